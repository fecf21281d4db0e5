"""The tables in Markdown: each line as measured here, and below it the same line as it was published."""

from collections.abc import Mapping, Sequence
from typing import Any

from cfmerge_accuracy.published.checks import Found
from cfmerge_accuracy.published.glue import SETS
from cfmerge_accuracy.published.numbers import PUBLISHED, Published
from cfmerge_accuracy.published.suites import Line, Task
from cfmerge_accuracy.tables import number
from cfmerge_accuracy.tables import table as markdown

NOT_RUN = "not run"
TITLE = "# Published tables, measured again"


def page(texts: Sequence[str]) -> str:
    """All tables as one page."""
    return f"{TITLE}\n\nAccuracies in per cent.\n\n" + "\n".join(texts)


def table(
    found: Found, lines: Sequence[Line], tasks: Sequence[Task], rows: Sequence[Mapping[str, Any]], limit: int | None
) -> str:
    """One suite's table, with what was not run and why, and the sources of what was published."""
    suite = found.suite
    measured = {(row["line"], row["task"]): row for row in rows if row["suite"] == suite.name and row["limit"] == limit}
    shown = [*suite.counted, *(task for task in tasks if task.extra)]
    sources: dict[str, int] = {}
    body = []
    for line in lines:
        body.append([line.title, "here", *_here(line, shown, suite.counted, measured)])
        for one in PUBLISHED[suite.name].get(line.name, ()):
            mark = sources.setdefault(one.source, len(sources) + 1)
            body.append(["", f"published [{mark}]", *_published(one, shown)])
    text = f"## {suite.title}\n\n"
    if limit is not None:
        text += f"**At most {limit} examples of each task, evenly spread: these are not the published sets.**\n\n"
    text += markdown(["", "", "average", *(task.title for task in shown)], body, left=2)
    text += "\n" + "".join(f"- [{mark}]: {source}\n" for source, mark in sources.items())
    return text + _notes(found, lines, tasks, measured)


def _here(
    line: Line, shown: Sequence[Task], counted: Sequence[Task], measured: Mapping[tuple[str, str], Mapping[str, Any]]
) -> list[str]:
    found = {task.name: measured[line.name, task.name] for task in shown if (line.name, task.name) in measured}
    whole = all(task.name in found for task in counted)
    mean = sum(found[task.name]["accuracy"] for task in counted) / len(counted) if whole else None
    cells = [number(100 * found[task.name]["accuracy"]) if task.name in found else NOT_RUN for task in shown]
    return [number(100 * mean) if mean is not None else NOT_RUN, *cells]


def _published(one: Published, shown: Sequence[Task]) -> list[str]:
    return [number(one.average), *(number(one.by_task.get(task.name)) for task in shown)]


def _notes(
    found: Found,
    lines: Sequence[Line],
    tasks: Sequence[Task],
    measured: Mapping[tuple[str, str], Mapping[str, Any]],
) -> str:
    """The reasons of what was not run, each once, and data sets of another size than the published ones."""
    reasons: dict[str, None] = {}
    for line in lines:
        for task in tasks:
            if (line.name, task.name) not in measured and (why := found.why_not(line, task)):
                reasons |= dict.fromkeys(why.split("; "))
    text = "\nNot run:\n\n" + "".join(f"- {reason}\n" for reason in reasons) if reasons else ""
    sizes = [
        f"- {task.name} has {len(found.data[task.name].labels)} examples here, and {SETS[task.name].size} in GLUE\n"
        for task in tasks
        if found.suite.name == "gpt2" and task.name in found.data
        and len(found.data[task.name].labels) != SETS[task.name].size
    ]  # fmt: skip
    return text + ("\nOther data than the published sets:\n\n" + "".join(sizes) if sizes else "")
