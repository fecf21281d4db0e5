"""Quantised models: the scheme, and the way out. Their stored numbers mean nothing without their scales.

The stored tensors show it: floats of 8 bits and less; integers where weights should be, with scales beside them or
under the names that packers use. Its config tells the scheme's name; a config alone, over plain floats, was left by
somebody who has dequantised the model.
"""

import dataclasses
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from cfmerge.formats.base import Source, TensorInfo
from cfmerge.models import is_buffer, is_float

PACKED = re.compile(r"(^|[._/])(weight|kernel|qweight|weight_packed|W_q|_data|codes|blocks|weight_qdata)$")
SCALES = re.compile(
    r"[.](absmax|nested_absmax|quant_map|quant_state\..*|SCB|weight_format|qzeros|g_idx|codebooks|weight_shape"
    r"|weight_(scale|zero_point)\w*|_quantization_scale|scales)$|_(scales|scale_inv)$"
)
INTEGERS = {"int8", "uint8", "int32", "uint32", "int16", "uint16"}  # 64 bits and booleans are buffers
NAMES = {
    "bitsandbytes": "bitsandbytes",
    "gptq": "GPTQ",
    "awq": "AWQ",
    "fp8": "fp8",
    "fbgemm_fp8": "fp8 (FBGEMM)",
    "compressed-tensors": "compressed-tensors",
    "mxfp4": "MXFP4",
    "nvfp4": "NVFP4",
    "hqq": "HQQ",
    "aqlm": "AQLM",
    "quanto": "Quanto",
    "torchao": "torchao",
    "eetq": "EETQ",
    "bitnet": "BitNet",
    "modelopt": "ModelOpt",
}
SIDE = {"quantize_config.json": "GPTQ", "quant_config.json": "AWQ", "hf_quant_config.json": "ModelOpt"}
DEQUANTIZE = "--dequantize reads it as bfloat16; recipe: 'dequantize: true'"
WAYS_OUT = {  # the call of transformers that gives plain weights, by the beginning of the scheme's name
    "bitsandbytes": ").dequantize()",
    "MXFP4": ", quantization_config=Mxfp4Config(dequantize=True))",
    "compressed-tensors": ", quantization_config=CompressedTensorsConfig(run_compressed=False))",
}


@dataclasses.dataclass(frozen=True)
class Quantised:
    """The quantisation of a model: the scheme's name, and a tensor by which it is known."""

    scheme: str
    tensor: str
    count: int


def quantised(source: Source) -> Quantised | None:
    """The quantisation of the model; None if its weights are plain numbers."""
    told = told_scheme(source)
    owners = _owners(source.tensors)
    found = [name for name, info in source.tensors.items() if _is_packed(name, info, owners, bool(told))]
    if not found:
        return None
    return Quantised(told or _scheme(found, source.tensors), found[0], len(found))


def told_scheme(source: Source) -> str:
    """The scheme that the config, or a file beside it, names; "" where none is."""
    config = source.config
    inner = [value for value in config.values() if isinstance(value, Mapping)]  # text_config, ...
    for place in (config, *inner):
        for key in ("quantization_config", "compression_config", "quantization"):
            given = place.get(key)
            if isinstance(given, Mapping) and given:
                return _named(given, key)
    return next((name for file, name in SIDE.items() if file in source.side_files), "")


def _named(given: Mapping[str, Any], key: str) -> str:
    method = str(given.get("quant_method") or given.get("quant_algo") or given.get("format") or "")
    name = NAMES.get(method, method) or ("MLX" if key == "quantization" and "group_size" in given else key)
    bits = given.get("bits") or (4 if given.get("load_in_4bit") else 8 if given.get("load_in_8bit") else None)
    return f"{name}, {bits} bits" if isinstance(bits, int) else name


def _owners(names: Iterable[str]) -> set[str]:
    """The modules, and the tensors, that have scales."""
    scales = [name for name in names if SCALES.search(name)]
    return {name[: match.start()] for name in scales if (match := SCALES.search(name))}


