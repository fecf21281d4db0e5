"""Whole models zipped on their spaces: trunk, heads, and what is refused."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cfmerge.align import Moments, match, parse_spaces, permute, random_permutations, zip_models
from cfmerge.align.flow import divided
from cfmerge.errors import CfmergeError

MLP = {
    "one.weight": "c1, in -",
    "one.bias": "c1",
    "two.weight": "c2, in c1",
    "two.bias": "c2",
    "norm.scale": "c2",
    "three.weight": "c3, in c2",
    "three.bias": "c3",
    "out.weight": "-, in c3",
    "out.bias": "-",
}
WIDTHS = (6, 8, 5)


def shapes(widths=WIDTHS, outputs=2):
    a, b, c = widths
    return {
        "one.weight": (a, 3), "one.bias": (a,), "two.weight": (b, a), "two.bias": (b,), "norm.scale": (b,),
        "three.weight": (c, b), "three.bias": (c,), "out.weight": (outputs, c), "out.bias": (outputs,),
    }  # fmt: skip


def mlp(seed, widths=WIDTHS, outputs=2):
    generator = np.random.default_rng(seed)
    return {name: generator.normal(size=shape) for name, shape in shapes(widths, outputs).items()}


def leaky(x):
    return np.maximum(x, 0.1 * x)  # no feature is dead


def features(model, x):
    """The features of each space, and the outputs."""
    c1 = leaky(x @ model["one.weight"].T + model["one.bias"])
    c2 = leaky(c1 @ model["two.weight"].T + model["two.bias"]) * model["norm.scale"]
    c3 = leaky(c2 @ model["three.weight"].T + model["three.bias"])
    return {"c1": c1, "c2": c2, "c3": c3, "out": c3 @ model["out.weight"].T + model["out.bias"]}


def similarities(models, run=features, seed=9, inputs=3):
    """`{space: correlation of all models' features}`."""
    x = np.random.default_rng(seed).normal(size=(200, inputs))
    found = [run(model, x) for model in models]
    names = [name for name in found[0] if name != "out"]
    joint = {name: np.concatenate([one[name] for one in found], axis=1) for name in names}
    return {name: np.corrcoef(values.T) for name, values in joint.items()}


@pytest.fixture
def spaces():
    return parse_spaces(MLP, shapes())


def doubled(model):
    """The same function, with two copies of each hidden neuron."""
    result = {}
    for name, values in model.items():
        rows = values if name.startswith("out") else np.repeat(values, 2, axis=0)
        inner = name.endswith("weight") and not name.startswith("one")
        result[name] = np.repeat(rows, 2, axis=1) / 2 if inner else rows
    return result


X = np.random.default_rng(5).normal(size=(7, 3))


@pytest.mark.parametrize("similarity", ["features", "weights"])
@pytest.mark.parametrize("models", [2, 3])
def test_a_network_and_its_permuted_copies_are_zipped_to_that_network(spaces, similarity, models):
    first = mlp(0)
    all_ = [first] + [permute(spaces, first, random_permutations(spaces, seed)) for seed in range(1, models)]
    given = similarities(all_) if similarity == "features" else similarity
    zipped = zip_models(spaces, all_, given)
    for name in zipped.models:
        for tensor, values in zipped.model(name).items():
            np.testing.assert_allclose(values, first[tensor], atol=1e-12)
    assert zipped.heads["model_1"].keys() == {"out.weight", "out.bias"}
    assert all(groups.is_permutation for groups in zipped.groups.values())


@pytest.mark.parametrize("models", [2, 3])
def test_networks_whose_neurons_have_copies_are_zipped_without_loss(models):
    """Each model's copies become one, so the trunk holds all that the models know, and the heads read their own."""
    all_ = [doubled(mlp(seed)) for seed in range(models)]
    wide = {name: values.shape for name, values in all_[0].items()}
    width = None if models == 2 else {"c1": 18, "c2": 24, "c3": 15}
    zipped = zip_models(parse_spaces(MLP, wide), all_, similarities(all_), budget=3, penalty=1, width=width)
    for name, model in zip(zipped.models, all_, strict=True):
        np.testing.assert_allclose(features(zipped.model(name), X)["out"], features(model, X)["out"], atol=1e-12)
    assert zipped.groups["c1"].within == (6,) * models


