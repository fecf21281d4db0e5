"""Merges in memory are merges of files: the same bits, for torch, NumPy and JAX; and nothing given is changed."""

import os
import re
import subprocess
import sys
import warnings
from pathlib import Path

import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

import cfmerge
from cfmerge.errors import CfmergeError

torch = pytest.importorskip("torch")
ROOT = Path(__file__).resolve().parents[2]
pytestmark = pytest.mark.filterwarnings("ignore:.*buffers, which are no parameters")


def torched(tensors):
    """Tensors of torch, in their own memory."""
    made = {}
    for name, array in tensors.items():
        plain = torch.from_numpy(np.array(array.view(np.int16) if array.dtype == ml_dtypes.bfloat16 else array))
        made[name] = plain.view(torch.bfloat16) if array.dtype == ml_dtypes.bfloat16 else plain
    return made


def bits(array):
    """Dtype and bytes, of whatever kind of array."""
    if isinstance(array, torch.Tensor):
        whole = array.detach().contiguous()
        return str(array.dtype).removeprefix("torch."), whole.reshape(-1).view(torch.uint8).numpy().tobytes()
    return np.dtype(array.dtype).name, np.asarray(array).tobytes()


def same(merged, expected):
    assert list(merged) == list(expected)
    for name, array in expected.items():
        assert tuple(merged[name].shape) == array.shape, name
        assert bits(merged[name]) == bits(array), name


def in_order(tensors, names):
    return {name: tensors[name] for name in names}


@pytest.fixture
def files(make_model, load, tmp_path):
    """`files(base, experts, method, **options)`: the merge of the same models in files."""

    def merged(base, experts, method, config=None, **options):
        path = make_model(tmp_path / "base", base, config)
        paths = {name: str(make_model(tmp_path / name, tensors, config)) for name, tensors in experts.items()}
        weights = options.pop("weights", {})
        specs = [cfmerge.Expert(path, name=name, weight=weights.get(name, 1.0)) for name, path in paths.items()]
        cfmerge.merge(path, specs, method, output=tmp_path / "out", **options)
        return in_order(load(tmp_path / "out"), base)

    return merged


def two(llama, dtype=np.float32):
    """A base and its experts, with integers and float64 that JAX would narrow."""
    more = {"steps": np.array([2**40 + 1]), "model.scales.weight": np.linspace(0, 1, 4).reshape(2, 2)}
    base = {**llama(0, dtype), **more}
    experts = {
        name: {**llama(number, dtype), **more, "model.scales.weight": more["model.scales.weight"] + 1e-12 * number}
        for name, number in (("math", 1), ("code", 2))
    }
    return base, experts


@pytest.mark.parametrize("dtype", [np.float32, ml_dtypes.bfloat16, np.float16])
def test_bits_are_those_of_files_whatever_the_arrays_are(llama, files, dtype):
    base, experts = two(llama, dtype)
    rules = [{"match": "*up_proj*", "method": "ties"}]
    weights = {"math": 1.0, "code": 0.5}
    expected = files(base, experts, "ace", weights=weights, rules=rules)
    same(cfmerge.merge_state_dicts(base, experts, weights=weights, rules=rules), expected)
    ours = cfmerge.merge_state_dicts(
        torched(base), {name: torched(expert) for name, expert in experts.items()}, weights=weights, rules=rules
    )
    assert all(type(tensor) is torch.Tensor and not tensor.requires_grad for tensor in ours.values())
    same(ours, expected)


def test_jax_arrays_and_mixed_kinds(llama, files):
    base, experts = llama(0), {"math": llama(1), "code": llama(2)}
    expected = files(base, experts, "drop(p=0.5) >> average", seed=3)
    ours = {name: jnp.asarray(array) for name, array in base.items()}
    given = {"math": torched(experts["math"]), "code": experts["code"]}
    merged = cfmerge.merge_state_dicts(ours, given, "drop(p=0.5) >> average", seed=3)
    assert all(isinstance(array, type(jnp.zeros(1))) for array in merged.values())
    same(merged, expected)


