"""The parts of pages that come from the package, so that they cannot go stale: markers are comments in the pages.

<!-- site: facts -->        on `docs/methods/NAME.md`: the tensors that it takes, and all that it asks for
<!-- site: parameters -->   there too: the parameters of that method, out of the registry
<!-- site: evidence -->     there too: its rows of `docs/results/overview.md`, beside the best of each column
<!-- site: commands -->     every command of the command line, with its options
<!-- site: public ROOM -->  the public names of `cfmerge.ROOM`, or without a room of `cfmerge`, for mkdocstrings
<!-- site: factories -->    the registered methods and transforms, likewise
"""

import functools
import importlib
import re
import types
import typing
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

MARKER = re.compile(r"^<!-- site: (\w+) ?(\w*) -->$", re.MULTILINE)
SCOPES = {
    "matrix": "matrices and convolutions; other tensors get the mean of the deltas",
    "tensor": "whole tensors of any shape",
    "entry": "tensors of any shape, entry by entry",
}


def on_page_markdown(markdown: str, page: Any, config: Any, **_: Any) -> str:
    """The page with its markers replaced; one that is not known raises."""
    name = Path(page.file.src_uri).stem
    overview = Path(config.docs_dir) / "results/overview.md"
    made: dict[str, Callable[[str], str]] = {
        "facts": lambda _: facts(name),
        "parameters": lambda _: parameters(name),
        "evidence": lambda _: evidence(name, overview.read_text()),
        "commands": lambda _: commands(),
        "public": public,
        "factories": lambda _: objects("cfmerge.methods", registry()),
    }
    return MARKER.sub(lambda match: made[match[1]](match[2]), markdown)


def registry() -> dict[str, Any]:
    """The registered methods and transforms; imported here, so that a page without them needs no JAX."""
    return importlib.import_module("cfmerge").methods.registry()


def table(head: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    """A table in Markdown."""
    titles = list(head)
    lines = [titles, ["---"] * len(titles), *(list(row) for row in rows)]
    return "\n".join(f"| {' | '.join(re.sub(r'[|]', r'&#124;', cell) for cell in line)} |" for line in lines)


# --- a method's page ------------------------------------------------------------------------------------------------


def facts(name: str) -> str:
    """All that the method, at its defaults, says of itself in the fields of `Method` and `Needs`, in one line."""
    from cfmerge.core.part import Method

    part = registry()[name].factory()
    needs = part.needs
    told = ["Method" if isinstance(part, Method) else "Transform", SCOPES[needs.scope]]
    least, most = needs.experts
    if isinstance(part, Method) and most != 1:
        streamed = "experts are streamed, can be added and [forgotten](../statistics.md)"
        told.append(streamed if part.additive else "no sum over the experts")
    if most == 1 or least > 1:
        told.append("one expert" if most == 1 else f"{least} experts" if most == least else f"at least {least} experts")
    weights = {"none": "weights have no meaning", "positive": "weights must be positive"}
    conditions = {
        weights.get(needs.weights, ""): needs.weights != "any",
        "a [measurement](measured.md) of each expert": needs.moments,
        "reads the files more than once": part.survey is not None or getattr(part, "chooses", False),
        "the experts' order counts": needs.ordered,
        "random, by the seed": needs.random,
        "adapters at the cost of [their ranks](adapters.md)": part.joint,
    }
    return f"*{' · '.join([*told, *(fact for fact, holds in conditions.items() if holds)])}.*"


def parameters(name: str) -> str:
    """The method's parameters, their defaults, and in which ways they may differ."""
    from cfmerge.core.numbers import LISTED, TRACED, marked

    entry = registry()[name]
    shown = {key: _shown(parameter.default) for key, parameter in entry.signature.items()}
    told = [table(["parameter", "default", ""], ([f"`{k}`", f"`{v}`", entry.describe(k)] for k, v in shown.items()))]
    hints = typing.get_type_hints(entry.factory, include_extras=True)
    differ, listed = ([f"`{key}`" for key in shown if marked(hints.get(key), mark)] for mark in (TRACED, LISTED))
    if differ:
        experts = f"; by expert too: {', '.join(listed)}" if listed else ""
        told.append(
            f"[May differ](../recipe.md#numbers-that-differ) by tensor, be swept: {', '.join(differ)}{experts}."
        )
    return "\n\n".join(told)


def _shown(default: Any) -> str:
    return "none" if default is None else str(default).lower() if isinstance(default, bool) else str(default)


def evidence(name: str, page: str) -> str:
    """The rows of the overview that name the method, and the best of each column."""
    lines = page.split("## At published defaults")[1].split("\n\n")[1].splitlines()
    head, _, *rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines if line]
    own = [row for row in rows if re.search(rf"(?<!\w){name}(?!\w)", row[0])]
    if not own:
        return "It was not run in them."
    beside = [row for row in rows if row[0] == "average" and row not in own]
    best = (max((row[column] for row in rows), key=_number) for column in range(1, len(head)))
    return (
        "Normalised accuracy at defaults (100: each expert on its own task), means over tasks and seeds, out of "
        f"{len(rows)} rows of [the overview](../results/overview.md):\n\n"
    ) + table(
        ["", "mean of all", *head[2:]],
        [*([f"`{row[0]}`", *row[1:]] for row in own + beside), ["*best of each column*", *best]],
    )


