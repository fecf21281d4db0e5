"""The torch runtime of examples/smile_torch.py: the paper's own code, this project's layers, transformers' models."""

import sys
from pathlib import Path

import golden_cases
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file
from smile_parts import golden_layer, layer_of, write

from cfmerge.compose import smile

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")


@pytest.fixture(scope="module")
def runtime():
    """The example, as a module."""
    sys.path.insert(0, str(Path(__file__).parents[2] / "examples"))
    try:
        import smile_torch
    finally:
        sys.path.pop(0)
    return smile_torch


class Model(torch.nn.Module):
    """A linear layer, called `fc`."""

    base_model_prefix = "model"

    def __init__(self, weight, bias):
        super().__init__()
        self.fc = torch.nn.Linear(weight.shape[1], weight.shape[0], bias is not None)
        self.fc.weight.data = torch.tensor(weight)
        if bias is not None:
            self.fc.bias.data = torch.tensor(bias)

    def forward(self, x):
        return self.fc(x)


def run(model, x):
    with torch.no_grad():
        return np.asarray(model(torch.tensor(np.asarray(x))))


@pytest.mark.parametrize("name", golden_cases.names("fb_smile_"))
def test_torch_gives_what_the_papers_own_code_and_jax_give(name, runtime, tmp_path):
    case = golden_cases.CASES[name]
    top_k = case["params"]["top_k"]
    x, base, bias, layer = golden_layer(case, "float32")
    model = Model(base, bias)
    write(tmp_path, {"fc.weight": layer}, top_k)
    assert runtime.upscale(model, tmp_path) == ["fc.weight"]
    out = run(model, x)
    expected = golden_cases.load(case)["expected_output"]
    assert np.max(np.abs(out - expected)) <= case["tolerance"]["expected_output"]["float32"]
    ours = x @ base.T + (0 if bias is None else bias) + smile.added(x, layer, top_k)
    np.testing.assert_allclose(out, ours, atol=2e-5)


@pytest.fixture
def made():
    """A model, a layer of dtype bfloat16 that fits it, and inputs."""
    rng = np.random.default_rng(0)
    weight, deltas = (rng.standard_normal(shape).astype(np.float32) for shape in ((6, 8), (3, 6, 8)))
    layer = layer_of(deltas, 3, 2, list(rng.standard_normal((3, 6)).astype(np.float32)))
    layer = smile.Layer(*(part.astype(jnp.bfloat16) for part in layer))
    return Model(weight, np.zeros(6, np.float32)), layer, jnp.asarray(rng.standard_normal((2, 5, 8)), jnp.float32)


def test_experts_in_bfloat16_and_in_shards_are_those_that_jax_runs(runtime, made, tmp_path):
    model, layer, x = made
    base = run(model, x)
    runtime.upscale(model, write(tmp_path, {"fc.weight": layer}, 2, shards=3))
    wide = smile.Layer(*(part.astype(jnp.float32) for part in layer))
    np.testing.assert_allclose(run(model, x) - base, smile.added(x, wide, 2), atol=1e-4)


def test_of_equal_norms_torch_too_takes_the_first_expert(runtime, made, tmp_path):
    model, layer, x = made
    base, same = run(model, x), smile.Layer(layer.up, layer.down, layer.router[:1].repeat(3, 0), layer.bias)
    runtime.upscale(model, write(tmp_path, {"fc.weight": same}))
    first = smile.Layer(*(part[:1].astype(jnp.float32) for part in layer))
    np.testing.assert_allclose(run(model, x) - base, smile.added(x, first), atol=1e-4)


def test_a_composition_of_another_model_is_refused(runtime, made, tmp_path):
    model, layer, _ = made
    with pytest.raises(SystemExit, match=r"other.weight: a Linear or Conv1D of shape \[6, 8\] is needed, found None"):
        runtime.upscale(model, write(tmp_path / "a", {"other.weight": layer}))
    cut = smile.Layer(layer.up[:, :5], layer.down, layer.router)
    with pytest.raises(SystemExit, match=r"fc.weight: a Linear .*\[5, 8\] is needed, found Linear\(in_features=8"):
        runtime.upscale(model, write(tmp_path / "b", {"fc.weight": cut}))
    file = write(tmp_path / "c", {"fc.weight": layer}) / "composition.json"
    file.write_text(file.read_text().replace('"smile"', '"emr"'))
    with pytest.raises(SystemExit, match="is not a SMILE composition, version 1"):
        runtime.upscale(model, tmp_path / "c")


def test_a_gpt2s_conv1d_is_upscaled_under_its_name_with_or_without_the_prefix(runtime, tmp_path):
    """Its weight lies as `(in, out)`; fusion_bench passes it over."""
    config = {"vocab_size": 32, "n_positions": 8, "n_embd": 8, "n_layer": 1, "n_head": 2}
    config = transformers.GPT2Config(**config, bos_token_id=0, eos_token_id=0)
    torch.manual_seed(0)
    base, expert = (transformers.GPT2LMHeadModel(config).eval() for _ in range(2))
    name = "transformer.h.0.mlp.c_fc.weight"
    with torch.no_grad():
        for key, value in expert.state_dict().items():
            value.copy_(base.state_dict()[key])
        expert.get_submodule(name.removesuffix(".weight")).weight += 0.1 * torch.randn(8, 32)
    delta = (expert.state_dict()[name] - base.state_dict()[name]).numpy().T
    layer, tokens = layer_of([delta], 8, 2), np.arange(8)[None]
    for own in (name, name.removeprefix("transformer.")):
        folder = write(tmp_path / own, {own: layer}, layouts={own: "io"}, tasks=["a"])
        model = transformers.GPT2LMHeadModel(config).eval()
        model.load_state_dict(base.state_dict())
        before = run(lambda tokens, model=model: model(tokens).logits, tokens)
        runtime.upscale(model, folder)
        after, expected = (run(lambda tokens, one=one: one(tokens).logits, tokens) for one in (model, expert))
        np.testing.assert_allclose(after, expected, atol=1e-5)
        assert np.max(np.abs(before - expected)) > 1e-3


def test_the_mean_of_other_tensors_is_added(runtime, made, tmp_path):
    model, layer, _ = made
    folder, base = write(tmp_path, {"fc.weight": layer._replace(bias=None)}), model.fc.bias.detach().numpy().copy()
    arrays = load_file(folder / "model.safetensors") | {"mean/fc.bias": np.arange(6, dtype=np.float32)}
    save_file(arrays, folder / "model.safetensors")
    runtime.upscale(model, folder)
    np.testing.assert_array_equal(model.fc.bias.detach(), base + np.arange(6))
    save_file(arrays | {"bias/other.bias": np.zeros((3, 6), np.float32)}, folder / "model.safetensors")
    with pytest.raises(SystemExit, match="not for a layer of the model: bias/other"):
        runtime.upscale(Model(np.zeros((6, 8), np.float32), np.zeros(6, np.float32)), folder)
