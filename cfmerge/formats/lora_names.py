"""LoRA files that are no PEFT directory: diffusers' `pytorch_lora_weights.safetensors`, and kohya's single files.

diffusers: `unet.MODULE.lora_A.weight` (or `.lora.down.weight`, or `.processor.to_q_lora.down.weight`), rank and alpha
in the metadata. kohya: `lora_unet_MODULE.lora_down.weight` with the module's dots as `_`, `.alpha`, `.dora_scale`.
"""

import dataclasses
import json
import re
from collections import defaultdict
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from cfmerge.errors import CfmergeError
from cfmerge.formats.adapter_parts import Adapter, Added, Pair, Part
from cfmerge.formats.base import Container, Source
from cfmerge.formats.containers import open_container
from cfmerge.formats.peft import check_ranks
from cfmerge.formats.peft_config import PeftConfig, peft_config
from cfmerge.models.patterns import tell

STEM = "pytorch_lora_weights"
METADATA = "lora_adapter_metadata"
FACTOR = re.compile(
    r"(?P<module>.+?)(?P<old>_lora|\.lora|\.lora_linear_layer)?\.(?P<what>down|up|lora_A|lora_B|lora_down|lora_up)"
    r"(?:\.(?!(?:weight|bias)$)[^.]+)?\.(?P<leaf>weight|bias)$"
)
BESIDE = re.compile(r"(?P<module>.+)\.(?P<what>alpha|dora_scale|lora_magnitude_vector)(?:\.[^.]+)*$")
A, B = {"down", "lora_A", "lora_down"}, {"up", "lora_B", "lora_up"}
KOHYA = re.compile(r"lora_(?P<part>unet|transformer|te\d?|text_encoder(?:_\d)?)_(?P<module>.+)")
COMPONENTS = re.compile(r"(unet|transformer|text_encoder(?:_\d)?|prior|controlnet|image_encoder)\.")
# The beginnings of the base's names that each part of kohya's may stand for: pipelines, components, single files.
PLACES: Mapping[str, tuple[str, ...]] = {
    "unet": ("unet/", "transformer/", "model.diffusion_model.", "diffusion_model.", ""),
    "te": ("text_encoder/", "cond_stage_model.transformer.", "text_encoders.clip_l.transformer.", ""),
    "te1": ("text_encoder/", "conditioner.embedders.0.transformer.", "text_encoders.clip_l.transformer.", ""),
    "te2": ("text_encoder_2/", "conditioner.embedders.1.", "text_encoders.clip_g.transformer.", ""),
    "te3": ("text_encoder_3/", "text_encoders.t5xxl.transformer.", ""),
}
CLIP = {"q": "q_proj", "k": "k_proj", "v": "v_proj", "out": "out_proj"}


@dataclasses.dataclass
class Found:
    """The names in the file of what belongs to one module."""

    down: str = ""
    up: str = ""
    bias: str = ""
    alpha: str = ""
    magnitude: str = ""
    kohya: bool = False


def find_file(directory: Path) -> Path | None:
    """diffusers' file of an adapter in a directory; None if there is none."""
    found = (directory / f"{STEM}{suffix}" for suffix in (".safetensors", ".bin"))
    return next((path for path in found if path.is_file()), None)


def read_lora(path: Path, base: Source) -> Adapter:
    """The adapter in diffusers' directory, or in a single file in diffusers' or kohya's names.

    Raises:
        CfmergeError: tensors that are no part of a LoRA, pairs that are not whole, modules that the base lacks.
    """
    file = find_file(path) if path.is_dir() else path
    assert file is not None
    container = open_container(file)
    modules, unknown = _modules(container)
    if unknown:
        raise CfmergeError(
            f"{file}: {tell(unknown, container.tensors)}: not known as parts of a LoRA (A and B, with alpha); factors "
            "of LoHa, LoKr and with a middle one, and whole differences, are not read: merge it with the tool that "
            "it was trained with"
        )
    configs, missing, parts = _configs(container), [], []
    flat: dict[str, dict[str, list[str]]] = {}
    for module, found in modules.items():
        targets = _flattened(module, base, flat) if found.kohya else [_dotted(module, base)]
        if not targets:
            missing.append(module)
            continue
        if len(targets) > 1:
            raise CfmergeError(f"{file}: {module!r} may be each of {', '.join(map(repr, targets))} of the base")
        parts += _parts(container, module, targets[0], found, configs)
    if missing:
        raise CfmergeError(
            f"{file}: {len(missing)} modules are none of the base ({base.path}) when its names are written with _: "
            f"{tell(missing)}; its modules look like {next(iter(base.tensors)).rpartition('.')[0]!r}. Is it an adapter "
            "of this base, and is the base in the layout (diffusers, or one file) that it was trained for?"
        )
    notes = tuple(f"{path}: {note}" for note in (*container.notes, *_told(configs)))
    return Adapter(path, container, container.files, parts, notes=notes)


