"""Inference of composed models for 2 to 20 components: time and memory, as multiples of one forward pass.

    python benchmarks/inference.py -o RESULTS [--components 2 5 10 20] [--rounds 7] [--batch 64] [--dim 128 --depth 4]

Every system answers the same batch with a vision transformer of that size (`cfmerge_accuracy`'s). All systems of one
number of components run in turn in every round, and a ratio is the median over the rounds of two times of one round.
`held` is the memory of what a system keeps ready, `working` what its program needs besides, as XLA tells it.

A system is a line of `systems`: `(base, components) -> (what it holds, its answer to a batch)`.
"""

import argparse
import dataclasses
import functools
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from measuring import figure, machine, table, write_report

from cfmerge import compose
from cfmerge.compose import smile_flax
from cfmerge.compose.smile_layers import layers_of
from cfmerge.compose.tangents import Tangents, linearised
from cfmerge.formats.pytree import flatten
from cfmerge_accuracy.vision.model import Vit, init

Answer = Callable[[Any, jax.Array], Any]  # (what the system holds, a batch) -> outputs


@dataclasses.dataclass(frozen=True)
class Zoo:
    """A network, its base, and full-size deltas over it; the weights are random, which times do not see."""

    model: Vit
    base: Any
    deltas: Sequence[Any]

    @property
    def network(self) -> Callable[[Any, jax.Array], jax.Array]:
        return lambda params, images: self.model.apply({"params": params}, images)


def zoo(model: Vit, count: int) -> Zoo:
    base = jax.tree.map(jnp.asarray, init(model, jax.random.key(0)))
    leaves, treedef = jax.tree.flatten(base)

    def delta(key: jax.Array) -> Any:
        keys = jax.random.split(key, len(leaves))
        made = [1e-2 * jax.random.normal(k, leaf.shape) for k, leaf in zip(keys, leaves, strict=True)]
        return jax.tree.unflatten(treedef, made)

    return Zoo(model, base, [delta(key) for key in jax.random.split(jax.random.key(1), count)])


# --- the systems --------------------------------------------------------------------------------------------------


def one_model(zoo: Zoo) -> tuple[Any, Answer]:
    """One forward pass, and what a merge into one checkpoint costs."""
    return zoo.base, zoo.network


def ensemble(zoo: Zoo) -> tuple[Any, Answer]:
    """As many ordinary models, and the mean of their outputs."""
    models = [jax.tree.map(jnp.add, zoo.base, delta) for delta in zoo.deltas]

    def answer(models: Any, images: jax.Array) -> Any:
        return functools.reduce(jnp.add, [zoo.network(params, images) for params in models]) / len(models)

    return models, answer


def tangents(zoo: Zoo, part: str = "") -> Tangents:
    """The deltas as components: all leaves, or one part of the tree alone."""
    made = Tangents(zoo.base)
    for number, delta in enumerate(zoo.deltas):
        made = made.add(f"t{number}", {part: delta[part]} if part else delta, 1 / len(zoo.deltas))
    return made


def tmc(zoo: Zoo) -> tuple[Any, Answer]:
    """Coefficients that come with the request: components are summed in every answer."""
    return tangents(zoo), lambda held, images: held.apply(zoo.network, images)


def tmc_summed(zoo: Zoo) -> tuple[Any, Answer]:
    """Coefficients that stay: the sum is held, and the components may lie in their files."""
    held = (zoo.base, tangents(zoo).total())
    return held, lambda held, images: linearised(zoo.network, held[0], held[1], images)


def tmc_last(zoo: Zoo) -> tuple[Any, Answer]:
    """Coefficients by request, components of the last block alone."""
    part = f"block_{zoo.model.depth - 1}" if zoo.model.depth else "norm"
    return tangents(zoo, part), lambda held, images: held.apply(zoo.network, images)


def weights(held: Tangents, images: jax.Array) -> jax.Array:
    return jnp.full((len(images), len(held.names)), 1 / len(held.names))


def tmc_each(zoo: Zoo) -> tuple[Any, Answer]:
    """Coefficients of its own for every example: each component's change of the output, weighted."""
    return tangents(zoo), lambda held, x: held.apply_each(zoo.network, x, coefficients=weights(held, x))


def tmc_mapped(zoo: Zoo) -> tuple[Any, Answer]:
    """The same by `vmap`: a sum of the components for every example."""

    def answer(held: Any, images: jax.Array) -> Any:
        own = jax.vmap(lambda image, c: held.apply(zoo.network, image[None], coefficients=c)[0])
        return own(images, weights(held, images))

    return tangents(zoo), answer