def _is_packed(name: str, info: TensorInfo, owners: set[str], told: bool) -> bool:
    dtype = info.dtype.name
    if is_float(dtype):
        return info.dtype.itemsize < 2
    if told and len(info.shape) > 1 and dtype != "bool" and not is_buffer(name, info.shape):
        return True
    if dtype not in INTEGERS or SCALES.search(name) or not info.shape:
        return False
    weight = bool(PACKED.search(name)) and (told or len(info.shape) > 1)
    return weight or not owners.isdisjoint({name, name.rpartition(".")[0], re.sub(r"_(blocks|packed)$", "", name)})


def _scheme(found: Sequence[str], tensors: Mapping[str, TensorInfo]) -> str:
    """The scheme's name, as far as the names of the tensors tell it."""

    def some(pattern: str, names: Iterable[str] = tensors) -> bool:
        return any(re.search(pattern, name) for name in names)

    eight = "float8" in tensors[found[0]].dtype.name
    signs = {
        "bitsandbytes, 4 bits": some(r"\.(absmax|quant_map|quant_state\.)"),
        "bitsandbytes, 8 bits": some(r"\.SCB$"),
        "GPTQ": some(r"\.g_idx$"),
        "AWQ or GPTQ": some(r"\.qweight$", found),
        "MXFP4": some(r"_blocks$", found),
        "compressed-tensors": some(r"\.weight_packed$", found),
        "HQQ": some(r"\.W_q$", found),
        "NVFP4": some(r"\.weight_scale_2$"),
        "Quanto": some(r"\.weight\._data$", found),
        "torchao": some(r"weight_qdata$", found),
        "fp8": eight and some("scale"),
        "fp8, without scales": eight,
        "MLX": some(r"\.scales$") and some(r"\.biases$"),
    }
    return next((scheme for scheme, seen in signs.items() if seen), f"packed {tensors[found[0]].dtype.name}")


def problem(who: str, source: Source, found: Quantised, base: Source | None = None) -> str:
    """The message about a quantised model, `base` or `expert 'NAME'`."""
    info = source.tensors[found.tensor]
    theirs = base.tensors.get(found.tensor) if base is not None and base is not source else None
    more = f" and {found.count - 1} more" if found.count > 1 else ""
    other = f", in the base {theirs.dtype.name}" if theirs else ""
    return (
        f"{who} ({source.path}) is quantised ({found.scheme}): {found.tensor!r}{more} is {info.dtype.name}{other}. "
        f"It must be dequantised first{_way_out(source, found)}, or take the model that it was made from; merge in "
        "bfloat16 or float32, and quantise the result"
    )


def _way_out(source: Source, found: Quantised) -> str:
    """How it is dequantised: here, or by transformers where that can."""
    scheme, info = found.scheme, source.tensors[found.tensor]
    if info.dtype.name.startswith("float8") and scheme != "NVFP4":
        return f" ({DEQUANTIZE})"
    if not source.config:
        return ""
    call = next((call for start, call in WAYS_OUT.items() if scheme.startswith(start)), "")
    directory = source.path if source.path.is_dir() else source.path.parent
    model = next(iter(source.config.get("architectures") or ()), "AutoModel")
    start = f"{model}.from_pretrained({str(directory)!r}, dtype='bfloat16'"
    return f" (transformers: {start}{call}.save_pretrained('OUT'))" if call else ""


def problems(base: Source, experts: Mapping[str, Source]) -> list[str]:
    """One line for every model that is quantised."""
    models = {"base": base, **{f"expert {name!r}": expert for name, expert in experts.items()}}
    return [
        problem(who, source, found, base) for who, source in models.items() if (found := quantised(source)) is not None
    ]


def notes(base: Source, experts: Mapping[str, Source]) -> list[str]:
    """One line for every model whose config says that it is quantised, though its weights are plain floats."""
    models = {"base": base, **{f"expert {name!r}": expert for name, expert in experts.items()}}
    return [
        f"{who} ({source.path}): its config.json says that it is quantised ({scheme}), but its weights are plain "
        "floats: they are read as dequantised"
        + ("; take the entry out of the output's config.json too" if source is base else "")
        for who, source in models.items()
        if (scheme := told_scheme(source)) and not quantised(source)
    ]
