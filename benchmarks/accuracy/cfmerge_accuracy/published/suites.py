"""GPT-2 on GLUE and CLIP on images: tasks, checkpoints, data, and the lines of the tables."""

from collections.abc import Mapping
from typing import Any, NamedTuple

import msgspec

import cfmerge
from cfmerge.recipe import Recipe, parse, shipped

REFERENCES = ("experts", "base")  # lines that merge nothing


class Task(NamedTuple):
    """A task: its name, its title in tables, the expert and the data set on the hub."""

    name: str
    title: str
    expert: str
    data: str
    extra: bool = False  # not run unless it is asked for, and not in the average


class Line(NamedTuple):
    """A line of a table: a recipe but for base and experts, by its keys; `{}` for experts and base."""

    name: str
    title: str
    recipe: Mapping[str, Any]

    def of(self, base: str, experts: Mapping[str, str], partial: bool) -> Recipe:
        """The recipe that merges these experts by it."""
        named = [{"name": task, "path": path, "partial": partial} for task, path in experts.items()]
        return parse({**self.recipe, "base": base, "experts": named}, self.name)


class Suite(NamedTuple):
    """A table: the names that its base has on the hub, its tasks and lines; experts may be `partial` models."""

    name: str
    title: str
    base: tuple[str, ...]
    tasks: tuple[Task, ...]
    lines: tuple[Line, ...]
    partial: bool

    def task(self, name: str) -> Task:
        return next(task for task in self.tasks if task.name == name)

    @property
    def counted(self) -> tuple[Task, ...]:
        """The tasks of the average."""
        return tuple(task for task in self.tasks if not task.extra)


def _own(name: str) -> dict[str, Any]:
    """The keys of a recipe that comes with cfmerge."""
    return {key: value for key, value in shipped(name).content.items() if key != "base"}


def _lines(scale: float, tables: tuple[str, ...], published: str, common: Mapping[str, Any]) -> tuple[Line, ...]:
    """The lines of a table; `tables` are matrices where a method is run as its published code is."""
    matrices = [{"match": match, "kind": "matrix", "layout": "oi"} for match in tables]
    return (
        Line("experts", "experts", {}),
        Line("base", "base", {}),
        Line("average", "average", {"method": "average", **common}),
        Line(
            "task_arithmetic",
            f"task arithmetic, {scale}",
            {"method": "task_arithmetic", "parameters": {"scale": scale}, **common},
        ),
        Line("tsv_m", "TSV-M", {"method": "tsv_m", "rules": matrices, **common}),
        Line("ace_published", "ACE as published", {**_own(published), **common}),
        Line("ace", "ACE by default", {"method": "ace", **common}),
        Line("auto", "auto", {"method": "auto", **common}),
    )


GLUE = {
    "cola": "CoLA", "mnli": "MNLI", "mrpc": "MRPC", "qnli": "QNLI", "qqp": "QQP", "rte": "RTE", "sst2": "SST-2",
}  # fmt: skip
IMAGES = {
    "sun397": ("SUN397", "tanganke/sun397"), "stanford-cars": ("Cars", "tanganke/stanford_cars"),
    "resisc45": ("RESISC45", "tanganke/resisc45"), "eurosat": ("EuroSAT", "tanganke/eurosat"),
    "svhn": ("SVHN", "ufldl-stanford/svhn"), "gtsrb": ("GTSRB", "tanganke/gtsrb"),
    "mnist": ("MNIST", "ylecun/mnist"), "dtd": ("DTD", "tanganke/dtd"),
}  # fmt: skip

GPT2 = Suite(
    "gpt2",
    "GPT-2, seven tasks of GLUE",
    ("openai-community/gpt2", "gpt2"),
    (
        *(Task(name, title, f"tanganke/gpt2_{name}", "nyu-mll/glue") for name, title in GLUE.items()),
        Task("mnli-matched", "MNLI matched", "tanganke/gpt2_mnli", "nyu-mll/glue", extra=True),
    ),
    _lines(0.5, ("*wte.weight", "*wpe.weight"), "ace-published-gpt2", {"heads": "keep-base"}),
    partial=False,
)
CLIP = Suite(
    "clip",
    "CLIP ViT-B/16, eight tasks of images",
    ("openai/clip-vit-base-patch16",),
    tuple(Task(name, title, f"tanganke/clip-vit-base-patch16_{name}", data) for name, (title, data) in IMAGES.items()),
    _lines(0.3, ("*position_embedding.weight",), "ace-published-clip", {}),
    partial=True,
)
SUITES = {suite.name: suite for suite in (GPT2, CLIP)}


def there(line: Line) -> bool:
    """Whether this version of cfmerge has the method of a line."""
    return not line.recipe or line.recipe["method"] in cfmerge.methods.registry("method", "transform", "composer")


def setting(line: Line) -> str:
    """The recipe of a line as a text that does not depend on where the models are."""
    return msgspec.json.encode(dict(line.recipe), order="sorted").decode()
