"""Statistics by themselves: accumulated, saved, added, forgotten, solved; what comes out is what a merge gives."""

import json

import jax
import ml_dtypes
import numpy as np
import pytest
import toys

import cfmerge
from cfmerge import Statistics, methods
from cfmerge.engine import cutting
from cfmerge.errors import CfmergeError
from cfmerge.recipe import load as load_recipe

UP = "model.layers.0.mlp.up_proj.weight"
NORM = "model.norm.weight"


@pytest.fixture(scope="module", autouse=True)
def own():
    with toys.registered(toys.times, toys.middle, toys.squares) as made:
        yield made


@pytest.fixture
def family(make_model, tmp_path):
    return toys.small_family(make_model, tmp_path / "in")


def close(found, expected, atol=2e-6):
    assert set(found) == set(expected)
    for name, tensor in found.items():
        np.testing.assert_allclose(np.asarray(tensor, float), np.asarray(expected[name], float), rtol=0, atol=atol)


def without(mapping, *names):
    return {name: value for name, value in mapping.items() if name not in names}


def only(mapping, *names):
    return {name: mapping[name] for name in names}


# --- trees --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "text", ["average", "squares(ridge=0.5)", "ace", "times(factor=2.0) >> squares >> scale(0.5)",
             "times(factor=2.0) >> ace", "anchored(towards=ace)"]
)  # fmt: skip
def test_in_two_halves(family, text):
    base = family.tensors[0]
    weights = {"m1": 1.0, "m2": 0.5, "m3": 2.0} if "ace" not in text else dict.fromkeys(family.trees, 1.0)
    whole = cfmerge.accumulate(base, family.trees, text, weights=list(weights.values()))
    expected = cfmerge.merge_params(base, family.trees, methods.make(text), weights=list(weights.values()))
    close(cfmerge.solve(whole, base), expected, 1e-5)
    parts = [
        cfmerge.accumulate(base, only(family.trees, *names), text, weights=[weights[name] for name in names])
        for names in (["m1"], ["m2", "m3"])
    ]
    assert dict((parts[0] + parts[1]).experts) == weights
    close(cfmerge.solve(parts[0] + parts[1], base), expected, 1e-5)
    close(cfmerge.solve(parts[1] + parts[0], base), expected, 1e-5)


def test_forgotten_is_never_added(family):
    """Of the sums, float32 loses about 1e-7 of what was added; float64 nothing that matters."""
    for precision, tolerance in (("float32", 5e-7), ("float64", 1e-15)):
        with jax.enable_x64(precision == "float64"):
            base, *trees = ({n: t.astype(precision) for n, t in tensors.items()} for tensors in family.tensors)
            kept = [cfmerge.accumulate(base, {f"m{n}": tree}, "squares") for n, tree in enumerate(trees)]
            again = kept[0] + kept[1] + kept[2] - kept[1]
            never = kept[0] + kept[2]
            assert dict(again.experts) == dict(never.experts) == {"m0": 1.0, "m2": 1.0}
            for name in never.tensors:
                for leaf, array in never.tensors[name].items():
                    added = np.abs(np.asarray(kept[1].tensors[name][leaf])).max() + np.abs(np.asarray(array)).max()
                    error = np.abs(np.asarray(again.tensors[name][leaf]) - np.asarray(array)).max()
                    assert error <= tolerance * added
            if precision == "float64":
                found, expected = cfmerge.solve(again, base), cfmerge.solve(never, base)
                for name, tensor in expected.items():
                    assert np.abs(found[name] - tensor).max() <= 1e-12 * np.abs(tensor).max()


def test_another_method_of_the_same_statistic(family):
    base = family.tensors[0]
    kept = cfmerge.accumulate(base, family.trees, "average")
    close(cfmerge.solve(kept, base, "task_arithmetic", parameters={"scale": 0.7}),
          cfmerge.merge_params(base, family.trees, methods.task_arithmetic(0.7)))  # fmt: skip
    kept = cfmerge.accumulate(base, family.trees, methods.make("squares"))
    for ridge in (0.5, {"gradient": [0.1, 2.0]}):
        method = methods.make("squares", {"ridge": ridge})
        close(cfmerge.solve(kept, base, method), cfmerge.merge_params(base, family.trees, method), 1e-5)


