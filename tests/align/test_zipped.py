"""The result of a zip: run from one trunk, as trees, saved and loaded, and as a checkpoint."""

import json
import re
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import cfmerge
from cfmerge.align import load_zipped, parse_spaces, permute, random_permutations, zip_models
from cfmerge.errors import CfmergeError

INPUTS, HIDDEN, TOP = 16, 32, 4
TABLE = {
    "Dense_0/kernel": "in -, c1", "Dense_0/bias": "c1", "Dense_1/kernel": "in c1, c2", "Dense_1/bias": "c2",
    "Dense_2/kernel": "in c2, -", "Dense_2/bias": "-",
}  # fmt: skip


def tree(seed, outputs=TOP):
    generator = np.random.default_rng(seed)
    sizes = (INPUTS, HIDDEN, HIDDEN, outputs)
    return {
        f"Dense_{i}": {
            "kernel": jnp.asarray(generator.normal(size=sizes[i : i + 2]), jnp.float32),
            "bias": jnp.asarray(generator.normal(size=sizes[i + 1]), jnp.float32),
        }
        for i in range(3)
    }


def run(params, x):
    for name in sorted(params):
        x = x @ params[name]["kernel"] + params[name]["bias"]
        x = x if name == "Dense_2" else jnp.tanh(x)
    return x


def spaces_of(model):
    return parse_spaces(TABLE, {f"{a}/{b}": leaf.shape for a, layer in model.items() for b, leaf in layer.items()})


def zipped_of(outputs=(TOP, TOP), stop_at="c2", **options):
    models = {name: tree(seed, count) for seed, (name, count) in enumerate(zip("ab", outputs, strict=True))}
    return zip_models(spaces_of(models["a"]), models, "weights", stop_at=stop_at, **options)


X = jnp.asarray(np.random.default_rng(3).normal(size=(64, INPUTS)), jnp.float32)
OF_TRUNK, OF_HEAD = 2 * 64 * (INPUTS + HIDDEN) * HIDDEN, 2 * 64 * HIDDEN * TOP


@pytest.mark.parametrize("outputs", [(TOP, TOP), (TOP, TOP + 3)])
def test_all_models_are_run_from_one_trunk(outputs, compiled_in_full):
    zipped = zipped_of(outputs)
    got = zipped.apply(run, X)
    assert list(got) == ["a", "b"]
    for name in zipped.models:
        np.testing.assert_allclose(got[name], run(zipped.model(name), X), rtol=1e-4, atol=1e-4)
    flops = jax.jit(lambda x: zipped.apply(run, x)).lower(X).compile().cost_analysis()["flops"]
    apart = jax.jit(lambda x: run(zipped.model("a"), x)).lower(X).compile().cost_analysis()["flops"]
    assert apart > OF_TRUNK + OF_HEAD
    assert OF_TRUNK + 2 * OF_HEAD < flops < 1.35 * OF_TRUNK


def test_trees_come_back_as_trees():
    a = tree(0)
    flat = {f"{layer}/{name}": leaf for layer, own in a.items() for name, leaf in own.items()}
    spaces = spaces_of(a)
    moved = permute(spaces, flat, random_permutations(spaces, 1))
    b = {layer: {name: moved[f"{layer}/{name}"] for name in own} for layer, own in a.items()}
    zipped = zip_models(spaces, [a, b], "weights")
    joint = zipped.joint()
    assert jax.tree.structure(joint) == jax.tree.structure(a)
    assert jax.tree.all(jax.tree.map(lambda one, two: jnp.allclose(one, two, atol=1e-5), joint, a))
    assert zipped.tensors("model_1").keys() == TABLE.keys()


def test_a_zip_is_saved_and_loaded(tmp_path):
    zipped = zipped_of((TOP, TOP + 3), budget=1)
    place = zipped.save(tmp_path / "zip")
    assert sorted(path.name for path in place.rglob("*")) == [
        "a.safetensors", "b.safetensors", "heads", "trunk.safetensors", "zip.json",
    ]  # fmt: skip
    loaded = load_zipped(place)
    assert (loaded.models, loaded.stop_at, loaded.table) == (zipped.models, ("c2",), zipped.table)
    assert loaded.sizes == zipped.sizes
    for space, groups in zipped.groups.items():
        np.testing.assert_array_equal(loaded.groups[space].partition, groups.partition)
        assert loaded.groups[space].widths == groups.widths
    for name in zipped.models:
        assert jax.tree.structure(loaded.model(name)) == jax.tree.structure(zipped.model(name))
        assert jax.tree.all(jax.tree.map(np.array_equal, loaded.model(name), zipped.model(name)))
    assert jax.tree.all(jax.tree.map(np.array_equal, loaded.apply(run, X), zipped.apply(run, X)))
    with pytest.raises(CfmergeError, match="exists already"):
        zipped.save(place)
    with pytest.raises(CfmergeError, match=r"is a zip of several models, not a model; cfmerge.save\("):
        cfmerge.open(place)
    loaded.save(tmp_path / "again")
    assert (tmp_path / "again/zip.json").read_text() == (place / "zip.json").read_text()


