"""Merges that are written as an adapter: peft loads them, and what is not kept is told."""

import copy
import json

import numpy as np
import pytest
from peft import PeftModel
from peft_models import adapter, saved, tiny
from safetensors.numpy import load_file

import cfmerge
from cfmerge.errors import CfmergeError
from cfmerge.formats import open_checkpoint
from cfmerge.formats.adapter_sink import AdapterSink
from cfmerge.formats.adapters import AdapterSource
from cfmerge.formats.base import Totals
from cfmerge.models import classify

PACKED = {"match": "mlp.experts.*", "method": "keep-base"}, {"match": "attn.in_proj_*", "method": "keep-base"}
ALONE = {"allow": ["one-expert"], "rules": PACKED}


def loaded(model, path):
    """What peft makes of the model and the adapter."""
    merged = PeftModel.from_pretrained(copy.deepcopy(model), path).merge_and_unload()
    return {name: tensor.detach().numpy() for name, tensor in merged.state_dict().items()}


@pytest.fixture
def base(tmp_path):
    model = tiny()
    return model, saved(model, tmp_path / "base", {"model_type": "gpt2"})  # whose c_fc is stored (in, out)


def test_a_merge_of_adapters_comes_out_whole(base, tmp_path):
    model, place = base
    every = ["fc", "square", "conv", "conv_line"]
    both = [
        adapter(
            model, tmp_path / f"a{seed}", seed, target_modules=every, r=2, modules_to_save=["norm"], bias="lora_only"
        )
        for seed in (1, 2)
    ]
    result = cfmerge.merge(
        place, [tmp_path / "a1", tmp_path / "a2"], "average", output=tmp_path / "out", adapter_out="exact"
    )
    for name, tensor in loaded(model, tmp_path / "out").items():
        mean = (both[0][name] + both[1][name]) / 2
        np.testing.assert_allclose(tensor, mean, rtol=0, atol=3e-6 * np.abs(mean).max())
    config = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"], config["rank_pattern"]) == (4, 4, {})
    assert sorted(config["target_modules"]) == sorted(every)
    assert config["bias"] == "all"
    assert any("100.00% of the deltas' squared norm" in note for note in result.notes)
    assert "library_name: peft" in (tmp_path / "out" / "README.md").read_text()
    again = AdapterSource(tmp_path / "out", open_checkpoint(place))
    assert again.rank("fc.weight") == 4
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [
        "README.md",
        "adapter_config.json",
        "adapter_model.safetensors",
    ]


def test_an_adapter_is_extracted_from_a_full_fine_tune(base, tmp_path):
    model, place = base
    tuned = saved(tiny(3), tmp_path / "tuned")
    result = cfmerge.merge(place, [tuned], "average", output=tmp_path / "out", adapter_out=3, **ALONE)
    ours, theirs = load_file(place / "model.safetensors"), load_file(tuned / "model.safetensors")
    kept = whole = 0.0
    for name, tensor in loaded(model, tmp_path / "out").items():
        delta, found = theirs[name] - ours[name], tensor - ours[name]
        if name.startswith(("mlp.experts", "attn.in_proj")):
            assert not found.any()
        elif delta.ndim > 1 and not name.startswith("embed_tokens"):
            u, s, vt = np.linalg.svd(delta.reshape(len(delta), -1), full_matrices=False)
            best = ((u[:, :3] * s[:3]) @ vt[:3]).reshape(delta.shape)
            np.testing.assert_allclose(found, best, rtol=0, atol=1e-5 * np.abs(best).max())
            kept, whole = kept + (s[:3] ** 2).sum(), whole + (s**2).sum()
        else:
            np.testing.assert_allclose(tensor, theirs[name], rtol=0, atol=1e-6)
    assert any(f"{kept / whole:.2%} of the deltas' squared norm is kept at rank 3" in note for note in result.notes)
    assert any("embed_tokens.weight" in note and "as they are" in note for note in result.notes)
    config = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert config["rank_pattern"] == config["alpha_pattern"] == {"score": 2}
    assert "norm" in config["modules_to_save"]


def test_what_has_no_place_in_an_adapter_is_refused_with_a_rule(base, tmp_path):
    tuned = saved(tiny(3), tmp_path / "tuned")
    with pytest.raises(CfmergeError) as error:
        cfmerge.merge(base[1], [tuned], "average", output=tmp_path / "out", adapter_out=3, allow=["one-expert"])
    for word in ("mlp.experts", "attn.in_proj_", 'method=keep-base"'):
        assert word in str(error.value)
    assert not (tmp_path / "out").exists()


def test_options_of_a_model_are_refused(base, tmp_path):
    tuned = saved(tiny(3), tmp_path / "tuned")
    for options, word in (
        ({"adapter_out": 3, "dtype": "bfloat16"}, "dtype"),
        ({"adapter_out": 3, "format": "torch"}, "format: torch"),
        ({"adapter_out": 0}, "positive"),
        ({"adapter_out": "exakt"}, "adapter_out: expected one of a number, exact, found 'exakt'"),
    ):
        with pytest.raises(CfmergeError, match=word):
            cfmerge.merge(base[1], [tuned], "average", output=tmp_path / "out", **ALONE, **options)


def test_pieces_and_factors_make_one_adapter(base, tmp_path):
    model, place = base
    source, rng = open_checkpoint(place), np.random.default_rng(0)
    names = ["fc.weight", "mlp.c_fc.weight", "conv.weight", "norm.weight"]
    kinds = classify({n: (i.shape, i.dtype.name) for n, i in source.tensors.items()}, source.config)
    left, right = rng.standard_normal((6, 2)), rng.standard_normal((2, 8))  # of c_fc, as it is stored
    merged = {name: source.read(name) + 1 for name in names if name != "mlp.c_fc.weight"}
    with AdapterSink(tmp_path / "out", source, {name: kinds[name] for name in names}, "exact") as sink:
        sink.declare({name: (source.tensors[name].shape, np.dtype(np.float32)) for name in names})
        for name, tensor in merged.items():
            flat, half = tensor.reshape(-1), tensor.size // 2
            sink.write(name, flat[half:], half)
            sink.write(name, flat[:half], 0)
        sink.write_factors("mlp.c_fc.weight", left, right)
        sink.write("square.weight", source.read("square.weight"))  # kept from the base
        sink.finish(Totals())
        sink.commit()
    found = loaded(model, tmp_path / "out")
    merged["mlp.c_fc.weight"] = source.read("mlp.c_fc.weight") + left @ right
    for name, tensor in source.tensors.items():
        del tensor
        expected = merged.get(name, source.read(name))
        np.testing.assert_allclose(found[name], expected, rtol=0, atol=3e-6 * max(np.abs(expected).max(), 1))
    with AdapterSink(tmp_path / "short", source, {"fc.weight": kinds["fc.weight"]}, 2) as sink:
        sink.declare({})
        sink.write("fc.weight", merged["fc.weight"].reshape(-1)[:7], 0)
        with pytest.raises(CfmergeError, match=r"not wholly written: fc.weight"):
            sink.finish(Totals())
    assert not (tmp_path / "short").exists()