def test_saved_and_loaded(family, tmp_path, contents):
    """Of arrays, of sums of them, and of weights that are arrays."""
    base = family.tensors[0]
    weights = np.asarray([1.0, 2.0, 3.0], np.float32)
    kept = cfmerge.accumulate(base, family.trees, "squares", weights=weights)
    (kept + cfmerge.accumulate(base, {"more": toys.small(7)}, "squares")).save(tmp_path / "kept")
    loaded = Statistics.load(tmp_path / "kept")
    assert dict(loaded.experts) == {"m1": 1.0, "m2": 2.0, "m3": 3.0, "more": 1.0}
    expected = cfmerge.merge_params(base, {**family.trees, "more": toys.small(7)}, methods.make("squares"),
                                    weights=[1, 2, 3, 1])  # fmt: skip
    close(cfmerge.solve(loaded, base), expected, 1e-5)
    close(cfmerge.solve(tmp_path / "kept", base), expected, 1e-5)
    less = loaded - cfmerge.accumulate(base, {"more": toys.small(7)}, "squares")
    less.save(tmp_path / "less")
    close(cfmerge.solve(tmp_path / "less", base),
          cfmerge.merge_params(base, family.trees, methods.make("squares"), weights=weights), 1e-5)  # fmt: skip
    before = contents(tmp_path / "less")
    with pytest.raises(CfmergeError, match="exists already"):
        kept.save(tmp_path / "less")
    assert contents(tmp_path / "less") == before
    kept.save(tmp_path / "less", overwrite=True)
    assert dict(Statistics.load(tmp_path / "less").experts) == {"m1": 1.0, "m2": 2.0, "m3": 3.0}


def test_trees_with_rules_and_stacked_layers(tmp_path):
    generator = np.random.default_rng(0)
    base, *trees = [{"layers": {"w": generator.standard_normal((3, 4, 5)).astype(np.float32)},
                     "table": generator.standard_normal((4, 3)).astype(np.float32),
                     "count": np.arange(2)} for _ in range(4)]  # fmt: skip
    named = dict(zip("abc", trees, strict=True))
    rules = [{"match": "layers/w", "layout": "bio"}, {"match": "table", "method": "task_arithmetic(scale=2)"}]
    expected = cfmerge.merge_params(base, named, methods.make("squares"), rules=rules)
    kept = cfmerge.accumulate(base, only(named, "a", "b"), "squares", rules=rules)
    (kept + cfmerge.accumulate(base, only(named, "c"), "squares", rules=rules)).save(tmp_path / "kept")
    found = cfmerge.solve(tmp_path / "kept", base)
    np.testing.assert_allclose(found["layers"]["w"], expected["layers"]["w"], rtol=0, atol=1e-5)
    np.testing.assert_allclose(found["table"], expected["table"], rtol=0, atol=1e-5)
    assert np.array_equal(found["count"], base["count"])


# --- checkpoints --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("text", ["average", "squares(ridge=0.5)", "times(factor=2.0) >> squares"])
def test_on_disk(family, tmp_path, load, monkeypatch, text):
    """At once, in halves that are added, one more later, and in pieces: what a merge gives."""
    cfmerge.merge(family.base, family.experts, text, output=tmp_path / "merged")
    expected = load(tmp_path / "merged")
    cfmerge.accumulate(family.base, family.experts, text, output=tmp_path / "whole")
    close(load(cfmerge.solve(tmp_path / "whole", family.base, output=tmp_path / "solved").output), expected)
    monkeypatch.setattr(cutting, "ENTRIES", 16)
    two = cfmerge.accumulate(family.base, only(family.experts, "m1", "m2"), text, output=tmp_path / "two")
    one = cfmerge.accumulate(family.base, only(family.experts, "m3"), text, output=tmp_path / "one")
    (two + one).save(tmp_path / "sum")
    close(load(cfmerge.solve(tmp_path / "sum", family.base, output=tmp_path / "of-sum").output), expected)
    close(load(cfmerge.solve(two + one, family.base, output=tmp_path / "of-both").output), expected)
    result = cfmerge.merge(
        family.base, only(family.experts, "m3"), text, statistics=str(tmp_path / "two"), output=tmp_path / "later"
    )
    close(load(result.output), expected)
    again = cfmerge.merge_recipe(load_recipe(result.output / "README.md"), tmp_path / "again")
    close(load(again.output), expected, 0)
    third = cfmerge.accumulate(
        family.base, only(family.experts, "m3"), text, statistics=str(tmp_path / "two"), output=tmp_path / "three"
    )
    assert dict(third.experts) == {"m1": 1.0, "m2": 1.0, "m3": 1.0}
    close(load(cfmerge.solve(third, family.base, output=tmp_path / "of-three").output), expected)


