"""The whole run: a file of numbers for every zoo and seed that is asked for, then the report over all that is there."""

from __future__ import annotations

import contextlib
import functools
import json
import os
import platform
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from cfmerge.errors import CfmergeError, nearest
from cfmerge_accuracy.methods import CURVE, ENTRIES, Entry, entries, fresh
from cfmerge_accuracy.zoo import Zoo

Load = Callable[..., Zoo]
ZOOS = (
    *("vision", "text-full", "text-lora-8", "text-lora-16", "text-lora-16-shared"),
    *("convolutional", "convolutional-reestimated", "linear"),
)
# Not seen when the rule of `auto` was written: merged by the methods of `methods.FRESH`, at defaults.
FRESH_ZOOS: tuple[str, ...] = (
    *("efficientnet", "vision-lora", "vision-lora-shared"),
    *("vision-steps-quarter", "vision-steps-once", "vision-steps-four"),
    *("text-fresh-full", "text-fresh-lora-16", "decoder-full", "decoder-lora"),
)
SCALED = ("vision-steps-quarter", "vision-steps-once", "vision-steps-four")  # of these, which try other scales too
QUICK_ZOOS = ("vision", "text-full", "convolutional-reestimated", "linear")  # of each kind one
SEEDS = (0, 1, 2)
CURVES = ("vision", "convolutional")


class Options(NamedTuple):
    """What the command line asks for.

    Attributes:
        output: a folder; `rows/` in it keeps one file of numbers for each zoo and seed.
        zoos, seeds, methods: which; "fresh": all of `FRESH_ZOOS`; no methods: all, of a fresh zoo those of
            `methods.FRESH`. Rows of methods that are named join those that are there.
        variants: all methods, and their variants: settings that nobody published as a default.
        quick: small networks, few steps, tasks and methods: minutes, to see that all works.
        scale: "large" trains a vision transformer of the shape of CLIP ViT-B/32, for a GPU.
        engine: what evaluates text models: "flax", or "torch", in bfloat16 where the processor has it in hardware;
            "auto": that where it has, else the other.
        command: as it was given, for the report.
        jobs: processes that share what is trained and the methods of a zoo.
    """

    output: Path
    zoos: Sequence[str] = ZOOS
    seeds: Sequence[int] = SEEDS
    methods: Sequence[str] = ()
    variants: bool = False
    quick: bool = False
    scale: str = "small"
    engine: Any = "auto"
    command: str = ""
    jobs: int = 1


def load(name: str, seed: int, options: Options, report: Callable[[str], None]) -> Zoo:
    """Trains what is not in the cache."""
    kind, _, variant = name.partition("-")
    if kind == "vision":
        from cfmerge_accuracy import vision

        return vision.load(
            seed, variant=variant, quick=options.quick, scale=options.scale, jobs=options.jobs, report=report
        )
    if kind == "text":
        from cfmerge_accuracy import text

        return text.load(seed, variant=variant, quick=options.quick, engine=options.engine, report=report)
    if kind == "decoder":
        from cfmerge_accuracy import decoder

        return decoder.load(seed, variant=variant, quick=options.quick, jobs=options.jobs, report=report)
    if kind == "efficientnet":
        from cfmerge_accuracy import efficientnet

        return efficientnet.load(seed, quick=options.quick, jobs=options.jobs, report=report)
    from cfmerge_accuracy import convolutional

    chosen: Any = "re-estimated" if variant else "averaged"
    return convolutional.load(seed, variant=chosen, quick=options.quick, jobs=options.jobs, report=report)


def environment(options: Options) -> dict[str, str]:
    """Versions and the class of machine."""
    import flax
    import jax

    import cfmerge
    from cfmerge_accuracy import processes

    machine = (platform.machine(), processes.vectors(), f"{os.cpu_count()} cores", jax.default_backend())
    return {
        "cfmerge": cfmerge.__version__, "jax": jax.__version__, "flax": flax.__version__,
        "python": platform.python_version(),
        "machine": ", ".join(filter(None, machine)),
        "command": options.command,
    }  # fmt: skip


def run(options: Options, report: Callable[[str], None]) -> Path:
    """Carries out the suite; returns the folder with tables and plots.

    Raises:
        CfmergeError: an unknown zoo or method; variants beside methods that are named; data that cannot be had; a
            package that is missing.
    """
    zoos = named(options.zoos)
    if options.jobs < 1:
        raise CfmergeError(f"jobs must be 1 or more processes, got {options.jobs}")
    if options.scale not in ("small", "large") or options.engine not in ("auto", "flax", "torch"):
        raise CfmergeError(
            f"scale is small or large, engine auto, flax or torch; got {options.scale!r}, {options.engine!r}"
        )
    if options.methods and options.variants:
        raise CfmergeError("--variants adds to all methods, and some are named: leave one of the two out")
    chosen = entries(options.methods, quick=options.quick, variants=options.variants)
    rows = options.output / "rows"
    rows.mkdir(parents=True, exist_ok=True)
    for name in zoos:
        if name == "linear":
            _write(rows / "linear.json", _linear(options, chosen))
            continue
        for seed in options.seeds:
            path = rows / f"{name}-{seed}.json"
            own = fresh(options.quick) if name in FRESH_ZOOS and not (options.methods or options.variants) else chosen
            found = _one(name, seed, options, own, report)
            kept = json.loads(path.read_text()) if path.exists() else None
            if kept:
                found = beside(kept, found) if options.methods else found | what_stays(kept, found)
            _write(path, found)
    from cfmerge_accuracy import report as reports

    reports.write(options.output)
    return options.output


