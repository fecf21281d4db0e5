"""What accelerator.py times: functions of matrices, the operations that they need at least, and the bytes they move.

A matrix is `m x n`, as a weight of `m` outputs and `n` inputs. Operations are counted for the mathematics: one triangle
of a Gram, the shorter way of a cross term, a Cholesky factorisation and two triangular solves. So a rate says how fast
the result was there, and a function that does needless work has a lower one.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

import cfmerge
from cfmerge import linalg, methods

Arrays = Sequence[Any]
EXPERTS = 4  # of ACE and of the entrywise methods
VARIANTS = (("bfloat16", "default"), ("float32", "default"), ("float32", "highest"), ("float64", "highest"))
OURS = (("float32", "highest"), ("float64", "highest"))  # what cfmerge computes in
FILES = (("bfloat16", "highest"),)  # what comes from files, and goes there; the arithmetic is float32


class Operation(NamedTuple):
    """Attributes:
    function: of the arrays, and of the precision of its products where it is not cfmerge's own.
    inputs: `(m, n, random numbers)` to the arrays.
    flops: the least number of operations; none: not counted.
    numbers: how many numbers go in and out, each once.
    variants: dtypes and precisions.
    widest: the widest matrix that is timed on a processor.
    """

    name: str
    function: Callable[..., Any]
    inputs: Callable[[int, int, np.random.Generator], Arrays]
    flops: Callable[[int, int], float] | None
    numbers: Callable[[int, int], float]
    variants: Sequence[tuple[str, str]] = OURS
    widest: int = 4096


def product(x: jax.Array, y: jax.Array, precision: str) -> jax.Array:
    """`x @ y`, added up in float32 at least."""
    wide = jnp.promote_types(x.dtype, jnp.float32)
    return jnp.matmul(x, y, precision=precision, preferred_element_type=wide)


def ace(*deltas: jax.Array) -> jax.Array:
    """ACE of the deltas by its sums: a Gram and a cross term for each, one solve."""
    method = methods.ace(form="full")
    statistic = method.init(jnp.zeros_like(deltas[0]))
    for delta in deltas:
        statistic = method.update(statistic, delta, 1.0)
    return method.solve(statistic)[0]


def merged(method: str) -> Callable[..., jax.Array]:
    return lambda base, *experts: cfmerge.merge_tensor(base, list(experts), method)


# --- the counts ---------------------------------------------------------------------------------------------------


def gram_flops(m: int, n: int) -> float:
    """Of one triangle."""
    return float(m) * n * (n + 1)


def cross_flops(m: int, n: int) -> float:
    """`D (D^T D)`, through the Gram or through `D D^T`."""
    return 2.0 * m * n * min(n, 2 * m)


def solve_flops(m: int, n: int) -> float:
    return n**3 / 3 + 2.0 * m * n**2


def ace_flops(m: int, n: int, experts: int = EXPERTS) -> float:
    return experts * (gram_flops(m, n) + cross_flops(m, n)) + solve_flops(m, n)


# --- the inputs ---------------------------------------------------------------------------------------------------


def deltas(m: int, n: int, rng: np.random.Generator, count: int = EXPERTS) -> list[np.ndarray]:
    """Directions of a falling spectrum over noise, as make_llama.py has them."""
    found = []
    for _ in range(count):
        left = rng.standard_normal((m, 32), np.float32) / np.arange(1, 33, dtype=np.float32)
        found.append(left @ rng.standard_normal((32, n), np.float32) + 0.5 * rng.standard_normal((m, n), np.float32))
    return found


def system(m: int, n: int, rng: np.random.Generator) -> list[np.ndarray]:
    """Right-hand sides, and a Gram of 512 rows with ACE's ridge."""
    (delta,) = deltas(512, n, rng, 1)
    gram = delta.T @ delta
    return [deltas(m, n, rng, 1)[0], gram + 0.07 * np.trace(gram) / n * np.eye(n, dtype=np.float32)]


def models(m: int, n: int, rng: np.random.Generator) -> list[np.ndarray]:
    base = rng.standard_normal((m, n), np.float32)
    return [base, *(base + np.float32(0.01) * delta for delta in deltas(m, n, rng))]


OPERATIONS = (
    Operation(
        "Gram by one product",
        lambda delta, precision: product(delta.T, delta, precision),
        lambda m, n, rng: deltas(m, n, rng, 1),
        gram_flops,
        lambda m, n: m * n + n * n,
        VARIANTS,
    ),
    Operation("Gram", linalg.gram, lambda m, n, rng: deltas(m, n, rng, 1), gram_flops, lambda m, n: m * n + n * n),
    Operation(
        "solve",
        lambda rhs, matrix: linalg.solve_right(rhs, matrix)[0],
        system,
        solve_flops,
        lambda m, n: 2 * m * n + n * n,
    ),
    Operation(f"ACE of {EXPERTS}", ace, deltas, ace_flops, lambda m, n: (EXPERTS + 1) * m * n),
    Operation(
        "leading vectors",
        lambda delta: linalg.leading(delta, min(delta.shape) // 7)[1],
        lambda m, n, rng: deltas(m, n, rng, 1),
        None,
        lambda m, n: m * n,
        OURS[:1],
        widest=2816,
    ),
    Operation("average", merged("average"), models, None, lambda m, n: (EXPERTS + 2) * m * n, FILES),
    Operation("ties", merged("ties"), models, None, lambda m, n: (EXPERTS + 2) * m * n, FILES),
)
