"""Methods that are one function of all deltas."""

import jax.numpy as jnp
import numpy as np
import pytest
import toys
from core_parts import BASE, close, fails, merged

from cfmerge import methods
from cfmerge.core.call import structure
from cfmerge.core.expressions import expression
from cfmerge.methods import (
    Needs,
    Number,
    from_deltas,
    make,
)


@pytest.fixture(scope="module")
def own():
    """Several methods, each a decorated function."""
    with toys.registered():

        @from_deltas
        def nearest(base, deltas, weights, power: Number = 2.0, largest: bool = False):
            """The deltas, weighted by a power of their weights.

            Args:
                power: of the weights.
                largest: the largest weight alone.

            Source: nobody.
            """
            shares = weights == jnp.max(weights) if largest else weights**power
            return jnp.tensordot(shares.astype(deltas.dtype), deltas, 1), {"weight": jnp.sum(shares)}

        @from_deltas(scope="entry", weights="none", experts=(2, None), notes={"x": (bool, "something")})
        def pulled(base, deltas, weights, share: float = 0.5):
            """The mean of the deltas, some way towards the origin."""
            return jnp.mean(deltas, axis=0) - share * base

        yield {"nearest": nearest, "pulled": pulled}


def test_a_decorated_function_is_a_factory(own, deltas):
    entry = methods.registry()["nearest"]
    assert list(entry.signature) == ["power", "largest"]
    assert (entry.kind, entry.source, entry.describe("power")) == ("method", "nobody.", "of the weights.")
    squares = deltas[0] + 4 * deltas[1] + 9 * deltas[2]
    close(merged(own["nearest"](), deltas, weights=[1, 2, 3]), squares, 1e-5)
    close(merged(make("nearest(largest=True)"), deltas, weights=[1, 2, 3]), deltas[2])
    close(merged(make("scale(2.0) >> nearest(power=1)"), deltas, weights=[1, 2, 3]),
          2 * (deltas[0] + 2 * deltas[1] + 3 * deltas[2]), 1e-5)  # fmt: skip
    assert expression(make("nearest(power=3)")) == "nearest(power=3)"
    assert structure(own["nearest"](1.0)) == structure(own["nearest"](2.0))
    fails(["nearest", "no parameter 'powr'"], make, "nearest(powr=3)")


def test_its_needs_and_its_report(own, deltas):
    method = own["pulled"](share=1.0)
    assert method.needs == Needs("entry", experts=(2, None), weights="none")
    assert not method.additive
    assert "x" in method.notes
    statistic = method.init(BASE + 1.0)
    for delta in deltas:
        statistic = method.see(statistic, delta)
    found, report = method.solve(statistic)
    close(found, np.mean(deltas, axis=0) - 1)
    assert report == {}
    fails(["pulled takes at least 2 experts"], merged, method, deltas[:1])


def test_a_function_of_less_is_refused():
    with toys.registered():

        def odd(deltas):
            return deltas[0]

        fails(["odd", "(base, deltas, weights, ...)"], from_deltas, odd)
