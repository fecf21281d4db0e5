"""Plans: a merge resolved from headers, which `run` carries out."""

import contextlib
import dataclasses
import os
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, Self, TypeVar

import msgspec

from cfmerge import recipe as recipes
from cfmerge.core.expressions import expression
from cfmerge.engine.cutting import check_memory
from cfmerge.engine.placement import Devices, Placement
from cfmerge.engine.run import ANYWHERE
from cfmerge.errors import CfmergeError, NonFiniteError
from cfmerge.methods import Method
from cfmerge.planning.prediction import Prediction
from cfmerge.planning.resolve import resolve
from cfmerge.planning.resolved import Resolved
from cfmerge.planning.work import Progress, Writable, silent
from cfmerge.products.carry_out import Models, Writes, carried_out
from cfmerge.products.choosing import settled
from cfmerge.products.predict import Forecast, forecast
from cfmerge.products.processes import memory_of, together
from cfmerge.products.resume import LeftOut
from cfmerge.recipe import Recipe
from cfmerge.statistics import Statistics

T = TypeVar("T")
Experts = Sequence[str | Path | recipes.Expert] | Mapping[str, str | Path]


class Plan(Resolved):
    """A merge resolved from headers: the action on every tensor, and the cost; `run` carries it out.

        >>> plan = cfmerge.plan("base", ["math", "code"], "average")
        >>> plan.counts()["matrix", "average"], plan.bytes_to_write, plan.notes
        (1, 64, ())
        >>> plan.run("merged").output.name
        'merged'

    A sink takes the tensors in place of a directory:

        >>> class Kept:
        ...     tensors = {}
        ...     def write(self, name, values, first=0):
        ...         self.tensors[name] = values
        >>> result = plan.run(Kept())
        >>> Kept.tensors["layer.bias"].tolist()
        [2.0, 2.0, 2.0, 2.0]

    `cfmerge.plan` and `cfmerge.make_plan` make it. Sizes are in bytes, `flops` are floating-point operations.
    """

    writes: ClassVar[Writes] = Models()

    def run(
        self,
        output: str | Path | Writable | Mapping[str, Writable],
        *,
        overwrite: bool = False,
        memory: str | int | None = None,
        devices: Devices = None,
        progress: Progress | None = None,
        fresh: bool = False,
    ) -> Any:
        """The result of the merge.

        Args:
            output: the directory or file to make (of a sweep: a directory that gets a model for each
                label); or a sink (of a sweep: a mapping `{label: sink}`), whose `write(name, values, first)` is
                called with every tensor. A large tensor comes in pieces: flat entries from entry `first` on.
            overwrite, memory, devices, progress, fresh: as in `merge`.

        Returns:
            A `MergeResult`; of a sweep `{label: MergeResult}`.

        Raises:
            CfmergeError: bad input; nothing is written then.
        """
        started = time.monotonic()
        with together(output, devices) as where:
            limit = memory_of(where.processes, memory, free_memory())
            tell = progress if progress and where.processes.number == 0 else silent
            done = self.attempted(limit, lambda plan, limit, left_out: carried_out(
                plan, output, overwrite, limit, where, tell, left_out, fresh, self.writes
            ), where)  # fmt: skip
        seconds = time.monotonic() - started
        results = {label: dataclasses.replace(result, seconds=seconds) for label, result in done.items()}
        return results.get("", results)

    def prediction(
        self,
        *,
        memory: str | int | None = None,
        devices: Devices = None,
        device_memory: str | int | None = None,
        calibrate: bool = True,
    ) -> Prediction:
        """The seconds and the memory that the merge will need, from headers and the speed of this machine.

            >>> plan = cfmerge.plan("base", ["math", "code"], "average")
            >>> plan.prediction(calibrate=False).memory > 1e8
            True
            >>> plan.prediction(devices=8, device_memory="80GB").too_large
            {}

        The machine is measured when that is first asked for, in some seconds; the rates are kept in the user's cache.

        Args:
            memory: as in `merge`.
            devices: as in `merge`; or a number of devices of a machine that is not here, of which no seconds are known.
            device_memory: what each of these has.
            calibrate: measure this machine if need be; otherwise no seconds are predicted.
        """
        return self.forecast(memory, devices, device_memory, calibrate).prediction

    def forecast(
        self, memory: str | int | None, devices: Devices, device_memory: str | int | None, calibrate: bool
    ) -> Forecast:
        """The prediction, with the bound of memory, the tensors that this refuses, and notes; see `prediction`."""
        free = free_memory()
        return forecast(self, _bound(memory, free), free, devices, device_memory, calibrate)

    def attempted(
        self, memory: str | int | None, do: "Callable[[Plan, int, list[LeftOut]], T]", placement: Placement = ANYWHERE
    ) -> T:
        """`do(plan, bound of memory, experts left out)`; again without one that is not finite, if that is allowed."""
        limit = _bound(memory, free_memory())
        left_out: list[LeftOut] = []
        plan = self
        while True:
            try:
                ready = plan.ready(limit, placement)
                for job in ready.jobs:
                    check_memory(ready.work.by_entry(job), limit)
                return do(ready, limit, left_out)
            except NonFiniteError as error:
                plan = plan._without(error, left_out)

    def ready(self, memory: int | None = None, placement: Placement = ANYWHERE) -> "Plan":
        """The plan with all settled that takes a look at the tensors: the methods in the place of `auto`.

            >>> plan = cfmerge.plan("base", ["math", "code"], "auto")
            >>> [note.split(":")[0] for note in plan.ready().notes]
            ['auto']

        Raises:
            NonFiniteError: an expert that the look was at holds NaN or infinity.
        """
        work, notes = settled(self.work, memory, placement)
        return dataclasses.replace(self, work=work, notes=(*self.notes, *notes)) if notes else self

    def _without(self, error: NonFiniteError, left_out: list[LeftOut]) -> "Plan":
        """The plan without the expert that is not finite, if it may be left out; otherwise raises the error."""
        recipe = self.recipe
        if recipe.on_nonfinite == "error" or not error.source or recipe.layers:
            raise error
        left_out.append(LeftOut(self.digest, str(error), error.source, error.tensor))
        kept = [spec for spec in self.expert_specs if spec.name != error.source]
        least = 0 if self.statistics else 1 if self.sums else 2
        if len(kept) < least and ("one-expert" not in recipe.allow or not kept):
            told = "no expert is left" if not kept else "1 expert is left"
            raise CfmergeError(f"{left_out[-1].note}, and {told} to merge: repair it, or give more") from None
        asked = {label: msgspec.structs.replace(one.recipe, experts=kept) for label, one in self.results.items()}
        return self.made(asked, self.statistics, sums=self.sums, opened=self.opened)

    @classmethod
    def made(cls, asked: Mapping[str, Recipe], statistics: Statistics | None = None, **how: Any) -> Self:
        """The plan of recipes by label; see `cfmerge.planning.resolve.resolve`."""
        resolved = resolve(asked, statistics, **how)
        return cls(**{field.name: getattr(resolved, field.name) for field in dataclasses.fields(resolved)})


