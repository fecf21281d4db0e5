"""Merges models that lie on many devices, as FSDP and tensor parallelism leave them, without gathering them.

Each leaf of the result lies as the base's leaf does. It runs on the accelerators that there are; on a processor
alone, on eight virtual devices of it.

    python examples/sharded_trees.py
"""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

import cfmerge


class Model(nn.Module):
    @nn.compact
    def __call__(self, x):
        for _ in range(4):
            x = x + nn.Dense(256)(nn.relu(nn.Dense(512)(nn.LayerNorm()(x))))
        return nn.LayerNorm()(x)


def tuned(base, seed):
    """The base with a change of each leaf, in place of fine-tuning."""
    keys = jax.random.split(jax.random.key(seed), len(jax.tree.leaves(base)))
    keys = jax.tree.unflatten(jax.tree.structure(base), list(keys))
    return jax.tree.map(lambda leaf, key: leaf + 0.02 * jax.random.normal(key, leaf.shape), base, keys)


def share(tree, device):
    """The part of a tree's bytes that one device holds."""
    held = [shard.data.nbytes for leaf in jax.tree.leaves(tree) for shard in leaf.addressable_shards
            if shard.device == device]  # fmt: skip
    return sum(held) / sum(leaf.nbytes for leaf in jax.tree.leaves(tree))


def farthest(tree, other):
    """The largest difference of two trees, over the largest entry."""
    pairs = zip(jax.tree.leaves(tree), jax.tree.leaves(other), strict=True)
    gaps = [np.abs(np.asarray(a) - np.asarray(b)).max() / np.abs(b).max() for a, b in pairs]
    return max(gaps)


def main():
    jax.config.update("jax_num_cpu_devices", 8)  # before JAX looks for devices; accelerators are not concerned
    base = Model().init(jax.random.key(0), jnp.ones((1, 256)))
    experts = [tuned(base, seed) for seed in (1, 2)]
    alone = cfmerge.merge_params(base, experts, "ace")  # on one device, to compare

    count = jax.device_count()
    mesh = jax.make_mesh((max(1, count // 2), min(2, count)), ("data", "model"))  # Explicit axes
    specs = {1: P("data"), 2: P("data", "model")}
    trees = [
        jax.tree.map(lambda leaf: jax.device_put(leaf, NamedSharding(mesh, specs[leaf.ndim])), tree)
        for tree in (base, *experts)
    ]
    base, *experts = trees

    with jax.set_mesh(mesh):
        merged = cfmerge.merge_params(base, experts, "ace")  # tensor by tensor
        compiled = jax.jit(lambda base, experts: cfmerge.merge_params(base, experts, "ace"))(base, experts)

    print(f"{count} devices, mesh {dict(mesh.shape)}")
    kernel = merged["params"]["Dense_0"]["kernel"]
    print(f"a kernel of {kernel.shape} lies as {kernel.sharding.spec}")
    print(f"share of a device     {share(merged, jax.devices()[0]):.4f}")
    print(f"eagerly, off by       {farthest(merged, alone):.7f}")
    print(f"under jit, off by     {farthest(compiled, alone):.7f}")
    same = [leaf.sharding == start.sharding for leaf, start in zip(*map(jax.tree.leaves, (merged, base)), strict=True)]
    print(f"leaves that lie as the base's  {sum(same)}  of {len(same)}")


if __name__ == "__main__":
    main()
