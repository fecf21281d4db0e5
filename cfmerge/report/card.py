"""The model card of a merge: its inputs, and the recipe that makes it again."""

import importlib.metadata
import platform
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path

import yaml

import cfmerge
from cfmerge import hub, methods
from cfmerge.formats import Source
from cfmerge.formats.stacked import Stack
from cfmerge.formats.unmerged import Unmerged
from cfmerge.planning.resolved import Resolved


def versions() -> dict[str, str]:
    """Versions of the packages that the result depends on."""
    packages = ("jax", "jaxlib", "numpy", "ml_dtypes")
    return {
        "cfmerge": cfmerge.__version__,
        "python": platform.python_version(),
        **{package: importlib.metadata.version(package) for package in packages},
    }


def model_card(plan: Resolved, digests: Mapping[Path, str], notes: Sequence[str], warnings: Sequence[str] = ()) -> str:
    """The README.md of a merged model: front matter of the hub, tables, and the recipe as YAML."""
    entry = methods.registry().get(plan.method.name)
    source = f"Source: {entry.source}" if entry and entry.source else ""
    told = f"Method: **{plan.method.name}**. {entry.summary if entry else ''} {source}" if plan.experts else ""
    again = (
        "`cfmerge merge README.md -o OUT`, with this card, repeats the merge (paths are relative to the directory "
        f"that it was run in).\n\n```yaml\n{plan.explicit_recipe.to_yaml().strip()}\n```"
    )
    return card(
        plan,
        f"A merge of {len(plan.experts)} experts by {plan.method.name}" if plan.experts else "A stack of layers",
        told,
        {
            "Inputs": table("model", "weight", "file", "SHA-256", rows=inputs(plan, digests)),
            "Notes": "\n".join(f"- {note}" for note in (*plan.notes, *notes)),
            "Recipe": again,
        },
        models=[checkpoint for _, _, checkpoint in _models(plan)],
        tags=re.findall(r"\w+", plan.method.name) if plan.experts else ["layers"],
        warnings=warnings,
    )


def card(
    plan: Resolved,
    title: str,
    told: str,
    sections: Mapping[str, str],
    *,
    models: Sequence[Source],
    tags: Sequence[str],
    warnings: Sequence[str] = (),
) -> str:
    """The README.md of a model that a plan makes.

    Args:
        told: sentences on how it was made.
        sections: `{title: text}`, behind what was done with the tensors; those without a text are left out.
        models: those that it is made of, for the hub.
        tags: besides `merge` and `cfmerge`.
    """
    front = {
        "base_model": [_public_name(checkpoint) for checkpoint in models],
        "base_model_relation": "merge",
        "library_name": _library(plan),
        "tags": ["merge", "cfmerge", *tags],
    }
    counts = [(*key, count) for key, count in sorted(plan.counts().items())]
    used = ", ".join(f"{package} {version}" for package, version in versions().items())
    paragraphs = [
        f"---\n{yaml.safe_dump(front, sort_keys=False).strip()}\n---",
        f"# {title}",
        *("> **Warning.** " + warning.replace("\n", "\n>\n> ") for warning in warnings),
        f"Made by [cfmerge](https://github.com/cfmerge/cfmerge) without data and without training.\n{told}".rstrip(),
    ]
    whole = {"What was done": table("kind", "what", "tensors", rows=counts), **sections, "Versions": used}
    paragraphs += [part for head, text in whole.items() if text for part in (f"## {head}", text)]
    return "\n\n".join(paragraphs) + "\n"


def table(*head: str, rows: Iterable[Sequence[object]]) -> str:
    """A table in Markdown; a bar within a cell is escaped, a line break is a blank."""
    lines = ([" ".join(str(cell).splitlines()).replace("|", r"\|") for cell in line] for line in (head, *rows))
    first, *others = (f"| {' | '.join(line)} |" for line in lines)
    return "\n".join((first, "|---" * len(head) + "|", *others))


def _models(plan: Resolved) -> Iterator[tuple[str, str, Source]]:
    """Role, weight and checkpoint of the base, of the models that give it layers, and of the experts."""
    base = plan.base.inner if isinstance(plan.base, Unmerged) else plan.base
    yield "base", "", base
    if isinstance(plan.base, Unmerged) and plan.base.other not in plan.experts:
        yield "unmerged", "", plan.base.other
    if isinstance(plan.base, Stack):
        yield from (("layers", "", source) for source in plan.base.sources if source is not plan.base.main)
    for spec, expert in zip(plan.expert_specs, plan.experts, strict=True):
        weight = format(spec.weight, "g") if isinstance(spec.weight, int | float) else "by tensor"
        yield spec.name, weight, expert


def inputs(plan: Resolved, digests: Mapping[Path, str]) -> Iterator[tuple[str, str, str, str]]:
    """A row for every file of the base and the experts: role, weight, path in the model, SHA-256 in backticks."""
    for role, weight, checkpoint in _models(plan):
        if cached := hub.snapshot(checkpoint.path):
            role += f" ({cached.repository}{'@' if cached.commit else ''}{cached.commit[:12]})"
        files = checkpoint.main.files if isinstance(checkpoint, Stack) else checkpoint.files
        for file in files:
            within = file.is_relative_to(checkpoint.path) and file != checkpoint.path
            name = file.relative_to(checkpoint.path).as_posix() if within else file.name
            yield role, weight, name, f"`{digests[file]}`"


def _library(plan: Resolved) -> str:
    """The library that loads the output."""
    if plan.recipe.adapter_out is not None:
        return "peft"
    if "model_index.json" in plan.base.side_files or "_diffusers_version" in plan.base.config:
        return "diffusers"
    if "modules.json" in plan.base.side_files:
        return "sentence-transformers"
    return "transformers" if plan.base.config.get("model_type") else "cfmerge"


def _public_name(checkpoint: Source) -> str:
    """The model's name on the hub if the cache or its config tells, else its directory's name."""
    if cached := hub.snapshot(checkpoint.path):
        return cached.repository
    told = checkpoint.config.get("_name_or_path")
    if isinstance(told, str) and told.count("/") == 1 and not told.startswith(("/", ".", "~")):
        return told
    return checkpoint.path.expanduser().resolve().name
