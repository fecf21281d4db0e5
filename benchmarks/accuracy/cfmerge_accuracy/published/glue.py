"""GLUE's validation sets: parquet as the hub has them (`nyu-mll/glue`), or the files of GLUE itself."""

import csv
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from cfmerge.errors import CfmergeError

SAME = ("not_equivalent", "equivalent")
ENTAILED = ("entailment", "not_entailment")
INFERENCE = ("entailment", "neutral", "contradiction")


class Set(NamedTuple):
    """A validation set: its folder and split on the hub, its file of GLUE, columns of texts, names of labels, size.

    Columns of GLUE's files are named as their first line does, or numbered where there is none.
    """

    config: str
    split: str
    file: str
    columns: tuple[str, ...]
    labels: tuple[str, ...]
    size: int
    theirs: tuple[str | int, ...]  # columns of the texts and of the label in GLUE's file

    @property
    def pattern(self) -> str:
        """The files on the hub."""
        return f"{self.config}/{self.split}-*.parquet"


PAIR = ("sentence1", "sentence2")
QUESTIONS = ("question1", "question2")
SETS = {
    "cola": Set(
        "cola", "validation", "CoLA/dev.tsv", ("sentence",), ("unacceptable", "acceptable"), 1043, (3, 1)
    ),
    "mnli": Set(
        "mnli", "validation_mismatched", "MNLI/dev_mismatched.tsv", ("premise", "hypothesis"), INFERENCE, 9832,
        (*PAIR, "gold_label"),
    ),
    "mnli-matched": Set(
        "mnli", "validation_matched", "MNLI/dev_matched.tsv", ("premise", "hypothesis"), INFERENCE, 9815,
        (*PAIR, "gold_label"),
    ),
    "mrpc": Set("mrpc", "validation", "MRPC/dev.tsv", PAIR, SAME, 408, ("#1 String", "#2 String", "Quality")),
    "qnli": Set(
        "qnli", "validation", "QNLI/dev.tsv", ("question", "sentence"), ENTAILED, 5463,
        ("question", "sentence", "label"),
    ),
    "qqp": Set(
        "qqp", "validation", "QQP/dev.tsv", QUESTIONS, ("not_duplicate", "duplicate"), 40430,
        (*QUESTIONS, "is_duplicate"),
    ),
    "rte": Set("rte", "validation", "RTE/dev.tsv", PAIR, ENTAILED, 277, (*PAIR, "label")),
    "sst2": Set(
        "sst2", "validation", "SST-2/dev.tsv", ("sentence",), ("negative", "positive"), 872, ("sentence", "label")
    ),
}  # fmt: skip


class Examples(NamedTuple):
    """Texts, one or two each, and the numbers of their labels."""

    texts: list[tuple[str, ...]]
    labels: list[int]


def files_of(folder: Path, task: str) -> list[Path]:
    """The files of a validation set in a folder: parquet, else GLUE's own; [] if it has neither."""
    one = SETS[task]
    parquet = sorted((folder / one.config).glob(f"{one.split}-*.parquet"))
    single = [folder / one.config / f"{one.split}.parquet", folder / one.file]
    return parquet or [path for path in single if path.is_file()][:1]


def read(files: Sequence[Path], task: str) -> Examples:
    """All examples of a validation set.

    Raises:
        CfmergeError: columns or labels that the task does not have, or no examples.
    """
    found = _of_glue(files[0], task) if files[0].suffix == ".tsv" else _of_parquet(files, task)
    if not found.labels:
        raise CfmergeError(f"{files[0]}: {task} has no examples")
    for number, (text, label) in enumerate(zip(found.texts, found.labels, strict=True)):
        if label is None or None in text:
            raise CfmergeError(f"{files[0]}: example {number} of {task} has a null in place of its text or label")
    wrong = sorted({label for label in found.labels if not 0 <= label < len(SETS[task].labels)})
    if wrong:
        raise CfmergeError(
            f"{files[0]}: labels of {task} are 0 to {len(SETS[task].labels) - 1}, found {wrong[0]}; a test set, whose "
            "labels are -1, cannot be evaluated: take the validation set"
        )
    return found


def _of_parquet(files: Sequence[Path], task: str) -> Examples:
    one, texts, labels = SETS[task], [], []
    for path in files:
        table = parquet(path)
        check_columns(path, table.schema_arrow.names, (*one.columns, "label"))
        _check_order(path, table, one)
        columns = table.read(columns=[*one.columns, "label"]).to_pydict()
        texts += list(zip(*(columns[name] for name in one.columns), strict=True))
        labels += columns["label"]
    return Examples(texts, labels)


def parquet(path: Path) -> Any:
    """A parquet file, opened.

    Raises:
        CfmergeError: pyarrow is not installed, or it is no such file.
    """
    try:
        import pyarrow.parquet as pq
    except ImportError:
        raise CfmergeError(f"{path}: parquet is read by pyarrow: pip install 'cfmerge[bench]'") from None
    try:
        return pq.ParquetFile(path)
    except (OSError, ValueError) as error:
        raise CfmergeError(f"{path}: cannot be read as parquet: {error}") from None


def check_columns(path: Path, found: Sequence[str], wanted: Sequence[str]) -> None:
    missing = [name for name in wanted if name not in found]
    if missing:
        raise CfmergeError(f"{path}: no column {', '.join(missing)}; there is: {', '.join(map(str, found))}")


def class_names(table: Any) -> list[str]:
    """The names of the labels that the datasets library has written into a parquet file; [] if it has not."""
    told = json.loads((table.schema_arrow.metadata or {}).get(b"huggingface", b"{}"))
    return list(told.get("info", {}).get("features", {}).get("label", {}).get("names") or ())


def _check_order(path: Path, table: Any, one: Set) -> None:
    names = class_names(table)
    if names and tuple(names) != one.labels:
        raise CfmergeError(
            f"{path}: its labels are {', '.join(names)}; expected {', '.join(one.labels)}, in this order"
        )


def _of_glue(path: Path, task: str) -> Examples:
    one = SETS[task]
    with path.open(encoding="utf-8", newline="") as file:
        lines = list(csv.reader(file, delimiter="\t", quoting=csv.QUOTE_NONE))
    columns = one.theirs
    if isinstance(columns[0], str):
        header, lines = [name.lstrip("\ufeff") for name in lines[0]], lines[1:]
        check_columns(path, header, [str(name) for name in columns])
        columns = tuple(header.index(str(name)) for name in columns)
    *texts, label = (int(column) for column in columns)
    short = next((number for number, line in enumerate(lines, 1) if len(line) <= max(*texts, label)), None)
    if short is not None:
        raise CfmergeError(f"{path}: example {short} has {len(lines[short - 1])} columns, too few for {task}")
    return Examples(
        [tuple(line[n] for n in texts) for line in lines], [_label(path, line[label], one) for line in lines]
    )


def _label(path: Path, text: str, one: Set) -> int:
    """The number of a label that GLUE writes as a number or by name."""
    if text in one.labels:
        return one.labels.index(text)
    if text.lstrip("-").isdigit():
        return int(text)
    raise CfmergeError(f"{path}: label {text!r}; expected one of {', '.join(one.labels)}, or its number")


def spread(count: int, limit: int | None) -> list[int]:
    """The numbers of the examples that a limit leaves, evenly spread, since data sets may be sorted by class.

    >>> spread(10, 4), spread(3, None)
    ([0, 2, 5, 7], [0, 1, 2])
    """
    if limit is None or limit >= count:
        return list(range(count))
    return [number * count // limit for number in range(limit)]
