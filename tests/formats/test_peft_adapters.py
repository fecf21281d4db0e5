"""Adapters that peft writes: each kind of part is, to rounding, what peft's `merge_and_unload` makes of it."""

import copy
import json

import numpy as np
import pytest
import torch
from laid import laid
from peft_models import adapter, saved, tiny
from safetensors.numpy import load_file, save_file

from cfmerge.errors import CfmergeError
from cfmerge.formats import open_checkpoint
from cfmerge.formats.adapters import AdapterSource, is_adapter
from cfmerge.models.deltas import Dense, Factors

UP, DOWN = "mlp.experts.gate_up_proj", "mlp.experts.down_proj"
PAIR = {"target_modules": ["fc", "square"], "r": 2, "lora_alpha": 3}
# config: (of LoraConfig, {the end of a tensor's name: the rank of its factors, or None where it is dense})
CONFIGS = {
    "plain": (
        PAIR | {"target_modules": ["fc", "square", "plain"]},
        {"fc.weight": 2, "square.weight": 2, "plain.weight": 2},
    ),
    "rank-stabilised": (PAIR | {"use_rslora": True}, {"fc.weight": 2, "square.weight": 2}),
    "patterns": (
        PAIR | {"rank_pattern": {"fc": 3, "s.*": 1}, "alpha_pattern": {"square": 7}},
        {"fc.weight": 3, "square.weight": 1},
    ),
    "convolutions": (
        PAIR | {"target_modules": ["conv", "point", "conv_line"]},
        {"conv.weight": 2, "point.weight": 2, "conv_line.weight": 2},
    ),
    "transposed": (
        PAIR | {"target_modules": ["c_fc", "c_proj"], "fan_in_fan_out": True},
        {"mlp.c_fc.weight": 2, "mlp.c_proj.weight": 2},
    ),
    "an embedding": (PAIR | {"target_modules": ["embed_tokens"]}, {"embed_tokens.weight": 2}),
    "dora": (
        PAIR | {"target_modules": ["fc", "square", "conv", "conv_line", "embed_tokens"], "use_dora": True},
        dict.fromkeys(("fc.weight", "square.weight", "conv.weight", "conv_line.weight", "embed_tokens.weight")),
    ),
    "dora transposed": (
        PAIR | {"target_modules": ["c_fc", "c_proj"], "use_dora": True, "fan_in_fan_out": True},
        {"mlp.c_fc.weight": None, "mlp.c_proj.weight": None},
    ),
    "biases of factors": (
        PAIR | {"target_modules": ["fc", "conv"], "lora_bias": True},
        {"fc.weight": 2, "fc.bias": None, "conv.weight": 2, "conv.bias": None},
    ),
    "biases of targets": (
        PAIR | {"bias": "lora_only"},
        {"fc.weight": 2, "fc.bias": None, "square.weight": 2, "square.bias": None},
    ),
    "modules by suffix": (
        PAIR | {"modules_to_save": ["norm", "score"]},
        {"fc.weight": 2, "square.weight": 2}
        | dict.fromkeys(f"{module}.{leaf}" for module in ("norm", "post_norm", "score") for leaf in ("weight", "bias")),
    ),
    "tokens": (
        PAIR | {"trainable_token_indices": [4, 1]},
        {"embed_tokens.weight": None, "fc.weight": 2, "square.weight": 2},
    ),
    "tokens by module": (
        PAIR | {"trainable_token_indices": {"embed_tokens": [1, 4]}},
        {"embed_tokens.weight": None, "fc.weight": 2, "square.weight": 2},
    ),
    "attention": (PAIR | {"target_modules": ["attn"]}, {"attn.in_proj_weight": 2, "attn.out_proj.weight": 2}),
    "packed experts": (
        PAIR | {"target_modules": [], "target_parameters": [UP, DOWN], "rank_pattern": {DOWN: 3}},
        {UP: None, DOWN: None},
    ),
    "packed experts, one of two": (
        PAIR | {"target_modules": ["fc"], "target_parameters": ["experts.down_proj"]},
        {"fc.weight": 2, DOWN: None},
    ),
}
TURNED = ["packed experts", "packed experts, one of two"]


