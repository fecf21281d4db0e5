"""The run: check everything, then merge and evaluate line by line, keeping each number as it comes."""

import dataclasses
import hashlib
import importlib.util
import json
import shutil
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import cfmerge
from cfmerge.errors import CfmergeError, nearest
from cfmerge.products.stages import is_made
from cfmerge_accuracy.published import checks, clip, glue, gpt2, pictures, places, tables
from cfmerge_accuracy.published.checks import Found
from cfmerge_accuracy.published.gpt2 import Counted
from cfmerge_accuracy.published.suites import REFERENCES, SUITES, Line, Suite, Task, setting

ROWS = "rows.jsonl"
OF_A_ROW = {"suite", "line", "task", "limit", "mark", "accuracy"}
Report = Callable[[str], None]


@dataclasses.dataclass(frozen=True)
class Options:
    """What is run: none of `suites`, `tasks`, `lines` means all of them.

    Attributes:
        limit: examples of each task, evenly spread.
        only_check: check what is there, and stop.
    """

    checkpoints: Path
    output: Path
    suites: Sequence[str] = ()
    tasks: Sequence[str] = ()
    lines: Sequence[str] = ()
    limit: int | None = None
    batch: int = 32
    device: str = "auto"
    only_check: bool = False


class Evaluator(Protocol):
    """Right answers of a model on a task; of None the task's own expert's."""

    def count(self, model: Path | None, task: Task) -> Counted: ...


def run(options: Options, report: Report) -> list[str]:
    """The tables as Markdown, a text for each suite; they are in the output's README.md too.

    Raises:
        CfmergeError: unknown names, or something that is there and wrong; nothing has been evaluated then.
    """
    chosen = _chosen(options)
    for option, value in (("--limit", options.limit), ("--batch", options.batch)):
        if value is not None and value < 1:
            raise CfmergeError(f"{option} {value}: must be at least 1")
    if not options.checkpoints.is_dir():
        raise CfmergeError(f"--checkpoints {options.checkpoints}: there is no such directory")
    if not options.only_check:
        _check_output(options.output)
    everything = [(checks.find(suite, options.checkpoints), tasks, lines) for suite, tasks, lines in chosen]
    if any(found.base for found, _, _ in everything):
        _check_libraries()
    problems = [problem for parts in everything for problem in checks.check(*parts)]
    if problems:
        raise CfmergeError("nothing was evaluated:\n" + "\n".join(f"  {problem}" for problem in problems))
    for found, tasks, lines in everything:
        cells = [not found.why_not(line, task) for line in lines for task in tasks]
        report(f"{found.suite.title}: {sum(cells)} of {len(cells)} numbers can be had; headers and labels are in order")
    if not options.only_check:
        _make(options.output)
        for found, tasks, lines in everything:
            _evaluate(found, tasks, lines, options, report)
    rows = kept(options.output / ROWS)
    texts = [
        tables.table(found, lines, tasks, _of_these(found, rows), options.limit) for found, tasks, lines in everything
    ]
    if not options.only_check:
        (options.output / "README.md").write_text(tables.page(texts))
    return texts


def _check_output(output: Path) -> None:
    """Raises `CfmergeError` if the output is no directory, or has a README.md of another's."""
    if output.exists() and not output.is_dir():
        raise CfmergeError(f"output {output}: cannot be a directory for results: it is a file")
    page = output / "README.md"
    if page.exists() and not page.read_text(errors="replace").startswith(tables.TITLE):
        raise CfmergeError(f"{page}: is not a page of these tables, and would be overwritten; give another -o")


def _make(output: Path) -> None:
    """Makes the output's directory; raises `CfmergeError` if it cannot be made."""
    try:
        output.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise CfmergeError(f"output {output}: cannot be a directory for results: {error}") from None


def _check_libraries() -> None:
    missing = [name for name in ("torch", "transformers") if importlib.util.find_spec(name) is None]
    if missing:
        raise CfmergeError(f"models are evaluated by {' and '.join(missing)}: pip install 'cfmerge[bench]'")


def _chosen(options: Options) -> list[tuple[Suite, list[Task], list[Line]]]:
    """The suites with the tasks and lines that are asked for.

    Raises:
        CfmergeError: a name that no suite has.
    """
    suites = [SUITES[name] for name in known("--suite", options.suites, SUITES)] or list(SUITES.values())
    known("--task", options.tasks, [task.name for suite in suites for task in suite.tasks])
    known("--row", options.lines, [line.name for suite in suites for line in suite.lines])
    chosen = []
    for suite in suites:
        tasks = [task for task in suite.tasks if task.name in options.tasks or (not options.tasks and not task.extra)]
        lines = [line for line in suite.lines if line.name in (options.lines or [line.name])]
        if tasks:
            chosen.append((suite, tasks, lines))
    return chosen


def known(option: str, names: Sequence[str], options: Iterable[str]) -> Sequence[str]:
    """The names, all of which are among the options; raises `CfmergeError` otherwise."""
    options = list(options)
    for name in names:
        if name not in options:
            raise CfmergeError(f"{option} {name!r}: there is no such name{nearest(name, options)}")
    return names


def kept(path: Path) -> list[dict[str, Any]]:
    """The rows of earlier runs; a line that was cut off, or is none of ours, is left out."""
    rows = []
    for line in path.read_text(errors="replace").splitlines() if path.is_file() else ():
        try:
            row = json.loads(line)
        except ValueError:
            continue
        if isinstance(row, dict) and row.keys() >= OF_A_ROW:
            rows.append(row)
    return rows


