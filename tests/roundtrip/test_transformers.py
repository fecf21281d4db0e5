"""Round trips through transformers: save a base and experts, merge the directories, load what came out.

The expected model is merged by `reference` (NumPy, float64) from the state dicts in memory. Which tensor is
what is written down here by hand, from each architecture; cfmerge's own classification is not asked.
"""

import dataclasses
import functools
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import reference
import torch
import transformers
from reference import BASE, BUFFER, CONV1D, CONVOLUTION, LINEAR, MEAN
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import cfmerge

# Of logits, relative to how much the merge changes them, and of deltas, relative to their norm. Where ACE
# refines (heterogeneous), float32 cuts the spectrum between two close singular values and is a little off:
# measured 1.4e-4, and 8e-7 with precision="float64". In bfloat16 a result near the middle may round either way.
HOMOGENEOUS, REFINED, FLOAT64, BFLOAT16 = 5e-5, 5e-4, 3e-6, 0.01
SMALL = (0.003, 0.0035, 0.004)  # deltas of about one energy: ACE's homogeneous branch
SPREAD = (0.002, 0.008, 0.03)  # energies over two decades: the heterogeneous branch, at these sizes
ONE_BY_ONE = 400_000  # bytes: so little that no two matrices of these sizes are stacked


# --- the families: a tiny model, what its tensors are, and what it is asked ---------------------------------


@dataclasses.dataclass(frozen=True)
class Family:
    name: str
    make: Callable[[], torch.nn.Module]
    auto: type
    kinds: Mapping[str, str]
    inputs: Callable[[], dict[str, torch.Tensor]]
    output: str = "logits"
    scales: Sequence[float] = SPREAD
    tied: Sequence[tuple[str, str]] = ()
    save: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    memory: int | None = ONE_BY_ONE
    frozen: Sequence[str] = ()  # tensors that the second expert did not train

    @property
    def tolerance(self) -> float:
        return HOMOGENEOUS if self.scales == SMALL else REFINED


def tokens(length: int = 9, last: int | None = None) -> torch.Tensor:
    ids = torch.randint(3, 60, (2, length), generator=torch.Generator().manual_seed(7))
    if last is not None:
        ids[:, -1] = last
    return ids


def pixels(size: int) -> torch.Tensor:
    return torch.randn(2, 3, size, size, generator=torch.Generator().manual_seed(8))


def ask_ids() -> dict[str, torch.Tensor]:
    return {"input_ids": tokens()}


def decoder_config(**more: Any) -> dict[str, Any]:
    return {
        "vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64,
        "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0, **more,
    }  # fmt: skip


def encoder_config(**more: Any) -> dict[str, Any]:
    return {
        "vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
        "num_attention_heads": 4, "max_position_embeddings": 32, **more,
    }  # fmt: skip


def llama(tied: bool) -> torch.nn.Module:
    config = transformers.LlamaConfig(**decoder_config(tie_word_embeddings=tied))
    model = transformers.LlamaForCausalLM(config)
    model.generation_config.max_new_tokens = 7
    return model


def mistral() -> torch.nn.Module:
    return transformers.MistralForCausalLM(transformers.MistralConfig(**decoder_config(sliding_window=6)))


def qwen2() -> torch.nn.Module:
    return transformers.Qwen2ForCausalLM(transformers.Qwen2Config(**decoder_config(tie_word_embeddings=True)))


def gpt2_config(**more: Any) -> transformers.GPT2Config:
    return transformers.GPT2Config(
        vocab_size=64, n_embd=32, n_layer=2, n_head=4, n_positions=32, n_inner=48,
        bos_token_id=1, eos_token_id=2, pad_token_id=0, **more,
    )  # fmt: skip


def gpt2() -> torch.nn.Module:
    return transformers.GPT2LMHeadModel(gpt2_config())


def bert_config(**more: Any) -> transformers.BertConfig:
    return transformers.BertConfig(**encoder_config(**more))


def bert_masked() -> torch.nn.Module:
    return transformers.BertForMaskedLM(bert_config())


def bert_classifier(labels: int = 3) -> torch.nn.Module:
    return transformers.BertForSequenceClassification(bert_config(num_labels=labels))


def vit() -> torch.nn.Module:
    config = transformers.ViTConfig(
        hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        image_size=16, patch_size=8, num_labels=5,
    )  # fmt: skip
    return transformers.ViTForImageClassification(config)


def t5() -> torch.nn.Module:
    config = transformers.T5Config(
        vocab_size=64, d_model=32, d_kv=8, d_ff=48, num_layers=1, num_heads=4, decoder_start_token_id=0
    )
    return transformers.T5ForConditionalGeneration(config)


