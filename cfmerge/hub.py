"""The Hugging Face cache: which repository and commit a path in it belongs to.

The cache holds `models--ORG--NAME/{blobs, refs/main, snapshots/COMMIT}`; a snapshot is a directory of links.
"""

import os
import re
from pathlib import Path
from typing import NamedTuple

from cfmerge.errors import CfmergeError

REPOSITORY = re.compile(r"models--(?:(?P<org>[^/]+?)--)?(?P<name>[^/]+)")
GENERIC = {"model", "diffusion_pytorch_model"}  # names of files that say nothing about the model


class Snapshot(NamedTuple):
    """`ORG/NAME` (or `NAME`) on the hub, and the commit, "" where the path does not tell it."""

    repository: str
    commit: str

    @property
    def name(self) -> str:
        return self.repository.rpartition("/")[2]


def snapshot(path: str | Path) -> Snapshot | None:
    """The repository and the commit that a path in the cache stands for; None elsewhere."""
    expanded = Path(path).expanduser()
    for candidate in (Path(os.path.abspath(expanded)), expanded.resolve()):
        for above in (candidate, *candidate.parents):
            match = REPOSITORY.fullmatch(above.name)
            if match and ((above / "snapshots").is_dir() or (above / "blobs").is_dir()):
                inner = candidate.relative_to(above).parts
                commit = inner[1] if len(inner) > 1 and inner[0] == "snapshots" else ""
                org = match["org"]
                return Snapshot(f"{org}/{match['name']}" if org else match["name"], commit)
    return None


def newest(path: Path) -> Path:
    """The snapshot that the folder `models--ORG--NAME` of the cache stands for; any other path as it is.

    Raises:
        CfmergeError: nothing says which of several snapshots it is.
    """
    snapshots = path / "snapshots"
    if not (REPOSITORY.fullmatch(path.resolve().name) and snapshots.is_dir()):
        return path
    main = path / "refs" / "main"
    commits = sorted(snapshot.name for snapshot in snapshots.iterdir() if snapshot.is_dir())
    told = main.read_text().strip() if main.is_file() else ""
    if told in commits:
        return snapshots / told
    if len(commits) == 1:
        return snapshots / commits[0]
    raise CfmergeError(
        f"{path}: is a model's folder in the Hugging Face cache, and "
        + (
            f"holds {len(commits)} snapshots; name one: " + ", ".join(f"snapshots/{commit}" for commit in commits[:4])
            if commits
            else "holds no snapshot; fetch the model again (hf download)"
        )
    )
