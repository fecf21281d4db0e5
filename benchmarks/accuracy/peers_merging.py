"""The two sides of peers.py: a zoo's experts merged by cfmerge, and by a worker in the peer's environment."""

from __future__ import annotations

import dataclasses
import functools
import os
import subprocess
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

import cfmerge
from cfmerge.formats.pytree import flatten, unflatten
from cfmerge.models import Parameter, from_canonical, to_canonical
from cfmerge.products.in_memory import Problem
from cfmerge_accuracy.compare import Given
from cfmerge_accuracy.methods import Entry
from cfmerge_accuracy.zoo import Params, Zoo
from peers_cases import Case, PeerError, Theirs

State = dict[str, Any]  # of NumPy arrays, by name


# --- tensors, as peers take them ----------------------------------------------------------------------------------


def merged_by(zoo: Zoo, method: str) -> dict[str, Parameter]:
    """The tensors that a method itself merges: not those that are averaged beside it, nor stacks of matrices."""
    made = cfmerge.methods.make(method)
    assignments = Problem.of(zoo.base, dict(zoo.experts), [made], zoo.rules).assignments[0]
    return {
        name: a.parameter
        for name, a in assignments.items()
        if a.action == "merge" and a.method.name == made.name and not _stacked(a.parameter)
    }


def _stacked(parameter: Parameter) -> bool:
    return bool(parameter.layout) and parameter.canonical[0] > 1


def canonical(leaves: Mapping[str, Any], parameters: Mapping[str, Parameter]) -> State:
    """Matrices as `(out, in)`, the rest as it is."""
    found = {}
    for name, parameter in parameters.items():
        array = np.asarray(leaves[name])
        found[name] = to_canonical(array, parameter.layout)[0] if parameter.layout else array
    return found


def stored(array: np.ndarray, parameter: Parameter) -> np.ndarray:
    """The inverse of `canonical`, of one tensor."""
    return from_canonical(array[None], parameter.layout, parameter.shape) if parameter.layout else array


class Files:
    """A folder from which workers read: everything that an entrywise method merges, and what was measured."""

    def __init__(self, zoo: Zoo, directory: Path) -> None:
        self.zoo, self.given, self.directory, self.written = zoo, Given(zoo), directory, set[str]()
        self.parameters = merged_by(zoo, "magmax")
        for name, tree in {"base": zoo.base, **self._numbered("expert", zoo.experts.values())}.items():
            np.savez(directory / f"{name}.npz", **canonical(flatten(tree)[0], self.parameters))

    def moments(self, case: Case, zoo: Zoo) -> list[Any] | None:
        """As cfmerge takes them; the workers find them in the folder."""
        entry = Entry(case.name, case.method, "", case.moments)
        found = self.given.moments(entry, self.zoo.tasks)
        if found is None:
            return None
        if case.moments not in self.written:
            self.written.add(case.moments)
            for name, moment in self._numbered(case.moments.removesuffix("s"), found).items():
                leaves = flatten(moment)[0]
                arrays = dict(leaves) if case.moments == "grams" else canonical(leaves, self.parameters)
                np.savez(self.directory / f"{name}.npz", **arrays)
        return self.given.moments(entry, zoo.tasks)

    @functools.cached_property
    def untied(self) -> Files:
        """Of the same experts, no two of whose entries tie."""
        directory = self.directory / "untied"
        directory.mkdir()
        return Files(untied(self.zoo), directory)

    @staticmethod
    def _numbered(name: str, values: Iterable[Any]) -> dict[str, Any]:
        return {f"{name}_{number}": value for number, value in enumerate(values)}


def untied(zoo: Zoo) -> Zoo:
    """The experts in float64, each entry of a delta changed by up to a hundred-thousandth of itself.

    In float32 many entries are equal in size. A threshold that falls on such keeps some of them, and which is no part
    of a method.
    """
    generator = np.random.default_rng(0)

    def moved(expert: Any, base: Any) -> Any:
        delta = np.asarray(expert, np.float64) - base
        return base + delta * generator.uniform(1 - 1e-5, 1 + 1e-5, delta.shape)

    experts = {task: jax.tree.map(moved, expert, zoo.base) for task, expert in zoo.experts.items()}
    return dataclasses.replace(zoo, experts=experts)


