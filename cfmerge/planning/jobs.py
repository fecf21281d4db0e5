"""Jobs: assignments with the numbers, weights and experts of every tensor settled, and checked."""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np

from cfmerge import methods as registered
from cfmerge.core.call import settle
from cfmerge.core.part import Composer
from cfmerge.core.several import members, several
from cfmerge.errors import CfmergeError
from cfmerge.methods import Method
from cfmerge.models import Parameter
from cfmerge.models.patterns import escape
from cfmerge.planning.assign import Assignment
from cfmerge.planning.depth import depths_of, place, same_for_stacked_layers, weight_at
from cfmerge.planning.work import Job, Participant, Readable
from cfmerge.recipe import rule_option
from cfmerge.statistics import Statistics, full_form


def settled_jobs(
    assignments: Sequence[Mapping[str, Assignment]],
    experts: Sequence[str],
    weights: Sequence[Any],
    *,
    before: Sequence[str] = (),
    sources: Sequence[Mapping[str, str]] | None = None,
    aliases: Mapping[str, Sequence[str]] | None = None,
    dtype_of: Callable[[Parameter], np.dtype],
    statistics: Statistics | None = None,
    sums: bool = False,
) -> tuple[list[Job], list[str]]:
    """The jobs, whose methods and weights have the numbers of their tensor; and notes for the user.

    Args:
        assignments: one mapping for each result; a sweep has several.
        experts, weights: names, and weights as a recipe gives them.
        before: names of the experts in the statistics.
        sources: `{name in the base: name in the expert}` of each expert; none: the same names.
        aliases: `{name: names tied to it}`.
        dtype_of: the output's dtype of a parameter.
        statistics: the statistics of the experts before.
        sums: take methods in the form whose statistic is a sum of fixed size.

    Raises:
        CfmergeError: a number, a weight or a count of experts that a method cannot take.
    """
    named = [*before, *experts]
    depth_of = depths_of(assignments[0])
    notes = same_for_stacked_layers(assignments[0], depth_of, weights, named)
    jobs = []
    for name, assignment in assignments[0].items():
        own_sources = tuple(name if sources is None else found.get(name) for found in (sources or [{}] * len(experts)))
        own_weights: tuple[Any, ...] = ()
        if assignment.action == "merge":
            where = place(name, depth_of[name], named)
            own = [settle(each[name].method, where) for each in assignments]
            if sums or statistics is not None:
                own = [full_form(method) for method in own]
            own_weights = tuple(weight_at(w, where, expert) for w, expert in zip(weights, experts, strict=True))
            taking = {e: w for e, w, s in zip(experts, own_weights, own_sources, strict=True) if s is not None}
            for method in own:
                _check_taking(method, name, len(before) + len(taking), len(taking) < len(experts))
                check_weights(method, taking, name)
                if statistics is not None:
                    statistics.check(method, name)
            method = own[0] if len(own) == 1 else several(tuple(own))
            assignment = dataclasses.replace(assignment, method=method)
        writes = (name, *(aliases or {}).get(name, ()))
        jobs.append(Job(name, assignment, writes, own_sources, dtype_of(assignment.parameter), own_weights))
    return jobs, notes


def _check_taking(method: Method, tensor: str, count: int, partial: bool) -> None:
    try:
        check_count(method, count)
    except CfmergeError as error:
        if not partial:
            raise
        raise CfmergeError(
            f"tensor {tensor!r}: {error} that have it (the others are partial); give it another method: "
            f"{rule_option(escape(tensor), 'average')}"
        ) from None


def check_count(method: Method, count: int) -> None:
    """Raises `CfmergeError` unless the method takes that many experts."""
    least, most = method.needs.experts
    if count < least or (most is not None and count > most):
        wanted = f"{least}" if least == most else f"at least {least}" if most is None else f"{least} to {most}"
        raise CfmergeError(f"{method.name} takes {wanted} expert{'s' if wanted != '1' else ''}, found {count}")


def check_weights(method: Method, weights: Mapping[str, Any], tensor: str) -> None:
    """Raises `CfmergeError` unless the weights `{expert: weight}` have a meaning for the method."""
    if any(isinstance(weight, jax.core.Tracer) for weight in weights.values()):
        return
    for name, weight in weights.items():
        if method.needs.weights == "positive" and weight <= 0:
            raise CfmergeError(
                f"expert {name!r}: {method.name} needs positive weights, found {weight} for {tensor!r}; "
                "leave the expert out, or use task_arithmetic"
            )
        if method.needs.weights == "none" and weight != 1:
            raise CfmergeError(
                f"expert {name!r}: {method.name} knows no weights, found {weight}; leave the weight out, or choose "
                "another method"
            )
    if method.needs.normalises and weights and abs(sum(weights.values())) <= 1e-9 * sum(map(abs, weights.values())):
        raise CfmergeError(
            f"the experts' weights sum to 0, so that {method.name} of {tensor!r} is not defined: "
            + ", ".join(f"{name}: {weight}" for name, weight in weights.items())
        )