def clip() -> torch.nn.Module:
    layers = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 4}
    ids = {"bos_token_id": 1, "eos_token_id": 63, "pad_token_id": 0}
    config = transformers.CLIPConfig(
        text_config={"vocab_size": 64, "max_position_embeddings": 16, **layers, **ids},
        vision_config={"image_size": 16, "patch_size": 8, **layers},
        projection_dim=24,
    )
    return transformers.CLIPModel(config)


def resnet() -> torch.nn.Module:
    config = transformers.ResNetConfig(
        embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], layer_type="basic", num_labels=5
    )
    return transformers.ResNetForImageClassification(config)


DECODER = {
    "model.embed_tokens.weight": MEAN,
    "model.layers.*.self_attn.[qkvo]_proj.weight": LINEAR,
    "model.layers.*.mlp.gate_proj.weight": LINEAR,
    "model.layers.*.mlp.up_proj.weight": LINEAR,
    "model.layers.*.mlp.down_proj.weight": LINEAR,
    "model.layers.*.input_layernorm.weight": MEAN,
    "model.layers.*.post_attention_layernorm.weight": MEAN,
    "model.norm.weight": MEAN,
    "lm_head.weight": MEAN,
}
GPT2_TRUNK = {
    "transformer.wte.weight": MEAN,
    "transformer.wpe.weight": MEAN,
    "transformer.h.*.ln_[12].*": MEAN,
    "transformer.h.*.attn.c_attn.weight": CONV1D,
    "transformer.h.*.attn.c_proj.weight": CONV1D,
    "transformer.h.*.mlp.c_fc.weight": CONV1D,
    "transformer.h.*.mlp.c_proj.weight": CONV1D,
    "transformer.h.*.c_*.bias": MEAN,
    "transformer.ln_f.*": MEAN,
}
BERT_TRUNK = {
    "bert.embeddings.*_embeddings.weight": MEAN,
    "bert.embeddings.LayerNorm.*": MEAN,
    "bert.encoder.layer.*.attention.self.query.weight": LINEAR,
    "bert.encoder.layer.*.attention.self.key.weight": LINEAR,
    "bert.encoder.layer.*.attention.self.value.weight": LINEAR,
    "bert.encoder.layer.*.dense.weight": LINEAR,
    "bert.encoder.layer.*.LayerNorm.weight": MEAN,
    "bert.encoder.layer.*.bias": MEAN,
}
BERT_POOLER = {"bert.pooler.dense.weight": LINEAR, "bert.pooler.dense.bias": MEAN}
CLIP_TOWERS = {
    "*_model.encoder.layers.*.self_attn.[qkv]_proj.weight": LINEAR,
    "*_model.encoder.layers.*.self_attn.out_proj.weight": LINEAR,
    "*_model.encoder.layers.*.mlp.fc[12].weight": LINEAR,
    "*_model.encoder.layers.*.layer_norm[12].weight": MEAN,
    "*_model.encoder.layers.*.bias": MEAN,
}
FAMILIES = {
    family.name: family
    for family in (
        Family(
            "llama-untied", functools.partial(llama, False), transformers.AutoModelForCausalLM, DECODER,
            ask_ids, memory=None,
            frozen=("model.layers.0.mlp.gate_proj.weight", "model.layers.1.self_attn.q_proj.weight"),
        ),
        Family(
            "llama-tied", functools.partial(llama, True), transformers.AutoModelForCausalLM, DECODER, ask_ids,
            scales=SMALL, tied=[("lm_head.weight", "model.embed_tokens.weight")],
        ),
        Family("mistral", mistral, transformers.AutoModelForCausalLM, DECODER, ask_ids, scales=SMALL),
        Family(
            "qwen2", qwen2, transformers.AutoModelForCausalLM,
            {**DECODER, "model.layers.*.self_attn.[qkv]_proj.bias": MEAN}, ask_ids,
            tied=[("lm_head.weight", "model.embed_tokens.weight")],
        ),
        Family(
            "gpt2", gpt2, transformers.AutoModelForCausalLM, {**GPT2_TRUNK, "lm_head.weight": MEAN}, ask_ids,
            tied=[("lm_head.weight", "transformer.wte.weight")],
        ),
        Family(
            "bert-masked", bert_masked, transformers.AutoModelForMaskedLM,
            {
                **BERT_TRUNK,
                "cls.predictions.transform.*": MEAN,
                "cls.predictions.bias": MEAN,
                "cls.predictions.decoder.*": MEAN,
            },
            ask_ids,
            tied=[
                ("cls.predictions.decoder.weight", "bert.embeddings.word_embeddings.weight"),
                ("cls.predictions.decoder.bias", "cls.predictions.bias"),
            ],
        ),
        Family(
            "bert-classifier", bert_classifier, transformers.AutoModelForSequenceClassification,
            {**BERT_TRUNK, **BERT_POOLER, "classifier.*": MEAN}, ask_ids, scales=SMALL,
        ),
        Family(
            "vit", vit, transformers.AutoModelForImageClassification,
            {
                "vit.embeddings.cls_token": MEAN,
                "vit.embeddings.position_embeddings": MEAN,
                "vit.embeddings.patch_embeddings.projection.*": MEAN,
                "vit.layers.*.attention.[qkvo]_proj.weight": LINEAR,
                "vit.layers.*.mlp.fc[12].weight": LINEAR,
                "vit.layers.*.layernorm_*.weight": MEAN,
                "vit.layers.*.bias": MEAN,
                "vit.layernorm.*": MEAN,
                "classifier.*": MEAN,
            },
            lambda: {"pixel_values": pixels(16)},
        ),
        Family(
            "t5", t5, transformers.AutoModelForSeq2SeqLM,
            {
                "shared.weight": MEAN,
                "*coder.embed_tokens.weight": MEAN,
                "*coder.block.*Attention.[qkvo].weight": LINEAR,
                "*coder.block.*.DenseReluDense.w[io].weight": LINEAR,
                "*coder.block.*.relative_attention_bias.weight": MEAN,
                "*layer_norm.weight": MEAN,
                "lm_head.weight": MEAN,
            },
            lambda: {"input_ids": tokens(), "decoder_input_ids": tokens(5)},
            tied=[
                ("encoder.embed_tokens.weight", "shared.weight"),
                ("decoder.embed_tokens.weight", "shared.weight"),
                ("lm_head.weight", "shared.weight"),
            ],
        ),
        Family(
            "clip", clip, transformers.AutoModel,
            {
                **CLIP_TOWERS,
                "*_model.embeddings.*": MEAN,
                "*_model.pre_layrnorm.*": MEAN,
                "*_model.*_layer*norm.*": MEAN,
                "visual_projection.weight": LINEAR,
                "text_projection.weight": MEAN,
                "logit_scale": MEAN,
            },
            lambda: {"input_ids": tokens(9, last=63), "pixel_values": pixels(16)},
            output="logits_per_image",
        ),
        Family(
            "resnet", resnet, transformers.AutoModelForImageClassification,
            {
                "resnet.*.convolution.weight": CONVOLUTION,
                "resnet.*.normalization.weight": MEAN,
                "resnet.*.normalization.bias": MEAN,
                "resnet.*.normalization.running_*": BUFFER,
                "resnet.*.normalization.num_batches_tracked": BASE,
                "classifier.1.*": MEAN,
            },
            lambda: {"pixel_values": pixels(32)},
            memory=None,
        ),
        Family(
            "llama-bf16-sharded", functools.partial(llama, False), transformers.AutoModelForCausalLM, DECODER,
            ask_ids, save={"dtype": torch.bfloat16, "max_shard_size": "20KB"},
        ),
    )
}  # fmt: skip


