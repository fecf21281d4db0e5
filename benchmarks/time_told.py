"""The tables of `time_study.py`."""

import itertools
from typing import Any

import numpy as np
import time_cells
import time_stream
from measuring import table
from time_scores import CELLS, Score, Told, cube, each, less, of_technique, over, shown, variance

# --- tables -------------------------------------------------------------------------------------------------------


def tables(told: Told) -> str:
    """All of them, in Markdown."""
    parts = [
        ("Bases and experts", bases(told)),
        ("Init and deploy, by interpolation", grid(told)),
        ("The EMA's weight", weights(told) + "\n" + pairs(told)),
        ("Techniques", techniques(told)),
        ("Init, deploy and technique beside each other", shares(told)),
        ("Offline merging, replay and weights by time", by_time(told)),
        ("Sizes and budgets", growth(told)),
        ("Two to eight tasks", tasks(told)),
        ("Seconds", seconds(told)),
    ]
    return "\n".join(f"## {title}\n\n{text}" for title, text in parts)


def bases(told: Told) -> str:
    """Each base before the first task, and its isolated experts, each on its own task."""
    lines = []
    for size, steps in settings(told):
        start, own = told.base(size), isolated(told, size, steps)
        lines.append(
            {"base": size, "steps": steps, "KA": shown(start, "ka"), "ZS": shown(start, "zs"), "GM": shown(start)}
            | {"experts, own tasks": f"{own:.1f}" if own else "", "replicates": len(start)}
        )
    return table(lines)


def isolated(told: Told, size: str, steps: int) -> float | None:
    """The mean accuracy of experts that begin at the base, each on its own task; None where they were not scored."""
    rows = [
        row["scores"][time_stream.ORDERS[row["seed"]][row["step"] - 1]]
        for row in told.rows
        if (row["size"], row["steps"], row["init"], row["deploy"], row["replay"])
        == (size, steps, "base", "last", False)
    ]
    return 100 * float(np.mean(rows)) if rows else None


def settings(told: Told) -> list[tuple[str, int]]:
    """Sizes and budgets that have rows, in the order of their size."""
    order = ("small", "medium", "large")
    found = {(row["size"], row["steps"]) for row in told.rows if row["steps"]}
    return sorted(found, key=lambda one: (order.index(one[0]) if one[0] in order else 0, one[1]))


def grid(told: Told) -> str:
    paint = f"paint(weight={told.chosen.weight})"
    named = {"base": "base", "last": "last", told.mean: "ema", "all": "all", paint: "paint"}
    lines = [
        {"init": "none", "deploy": "base", "KA": shown(told.base(), "ka"), "ZS": shown(told.base(), "zs")}
        | {"GM": shown(told.base()), "of each": each(told.base())}
    ]
    for init, deploy in itertools.product(named, named):
        plain, replayed = (told.at(init, deploy, replay) for replay in (False, True))
        if plain:
            lines.append(
                {"init": named[init], "deploy": named[deploy]}
                | {
                    "KA": shown(plain, "ka"),
                    "ZS": shown(plain, "zs"),
                    "GM": f"{over(plain):.1f}",
                    "of each": each(plain),
                }
                | {"KA, replay": shown(replayed, "ka"), "ZS, replay": shown(replayed, "zs")}
                | {"GM, replay": shown(replayed), "of each, replay": each(replayed)}
            )
    every = told.multitask()
    lines.append(
        {"init": "base", "deploy": "trained on all at once", "KA": shown(every, "ka"), "ZS": shown(every, "zs")}
        | {"GM": shown(every), "of each": each(every)}
    )
    return table(lines) + "\n" + differences(told)


def differences(told: Told) -> str:
    """BEST-IN-TIME less the others, paired by replicate."""
    mean = told.mean
    others = {
        "the base": told.base(),
        "sequential": told.at("last", "last"),
        "sequential, replay": told.at("last", "last", True),
        "base + ema": told.at("base", mean),
        "last + ema": told.at("last", mean),
        "last + ema, replay": told.at("last", mean, True),
        "offline": told.at("base", "all"),
        "offline, replay": told.at("base", "all", True),
        "last + all": told.at("last", "all"),
        "last + all, replay": told.at("last", "all", True),
        "trained on all at once": told.multitask(),
    }
    best, replayed = told.at(mean, mean), told.at(mean, mean, True)
    lines = [
        {
            "GM of ema + ema less that of": name,
            "without replay": less(best, other),
            "with replay": less(replayed, other),
        }
        for name, other in others.items()
    ]
    return table(lines)


