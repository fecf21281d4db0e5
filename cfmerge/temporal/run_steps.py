"""The checkpoints of one training run: step directories and files as trainers name them, in any format that is read.

| trainer | a step |
|---|---|
| Hugging Face Trainer | `checkpoint-N/` |
| Megatron | `iter_N/` beside `latest_checkpointed_iteration.txt` |
| torchtitan | `step-N/` |
| Orbax | `N/` |
| Lightning | `epoch=E-step=N.ckpt` |

Where a directory has none of these, names that differ in one number alone are steps too (`model_100.safetensors`).
"""

import fnmatch
import itertools
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import NamedTuple

from cfmerge.errors import CfmergeError, and_more
from cfmerge.formats import open_checkpoint
from cfmerge.formats.adapters import adapter_alone
from cfmerge.formats.distributed import LATEST
from cfmerge.formats.orbax_layout import unfinished
from cfmerge.recipe import FILES

TRAINERS = {  # names of steps, whole; directories, but for Lightning's
    "Hugging Face Trainer": re.compile(r"checkpoint-(\d{1,18})"),
    "Megatron": re.compile(r"iter_(\d{1,18})"),
    "torchtitan": re.compile(r"step-(\d{1,18})"),
    "Orbax": re.compile(r"(\d{1,18})"),
    "Lightning": re.compile(r"(?:.*\W)?step=(\d{1,18})(?:\W.*)?"),
}
TEMPORARY = re.compile(r"^(tmp|\.tmp|temp)[-_.]|\.(tmp|part|incomplete)$|^\.")  # names of what is being written
SHARD = re.compile(r"-\d+-of-\d+")
SHOWN = 3  # steps in a message that none is whole
STEP_WORDS = re.compile(r"(step|iter|iteration)s?[-_=.]?$", re.IGNORECASE)


class Step(NamedTuple):
    """A checkpoint of a run: its step, and its directory or file."""

    number: int
    path: Path


class Steps(NamedTuple):
    """The checkpoints of a run, the oldest first; notes for the user; and those that are not finished, by step."""

    run: Path
    steps: tuple[Step, ...]
    notes: tuple[str, ...] = ()
    broken: Mapping[int, str] = MappingProxyType({})

    @property
    def numbers(self) -> list[int]:
        return [step.number for step in self.steps]


def steps_of(run: str | Path) -> Steps:
    """The checkpoints of a run, by the names in its directory, without those at the end that are not whole.

        >>> for step in (20, 100):
        ...     _ = cfmerge.save({"w": np.ones(3)}, f"run/step-{step}/model.safetensors")
        >>> temporal.steps_of("run").numbers
        [20, 100]

    Args:
        run: the directory; or a pattern of the steps in it, such as `run/checkpoint-*`.

    Raises:
        CfmergeError: there is no directory or no step, two trainers have written there, or two names are one step.
    """
    directory, pattern = _directory(Path(run).expanduser())
    names = sorted(path for path in directory.iterdir() if fnmatch.fnmatchcase(path.name, pattern))
    written = {number: path for path in names if unfinished(path) and (number := _first_number(path)) is not None}
    whole = [path for path in names if not unfinished(path) and not TEMPORARY.search(path.name)]
    by_number: dict[int, Path] = {}
    for number, path in _of_one_trainer(run, directory, whole):
        if number in by_number:
            raise CfmergeError(
                f"{directory}: {by_number[number].name} and {path.name} are both step {number}; move one of them away"
            )
        by_number[number] = path
    broken = {n: f"{path.name} is not finished" for n, path in written.items() if n not in by_number}
    steps = [Step(number, by_number[number]) for number in sorted(by_number)]
    kept = _without_broken_end(directory, steps, broken, _last_of_megatron(directory))
    return kept._replace(notes=(*kept.notes, *_files_without_a_step(steps, whole)))


def _directory(run: Path) -> tuple[Path, str]:
    """The directory of a run, and the pattern of its steps' names."""
    if run.is_dir():
        return run, "*"
    if any(character in run.name for character in "*?[") and run.parent.is_dir():
        return run.parent, run.name
    told = "is a file; a run is the directory that holds its steps" if run.exists() else "no such directory"
    raise CfmergeError(f"run {run}: {told}")


# --- names --------------------------------------------------------------------------------------------------------