def test_ace_on_disk(family, tmp_path, load):
    """It is kept in the form whose size does not depend on the experts."""
    cfmerge.merge(family.base, family.experts, "ace", output=tmp_path / "merged")
    kept = cfmerge.accumulate(family.base, family.experts, "ace", output=tmp_path / "kept")
    close(load(cfmerge.solve(kept, family.base, output=tmp_path / "solved").output), load(tmp_path / "merged"), 1e-4)


def test_trees_and_checkpoints_meet(family, tmp_path, load):
    """Names and layouts are the same: what was kept in memory can be solved on disk, and the other way round."""
    expected = cfmerge.merge_params(family.tensors[0], family.trees, methods.make("squares"))
    here = cfmerge.accumulate(family.tensors[0], only(family.trees, "m1"), "squares")
    there = cfmerge.accumulate(family.base, without(family.experts, "m1"), "squares", output=tmp_path / "kept")
    close(cfmerge.solve(here + there, family.tensors[0]), expected, 1e-5)
    close(load(cfmerge.solve(there + here, family.base, output=tmp_path / "out").output), expected, 1e-5)


def test_bfloat16_models(make_model, tmp_path, load):
    """The sums are float32; the result is the base's dtype."""
    family = toys.small_family(make_model, tmp_path / "in", dtype=ml_dtypes.bfloat16)
    cfmerge.merge(family.base, family.experts, "squares", output=tmp_path / "merged")
    kept = cfmerge.accumulate(family.base, family.experts, "squares", output=tmp_path / "kept")
    assert {array.dtype for leaves in kept.tensors.values() for array in leaves.values()} == {np.dtype(np.float32)}
    found = load(cfmerge.solve(kept, family.base, output=tmp_path / "solved").output)
    assert {tensor.dtype for tensor in found.values()} == {np.dtype(ml_dtypes.bfloat16)}
    close(found, load(tmp_path / "merged"), 2e-2)
    assert np.mean([np.mean(found[name] == tensor) for name, tensor in load(tmp_path / "merged").items()]) > 0.95


def test_in_float64(family, tmp_path):
    one, two, both = (
        cfmerge.accumulate(family.base, only(family.experts, *names), "squares", precision="float64",
                           output=tmp_path / "-".join(names))
        for names in (["m1"], ["m2"], ["m1", "m2"])
    )  # fmt: skip
    for name, leaves in both.tensors.items():
        for leaf, array in leaves.items():
            assert array.dtype == np.float64
            again = (one + two - one).tensors[name][leaf]
            np.testing.assert_allclose(again, two.tensors[name][leaf], rtol=0, atol=1e-13 * np.abs(array).max())
            np.testing.assert_allclose((one + two).tensors[name][leaf], array, rtol=0, atol=1e-13 * np.abs(array).max())


def test_rules_and_heads_are_remembered(make_model, tmp_path, load):
    tensors = [toys.small(n) | {"classifier.weight": np.full((4 + n, 8), float(n), np.float32)} for n in range(3)]
    base, *experts = [make_model(tmp_path / f"m{n}", own, None) for n, own in enumerate(tensors)]
    options = {"rules": [{"match": NORM, "method": "task_arithmetic", "parameters": {"scale": 2.0}},
                         {"match": "*layers.1*", "method": "keep-base"}], "heads": "keep-base"}  # fmt: skip
    cfmerge.merge(base, experts, "average", output=tmp_path / "merged", **options)
    cfmerge.accumulate(base, experts, "average", output=tmp_path / "kept", **options)
    result = cfmerge.solve(tmp_path / "kept", base, output=tmp_path / "out")
    close(load(result.output), load(tmp_path / "merged"))
    assert np.array_equal(load(result.output)["classifier.weight"], tensors[0]["classifier.weight"])