# --- making models, merging them, and the merge that is expected --------------------------------------------


@dataclasses.dataclass
class Models:
    """A base and its experts in memory (`state`s, float32 or as saved) and on disk."""

    base: torch.nn.Module
    states: list[dict[str, np.ndarray]]  # base first
    paths: list[Path]


def seeded(make: Callable[[], torch.nn.Module], seed: int = 0) -> torch.nn.Module:
    torch.manual_seed(seed)
    model = make().eval()
    with torch.no_grad():
        for name, buffer in model.named_buffers():
            if name.endswith("running_mean"):
                buffer.normal_(0, 0.1)
            elif name.endswith("running_var"):
                buffer.uniform_(0.5, 1.5)
            elif name.endswith("num_batches_tracked"):
                buffer.fill_(100)
    return model


def fine_tune(model: torch.nn.Module, scale: float, seed: int, frozen: Sequence[str] = ()) -> None:
    """Adds deltas with a few strong directions, as training makes them, to every parameter and statistic."""
    draw = torch.Generator().manual_seed(seed)

    def randn(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=draw)

    with torch.no_grad():
        for name, parameter in model.named_parameters():
            delta = randn(*parameter.shape)
            if parameter.ndim > 1:
                rows, rest = parameter.shape[0], parameter[0].numel()
                strong = randn(rows, 3) @ torch.diag(torch.tensor([3.0, 2.0, 1.0])) @ randn(3, rest)
                delta = delta + strong.reshape(parameter.shape) + randn(1, *parameter.shape[1:])
            if name not in frozen:
                parameter.add_(scale * delta)
        for name, buffer in model.named_buffers():
            if name.endswith("running_mean"):
                buffer.add_(scale * randn(*buffer.shape))
            elif name.endswith("running_var"):
                buffer.mul_(torch.exp(scale * randn(*buffer.shape)))
            elif name.endswith("num_batches_tracked"):
                buffer.add_(seed)