def test_a_directory_that_is_not_whole_is_refused(tmp_path):
    place = zipped_of().save(tmp_path / "zip")
    with pytest.raises(CfmergeError, match=r"holds no zip: there is no zip.json"):
        load_zipped(tmp_path)
    table = json.loads((place / "zip.json").read_text())
    for change, message in (
        ({"version": 2}, "should be 'cfmerge-zip', version 1; found 'cfmerge-zip', version 2"),
        ({"models": []}, "is not whole, or was changed: ValueError"),
        ({"groups": {"c1": {"partition": [0], "widths": [2], "bias": 0}}}, "a partition of 1 features, and widths"),
        ({"models": ["a", "a"]}, "a model is named twice: a, a"),
        ({"stop_at": ["c9"]}, "there is no space 'c9'"),
        ({"sizes": {**table["sizes"], "c1": 2}}, "space 'c1' has 2 features, and 32 groups"),
        ({"models": ["../a", "b"]}, "model '../a' cannot be a file's name"),
        ({"heads": ["Dense_2/kernel"]}, r"trunk.safetensors: lacks Dense_2/bias, not as zip.json tells"),
        ({"spaces": {**table["spaces"], "more": "-"}}, "trunk.safetensors: lacks more, not as zip.json tells"),
    ):
        (place / "zip.json").write_text(json.dumps(table | change))
        with pytest.raises(CfmergeError, match=message):
            load_zipped(place)
    (place / "zip.json").write_text(json.dumps(table))
    whole = load_file(place / "heads/b.safetensors")
    save_file(whole | {"Dense_2/bias": whole["Dense_2/bias"][:1]}, place / "heads/b.safetensors")
    with pytest.raises(
        CfmergeError, match=r"b.safetensors: tensor 'Dense_2/bias' has shape \(1,\), in zip.json \(\d+,\)"
    ):
        load_zipped(place)
    (place / "heads/b.safetensors").unlink()
    with pytest.raises(CfmergeError, match=r"b.safetensors: is not there, and zip.json tells of its tensors"):
        load_zipped(place)


def test_heads_that_have_no_mean_and_models_that_are_not_there_are_told(tmp_path):
    with pytest.raises(CfmergeError, match=r"it stops at c1, and behind it the models' features are not matched"):
        zipped_of(stop_at="c1").joint()
    assert zipped_of(stop_at="c2").joint().keys() == tree(0).keys()  # which is all there is
    differing = zipped_of((TOP, TOP + 3), stop_at=None)
    with pytest.raises(CfmergeError, match=r"'Dense_2/kernel' has the shapes \(32, 4\) and .*; take model\(NAME\)"):
        differing.joint()
    with pytest.raises(CfmergeError, match="there is no model 'c'; there is: a, b"):
        differing.model("c")
    models = {"up/down": tree(0), "b": tree(1)}
    with pytest.raises(CfmergeError, match=r"model 'up/down' cannot be a file's name; give models as \{name: model\}"):
        zip_models(spaces_of(tree(0)), models, "weights").save(tmp_path / "zip")
    assert not (tmp_path / "zip").exists()


BERT = {
    r"bert.embeddings.\w+_embeddings.weight": "-, h",
    r"bert.*LayerNorm.(weight|bias)": "h",
    r"bert.encoder.layer.(\d).attention.self.(query|key).weight": "heads{0} 4, in h",
    r"bert.encoder.layer.(\d).attention.self.(query|key).bias": "heads{0} 4",
    r"bert.encoder.layer.(\d).attention.self.value.weight": "heads{0} heads{0}.v, in h",
    r"bert.encoder.layer.(\d).attention.self.value.bias": "heads{0} heads{0}.v",
    r"bert.encoder.layer.(\d).attention.output.dense.weight": "h, in heads{0} heads{0}.v",
    r"bert.encoder.layer.(\d).intermediate.dense.weight": "f{0}, in h",
    r"bert.encoder.layer.(\d).intermediate.dense.bias": "f{0}",
    r"bert.encoder.layer.(\d).output.dense.weight": "h, in f{0}",
    r"bert.*output.dense.bias": "h",
    r"bert.pooler.dense.weight": "p, in h",
    r"bert.pooler.dense.bias": "p",
    r"classifier.weight": "-, in p",
    r"classifier.bias": "-",
}


def of_bert(names):
    """The table of a BERT's tensors."""
    found = {name: [(re.fullmatch(key, name), line) for key, line in BERT.items()] for name in names}
    return {name: next(line.format(*m.groups()) for m, line in own if m) for name, own in found.items()}


