"""Sweeps: many results from one pass, each what a merge by its method alone gives."""

import collections

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import toys

import cfmerge
from cfmerge import methods
from cfmerge.core.several import several
from cfmerge.engine import cutting, run
from cfmerge.errors import CfmergeError
from cfmerge.formats.huggingface import HuggingFaceSource
from cfmerge.products.carry_out import directory_name
from cfmerge.products.leaves import Kept
from cfmerge.products.plan import as_recipe
from cfmerge.recipe import load as load_recipe

UP = "model.layers.0.mlp.up_proj.weight"
TEXTS = [
    "average", "task_arithmetic(scale=0.5)", "squares", "squares(ridge=0.5)", "squares(ridge=2.0, scale=0.5)", "middle",
    "times(factor=[1, 2, 3]) >> average", "task_arithmetic(scale={'gradient': [1, 0.5]})", "by_chance >> average",
    "trim(density=0.5) >> disjoint_mean",
]  # fmt: skip


@pytest.fixture(scope="module", autouse=True)
def own():
    with toys.registered(toys.times, toys.middle, toys.squares, toys.by_chance) as made:
        yield made


@pytest.fixture
def family(make_model, tmp_path):
    return toys.small_family(make_model, tmp_path / "in")


def close(found, expected, atol=2e-6):
    assert set(found) == set(expected)
    for name, tensor in found.items():
        np.testing.assert_allclose(np.asarray(tensor), np.asarray(expected[name]), rtol=0, atol=atol)


# --- the same results ---------------------------------------------------------------------------------------------


def test_each_result_is_that_of_a_merge(family, tmp_path, load):
    """Additive or not, chained, random, with numbers by tensor and expert; to rounding, for XLA may fuse otherwise."""
    found = cfmerge.sweep(family.base, family.experts, TEXTS, output=tmp_path / "all", seed=3)
    trees = cfmerge.sweep(family.tensors[0], family.trees, TEXTS, seed=3)
    assert list(found) == list(trees) == TEXTS
    for number, text in enumerate(TEXTS):
        cfmerge.merge(family.base, family.experts, text, output=tmp_path / f"{number}", seed=3)
        alone = load(tmp_path / f"{number}")
        close(load(found[text].output), alone)
        close(trees[text], alone)


def test_a_sweep_of_one(family, tmp_path, load):
    found = cfmerge.sweep(family.base, family.experts, ["middle"], output=tmp_path / "one")
    cfmerge.merge(family.base, family.experts, "middle", output=tmp_path / "alone")
    close(load(found["middle"].output), load(tmp_path / "alone"), 0)
    close(cfmerge.sweep(family.tensors[0], family.trees, ["middle"])["middle"], load(tmp_path / "alone"))


def test_pieces_rules_weights_and_dtype(family, tmp_path, load, monkeypatch):
    """Options hold for all; a rule's tensors are the same in every result."""
    monkeypatch.setattr(cutting, "ENTRIES", 16)
    experts = [cfmerge.Expert(str(path), name, {"gradient": [1.0, 3.0]} if name == "m1" else 1.0)
               for name, path in family.experts.items()]  # fmt: skip
    options = {"rules": [{"match": "*norm*", "method": "task_arithmetic(scale=2)"}], "dtype": "float16"}
    by = {"mean": "average", "median": "times(factor=[1, 2, 3]) >> average", "half": "task_arithmetic(scale=0.5)"}
    found = cfmerge.sweep(family.base, experts, by, output=tmp_path / "all", **options)
    norms = []
    for label, text in by.items():
        cfmerge.merge(family.base, experts, text, output=tmp_path / label, **options)
        close(load(found[label].output), load(tmp_path / label), 1e-3)
        norms.append(load(found[label].output)["model.norm.weight"])
    assert norms[0].dtype == np.float16
    assert all(np.array_equal(norm, norms[0]) for norm in norms)


