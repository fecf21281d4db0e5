"""Tensors that are one in every model: bytes decide, and the ties of libraries say where to look."""

import dataclasses
import re
from collections import Counter, defaultdict
from collections.abc import Callable, Mapping, Sequence

import numpy as np

from cfmerge.formats import Source
from cfmerge.models import is_buffer
from cfmerge.models.heads import may_be_head
from cfmerge.models.patterns import tell
from cfmerge.models.ties import stated
from cfmerge.recipe import Expert

SAMPLE = 64  # entries at the start, in the middle and at the end of a tensor
LAYERS = 12  # names that differ in numbers alone, up to which they are looked at


@dataclasses.dataclass
class Ties:
    """`aliases` maps names of the base to the one that is merged; `copies[t]` are expert t's stored copies."""

    aliases: dict[str, str]
    copies: list[set[str]]
    notes: list[str]
    problems: list[str]


def settle_ties(
    base: Source,
    experts: Sequence[Source],
    specs: Sequence[Expert],
    sources: Sequence[dict[str, str]],
    apart: Callable[[str, str], bool],
) -> Ties:
    """The tensors that are one; completes `sources` through them.

    Args:
        base, experts, specs, sources: the models, and the experts' names for the base's.
        apart: whether the rules treat two names otherwise, so that only a stated tie joins them.
    """
    result = Ties({}, [set() for _ in experts], [], [])
    stored = [set(names.values()) for names in sources]
    found: list[str] = []
    for alias, name in _candidates(base):
        root = result.aliases.get(name, name)
        claimed = base.ties.get(alias) == name
        if alias == root or alias in result.aliases or (not claimed and apart(alias, root)):
            continue
        different = _where_different(base, experts, specs, sources, alias, root)
        if different is None:
            result.aliases[alias] = root
            found += [] if claimed else [alias]
            _complete(alias, root, sources)
        elif claimed:
            _untie(alias, root, different, base, result)
    for alias in result.aliases:  # an alias of an alias
        while result.aliases[alias] in result.aliases:
            result.aliases[alias] = result.aliases[result.aliases[alias]]
    if found:
        result.notes.append(
            f"{tell(found)}: equal to {result.aliases[found[0]]!r}{' and others' if len(found) > 1 else ''} in every "
            "model, and so merged once and written under every name"
        )
    for number, (spec, expert, names) in enumerate(zip(specs, experts, sources, strict=True)):
        _copies(base, spec, expert, names, result.copies[number], result)
        alone = sorted(result.copies[number] - stored[number])
        if alone:
            result.notes.append(
                f"expert {spec.name!r} stores {tell(alone)} as a copy of another tensor of its own; the base stores it "
                "once, and so does the output"
            )
        for name in [name for name in names if name not in base.tensors]:
            del names[name]
    return result


def _candidates(base: Source) -> list[tuple[str, str]]:
    """`(alias, name)` pairs of stored tensors that may be one, those that libraries tie first."""
    claimed = [(a, n) for a, n in base.ties.items() if a in base.tensors and n in base.tensors and a != n]
    groups: dict[bytes, list[str]] = defaultdict(list)
    parameters = [name for name, info in base.tensors.items() if not is_buffer(name, info.shape)]
    for name, sample in fingerprints(base, parameters).items():
        groups[sample].append(name)
    targets = {name for _, name in claimed}
    pairs = []
    for names in groups.values():
        first = min(names, key=lambda name: (name not in targets, may_be_head(name)))
        pairs += [(name, first) for name in names if name != first]
    return [*claimed, *(pair for pair in pairs if pair not in claimed)]


def fingerprints(checkpoint: Source, names: Sequence[str]) -> dict[str, bytes]:
    """Shape, dtype and a sample of those of the tensors that share all three with another.

    Constants have none; neither have the layers of a deep model, or the experts of a mixture, which no library ties
    and which are too many to look at.
    """
    shapes: dict[tuple[object, ...], list[str]] = defaultdict(list)
    alike = Counter((re.sub(r"\d+", "#", name), checkpoint.tensors[name].shape) for name in names)
    for name in names:
        info = checkpoint.tensors[name]
        if len(info.shape) > 1 and info.nbytes and alike[re.sub(r"\d+", "#", name), info.shape] <= LAYERS:
            shapes[info.shape, info.dtype.name].append(name)
    found: dict[bytes, list[str]] = defaultdict(list)
    for key, same in shapes.items():
        for name in same if len(same) > 1 else ():
            sample = _sample(checkpoint.read(name))
            if sample is not None:
                found[repr(key).encode() + sample].append(name)
    return {name: sample for sample, same in found.items() if len(same) > 1 for name in same}