def with_ranks(jobs: Sequence[Job], experts: Sequence[Participant], sums: bool = False) -> list[Job]:
    """The jobs with the ranks of the experts' factors, as far as their sources' headers tell them.

    Args:
        sums: statistics are wanted, or come before the experts: they are of dense deltas.

    Raises:
        CfmergeError: a method needs factors that an expert does not have.
    """

    def rank(number: int, source: str | None) -> int | None:
        return experts[number].tensors.rank(source) if source is not None else None

    found = []
    for job in jobs:
        if job.assignment.action == "merge":
            ranks = tuple(rank(number, source) for number, source in enumerate(job.sources))
            own = dataclasses.replace(job, ranks=() if sums else ranks)
            if job.method.needs.factors == "required" and own.joint is None:
                _tell_missing_factors(own, [experts[number] for number in own.experts if ranks[number] is None])
            job = own
        found.append(job)
    return found


def _tell_missing_factors(job: Job, dense: Sequence[Participant]) -> None:
    who = ", ".join(one.told for one in dense) or f"a tensor of layout {job.parameter.layout!r}, or of statistics,"
    raise CfmergeError(
        f"{job.method.name} of {job.name!r} takes the factors of adapters, B and A, which {who} does not have; give "
        f"such tensors another method: {rule_option(escape(job.name), 'average')}, or peft_cat, which takes any delta"
    )


def check_moments(jobs: Sequence[Job], experts: Sequence[Participant], header: Callable[[Readable, str], Any]) -> None:
    """Raises `CfmergeError` unless every expert brings the moments that the methods need, of the right shape.

    Args:
        header: `header(moments, name)`: the array of that name or its header, None if there is none.
    """
    for job in jobs:
        needed = job.method.needs.moments if job.assignment.action == "merge" else ""
        if needed:
            for number in job.experts:
                own = experts[number].moments
                found = None if own is None else header(own, job.name)
                _check_moment(needed, job.parameter, found, job.method.name, experts[number].told)


def _check_moment(needed: str, parameter: Parameter, found: Any, method: str, who: str) -> None:
    shape: tuple[int, ...] = parameter.shape
    kind = "a diagonal Fisher"
    if needed == "input_gram":
        b, _, n = parameter.canonical
        shape, kind = ((b, n, n) if b > 1 else (n, n)), "an input Gram"
    if found is None:
        raise CfmergeError(
            f"{who}: {method} needs {kind} of {parameter.name!r}, of shape {shape}: give it (on disk 'moments: "
            "FILE' beside the expert's path, of trees moments=[...]; cfmerge.activations collects Grams), or another "
            "method for this tensor by a rule"
        )
    if tuple(found.shape) != shape:
        raise CfmergeError(f"{who}: {kind} of {parameter.name!r} has shape {tuple(found.shape)}, expected {shape}")


def as_method(method: str | Method, parameters: Mapping[str, Any] | None = None, *, composing: bool = False) -> Method:
    """The method: itself, or of the text that names it or a chain (`"trim(density=0.2) >> disjoint_mean"`).

    Raises:
        CfmergeError: unknown, or a transform alone, or parameters of a method that has its own; or a composer, unless
            `composing`.
    """
    if isinstance(method, str):
        method, parameters = registered.make(method, parameters), None
    if not isinstance(method, Method):
        raise CfmergeError(
            f"method: expected a name such as 'ace', a chain as text, or a method such as cfmerge.methods.ace(); "
            f"found {method!r}"
        )
    if parameters:
        raise CfmergeError(f"parameters {dict(parameters)}: method {method.name!r} has its own already")
    if not composing:
        check_result(method, composing=False)
    return method


def check_result(method: Method, composing: bool) -> None:
    """Raises `CfmergeError` where a method makes one checkpoint, and another result is asked for, or the other way."""
    if isinstance(method, Composer) and not composing:
        raise CfmergeError(
            f"{method.name} makes a result that is not one checkpoint: use cfmerge compose {method.name} RECIPE -o OUT "
            "(in Python cfmerge.compose.build)"
        )
    if composing and not isinstance(method, Composer):
        known = ", ".join(registered.registry("composer"))
        raise CfmergeError(f"{method.name} makes one checkpoint: use cfmerge merge; there is to compose: {known}")


def methods_of(job: Job) -> tuple[Method, ...]:
    """The job's methods, one for each result."""
    return members(job.method)
