"""What is there of a table's checkpoints and data, and what is wrong with it, from headers and labels alone."""

import dataclasses
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import cfmerge
from cfmerge import Plan
from cfmerge.errors import CfmergeError
from cfmerge.recipe import Recipe
from cfmerge_accuracy.published import clip, glue, gpt2, pictures, places
from cfmerge_accuracy.published.suites import REFERENCES, Line, Suite, Task, there
from cfmerge_accuracy.published.tensors import check_shapes


@dataclasses.dataclass
class Found:
    """The parts of a table that are there.

    Attributes:
        experts, files, data: by task: a model, the files of the data, and what they hold once it is checked.
        absent: how to fetch what is not there: by "base", ("expert", task), ("data", task).
    """

    suite: Suite
    base: Path | None = None
    experts: dict[str, Path] = dataclasses.field(default_factory=dict)
    files: dict[str, list[Path]] = dataclasses.field(default_factory=dict)
    data: dict[str, Any] = dataclasses.field(default_factory=dict)
    absent: dict[Any, str] = dataclasses.field(default_factory=dict)

    def recipe(self, line: Line) -> Recipe:
        """The recipe of a line, with the base and the experts of all tasks of the average."""
        experts = {task.name: str(self.experts[task.name]) for task in self.suite.counted}
        return line.of(str(self.base), experts, self.suite.partial)

    def why_not(self, line: Line, task: Task) -> str:
        """The reason for which a line is not run on a task; "" if it can be."""
        needs: list[Any] = [("expert", task.name)] if self.suite.name == "gpt2" or line.name == "experts" else []
        needs += ["base"]
        needs += [] if line.name in REFERENCES else [("expert", each.name) for each in self.suite.counted]
        lacking = [self.absent[need] for need in [*needs, ("data", task.name)] if need in self.absent]
        if not there(line):
            return f"this version of cfmerge has no method {line.recipe['method']}"
        return "; ".join(dict.fromkeys(lacking))


def find(suite: Suite, root: Path) -> Found:
    """The base, experts and data of a table in a folder."""
    found = Found(suite, places.find(root, suite.base))
    if found.base is None:
        found.absent["base"] = f"{suite.base[0]} is not there: {places.command(root, suite.base[0])}"
    for task in suite.tasks:
        expert = places.find(root, [task.expert])
        if expert:
            found.experts[task.name] = expert
        else:
            told = f"{task.expert} is not there: {places.command(root, task.expert)}"
            found.absent["expert", task.name] = told
        files = _files(suite, root, task)
        if files:
            found.files[task.name] = files
        else:
            found.absent["data", task.name] = _no_data(suite, root, task)
    return found


def _files(suite: Suite, root: Path, task: Task) -> list[Path]:
    names = [task.data, "GLUE"] if suite.name == "gpt2" else [task.data, task.name]
    folder = places.find(root, names, "dataset")
    if folder is None:
        return []
    return glue.files_of(folder, task.name) if suite.name == "gpt2" else pictures.files_of(folder, task.name)


def _no_data(suite: Suite, root: Path, task: Task) -> str:
    if suite.name == "gpt2":
        one = glue.SETS[task.name]
        fetch = places.command(root, task.data, "dataset", [one.pattern])
        return f"{one.split} of {task.name} is not there ({one.pattern}, or GLUE/{one.file}): {fetch}"
    inner = pictures.CONFIGS.get(task.name)
    fetch = places.command(root, task.data, "dataset", [f"{inner}/test-*"] if inner else ["*test-*"])
    return f"the test set of {task.name} is not there (test-*.parquet, or test/CLASS/IMAGE): {fetch}"


def check(found: Found, tasks: Iterable[Task], lines: Iterable[Line]) -> list[str]:
    """Every problem of what is there; reads the data on the way."""
    suite, problems = found.suite, []
    tasks = list(tasks)

    def tried(do: Callable[..., Any], *arguments: Any) -> Any:
        try:
            return do(*arguments)
        except CfmergeError as error:
            problems.append(str(error))
            return None

    base = found.base
    padding = None
    if base is not None and suite.name == "gpt2":
        tokenizer = tried(gpt2.tokenizer_of, base)
        padding = tokenizer and tokenizer.pad_token_id
    elif base is not None:
        tried(clip.check_base, base)
    shapes = tried(gpt2.shapes_of, base) if base is not None and suite.name == "gpt2" else None
    for task in suite.tasks:
        expert = found.experts.get(task.name)
        if expert and suite.name == "gpt2":
            tried(gpt2.check_expert, expert, task.name, padding)
            if shapes:
                tried(lambda expert: check_shapes(expert, gpt2.shapes_of(expert), shapes), expert)
    for task in tasks:
        if files := found.files.get(task.name):
            reader: Callable[..., Any] = glue.read if suite.name == "gpt2" else pictures.read
            found.data[task.name] = tried(reader, files, task.name)
    for line in lines if not problems else ():
        if line.name not in REFERENCES and tasks and all(not _lacks(found, line, task) for task in suite.counted):
            tried(_planned, found, line)
    return list(dict.fromkeys(problems))


def _planned(found: Found, line: Line) -> Plan:
    """The plan of a line; its problems name it."""
    try:
        return cfmerge.make_plan(found.recipe(line))
    except CfmergeError as error:
        raise CfmergeError(f"{found.suite.name}, {line.title}: {error}") from None


def _lacks(found: Found, line: Line, task: Task) -> bool:
    return not there(line) or "base" in found.absent or ("expert", task.name) in found.absent
