"""Methods that look at the whole model first: by expert, jointly, by tensor, in several passes; anywhere in a chain."""

import jax
import numpy as np
import pytest
import toys

import cfmerge
from cfmerge import methods
from cfmerge.engine import cutting
from cfmerge.errors import CfmergeError


@pytest.fixture(scope="module", autouse=True)
def own():
    with toys.registered(toys.times, toys.by_chance, toys.middle, toys.unit, toys.above, toys.unit_sum,
                         toys.unit_sum_of, toys.share, toys.restore, toys.squares) as made:  # fmt: skip
        yield made


@pytest.fixture
def family(make_model, tmp_path):
    return toys.small_family(make_model, tmp_path / "in")


def deltas_of(family):
    """`{tensor: (experts, ...)}`."""
    base, *experts = family.tensors
    return {name: np.stack([e[name].astype(np.float64) - base[name] for e in experts]) for name in base}


def by_expert(values, stack):
    return np.asarray(values).reshape(-1, *[1] * (stack.ndim - 1)) * stack


def squares_of(deltas):
    """Every expert's squared norm in the model."""
    return sum((stack**2).reshape(len(stack), -1).sum(axis=1) for stack in deltas.values())


def unit(deltas, size=1.0):
    return {name: by_expert(size / np.sqrt(squares_of(deltas)), stack) for name, stack in deltas.items()}


def above(deltas, power):
    sizes = sum(stack[0].size for stack in deltas.values())
    limit = np.sqrt(squares_of(deltas) / sizes)
    over = sum((np.abs(s) > by_expert(limit, np.ones_like(s))).reshape(len(s), -1).sum(1) for s in deltas.values())
    return {name: by_expert((over / sizes) ** power, stack) for name, stack in deltas.items()}


def share(deltas):
    own = {name: squares_of({name: stack}) / squares_of(deltas) for name, stack in deltas.items()}
    return {name: by_expert(own[name], stack) for name, stack in deltas.items()}


def times(deltas, factors):
    return {name: by_expert(factors, stack) for name, stack in deltas.items()}


def of_sum(deltas, scale=1.0, norm=None):
    total = {name: stack.sum(axis=0) for name, stack in deltas.items()}
    size = np.sqrt(sum((value**2).sum() for value in total.values()))
    return {name: scale * value / (size if norm is None else norm) for name, value in total.items()}


def restored(deltas, factors):
    merged = {name: np.median(stack, axis=0) for name, stack in times(deltas, factors).items()}
    size = np.sqrt(sum((value**2).sum() for value in merged.values()))
    return {name: value * np.mean(np.sqrt(squares_of(deltas))) / size for name, value in merged.items()}


def twice(deltas, sizes):
    """Two parts of a chain look at the model: the second at what the first one lets through, merged."""
    merged = {name: np.median(stack, axis=0) for name, stack in unit(deltas, np.array(sizes)).items()}
    size = np.sqrt(sum((value**2).sum() for value in merged.values()))
    return {name: value * np.mean(np.sqrt(squares_of(deltas))) / size for name, value in merged.items()}


SURVEYED = {
    "unit >> average": lambda d: of_sum(unit(d), norm=3),
    "unit(size=[1.0, 2.0, 4.0]) >> average": lambda d: of_sum(unit(d, [1, 2, 4]), norm=3),
    "times(factor=[1.0, 2.0, -4.0]) >> unit >> scale(factor=2) >> average": lambda d: of_sum(
        unit(times(d, [1, 2, -4])), 2, norm=3
    ),
    "above(power=2) >> average": lambda d: of_sum(above(d, 2), norm=3),
    "unit_sum(size=2)": lambda d: of_sum(d, 2),
    "times(factor=[1.0, 0.5, -2.0]) >> unit_sum >> scale(factor=3)": lambda d: of_sum(times(d, [1, 0.5, -2]), 3),
    "unit_sum_of(factor=[1.0, 0.5, -2.0])": lambda d: of_sum(times(d, [1, 0.5, -2]), 2),
    "share >> average": lambda d: of_sum(share(d), norm=3),
    "times(factor=[1.0, 0.5, 2.0]) >> middle >> restore": lambda d: restored(d, [1, 0.5, 2]),
    "unit(size=[1.0, 2.0, 4.0]) >> middle >> restore": lambda d: twice(d, [1, 2, 4]),
    "metagpt": lambda d: of_sum(times(d, squares_of(d) / squares_of(d).sum()), norm=1),
}