def test_without_a_budget_a_zip_is_the_mean_of_permuted_models(spaces):
    all_ = [mlp(seed) for seed in range(3)]
    zipped = zip_models(spaces, all_, similarities(all_), budget=0)
    orders = [{space: np.argsort(groups.parts[model]) for space, groups in zipped.groups.items()} for model in range(3)]
    permuted = [permute(spaces, model, order) for model, order in zip(all_, orders, strict=True)]
    for name, values in zipped.joint().items():
        np.testing.assert_allclose(values, np.mean([model[name] for model in permuted], axis=0), atol=1e-12)


def by_hand(name, models, groups, stop):
    """Trunk's tensor, or each model's own, of an MLP that is zipped up to a space: the equations with M and U."""
    writes, _, read = MLP[name].partition(", in ")
    zipped = ["c1", "c2", "c3"][: int(stop[1])]
    split = {space: np.cumsum(one.widths)[:-1] for space, one in groups.items()}
    parts = []
    for model, tensors in enumerate(models):
        values = tensors[name]
        if read in zipped:
            values = values @ np.split(groups[read].unmerge, split[read])[model]
        if writes in zipped:
            values = np.split(groups[writes].merge, split[writes], axis=1)[model] @ values
        parts.append(values)
    return sum(parts) if writes in zipped else parts


@pytest.mark.parametrize("stop", ["c1", "c2", "c3"])
def test_a_partial_zip_is_that_of_the_equations(spaces, stop):
    all_ = {"a": mlp(0), "b": mlp(1)}
    given = similarities(list(all_.values()))
    zipped = zip_models(spaces, all_, given, stop_at=stop, budget=1)
    assert set(zipped.groups) == set(["c1", "c2", "c3"][: int(stop[1])])
    for space, groups in zipped.groups.items():
        np.testing.assert_array_equal(groups.partition, match(given[space], 2, budget=1).partition)
    for name in MLP:
        expected = by_hand(name, list(all_.values()), zipped.groups, stop)
        if name in zipped.trunk:
            np.testing.assert_allclose(zipped.trunk[name], expected, atol=1e-12)
        else:
            for model, own in zip(all_, expected, strict=True):
                np.testing.assert_allclose(zipped.heads[model][name], own, atol=1e-12)
    assert ("two.weight" in zipped.trunk) == (stop != "c1")
    assert "out.bias" in zipped.heads["a"]


def test_the_authors_groups_are_applied_where_they_are_asked_for(spaces):
    all_ = [mlp(seed) for seed in range(3)]
    given = similarities(all_)
    zipped = zip_models(spaces, all_, given, stop_at="c1", compat="official")
    groups = match(given["c1"], 3, compat="official")
    parts = np.split(groups.merge, 3, axis=1)
    expected = sum(part @ model["one.weight"] for part, model in zip(parts, all_, strict=True))
    np.testing.assert_allclose(zipped.trunk["one.weight"], expected, rtol=2e-5)


CONV = {
    "conv1": "c1, in -, -, -", "norm1.scale": "c1", "norm1.bias": "c1",
    "conv2": "c2, in c1, -, -", "norm2.scale": "c2", "norm2.bias": "c2",
    "fc": "-, in c2 4", "fc.bias": "-",
}  # fmt: skip
CONV_SHAPES = {
    "conv1": (4, 3, 2, 2), "norm1.scale": (4,), "norm1.bias": (4,),
    "conv2": (6, 4, 2, 2), "norm2.scale": (6,), "norm2.bias": (6,), "fc": (3, 24), "fc.bias": (3,),
}  # fmt: skip


