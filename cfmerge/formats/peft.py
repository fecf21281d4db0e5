"""PEFT's adapters: the names of their tensors as parts, see `adapter_parts`."""

import dataclasses
import re
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path

from cfmerge.errors import CfmergeError
from cfmerge.formats.adapter_parts import Adapter, Added, Full, Pair, Part, Rows
from cfmerge.formats.base import Container
from cfmerge.formats.containers import open_container
from cfmerge.formats.layout import read_json
from cfmerge.formats.peft_config import FILE, PeftConfig, peft_config
from cfmerge.models import Shape
from cfmerge.models.patterns import tell

STEM = "adapter_model"
FACTOR = re.compile(
    r"(?:(?P<module>.+)\.)?(?P<what>lora_A|lora_B|lora_embedding_A|lora_embedding_B|lora_magnitude_vector)"
    r"(?:\.(?P<own>(?!(?:weight|bias)$)[^.]+))?(?:\.(?P<leaf>weight|bias))?$"
)
TOKENS = re.compile(r"(?P<module>.+)\.token_adapter\.trainable_tokens_delta(?:\.[^.]+)?$")
SAVED = re.compile(r"\.modules_to_save(?:\.(?!(?:weight|bias)$)[^.]+(?=\.))?(?=\.)")
TWICE = "base_layer.out_proj"  # of torch's MultiheadAttention: PEFT adds its product twice, forward and merged
INNER = re.compile(r"(^|(?<=\.))base_layer\.|\.base_layer$")


@dataclasses.dataclass
class Module:
    """The names in the file of one module's factors."""

    names: dict[str, str] = dataclasses.field(default_factory=dict)
    owns: set[str] = dataclasses.field(default_factory=set)  # names of adapters among them


def find_file(directory: Path) -> Path | None:
    """The file of tensors of an adapter's directory; None if there is none."""
    found = (directory / f"{STEM}{suffix}" for suffix in (".safetensors", ".bin"))
    return next((path for path in found if path.is_file()), None)


def read_peft(path: Path) -> Adapter:
    """The adapter in a directory with adapter_config.json, or in the file beside it.

    Raises:
        CfmergeError: files are missing or damaged, or it is an adapter that is not read.
    """
    directory = path if path.is_dir() else path.parent
    file = find_file(directory) if path.is_dir() else path
    if file is None:
        raise CfmergeError(f"{directory}: holds {FILE} and no {STEM}.safetensors (or .bin); fetch the adapter again")
    config = peft_config(read_json(directory / FILE), directory / FILE)
    container = open_container(file)
    parts = peft_parts(container, config, {name: name for name in container.tensors})
    return Adapter(
        path, container, (*container.files, directory / FILE), parts, config.trained_on, config.tied,
        (*config.notes, *(f"{path}: {note}" for note in container.notes)),
    )  # fmt: skip


def peft_parts(container: Container, config: PeftConfig, names: Mapping[str, str]) -> list[Part]:
    """The parts of tensors that are called as PEFT calls them.

    Args:
        names: `{name as PEFT has it: name in the file}`.
    """
    modules: dict[str, Module] = defaultdict(Module)
    parts: list[Part] = []
    unknown = []
    for full, own in names.items():
        name = full.removeprefix("base_model.model.")
        factor, tokens = FACTOR.match(name), TOKENS.match(name)
        if factor:
            found = modules[factor["module"] or ""]
            kind = factor["what"] + (".bias" if factor["leaf"] == "bias" else "")
            found.names.setdefault(kind, own)
            found.owns.add(factor["own"] or "")
        elif tokens:
            parts.append(_rows(container, config, INNER.sub("", tokens["module"]), own))
        elif re.search(r"(^|\.)(lora_|hada_|lokr_|token_adapter\.)", name):
            unknown.append(own)
        else:
            parts.append(Full((INNER.sub("", SAVED.sub("", name)),), own))
    several = sorted({own for found in modules.values() for own in found.owns})
    if len(several) > 1:
        raise CfmergeError(f"{container.path}: holds several adapters: {', '.join(map(repr, several))}; save one")
    if unknown:
        raise CfmergeError(f"{container.path}: {tell(unknown, container.tensors)}: not known as parts of a LoRA")
    stacks: dict[str, list[str]] = defaultdict(list)
    for module in modules:
        stacks[INNER.sub("", module)].append(module)
    for module, nested in stacks.items():
        chosen = [key for key in config.parameters if _owns(module, key)]
        if chosen and not any("lora_embedding_A" in modules[one].names for one in nested):
            parts += _stacks(container, config, module, chosen, [modules[one] for one in nested])
        else:
            for one in nested:
                parts += _module(container, config, module, modules[one], 2 if one.endswith(TWICE) else 1)
    return parts


