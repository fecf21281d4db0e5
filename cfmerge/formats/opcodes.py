"""Pickles written by hand: opcodes of protocol 2 for the few kinds of value that torch's files are made of."""

import struct
from collections.abc import Iterable


class Opcodes:
    """A writer of one pickle. Texts and names that come again are remembered,
    so they are asked for in the order in which they stand.

    >>> import pickle
    >>> write = Opcodes()
    >>> pickle.loads(write.ended(write.tuple_of(write.text("a"), write.number(300))))
    ('a', 300)
    """

    def __init__(self) -> None:
        self._memo: dict[bytes, int] = {}

    def ended(self, value: bytes) -> bytes:
        """The whole pickle of a value."""
        return b"\x80\x02" + value + b"."

    def text(self, value: str) -> bytes:
        content = value.encode("utf-8", "surrogatepass")
        return b"X" + struct.pack("<I", len(content)) + content

    def word(self, value: str) -> bytes:
        """A text that comes again."""
        return self.again(self.text(value))

    def again(self, value: bytes) -> bytes:
        """A value that comes again and is never changed: its opcodes at first, then a reference to it."""
        number = self._memo.get(value)
        if number is None:
            number = self._memo[value] = len(self._memo)
            return value + (b"q" + bytes([number]) if number < 256 else b"r" + struct.pack("<I", number))
        return b"h" + bytes([number]) if number < 256 else b"j" + struct.pack("<I", number)

    def number(self, value: int) -> bytes:
        if 0 <= value < 256:
            return b"K" + bytes([value])
        if -(1 << 31) <= value < 1 << 31:
            return b"J" + struct.pack("<i", value)
        content = value.to_bytes(value.bit_length() // 8 + 1, "little", signed=True)
        return b"\x8a" + bytes([len(content)]) + content

    def tuple_of(self, *values: bytes) -> bytes:
        if len(values) < 4:
            return b"".join(values) + (b")", b"\x85", b"\x86", b"\x87")[len(values)]
        return b"(" + b"".join(values) + b"t"

    def numbers(self, values: Iterable[int]) -> bytes:
        return self.tuple_of(*(self.number(value) for value in values))

    def list_of(self, values: Iterable[bytes]) -> bytes:
        return b"](" + b"".join(values) + b"e"

    def items(self, pairs: Iterable[tuple[bytes, bytes]]) -> bytes:
        """What sets items of the value before it."""
        return b"(" + b"".join(key + value for key, value in pairs) + b"u"

    def dict_of(self, pairs: Iterable[tuple[bytes, bytes]]) -> bytes:
        return b"}" + self.items(pairs)

    def name(self, module: str, name: str) -> bytes:
        return self.again(f"c{module}\n{name}\n".encode())

    def call(self, func: bytes, *args: bytes) -> bytes:
        return func + self.tuple_of(*args) + b"R"

    def object(self, cls: bytes, state: bytes) -> bytes:
        """An object without arguments, and its state."""
        return cls + b")\x81" + state + b"b"