def check(found, family, expected, atol=3e-6):
    for name, delta in expected.items():
        np.testing.assert_allclose(np.asarray(found[name], float) - family.tensors[0][name], delta, rtol=0, atol=atol)


@pytest.mark.parametrize("text", SURVEYED)
def test_on_disk_and_in_memory(family, tmp_path, load, monkeypatch, text):
    """And in pieces of 16 entries, which are surveyed one by one."""
    expected = SURVEYED[text](deltas_of(family))
    cfmerge.merge(family.base, family.experts, text, output=tmp_path / "whole")
    check(load(tmp_path / "whole"), family, expected)
    check(cfmerge.merge_params(family.tensors[0], family.trees, methods.make(text)), family, expected)
    monkeypatch.setattr(cutting, "ENTRIES", 16)
    cfmerge.merge(family.base, family.experts, text, output=tmp_path / "cut")
    check(load(tmp_path / "cut"), family, expected)


def test_all_at_once(family, tmp_path, load):
    """In a sweep every method surveys for itself, one after the other, whatever was found before."""
    by = [*list(SURVEYED)[1:], "average", "squares"]
    deltas = deltas_of(family)
    in_memory = cfmerge.sweep(family.tensors[0], family.trees, by)
    on_disk = cfmerge.sweep(family.base, family.experts, by, output=tmp_path / "out")
    for text in by[:-2]:
        check(in_memory[text], family, SURVEYED[text](deltas))
        check(load(on_disk[text].output), family, SURVEYED[text](deltas))
    alone = cfmerge.merge_params(family.tensors[0], family.trees, methods.make("squares"))
    check(in_memory["squares"], family, {n: np.asarray(v, float) - family.tensors[0][n] for n, v in alone.items()})


def test_one_tensor_is_the_whole_model(own):
    base, generator = np.zeros((5, 4), np.float32), np.random.default_rng(1)
    experts = [generator.standard_normal((5, 4)).astype(np.float32) for _ in range(2)]
    found = np.asarray(cfmerge.merge_tensor(base, experts, own.unit([1.0, 3.0]) >> methods.average()))
    a, b = (expert / np.linalg.norm(expert) for expert in experts)
    np.testing.assert_allclose(found, (a + 3 * b) / 2, rtol=0, atol=1e-6)
    found = np.asarray(cfmerge.merge_tensor(base, experts, own.unit_sum(), weights=[1.0, 2.0]))
    total = experts[0] + 2 * experts[1]
    np.testing.assert_allclose(found, total / np.linalg.norm(total), rtol=0, atol=1e-6)


@pytest.mark.parametrize("layout", ["boi", "bio"])
def test_stacked_layers(make_model, tmp_path, load, layout):
    """A tensor that stacks three layers has three places, beside those of another tensor."""
    generator = np.random.default_rng(1)
    tensors = [{"layers.w": generator.standard_normal((3, 5, 4)).astype(np.float32),
                "w": generator.standard_normal((4, 4)).astype(np.float32)} for _ in range(3)]  # fmt: skip
    rules = [{"match": "layers.w", "layout": layout}, {"match": "w", "layout": "oi"}]
    text = "share(by='place', scope='tensor') >> average"
    paths = [make_model(tmp_path / f"m{n}", own, None) for n, own in enumerate(tensors)]
    base, *experts = tensors
    results = [
        cfmerge.merge_params(base, experts, methods.make(text), rules=rules),
        load(cfmerge.merge(paths[0], paths[1:], text, rules=rules, output=tmp_path / "out").output),
    ]
    deltas = [{name: expert[name].astype(float) - base[name] for name in base} for expert in experts]
    totals = [sum((value**2).sum() for value in delta.values()) for delta in deltas]
    for found in results:
        for layer in range(3):
            own = [d["layers.w"][layer] * (d["layers.w"][layer] ** 2).sum() / t
                   for d, t in zip(deltas, totals, strict=True)]  # fmt: skip
            np.testing.assert_allclose(
                np.asarray(found["layers.w"][layer]) - base["layers.w"][layer], np.mean(own, axis=0), rtol=0, atol=1e-6
            )


