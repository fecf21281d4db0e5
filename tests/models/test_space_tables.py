"""Permutation spaces by names: each table proven by transformers, on tiny models whose neurons change their order."""

import re

import numpy as np
import pytest
import torch
import transformers
from space_models import (
    GROUPED,
    IMAGE,
    TEXT,
    TorchvisionResNet,
    config_of,
    headers_of,
    outputs,
    saved,
    tensors_of,
    with_tensors,
)  # fmt: skip

from cfmerge.align import permute, permute_tensor, random_permutations
from cfmerge.models.space_tables import describe, read_table, spaces_of

ENCODER = "hidden heads{l} heads{l}.qk heads{l}.v mlp{l}"
MIXTURE = "hidden kv{l} kv{l}.q kv{l}.v"
DECODER = f"{MIXTURE} mlp{{l}}"
HEADS_OF_8 = {**GROUPED, "head_dim": 8}
BIASED = {**GROUPED, "attention_bias": True, "mlp_bias": True}
EXPERTS = {"num_experts": 2, "num_experts_per_tok": 2, "moe_intermediate_size": 6}
SMALL_BERT = {"vocab_size": 20, "dim": 16, "n_layers": 2, "n_heads": 4, "hidden_dim": 24, "pad_token_id": 0}
GPT2 = {"vocab_size": 20, "n_embd": 16, "n_layer": 2, "n_head": 4, "n_positions": 32}
T5 = {"vocab_size": 20, "d_model": 16, "d_kv": 5, "num_heads": 4, "d_ff": 24, "num_layers": 2,
      "relative_attention_num_buckets": 4, "relative_attention_max_distance": 8}  # fmt: skip