def _sample(array: np.ndarray) -> bytes | None:
    """Some entries as bytes; None where they are all the same, as in a tensor of zeros."""
    flat = array.reshape(-1)
    middle = flat.size // 2
    entries = np.concatenate([flat[:SAMPLE], flat[middle : middle + SAMPLE], flat[-SAMPLE:]])
    raw = entries.view(np.uint8).reshape(len(entries), -1)
    return None if (raw == raw[0]).all() else raw.tobytes()


def _where_different(
    base: Source,
    experts: Sequence[Source],
    specs: Sequence[Expert],
    sources: Sequence[Mapping[str, str]],
    alias: str,
    name: str,
) -> tuple[str, Source] | None:
    """The first model in which two tensors of the base are not one; None if there is none."""
    if not same_bits(base.read(alias), base.read(name)):
        return "base", base
    for spec, expert, names in zip(specs, experts, sources, strict=True):
        one, other = names.get(alias), names.get(name)
        if one and other and one != other and not same_bits(expert.read(one), expert.read(other)):
            return f"expert {spec.name!r}", expert
    return None


def _complete(alias: str, name: str, sources: Sequence[dict[str, str]]) -> None:
    """An expert that stores only one of two names has the tensor."""
    for names in sources:
        if name not in names and alias in names:
            names[name] = names[alias]
        names.pop(alias, None)


def _untie(alias: str, name: str, where: tuple[str, Source], base: Source, result: Ties) -> None:
    who, checkpoint = where
    if stated(alias, base.config):
        if checkpoint.config.get("tie_word_embeddings") is False:
            result.problems.append(_of_its_own(who, checkpoint, alias, name))
        else:
            result.problems.append(
                f"{who} ({checkpoint.path}): {alias!r} and {name!r} are tied by its config.json, but differ; set "
                "tie_word_embeddings to false there, in the base and all experts alike"
            )
        return
    result.notes.append(
        f"{alias!r} and {name!r} are mostly one tensor in this family, but differ in {who}: each is merged by itself"
    )


def _of_its_own(who: str, checkpoint: Source, alias: str, name: str) -> str:
    return (
        f"{who} ({checkpoint.path}) has a {alias!r} of its own, but in the base it is tied to {name!r}; "
        "tie_word_embeddings must be the same in every config.json. Untie it in the base (store both, and set it to "
        "false), or tie it in the expert"
    )


def _copies(base: Source, spec: Expert, expert: Source, names: dict[str, str], copies: set[str], result: Ties) -> None:
    """Copies that an expert stores under names that the base does not store."""
    used = set(names.values())
    for alias, name in base.ties.items():
        theirs, merged = names.get(alias), names.get(result.aliases.get(name, name))
        if alias in base.tensors or theirs is None or merged is None or theirs == merged:
            continue
        if same_bits(expert.read(theirs), expert.read(merged)):
            copies.add(theirs)
        else:
            result.problems.append(_of_its_own(f"expert {spec.name!r}", expert, alias, name))
        names.pop(alias)
    extra = [name for name, info in expert.tensors.items() if name not in used and not is_buffer(name, info.shape)]
    shapes = {expert.tensors[name].shape for name in extra}
    prints = fingerprints(expert, [n for n, info in expert.tensors.items() if info.shape in shapes])
    for name in extra:
        same = [other for other in prints if other != name and other in used and prints[other] == prints.get(name)]
        if any(same_bits(expert.read(name), expert.read(other)) for other in same):
            copies.add(name)


def same_bits(a: np.ndarray, b: np.ndarray) -> bool:
    """Whether two arrays are equal byte by byte; compared in pieces, since a comparison makes an array of booleans."""
    if a.dtype != b.dtype or a.shape != b.shape:
        return False
    if all(isinstance(x, np.ndarray) for x in (a, b)) and a.__array_interface__ == b.__array_interface__:
        return True  # the same memory: an adapter has its base's tensors
    a, b = (np.ascontiguousarray(x).reshape(-1).view(np.uint8) for x in (a, b))
    piece = 1 << 22
    return all(np.array_equal(a[i : i + piece], b[i : i + piece]) for i in range(0, a.size, piece))