def to_numpy(state: Mapping[str, torch.Tensor]) -> dict[str, np.ndarray]:
    return {
        name: (tensor.double() if tensor.is_floating_point() else tensor).detach().numpy().copy()
        for name, tensor in state.items()
    }


def make_models(family: Family, directory: Path) -> Models:
    save = dict(family.save)
    dtype = save.pop("dtype", torch.float32)
    states, paths = [], []
    for number in range(1 + len(family.scales)):
        model = seeded(family.make)
        if number:
            frozen = family.frozen if number == 2 else ()
            fine_tune(model, family.scales[number - 1], number, frozen)
        model = model.to(dtype)
        path = directory / ("base" if number == 0 else f"expert-{number}")
        model.save_pretrained(path, **save)
        states.append(to_numpy(model.state_dict()))
        paths.append(path)
    return Models(seeded(family.make), states, paths)


def load(auto: type, path: Path) -> torch.nn.Module:
    """Loads a model as a user does, and insists that every tensor found its place."""
    model, info = auto.from_pretrained(path, output_loading_info=True, dtype="auto")
    for complaint in ("missing_keys", "unexpected_keys", "mismatched_keys", "error_msgs"):
        assert not info[complaint], (complaint, info[complaint])
    return model.eval()


def with_state(make: Callable[[], torch.nn.Module], state: Mapping[str, np.ndarray]) -> torch.nn.Module:
    model = make().double().eval()
    model.load_state_dict({name: torch.from_numpy(np.ascontiguousarray(t)) for name, t in state.items()})
    return model


def answer(model: torch.nn.Module, family: Family) -> torch.Tensor:
    inputs = {k: v.double() if v.is_floating_point() else v for k, v in family.inputs().items()}
    with torch.no_grad():
        return model.double()(**inputs)[family.output]


def branches(kinds: Mapping[str, str], states: Sequence[Mapping[str, np.ndarray]]) -> dict[str, dict[str, Any]]:
    """What the reference says of ACE's gate on every matrix."""
    told: dict[str, dict[str, Any]] = {}
    base, *experts = states
    for name, kind in kinds.items():
        if kind in {LINEAR, CONV1D, CONVOLUTION}:
            deltas = [reference.to_canonical(expert[name] - base[name], kind) for expert in experts]
            reference.ace(deltas, told=told.setdefault(name, {}))
    return told


def assert_states_agree(
    got: Mapping[str, torch.Tensor],
    want: Mapping[str, np.ndarray],
    base: Mapping[str, np.ndarray],
    kinds: Mapping[str, str],
    tolerance: float = REFINED,
) -> None:
    """Solved deltas agree to `tolerance` of their norm; means to float32 rounding; what is kept, exactly."""
    assert set(got) == set(want)
    for name, kind in kinds.items():
        tensor = got[name]
        have = tensor.double().numpy() if tensor.is_floating_point() else tensor.numpy()
        if kind == BASE:
            np.testing.assert_array_equal(have, want[name], err_msg=name)
            continue
        unit = torch.finfo(tensor.dtype).eps
        size = np.abs(want[name]).max()
        delta = np.linalg.norm(want[name] - base[name])
        error = np.linalg.norm(have - want[name])
        rounding = unit * np.linalg.norm(want[name])
        if kind in {LINEAR, CONV1D, CONVOLUTION}:
            assert delta > 0, name
            assert error <= tolerance * delta + rounding, (name, error / delta)
        else:
            np.testing.assert_allclose(have, want[name], rtol=0, atol=2 * max(unit, 1e-7) * size, err_msg=name)


class Round:
    """One family's round trip: models on disk, their merge by ACE, the loaded result, the expected state."""

    def __init__(self, family: Family, directory: Path):
        self.family = family
        self.models = make_models(family, directory)
        base, *experts = self.models.paths
        self.output = directory / "merged"
        self.result = cfmerge.merge(
            base, experts, method="ace", output=self.output, memory=family.memory,
            **({"shard_size": "12KB"} if "max_shard_size" in family.save else {}),
        )  # fmt: skip
        self.loaded = load(family.auto, self.output)
        self.kinds = reference.kinds_of(list(self.models.states[0]), family.kinds)
        self.want = reference.merge_state(self.models.states[0], self.models.states[1:], self.kinds)


@pytest.fixture(scope="module")
def round_of(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Round]:
    @functools.cache
    def make(name: str) -> Round:
        return Round(FAMILIES[name], tmp_path_factory.mktemp(name))

    return make


def stored_names(directory: Path) -> set[str]:
    names: set[str] = set()
    for file in directory.glob("*.safetensors"):
        with safe_open(file, "pt") as opened:
            names |= set(opened.keys())
    return names


