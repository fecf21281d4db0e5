"""Errors as one process tells them, and the others raise them."""

from collections.abc import Callable

from cfmerge.errors import CfmergeError, NonFiniteError, StoppedError

GO_ON = "the same command goes on with what is kept of it"
KINDS: dict[str, Callable[..., BaseException]] = {
    "input": CfmergeError,
    "not finite": NonFiniteError,
    "stopped": lambda message: StoppedError(message, GO_ON),
}


def told(error: BaseException, number: int, count: int) -> dict[str, str]:
    """An error of process `number` of `count` as texts by name."""
    if isinstance(error, NonFiniteError):
        return {"kind": "not finite", "message": str(error), "source": error.source, "tensor": error.tensor}
    if isinstance(error, StoppedError):
        return {"kind": "stopped", "message": error.reason}
    if isinstance(error, CfmergeError):
        return {"kind": "input", "message": str(error)}
    what = "was interrupted" if isinstance(error, KeyboardInterrupt) else f"failed: {type(error).__name__}: {error}"
    return {"kind": "stopped", "message": f"process {number} of {count} {what}"}


def heard(content: dict[str, str]) -> BaseException:
    """The error that another process has told."""
    others = {key: value for key, value in content.items() if key not in {"kind", "message"}}
    return KINDS[content["kind"]](content["message"], **others)