def test_nothing_that_is_given_is_changed_or_shared(llama):
    base, experts = llama(0), [llama(1), llama(2)]
    copies = [{name: array.copy() for name, array in model.items()} for model in (base, *experts)]
    merged = cfmerge.merge_state_dicts(base, experts, "ties", rules=[{"match": "*norm*", "method": "keep-base"}])
    for model, copy in zip((base, *experts), copies, strict=True):
        same(model, copy)
        assert all(array.flags.writeable for array in model.values())
    for name, array in merged.items():
        array += 1
        assert not np.shares_memory(array, base[name])
    tensors = torched(base)
    kept = cfmerge.merge_state_dicts(tensors, experts, "average", rules=[{"match": "*norm*", "method": "keep-base"}])
    kept["model.norm.weight"].zero_()
    same(tensors, base)


def test_a_dtype_for_the_floats(llama, files):
    base, experts = two(llama)
    expected = files(base, experts, "average", dtype="bfloat16")
    for dtype in ("bfloat16", torch.bfloat16, jnp.bfloat16):
        same(cfmerge.merge_state_dicts(base, experts, "average", dtype=dtype), expected)
    with pytest.raises(CfmergeError, match="dtype"):
        cfmerge.merge_state_dicts(base, experts, "average", dtype=torch.int32)


class Tied(torch.nn.Module):
    """A language model whose output layer is its table, with a buffer and a frozen parameter."""

    def __init__(self, step=0.0):
        super().__init__()
        generator = torch.Generator().manual_seed(1)
        self.embed_tokens = torch.nn.Embedding(12, 8)
        self.layer = torch.nn.Linear(8, 6)
        self.norm = torch.nn.BatchNorm1d(6)
        self.lm_head = torch.nn.Linear(8, 12, bias=False)
        self.lm_head.weight = self.embed_tokens.weight
        with torch.no_grad():
            for number, parameter in enumerate(self.parameters()):
                parameter.copy_(torch.randn(parameter.shape, generator=generator) + step * (number + 1))
        self.layer.bias.requires_grad_(False)


def test_modules_with_ties_and_buffers(files):
    base, experts = Tied(), {"a": Tied(0.1), "b": Tied(-0.3)}
    plain = {name: tensor.detach().numpy().copy() for name, tensor in base.state_dict().items()}
    theirs = {n: {k: t.detach().numpy().copy() for k, t in m.state_dict().items()} for n, m in experts.items()}
    merged = cfmerge.merge_state_dicts(base, experts, "ties")
    same(merged, files(plain, theirs, "ties"))
    assert merged["lm_head.weight"] is merged["embed_tokens.weight"]
    assert merged["norm.num_batches_tracked"].dtype == torch.int64
    same(base.state_dict(), plain)
    assert base.layer.weight.requires_grad
    base.load_state_dict(merged)
    assert base.lm_head.weight is base.embed_tokens.weight


def test_one_storage_under_two_names_is_one_array(llama):
    """Views of one memory are ties too; equal arrays in memories of their own are not."""
    table = np.random.default_rng(0).standard_normal((12, 8)).astype(np.float32)
    base = {"embed.weight": table, "again.weight": table[:], "copy.weight": table.copy()}
    experts = [{name: array + step for name, array in base.items()} for step in (1, 2)]
    with pytest.warns(UserWarning, match=r"copy\.weight.*merged once"):
        merged = cfmerge.merge_state_dicts(base, experts, "average")
    assert merged["again.weight"] is merged["embed.weight"]
    assert not np.shares_memory(merged["copy.weight"], merged["embed.weight"])
    np.testing.assert_allclose(merged["copy.weight"], table + 1.5, rtol=1e-6)


def test_an_expert_that_is_not_tied_unties_the_result():
    base, expert = Tied(), Tied(0.1)
    expert.lm_head.weight = torch.nn.Parameter(expert.lm_head.weight.detach() + 1)
    with pytest.warns(UserWarning, match="differ in expert '1'"):
        merged = cfmerge.merge_state_dicts(base, [Tied(0.2), expert], "average")
    assert not torch.equal(merged["lm_head.weight"], merged["embed_tokens.weight"])


