"""Registering a method of one's own."""

import jax.numpy as jnp
import numpy as np
import pytest
import toys
from core_parts import close, fails, merged

import cfmerge
from cfmerge import methods
from cfmerge.core.call import structure
from cfmerge.core.expressions import expression
from cfmerge.methods import (
    Method,
    Needs,
    Number,
    PerExpert,
    Transform,
    make,
    register,
)


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
            return Method("x", jnp.zeros_like, lambda s, delta, weight: s + weight * delta, lambda s: (s + shift, {}),
                          needs=Needs("entry"))  # fmt: skip

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
        assert structure(shifted(power=3)) != structure(shifted(power=2))
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
    assert expression(method) == "deeper(gain=2.0) >> average"
    fails(["no parameter 'depth'"], make, "deeper(depth=0.5) >> average")
    base = {f"h.{n}.w": jnp.zeros((4, 3)) for n in range(3)} | {"wte": jnp.zeros((4, 3))}
    found = cfmerge.merge_params(base, [dict.fromkeys(base, delta) for delta in deltas], method)
    for name, factor in {"h.0.w": 1, "h.1.w": 2, "h.2.w": 3, "wte": 1}.items():
        close(found[name], factor * np.mean(deltas, axis=0))


@pytest.mark.parametrize(
    ("name", "end"),
    [("iso_c", "ICML 2025, arXiv 2502.04959."), ("metagpt", "EMNLP 2024, arXiv 2406.11385."),
     ("svc", "ICML 2026, arXiv 2602.05536."), ("average", "ICML 2022, arXiv 2203.05482.")],
)  # fmt: skip
def test_a_source_of_several_lines_is_joined(name, end):
    source = methods.registry()[name].source
    assert source.endswith(end)
    assert "\n" not in source
    assert "  " not in source
