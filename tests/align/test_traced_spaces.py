"""Spaces that a trace of a function finds: as many as there are, and no permutation of theirs changes an output."""

import functools
import random

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cfmerge.align import check_spaces, trace_spaces, why_fixed

KEY = jax.random.key(0)
IDS = jnp.array([1, 4, 2, 9, 0])


def weights(**shapes):
    generator = np.random.default_rng(0)
    return {name: (generator.normal(size=shape) / shape[0] ** 0.5).astype(np.float32) for name, shape in shapes.items()}


def tried(f, params, *inputs):
    """The table of a function's spaces; they were tried."""
    spaces = trace_spaces(f, params, *inputs)
    check_spaces(spaces, f, params, *inputs)
    return spaces.table()


def rotated(x):
    """Rotary embedding `(t, heads, d)`, of halves."""
    angles = jnp.arange(x.shape[0])[:, None, None] / 10.0 ** jnp.arange(x.shape[-1] // 2)
    one, other = jnp.split(x, 2, axis=-1)
    cos, sin = jnp.cos(angles), jnp.sin(angles)
    return jnp.concatenate([one * cos - other * sin, other * cos + one * sin], axis=-1)


def rms(x, scale):
    return x * jax.lax.rsqrt((x * x).mean(-1, keepdims=True) + 1e-6) * scale


def llama(p, ids):
    """A block with two key-value heads, each of three queries' heads of four, and a gated MLP."""
    x = p["embed"][ids]
    y = rms(x, p["norm"])
    q, k, v = (y @ p[name] for name in "qkv")
    q, k = rotated(q.reshape(-1, 6, 4)), rotated(k.reshape(-1, 2, 4))
    k, v = (jnp.repeat(array, 3, axis=1) for array in (k, v.reshape(-1, 2, 4)))
    scores = jnp.where(jnp.tri(len(ids))[None] > 0, jnp.einsum("thd,shd->hts", q, k), -jnp.inf)
    x = x + jnp.einsum("hts,shd->thd", jax.nn.softmax(scores), v).reshape(-1, 24) @ p["o"]
    y = rms(x, p["norm2"])
    return rms(x + (jax.nn.silu(y @ p["gate"]) * (y @ p["up"])) @ p["down"], p["norm3"]) @ p["embed"].T


LLAMA = weights(
    embed=(11, 12), norm=(12,), q=(12, 24), k=(12, 8), v=(12, 8), o=(24, 12),
    norm2=(12,), gate=(12, 10), up=(12, 10), down=(10, 12), norm3=(12,),
)  # fmt: skip


def test_query_heads_permute_within_their_group_and_rotary_keys_keep_their_order():
    assert tried(llama, LLAMA, IDS) == {
        "embed": "-, embed",
        "norm": "embed",
        "q": "in embed, k k.q 4",
        "k": "in embed, k 4",
        "v": "in embed, k k.v",
        "o": "in k k.q k.v, embed",
        "norm2": "embed",
        "gate": "in embed, gate",
        "up": "in embed, gate",
        "down": "in gate, embed",
        "norm3": "embed",
    }


def test_what_lies_between_queries_and_keys_permutes_within_heads_unless_it_is_rotated():
    def attention(p, x):
        q, k, v = ((x @ p[name]).reshape(-1, 3, 4) for name in "qkv")
        return jnp.einsum("hts,shd->thd", jnp.einsum("thd,shd->hts", q, k), v).reshape(-1, 12) @ p["o"]

    table = tried(attention, weights(q=(5, 12), k=(5, 12), v=(5, 12), o=(12, 2)), jax.random.normal(KEY, (4, 5)))
    assert table == {"q": "in 5, k k.k", "k": "in 5, k k.k", "v": "in 5, k k.v", "o": "in k k.v, -"}


ACROSS_HEADS = {
    "product": lambda h: jnp.einsum("thv,tgv->thg", h, h).sum(-1)[..., None] * h,
    "pairs": lambda h: (h[:, :, None] * jnp.sin(h[:, None])).sum(2),
}


@pytest.mark.parametrize("use", ACROSS_HEADS.values(), ids=ACROSS_HEADS)
def test_numbers_of_several_heads_that_meet_have_one_order_in_all_heads(use):
    def model(p, x):
        return use((x @ p["a"] + p["bias"]).reshape(-1, 3, 4)).reshape(-1, 12) @ p["b"]

    table = tried(model, weights(a=(5, 12), bias=(12,), b=(12, 2)), jax.random.normal(KEY, (4, 5)))
    assert table == {"a": "in 5, a a_2", "bias": "a a_2", "b": "in a a_2, -"}


@pytest.mark.parametrize("fused", [
    lambda x: [part.reshape(-1, 3, 4) for part in jnp.split(x, 3, -1)],
    lambda x: [part.reshape(-1, 3, 4) for part in (x[:, :12], x[:, 12:24], x[:, 24:])],
    lambda x: list(jnp.moveaxis(x.reshape(-1, 3, 3, 4), 1, 0)),
], ids=["split", "slices", "reshaped"])  # fmt: skip
def test_a_fused_projection_of_queries_keys_and_values_has_heads_in_each_part(fused):
    def attention(p, x):
        q, k, v = fused(x @ p["qkv"] + p["bias"])
        weights = jax.nn.softmax(jnp.einsum("thd,shd->hts", rotated(q), rotated(k)))
        return jnp.einsum("hts,shd->thd", weights, v).reshape(-1, 12) @ p["out"]

    table = tried(attention, weights(qkv=(5, 36), bias=(36,), out=(12, 2)), jax.random.normal(KEY, (4, 5)))
    assert table["out"].startswith("in qkv ")
    assert table["qkv"] in ("in 5, qkv 4 + qkv 4 + qkv qkv.qkv", "in 5, 3 qkv 4")


def test_two_children_of_one_layer_have_two_names():
    def attention(p, x):
        q, k, v = (part.reshape(-1, 3, 4) for part in jnp.split(x @ p["to_qkv"] + p["bias"], 3, axis=-1))
        weights = jax.nn.softmax(jnp.einsum("thd,shd->hts", q, k))
        return jnp.einsum("hts,shd->thd", weights, v).reshape(-1, 12) @ p["out"]

    params = weights(to_qkv=(5, 36), bias=(36,), out=(12, 2))
    table = tried(attention, params, jax.random.normal(KEY, (4, 5)))
    heads, queries, values = "to_qkv", "to_qkv.to_qkv", "to_qkv.to_qkv_2"
    assert table["bias"] == f"{heads} {queries} + {heads} {queries} + {heads} {values}"


def test_a_fused_projection_of_gates_and_values_has_the_hidden_units_twice():
    def gated(p, x):
        gate, value = jnp.split(x @ p["up"], 2, axis=-1)
        return (jax.nn.silu(gate) * value) @ p["down"]

    table = tried(gated, weights(up=(5, 16), down=(8, 2)), jax.random.normal(KEY, (4, 5)))
    assert table == {"up": "in 5, up + up", "down": "in up, -"}


def test_features_that_are_joined_end_to_end_permute_each_by_themselves():
    def skipped(p, x):
        y = jnp.tanh(x @ p["a"])
        return jnp.concatenate([y, jnp.sin(y @ p["b"]), x], -1) @ p["c"]

    table = tried(skipped, weights(a=(5, 6), b=(6, 7), c=(18, 2)), jax.random.normal(KEY, (4, 5)))
    assert table == {"a": "in 5, a", "b": "in a, b", "c": "in a + b + 5, -"}


def test_a_scan_over_layers_keeps_their_order_and_its_carry_is_one_space():
    def stacked(p, x):
        def layer(h, own):
            up, down = own
            return h + jax.nn.relu(h @ up) @ down, h.mean()

        return jax.lax.scan(jax.checkpoint(layer), x @ p["in"], (p["up"], p["down"]))[0] @ p["out"]

    params = {
        **weights(**{"in": (5, 6), "out": (6, 2)}),
        "up": jax.random.normal(KEY, (3, 6, 8)),
        "down": jax.random.normal(KEY, (3, 8, 6)),
    }
    assert tried(stacked, params, jax.random.normal(KEY, (4, 5))) == {
        "in": "in 5, down",
        "out": "in down, -",
        "up": "-, in down, up",
        "down": "-, in up, down",
    }


def test_loops_and_branches_are_followed():
    def looped(p, x):
        h = jax.lax.fori_loop(0, 3, lambda _, h: jnp.tanh(h @ p["w"]), jnp.zeros((4, 6)) + x @ p["in"])
        h = jax.lax.cond(x[0, 0] > 0, lambda h: h @ p["a"], lambda h: h @ p["b"] + p["c"], h)
        return jax.lax.while_loop(lambda h: h.sum() > 9, lambda h: h / 2, h) @ p["out"]

    params = weights(**{"in": (5, 6), "w": (6, 6), "a": (6, 7), "b": (6, 7), "c": (7,), "out": (7, 2)})
    assert tried(looped, params, jax.random.normal(KEY, (4, 5))) == {
        "in": "in 5, in_",  # `in` is a word of the table
        "w": "in in_, in_",
        "a": "in in_, a",
        "b": "in in_, a",
        "c": "a",
        "out": "in a, -",
    }


IN_ORDER = {
    "fft": (lambda h: jnp.fft.rfft(h).real, "`fft` is not followed"),
    "sort": (lambda h: jnp.sort(h, axis=-1), "`sort` along it"),
    "rev": (lambda h: h[:, ::-1], "`rev` along it"),
    "cumsum": (lambda h: jnp.cumsum(h, axis=-1), "`cumsum` along it"),
    "argmax": (lambda h: jax.nn.one_hot(h.argmax(-1), 8), "`argmax` over it"),
    "iota": (lambda h: h * jnp.arange(8.0), "positions"),
    "constant": (lambda h: h * np.arange(8.0), "a constant of the model"),
    "stride": (lambda h: h[:, ::2], "every other element of it is taken"),
    "pad": (lambda h: jnp.pad(h, ((0, 0), (1, 0))), "`pad` along it"),
    "gather": (lambda h: h @ h.T @ h[:, [3, 1, 2]], "an index into it"),
    "roll": (lambda h: jnp.roll(h, 1, axis=-1) + h, "a single element"),
}


@pytest.mark.parametrize(("use", "reason"), IN_ORDER.values(), ids=IN_ORDER)
def test_an_axis_whose_order_counts_is_fixed_and_the_reason_is_told(use, reason):
    x = jax.random.normal(KEY, (4, 5))
    width = jax.eval_shape(use, jnp.ones((4, 8))).shape[1]
    params = weights(w=(5, 8), v=(width, 6), u=(6, 2))

    def model(p, x):
        return jnp.tanh(use(x @ p["w"]) @ p["v"]) @ p["u"]

    table = tried(model, params, x)
    assert table == {"w": "in 5, -", "v": f"in {width}, v", "u": "in v, -"}
    assert reason in why_fixed(model, params, x)["w"][1]
    assert list(why_fixed(model, params, x)["v"]) == [0]


ALONG_ANOTHER = {
    "stack": lambda h: jnp.stack([h, jnp.sin(h)], 1).max(1),
    "unstack": lambda h: sum(jnp.unstack(jnp.stack([h, jnp.sin(h)]))),
    "tile": lambda h: jnp.tile(h[:, :], (2, 1))[:4],
    "set": lambda h: h.at[2].set(jnp.ones(8)),
    "add": lambda h: h.at[jnp.array([0, 2])].add(h[:2]),
    "update": lambda h: jax.lax.dynamic_update_slice(h, h[:1] ** 2, (2, 0)),
    "slice": lambda h: jax.lax.dynamic_slice_in_dim(h, 1, 2) + h[0],
    "top_k": lambda h: jax.lax.top_k(h.T, 2)[0].T,
    "take": lambda h: jnp.take_along_axis(h, jnp.argsort(h.sum(-1))[:, None], axis=0),
    "pool": lambda h: jax.lax.reduce_window(h, -jnp.inf, jax.lax.max, (2, 1), (1, 1), "SAME"),
    "join": lambda h: jnp.concatenate([h, jnp.zeros((1, 8))]),
    "norm": lambda h: jnp.linalg.norm(h, axis=0, keepdims=True) * jax.nn.standardize(h) + jnp.where(h > 0, h.mean(), 0),
    "mask": lambda h: h * np.arange(4.0)[:, None] + np.outer(np.arange(4.0), np.ones(8)),
    "vmap": jax.vmap(lambda row: jax.lax.optimization_barrier(jnp.where(row > 0, row, -row))),
}


@pytest.mark.parametrize("use", ALONG_ANOTHER.values(), ids=ALONG_ANOTHER)
def test_an_axis_is_followed_through_what_is_done_along_another(use):
    params = weights(w=(5, 8), v=(8, 2))
    table = tried(lambda p, x: use(jnp.tanh(x @ p["w"])) @ p["v"], params, jax.random.normal(KEY, (4, 5)))
    assert table == {"w": "in 5, w", "v": "in w, -"}


def test_an_axis_with_one_element_taken_out_permutes_among_the_others():
    def first(p, x):
        h = jnp.tanh(x @ p["w"])
        return h[:, :1] + h @ p["v"]

    table = tried(first, weights(w=(5, 8), v=(8, 2)), jax.random.normal(KEY, (4, 5)))
    assert table == {"w": "in 5, 1 + w", "v": "in 1 + w, -"}


def test_tensors_that_are_products_of_others_are_read_where_they_are_contracted():
    def adapted(p, x):
        return jnp.tanh(x @ (p["w"] + p["a"] @ p["b"])) @ p["v"].astype(jnp.float32).T

    table = tried(adapted, weights(w=(5, 8), a=(5, 3), b=(3, 8), v=(2, 8)), jax.random.normal(KEY, (4, 5)))
    assert table == {"w": "in 5, b", "a": "in 5, a", "b": "in a, b", "v": "-, in b"}


def heads(x, par, r):
    """Two projections of two inputs into heads, which are multiplied."""
    w = r.choice([4, 6, 8])
    parts = [(x @ par(x.shape[-1], w)).reshape(*x.shape[:-1], 2, w // 2) for _ in range(2)]
    return (parts[0] * jax.nn.softmax(parts[1])).reshape(*x.shape[:-1], w)


STEPS = (
    heads,
    lambda x, par, r: jnp.tanh(x @ par(x.shape[-1], r.choice([4, 6, 8, 12]))),
    lambda x, par, r: x * par(x.shape[-1]) + par(x.shape[-1]),
    lambda x, par, r: x.reshape(*x.shape[:-1], 2, -1) if x.ndim < 4 and x.shape[-1] % 2 == 0 else x,
    lambda x, par, r: x.reshape(len(x), -1) if x.size < 400 else x,
    lambda x, par, r: jnp.swapaxes(x, -1, -2) if x.ndim > 2 else x,
    lambda x, par, r: jnp.concatenate([x, jnp.sin(x @ par(x.shape[-1], 4))], -1),
    lambda x, par, r: jnp.split(x, 2, -1)[r.randint(0, 1)] if x.shape[-1] % 2 == 0 else x,
    lambda x, par, r: x @ jnp.swapaxes(x, -1, -2) / 9,
    lambda x, par, r: jax.nn.softmax(x) + x.mean(-1, keepdims=True),
    lambda x, par, r: jnp.repeat(x, 2, axis=-1) if x.size < 400 else x,
    lambda x, par, r: jnp.einsum("...hv,hvo->...o", x, par(*x.shape[-2:], 6)) if x.ndim > 2 else x,
    lambda x, par, r: jnp.einsum("...hv,hvo->...ho", x, par(*x.shape[-2:], 4)) if x.ndim > 2 else x,
)


def test_no_permutation_that_is_found_changes_what_a_random_function_computes():
    found = []
    for seed in range(8):
        params = {}

        def model(p, x, seed=seed, params=params):
            r, own = random.Random(seed), iter(range(99))

            def par(*shape):
                name = f"p{next(own)}"
                if p is None:
                    params.update({name: np.random.default_rng(len(params)).normal(size=shape) / shape[0] ** 0.5})
                return jnp.asarray(params[name] if p is None else p[name], jnp.float32)

            for _ in range(r.randint(6, 14)):
                x = r.choice(STEPS)(x, par, r)
            return jnp.tanh(x @ par(x.shape[-1], 3)).sum(0)

        x = jax.random.normal(KEY, (2, 6))
        jax.eval_shape(functools.partial(model, None), x)  # makes the tensors
        spaces = trace_spaces(model, params, x)
        check_spaces(spaces, model, params, x, tolerance=1e-3)
        found += spaces.sizes
    assert len(found) > 12
    assert any("." in name for name in found)
