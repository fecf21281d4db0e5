"""Equations as MathML, which browsers render by themselves: no script, no font, nothing from the network.

`pymdownx.arithmatex` finds `$...$` and `$$...$$`; what it leaves, `\\(...\\)` and `\\[...\\]`, is translated here.
"""

import html
import logging
import re
from typing import Any

from latex2mathml.converter import convert

log = logging.getLogger("mkdocs.hooks.equations")
FOUND = re.compile(r'<(span|div) class="arithmatex">\\([(\[])(.*?)\\[)\]]</\1>', re.DOTALL)
WORD = re.compile(r"<mo>([A-Za-z]{2,})</mo>")  # `\exp`, `\operatorname{tr}`: as operators they would have wide spaces
LIMITS = ("min", "max")
BAR = re.compile(
    r"<mo>(&#x02016;|&#x0007C;)</mo>"
)  # of norms: one that has an exponent would not stretch, the other would
SIZED = re.compile(
    r"\\[bB]igg?[lrm]?(?=\s*(?:/|\\(?:[lr]?[vV]ert|[lr]brace|[lr]ceil|[lr]floor|[{}])))"
)  # not known there
WRONG = re.compile(r"\\|<mi>&</mi>|<mi>&amp;</mi>|<mo ?/>")  # left of a command that the translator does not know


def on_page_content(content: str, page: Any, **_: Any) -> str:
    """The page with its equations as MathML; strict builds fail at one that cannot be translated."""

    def translated(match: re.Match[str]) -> str:
        block = match[2] == "["
        try:
            return mathml(html.unescape(match[3]).strip(), block)
        except Exception as error:
            log.warning("%s: an equation that cannot be translated: %s (%s)", page.file.src_uri, match[3], error)
            return match[0]

    return FOUND.sub(translated, content)


def mathml(latex: str, block: bool) -> str:
    """One equation as MathML, a displayed one in a box that scrolls where the screen is narrow."""
    known = SIZED.sub("", latex).replace("{aligned}", "{split}")
    known = known.replace(r"\{", r"\lbrace ").replace(r"\}", r"\rbrace ")
    made = convert(known, display="block" if block else "inline")
    wrong = WRONG.search(made)
    if wrong:
        raise ValueError(f"{wrong[0]!r} is left in its translation")
    made = made.replace('mathvariant="bold"', 'style="font-weight: bold"')
    made = BAR.sub(r'<mo stretchy="false" lspace="0" rspace="0">\1</mo>', made)
    made = WORD.sub(lambda word: word[0] if word[1] in LIMITS else f"<mi>{word[1]}</mi>", made)
    if not block:
        return made
    label = html.escape(" ".join(latex.split()), quote=True)
    return f'<div class="equation" tabindex="0" role="group" aria-label="{label}">{made}</div>'
