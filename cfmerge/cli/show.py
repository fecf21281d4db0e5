"""How results look in a terminal, and as JSON."""

import contextlib
import json as json_module
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.markup import escape
from rich.table import Column, Table

if TYPE_CHECKING:
    from cfmerge.engine.merge import MergeResult
    from cfmerge.engine.plan import Plan
    from cfmerge.formats import Checkpoint
    from cfmerge.methods import Entry


def out() -> Console:
    """Standard output; wide where it is no terminal, so that nothing is folded in a file."""
    return Console(width=None if sys.stdout.isatty() else 200)


def _name_column() -> Column:
    return Column("tensor", overflow="fold", ratio=1)


def error(message: str) -> None:
    Console(stderr=True, soft_wrap=True).print(f"[bold red]error:[/] {escape(message)}", highlight=False)


def event(kind: str, **values: Any) -> None:
    """One line of JSON on stdout."""
    print(json_module.dumps({"event": kind, **values}), flush=True)


def size(count: float) -> str:
    for unit in ("B", "kB", "MB", "GB"):
        if count < 1000:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:.1f} TB"


@contextlib.contextmanager
def progress(total: int, *, json: bool, quiet: bool) -> Iterator[Callable[[str, int], None] | None]:
    """A callback for the engine: a bar in a terminal, lines of JSON with `--json`, nothing otherwise."""
    if json and not quiet:
        done, shown = 0, 0

        def tell(name: str, count: int) -> None:
            nonlocal done, shown
            done += count
            if done - shown >= total / 100 or done >= total > shown:
                shown = done
                event("progress", tensor=name, bytes=done, total=total)

        yield tell
        return
    if quiet or not sys.stderr.isatty():
        yield None
        return
    from rich.progress import (
        BarColumn,
        DownloadColumn,
        Progress,
        TextColumn,
        TimeRemainingColumn,
        TransferSpeedColumn,
    )

    columns = (
        TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TransferSpeedColumn(),
        TimeRemainingColumn(),
    )  # fmt: skip
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task("merging", total=total)
        yield lambda name, count: bar.update(task, advance=count, description=escape(name[-48:]))


def merge_result(result: "MergeResult") -> None:
    console = out()
    table = Table("kind", "what was done", "tensors", title=f"merged by {result.plan.method.name}")
    for (kind, what), count in sorted(result.plan.counts().items()):
        table.add_row(kind, what, str(count))
    console.print(table)
    _notes(console, result.notes)
    console.print(
        f"[bold]{escape(str(result.output))}[/]  {size(result.plan.bytes_to_write)} in {result.seconds:.1f} s",
        soft_wrap=True,
    )


def _notes(console: Console, notes: Sequence[str]) -> None:
    for note in notes:
        console.print(f"[yellow]note:[/] {escape(note)}", soft_wrap=True, highlight=False)


def plan(plan: "Plan", memory: int | None, tensors: bool, json: bool) -> None:
    from cfmerge.engine.merge import free_memory

    limit = free_memory() // 4 if memory is None else memory
    largest = plan.largest
    need = largest.working_bytes if largest else 0
    rows: list[dict[str, Any]] = [
        {
            "name": job.name, "kind": str(job.parameter.kind), "layout": job.parameter.describe_layout(),
            "shape": list(job.parameter.shape), "dtype": str(job.dtype), "what": job.assignment.label,
            "rule": job.assignment.rule.match if job.assignment.rule else None, "note": job.parameter.note,
            "tied": list(job.writes[1:]),
        }
        for job in plan.jobs
    ]  # fmt: skip
    if json:
        summary = {
            "method": plan.method.name, "parameters": dict(plan.method.parameters),
            "experts": [spec.name for spec in plan.expert_specs], "bytes_read": plan.bytes_to_read,
            "bytes_written": plan.bytes_to_write, "flops": plan.flops, "largest_working_set": need,
            "memory": limit, "exported_heads": {k: list(v) for k, v in plan.exported.items()},
            "notes": list(plan.notes), "tensors": rows,
        }  # fmt: skip
        print(json_module.dumps(summary, indent=2))
        return
    console = out()
    experts = ", ".join(
        spec.name + (f" (x{spec.weight:g})" if isinstance(spec.weight, int | float) else " (weight by tensor)")
        if spec.weight != 1 else spec.name
        for spec in plan.expert_specs
    )  # fmt: skip
    parameters = ", ".join(f"{key}={value}" for key, value in plan.method.parameters.items())
    console.print(f"[bold]{plan.method.name}[/] ({parameters})", highlight=False, soft_wrap=True)
    console.print(f"base    {escape(str(plan.base.path))}\nexperts {escape(experts)}", soft_wrap=True)
    if tensors:
        table = Table(_name_column(), "kind", "layout", "shape", "dtype", "what", "why")
        for row in rows:
            why = f"rule {row['rule']}" if row["rule"] else row["note"]
            table.add_row(
                escape(str(row["name"])), str(row["kind"]), str(row["layout"]), str(tuple(row["shape"])),
                str(row["dtype"]), str(row["what"]), escape(str(why or "")),
            )  # fmt: skip
    else:
        table = Table("kind", "what", "tensors")
        for (kind, what), count in sorted(plan.counts().items()):
            table.add_row(kind, what, str(count))
    console.print(table)
    for expert, heads in plan.exported.items():
        console.print(f"heads/{escape(expert)}.safetensors: {escape(', '.join(heads))}", soft_wrap=True)
    averaged = [row for row in rows if row["note"] and not row["rule"]]
    if averaged and not tensors and plan.method.scope == "matrix":
        console.print(f"[yellow]note:[/] {escape(str(averaged[0]['name']))}: {averaged[0]['note']}", soft_wrap=True)
    _notes(console, plan.notes)
    console.print(
        f"reads {size(plan.bytes_to_read)}, writes {size(plan.bytes_to_write)}, about {plan.flops / 1e12:.2f} TFLOP; "
        f"largest working set {size(need)} of {size(limit)}"
        + ("" if need <= limit else " [bold red](too large: raise --memory or add a rule)[/]"),
        highlight=False, soft_wrap=True,
    )  # fmt: skip


