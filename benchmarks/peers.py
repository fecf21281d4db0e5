"""cfmerge beside other programs that merge models: wall time and memory of whole processes, in alternating rounds.

    python benchmarks/make_llama.py DIR
    python benchmarks/peers.py DIR [--experts 4] [--rounds 3] [--peers mergekit numpy] [--methods ties ace] -o RESULTS
    python benchmarks/peers.py --quick

Peers are mergekit 0.1.5, fusion_bench 0.2.33, the code of ACE's authors, and ACE written with NumPy alone
(numpy_ace.py). Each of the first three has an environment of its own, which is made under `--environments` when it is
first needed (pip takes its settings from its variables and files, as always; the authors' code is cloned), or which
`--mergekit`, `--fusion-bench`, `--ace-python` and `--ace-clone` name. A peer that is not to be had is left out, and
said so.

DIR holds a base and experts of make_llama.py; nothing is written there. Both sides read the same files and write a
model. In every round ours and theirs run one after the other, the first of them in turn; ratios are taken round by
round. A first merge of ours, which is not counted, fills the cache of compiled programs (`--cold`: every merge
compiles anew). RESULTS gets peers.md, peers.json and peers.png.
"""

import argparse
import contextlib
import getpass
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from make_llama import SIZES, write_models
from measuring import ROOT, Figures, ProcessError, existing, figure, machine, run, table, write_report
from recipes import recipe

HERE = Path(__file__).resolve().parent
REQUIREMENTS = {"mergekit": ["mergekit==0.1.5"], "fusion_bench": ["fusion_bench==0.2.33"], "ace": ["numpy"]}
ACE = "https://github.com/unravel-xu/ACE-Merging", "22d9dfea905f905af6244484aac847e463c7b866"


class Case(NamedTuple):
    """A method of ours and the same of a peer's; `settings` are of each expert, `shared` of the merge (mergekit)."""

    ours: str
    peer: str
    theirs: str
    settings: Mapping[str, float] = {}
    shared: Mapping[str, Any] = {}
    with_base: bool = True


CASES = (
    Case("average", "mergekit", "linear", {"weight": 1.0}, with_base=False),
    Case("task_arithmetic", "mergekit", "task_arithmetic", {"weight": 1.0}, {"lambda": 0.3}),
    Case("slerp", "mergekit", "slerp", {}, {"t": 0.5}),
    Case("model_stock", "mergekit", "model_stock"),
    Case("karcher", "mergekit", "karcher", with_base=False),
    Case("ties(variant='mergekit')", "mergekit", "ties", {"weight": 1.0, "density": 0.2}),
    Case("dare_ties", "mergekit", "dare_ties", {"weight": 1.0, "density": 0.1}),
    Case("della", "mergekit", "della", {"weight": 1.0, "density": 0.5, "epsilon": 0.05}),
    Case("breadcrumbs", "mergekit", "breadcrumbs", {"weight": 1.0, "density": 0.9, "gamma": 0.01}, {"lambda": 0.3}),
    Case("sce(density=0.5)", "mergekit", "sce", {}, {"select_topk": 0.5}),
    Case("average", "fusion_bench", "average"),
    Case("task_arithmetic", "fusion_bench", "task_arithmetic"),
    Case("ties(variant='fusion_bench')", "fusion_bench", "ties"),
    Case("magmax", "fusion_bench", "magmax"),
    Case("tsv_m", "fusion_bench", "tsv_m"),
    Case("iso_c", "fusion_bench", "iso_c"),
    Case("ace", "ace", "ace"),
    Case("ace", "numpy", "ace"),
)


# --- the environments ---------------------------------------------------------------------------------------------


def private(folder: Path) -> Path:
    """The folder, made for this user alone; programs are run from it, so that nobody else may own it."""
    folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    if hasattr(os, "getuid") and folder.stat().st_uid != os.getuid():
        sys.exit(f"{folder} belongs to another user; name a folder of your own: --environments")
    return folder


def environment(folder: Path, peer: str, torch: str) -> Path:
    """The interpreter of a peer's environment, which is made unless it is there complete."""
    place = private(folder) / peer
    python = place / ("Scripts/python.exe" if os.name == "nt" else "bin/python")
    if not (place / "complete").exists():
        print(f"making {place}", flush=True)
        shutil.rmtree(place, ignore_errors=True)
        subprocess.run([sys.executable, "-m", "venv", place], check=True)
        subprocess.run([python, "-m", "pip", "install", "-q", torch, "safetensors", *REQUIREMENTS[peer]], check=True)
        (place / "complete").touch()
    return python


