"""Pickles as inert records: the opcodes are interpreted, nothing is imported, and nothing is called.

A pickle is a program for a small stack machine, two of whose instructions fetch anything by name and call it. Here a
name becomes a `Global`, a call becomes a `Call`, and the reader looks at them. What may not be met even so, since
whoever opens the file with another tool would run it, is refused by `dangers.danger`.
"""

import io
import pickletools
import struct
from collections.abc import Callable
from typing import Any, BinaryIO

from cfmerge.errors import CfmergeError
from cfmerge.formats.dangers import danger
from cfmerge.formats.records import Call as Call
from cfmerge.formats.records import Global as Global
from cfmerge.formats.records import Malformed, key_of
from cfmerge.formats.records import Persistent as Persistent
from cfmerge.formats.records import Pickle as Pickle

MAX_BYTES = 1 << 28
MAX_OPCODES = 10_000_000  # each makes at most one small object
MAX_DEPTH = 100
GETATTR = (Global("builtins", "getattr"), Global("__builtin__", "getattr"))


def interpret(data: bytes | memoryview | BinaryIO, where: str) -> Pickle:
    """The content of a pickle as plain values and inert records.

    >>> import pickle
    >>> interpret(pickle.dumps({"a": [1, 2.5]}), "file").value
    {'a': [1, 2.5]}

    Args:
        data: the pickle; or a file, which is read to the end of the pickle and no further.
        where: the file's name in messages.

    Raises:
        CfmergeError: it would run something, it is corrupt, or it is too large.
    """
    machine = _Machine(where)
    if isinstance(data, bytes | memoryview):
        if len(data) > MAX_BYTES:
            raise CfmergeError(f"{where}: its pickle has {len(data)} bytes, cfmerge reads at most {MAX_BYTES}")
        data = io.BytesIO(data)
    try:
        return machine.run(data)
    except (Malformed, ValueError, IndexError, KeyError, TypeError, OverflowError, MemoryError, struct.error) as error:
        if isinstance(error, CfmergeError):
            raise
        raise CfmergeError(f"{where}: its pickle is corrupt ({error}); fetch the file again") from None