def test_a_checkpoint_that_is_zipped_all_through_is_read_by_transformers(tmp_path):
    """A BERT and its permuted twin, whose head has other labels: the zip is the BERT, with either head or the mean."""
    torch, transformers = pytest.importorskip("torch"), pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.BertConfig(
        vocab_size=20, hidden_size=12, num_hidden_layers=2, num_attention_heads=3, intermediate_size=16,
        max_position_embeddings=8,
    )  # fmt: skip
    model = transformers.BertForSequenceClassification(config).eval()
    model.save_pretrained(tmp_path / "a")
    a = cfmerge.open(tmp_path / "a")
    spaces = parse_spaces(of_bert(a), {name: a[name].shape for name in a})
    order = random_permutations(spaces, 1)
    b = permute(spaces, {name: a[name] for name in a}, order)
    b["classifier.weight"] = -b["classifier.weight"]
    zipped = zip_models(spaces, {"a": a, "b": b}, "weights")
    ids = torch.arange(8)[None]

    def logits(place):
        loaded, told = transformers.AutoModelForSequenceClassification.from_pretrained(place, output_loading_info=True)
        assert not told["missing_keys"]
        assert not told["unexpected_keys"]
        return loaded.eval()(ids).logits.detach().numpy()

    expected = model(ids).logits.detach().numpy()
    np.testing.assert_allclose(logits(zipped.write(tmp_path / "own", tmp_path / "a", "a")), expected, atol=1e-6)
    np.testing.assert_allclose(logits(zipped.write(tmp_path / "of_b", tmp_path / "a", "b")), -expected, atol=1e-6)
    np.testing.assert_allclose(logits(zipped.write(tmp_path / "mean", tmp_path / "a")), 0 * expected, atol=1e-6)
    with pytest.raises(CfmergeError, match="exists already"):
        zipped.write(tmp_path / "mean", tmp_path / "a")
    part = zip_models(spaces, {"a": a, "b": b}, "weights", stop_at="h")
    with pytest.raises(CfmergeError, match=r"it stops at h; write a model by"):
        part.write(tmp_path / "part", tmp_path / "a", "a")
    cfmerge.save(b, tmp_path / "b")
    shutil.copy(tmp_path / "a/config.json", tmp_path / "b")
    paths = {name: tmp_path / name for name in "ab"}
    kept = cfmerge.zip_checkpoints(paths, tmp_path / "files", from_weights=True, stop_at="hidden")
    assert set(load_zipped(tmp_path / "files").heads["b"]) == set(kept.heads["b"]) == set(part.heads["b"])
    wider = zip_models(spaces, {"a": a, "b": b}, "weights", width={"p": 20})
    with pytest.raises(CfmergeError, match=r"tensor 'bert.pooler.dense.bias' has shape \(12,\), in the zip \(20,\)"):
        wider.write(tmp_path / "wider", tmp_path / "a")


def test_spaces_and_zips_tell_what_they_hold_and_not_their_arrays():
    spaces = parse_spaces({"up": "h, in -", "down": "-, in h"}, {"up": (2, 1), "down": (1, 2)})
    model = {"up": np.array([[1.0], [2.0]]), "down": np.array([[1.0, 1.0]])}
    assert repr(spaces) == "<Spaces of 2 tensors: h 2>"
    zipped = zip_models(spaces, {"a": model, "b": model}, "weights", stop_at="h")
    assert repr(zipped) == "<Zipped of a, b up to h: 1 tensors of all, 1 of each>"
    with pytest.raises(CfmergeError, match=r"space 'h' are; give joint moments .*, or 'weights'"):
        zip_models(spaces, {"a": model, "b": model}, None)


def test_an_embedding_that_is_stored_once_and_is_the_output_layer_too_is_not_zipped(tmp_path, make_model):
    """So it is with two names of one tensor, which clients read once."""
    table = {"transformer.wte.weight": "-, h", "up.weight": "u, in h", "down.weight": "h, in u"}
    shapes = {"transformer.wte.weight": (9, 6), "up.weight": (5, 6), "down.weight": (6, 5)}
    config = {"model_type": "gpt2", "architectures": ["GPT2LMHeadModel"]}
    generator = np.random.default_rng(0)
    models = [{name: generator.normal(size=shape) for name, shape in shapes.items()} for _ in range(2)]
    similarity = {name: np.corrcoef(generator.normal(size=(2 * n, 30))) for name, n in (("h", 6), ("u", 5))}
    files = {
        name: cfmerge.open(make_model(tmp_path / name, m, config=config)) for name, m in zip("ab", models, strict=True)
    }
    spaces = parse_spaces(table, shapes)
    with pytest.raises(CfmergeError, match=r"'transformer.wte.weight' writes 'h' and, as the output layer, reads it"):
        zip_models(spaces, files, similarity, budget=1)
    both = {**table, "lm_head.weight": "-, in h"}
    for name, model in zip("cd", models, strict=True):
        own = {**model, "lm_head.weight": model["transformer.wte.weight"]}
        files[name] = cfmerge.open(make_model(tmp_path / name, own, config=config))
    spaces, models = parse_spaces(both, {**shapes, "lm_head.weight": (9, 6)}), {name: files[name] for name in "cd"}
    zipped = zip_models(spaces, models, similarity, budget=1)
    with pytest.raises(
        CfmergeError, match=r"'lm_head.weight' is 'transformer.wte.weight' there, and another tensor in"
    ):
        zipped.write(tmp_path / "zip", tmp_path / "c", "c")
    permuted = zip_models(spaces, models, similarity, method="permute")
    assert permuted.write(tmp_path / "zip", tmp_path / "c").is_dir()
