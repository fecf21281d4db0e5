"""adapter_config.json of PEFT: what of it changes the meaning of an adapter's tensors, and what is refused."""

import dataclasses
import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from cfmerge.errors import CfmergeError

FILE = "adapter_config.json"
CONVERT = "convert it to LoRA with peft: peft.tuners.lora.conversion.save_as_lora(OUT, model, rank=...)"
MUTATING = ("pissa", "olora", "corda", "lora_ga", "loftq")  # inits that change the base's weights
REFUSED = {  # fields that make the change something else than s B A, and the way out
    "layer_replication": "it repeats layers of its base; merge it with peft: merge_and_unload().save_pretrained(OUT)",
    "alora_invocation_tokens": "it acts after some tokens only (activated LoRA), so that it has no delta",
    "use_qalora": "it acts on pooled inputs (QA-LoRA); merge it with peft: merge_and_unload().save_pretrained(OUT)",
    "use_bdlora": "its factors are block-diagonal; merge it with peft: merge_and_unload().save_pretrained(OUT)",
    "kasa_config": "it cuts its base's spectrum (KaSA); merge it with peft: merge_and_unload().save_pretrained(OUT)",
    "arrow_config": "it chooses among adapters at every token (Arrow), so that it has no delta; name them one by one",
    "velora_config": "VeLoRA is not read; merge it with peft: merge_and_unload().save_pretrained(OUT)",
    "monteclora_config": "it draws its factors at random (MonteCLoRA); merge it with peft: "
    "merge_and_unload().save_pretrained(OUT)",
    "megatron_config": "its factors are cut by Megatron's tensor parallelism; gather and save them without it",
}
KNOWN = {
    *REFUSED,
    *("task_type", "peft_type", "auto_mapping", "peft_version", "base_model_name_or_path", "revision"),
    *("inference_mode", "r", "target_modules", "exclude_modules", "lora_alpha", "lora_dropout", "fan_in_fan_out"),
    *("bias", "use_rslora", "modules_to_save", "init_lora_weights", "layers_to_transform", "layers_pattern"),
    *("rank_pattern", "alpha_pattern", "megatron_core", "trainable_token_indices", "loftq_config", "eva_config"),
    *("corda_config", "lora_ga_config", "use_dora", "qalora_group_size", "lora_bias", "target_parameters"),
    *("ensure_weight_tying", "target_modules_to_tie", "runtime_config"),
}


@dataclasses.dataclass(frozen=True)
class PeftConfig:
    """The fields that say how tensors become a delta.

    Attributes:
        place: the file, for messages.
        turned: `fan_in_fan_out`: matrices are stored `(in, out)`.
        parameters: `target_parameters`, the ends of names of parameters that are no module's weight.
        tied: `ensure_weight_tying`: what changes one of two tied tensors changes both.
        tokens: `trainable_token_indices`, by the end of the module's name; "" for any.
    """

    place: str
    rank: int
    alpha: float
    ranks: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    alphas: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    root: bool = False
    turned: bool = False
    parameters: tuple[str, ...] = ()
    tokens: Mapping[str, tuple[int, ...]] = dataclasses.field(default_factory=dict)
    trained_on: str = ""
    tied: bool = False
    notes: tuple[str, ...] = ()

    def rank_of(self, module: str) -> int:
        return int(_by_pattern(self.ranks, module, self.rank))

    def scale_of(self, module: str) -> float:
        rank = self.rank_of(module)
        return float(_by_pattern(self.alphas, module, self.alpha)) / (math.sqrt(rank) if self.root else rank)


def _by_pattern(patterns: Mapping[str, Any], module: str, default: Any) -> Any:
    """The value of the first pattern that matches, as PEFT has it."""
    return next((value for key, value in patterns.items() if re.match(rf"(.*\.)?({key})$", module)), default)


def peft_config(content: Mapping[str, Any], place: str | Path) -> PeftConfig:
    """The config in plain values.

    Raises:
        CfmergeError: what it says is no LoRA, or one that is not s B A over the base that is merged.
    """
    place = str(place)
    kind = str(content.get("peft_type", "LORA")).rpartition(".")[2].upper()
    if kind != "LORA":
        raise CfmergeError(f"{place}: peft_type {kind} is not read, LORA is; {CONVERT}")
    for key, way_out in REFUSED.items():
        if content.get(key):
            raise CfmergeError(f"{place}: {key} is set, which is not read: {way_out}")
    init = str(content.get("init_lora_weights", True))
    if init.lower().startswith(MUTATING):
        raise CfmergeError(
            f"{place}: init_lora_weights {init!r} has changed the base before training, so that the adapter is none of "
            "the base itself. Convert it with peft: model.save_pretrained(OUT, "
            "path_initial_model_for_weight_conversion=INITIAL_ADAPTER), which sets init_lora_weights to true"
        )
    unknown = [f"{key}: {value!r}" for key, value in content.items() if key not in KNOWN and value]
    notes = (f"{place}: not known, and not heeded: {', '.join(unknown)}",) if unknown else ()
    return PeftConfig(
        place,
        _checked(content, place, "r", True, 8),
        _checked(content, place, "lora_alpha", False, 8),
        _patterns(content, place, "rank_pattern", True),
        _patterns(content, place, "alpha_pattern", False),
        bool(content.get("use_rslora")),
        bool(content.get("fan_in_fan_out")),
        tuple(map(str, content.get("target_parameters") or ())),
        _tokens(content.get("trainable_token_indices"), place),
        str(content.get("base_model_name_or_path") or ""),
        bool(content.get("ensure_weight_tying")),
        notes,
    )


def _checked(content: Mapping[str, Any], place: str, key: str, whole: bool, default: Any = None) -> Any:
    """A number of the config: a rank, if it is whole, else any number."""
    value = content.get(key, default)
    fine = type(value) is int and value > 0 if whole else type(value) in {int, float} and math.isfinite(value)
    if not fine:
        raise CfmergeError(
            f"{place}: {key} must be a {'positive whole number' if whole else 'number'}, found {value!r}"
        )
    return value


def _patterns(content: Mapping[str, Any], place: str, key: str, whole: bool) -> Mapping[str, Any]:
    found = content.get(key) or {}
    if not isinstance(found, Mapping):
        raise CfmergeError(f"{place}: {key} must be a mapping {{pattern: number}}, found {found!r}")
    for pattern in found:
        _checked(found, f"{place}: {key}", pattern, whole)
        try:
            re.compile(pattern)
        except re.error as error:
            raise CfmergeError(f"{place}: {key}: {pattern!r} is no regular expression: {error}") from None
    return found


def _tokens(found: Any, place: str) -> dict[str, tuple[int, ...]]:
    by_module = found if isinstance(found, Mapping) else {"": found} if found else {}
    for indices in by_module.values():
        if not isinstance(indices, list) or not all(type(i) is int and i >= 0 for i in indices):
            raise CfmergeError(f"{place}: trainable_token_indices must be lists of token numbers, found {found!r}")
    return {str(module): tuple(indices) for module, indices in by_module.items()}