# --- the two sides ------------------------------------------------------------------------------------------------


class Worker(Theirs):
    """A process in the peer's environment, see peers_worker.py."""

    def __init__(self, python: str, package: str, clones: str | None, limit: float) -> None:
        environment = os.environ | {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}  # the same sums at every run
        script = Path(__file__).with_name("peers_worker.py")
        self.package, self.limit, self.late = package, limit, False
        self.process = subprocess.Popen(
            [python, str(script), package, clones or "."], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL, text=True, env=environment,
        )  # fmt: skip

    def label(self, case: Case) -> str:
        """The peer with its version, if it has one."""
        package = self.package.replace("_", "-")
        version = self.ask(do="versions", packages=[package]).get(package)
        return f"{self.package}{f' {version}' if version else ''}: {case.peer.removeprefix(self.package + '_')}"

    def merge(self, case: Case, files: Files, names: Iterable[str], experts: int, double: bool) -> State:
        """The merged deltas."""
        save = files.directory / "theirs.npz"
        moments = "" if case.moments == "none" else case.moments.removesuffix("s")
        self.ask(
            do="merge", peer=case.peer, directory=str(files.directory), experts=experts, names=list(names),
            moments=moments, double=double, save=str(save),
        )  # fmt: skip
        if self.late:
            raise PeerError(f"stopped after {self.limit:.0f} s")
        with np.load(save) as file:
            return {name: file[name] for name in file.files}


def ours(zoo: Zoo, case: Case, moments: list[Any] | None, double: bool) -> Params:
    """cfmerge's merged parameters."""

    def cast(tree: Any) -> Any:
        return jax.tree.map(lambda leaf: leaf.astype(np.float64) if double and leaf.dtype == np.float32 else leaf, tree)

    method = cfmerge.methods.make((case.exact if double else "") or case.method)
    with jax.enable_x64(double):
        merged = cfmerge.merge_params(
            cast(zoo.base), {task: cast(zoo.experts[task]) for task in zoo.tasks}, method,
            rules=zoo.rules, moments=cast(moments), seed=zoo.seed,
        )  # fmt: skip
        return jax.tree.map(np.asarray, merged)


class Both(NamedTuple):
    """Merged by both sides, in one precision.

    Attributes:
        difference: the largest, relative to the largest entry of their merged delta.
        share: of the entries that differ by more than the tolerance.
    """

    ours: Params
    theirs: Params
    difference: float
    share: float


def merge(zoo: Zoo, case: Case, files: Files, worker: Worker, names: Sequence[str], double: bool) -> Both:
    """Both merges of the named tensors; the rest of their model is ours."""
    parameters = {name: files.parameters[name] for name in names}
    leaves, treedef = flatten(ours(zoo, case, files.moments(case, zoo), double))
    deltas = worker.merge(case, files, names, len(zoo.tasks), double)
    start = flatten(zoo.base)[0]
    base, merged = canonical(start, parameters), canonical(leaves, parameters)
    apart = np.concatenate([np.abs(merged[n].astype(np.float64) - base[n] - deltas[n]).ravel() for n in names])
    apart /= max(float(np.max(np.abs(delta), initial=0)) for delta in deltas.values()) or 1.0
    limit = case.double if double and case.double else case.tolerance
    theirs = {n: stored((base[n] + deltas[n]).astype(np.float32), parameters[n]) for n in names}
    single = {n: np.asarray(leaf, start[n].dtype) for n, leaf in leaves.items()}
    return Both(
        unflatten(treedef, single), unflatten(treedef, single | theirs), float(np.max(apart, initial=0)),
        float(np.mean(~(apart <= limit))),
    )  # fmt: skip