def test_weights_over_depth(family, tmp_path, load):
    experts = [cfmerge.Expert(str(path), name, {"gradient": [1.0, 3.0]} if name == "m1" else 1.0)
               for name, path in family.experts.items()]  # fmt: skip
    cfmerge.merge(family.base, experts, "average", output=tmp_path / "merged")
    kept = cfmerge.accumulate(family.base, experts[:2], "average", output=tmp_path / "two")
    assert kept.experts["m1"] == {"gradient": [1.0, 3.0]}
    third = cfmerge.accumulate(family.base, experts[2:], "average", output=tmp_path / "one")
    close(load(cfmerge.solve(kept + third, family.base, output=tmp_path / "out").output), load(tmp_path / "merged"))


# --- errors -------------------------------------------------------------------------------------------------------


def fails(words, function, *arguments, **options):
    with pytest.raises(CfmergeError) as caught:
        function(*arguments, **options)
    assert all(word in str(caught.value) for word in words), str(caught.value)


def test_what_does_not_fit(family, tmp_path):
    base, other = family.tensors[0], toys.small(5)
    one, two = (cfmerge.accumulate(base, only(family.trees, name), "squares") for name in ("m1", "m2"))
    fails(["'m1' is in both"], lambda: one + one)
    fails(["'m2' cannot be forgotten"], lambda: one - two)
    fails(["different bases"], lambda: one + cfmerge.accumulate(other, only(family.trees, "m2"), "squares"))
    fails(["differ in what is kept", UP, "toy-squares", "sum"],
          lambda: one + cfmerge.accumulate(base, only(family.trees, "m2"), "average"))  # fmt: skip
    heavy = cfmerge.accumulate(base, only(family.trees, "m1"), "squares", weights=[2.0])
    fails(["'m1' was added with weight 1.0, not 2.0"], lambda: one - heavy)
    fails(["another base"], cfmerge.solve, one, other)
    fails(["ace needs the statistic"], cfmerge.solve, one, base, "ace")
    fails(["accumulate for times >> squares"], cfmerge.solve, one, base, "times(factor=1) >> squares")
    fails(["middle keeps every expert's delta"], cfmerge.accumulate, base, family.trees, "middle")
    fails(["middle keeps every expert's delta"], cfmerge.solve, one, base, "middle")
    fails(["output="], cfmerge.accumulate, family.base, family.experts, "average")
    fails(["save what is returned"], cfmerge.accumulate, base, family.trees, "average", output=tmp_path / "x")
    fails(["holds no statistics"], Statistics.load, family.base)
    fails(["nowhere"], Statistics.load, tmp_path / "nowhere")


def test_what_does_not_fit_on_disk(family, tmp_path, contents, make_model):
    other = make_model(tmp_path / "in/other", toys.small(5), None)
    cfmerge.accumulate(family.base, only(family.experts, "m1", "m2"), "squares", output=tmp_path / "kept")
    kept = str(tmp_path / "kept")
    before = contents(tmp_path)
    new = {"output": tmp_path / "out"}
    fails(["another base"], cfmerge.solve, kept, other, **new)
    fails(["ace needs the statistic"], cfmerge.solve, kept, family.base, "ace", **new)
    fails(
        ["'m2' is in the statistics already"],
        cfmerge.merge,
        family.base,
        only(family.experts, "m2"),
        "squares",
        statistics=kept,
        **new,
    )
    fails(["middle keeps every"], cfmerge.merge, family.base, only(family.experts, "m3"), "middle", statistics=kept,
          **new)  # fmt: skip
    fails(["middle keeps every"], cfmerge.accumulate, family.base, family.experts, "middle", **new)
    fails(["exists already"], cfmerge.accumulate, family.base, family.experts, "squares", output=kept)
    fails(["output="], cfmerge.solve, kept, family.base)
    fails(["'m1' is in both"], lambda: Statistics.load(kept) + Statistics.load(kept))
    assert contents(tmp_path) == before


@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError])
def test_nothing_half_written(family, tmp_path, contents, error):
    """Stopped in the middle, whether new or in the place of an older one."""
    cfmerge.accumulate(family.base, family.experts, "average", output=tmp_path / "old")
    before = contents(tmp_path)
    calls = []

    def stop(name, count):
        calls.append(name)
        if len(calls) == 3:
            raise error

    for options in ({"output": tmp_path / "new"}, {"output": tmp_path / "old", "overwrite": True}):
        calls.clear()
        with pytest.raises(error):
            cfmerge.accumulate(family.base, family.experts, "squares", progress=stop, **options)
        assert contents(tmp_path) == before