planned = Plan.made


def make_plan(recipe: Recipe, statistics: Statistics | None = None, *, sums: bool = False) -> Plan:
    """The plan of a recipe: checkpoints opened, headers checked, no tensor merged.

        >>> recipe = cfmerge.Recipe(base="base", experts=["math", "code"], method="ties")
        >>> cfmerge.make_plan(recipe).counts()["vector", "ties"]
        1

    Args:
        recipe: base, experts, method and options.
        statistics: statistics of other experts to begin from.
        sums: take methods in the form that has statistics, for `accumulate`.

    Raises:
        CfmergeError: with every problem that the headers show, one a line.
    """
    return planned({"": recipe}, statistics, sums=sums)


def plan(
    base: str | Path | Recipe | Mapping[str, Recipe],
    experts: Experts = (),
    method: str | Method = "ace",
    *,
    parameters: Mapping[str, Any] | None = None,
    **options: Any,
) -> Plan:
    """The plan of a merge, made from headers; its `run(output)` merges.

        >>> plan = cfmerge.plan("base", {"maths": "math", "coding": "code"}, "task_arithmetic(scale=0.5)")
        >>> [expert.name for expert in plan.expert_specs]
        ['maths', 'coding']
        >>> plan.counts()["matrix", "task_arithmetic"]
        1

    Several results in one pass are several recipes by label:

        >>> recipes = {name: cfmerge.Recipe("base", ["math", "code"], name) for name in ("average", "ties")}
        >>> sorted(cfmerge.plan(recipes).run("runs"))
        ['average', 'ties']

    Args:
        base: as in `merge`; or a `Recipe`, which says everything; or `{label: Recipe}` of several that differ in
            method and parameters alone, which are merged in one pass.
        experts, method, parameters: as in `merge`.
        **options: the other fields of `Recipe`.

    Raises:
        CfmergeError: with every problem that the headers show, one a line.
    """
    if isinstance(base, Mapping) and all(isinstance(one, Recipe) for one in base.values()):
        return planned(base)
    if isinstance(base, Recipe):
        return make_plan(base)
    return make_plan(as_recipe(base, experts, method, parameters, options))  # type: ignore[arg-type]


def as_recipe(
    base: str | Path,
    experts: Experts,
    method: str | Method,
    parameters: Mapping[str, Any] | None,
    options: Mapping[str, Any],
) -> Recipe:
    """The arguments of `merge` as a recipe."""
    if isinstance(experts, Mapping):
        experts = [recipes.Expert(path=_path("expert", path), name=name) for name, path in experts.items()]
    if isinstance(method, Method):
        if method.call is None:
            raise CfmergeError(
                f"method {method.name!r} is not registered, and a merge of files must be able to name it: put "
                "@cfmerge.methods.register on the function that makes it"
            )
        if parameters:
            raise CfmergeError(f"parameters {dict(parameters)}: method {method.name!r} has its own already")
        method = expression(method)
    content = {
        "base": _path("base", base),
        "experts": [msgspec.to_builtins(e) if isinstance(e, recipes.Expert) else _path("expert", e) for e in experts],
        "method": method,
        "parameters": dict(parameters or {}),
        **options,
        "rules": [msgspec.to_builtins(r) if isinstance(r, recipes.Rule) else dict(r) for r in options.get("rules", ())],
    }
    return recipes.parse(content, "cfmerge.merge")


def _path(role: str, given: Any) -> str:
    if isinstance(given, str | os.PathLike):
        return str(given)
    raise CfmergeError(
        f"{role}: a path or a name is expected, found {type(given).__name__}; arrays in memory are merged by "
        "cfmerge.merge_params"
    )


def _bound(memory: str | int | None, free: int) -> int:
    """The bound of the working set: what is asked for, else a quarter of the free memory."""
    return free // 4 if memory is None else recipes.parse_size(str(memory))


def free_memory() -> int:
    """Bytes of memory that are available."""
    with contextlib.suppress(OSError, StopIteration, ValueError):
        line = next(row for row in Path("/proc/meminfo").read_text().splitlines() if "MemAvailable" in row)
        return int(line.split()[1]) * 1024
    return 4 << 30