def _of_one_trainer(run: str | Path, directory: Path, paths: Sequence[Path]) -> Iterator[tuple[int, Path]]:
    """The steps among some paths: those of the only trainer whose names are there, else of a user's own naming."""
    found = {name: own for name, pattern in TRAINERS.items() if (own := list(_matching(name, pattern, paths)))}
    if len(found) > 1:
        told = " and ".join(f"{name} ({and_more([path.name for _, path in own])})" for name, own in found.items())
        ways = " or ".join(f"--run '{directory / _pattern(own[0][1])}'" for own in found.values())
        raise CfmergeError(f"{directory}: holds steps of several trainers: {told}; name one by a pattern: {ways}")
    if found:
        return iter(next(iter(found.values())))
    own = list(_numbered(directory, [path for path in paths if _may_be_model(path)]))
    if not own:
        inside = [path for path in paths if path.is_dir() and any(_matching_any(sorted(path.iterdir())))]
        hint = f"; {inside[0]} has some: --run {inside[0]}" if inside else ""
        raise CfmergeError(
            f"run {run}: no steps in it; steps are called checkpoint-N (Hugging Face Trainer), iter_N (Megatron), "
            f"step-N (torchtitan), N (Orbax), epoch=E-step=N.ckpt (Lightning), or differ in one number alone{hint}"
        )
    return iter(own)


def _matching(name: str, pattern: re.Pattern[str], paths: Sequence[Path]) -> Iterator[tuple[int, Path]]:
    for path in paths:
        match = pattern.fullmatch(path.name)
        if match and (path.is_dir() or path.is_symlink() or (name == "Lightning" and path.suffix in FILES)):
            yield int(match[1]), path


def _matching_any(paths: Sequence[Path]) -> Iterator[tuple[int, Path]]:
    for name, pattern in TRAINERS.items():
        yield from _matching(name, pattern, paths)


def _pattern(path: Path) -> str:
    """A pattern of the steps that are called as one of them."""
    return re.sub(r"\d+", "*", path.name) if re.search(r"\D", path.name) else "[0-9]*"


def _may_be_model(path: Path) -> bool:
    return not SHARD.search(path.name) and (path.is_dir() or path.suffix in FILES)


def _numbered(directory: Path, paths: Sequence[Path]) -> Iterator[tuple[int, Path]]:
    """The steps among paths of a user's own naming: they differ in one number, or in several, one of them a step's.

    Raises:
        CfmergeError: several kinds of names have numbers, or several numbers differ.
    """
    groups: dict[tuple[str, ...], list[Path]] = {}
    for path in paths:
        if re.search(r"\d", path.stem):
            groups.setdefault(tuple(re.split(r"\d+", path.name)), []).append(path)
    several = {texts: own for texts, own in groups.items() if len(own) > 1} or groups
    if len(several) > 1:
        ways = " or ".join(f"--run '{directory / _pattern(own[0])}'" for own in several.values())
        raise CfmergeError(f"{directory}: several kinds of names have numbers; name the steps by a pattern: {ways}")
    for texts, own in several.items():
        numbers = [[int(text) for text in re.findall(r"\d+", path.name)] for path in own]
        differ = [place for place, column in enumerate(zip(*numbers, strict=True)) if len(set(column)) > 1]
        named = [place for place in range(len(texts) - 1) if STEP_WORDS.search(texts[place])]
        places = named if len(named) == 1 else differ or [0] * (len(texts) == 2)
        if len(places) != 1:
            raise CfmergeError(
                f"{directory}: names such as {own[0].name} have several numbers, and none is called a step; link the "
                "checkpoints under names such as step-100 in a directory, and name that"
            )
        yield from ((row[places[0]], path) for row, path in zip(numbers, own, strict=True))


def _first_number(path: Path) -> int | None:
    """The step in the name of an unfinished checkpoint of Orbax, such as `300.orbax-checkpoint-tmp-17`."""
    match = re.search(r"\d{1,18}", path.name)
    return int(match.group()) if match else None


def _files_without_a_step(steps: Sequence[Step], paths: Sequence[Path]) -> list[str]:
    """A note on files of the steps' kind that are none, such as Lightning's `last.ckpt`."""
    suffixes = {step.path.suffix for step in steps if not step.path.is_dir()}
    known = {step.path for step in steps}
    other = [path.name for path in paths if path.suffix in suffixes and path not in known]
    return [f"{and_more(other)}: no step in the name; not taken"] if other else []


# --- steps that are not whole -------------------------------------------------------------------------------------


def _last_of_megatron(directory: Path) -> int | None:
    """The newest iteration that Megatron says it has written to its end; None where nothing tells."""
    file = directory / LATEST
    told = file.read_text(errors="replace").strip() if file.is_file() else ""
    return int(told) if re.fullmatch(r"\d{1,18}", told) else None


