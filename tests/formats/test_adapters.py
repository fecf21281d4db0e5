"""Factors of an adapter are no weights: an expert that holds them is refused, unless a rule leaves them out."""

import numpy as np
import pytest
from laid import laid, ones

import cfmerge
from cfmerge.formats import open_checkpoint
from cfmerge.formats.adapters import factors

Q = "model.layers.0.self_attn.q_proj"
PEFT = ones(f"{Q}.lora_A.default.weight", f"{Q}.lora_B.default.weight")
NAMES = [
    *PEFT, "base_model.model.h.0.lora_A.weight", "emb.lora_embedding_A", "h.lora_magnitude_vector",
    "lora_unet_x.lora_down.weight", "x.hada_w1_a", "x.lokr_w2",
    "unet.x.lora.down.weight", "attn1.processor.to_q_lora.up.weight",
]  # fmt: skip
OTHERS = ["attn.w_lora.lora.0.weight", "q_a_proj.weight", "explorer.lora.weight"]


def test_factors_are_known_by_their_names(tmp_path):
    source = open_checkpoint(laid(tmp_path, {"m.safetensors": ones(*NAMES, *OTHERS)}))
    assert set(factors(source)) == set(NAMES)


@pytest.mark.parametrize("base_layer", [True, False])
def test_an_expert_with_factors_beside_its_weights(family, refused, make_model, tmp_path, llama, base_layer):
    full = llama(1)
    if base_layer:
        full[f"{Q}.base_layer.weight"] = full.pop(f"{Q}.weight")
    path = make_model(tmp_path / "unmerged", full | PEFT)
    refused(
        ["expert 'unmerged'", str(path), "adapter (LoRA)", "lora_A", "merge_and_unload"],
        family.base, [path, family.experts[1]],
    )  # fmt: skip
    rules = [{"match": "*.lora_[AB].*", "method": "skip"}]
    plan = cfmerge.plan(family.base, [path, family.experts[1]], "average", rules=rules)
    assert any("left out by rule" in note for note in plan.notes)


def test_an_adapter_alone(family, refused, tmp_path):
    path = laid(tmp_path / "ad", {"adapter_model.safetensors": PEFT}) / "adapter_model.safetensors"
    message = refused(["adapter (LoRA)"], family.base, [family.experts[0], path])
    assert "lacks" not in message


def test_factors_that_all_models_have_are_told(make_model, tmp_path, llama):
    models = [make_model(tmp_path / f"m{n}", llama(n) | {k: v + np.float32(n) for k, v in PEFT.items()})
              for n in range(3)]  # fmt: skip
    assert any("each is merged by itself" in note for note in cfmerge.plan(models[0], models[1:], "average").notes)