def test_tensors_that_are_kept(make_model, tmp_path, load):
    models = []
    for number in range(3):
        tensors = toys.small(number) | {"position_ids": np.arange(5), "fixed.weight": np.eye(3, dtype=np.float32)}
        models.append(make_model(tmp_path / f"m{number}", tensors, None))
    rules = [{"match": "fixed.weight", "method": "keep-base"}]
    found = cfmerge.sweep(models[0], models[1:], ["average", "task_arithmetic"], rules=rules, output=tmp_path / "out")
    for result in found.values():
        assert np.array_equal(load(result.output)["position_ids"], np.arange(5))
        assert np.array_equal(load(result.output)["fixed.weight"], np.eye(3))


def test_each_card_gives_its_own_merge(family, tmp_path, load):
    found = cfmerge.sweep(family.base, family.experts, ["squares(ridge=0.5)", "average"], output=tmp_path / "all")
    for number, result in enumerate(found.values()):
        again = cfmerge.merge_recipe(load_recipe(result.output / "README.md"), tmp_path / f"again{number}")
        close(load(again.output), load(result.output))


def test_reports_by_result(family, tmp_path):
    found = cfmerge.sweep(family.base, family.experts, ["squares(ridge=0.5)", "average", "squares(ridge=2)"],
                          output=tmp_path / "out")  # fmt: skip
    first, middle, last = (result.reports[UP] for result in found.values())
    assert (first["ridge"], last["ridge"]) == (0.5, 2.0)
    assert first["trace"] == last["trace"] > 0
    assert middle == {}


# --- one pass -----------------------------------------------------------------------------------------------------


def test_every_tensor_is_read_once(family, tmp_path, monkeypatch):
    reads = collections.Counter()
    original = HuggingFaceSource.read

    def counted(self, name, first=0, count=None):
        reads.update([(str(self.path), name)])
        return original(self, name, first, count)

    plan = cfmerge.plan({text: as_recipe(family.base, family.experts, text, None, {}) for text in TEXTS})
    monkeypatch.setattr(HuggingFaceSource, "read", counted)
    run.merge(plan.work, [Kept() for _ in TEXTS])
    assert set(reads.values()) == {1}
    assert len(reads) == 4 * len(family.tensors[0])


def decompositions(function, *arguments):
    """Shapes of the matrices that are decomposed, anywhere in the function."""
    shapes = []

    def walk(jaxpr):
        for equation in jaxpr.eqns:
            if equation.primitive.name in {"eigh", "cholesky", "svd", "qr", "lu"}:
                shapes.append(equation.invars[0].aval.shape)
            for value in jax.tree.leaves(equation.params, is_leaf=lambda x: hasattr(x, "eqns") or hasattr(x, "jaxpr")):
                inner = getattr(value, "jaxpr", value)
                if hasattr(inner, "eqns"):
                    walk(inner)

    walk(jax.make_jaxpr(function)(*arguments).jaxpr)
    return shapes


def test_one_decomposition_for_many_ridges(own):
    """Methods that differ in numbers alone share the statistic and what does not depend on the numbers."""
    many = several(tuple(own.squares(ridge=r, scale=s) for r, s in [(0.1, 1.0), (0.2, 1.0), (0.3, 0.5)]))
    base, delta = jnp.zeros((4, 3)), jnp.ones((4, 3)) + jnp.eye(4, 3)
    statistic = many.update(many.init(base), delta, 1.0)
    assert len(statistic) == 1
    assert decompositions(many.solve, statistic) == [(3, 3)]
    for result, ridge, scale in zip(many.solve(statistic)[0], (0.1, 0.2, 0.3), (1.0, 1.0, 0.5), strict=True):
        alone = own.squares(ridge=ridge, scale=scale)
        np.testing.assert_allclose(result, alone.solve(statistic[0])[0], rtol=0, atol=1e-6)


