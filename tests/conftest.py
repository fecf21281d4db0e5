"""Shared by all tests: a calm environment, and tiny models on disk."""

import atexit
import gc
import hashlib
import json
import os
import shutil
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

# Before JAX or NumPy are imported, and for the processes that tests start.
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
os.environ.setdefault("JAX_PLATFORMS", "cpu")
# Compiling is most of the time that tests take, so programs are compiled quickly, as users' small merges of files are
# (`engine/compiling.py`). Compiled in full are the tests that ask for `compiled_in_full`, the examples, and in
# `.ci/run` the demo and the accuracy suite; all tests are by `JAX_DISABLE_MOST_OPTIMIZATIONS=false XLA_FLAGS= pytest`.
os.environ.setdefault("JAX_DISABLE_MOST_OPTIMIZATIONS", "true")
os.environ.setdefault("XLA_FLAGS", "--xla_cpu_use_fusion_emitters=false")
if "CFMERGE_CACHE" not in os.environ:  # one calibration for all processes of a test run, and none of the user's
    os.environ["CFMERGE_CACHE"] = _rates = tempfile.mkdtemp(prefix="cfmerge-tests-rates-")
    atexit.register(shutil.rmtree, _rates, ignore_errors=True)
if "JAX_COMPILATION_CACHE_DIR" not in os.environ:  # one compilation of each step for all processes of a test run
    _cache = tempfile.mkdtemp(prefix="cfmerge-tests-")
    os.environ["JAX_COMPILATION_CACHE_DIR"] = _cache
    os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"
    os.environ["JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES"] = "-1"
    atexit.register(shutil.rmtree, _cache, ignore_errors=True)

import jax
import numpy as np
import pytest
import shape_checks
from jax._src import compiler

shape_checks.install()  # so cfmerge is imported after this

LONGEST = ("test_eight_devices.py", "test_examples.py", "test_battery.py", "test_transformers.py", "test_ace.py",
           "test_in_memory.py", "test_minilm.py", "test_adapters_merged.py", "test_jax_layouts.py")  # fmt: skip
Tensors = dict[str, np.ndarray]
LLAMA = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": 8, "intermediate_size": 16,
    "num_hidden_layers": 2, "num_attention_heads": 2, "vocab_size": 12, "tie_word_embeddings": False,
    "torch_dtype": "float32",
}  # fmt: skip
SHAPES = {
    "model.embed_tokens.weight": (12, 8),
    **{
        f"model.layers.{layer}.{name}": shape
        for layer in range(2)
        for name, shape in {
            "self_attn.q_proj.weight": (8, 8), "mlp.up_proj.weight": (16, 8), "mlp.down_proj.weight": (8, 16),
            "input_layernorm.weight": (8,),
        }.items()
    },
    "model.norm.weight": (8,),
    "lm_head.weight": (12, 8),
}  # fmt: skip


def _llama(expert: int = 0, dtype: object = np.float32) -> Tensors:
    """Tensors of a tiny LLaMA: the base for expert 0, fine-tuned ones for 1, 2, ..."""
    common, own = np.random.default_rng(0), np.random.default_rng(1000 + expert)
    scale = 0.02 if expert else 0.0
    return {
        name: (common.standard_normal(shape) + scale * own.standard_normal(shape)).astype(dtype)
        for name, shape in SHAPES.items()
    }