def named(zoos: Sequence[str]) -> list[str]:
    """The zoos with "fresh" spelled out, each once.

    Raises:
        CfmergeError: an unknown zoo.
    """
    spelled = [name for zoo in zoos for name in (FRESH_ZOOS if zoo == "fresh" else (zoo,))]
    known = (*ZOOS, *FRESH_ZOOS)
    for name in spelled:
        if name not in known:
            raise CfmergeError(f"no zoo {name!r} in the suite{nearest(name, (*known, 'fresh'))}")
    return list(dict.fromkeys(spelled))


def factors(name: str, quick: bool) -> tuple[float, ...]:
    """What a merged delta is multiplied by besides 1; none for a fresh zoo that is judged at defaults only."""
    from cfmerge_accuracy import compare

    if name in FRESH_ZOOS and name not in SCALED:
        return ()
    return (0.5, 2.0) if quick else compare.FACTORS


def beside(kept: dict[str, Any], found: dict[str, Any]) -> dict[str, Any]:
    """The numbers that were kept, with some methods' rows added, or in the place of those of the same name.

    Raises:
        CfmergeError: the rows are not of the same experts.
    """
    if not _same_experts(kept, found):
        raise CfmergeError(
            f"{kept['zoo']}, seed {kept['seed']}: the rows that are there are of other experts than these now; run the "
            "zoo with all methods (no -m), or with another output folder"
        )
    rows = {row["name"]: row for row in (*kept["methods"], *found["methods"])}
    environment = kept["environment"] | {"command": _both(kept, found)}
    return kept | {"methods": [*rows.values()], "facts": kept["facts"] | found["facts"], "environment": environment}


def what_stays(kept: dict[str, Any], found: dict[str, Any]) -> dict[str, Any]:
    """Of the numbers that were kept, where a whole run takes their place, if these are of the same experts.

    That is what peers.py wrote, and the variants that were not run again.
    """
    if not _same_experts(kept, found):
        return {}
    stays: dict[str, Any] = {key: kept[key] for key in ("peers", "peers_failed") if key in kept}
    left = {entry.name for entry in ENTRIES if entry.variant} - {row["name"] for row in found["methods"]}
    if rows := [row for row in kept["methods"] if row["name"] in left]:
        stays["methods"] = [*found["methods"], *rows]
        stays["environment"] = found["environment"] | {"command": _both(kept, found)}
    return stays


def _both(kept: dict[str, Any], found: dict[str, Any]) -> str:
    return "; ".join(one["environment"]["command"] for one in (kept, found))


def _same_experts(kept: dict[str, Any], found: dict[str, Any]) -> bool:
    return all(kept[key] == found[key] for key in ("references", "quick"))


def _one(name: str, seed: int, options: Options, chosen: list[Entry], report: Callable[[str], None]) -> dict[str, Any]:
    from cfmerge_accuracy import compare, workers

    started = time.monotonic()
    zoo = load(name, seed, options, report)
    trained = time.monotonic()
    curve = [e for e in chosen if e.method in CURVE and name in CURVES and not options.methods and not options.quick]
    again = functools.partial(load, name, seed, options, _in_silence)
    with workers.spread(options.jobs, again) if options.jobs > 1 else contextlib.nullcontext() as run:
        found = compare.compare(zoo, chosen, factors(name, options.quick), report, curve, run)
    seconds = {"loading": trained - started, "comparing": time.monotonic() - trained}
    return found | {"quick": options.quick, "environment": environment(options), "seconds": seconds}


def _in_silence(line: str) -> None:
    """A report that nobody reads: of what is loaded again."""


def _linear(options: Options, chosen: list[Entry]) -> dict[str, Any]:
    import cfmerge
    from cfmerge_accuracy import linear

    without = [] if options.quick else [entry for entry in chosen if entry.data == "none"]
    others = {entry.name: cfmerge.methods.make(entry.method) for entry in without}
    return linear.table(options.seeds, others=others, quick=options.quick) | {"environment": environment(options)}


def _write(path: Path, found: dict[str, Any]) -> None:
    partial = path.with_suffix(".partial")
    partial.write_text(json.dumps(found, indent=1) + "\n")
    partial.rename(path)