@pytest.mark.parametrize("method", ["ace", "ties", "task_arithmetic"])
def test_strides_are_honoured(llama, files, method):
    base, experts = llama(0), {"math": llama(1), "code": llama(2)}
    turned = {name: t.t().contiguous().t() if t.ndim == 2 else t for name, t in torched(base).items()}
    assert not turned["model.layers.0.mlp.up_proj.weight"].is_contiguous()
    ours = {
        "math": {name: np.asfortranarray(array) for name, array in experts["math"].items()},
        "code": {name: np.repeat(array, 2, -1)[..., ::2] for name, array in experts["code"].items()},
    }
    same(cfmerge.merge_state_dicts(turned, ours, method), files(base, experts, method))


def test_pieces_of_arrays_are_read_as_of_files():
    from cfmerge.formats.arrays import ArraysSource

    array = np.arange(60, dtype=np.float32).reshape(5, 4, 3)
    forms = {
        "plain": array, "turned": np.asfortranarray(array), "torch": torch.from_numpy(array).transpose(0, 2).clone(
        ).transpose(0, 2), "jax": jnp.asarray(array), "half": torch.from_numpy(array).bfloat16(),
        "number": np.float32(3), "empty": np.zeros((0, 3), np.float32),
    }  # fmt: skip
    source = ArraysSource(forms, "base", "memory", {})
    for name in ("plain", "turned", "torch", "jax", "half"):
        np.testing.assert_array_equal(source.read(name).astype(np.float32), array)
        for first, count in ((0, 60), (5, 1), (7, 30), (59, 1), (3, 0)):
            piece = source.read(name, first, count)
            np.testing.assert_array_equal(piece.astype(np.float32), array.reshape(-1)[first : first + count])
            assert not piece.flags.writeable
    assert source.read("number", 0, 1).tolist() == [3.0]
    assert source.read("empty", 0, 0).shape == (0,)
    assert source.tensors["half"].dtype == ml_dtypes.bfloat16


def test_config_tells_as_a_config_file_does(llama, files):
    """Of a module its own; the layout of packed experts follows from it, say."""
    rng = np.random.default_rng(0)
    base = {"model.layers.0.mlp.experts.down_proj": rng.standard_normal((2, 8, 4)).astype(np.float32), **llama(0)}
    name = next(iter(base))
    experts = {
        key: {name: base[name] + rng.standard_normal((2, 8, 4)).astype(np.float32) / 50, **llama(number)}
        for key, number in (("a", 1), ("b", 2))
    }
    config = {"model_type": "mixtral", "hidden_size": 8, "tie_word_embeddings": False}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        same(cfmerge.merge_state_dicts(base, experts, config=config), files(base, experts, "ace", config=config))


def test_partial_heads_and_skips(llama, files):
    base, experts = llama(0), {"math": llama(1), "code": llama(2)}
    part = {"math": {k: v for k, v in experts["math"].items() if "layers.0" in k}, "code": experts["code"]}
    with pytest.warns(UserWarning, match="expert 'math' is partial"):
        merged = cfmerge.merge_state_dicts(base, part, "average", partial=True)
    np.testing.assert_array_equal(merged["model.norm.weight"], experts["code"]["model.norm.weight"])
    score = np.ones((3, 8), np.float32)
    headed = {"a": {**experts["math"], "score.weight": score}, "b": {**experts["code"], "score.weight": 2 * score}}
    rules = [{"match": "*norm*", "method": "skip"}]
    with pytest.raises(CfmergeError, match="heads that the models do not share"):
        cfmerge.merge_state_dicts(base, headed, "average")
    dropped = cfmerge.merge_state_dicts(base, headed, "average", heads="drop", rules=rules)
    assert list(dropped) == [name for name in base if "norm" not in name]
    with pytest.raises(CfmergeError, match="'export' writes files"):
        cfmerge.merge_state_dicts(base, experts, heads="export")