@pytest.mark.parametrize(
    ("name", "parameter"),
    [("ace", "eps_rel"), ("ace", "tau"), ("power", "exponent"), ("iso_c", "alpha"), ("two_sided", "output_power")],
)
def test_what_depends_on_the_numbers_is_decomposed_one_by_one(name, parameter):
    """Never as a batch: two batches at once could wait for each other, and fall-backs would run for nothing."""
    many = several(tuple(methods.make(f"{name}({parameter}={value})") for value in (0.25, 0.5, 0.75)))
    statistic = many.init(jnp.zeros((6, 5)))
    for delta in jax.random.normal(jax.random.key(0), (2, 6, 5)):
        statistic = many.update(statistic, delta, 1.0)
    shapes = decompositions(many.solve, statistic)
    assert shapes
    assert {len(shape) for shape in shapes} == {2}


def test_statistics_that_are_shared(own):
    many = several((methods.average(), methods.task_arithmetic(0.5), own.squares(), own.squares(2.0), own.middle()))
    assert len(many.init(jnp.zeros((4, 3)))) == 3
    assert not many.additive
    assert several((methods.average(), own.squares())).additive
    apart = several((own.times(1.0) >> methods.average(), own.times(2.0) >> methods.average(), methods.average()))
    assert len(apart.init(jnp.zeros(3))) == 3


def test_under_jit_and_grad(own, family):
    """A ridge path as a function of the base, and its derivative."""

    def first(base):
        found = cfmerge.sweep(base, family.trees, {"a": own.squares(0.5), "b": own.squares(1.5)})
        return found["a"][UP].sum() + 2 * found["b"][UP].sum()

    base = {name: jnp.asarray(tensor) for name, tensor in family.tensors[0].items()}

    def alone(base):
        one, other = (cfmerge.merge_params(base, family.trees, own.squares(r))[UP].sum() for r in (0.5, 1.5))
        return one + 2 * other

    np.testing.assert_allclose(jax.jit(first)(base), alone(base), rtol=1e-5)
    np.testing.assert_allclose(jax.grad(first)(base)[UP], jax.grad(alone)(base)[UP], rtol=1e-3, atol=1e-3)


# --- labels -------------------------------------------------------------------------------------------------------


def test_grid():
    made = cfmerge.grid("task_arithmetic", scale=[0.1, 0.2], normalise=[True, False])
    assert list(made) == [f"task_arithmetic(scale={s}, normalise={n})" for s in (0.1, 0.2) for n in (True, False)]
    assert made["task_arithmetic(scale=0.2, normalise=True)"].parameters == {"scale": 0.2, "normalise": True}
    only = cfmerge.grid("task_arithmetic", scale=[0.1, 0.2], normalise=True)
    assert list(only) == ["task_arithmetic(scale=0.1)", "task_arithmetic(scale=0.2)"]
    assert all(method.parameters["normalise"] for method in only.values())
    by_depth = cfmerge.grid("task_arithmetic", scale=[{"gradient": [0.0, 1.0]}, 0.5])
    assert [method.parameters["scale"] for method in by_depth.values()] == [{"gradient": [0.0, 1.0]}, 0.5]
    with pytest.raises(CfmergeError, match="no parameter has a list"):
        cfmerge.grid("task_arithmetic", scale=0.1)
    with pytest.raises(CfmergeError, match="'scal'"):
        cfmerge.grid("task_arithmetic", scal=[0.1])


def test_grid_of_values_by_expert(family):
    found = cfmerge.sweep(family.tensors[0], family.trees, {
        label: method >> methods.average() for label, method in
        {"a": methods.trim([0.5, 0.2, 1.0]), "b": methods.trim(0.5)}.items()
    })  # fmt: skip
    close(found["a"], cfmerge.merge_params(family.tensors[0], family.trees,
                                           methods.trim([0.5, 0.2, 1.0]) >> methods.average()))  # fmt: skip


