"""Writes the headers of large models as sparse files: names and shapes are real, there are no data.

    python benchmarks/make_headers.py DIR --model llama-8b|llama-70b|llama-405b|deepseek-671b [--experts 4]
    cfmerge plan --base DIR/base -e DIR/expert_0 -e DIR/expert_1 ... --devices 8 --device-memory 80GB

Each file is made as long as its header says by `os.truncate`, and takes a few kB of disk. `--layers N` writes the
first N layers alone.
"""

import argparse
import json
import os
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

Shapes = dict[str, tuple[int, ...]]
SHARD = 5_000_000_000  # bytes

LLAMA = {  # layers, hidden, intermediate, heads, key-value heads, vocabulary
    "llama-8b": (32, 4096, 14336, 32, 8, 128256),
    "llama-70b": (80, 8192, 28672, 64, 8, 128256),
    "llama-405b": (126, 16384, 53248, 128, 8, 128256),
}
MODELS = (*LLAMA, "deepseek-671b")


def llama(name: str, layers: int | None = None) -> tuple[dict[str, Any], Shapes]:
    """The config and the shapes of Llama 3.1."""
    count, d, f, heads, few, v = LLAMA[name]
    count, narrow = layers or count, d // heads * few
    shapes: Shapes = {"model.embed_tokens.weight": (v, d)}
    for n in range(count):
        at = f"model.layers.{n}."
        shapes |= {at + "self_attn.q_proj.weight": (d, d), at + "self_attn.o_proj.weight": (d, d)}
        shapes |= {at + f"self_attn.{p}_proj.weight": (narrow, d) for p in "kv"}
        shapes |= {at + f"mlp.{p}_proj.weight": (f, d) for p in ("gate", "up")}
        shapes |= {at + "mlp.down_proj.weight": (d, f)}
        shapes |= {at + f"{p}_layernorm.weight": (d,) for p in ("input", "post_attention")}
    config = {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": d, "intermediate_size": f,
        "num_hidden_layers": count, "num_attention_heads": heads, "num_key_value_heads": few, "vocab_size": v,
        "tie_word_embeddings": False, "dtype": "bfloat16",
    }  # fmt: skip
    return config, shapes | {"model.norm.weight": (d,), "lm_head.weight": (v, d)}


def deepseek(layers: int | None = None) -> tuple[dict[str, Any], Shapes]:
    """Those of DeepSeek-V3 in bfloat16: 61 layers, the first 3 dense, the others with 256 experts and a shared one."""
    d, v, heads, count = 7168, 129280, 128, layers or 61
    attention = {
        "q_a_proj": (1536, d), "q_a_layernorm": (1536,), "q_b_proj": (heads * 192, 1536),
        "kv_a_proj_with_mqa": (576, d), "kv_a_layernorm": (512,), "kv_b_proj": (heads * 256, 512),
        "o_proj": (d, heads * 128),
    }  # fmt: skip
    shapes: Shapes = {"model.embed_tokens.weight": (v, d)}

    def block(at: str, f: int) -> Shapes:
        return {f"{at}.gate_proj.weight": (f, d), f"{at}.up_proj.weight": (f, d), f"{at}.down_proj.weight": (d, f)}

    for n in range(count):
        at = f"model.layers.{n}"
        shapes |= {f"{at}.self_attn.{name}.weight": shape for name, shape in attention.items()}
        shapes |= {f"{at}.{p}_layernorm.weight": (d,) for p in ("input", "post_attention")}
        if n < 3:
            shapes |= block(f"{at}.mlp", 18432)
            continue
        shapes |= {f"{at}.mlp.gate.weight": (256, d), f"{at}.mlp.gate.e_score_correction_bias": (256,)}
        shapes |= block(f"{at}.mlp.shared_experts", 2048)
        for number in range(256):
            shapes |= block(f"{at}.mlp.experts.{number}", 2048)
    config = {
        "architectures": ["DeepseekV3ForCausalLM"], "model_type": "deepseek_v3", "hidden_size": d,
        "intermediate_size": 18432, "moe_intermediate_size": 2048, "n_routed_experts": 256, "n_shared_experts": 1,
        "num_experts_per_tok": 8, "first_k_dense_replace": 3, "num_hidden_layers": count, "num_attention_heads": heads,
        "num_key_value_heads": heads, "q_lora_rank": 1536, "kv_lora_rank": 512, "qk_nope_head_dim": 128,
        "qk_rope_head_dim": 64, "v_head_dim": 128, "vocab_size": v, "tie_word_embeddings": False, "dtype": "bfloat16",
    }  # fmt: skip
    return config, shapes | {"model.norm.weight": (d,), "lm_head.weight": (v, d)}


def write(directory: Path, config: dict[str, Any], shapes: Shapes) -> None:
    """A Hugging Face directory of sparse shards."""
    directory.mkdir(parents=True)
    (directory / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    shards, index = list(_shards(shapes)), {}
    for number, names in enumerate(shards, 1):
        file = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        entries, end = {}, 0
        for name in names:
            size = 2 * _product(shapes[name])
            entries[name] = {"dtype": "BF16", "shape": list(shapes[name]), "data_offsets": [end, end + size]}
            end += size
        header = json.dumps(entries, separators=(",", ":")).encode()
        (directory / file).write_bytes(struct.pack("<Q", len(header)) + header)
        os.truncate(directory / file, 8 + len(header) + end)
        index |= dict.fromkeys(names, file)
    total = sum(2 * _product(shape) for shape in shapes.values())
    content = {"metadata": {"total_size": total}, "weight_map": index}
    (directory / "model.safetensors.index.json").write_text(json.dumps(content) + "\n")


def _shards(shapes: Shapes) -> Iterator[list[str]]:
    names: list[str] = []
    filled = 0
    for name, shape in shapes.items():
        if names and filled + 2 * _product(shape) > SHARD:
            yield names
            names, filled = [], 0
        names.append(name)
        filled += 2 * _product(shape)
    yield names


def _product(shape: tuple[int, ...]) -> int:
    size = 1
    for length in shape:
        size *= length
    return size


def family(directory: Path, model: str, experts: int, layers: int | None = None) -> None:
    """A base and its experts."""
    config, shapes = deepseek(layers) if model == "deepseek-671b" else llama(model, layers)
    for name in ("base", *(f"expert_{number}" for number in range(experts))):
        write(directory / name, config, shapes)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("directory", type=Path)
    parser.add_argument("--model", choices=MODELS, required=True)
    parser.add_argument("--experts", type=int, default=4)
    parser.add_argument("--layers", type=int, help="the first so many alone")
    args = parser.parse_args()
    family(args.directory, args.model, args.experts, args.layers)
    print(f"{args.directory}: headers of {args.model}, base and {args.experts} experts")
