"""`Time`: the protocol of merging over time, on a store that outlives the process.

    init      a model out of the store, from which the next task starts
    train     by the user
    store     the trained expert goes in
    deploy    a model out of the store, to serve now
    evaluate  the user's scores of it go in

S. Dziadzio et al., How to Merge Your Multimodal Models Over Time?, CVPR 2025, arXiv 2412.06712.
"""

import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from cfmerge.engine.placement import Devices
from cfmerge.errors import CfmergeError
from cfmerge.planning.work import Progress
from cfmerge.products.loading import load
from cfmerge.temporal.book import BOOK, Expert
from cfmerge.temporal.forgetting import forget, keep_states_of, let_go
from cfmerge.temporal.making import write_model
from cfmerge.temporal.merging import base_name, checked_options
from cfmerge.temporal.metrics import checked as checked_scores
from cfmerge.temporal.opening import check_same, completed, extend, made, rules_of
from cfmerge.temporal.prints import prints, prints_of_tree
from cfmerge.temporal.report import Report, report_of
from cfmerge.temporal.rules import Rule, rule
from cfmerge.temporal.store import Store
from cfmerge.temporal.taking import take_in
from cfmerge.temporal.telling import Told, told


class Time:
    """The protocol on a store: made by the first call with a base, opened by the later ones.

        >>> time = temporal.Time("store", base="base", protocol="best-in-time", weight=0.5, tasks=["math", "code"])
        >>> time.init().name                              # the first task starts from the base
        'init'
        >>> time.store("math", "math")                    # the expert, a checkpoint; or a tree of parameters
        >>> time.deploy("served").name
        'served'
        >>> time.evaluate({"math": 0.9, "code": 0.4})
        >>> time.done, time.left
        (['math'], ['code'])

    All calls can be made again after a stop at any moment: what is done is in the store, see `done`.

    Args:
        store: the store's directory.
        base: the model that all began from: a checkpoint in any format, or a tree of parameters, which is saved. It may
            be left out of a store that is there; another path for the same weights is taken over.
        init, deploy: rules, or their texts, see `temporal.rule`.
        protocol: both by one name, such as "best-in-time" (ema and ema); see `temporal.protocol`.
        technique: a method's text, for rules that name none; without it, interpolation (average).
        weight: of the newest expert in `ema` and `paint`, for rules that name none. The article does not tell the one
            that it tuned; interpolation needs it.
        window: rules see the newest so many experts alone.
        keep: so many of the newest experts keep their tensors in the store; None: all. Running models need no more.
        tasks: the adaptation tasks, in the order in which they come; their mean score is the knowledge accumulation.
            A longer list that begins with the store's adds tasks to it.
        held_out: tasks that are never trained, whose mean score is the zero-shot retention; may grow likewise.
        trained: `{expert: adaptation tasks that its data belong to}`, where experts have names of their own.
        **options: of every merge, as in a recipe: rules, heads, rename, allow, precision, seed, plugins; and of the
            models that go out: dtype, format, shard_size, side_files; `unmerged="newest"`: integers, buffers and
            objects are the newest expert's, not the base's, and experts may differ in them.

    Raises:
        CfmergeError: a store of another base or of other rules, rules that disagree, or no store and no base.
    """

    def __init__(
        self,
        store: str | Path,
        base: Any = None,
        *,
        init: str | Rule | None = None,
        deploy: str | Rule | None = None,
        protocol: str | None = None,
        technique: str | None = None,
        weight: float | None = None,
        window: int | None = None,
        keep: int | None = None,
        tasks: Sequence[str] | None = None,
        held_out: Sequence[str] | None = None,
        trained: Mapping[str, Sequence[str]] | None = None,
        **options: Any,
    ) -> None:
        path = Path(store).expanduser().absolute()
        rules = rules_of(init, deploy, protocol, technique, weight)
        asked = {
            "window": window,
            "keep": keep,
            "tasks": None if tasks is None else list(tasks),
            "held_out": None if held_out is None else list(held_out),
            "trained": None if trained is None else {name: list(tasks) for name, tasks in trained.items()},
            "options": checked_options(options) or None,
        }
        if (path / BOOK).is_file():
            self._store = Store.opened(path)
            check_same(self._store, rules, asked)
            extend(self._store, asked)
            self._move_base(base)
        else:
            self._store = made(path, base, rules, asked)

    @property
    def path(self) -> Path:
        """The store's directory."""
        return self._store.path

    @property
    def rules(self) -> tuple[Rule, Rule]:
        """The rules (init, deploy)."""
        book = self._store.book  # never changes
        return rule(book.init), rule(book.deploy)

    @property
    def done(self) -> list[str]:
        """The tasks whose experts are in the store, oldest first."""
        return [one.task for one in self._store.again().book.experts]

    @property
    def seen(self) -> list[str]:
        """The tasks whose experts rules see: those of `done`, or the newest in the window."""
        return [one.task for one in self._store.again().experts]

    @property
    def left(self) -> list[str]:
        """The adaptation tasks that have not come yet."""
        book = self._store.again().book
        return [task for task in book.tasks if task not in book.order]

    @property
    def step(self) -> int:
        """The number of the newest expert; 0 before the first."""
        return self._store.again().next_number - 1

    @property
    def replay_file(self) -> Path:
        """A place in the store for a replay buffer, see `temporal.Reservoir`."""
        return self.path / "replay.npz"

    def init(self, output: str | Path | None = None, *, like: Any = None, overwrite: bool = False, **how: Any) -> Any:
        """The checkpoint from which the next task starts.

        Args:
            output: where it is written; None: in the store, in place of the one before.
            like: a tree of arrays; the parameters are returned as such a tree, as `cfmerge.load` does it.
            overwrite: replace what is at the output.
            **how: memory, devices and progress, as for `cfmerge.merge`.

        Returns:
            Its path; with `like` a tree.
        """
        return self._written(self.rules[0], output, "init", like, overwrite, how)

    def deploy(
        self,
        output: str | Path | None = None,
        *,
        rule: str | Rule | None = None,
        like: Any = None,
        overwrite: bool = False,
        **how: Any,
    ) -> Any:
        """The model to serve now; arguments as for `init`.

        Args:
            rule: another rule than the store's, this once.
        """
        chosen = self.rules[1] if rule is None else completed(rule)
        return self._written(chosen, output, "deploy", like, overwrite, how)

    def _written(
        self, rule: Rule, output: str | Path | None, name: str, like: Any, overwrite: bool, how: Mapping[str, Any]
    ) -> Any:
        with self._store.changing():
            if output is not None:
                target = Path(output).expanduser()
                self._store.check_output(target)
                write_model(self._store, rule, target, {"overwrite": overwrite, **how})
            else:
                target, new = self.path / name, self.path / f".{name}.new"
                shutil.rmtree(new, ignore_errors=True)
                write_model(self._store, rule, new, how)
                shutil.rmtree(target, ignore_errors=True)
                new.rename(target)
            keep_states_of(self._store, self.rules)
        return target if like is None else load(target, like)

    def store(
        self,
        expert: Any,
        task: str,
        *,
        link: bool = False,
        over: str | Path | None = None,
        memory: str | int | None = None,
        devices: Devices = None,
        progress: Progress | None = None,
    ) -> None:
        """Takes in the trained expert of a task: it is checked against the base, and copied.

        Args:
            expert: a checkpoint in any format, an adapter, or a tree of parameters.
            task: its name; one of the adaptation tasks, where these are named.
            link: refer to the checkpoint where it lies in place of copying it. Where it changes later, that is told.
            over: the model that an adapter changes, from which its task started; the store keeps the model that comes
                out. It is asked for where the init rule did not begin with the base; of the base, name that.
            memory, devices, progress: as for `cfmerge.merge`, of the step of the running models with `keep`.

        Raises:
            CfmergeError: it does not fit the base, holds NaN or infinity, or there is one of that task.
        """
        with self._store.changing():
            store, book = self._store, self._store.book
            how = {"memory": memory, "devices": devices, "progress": progress}
            if book.keep is not None and any(one.task == task for one in book.experts):
                let_go(store, self.rules, how)  # after a stop
            store.check_task(task)
            one = Expert(task, store.next_number, "")
            take_in(store, one, expert, link, over, progress)
            book.experts.append(one)
            book.order.append(task)
            store.write()
            if book.keep is not None:
                let_go(store, self.rules, how)

    def forget(self, task: str, **how: Any) -> None:
        """Takes an expert out of the store and of its running models.

        A weighted sum, and statistics, take it off without a look at the others but for those whose weights change;
        running models of other kinds are made again of the experts that are left.

        Args:
            task: its task.
            **how: memory, devices and progress, as for `cfmerge.merge`.

        Raises:
            CfmergeError: there is none, or a running model cannot be had without it; nothing is changed then.
        """
        with self._store.changing():
            forget(self._store, self.rules, self._store.named(task), how)

    def plan(self) -> tuple[Told, Told]:
        """How the next models of both axes (init, deploy) are made, and what that needs, from headers alone.

        It says where a step reads all experts, so that its cost grows with the number of tasks.
        """
        init, deploy = self.rules
        self._store.again()
        return told(self._store, "init", init), told(self._store, "deploy", deploy)

    def evaluate(self, scores: Mapping[str, float], step: int | None = None) -> None:
        """Takes in the scores of the model that was deployed after a step.

        Args:
            scores: `{task: score}`, all on one scale, larger is better; those before of the same step stay.
            step: the number of the newest expert then; None: of the newest one now; 0: of the base.

        Raises:
            CfmergeError: a name that is no task of the store (with the nearest), or a step that has not come.
        """
        with self._store.changing(writes=False):
            book, newest = self._store.book, self._store.next_number - 1
            at = newest if step is None else step
            if not 0 <= at <= newest:
                raise CfmergeError(f"store {self.path}: step {at} has not come; the newest is {newest}")
            numbers = checked_scores(scores, book.tasks or book.order, book.held_out)
            book.scores[at] = {**book.scores.get(at, {}), **numbers}
            self._store.write()

    def report(self) -> Report:
        """The metrics of each step, and the scores by task; it has `markdown()`, `to_json()` and `save(directory)`."""
        book = self._store.again().book
        about = {"store": self.path.name, "base": book.base, "init": book.init, "deploy": book.deploy}
        about |= {key: getattr(book, key) for key in ("window", "keep") if getattr(book, key) is not None}
        there = {one.task for one in book.experts}
        forgotten = [task for task in book.order if task not in there]
        about |= {"forgotten": ", ".join(forgotten)} if forgotten else {}
        tasks = book.tasks or list(dict.fromkeys(book.order))
        return report_of(book.scores, book.order, tasks, book.held_out, about, trained=book.trained or None)

    def _move_base(self, base: Any) -> None:
        if base is None:
            return
        if not isinstance(base, str | Path):
            saved = self._store.prints()
            self._store.check_base("that is given", prints_of_tree(base, saved))
            return
        name = base_name(base)
        if name != self._store.book.base:
            with self._store.changing(writes=False):
                self._store.check_base(name, prints(self._store.source(name)))
                self._store.book.base = name
                self._store.write()
