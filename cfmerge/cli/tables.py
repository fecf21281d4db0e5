"""How plans, checkpoints and methods look in a terminal, and as JSON."""

import itertools
import json as json_module
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.markup import escape
from rich.table import Column, Table

from cfmerge import hub
from cfmerge.cli.messages import out, say, tell
from cfmerge.cli.texts import told_run

if TYPE_CHECKING:
    from cfmerge.formats import Source
    from cfmerge.methods import Entry
    from cfmerge.models import Parameter
    from cfmerge.planning.resolved import Resolved
    from cfmerge.products.plan import Plan
    from cfmerge.products.predict import Forecast
    from cfmerge.recipe import Expert
    from cfmerge.temporal.trajectory import Window

NARROW = 120  # columns below which a list of methods leaves their parameters out


def size(count: float) -> str:
    for unit in ("B", "kB", "MB", "GB"):
        if count < 1000:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:.1f} TB"


def _called(path: Path) -> str:
    """A path as it is, or the repository and commit of a model in the hub's cache."""
    found = hub.snapshot(path)
    return f"{found.repository}@{found.commit[:8]}" if found else str(path)


def _table(*columns: Column | str) -> Table:
    return Table(*columns, box=SIMPLE_HEAD, pad_edge=False, padding=(0, 2, 0, 0))


def counts(plan: "Resolved", what: str) -> Table:
    """How many tensors of each kind are merged by which method; `what` heads the methods."""
    table = Table("kind", what, "tensors")
    for (kind, what), count in sorted(plan.counts().items()):
        table.add_row(kind, escape(what), str(count))
    return table


def _tensors(console: Console, headers: Sequence[str], rows: Sequence[Sequence[str]], remarks: Sequence[str]) -> None:
    """A row for each tensor, its name broken behind dots; each remark once, below, and its number in the rows."""
    numbers = {remark: f"({n})" for n, remark in enumerate(dict.fromkeys(filter(None, remarks)), 1)}
    cells = [
        (*row[:-1], f"{row[-1]} {numbers.get(remark, '')}".rstrip()) for row, remark in zip(rows, remarks, strict=True)
    ]
    widths = [max(map(len, column)) for column in zip(headers, *cells, strict=True)]
    widths[0] = max(min(widths[0], console.width - sum(widths[1:]) - 2 * len(widths[1:])), 20)

    def line(row: Sequence[str]) -> str:
        first, *rest = _broken(row[0], widths[0])
        aligned = "  ".join(cell.ljust(width) for cell, width in zip((first, *row[1:]), widths, strict=True))
        return "\n".join((aligned.rstrip(), *rest))

    console.print(f"[dim]{line(headers)}[/]", soft_wrap=True)
    for row in cells:
        console.print(escape(line(row)), soft_wrap=True)
    for remark, number in numbers.items():
        say(console, f"{number} {remark}")


def _broken(name: str, width: int) -> list[str]:
    """The name in lines of at most `width`, broken behind dots and slashes, all but the first indented."""
    lines = [""]
    for part in re.findall(r"[^./]*[./]|[^./]+", name):
        if lines[-1].strip() and len(lines[-1] + part) > width:
            lines.append("  ")
        lines[-1] += part
    return lines


def plan(plan: "Plan", forecast: "Forecast", tensors: bool, json: bool, window: "Window | None" = None) -> None:
    """A plan: the action on every kind of tensor, and the cost; in JSON with the steps of a training run, if it has."""
    if json:
        of_run = {} if window is None else {"window": window.summary(), "notes_on_run": list(window.notes)}
        print(json_module.dumps({**_plan_summary(plan, forecast), **of_run}, indent=2))
        return
    console = out()
    told = ", ".join(f"{key}={value}" for key, value in plan.method.parameters.items())
    say(console, f"{plan.method.name} ({told})" if plan.experts else "a stack of layers", "bold")
    console.print(f"base    {escape(_called(plan.base.path))}", soft_wrap=True)
    experts = [f"experts {', '.join(map(_described, plan.expert_specs))}"] if plan.experts else []
    for line in (*experts, *(f"layers  {told_run(run)}" for run in plan.recipe.layers)):
        console.print(escape(line), soft_wrap=True)
    if how := plan.recipe.align:
        told = f", moments of {how.moments}" if how.moments else ""
        say(console, f"align   to {how.to} by {how.method}{told}{f', spaces of {how.spaces}' if how.spaces else ''}")
    notes = list(plan.notes)
    if tensors:
        _list_jobs(console, plan)
    else:
        console.print(counts(plan, "what"))
        unknown = [job for job in plan.jobs if job.parameter.note and not job.assignment.rule]
        if unknown and plan.method.needs.scope == "matrix":
            notes.insert(0, f"{unknown[0].name}: {unknown[0].parameter.note}")
    for expert, heads in plan.exported.items():
        say(console, f"heads/{expert}.safetensors: {', '.join(heads)}")
    for note in notes:
        tell(console, "note", note, "yellow")
    say(
        console,
        f"reads {size(plan.bytes_to_read)}, writes {size(plan.bytes_to_write)}, about {plan.flops / 1e12:.2f} TFLOP; "
        f"largest working set {size(forecast.needed)} of {size(forecast.memory)}",
    )
    _costs(console, forecast)