def _evaluate(found: Found, tasks: list[Task], lines: list[Line], options: Options, report: Report) -> None:
    """Adds the numbers that are not there yet to the file of rows."""
    path = options.output / ROWS
    marks = _marks(found)
    evaluator: Evaluator | None = None
    for line in lines:
        there = {(row["suite"], row["line"], row["task"], row["limit"], row["mark"]) for row in kept(path)}
        wanted = {
            task.name: row for task in tasks
            if not found.why_not(line, task) and (row := _row(found, line, task, marks, options.limit)) and
            (found.suite.name, line.name, task.name, options.limit, row["mark"]) not in there
        }  # fmt: skip
        if not wanted:
            continue
        evaluator = evaluator or evaluator_of(found, options)
        model = _model(found, line, options.output, report)
        for name, row in wanted.items():
            counted = evaluator.count(model, found.suite.task(name))
            row |= {"accuracy": counted.accuracy, **counted._asdict()}
            with path.open("a") as file:
                file.write(("" if _ends_a_line(path) else "\n") + json.dumps(row) + "\n")
            report(
                f"{line.title}, {name}: {100 * counted.accuracy:.1f} ({counted.examples} examples, "
                f"{counted.examples / max(counted.seconds, 1e-9):.1f} a second)"
            )
        if line.name not in REFERENCES and model is not None:
            shutil.rmtree(model)


def _ends_a_line(path: Path) -> bool:
    """Whether the next line may follow: a run that was killed may have left half a one."""
    with path.open("rb") as file:
        size = file.seek(0, 2)
        file.seek(max(size - 1, 0))
        return file.read() in {b"", b"\n"}


def _row(found: Found, line: Line, task: Task, marks: Mapping[Any, str], limit: int | None) -> dict[str, Any]:
    """A row without its numbers; its mark is another one where models, data or settings are."""
    needs: list[Any] = ["base", ("expert", task.name), ("data", task.name)]
    if line.name not in REFERENCES:
        needs += [("expert", each.name) for each in found.suite.counted]
    told = json.dumps([setting(line), *(marks.get(need, "") for need in needs)])
    mark = hashlib.sha256(told.encode()).hexdigest()[:16]
    row = {"suite": found.suite.name, "line": line.name, "task": task.name, "limit": limit, "mark": mark}
    return row | {"cfmerge": cfmerge.__version__}


def _of_these(found: Found, rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """The rows of a suite but for those of other models, data or settings than are there now."""
    marks, suite = _marks(found), found.suite
    lines, tasks = {line.name: line for line in suite.lines}, {task.name: task for task in suite.tasks}
    kept_rows = []
    for row in rows:
        if row["suite"] == suite.name and row["line"] in lines and row["task"] in tasks:
            line, task = lines[row["line"]], tasks[row["task"]]
            if found.why_not(line, task) or _row(found, line, task, marks, None)["mark"] == row["mark"]:
                kept_rows.append(row)
    return kept_rows


def _marks(found: Found) -> dict[Any, str]:
    """A hash of each model's files, and of each data set's."""
    models: dict[Any, Path] = {("expert", task): path for task, path in found.experts.items()}
    if found.base is not None:
        models["base"] = found.base
    marks: dict[Any, str] = {key: places.mark(places.files_of(path)) for key, path in models.items()}
    return marks | {("data", task): places.mark(files) for task, files in found.files.items()}


def _model(found: Found, line: Line, output: Path, report: Report) -> Path | None:
    """The model of a line, merged if need be; None for the experts."""
    if line.name in REFERENCES:
        return found.base if line.name == "base" else None
    place = output / "models" / f"{found.suite.name}-{line.name}"
    plan = cfmerge.make_plan(found.recipe(line))
    if not is_made(plan, place):
        result = plan.run(place, overwrite=place.exists())
        report(f"{line.title}: merged in {result.seconds:.0f} s")
    return place


def evaluator_of(found: Found, options: Options) -> Evaluator:
    """The evaluator of a suite, on the device that is asked for."""
    import torch

    device = options.device
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    kind = Texts if found.suite.name == "gpt2" else Images
    return kind(found, options.limit, options.batch, device)


class Texts:
    """GPT-2 on GLUE; see `gpt2`."""

    def __init__(self, found: Found, limit: int | None, batch: int, device: str) -> None:
        assert found.base is not None
        self.found, self.limit, self.batch, self.device = found, limit, batch, device
        self.tokenizer = gpt2.tokenizer_of(found.base)

    def count(self, model: Path | None, task: Task) -> Counted:
        expert, examples = self.found.experts[task.name], self.found.data[task.name]
        numbers = glue.spread(len(examples.labels), self.limit)
        some = glue.Examples([examples.texts[n] for n in numbers], [examples.labels[n] for n in numbers])
        made = gpt2.classifier(gpt2.trunk_of(model or expert), expert, self.tokenizer.pad_token_id)
        order = gpt2.order_of(gpt2.config_of(expert), task.name, expert)
        return gpt2.count(made, self.tokenizer, some, order, self.batch, self.device)


class Images:
    """CLIP on images; see `clip`."""

    def __init__(self, found: Found, limit: int | None, batch: int, device: str) -> None:
        assert found.base is not None
        self.found, self.limit, self.batch = found, limit, batch
        self.clip = clip.Clip(found.base, device)

    def count(self, model: Path | None, task: Task) -> Counted:
        data = self.found.data[task.name]
        self.clip.encode_by(clip.encoder_of(model or self.found.experts[task.name]))
        numbers = glue.spread(len(data.labels), self.limit)
        return self.clip.count(task.name, pictures.classes_of(task.name), data, numbers, self.batch)