def clone(folder: Path) -> Path:
    """The code of ACE's authors, at the commit that cfmerge is tested against."""
    address, commit = ACE
    place = private(folder) / "ACE-Merging"
    if not place.exists():
        partial = place.with_suffix(".partial")
        shutil.rmtree(partial, ignore_errors=True)
        subprocess.run(["git", "clone", "-q", address, partial], check=True)
        subprocess.run(["git", "-C", partial, "checkout", "-q", commit], check=True)
        partial.rename(place)
    return place


def program(peer: str, args: argparse.Namespace) -> list[str]:
    """What runs a peer; raises `CalledProcessError` or `OSError` where its environment cannot be made."""
    if peer == "numpy":
        return [sys.executable, str(HERE / "numpy_ace.py")]
    if peer == "mergekit":
        made = args.mergekit or environment(args.environments, peer, args.torch).with_name("mergekit-yaml")
        return [str(made)]
    if peer == "fusion_bench":
        python = args.fusion_bench or environment(args.environments, peer, args.torch)
        return [str(python), str(HERE / "peers_programs.py"), peer]
    place = args.ace_clone or clone(args.environments)
    python = args.ace_python or environment(args.environments, peer, args.torch)
    return [str(python), str(HERE / "peers_programs.py"), peer, str(Path(place).resolve())]


# --- measuring ----------------------------------------------------------------------------------------------------


def mergekit_config(case: Case, base: Path, experts: Sequence[Path], file: Path) -> Path:
    """mergekit's configuration of a merge, in JSON, which is YAML."""
    models: list[dict[str, Any]] = [{"model": str(path), "parameters": dict(case.settings)} for path in experts]
    content = {"merge_method": case.theirs, "dtype": "bfloat16", "models": models, "parameters": dict(case.shared)}
    start = experts[0] if case.theirs == "slerp" else base  # from one expert to the other, here as there
    file.write_text(json.dumps(content | ({"base_model": str(start)} if case.with_base else {})))
    return file


def commands(case: Case, started: list[str], models: Path, count: int, folder: Path) -> dict[str, list[str]]:
    """Both sides' commands, whose output is `folder/out`."""
    out, file = str(folder / "out"), recipe(models, case.ours, count, folder)
    merged = json.loads(file.read_text())
    base, experts = Path(merged["base"]), [Path(expert["path"]) for expert in merged["experts"]]
    paths = [str(path) for path in (base, *experts)]
    theirs = [*started, out, *paths]
    if case.peer == "mergekit":
        theirs = [*started, str(mergekit_config(case, base, experts, folder / "mergekit.yaml")), out]
    elif case.peer == "fusion_bench":
        theirs = [*started, case.theirs, out, *paths]
    elif case.peer == "numpy":
        theirs = [*started, *paths, "-o", out]
    return {"ours": [sys.executable, "-m", "cfmerge", "merge", str(file), "--quiet", "-o", out], "theirs": theirs}


