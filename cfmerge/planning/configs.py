"""Notes on configs of base and experts that differ in what changes the meaning of the weights.

A merged model has one config, so that weights which were trained for another rope, activation or pooling do not mean
there what they meant. All keys are compared but those that are known not to matter; a new library's keys are told.
"""

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from cfmerge.formats import Source

SILENT = re.compile(
    r"(^|\.)(_.*|architectures|auto_map|transformers_version|(torch_)?dtype|torchscript|model_type|use_cache|return_dict\w*"
    r"|output_(attentions|hidden_states|scores|past|router_logits)|attn_implementation|use_flash_attn\w*|use_sdpa|gradient_checkpointing\w*|.*dropout\w*|.*drop_rate\w*"
    r"|.*layerdrop|initializer\w*|init_\w+|\w*_init\w*|num_labels|id2label|label2id|problem_type|finetuning_task"
    r"|task_specific_params|quantization_config|compression_config|quantization"
    r"|(pad|bos|eos|sep|cls|unk|mask|decoder_start|forced_\w+)_token_id|prefix|bad_words_ids|suppress_tokens"
    r"|begin_suppress_tokens|max_length|min_length|do_sample|early_stopping|num_beams\w*|num_return_sequences|diversity_penalty"
    r"|top_k|top_p|typical_p|repetition_penalty|length_penalty|no_repeat_ngram_size|encoder_no_repeat_ngram_size"
    r"|remove_invalid_values|exponential_decay_length_penalty|chunk_size_feed_forward|pretraining_tp|pruned_heads"
    r"|router_\w*loss\w*|.*_loss_\w*|loss_\w*|ctc_\w+|apply_spec_augment|mask_(time|feature)_\w+|unsloth\w*|name|license"
    r"|language|classifier\w*|summary_\w+|transformers\.js_config\w*|processor_class|image_processor_type"
    r"|feature_extractor_type|is_composition|cross_attention_hidden_size|vocab_size)(\.|$)"
)
# these keys are told too where only some of the models state them: libraries have other defaults
STATED = re.compile(
    r"rope|theta|rotary|window|softcap|multiplier|logit_scale|attention_scale|_act$|_act_fn$|activation"
    r"|experts_per|top_?k_prob|scaling_factor|scale_embedding|attn_scalar|position_embedding_type|pool|is_decoder|causal"
)
DEFAULTS: Mapping[str, Any] = {
    "rope_theta": 10000, "rope.rope_type": "default", "partial_rotary_factor": 1, "rope.partial_rotary_factor": 1,
}  # fmt: skip
CONFIG = re.compile(r"config\.json$")
OTHER_CONFIGS = re.compile(  # configs for generation, for reading text or images, and for training
    r"(^|/)(generation_config|tokenizer_config|\w*quant\w*_config|quantize_config|adapter_config|trainer_\w*)\.json$"
)
SHOWN = 8


def config_notes(base: Source, experts: Mapping[str, Source]) -> list[str]:
    """One note for every config file in which base and experts differ."""
    notes = []
    of_experts = {name: _configs(expert) for name, expert in experts.items()}
    for file, ours in _configs(base).items():
        theirs = {name: configs[file] for name, configs in of_experts.items() if file in configs}
        differing = differences(ours, theirs)
        if differing:
            told = [
                f"{key} {_short(value)} in the base, "
                + ", ".join(f"{_short(other)} in {name!r}" for name, other in others.items())
                for key, (value, others) in list(differing.items())[:SHOWN]
            ]
            more = len(differing) - len(told)
            notes.append(
                f"{file} differs in what may change the meaning of weights: {'; '.join(told)}"
                + (f"; and {more} more keys" if more else "")
                + ". The output has the base's, unless side_files says otherwise"
            )
    return notes


def differences(base: Mapping[str, Any], experts: Mapping[str, Mapping[str, Any]]) -> dict[str, tuple[Any, dict]]:
    """`{key: (the base's value, {expert: its value})}` of the keys that matter; the experts that differ only."""
    ours = _plain(base)
    theirs = {name: _plain(expert) for name, expert in experts.items()}
    found = {}
    for key in dict.fromkeys(key for config in (ours, *theirs.values()) for key in config):
        if SILENT.search(key):
            continue
        others = {name: config.get(key) for name, config in theirs.items() if _differ(key, ours, config)}
        if others:
            found[key] = ours.get(key), others
    return found


def _differ(key: str, ours: Mapping[str, Any], theirs: Mapping[str, Any]) -> bool:
    values = [config.get(key, _default(key, config)) for config in (ours, theirs)]
    if None in values:  # not stated by one of them, and without a default that is known
        return any(values) and bool(STATED.search(key))
    return values[0] != values[1]


def _default(key: str, config: Mapping[str, Any]) -> Any:
    """The value that a key has where it is not stated; None if that is not known."""
    inner, _, last = key.rpartition(".")
    before = f"{inner}." if inner and inner != "rope" else ""
    heads, hidden = config.get(f"{before}num_attention_heads"), config.get(f"{before}hidden_size")
    if last == "num_key_value_heads":
        return heads
    if last == "head_dim" and isinstance(heads, int) and isinstance(hidden, int) and heads:
        return hidden // heads
    return DEFAULTS.get(key.removeprefix(before))


def _plain(config: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested keys joined by dots; rope's under one name, wherever a version of the library puts them."""
    plain: dict[str, Any] = {}
    for key, value in config.items():
        if key in {"rope_scaling", "rope_parameters"} and isinstance(value, Mapping):
            inner = {("rope_type" if k == "type" else k): v for k, v in value.items()}
            if "rope_theta" in inner:
                plain[f"{prefix}rope_theta"] = inner.pop("rope_theta")
            plain |= _plain(inner, f"{prefix}rope.")
        elif isinstance(value, Mapping):
            plain |= _plain(value, f"{prefix}{key}.")
        elif value is not None:
            plain[f"{prefix}{key}"] = value
    return plain


def _short(value: Any) -> str:
    text = "not stated" if value is None else json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 60 else text[:57] + "..."


def _configs(source: Source) -> dict[str, Mapping[str, Any]]:
    """The configs of a model by their files' names; the main one is `config.json` wherever it lies."""
    main = source.folders[0]
    names = [name for name in source.side_files if CONFIG.search(name) and not OTHER_CONFIGS.search(name)]
    if main.prefix:  # a pipeline: each component has its own
        return {name: _read(source.side_files[name]) for name in names}
    inner = [name for name in names if name not in {"config.json", f"{main.name}/config.json"}]
    configs = {name: _read(source.side_files[name]) for name in inner}
    return {"config.json": source.config, **configs} if source.config else configs


def _read(path: Path) -> Mapping[str, Any]:
    """The object in a JSON file; {} where it is none (whether it must be one, the format says)."""
    try:
        content = json.loads(path.read_text())
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}
