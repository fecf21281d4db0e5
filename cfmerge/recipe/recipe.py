"""A recipe: all that a user asks for, and the names of its experts."""

import math
import os
import re
from pathlib import Path
from typing import Any, Literal

import msgspec
import yaml

from cfmerge import hub
from cfmerge.errors import CfmergeError
from cfmerge.recipe.parts import Align, Expert, Layers, Rename, Rule

FILES = {".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".msgpack", ".npz"}  # ends that are not in an expert's name
Heads = Literal["keep-base", "drop", "export"]
Format = Literal["safetensors", "torch", "msgpack", "npz", "orbax", "orbax-v0", "distributed"]
Allowed = Literal["duplicate-experts", "one-expert", "base-as-expert", "other-base", "batch-norm"]


class Recipe(msgspec.Struct, forbid_unknown_fields=True):
    """All that a user asks for: the content of a recipe file.

    >>> recipe = cfmerge.Recipe("base", ["math", "code"], "ties", {"density": 0.3})
    >>> recipe.to_yaml().splitlines()[:3]
    ['base: base', 'experts:', '- math']
    >>> cfmerge.make_plan(recipe).counts()["matrix", "ties"]
    1
    """

    base: str
    experts: list[str | Expert] = []
    method: str = "ace"
    parameters: dict[str, Any] = {}
    rules: list[Rule] = []
    rename: list[Rename] = []  # for all experts' names
    components: list[str] = []  # folders of a pipeline that are merged; the others are copied; none: all
    heads: Heads | None = None
    align: Align | None = None  # models of different initialisation are brought into one order first
    on_nonfinite: Literal["error", "skip-expert"] = "error"
    vocabulary: str | None = None  # the output's tokens: base, union, or an expert's name; none: base, if it has all
    unmerged: str | None = None  # whose integers, buffers and objects the output has: an expert, a path; none: the base
    allow: list[Allowed] = []
    dtype: Literal["float32", "float16", "bfloat16"] | None = None  # the output's; none: the base's
    format: Format | None = None  # of the output's files; none: the base's, or as the name of a file says
    dequantize: bool = False  # weights of 8 bits (fp8) with scales count as the bfloat16 that they stand for
    precision: Literal["auto", "float32", "float64"] = "auto"  # the computation's
    shard_size: str = "5GB"
    side_files: str | None = None  # where config and tokenizer come from; none: the base
    seed: int = 0  # for random methods
    plugins: list[str] = []  # Python files that register methods
    statistics: str | None = None  # a directory of statistics to begin from
    download: bool = False  # fetch models that are named as on the hub, and are not in its cache
    cache_dir: str | None = None  # of the Hugging Face hub; none: where huggingface_hub has it
    chat_template: str | None = None  # auto (that of most models), chatml, or Jinja; none: the base's
    layers: list[Layers] = []  # the output's layers, where they are not those of the base one by one
    adapter_out: int | Literal["exact"] | None = None  # the rank of an adapter that is written in place of a model

    def resolved_experts(self, least: int = 2) -> list[Expert]:
        """The experts, each with a name: its own, else that of its directory.

        Raises:
            CfmergeError: none, one without leave, two of one name, or weights that sum to nothing.
        """
        experts = [Expert(path=e) if isinstance(e, str) else e for e in self.experts]
        if len(experts) < min(least, 1) and not self.layers:
            raise CfmergeError("no experts: a merge needs a base and at least two experts")
        if 0 < len(experts) < least and "one-expert" not in self.allow and not self.layers:
            raise CfmergeError(
                f"one expert ({experts[0].path}): there is nothing to merge it with. Give another, or allow it: "
                "--allow one-expert (recipe: 'allow: [one-expert]')"
            )
        seen: dict[str, str] = {}
        named = []
        for expert in experts:
            if isinstance(expert.weight, int | float) and not math.isfinite(expert.weight):
                raise CfmergeError(f"expert {expert.path}: its weight must be finite, found {expert.weight}")
            name = expert.name or _default_name(expert.adapter or expert.path, seen)
            if name in seen:
                raise CfmergeError(
                    f"two experts are called {name!r}: {seen[name]} and {expert.path}; give them other names"
                )
            if re.search(r"[/\\\0]", name) or name in {".", ".."}:
                raise CfmergeError(f"expert name {name!r} cannot be used as a file name")
            seen[name] = expert.path
            named.append(msgspec.structs.replace(expert, name=name))
        return named

    def to_yaml(self) -> str:
        return yaml.safe_dump(msgspec.to_builtins(self), sort_keys=False, allow_unicode=True, width=100)

    def brief(self) -> str:
        """The YAML without the keys that have their defaults."""
        plain = msgspec.to_builtins(Recipe(""))
        said = {key: value for key, value in msgspec.to_builtins(self).items() if value != plain[key]}
        return yaml.safe_dump(said, sort_keys=False, allow_unicode=True, width=100)


def _default_name(path: str, seen: dict[str, str]) -> str:
    """A name that is not among those `seen`: the directory's, the file's, or the one on the hub."""
    if asked := hub.asked(path):
        org, name, revision = *asked.repository.split("/"), asked.revision.replace("/", "-")
        longer = f"{name}-{revision[:12]}" if revision else f"{org}-{name}"
        return _free(name, [longer, f"{org}-{longer}"], seen)
    pure = Path(path).expanduser()
    real = Path(os.path.realpath(pure))  # of a link in a circle, itself
    cached, single = hub.snapshot(pure), pure.suffix in FILES
    named = cached is not None and (not single or pure.stem in hub.GENERIC)
    name = (cached.name if cached and named else pure.stem if single else real.name) or "expert"
    parent = f"{name}-{cached.commit[:8]}" if cached else f"{real.parent.name}-{name}"
    return _free(name, [parent], seen)


def _free(name: str, longer: list[str], seen: dict[str, str]) -> str:
    """The first name that is not among those `seen`: it, a longer one, or it with a number."""
    candidates = [name, *longer, *(f"{name}-{number}" for number in range(2, len(seen) + 3))]
    return next(candidate for candidate in candidates if candidate not in seen)
