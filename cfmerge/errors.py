"""The errors that cfmerge raises, and the names that they suggest."""

import difflib
from collections.abc import Iterable, Sequence


class CfmergeError(ValueError):
    """Bad input, or a merge that cannot be done: the message says what, where, and the way out.

        >>> try:
        ...     cfmerge.merge("base", ["math", "code"], "tsv", output="merged")
        ... except cfmerge.CfmergeError as error:
        ...     print(error)
        unknown method 'tsv'; did you mean 'tsv_m' or 'tsv_c' or 'svc'?

    It is a `ValueError`. Nothing has been written when it is raised, but by a `StoppedError` that says so.
    """


class StoppedError(CfmergeError):
    """A merge that something around it has stopped, such as a full disk: the same merge, run again, may go on.

    Attributes:
        reason: the message without what has become of the output.
    """

    def __init__(self, reason: str, left: str = "nothing was written"):
        super().__init__(f"{reason}; {left}")
        self.reason = reason


class NonFiniteError(CfmergeError):
    """A NaN or an infinity in `tensor` of the checkpoint called `source`."""

    def __init__(self, message: str, *, source: str, tensor: str):
        super().__init__(message)
        self.source = source
        self.tensor = tensor


def nearest(name: str, options: Iterable[str]) -> str:
    """`; did you mean 'x' or 'y'?` for the options that look like `name`, else all of them."""
    options = sorted(options)
    close = difflib.get_close_matches(name, options, n=3, cutoff=0.5)
    if close:
        return "; did you mean " + " or ".join(repr(option) for option in close) + "?"
    return "; there is: " + ", ".join(options) if options else ""


def and_more(names: Sequence[str]) -> str:
    """The first of some names, and how many more there are: "a", or "a and 2 more"."""
    return f"{names[0]} and {len(names) - 1} more" if len(names) > 1 else names[0]
