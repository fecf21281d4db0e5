"""The protocol: merge, evaluate on test; choose one scale on validation examples, evaluate on test again."""

from __future__ import annotations

import functools
import time
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict

import cfmerge
from cfmerge import CfmergeError, covariance, linalg
from cfmerge_accuracy import covariances as spectra
from cfmerge_accuracy import proxies
from cfmerge_accuracy.cache import cached
from cfmerge_accuracy.methods import CURVE, Entry
from cfmerge_accuracy.zoo import Params, Split, Zoo

Report = Callable[[str], None]
FACTORS = (0.35, 0.5, 0.71, 1.41, 2.0, 2.83)  # of the merged delta, besides 1


class Given:
    """What is measured of the experts, mostly with the tasks' data, once, when the first method asks for it."""

    def __init__(self, zoo: Zoo) -> None:
        self.zoo = zoo
        self._kept: dict[str, dict[str, Any]] = {}
        self._merged = 0

    def make_room(self) -> None:
        """Compiled code takes memory maps, of which a process may have only so many (65,530 on Linux)."""
        self._merged += 1
        maps = Path("/proc/self/maps")
        crowded = maps.read_bytes().count(b"\n") > 20_000 if maps.exists() else self._merged % 20 == 0
        if crowded:
            jax.clear_caches()

    @functools.cached_property
    def own(self) -> dict[str, float]:
        """The experts' accuracies on validation examples."""
        return own_accuracies(self.zoo, "validation")

    @functools.cached_property
    def outputs(self) -> proxies.Outputs:
        """What the excess error of a merge is measured with."""
        return proxies.outputs(proxies.deltas(self.zoo), self.grams())

    def grams(self) -> dict[str, Mapping[str, np.ndarray]]:
        return self._measured("grams", self.zoo.grams)

    def fishers(self) -> dict[str, Params]:
        if self.zoo.fishers is None:
            raise CfmergeError(f"{self.zoo.name}: Fishers are not measured here")
        return self._measured("fishers", self.zoo.fishers)

    def _measured(self, name: str, measure: Callable[[str], Any]) -> dict[str, Any]:
        if name not in self._kept:
            self._kept[name] = {task: measure(task) for task in self.zoo.tasks}
        return self._kept[name]

    def moments(self, entry: Entry, tasks: Sequence[str]) -> list[Any] | None:
        """One for each expert, as `cfmerge.merge_params` takes them."""
        if entry.data not in ("grams", "fishers"):
            return None
        known = self.grams() if entry.data == "grams" else self.fishers()
        return [known[task] for task in tasks]


def merge(zoo: Zoo, entry: Entry, given: Given) -> Params:
    """The merged parameters, before `zoo.finish`."""
    if entry.method == "regmean_pp":
        if zoo.regmean_pp is None:
            raise CfmergeError(f"{zoo.name}: RegMean++ is not done here")
        return zoo.regmean_pp()
    method = cfmerge.methods.make(entry.method)
    moments = given.moments(entry, zoo.tasks)
    experts = {task: zoo.experts[task] for task in zoo.tasks}
    return cfmerge.merge_params(zoo.base, experts, method, rules=zoo.rules, moments=moments, seed=zoo.seed)


def scaled(base: Params, merged: Params, factor: float) -> Params:
    """`base + factor (merged - base)`; running statistics stay as they were merged."""
    start, end = flatten_dict(base), flatten_dict(merged)
    return unflatten_dict(
        {
            path: end[path]
            if path[0] == "batch_stats"
            else value + np.float32(factor) * (np.asarray(end[path]) - value)
            for path, value in start.items()
        }
    )


def normalised(found: Mapping[str, float], experts: Mapping[str, float]) -> float:
    """The mean over tasks of accuracy / the expert's accuracy.

    Raises:
        CfmergeError: an expert without a right answer.
    """
    for task in found:
        if not experts[task]:
            raise CfmergeError(
                f"{task}: the expert has no right answer, so nothing can be a share of it; train it longer"
            )
    return float(np.mean([found[task] / experts[task] for task in found]))


def climb(value: Callable[[float], float], factors: Sequence[float]) -> float:
    """From 1 up, and down, for as long as the value rises: the factor of the highest one, of several that nearest to 1.

    On all rows of the suite that had every factor tried it found the best of them in 99 of 100, in 4.4 trials, not 7.
    """
    found = {1.0: value(1.0)}
    for way in (sorted(f for f in factors if f > 1), sorted((f for f in factors if f < 1), reverse=True)):
        top = found[1.0]
        for factor in way:
            found[factor] = value(factor)
            if found[factor] <= top:
                break
            top = found[factor]
    top = max(found.values())
    return min((factor for factor, value in found.items() if value == top), key=lambda f: abs(np.log(f)))


