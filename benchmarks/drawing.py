"""The look of the benchmarks' plots: colours that the colour-blind can tell apart (Okabe and Ito), titles, grids."""

from typing import Any

BLUE, ORANGE, GREEN, PINK, SKY, AMBER = "#0072b2", "#d55e00", "#009e73", "#cc79a7", "#56b4e9", "#e69f00"
DARK, GREY = "#222222", "#8a8a8a"


def titled(axes: Any, title: str, x: str = "", y: str = "") -> None:
    axes.set_title(title, fontsize=10.5, loc="left")
    axes.set_xlabel(x)
    axes.set_ylabel(y)
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(color="#ececec", linewidth=0.8)
    axes.set_axisbelow(True)


def headed(made: Any, title: str) -> Any:
    made.suptitle(title, x=0.01, ha="left", fontsize=11.5, weight="bold")
    return made