def test_values_that_are_no_arrays_are_the_base_s(llama):
    base = {"a": llama(0)["lm_head.weight"], "layer._extra_state": {"scale": 1}, "b": llama(0)["model.norm.weight"]}
    base = {"layer._extra_state": None, **{k: v for k, v in base.items() if k != "layer._extra_state"}}
    experts = [{**base, "a": base["a"] + step, "b": base["b"] + step} for step in (1, 2)]
    with pytest.warns(UserWarning, match=r"layer\._extra_state: no arrays"):
        merged = cfmerge.merge_state_dicts(base, experts, "average")
    assert list(merged) == ["layer._extra_state", "a", "b"]
    assert merged["layer._extra_state"] is None


WRONG = {
    "fp8": (lambda t: t.to(torch.float8_e4m3fn), r"expert 'math' \(memory:math\) is quantised \(fp8.*'lm_head.weight'"),
    "sparse": (lambda t: t.to_sparse(), "expert 'math': 'lm_head.weight' is sparse"),
    "meta": (lambda t: t.to("meta"), "expert 'math': 'lm_head.weight' lies on the meta device"),
    "quantised": (
        lambda t: torch.quantize_per_tensor(t, 0.1, 0, torch.qint8), "expert 'math': 'lm_head.weight' is quantised"
    ),
    "shape": (lambda t: t[:, :3], r"expert 'math' \(memory:math\): tensor 'lm_head.weight' has shape \(12, 3\), in"),
    "NaN": (lambda t: t * float("nan"), r"expert 'math' \(memory:math\): tensor 'lm_head.weight' holds NaN"),
    "order": (lambda t: t.numpy().astype(">f4"), "expert 'math': 'lm_head.weight' has the bytes"),
    "text": (lambda t: np.array(["a"]), "expert 'math': 'lm_head.weight' is of dtype <U1"),
    "tree": (lambda t: {"inner": t}, "expert 'math': 'lm_head.weight' is a dict, not an array; merge_params"),
}  # fmt: skip


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore:.*quantiz")
@pytest.mark.parametrize("wrong", list(WRONG))
def test_errors_name_model_and_tensor(llama, wrong):
    turn, message = WRONG[wrong]
    expert = torched(llama(1))
    expert["lm_head.weight"] = turn(expert["lm_head.weight"])
    with pytest.raises(CfmergeError, match=message):
        cfmerge.merge_state_dicts(torched(llama(0)), {"math": expert, "code": llama(2)})


def test_the_same_model_twice_is_a_mistake(llama):
    """As when state dicts of one training run are kept without a copy: all are the last one."""
    base, expert = torched(llama(0)), torched(llama(1))
    with pytest.raises(CfmergeError, match=r"expert '1' .* holds the same weights as expert '0'"):
        cfmerge.merge_state_dicts(base, [expert, expert])
    with pytest.raises(CfmergeError, match=r"expert '0' .* holds the same weights as the base"):
        cfmerge.merge_state_dicts(base, [base, expert])
    with pytest.raises(CfmergeError, match="one expert"):
        cfmerge.merge_state_dicts(base, [expert])
    assert cfmerge.merge_state_dicts(base, [expert], "average", allow=["one-expert"]).keys() == base.keys()


@pytest.mark.parametrize(
    ("base", "message"),
    [
        ({"model": {"a": np.ones(1)}}, "base: is a checkpoint, whose tensors lie in its 'model'; give that"),
        ([1], "base: expected a module or a dict of arrays by name, found list"),
        ({}, "base: holds no arrays"),
        ({"step": 3}, "base: holds no arrays"),
    ],
)
def test_what_is_no_state_dict(base, message, llama):
    with pytest.raises(CfmergeError, match=re.escape(message)):
        cfmerge.merge_state_dicts(base, [llama(1), llama(2)])


