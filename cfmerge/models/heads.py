"""Heads: the output layers of a task, by their names, and what counts as one where the models do not share it."""

import re
from collections.abc import Iterable, Mapping

from cfmerge.models.layouts import Shape

HEAD = re.compile(
    r"(^|[./])(classifier\w*|score|qa_outputs|(seq|multi)_relationship|cls|head|heads|out_proj_head"
    r"|fc_head|logits|summary|classification_head|span_predictor|regressor|lm_classifier"
    r"|last_linear|head_dist|classif|AuxLogits|aux_?logits|aux\d*|aux_classifier)([./]|$)"
)
IN_THE_TRUNK = re.compile(
    r"(^|[./])(vision_tower|vision_model|visual|text_model)[./]head[./]"  # SigLIP's pooling and projection
    r"|(^|[./])head[./](norm|pre_logits)[./]"  # timm's, before the last layer
)
# ResNet's `fc`, at the top of the model or below wrappers alone; deeper ones belong to a block.
TOP_FC = re.compile(r"^((module|model|net|network|backbone|base_model|timm_model|\w*net\w*)[./])*_?fc[./](\w+)$")
NUMBERED = re.compile(r"^(.*?(?:^|[./])classifier[./])(\d+)[./]")
# Part of the trunk where all models have them in one shape.
UNSHARED = re.compile(
    r"(^|[./])(pooler|lm_head|\w+_head|pre_classifier|vocab_(transform|layer_norm|projector)|lm_loss|pred_layer"
    r"|(lm|mask)_predictions|generator_(predictions|lm_head)|discriminator_predictions|(class|bbox)_embed|classifier\w*)([./]|$)"
)
VOCABULARY = re.compile(
    r"(embed_tokens|word_embeddings|wte|lm_head|shared|predictions\.(decoder|bias)|embed_in|embed_out)"
)


def is_head(name: str, names: Iterable[str] | Mapping[str, object] = ()) -> bool:
    """Whether a tensor is a task's own output layer.

    Args:
        name: the tensor's.
        names: the whole model's: the dense layers of VGG's `classifier.0`, `.3`, `.6` are the trunk's but the last.
    """
    numbered = NUMBERED.search(name)
    if numbered:
        beside = [int(m[2]) for other in names if (m := NUMBERED.search(other)) and m[1] == numbered[1]]
        return int(numbered[2]) >= max(beside, default=0)
    return bool(HEAD.search(name) or TOP_FC.search(name)) and not IN_THE_TRUNK.search(name)


def may_be_head(name: str) -> bool:
    """Whether a tensor that not all models have, or not in one shape, is a head's."""
    return is_head(name) or bool(UNSHARED.search(name))


def is_output_layer(name: str, ours: Shape, theirs: Shape) -> bool:
    """Whether two shapes of a tensor differ as those of a last layer do: in the number of outputs, outside the layers.

    Vocabularies differ so too, and are none.
    """
    in_layers = any(part.isdigit() for part in re.split(r"[./]", name)[:-2])
    leaf = {1: "bias", 2: "weight"}.get(len(ours))
    outputs = len(ours) == len(theirs) and ours[1:] == theirs[1:] and ours[:1] != theirs[:1]
    table = re.search(r"embed|token", name) or VOCABULARY.search(name)
    return outputs and not in_layers and not table and re.split(r"[./]", name)[-1] == leaf
