"""The parts of pages that come from the package, so that they cannot go stale: markers are comments in the pages.

    <!-- site: parameters -->   on `docs/methods/NAME.md`: the parameters of that method, out of the registry
    <!-- site: evidence -->     there too: its rows of `docs/results/overview.md`, beside the best of each column
    <!-- site: commands -->     every command of the command line, with its options
    <!-- site: methods -->      every method and transform with its summary and its page
"""

import functools
import re
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

MARKER = re.compile(r"^<!-- site: (\w+) -->$", re.MULTILINE)


def on_page_markdown(markdown: str, page: Any, config: Any, **_: Any) -> str:
    """The page with its markers replaced; one that is not known raises."""
    docs = Path(config.docs_dir)
    name = Path(page.file.src_uri).stem
    made: dict[str, Callable[[], str]] = {
        "parameters": lambda: parameters(name),
        "evidence": lambda: evidence(name, (docs / "results/overview.md").read_text()),
        "commands": commands,
        "methods": methods,
    }
    return MARKER.sub(lambda match: made[match[1]](), markdown)


def table(head: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    """A table in Markdown."""
    head = list(head)
    lines = [head, ["---"] * len(head), *(list(row) for row in rows)]
    return "\n".join(f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in line)} |" for line in lines)


def parameters(name: str) -> str:
    """The method's parameters, their defaults, and in which ways they may differ."""
    import cfmerge

    entry = cfmerge.methods.registry()[name]
    if not entry.signature:
        return "None."
    rows = [
        [f"`{key}`", f"`{_shown(parameter.default)}`", entry.describe(key)] for key, parameter in entry.signature.items()
    ]
    varied = {mark: [f"`{key}`" for key in entry.signature if _bears(entry.factory, key, mark)] for mark in range(2)}
    told = [table(["parameter", "default", ""], rows)]
    if varied[0]:
        link = "(../recipe.md#numbers-that-differ)"
        experts = f"; by expert too: {', '.join(varied[1])}" if varied[1] else ""
        told.append(f"[May differ]{link} by tensor, and be swept: {', '.join(varied[0])}{experts}.")
    return "\n\n".join(told)


def _shown(default: Any) -> str:
    return "none" if default is None else str(default).lower() if isinstance(default, bool) else str(default)


def _bears(factory: Callable[..., Any], key: str, number: int) -> bool:
    import typing

    from cfmerge.core.numbers import LISTED, TRACED, marked

    hints = typing.get_type_hints(factory, include_extras=True)
    return marked(hints.get(key), (TRACED, LISTED)[number])


def evidence(name: str, page: str) -> str:
    """The rows of the overview that name the method, and the best row of each column."""
    lines = [line for line in page.split("## At published defaults")[1].split("\n\n")[1].splitlines() if line]
    head, _, *rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    own = [row for row in rows if re.search(rf"(?<!\w){name}(?!\w)", row[0])]
    if not own:
        return "Not run in [our results](../results/README.md)."
    best = ["*best of each column*", *(max((row[n] for row in rows), key=_number) for n in range(1, len(head)))]
    average = [] if name == "average" else [row for row in rows if row[0] == "average"]
    shown = [[f"`{row[0]}`", *row[1:]] for row in own + [row for row in average if row not in own]]
    return (
        "Normalised accuracy at defaults (100: each expert on its own task), means over tasks and seeds of "
        f"[our small models](../results/overview.md), {len(rows)} rows in all:\n\n"
        + table(["", "mean of all", *head[2:]], [*shown, best])
    )


def _number(cell: str) -> float:
    return float(cell) if re.fullmatch(r"-?[\d.]+", cell) else float("-inf")


def methods() -> str:
    """All methods and transforms, each with a link to its page."""
    import cfmerge

    told = []
    for kind in ("method", "transform"):
        rows = [[f"[{name}]({name}.md)", entry.summary] for name, entry in cfmerge.methods.registry(kind).items()]
        told.append(f"### All {kind}s\n\n" + table([kind, ""], rows))
    return "\n\n".join(told)


@functools.cache
def commands() -> str:
    """Every command with its usage, arguments and options, in the order of `cfmerge --help`."""
    import typer.main

    from cfmerge.cli import app

    return "\n\n".join(_command(["cfmerge"], typer.main.get_command(app)))


def _command(path: list[str], command: Any) -> Iterable[str]:
    inner = getattr(command, "commands", {})
    if not inner:
        yield f"## {' '.join(path)}"
        yield " ".join(re.split(r"\n\s*\n|\f", command.help or "")[0].split())
        context = command.make_context("cfmerge", [], resilient_parsing=True)
        yield f"```\n{' '.join(path)} {' '.join(command.collect_usage_pieces(context))}\n```"
        rows = [row for parameter in command.params if not getattr(parameter, "hidden", False)
                for row in [_option(parameter)]]  # fmt: skip
        yield table(["option", "value", ""], rows)
        examples = re.findall(r"cfmerge [^\n\x08]+", command.epilog or "")
        if examples:
            yield "```sh\n" + "\n".join(" ".join(line.split()) for line in examples) + "\n```"
    for name, one in inner.items():
        yield from _command([*path, name], one)


def _option(parameter: Any) -> list[str]:
    names = parameter.opts if parameter.param_type_name == "option" else [parameter.make_metavar_shown()] \
        if hasattr(parameter, "make_metavar_shown") else [parameter.metavar or parameter.name.upper()]  # fmt: skip
    value = "" if getattr(parameter, "is_flag", False) or parameter.param_type_name == "argument" else (
        parameter.metavar or parameter.type.name.upper()
    )
    return [", ".join(f"`{name}`" for name in names), f"`{value}`" if value else "", parameter.help or ""]
