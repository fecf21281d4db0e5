"""The tensors of a base that an adapter's parts change: found by name, checked by shape."""

import dataclasses
import itertools
import math
import re
from collections.abc import Iterator, Mapping, Sequence

import numpy as np

from cfmerge.errors import CfmergeError, nearest
from cfmerge.formats.adapter_change import Change, is_copy
from cfmerge.formats.adapter_parts import Adapter, Added, Full, Pair, Product, Rows
from cfmerge.formats.adapter_ties import aliases_of, settle_ties
from cfmerge.formats.base import Source
from cfmerge.models import Shape, classify
from cfmerge.models.mixtures import of_each_expert, single_experts
from cfmerge.models.patterns import patterns, tell
from cfmerge.models.renames import canonical, pair

WRONG = "is it an adapter of this base?"


@dataclasses.dataclass
class Placed:
    """The changes by the base's names; tensors that the base lacks; notes."""

    changes: dict[str, Change]
    extra: dict[str, Change]
    notes: list[str]


class Placing:
    """An adapter's parts on their way to the base's tensors; problems are collected, and told by pattern."""

    def __init__(self, adapter: Adapter, base: Source, partial: bool = False):
        self.adapter, self.base, self.partial = adapter, base, partial
        self.file = adapter.container
        self.kinds = classify({n: (i.shape, i.dtype.name) for n, i in base.tensors.items()}, base.config)
        self.has_turned = any(kind.layout == "io" for kind in self.kinds.values())
        self.shapes: dict[str, Shape] = {name: info.shape for name, info in base.tensors.items()}
        self.shapes |= {a: self.shapes[n] for a, n in base.ties.items() if a not in self.shapes and n in self.shapes}
        self.single = single_experts(self.shapes)
        self.placed = Placed({}, {}, [])
        self.names_of: dict[str, set[str]] = {}  # of a tensor that takes the base's place: the base's names for it
        self.missing: list[str] = []
        self.misfits: dict[str, str] = {}

    def run(self) -> Placed:
        where = self._found()
        for part in sorted(self.adapter.parts, key=lambda part: not isinstance(part, Full)):
            if isinstance(part, Pair) and part.form == "stack":
                continue
            names = [where[target] for target in part.targets if target in where]
            if names:
                self._put(names[0], part)
            elif isinstance(part, Full):
                self.placed.extra[part.target] = Change(self.base, part.target, self.file, part)
            else:
                self.missing.append(part.target)
        self._stacks(where)
        self._raise()
        self.placed.changes = {name: change for name, change in self.placed.changes.items() if any(change.parts)}
        self.placed.notes += settle_ties(self.placed.changes, self.base, self.file, self.names_of)
        return self.placed

    def _found(self) -> Mapping[str, str]:
        """`{target: the base's name}`."""
        theirs: dict[str, Shape] = {}
        for part in self.adapter.parts:
            if isinstance(part, Pair):
                theirs |= dict.fromkeys(part.targets, part.shape if part.form != "stack" else ())
            else:
                theirs[part.target] = self.file.tensors[part.name].shape
        ends = {_end(name) for name in self.shapes}  # a head of the adapter's own says nothing about prefixes
        pairs = pair(self.shapes, {name: shape for name, shape in theirs.items() if _end(name) in ends})
        if pairs.ambiguous:
            raise CfmergeError(
                f"{self.adapter.path}: its names are the base's with {' or with '.join(pairs.ambiguous)}: say which by "
                "'rename: [{from: REGEX, to: TEXT}]' for this expert"
            )
        self.placed.notes += pairs.told
        return {theirs_name: ours for ours, theirs_name in pairs.sources.items()}

    # --- single tensors -------------------------------------------------------------------------------------------

    def _change(self, name: str) -> Change:
        return self.placed.changes.setdefault(name, Change(self.base, name, self.file))

    def _put(self, alias: str, part: Pair | Full | Rows | Added) -> None:
        """Adds a part to the change of its tensor, if it fits."""
        name = alias if alias in self.base.tensors else self.base.ties[alias]
        change = self._change(name)
        shape = change.shape
        if isinstance(part, Full):
            own = self.names_of.setdefault(name, set())
            if change.full is not None:  # under the name of a tied tensor too
                own.add(alias)
                return self._same(name, change.full, part)
            found = Change(self.base, name, self.file, part)
            if is_copy(found):
                return None
            beside = self.adapter.tied or "base_layer" in part.name  # the model's own, whatever names it has there
            own |= {alias, *([name, *aliases_of(self.base, name)] if beside else [])}
            return change.add(part)
        if isinstance(part, Pair):
            turned = self._turned(name, part, shape)
            if turned is None:
                self._misfit(part, shape)
                return None
            self._check_magnitude(part, shape, turned)
            product = Product(part, turned)
            if self.adapter.tied and self._again(change, product):
                self.placed.notes.append(
                    f"{part.down!r} is the same change under a tied name, and counts once, as it does when the model "
                    "runs (peft's merge_and_unload adds it twice)"
                )
                return None
            return change.add(product)
        found_shape = self.file.tensors[part.name].shape
        if isinstance(part, Rows):
            if found_shape[1:] != shape[1:] or max(part.indices, default=0) >= shape[0]:
                self.misfits[part.target] = (
                    f"{shape} in the base, and {part.name!r} has rows of {found_shape[1:]} for tokens up to "
                    f"{max(part.indices, default=0)}"
                )
            return change.add(part)
        if math.prod(found_shape) != math.prod(shape):
            self.misfits[part.target] = f"{shape} in the base, and {part.name!r} has {found_shape}"
        return change.add(part)

    def _same(self, name: str, one: Full, other: Full) -> None:
        a, b = (Change(self.base, name, self.file, full) for full in (one, other))
        if a.shape != b.shape or a.read().tobytes() != b.read().tobytes():
            raise CfmergeError(
                f"{self.file.path}: {one.name!r} and {other.name!r} differ, and are one tensor, {name!r}, in the base: "
                "store both in the base, and set tie_word_embeddings to false in its config.json"
            )

    def _again(self, change: Change, product: Product) -> bool:
        """Whether the change has the same product already, of factors that are tied."""
        ours = product.factors(self.file.read)
        theirs = [one.factors(self.file.read) for one in change.products]
        return any(all(map(np.array_equal, ours, other)) for other in theirs)

    def _turned(self, name: str, part: Pair, shape: Shape) -> bool | None:
        """Whether the tensor is stored `(in, out)`; None where the pair does not fit it."""
        out, inner = part.rows, part.shapes[0][1:]
        if part.form == "embedding":
            return True if shape == (*inner, out) else None
        if len(shape) == 2 and math.prod(inner) == inner[0]:
            fits = [turned for turned in (False, True) if shape == ((inner[0], out) if turned else (out, inner[0]))]
            if len(fits) == 2:  # square: as the family has it, for one flag stands for all modules; else as it says
                return self.kinds[name].layout == "io" if self.has_turned else part.turned
            return fits[0] if fits else None
        whole = len(shape) > 2 and shape[0] == out and shape[1:] in (inner, (*inner, *(1,) * (len(shape) - 2)))
        return False if whole else None

    def _misfit(self, part: Pair, shape: Shape) -> None:
        grouped = len(shape) > 2 and part.shapes[0][2:] == shape[2:] and part.shapes[0][1] != shape[1]
        hint = " (a grouped convolution, whose factors no tool merges)" if grouped and part.rows == shape[0] else ""
        self.misfits[part.target] = f"{shape} in the base, {part.shape} by {part.down!r} and {part.up!r}{hint}"

    def _check_magnitude(self, part: Pair, shape: Shape, turned: bool) -> None:
        if not part.magnitude:
            return
        found = self.file.tensors[part.magnitude].shape
        axes = (int(turned), int(not turned)) if part.input_norms else (int(turned),)
        if math.prod(found) not in {shape[axis] for axis in axes}:
            self.misfits[part.target] = f"{shape} in the base, and {part.magnitude!r} has {found}"

    # --- experts of a mixture, stacked ----------------------------------------------------------------------------

    def _stacks(self, where: Mapping[str, str]) -> None:
        by_targets: dict[tuple[str, ...], list[Pair]] = {}
        for part in self.adapter.parts:
            if isinstance(part, Pair) and part.form == "stack":
                by_targets.setdefault(part.targets, []).append(part)
        for targets, parts in by_targets.items():
            there = [target for target in targets if target in where or self._split(target)]
            if len(there) < len(parts):
                self.missing += [target for target in targets if target not in there]
                continue
            found = self._assigned(parts, there, where)
            if found is None:
                told = ", ".join(f"{t!r} {self.shapes[where[t]]}" for t in there if t in where)
                shapes = ", ".join(f"{part.down!r} {part.shapes[0]} and {part.up!r} {part.shapes[1]}" for part in parts)
                self.misfits[targets[0]] = f"{told or 'one tensor for each expert'} in the base, and {shapes}"
            for name, product in found or ():
                self._change(name).add(product)

    def _assigned(
        self, parts: Sequence[Pair], targets: Sequence[str], where: Mapping[str, str]
    ) -> list[tuple[str, Product]] | None:
        """The parts, each on a target whose shape it fits; by the order of PEFT's nesting where several fit."""
        ordered = sorted(targets, key=lambda target: "down" in target)  # as modules have them: what goes up, down
        for some in itertools.permutations(ordered[::-1], len(parts)):  # the outermost is the last parameter
            found = [list(self._placed(part, target, where)) for part, target in zip(parts, some, strict=True)]
            if all(found):
                return [one for several in found for one in several]
        return None

    def _placed(self, part: Pair, target: str, where: Mapping[str, str]) -> Iterator[tuple[str, Product]]:
        rank, scale = part.numbers[part.targets.index(target)]
        part = dataclasses.replace(part, targets=(target,), rank=rank, scale=scale)
        out, size = part.rows, part.shapes[0][1]
        if target in where:
            name = where[target]
            shape = self.shapes[name]
            count = shape[0] if len(shape) == 3 else 1
            inner = [turned for turned in (False, True) if shape[-2:] == ((size, out) if turned else (out, size))]
            if part.shapes[0][0] != rank * count or part.shapes[1][1] != rank * count or not inner:
                return
            turned = self.kinds[name].layout.endswith("io") if len(inner) == 2 else inner[0]
            if len(shape) == 2:
                part = dataclasses.replace(part, form="matrix")
            yield name, Product(part, turned)
            return
        halves = self._split(target)
        count, rows = len(halves[0]), out // len(halves)
        shapes = {self.shapes[name] for half in halves for name in half}
        if part.shapes[0][0] != rank * count or part.shapes[1][1] != rank * count or shapes != {(rows, size)}:
            return
        for half, names in enumerate(halves):
            for number, name in enumerate(names):
                yield name, Product(part, False, number, (half * rows, (half + 1) * rows))

    def _split(self, target: str) -> list[list[str]]:
        """The base's tensors of each expert that a packed array is made of; for gate and up one after the other."""
        return of_each_expert(target, self.single)

    # --- problems -------------------------------------------------------------------------------------------------

    def _raise(self) -> None:
        lines = []
        for found in patterns(list(self.misfits), list(self.shapes))[:5]:
            name = found.names[0]
            start = f"tensor {name!r}" if len(found.names) == 1 else f"{found.text} ({len(found.names)} tensors)"
            such = "" if len(found.names) == 1 else f"such as {name!r}: "
            lines.append(f"{self.file.path}: {start}: {such}{self.misfits[name]}; {WRONG}")
        if self.missing and self.partial:
            self.placed.notes.append(f"{tell(self.missing)} are not in the base, and left out")
        elif self.missing:
            like = f"; its tensors look like {next(iter(self.shapes))!r}."
            hint = nearest(self.missing[0], self.shapes) if len(self.missing) == 1 else like
            lines.append(
                f"{self.file.path}: changes {tell(self.missing)}, which the base ({self.base.path}) lacks"
                f"{hint} {WRONG.capitalize()} Names that "
                "differ: -e '{path: ADAPTER, rename: [{from: REGEX, to: TEXT}]}'; to leave out what the base lacks: "
                "-e '{path: ADAPTER, partial: true}'"
            )
        if lines:
            raise CfmergeError("\n".join(lines))


def _end(name: str) -> str:
    """The last two parts of a name in its canonical spelling."""
    return ".".join(re.split(r"[./]", canonical(name))[-2:])