@pytest.mark.parametrize("stop", ["c1", "c2"])
def test_a_convolutional_net_is_zipped_as_by_the_equations(stop):
    generator = np.random.default_rng(0)
    a, b = ({name: generator.normal(size=shape) for name, shape in CONV_SHAPES.items()} for _ in range(2))
    spaces = parse_spaces(CONV, CONV_SHAPES)
    given = {name: np.corrcoef(generator.normal(size=(2 * n, 30))) for name, n in (("c1", 4), ("c2", 6))}
    zipped = zip_models(spaces, [a, b], given, stop_at=stop, budget=1)
    m1 = np.split(zipped.groups["c1"].merge, 2, axis=1)
    u1 = np.split(zipped.groups["c1"].unmerge, 2)
    conv1 = sum(np.einsum("ui,iabc->uabc", m, model["conv1"]) for m, model in zip(m1, (a, b), strict=True))
    np.testing.assert_allclose(zipped.trunk["conv1"], conv1, atol=1e-12)
    scale = sum(m @ model["norm1.scale"] for m, model in zip(m1, (a, b), strict=True))
    np.testing.assert_allclose(zipped.trunk["norm1.scale"], scale, atol=1e-12)
    inner = [np.einsum("oiab,iu->ouab", model["conv2"], u) for u, model in zip(u1, (a, b), strict=True)]
    if stop == "c1":
        np.testing.assert_allclose(zipped.heads["model_1"]["conv2"], inner[1], atol=1e-12)
        np.testing.assert_array_equal(zipped.heads["model_1"]["fc"], b["fc"])
        return
    m2, u2 = np.split(zipped.groups["c2"].merge, 2, axis=1), np.split(zipped.groups["c2"].unmerge, 2)
    conv2 = sum(np.einsum("ui,iabc->uabc", m, one) for m, one in zip(m2, inner, strict=True))
    np.testing.assert_allclose(zipped.trunk["conv2"], conv2, atol=1e-12)
    head = np.einsum("oip,iu->oup", b["fc"].reshape(3, 6, 4), u2[1]).reshape(3, 24)
    np.testing.assert_allclose(zipped.heads["model_1"]["fc"], head, atol=1e-12)


RESIDUAL = {
    "embed": "-, h",
    "up0": "u0, in h", "down0": "h, in u0", "norm0": "h",
    "up1": "u1, in h", "down1": "h, in u1", "norm1": "h",
    "mix": "m, in h", "out": "-, in m",
    "bias": "-",
}  # fmt: skip
RESIDUAL_SHAPES = {
    "embed": (9, 4), "up0": (6, 4), "down0": (4, 6), "norm0": (4,), "up1": (6, 4), "down1": (4, 6), "norm1": (4,),
    "mix": (5, 4), "out": (2, 5), "bias": (2,),
}  # fmt: skip


def test_all_blocks_of_a_residual_stream_are_zipped_together():
    spaces = parse_spaces(RESIDUAL, RESIDUAL_SHAPES)
    assert divided(spaces, "u0").zipped == divided(spaces, "h").zipped == ("h", "u0", "u1")
    flow = divided(spaces, "h")
    assert flow.heads == ("mix", "out", "bias")
    assert flow.plain == ()
    assert divided(spaces, "m").zipped == spaces.names
    one, two = ({name: np.ones(shape) for name, shape in RESIDUAL_SHAPES.items()} for _ in range(2))
    with pytest.raises(CfmergeError, match=r"'embed': of model 'model_0' it comes out as \(9, 4\), of '"):
        zip_models(spaces, [one, {**two, "embed": np.ones((7, 4))}], None, method="identity")
    with pytest.raises(CfmergeError, match=r"stop_at: there is no space 'u2'; did you mean 'u1' or 'u0'"):
        divided(spaces, "u2")


def test_a_tensor_without_spaces_goes_where_its_module_goes():
    table = {"trunk.up": "h, in -", "trunk.scale": "-", "head.down": "-, in h", "head.bias": "-", "heat": ""}
    given = {"trunk.up": (4, 3), "trunk.scale": (3,), "head.down": (2, 4), "head.bias": (2,), "heat": ()}
    spaces = parse_spaces(table, given)
    a, b = ({name: np.full(shape, step) + np.arange(4.0)[:shape[0], None] if len(shape) == 2 else np.full(shape, step)
             for name, shape in given.items()} for step in (1.0, 3.0))  # fmt: skip
    zipped = zip_models(spaces, {"a": a, "b": b}, None, method="identity")
    np.testing.assert_array_equal(zipped.trunk["trunk.scale"], 2)
    assert zipped.heads["b"].keys() == {"head.down", "head.bias", "heat"}
    assert zipped.notes == ("trunk.scale: of no space, averaged as they are",)


