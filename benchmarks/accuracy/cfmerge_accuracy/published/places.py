"""Repositories of the hub in a folder of the user's: as `hf download --local-dir` leaves them, or as its cache does."""

import hashlib
from collections.abc import Iterable, Sequence
from pathlib import Path

import cfmerge
from cfmerge.errors import CfmergeError

PIECE = 1 << 20
MANY = 100


def find(root: Path, names: Sequence[str], kind: str = "model") -> Path | None:
    """The folder of a repository that has one of these names, the first that is there; None if none is.

    Looked for are `ORG/NAME`, `NAME`, `ORG--NAME`, and the hub's cache, `models--ORG--NAME` (or `datasets--`), in
    `root` and in `root/hub`.

    Raises:
        CfmergeError: a repository's folder in the cache has no snapshot, or several and none that is the main one.
    """
    for name in names:
        flat = name.replace("/", "--")
        for place in (name, name.rpartition("/")[2], flat, f"{kind}s--{flat}", f"hub/{kind}s--{flat}"):
            if (root / place).is_dir():
                return _snapshot(root / place)
    return None


def _snapshot(folder: Path) -> Path:
    """The snapshot that a repository's folder in the cache stands for; any other folder as it is."""
    if not (folder / "snapshots").is_dir():
        return folder
    main = folder / "refs" / "main"
    commits = sorted(path.name for path in (folder / "snapshots").iterdir() if path.is_dir())
    named = main.read_text().strip() if main.is_file() else ""
    if named in commits or len(commits) == 1:
        return folder / "snapshots" / (named if named in commits else commits[0])
    raise CfmergeError(f"{folder}: {len(commits)} snapshots, none named by refs/main; fetch it again (hf download)")


def files_of(model: Path) -> list[Path]:
    """All files of a model that its numbers hang on: weights, config, tokenizer, processor."""
    beside = (path for pattern in ("*.json", "*.txt") for path in model.glob(pattern))
    return sorted({*cfmerge.open_checkpoint(model).files, *(path for path in beside if path.is_file())})


def command(root: Path, name: str, kind: str = "model", include: Sequence[str] = ()) -> str:
    """The command that fetches a repository into the folder."""
    of = "" if kind == "model" else f" --repo-type {kind}"
    only = "".join(f" --include '{pattern}'" for pattern in include)
    return f"hf download {name}{of}{only} --local-dir {root / name.rpartition('/')[2]}"


def mark(paths: Iterable[Path]) -> str:
    """A hash of files' names, sizes, first and last bytes: the same in another place; of many files without bytes."""
    told, paths = hashlib.sha256(), sorted(paths)
    for path in paths:
        size = path.stat().st_size
        told.update(f"{path.name}:{size}:".encode())
        if len(paths) > MANY:
            continue
        with path.open("rb") as file:
            told.update(file.read(PIECE))
            file.seek(max(size - PIECE, 0))
            told.update(file.read(PIECE))
    return told.hexdigest()[:16]
