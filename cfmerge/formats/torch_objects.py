"""The one dictionary of tensors in a PyTorch file's object: a state dict, a wrapped one, a whole module."""

from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

from cfmerge.errors import CfmergeError, and_more, nearest
from cfmerge.formats.pickles import MAX_DEPTH, Call
from cfmerge.formats.torch_tensors import is_tensor

WRAPPERS = [
    "state_dict",
    "model_state_dict",
    "model",
    "module",
    "net",
    "weights",
    "params",
    "ema",
    "model_ema",
    "state_dict_ema",
]  # keys under which training scripts keep the weights
PREFIXES = ("module.", "_orig_mod.")  # of DataParallel, of torch.compile
MAX_MEMBERS, MAX_NAME = 1_000_000, 10_000


class Found(NamedTuple):
    """Tensors' records by name, notes on what stands beside them, and the entry that they lie in, as `key`."""

    tensors: Mapping[str, Call]
    notes: tuple[str, ...]
    key: str = ""


def chosen(value: Any, where: str, key: str = "") -> Found:
    """The dictionary of tensors that is meant.

    Args:
        key: the entry that the user named, levels apart by `::`; "": the only one that there is.

    Raises:
        CfmergeError: there is none, or there are several.
    """
    for step in key.split("::") if key else ():
        entries = _entries(value)
        if step not in entries:
            raise CfmergeError(f"{where}: has no entry {step!r}{nearest(step, _texts(entries))}")
        value = entries[step]
    notes: tuple[str, ...] = ()
    trail, asked = [where, *([key] if key else [])], bool(key)
    for _ in range(MAX_DEPTH):
        entries = _entries(value)
        options = _options(entries)
        known = [name for name in options if name in WRAPPERS]
        if (_is_state(value) and (asked or not known)) or not options:
            break
        options = known or options
        if len(options) > 1:
            shown = "\n".join(f"  {'::'.join([*trail, name])}" for name in options)
            raise CfmergeError(f"{where}: holds several dictionaries of tensors; name the one that is meant:\n{shown}")
        others = [name for name in _texts(entries) if name != options[0]]
        if others:
            notes += (f"its weights are those under {options[0]!r}; not read: {and_more(others)}",)
        value, asked = entries[options[0]], False
        trail.append(options[0])
    found = _state(value, where)
    if not found.tensors:
        raise CfmergeError(
            f"{where}: holds no tensors with names (it is {_kind(value)}); save the model's weights: "
            "torch.save(model.state_dict(), FILE)"
        )
    return Found(found.tensors, notes + found.notes, "::".join(trail[1:]))


def unwrapped(tensors: Mapping[str, Call]) -> tuple[dict[str, Call], list[str]]:
    """The tensors without the prefixes that wrapped modules give to all names, and the notes on them."""
    named, notes = dict(tensors), []
    while named:
        prefix = next((prefix for prefix in PREFIXES if all(name.startswith(prefix) for name in named)), "")
        if not prefix or any(name == prefix for name in named):
            break
        named = {name.removeprefix(prefix): value for name, value in named.items()}
        notes.append(f"all names began with {prefix!r}, which is taken off")
    return named, notes


def _entries(value: Any) -> dict[Any, Any]:
    """The entries of a dictionary, or of an object that is one; an object's attributes are none."""
    if type(value) is dict:
        return value
    if not isinstance(value, Call) or _is_module(value):
        return {}
    pairs = value.items
    if str(value.func) == "collections.OrderedDict" and value.args and type(value.args[0]) is list:  # Python 2
        pairs = [pair for pair in value.args[0] if type(pair) in (list, tuple) and len(pair) == 2]
    return {key: entry for key, entry in pairs if type(key) is str}


def _texts(entries: Mapping[Any, Any]) -> list[str]:
    return [key for key in entries if type(key) is str]


def _kind(value: Any) -> str:
    if isinstance(value, Call):
        return f"a {value.func}"
    named = _texts(_entries(value))
    return f"a {type(value).__name__}" + (f" with {and_more(named)}" if named else "")


def _is_module(value: Any) -> bool:
    return isinstance(value, Call) and type(value.state) is dict and "_modules" in value.state


def _is_state(value: Any) -> bool:
    """Whether it is a dictionary of tensors, or a module."""
    return _is_module(value) or any(is_tensor(entry) and type(key) is str for key, entry in _entries(value).items())


def _options(entries: Mapping[Any, Any]) -> list[str]:
    """The keys under which there is a dictionary of tensors, or a wrapped one."""
    known: dict[int, bool] = {}  # by object: it may stand under many keys
    options = []
    for key, entry in entries.items():
        if type(key) is str:
            if id(entry) not in known:
                known[id(entry)] = _is_state(entry)
            if known[id(entry)] or (key in WRAPPERS and any(_is_state(one) for one in _entries(entry).values())):
                options.append(key)
    return options


def _state(value: Any, where: str) -> Found:
    """A state dict's tensors, or a module's."""
    if _is_module(value):
        return Found(dict(_walked(value, where)), ())
    entries = _entries(value)
    tensors = {key: entry for key, entry in entries.items() if is_tensor(entry) and type(key) is str}
    others = [repr(key) if type(key) is str else "a key that is no text" for key in entries if key not in tensors]
    notes = (f"entries that are no tensors are not read: {and_more(others)}",) if others and tensors else ()
    return Found(tensors, notes)


def _walked(module: Call, where: str) -> Iterator[tuple[str, Call]]:
    """Names and tensors of a module that was pickled as a whole, as its `state_dict()` has them."""
    todo: list[tuple[str, Call, int]] = [("", module, 0)]
    count = 0
    while todo:
        prefix, one, depth = todo.pop()
        left_out = _members(one.state.get("_non_persistent_buffers_set"))
        members = [(kind, _entries(one.state.get(kind))) for kind in ("_parameters", "_buffers")]
        yield from (
            (prefix + name, value)
            for kind, entries in members
            for name, value in entries.items()
            if type(name) is str and is_tensor(value) and not (kind == "_buffers" and name in left_out)
        )
        children = [item for item in _entries(one.state["_modules"]).items() if type(item[0]) is str]
        todo += [(f"{prefix}{name}.", child, depth + 1) for name, child in reversed(children) if _is_module(child)]
        count += 1 + len(left_out) + len(children) + sum(len(entries) for _, entries in members)
        if count > MAX_MEMBERS or depth > MAX_DEPTH or len(prefix) > MAX_NAME:
            raise CfmergeError(
                f"{where}: its modules are nested deeper than {MAX_DEPTH}, are more than {MAX_MEMBERS}, or have names "
                f"of more than {MAX_NAME} characters; save model.state_dict()"
            )


def _members(value: Any) -> set[str]:
    """The texts in a set: a list, or a call of `set` with one."""
    if isinstance(value, Call):
        value = value.args[0] if value.args else value.entries
    return {one for one in value if type(one) is str} if type(value) in (list, tuple) else set()