def test_rules_survey_their_own_tensors(family, tmp_path, load):
    """A method with other numbers, or in another chain, knows the tensors that it merges."""
    rules = [{"match": "*norm*", "method": "unit(size=5) >> task_arithmetic(scale=1)"}]
    cfmerge.merge(family.base, family.experts, "unit >> task_arithmetic(scale=1)", rules=rules, output=tmp_path / "out")
    deltas = deltas_of(family)
    norm = {name: deltas.pop(name) for name in list(deltas) if "norm" in name}
    expected = of_sum(unit(deltas), norm=1) | of_sum(unit(norm, 5), norm=1)
    check(load(tmp_path / "out"), family, expected)
    found = cfmerge.merge_params(
        family.tensors[0], family.trees, methods.make("unit >> task_arithmetic(scale=1)"), rules=rules
    )
    check(found, family, expected)


def test_a_survey_sees_what_is_drawn(family):
    """One expert, its entries dropped at random and the model then scaled to norm 1: it has norm 1."""
    found = cfmerge.merge_params(
        family.tensors[0], {"m1": family.tensors[1]}, methods.make("by_chance >> unit >> task_arithmetic(scale=1)")
    )
    merged = {name: np.asarray(value, float) - family.tensors[0][name] for name, value in found.items()}
    assert sum((value**2).sum() for value in merged.values()) == pytest.approx(1, abs=1e-5)
    assert sum((value == 0).mean() for value in merged.values()) > 0.3


def test_experts_weights_and_order(family, tmp_path, load):
    """What is found of an expert goes with it."""
    there = cfmerge.merge_params(family.tensors[0], family.trees, methods.make("unit >> average"))
    back = cfmerge.merge_params(
        family.tensors[0], dict(reversed(family.trees.items())), methods.make("unit >> average")
    )
    for name in there:
        np.testing.assert_allclose(np.asarray(there[name]), np.asarray(back[name]), rtol=0, atol=1e-6)
    experts = [cfmerge.Expert(str(path), name, 1.0 + number) for number, (name, path)
               in enumerate(family.experts.items())]  # fmt: skip
    cfmerge.merge(family.base, experts, "unit >> average", output=tmp_path / "out")
    expected = of_sum(times(unit(deltas_of(family)), [1, 2, 3]), norm=6)
    check(load(tmp_path / "out"), family, expected)


def test_in_float64(make_model, tmp_path, load):
    family = toys.small_family(make_model, tmp_path / "in", dtype=np.float64)
    for text, tolerance in {"unit >> average": 1e-14, "unit_sum(size=2)": 1e-14, "share >> average": 1e-14}.items():
        output = tmp_path / text.split("(")[0].replace(" >> ", "-")
        cfmerge.merge(family.base, family.experts, text, output=output)
        check(load(output), family, SURVEYED[text](deltas_of(family)), tolerance)


# --- what cannot be ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("text", ["unit >> average", "unit_sum", "average >> restore", "share >> average"])
def test_under_jit(family, text):
    """What is combined on the host needs values."""
    method = methods.make(text)
    if text == "share >> average":  # sums alone: these can be traced
        found = jax.jit(lambda base, trees: cfmerge.merge_params(base, trees, method))(family.tensors[0], family.trees)
        check(found, family, SURVEYED[text](deltas_of(family)))
        return
    with pytest.raises(CfmergeError, match=r"surveys the whole model .* cannot be done under jit; call it outside"):
        jax.jit(lambda base: cfmerge.merge_params(base, family.trees, method))(family.tensors[0])


