"""The tables and the picture of `trajectory_study.py`: `trajectory.md` behind its mark, and `trajectory.png`."""

import statistics
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from measuring import figure, table

Row = dict[str, Any]
MARK = "<!-- tables -->"  # what stands in front of it is written by hand
SEVERAL = 6  # checkpoints: fewer are too few
LINES = (  # (label, kind, shape, color, style)
    ("decayed, linear", "decayed", "linear", "C0", "-"),
    ("decayed, inverse-sqrt", "decayed", "inverse-sqrt", "C0", ":"),
    ("merged, linear", "merged", "linear", "C1", "-"),
    ("merged, inverse-sqrt", "merged", "inverse-sqrt", "C1", ":"),
)


def write(folder: Path, rows: Sequence[Row]) -> None:
    """Writes the tables into the section, and the picture beside it."""
    rates = sorted({row["rate"] for row in rows})
    page = folder / "trajectory.md"
    head = page.read_text().partition(MARK)[0] if page.exists() else "# Along one training run\n\n"
    text = "\n".join(section(rate, [row for row in rows if row["rate"] == rate]) for rate in rates)
    page.write_text(f"{head}{MARK}\n\n{text}")
    made, axes = figure(2, 5.2, len(rates))
    for number, rate in enumerate(rates):
        own = [row for row in rows if row["rate"] == rate]
        _by_window(axes[2 * number], rate, own)
        _by_count(axes[2 * number + 1], rate, own)
    made.savefig(folder / "trajectory.png")


# --- rows ---------------------------------------------------------------------------------------------------------


def chosen(rows: Iterable[Row], **given: Any) -> list[Row]:
    """The rows with these values."""
    return [row for row in rows if all(row.get(key) == value for key, value in given.items())]


def full(rows: Iterable[Row], **given: Any) -> list[Row]:
    """Of merged rows those with all checkpoints in their window."""
    found = chosen(rows, kind="merged", **given)
    most = {w: max(row["count"] for row in found if row["window"] == w) for w in {row["window"] for row in found}}
    return [row for row in found if row["count"] == most[row["window"]]]


def mean(rows: Sequence[Row], key: str = "test_loss") -> float | None:
    return statistics.mean(row[key] for row in rows) if rows else None


def told(rows: Sequence[Row]) -> str:
    """Loss with its spread over seeds, and accuracy in per cent."""
    if not rows:
        return ""
    losses = [row["test_loss"] for row in rows]
    spread = statistics.stdev(losses) if len(losses) > 1 else 0.0
    return f"{statistics.mean(losses):.3f} ± {spread:.3f} ({100 * (mean(rows, 'test_accuracy') or 0):.1f} %)"


def best(rows: Iterable[Row]) -> list[Row]:
    """For each seed the row of least validation loss."""
    by_seed: dict[int, list[Row]] = {}
    for row in rows:
        by_seed.setdefault(row["seed"], []).append(row)
    return [min(own, key=lambda row: row["validation_loss"]) for own in by_seed.values()]


def spread_over(rows: Sequence[Row], along: str, fixed: str) -> float | None:
    """How far the mean loss moves along one key while another is held: the median of largest less least."""
    ranges = []
    for value in {row[fixed] for row in rows}:
        own = chosen(rows, **{fixed: value})
        means = [mean(chosen(own, **{along: other})) or 0.0 for other in {row[along] for row in own}]
        ranges += [max(means) - min(means)] if len(means) > 1 else []
    return statistics.median(ranges) if ranges else None


# --- tables -------------------------------------------------------------------------------------------------------


def section(rate: float, rows: Sequence[Row]) -> str:
    """The tables of one rate."""
    seeds = sorted({row["seed"] for row in rows})
    windows = sorted({row["window"] for row in rows if row["kind"] == "merged"})
    longest = max(row.get("window", 0) for row in rows)
    means = [row for row in rows if row["kind"] == "merged" and row["shape"] == "linear"]
    whole = [
        {"run": "constant rate, last checkpoint", "loss (accuracy)": told(chosen(rows, kind="last"))},
        {"run": "cosine from the start", "loss (accuracy)": told(chosen(rows, kind="decayed", window=longest))},
        {"run": "decayed at the end, best", "loss (accuracy)": told(best(_ends(rows, longest)))},
        {"run": "merged, best", "loss (accuracy)": told(best(row for row in rows if row["kind"] == "merged"))},
        {"run": "merged, linear, best window", "loss (accuracy)": told(best(full(rows, shape="linear")))},
    ]
    by_window = [
        {"window": window}
        | {label: told(_line(rows, kind, shape, window)) for label, kind, shape, _, _ in LINES}
        | {name: told(full(rows, shape=name, window=window)) for name in ("cosine", "ema=0.9", "ema=0.97")}
        for window in windows
    ]
    counts = sorted({row["count"] for row in means})
    by_count = [
        {"window": window}
        | {f"{count} checkpoints": _short(chosen(means, window=window, count=count)) for count in counts}
        for window in windows
    ]
    others = [row for row in rows if row.get("method")]
    by_method = [
        {"method": name, "loss (accuracy)": told(chosen(others, method=name))}
        for name in dict.fromkeys(row["method"] for row in others)
    ]
    like = {"window": others[0]["window"], "count": others[0]["count"]} if others else {}
    by_method += [{"method": "the mean", "loss (accuracy)": told(chosen(means, **like))}]
    moved = [_moved(means), _moved([row for row in means if row["count"] >= SEVERAL])]
    return "\n".join([
        f"## Rate {rate:g}, seeds {', '.join(map(str, seeds))}\n",
        table(whole),
        _paired(rows, windows),
        "By window, merged of all its checkpoints:\n",
        table(by_window),
        "The mean (`linear`) of some of them, loss:\n",
        table(by_count),
        f"How far the loss moves (medians of largest less least): {moved[0]}.",
        f"From {SEVERAL} checkpoints on {moved[1]}.\n",
        f"Other methods over a window of {like.get('window')} steps, {like.get('count')} checkpoints:\n",
        table(by_method),
    ])  # fmt: skip


