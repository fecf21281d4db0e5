"""Parts of methods: chains, text and back, forms of a value, numbers apart from structure, a user's own parts."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import toys
from cfmerge.methods._base import with_context

import cfmerge
from cfmerge import methods
from cfmerge.errors import CfmergeError
from cfmerge.methods import Context, Method, Number, PerExpert, Seen, Transform, chain, make, register
from cfmerge.methods import _registry as parts


@pytest.fixture(scope="module")
def own():
    with toys.registered(toys.times, toys.deeper, toys.toward, toys.by_chance, toys.middle, toys.squares, toys.unit,
                         toys.restore) as made:  # fmt: skip
        yield made


@pytest.fixture(scope="module")
def deltas():
    generator = np.random.default_rng(3)
    return [jnp.asarray(generator.standard_normal((4, 3)), jnp.float32) for _ in range(3)]


BASE = jnp.zeros((4, 3))


def merged(method, deltas, **options):
    return np.asarray(cfmerge.merge_tensor(BASE, deltas, method, **options))


def close(found, expected, atol=1e-6):
    np.testing.assert_allclose(found, expected, rtol=0, atol=atol)


def fails(words, function, *arguments, **options):
    with pytest.raises(CfmergeError) as caught:
        function(*arguments, **options)
    for word in words:
        assert word in str(caught.value), str(caught.value)


# --- chains -------------------------------------------------------------------------------------------------------


def test_chain_is_its_parts_one_after_the_other(own, deltas):
    """In front on each delta, behind on the merged one; called part by part, it is the same."""
    method = own.times(2.0) >> own.deeper() >> methods.average() >> methods.scale(0.5) >> own.times(3.0)
    close(merged(method, deltas), 3 * np.mean(deltas, axis=0))
    statistic = method.init(BASE)
    for delta in deltas:
        statistic = method.update(statistic, delta, 1.0)
    close(method.solve(statistic), 3 * np.mean(deltas, axis=0))


def test_chain_takes_over_what_its_method_says(own):
    method = own.by_chance() >> methods.average() >> own.times(1.0)
    assert method.additive
    assert method.normalises
    assert method.random
    assert method.scope == "entry"
    assert method.name == "by_chance >> average >> times"
    assert (own.times(1.0) >> methods.ace()).scope == "matrix"
    assert (own.by_chance(scope="tensor") >> methods.average()).scope == "tensor"
    assert not (own.times(1.0) >> own.middle()).additive
    assert (own.times(1.0) >> methods.expo()).experts == (1, 1)
    assert method.statistic is None  # transformed deltas are not another method's statistic


def test_chains_nest(own, deltas):
    a, b, method, c, d = own.times(2.0), own.times(3.0), methods.average(), own.times(5.0), own.times(7.0)
    ways = [a >> b >> method >> c >> d, (a >> b) >> (method >> (c >> d)), chain(a, chain(b, chain(method, c)), d)]
    assert len({parts.structure(way) for way in ways}) == 1
    assert {parts.expression(way) for way in ways} == {
        "times(factor=2.0) >> times(factor=3.0) >> average >> times(factor=5.0) >> times(factor=7.0)"
    }
    results = [merged(way, deltas) for way in ways]
    assert all(np.array_equal(result, results[0]) for result in results)


def test_a_chain_of_transforms_is_a_transform(own, deltas):
    both = own.times(2.0) >> own.times(3.0)
    assert isinstance(both, Transform)
    close(both(deltas[0]), 6 * deltas[0])
    assert isinstance(both >> methods.average(), Method)


def test_what_cannot_be_chained(own):
    fails(["two methods", "average and ace"], lambda: methods.average() >> methods.ace())
    fails(["unit and restore", "survey"], lambda: own.unit() >> methods.average() >> own.restore())
    fails(["toward", "behind a method"], lambda: own.toward() >> methods.average())
    fails(["by_chance", "in front of the method"], lambda: methods.average() >> own.by_chance())
    with pytest.raises(TypeError):
        methods.average() >> 3


def test_a_transform_that_looks_back(own, deltas):
    """It gets the deltas as they came in, whatever stands in front of the method."""
    method = own.times(2.0) >> methods.average() >> own.toward(0.25)
    assert not method.additive
    close(merged(method, deltas), 0.75 * 2 * np.mean(deltas, axis=0) + 0.25 * deltas[0])


def test_what_a_transform_sees_when_it_looks_back(deltas):
    seen = []

    def look() -> Transform:
        """Notes what it is given."""
        return Transform("look", lambda merged, given: seen.append(given) or merged, looks_back=True)

    method = methods.average() >> look()
    statistic = method.init(deltas[0])
    for number in (1, 2):
        statistic = method.update(statistic, deltas[number], float(number))
    method.solve(statistic)
    assert isinstance(seen[0], Seen)
    assert np.array_equal(seen[0].base, deltas[0])
    assert np.array_equal(seen[0].deltas, np.stack(deltas[1:]))
    assert seen[0].weights.tolist() == [1, 2]


def test_context_comes_to_those_who_take_it(own):
    context = Context(number=3)
    assert with_context(lambda delta: delta, (1,), context) == 1
    assert with_context(lambda delta, context: context.number, (1,), context) == 3
    assert with_context(lambda *all_of_them: all_of_them[-1].number if len(all_of_them) > 1 else 0, (1,), context) == 0


# --- text ---------------------------------------------------------------------------------------------------------


TEXTS = [
    "average", "task_arithmetic(scale=0.4)", "trim(density=0.3) >> disjoint_mean", "trim(density=0.3) >> average",
    "times(factor=2.0) >> ace(eps_rel=0.01) >> scale(factor=0.5)", "times(factor=[0.1, 0.2, 0.3]) >> average",
    "times(factor={'experts': {'a': 0.1, 'b': 2.0}}) >> average", "task_arithmetic(scale={'gradient': [0.0, 1.0]})",
    "task_arithmetic(scale=[{'match': '*mlp*', 'value': 1.0}, {'value': -0.5}])",
    "by_chance(p=0.25, scope='tensor') >> average",
]  # fmt: skip


@pytest.mark.parametrize("text", TEXTS)
def test_text_and_back(own, text):
    made = make(text)
    assert parts.expression(made) == text
    assert make(parts.expression(made)) is make(text) or " >> " in text
    assert parts.structure(make(parts.expression(made))) == parts.structure(made)
    assert parts.numbers(make(parts.expression(made))) == parts.numbers(made)


def test_ways_to_write_the_same(own):
    texts = ["times( 2.0 )>>average", "times(factor=2.0) >> average()", "(times(factor=2.0)) >> (average)"]
    names = {parts.expression(make(text)) for text in texts}
    assert names == {"times(factor=2.0) >> average"}
    assert make("task_arithmetic", {"scale": "4e-1"}) is make("task_arithmetic(scale=4e-1)")
    assert make("task_arithmetic", {"scale": 0.3}) is not make("task_arithmetic", {"scale": 0.4})
    assert parts.expression(make("task_arithmetic(scale=0.3)")) == "task_arithmetic"  # the default


def test_text_is_not_evaluated(own):
    fails(["cannot be read"], make, "task_arithmetic(scale=__import__('os').getpid())")


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("averag", ["unknown method 'averag'", "did you mean 'average'"]),
        ("trim(densit=0.2) >> average", ["trim", "no parameter 'densit'", "'density'"]),
        ("times >> average", ["'times' needs a value for 'factor'", "the number"]),
        ("times(1, 2) >> average", ["times has 1 parameters, found 2"]),
        ("task_arithmetic(scale='big')", ["'scale'", "expected a number", "'big'"]),
        ("task_arithmetic(scale=True)", ["'scale'", "expected a number", "True"]),
        ("task_arithmetic(normalise='maybe')", ["'normalise'", "bool", "'maybe'"]),
        ("by_chance(scope='all') >> average", ["'scope'", "'all'"]),
        ("trim(density=1.5) >> average", ["trim: density", "[0, 1]", "1.5"]),
        ("trim(density=0.2", ["cannot be read"]),
        ("", ["cannot be read"]),
        ("trim + average", ["cannot be read", "trim + average"]),
        ("trim(density=0.2)", ["is a transform", ">> average"]),
        ("times(factor=[]) >> average", ["'factor'", "[]"]),
        ("task_arithmetic(scale=[0.1, 0.2])", ["'scale'", "cannot differ from expert to expert"]),
        ("task_arithmetic(scale={'experts': {'a': 1}})", ["'scale'", "cannot differ from expert to expert"]),
        ("task_arithmetic(scale={'gradient': 3})", ["'scale'", "gradient"]),
        ("task_arithmetic(scale={'gradient': []})", ["'scale'", "gradient"]),
        ("times(factor={'experts': [1, 2]}) >> average", ["'factor'", "experts"]),
        ("task_arithmetic(scale=[{'match': '*'}])", ["'scale'", "values by name"]),
        ("task_arithmetic(scale={'gradient': [0, 'x']})", ["'scale'", "expected a number"]),
    ],
)
def test_text_that_is_wrong(own, text, words):
    fails(words, make, text)


def test_values_that_are_wrong_from_python(own):
    fails(["'scale'", "gradient"], methods.task_arithmetic, {"gradient": [0.1, "x"]})
    fails(["'factor'"], own.times, {"experts": {"a": 1.0, "b": "x"}})
    fails(["'factor'"], own.times, [0.1, [0.2]])
    fails(["'scale'"], methods.task_arithmetic, jnp.ones(3))
    fails(["times"], own.times)
    fails(["times"], own.times, 1.0, wrong=2)
    fails(["write the parameters into the expression"], make, "times(1.0) >> average", {"factor": 2})


def test_arrays_that_print_alike_are_different_numbers():
    """`make` keeps what it made, but neither traced values nor one number for another."""
    near = np.float32(0.1), np.nextafter(np.float32(0.1), np.float32(1))
    made = [make("task_arithmetic", {"scale": jnp.asarray(value)}) for value in near]
    assert [float(method.parameters["scale"]) for method in made] == [float(value) for value in near]

    for shift in (1.0, 2.0):  # the second trace must not find the first one's value
        merge = jax.jit(lambda s, shift=shift: shift * merged_sum(make("task_arithmetic", {"scale": s})))
        assert merge(0.5) == shift * 6
    chained = jax.jit(lambda s: merged_sum(methods.scale(s) >> methods.average()))
    assert chained(0.5) == 6


def merged_sum(method):
    return jnp.sum(cfmerge.merge_tensor(BASE, [jnp.ones((4, 3))], method))


# --- numbers and structure ----------------------------------------------------------------------------------------


def test_numbers_apart_from_structure(own):
    method = own.times([0.1, 0.2]) >> methods.ace(eps_rel=0.5) >> methods.scale(3.0)
    values = parts.numbers(method)
    assert values[0] == [0.1, 0.2]
    assert {0.5, 3.0} <= {value for value in values[1:] if value is not None}
    other = parts.with_numbers(method, [2.0, *values[1:]])
    assert parts.numbers(other) == [2.0, *values[1:]]
    assert parts.structure(other) == parts.structure(method)
    assert parts.structure(method) != parts.structure(methods.ace() >> methods.scale(3.0))
    assert parts.structure(own.by_chance()) != parts.structure(own.by_chance(scope="tensor"))
    assert parts.structure(methods.ace()) != parts.structure(methods.ace(eps=0.1))  # given or not: another branch


def test_parts_without_an_origin_are_their_own_structure():
    plain = Transform("plain", lambda delta: delta)
    assert parts.structure(plain) is plain
    assert parts.numbers(plain >> methods.scale(2.0)) == [2.0]
    assert parts.with_numbers(plain >> methods.scale(2.0), [3.0]).parameters["parts"][0] is plain


@pytest.mark.parametrize(
    "text",
    ["task_arithmetic(scale=0.7)", "times(factor=0.7) >> average", "average >> scale(factor=0.7)",
     "squares(ridge=0.7) >> scale(0.5)", "times(0.7) >> middle >> toward"],
)  # fmt: skip
def test_traced_numbers_give_the_same(own, deltas, text):
    """Under jit, vmap and grad; the derivative is that of finite differences."""
    method = make(text)
    values = parts.numbers(method)
    at = values.index(0.7)

    def result(number):
        traced = parts.with_numbers(method, [number if k == at else value for k, value in enumerate(values)])
        return cfmerge.merge_tensor(BASE, deltas, traced)

    expected = merged(method, deltas)
    close(jax.jit(result)(0.7), expected, 2e-6)
    close(jax.vmap(result)(jnp.asarray([0.2, 0.7]))[1], expected, 2e-6)

    def size(number):
        return jnp.sum(result(number) ** 2)

    step = 2e-3
    slope = (size(0.7 + step) - size(0.7 - step)) / (2 * step)
    np.testing.assert_allclose(jax.grad(size)(0.7), slope, rtol=2e-2, atol=2e-3)


# --- forms of a value ---------------------------------------------------------------------------------------------


def settled(part, name="model.layers.1.mlp.w", depth=None, experts=("a", "b", "c")):
    from cfmerge.engine.resolve import place

    return parts.numbers(parts.resolve(part, place(name, depth, experts)))


def test_values_are_settled_for_a_tensor(own):
    scale = methods.task_arithmetic
    assert settled(scale(0.25)) == [0.25]
    assert settled(scale({"gradient": [1.0, 3.0]}), depth=0.25) == [1.5]
    assert settled(scale({"gradient": [1.0, 3.0, 9.0]}), depth=0.75) == [6.0]
    assert settled(scale({"gradient": [1.0, 3.0]}), depth=None) == [1.0]
    assert settled(scale({"gradient": [4.0]}), depth=0.7) == [4.0]
    by_name = scale([{"match": "*mlp*", "value": {"gradient": [0.0, 1.0]}}, {"value": 7.0}])
    assert settled(by_name, depth=0.5) == [0.5]
    assert settled(by_name, "head") == [7.0]
    assert settled(own.times([1, 2, 3])) == [(1, 2, 3)]
    assert settled(own.times({"experts": {"c": 3, "a": 1, "b": 2}})) == [(1, 2, 3)]
    mixed = own.times([{"match": "*mlp*", "value": [1, {"gradient": [0.0, 4.0]}, 3]}, {"value": 5}])
    assert settled(mixed, depth=0.5) == [(1, 2.0, 3)]
    assert settled(mixed, "head") == [5]


def test_values_that_do_not_fit_the_merge(own):
    fails(["times: parameter 'factor'", "2 values for 3 experts"], settled, own.times([1, 2]))
    fails(["no expert 'd'", "a, b, c"], settled, own.times({"experts": {"a": 1, "b": 2, "c": 3, "d": 4}}))
    fails(["expert 'c' has no value"], settled, own.times({"experts": {"a": 1, "b": 2}}))
    only = methods.task_arithmetic([{"match": "*attn*", "value": 1.0}])
    fails(["'scale'", "'model.layers.1.mlp.w'", "no pattern"], settled, only)


def test_per_expert_values_in_a_merge(own, deltas):
    for factor in ([1.0, 2.0, 4.0], {"experts": {"x": 1.0, "z": 4.0, "y": 2.0}}):
        method = own.times(factor) >> methods.average()
        expected = (deltas[0] + 2 * deltas[1] + 4 * deltas[2]) / 3
        close(merged(method, deltas, names=["x", "y", "z"]), expected)


# --- registering one's own ----------------------------------------------------------------------------------------


def test_a_users_own_method(deltas):
    """Three functions and a decorator."""
    with toys.registered():

        @register
        def shifted(shift: Number = 1.0, power: int = 2) -> Method:
            """The sum of the deltas, plus a number.

            Args:
                shift: the number,
                    on two lines.
                power: not traced.

            Source: nobody.
            """
            return Method("x", jnp.zeros_like, lambda s, delta, weight: s + weight * delta, lambda s: s + shift,
                          scope="entry")  # fmt: skip

        @register
        def negative(size: PerExpert) -> Transform:
            """The opposite."""
            return Transform("y", lambda delta: -jnp.asarray(size, delta.dtype) * delta)

        entries = methods.registry()
        assert (entries["shifted"].kind, entries["negative"].kind) == ("method", "transform")
        assert entries["shifted"].describe("shift") == "the number, on two lines."
        assert entries["shifted"].source == "nobody."
        assert entries["shifted"].summary == "The sum of the deltas, plus a number."
        method = make("negative(2.0) >> shifted(shift=3)")
        assert method.name == "negative >> shifted"
        assert shifted(power=4).parameters == {"shift": 1.0, "power": 4}
        close(merged(method, deltas), 3 - 2 * np.sum(deltas, axis=0))
        assert parts.structure(shifted(power=3)) != parts.structure(shifted(power=2))
    assert "shifted" not in methods.registry()


def test_a_name_that_is_taken():
    with toys.registered():

        def average() -> Method:
            """Another."""
            return methods.task_arithmetic()

        fails(["there is a method 'average' already"], register, average)


def test_depth_is_filled_in(own, deltas):
    """Whatever its annotation; and it is no parameter of recipes."""
    assert "depth" not in methods.registry()["deeper"].signature
    method = own.deeper(gain=2.0) >> methods.average()
    assert parts.expression(method) == "deeper(gain=2.0) >> average"
    fails(["no parameter 'depth'"], make, "deeper(depth=0.5) >> average")
    base = {f"h.{n}.w": jnp.zeros((4, 3)) for n in range(3)} | {"wte": jnp.zeros((4, 3))}
    found = cfmerge.merge_params(base, [dict.fromkeys(base, delta) for delta in deltas], method)
    for name, factor in {"h.0.w": 1, "h.1.w": 2, "h.2.w": 3, "wte": 1}.items():
        close(found[name], factor * np.mean(deltas, axis=0))