def _make_model(path: Path, tensors: Tensors | None = None, config: dict | None = LLAMA, shards: int = 1) -> Path:
    """Writes a Hugging Face model directory, by the safetensors library; `config=None` leaves config.json out."""
    from safetensors.numpy import save_file

    tensors = _llama() if tensors is None else tensors
    path.mkdir(parents=True)
    if config is not None:
        (path / "config.json").write_text(json.dumps(config))
    if shards == 1:
        save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})
        return path
    names = list(tensors)
    weight_map = {}
    for number in range(shards):
        file = f"model-{number + 1:05d}-of-{shards:05d}.safetensors"
        part = {name: tensors[name] for name in names[number::shards]}
        save_file(part, path / file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(part, file)
    index = {"metadata": {"total_size": sum(t.nbytes for t in tensors.values())}, "weight_map": weight_map}
    (path / "model.safetensors.index.json").write_text(json.dumps(index))
    return path


def _load(directory: Path) -> Tensors:
    """All tensors of a model directory, read by the safetensors library."""
    from safetensors.numpy import load_file

    files = sorted(Path(directory).glob("*.safetensors"))
    return {name: tensor for file in files for name, tensor in load_file(file).items()}


def _contents(directory: Path) -> dict[str, str]:
    """Everything below a directory, hidden or not: `{relative path: SHA-256}`."""
    return {
        str(path.relative_to(directory)): hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else "-"
        for path in sorted(directory.rglob("*"))
    }


@pytest.fixture(scope="module", autouse=True)
def _compiled_code_is_freed():
    """After each file: thousands of small compilations would fill the memory."""
    yield
    jax.clear_caches()


@pytest.fixture(scope="module")
def compiled_in_full():
    """Programs with all optimisations, as users compile what is not small: slower by far, and another arithmetic."""
    quick, options = jax.config.read("jax_disable_most_optimizations"), compiler.get_compile_options

    def in_full(*arguments, env_options_overrides=None, **named):
        overrides = {"xla_cpu_use_fusion_emitters": True, **(env_options_overrides or {})}
        return options(*arguments, env_options_overrides=overrides, **named)

    jax.config.update("jax_disable_most_optimizations", False)
    jax.clear_caches()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(compiler, "get_compile_options", in_full)
        yield
    jax.config.update("jax_disable_most_optimizations", quick)


@pytest.fixture(scope="session")
def llama() -> Callable[..., Tensors]:
    """`llama(expert, dtype)`: tensors of a tiny LLaMA, 0 the base."""
    return _llama


@pytest.fixture(scope="session")
def llama_config() -> dict:
    return dict(LLAMA)


@pytest.fixture(scope="session")
def make_model() -> Callable[..., Path]:
    """`make_model(path, tensors, config, shards)` writes a model directory."""
    return _make_model


@pytest.fixture(scope="session")
def load() -> Callable[[Path], Tensors]:
    """`load(directory)`: a model's tensors, as the safetensors library reads them."""
    return _load


@pytest.fixture(scope="session")
def contents() -> Callable[[Path], dict[str, str]]:
    """`contents(directory)`: SHA-256 of everything below it."""
    return _contents


@pytest.fixture
def family(tmp_path: Path) -> SimpleNamespace:
    """A base and three experts in `tmp_path/in`: `.base`, `.experts`, `.tensors` (the base's first)."""
    tensors = [_llama(number) for number in range(4)]
    paths = [_make_model(tmp_path / "in" / f"m{number}", tensors[number]) for number in range(4)]
    return SimpleNamespace(base=paths[0], experts=paths[1:], tensors=tensors)


@pytest.fixture
def refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., str]:
    """`refused(words, base, experts, ...)`: the merge fails, says all the words, and changes nothing on disk."""

    import cfmerge

    monkeypatch.setattr(sys, "dont_write_bytecode", True)  # Python's own cache, beside a method that is a file

    def check(words: list[str], base: Path, experts: object, method: str = "average", **options: object) -> str:
        before = _contents(tmp_path)
        options.setdefault("output", tmp_path / "out")
        with pytest.raises(cfmerge.CfmergeError) as caught:
            cfmerge.merge(base, experts, method, **options)
        message = str(caught.value)
        for word in words:
            assert word in message
        assert _contents(tmp_path) == before, "the merge left something behind"
        return message

    return check


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The longest files come first: at the end one worker would run one while the other has nothing to do.

    xdist keeps to this order when it is told not to start with the files of most tests (`pyproject.toml`).
    """
    place = {name: number for number, name in enumerate(LONGEST)}
    items.sort(key=lambda item: place.get(item.path.name, len(LONGEST)))


def pytest_collection_finish() -> None:
    """What is imported stays, so the garbage collector need not look at it again: it took a fifteenth of the time."""
    gc.freeze()
