"""One matrix on several devices: its rows are shared out.

XLA shares out products by itself, and adds the devices' parts of a Gram. It does not see into LAPACK's calls: a solve
would be done on every device, for all right-hand sides.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec
from jaxtyping import Array

ROWS = "cfmerge rows"  # the axis of a mesh that shares rows out; the mesh is set: `jax.set_mesh`


def by_rows(solve: Callable[..., tuple[Array, Any]], rows: Array, matrix: Array) -> tuple[Array, Any]:
    """`solve(rows, matrix)`, each device for its own rows where a mesh of the axis `ROWS` is set.

    `solve` treats rows apart from each other, and its second result does not depend on them.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if ROWS not in mesh.axis_names:
        return solve(rows, matrix)
    own, same = PartitionSpec(ROWS), PartitionSpec()
    filled = jnp.pad(rows, ((0, -len(rows) % mesh.shape[ROWS]), (0, 0)))
    shared = jax.shard_map(solve, in_specs=(own, same), out_specs=(own, same), check_vma=False)
    solution, told = shared(filled, matrix)
    return solution[: len(rows)], told
