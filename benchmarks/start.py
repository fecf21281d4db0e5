"""How long a merge of a tiny model takes, as multiples of `import jax`: cold, and with the compilation cache filled.

    python benchmarks/start.py [--method all] [--rounds 1] [--pythonpath CHECKOUT] [--json FILE] [--markdown FILE]

The model is a LLaMA of two layers and 32 dimensions with three experts. For every method three processes run in turn,
round after round: `python -c "import jax"`, a merge with an empty cache, and the same merge again. Medians of their
ratios are told, round by round, of wall time and of the processor's time in user mode; how many programs the first
merge compiles, and the second; the seconds that the compiler takes (of both threads together); and whether both merges
write the same bytes.
"""

import argparse
import hashlib
import json
import os
import statistics
import sys
import tempfile
from pathlib import Path
from typing import Any, NamedTuple

import measuring
from make_llama import SIZES, write_models
from measuring import ROOT
from recipes import chosen_methods, recipe

EXPERTS = 3
COLUMNS = (
    "method", "cold, wall", "cold, user", "warm, wall", "warm, user", "programs", "seconds", "warm", "same bytes",
)  # fmt: skip
SETTINGS = ("COMPILATION_CACHE_DIR", "PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "ENABLE_COMPILATION_CACHE")
EVENTS = {"compiled": "/backend_compile_duration", "from the cache": "/cache_retrieval_time_sec"}


class Run(NamedTuple):
    """One process: wall and user seconds; programs that were compiled, the compiler's seconds, and the output."""

    wall: float
    user: float
    programs: int = 0
    compiling: float = 0.0
    output: str = ""


def run(command: list[str], environment: dict[str, str], told: Path) -> Run:
    told.unlink(missing_ok=True)
    figures = measuring.run(command, environment=environment)
    return Run(figures.wall, figures.user, **json.loads(told.read_text()) if told.exists() else {})


def work(told: Path, arguments: list[str]) -> None:
    """Runs the command line and writes what was compiled."""
    import jax.monitoring

    counts, seconds = dict.fromkeys(EVENTS, 0), dict.fromkeys(EVENTS, 0.0)

    def listen(event: str, duration: float, **_: Any) -> None:
        for name, end in EVENTS.items():
            if event.endswith(end):
                counts[name] += 1
                seconds[name] += duration

    jax.monitoring.register_event_duration_secs_listener(listen)
    from cfmerge.cli import main

    sys.argv = ["cfmerge", *arguments]
    try:
        main()
    finally:
        programs = counts["compiled"] - counts["from the cache"]
        compiling = seconds["compiled"] - seconds["from the cache"]
        told.write_text(
            json.dumps({"programs": programs, "compiling": compiling, "output": digest(told.parent / "out")})
        )


def digest(directory: Path) -> str:
    found = hashlib.sha256()
    for file in sorted(directory.rglob("*.safetensors")):
        found.update(file.read_bytes())
    return found.hexdigest()


def rounds(folder: Path, method: str, count: int, checkout: Path) -> list[tuple[Run, Run, Run]]:
    """`(import jax, cold, warm)` of every round."""
    environment = {name: value for name, value in os.environ.items() if name.removeprefix("JAX_") not in SETTINGS}
    told, asked, found = folder / "told.json", recipe(folder, method, EXPERTS), []
    merge = ["merge", str(asked), "--quiet", "--overwrite", "-o", str(folder / "out")]
    ours = [sys.executable, __file__, "--work", str(told), *merge]
    for _ in range(count):
        environment |= {"PYTHONPATH": str(checkout), "XDG_CACHE_HOME": tempfile.mkdtemp(dir=folder)}
        imported = run([sys.executable, "-c", "import jax"], environment, told)
        found.append((imported, run(ours, environment, told), run(ours, environment, told)))
    return found


def row(method: str, found: list[tuple[Run, Run, Run]]) -> dict[str, Any]:
    """The figures of a method, by column."""

    def ratio(which: int, what: str) -> float:
        return round(statistics.median(getattr(one[which], what) / getattr(one[0], what) for one in found), 2)

    _, cold, warm = found[-1]
    compiling = round(statistics.median(one[1].compiling for one in found), 1)
    values = (
        method, ratio(1, "wall"), ratio(1, "user"), ratio(2, "wall"), ratio(2, "user"), cold.programs, compiling,
        warm.programs, "yes" if cold.output == warm.output else "NO",
    )  # fmt: skip
    return dict(zip(COLUMNS, values, strict=True))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--method", nargs="+", default=["all"], help="methods or expressions, or `all`")
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--pythonpath", type=Path, default=ROOT, metavar="DIR", help="the checkout that merges")
    parser.add_argument("--json", type=Path, metavar="FILE")
    parser.add_argument("--markdown", type=Path, metavar="FILE")
    args = parser.parse_args()
    rows, imports = [], []
    with tempfile.TemporaryDirectory(prefix="start-") as directory:
        folder = Path(directory)
        write_models(folder, SIZES["tiny"], EXPERTS)
        for method in chosen_methods(args.method):
            found = rounds(folder, method, args.rounds, args.pythonpath.resolve())
            rows.append(row(method, found))
            imports += [one[0] for one in found]
            print("  ".join(f"{key} {value}" for key, value in rows[-1].items()), flush=True)
    wall, user = (statistics.median(getattr(one, what) for one in imports) for what in ("wall", "user"))
    print(f"import jax: {wall:.2f} s of wall time, {user:.2f} s in user mode; load {os.getloadavg()[0]:.1f}")
    print(measuring.table(rows), end="")
    if args.markdown:
        args.markdown.write_text(measuring.table(rows))
    if args.json:
        args.json.write_text(json.dumps({"import jax": {"wall": wall, "user": user}, "methods": rows}, indent=2) + "\n")


if __name__ == "__main__":
    if sys.argv[1:2] == ["--work"]:
        work(Path(sys.argv[2]), sys.argv[3:])
    else:
        main()