def experts(zoo: Zoo) -> dict[str, Any]:
    return {f"t{n}": jax.tree.map(jnp.add, zoo.base, delta) for n, delta in enumerate(zoo.deltas)}


def emr(zoo: Zoo) -> tuple[Any, Answer]:
    """The model of one task, made anew from vector, mask and number in every answer."""
    held = (zoo.base, compose.build(zoo.base, experts(zoo), "emr"))
    return held, lambda held, images: held[1].apply(zoo.network, held[0], "t0", images)


def smile(zoo: Zoo) -> tuple[Any, Answer]:
    """Every token chooses among all experts, of rank 16 by a gate of 16 dimensions."""
    held = (zoo.base, layers_of(compose.build(zoo.base, experts(zoo), "smile(rank=16, gate=16)").parts))

    def answer(held: Any, images: jax.Array) -> Any:
        return smile_flax.apply(zoo.model, {"params": held[0]}, held[1], images)

    return held, answer


def systems() -> dict[str, Callable[[Zoo], tuple[Any, Answer]]]:
    """The systems that are compared, by name; the first is what times are multiples of."""
    return {
        "one model": one_model,
        "ensemble": ensemble,
        "TMC, by request": tmc,
        "TMC, summed": tmc_summed,
        "TMC of the last block, by request": tmc_last,
        "TMC, by example": tmc_each,
        "TMC, by example, vmap": tmc_mapped,
        "EMR, one task": emr,
        "SMILE": smile,
    }


# --- measuring ----------------------------------------------------------------------------------------------------


def held_bytes(held: Any) -> int:
    """Bytes of a tree's arrays, each counted once."""
    arrays = {id(leaf): leaf.nbytes for leaf in flatten(held)[0].values()}
    return sum(arrays.values())


def seconds(compiled: Callable[..., Any], held: Any, images: jax.Array, repeats: int) -> float:
    started = time.perf_counter()
    for _ in range(repeats):
        found = compiled(held, images)
    jax.block_until_ready(found)
    return (time.perf_counter() - started) / repeats


def measured(made: Zoo, batch: int, rounds: int, repeats: int) -> list[dict[str, Any]]:
    """A row for each system, of one number of components."""
    images = jnp.asarray(np.random.default_rng(0).integers(0, 255, (batch, 28, 28)), jnp.uint8)
    programs: dict[str, tuple[Any, Any]] = {}
    memory: dict[str, tuple[int, int]] = {}
    for name, build in systems().items():
        held, answer = build(made)
        compiled = jax.jit(answer).lower(held, images).compile()
        jax.block_until_ready(compiled(held, images))
        told = compiled.memory_analysis()
        memory[name] = held_bytes(held), told.temp_size_in_bytes if told else 0
        programs[name] = compiled, held
    times: dict[str, list[float]] = {name: [] for name in programs}
    for _ in range(rounds):
        for name, (compiled, held) in programs.items():
            times[name].append(seconds(compiled, held, images, repeats))
    first, *_ = programs

    def ratio(name: str, other: str) -> float:
        return statistics.median(a / b for a, b in zip(times[name], times[other], strict=True))

    return [
        {
            "components": len(made.deltas),
            "system": name,
            "ms": 1000 * statistics.median(times[name]),
            "forward passes": ratio(name, first),
            "ensemble / system": ratio("ensemble", name),
            "held, MiB": memory[name][0] / 2**20,
            "working, MiB": memory[name][1] / 2**20,
        }
        for name in programs
    ]


def plot(rows: Sequence[dict[str, Any]], file: Path) -> None:
    made, panels = figure(2)
    for panel, key in zip(panels, ("forward passes", "held, MiB"), strict=True):
        for name in systems():
            own = [row for row in rows if row["system"] == name]
            panel.plot([row["components"] for row in own], [row[key] for row in own], marker="o", label=name)
        panel.set(xlabel="components", ylabel=key, yscale="log")
    panels[0].legend(fontsize=8)
    made.savefig(file)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("-o", "--output", type=Path, required=True)
    parser.add_argument("--components", type=int, nargs="+", default=[2, 5, 10, 20])
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--repeats", type=int, default=3, help="answers that one time is the mean of")
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--dim", type=int, default=128)
    parser.add_argument("--depth", type=int, default=4)
    args = parser.parse_args()
    told, rows = machine(), []
    for count in args.components:
        made = zoo(Vit(dim=args.dim, depth=args.depth), count)
        rows += measured(made, args.batch, args.rounds, args.repeats)
        print(table(rows[-len(systems()) :]), flush=True)
    write_report(args.output, "inference", "Inference", {"machine": told, "rows": rows}, [table(rows)])
    plot(rows, args.output / "inference.png")


if __name__ == "__main__":
    main()