class _Machine:
    """The stack, the memo and the marks."""

    def __init__(self, where: str):
        self.where = where
        self.stack: list[Any] = []
        self.marks: list[list[Any]] = []
        self.memo: dict[int, Any] = {}
        self.globals: dict[Global, Global] = {}
        self.persistents: list[Persistent] = []
        self.unused: Global | None = None  # a `getattr` that has not yet fetched a member of a class

    def run(self, file: BinaryIO) -> Pickle:
        actions: dict[str, Callable[[Any], None]] = {
            name: getattr(self, f"on_{method}") for method, names in ACTIONS.items() for name in names.split()
        }
        for count, (opcode, arg, _) in enumerate(pickletools.genops(file)):
            name = opcode.name
            if name in LITERALS:
                self.stack.append(arg)
            elif name in CONSTANTS:
                self.stack.append(CONSTANTS[name])
            elif name in FRESH:
                self.stack.append(FRESH[name]())
            elif name in TUPLES:
                self.stack.append(tuple(self.take(TUPLES[name])))
            elif name in actions:
                actions[name](arg)
            elif name == "STOP":
                break
            elif name not in NOTHING:
                raise Malformed(f"opcode {name}")
            if count > MAX_OPCODES:
                raise Malformed(f"more than {MAX_OPCODES} opcodes")
        if self.unused is not None:
            self._refuse(str(self.unused))
        if len(self.stack) != 1 or self.marks:
            raise Malformed(f"{len(self.stack)} values and {len(self.marks)} marks are left at its end")
        return Pickle(self.stack[0], tuple(self.globals), tuple(self.persistents))

    def on_pop_mark(self, _: Any = None) -> list[Any]:
        if not self.marks:
            raise Malformed("a mark is missing")
        values, self.stack = self.stack, self.marks.pop()
        return values

    def on_mark(self, _: Any) -> None:
        if len(self.marks) >= MAX_DEPTH:
            raise Malformed(f"nested deeper than {MAX_DEPTH}")
        self.marks.append(self.stack)
        self.stack = []

    def on_pop(self, _: Any) -> None:
        if self.stack:
            self.stack.pop()
        else:
            self.on_pop_mark()

    def on_dup(self, _: Any) -> None:
        self.stack.append(self.stack[-1])

    def on_put(self, arg: Any) -> None:
        self.memo[int(arg)] = self.stack[-1]

    def on_memoize(self, _: Any) -> None:
        self.memo[len(self.memo)] = self.stack[-1]

    def on_get(self, arg: Any) -> None:
        self.stack.append(self.memo[int(arg)])

    def take(self, count: int) -> list[Any]:
        if len(self.stack) < count:
            raise Malformed("values are missing")
        values = self.stack[-count:]
        del self.stack[-count:]
        return values

    def on_tuple(self, _: Any) -> None:
        values = self.on_pop_mark()
        self.stack.append(tuple(values))

    def on_list(self, _: Any) -> None:
        values = self.on_pop_mark()
        self.stack.append(values)

    def on_dict(self, _: Any) -> None:
        values = self.on_pop_mark()
        self.stack.append({})
        self._set(values)

    def on_append(self, _: Any) -> None:
        self._extend(self.take(1))

    def on_appends(self, _: Any) -> None:
        self._extend(self.on_pop_mark())

    def on_setitem(self, _: Any) -> None:
        self._set(self.take(2))

    def on_setitems(self, _: Any) -> None:
        self._set(self.on_pop_mark())

    def _extend(self, values: list[Any]) -> None:
        target = self.stack[-1]
        if isinstance(target, Call):
            target.entries.extend(values)
        elif type(target) is list:
            target.extend(values)
        else:
            raise Malformed(f"appends to a {type(target).__name__}")

    def _set(self, values: list[Any]) -> None:
        target = self.stack[-1]
        if len(values) % 2:
            raise Malformed("a key without a value")
        pairs = zip(values[::2], values[1::2], strict=True)
        if isinstance(target, Call):
            target.items.extend(pairs)
        elif type(target) is dict:
            target.update((key_of(key), value) for key, value in pairs)
        else:
            raise Malformed(f"sets items of a {type(target).__name__}")

    def on_named(self, arg: str) -> None:
        module, _, name = arg.partition(" ")
        self._push(Global(module, name))

    def on_stack_named(self, _: Any) -> None:
        module, name = self.take(2)
        if not isinstance(module, str) or not isinstance(name, str):
            raise Malformed("a name that is no text")
        self._push(Global(module, name))

    def _push(self, name: Global) -> None:
        if name not in self.globals:
            self.globals[name] = name
            if name in GETATTR:
                self.unused = name
            elif danger(name.module, name.name):
                self._refuse(str(name))
        self.stack.append(self.globals[name])

    def on_reduce(self, _: Any) -> None:
        func, args = self.take(2)
        self._call(func, args)

    def on_newobj_ex(self, _: Any) -> None:
        func, args, kwargs = self.take(3)
        if type(kwargs) is not dict:
            raise Malformed("keyword arguments that are no dict")
        self._call(func, args)
        self.stack[-1].items.extend(kwargs.items())

    def on_inst(self, arg: str) -> None:
        args = self.on_pop_mark()
        self.on_named(arg)
        self._call(self.stack.pop(), tuple(args))

    def on_obj(self, _: Any) -> None:
        func, *args = self.on_pop_mark() or [None]
        self._call(func, tuple(args))

    def on_build(self, _: Any) -> None:
        target, state = self.take(2)
        if isinstance(target, Global):
            self._refuse(str(target), "change")
        if not isinstance(target, Call):
            raise Malformed(f"sets the state of a {type(target).__name__}")
        if target.state is not None:
            raise Malformed(f"sets the state of {target.func} twice")
        target.state = state
        self.stack.append(target)

    def on_extension(self, arg: int) -> None:
        self._refuse(f"number {arg} of the extension registry")

    def on_persistent(self, arg: Any) -> None:
        self.persistents.append(Persistent(arg))
        self.stack.append(self.persistents[-1])

    def on_stack_persistent(self, _: Any) -> None:
        self.on_persistent(*self.take(1))

    def _call(self, func: Any, args: Any) -> None:
        if isinstance(func, Call):
            self._refuse(f"the result of {func.func}")
        if not isinstance(func, Global) or type(args) is not tuple:
            raise Malformed(f"calls a {type(func).__name__} with a {type(args).__name__}")
        if func in GETATTR:
            self._check_member(func, args)
        self.stack.append(Call(func, args))

    def _check_member(self, func: Global, args: tuple) -> None:
        """An enumeration's member, as Python 3.11 pickled it, is `getattr(Class, "MEMBER")`; no other is let pass."""
        owner, member = args if len(args) == 2 else (None, None)
        if not isinstance(owner, Global) or not isinstance(member, str) or not member.isidentifier():
            self._refuse(str(func))
        elif danger(owner.module, f"{owner.name}.{member}"):
            self._refuse(f"{owner}.{member}")
        self.unused = None

    def _refuse(self, what: str, how: str = "run") -> None:
        raise CfmergeError(
            f"{self.where}: this file would {how} {what} when it is loaded, which no weights need; nothing of it was "
            "run. Do not open it with other tools, and fetch the model from somebody whom you trust"
        )


_LITERALS = (
    "INT BININT BININT1 BININT2 LONG LONG1 LONG4 STRING BINSTRING SHORT_BINSTRING BINBYTES SHORT_BINBYTES BINBYTES8 "
    "BYTEARRAY8 UNICODE SHORT_BINUNICODE BINUNICODE BINUNICODE8 FLOAT BINFLOAT"
)
LITERALS = frozenset(_LITERALS.split())
CONSTANTS = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False, "EMPTY_TUPLE": ()}
FRESH: dict[str, Callable[[], Any]] = {"EMPTY_LIST": list, "EMPTY_DICT": dict, "EMPTY_SET": list}
TUPLES = {"TUPLE1": 1, "TUPLE2": 2, "TUPLE3": 3}
NOTHING = {"PROTO", "FRAME"}
ACTIONS = {  # the method, and its opcodes
    "mark": "MARK",
    "pop": "POP",
    "pop_mark": "POP_MARK",
    "dup": "DUP",
    "memoize": "MEMOIZE",
    "put": "PUT BINPUT LONG_BINPUT",
    "get": "GET BINGET LONG_BINGET",
    "tuple": "TUPLE FROZENSET",
    "list": "LIST",
    "dict": "DICT",
    "append": "APPEND",
    "appends": "APPENDS ADDITEMS",
    "setitem": "SETITEM",
    "setitems": "SETITEMS",
    "named": "GLOBAL",
    "stack_named": "STACK_GLOBAL",
    "reduce": "REDUCE NEWOBJ",
    "newobj_ex": "NEWOBJ_EX",
    "inst": "INST",
    "obj": "OBJ",
    "build": "BUILD",
    "extension": "EXT1 EXT2 EXT4",
    "persistent": "PERSID",
    "stack_persistent": "BINPERSID",
}