# --- every family -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", FAMILIES)
class TestFamily:
    def test_tensors_agree_with_the_reference(self, round_of: Callable[[str], Round], name: str) -> None:
        r = round_of(name)
        assert_states_agree(r.loaded.state_dict(), r.want, r.models.states[0], r.kinds, r.family.tolerance)

    def test_logits_agree_with_the_reference(self, round_of: Callable[[str], Round], name: str) -> None:
        r = round_of(name)
        expected = answer(with_state(r.family.make, as_stored(r.want, r.loaded.dtype)), r.family)
        before = answer(with_state(r.family.make, r.models.states[0]), r.family)
        mean = reference.merge_state(r.models.states[0], r.models.states[1:], r.kinds, reference.average)
        averaged = answer(with_state(r.family.make, mean), r.family)
        got = answer(load(r.family.auto, r.output), r.family)

        effect = (expected - before).abs().max()
        tolerance = BFLOAT16 if r.loaded.dtype == torch.bfloat16 else r.family.tolerance
        assert (got - expected).abs().max() < tolerance * effect
        assert (averaged - expected).abs().max() > 0.05 * effect  # the comparison can tell ACE from averaging

    def test_takes_the_branch_that_the_reference_takes(self, round_of: Callable[[str], Round], name: str) -> None:
        r = round_of(name)
        told = branches(r.kinds, r.models.states)
        reports = {stored_to_state(r.family, n): v for n, v in r.result.reports.items()}
        assert set(reports) == set(told)
        for tensor, expected in told.items():
            assert bool(reports[tensor]["heterogeneous"]) == expected["heterogeneous"], tensor
            assert reports[tensor]["gate"] == pytest.approx(expected["gate"], rel=1e-2), tensor
        if r.family.scales == SMALL:
            assert not any(t["heterogeneous"] for t in told.values())
        else:
            assert sum(t["heterogeneous"] for t in told.values()) > len(told) / 2

    def test_stores_what_the_base_stores(self, round_of: Callable[[str], Round], name: str) -> None:
        r = round_of(name)
        assert stored_names(r.output) == stored_names(r.models.paths[0])
        for alias, target in r.family.tied:
            state = r.loaded.state_dict()
            assert state[alias].data_ptr() == state[target].data_ptr()
        for file in r.models.paths[0].glob("*.json"):
            if not file.name.endswith(".index.json"):
                assert json.loads((r.output / file.name).read_text()) == json.loads(file.read_text())


def as_stored(state: Mapping[str, np.ndarray], dtype: torch.dtype) -> dict[str, np.ndarray]:
    """The state rounded to bfloat16, if that is what it is stored in."""
    if dtype != torch.bfloat16:
        return dict(state)
    return {name: torch.from_numpy(tensor).to(dtype).double().numpy() for name, tensor in state.items()}


def stored_to_state(family: Family, name: str) -> str:
    """ViT is stored under other names than its modules have."""
    if family.name != "vit":
        return name
    pairs = {
        "vit.encoder.layer.": "vit.layers.", "attention.attention.query": "attention.q_proj",
        "attention.attention.key": "attention.k_proj", "attention.attention.value": "attention.v_proj",
        "attention.output.dense": "attention.o_proj", "intermediate.dense": "mlp.fc1",
        "output.dense": "mlp.fc2",
    }  # fmt: skip
    for stored, module in pairs.items():
        name = name.replace(stored, module)
    return name


def test_both_branches_and_a_frozen_tensor_occur(round_of: Callable[[str], Round]) -> None:
    r = round_of("llama-untied")
    told = branches(r.kinds, r.models.states)
    counted = {name: t["counted"] for name, t in told.items()}
    assert {name for name, count in counted.items() if count == 2} == set(r.family.frozen)
    seen = {t["heterogeneous"] for f in ("llama-untied", "llama-tied") for t in
            branches(round_of(f).kinds, round_of(f).models.states).values()}  # fmt: skip
    assert seen == {True, False}


def test_float64_agrees_to_rounding(round_of: Callable[[str], Round], tmp_path: Path) -> None:
    """When cfmerge computes in float64, what is left of the difference is the rounding of the stored result."""
    r = round_of("llama-untied")
    base, *experts = r.models.paths
    cfmerge.merge(base, experts, output=tmp_path / "out", precision="float64", memory=r.family.memory)
    loaded = load(r.family.auto, tmp_path / "out")
    assert_states_agree(loaded.state_dict(), r.want, r.models.states[0], r.kinds, 1e-7)
    expected = answer(with_state(r.family.make, r.want), r.family)
    effect = (expected - answer(with_state(r.family.make, r.models.states[0]), r.family)).abs().max()
    assert (answer(loaded, r.family) - expected).abs().max() < FLOAT64 * effect


