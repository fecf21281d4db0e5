"""The parts of pages that come from the package, so that they cannot go stale: markers are comments in the pages.

<!-- site: parameters -->   on `docs/methods/NAME.md`: the parameters of that method, out of the registry
<!-- site: facts -->        there too: on which tensors it works, what it holds, what it asks for
<!-- site: evidence -->     there too: its rows of `docs/results/overview.md`, beside the best of each column
<!-- site: commands -->     every command of the command line, with its options
<!-- site: public ROOM -->  the public names of `cfmerge.ROOM`, or without a room of `cfmerge`, for mkdocstrings
<!-- site: factories -->    the registered methods and transforms, likewise
"""

import functools
import importlib
import re
import types
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

MARKER = re.compile(r"^<!-- site: (\w+) ?(\w*) -->$", re.MULTILINE)


def on_page_markdown(markdown: str, page: Any, config: Any, **_: Any) -> str:
    """The page with its markers replaced; one that is not known raises."""
    docs = Path(config.docs_dir)
    name = Path(page.file.src_uri).stem
    made: dict[str, Callable[[str], str]] = {
        "parameters": lambda _: parameters(name),
        "facts": lambda _: facts(name),
        "evidence": lambda _: evidence(name, (docs / "results/overview.md").read_text()),
        "commands": lambda _: commands(),
        "public": public,
        "factories": lambda _: objects("cfmerge.methods", registered()),
    }
    return MARKER.sub(lambda match: made[match[1]](match[2]), markdown)


def table(head: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    """A table in Markdown."""
    head = list(head)
    lines = [head, ["---"] * len(head), *(list(row) for row in rows)]
    return "\n".join(f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in line)} |" for line in lines)


SCOPES = {
    "matrix": "matrices and convolutions; other tensors get the mean of the deltas",
    "tensor": "whole tensors of any shape",
    "entry": "tensors of any shape, entry by entry",
}


def facts(name: str) -> str:
    """What the method, at its defaults, says of itself in the fields of `Method` and `Needs`."""
    from cfmerge.core.part import Method

    part = cfmerge_methods().registry()[name].factory()
    needs = part.needs
    told = ["Method" if isinstance(part, Method) else "Transform", SCOPES[needs.scope]]
    least, most = needs.experts
    if isinstance(part, Method) and most != 1:
        streamed = "experts are streamed, can be added and [forgotten](../statistics.md)"
        told.append(streamed if part.additive else "no sum over the experts")
    if most == 1 or least > 1:
        told.append("one expert" if most == 1 else f"{least} experts" if most == least else f"at least {least} experts")
    if needs.weights != "any":
        told.append({"none": "weights have no meaning", "positive": "weights must be positive"}[needs.weights])
    if needs.moments:
        told.append("a [measurement](measured.md) of each expert")
    if part.survey is not None or getattr(part, "chooses", False):
        told.append("reads the files more than once")
    if needs.ordered:
        told.append("the experts' order counts")
    if needs.random:
        told.append("random, by the seed")
    if part.joint:
        told.append("adapters at the cost of [their ranks](adapters.md)")
    return "*" + " · ".join(told) + ".*"


def cfmerge_methods() -> Any:
    import cfmerge

    return cfmerge.methods


def parameters(name: str) -> str:
    """The method's parameters, their defaults, and in which ways they may differ."""
    entry = cfmerge_methods().registry()[name]
    if not entry.signature:
        return "None."
    rows = [
        [f"`{key}`", f"`{_shown(parameter.default)}`", entry.describe(key)]
        for key, parameter in entry.signature.items()
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


def registered() -> list[str]:
    return list(cfmerge_methods().registry())


def public(room: str) -> str:
    """The public functions and classes of a room; of methods, those with which methods are written."""
    import cfmerge

    module = importlib.import_module(f"cfmerge.{room}") if room else cfmerge
    names = cfmerge.__all__ if not room else vars(module)
    found = {name: getattr(module, name) for name in names if not name.startswith("_")}
    own = [
        name
        for name, value in found.items()
        if not isinstance(value, types.ModuleType)
        and (not room or getattr(value, "__module__", "").startswith("cfmerge."))
        and not (room == "methods" and name in registered())
    ]
    return objects(module.__name__, own)


def objects(module: str, names: Iterable[str]) -> str:
    """The names as mkdocstrings takes them."""
    return "\n\n".join(f"::: {module}.{name}" for name in names)


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
    value = (
        ""
        if getattr(parameter, "is_flag", False) or parameter.param_type_name == "argument"
        else (parameter.metavar or parameter.type.name.upper())
    )
    return [", ".join(f"`{name}`" for name in names), f"`{value}`" if value else "", parameter.help or ""]
