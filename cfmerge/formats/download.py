"""Models named as on the Hugging Face hub: taken from its cache, or fetched if that is asked for.

First the JSON files are fetched, then exactly those that would be read or copied if all were there: a folder of empty
files of the same names and sizes, and the true JSON, is looked at as a model is.
"""

import fnmatch
import logging
import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path, PurePosixPath

from cfmerge import hub
from cfmerge.errors import CfmergeError
from cfmerge.formats.components import find_components
from cfmerge.formats.side_files import look_beside, side_files
from cfmerge.hub import Asked, Remote

CONFIGS = ("config.json", "model_index.json", "modules.json")
ADAPTER = "adapter_config.json"
ADAPTER_WEIGHTS = ("adapter_model.safetensors", "adapter_model.bin")  # the first that is there
LARGEST_JSON = 1 << 28  # bytes

logger = logging.getLogger(__name__)


def snapshot_of(model: Asked, download: bool, cache_dir: str | None, weights: bool = True) -> Path:
    """The directory of a model of the hub in the cache.

    Args:
        model: its name.
        download: fetch the files that are missing; otherwise nothing reaches for the network.
        cache_dir: the cache's directory; None: where huggingface_hub has it.
        weights: take the weights too, not only the files beside them.

    Raises:
        CfmergeError: it is not there, in part alone, or cannot be fetched.
    """
    found = hub.in_cache(model, cache_dir)
    lacking = None if found is None else _lacking(found, weights)
    if found is not None and lacking is None:
        return found
    if download:
        return _fetched(model, cache_dir, weights)
    if found is None:
        raise hub.missing(model, cache_dir)
    if lacking == "":  # a model without a config, for all that is known
        return found
    raise CfmergeError(
        f"{lacking}\nThis is what the Hugging Face cache holds of {model}; --download (recipe: 'download: true') "
        f"fetches what is missing, and so does: {model.command}"
    )


def _lacking(found: Path, weights: bool) -> str | None:
    """What a snapshot lacks, as a message; "" if that is a config, which not every model has; None: nothing."""
    if (found / ADAPTER).is_file():
        there = not weights or any((found / name).is_file() for name in ADAPTER_WEIGHTS)
        return None if there else f"{found}: {ADAPTER_WEIGHTS[0]} is missing"
    try:
        if weights:
            find_components(found)
    except CfmergeError as error:
        return str(error)
    return None if any((found / name).is_file() for name in CONFIGS) else ""


def _fetched(model: Asked, cache_dir: str | None, weights: bool) -> Path:
    files = {name: file for name, file in hub.listed(model, cache_dir).items() if _is_safe(name)}
    described = [name for name, file in files.items() if name.endswith(".json") and file.size <= LARGEST_JSON]
    place = hub.fetched(model, cache_dir, described) if described else None
    with tempfile.TemporaryDirectory(prefix="cfmerge-") as folder:
        _lay(Path(folder), files, {name: place / name for name in described} if place else {})
        try:
            wanted = _wanted(Path(folder), weights)
        except CfmergeError as error:
            raise CfmergeError(str(error).replace(folder, str(model))) from None
    names = [name for name in wanted if name not in described]
    new = [files[name].size for name in names if not files[name].cached]
    if new:
        logger.info("%s: %d files, %s, are fetched from the Hugging Face hub", model, len(new), _size(sum(new)))
    if names:
        return hub.fetched(model, cache_dir, names)
    if place is None:
        raise CfmergeError(f"{model}: the repository holds no model")
    return place


def _is_safe(name: str) -> bool:
    parts = PurePosixPath(name).parts
    return bool(parts) and ".." not in parts and not PurePosixPath(name).is_absolute() and "\\" not in name


def _lay(folder: Path, files: Mapping[str, Remote], known: Mapping[str, Path]) -> None:
    """A folder as the repository is: the known files, and empty ones of the same sizes."""
    for name, file in files.items():
        target = folder / name
        target.parent.mkdir(parents=True, exist_ok=True)
        if name in known:
            shutil.copyfile(known[name], target)
        else:
            with target.open("wb") as stream:
                stream.truncate(file.size)  # takes no space


def _wanted(folder: Path, weights: bool) -> list[str]:
    """The files of a model that are read or copied, relative to its folder."""
    own: list[Path] = []
    if (folder / ADAPTER).is_file():
        chosen = next((folder / name for name in ADAPTER_WEIGHTS if (folder / name).is_file()), None)
        own = [chosen] if chosen and weights else []
        beside = side_files(folder)
    elif weights:
        components = find_components(folder)
        own = [file for component in components for file in component.weights.files]
        indices = [component.weights.index for component in components if component.weights.index]
        ignored = [file for component in components for file in component.weights.ignored]
        beside = {**look_beside(folder, own, [*ignored, *indices]).files, **{i.name: i for i in indices}}
    else:
        beside = {n: f for n, f in side_files(folder).items() if not fnmatch.fnmatch(n, "*.index.json")}
    names = [file.relative_to(folder).as_posix() for file in (*own, *beside.values())]
    return list(dict.fromkeys(names))


def _size(count: int) -> str:
    return f"{count / 1e9:.2f} GB" if count >= 1e7 else f"{count / 1e6:.2f} MB"