# --- GPT-2 --------------------------------------------------------------------------------------------------


def test_gpt2_as_published_solves_the_stored_matrix(round_of: Callable[[str], Round], tmp_path: Path) -> None:
    r = round_of("gpt2")
    base, *experts = r.models.paths
    rules = [{"match": f"*.{name}.weight", "layout": "oi"} for name in ("c_attn", "c_proj", "c_fc")]
    cfmerge.merge(
        base, experts, method="ace", rules=rules, output=tmp_path / "out", precision="float64", memory=2 * ONE_BY_ONE
    )
    as_stored = {name: LINEAR if kind == CONV1D else kind for name, kind in r.kinds.items()}
    want = reference.merge_state(r.models.states[0], r.models.states[1:], as_stored)
    loaded = load(r.family.auto, tmp_path / "out")
    assert_states_agree(loaded.state_dict(), want, r.models.states[0], as_stored, 1e-7)

    expected = answer(with_state(r.family.make, want), r.family)
    canonical = answer(with_state(r.family.make, r.want), r.family)
    effect = (expected - answer(with_state(r.family.make, r.models.states[0]), r.family)).abs().max()
    assert (answer(loaded, r.family) - expected).abs().max() < FLOAT64 * effect
    assert (canonical - expected).abs().max() > 0.05 * effect


def test_gpt2_as_on_the_hub(tmp_path: Path) -> None:
    """The published base has no prefix, and causal masks among its weights. Experts: several numbers of labels."""
    base = seeded(lambda: transformers.GPT2Model(gpt2_config()))
    trunk = {name: tensor.clone() for name, tensor in base.state_dict().items()}
    base.save_pretrained(tmp_path / "base")
    mask = torch.tril(torch.ones(32, 32)).reshape(1, 1, 32, 32)
    file = tmp_path / "base/model.safetensors"
    save_file(load_file(file) | {f"h.{n}.attn.bias": mask.clone() for n in (0, 1)}, file, {"format": "pt"})
    states = [{f"transformer.{name}": tensor for name, tensor in to_numpy(trunk).items()}]
    for number, (scale, labels) in enumerate(zip(SPREAD, (2, 3, 4), strict=True), 1):
        torch.manual_seed(number)
        expert = transformers.GPT2ForSequenceClassification(gpt2_config(num_labels=labels))
        expert.transformer.load_state_dict(trunk)
        fine_tune(expert, scale, number)
        expert.save_pretrained(tmp_path / f"expert-{number}")
        states.append(to_numpy(expert.state_dict()))
    file = tmp_path / "expert-2/model.safetensors"  # masks of which the base has the one and not the other
    masks = {"attn.bias": mask, "attn.masked_bias": torch.tensor(-1e4)}
    save_file(
        load_file(file) | {f"transformer.h.0.{name}": tensor.clone() for name, tensor in masks.items()},
        file, {"format": "pt"},
    )  # fmt: skip

    experts = [tmp_path / f"expert-{n}" for n in (1, 2, 3)]
    result = cfmerge.merge(tmp_path / "base", experts, output=tmp_path / "out", heads="export", memory=ONE_BY_ONE)
    assert any("transformer.h.0.attn.masked_bias" in note for note in result.notes)
    torch.testing.assert_close(load_file(tmp_path / "out/model.safetensors")["h.1.attn.bias"], mask)
    kinds = reference.kinds_of(list(states[0]), GPT2_TRUNK)
    want = reference.merge_state(states[0], states[1:], kinds)
    merged = load(transformers.AutoModel, tmp_path / "out").state_dict()
    assert_states_agree({f"transformer.{n}": t for n, t in merged.items()}, want, states[0], kinds)
    for n in (1, 2, 3):
        head = load_file(tmp_path / f"out/heads/expert-{n}.safetensors")
        assert set(head) == {"score.weight"}
        np.testing.assert_array_equal(head["score.weight"].double().numpy(), states[n]["score.weight"])


# --- BERT: heads --------------------------------------------------------------------------------------------

LABELS = (2, 3, 5)


@dataclasses.dataclass
class Heads:
    directory: Path
    experts: list[Path]
    states: list[dict[str, np.ndarray]]  # base's trunk (with prefix) first
    want: dict[str, np.ndarray]  # the merged trunk, with prefix