def _modules(container: Container) -> tuple[dict[str, Found], list[str]]:
    """`{module: names}`, and names that are no part of a LoRA."""
    modules: dict[str, Found] = defaultdict(Found)
    unknown = []
    for name in container.tensors:
        factor, beside = FACTOR.match(name), BESIDE.match(name)
        if factor and (factor["old"] or factor["what"] not in {"down", "up"}):
            found = modules[_plain(factor["module"], factor["old"] == "_lora")]
            key = "bias" if factor["leaf"] == "bias" else "down" if factor["what"] in A else "up"
        elif beside and not factor:
            found = modules[_plain(beside["module"], beside["module"].endswith("_lora"))]
            key = "alpha" if beside["what"] == "alpha" else "magnitude"
        else:
            unknown.append(name)
            continue
        if getattr(found, key):
            raise CfmergeError(f"{container.path}: {name!r} and {getattr(found, key)!r} are one thing of one module")
        setattr(found, key, name)
        found.kohya |= bool(KOHYA.match(name))
    return modules, unknown


def _plain(module: str, old: bool) -> str:
    """A module's name without the processor of an attention, which older versions of diffusers hung factors on."""
    if not old:
        return module
    module = module.removesuffix("_lora").replace(".processor.", ".")
    before, _, last = module.rpartition(".")
    what = last.removeprefix("to_")
    if "text_model" in before or before.endswith("self_attn"):
        return f"{before}.{CLIP.get(what, last)}"
    return f"{before}.to_out.0" if last == "to_out" else module


def _configs(container: Container) -> dict[str, PeftConfig]:
    """`{component: config}` of the metadata that diffusers writes."""
    text = container.metadata.get(METADATA)
    if not text:
        return {}
    place = f"{container.path} ({METADATA})"
    try:
        content = json.loads(text)
    except ValueError as error:
        raise CfmergeError(f"{place}: is not valid JSON: {error}") from None
    if not isinstance(content, dict):
        raise CfmergeError(f"{place}: should hold a JSON object, found {type(content).__name__}")
    by_component: dict[str, dict[str, Any]] = defaultdict(dict)
    for key, value in content.items():
        component, _, field = key.rpartition(".")
        by_component[component][field] = value
    return {component: peft_config(own, place) for component, own in by_component.items()}


def _told(configs: Mapping[str, PeftConfig]) -> Iterable[str]:
    return dict.fromkeys(note for config in configs.values() for note in config.notes)


def _parts(
    container: Container, module: str, target: str, found: Found, configs: Mapping[str, PeftConfig]
) -> list[Part]:
    if not (found.down and found.up):
        names = [name for name in dataclasses.astuple(found) if isinstance(name, str) and name]
        lacks = "A (down)" if not found.down else "B (up)"
        raise CfmergeError(f"{container.path}: module {module!r} has no {lacks} beside {names[0]!r}; fetch it again")
    shapes = container.tensors[found.down].shape, container.tensors[found.up].shape
    component, _, inner = module.partition(".")
    config = configs.get(component)
    rank = shapes[0][0] if shapes[0] else 0
    if config:
        rank, place = config.rank_of(inner), config.place
    else:
        place = str(container.path)
    check_ranks(container, found.down, found.up, shapes, rank, place)
    scale = config.scale_of(inner) if config else 1.0
    if found.alpha:
        scale = _scalar(container, found.alpha) / rank
    pair = Pair((f"{target}.weight",), found.down, found.up, shapes, scale, rank, magnitude=found.magnitude,
                input_norms=found.kohya)  # fmt: skip
    return [pair, *([Added((f"{target}.bias",), found.bias, scale)] if found.bias else [])]


def _scalar(container: Container, name: str) -> float:
    value = np.asarray(container.read(name)).reshape(-1)
    if value.size != 1 or not np.isfinite(value.astype(np.float64)).all():
        raise CfmergeError(f"{container.path}: {name!r} must be one number, found shape {value.shape}")
    return float(value[0])


def _dotted(module: str, base: Source) -> str:
    """The base's name of a module that begins with its component's."""
    component = COMPONENTS.match(module)
    if component is None:
        return module
    inner = module[component.end() :]
    prefixes = {folder.prefix for folder in base.folders}
    if f"{component[1]}/" in prefixes:
        return f"{component[1]}/{inner}"
    return inner if "" in prefixes and f"{module}.weight" not in base.tensors else module


def _flattened(module: str, base: Source, known: dict[str, dict[str, list[str]]]) -> list[str]:
    """The base's modules whose names are that of kohya's where dots are written as `_`.

    Args:
        known: what was found for the beginnings of names before.
    """
    match = KOHYA.match(module)
    if match is None:
        return []
    part = match["part"].replace("text_encoder", "te").replace("te_", "te").replace("transformer", "unet")
    for place in PLACES.get(part, ("",)):
        if place not in known:
            known[place] = defaultdict(list)
            for name in base.tensors:
                if name.startswith(place) and name.endswith(".weight"):
                    plain = name.removesuffix(".weight")
                    known[place][re.sub(r"[./]", "_", plain.removeprefix(place))].append(plain)
        if match["module"] in known[place]:
            return known[place][match["module"]]
    return []
