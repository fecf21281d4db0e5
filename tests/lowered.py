"""What functions become under `vmap`."""

import jax


def lapack_calls(function, *arguments):
    """LAPACK's calls in the batched function, and those of them on a whole batch; no other side is as long as it."""
    lowered = jax.jit(jax.vmap(function)).lower(*arguments).as_text()
    calls = [line for line in lowered.splitlines() if "@lapack_" in line]
    size = jax.tree.leaves(arguments)[0].shape[0]
    return calls, [line for line in calls if f"tensor<{size}x" in line]
