"""One layer by hand: estimate the experts' input covariances, accumulate, solve. And a batch of layers, and a gradient.

    python examples/one_layer.py

Two experts have learnt their tasks on inputs of their own, which lie in different directions. A merge that knows (or
estimates) where each expert's inputs lie keeps what each has learnt there; the average halves both.
"""

import jax
import jax.numpy as jnp
import numpy as np

from cfmerge import covariance, least_squares

OUT, IN, EXPERTS = 24, 32, 2


def layer(seed):
    """`(base, deltas, inputs)` of one layer: each delta is a sum of gradients `e x^T` over the expert's own inputs."""
    rng = np.random.default_rng(seed)
    scales = [np.geomspace(2, 0.2, IN), np.geomspace(0.2, 2, IN)]
    rotation = np.linalg.qr(rng.standard_normal((IN, IN)))[0]
    inputs = np.stack([(rng.standard_normal((400, IN)) * scale) @ rotation for scale in scales]).astype(np.float32)
    errors = rng.standard_normal((EXPERTS, 400, OUT)).astype(np.float32)
    deltas = 1e-3 * np.einsum("tko,tki->toi", errors, inputs)
    return rng.standard_normal((OUT, IN)).astype(np.float32), deltas, inputs


def merged_delta(deltas, covariances, weights=(1.0, 1.0), ridge=0.05):
    """The merged delta of one layer, from deltas `(T, out, in)` and one covariance for each."""
    sums = least_squares.init(deltas[0])
    for delta, sigma, weight in zip(deltas, covariances, weights, strict=True):
        sums = least_squares.add(sums, delta, sigma, weight)
    merged, report = least_squares.solve(sums, ridge, anchor="mean")
    return merged, report


def loss(merged, deltas, inputs):
    """How far the merged layer's outputs are from each expert's on its own inputs, relative to what it has learnt."""
    error = jnp.einsum("toi,tki->tko", merged - deltas, inputs)
    return jnp.mean(jnp.sum(error**2, (1, 2)) / jnp.sum(jnp.einsum("toi,tki->tko", deltas, inputs) ** 2, (1, 2)))


def main():
    _, deltas, inputs = (jnp.asarray(part) for part in layer(0))
    average = jnp.mean(deltas, axis=0)

    # 1. Covariances from the deltas alone, as ACE-Merging ("ACEM") and ACTMat estimate them: no data.
    estimated, report = merged_delta(deltas, [covariance.of_centred(delta) for delta in deltas])

    # 2. Covariances of one's own, here of the inputs that each expert sees (RegMean).
    measured, _ = merged_delta(deltas, [covariance.from_activations(x) for x in inputs])

    print("loss on the experts' own inputs")
    print(f"  average               {loss(average, deltas, inputs):.4f}")
    print(f"  estimated             {loss(estimated, deltas, inputs):.4f}")
    print(f"  measured              {loss(measured, deltas, inputs):.4f}")
    print(f"ridge over the largest eigenvalue: {report['ridge_ratio']:.1e}")

    # 3. A batch of layers under vmap, compiled once.
    stacks = [jnp.asarray(np.stack(part)) for part in zip(*(layer(seed) for seed in range(4)), strict=True)]

    @jax.jit
    @jax.vmap
    def all_layers(deltas):
        return merged_delta(deltas, [covariance.of_centred(delta) for delta in deltas])[0]

    batch = all_layers(stacks[1])
    print("difference of a layer in the batch from the same layer alone")
    print(f"  batch                 {float(jnp.max(jnp.abs(batch[0] - estimated)) / jnp.max(jnp.abs(estimated))):.4f}")

    # 4. The ridge by its gradient, on a few inputs, from one that is too large: the solve is differentiable.
    def ridged(log_ridge):
        return merged_delta(deltas, [covariance.of_centred(delta) for delta in deltas], ridge=jnp.exp(log_ridge))[0]

    step = jax.jit(jax.grad(lambda log_ridge: loss(ridged(log_ridge), deltas, inputs[:, :20])))
    log_ridge = jnp.log(3.0)
    print("loss with a large ridge, and with the one that gradient descent found from there")
    print(f"  large                 {loss(ridged(log_ridge), deltas, inputs):.4f}")
    for _ in range(40):
        log_ridge = log_ridge - 10.0 * step(log_ridge)
    print(f"  tuned                 {loss(ridged(log_ridge), deltas, inputs):.4f}")

    # 5. Experts are forgotten: what remains is the sums of the others.
    sums = least_squares.init(deltas[0])
    parts = [least_squares.add(sums, delta, covariance.of_centred(delta)) for delta in deltas]
    both = least_squares.join(*parts)
    first, _ = least_squares.solve(least_squares.forget(both, parts[1]), 0.05, anchor="mean")
    print("difference of one expert's merge from its delta, after the other was forgotten")
    print(f"  forgotten             {float(jnp.max(jnp.abs(first - deltas[0])) / jnp.max(jnp.abs(deltas[0]))):.4f}")


if __name__ == "__main__":
    main()