def _moved(means: Sequence[Row]) -> str:
    by_window, by_count = spread_over(means, "window", "count"), spread_over(means, "count", "window")
    return (
        f"by {by_window or 0:.3f} with the window where the number of checkpoints is held, by {by_count or 0:.3f} with "
        "the number where the window is held"
    )


def _paired(rows: Sequence[Row], windows: Sequence[int]) -> str:
    """How merged and decayed runs of one seed, window and shape differ."""
    differences = []
    for shape in ("linear", "inverse-sqrt"):
        for window in windows:
            ours, theirs = (
                full(rows, shape=shape, window=window),
                chosen(rows, kind="decayed", shape=shape, window=window),
            )
            decayed = {row["seed"]: row["test_loss"] for row in theirs}
            by_seed = [row["test_loss"] - decayed[row["seed"]] for row in ours]
            cells = {"shape": shape, "window": window, "merged less decayed": f"{statistics.mean(by_seed):+.4f}"}
            differences.append(cells | {"seeds": ", ".join(f"{one:+.4f}" for one in by_seed)})
    return "Loss of the merged run less that of the decayed one, of one seed, window and shape:\n\n" + table(
        differences
    )


def _ends(rows: Sequence[Row], longest: int) -> list[Row]:
    return [row for row in chosen(rows, kind="decayed") if row["window"] < longest]


def _line(rows: Sequence[Row], kind: str, shape: str, window: int) -> list[Row]:
    own: Callable[..., list[Row]] = full if kind == "merged" else chosen
    return (
        own(rows, shape=shape, window=window) if kind == "merged" else own(rows, kind=kind, shape=shape, window=window)
    )


def _short(rows: Sequence[Row]) -> str:
    found = mean(rows)
    return "" if found is None else f"{found:.3f}"


# --- the picture --------------------------------------------------------------------------------------------------


def _by_window(axis: Any, rate: float, rows: Sequence[Row]) -> None:
    windows = sorted({row["window"] for row in rows if row["kind"] == "merged"})
    for number, (label, kind, shape, color, style) in enumerate(LINES):
        own = [_line(rows, kind, shape, window) for window in windows]
        losses = [[row["test_loss"] for row in found] for found in own]
        spread = [statistics.stdev(each) if len(each) > 1 else 0.0 for each in losses]
        beside = [window * 1.03 ** (number - 1.5) for window in windows]  # bars do not hide each other
        axis.errorbar(
            beside, [statistics.mean(each) for each in losses], spread, label=label, color=color, ls=style, capsize=2
        )
    longest = max(row.get("window", 0) for row in rows)
    axis.axhline(mean(chosen(rows, kind="last")), color="0.6", ls="-", lw=1, label="last checkpoint")
    axis.axhline(mean(chosen(rows, window=longest)), color="0.3", ls="--", lw=1, label="cosine from the start")
    axis.set(title=f"rate {rate:g}: by window", xlabel="window, steps", ylabel="test loss", xscale="log")
    axis.set_xticks(windows, map(str, windows))
    axis.minorticks_off()
    axis.legend(fontsize=7)


def _by_count(axis: Any, rate: float, rows: Sequence[Row]) -> None:
    means = [row for row in rows if row["kind"] == "merged" and row["shape"] == "linear"]
    for window in sorted({row["window"] for row in means}):
        own = chosen(means, window=window)
        counts = sorted({row["count"] for row in own})
        losses = [mean(chosen(own, count=count)) for count in counts]
        axis.plot(counts, losses, marker="o", ms=3, label=f"window {window}")
    axis.set(
        title=f"rate {rate:g}: mean, by count", xlabel="checkpoints in the window", ylabel="test loss", xscale="log"
    )
    axis.set_xticks([2, 3, 6, 11, 21, 41, 61], ["2", "3", "6", "11", "21", "41", "61"])
    axis.minorticks_off()
    axis.legend(fontsize=7)