ATTENTION = {
    "q": "heads 4, in h", "k": "heads 4, in h", "v": "heads heads.v, in h", "o": "h, in heads heads.v",
    "embed": "-, h", "out": "-, in h",
}  # fmt: skip
ATTENTION_SHAPES = {"q": (12, 10), "k": (12, 10), "v": (15, 10), "o": (10, 15), "embed": (7, 10), "out": (2, 10)}


def attend(model, x):
    """The features of a block of attention over tokens."""
    h = x @ model["embed"]
    q, k = ((h @ model[name].T).reshape(-1, 3, 4) for name in "qk")
    v = (h @ model["v"].T).reshape(-1, 3, 5)
    scores = np.exp(np.einsum("qhd,khd->hqk", q, k) / 8)
    mixed = np.einsum("hqk,khv->qhv", scores / scores.sum(-1, keepdims=True), v).reshape(-1, 15)
    h = h + mixed @ model["o"].T
    return {"heads": mixed, "h": h, "out": h @ model["out"].T}


def test_heads_are_permuted_as_blocks_and_values_within_them():
    spaces = parse_spaces(ATTENTION, ATTENTION_SHAPES, {"heads": 3})
    generator = np.random.default_rng(0)
    a = {name: generator.normal(size=shape) * 0.3 for name, shape in ATTENTION_SHAPES.items()}
    b = permute(spaces, a, random_permutations(spaces, 1))
    given = similarities([a, b], attend, inputs=7)
    zipped = zip_models(spaces, [a, b], given)
    for name, values in zipped.joint().items():
        np.testing.assert_allclose(values, a[name], atol=1e-12)
    other = {name: generator.normal(size=shape) * 0.3 for name, shape in ATTENTION_SHAPES.items()}
    mixed = zip_models(spaces, [a, other], similarities([a, other], attend, inputs=7), budget=1)
    order = mixed.blocks[1]
    moved = permute(spaces, other, order)
    m, u = np.split(mixed.groups["h"].merge, 2, axis=1), np.split(mixed.groups["h"].unmerge, 2)
    np.testing.assert_allclose(mixed.trunk["v"], (a["v"] @ u[0] + moved["v"] @ u[1]) / 2, atol=1e-12)
    np.testing.assert_allclose(mixed.trunk["o"], m[0] @ a["o"] + m[1] @ moved["o"], atol=1e-12)
    by_weights = zip_models(spaces, [a, b], {"h": given["h"]})
    assert by_weights.notes == ("heads: in an order that weights tell, since no similarity does",)
    for name, values in by_weights.joint().items():
        np.testing.assert_allclose(values, a[name], atol=1e-12)
    ordered = zip_models(spaces, [a, b], {"h": given["h"]}, permutations=[{}, by_weights.blocks[1]])
    assert ordered.notes == ()
    with pytest.raises(CfmergeError, match=r"'heads': 1 features of each element do not tell the order of heads.v 5"):
        zip_models(spaces, [a, b], {**given, "heads": np.eye(6)})


def test_spaces_of_given_order_are_averaged_and_the_others_zipped(spaces):
    first = mlp(0)
    order = random_permutations(spaces, 4)
    other = permute(spaces, first, order)
    back = {name: np.argsort(one) for name, one in order.items()}
    zipped = zip_models(spaces, [first, other], None, permutations=[{}, back])
    np.testing.assert_allclose(zipped.joint()["three.weight"], first["three.weight"], atol=1e-12)
    one = zip_models(spaces, [first, mlp(1)], similarities([first, mlp(1)]), permutations=[{}, {"c2": back["c2"]}])
    assert one.groups["c2"].is_permutation
    with pytest.raises(CfmergeError, match="there is no space c4"):
        zip_models(spaces, [first, other], None, permutations=[{}, {"c4": np.arange(3)}])