def own_accuracies(zoo: Zoo, split: Split) -> dict[str, float]:
    """Each expert's on its own task."""
    return {task: zoo.accuracies(zoo.experts[task], split, [task])[task] for task in zoo.tasks}


def references(given: Given) -> dict[str, dict[str, float]]:
    """On test: each expert on its own task, the base, the experts' ensemble, and the model of all tasks, if any."""
    zoo = given.zoo
    found = {
        "experts": own_accuracies(zoo, "test"),
        "base": zoo.accuracies(zoo.base, "test"),
        "ensemble": zoo.ensemble("test"),
    }
    return found if zoo.multitask is None else found | {"multitask": zoo.accuracies(zoo.multitask, "test")}


def perplexities(zoo: Zoo) -> dict[str, dict[str, float]]:
    """On test: each expert's on its own task, and the base's."""
    experts = {task: zoo.perplexities(zoo.experts[task], "test", [task])[task] for task in zoo.tasks}
    return {"experts": experts, "base": zoo.perplexities(zoo.base, "test")}


def row(given: Given, entry: Entry, factors: Sequence[float]) -> dict[str, Any]:
    """One method: see `report` for the keys. Without factors, at its defaults alone."""
    zoo = given.zoo
    kept: dict[str, Any] = {"name": entry.name, "method": entry.method, "group": entry.group, "data": entry.data}
    given.make_room()
    try:
        given.moments(entry, zoo.tasks)  # not what is timed
        started = time.perf_counter()
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            merged = merge(zoo, entry, given)
        if not all(np.isfinite(leaf).all() for leaf in flatten_dict(merged).values()):
            raise CfmergeError("the merged model is not finite")
    except CfmergeError as error:
        return kept | {"failed": str(error), "published": None, "scaled": None, "notes": []}
    kept |= {
        "seconds": time.perf_counter() - started,
        "failed": None,
        "notes": sorted({str(w.message) for w in caught}),
    }
    finished = zoo.finish(merged, zoo.tasks)
    kept["published"] = zoo.accuracies(finished, "test")
    if zoo.perplexity:
        kept["perplexities"] = zoo.perplexities(finished, "test")
    if factors:
        tried: dict[float, float] = {}

        def validation(factor: float) -> float:
            if factor not in tried:
                params = zoo.finish(scaled(zoo.base, merged, factor), zoo.tasks)
                tried[factor] = normalised(zoo.accuracies(params, "validation"), given.own)
            return tried[factor]

        kept["factor"] = climb(validation, factors)
        for factor in factors if entry.method in CURVE else ():  # for the plot
            validation(factor)
        kept["validation"] = {f"{factor:g}": tried[factor] for factor in sorted(tried)}
        kept["scaled"] = kept["published"]
        if kept["factor"] != 1:
            params = zoo.finish(scaled(zoo.base, merged, kept["factor"]), zoo.tasks)
            kept["scaled"] = zoo.accuracies(params, "test")
    errors = proxies.excess(zoo.base, merged, given.outputs) if factors else {}
    kept["excess"] = float(np.mean(list(errors.values()))) if errors else None
    return kept


def at_count(given: Given, entries: Sequence[Entry], count: int) -> list[dict[str, Any]]:
    """Normalised accuracy on test, of the first `count` experts merged; None of a method that failed."""
    few, found = given.zoo.of_tasks(given.zoo.tasks[:count]), []
    own = own_accuracies(few, "test")
    for entry in entries:
        given.make_room()
        one: dict[str, Any] = {"name": entry.name, "count": count, "tasks": list(few.tasks)}
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # told in the method's row, of all experts
                merged = merge(few, entry, given)
            params = few.finish(merged, few.tasks)
            found.append(one | {"normalised": normalised(few.accuracies(params, "test"), own)})
        except CfmergeError as error:
            found.append(one | {"normalised": None, "failed": str(error)})
    return found


def covariances(given: Given) -> list[dict[str, Any]]:
    """The estimates that the methods rest on, beside the truth; measured once for the same experts."""
    zoo, grams = given.zoo, given.grams()

    def make() -> Params:
        found = proxies.estimates(zoo, grams)
        return {key: np.array([one[key] for one in found]) for key in (found[0] if found else ()) if key != "estimator"}

    code = (proxies, spectra, covariance, linalg)
    arrays = jax.tree.leaves((zoo.base, dict(zoo.experts), grams))
    found = dict(sorted(cached(f"{zoo.name}-{zoo.seed}-estimates", make, of={}, code=code, data=arrays).items()))
    rows = zip(*found.values(), strict=True)
    return [
        {"estimator": label, **dict(zip(found, map(float, row), strict=True))}
        for label, row in zip(proxies.ESTIMATORS, rows, strict=False)
    ]


