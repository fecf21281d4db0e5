"""Whether `cfmerge convert --names` makes the tensors that the libraries themselves make, bit for bit. No time.

    python benchmarks/converted_names.py make DIR                # needs transformers 5 and torch
    python benchmarks/converted_names.py flax DIR                # in an environment with transformers 4.49, jax 0.4
    python benchmarks/converted_names.py tunix DIR TUNIX         # TUNIX: the sources of tunix 0.1.7, it is not imported

`make` writes tiny random models, and what `convert` makes of them. `flax` loads the models into the Flax classes, and
compares their parameters. `tunix` applies the maps of tunix's own loaders. Tells each model, and fails if one differs.
"""

import argparse
import ast
import contextlib
import json
import re
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np

import cfmerge

SMALL = {
    "hidden_size": 8, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 12, "vocab_size": 16,
    "max_position_embeddings": 10, "bos_token_id": 0, "eos_token_id": 3, "pad_token_id": 1,
}  # fmt: skip
GROUPED = {**SMALL, "num_key_value_heads": 1, "head_dim": 6}
VISION = {key: SMALL[key] for key in ("hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size")}
VISION |= {"image_size": 8, "patch_size": 4}
GPT2 = {
    "n_embd": 8,
    "n_layer": 2,
    "n_head": 2,
    "vocab_size": 16,
    "n_positions": 10,
    "bos_token_id": 0,
    "eos_token_id": 3,
}
T5 = {"d_model": 8, "d_kv": 4, "num_heads": 2, "d_ff": 12, "num_layers": 2, "vocab_size": 16}
EXPERTS = {"num_experts": 3, "num_experts_per_tok": 2, "moe_intermediate_size": 5}
CLIP = {"text_config": SMALL, "vision_config": VISION, "projection_dim": 6}
FLAX = (  # (family, class, config)
    *(("bert", f"Bert{end}", SMALL) for end in ("Model", "ForMaskedLM", "ForPreTraining", "ForSequenceClassification",
                                               "ForQuestionAnswering", "ForTokenClassification")),
    *(("roberta", f"Roberta{end}", SMALL) for end in ("Model", "ForMaskedLM", "ForSequenceClassification")),
    ("gpt2", "GPT2Model", GPT2), ("gpt2", "GPT2LMHeadModel", GPT2),
    ("gpt2", "GPT2LMHeadModel", {**GPT2, "tie_word_embeddings": False}),
    ("vit", "ViTModel", VISION), ("vit", "ViTForImageClassification", VISION), ("clip", "CLIPModel", CLIP),
    ("t5", "T5EncoderModel", T5), ("t5", "T5ForConditionalGeneration", T5),
    ("t5", "T5ForConditionalGeneration", {**T5, "feed_forward_proj": "gated-gelu"}),
)  # fmt: skip
TUNIX = (
    ("llama3", "LlamaForCausalLM", GROUPED), ("qwen2", "Qwen2ForCausalLM", SMALL),
    ("qwen3", "Qwen3ForCausalLM", GROUPED), ("qwen3", "Qwen3MoeForCausalLM", GROUPED | EXPERTS),
    ("gemma2", "Gemma2ForCausalLM", GROUPED),
    ("gemma2", "Gemma2ForCausalLM", {**GROUPED, "num_key_value_heads": 2}), ("gemma3", "Gemma3ForCausalLM", GROUPED),
)  # fmt: skip


def places(directory: Path, models: tuple) -> list[tuple[str, str, dict, Path]]:
    return [(*model, directory / f"{number:02d}_{model[1]}") for number, model in enumerate(models)]


def make(directory: Path) -> None:
    import torch
    import transformers

    for family, name, config, place in places(directory / "flax", FLAX) + places(directory / "tunix", TUNIX):
        torch.manual_seed(0)
        model = getattr(transformers, name)
        model(model.config_class(**config)).save_pretrained(place / "torch")
        cfmerge.convert(place / "torch", place / "converted", names=family, format="safetensors", overwrite=True)


def told(place: Path, theirs: dict[str, np.ndarray]) -> bool:
    """Whether the converted tensors are theirs, and a line about it."""
    source = cfmerge.open_checkpoint(place / "converted")
    ours = {name: source.read(name) for name in source.tensors}
    odd = ours.keys() ^ theirs.keys()
    for name in ours.keys() - odd:
        mine, other = ours[name], np.asarray(theirs[name])
        odd |= set() if (mine.shape, mine.tobytes()) == (other.shape, other.tobytes()) else {name}
    print(f"{place.name:34} {len(ours):3} tensors  {'DIFFER: ' + ', '.join(sorted(odd)[:4]) if odd else 'the same'}")
    return not odd


def flax(directory: Path) -> bool:
    import transformers
    from flax.traverse_util import flatten_dict

    same = []
    for _, name, _, place in places(directory / "flax", FLAX):
        model = getattr(transformers, f"Flax{name}").from_pretrained(place / "torch", from_pt=True)
        found = {"/".join(path): np.asarray(value) for path, value in flatten_dict(model.params).items()}
        same.append(told(place, found))
    return all(same)


def functions(file: Path) -> dict[str, Any]:
    """The functions that a file defines, without its imports: jax.numpy is NumPy."""
    tree = ast.parse("from __future__ import annotations\n" + file.read_text())
    tree.body = [tree.body[0], *(node for node in tree.body if isinstance(node, ast.FunctionDef))]
    jax = SimpleNamespace(default_device=lambda device: contextlib.nullcontext(), devices=lambda kind: [None])
    names: dict[str, Any] = {"re": re, "jnp": np, "jax": jax}
    exec(compile(tree, file, "exec"), names)
    return names


def tunix(directory: Path, sources: Path) -> bool:
    same = []
    for family, _, _, place in places(directory / "tunix", TUNIX):
        folder = sources / "tunix" / "models" / {"gemma2": "gemma"}.get(family, family)
        theirs = functions(folder / ("params_safetensors.py" if family.startswith("gemma") else "params.py"))
        config = json.loads((place / "torch/config.json").read_text())
        heads, hidden = config["num_attention_heads"], config["hidden_size"]
        sizes = SimpleNamespace(
            embed_dim=hidden, num_heads=heads, num_kv_heads=config["num_key_value_heads"],
            head_dim=config.get("head_dim") or hidden // heads, vision_config=None,
        )  # fmt: skip
        mapping, source, found = (
            theirs["_get_key_and_transform_mapping"](sizes),
            cfmerge.open_checkpoint(place / "torch"),
            {},
        )
        for name in source.tensors:
            pattern = next(pattern for pattern in mapping if re.fullmatch(pattern, name))
            target, change = mapping[pattern]
            order, shape = change or (None, None)
            tensor = source.read(name)
            tensor = tensor if order is None else tensor.transpose(order)
            found[re.sub(pattern, target, name)] = tensor if shape is None else tensor.reshape(shape)
        if "_make_preprocess_fn" in theirs:
            found = theirs["_make_preprocess_fn"](sizes)(found)
        if "_stack_experts" in theirs:
            found = theirs["_stack_experts"](found)
        same.append(told(place, {name.replace(".kernel", "/kernel").replace(".", "/"): t for name, t in found.items()}))
    return all(same)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["make", "flax", "tunix"])
    parser.add_argument("directory", type=Path)
    parser.add_argument("sources", type=Path, nargs="?")
    asked = parser.parse_args()
    if asked.what == "make":
        make(asked.directory)
    else:
        sys.exit(not (flax(asked.directory) if asked.what == "flax" else tunix(asked.directory, asked.sources)))
