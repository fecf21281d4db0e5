"""The files that a report is about: whether a merge's inputs are still there and the same, sizes, headers."""

import dataclasses
import threading
from collections.abc import Sequence
from pathlib import Path

from cfmerge.errors import CfmergeError
from cfmerge.formats import open_checkpoint
from cfmerge.models import classify
from cfmerge.planning.experts import open_expert
from cfmerge.products.hashes import sha256
from cfmerge.products.plan import Plan
from cfmerge.recipe import Recipe
from cfmerge.report.card import inputs
from cfmerge.report.page.merge import Input, Tensor

CARD = "README.md"
SAME, OTHER, GONE, NEW = "unchanged", "other content", "not there", "not in the card"


def unreadable(recipe: Recipe) -> dict[str, str]:
    """`{role: why}` of the models that cannot be opened."""
    wrong: dict[str, str] = {}
    base = None
    try:
        base = open_checkpoint(recipe.base, cache_dir=recipe.cache_dir)
    except CfmergeError as error:
        wrong["base"] = f"base: {error}"
    for spec in recipe.resolved_experts(0):
        try:
            if base is None:
                open_checkpoint(spec.adapter or spec.path, cache_dir=recipe.cache_dir)
            else:
                open_expert(spec, base, recipe)
        except CfmergeError as error:
            wrong[spec.name] = f"{spec.name}: {error}"
    return wrong


def compared(told: Sequence[Input], plan: Plan) -> list[Input]:
    """The files that the card tells of, each with its state now, and files that it does not tell of.

    Names need not be told apart by their role alone (an expert may be called "base"), so files of one name are taken in
    the card's order.
    """
    if not told:
        return []
    files = dict.fromkeys(file for model in (plan.base, *plan.experts) for file in model.files)
    digests = {file: sha256(file, threading.Event()) for file in files}
    now: dict[tuple[str, str], list[Input]] = {}
    for role, weight, name, digest in inputs(plan, digests):
        now.setdefault((role, name), []).append(Input(role, weight, name, digest.strip("`"), NEW))

    def state(one: Input) -> str:
        there = now.get((one.role, one.file))
        return GONE if not there else SAME if there.pop(0).digest == one.digest else OTHER

    found = [dataclasses.replace(one, state=state(one)) for one in told]
    return [*found, *(one for left in now.values() for one in left)]


def files_of(plan: Plan) -> list[tuple[str, str, Path]]:
    """Role, weight and path of every input file."""
    files = list(dict.fromkeys(file for model in (plan.base, *plan.experts) for file in model.files))
    return [(role, weight, Path(path.strip("`"))) for role, weight, _, path in inputs(plan, {f: str(f) for f in files})]


def tensors_of(path: Path) -> list[Tensor]:
    """The tensors of a merged model; none if it is not read as one, such as an adapter."""
    try:
        model = open_checkpoint(path)
    except CfmergeError:
        return []
    headers = {name: (info.shape, info.dtype.name) for name, info in model.tensors.items()}
    return [
        Tensor(name, str(one.kind), one.shape, str(one.dtype), "")
        for name, one in classify(headers, model.config).items()
    ]


def size_of(path: Path) -> str:
    """The size of a model's files but for its card."""
    files = [file for file in path.rglob("*") if file.is_file() and file.name != CARD] if path.is_dir() else [path]
    return f"{size(sum(file.stat().st_size for file in files))} in {len(files)} file{'s' if len(files) != 1 else ''}"


def size(count: float) -> str:
    for unit in ("bytes", "kB", "MB", "GB"):
        if count < 1000:
            return f"{count:.0f} {unit}" if unit == "bytes" else f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:.1f} TB"
