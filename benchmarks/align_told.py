"""The tables of `align_study.py`."""

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from measuring import table

Rows = Sequence[dict[str, Any]]
BUDGET, INPUTS = 0.125, 2000  # ZipIt!'s default, and the images of moments and statistics
NAMES = {
    "none": "as they are",
    "weights": "weight matching",
    "activations": "activation matching",
    "ot": "OT fusion",
    "merge_many": "MergeMany",
    "c2m3": "C2M3",
    "members": "each by itself",
    "ensemble": "ensemble",
    "zip": "ZipIt!",
    "from weights": "ZipIt! from weights",
}
KINDS = ("mlp", "conv", "batch", "vit")


def tables(rows: Rows) -> str:
    """All of them, in Markdown; those without rows are left out."""
    parts = [
        ("Barriers between two models", "The barrier in test loss: its mean over pairs, and each pair.", barriers),
        ("Half way between two models", "Test accuracy in per cent, mean over pairs.", halves),
        ("Means of three models", "Test accuracy in per cent, and loss. Weight and activation matching match each "
         "to the first.", three),
        ("Unequal widths", "OT fusion of models of other widths, as wide as the second: test accuracy in per cent.",
         unequal),
        ("Zips of other classes", "Accuracy in per cent over all ten classes (mean of both tasks on their own five),\n"
         "mean over replicates, by the number of layers that are one trunk.", zips),
        ("What ZipIt! sees, and its budget", "As above; 2,000 images and a budget of 0.125 unless said otherwise.",
         ablation),
        ("Seconds", "Of the clock, by part; a row whose models were not in the cache has their training too.", seconds),
    ]  # fmt: skip
    found = [(title, lead, make(rows)) for title, lead, make in parts]
    return "\n".join(f"## {title}\n\n{lead}\n\n{text}" for title, lead, text in found if text)


def lined(lines: Sequence[dict[str, Any]]) -> str:
    """A table, or nothing."""
    return table(lines) if lines else ""


# --- rows ---------------------------------------------------------------------------------------------------------


def of(rows: Rows, **fields: Any) -> list[dict[str, Any]]:
    """The rows that have these values."""
    return [row for row in rows if all(row[name] == value for name, value in fields.items())]


def nets(rows: Rows) -> list[str]:
    """The networks of rows by kind and width."""
    found = dict.fromkeys(row["net"] for row in rows)
    return sorted(found, key=lambda net: (KINDS.index(net.split("-")[0]), int(net.split("-")[1].split()[0])))


def ways(rows: Rows) -> Iterator[tuple[str, bool, str]]:
    """The methods that rows have, with and without REPAIR, in the order of NAMES."""
    for method in NAMES:
        for repair in (False, True):
            if of(rows, method=method, repair=repair):
                yield method, repair, NAMES[method] + (" + REPAIR" if repair else "")


def over(values: Sequence[float], digits: int) -> str:
    """Their mean, and each of them where there are several."""
    if not values:
        return ""
    mean = f"{np.mean(values):.{digits}f}"
    return mean if len(values) == 1 else f"{mean} ({', '.join(f'{value:.{digits}f}' for value in values)})"


def percent(values: Sequence[float], digits: int = 1) -> str:
    return over([100 * value for value in values], digits)


# --- the same classes ---------------------------------------------------------------------------------------------


def barriers(rows: Rows) -> str:
    """By network and method: the mean over pairs, and each pair."""
    own = of(rows, part="pair")
    lines = [
        {"network": net}
        | {
            title: over([row["barrier"] for row in of(own, net=net, method=method, repair=repair)], 2)
            for method, repair, title in ways(own)
        }
        for net in nets(own)
    ]
    return lined(lines)


def halves(rows: Rows) -> str:
    """Accuracy of the mean of two models beside that of the models."""
    own, lines = of(rows, part="pair"), []
    for net in nets(own):
        plain = of(own, net=net, method="none", repair=False)
        ends = [(row["accuracy"][0] + row["accuracy"][-1]) / 2 for row in plain]
        losses = [(row["loss"][0] + row["loss"][-1]) / 2 for row in plain]
        line = {
            "network": net,
            "loss of each": f"{np.mean(losses):.2f}",
            "each by itself": f"{100 * np.mean(ends):.1f}",
        }
        for method, repair, title in ways(own):
            found = of(own, net=net, method=method, repair=repair)
            line[title] = f"{100 * np.mean([middle(row['accuracy']) for row in found]):.1f}" if found else ""
        lines.append(line)
    return lined(lines)