def _module(container: Container, config: PeftConfig, module: str, found: Module, times: int) -> list[Part]:
    embedding = "lora_embedding_A" in found.names or "lora_embedding_B" in found.names
    a, b = ("lora_embedding_A", "lora_embedding_B") if embedding else ("lora_A", "lora_B")
    shapes = _both(container, found, a, b, module)
    rank = config.rank_of(module)
    check_ranks(container, found.names[a], found.names[b], shapes, rank, config.place)
    scale, end = times * config.scale_of(module), f"{module}." if module else ""
    pair = Pair(
        (f"{end}weight",) if embedding else (f"{end}weight", f"{end}in_proj_weight"), found.names[a], found.names[b],
        shapes, scale, rank, "embedding" if embedding else "matrix", config.turned,
        found.names.get("lora_magnitude_vector", ""),
    )  # fmt: skip
    bias = found.names.get(f"{b}.bias")
    return [pair, *([Added((f"{end}bias",), bias, scale)] if bias else [])]


def _both(container: Container, found: Module, a: str, b: str, module: str) -> tuple[Shape, Shape]:
    missing = [what for what in (a, b) if what not in found.names]
    if missing:
        raise CfmergeError(
            f"{container.path}: module {module!r} has no {missing[0]}, which belongs to "
            f"{', '.join(map(repr, found.names.values()))}; the file is not whole, fetch it again"
        )
    return container.tensors[found.names[a]].shape, container.tensors[found.names[b]].shape


def check_ranks(
    container: Container, down: str, up: str, shapes: tuple[Shape, Shape], rank: int, place: str, stacked: int = 1
) -> None:
    """Raises `CfmergeError` unless A and B have the rank that the config says.

    Args:
        stacked: how many experts of a mixture are stacked in them.
    """
    a, b = shapes
    if len(a) < 2 or len(b) < 2 or 0 in (*a, *b):
        raise CfmergeError(f"{container.path}: {down!r} {a} and {up!r} {b} are no factors of a matrix")
    if a[0] != rank * stacked:
        raise CfmergeError(
            f"{container.path}: {down!r} has shape {a}: expected rank {rank}, as {place} says, found "
            f"{a[0] // stacked if a[0] % stacked == 0 else a[0]}; the two are not of one adapter"
        )
    if b[1] != a[0] or any(size != 1 for size in b[2:]):
        raise CfmergeError(f"{container.path}: {up!r} of shape {b} does not fit {down!r} of shape {a}")


def _rows(container: Container, config: PeftConfig, module: str, name: str) -> Rows:
    fitting = [indices for end, indices in config.tokens.items() if not end or _owns(module, f"{end}.x", "x")]
    shape = container.tensors[name].shape
    if not fitting:
        raise CfmergeError(f"{container.path}: {name!r}: {config.place} has no trainable_token_indices for {module!r}")
    if shape[0] != len(fitting[0]):
        raise CfmergeError(
            f"{container.path}: {name!r} has {shape[0]} rows; {config.place} names {len(fitting[0])} tokens"
        )
    return Rows((f"{module}.weight",), name, fitting[0])


def _owns(module: str, key: str, leaf: str = "") -> bool:
    """Whether a parameter that a config names by its end belongs to a module."""
    name = f"{module}.{leaf or key.rpartition('.')[2]}"
    return name == key or name.endswith(f".{key}")


def _stacks(
    container: Container, config: PeftConfig, module: str, keys: Sequence[str], nested: Sequence[Module]
) -> list[Part]:
    """The pairs of a module's parameters: which of them is whose is told by shapes, when the base is known."""
    targets = tuple(dict.fromkeys(f"{module}.{key.rpartition('.')[2]}" for key in keys))
    numbers = tuple((config.rank_of(target), config.scale_of(target)) for target in targets)
    parts: list[Part] = []
    for found in nested:
        shapes = _both(container, found, "lora_A", "lora_B", module)
        if len(shapes[0]) != 2 or len(shapes[1]) != 2:
            check_ranks(container, found.names["lora_A"], found.names["lora_B"], shapes, numbers[0][0], config.place)
        rank, scale = numbers[0]
        down, up = found.names["lora_A"], found.names["lora_B"]
        parts.append(Pair(targets, down, up, shapes, scale, rank, "stack", numbers=numbers))
    return parts
