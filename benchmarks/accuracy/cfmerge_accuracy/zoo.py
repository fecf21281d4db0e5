"""What the suite knows of a domain: a base, its experts, and how good a model is."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

import jax
import numpy as np

from cfmerge_accuracy.cache import cached

Params = Any  # a tree of arrays as Flax names them: what is trained and merged
Split = Literal["train", "validation", "test"]


def unchanged(params: Params, tasks: Sequence[str]) -> Params:
    return params


@dataclasses.dataclass(frozen=True)
class Zoo:
    """A base and one expert per task, all of one seed, and what can be asked about a model of theirs.

    Heads are frozen and fixed before fine-tuning: they belong to the tasks, so that a model is its trunk.

    Attributes:
        name: of the domain and its variant: "vision", "text", "text-lora-16", "convolutional".
        seed: of the splits, the initial weights and the training.
        tasks: their names, in the order in which experts are counted.
        base, experts, multitask: the parameters; `experts` by task, `multitask` trained on all of them, or None.
        labels: `(task, split) -> (N,)` integers.
        logits: `(params, task, split) -> (N, classes)`.
        grams: `task -> {name of a kernel: (in, in)}`: `X^T X / tokens` of the inputs that the task's expert sees of
            its training images or texts, as `cfmerge.activations` collects them.
        fishers: `task -> tree like base`: the expert's diagonal Fisher information.
        regmean_pp: merges with the data, layer by layer.
        rules: of the recipe, for tensors that the methods shall not see.
        finish: `(params, tasks) -> params`: what has to be done to a merged model before it is used (batch norms).
        facts: for the report: sizes, steps, chance levels, whatever describes the experts.
        judged_by: a digest of all that decides accuracies besides the parameters: code, examples, heads, machine. With
            it, those of a model that was judged before come from the cache.
        perplexity: whether a label is a token of a text, so that perplexities are told beside accuracies.
    """

    name: str
    seed: int
    tasks: tuple[str, ...]
    base: Params
    experts: Mapping[str, Params]
    multitask: Params | None
    labels: Callable[[str, Split], np.ndarray]
    logits: Callable[[Params, str, Split], np.ndarray]
    grams: Callable[[str], Mapping[str, np.ndarray]]
    fishers: Callable[[str], Params] | None = None
    regmean_pp: Callable[[], Params] | None = None
    rules: Sequence[Mapping[str, Any]] = ()
    finish: Callable[[Params, Sequence[str]], Params] = unchanged
    facts: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    judged_by: str = ""
    perplexity: bool = False

    def accuracies(self, params: Params, split: Split, tasks: Sequence[str] | None = None) -> dict[str, float]:
        """By task: the share of the split's examples whose best-scoring class is the right one."""
        return self._judged("accuracies", params, tasks, split, lambda task: self.logits(params, task, split))

    def perplexities(self, params: Params, split: Split, tasks: Sequence[str] | None = None) -> dict[str, float]:
        """By task: `exp` of the mean negative log likelihood of the right labels."""
        return self._judged("perplexities", params, tasks, split, lambda task: self.logits(params, task, split))

    def ensemble(self, split: Split) -> dict[str, float]:
        """Accuracies of the mean of all experts' probabilities: an upper reference that costs all the models."""

        def mean(task: str) -> np.ndarray:
            return np.mean([softmax(self.logits(params, task, split)) for params in self.experts.values()], axis=0)

        return self._judged("accuracies", dict(self.experts), self.tasks, split, mean)

    def _judged(
        self, what: str, models: Params, tasks: Sequence[str] | None, split: Split, scores: Callable[[str], np.ndarray]
    ) -> dict[str, float]:
        tasks, measure = tuple(tasks or self.tasks), MEASURES[what]

        def make() -> Params:
            return {task: np.array([measure(scores(task), self.labels(task, split))]) for task in tasks}

        if not self.judged_by:
            found = make()
        else:
            of = {"by": self.judged_by, "tasks": tasks, "split": split}
            name = f"{what}/{self.name}-{self.seed}"
            found = cached(name, make, of=of, code=(), data=jax.tree.leaves(models))
        return {task: float(found[task].item()) for task in tasks}

    def of_tasks(self, tasks: Sequence[str]) -> Zoo:
        """The same base with fewer experts."""
        return dataclasses.replace(self, tasks=tuple(tasks), experts={task: self.experts[task] for task in tasks})


def softmax(logits: np.ndarray) -> np.ndarray:
    """Probabilities over the last axis."""
    raised = np.exp(logits - logits.max(axis=-1, keepdims=True))
    return raised / raised.sum(axis=-1, keepdims=True)


def accuracy(scores: np.ndarray, labels: np.ndarray) -> float:
    """The share of rows whose best score is the label's."""
    return float(np.mean(np.argmax(scores, axis=-1) == labels))


def perplexity(logits: np.ndarray, labels: np.ndarray) -> float:
    """`exp` of the mean negative log likelihood of the labels."""
    likelihoods = np.take_along_axis(softmax(logits), labels[:, None], axis=-1)
    return float(np.exp(-np.mean(np.log(np.maximum(likelihoods, np.finfo(np.float32).tiny)))))


MEASURES: Mapping[str, Callable[[np.ndarray, np.ndarray], float]] = {
    "accuracies": accuracy,
    "perplexities": perplexity,
}
