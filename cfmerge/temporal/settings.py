"""Settings: which data sets a stream of tasks trains, which are held out, and the rules that were tried on it.

`published/` holds those of articles, as YAML files; `published` reads them, and files of one's own in the same form.
"""

from __future__ import annotations

from collections.abc import Sequence
from importlib import resources
from pathlib import Path
from typing import Any

import msgspec
import yaml

from cfmerge.errors import CfmergeError, nearest
from cfmerge.temporal.metrics import check_tasks
from cfmerge.temporal.rules import rule

Tasks = dict[str, dict[str, int]]  # by task in order, its data sets and the number of classes of each


class Tried(msgspec.Struct, frozen=True, forbid_unknown_fields=True, rename={"origin": "from"}):
    """Rules that were tried in a setting.

    Attributes:
        init: the rule for the model from which a task starts.
        deploy: the rule for the model that is served.
        stream: the name of the stream.
        origin: where they were read.
        note: what else is known.
    """

    init: str
    deploy: str
    stream: str
    origin: str = ""
    note: str = ""


class Setting(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A setting: streams of tasks over data sets, each with a score of its own.

        >>> setting = temporal.published("fomo-in-flux")
        >>> len(setting.tasks), len(setting.adaptation), len(setting.held_out)
        (20, 41, 22)
        >>> setting.metric("fscoco"), setting.metric("cub200")
        ('recall@5', 'accuracy')
        >>> setting.protocols["best-in-time"].deploy
        'ema(weight=0.5)'

    A task may train several data sets, and a data set may belong to several tasks: scores are by data set, experts by
    task.

    Attributes:
        name: the setting's name.
        adaptation: the data sets that the stream trains.
        held_out: the data sets that it does not.
        streams: by stream and task, the data sets and how many classes of each.
        stream: the stream that is meant.
        other_metrics: by data set, the metric where it is not the accuracy.
        protocols: the rules that were tried.
        article, benchmark, source, status, model, training, confirmed, unconfirmed, check: where the facts come from,
            and what is known of them.
    """

    name: str
    adaptation: tuple[str, ...]
    held_out: tuple[str, ...]
    streams: dict[str, Tasks]
    stream: str
    other_metrics: dict[str, str] = {}
    protocols: dict[str, Tried] = {}
    article: str = ""
    benchmark: str = ""
    source: dict[str, str] = {}
    status: str = ""
    model: dict[str, str] = {}
    training: dict[str, Any] = {}
    confirmed: tuple[str, ...] = ()
    unconfirmed: tuple[str, ...] = ()
    check: dict[str, Any] = {}

    def __post_init__(self) -> None:
        for stream in (self.stream, *(tried.stream for tried in self.protocols.values())):
            if stream not in self.streams:
                raise CfmergeError(f"setting {self.name}: unknown stream {stream!r}{nearest(stream, self.streams)}")
        for tasks in self.streams.values():
            trained = {task: tuple(data_sets) for task, data_sets in tasks.items()}
            check_tasks(self.adaptation, self.held_out, tuple(tasks), trained)
        for data_set in self.other_metrics:
            self.metric(data_set)
        for tried in self.protocols.values():
            for text in (tried.init, tried.deploy):
                rule(text).check()

    @property
    def tasks(self) -> tuple[str, ...]:
        """The tasks of the stream that is meant, in order."""
        return tuple(self.streams[self.stream])

    @property
    def trained(self) -> dict[str, tuple[str, ...]]:
        """By task, the data sets that it trains."""
        return {task: tuple(data_sets) for task, data_sets in self.streams[self.stream].items()}

    def metric(self, data_set: str) -> str:
        """The metric of a data set."""
        known = (*self.adaptation, *self.held_out)
        if data_set not in known:
            raise CfmergeError(f"setting {self.name}: unknown data set {data_set!r}{nearest(data_set, known)}")
        return self.other_metrics.get(data_set, "accuracy")

    def on(self, stream: str) -> Setting:
        """The setting on another of its streams.

        >>> temporal.published("fomo-in-flux").on("data-set-incremental-1").trained["task-03"]
        ('zappos50k',)
        """
        return msgspec.structs.replace(self, stream=stream)

    def tried(self, protocol: str) -> Tried:
        """The rules that were tried under a name."""
        if protocol not in self.protocols:
            near = nearest(protocol, self.protocols)
            raise CfmergeError(f"setting {self.name}: unknown protocol {protocol!r}{near}")
        return self.protocols[protocol]


def published(name: str | Path) -> Setting:
    """The setting of an article by its name (`fomo-in-flux`), or one of your own by its file's path.

        >>> temporal.published("fomo-in-flux").status
        'not run here'

    Raises:
        CfmergeError: there is none of that name, or the file contradicts itself.
    """
    files = {entry.name[: -len(".yaml")].replace("_", "-"): entry for entry in _shipped()}
    if str(name) in files:
        text, place = files[str(name)].read_text("utf-8"), str(name)
    elif Path(name).is_file():
        text, place = Path(name).read_text("utf-8"), str(name)
    else:
        raise CfmergeError(f"unknown setting {str(name)!r}{nearest(str(name), files)}, or name a YAML file")
    try:
        return msgspec.convert(yaml.safe_load(text), Setting)
    except (yaml.YAMLError, msgspec.ValidationError) as error:
        raise CfmergeError(f"setting {place}: {error}") from None


def _shipped() -> Sequence[Any]:
    folder = resources.files("cfmerge.temporal") / "shipped"
    return [entry for entry in folder.iterdir() if entry.name.endswith(".yaml")]