@pytest.fixture(scope="module")
def heads(tmp_path_factory: pytest.TempPathFactory) -> Heads:
    """Base: BertModel, no prefix. Experts: classifiers of 2, 3 and 5 classes. And a base with a head of 4."""
    directory = tmp_path_factory.mktemp("heads")
    base = seeded(lambda: transformers.BertModel(bert_config()))
    base.save_pretrained(directory / "base")
    headed = seeded(functools.partial(bert_classifier, 4), seed=9)
    headed.bert.load_state_dict(base.state_dict())
    headed.save_pretrained(directory / "headed-base")
    states = [{f"bert.{name}": tensor for name, tensor in to_numpy(base.state_dict()).items()}]
    paths = []
    for number, (scale, labels) in enumerate(zip(SPREAD, LABELS, strict=True), 1):
        expert = seeded(functools.partial(bert_classifier, labels), seed=number)
        expert.bert.load_state_dict(base.state_dict())
        fine_tune(expert, scale, number)
        paths.append(directory / f"expert-{number}")
        expert.save_pretrained(paths[-1])
        states.append(to_numpy(expert.state_dict()))
    kinds = reference.kinds_of(list(states[0]), {**BERT_TRUNK, **BERT_POOLER})
    return Heads(directory, paths, states, reference.merge_state(states[0], states[1:], kinds))


def assert_trunk(heads: Heads, state: Mapping[str, torch.Tensor]) -> None:
    kinds = reference.kinds_of(list(heads.want), {**BERT_TRUNK, **BERT_POOLER})
    assert_states_agree(state, heads.want, heads.states[0], kinds)


def test_heads_need_a_choice(heads: Heads, tmp_path: Path) -> None:
    with pytest.raises(cfmerge.CfmergeError, match=r"classifier\.weight.*\(5, 32\)") as caught:
        cfmerge.merge(heads.directory / "base", heads.experts, output=tmp_path / "out")
    for choice in ("keep-base", "drop", "export"):
        assert choice in str(caught.value)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("choice", ["keep-base", "drop", "export"])
def test_trunk_without_heads(heads: Heads, choice: str, tmp_path: Path) -> None:
    out = tmp_path / "out"
    cfmerge.merge(heads.directory / "base", heads.experts, output=out, heads=choice, memory=ONE_BY_ONE)
    trunk = load(transformers.AutoModel, out)
    assert_trunk(heads, {f"bert.{name}": tensor for name, tensor in trunk.state_dict().items()})
    assert (out / "heads").exists() == (choice == "export")
    if choice == "export":
        assert_exported_heads_work(heads, trunk, out)


def assert_exported_heads_work(heads: Heads, trunk: torch.nn.Module, out: Path) -> None:
    """Each expert's head on the merged trunk answers as the reference's trunk with that head."""
    for number, labels in enumerate(LABELS, 1):
        head = load_file(out / f"heads/expert-{number}.safetensors")
        assert set(head) == {"classifier.weight", "classifier.bias"}
        make = functools.partial(bert_classifier, labels)
        model = seeded(make)
        model.bert.load_state_dict(trunk.state_dict())
        assert not model.load_state_dict(head, strict=False).unexpected_keys

        own = {name: heads.states[number][name] for name in head}
        expected = with_state(make, {**heads.want, **own})
        before = with_state(make, {**heads.states[0], **own})
        family = dataclasses.replace(FAMILIES["bert-classifier"], make=make)
        want, got = answer(expected, family), answer(model, family)
        assert want.shape == (2, labels)
        assert (got - want).abs().max() < REFINED * (want - answer(before, family)).abs().max()


@pytest.mark.parametrize("choice", ["keep-base", "drop", "export"])
def test_base_with_a_head_of_its_own(heads: Heads, choice: str, tmp_path: Path) -> None:
    out = tmp_path / "out"
    cfmerge.merge(heads.directory / "headed-base", heads.experts, output=out, heads=choice, memory=ONE_BY_ONE)
    base = load_file(heads.directory / "headed-base/model.safetensors")
    if choice == "drop":
        trunk = load(transformers.AutoModel, out)
        assert_trunk(heads, {f"bert.{name}": tensor for name, tensor in trunk.state_dict().items()})
        return
    state = load(transformers.AutoModelForSequenceClassification, out).state_dict()
    for name in ("classifier.weight", "classifier.bias"):
        torch.testing.assert_close(state.pop(name), base[name], rtol=0, atol=0)
    assert_trunk(heads, state)
    if choice == "export":
        for number, labels in enumerate(LABELS, 1):
            head = load_file(out / f"heads/expert-{number}.safetensors")
            assert head["classifier.weight"].shape == (labels, 32)


# --- LLaMA as a user has it ---------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["llama-untied", "llama-tied", "llama-bf16-sharded"])
def test_llama_generates_what_the_reference_generates(round_of: Callable[[str], Round], name: str) -> None:
    r = round_of(name)
    loaded = load(r.family.auto, r.output)
    assert loaded.generation_config.max_new_tokens == 7
    want = r.want
    if name == "llama-bf16-sharded":
        assert loaded.dtype == torch.bfloat16
        want = to_numpy(loaded.state_dict())  # rounding may change a greedy choice: ask the same weights
    expected = with_state(r.family.make, want)
    options = {"max_new_tokens": 7, "do_sample": False, "attention_mask": torch.ones_like(tokens())}
    got = loaded.double().generate(tokens(), **options)
    assert got.shape[1] > tokens().shape[1]
    assert torch.equal(got, expected.generate(tokens(), **options))


