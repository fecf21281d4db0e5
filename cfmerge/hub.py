"""The Hugging Face hub: names of models on it, and its cache.

The cache holds `models--ORG--NAME/{blobs, refs/main, snapshots/COMMIT}`; a snapshot is a directory of links. All that
knows where the cache is, and the network, is the library `huggingface_hub`, imported where a name is looked up.
"""

import contextlib
import glob
import os
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

from cfmerge.errors import CfmergeError

REPOSITORY = re.compile(r"models--(?:(?P<org>[^/]+?)--)?(?P<name>[^/]+)")
NAME = r"[A-Za-z0-9_]([A-Za-z0-9_.-]*[A-Za-z0-9_])?"
ASKED = re.compile(rf"(?P<repository>{NAME}/{NAME})(@(?P<revision>[^\s@]+))?")
FILE = re.compile(r".*\.(safetensors|bin|pt|pth|ckpt|msgpack|npz|gguf|h5|json|ya?ml|md)")  # no repository's name
MODULES = {"huggingface_hub", "httpx", "httpx2", "requests", "urllib3", "hf_xet"}  # whose errors are the hub's
GENERIC = {
    "model",
    "diffusion_pytorch_model",
    "pytorch_model",
    "flax_model",
}  # names of files that say nothing about the model


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
    for candidate in (Path(os.path.abspath(expanded)), Path(os.path.realpath(expanded))):
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


# --- names on the hub ----------------------------------------------------------------------------------------------


class Asked(NamedTuple):
    """A model on the hub: `ORG/NAME`, and a branch, a tag or a commit; "" is the main branch."""

    repository: str
    revision: str

    @property
    def name(self) -> str:
        return self.repository.rpartition("/")[2]

    def __str__(self) -> str:
        return f"{self.repository}@{self.revision}" if self.revision else self.repository

    @property
    def command(self) -> str:
        """The command that fetches it."""
        return f"hf download {self.repository}" + (f" --revision {self.revision}" if self.revision else "")


class Remote(NamedTuple):
    """A file of a repository: its size in bytes, and whether the cache has it."""

    size: int
    cached: bool


def asked(path: str | Path) -> Asked | None:
    """The model on the hub that `ORG/NAME` or `ORG/NAME@REVISION` names; None where there is such a path."""
    match = ASKED.fullmatch(str(path))
    if match is None or os.path.lexists(path) or FILE.fullmatch(match["repository"]):
        return None
    return Asked(match["repository"], match["revision"] or "")


def in_cache(model: Asked, cache_dir: str | None) -> Path | None:
    """The snapshot of a model in the cache, whole or not; None if there is none."""
    library = _library(model)
    with _told(model, library):
        try:  # the library, too, may know that files are missing: those that nobody has asked for
            return Path(_download(library, model, cache_dir, ["config.json"], local_files_only=True))
        except library.errors.LocalEntryNotFoundError as error:
            place = getattr(error, "snapshot_path", None)  # of one that is there in part
            return Path(place) if place else None


def listed(model: Asked, cache_dir: str | None) -> dict[str, Remote]:
    """The files of a model on the hub, by name."""
    library = _library(model)
    with _told(model, library):
        found = _download(library, model, cache_dir, None, dry_run=True)
    return {file.filename: Remote(file.file_size or 0, file.is_cached) for file in found}


def fetched(model: Asked, cache_dir: str | None, names: Iterable[str]) -> Path:
    """The snapshot of a model in the cache, with the files of these names in it."""
    library = _library(model)
    with _told(model, library):
        return Path(_download(library, model, cache_dir, [glob.escape(name) for name in names]))


def missing(model: Asked, cache_dir: str | None) -> CfmergeError:
    """The error about a model that is not in the cache."""
    place = cache_dir or _library(model).constants.HF_HUB_CACHE
    short = re.fullmatch("[0-9a-f]{4,39}", model.revision)
    digits = "; a commit is named by all of its 40 digits" if short else ""
    return CfmergeError(
        f"{model}: there is no such file or directory, and no such model in the Hugging Face cache ({place}){digits}. "
        f"A model on the hub is fetched by --download (recipe: 'download: true'), or before: {model.command}"
    )


def _library(model: Asked) -> Any:
    try:
        import huggingface_hub
        import huggingface_hub.constants
        import huggingface_hub.errors
    except ImportError:
        raise CfmergeError(
            f"{model}: there is no such file or directory; if it is a model on the Hugging Face hub, cfmerge finds it "
            "with huggingface_hub: pip install 'cfmerge[hub]'"
        ) from None
    return huggingface_hub


def _download(library: Any, model: Asked, cache_dir: str | None, patterns: list[str] | None, **how: Any) -> Any:
    return library.snapshot_download(
        model.repository, revision=model.revision or None, cache_dir=cache_dir, allow_patterns=patterns, **how
    )


@contextlib.contextmanager
def _told(model: Asked, library: ModuleType) -> Iterator[None]:
    """The library's errors as `CfmergeError`s of one sentence."""
    try:
        yield
    except CfmergeError:
        raise
    except Exception as error:
        if not isinstance(error, OSError) and not MODULES & {
            kind.__module__.split(".")[0] for kind in type(error).__mro__
        }:
            raise
        raise CfmergeError(f"{model}: {_sentence(model, library.errors, error)}") from None


def _sentence(model: Asked, errors: Any, error: Exception) -> str:
    """The cause of an error, and the way out."""
    first = (str(error).strip() or type(error).__name__).splitlines()[0].strip()
    status = getattr(getattr(error, "response", None), "status_code", None)
    causes = (  # the narrower kinds of errors first
        ("GatedRepoError", "its authors ask for consent: give it on the model's page, and log in (hf auth login)"),
        ("RevisionNotFoundError", f"the repository has no branch, tag or commit {model.revision or 'main'!r}"),
        (
            "RepositoryNotFoundError",
            "there is no such path, and no such model on the hub, or it is private (hf auth login)",
        ),
        ("DisabledRepoError", "the hub has disabled this repository"),
        ("HFValidationError", f"there is no such path, and it is no name on the hub: {first}"),
        ("OfflineModeIsEnabled", "huggingface_hub is set to be offline (HF_HUB_OFFLINE)"),
        ("LocalEntryNotFoundError", f"it is not in the cache, and the hub cannot be reached: {first}"),
        (
            "DryRunError",
            "the hub cannot be reached, so that its files are not known; what is in the cache is not all of it",
        ),
        ("LocalTokenNotFoundError", "it needs a token: log in (hf auth login)"),
        ("HfHubHTTPError", f"the hub answers {status or 'with an error'}: {first}"),
    )
    known = ((getattr(errors, name, None), told) for name, told in causes)
    return next((told for kind, told in known if kind and isinstance(error, kind)), f"it cannot be fetched: {first}")
