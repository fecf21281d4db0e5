"""Checks that look at values: finite tensors, ties, integers that must agree, models that are the same."""

from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np

from cfmerge.engine.units import Unit
from cfmerge.errors import CfmergeError, NonFiniteError
from cfmerge.models import Kind, is_float
from cfmerge.models.patterns import escape
from cfmerge.planning.ties import same_bits
from cfmerge.planning.work import Job, Readable, Work
from cfmerge.recipe import rule_option


def check_finite(unit: Unit, base: Any, expert: int | None, flags: np.ndarray) -> None:
    """Raises `NonFiniteError` unless all flags of a unit's tensors are set.

    Args:
        base: the unit's base, which is to blame where it is not finite itself.
        expert: number of the expert that the flags are about; None: the base or the merged tensors.
    """
    if flags.all():
        return
    whole = [bool(flags[span].all()) for span in unit.spans]
    if all(whole):  # rows that only fill up
        return
    number, work = whole.index(False), unit.work
    name = unit.jobs[number].name
    who, source = (work.experts[expert].told, work.experts[expert].name) if expert is not None else ("", "")
    if not jnp.isfinite(base[unit.spans[number]]).all():
        who, source = work.base.told, ""
    if not who:
        wider = ", or --dtype float32" if work.from_files else ""
        raise NonFiniteError(
            f"merged tensor {name!r} holds NaN or infinity in {unit.jobs[number].dtype.name}: nothing was written; "
            f"a smaller scale, another method for it{wider} may help",
            source="", tensor=name,
        )  # fmt: skip
    skip = ", or pass --on-nonfinite skip-expert" if source and work.from_files else ""
    raise NonFiniteError(
        f"{who}: tensor {name!r} holds NaN or infinity. Repair or leave out that model{skip}",
        source=source, tensor=name,
    )  # fmt: skip


def kept_tensor(work: Work, job: Job) -> np.ndarray:
    """The base's tensor in the output's dtype, after the checks that a kept tensor needs."""
    base = work.base.tensors.read(job.name)
    with np.errstate(over="ignore"):  # found below
        kept = base.astype(job.dtype, copy=False)
    if is_float(base.dtype.name):
        pieces = max(1, base.size >> 22)
        for stored, cast in zip(*(np.array_split(a.reshape(-1), pieces) for a in (base, kept)), strict=True):
            if job.parameter.kind not in {Kind.OTHER, Kind.VECTOR} and not np.isfinite(stored).all():
                raise NonFiniteError(
                    f"{work.base.told}: tensor {job.name!r} holds NaN or infinity", source="", tensor=job.name
                )
            if not (np.isfinite(cast) | ~np.isfinite(stored)).all():
                raise NonFiniteError(
                    f"{work.base.told}: tensor {job.name!r} does not fit {job.dtype.name}; use another --dtype",
                    source="", tensor=job.name,
                )  # fmt: skip
    check_agreement(work, job, base)
    return kept


def check_agreement(work: Work, job: Job, base: np.ndarray) -> None:
    """Raises `CfmergeError` where an expert differs from the base in a tensor that is not merged."""
    for expert, source in zip(work.experts, job.sources, strict=True) if job.assignment.agree else ():
        if source is not None and not np.array_equal(expert.tensors.read(source), base):
            kind = "integers" if np.issubdtype(base.dtype, np.integer) else "values"
            raise CfmergeError(
                f"{expert.told}: {kind} {source!r} ({base.dtype.name}) differ from the base's, and {kind} of this "
                f"dtype are not merged; to keep the base's: {rule_option(escape(job.name), 'keep-base')}"
            )


def same_content(a: Readable, b: Readable, names: Mapping[str, str]) -> bool:
    """Whether two models are the same in every tensor; stops at the first difference, embeddings last.

    Args:
        names: `{name in a: name in b}`.
    """
    return all(same_bits(a.read(name), b.read(names[name])) for name in sorted(names, key=lambda name: "embed" in name))