def _number(cell: str) -> float:
    return float(cell) if re.fullmatch(r"-?[\d.]+", cell) else float("-inf")


# --- reference ------------------------------------------------------------------------------------------------------


def public(room: str) -> str:
    """The public functions and classes of a room; of methods, those with which methods are written."""
    module = importlib.import_module(f"cfmerge.{room}" if room else "cfmerge")
    names = vars(module) if room else module.__all__
    found = {name: getattr(module, name) for name in names if not name.startswith("_")}
    left_out = registry() if room == "methods" else {}
    own = [
        name
        for name, value in found.items()
        if not isinstance(value, types.ModuleType)
        and (not room or getattr(value, "__module__", "").startswith("cfmerge."))
        and name not in left_out
    ]
    return objects(module.__name__, own)


def objects(module: str, names: Iterable[str]) -> str:
    """The names as mkdocstrings takes them."""
    return "\n\n".join(f"::: {module}.{name}" for name in names)


@functools.cache
def commands() -> str:
    """Every command with its usage, arguments, options and examples, in the order of `cfmerge --help`."""
    import typer.main

    from cfmerge.cli import app

    return "\n\n".join(_commands(["cfmerge"], typer.main.get_command(app)))


def _commands(path: list[str], command: Any) -> Iterator[str]:
    inner = getattr(command, "commands", {})
    for name, one in inner.items():
        yield from _commands([*path, name], one)
    if inner:
        return
    usage = command.collect_usage_pieces(command.make_context("cfmerge", [], resilient_parsing=True))
    yield f"## {' '.join(path)}"
    yield " ".join(re.split(r"\n\s*\n|\f", command.help or "")[0].split())
    yield f"```\n{' '.join([*path, *usage])}\n```"
    yield table(["option", "value", ""], [_option(one) for one in command.params if not getattr(one, "hidden", False)])
    examples = re.findall(r"cfmerge [^\n\x08]+", command.epilog or "")
    if examples:
        yield "```sh\n" + "\n".join(" ".join(line.split()) for line in examples) + "\n```"


def _option(parameter: Any) -> list[str]:
    argument = parameter.param_type_name == "argument"
    names = [parameter.metavar or parameter.name.upper()] if argument else parameter.opts
    value = "" if argument or parameter.is_flag else parameter.metavar or parameter.type.name.upper()
    return [", ".join(f"`{name}`" for name in names), f"`{value}`" if value else "", parameter.help or ""]
