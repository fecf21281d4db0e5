"""How the command ends: errors and interrupts as messages and exit codes."""

import json as json_module
import signal
import sys
from collections.abc import Callable
from types import FrameType

import typer

from cfmerge.cli import messages
from cfmerge.errors import CfmergeError

INTERRUPTED = 130


def ended(app: Callable[[], object], json: bool) -> None:
    """Runs the command line, and ends the process: exit code 1 after an error, 130 when interrupted or terminated.

    Args:
        json: errors are events on the standard output too.
    """
    signal.signal(signal.SIGTERM, _terminate)
    try:
        app()
    except CfmergeError as error:
        if json:
            typer.echo(json_module.dumps({"event": "error", "message": str(error)}))
        messages.error(str(error))
        sys.exit(1)
    except SystemExit as end:
        if end.code == INTERRUPTED:  # typer turns KeyboardInterrupt into this
            messages.error(f"interrupted; {_left(end)}")
        raise


def _terminate(number: int, frame: FrameType | None) -> None:
    raise KeyboardInterrupt


def _left(error: BaseException | None) -> str:
    """What an interrupted merge has left, which it has noted on its KeyboardInterrupt."""
    while error is not None:
        if isinstance(error, KeyboardInterrupt) and getattr(error, "__notes__", None):
            return error.__notes__[0]
        error = error.__cause__ or error.__context__
    return "nothing was written"