def test_an_expert_that_is_not_finite(family, make_model, tmp_path, contents):
    tensors = toys.small(6)
    tensors[NORM][0] = np.nan
    broken = family.experts | {"broken": make_model(tmp_path / "in/broken", tensors, None)}
    before = contents(tmp_path)
    fails(["expert 'broken'", NORM], cfmerge.accumulate, family.base, broken, "squares", output=tmp_path / "out")
    assert contents(tmp_path) == before


def test_saving_that_fails_leaves_nothing(family, tmp_path, contents):
    kept = cfmerge.accumulate(family.tensors[0], family.trees, "average")

    class Broken(dict):
        def __getitem__(self, name):
            if len(self.asked) == 4:
                raise RuntimeError("gone")
            self.asked.append(name)
            return super().__getitem__(name)

    tensors = Broken(kept.tensors)
    tensors.asked = []
    object.__setattr__(kept, "tensors", tensors)
    before = contents(tmp_path)
    with pytest.raises(RuntimeError, match="gone"):
        kept.save(tmp_path / "kept")
    assert contents(tmp_path) == before


def test_files_are_plain_safetensors(family, tmp_path, load):
    """`TENSOR:LEAF`, and what it is in the metadata."""
    kept = cfmerge.accumulate(family.base, family.experts, "average", output=tmp_path / "kept")
    found = load(tmp_path / "kept")
    assert set(found) == {f"{name}:{leaf}" for name in toys.SMALL for leaf in ("total", "weight")}
    assert found[f"{UP}:total"].shape == (1, 8, 6)
    assert found[f"{UP}:weight"].tolist() == [3]
    told = json.loads(kept.metadata()["cfmerge.statistics"])
    assert told["method"] == "average"
    assert told["experts"] == {"m1": 1.0, "m2": 1.0, "m3": 1.0}
    assert told["kinds"] == dict.fromkeys(toys.SMALL, "'sum'")


def test_an_expert_that_is_not_finite_can_be_left_out_of_statistics(family, make_model, tmp_path):
    broken = dict(family.tensors[2])
    broken[UP] = np.full_like(broken[UP], np.nan)
    experts = family.experts | {"m2": make_model(tmp_path / "broken", broken, None)}
    with pytest.raises(CfmergeError, match=r"expert 'm2'.*NaN.*--on-nonfinite skip-expert"):
        cfmerge.accumulate(family.base, experts, "average", output=tmp_path / "sums")
    kept = cfmerge.accumulate(family.base, experts, "average", output=tmp_path / "sums", on_nonfinite="skip-expert")
    assert list(kept.experts) == ["m1", "m3"]


def test_a_sweep_over_statistics_is_its_methods_one_by_one(family, tmp_path, load):
    cfmerge.accumulate(family.base, family.experts, "squares(ridge=1)", output=tmp_path / "sums")
    texts = ["squares(ridge=0.5)", "squares(ridge=2)"]
    found = cfmerge.sweep(family.base, [], texts, output=tmp_path / "swept", statistics=str(tmp_path / "sums"))
    for number, text in enumerate(texts):
        cfmerge.solve(tmp_path / "sums", family.base, text, output=tmp_path / str(number))
        close(load(found[text].output), load(tmp_path / str(number)))


@pytest.mark.parametrize("text", ["trim(density=0.5, scope='tensor') >> ace", "anchored(towards=ace)"])
def test_chains_and_anchors_of_ace_accumulate(family, tmp_path, load, text):
    cfmerge.accumulate(family.base, family.experts, text, output=tmp_path / "sums")
    cfmerge.solve(tmp_path / "sums", family.base, output=tmp_path / "solved")
    cfmerge.merge(family.base, family.experts, text, output=tmp_path / "merged")
    close(load(tmp_path / "solved"), load(tmp_path / "merged"), 1e-4)


def test_a_matrix_that_statistics_hold_whole_must_fit_the_memory(family, tmp_path):
    """A merge by this chain takes the tensor in pieces; its statistics do not."""
    chain = "trim(density=0.5) >> average"
    cfmerge.merge(family.base, family.experts, chain, output=tmp_path / "out", memory=100)
    with pytest.raises(CfmergeError, match="but the working set may be"):
        cfmerge.accumulate(family.base, family.experts, chain, output=tmp_path / "stats", memory=100)