def test_models_of_other_widths_are_zipped_to_the_first_ones_width_or_another(spaces):
    narrow, wide = mlp(0), mlp(1, (9, 10, 7), outputs=4)
    given = similarities([narrow, wide])
    zipped = zip_models(spaces, {"narrow": narrow, "wide": wide}, given)
    assert zipped.model("wide")["two.weight"].shape == (8, 6)
    assert zipped.model("wide")["out.weight"].shape == (4, 5)
    wider = zip_models(spaces, [narrow, wide], given, width=2.0, stop_at="c2")
    assert wider.trunk["two.weight"].shape == (16, 12)
    assert wider.heads["model_1"]["three.weight"].shape == (7, 16)
    everything = zip_models(spaces, [narrow, wide], given, width={"c1": 15, "c2": 18, "c3": 12})
    for name, model in zip(everything.models, (narrow, wide), strict=True):
        np.testing.assert_allclose(features(everything.model(name), X)["out"], features(model, X)["out"], atol=1e-12)
    with pytest.raises(CfmergeError, match=r"space 'c1' has 6 and 9 elements, and is permuted"):
        zip_models(spaces, [narrow, wide], None, method="identity")


def test_the_wide_copy_of_a_network_is_zipped_to_it_by_weights_alone():
    """The second model has two copies of each neuron, in another order: their inputs are brought together by U."""
    first = mlp(0)
    spaces = parse_spaces(MLP, shapes())
    wide = doubled(first)
    of_wide = parse_spaces(MLP, {name: values.shape for name, values in wide.items()})
    other = permute(of_wide, wide, random_permutations(of_wide, 3))
    zipped = zip_models([spaces, of_wide], [first, other], "weights", penalty=1)
    for tensor, values in zipped.model("model_1").items():
        np.testing.assert_allclose(values, first[tensor], atol=1e-12)
    assert zipped.groups["c2"].within == (0, 8)


def test_models_of_other_widths_whose_weights_tell_nothing_are_refused():
    table = {"up": "u, in h", "down": "h, in u", "scale": "h"}
    a, b = ({"up": np.ones((n, 4)), "down": np.ones((4, n)), "scale": np.ones(4)} for n in (3, 5))
    spaces = parse_spaces(table, {name: values.shape for name, values in a.items()})
    with pytest.raises(CfmergeError, match=r"every matrix that writes space 'u' reads a space that is not zipped bef"):
        zip_models(spaces, [a, b], "weights")


class Files(dict):
    """A model that is read tensor by tensor."""

    def __init__(self, tensors):
        super().__init__(tensors)
        self.tensors, self.read = tensors, []

    def __getitem__(self, name):
        self.read.append(name)
        return super().__getitem__(name)

    def items(self):
        raise AssertionError("all of a model is asked for at once")

    values = items


def test_models_in_files_are_read_a_tensor_at_a_time(spaces):
    a, b = Files(mlp(0)), Files(mlp(1))
    zip_models(spaces, [a, b], similarities([dict(mlp(0)), dict(mlp(1))]), stop_at="c2")
    assert max(map(b.read.count, MLP)) == 1
    assert set(b.read) == set(MLP)
    zip_models(spaces, [Files(mlp(0)), Files(mlp(1))], "weights", stop_at="c2")


def test_dtypes_and_kinds_of_arrays_are_kept(spaces):
    a, b = ({n: jnp.asarray(v, jnp.bfloat16) for n, v in mlp(seed).items()} for seed in (0, 1))
    zipped = zip_models(spaces, [a, b], "weights", stop_at="c2")
    assert all(isinstance(leaf, jax.Array) for leaf in jax.tree.leaves(zipped.model("model_0")))
    assert {leaf.dtype for leaf in zipped.model("model_1").values()} == {jnp.bfloat16.dtype}
    assert any("an extension of ZipIt!" in note for note in zipped.notes)