def middle(curve: Sequence[float]) -> float:
    return curve[len(curve) // 2]


def three(rows: Rows) -> str:
    """Accuracy and loss of the mean of three models."""
    own = of(rows, part="several")
    lines = []
    for method, repair, title in ways(own):
        line = {"mean of three": title}
        for net in nets(own):
            found = of(own, net=net, method=method, repair=repair)
            line[net] = f"{100 * found[0]['accuracy'][0]:.1f} (loss {found[0]['loss'][0]:.2f})" if found else ""
        lines.append(line)
    return lined(lines)


def unequal(rows: Rows) -> str:
    """OT fusion of two models of other widths."""
    own, lines = of(rows, part="unequal"), []
    for net in dict.fromkeys(row["net"] for row in own):
        alone, fused = ([row["accuracy"] for row in of(own, net=net, method=method)] for method in ("members", "ot"))
        lines.append(
            {"first, second": net.replace(" ", ", ")}
            | {"first": percent([one[0] for one in alone]), "second": percent([one[1] for one in alone])}
            | {"first, transported": percent([one[0] for one in fused])}
            | {"half of each": percent([middle(one) for one in fused])}
        )
    return lined(lines)


# --- other classes ------------------------------------------------------------------------------------------------


def zips(rows: Rows) -> str:
    """Joint and task accuracy by method and the number of zipped layers."""
    own = [row for row in of(rows, part="zip", inputs=INPUTS, budget=BUDGET) if row["method"] != "from weights"]
    return "\n".join(f"`{net}`\n\n{by_stop(of(own, net=net))}" for net in nets(own))


def by_stop(own: Rows) -> str:
    """A line for each method, a column for each stop; nothing zipped is the ensemble."""
    stops, both = sorted({row["stop"] for row in own}), of(own, method="ensemble")
    lines = []
    for method, repair, title in ways(own):
        if method != "ensemble":
            found = both + of(own, method=method, repair=repair)
            lines.append({"layers": title} | {str(stop): joint_and_task(of(found, stop=stop)) for stop in stops})
    return table(lines)


def joint_and_task(found: Rows) -> str:
    """Joint accuracy, and the mean of both tasks, over replicates."""
    if not found:
        return ""
    joint, tasks = (np.mean([np.mean(row[name]) for row in found]) for name in ("joint", "tasks"))
    return f"{100 * joint:.1f} ({100 * tasks:.1f})"


def ablation(rows: Rows) -> str:
    """ZipIt! by the number of inputs, from weights, and by budget: joint accuracy."""
    own = of(rows, part="zip")
    text = []
    for net in nets(own):
        mine = [row for row in of(own, net=net) if row["repair"] == net.startswith("batch")]
        stops = sorted({row["stop"] for row in mine} - {0})
        kinds = [
            (f"{count} images", {"method": "zip", "inputs": count, "budget": BUDGET}) for count in (50, 500, INPUTS)
        ]
        kinds.append(("from weights", {"method": "from weights"}))
        kinds += [
            (f"budget {budget}", {"method": "zip", "inputs": INPUTS, "budget": budget}) for budget in (0.0, 0.5, 1.0)
        ]
        lines = [
            {"layers": title} | {str(stop): joint_and_task(of(mine, stop=stop, **fields)) for stop in stops}
            for title, fields in kinds
            if of(mine, **fields)
        ]
        text.append(f"`{net}`\n\n{table(lines)}")
    return "\n".join(text)


def seconds(rows: Rows) -> str:
    """What the rows took, by part and network, training of models that were not in the cache among it."""
    lines = []
    for part in dict.fromkeys(row["part"] for row in rows):
        own = of(rows, part=part)
        lines += [
            {"part": part, "networks": net, "rows": len(of(own, net=net)),
             "seconds": round(sum(row["seconds"] for row in of(own, net=net)))}
            for net in nets(own)
        ]  # fmt: skip
    return lined(lines)
