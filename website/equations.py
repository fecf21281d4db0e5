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
WORD = re.compile(r"<mo>([A-Za-z]{2,})</mo>(?=(<mo[^>]*>(?:&#x00028;|\())?)")  # `\exp`, `\operatorname{tr}`
LIMITS = ("min", "max")
BAR = re.compile(r"<mo>(&#x02016;|&#x0007C;)</mo>")  # of a norm: only one without an exponent would stretch
# `\Bigl` and its kin are translated in front of brackets alone; others grow by themselves or stay as they are.
SIZED = re.compile(r"\\[bB]igg?[lrm]?(?=\s*(?:/|\\(?:[lr]?[vV]ert|[lr]brace|[lr]ceil|[lr]floor|[{}])))")
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
    made = WORD.sub(_word, made)
    return f'<div class="equation" tabindex="0" role="group" aria-label="equation">{made}</div>' if block else made


def _word(match: re.Match[str]) -> str:
    """An operator's name with a thin space before it, and one behind it unless a bracket follows."""
    space = "0" if match[2] else ".17em"
    return match[0] if match[1] in LIMITS else f'<mo lspace=".17em" rspace="{space}">{match[1]}</mo>'
