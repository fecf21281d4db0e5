"""Checks that look at values: finite tensors, ties, integers that must agree, models that are the same."""

from collections.abc import Mapping
from typing import Any

import numpy as np

from cfmerge.engine.units import Unit
from cfmerge.engine.work import Job, Readable, Work
from cfmerge.errors import CfmergeError, NonFiniteError
from cfmerge.parameters import Kind, is_float


def check_finite(unit: Unit, base: Any, expert: int | None, flags: np.ndarray) -> None:
    """Raises `NonFiniteError` unless all flags of a unit's tensors are set.

    Args:
        base: the unit's base, which is to blame where it is not finite itself.
        expert: number of the expert that the flags are about; None: the base or the merged tensors.
    """
    if flags.all():
        return
    number, work = int(np.argmin(flags)), unit.work
    name = unit.jobs[number].name
    who, source = (work.experts[expert].told, work.experts[expert].name) if expert is not None else ("", "")
    if not np.isfinite(np.asarray(base[number], np.float32)).all():
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
            if job.parameter.kind is not Kind.OTHER and not np.isfinite(stored).all():
                raise NonFiniteError(
                    f"{work.base.told}: tensor {job.name!r} holds NaN or infinity", source="", tensor=job.name
                )
            if not (np.isfinite(cast) | ~np.isfinite(stored)).all():
                raise NonFiniteError(
                    f"{work.base.told}: tensor {job.name!r} does not fit {job.dtype.name}; use another --dtype",
                    source="", tensor=job.name,
                )  # fmt: skip
    if job.assignment.agree:
        for expert, source in zip(work.experts, job.sources, strict=True):
            if source is not None and not np.array_equal(expert.tensors.read(source), base):
                raise CfmergeError(
                    f"{expert.told}: integers {source!r} ({base.dtype.name}) differ from the "
                    f"base's, and integers are not merged; a rule 'match: \"{job.name}\", method: keep-base' keeps "
                    "the base's"
                )
    return kept


def check_ties(work: Work, job: Job) -> None:
    """Raises `CfmergeError` unless tensors that a config ties are the same where they are stored twice."""
    models = [(work.base, job.name)]
    models += [(expert, source) for expert, source in zip(work.experts, job.sources, strict=True) if source is not None]
    for model, name in models:
        checkpoint: Any = model.tensors
        for alias, target in checkpoint.ties.items():
            stored = alias in checkpoint.tensors and target == name
            if stored and not _same_bits(checkpoint.read(alias), checkpoint.read(name)):
                raise CfmergeError(
                    f"{model.told}: {alias!r} and {name!r} are tied by its config.json, but differ; "
                    "set tie_word_embeddings to false there, in the base and all experts alike"
                )


def same_content(a: Readable, b: Readable, names: Mapping[str, str]) -> bool:
    """Whether two models are the same in every tensor; stops at the first difference, embeddings last.

    Args:
        names: `{name in a: name in b}`.
    """
    return all(
        _same_bits(a.read(name), b.read(names[name])) for name in sorted(names, key=lambda name: "embed" in name)
    )


def _same_bits(a: np.ndarray, b: np.ndarray) -> bool:
    """Piece by piece: a comparison makes an array of booleans."""
    if a.dtype != b.dtype or a.shape != b.shape:
        return False
    a, b = a.reshape(-1).view(np.uint8), b.reshape(-1).view(np.uint8)
    piece = 1 << 22
    return all(np.array_equal(a[i : i + piece], b[i : i + piece]) for i in range(0, a.size, piece))