def _without_broken_end(directory: Path, steps: Sequence[Step], broken: Mapping[int, str], last: int | None) -> Steps:
    """The steps up to the newest one that is whole; notes name those behind it."""
    kept, notes = list(steps), []
    while kept and (why := _wrong(kept[-1], last)):
        step = kept.pop()
        broken = {**broken, step.number: f"{step.path.name}: {why}"}
    end = kept[-1].number if kept else -1
    notes = [f"step {number} is left out: {why}" for number, why in sorted(broken.items()) if number > end]
    if not kept:
        shown = [f"{path.name}: {_wrong(Step(number, path), last)}" for number, path in steps[-SHOWN:]]
        raise CfmergeError("\n".join([f"run {directory}: none of {len(steps)} steps is whole, the last ones:", *shown]))
    return Steps(directory, tuple(kept), tuple(notes), broken)


def _wrong(step: Step, last: int | None) -> str:
    """The reason why a step is not whole, by its headers; "" where it is."""
    if last is not None and step.number > last:
        return f"{LATEST} names {last}: it was not written to its end, or the run went back to {last}"
    try:
        if adapter_alone(step.path) is None:
            open_checkpoint(step.path)
    except CfmergeError as error:
        return str(error).splitlines()[0]
    return ""


# --- windows ------------------------------------------------------------------------------------------------------


def window(
    found: Steps, start: int | None = None, end: int | None = None, last: int | None = None, every: int = 1
) -> Steps:
    """Some of a run's steps: from one to another, both taken; or the newest ones; and of these each n-th.

    Args:
        start, end: the first and the last step; None: the oldest, the newest that is whole.
        last: in their place the number of steps, up to the newest that is whole.
        every: take each n-th of these, counted back from the newest.

    Raises:
        CfmergeError: there is no such step, with the nearest; or a number is no positive one.
    """
    for name, value in (("last", last), ("every", every)):
        if value is not None and value < 1:
            raise CfmergeError(f"--{name} {value}: expected 1 or more")
    if last is not None and (start, end) != (None, None):
        raise CfmergeError("--last counts back from the newest step: give it, or --from and --to")
    steps = list(found.steps)
    for option, number in (("--from", start), ("--to", end)):
        if number is not None and number not in found.numbers:
            raise CfmergeError(not_there(found, option, number))
    if start is not None and end is not None and start > end:
        raise CfmergeError(f"--from {start} --to {end}: the first step is behind the last one")
    if last is not None and last > len(steps):
        raise CfmergeError(f"--last {last}: {found.run} has {len(steps)} steps: {told(found.numbers)}")
    asked = [step for step in steps if (start is None or step.number >= start) and (end is None or step.number <= end)]
    asked = asked[-last:] if last is not None else asked
    taken = asked[::-1][::every][::-1]
    _check_whole(found, taken)
    notes = [*found.notes, *_gaps(found, [step.number for step in asked])]
    return found._replace(steps=tuple(taken), notes=tuple(notes))


def _check_whole(found: Steps, steps: Sequence[Step]) -> None:
    """Raises `CfmergeError` where a step that is to be merged cannot be read."""
    for step in steps:
        if why := _wrong(step, None):
            after = [number for number in found.numbers if number > step.number]
            way = f"--from {after[0]}" if after else f"--to {max([n for n in found.numbers if n < step.number] or [0])}"
            raise CfmergeError(f"step {step.number}: {step.path.name}: {why}; move it away, or leave it out by {way}")


def not_there(found: Steps, option: str, number: int) -> str:
    """The message about a step that is asked for, and is not there, with the nearest ones."""
    near = sorted(found.numbers, key=lambda one: abs(one - number))[:2]
    ways = " or ".join(f"{option} {one}" for one in sorted(near))
    why = found.broken.get(number, f"{found.run} has no step {number}")
    return f"{option} {number}: {why}; the nearest: {ways} (there is: {told(found.numbers)})"


def _gaps(found: Steps, numbers: Sequence[int]) -> list[str]:
    """A note on steps that a regular interval would have, and that are not there."""
    distances = [after - before for before, after in itertools.pairwise(numbers)]
    if not distances:
        return []
    usual = max(sorted(set(distances)), key=distances.count)
    lost = [
        number
        for before, distance in zip(numbers, distances, strict=False)
        if distance > usual and distance % usual == 0
        for number in range(before + usual, before + distance, usual)
    ]
    why = "".join(f" ({found.broken[number]})" for number in lost if number in found.broken)
    if lost:
        return [f"steps are {usual} apart, and not there: {told(lost)}{why}; the others are taken"]
    if len(set(distances)) > 1:
        return [f"steps lie {min(distances)} to {max(distances)} apart: {told(numbers)}; each counts by its place"]
    return []


def told(numbers: Sequence[int], most: int = 8) -> str:
    """Steps for people, the middle ones left out where there are many."""
    few = list(numbers) if len(numbers) <= most else [*numbers[: most // 2], "...", *numbers[-most // 2 :]]
    return ", ".join(map(str, few))