def test_statistics_of_batch_norm_are_refused_unless_they_will_be_estimated_again():
    table = {
        "conv": "c, in -",
        "bn/mean": "c",
        "bn/var": "c",
        "bn/scale": "c",
        "bn.num_batches_tracked": "",
        "out": "-, in c",
    }
    given = {
        "conv": (4, 3),
        "bn/mean": (4,),
        "bn/var": (4,),
        "bn/scale": (4,),
        "bn.num_batches_tracked": (),
        "out": (2, 4),
    }
    spaces = parse_spaces(table, given)
    a, b = ({name: np.arange(float(np.prod(shape)) + seed, seed, -1).reshape(shape) for name, shape in given.items()}
            for seed in (0, 1))  # fmt: skip
    for model, steps in ((a, 3), (b, 4)):
        model["bn.num_batches_tracked"] = np.array(steps)
    with pytest.raises(
        CfmergeError, match=r"'bn/mean' and 1 more: running statistics of BatchNorm .* reset_norms=True"
    ):
        zip_models(spaces, [a, b], None, method="identity")
    zipped = zip_models(spaces, [a, b], None, method="identity", reset_norms=True)
    assert any("running statistics are those of no model until" in note for note in zipped.notes)
    np.testing.assert_allclose(zipped.trunk["bn/mean"], (a["bn/mean"] + b["bn/mean"]) / 2)


def test_a_tied_embedding_is_permuted_and_not_zipped():
    table = {"embed": "-, h", "up": "u, in h", "down": "h, in u"}
    given = {"embed": (9, 4), "up": (6, 4), "down": (4, 6)}
    spaces = parse_spaces(table, given)
    generator = np.random.default_rng(0)
    a = {name: generator.normal(size=shape) for name, shape in given.items()}
    b = {name: generator.normal(size=shape) for name, shape in given.items()}
    similarity = {name: np.corrcoef(generator.normal(size=(n, 30))) for name, n in (("h", 8), ("u", 12))}
    with pytest.raises(CfmergeError, match=r"'embed' writes 'h' and, as the output layer, reads it"):
        zip_models(spaces, [a, b], similarity, tied=["embed"], budget=1)
    zipped = zip_models(spaces, [a, b], similarity, tied=["embed"], method="permute")
    assert zipped.groups["h"].is_permutation


def test_what_cannot_be_zipped_is_refused_by_name(spaces):
    a, b = mlp(0), mlp(1)
    given = similarities([a, b])
    with pytest.raises(CfmergeError, match=r"how alike the features of space 'c2' are; .*; there is: c1"):
        zip_models(spaces, [a, b], {"c1": given["c1"]})
    with pytest.raises(CfmergeError, match=r"space 'c1': the similarity is of shape \(3, 3\), and .* 6 \+ 6 features"):
        zip_models(spaces, [a, b], {**given, "c1": np.eye(3)})
    with pytest.raises(CfmergeError, match=r"model 'b': has no tensor three.bias, which zip: the table of spaces has"):
        zip_models(spaces, {"a": a, "b": {n: v for n, v in b.items() if n != "three.bias"}}, given)
    with pytest.raises(CfmergeError, match=r"model 'b': spaces: tensor 'two.weight': axis 1 has 7 elements"):
        zip_models(spaces, {"a": a, "b": {**b, "two.weight": np.ones((8, 7))}}, given)
    with pytest.raises(CfmergeError, match=r"model 'b': spaces: tensor 'one.weight': axis 1 has 4 elements"):
        zip_models(spaces, {"a": a, "b": {**b, "one.weight": np.ones((6, 4))}}, given)
    with pytest.raises(CfmergeError, match=r"1 models; give two or more"):
        zip_models(spaces, [a], given)
    with pytest.raises(CfmergeError, match=r"method should be one of zip, permute, identity, found 'average'"):
        zip_models(spaces, [a, b], given, method="average")
    with pytest.raises(CfmergeError, match=r"space 'c1': match: the similarity of feature 0 is NaN"):
        zip_models(spaces, [a, b], {**given, "c1": np.full((12, 12), np.nan)})
    with pytest.raises(CfmergeError, match=r"should be joint moments, .* found str"):
        zip_models(spaces, [a, b], "activations")
    with pytest.raises(CfmergeError, match=r"stop_at: no space is named; there is: c1, c2, c3; None zips all"):
        zip_models(spaces, [a, b], given, stop_at=[])
    with pytest.raises(CfmergeError, match=r"width: no space 'c4' is zipped; did you mean"):
        zip_models(spaces, [a, b], given, width={"c4": 3})
    with pytest.raises(CfmergeError, match=r"width should be \{space: n\}, or a factor above 0; found -1"):
        zip_models(spaces, [a, b], given, width=-1)
    for method in ("permute", "identity"):
        with pytest.raises(CfmergeError, match=rf"method '{method}' keeps the models' width; leave out width=0.5"):
            zip_models(spaces, [a, b], given, method=method, width=0.5)
        with pytest.raises(CfmergeError, match=r"compat should be None or 'official', found 'authors'"):
            zip_models(spaces, [a, b], given, method=method, compat="authors")


