"""Test sets of images: parquet as the hub has them, or folders of images by class."""

import io
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from cfmerge.errors import CfmergeError
from cfmerge_accuracy.published.glue import check_columns, class_names, parquet

CONFIGS = {"svhn": "cropped_digits", "mnist": "mnist"}  # folders of repositories that hold several data sets
SUFFIXES = {".jpg", ".jpeg", ".png", ".ppm", ".bmp", ".tif", ".tiff", ".webp"}


class Classes(NamedTuple):
    """The classes of a task in the order of its labels, and the texts that `{}` takes each of them into."""

    templates: list[str]
    classes: list[str]

    def texts(self, name: str) -> list[str]:
        return [template.replace("{}", name) for template in self.templates]


def classes_of(task: str) -> Classes:
    """The published classes and templates of a task."""
    content = yaml.load(
        (Path(__file__).parent / "classes.yaml").read_text(), getattr(yaml, "CSafeLoader", yaml.SafeLoader)
    )
    return Classes(**content[task])


class Pictures(NamedTuple):
    """A test set: its files, and each image's label and place, `(file, row)` in parquet, `(file, 0)` in folders."""

    files: list[Path]
    labels: list[int]
    places: list[tuple[int, int]]

    def images(self, numbers: Sequence[int]) -> Iterator[tuple[int, Any]]:
        """The images of these numbers, each with its label, in ascending order of the numbers."""
        from PIL import Image

        chosen = sorted(numbers)
        for file in sorted({self.places[number][0] for number in chosen}):
            here = [number for number in chosen if self.places[number][0] == file]
            path = self.files[file]
            if path.suffix != ".parquet":
                yield self.labels[here[0]], Image.open(path).convert("RGB")
                continue
            rows = {self.places[number][1]: number for number in here}
            first = 0
            for batch in parquet(path).iter_batches(batch_size=256, columns=["image"]):
                for row, value in enumerate(batch.column(0), first):
                    if row in rows:
                        yield self.labels[rows[row]], Image.open(io.BytesIO(value["bytes"].as_py())).convert("RGB")
                first += batch.num_rows


def files_of(folder: Path, task: str) -> list[Path]:
    """The files of a test set: parquet of the split `test`, else the images in `test/CLASS/`; [] if there are none."""
    inner = folder / CONFIGS.get(task, "")
    inner = inner if inner.is_dir() else folder
    tables = sorted(path for path in inner.rglob("*.parquet") if path.stem == "test" or path.stem.startswith("test-"))
    if tables:
        return tables
    return sorted(path for path in (folder / "test").glob("*/*") if path.suffix.lower() in SUFFIXES)


def read(files: Sequence[Path], task: str) -> Pictures:
    """A test set, with no image decoded yet.

    Raises:
        CfmergeError: columns, labels or folders that the task does not have.
    """
    classes = classes_of(task).classes
    found = _of_parquet(files, classes) if files[0].suffix == ".parquet" else _of_folders(files, classes)
    wrong = [label for label in found.labels if not 0 <= label < len(classes)]
    if wrong or not found.labels:
        told = f"label {wrong[0]}; those of {task} are 0 to {len(classes) - 1}" if wrong else "no images"
        raise CfmergeError(f"{files[0]}: {told}")
    return found


def _of_parquet(files: Sequence[Path], classes: Sequence[str]) -> Pictures:
    labels: list[int] = []
    places: list[tuple[int, int]] = []
    for number, path in enumerate(files):
        table = parquet(path)
        check_columns(path, table.schema_arrow.names, ["image", "label"])
        names = class_names(table)
        if names and len(names) != len(classes):
            raise CfmergeError(f"{path}: has {len(names)} classes, and the published task has {len(classes)}")
        own = table.read(columns=["label"]).column(0).to_pylist()
        labels += own
        places += [(number, row) for row in range(len(own))]
    return Pictures(list(files), labels, places)


def _of_folders(files: Sequence[Path], classes: Sequence[str]) -> Pictures:
    """Folders are called as the classes are, or by the numbers of the labels."""
    numbers = {_plain(name): number for number, name in enumerate(classes)}
    folders = sorted({path.parent.name for path in files})
    if all(name.isdigit() for name in folders):
        known = {name: int(name) for name in folders}
    else:
        known = {name: numbers[_plain(name)] for name in folders if _plain(name) in numbers}
    unknown = [name for name in folders if name not in known]
    if unknown:
        raise CfmergeError(
            f"{files[0].parents[1]}: folder {unknown[0]!r} is no class of the published task; folders are called as "
            f"the classes are ({classes[0]!r}, {classes[1]!r}, ...), or 0 to {len(classes) - 1}"
        )
    return Pictures(list(files), [known[path.parent.name] for path in files], [(n, 0) for n in range(len(files))])


def _plain(name: str) -> str:
    return "".join(character for character in name.lower() if character.isalnum())
