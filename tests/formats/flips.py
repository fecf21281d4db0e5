"""Files in which bits are flipped, and what a reader makes of them."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np

from cfmerge.errors import CfmergeError
from cfmerge.formats.base import Container


def flips(files: Sequence[Path], count: int, seed: int = 0) -> Iterator[tuple[Path, int]]:
    """Flips one bit of one file after the other, each time anew; gives `(file, bit)` while it is flipped."""
    rng = np.random.default_rng(seed)
    contents = [file.read_bytes() for file in files]
    ends = np.cumsum([len(content) for content in contents])
    for bit in rng.integers(0, 8 * ends[-1], count):
        number = int(np.searchsorted(ends, bit // 8, side="right"))
        place = int(bit) - 8 * int(ends[number] - len(contents[number]))
        changed = bytearray(contents[number])
        changed[place // 8] ^= 1 << place % 8
        files[number].write_bytes(changed)
        yield files[number], place
        files[number].write_bytes(contents[number])


def outcome(open_container: Callable[[], Container], expected: Mapping[str, np.ndarray]) -> str:
    """ "refused", "same", "other numbers" or "other tensors"; any error but a `CfmergeError` comes through."""
    try:
        container = open_container()
        found = {name: container.read(name) for name in container.tensors}
    except CfmergeError:
        return "refused"
    alike = {name: (tensor.shape, tensor.dtype) for name, tensor in found.items()}
    if alike != {name: (tensor.shape, tensor.dtype) for name, tensor in expected.items()}:
        return "other tensors"
    same = all(found[name].tobytes() == tensor.tobytes() for name, tensor in expected.items())
    return "same" if same else "other numbers"
