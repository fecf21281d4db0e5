"""The names of transformers' Flax classes (up to version 4), beside those of its PyTorch classes.

The names are the same but for the last part, so that a table names modules and says what each one is:

    dense      weight (out, in)           kernel (in, out)
    conv1d     weight (in, out)           kernel (out, in)       GPT-2's; in Flax it is stored transposed
    conv       weight (out, in, h, w)     kernel (h, w, in, out)
    norm       weight                     scale
    embedding  weight                     embedding
    param      a tensor by itself, the same on both sides
"""

from cfmerge.models.names.rules import Family, Rule, table

KINDS = {
    "dense": ("weight <-> kernel : o i -> i o", "bias <-> bias"),
    "conv1d": ("weight <-> kernel : i o -> o i", "bias <-> bias"),
    "conv": ("weight <-> kernel : o i h w -> h w i o", "bias <-> bias"),
    "norm": ("weight <-> scale", "bias <-> bias"),
    "embedding": ("weight <-> embedding",),
}


def modules(text: str) -> tuple[Rule, ...]:
    """The rules of modules, one a line: their names, and what they are."""
    lines = []
    for module, kind in (line.split() for line in text.strip().splitlines()):
        other = module.replace(".", "/")
        for leaf in KINDS.get(kind, ()):
            left, right = leaf.split(" <-> ")
            lines.append(f"{module}.{left} <-> {other}/{right}")
        lines += [f"{module} <-> {other}"] if kind == "param" else []
    return table("\n".join(lines))


OLD = {"gamma": "weight", "beta": "bias"}  # norms in files that began as TensorFlow's
TRANSFORMER = """
    [{0}.]embeddings.{{x=word|position|token_type}}_embeddings                          embedding
    [{0}.]embeddings.LayerNorm                                                          norm
    [{0}.]encoder.layer.{{l}}.{{a=attention|crossattention}}.self.{{x=query|key|value}} dense
    [{0}.]encoder.layer.{{l}}.{{a=attention|crossattention}}.output.dense               dense
    [{0}.]encoder.layer.{{l}}.{{a=attention|crossattention}}.output.LayerNorm           norm
    [{0}.]encoder.layer.{{l}}.{{x=intermediate|output}}.dense                           dense
    [{0}.]encoder.layer.{{l}}.output.LayerNorm                                          norm
    [{0}.]pooler.dense                                                                  dense
"""
BERT = modules(
    TRANSFORMER.format("bert").rstrip()
    + """
    cls.predictions.transform.dense      dense
    cls.predictions.transform.LayerNorm  norm
    cls.predictions.bias                 param
    cls.predictions.decoder              dense
    cls.seq_relationship                 dense
    classifier                           dense
    qa_outputs                           dense
"""
)
ROBERTA = modules(
    TRANSFORMER.format("roberta").rstrip()
    + """
    lm_head.dense                        dense
    lm_head.layer_norm                   norm
    lm_head.bias                         param
    lm_head.decoder                      dense
    classifier.{x=dense|out_proj}        dense
    classifier                           dense
    qa_outputs                           dense
"""
)
GPT2 = modules("""
    [transformer.]{x=wte|wpe}                                       embedding
    [transformer.]h.{l}.{x=ln_1|ln_2|ln_cross_attn}                 norm
    [transformer.]h.{l}.attn.{x=c_attn|c_proj}                      conv1d
    [transformer.]h.{l}.crossattention.{x=c_attn|q_attn|c_proj}     conv1d
    [transformer.]h.{l}.mlp.{x=c_fc|c_proj}                         conv1d
    [transformer.]ln_f                                              norm
    lm_head                                                         dense
""")
VIT = modules("""
    [vit.]embeddings.{x=cls_token|position_embeddings}              param
    [vit.]embeddings.patch_embeddings.projection                    conv
    [vit.]encoder.layer.{l}.attention.attention.{x=query|key|value} dense
    [vit.]encoder.layer.{l}.attention.output.dense                  dense
    [vit.]encoder.layer.{l}.{x=intermediate|output}.dense           dense
    [vit.]encoder.layer.{l}.layernorm_{x=before|after}              norm
    [vit.]layernorm                                                 norm
    [vit.]pooler.dense                                              dense
    classifier                                                      dense
""")
CLIP = modules("""
    text_model.embeddings.{x=token|position}_embedding                                 embedding
    vision_model.embeddings.position_embedding                                         embedding
    vision_model.embeddings.class_embedding                                            param
    vision_model.embeddings.patch_embedding                                            conv
    {t=text|vision}_model.encoder.layers.{l}.self_attn.{x=q_proj|k_proj|v_proj|out_proj} dense
    {t=text|vision}_model.encoder.layers.{l}.mlp.{x=fc1|fc2}                           dense
    {t=text|vision}_model.encoder.layers.{l}.layer_norm{x=1|2}                         norm
    text_model.final_layer_norm                                                        norm
    vision_model.{x=pre_layrnorm|post_layernorm}                                       norm
    {x=visual|text}_projection                                                         dense
    logit_scale                                                                        param
""")
T5 = modules("""
    shared                                                                             embedding
    {c=encoder|decoder}.block.{l}.layer.0.SelfAttention.{x=q|k|v|o}                    dense
    {c=encoder|decoder}.block.{l}.layer.0.SelfAttention.relative_attention_bias        embedding
    decoder.block.{l}.layer.1.EncDecAttention.{x=q|k|v|o}                              dense
    {c=encoder|decoder}.block.{l}.layer.{n=1|2}.DenseReluDense.{x=wi|wi_0|wi_1|wo}     dense
    {c=encoder|decoder}.block.{l}.layer.{n=0|1|2}.layer_norm.weight                    param
    {c=encoder|decoder}.final_layer_norm.weight                                        param
    lm_head                                                                            dense
""")

FAMILIES = {
    "bert": Family("HF-Flax", BERT, spellings=OLD),
    "roberta": Family("HF-Flax", ROBERTA),
    "gpt2": Family("HF-Flax", GPT2),
    "vit": Family("HF-Flax", VIT),
    "clip": Family("HF-Flax", CLIP),
    "t5": Family("HF-Flax", T5),
}