def test_directories_are_called_after_the_labels(family, tmp_path):
    found = cfmerge.sweep(family.base, family.experts, cfmerge.grid("task_arithmetic", scale=[0.25, 1]),
                          output=tmp_path / "out")  # fmt: skip
    assert {path.name for path in (tmp_path / "out").iterdir()} == {
        "task_arithmetic_scale=0.25", "task_arithmetic_scale=1"
    }  # fmt: skip
    assert [result.output.name for result in found.values()] == [
        "task_arithmetic_scale=0.25",
        "task_arithmetic_scale=1",
    ]
    assert directory_name("trim(density=0.2) >> average") == "trim_density=0.2_average"
    assert directory_name("../../etc") not in {"..", "."}
    assert "/" not in directory_name("../a/b")
    for label in ("..", ".", "", "///", "ä ö"):
        assert directory_name(label) not in {"", ".", ".."}


# --- errors -------------------------------------------------------------------------------------------------------


@pytest.fixture
def fails(family, tmp_path, contents):
    """`fails(words, methods, ...)`: the sweep says all the words, and changes nothing on disk."""

    def check(words, by, experts=None, **options):
        before = contents(tmp_path)
        with pytest.raises(CfmergeError) as caught:
            cfmerge.sweep(family.base, experts or family.experts, by, **{"output": tmp_path / "a/b/out"} | options)
        assert all(word in str(caught.value) for word in words), str(caught.value)
        assert contents(tmp_path) == before

    return check


def test_failures_leave_nothing(family, fails, tmp_path, make_model):
    fails(["no methods"], [])
    fails(["the same method is there twice"], ["average", "average"])
    fails(["the same directory"], {"a b": "average", "a_b": "squares"})
    fails(["unknown method 'averag'"], ["average", "averag"])
    fails(["output="], ["average"], output=None)
    fails(["expo takes 1 expert, found 3"], ["average", "expo"])
    fails(["2 values for 3 experts"], ["average", "times(factor=[1, 2]) >> average"])
    fails(["weights"], ["average", "middle"], [cfmerge.Expert(str(family.experts["m1"]), "a", 2.0),
                                               str(family.experts["m2"])])  # fmt: skip
    tensors = toys.small(9)
    tensors[UP][0, 0] = np.inf
    fails(["expert 'broken'", UP], TEXTS[:3],
          family.experts | {"broken": make_model(tmp_path / "in/broken", tensors, None)})  # fmt: skip


def test_one_of_the_outputs_exists(fails, make_model, tmp_path):
    make_model(tmp_path / "a/b/out/squares", toys.small(), None)
    fails(["squares", "exists already"], ["average", "squares", "middle"])


def test_an_expert_that_is_not_finite_is_left_out_of_all(family, make_model, tmp_path, load):
    tensors = toys.small(9)
    tensors[UP][0, 0] = np.nan
    experts = family.experts | {"broken": make_model(tmp_path / "in/broken", tensors, None)}
    by = ["average", "middle"]
    found = cfmerge.sweep(family.base, experts, by, output=tmp_path / "out", on_nonfinite="skip-expert")
    without = cfmerge.sweep(family.base, family.experts, by, output=tmp_path / "without")
    for text in by:
        close(load(found[text].output), load(without[text].output), 0)
        assert sum("'broken' was left out" in note for note in found[text].notes) == 1


def test_trees_are_checked_for_every_method(family):
    def fails(words, by, trees=family.trees, **options):
        with pytest.raises(CfmergeError) as caught:
            cfmerge.sweep(family.tensors[0], trees, by, **options)
        assert all(word in str(caught.value) for word in words), str(caught.value)

    fails(["expo takes 1 expert, found 3"], ["average", "expo"])
    fails(["middle knows no weights"], ["average", "middle"], weights=[1, 2, 1])
    fails(["sum to 0"], ["task_arithmetic", "average"], weights=[1, -2, 1])
    fails(["2 values for 3 experts"], ["average", "times(factor=[1, 2]) >> average"])
    fails(["output is for checkpoints"], ["average"], output="x")
    fails(["fisher", "regmean", "different moments"], ["fisher", "regmean"])
