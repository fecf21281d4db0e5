"""What is measured of the experts on training texts: input covariances, Fisher information, RegMean++."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

from cfmerge import activations
from cfmerge_accuracy.fisher import drawn_square
from cfmerge_accuracy.text.bert import Encoder
from cfmerge_accuracy.text.setting import Setting, embedded
from cfmerge_accuracy.zoo import Params

Batches = list[tuple[jax.Array, jax.Array]]


def sample(setting: Setting, task: str, count: int, batch: int) -> Batches:
    """The first training texts, of like length together, all batches of one shape (so that one program serves all)."""
    train = setting.tasks[task].train
    count = min(count, len(train))
    texts = train.rows(slice(0, count - count % batch))
    return [(x, mask) for _, x, mask in embedded(setting.minilm, texts, batch, multiple=train.ids.shape[1])]


def grams(setting: Setting, params: Params, task: str, count: int = 256) -> dict[str, np.ndarray]:
    """Input covariances `(in, in)` of the encoder's kernels on `count` training texts, padding left out.

    The encoder gives its dense layers zeros for padding: these add nothing to `X^T X`, but they are counted.
    """
    batches = sample(setting, task, count, min(count, 64))
    found = activations.collect_linen(setting.minilm.module, {"params": params}, batches)
    share = float(np.mean([np.mean(np.asarray(mask)) for _, mask in batches]))
    return {name: np.asarray(gram) / share for name, gram in found.items()}


def regmean_pp(setting: Setting, experts: Mapping[str, Params], count: int = 128) -> Params:
    """RegMean++ on the first training texts of every task."""
    data = [sample(setting, task, count, min(count, 64)) for task in experts]
    base = setting.minilm
    return activations.regmean_pp(base.module, base.encoder, list(experts.values()), data)


def fisher(setting: Setting, params: Params, task: str, seed: int, count: int = 96) -> Params:
    """Diagonal Fisher information `E[(d log p(y) / d theta)^2]`: on training texts, `y` drawn from the model."""
    texts = sample(setting, task, count, 1)
    keys = jax.random.split(jax.random.key(seed), len(texts))
    x, mask = (jnp.stack(parts) for parts in zip(*texts, strict=True))
    head, bias = padded(setting.heads[task])
    found = _fisher(setting.minilm.module, jax.tree.map(jnp.asarray, params), x, mask, head, bias, keys)
    return jax.tree.map(np.asarray, found)


def padded(head: np.ndarray, rows: int = 32) -> tuple[jax.Array, jax.Array]:
    """A head with rows of zeros below, and what is added to its logits so that these are never drawn."""
    below = max(0, rows - len(head))
    bias = np.concatenate([np.zeros(len(head), np.float32), np.full(below, -1e9, np.float32)])
    return jnp.asarray(np.pad(head, ((0, below), (0, 0)))), jnp.asarray(bias)


@partial(jax.jit, static_argnames="encoder")
def _fisher(
    encoder: Encoder,
    params: Params,
    x: jax.Array,
    mask: jax.Array,
    head: jax.Array,
    bias: jax.Array,
    keys: jax.Array,
) -> Params:
    """Mean over texts `(texts, 1, tokens, width)`, one after the other."""

    def add(total: Params, text: tuple[jax.Array, jax.Array, jax.Array]) -> tuple[Params, None]:
        one, seen, key = text

        def log_likelihoods(params: Params) -> jax.Array:
            logits = jnp.asarray(encoder.apply({"params": params}, one, seen))[0] @ head.T + bias
            return jax.nn.log_softmax(logits)

        return jax.tree.map(jnp.add, total, drawn_square(log_likelihoods, params, key)), None

    total, _ = jax.lax.scan(add, jax.tree.map(jnp.zeros_like, params), (x, mask, keys))
    return jax.tree.map(lambda sum_: sum_ / len(x), total)