def _costs(console: Console, forecast: "Forecast") -> None:
    """Seconds and memory as they are predicted, and the tensors that do not fit."""
    from cfmerge.models.patterns import tell as named

    predicted, devices = forecast.prediction, forecast.devices
    if predicted.seconds is not None and predicted.compiling is not None:
        more = f" ({predicted.compiling:.0f} s more where nothing is compiled yet)" if predicted.compiling > 0.5 else ""
        say(console, f"about {_duration(predicted.seconds)} on this machine{more}, {size(predicted.memory)} of memory")
    else:
        say(console, f"about {size(predicted.memory)} of memory on the host")
    if not devices.on_host:
        each = "" if devices.memory is None else f" of {size(devices.memory)}"
        work, held = predicted.device_flops / 1e12, size(predicted.device_memory)
        say(console, f"{devices.count} devices{each}: about {work:.2f} TFLOP and {held} each")
    for note in forecast.notes:
        tell(console, "note", note, "yellow")
    if predicted.too_large:
        names, most = named(list(predicted.too_large)), size(max(predicted.too_large.values()))
        text = f"{names}: needs {most} on a device, which has {size(devices.memory or 0)}"
        say(console, f"{text}: take larger devices, more of them, or a --rule", "bold red")
    if forecast.refused:
        names, most = named(list(forecast.refused)), size(max(forecast.refused.values()))
        text = f"{names}: needs {most}; the largest working set is too large"
        say(console, f"{text}: raise --memory or add a --rule", "bold red")


