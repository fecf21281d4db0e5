"""Where the arrays of an Orbax checkpoint lie: its steps, its items, and the names in `_METADATA`."""

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from cfmerge.errors import CfmergeError, and_more
from cfmerge.formats.trees import TRAINING

TREE, CHECKPOINT = "_METADATA", "_CHECKPOINT_METADATA"
FIRST = "orbax.checkpoint"  # which only version 1 writes
OWN = {  # the names that Orbax gives to its files, beside `ocdbt.process_*`
    *(TREE, CHECKPOINT, "manifest.ocdbt", "commit_success.txt", FIRST, "_sharding", "array_metadatas"),
    *("d", "state"),
}
UNFINISHED = (".orbax-checkpoint-tmp", ".partial_save")
STEP = re.compile(r"(?:\w+_)?(\d{1,18})")
ARRAYS = {"jax.Array", "np.ndarray"}
MODELS = {"params", "model_params", "model"}  # items of the model itself
NOTHING = {"None", "Dict", "List", "Tuple", "NamedTuple", "dict", "list", "tuple"}  # empty ones
MAX_BYTES = 1 << 28
LIST = 1  # the type of a key that is a place in a list
Keys = tuple[str | int, ...]
AGAIN = "the checkpoint is incomplete or corrupt; fetch it again"


class Tree(NamedTuple):
    """A tree of arrays in one folder.

    Attributes:
        leaves: `{keys joined by "/": the name that the array is stored under}`.
        keys: `{keys joined by "/": the keys}`; the places of a list are numbers.
        ocdbt, zarr3: how they are stored.
        sparse: whether chunks that are zero may lack.
        notes: on leaves that are no arrays.
    """

    folder: Path
    leaves: dict[str, str]
    keys: dict[str, Keys]
    ocdbt: bool
    zarr3: bool
    sparse: bool
    notes: tuple[str, ...]


def is_orbax(path: Path) -> bool:
    """Whether a directory looks like a checkpoint of Orbax: one item, several items, or several steps."""
    if not path.is_dir():
        return False
    if (path / TREE).is_file() or (path / CHECKPOINT).is_file() or unfinished(path):
        return True
    return any(STEP.fullmatch(child.name) and _has_items(child) for child in path.iterdir() if child.is_dir())


def unfinished(path: Path) -> bool:
    """Whether a directory is a checkpoint that Orbax has not finished, by its name."""
    return any(mark in path.name for mark in UNFINISHED)


def find_tree(path: Path) -> tuple[Path, tuple[str, ...]]:
    """The folder with the arrays of a checkpoint, an item of it, or the newest of several steps; and notes.

    Raises:
        CfmergeError: there is none, it is unfinished, or there are several.
    """
    try:
        if unfinished(path.absolute()):
            raise CfmergeError(
                f"{path}: Orbax has not finished this checkpoint: it was interrupted, or is being written; name "
                "another step"
            )
        if (path / TREE).is_file():
            return path, ()
        children = sorted(child for child in path.iterdir() if child.is_dir())
    except OSError as error:
        raise CfmergeError(f"{path}: cannot be read: {error.strerror}") from None
    items = [child for child in children if (child / TREE).is_file() and not unfinished(child)]
    if items and not all(STEP.fullmatch(item.name) for item in items):
        return _item(path, items, children)
    steps = {int(found[1]): child for child in children if (found := STEP.fullmatch(child.name)) and _has_items(child)}
    broken = [child.name for child in children if unfinished(child)]
    if not steps:
        told = f": {and_more(broken)} is unfinished" if broken else f": no {TREE} in it or below it"
        raise CfmergeError(f"{path}: holds no checkpoint of Orbax that could be read{told}; {AGAIN}")
    newest = steps[max(steps)]
    folder, notes = find_tree(newest)
    if steps.keys() - {max(steps)}:
        notes = (f"step {max(steps)} is read, the newest of {len(steps)}; name a step's directory for another", *notes)
    if broken:
        notes = (*notes, f"{and_more(broken)}: unfinished; not read")
    return folder, notes


def _has_items(step: Path) -> bool:
    return (step / TREE).is_file() or (step / CHECKPOINT).is_file() or any(step.glob(f"*/{TREE}"))


def _item(path: Path, items: list[Path], children: list[Path]) -> tuple[Path, tuple[str, ...]]:
    models = [item for item in items if item.name not in TRAINING]
    models = models[:1] if len(models) == 1 else [item for item in models if item.name in MODELS]
    if len(items) > 1 and len(models) != 1:
        names = " or ".join(str(item) for item in items)
        raise CfmergeError(f"{path}: has several items of arrays; name the one that is the model: {names}")
    model = models[0] if len(items) > 1 else items[0]
    apart = [f"{item.name}/" for item in items if item != model]
    other = [f"{child.name}/" for child in children if child not in items and _is_item(child)]
    notes = (
        (apart, f"arrays that are not the model's, which is {model.name}/; not read"),
        (other, "no arrays; not read"),
    )
    return model, tuple(f"{and_more(names)}: {told}" for names, told in notes if names)


def _is_item(child: Path) -> bool:
    return (child / "metadata").is_file() or unfinished(child)