def test_weights_that_do_not_fit(llama):
    models = [llama(number) for number in range(3)]
    with pytest.raises(CfmergeError, match="1 weights for 2 experts"):
        cfmerge.merge_state_dicts(models[0], models[1:], weights=[1.0])
    with pytest.raises(CfmergeError, match="weights by name: the experts are a, b; found a"):
        cfmerge.merge_state_dicts(models[0], {"a": models[1], "b": models[2]}, weights={"a": 1.0})


@pytest.mark.filterwarnings("ignore:.*are dequantised")
def test_fp8_counts_as_bfloat16_if_that_is_asked_for(llama):
    base, names = torched(llama(0)), [name for name in llama(0) if "proj" in name]
    plain, packed = [], []
    for number in (1, 2):
        tensors = torched(llama(number))
        eight = {name: (tensors[name] * 64).to(torch.float8_e4m3fn) for name in names}
        scales = {f"{name}_scale": torch.full((1,), 1 / 64) for name in names}
        packed.append({**tensors, **eight, **scales})
        plain.append({**tensors, **{name: (tensor.float() / 64).bfloat16() for name, tensor in eight.items()}})
    expected = cfmerge.merge_state_dicts(base, plain, "average")
    merged = cfmerge.merge_state_dicts(base, packed, "average", dequantize=True)
    for name, tensor in expected.items():
        assert bits(merged[name]) == bits(tensor)


ON_DEVICES = """
import jax, numpy as np, cfmerge
from jax.sharding import NamedSharding, PartitionSpec
mesh = jax.make_mesh((2,), ("data",))
plain = [{"layer.weight": np.arange(24, dtype=np.float32).reshape(4, 6) + n, "layer.bias": np.full(4, n, np.float32)}
         for n in (0, 1, 4)]
where = NamedSharding(mesh, PartitionSpec("data"))
spread = [{name: jax.device_put(array, where) for name, array in one.items()} for one in plain]
for method in ("ace", "ties"):
    expected = cfmerge.merge_state_dicts(plain[0], plain[1:], method)
    merged = cfmerge.merge_state_dicts(spread[0], [spread[1], plain[2]], method)
    for name, array in expected.items():
        assert merged[name].sharding == where and (np.asarray(merged[name]) == array).all()
assert spread[1]["layer.weight"]._npy_value is None  # no copy of an input stays
"""


def test_arrays_on_several_devices():
    """They are fetched one at a time, and the result lies as the base does."""
    environment = os.environ | {"XLA_FLAGS": "--xla_force_host_platform_device_count=2"}
    done = subprocess.run(
        [sys.executable, "-c", ON_DEVICES], capture_output=True, text=True, cwd=ROOT, timeout=300, env=environment
    )
    assert done.returncode == 0, done.stderr


MEMORY = """
import re
from pathlib import Path
import numpy as np
import cfmerge

def model(step, count):
    return {f"layers.{n}.mlp.up_proj.weight": np.full((1024, 1024), n + step, np.float32) for n in range(count)}

def peak():
    return int(re.search(r"VmHWM:\\s+(\\d+)", Path("/proc/self/status").read_text())[1]) / 1024

models = [model(step, 64) for step in (0.0, 0.5, 1.5)]
small = [dict(list(one.items())[:2]) for one in models]
cfmerge.merge_state_dicts(small[0], small[1:], METHOD)
before = peak()
merged = cfmerge.merge_state_dicts(models[0], models[1:], METHOD)
print((peak() - before) / 4)  # tensors of 4 MiB
assert len(merged) == 64 and float(merged["layers.3.mlp.up_proj.weight"][0, 0]) == 4.0
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="peak memory is read from /proc")
def test_memory_is_the_result_and_a_few_tensors():
    """Of 64 tensors, three models: the result's 64 and what the loop has in work; a copy of the inputs were 192."""
    code = MEMORY.replace("METHOD", "'average'")
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, timeout=300)
    assert done.returncode == 0, done.stderr
    assert 32 < float(done.stdout) < 64 + 48


def test_torch_is_not_imported():
    code = "import sys, cfmerge; cfmerge.merge_state_dicts; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT, timeout=300)
