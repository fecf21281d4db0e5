"""Makes a LLaMA-architecture base of 374M parameters and experts of it, in bfloat16, for the benchmarks.

    python benchmarks/make_llama.py DIR [--experts 8] [--layers 24] [--hidden 1024] [--vocabulary 32000]

Weights are random; an expert's delta is 1 % of the base's norm: a low-rank part whose spectrum decays, and noise,
as fine-tuning leaves it. DIR/base and DIR/expert_0 .. are Hugging Face directories.
"""

import argparse
import json
import shutil
from pathlib import Path
from typing import NamedTuple

import ml_dtypes
import numpy as np

from cfmerge.formats.shards import ShardWriter

BF16 = np.dtype(ml_dtypes.bfloat16)


class Size(NamedTuple):
    """How large the model is; the default is 374M parameters."""

    layers: int = 24
    hidden: int = 1024
    vocabulary: int = 32000

    @property
    def intermediate(self) -> int:
        return self.hidden * 11 // 4


SIZES = {  # by their parameters; the widest layers have 88, 704, 2816 and 5632 inputs
    "tiny": Size(2, 32, 256),
    "15M": Size(8, 256, 16000),
    "374M": Size(),
    "1.1B": Size(19, 2048),
}


def config(size: Size) -> dict:
    return {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": size.hidden,
        "intermediate_size": size.intermediate, "num_hidden_layers": size.layers, "num_attention_heads": 16,
        "num_key_value_heads": 16, "vocab_size": size.vocabulary, "max_position_embeddings": 2048,
        "hidden_act": "silu", "rms_norm_eps": 1e-5, "tie_word_embeddings": False, "dtype": "bfloat16",
        "bos_token_id": 1, "eos_token_id": 2,
    }  # fmt: skip


def shapes(size: Size) -> dict[str, tuple[int, ...]]:
    d, f, v = size.hidden, size.intermediate, size.vocabulary
    result: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (v, d)}
    for n in range(size.layers):
        prefix = f"model.layers.{n}."
        result |= {prefix + f"self_attn.{p}_proj.weight": (d, d) for p in "qkvo"}
        result |= {prefix + f"mlp.{p}_proj.weight": (f, d) for p in ("gate", "up")}
        result |= {prefix + "mlp.down_proj.weight": (d, f)}
        result |= {prefix + f"{p}_layernorm.weight": (d,) for p in ("input", "post_attention")}
    return result | {"model.norm.weight": (d,), "lm_head.weight": (v, d)}


def base_tensor(rng: np.random.Generator, shape: tuple[int, ...]) -> np.ndarray:
    if len(shape) == 1:
        return np.ones(shape, np.float32)
    return rng.standard_normal(shape, np.float32) * np.float32(0.02)


def delta(rng: np.random.Generator, shape: tuple[int, ...]) -> np.ndarray:
    if len(shape) == 1:
        return rng.standard_normal(shape, np.float32) * np.float32(1e-2)
    rank = 32
    spectrum = np.arange(1, rank + 1, dtype=np.float32) ** -1
    low = rng.standard_normal((shape[0], rank), np.float32) * spectrum
    low = low @ rng.standard_normal((rank, shape[1]), np.float32)
    low *= np.float32(2e-4) / np.sqrt(np.mean(low**2))
    return low + rng.standard_normal(shape, np.float32) * np.float32(1e-4)


def write(directory: Path, size: Size, expert: int | None) -> None:
    directory.mkdir(parents=True)
    (directory / "config.json").write_text(json.dumps(config(size), indent=2) + "\n")
    generation = {"bos_token_id": 1, "eos_token_id": 2, "do_sample": False}
    (directory / "generation_config.json").write_text(json.dumps(generation) + "\n")
    tensors = shapes(size)
    writer = ShardWriter(directory, {n: (s, BF16) for n, s in tensors.items()}, 1 << 40, {"format": "pt"})
    for number, (name, shape) in enumerate(tensors.items()):
        value = base_tensor(np.random.default_rng([0, number]), shape).astype(BF16)
        if expert is not None:
            change = delta(np.random.default_rng([1, expert, number]), shape)
            value = (value.astype(np.float32) + change).astype(BF16)
        writer.write(name, value)
    writer.close()


def write_models(directory: Path, size: Size, experts: int) -> Path:
    """`directory`, with a base and experts in it; what is there already stays as it is."""
    for number in (None, *range(experts)):
        place = directory / ("base" if number is None else f"expert_{number}")
        if not place.exists():
            partial = directory / f"{place.name}.partial"
            shutil.rmtree(partial, ignore_errors=True)
            write(partial, size, number)
            partial.rename(place)
    return directory


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("directory", type=Path)
    parser.add_argument("--experts", type=int, default=8)
    parser.add_argument("--layers", type=int, default=Size().layers)
    parser.add_argument("--hidden", type=int, default=Size().hidden, help="a multiple of 32")
    parser.add_argument("--vocabulary", type=int, default=Size().vocabulary)
    args = parser.parse_args()
    size = Size(args.layers, args.hidden, args.vocabulary)
    write_models(args.directory, size, args.experts)
    print(f"{args.directory}: base and {args.experts} experts")