SHARED_HEADS = "hidden heads heads.qk{l} heads.v{l} mlp{l}"
STACKS = "hidden cross{l} cross{l}.qk cross{l}.v " + " ".join(
    f"{stack}/heads {stack}/heads.qk{{l}} {stack}/heads.v{{l}} {stack}/mlp{{l}}" for stack in ("encoder", "decoder")
)
STAGES = {"image_size": 32, "hidden_sizes": [8, 12], "depths": [2, 2], "num_labels": 3}
BOTTLENECKS = {**STAGES, "hidden_sizes": [16, 24], "layer_type": "bottleneck", "embedding_size": 6}
UNTIED = {**TEXT, "tie_word_embeddings": False}
MODELS = [  # (class, its config, the spaces)
    ("BertForSequenceClassification", TEXT, f"{ENCODER} pooler"),
    ("BertForMaskedLM", TEXT, ENCODER),
    ("BertForMaskedLM", UNTIED, ENCODER),
    ("BertForPreTraining", TEXT, f"{ENCODER} pooler"),
    ("BertForTokenClassification", TEXT, ENCODER),
    ("RobertaForSequenceClassification", TEXT, f"{ENCODER} classifier"),
    ("RobertaForMaskedLM", TEXT, ENCODER),
    ("XLMRobertaForQuestionAnswering", TEXT, ENCODER),
    ("ElectraForPreTraining", {**TEXT, "embedding_size": 8}, f"{ENCODER} embedding discriminator"),
    ("ElectraForSequenceClassification", {**TEXT, "embedding_size": 16}, f"{ENCODER} classifier"),
    ("ElectraForMaskedLM", {**TEXT, "embedding_size": 8}, f"{ENCODER} embedding"),
    ("LlamaForCausalLM", GROUPED, DECODER),
    ("LlamaForCausalLM", {**BIASED, "tie_word_embeddings": True}, DECODER),
    ("LlamaForSequenceClassification", {**TEXT, "num_labels": 3}, DECODER),
    ("MistralForCausalLM", GROUPED, DECODER),
    ("Qwen2ForCausalLM", GROUPED, DECODER),
    ("Qwen3ForCausalLM", HEADS_OF_8, DECODER),
    ("GemmaForCausalLM", {**HEADS_OF_8, "tie_word_embeddings": True}, DECODER),
    ("Gemma2ForCausalLM", HEADS_OF_8, DECODER),
    ("Gemma3ForCausalLM", HEADS_OF_8, DECODER),
    ("Phi3ForCausalLM", GROUPED, DECODER),
    ("OlmoForCausalLM", GROUPED, DECODER),
    ("Olmo2ForCausalLM", GROUPED, DECODER),
    ("GraniteForCausalLM", BIASED, DECODER),
    ("MixtralForCausalLM", {**GROUPED, "num_local_experts": 2}, f"{MIXTURE} mlp{{l}}:0 mlp{{l}}:1"),
    ("Qwen3MoeForCausalLM", {**HEADS_OF_8, **EXPERTS, "decoder_sparse_step": 2}, f"{MIXTURE} mlp0 mlp1:0 mlp1:1"),
    ("Qwen2MoeForCausalLM", {**GROUPED, **EXPERTS, "shared_expert_intermediate_size": 10},
     f"{MIXTURE} mlp{{l}}:0 mlp{{l}}:1 mlp{{l}}:shared"),
    ("DistilBertForMaskedLM", SMALL_BERT, ENCODER),
    ("DistilBertForSequenceClassification", {**SMALL_BERT, "sinusoidal_pos_embds": True}, f"{ENCODER} classifier"),
    ("MPNetForMaskedLM", TEXT, SHARED_HEADS),
    ("MPNetForSequenceClassification", TEXT, f"{SHARED_HEADS} classifier"),
    ("GPT2LMHeadModel", GPT2, ENCODER),
    ("GPT2ForSequenceClassification", {**GPT2, "num_labels": 3, "pad_token_id": 0}, ENCODER),
    ("GPTNeoXForCausalLM", {**UNTIED, "rotary_pct": 0.5}, "hidden heads{l} mlp{l}"),
    ("T5ForConditionalGeneration", T5, STACKS),
    ("MT5ForConditionalGeneration", {**T5, "feed_forward_proj": "gated-gelu", "tie_word_embeddings": False}, STACKS),
    ("ViTForImageClassification", IMAGE, ENCODER),
    ("DeiTForImageClassificationWithTeacher", IMAGE, ENCODER),
    ("Dinov2ForImageClassification", {**IMAGE, "use_swiglu_ffn": True}, ENCODER),
    ("CLIPModel", {"text_config": TEXT, "vision_config": {**IMAGE, "hidden_size": 24, "num_attention_heads": 3}},
     " ".join(f"{tower}/{space}" for tower in ("text", "vision") for space in ENCODER.split())),
    ("CLIPForImageClassification", {"vision_config": IMAGE},
     " ".join(f"vision/{space}" for space in ENCODER.split())),
    ("ResNetForImageClassification", {**STAGES, "layer_type": "basic", "embedding_size": 8},
     "stage1 stage2 first0:0 first0:1 first1:0 first1:1"),
    ("ResNetForImageClassification", BOTTLENECKS,
     "stage0 stage1 stage2 first0:0 first0:1 first1:0 first1:1 second0:0 second0:1 second1:0 second1:1"),
    ("ConvNextForImageClassification", {**STAGES, "num_stages": 2, "image_size": 16},
     "stage0 stage1 mlp0:0 mlp0:1 mlp1:0 mlp1:1"),
]  # fmt: skip
CONFIGS = {"Gemma3ForCausalLM": "Gemma3TextConfig"}


@pytest.fixture(scope="module", autouse=True)
def quiet_clients():
    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()


def moved(spaces, seed=0):
    """Random permutations, none of which keeps the order."""
    return {
        name: np.where(np.all(order == np.sort(order), axis=-1, keepdims=True), np.roll(order, 1, axis=-1), order)
        for name, order in random_permutations(spaces, seed).items()
    }


def difference(found, expected):
    return np.abs(found - expected).max() / np.abs(expected).max()


