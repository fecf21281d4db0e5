"""SMILE: the base, and for every layer low-rank experts among which each token's own norms choose.

A. Tang et al., SMILE: Zero-Shot Sparse Mixture of Low-Rank Experts Construction From Pre-Trained Foundation Models,
arXiv 2408.10174. A layer `y = W x + b`, `W` of shape (m, n), and N experts `W_i, b_i` of it:

    D_i = W_i - W = U_i diag(s_i) V_i^T                 singular triplets, largest first
    E_i(x) = U_i[:, :k] diag(s_i[:k]) V_i[:, :k]^T x + (b_i - b)         the expert; dense: D_i x + (b_i - b)
    r_i(x) = || V_i[:, :g]^T x ||                       the router: how much of x the delta's leading inputs hold
    p = softmax(r_1 .. r_N)
    y = W x + b + sum_{i in T} p_i / (sum_{j in T} p_j) E_i(x),          T the K largest of p

    k  the rank of the experts ("rank")    g  the dimensions of the router ("gate")    K  "top_k"

`up_i = U_i[:, :k] diag(s_i[:k])`, `down_i = V_i[:, :k]^T` and `router_i = V_i[:, :g]^T` are what a layer keeps. Signs
and rotations of the triplets cancel in `E_i` and in `r_i`, and `k = rank(D_i)` is the dense expert.

A gate as wide as the input is no router: `V_i` is then orthogonal, so that every `r_i = ||x||` and rounding chooses;
`g < n` is required. Directions in which a delta is numerically zero have no vectors of their own: they are zeros here,
in `down` and in `router`. The norms are not relative to anything, so that for K > 1 the weights of the chosen experts
depend on how large the activations are (`blend_warning`); for K = 1 the weight is 1.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from cfmerge import linalg
from cfmerge.compose.slots import resized
from cfmerge.errors import CfmergeError


class Layer(NamedTuple):
    """What N experts add to one layer: a pytree, its arrays stacked over the experts.

    Attributes:
        up: `U_i[:, :k] diag(s_i[:k])`, or the deltas themselves where the experts are dense.
        down: `V_i[:, :k]^T`; None: the experts are dense.
        router: `V_i[:, :g]^T`.
        bias: `b_i - b`; None: the layer has no bias, or no expert changes it.
    """

    up: Float[Array, "N m k"]
    down: Float[Array, "N k n"] | None
    router: Float[Array, "N g n"]
    bias: Float[Array, "N m"] | None = None


# --- building ----------------------------------------------------------------------------------------------------


def sizes(m: int, n: int, rank: int | None, gate: int) -> tuple[int | None, int]:
    """The rank and the gate of a layer of shape `(m, n)`: neither exceeds its sides; the rank is None if dense."""
    return None if is_dense(rank) else min(rank or 0, m, n), min(gate, m, n)


def is_dense(rank: int | None) -> bool:
    """Whether the rank asks for the deltas themselves: None, or negative as in the paper's code."""
    return rank is None or rank < 0


def expert(
    delta: Float[Array, "m n"], rank: int | None, gate: int, routed: Float[Array, "m n"] | None = None
) -> tuple[Float[Array, "m k"], Float[Array, "k n"] | None, Float[Array, "g n"]]:
    """`(up, down, router)` of one expert's delta, of the shapes that `sizes` tells; `down` is None if it is dense.

    Args:
        routed: the matrix whose right singular vectors route; None: the delta. (The fine-tuned weight:
            `routing_use_diff=False` of the paper's code.)
    """
    check_gate(gate, delta.shape[1])
    return leading_parts(delta, rank, gate, routed)


def leading_parts(
    delta: Float[Array, "m n"], rank: int | None, gate: int, routed: Float[Array, "m n"] | None = None
) -> tuple[Float[Array, "m k"], Float[Array, "k n"] | None, Float[Array, "g n"]]:
    """`expert`, of a core in a basis of its inputs too, which may be narrower than the gate."""
    k, g = sizes(delta.shape[0], delta.shape[1], rank, gate)
    shared = g if routed is None else 0
    u, s, vt = _triplets(delta, max(k or 0, shared))
    router = vt[:g] if routed is None else _triplets(routed, g)[2]
    return (delta, None, router) if k is None else (u[:, :k] * s[:k], vt[:k], router)


def expert_of_factors(
    left: Float[Array, "m r"], right: Float[Array, "r n"], rank: int | None, gate: int
) -> tuple[Float[Array, "m k"], Float[Array, "k n"], Float[Array, "g n"]]:
    """`expert(left @ right, rank, gate)`, by the QR of both sides and the SVD of what lies between them.

    The product is never formed while `r` is less than its sides. A rank above `r` is filled with zeros, so that
    adapters of several ranks stack. Where `expert` is dense, this is exact: the rank is `min(m, r, n)`.
    """
    (m, r), n = left.shape, right.shape[1]
    check_gate(gate, n)
    k, g = sizes(m, n, r if is_dense(rank) else rank, gate)
    rows, columns = _basis(left), _basis(right.T)
    core = linalg.matmul(linalg.matmul(rows.T, left), linalg.matmul(right, columns))
    u, s, vt = _triplets(core, min(core.shape))
    up, down = linalg.matmul(rows, u * s), linalg.matmul(vt, columns.T)
    return resized(up, 1, k or 0), resized(down, 0, k or 0), resized(down, 0, g)


def rank_for(values: Float[Array, " r"], energy: float) -> Array:
    """The least `k` whose leading singular values hold that share of the sum of squares: 0 if all are zero.

    Example:
        >>> int(rank_for(jnp.array([3.0, 2.0, 1.0]), 0.9))
        2
    """
    if not 0 < energy <= 1:
        raise CfmergeError(f"smile: energy must be above 0 and at most 1, not {energy}")
    sums = jnp.cumsum((values / jnp.maximum(jnp.max(values), jnp.finfo(values.dtype).tiny)) ** 2)
    return jnp.where(sums[-1] > 0, 1 + jnp.sum(sums < energy * sums[-1]), 0)


