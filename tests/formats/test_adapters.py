"""Factors of an adapter are no weights: an expert that holds them is refused, unless a rule leaves them out."""

import numpy as np
import pytest
from laid import laid, ones
from safetensors.numpy import load_file

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


# --- adapters as experts of a merge -------------------------------------------------------------------------------


@pytest.fixture
def models(make_model, tmp_path, llama):
    """A base, two adapters over it, and what they make of it, as models."""
    rng = np.random.default_rng(5)
    base = llama(0)
    names = [name.removesuffix(".weight") for name in base if "q_proj" in name or "up_proj" in name]
    adapters, merged = [], []
    for number in range(2):
        pairs, whole = {}, dict(base)
        for name in names:
            rows, columns = base[f"{name}.weight"].shape
            a, b = (0.1 * rng.standard_normal(shape).astype(np.float32) for shape in ((2, columns), (rows, 2)))
            pairs |= {f"base_model.model.{name}.lora_A.weight": a, f"base_model.model.{name}.lora_B.weight": b}
            whole[f"{name}.weight"] = base[f"{name}.weight"] + 2 * b @ a
        config = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "base_model_name_or_path": "org/tiny"}
        files = {"adapter_model.safetensors": pairs, "adapter_config.json": config}
        adapters.append(laid(tmp_path / f"a{number}", files))
        merged.append(make_model(tmp_path / f"whole{number}", whole))
    return make_model(tmp_path / "base", base), adapters, merged


def same(one, other, load, atol=1e-6):
    ours, theirs = load(one), load(other)
    assert ours.keys() == theirs.keys()
    for name, tensor in theirs.items():
        np.testing.assert_allclose(ours[name], tensor, rtol=0, atol=atol)


@pytest.mark.parametrize("method", ["average", "ace", "ties"])
def test_adapters_are_merged_as_the_models_that_they_make(models, tmp_path, load, method):
    base, adapters, merged = models
    expected = cfmerge.merge(base, merged, method, output=tmp_path / "models").output
    result = cfmerge.merge(base, adapters, method, output=tmp_path / "adapters")
    same(result.output, expected, load, 1e-5)
    same(cfmerge.merge(base, [adapters[0], merged[1]], method, output=tmp_path / "mixed").output, expected, load, 1e-5)
    untouched = any("changed by no adapter" in note for note in result.notes)
    assert untouched == (method != "ties")  # which looks at the whole model
    card = (tmp_path / "adapters" / "README.md").read_text()
    assert "adapter_model.safetensors" in card
    assert "adapter_config.json" in card


def test_an_adapter_over_another_model(models, make_model, tmp_path, load, llama):
    base, adapters, merged = models
    other, whole = llama(1), llama(1)
    delta = {name: load(merged[0])[name] - tensor for name, tensor in load(base).items()}
    whole = {name: tensor + delta[name] for name, tensor in other.items()}
    paths = make_model(tmp_path / "other", other), make_model(tmp_path / "tuned", whole)
    over = cfmerge.Expert(str(paths[0]), "tuned", adapter=str(adapters[0]))
    expected = cfmerge.merge(base, [paths[1], merged[1]], "average", output=tmp_path / "models").output
    same(cfmerge.merge(base, [over, adapters[1]], "average", output=tmp_path / "out").output, expected, load)
    own = cfmerge.Expert(str(base), "own", adapter=str(adapters[0]))
    plan = cfmerge.plan(base, [own, adapters[1]], "average")
    assert plan.experts[0].rank("model.layers.0.self_attn.q_proj.weight") == 2  # of the base itself: exact factors


def test_adapters_that_name_different_bases(models, refused):
    base, adapters, _ = models
    config = adapters[1] / "adapter_config.json"
    config.write_text(config.read_text().replace("org/tiny", "org/large"))
    refused(["different bases", "'org/tiny'", "'org/large'", "--allow other-base"], base, adapters)
    plan = cfmerge.plan(base, adapters, "average", allow=["other-base"])
    assert any("different bases" in note for note in plan.notes)
    config.write_text(config.read_text().replace("org/large", "unsloth/tiny-bnb-4bit"))
    assert any("quantised model" in note for note in cfmerge.plan(base, adapters, "average").notes)


def test_the_names_of_an_adapter_are_renamed(models, refused, tmp_path):
    from safetensors.numpy import load_file, save_file

    base, adapters, merged = models
    file = adapters[0] / "adapter_model.safetensors"
    save_file({name.replace("q_proj", "query"): tensor for name, tensor in load_file(file).items()}, file)
    refused(["query.weight", "lacks", "rename"], base, adapters)
    rename = [cfmerge.Rename(r"\.query\.", ".q_proj.")]
    plan = cfmerge.plan(base, [cfmerge.Expert(str(adapters[0]), rename=rename), adapters[1]], "average")
    assert plan.experts[0].rank("model.layers.1.self_attn.q_proj.weight") == 2
    assert cfmerge.plan(base, adapters, "average", rename=rename).experts[0].rank(f"{Q}.weight") == 2
    wrong = cfmerge.Expert(str(adapters[1]), rename=[cfmerge.Rename("nothing", "x")])
    refused(["rename 'nothing' matches none"], base, [merged[0], wrong])
    partial = cfmerge.Expert(str(adapters[0]), partial=True)
    assert any(
        "query.weight" in note and "left out" in note for note in cfmerge.plan(base, [partial, adapters[1]]).notes
    )


