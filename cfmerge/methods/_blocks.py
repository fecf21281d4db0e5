"""For TSV-M, Iso-CTS and DC-Merge: the experts' leading singular vectors, side by side, made orthonormal."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from cfmerge import linalg
from cfmerge.core.part import Report


class Triplets(NamedTuple):
    """`k` singular triplets of each of T matrices, largest first; those that are numerically zero are zeros."""

    u: Float[Array, "T m k"]
    s: Float[Array, "T k"]
    vt: Float[Array, "T k n"]


def scaled(deltas: Float[Array, "T m n"], weights: Float[Array, " T"]) -> Float[Array, "T m n"]:
    """`w_t D_t`."""
    return weights[:, None, None] * deltas


def leading(matrices: Float[Array, "T m n"], k: int, largest: Float[Array, " T"] | None = None) -> Triplets:
    """The leading triplets of each matrix.

    Args:
        largest: the value against which a singular value counts as zero; None: the matrix's own largest.
    """
    cutoff = linalg.rank_cutoff(matrices.shape[1:], matrices.dtype)

    def one(arguments: tuple[Array, Array | None]) -> Triplets:
        matrix, reference = arguments
        u, s, vt = linalg.leading(matrix, k)
        kept = linalg.nonzero(s, jnp.max(s, initial=0) if reference is None else reference, cutoff)
        return Triplets(u * kept, s * kept, vt * kept[:, None])

    return lax.map(one, (matrices, largest))


class Bases(NamedTuple):
    """`polar([U_1 .. U_T])` and `polar([V_1 .. V_T])`, and how many directions linear dependence has cost them."""

    u: Float[Array, "m kT"]
    vt: Float[Array, "kT n"]
    lost: Float[Array, ""]


def orthonormal(
    us: Float[Array, "m q"], vts: Float[Array, "q n"], columns: Float[Array, ""], most: int | None = None
) -> Bases:
    """The polar factors of left and right vectors side by side.

    The vectors of all experts may nearly fill the space, so that the smallest singular values of a side are small and
    still mean something: 2e-4 of the largest at 7 x 109 vectors in 768 dimensions.

    Args:
        columns: how many of the `q` are not zero.
        most: how many can be independent, `min(out, in)` of the dense deltas; none: these are dense.
    """
    left, right = linalg.polar(us), linalg.polar(vts)
    possible = jnp.minimum(columns, min(us.shape[0], vts.shape[1]) if most is None else most)
    return Bases(left.factor, right.factor, possible - jnp.minimum(left.rank, right.rank))


def side_by_side(triplets: Triplets) -> tuple[Float[Array, "m kT"], Float[Array, " kT"], Float[Array, "kT n"]]:
    """`[U_1 .. U_T]`, the values in that order, and `[V_1 .. V_T]^T`."""
    u, s, vt = triplets
    return jnp.moveaxis(u, 0, 1).reshape(u.shape[1], -1), s.ravel(), vt.reshape(-1, vt.shape[2])


def cover(triplets: Triplets, most: int) -> tuple[Bases, Float[Array, " kT"]]:
    """The orthonormal bases of all triplets, and their singular values; for `most` see `orthonormal`."""
    us, s, vts = side_by_side(triplets)
    return orthonormal(us, vts, jnp.sum(s > 0, dtype=s.dtype), most), s


def told(bases: Bases, crowded: bool = False) -> Report:
    """The report on bases; `crowded`: there were more experts than the matrix has directions."""
    return {"dependent": jax.lax.stop_gradient(bases.lost), "crowded": jnp.asarray(crowded)}


NOTES = {
    "dependent": (
        lambda value: value > 0,
        "the experts' singular vectors are linearly dependent ({value:.0f} directions fewer than vectors): their "
        "polar factor spans what there is",
    ),
    "crowded": (
        bool,
        "more experts than min(out, in): one singular triplet of each expert is kept, and they cannot be orthogonal",
    ),
}
