"""A page as HTML: the template and the style beside this file, filled by jinja2."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from cfmerge.report.page.blocks import Page, Section

HERE = Path(__file__).parent


def html(page: Page) -> str:
    """The page as one text of HTML that needs no other file."""
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    environment = Environment(
        loader=FileSystemLoader(HERE), autoescape=True, trim_blocks=True, lstrip_blocks=True, undefined=StrictUndefined
    )
    environment.filters |= {"inline": _inline, "slug": slug, "kind": _kind}
    environment.globals |= {"identify": _Identities()}
    template = environment.get_template("page.html.jinja")
    return template.render(page=page, style=(HERE / "page.css").read_text(encoding="utf-8")).lstrip()


def slug(text: str) -> str:
    """The text as an id: small letters, digits and hyphens."""
    return re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-") or "part"


class _Identities:
    """Ids of a page, each used once."""

    def __init__(self) -> None:
        self._used: set[str] = set()
        self._of: dict[int, str] = {}

    def __call__(self, section: Section) -> str:
        """The id of a section; the same when it is asked for again."""
        if id(section) not in self._of:
            name = slug(section.title)
            number = next(n for n in range(1, len(self._used) + 2) if f"{name}-{n}" not in self._used)
            self._used.add(f"{name}-{number}")
            self._of[id(section)] = name if number == 1 else f"{name}-{number}"
        return self._of[id(section)]


def _kind(block: Any) -> str:
    """The name of a block's or cell's class, in small letters, which the template chooses by."""
    return type(block).__name__.lower()


def _inline(text: str) -> Any:
    """A text with what stands between backticks as code, and between two stars in bold; all else escaped."""
    from markupsafe import Markup, escape

    escaped = str(escape(text))
    escaped = re.sub(r"`([^`\n]+)`", r"<code>\1</code>", escaped)
    escaped = re.sub(r"\*\*([^*\n]+)\*\*", r"<strong>\1</strong>", escaped)
    return Markup(escaped)
