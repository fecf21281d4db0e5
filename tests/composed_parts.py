"""Small models for tests of composed results, and each system's formula in NumPy, for tensors (out, in)."""

import numpy as np

SYSTEMS = ("emr", "tall(threshold=0.5)", "tsv_c", "smile(rank=3, gate=2)")
SHAPES = {
    "model.embed_tokens.weight": (12, 8), "model.layers.0.self_attn.q_proj.weight": (8, 8),
    "model.layers.0.self_attn.q_proj.bias": (8,), "model.layers.0.mlp.up_proj.weight": (16, 8),
    "model.norm.weight": (8,),
}  # fmt: skip


def models(experts=3, dtype=np.float32, seed=0):
    """The tensors of a base and of experts, the base's first."""
    rng = np.random.default_rng(seed)
    base = {name: rng.standard_normal(shape).astype(dtype) for name, shape in SHAPES.items()}
    moved = [
        {name: (base[name] + 0.1 * rng.standard_normal(shape)).astype(dtype) for name, shape in SHAPES.items()}
        for _ in range(experts)
    ]
    return [base, *moved]


def emr(deltas):
    """`(unified, masks, lambda)` of `{name: (T, ...)}`, as the paper has it, in float64."""
    unified, masks = {}, {}
    for name, stack in deltas.items():
        sign = np.sign(stack.sum(0))
        masks[name] = sign * stack > 0
        unified[name] = sign * np.where(masks[name], np.abs(stack), 0).max(0)
    tasks = len(next(iter(deltas.values())))
    own = [sum(np.abs(stack[t]).sum() for stack in deltas.values()) for t in range(tasks)]
    kept = [sum(np.abs(masks[n][t] * unified[n]).sum() for n in deltas) for t in range(tasks)]
    return unified, masks, np.divide(own, kept)


def deltas_of(tensors):
    """`{name: (T, ...)}` in float64, of the tensors that `models` makes."""
    base, *experts = [{n: v.astype(np.float64) for n, v in model.items()} for model in tensors]
    return {name: np.stack([expert[name] - base[name] for expert in experts]) for name in base}


def truncated(delta, k):
    """The delta's `k` leading singular triplets."""
    u, s, vt = np.linalg.svd(delta)
    return (u[:, :k] * s[:k]) @ vt[:k]
