"""Adapters whose factors lie among a model's weights, or alone: factors are no weights."""

import re
from collections.abc import Callable, Mapping

from cfmerge.errors import CfmergeError
from cfmerge.formats.base import Source
from cfmerge.models.patterns import tell

FACTORS = re.compile(
    r"((^|[./_])lora[./_](A|B|embedding_A|embedding_B|magnitude_vector|down|up|mid)"
    r"|[./](hada_w\d_[ab]|lokr_w\d(_[ab])?))([./]|$)"
)


def factors(source: Source) -> list[str]:
    """The names of a model's tensors that are factors of an adapter."""
    return [name for name in source.tensors if FACTORS.search(name)]


def check_adapters(base: Source, experts: Mapping[str, Source], skipped: Callable[[str], bool]) -> list[str]:
    """A note on factors that base and experts both have, and that are merged each for itself.

    Args:
        base, experts: the models.
        skipped: whether a rule leaves a name out.

    Raises:
        CfmergeError: an expert holds factors of an adapter, and the base does not.
    """
    found = {name: [f for f in factors(expert) if not skipped(f)] for name, expert in experts.items()}
    if factors(base):
        return [
            f"{tell(factors(base))}: factors of an adapter; each is merged by itself, and the product of merged "
            "factors is not the merged product"
        ]
    problems = [
        f"expert {name!r} ({experts[name].path}) holds an adapter (LoRA) that is not merged into its weights: "
        f"{tell(names, experts[name].tensors)}. Merge it first: peft's model.merge_and_unload().save_pretrained(OUT)"
        for name, names in found.items() if names
    ]  # fmt: skip
    if problems:
        raise CfmergeError("\n".join(problems))
    return []
