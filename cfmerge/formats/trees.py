"""Names with "/" as nested mappings, and which of a training state's names are the model's parameters."""

import collections
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from cfmerge.errors import CfmergeError, nearest

WRAPPERS = ("state", "train_state")  # of a whole training state
PARAMETERS = "params"
COLLECTIONS = ("batch_stats", "buffers", "constants")  # of the model too, beside its parameters
TRAINING = {  # beside a model, these are a training's
    *("opt", "opt_state", "opt_states", "optimizer", "optimizer_state", "mu", "nu", "step", "steps", "global_step"),
    *("count", "epoch", "rng", "rngs", "dropout_rng", "loss_scale", "scheduler", "lr_scheduler"),
}


def nested(named: Mapping[str, Any], keys: Mapping[str, tuple[str | int, ...]] | None = None) -> dict[str, Any]:
    """Nested mappings out of names.

    >>> nested({"a/b": 1, "a/c": 2, "d": 3})
    {'a': {'b': 1, 'c': 2}, 'd': 3}
    >>> nested({"a/b/c": 1}, {"a/b/c": ("a/b", "c")})
    {'a/b': {'c': 1}}

    Args:
        keys: the keys of names that are not to be cut at every "/".

    Raises:
        CfmergeError: a name is also the beginning of another.
    """
    tree: dict[str, Any] = {}
    for name, value in named.items():
        *folders, last = map(str, (keys or {}).get(name) or name.split("/"))
        inner, at = tree, []
        for folder in folders:
            at.append(folder)
            inner = inner.setdefault(folder, {})
            if not isinstance(inner, dict):
                _both("/".join(at), name)
        if last in inner:
            _both(name, next((other for other in named if other.startswith(name + "/")), name))
        inner[last] = value
    return tree


def below(keys: tuple[str | int, ...], prefix: str) -> tuple[str | int, ...]:
    """The keys without the beginning of their name.

    >>> below(("params", "a/b", 0), "params/a/")
    ('b', 0)
    """
    while prefix:
        first = f"{keys[0]}/"
        if not prefix.startswith(first):
            return first.removeprefix(prefix).removesuffix("/"), *keys[1:]
        keys, prefix = keys[1:], prefix.removeprefix(first)
    return keys


def _both(name: str, other: str) -> None:
    raise CfmergeError(
        f"tensors {name!r} and {other!r} cannot both be in a tree of parameters: the first name is an array and a "
        'folder at once; write a format with flat names (format: "safetensors")'
    )


def chosen(names: Iterable[str], subtree: str, path: Path) -> tuple[dict[str, str], tuple[str, ...]]:
    """The arrays that are read, `{name: name in the file}`, and notes on those that are not.

    With a subtree, its arrays, under the names that they have in it. Otherwise the whole tree; of a training state the
    model alone, under the names that it has there.

    >>> chosen(["params/w", "opt_state/0/mu/w", "step"], "", Path("model"))[0]
    {'params/w': 'params/w'}
    >>> chosen(["params/w", "opt_state/0/mu/w", "step"], "params", Path("model"))[0]
    {'w': 'params/w'}

    Raises:
        CfmergeError: there is no such subtree.
    """
    names = list(names)
    if subtree:
        prefix = subtree.strip("/") + "/"
        within = {name.removeprefix(prefix): name for name in names if name.startswith(prefix)}
        if not within:
            folders = {name[:at] for name in names for at, letter in enumerate(name) if letter == "/"}
            raise CfmergeError(f"{path}: holds no arrays below {subtree!r}{nearest(subtree, folders)}")
        return within, ()
    parts = {name: _part(name, wrapper) for wrapper in [_wrapper(names)] for name in names}
    apart = _apart(set(parts.values()))
    left_out = collections.Counter(part for part in parts.values() if part in apart)
    kept = {name: name for name, part in parts.items() if part not in apart}
    told = ", ".join(f"{part} ({count} array{'s' * (count > 1)})" for part, count in left_out.items())
    note = f"{told}: no parameters of the model; not read. To read one part of it, name the part: {path}::PART"
    return kept, (note,) if told else ()


def _wrapper(names: list[str]) -> str:
    """The beginning of all names of the model that a training state wraps."""
    return next((f"{own}/" for own in WRAPPERS for name in names if name.startswith(f"{own}/{PARAMETERS}/")), "")


def _part(name: str, wrapper: str) -> str:
    """The uppermost folder that a name is in, below the wrapper; with "/" before it if it is outside."""
    return name.removeprefix(wrapper).partition("/")[0] if name.startswith(wrapper) else f"/{name.partition('/')[0]}"


def _apart(parts: set[str]) -> set[str]:
    """Those parts that are not of the model."""
    if PARAMETERS in parts:
        return parts - {PARAMETERS, *COLLECTIONS}
    return parts & TRAINING if parts & {"model", "base"} else set()