@pytest.mark.parametrize("combine", [lambda total: float(total[0]), lambda total: 1.0 if total[0] > 0 else 0.0,
                                     lambda total: [1.0, 2.0][int(total[0])]])  # fmt: skip
def test_under_jit_whatever_the_host_does(own, combine):
    def look(entries, own):
        return combine((yield methods.Measure(lambda delta: delta.sum())))

    survey = methods.Survey(look, lambda found: methods.scale(2.0))
    part = methods.Transform("odd", lambda delta: delta, survey=survey)
    with pytest.raises(CfmergeError, match="odd >> average surveys the whole model"):
        jax.jit(lambda base: cfmerge.merge_tensor(base, [base + 1.0], part >> methods.average()))(np.zeros((2, 2)))


@pytest.mark.parametrize("text", [
    "metagpt", "iso_c >> larv", "pcb", "ties(density=[0.1, 0.5, 0.9], zero='majority')",
    "dare_ties(p=0.5) >> trim(scope='model')",
])  # fmt: skip
def test_the_package_s_own_under_jit(text):
    """Order statistics among values that tie, and what tells of each tensor, are found while they are traced too."""
    base, *experts = ({name: np.round(a, 1) for name, a in toys.small(seed).items()} for seed in range(4))
    method = methods.make(text)
    expected = cfmerge.merge_params(base, experts, method)
    found = jax.jit(lambda base, experts: cfmerge.merge_params(base, experts, method))(base, experts)
    for name, value in expected.items():
        np.testing.assert_allclose(found[name], value, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("text", ["ties", "pcb"])
def test_the_package_s_own_under_vmap(text):
    """Each of a stack of weights is a model of its own."""
    generator = np.random.default_rng(0)
    base, *experts = generator.standard_normal((4, 2, 5, 4)).astype(np.float32)
    method = methods.make(text)
    found = jax.vmap(lambda base, experts: cfmerge.merge_tensor(base, experts, method))(base, experts)
    for number in range(2):
        alone = cfmerge.merge_tensor(base[number], [expert[number] for expert in experts], method)
        np.testing.assert_allclose(found[number], alone, rtol=1e-5, atol=1e-6)


def test_no_statistics_of_a_part(family, tmp_path):
    for text in ("unit >> average", "unit_sum"):
        with pytest.raises(CfmergeError, match="surveys the whole model"):
            cfmerge.accumulate(family.tensors[0], family.trees, text)
        with pytest.raises(CfmergeError, match="surveys the whole model"):
            cfmerge.accumulate(family.base, family.experts, text, output=tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("text", ["unit >> average", "unit_sum", "trim(density=0.5, scope='model') >> average"])
def test_a_model_that_is_not_finite(make_model, family, tmp_path, load, text):
    """The survey comes first, and still it is the model that is named; or left out, and all is surveyed again."""
    tensors = toys.small(4)
    tensors["model.norm.weight"][3] = np.nan
    broken = family.experts | {"broken": make_model(tmp_path / "in/broken", tensors, None)}
    with pytest.raises(CfmergeError, match=r"'broken'.*model\.norm\.weight"):
        cfmerge.merge(family.base, broken, text, output=tmp_path / "out")
    assert not (tmp_path / "out").exists()
    result = cfmerge.merge(family.base, broken, text, output=tmp_path / "out", on_nonfinite="skip-expert")
    assert any("'broken' was left out" in note for note in result.notes)
    cfmerge.merge(family.base, family.experts, text, output=tmp_path / "without")
    skipped, without = load(tmp_path / "out"), load(tmp_path / "without")
    assert all(np.array_equal(skipped[name], without[name]) for name in without)