# pairs of cells that differ in one thing, and training on all at once
PAIRS = (
    ("last + ema", "base + ema"), ("ema + ema", "base + ema"), ("ema + ema", "last + ema"),
    ("last + ema", "last + last"), ("ema + ema", "last + last"), ("base + ema", "base + all"),
    ("last + ema", "all at once"), ("ema + ema", "all at once"),
)  # fmt: skip


def pairs(told: Told) -> str:
    """Differences of GM by interpolation, at the chosen weight of the EMA and at USUAL."""

    def found(cell: str, weight: float, replay: bool) -> dict[int, Score]:
        if cell == "all at once":
            return told.multitask()
        rules = {"ema": time_cells.ema("average", weight)}
        return told.at(*(rules.get(name, name) for name in cell.split(" + ")), replay)

    weights = dict.fromkeys((told.chosen.weight, time_cells.USUAL))
    lines = [
        {"weight": f"{weight}", "GM of": f"{one} less {other}"}
        | {
            title: less(found(one, weight, replay), found(other, weight, replay))
            for title, replay in (("no replay", False), ("replay", True))
        }
        for weight, (one, other) in itertools.product(weights, PAIRS)
    ]
    return table(lines)


def weights(told: Told) -> str:
    """KA, ZS and GM by the weight of the newest, where it makes what is deployed (and, with ema, what begins)."""
    lines = []
    for weight, replay in itertools.product(time_cells.WEIGHTS, (False, True)):
        how = f"ema(weight={weight})"
        line: dict[str, Any] = {"weight of the newest": weight, "replay": "yes" if replay else "no"}
        for init, rule in {"base": "base", "last": "last", "ema": how}.items():
            found = told.at(rule, how, replay)
            line[f"{init} + ema: KA, ZS"] = f"{shown(found, 'ka')}, {shown(found, 'zs')}" if found else ""
            line |= {f"{init} + ema: GM": shown(found), f"{init} + ema: of each": each(found)}
        lines.append(line)
    return table(sorted(lines, key=lambda line: line["replay"]))


def techniques(told: Told) -> str:
    """GM by technique, and less that of interpolation and of sequential training with replay, paired by replicate."""
    cells = {title: (*cell, False) for title, cell in CELLS.items()} | {"base + all, replay": ("base", "all", True)}
    lines = []
    for name in told.names:
        factors = {"factor, ema": told.chosen.ema.get(name), "factor, all": told.chosen.offline.get(name)}
        found = {title: shown(of_technique(told, name, *cell)) for title, cell in cells.items()}
        lines.append({"technique": name, **factors, **found})
    spread = {title: [over(of_technique(told, name, *cell)) for name in told.names] for title, cell in cells.items()}
    lines.append({"technique": "highest less lowest"} | {t: f"{max(v) - min(v):.1f}" for t, v in spread.items()})
    sequential, beside = told.at("last", "last", True), []
    for name in told.names:
        line = {"technique": name}
        for title in ("ema + ema", "base + all"):
            found, mean = (of_technique(told, one, *cells[title]) for one in (name, "average"))
            line[f"{title}, less average"] = less(found, mean) if name != "average" else ""
        line["base + all, less sequential with replay"] = less(of_technique(told, name, "base", "all"), sequential)
        replayed = of_technique(told, name, "base", "all", True)
        line["base + all with replay, less sequential with replay"] = less(replayed, sequential)
        line["base + all, with replay less without"] = less(replayed, of_technique(told, name, "base", "all"))
        beside.append(line)
    return table(lines) + "\n" + table(beside)