def _duration(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"


def _described(expert: "Expert") -> str:
    if not isinstance(expert.weight, int | float):
        return f"{expert.name} (weight by tensor)"
    return expert.name if expert.weight == 1 else f"{expert.name} (x{expert.weight:g})"


def _list_jobs(console: Console, plan: "Plan") -> None:
    rows, remarks = [], []
    for job in plan.jobs:
        parameter, rule = job.parameter, job.assignment.rule
        kind, layout, shape = str(parameter.kind), parameter.describe_layout(), str(parameter.shape)
        rows.append((job.name, kind, layout, shape, str(job.dtype), job.assignment.label))
        remarks.append(f"by the rule for {rule.match or 'its kind'}" if rule else parameter.note)
    _tensors(console, ("tensor", "kind", "layout", "shape", "dtype", "what"), rows, remarks)


def _plan_summary(plan: "Plan", forecast: "Forecast") -> dict[str, Any]:
    told = forecast.prediction
    return {
        "method": plan.method.name,
        "parameters": dict(plan.method.parameters),
        "recipe": msgspec.to_builtins(plan.recipe),
        "experts": [spec.name for spec in plan.expert_specs],
        "bytes_read": plan.bytes_to_read,
        "bytes_written": plan.bytes_to_write,
        "flops": plan.flops,
        "largest_working_set": forecast.needed,
        "memory": forecast.memory,
        "refused": dict(forecast.refused),
        "prediction": {**told._asdict(), "notes": list(forecast.notes)},
        "exported_heads": {expert: list(heads) for expert, heads in plan.exported.items()},
        "notes": list(plan.notes),
        "tensors": [
            {
                "name": job.name,
                "kind": str(job.parameter.kind),
                "layout": job.parameter.describe_layout(),
                "shape": list(job.parameter.shape),
                "dtype": str(job.dtype),
                "what": job.assignment.label,
                "rule": job.assignment.rule.match if job.assignment.rule else None,
                "note": job.parameter.note,
                "tied": list(job.writes[1:]),
            }
            for job in plan.jobs
        ],
    }


def _checkpoint_summary(
    checkpoint: "Source", parameters: "Mapping[str, Parameter]", ties: Mapping[str, str]
) -> dict[str, Any]:
    return {
        "path": str(checkpoint.path),
        "model_type": checkpoint.config.get("model_type"),
        "bytes": sum(info.nbytes for info in checkpoint.tensors.values()),
        "parameters": sum(p.size for p in parameters.values()),
        "files": [file.name for file in checkpoint.files],
        "ties": dict(ties),
        "notes": list(checkpoint.notes),
        "tensors": [
            {
                "name": name,
                "kind": p.kind,
                "layout": p.describe_layout(),
                "shape": p.shape,
                "dtype": p.dtype,
                "file": checkpoint.tensors[name].file.name,
                "note": p.note,
            }
            for name, p in parameters.items()
        ],
    }


def checkpoint(checkpoint: "Source", json: bool) -> None:
    """A checkpoint: its tensors by file, its ties, its size."""
    from cfmerge.models import classify

    headers = {name: (info.shape, info.dtype.name) for name, info in checkpoint.tensors.items()}
    parameters = classify(headers, checkpoint.config)
    stored = {alias: name for alias, name in checkpoint.ties.items() if name in headers}
    total = sum(info.nbytes for info in checkpoint.tensors.values())
    files = {name: checkpoint.tensors[name].file.name for name in parameters}
    if json:
        print(json_module.dumps(_checkpoint_summary(checkpoint, parameters, stored), indent=2))
        return
    console = out()
    for file, names in itertools.groupby(parameters, files.__getitem__):
        found = [parameters[name] for name in names]
        rows = [(p.name, p.dtype, str(p.shape), p.describe_layout(), str(p.kind)) for p in found]
        console.print(f"[bold]{escape(file)}[/]", soft_wrap=True)
        _tensors(console, ("tensor", "dtype", "shape", "layout", "kind"), rows, [p.note for p in found])
        console.print()
    for alias, name in stored.items():
        state = "stored too" if alias in headers else "not stored"
        console.print(f"tied: {escape(alias)} = {escape(name)} ({state})", soft_wrap=True)
    for note in checkpoint.notes:
        tell(console, "note", note, "yellow")
    model_type = checkpoint.config.get("model_type") or _adapter(checkpoint.config) or "unknown architecture"
    say(
        console,
        f"{_called(checkpoint.path)}: {model_type}, {len(parameters)} tensors, "
        f"{sum(p.size for p in parameters.values()):,} parameters, {size(total)} in {len(checkpoint.files)} files",
    )


def _adapter(config: Mapping[str, Any]) -> str:
    """An adapter by its config: `adapter (LORA, rank 8, alpha 16) of NAME`; "" for a model's config."""
    if "peft_type" not in config:
        return ""
    numbers = [f"{name} {config[key]}" for name, key in (("rank", "r"), ("alpha", "lora_alpha")) if key in config]
    base = config.get("base_model_name_or_path")
    return f"adapter ({', '.join([str(config['peft_type']), *numbers])})" + (f" of {base}" if base else "")


def methods(entries: Sequence["Entry"], json: bool, full: bool) -> None:
    """One line each, or all of it."""
    if json:
        described = [
            {
                "name": entry.name,
                "kind": entry.kind,
                "summary": entry.summary,
                "source": entry.source,
                "parameters": {
                    name: {"default": _default(parameter.default), "doc": entry.describe(name)}
                    for name, parameter in entry.signature.items()
                },
            }
            for entry in entries
        ]
        print(json_module.dumps(described, indent=2))
    elif full:
        for entry in entries:
            _in_full(entry)
    else:
        _listed(entries)


def _listed(entries: Sequence["Entry"]) -> None:
    console = out()
    wide = console.width >= NARROW
    for kind in ("method", "transform"):
        table = Table(kind + "s", *(("", "parameters") if wide else ("",)), box=None, padding=(0, 2, 0, 0))
        for entry in entries:
            if entry.kind == kind:
                cells = (escape(entry.summary), *((", ".join(entry.signature),) if wide else ()))
                table.add_row(f"[bold]{entry.name}[/]", *cells)
        console.print(table)
        console.print()
    say(console, "`cfmerge methods NAME` tells all of one; `A >> B >> C` chains transforms with a method.")


def _in_full(entry: "Entry") -> None:
    console = out()
    say(console, f"{entry.name}: {entry.summary}", "bold")
    say(console, f"Source: {entry.source}")
    if entry.signature:
        table = Table(box=None, show_header=False, padding=(0, 2, 0, 2))
        for name, parameter in entry.signature.items():
            default = "" if parameter.default is parameter.empty else f"={_default(parameter.default)}"
            table.add_row(escape(f"{name}{default}"), escape(entry.describe(name)))
        console.print(table)


def _default(value: Any) -> Any:
    """A parameter's default as JSON has it, or as text."""
    if isinstance(value, type) and value.__name__ == "_empty":
        return None
    return value if isinstance(value, str | int | float | bool | None) else getattr(value, "name", str(value))
