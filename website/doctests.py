"""Examples in docstrings as code: those that stand at the margin, or in a section, get a fence."""

import re
from typing import Any

import griffe

RUN = re.compile(r"^( *)>>> .*\n?(?:\1\S.*\n?|\1 +\S.*\n?)*", re.MULTILINE)
AT_THE_MARGIN = re.compile(r"^\S.*$", re.MULTILINE)


class Doctests(griffe.Extension):
    """Fences in every docstring."""

    def on_instance(self, *, obj: griffe.Object, **_: Any) -> None:
        if obj.docstring is not None:
            obj.docstring.value = as_code(obj.docstring.value)


def as_code(text: str) -> str:
    """The docstring with fences about examples that are not indented further than the text around them."""

    def fenced(match: re.Match[str]) -> str:
        above = AT_THE_MARGIN.findall(text[: match.start()])
        margin = "    " if above and re.fullmatch(r"Examples?:", above[-1]) else ""
        if match[1] != margin:
            return match[0]
        return f"{margin}```pycon\n{match[0].rstrip()}\n{margin}```\n"

    return RUN.sub(fenced, text)