def _triplets(matrix: Array, k: int) -> tuple[Array, Array, Array]:
    """The `k` leading singular triplets; those whose singular value is numerically zero are zeros."""
    u, s, vt = linalg.leading(matrix, k)
    kept = linalg.nonzero(s, jnp.max(s, initial=0), linalg.rank_cutoff(matrix.shape, s.dtype))
    return u, s * kept, vt * kept[:, None]


def _basis(columns: Float[Array, "m r"]) -> Array:
    """Orthonormal columns that span the given ones, no more of them than rows."""
    m, r = columns.shape
    return linalg.orthonormal(columns) if r <= m else jnp.eye(m, dtype=columns.dtype)


# --- applying ----------------------------------------------------------------------------------------------------


def routing(x: Float[Array, "... n"], router: Float[Array, "N g n"], top_k: int = 1) -> Float[Array, "... N"]:
    """The experts' weights: the softmax of the norms, kept for the `top_k` largest and renormalised among them.

    The norms choose, before the softmax rounds them; of equal ones the expert of lower number is taken. At least
    float32, whatever the activations are.
    """
    check_top_k(top_k, router.shape[0])
    wide = jnp.promote_types(jnp.promote_types(x.dtype, router.dtype), jnp.float32)
    inside = jnp.einsum("...n,ign->...ig", x.astype(wide), router.astype(wide), precision=linalg.HIGHEST)
    norms = linalg.norm(inside, axis=-1)[..., 0]
    chosen = lax.top_k(lax.stop_gradient(norms), top_k)[1]
    kept = jax.nn.one_hot(chosen, router.shape[0], dtype=jnp.int8).sum(-2) > 0
    return jax.nn.softmax(norms, where=kept, axis=-1)


def added(
    x: Float[Array, "... n"], layer: Layer, top_k: int = 1, precision: Any = linalg.HIGHEST
) -> Float[Array, "... m"]:
    """`sum_i p_i E_i(x)`, which is added to the base layer's output.

    All experts are computed, and those that are not chosen have the weight 0: the shapes do not depend on the data.

    Args:
        precision: the products' in the experts; the router's is always the full one.
    """
    weights = routing(x, layer.router, top_k).astype(x.dtype)
    if layer.down is None:
        inner = x[..., None, :] * weights[..., None]
    else:
        inner = jnp.einsum("...n,ikn->...ik", x, layer.down, precision=precision) * weights[..., None]
    out = jnp.einsum("...ik,imk->...m", inner, layer.up, precision=precision)
    if layer.bias is None:
        return out
    return out + jnp.einsum("...i,im->...m", weights, layer.bias, precision=precision)


# --- what it costs -----------------------------------------------------------------------------------------------


class Cost(NamedTuple):
    """Numbers of one layer, parameters or floating-point operations: of the base, of the experts, of the routers."""

    base: int
    experts: int
    router: int

    @property
    def total(self) -> int:
        return self.base + self.experts + self.router


def parameters(m: int, n: int, experts: int, rank: int | None, gate: int, bias: bool = True) -> Cost:
    """The parameters of one layer: `m n + m`, `N (k (m + n) + m)` and `N g n`; those of a dense expert are `m n + m`.

    Example:
        >>> parameters(768, 768, experts=8, rank=32, gate=16)
        Cost(base=590592, experts=399360, router=98304)
    """
    k, g = sizes(m, n, rank, gate)
    of_expert = m * n if k is None else k * (m + n)
    return Cost(m * n + bias * m, experts * (of_expert + bias * m), experts * g * n)


def flops(
    m: int, n: int, experts: int, rank: int | None, gate: int, bias: bool = True, computed: int | None = None
) -> Cost:
    """The floating-point operations of one layer for one token: two for each parameter that is multiplied.

    Args:
        computed: how many experts are computed; None: all of them, as `added` does. (`top_k`: what a program needs
            that leaves out those which are not chosen.)
    """
    of_layer = parameters(m, n, experts, rank, gate, bias)
    return Cost(2 * of_layer.base, 2 * of_layer.experts // experts * (computed or experts), 2 * of_layer.router)


# --- errors ------------------------------------------------------------------------------------------------------


def check_gate(gate: int, n: int, name: str = "") -> None:
    """Raises an error unless the gate is at least 1 and below the layer's input width `n`."""
    of = f" of {name!r}" if name else ""
    if gate < 1:
        raise CfmergeError(f"smile: gate must be at least 1, not {gate}")
    if gate >= n:
        raise CfmergeError(
            f"smile: gate={gate} is not below the input width {n}{of}: every expert's norm would be that of the "
            f"input, and rounding would choose; take a gate of at most {n - 1} (16 is usual), or leave the layer out"
        )


def check_top_k(top_k: int, experts: int) -> None:
    """Raises an error unless `top_k` is between 1 and the number of experts."""
    if not 1 <= top_k <= experts:
        raise CfmergeError(f"smile: top_k must be from 1 to the number of experts, {experts}, not {top_k}")


def blend_warning(top_k: int) -> str | None:
    """A warning to show where several experts are blended; None for `top_k=1`."""
    if top_k == 1:
        return None
    return (
        f"smile: with top_k={top_k} the experts are blended by a softmax of norms that are not normalised, so the "
        "blend depends on the scale of each layer's activations: large ones choose one expert, small ones average; "
        "the paper's accuracies fall as top_k grows"
    )