def test_shards_and_dtype(round_of: Callable[[str], Round]) -> None:
    r = round_of("llama-bf16-sharded")
    shards = sorted(r.output.glob("model-*.safetensors"))
    of_base = list(r.models.paths[0].glob("model-*.safetensors"))
    assert len(shards) > len(of_base) > 1
    index = json.loads((r.output / "model.safetensors.index.json").read_text())
    assert set(index["weight_map"].values()) == {shard.name for shard in shards}
    assert all(tensor.dtype == torch.bfloat16 for shard in shards for tensor in load_file(shard).values())
    # rounded to nearest from a float32 result: one unit in the last place off at most, and seldom
    for name, want in r.want.items():
        got = r.loaded.state_dict()[name]
        rounded = torch.from_numpy(want).to(torch.bfloat16)
        off = (got != rounded).float().mean()
        assert off < 0.05, (name, float(off))
        torch.testing.assert_close(got, rounded, rtol=2**-7, atol=1e-4 * rounded.abs().max().item())


def test_tied_tensor_stored_twice(round_of: Callable[[str], Round], tmp_path: Path) -> None:
    """Older files hold the tied head as well; some models of the merge may, others not."""
    r = round_of("llama-tied")
    paths = []
    for number, source in enumerate(r.models.paths):
        paths.append(tmp_path / source.name)
        paths[-1].mkdir()
        (paths[-1] / "config.json").write_bytes((source / "config.json").read_bytes())
        state = load_file(source / "model.safetensors")
        if number != 2:
            state["lm_head.weight"] = state["model.embed_tokens.weight"].clone()
        save_file(state, paths[-1] / "model.safetensors", {"format": "pt"})
    cfmerge.merge(paths[0], paths[1:], output=tmp_path / "out", memory=ONE_BY_ONE)
    loaded = load(r.family.auto, tmp_path / "out").state_dict()
    assert loaded["lm_head.weight"].data_ptr() == loaded["model.embed_tokens.weight"].data_ptr()
    for name, tensor in r.loaded.state_dict().items():
        torch.testing.assert_close(loaded[name], tensor, rtol=0, atol=0)


def test_side_files_work(round_of: Callable[[str], Round], tmp_path: Path) -> None:
    tokenizers = pytest.importorskip("tokenizers")
    r = round_of("llama-tied")
    vocabulary = {"<pad>": 0, "<s>": 1, "</s>": 2, "<unk>": 3, **{f"w{n}": n for n in range(4, 64)}}
    raw = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary, unk_token="<unk>"))
    raw.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=raw, unk_token="<unk>", bos_token="<s>", eos_token="</s>", pad_token="<pad>"
    )
    base = tmp_path / "base"
    tokenizer.save_pretrained(base)
    transformers.AutoModelForCausalLM.from_pretrained(r.models.paths[0]).save_pretrained(base)
    cfmerge.merge(base, r.models.paths[1:], method="average", output=tmp_path / "out")

    again = transformers.AutoTokenizer.from_pretrained(tmp_path / "out")
    assert again("w5 w6 nothing")["input_ids"] == tokenizer("w5 w6 nothing")["input_ids"] == [5, 6, 3]
    assert again.eos_token == "</s>"
    assert transformers.GenerationConfig.from_pretrained(tmp_path / "out").max_new_tokens == 7
    expected = {file.name for file in base.iterdir()} | {"README.md"}
    assert {file.name for file in (tmp_path / "out").iterdir()} == expected


def test_average_and_task_arithmetic(round_of: Callable[[str], Round], tmp_path: Path) -> None:
    r = round_of("bert-classifier")
    base, *experts = r.models.paths
    scaled = lambda deltas: 0.4 * sum(deltas)  # noqa: E731
    for method, parameters, function in (
        ("average", {}, reference.average),
        ("task_arithmetic", {"scale": 0.4}, scaled),
    ):
        out = tmp_path / method
        cfmerge.merge(base, experts, method=method, parameters=parameters, output=out)
        want = reference.merge_state(r.models.states[0], r.models.states[1:], r.kinds, function, function)
        loaded = load(r.family.auto, out)
        for name, tensor in loaded.state_dict().items():
            np.testing.assert_allclose(tensor.double().numpy(), want[name], rtol=1e-6, atol=1e-8, err_msg=name)
        expected = answer(with_state(r.family.make, want), r.family)
        assert (answer(loaded, r.family) - expected).abs().max() < 1e-6