def test_the_same_adapter_twice_and_an_adapter_that_is_none(models, refused, tmp_path):
    base, adapters, merged = models
    refused(["same files"], base, [adapters[0], cfmerge.Expert(str(adapters[0]), "again")])
    refused(["is no adapter"], base, [cfmerge.Expert(str(base), "x", adapter=str(merged[0])), adapters[1]])
    refused(
        ["is an adapter itself"], base, [cfmerge.Expert(str(adapters[0]), "x", adapter=str(adapters[1])), merged[0]]
    )
    refused(["no such file"], base, [cfmerge.Expert(str(base), "x", adapter="nowhere"), adapters[1]])


def test_statistics_count_an_adapter_where_it_changes_nothing(models, tmp_path, load):
    base, adapters, merged = models
    expected = cfmerge.merge(base, [merged[0], merged[1]], "ace", output=tmp_path / "models").output
    kept = cfmerge.accumulate(base, [adapters[0]], "ace", output=tmp_path / "kept", allow=["one-expert"])
    assert "model.layers.0.mlp.down_proj.weight" in kept.tensors
    recipe = cfmerge.Recipe(str(base), [str(adapters[1])], "ace", statistics=str(tmp_path / "kept"))
    same(cfmerge.merge_recipe(recipe, tmp_path / "out").output, expected, load, 1e-5)


def test_tied_tensors_that_are_stored_twice_change_together(make_model, tmp_path, llama, llama_config, load):
    base = llama(0)
    base["lm_head.weight"] = base["model.embed_tokens.weight"]
    config = llama_config | {"tie_word_embeddings": True}
    path = make_model(tmp_path / "base", base, config)
    rng, adapters = np.random.default_rng(0), []
    factors = [(rng.standard_normal((2, 8)), rng.standard_normal((12, 2))) for _ in range(2)]
    for number, (a, b) in enumerate(factors):
        pair = {"lm_head.lora_A.weight": a.astype(np.float32), "lm_head.lora_B.weight": b.astype(np.float32)}
        content = {"peft_type": "LORA", "r": 2, "lora_alpha": 2}
        files = {"adapter_model.safetensors": pair, "adapter_config.json": content}
        adapters.append(laid(tmp_path / f"a{number}", files))
    result = cfmerge.merge(path, adapters, "average", output=tmp_path / "out")
    found = load(result.output)
    expected = base["lm_head.weight"] + sum(b @ a for a, b in factors) / 2
    for name in ("lm_head.weight", "model.embed_tokens.weight"):
        np.testing.assert_allclose(found[name], expected, atol=1e-5)
    assert any("what changes one changes both" in note for note in result.notes)


def test_an_adapter_goes_in_and_comes_out_on_the_command_line(models, tmp_path):
    import json

    from typer.testing import CliRunner

    from cfmerge.cli import app

    base, adapters, _ = models
    experts = [word for path in adapters for word in ("-e", str(path))]
    command = [
        "merge",
        "--base",
        str(base),
        *experts,
        "-m",
        "average",
        "--adapter-out",
        "3",
        "-o",
        str(tmp_path / "out"),
    ]
    ran = CliRunner().invoke(app, command)
    assert ran.exit_code == 0, ran.output
    assert "of the deltas' squared norm is kept at rank 3" in " ".join(ran.output.split())
    assert json.loads((tmp_path / "out" / "adapter_config.json").read_text())["r"] == 3
    again = cfmerge.merge_recipe(cfmerge.recipe.load(tmp_path / "out" / "README.md"), tmp_path / "again")
    assert (again.output / "adapter_model.safetensors").read_bytes() == (
        tmp_path / "out" / "adapter_model.safetensors"
    ).read_bytes()


def test_a_pipeline_is_no_base_of_an_adapter_that_is_written(tmp_path):
    def pipe(name, value):
        unet, vae = ({f"{part}.weight": np.full((4, 4), value, np.float32)} for part in "uv")
        return laid(tmp_path / name, {
            "model_index.json": {}, "unet/diffusion_pytorch_model.safetensors": unet,
            "vae/diffusion_pytorch_model.safetensors": vae,
        })  # fmt: skip

    with pytest.raises(cfmerge.CfmergeError, match=r"an adapter is over one model; the base has unet, vae"):
        cfmerge.merge(pipe("b", 0.0), [pipe("x", 1.0), pipe("y", 2.0)], "average", output=tmp_path / "o", adapter_out=2)


def test_an_adapter_of_an_embedding_comes_out_with_the_embedding_whole(make_model, tmp_path, llama):
    base, name = llama(0), "model.embed_tokens.weight"
    rows, columns = base[name].shape
    rng = np.random.default_rng(0)
    config = {"peft_type": "LORA", "r": 2, "lora_alpha": 2}
    shapes = {"A": (2, rows), "B": (columns, 2)}
    adapters, factors = [], []
    for number in range(2):
        own = {end: rng.standard_normal(shape).astype(np.float32) for end, shape in shapes.items()}
        pairs = {f"base_model.model.model.embed_tokens.lora_embedding_{end}": one for end, one in own.items()}
        files = {"adapter_model.safetensors": pairs, "adapter_config.json": config}
        adapters.append(laid(tmp_path / f"a{number}", files))
        factors.append(own)
    place, out = make_model(tmp_path / "base", base), tmp_path / "out"
    cfmerge.merge(place, adapters, "average", output=out, adapter_out=4)
    expected = base[name] + sum((own["B"] @ own["A"]).T for own in factors) / 2
    found = load_file(out / "adapter_model.safetensors")
    np.testing.assert_allclose(found[f"base_model.model.{name}"], expected, atol=1e-5)