@pytest.mark.parametrize(("kind", "settings", "names"), MODELS)
def test_a_model_whose_spaces_are_permuted_computes_the_same(tmp_path, kind, settings, names):
    path = saved(tmp_path / "model", kind, CONFIGS.get(kind), **settings)
    tensors, spaces = tensors_of(path), spaces_of(headers_of(path), config_of(path))
    assert set(spaces.sizes) == {name.format(l=layer) for name in names.split() for layer in range(2)}
    expected = outputs(path, kind)
    permutations = moved(spaces)
    permuted = permute(spaces, tensors, permutations)
    for name, axes in spaces.axes.items():
        sizes = [spaces.sizes[space] for axis in axes for space in axis.spaces]
        assert np.array_equal(permuted[name], tensors[name]) == (max(sizes, default=1) == 1), name
    assert difference(outputs(with_tensors(path, tmp_path / "permuted", permuted), kind), expected) < 1e-5
    for name, order in permutations.items():  # a single matrix of a space is not enough
        if spaces.sizes[name] > 1 and not re.search(r"[a-z]1", name.replace("stage", "")):  # of the first layer
            use = next(use.tensor for use in spaces.uses(name) if tensors[use.tensor].ndim > 1
                       and any(name in axis.spaces for axis in spaces.axes[use.tensor]))  # fmt: skip
            one = {**tensors, use: permute_tensor(spaces, use, tensors[use], {name: order})}
            assert difference(outputs(with_tensors(path, tmp_path / "one", one), kind), expected) > 1e-4, name


@pytest.mark.parametrize("wide", [False, True])
def test_a_resnet_of_torchvision_whose_spaces_are_permuted_computes_the_same(wide):
    model = TorchvisionResNet(wide)
    tensors = {name: tensor.numpy().copy() for name, tensor in model.state_dict().items()}
    spaces = spaces_of({name: tensor.shape for name, tensor in tensors.items()}, {})
    inner = {f"first{stage}:{block}" for stage in range(1, 5) for block in range(2)}
    stages = {f"stage{stage}" for stage in range(0 if wide else 1, 5)}
    inner |= {name.replace("first", "second") for name in inner if wide}
    assert set(spaces.names) == stages | inner
    x = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    expected = model(x).detach().numpy()
    other = TorchvisionResNet(wide)
    permuted = permute(spaces, tensors, moved(spaces))
    other.load_state_dict({name: torch.tensor(tensor) for name, tensor in permuted.items()})
    assert not np.array_equal(permuted["layer2.0.conv1.weight"], tensors["layer2.0.conv1.weight"])
    assert difference(other(x).detach().numpy(), expected) < 1e-9


@pytest.mark.parametrize(
    ("kind", "settings"),
    [("ViTForImageClassification", IMAGE), ("MixtralForCausalLM", {**GROUPED, "num_local_experts": 2})],
)
def test_names_in_memory_are_known_too(tmp_path, kind, settings):
    """Those of transformers 5, which packs experts into one array: they share one order."""
    saved(tmp_path / "model", kind, **settings)
    model = getattr(transformers, kind).from_pretrained(tmp_path / "model", experts_implementation="eager")
    model = model.double().eval()
    x = torch.randn(2, 3, 8, 8, dtype=torch.float64) if settings is IMAGE else torch.randint(3, 20, (2, 7))
    tensors = {name: tensor.numpy().copy() for name, tensor in model.state_dict().items()}
    spaces = spaces_of({name: tensor.shape for name, tensor in tensors.items()}, model.config.to_dict())
    expected = model(x).logits.detach().numpy()
    permuted = permute(spaces, tensors, moved(spaces))
    model.load_state_dict({name: torch.tensor(tensor) for name, tensor in permuted.items()})
    assert {"mlp0", "mlp1"} <= set(spaces.names)
    assert all(any(axis.spaces for axis in axes) for name, axes in spaces.axes.items() if name.endswith("proj"))
    assert difference(model(x).logits.detach().numpy(), expected) < 1e-5


