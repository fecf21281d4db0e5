"""What the models in nnx_*.py share: weights by their names, attention, activations.

The attributes of these models are called as the tensors are: `encoder/layer/0/...` is `model.encoder.layer[0]...`. So
loading is one look at the names, and a name too many or too few is an error.
"""

import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import jax
import jax.numpy as jnp
from flax import nnx

import cfmerge

ACTIVATIONS: dict[str, Callable[[jax.Array], jax.Array]] = {
    "gelu": partial(jax.nn.gelu, approximate=False),
    "gelu_new": jax.nn.gelu,
    "quick_gelu": lambda x: x * jax.nn.sigmoid(1.702 * x),
    "relu": jax.nn.relu,
    "silu": jax.nn.silu,
}


class Tree(nnx.Module):
    """Modules by name, where a level of the names has no computation of its own: `Tree(dense=..., LayerNorm=...)`."""

    def __init__(self, **modules: object):
        for name, module in modules.items():
            setattr(self, name, module)


def norm(c: SimpleNamespace, rngs: nnx.Rngs) -> nnx.LayerNorm:
    """The norm of BERT, ViT and CLIP."""
    return nnx.LayerNorm(c.hidden_size, epsilon=c.layer_norm_eps, rngs=rngs)


class RMSNorm(nnx.Module):
    """`x / sqrt(mean(x^2) + eps)`, times a weight that is called `name`."""

    def __init__(self, size: int, eps: float, name: str):
        setattr(self, name, nnx.Param(jnp.ones(size)))
        self.name, self.eps = name, eps

    def __call__(self, x: jax.Array) -> jax.Array:
        scale = jax.lax.rsqrt(jnp.mean(x**2, axis=-1, keepdims=True) + self.eps)
        return x * scale * getattr(self, self.name)[...]


def read_config(directory: str | Path) -> SimpleNamespace:
    """A model's config.json, its keys as attributes."""
    text = (Path(directory) / "config.json").read_text()
    return json.loads(text, object_hook=lambda keys: SimpleNamespace(**keys))


def load(make: Callable[[SimpleNamespace, nnx.Rngs], nnx.Module], directory: str | Path) -> nnx.Module:
    """The model that `make(config, rngs)` describes, with the weights of a directory that `cfmerge convert` wrote."""
    config, source = read_config(directory), cfmerge.open_checkpoint(directory)
    graph, state = nnx.split(nnx.eval_shape(lambda: make(config, nnx.Rngs(0))))
    params = {"/".join(map(str, path)): (path, param) for path, param in nnx.to_flat_state(state)}
    odd = params.keys() ^ source.tensors.keys()
    odd |= {name for name in params.keys() - odd if params[name][1].shape != source.tensors[name].shape}
    if odd:
        raise SystemExit(f"{directory}: not the tensors of {make.__name__}: {', '.join(sorted(odd)[:4])}")
    filled = [(path, param.replace(jnp.asarray(source.read(name)))) for name, (path, param) in params.items()]
    return nnx.merge(graph, nnx.from_flat_state(filled))


def attend(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    heads: int,
    *,
    causal: bool = False,
    bias: jax.Array | None = None,
    scale: float | None = None,
) -> jax.Array:
    """Attention of `(batch, tokens, heads * size)`, in the same shape."""
    split = [x.reshape(*x.shape[:2], heads, -1) for x in (query, key, value)]
    found = jax.nn.dot_product_attention(*split, bias=bias, scale=scale, is_causal=causal)
    return found.reshape(query.shape)