# --- all of it ----------------------------------------------------------------------------------------------------

Part = Callable[[Given], Any]  # to be pickled: a function of this module, or a partial of one
Run = Callable[[list[Part]], Iterable[Any]]  # their results, in their order


def compare(
    zoo: Zoo,
    entries: Sequence[Entry],
    factors: Sequence[float],
    report: Report,
    curve: Sequence[Entry] = (),
    run: Run | None = None,
) -> dict[str, Any]:
    """All that is known of one zoo: references, every method, the covariances that they rest on.

    Args:
        factors: of the merged delta, besides 1; none: every method at its defaults alone, and no covariances, as these
            take as long.
        curve: of the entries, those that also merge the first 2, 3, ... experts.
        run: carries out the parts; none: here, one after the other.
    """
    counts = range(2, len(zoo.tasks)) if curve else ()
    order = sorted(entries, key=lambda entry: entry.data == "none")  # what takes long comes first, for `run`'s sake
    curves: list[Part] = [functools.partial(at_count, entries=curve, count=count) for count in counts]
    rows: list[Part] = [functools.partial(row, entry=entry, factors=factors) for entry in order]
    first: list[Part] = [references, covariances if factors else _nothing]
    results = iter((run or _one_by_one(zoo))([*first, *reversed(curves), *rows]))

    known, estimates = next(results), next(results)
    for label, accuracies in known.items():
        report(f"{zoo.name} {zoo.seed} {label}: {100 * np.mean(list(accuracies.values())):.1f}")
    fewer = [next(results) for _ in counts]
    made = {}
    for entry in order:
        made[entry.name] = next(results)
        report(f"{zoo.name} {zoo.seed} {entry.name}: {_told(made[entry.name], known['experts'])}")
    facts = dict(zoo.facts) | {"lengths": lengths(zoo)}
    found = {
        "zoo": zoo.name, "seed": zoo.seed, "tasks": list(zoo.tasks), "facts": facts,
        "references": known, "methods": [made[entry.name] for entry in entries], "covariances": estimates,
    }  # fmt: skip
    if zoo.perplexity:
        found["perplexities"] = perplexities(zoo)
    if not curve:
        return found
    whole = [_of_all(zoo.tasks, made[entry.name], known["experts"]) for entry in curve]
    found["counts"] = [one for each in reversed(fewer) for one in each] + whole
    for one in found["counts"]:
        if one["normalised"] is None:
            report(f"{zoo.name} {zoo.seed} {one['name']}, {one['count']} experts: {one['failed']}")
    return found


def lengths(zoo: Zoo) -> dict[str, float]:
    """By expert, the norm of what it changed over that of the base, of all that was trained."""
    base = {path: leaf for path, leaf in flatten_dict(zoo.base).items() if path[0] != "batch_stats"}

    def norm(leaves: Iterable[np.ndarray]) -> float:
        return float(np.sqrt(sum(float(np.sum(np.square(leaf, dtype=np.float64))) for leaf in leaves)))

    changed = {name: flatten_dict(expert) for name, expert in zoo.experts.items()}
    return {
        name: round(norm(own[path] - leaf for path, leaf in base.items()) / norm(base.values()), 5)
        for name, own in changed.items()
    }


def _nothing(given: Given) -> list[dict[str, Any]]:
    """In place of the covariances."""
    return []


def _of_all(tasks: Sequence[str], made: Mapping[str, Any], experts: Mapping[str, float]) -> dict[str, Any]:
    """A row as the end of the method's curve."""
    one: dict[str, Any] = {"name": made["name"], "count": len(tasks), "tasks": list(tasks)}
    if made["failed"]:
        return one | {"normalised": None, "failed": made["failed"]}
    return one | {"normalised": normalised(made["published"], experts)}


def _one_by_one(zoo: Zoo) -> Run:
    given = Given(zoo)
    return lambda parts: (part(given) for part in parts)


def _told(made: Mapping[str, Any], experts: Mapping[str, float]) -> str:
    if made["failed"]:
        return str(made["failed"])
    told = f"{100 * normalised(made['published'], experts):.1f}"
    if made.get("scaled"):
        told += f", at {made['factor']:g} {100 * normalised(made['scaled'], experts):.1f}"
    return f"{told} ({made['seconds']:.1f} s)"