def test_moments_whose_models_stand_at_other_places_are_refused(spaces):
    a, b, c = mlp(0), mlp(1), mlp(2)
    for names in (("b", "a"), ("b", "c"), ("c", "a"), ("a", "c")):
        moments = Moments(names)
        with pytest.raises(CfmergeError, match=f"the moments are of {', '.join(names)}, the models are a, b"):
            zip_models(spaces, {"a": a, "b": b}, moments)
    with pytest.raises(CfmergeError, match="are of a, b, the models are a, b, c"):
        zip_models(spaces, {"a": a, "b": b, "c": c}, Moments(("a", "b")))


@pytest.mark.parametrize("stop", ["c1", None])
def test_weights_that_are_not_finite_are_named(spaces, stop):
    a, b = mlp(0), mlp(1)
    broken = {**b, "two.weight": np.where(np.arange(48).reshape(8, 6) == 7, np.inf, b["two.weight"])}
    with pytest.raises(CfmergeError, match=r"zip: tensor 'two.weight' of model 'b' holds NaN or infinity"):
        zip_models(spaces, {"a": a, "b": broken}, similarities([a, b]), stop_at=stop)
    with pytest.raises(CfmergeError, match=r"tensor 'two.weight' of model 'b': has a NaN or an infinity"):
        zip_models(spaces, {"a": a, "b": broken}, "weights", stop_at=stop)
    large = [{**one, "two.weight": np.full((8, 6), 6e4, np.float16)} for one in (a, b)]
    with pytest.raises(CfmergeError, match=r"zip: tensor 'two.weight' does not fit float16 when zipped"):
        zip_models(spaces, large, similarities([a, b]), stop_at=stop, width={"c1": 2})


def test_a_tensor_that_writes_two_spaces_is_not_zipped():
    table = {"a": "p, in -", "b": "q, in -", "both": "p, q", "out": "-, in p", "more": "-, in q"}
    given = {"a": (3, 2), "b": (4, 2), "both": (3, 4), "out": (1, 3), "more": (1, 4)}
    spaces = parse_spaces(table, given)
    generator = np.random.default_rng(0)
    a, b = ({name: generator.normal(size=shape) for name, shape in given.items()} for _ in range(2))
    with pytest.raises(CfmergeError, match=r"'both' writes p and q together, 'p, q', .* method='permute'"):
        zip_models(spaces, [a, b], "weights", budget=1)
    zipped = zip_models(spaces, [a, b], "weights", method="permute")
    order = np.ix_(*(np.argsort(zipped.groups[space].parts[1]) for space in "pq"))
    np.testing.assert_allclose(zipped.trunk["both"], (a["both"] + b["both"][order]) / 2)


def test_neurons_that_never_fire_are_merged_with_each_other_and_a_permuted_copy_is_the_network():
    generator = np.random.default_rng(3)
    table = {"up": "hidden, in -", "bias": "hidden", "down": "-, in hidden"}
    spaces = parse_spaces(table, {"up": (16, 6), "bias": (16,), "down": (3, 16)})
    a = {
        "up": generator.normal(size=(16, 6)),
        "bias": generator.normal(size=16),
        "down": generator.normal(size=(3, 16)),
    }
    a["bias"][:5] = -100.0
    models = {"a": a, "b": permute(spaces, a, random_permutations(spaces, 2))}
    x = generator.normal(size=(200, 6))
    moments = Moments(("a", "b"))
    moments.add("hidden", [np.maximum(x @ m["up"].T + m["bias"], 0) for m in models.values()])
    zipped = zip_models(spaces, models, moments)
    expected = np.maximum(x @ a["up"].T + a["bias"], 0) @ a["down"].T
    for name in models:
        m = zipped.model(name)
        np.testing.assert_allclose(np.maximum(x @ m["up"].T + m["bias"], 0) @ m["down"].T, expected, atol=1e-10)