@pytest.fixture(scope="module")
def bases(tmp_path_factory):
    """The tiny model and its directory; a second one, whose packed experts are stored (in, out)."""
    models = [tiny(turned=turned) for turned in (False, True)]
    return [(model, saved(model, tmp_path_factory.mktemp("bases") / "base")) for model in models]


def close(ours, theirs):
    np.testing.assert_allclose(ours, theirs, rtol=0, atol=1e-6 * max(np.abs(theirs).max(), 1e-30))


def whole(source, base, name, first=0, count=None):
    """The expert's tensor, from its delta."""
    delta = source.delta(name, first, count)
    if isinstance(delta, Dense):
        return delta.tensor
    stored = base.read(name, first, count)
    return stored + delta.product.reshape(stored.shape)


@pytest.mark.parametrize(("case", "turned"), [*((case, 0) for case in CONFIGS), *((case, 1) for case in TURNED)])
def test_an_adapter_is_what_peft_merges(bases, tmp_path, case, turned):
    model, place = bases[turned]
    config, ranks = CONFIGS[case]
    merged = adapter(model, tmp_path, **config)
    base = open_checkpoint(place)
    assert is_adapter(tmp_path)
    source = AdapterSource(tmp_path, base)
    assert {name: source.rank(name) for name in source.tensors if source.rank(name) != 0} == ranks
    assert source.tensors.keys() == merged.keys()
    for name, tensor in merged.items():
        close(whole(source, base, name), tensor)
        close(source.read(name), tensor)
        assert source.tensors[name].shape == tensor.shape
        for first, count in ((tensor.size // 3, tensor.size // 2), (tensor.size - 1, 1)):
            close(whole(source, base, name, first, count), tensor.reshape(-1)[first : first + count])
        delta = source.delta(name)
        assert (delta.right.shape[0] if isinstance(delta, Factors) else None) == source.rank(name)


def test_all_biases(bases, tmp_path):
    model, place = bases[0]
    merged = adapter(model, tmp_path, **PAIR, bias="all")
    source = AdapterSource(tmp_path, open_checkpoint(place))
    for name, tensor in merged.items():
        close(source.read(name), tensor)


def test_adapters_in_half_precision_have_factors_in_single(bases, tmp_path):
    model, place = bases[0]
    adapter(model, tmp_path, **PAIR)
    file = tmp_path / "adapter_model.safetensors"
    save_file({name: tensor.astype(np.float16) for name, tensor in load_file(file).items()}, file)
    delta = AdapterSource(tmp_path, open_checkpoint(place)).delta("fc.weight")
    assert delta.left.dtype == delta.right.dtype == np.float32


@pytest.mark.parametrize("case", ["plain", "transposed", "an embedding", "convolutions"])
def test_factors_tell_their_scale(bases, tmp_path, case):
    """Methods that take the factors themselves need those of the file, by the root of the scale."""
    model, place = bases[0]
    config, ranks = CONFIGS[case]
    adapter(model, tmp_path, **config)
    source = AdapterSource(tmp_path, open_checkpoint(place))
    stored = [np.linalg.norm(tensor) for tensor in load_file(tmp_path / "adapter_model.safetensors").values()]
    for name in ranks:
        delta = source.delta(name)
        assert delta.scale == 1.5
        for factor in delta.balanced:
            assert np.isclose(np.linalg.norm(factor) / np.sqrt(1.5), stored, rtol=1e-5).any()


def test_a_name_of_the_adapter_in_the_names_of_its_factors(bases, tmp_path):
    model, place = bases[0]
    merged = adapter(model, tmp_path, **PAIR)
    file = tmp_path / "adapter_model.safetensors"
    named = {name.replace(".weight", ".default.weight"): tensor for name, tensor in load_file(file).items()}
    save_file(named, file)
    close(AdapterSource(tmp_path, open_checkpoint(place)).read("fc.weight"), merged["fc.weight"])
    named |= {name.replace("default", "other"): tensor for name, tensor in named.items()}
    save_file(named, file)
    with pytest.raises(CfmergeError, match="several adapters: 'default', 'other'"):
        AdapterSource(tmp_path, open_checkpoint(place))


def test_a_copy_of_the_embedding_beside_its_factors(bases, tmp_path):
    model, place = bases[0]
    adapter(model, tmp_path, target_modules=["embed_tokens"], r=2)
    file = tmp_path / "adapter_model.safetensors"
    table = model.embed_tokens.weight.detach().numpy()
    copy_of = "base_model.model.embed_tokens.base_layer.weight"
    save_file(load_file(file) | {copy_of: table}, file)
    base = open_checkpoint(place)
    assert AdapterSource(tmp_path, base).rank("embed_tokens.weight") == 2
    longer = np.concatenate([table, table[:2]])
    save_file(load_file(file) | {copy_of: longer}, file)
    with pytest.raises(CfmergeError, match=r"embed_tokens.weight.*\(13, 6\) in the base, \(11, 6\)"):
        AdapterSource(tmp_path, base)
    factor = "base_model.model.embed_tokens.lora_embedding_A"
    save_file(load_file(file) | {factor: np.ones((2, 13), np.float32)}, file)
    assert AdapterSource(tmp_path, base).tensors["embed_tokens.weight"].shape == (13, 6)  # a resized vocabulary


# --- files and configs that are refused --------------------------------------------------------------------------

REFUSED = {
    "ia3": ({"peft_type": "IA3"}, ["peft_type IA3", "LORA", "save_as_lora"]),
    "lokr": ({"peft_type": "PeftType.LOKR"}, ["peft_type LOKR"]),
    "pissa": ({"init_lora_weights": "pissa_niter_4"}, ["pissa_niter_4", "path_initial_model_for_weight_conversion"]),
    **{
        init: ({"init_lora_weights": init}, [init, "path_initial_model_for_weight_conversion"])
        for init in ("olora", "corda", "lora_ga", "loftq", "OLoRA")
    },
    "replication": ({"layer_replication": [[0, 2]]}, ["layer_replication"]),
    "alora": ({"alora_invocation_tokens": [1]}, ["alora_invocation_tokens", "no delta"]),
    **{
        key: ({key: True}, [key, "merge_and_unload"])
        for key in ("use_qalora", "use_bdlora", "kasa_config", "velora_config", "monteclora_config")
    },
    "arrow": ({"arrow_config": {"top_k": 1}}, ["arrow_config"]),
    "megatron": ({"megatron_config": {"a": 1}}, ["megatron_config"]),
    "rank of text": ({"r": "8"}, ["r must be a positive whole number", "'8'"]),
    "rank 0": ({"r": 0}, ["r must be a positive whole number"]),
    "alpha": ({"lora_alpha": None}, ["lora_alpha must be a number"]),
    "pattern": ({"rank_pattern": {"(": 2}}, ["rank_pattern", "regular expression"]),
    "list of patterns": ({"alpha_pattern": [1]}, ["alpha_pattern must be a mapping"]),
    "pattern of ranks": ({"rank_pattern": {"fc": 1.5}}, ["rank_pattern", "fc must be a positive whole number"]),
    "another rank": ({"r": 4}, ["lora_A", "expected rank 4", "found 2"]),
    "tokens": ({"trainable_token_indices": "1"}, ["trainable_token_indices must be lists"]),
}


@pytest.mark.parametrize("case", REFUSED)
def test_configs_that_are_refused(bases, tmp_path, case):
    change, words = REFUSED[case]
    model, place = bases[0]
    adapter(model, tmp_path, **PAIR)
    config = tmp_path / "adapter_config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | change))
    with pytest.raises(CfmergeError) as error:
        AdapterSource(tmp_path, open_checkpoint(place))
    for word in ["adapter_config.json", *words]:
        assert word in str(error.value)


def test_a_key_that_is_not_known_is_told(bases, tmp_path):
    model, place = bases[0]
    adapter(model, tmp_path, **PAIR)
    config = tmp_path / "adapter_config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"new_thing": 3}))
    source = AdapterSource(tmp_path, open_checkpoint(place))
    assert [note for note in source.notes if "new_thing: 3" in note and "not heeded" in note]


FC = "base_model.model.fc.lora_"


def spoiled(case):
    """Tensors that are put over the adapter's (None: taken out), and words of the error."""
    ones = np.ones
    return {
        "no B": ({f"{FC}B.weight": None}, ["'fc' has no lora_B", "fc.lora_A.weight", "fetch it again"]),
        "no A": ({f"{FC}A.weight": None}, ["'fc' has no lora_A"]),
        "B of another rank": ({f"{FC}B.weight": ones((10, 3), np.float32)}, ["lora_B", "(10, 3)", "does not fit"]),
        "no matrix": ({f"{FC}A.weight": ones(2, np.float32)}, ["no factors of a matrix"]),
        "other outputs": (
            {f"{FC}B.weight": ones((9, 2), np.float32)},
            ["'fc.weight'", "(10, 6) in the base, (9, 6)", "this base?"],
        ),
        "no such module": (
            {
                "base_model.model.gc.lora_A.weight": ones((2, 6), np.float32),
                "base_model.model.gc.lora_B.weight": ones((10, 2), np.float32),
            },
            ["gc.weight", "lacks", "did you mean 'fc.weight'", "partial: true"],
        ),
        "a strange part": ({f"{FC}diag": ones(2, np.float32)}, ["lora_diag", "not known"]),
        "a magnitude of other size": ({f"{FC}magnitude_vector": ones(6, np.float32)}, ["magnitude", "(6,)"]),
        "a grouped convolution": (
            {
                "base_model.model.conv.lora_A.weight": ones((2, 6, 3, 2), np.float32),
                "base_model.model.conv.lora_B.weight": ones((5, 2, 1, 1), np.float32),
            },
            ["conv.weight", "grouped convolution"],
        ),
        "a bias of another size": ({f"{FC}B.bias": ones(3, np.float32)}, ["fc.bias", "(10,) in the base", "(3,)"]),
    }[case]


@pytest.mark.parametrize(
    "case",
    [
        "no B",
        "no A",
        "B of another rank",
        "no matrix",
        "other outputs",
        "no such module",
        "a strange part",
        "a magnitude of other size",
        "a grouped convolution",
        "a bias of another size",
    ],
)
def test_files_that_are_refused(bases, tmp_path, case):
    change, words = spoiled(case)
    model, place = bases[0]
    adapter(model, tmp_path, **PAIR)
    file = tmp_path / "adapter_model.safetensors"
    tensors = load_file(file) | change
    save_file({name: tensor for name, tensor in tensors.items() if tensor is not None}, file)
    with pytest.raises(CfmergeError) as error:
        AdapterSource(tmp_path, open_checkpoint(place))
    for word in [str(file), *words]:
        assert word in str(error.value)


def test_damaged_directories(bases, tmp_path):
    model, place = bases[0]
    base = open_checkpoint(place)
    adapter(model, tmp_path / "cut", **PAIR)
    file = tmp_path / "cut" / "adapter_model.safetensors"
    file.write_bytes(file.read_bytes()[:-7])
    with pytest.raises(CfmergeError, match="truncated or corrupt"):
        AdapterSource(tmp_path / "cut", base)
    file.unlink()
    assert is_adapter(tmp_path / "cut")
    with pytest.raises(CfmergeError, match=r"no adapter_model\.safetensors"):
        AdapterSource(tmp_path / "cut", base)
    laid(tmp_path / "json", {"adapter_config.json": "{", "adapter_model.safetensors": {"x": np.ones(1)}})
    with pytest.raises(CfmergeError, match="not valid JSON"):
        AdapterSource(tmp_path / "json", base)


@pytest.mark.parametrize("count", [100, pytest.param(2000, marks=pytest.mark.long)])
def test_flipped_bits_are_an_error_or_other_numbers_in_the_same_tensors(bases, tmp_path, count):
    model, place = bases[0]
    adapter(model, tmp_path, **PAIR)
    base, file = open_checkpoint(place), tmp_path / "adapter_model.safetensors"
    content, rng = file.read_bytes(), np.random.default_rng(0)
    header = 8 + int.from_bytes(content[:8], "little")
    for _ in range(count):
        place_of_bit = int(rng.integers(header * 8))
        flipped = bytearray(content)
        flipped[place_of_bit // 8] ^= 1 << place_of_bit % 8
        file.write_bytes(flipped)
        try:
            source = AdapterSource(tmp_path, base)
        except CfmergeError:
            continue
        for name in source.tensors:
            source.delta(name)


def test_rows_of_tokens_that_the_base_lacks(bases, tmp_path):
    model, place = bases[0]
    adapter(model, tmp_path, **PAIR, trainable_token_indices=[1, 4])
    config = tmp_path / "adapter_config.json"
    for indices, word in (([1, 11], "up to 11"), ([1, 2, 3], "names 3 tokens")):
        config.write_text(json.dumps(json.loads(config.read_text()) | {"trainable_token_indices": indices}))
        with pytest.raises(CfmergeError, match=word):
            AdapterSource(tmp_path, open_checkpoint(place))


def test_a_square_matrix_is_transposed_as_its_family_is_though_the_config_says_no(tmp_path):
    """peft's one flag stands for the module that was wrapped last, which may be the output layer."""
    from peft import LoraConfig, get_peft_model
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    model = GPT2LMHeadModel(GPT2Config(n_embd=8, n_head=2, n_layer=1, vocab_size=13, n_positions=10))
    base = {name: tensor.clone() for name, tensor in model.state_dict().items() if name != "lm_head.weight"}
    config = {"model_type": "gpt2", "tie_word_embeddings": True}
    laid(tmp_path / "base", {"model.safetensors": {n: t.numpy() for n, t in base.items()}, "config.json": config})
    tuned = get_peft_model(copy.deepcopy(model), LoraConfig(target_modules=["c_proj", "lm_head"], r=2))
    with torch.no_grad():
        for parameter in (p for p in tuned.parameters() if p.requires_grad):
            parameter.copy_(torch.randn_like(parameter))
    tuned.save_pretrained(tmp_path / "ad")
    assert json.loads((tmp_path / "ad" / "adapter_config.json").read_text())["fan_in_fan_out"] is False
    merged = tuned.merge_and_unload().state_dict()
    source = AdapterSource(tmp_path / "ad", open_checkpoint(tmp_path / "base"))
    assert source.rank("transformer.h.0.attn.c_proj.weight") == source.rank("transformer.wte.weight") == 2
    for name in base:
        close(source.read(name), merged[name].numpy())
    told = "'lm_head.weight' and 'transformer.wte.weight' are one tensor"
    assert any(told in note for note in source.notes)


def tuned_gpt2(tmp_path, **config):
    """A tiny GPT-2's directory, and its adapter's; the adapter's model."""
    from peft import LoraConfig, get_peft_model
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    size = {"n_embd": 8, "n_head": 2, "n_layer": 1, "vocab_size": 13, "n_positions": 10}
    model = GPT2LMHeadModel(GPT2Config(**size, bos_token_id=0, eos_token_id=0))
    model.save_pretrained(tmp_path / "base")
    tuned = get_peft_model(copy.deepcopy(model), LoraConfig(r=2, **config))
    with torch.no_grad():
        for parameter in (p for p in tuned.parameters() if p.requires_grad):
            parameter.copy_(torch.randn_like(parameter))
    tuned.save_pretrained(tmp_path / "ad")
    return tuned


def test_factors_that_are_tied_count_once_as_the_model_runs(tmp_path):
    tied = {"target_modules": ["wte", "lm_head"], "ensure_weight_tying": True}
    tuned = tuned_gpt2(tmp_path, **tied)
    source = AdapterSource(tmp_path / "ad", open_checkpoint(tmp_path / "base"))
    assert source.rank("transformer.wte.weight") == 2
    table = torch.tensor(source.read("transformer.wte.weight"))
    tokens = torch.arange(13)
    close(tuned.base_model.model.transformer.wte(tokens).detach().numpy(), table.numpy())
    close(tuned.base_model.model.lm_head(torch.eye(8)).detach().numpy(), table.T.numpy())


@pytest.mark.parametrize("tied", [False, True])
def test_a_table_of_its_own_that_the_base_ties(tmp_path, tied):
    tuned = tuned_gpt2(tmp_path, target_modules=["c_attn"], modules_to_save=["wte"], ensure_weight_tying=tied)
    base = open_checkpoint(tmp_path / "base")
    if not tied:
        with pytest.raises(CfmergeError, match=r"of its own.*are one tensor: store both in the base"):
            AdapterSource(tmp_path / "ad", base)
        return
    source = AdapterSource(tmp_path / "ad", base)
    close(source.read("transformer.wte.weight"), tuned.merge_and_unload().transformer.wte.weight.detach().numpy())


def test_a_head_that_the_base_lacks_is_the_experts_own(tmp_path):
    from peft import LoraConfig, get_peft_model
    from transformers import BertConfig, BertForSequenceClassification

    size = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 12}
    model = BertForSequenceClassification(BertConfig(**size, vocab_size=13))
    model.bert.save_pretrained(tmp_path / "base")  # whose names do not begin with `bert.`
    get_peft_model(model, LoraConfig(target_modules=["query"], r=2, task_type="SEQ_CLS")).save_pretrained(
        tmp_path / "ad"
    )
    base = open_checkpoint(tmp_path / "base")
    source = AdapterSource(tmp_path / "ad", base)
    assert source.tensors.keys() - base.tensors.keys() == {"classifier.weight", "classifier.bias"}
    assert [source.rank(name) for name in base.tensors if "query.weight" in name] == [2]
    assert source.read("classifier.weight").shape == (2, 8)


def test_packed_experts_over_a_base_that_stores_them_one_by_one(tmp_path):
    from peft import LoraConfig, get_peft_model
    from transformers import MixtralConfig, MixtralForCausalLM

    torch.manual_seed(0)
    size = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 2}
    config = MixtralConfig(**size, intermediate_size=12, vocab_size=13, num_local_experts=3)
    model = MixtralForCausalLM(config)
    model.save_pretrained(tmp_path / "base")
    packed = LoraConfig(target_modules=["q_proj"], target_parameters=[UP, DOWN], r=2, lora_alpha=3)
    tuned = get_peft_model(model, packed)
    with torch.no_grad():
        for parameter in (p for p in tuned.parameters() if p.requires_grad):
            parameter.copy_(torch.randn_like(parameter))
    tuned.save_pretrained(tmp_path / "ad")
    tuned.merge_and_unload().save_pretrained(tmp_path / "merged")
    base, merged = open_checkpoint(tmp_path / "base"), open_checkpoint(tmp_path / "merged")
    source = AdapterSource(tmp_path / "ad", base)
    assert "model.layers.0.block_sparse_moe.experts.2.w3.weight" in source.tensors
    assert {source.rank(name) for name in source.tensors if ".experts." in name} == {2}
    for name in base.tensors:
        close(whole(source, base, name), merged.read(name))
