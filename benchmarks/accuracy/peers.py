"""The suite's experts merged by cfmerge and by other packages: merged weights and accuracies must coincide.

    python benchmarks/accuracy/peers.py --zoo vision --seed 0 --output docs/results
    python benchmarks/accuracy/peers.py --zoo vision --quick --methods ties tsv_m

Peers run in environments of their own: `--python` (or PEERS_PYTHON) has `pip install torch fusion-bench==0.2.33`,
`--mergekit` (or MERGEKIT_PYTHON) has `pip install mergekit==0.1.5`, `--clones` (or PEERS_CLONES) is a folder with the
authors' repositories: actmat, CART, DC-Merge, iso-merging, LiNeS, MLLMerging, OrthoMerge, pcb-merging, STAR,
task_singular_vectors, ties-merging. What is not given is left out.

A method of matrices goes matrix by matrix through the peer; what is not a matrix is averaged on both sides. The
difference is the largest of all entries of the tensors that the peer merged, relative to the largest entry of its
merged delta. It is that of float32, as one merges; where this is above the tolerance, because the problem is
ill-conditioned or entries are chosen by comparison, it is that of float64 on both sides, and float32's stands in the
note; where that is above the tolerance too, it is that of experts in float64 whose entries are told apart where they
tie. Accuracies are those of the float32 merges, means over the tasks. If `<output>/rows/<zoo>-<seed>.json` is there,
the rows are written into it, and the suite's report shows them.
"""

import argparse
import json
import os
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from cfmerge import CfmergeError
from cfmerge.models import Parameter
from cfmerge_accuracy import cache, suite
from cfmerge_accuracy.zoo import Split, Zoo
from peers_cases import CASES, Case, PeerError
from peers_merging import Files, Worker, merge, merged_by

ACCURACY = 0.005  # by which the mean accuracies may differ
SPLITS: dict[Split, str] = {"validation": "validation", "test": "accuracy"}  # and what the row calls it
State = dict[str, np.ndarray]


# --- comparing ----------------------------------------------------------------------------------------------------


def chosen(zoo: Zoo, case: Case, parameters: Mapping[str, Parameter]) -> tuple[Zoo, list[str]]:
    """As many experts as the case takes, and those of the tensors on which it is then the same method."""
    shapes = {name: p.canonical[1:] for name, p in parameters.items() if p.layout}
    counts = [case.experts] if case.experts else range(len(zoo.tasks), 1, -1)
    fitting = [k for k in counts if all(case.same(shape, k) for shape in shapes.values())]
    count = (fitting or counts)[0]
    names = [name for name in parameters if name not in shapes or case.same(shapes[name], count)]
    if not names:
        raise PeerError("on no tensor of this zoo the same method")
    return zoo.of_tasks(zoo.tasks[:count]), names


def compare(case: Case, files: Files, worker: Worker) -> dict[str, Any]:
    """What a row has besides its names; see `cfmerge_accuracy.tables.peers` for its use."""
    zoo = files.zoo
    parameters = merged_by(zoo, case.method)
    few, all_names = chosen(zoo, case, parameters)
    names = [name for name in all_names if name in files.parameters]
    notes = [case.note] if case.note else []
    if not case.experts and len(few.tasks) < len(zoo.tasks):
        notes.append(f"of the first {len(few.tasks)} experts: where min(out, in) is no multiple, theirs pads")
    if len(all_names) < len(parameters):
        notes.append(f"{len(all_names)} of {len(parameters)} matrices: where out >= in")
    single = merge(few, case, files, worker, names, double=False)
    difference, tolerance = single.difference, case.tolerance
    if not difference <= tolerance and case.double:
        share = f"more than {tolerance:g} in {single.share:.1e} of the entries"
        difference, tolerance = merge(few, case, files, worker, names, double=True).difference, case.double
        if difference <= tolerance:
            notes.append(f"in float64; in float32 {single.difference:.0e}, {share}")
        else:
            few_untied = files.untied.zoo.of_tasks(few.tasks)
            difference = merge(few_untied, case, files.untied, worker, names, double=True).difference
            notes.append(f"in float64, ties told apart; as they are, in float32, {single.difference:.0e}, {share}")
    row: dict[str, Any] = {"peer": worker.label(case), "difference": difference, "tolerance": tolerance}
    for split, prefix in SPLITS.items():
        for side, params in (("ours", single.ours), ("theirs", single.theirs)):
            found = few.accuracies(few.finish(params, few.tasks), split)
            row[f"{prefix}_{side}"] = float(np.mean(list(found.values())))
    apart = max(abs(row[f"{prefix}_ours"] - row[f"{prefix}_theirs"]) for prefix in SPLITS.values())
    if difference <= tolerance and apart > ACCURACY:
        notes.append(f"accuracies of the float32 merges differ by {100 * apart:.1f} points")
    row["agrees"] = bool(difference <= tolerance and apart <= ACCURACY)
    return row | {"note": "; ".join(notes)}