def measure(case: Case, started: list[str], args: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Figures round by round of both sides, or what failed."""
    row: dict[str, Any] = {"method": case.ours, "peer": case.peer, "theirs": case.theirs, "rounds": []}
    both = commands(case, started, args.models, args.experts, folder)
    plain = {name: value for name, value in os.environ.items() if not name.endswith(("PYTHONPATH", "_NUM_THREADS"))}
    if args.cold:
        both["ours"].append("--no-compile-cache")

    def of(side: str) -> Figures:
        shutil.rmtree(folder / "out", ignore_errors=True)
        return run(both[side], ROOT) if side == "ours" else run(both[side], environment=plain)

    try:
        if not args.cold:
            of("ours")
        for number in range(args.rounds):
            order = ("ours", "theirs") if number % 2 == 0 else ("theirs", "ours")
            load = os.getloadavg()[0]
            found = {side: of(side)._asdict() for side in order}
            row["rounds"].append({"load": round(load, 1), **found})
            told = "  ".join(f"{side} {found[side]['wall']:.1f} s" for side in ("ours", "theirs"))
            print(f"{case.ours} | {case.peer} | round {number + 1} | load {load:.1f} | {told}", flush=True)
    except ProcessError as error:
        row["failed"] = str(error)
        print(f"{case.ours} | {case.peer} | failed\n{error}", flush=True)
    return row


def told(row: Mapping[str, Any]) -> dict[str, Any]:
    """The table's line of a case: medians of all rounds, and of their ratios."""
    line: dict[str, Any] = {"method": f"`{row['method']}`", "beside": f"{row['peer']} {row['theirs']}"}
    rounds = row["rounds"]
    if not rounds:
        return line | {"wall, ours / theirs": "failed"}

    def middle(side: str, what: str) -> float | None:
        values = [one[side][what] for one in rounds if one[side][what] is not None]
        return statistics.median(values) if values else None

    for side in ("ours", "theirs"):
        line |= {f"{side}, s": middle(side, "wall"), f"{side}, GiB": middle(side, "memory")}
    for what in ("wall", "cpu"):
        ratios = [one["ours"][what] / max(one["theirs"][what], 1e-9) for one in rounds]
        line[f"{what}, ours / theirs"] = f"**{statistics.median(ratios):.2f}** ({min(ratios):.2f} .. {max(ratios):.2f})"
    return line | {"load": " ".join(str(one["load"]) for one in rounds)}


def draw(rows: Sequence[Mapping[str, Any]], file: Path) -> None:
    """Bars of ours / theirs, wall time and memory; a dot for every round."""
    made, panels = figure(2, 6.0)
    names = [f"{row['method']}\n{row['peer']}" for row in rows]
    for axes, what, title in zip(panels, ("wall", "memory"), ("wall time", "peak anonymous memory"), strict=True):
        for place, row in enumerate(rows):
            pairs = [(one["ours"][what], one["theirs"][what]) for one in row["rounds"]]
            ratios = [ours / theirs for ours, theirs in pairs if ours and theirs]
            if ratios:
                axes.barh(place, statistics.median(ratios), color="#0b6fb8", alpha=0.6)
                axes.plot(ratios, [place] * len(ratios), "k.", markersize=4)
        axes.axvline(1, color="#c9c9c9", zorder=0)
        axes.set_yticks(range(len(names)), names, fontsize=7)
        axes.set_ylim(len(names) - 0.4, -0.6)
        axes.set_title(f"{title}, cfmerge / peer", fontsize=9)
    made.savefig(file)


def report(content: Mapping[str, Any], output: Path) -> None:
    left = "".join(f"\nLeft out: {peer}: {why}\n" for peer, why in content["left_out"].items())
    sections = [table([told(row) for row in content["cases"]]), left]
    write_report(output, "peers", f"cfmerge beside its peers, {content['experts']} experts", content, sections)
    draw(content["cases"], output / "peers.png")


@contextlib.contextmanager
def prepared(args: argparse.Namespace) -> Iterator[Path]:
    """A folder to work in; `--quick` has its models there, of some 30,000 parameters."""
    with tempfile.TemporaryDirectory(prefix="peers-", dir=args.work) as directory:
        folder = Path(directory)
        if args.models is None:
            if not args.quick:
                sys.exit("peers: name a folder of make_llama.py's models, or give --quick")
            args.models = write_models(folder / "models", SIZES["tiny"], args.experts)
        args.models = args.models.resolve()  # recipes lie elsewhere
        yield folder


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("models", type=Path, nargs="?")
    parser.add_argument("--experts", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--peers", nargs="+", choices=[*REQUIREMENTS, "numpy"], default=[*REQUIREMENTS, "numpy"])
    parser.add_argument("--methods", nargs="+", help="names of ours, without what stands in brackets")
    parser.add_argument("--quick", action="store_true", help="one round of `average` or `ace` on a tiny model")
    parser.add_argument("--cold", action="store_true", help="without the cache of compiled programs")
    default = Path(tempfile.gettempdir()) / f"cfmerge-peers-{getpass.getuser()}"
    parser.add_argument("--environments", type=Path, default=default, help="default: %(default)s")
    parser.add_argument("--torch", default="torch", help="what pip is asked for, such as torch==2.13.0+cpu")
    parser.add_argument("--mergekit", metavar="PATH", help="a mergekit-yaml that is there")
    parser.add_argument("--fusion-bench", metavar="PYTHON", help="an interpreter that has fusion_bench")
    parser.add_argument("--ace-python", metavar="PYTHON", help="an interpreter that has torch and safetensors")
    parser.add_argument("--ace-clone", metavar="DIR", help="a clone of ACE's authors' code")
    parser.add_argument("--work", type=Path, metavar="DIR", help="where outputs go; default: a temporary folder")
    parser.add_argument("-o", "--output", type=Path, default=Path("results"))
    args = parser.parse_args()
    args.work = existing(args.work)
    if args.quick:
        args.rounds, args.methods = 1, args.methods or ["average", "ace"]
    content: dict[str, Any] = {"machine": machine(), "experts": args.experts, "cases": [], "left_out": {}}
    with prepared(args) as folder:
        for peer in args.peers:
            cases = [case for case in CASES if case.peer == peer]
            cases = [case for case in cases if not args.methods or case.ours.partition("(")[0] in args.methods]
            try:
                started = program(peer, args) if cases else []
            except (OSError, subprocess.CalledProcessError) as error:
                content["left_out"][peer] = str(error)
                print(f"left out: {peer}: {error}", flush=True)
                continue
            for case in cases:
                content["cases"].append(measure(case, started, args, folder))
                report(content, args.output)  # what is measured stays, whatever comes next
    report(content, args.output)
    print(f"written: {args.output}/peers.md, .json, .png")
    print(table([told(row) for row in content["cases"]]), end="")


if __name__ == "__main__":
    main()
