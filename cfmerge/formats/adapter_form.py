"""How a merged model stands in an adapter: a form for each tensor, and adapter_config.json."""

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from cfmerge.errors import CfmergeError
from cfmerge.formats.base import Source
from cfmerge.models import Kind, Parameter
from cfmerge.models.patterns import patterns, tell

TASKS = {"ForCausalLM": "CAUSAL_LM", "ForConditionalGeneration": "SEQ_2_SEQ_LM"}
LAYOUTS = {"oi", "io", "oii", "oiii", "oiiii"}


def module_of(name: str) -> str:
    """The module that a tensor belongs to."""
    return name.rpartition(".")[0]


def form_of(parameter: Parameter) -> str:
    """How a tensor stands in an adapter: as `factors`, in `full`, or "" where it has no place."""
    leaf = parameter.name.rpartition(".")[2]
    matrix = parameter.kind in {Kind.MATRIX, Kind.CONVOLUTION, Kind.HEAD} and parameter.layout in LAYOUTS
    if matrix and leaf == "weight" and "." in parameter.name:
        return "factors"
    plain = parameter.kind is not Kind.OTHER and leaf in {"weight", "bias"} and "." in parameter.name
    return "full" if plain and (leaf == "weight" or len(parameter.shape) == 1) else ""


def check_forms(target: Path, base: Source, merged: Mapping[str, Parameter]) -> None:
    """Raises `CfmergeError` if a tensor that is merged has no place in an adapter."""
    if any(folder.prefix for folder in base.folders):
        names = ", ".join(folder.name for folder in base.folders)
        raise CfmergeError(f"output {target}: an adapter is over one model; the base has {names}: name one")
    lost = [name for name, parameter in merged.items() if not form_of(parameter)]
    if not lost:
        return
    found = patterns(lost, [name for name in merged if name not in lost])
    rules = " ".join(f'--rule "match={pattern.glob}, method=keep-base"' for pattern in found[:6])
    raise CfmergeError(
        f"output {target}: {tell(lost, merged)}: no weight or bias of a module, which is all that an adapter can "
        f"change. Leave them at the base: {rules}; or write a model, without adapter_out"
    )


def peft_config_of(
    ranks: Mapping[str, int], saved: Iterable[str], biases: bool, name: str, config: Mapping[str, Any]
) -> dict[str, Any]:
    """The content of adapter_config.json: alpha is the rank of every module, so that every scale is 1."""
    common = max(set(ranks.values()), key=list(ranks.values()).count, default=1)
    others = {module: rank for module, rank in ranks.items() if rank != common}
    ordered = sorted(ranks, key=lambda module: -len(module))  # PEFT takes the first pattern that is a name's end
    ends = tuple(f".{module}" for module in others)
    pattern = {m: ranks[m] for m in ordered if m in others or (f".{m}").endswith(ends)}
    architecture = next(iter(config.get("architectures") or ()), "")
    return {
        "peft_type": "LORA",
        "task_type": next((task for end, task in TASKS.items() if str(architecture).endswith(end)), None),
        "base_model_name_or_path": name,
        "r": common,
        "lora_alpha": common,
        "target_modules": sorted(ranks),
        "rank_pattern": pattern,
        "alpha_pattern": pattern,
        "modules_to_save": sorted(saved) or None,
        "bias": "all" if biases else "none",
        "lora_dropout": 0.0,
        "fan_in_fan_out": False,
        "use_rslora": False,
        "inference_mode": True,
    }