class Environments(NamedTuple):
    """What the command line gave: interpreters, the folder of clones, and the seconds that one merge may take."""

    python: str | None
    mergekit: str | None
    clones: str | None
    limit: float

    def interpreter(self, case: Case) -> str | None:
        """Where a case can be run; none: not here."""
        if case.package == "mergekit":
            return self.mergekit
        of_clone = case.peer.startswith("authors")
        return self.python if self.clones or not of_clone else None

    def check(self) -> None:
        """Raises `CfmergeError` if there is no peer at all."""
        if not (self.python or self.mergekit):
            raise CfmergeError(
                "no peer to compare with. Give at least one interpreter of an environment of its own: --python or "
                "PEERS_PYTHON, after `pip install torch fusion-bench==0.2.33`; --mergekit or MERGEKIT_PYTHON, after "
                "`pip install mergekit==0.1.5`. --clones or PEERS_CLONES names a folder of the authors' repositories"
            )


def run(zoo: Zoo, cases: Sequence[Case], environments: Environments, console: Console) -> Iterator[dict[str, Any]]:
    """A row for each case, as it is done; where the peer could not, it has `failed` in place of numbers."""
    environments.check()
    workers: dict[str, Worker] = {}
    try:
        with tempfile.TemporaryDirectory() as directory:
            files = Files(zoo, Path(directory))
            for case in cases:
                python = environments.interpreter(case)
                if python is None:
                    console.print(f"left out, not given: {case.peer}", style="dim")
                    continue
                row = {"name": case.name, "peer": case.peer, "method": case.method, "function": case.peer}
                try:
                    worker = workers.get(case.package)
                    if worker is None or worker.process.poll() is not None or case.package == "authors":
                        if worker is not None:  # authors' modules have the same names: a process for each
                            worker.close()
                        worker = Worker(python, case.package, environments.clones, environments.limit)
                        workers[case.package] = worker
                    row |= compare(case, files, worker)
                    told = f"{row['difference']:.1e}"
                except (PeerError, CfmergeError, OSError) as error:
                    row["failed"] = told = str(error)
                console.print(f"{case.method} | {case.peer} | {told}", highlight=False, markup=False)
                yield row
    finally:
        for worker in workers.values():
            worker.close()


# --- telling ------------------------------------------------------------------------------------------------------


def show(rows: Sequence[Mapping[str, Any]], title: str, console: Console) -> None:
    table = Table(title=title, title_justify="left")
    for name in ("method", "peer"):
        table.add_column(name)
    for name in ("difference", "tolerance", "ours, test", "theirs, test"):
        table.add_column(name, justify="right")
    for name in ("agrees", "note"):
        table.add_column(name)
    for row in rows:
        names = (escape(row["method"]), escape(row["peer"]))
        if "failed" in row:
            table.add_row(*names, "", "", "", "", "[red]failed", escape(row["failed"]))
            continue
        means = (f"{100 * row[key]:.2f}" for key in ("accuracy_ours", "accuracy_theirs"))
        agrees = "yes" if row["agrees"] else "[red]no"
        table.add_row(*names, f"{row['difference']:.1e}", f"{row['tolerance']:g}", *means, agrees, escape(row["note"]))
    console.print(table)


def write(row: dict[str, Any], path: Path) -> None:
    """Into the suite's file, in place of an earlier row of the same pair; failures have a key of their own."""
    whole = json.loads(path.read_text())
    for key in ("peers", "peers_failed"):
        kept = [old for old in whole.get(key, []) if any(old[name] != row[name] for name in ("method", "function"))]
        whole[key] = [*kept, *([row] if ("failed" in row) == (key == "peers_failed") else [])]
    partial = path.with_suffix(".partial")
    partial.write_text(json.dumps(whole, indent=1) + "\n")
    partial.rename(path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--zoo", choices=[name for name in suite.ZOOS if name != "linear"], default="vision")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("-o", "--output", type=Path, default=Path("docs/results"))
    parser.add_argument("--quick", action="store_true", help="the quick zoo")
    parser.add_argument("--methods", nargs="*", help="rows of the tables, methods, or parts of peers' names")
    parser.add_argument("--python", default=os.environ.get("PEERS_PYTHON"))
    parser.add_argument("--mergekit", default=os.environ.get("MERGEKIT_PYTHON"))
    parser.add_argument("--clones", default=os.environ.get("PEERS_CLONES"))
    parser.add_argument("--limit", type=float, default=900, help="seconds for one merge of a peer")
    args = parser.parse_args()
    console = Console()
    try:
        environments = Environments(args.python, args.mergekit, args.clones, args.limit)
        environments.check()
        cache.keep_compiled()
        options = suite.Options(args.output, quick=args.quick)
        zoo = suite.load(args.zoo, args.seed, options, lambda line: console.print(line, highlight=False))
        wanted = [case for case in CASES if not args.methods or asked(case, args.methods)]
        rows, path = [], args.output / "rows" / f"{args.zoo}-{args.seed}.json"
        for row in run(zoo, wanted, environments, console):
            rows.append(row)
            if path.exists():
                write(row, path)
    except CfmergeError as error:
        sys.exit(f"peers: {error}")
    show(rows, f"{args.zoo}, seed {args.seed}: cfmerge and its peers", console)
    if not path.exists():
        console.print(f"{path} is not there: nothing written")


def asked(case: Case, methods: Sequence[str]) -> bool:
    return any(name in (case.name, case.method.partition("(")[0]) or name in case.peer for name in methods)


if __name__ == "__main__":
    main()
