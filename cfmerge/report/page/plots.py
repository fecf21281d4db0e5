"""Drawings: lines, heat maps. Each returns a panel, whose label says the main numbers in words."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from jaxtyping import Float

from cfmerge.report.page.blocks import Panel
from cfmerge.report.page.drawing import TEXT, drawn, labelled, look, mark, svg_of

WIDTH, HEIGHT = 340, 230  # pixels: a phone's width
CROWDED = 40  # points from which a line has no markers
ROOM = 30  # pixels of a cell from which it has its number
MINUS, DASH = "\N{MINUS SIGN}", "\N{EN DASH}"
Line = tuple[int, Sequence[float], Sequence[float]]  # the number of its look, x, y


def number(value: float, digits: int = 3) -> str:
    """A number in three digits, in powers of ten where it is very small or large; a dash where there is none."""
    if not math.isfinite(value):
        return DASH
    value = float(f"{value:.{digits - 1}e}")
    if value and not 1e-3 <= abs(value) < 1e5:
        mantissa, power = f"{value:.{digits - 1}e}".split("e")
        return f"{mantissa}e{int(power)}".replace("-", MINUS)
    places = max(digits - 1 - math.floor(math.log10(abs(value))), 0) if value else 0
    return f"{value:,.{min(places, 4)}f}".replace("-", MINUS)


def lines(
    title: str,
    series: Mapping[str, Line],
    *,
    key: str,
    x: str,
    y: str = "",
    logarithmic: bool = False,
    ticks: Sequence[float] | None = None,
    at: float | None = None,
    from_zero: bool = True,
) -> Panel:
    """A panel of lines; values that are not finite are gaps.

    Args:
        series: by name.
        key: a word that no other panel of the page has.
        ticks: where the x axis, which is logarithmic then, has its numbers.
        at: the place of a horizontal line that others are compared with.
        from_zero: the y axis begins at zero, where nothing is below.
    """
    figure, axes = drawn(WIDTH, HEIGHT)
    if at is not None:
        axes.axhline(at, color=mark("muted"), linewidth=1, linestyle=(0, (3, 3)), zorder=1)
    for number_, xs, ys in series.values():
        style = look(number_)
        if len(xs) > CROWDED:
            style["marker"] = ""
        axes.plot(xs, ys, markersize=4.5, markeredgecolor=mark("paper"), markeredgewidth=0.6, **style)
    _scaled(
        axes, [*(ys for _, _, ys in series.values()), *([] if at is None else [[at]])], logarithmic, from_zero, ticks
    )
    labelled(axes, x, y)
    _no_offset(axes, logarithmic)
    return Panel(title, svg_of(figure, _told(title, series, x), key), WIDTH)


def _scaled(
    axes: Any, values: Sequence[Sequence[float]], logarithmic: bool, from_zero: bool, ticks: Sequence[float] | None
) -> None:
    from matplotlib.ticker import MaxNLocator

    found = [value for each in values for value in each if math.isfinite(value)]
    if logarithmic and any(value > 0 for value in found):
        axes.set_yscale("log")
    elif found and from_zero and min(found) >= 0:
        axes.set_ylim(0, 1.06 * max(max(found), 1e-30))
    axes.margins(x=0.04)
    if ticks is not None:
        axes.set_xscale("log")
        axes.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
        axes.set_xticks([], minor=True)
    else:
        axes.xaxis.set_major_locator(MaxNLocator(6, integer=True))


def _no_offset(axes: Any, logarithmic: bool) -> None:
    """Numbers of the y axis in full, without a power of ten above the axis."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

    if logarithmic and axes.get_yscale() == "log":
        low, high = axes.get_ylim()
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5) if high < 150 * low else (1,), numticks=8))
        axes.yaxis.set_minor_locator(NullLocator())
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, place: number(value, 2)))


def heat(title: str, names: Sequence[str], values: Float[np.ndarray, "T T"], *, key: str) -> Panel:
    """A panel of numbers from -1 to 1 between all pairs of names."""
    from matplotlib.patches import Rectangle

    count = len(names)
    shown = [f"{_short(name)}  {place}" for place, name in enumerate(names, 1)]
    left = 14 + int(6.7 * max(map(len, shown), default=0))
    side = max(min((WIDTH - left - 6) // max(count, 1), 56), 14)
    width, height = max(left + side * count + 6, WIDTH), side * count + 30
    figure, axes = drawn(width, height, left=left, bottom=26, right=width - left - side * count, top=4)
    axes.grid(False)
    axes.spines[:].set_visible(False)
    for (row, column), value in np.ndenumerate(values):
        share = min(abs(value), 1.0) if math.isfinite(value) else 0.0
        colour = (mark("minus" if value < 0 else "plus"), share)
        axes.add_artist(Rectangle((column, row), 1, 1, facecolor=colour, edgecolor=mark("paper"), linewidth=2))
        if side >= ROOM:
            text = f"{value:.2f}".replace("-", MINUS) if math.isfinite(value) else DASH
            axes.text(column + 0.5, row + 0.52, text, ha="center", va="center", fontsize=TEXT, color=mark("ink"))
    axes.set_xlim(0, count)
    axes.set_ylim(count, 0)
    axes.set_yticks(np.arange(count) + 0.5, shown)
    axes.set_xticks(np.arange(count) + 0.5, [str(place) for place in range(1, count + 1)])
    apart = [(values[s, t], names[s], names[t]) for s in range(count) for t in range(s)]
    told = f"{title}."
    if apart:
        for word, chosen in (("Largest", max(apart)), ("least", min(apart))):
            told += f" {word} {chosen[0]:.2f} between {chosen[2]} and {chosen[1]}{',' if word == 'Largest' else '.'}"
    return Panel(title, svg_of(figure, told, key), width)


def _short(name: str, most: int = 16) -> str:
    return name if len(name) <= most else f"{name[: most - 6]}…{name[-5:]}"


def _told(title: str, series: Mapping[str, Line], x: str) -> str:
    """The lines in words: their range, and where it is reached, for some of them."""
    told = [f"{title}, by {x}."]
    for name, (_, xs, ys) in list(series.items())[:6]:
        pairs = [(value, place) for place, value in zip(xs, ys, strict=True) if math.isfinite(value)]
        if pairs:
            (low, at_low), (high, at_high) = min(pairs), max(pairs)
            told.append(f"{name}: {number(low)} (at {at_low:g}) to {number(high)} (at {at_high:g}).")
    if len(series) > 6:
        told.append(f"{len(series) - 6} more in the table.")
    return " ".join(told)