def read_tree(folder: Path) -> Tree:
    """The arrays that a folder's `_METADATA` names.

    Raises:
        CfmergeError: it is corrupt, or a name would lead out of the folder.
    """
    file = folder / TREE
    try:
        if file.stat().st_size > MAX_BYTES:
            raise CfmergeError(f"{file}: is larger than {MAX_BYTES} bytes, so it is no list of names; {AGAIN}")
        content = json.loads(file.read_bytes())
        entries = [_entry(entry) for entry in content["tree_metadata"].values()]
        ocdbt, zarr3 = content.get("use_ocdbt", True), content.get("use_zarr3", False)
        sparse = not content.get("store_array_data_equal_to_fill_value", False)
    except OSError as error:
        raise CfmergeError(f"{file}: cannot be read: {error.strerror}") from None
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        if isinstance(error, CfmergeError):
            raise
        raise CfmergeError(f"{file}: is no list of an Orbax checkpoint's arrays ({error!r}); {AGAIN}") from None
    if ocdbt and not (folder / "manifest.ocdbt").is_file():
        raise CfmergeError(f"{folder}: lacks manifest.ocdbt: Orbax has not finished this checkpoint; {AGAIN}")
    leaves, other, stored = dict[str, str](), dict[str, list[str]](), set[str]()
    all_keys: dict[str, Keys] = {}
    for keys, kind in entries:
        name, own = "/".join(map(str, keys)), ".".join(map(str, keys))
        if kind in NOTHING:
            continue
        if kind not in ARRAYS:
            other.setdefault(kind, []).append(name)
            continue
        if name in leaves or own in stored:
            raise CfmergeError(f"{file}: names two arrays {name!r}; {AGAIN}")
        _check_inside(file, name, own)
        leaves[name], all_keys[name] = own, keys
        stored.add(own)
    notes = tuple(f"{and_more(names)}: {kind}, not an array; not read" for kind, names in other.items())
    return Tree(folder, leaves, all_keys, bool(ocdbt), bool(zarr3), sparse, notes)


def _entry(entry: Any) -> tuple[Keys, str]:
    """`(keys, kind)` of an entry of `_METADATA`."""
    keys, kind = [key["key"] for key in entry["key_metadata"]], entry["value_metadata"]["value_type"]
    if not keys or not all(isinstance(text, str) for text in (*keys, kind)):
        raise TypeError(f"an entry has keys {keys} and the kind {kind!r}")
    lists = [key.get("key_type") == LIST and key["key"].isdecimal() for key in entry["key_metadata"]]
    return tuple(int(key) if listed else key for key, listed in zip(keys, lists, strict=True)), kind


def mark_lists(folder: Path, keys: Mapping[str, Keys]) -> None:
    """Says in a checkpoint that was written as nested mappings which of them are lists; whole ones alone are."""
    file = folder / TREE
    content = json.loads(file.read_bytes())
    entries = {"/".join(map(str, _entry(entry)[0])): entry for entry in content["tree_metadata"].values()}
    places: dict[tuple, set] = {}
    for own in (keys[name] for name in entries if name in keys):
        for depth, key in enumerate(own):
            places.setdefault(own[:depth], set()).add(key)
    whole = {prefix for prefix, found in places.items() if found == set(range(len(found)))}
    for name, entry in entries.items():
        own = keys.get(name, ())
        for depth in range(len(own)):
            if own[:depth] in whole:
                entry["key_metadata"][depth]["key_type"] = LIST
    if whole:
        file.write_text(json.dumps(content))


def _check_inside(file: Path, name: str, stored: str) -> None:
    """Raises `CfmergeError` if an array is not below its folder."""
    if "\0" in stored or stored.startswith("/") or {"", ".", ".."} & set(stored.split("/")):
        raise CfmergeError(f"{file}: tensor {name!r} would be read from outside its folder; the file is not trusted")
    place = (file.parent / stored).resolve()
    if place.exists() and file.parent.resolve() not in place.parents:
        raise CfmergeError(f"{file}: tensor {name!r} is a link to {place}, outside its folder; it is not followed")


def files_of(tree: Tree) -> tuple[Path, ...]:
    """The files that hold a tree's names and arrays."""
    stored = ["manifest.ocdbt", "d", *(part.name for part in tree.folder.glob("ocdbt.process_*"))]
    parts = [tree.folder / name for name in (TREE, *(stored if tree.ocdbt else tree.leaves.values()))]
    inside = [file for part in parts for file in ([part] if part.is_file() else part.rglob("*"))]
    return tuple(sorted(file for file in inside if file.is_file()))


def text_metadata(folder: Path) -> dict[str, str]:
    """The texts in a checkpoint's custom metadata, which lie beside a tree or one folder up."""
    file = next((place / CHECKPOINT for place in (folder, folder.parent) if (place / CHECKPOINT).is_file()), None)
    try:
        content = json.loads(file.read_bytes()).get("custom_metadata") if file else None
    except (OSError, ValueError, AttributeError, RecursionError):
        return {}  # a damaged one takes nothing from the arrays
    return {key: text for key, text in content.items() if isinstance(text, str)} if isinstance(content, dict) else {}