def shares(told: Told) -> str:
    """Shares of the variance of GM over replicates, inits (base, last, ema), deploys and techniques."""
    cells = cube(told)
    if np.isnan(cells).any():
        return "Not all cells were run.\n"
    of = {"deploy: last, ema, all": variance(cells), "deploy: ema, all": variance(cells[:, :, 1:])}
    rest = {title: sum(share for name, share in one.items() if "replicate" in name) for title, one in of.items()}
    names = [name for name in of["deploy: ema, all"] if "replicate" not in name]
    lines = [{"source": name} | {title: f"{one[name]:.1f}" for title, one in of.items()} for name in names]
    lines.append({"source": "replicates, alone and with others"} | {title: f"{one:.1f}" for title, one in rest.items()})
    return "Shares of the variance of GM, per cent:\n\n" + table(lines)


def by_time(told: Told) -> str:
    names = {"uniform": "all", "linear": "all(by_time='linear')", "squared": "all(by_time='squared')",
             "exponential": "all(by_time='exponential')",
             "linear, backwards": "all(by_time='linear', backwards=True)"}  # fmt: skip
    lines = []
    for name, rule in names.items():
        line: dict[str, Any] = {"base + all, weights": name}
        for replay, title in ((False, ""), (True, ", replay")):
            found = told.at("base", rule, replay)
            line |= {f"KA{title}": shown(found, "ka"), f"ZS{title}": shown(found, "zs"), f"GM{title}": shown(found)}
            line |= {f"less uniform{title}": less(found, told.at("base", "all", replay)) if rule != "all" else ""}
        lines.append(line)
    best, sequential = told.at("base", "all", True), told.at("last", "last", True)
    words = (
        f"\nGM of offline merging with replay less that of sequential training with replay: {less(best, sequential)};"
    )
    plain = less(told.at("base", "all"), sequential)
    return (
        table(lines) + words + f" without replay for the experts: {plain}. Replay for the experts: "
        f"{less(best, told.at('base', 'all'))}.\n"
    )


def growth(told: Told) -> str:
    """GM after the last task by replicate, base and budget, and that of ema + ema less the others'."""
    lines = []
    for seed, setting in itertools.product(told.seeds, settings(told)):
        best = told.at(told.mean, told.mean, setting=setting).get(seed)
        if best is None:
            continue
        others = {
            "base": told.base(setting[0]),
            "isolated": told.at("base", "last", setting=setting),
            "offline": told.at("base", "all", setting=setting),
            "sequential, replay": told.at("last", "last", True, setting=setting),
            "all at once": told.multitask(setting=setting),
        }
        found = {name: one[seed] for name, one in others.items() if seed in one}
        line: dict[str, Any] = {"replicate": str(seed), "base of": setting[0], "steps": str(setting[1])}
        line |= {"ema + ema: KA, ZS": f"{best.ka:.1f}, {best.zs:.1f}", "ema + ema": f"{best.gm:.1f}"}
        line |= {name: f"{found[name].gm:.1f}" if name in found else "" for name in others}
        line |= {f"less {name}": f"{best.gm - found[name].gm:+.1f}" if name in found else "" for name in others}
        lines.append(line)
    return table(lines)


def tasks(told: Told) -> str:
    """GM in the main setting after some of the tasks."""
    lines = []
    for step in range(2, told.count + 1, 2):
        best, every = told.at(told.mean, told.mean, step=step), told.multitask(step)
        lines.append(
            {"tasks": step, "ema + ema": shown(best), "last + ema": shown(told.at("last", told.mean, step=step))}
            | {"last + ema, replay": shown(told.at("last", told.mean, True, step=step))}
            | {"offline": shown(told.at("base", "all", step=step))}
            | {"sequential, replay": shown(told.at("last", "last", True, step=step)), "all at once": shown(every)}
            | {"ema + ema less base": less(best, told.base()), "less all at once": less(best, every)}
        )
    return table(lines)


def seconds(told: Told) -> str:
    """How long the rows took; what an earlier call had trained took none."""
    total = {kind: sum(row["seconds"][kind] for row in told.rows) for kind in ("training", "scoring")}
    times = f"Training, with the merges that begin tasks: {total['training']:,.0f}; scoring: {total['scoring']:,.0f}"
    left_out = "experts that a stopped call had trained count nothing"
    return f"{times}; on one core, beside other work; {left_out}. {len(told.rows)} models were scored on test images.\n"
