"""Errors, warnings and notes as a terminal shows them: prose between words, and whole what is to be pasted."""

import re
import sys
import textwrap

from rich.console import Console
from rich.text import Text

WHOLE = re.compile(r"\s|- |--|cfmerge |\{")  # how a line begins that is an item of a list, a command or a rule
QUOTED = re.compile(r"(?<!\w)(?:--?[\w-]+ )?(['\"`])(?=\S)[^\n]*?\S\1(?!\w)")  # an option's name goes with its text
HELD = "\ue000"  # stands for a space at which no line ends


def out() -> Console:
    """Standard output; wide where it is no terminal, so that nothing is folded in a file."""
    return Console(width=None if sys.stdout.isatty() else 200, emoji=False, highlight=False)


def error(message: str) -> None:
    tell(Console(stderr=True, emoji=False), "error", message, "bold red")


def tell(console: Console, label: str, message: str, style: str) -> None:
    """Prints `label: message`; the label has the style."""
    text = Text(folded(f"{label}: {message}", _width(console)))
    text.stylize(style, 0, len(label) + 1)
    console.print(text, soft_wrap=True, highlight=False)


def say(console: Console, message: str, style: str = "") -> None:
    """Prints prose."""
    console.print(Text(folded(message, _width(console)), style), soft_wrap=True, highlight=False)


def _width(console: Console) -> int | None:
    return console.width if console.is_terminal else None


def folded(message: str, width: int | None) -> str:
    """The message in lines of at most `width`, but for what must stay whole to be pasted; none: as it is.

    Lines that are indented, commands or rules stay as they are. In other lines words and quoted texts stay whole.
    """
    if width is None:
        return message
    return "\n".join(line if WHOLE.match(line) else _filled(line, width) for line in message.split("\n"))


def _filled(line: str, width: int) -> str:
    held = QUOTED.sub(lambda quoted: quoted.group().replace(" ", HELD), line)
    lines = textwrap.wrap(held, width, break_long_words=False, break_on_hyphens=False)
    return "\n".join(lines).replace(HELD, " ")