def test_each_space_of_a_model_may_be_permuted_alone(tmp_path):
    path = saved(tmp_path / "model", "Qwen2ForCausalLM", **GROUPED)
    tensors, spaces = tensors_of(path), spaces_of(headers_of(path), config_of(path))
    expected = outputs(path, "Qwen2ForCausalLM")
    for name, order in moved(spaces).items():
        permuted = permute(spaces, tensors, {name: order})
        changed = [other for other in tensors if not np.array_equal(permuted[other], tensors[other])]
        assert len(changed) > 1, name
        found = outputs(with_tensors(path, tmp_path / "permuted", permuted), "Qwen2ForCausalLM")
        assert difference(found, expected) < 1e-5, name


@pytest.mark.parametrize(
    ("kind", "settings", "lines"),
    [
        ("LlamaForCausalLM", GROUPED, {"layers.{l}.post_attention_layernorm.weight": "-"}),
        ("LlamaForCausalLM", GROUPED, {"norm.weight": "-"}),
        ("LlamaForCausalLM", GROUPED, {"layers.{l}.self_attn.q_proj.weight": "kv{l} kv{l}.q kv{l}.k, in hidden",
                                       "layers.{l}.self_attn.k_proj.weight": "kv{l} kv{l}.k, in hidden"}),
        ("LlamaForCausalLM", {**BIASED, "tie_word_embeddings": True}, {"layers.{l}.self_attn.v_proj.bias": "-"}),
        ("BertForMaskedLM", TEXT, {"embeddings.token_type_embeddings.weight": "-, -"}),
        ("BertForMaskedLM", TEXT, {"encoder.layer.{l}.attention.self.key.bias": "-",
                                   "encoder.layer.{l}.attention.self.query.bias": "-"}),
    ],
)  # fmt: skip
def test_a_wrong_table_changes_what_the_model_computes(tmp_path, kind, settings, lines):
    path = saved(tmp_path / "model", kind, **settings)
    table = read_table({"like": kind.partition("For")[0].lower(), "spaces": lines})
    spaces = describe(headers_of(path), config_of(path), table).spaces
    wrong = with_tensors(path, tmp_path / "wrong", permute(spaces, tensors_of(path), moved(spaces)))
    assert difference(outputs(wrong, kind), outputs(path, kind)) > 1e-3


@pytest.mark.parametrize(("kind", "settings"), [("BertModel", TEXT), ("LlamaModel", GROUPED), ("ViTModel", IMAGE)])
def test_the_hidden_states_of_a_model_without_a_head_come_out_permuted(tmp_path, kind, settings):
    path = saved(tmp_path / "model", kind, **settings)
    described = describe(headers_of(path), config_of(path))
    permutations = moved(described.spaces)
    other = with_tensors(path, tmp_path / "other", permute(described.spaces, tensors_of(path), permutations))
    assert "pooler" not in described.spaces.sizes
    assert [note for note in described.notes if "'pooler'" in note and "output" in note] or kind == "LlamaModel"
    assert difference(outputs(other, kind), outputs(path, kind)[..., permutations["hidden"]]) < 1e-5


@pytest.mark.parametrize("prefix", ["", "bert.", "0.auto_model.", "module.", "module.bert.", "base_model.model.bert."])
def test_names_may_have_a_prefix(tmp_path, prefix):
    path = saved(tmp_path / "model", "BertForSequenceClassification", **TEXT)
    headers, spaces = headers_of(path), spaces_of(headers_of(path), config_of(path))
    outer = prefix.removesuffix("bert.")
    renamed = {
        name: prefix + name.removeprefix("bert.") if name.startswith("bert.") else outer + name for name in headers
    }
    other = spaces_of({renamed[name]: shape for name, shape in headers.items()}, config_of(path))
    assert other.table() == {renamed[name]: line for name, line in spaces.table().items()}