def checkpoint(checkpoint: "Checkpoint", json: bool) -> None:
    from cfmerge.parameters import classify

    headers = {name: (info.shape, info.dtype.name) for name, info in checkpoint.tensors.items()}
    parameters = classify(headers, checkpoint.config)
    stored = {alias: name for alias, name in checkpoint.ties.items() if name in headers}
    rows = [
        (name, p.kind, p.describe_layout(), p.shape, p.dtype, checkpoint.tensors[name].file.name, p.note)
        for name, p in parameters.items()
    ]
    total = sum(info.nbytes for info in checkpoint.tensors.values())
    if json:
        keys = ("name", "kind", "layout", "shape", "dtype", "file", "note")
        print(json_module.dumps({
            "path": str(checkpoint.path), "model_type": checkpoint.config.get("model_type"), "bytes": total,
            "parameters": sum(p.size for p in parameters.values()),
            "files": [file.name for file in checkpoint.files], "ties": stored,
            "tensors": [dict(zip(keys, row, strict=True)) for row in rows],
        }, indent=2))  # fmt: skip
        return
    console = out()
    table = Table(_name_column(), "kind", "layout", "shape", "dtype", "file")
    for name, kind, layout, shape, dtype, file, note in rows:
        table.add_row(escape(name), str(kind) + ("*" if note else ""), layout, str(shape), dtype, file)
    console.print(table)
    for note in dict.fromkeys(row[-1] for row in rows if row[-1]):
        console.print(f"* {note}", soft_wrap=True)
    for alias, name in stored.items():
        state = "stored too" if alias in headers else "not stored"
        console.print(f"tied: {escape(alias)} = {escape(name)} ({state})", soft_wrap=True, highlight=False)
    model_type = checkpoint.config.get("model_type") or "unknown architecture"
    console.print(
        f"{escape(str(checkpoint.path))}: {escape(model_type)}, {len(rows)} tensors, "
        f"{sum(p.size for p in parameters.values()):,} parameters, {size(total)} in {len(checkpoint.files)} files",
        soft_wrap=True, highlight=False,
    )  # fmt: skip


def methods(entries: Sequence["Entry"], json: bool, full: bool) -> None:
    """One line each, or all of it."""
    if json:
        described = [
            {
                "name": entry.name, "kind": entry.kind, "summary": entry.summary, "source": entry.source,
                "parameters": {
                    name: {"default": _default(parameter.default), "doc": entry.describe(name)}
                    for name, parameter in entry.signature.items()
                },
            }
            for entry in entries
        ]  # fmt: skip
        print(json_module.dumps(described, indent=2))
        return
    console = out()
    if not full:
        for kind in ("method", "transform"):
            table = Table(kind + "s", "", "parameters", box=None, padding=(0, 2, 0, 0))
            for entry in entries:
                if entry.kind == kind:
                    table.add_row(f"[bold]{entry.name}[/]", escape(entry.summary), ", ".join(entry.signature))
            console.print(table)
            console.print()
        console.print("`cfmerge methods NAME` tells all of one; `A >> B >> C` chains transforms with a method.")
        return
    for entry in entries:
        console.print(f"[bold]{entry.name}[/]  {escape(entry.summary)}", highlight=False)
        console.print(f"  [dim]{escape(entry.source)}[/]", highlight=False)
        if entry.signature:
            table = Table(box=None, show_header=False, padding=(0, 2, 0, 2))
            for name, parameter in entry.signature.items():
                default = "" if parameter.default is parameter.empty else f"={_default(parameter.default)}"
                table.add_row(f"{name}{default}", escape(entry.describe(name)))
            console.print(table)
        console.print()


def _default(value: Any) -> Any:
    """A parameter's default as JSON has it, or as text."""
    if isinstance(value, type) and value.__name__ == "_empty":
        return None
    return value if isinstance(value, str | int | float | bool | None) else getattr(value, "name", str(value))


def line(text: str) -> None:
    out().print(escape(text), soft_wrap=True, highlight=False)
