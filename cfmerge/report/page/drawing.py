"""Figures of matplotlib as inline SVG: text as text, colours of the page's style, nothing but what is drawn.

matplotlib draws in colours that stand for names of the style sheet (`mark("ink")`); in the SVG each becomes
`var(--ink)`, so that one drawing serves both themes.
"""

from __future__ import annotations

import io
import re
from typing import Any
from xml.etree import ElementTree

SERIES = 8  # colours; from there on they repeat, with other dashes
NAMES = ("ink", "muted", "rule", "paper", "plus", "minus", *(f"s{number}" for number in range(SERIES)))
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "p")
DASHES: tuple[Any, ...] = ("-", (0, (5, 2)), (0, (1.5, 1.5)))
MERGED = -1  # the series of the merged model: in ink, and thicker
TEXT = 12  # pixels
SVG, XLINK = "{http://www.w3.org/2000/svg}", "{http://www.w3.org/1999/xlink}"


def mark(name: str) -> str:
    """The colour that stands for a name of the style sheet while matplotlib draws."""
    return f"#fe01{NAMES.index(name):02x}"


def look(series: int) -> dict[str, Any]:
    """Colour, marker and dashes of a series; they agree with the legend of the page."""
    if series == MERGED:
        return {"color": mark("ink"), "marker": "o", "linestyle": "-", "linewidth": 2.4, "zorder": 4}
    number = series % SERIES
    dashes = DASHES[series // SERIES % len(DASHES)]
    return {"color": mark(f"s{number}"), "marker": MARKERS[number], "linestyle": dashes, "linewidth": 1.5}


def drawn(width: int, height: int, left: int = 50, bottom: int = 38, right: int = 12, top: int = 10) -> tuple[Any, Any]:
    """A figure of so many pixels with one pair of axes, whose margins are in pixels."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width / 72, height / 72), dpi=72)
    figure.patch.set_alpha(0)
    place = (left / width, bottom / height, (width - left - right) / width, (height - bottom - top) / height)
    axes = figure.add_axes(place)
    axes.patch.set_alpha(0)
    axes.set_axisbelow(True)
    axes.grid(axis="y", color=mark("rule"), linewidth=0.8)
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.spines["bottom"].set_color(mark("muted"))
    axes.tick_params(length=0, labelsize=TEXT, labelcolor=mark("muted"), color=mark("muted"), pad=4)
    return figure, axes


def labelled(axes: Any, x: str, y: str = "") -> None:
    """Names the axes."""
    for name, text in (("xlabel", x), ("ylabel", y)):
        getattr(axes, f"set_{name}")(text, fontsize=TEXT, color=mark("muted"), labelpad=3)


def svg_of(figure: Any, label: str, key: str) -> str:
    """The figure as an SVG element with an accessible name; `key` keeps its ids apart from those of others."""
    from matplotlib import rc_context
    from matplotlib.backends.backend_svg import FigureCanvasSVG

    buffer = io.StringIO()
    with rc_context({"svg.fonttype": "none", "svg.hashsalt": key, "text.parse_math": False}):
        FigureCanvasSVG(figure).print_svg(buffer, metadata={"Date": None, "Creator": None})
    root = ElementTree.fromstring(buffer.getvalue())
    return ElementTree.tostring(_cleaned(root, label, key), encoding="unicode")


def _cleaned(root: Any, label: str, key: str) -> Any:
    """The SVG without metadata, unused ids and fonts, in the colours of the style sheet."""
    ElementTree.register_namespace("", SVG[1:-1])
    for child in root.findall(f"{SVG}metadata"):
        root.remove(child)
    width, height = root.get("viewBox").split()[2:]
    root.attrib = {
        "viewBox": root.get("viewBox"), "width": f"{float(width):g}", "height": f"{float(height):g}",
        "role": "img", "aria-label": label, "focusable": "false",
    }  # fmt: skip
    used = set(re.findall(r"#([\w-]+)", " ".join(_references(root))))
    for element in root.iter():
        _clean(element, used, key)
    return root


def _references(root: Any) -> list[str]:
    """The values of all attributes that may point to an id."""
    return [
        value
        for element in root.iter()
        for name, value in element.attrib.items()
        if name.endswith("href") or "url(" in value
    ]


def _clean(element: Any, used: set[str], key: str) -> None:
    found = dict(element.attrib)
    element.attrib.clear()
    for name, value in found.items():
        if name == "id" and value not in used:
            continue
        if name == "style":
            value = re.sub(r"font-family:[^;]*;?|stroke-linejoin: *miter;?", "", value)
            value = re.sub(r"font: *(?:\d+ +)?([\d.]+px)[^;]*", r"font-size: \1", value)
            value = re.sub(r"#fe01([0-9a-f]{2})", lambda hit: f"var(--{NAMES[int(hit[1], 16)]})", value)
        if name == "id":
            value = f"{key}-{value}"
        elif name.endswith("href") or "url(#" in value:
            value = value.replace("#", f"#{key}-")
        element.set("href" if name == f"{XLINK}href" else name, value)
    if element.text and not element.text.strip():
        element.text = None
    if element.tail and not element.tail.strip():
        element.tail = None
