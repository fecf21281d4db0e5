"""Layers of SMILE for tests: of deltas, of the golden cases, by NumPy, and as a directory on disk."""

import json

import golden_cases
import jax
import jax.numpy as jnp
import numpy as np
from safetensors.numpy import save_file

from cfmerge.compose import smile


def layer_of(deltas, rank, gate, biases=None, routed=None):
    """The layer of a list of deltas."""
    expert = jax.jit(smile.expert, static_argnums=(1, 2))
    routed = routed or [None] * len(deltas)
    made = [expert(jnp.asarray(delta), rank, gate, of) for delta, of in zip(deltas, routed, strict=True)]
    up, down, router = (None if part[0] is None else jnp.stack(part) for part in zip(*made, strict=True))
    return smile.Layer(up, down, router, None if biases is None else jnp.stack([jnp.asarray(b) for b in biases]))


def golden_layer(case, dtype):
    """`(x, W, b or None, Layer)` of a case."""
    arrays = {k: v.astype(dtype) for k, v in golden_cases.load(case).items() if not k.startswith("expected")}
    params, experts = case["params"], range(case["num_experts"])
    weights = [arrays[f"expert_{t}.weight"] for t in experts]
    base, bias = arrays["base.weight"], arrays.get("base.bias")
    routed = None if params["routing_use_diff"] else [jnp.asarray(weight) for weight in weights]
    biases = None if bias is None else [arrays[f"expert_{t}.bias"] - bias for t in experts]
    deltas = [weight - base for weight in weights]
    return jnp.asarray(arrays["x"]), base, bias, layer_of(deltas, params["k"], params["gate_k"], biases, routed)


def numpy_added(x, deltas, rank, gate, top_k, biases=None):
    """The paper's equations for one token after the other, by NumPy."""
    u, s, vt = zip(*(np.linalg.svd(delta, full_matrices=False) for delta in deltas), strict=True)
    x, out = np.asarray(x), []
    for token in x.reshape(-1, x.shape[-1]):
        r = np.array([np.linalg.norm(v[:gate] @ token) for v in vt])
        p = np.exp(r) / np.exp(r).sum()
        top = np.argsort(-p, kind="stable")[:top_k]
        experts = [u[i][:, :rank] @ (s[i][:rank] * (vt[i][:rank] @ token)) for i in top]
        if biases is not None:
            experts = [expert + biases[i] for i, expert in zip(top, experts, strict=True)]
        out.append(sum(p[i] / p[top].sum() * expert for i, expert in zip(top, experts, strict=True)))
    return np.stack(out).reshape(*x.shape[:-1], -1)


def write(directory, layers, top_k=1, layouts=None, tasks=("a", "b", "c"), shards=1):
    """A composition on disk, of `{name of a weight: Layer}`; layouts: of weights that lie as `io`."""
    arrays, tensors = {}, {}
    for name, layer in layers.items():
        layout = (layouts or {}).get(name, "oi")
        shape = [layer.up.shape[1], layer.router.shape[2]]
        last = name.rpartition(".")[2]
        bias = name.removesuffix(last) + {"weight": "bias", "kernel": "bias"}[last]
        for part, array in layer._asdict().items():
            if array is None:
                continue
            owner = bias if part == "bias" else name
            arrays[f"{part}/{owner}"] = np.asarray(array)
            entry = (
                {"shape": shape[:1], "layout": ""}
                if owner == bias
                else {"shape": shape[:: {"io": -1}.get(layout, 1)], "layout": layout}
            )
            entry = tensors.setdefault(owner, {**entry, "dtype": "F32", "parts": {}})
            entry["parts"][part] = {"shape": list(array.shape), "dtype": "F32"}
    told = {"format": "cfmerge-composition", "version": 1, "system": "smile", "tasks": list(tasks),
            "parameters": {"top_k": top_k}, "tensors": tensors}  # fmt: skip
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "composition.json").write_text(json.dumps(told))
    if shards == 1:
        save_file(arrays, directory / "model.safetensors")
        return directory
    files = {name: f"model-{i % shards + 1:05}-of-{shards:05}.safetensors" for i, name in enumerate(arrays)}
    for file in set(files.values()):
        save_file({name: arrays[name] for name in arrays if files[name] == file}, directory / file)
    (directory / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": files}))
    return directory
