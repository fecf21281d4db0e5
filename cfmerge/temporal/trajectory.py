"""Checkpoints along one training run as one merge: a window of steps becomes an ordinary recipe.

With the steps `theta_0 .. theta_k` of the window and weights `c_0 .. c_k` that sum to 1, the recipe's base is the
newest step that counts and its experts are the others:

    sum_j c_j theta_j = theta_k + sum_(j<k) c_j (theta_j - theta_k)        task_arithmetic(scale=1)

so that integers, objects, config and side files are the newest step's. With a method of the user's the base is the
first step, and the experts are the others: their deltas are the updates since then. With a base of the user's (the
model that adapters change, say) all steps are experts.
"""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from cfmerge.errors import CfmergeError
from cfmerge.formats.adapters import is_adapter
from cfmerge.methods import Method
from cfmerge.planning.jobs import as_method
from cfmerge.planning.plugins import load_plugins
from cfmerge.products.plan import as_recipe
from cfmerge.recipe import Expert, Recipe
from cfmerge.temporal.decays import coefficients, decay_weights
from cfmerge.temporal.run_steps import Step, Steps, not_there, steps_of, told, window

DECAY = "linear"
MEAN = ("task_arithmetic", {"scale": 1.0})  # over weights that sum to 1
NEAR = 1e-6  # how far from 1 the sum of given weights may be
ALLOWED = ("duplicate-experts", "base-as-expert", "one-expert")  # a run may have stalled, a window have one step


@dataclasses.dataclass(frozen=True)
class Window:
    """Steps of a run, their weights, and the recipe that merges them.

        >>> for step in (20, 100):
        ...     _ = cfmerge.save({"w": np.ones(3)}, f"run/step-{step}/model.safetensors")
        >>> window = temporal.along("run", weights=[0.25, 0.75])
        >>> window.summary()["steps"][0]["weight"], window.recipe.method
        (0.25, 'task_arithmetic')

    Attributes:
        run: the directory.
        steps: the steps that were asked for, the oldest first.
        weights: theirs; None for the base of a method's deltas.
        decay: the shape of the weights; "" where they were given, or are a method's own.
        notes: notes for the user.
        recipe: an ordinary recipe, for `cfmerge.merge_recipe` or `cfmerge.make_plan`.
    """

    run: Path
    steps: tuple[Step, ...]
    weights: tuple[float | None, ...]
    decay: str
    notes: tuple[str, ...]
    recipe: Recipe

    @property
    def mean(self) -> bool:
        """Whether it is the weighted mean of the steps."""
        return self.recipe.method == MEAN[0] and None not in self.weights

    @property
    def how(self) -> str:
        """The number of steps and the shape of their weights, in words."""
        by = "weighted mean" if self.mean else self.recipe.method
        weights = f"decay {self.decay}" if self.decay else "weights as given"
        return f"{len(self.steps)} steps, {by}{f', {weights}' if self.mean or self.decay else ''}"

    @property
    def note(self) -> str:
        """A sentence for the card of the model that comes out."""
        steps = told([step.number for step in self.steps])
        return f"merged along one training run, {self.run}: {self.how}; the steps {steps}"

    def summary(self) -> dict[str, Any]:
        """The window as plain values."""
        return {
            "run": str(self.run),
            "decay": self.decay,
            "steps": [
                {"step": step.number, "path": str(step.path), "weight": weight}
                for step, weight in zip(self.steps, self.weights, strict=True)
            ],
        }


def along(
    run: str | Path,
    *,
    start: int | None = None,
    end: int | None = None,
    last: int | None = None,
    every: int = 1,
    decay: str | None = None,
    weights: Sequence[float] | None = None,
    extra_from: int | None = None,
    base: str | Path | None = None,
    method: str | Method | None = None,
    parameters: Mapping[str, Any] | None = None,
    **options: Any,
) -> Window:
    """The window of a training run's checkpoints, with the recipe that merges them.

        >>> for step in (100, 200, 300):
        ...     tree = {"w": np.full(4, step, np.float32)}
        ...     _ = cfmerge.save(tree, f"run/checkpoint-{step}/model.safetensors")
        >>> found = temporal.along("run", last=2)
        >>> [(step.number, weight) for step, weight in zip(found.steps, found.weights)]
        [(200, 0.5), (300, 0.5)]
        >>> _ = cfmerge.merge_recipe(found.recipe, "averaged")
        >>> cfmerge.open("averaged")["w"]
        array([250., 250., 250., 250.], dtype=float32)

    Args:
        run: the directory that holds the steps, or a pattern such as `run/checkpoint-*`.
        start, end: the first and the last step of the window; None: the oldest, the newest that is whole.
        last: in their place the number of steps, up to the newest that is whole.
        every: take each n-th of these, counted back from the newest.
        decay: the decay of the learning rate that the weights stand for: "linear" (the mean), "cosine",
            "inverse-sqrt" or "ema=D". Without a method of your own "linear" is the default.
        weights: in its place a weight for each step, the oldest first, which sum to 1; with a method of your own one
            for each expert.
        extra_from: the step whose integers, buffers and objects the output has; None: the newest.
        base: a model from which the deltas of all steps are taken; None: a step is the base.
        method, parameters: another method than the weighted mean, with its parameters.
        **options: the other fields of `Recipe`.

    Raises:
        CfmergeError: there are no such steps, weights do not fit, or the method knows none.
    """
    everything = steps_of(run)
    found = window(everything, start, end, last, every)
    if decay is not None and weights is not None:
        raise CfmergeError("--decay and --weights both say how much each step counts; leave one out")
    if extra_from is not None and options.get("unmerged"):
        raise CfmergeError("--extra-from and --unmerged both name the model of what is not merged; leave one out")
    extra = _extra(everything, found, extra_from)
    _check_adapters(found, base)
    common = {**options, "allow": list(dict.fromkeys([*ALLOWED, *options.get("allow", ())]))}
    if not options.get("unmerged") and not is_adapter(extra.path):  # which has only tensors that it changes
        common["unmerged"] = str(extra.path)
    if method is None:
        if parameters:
            raise CfmergeError(f"parameters {dict(parameters)}: a weighted mean has none; name the method: -m METHOD")
        return _mean(found, decay, weights, base, common)
    return _by_method(found, decay, weights, base, method, parameters or {}, common)


def _mean(
    found: Steps, decay: str | None, given: Sequence[float] | None, base: str | Path | None, common: Mapping[str, Any]
) -> Window:
    """The window that is merged as a weighted mean."""
    k = len(found.steps) - 1
    shares = _given(found, given) if given is not None else coefficients(decay_weights(decay or DECAY, k)).tolist()
    counted = [(step, share) for step, share in zip(found.steps, shares, strict=True) if share != 0]
    idle = [step.number for step, share in zip(found.steps, shares, strict=True) if share == 0]
    notes = [*found.notes, *([f"steps {told(idle)} have weight 0, and take no part"] if idle else [])]
    origin, experts = (base, counted) if base is not None else (counted[-1][0].path, counted[:-1])
    experts = experts or counted  # of one step: the step itself
    name, parameters = MEAN
    recipe = _recipe(origin, experts, name, parameters, common)
    shape = "" if given is not None else decay or DECAY
    return Window(found.run, found.steps, tuple(map(float, shares)), shape, tuple(notes), recipe)


def _by_method(
    found: Steps,
    decay: str | None,
    given: Sequence[float] | None,
    base: str | Path | None,
    method: str | Method,
    parameters: Mapping[str, Any],
    common: Mapping[str, Any],
) -> Window:
    """The window as a base, its first step or one that is given, and experts, for any method."""
    experts = found.steps if base is not None else found.steps[1:]
    load_plugins(common.get("plugins", ()))
    made = as_method(method, parameters)
    if not experts:
        raise CfmergeError(f"{made.name}: the window has one step, {told(found.numbers)}, which is the base; take more")
    asked = "--decay" if decay is not None else "--weights" if given is not None else ""
    if asked and made.needs.weights == "none":
        raise CfmergeError(f"{asked}: {made.name} knows no weights of experts; leave it out, or take another method")
    notes, weights = list(found.notes), [1.0] * len(experts)
    if given is not None:
        weights = _given_to_experts(made.name, found, experts, given)
    elif decay is not None:
        shares = coefficients(decay_weights(decay, len(found.steps) - 1)).tolist()
        weights = shares[len(found.steps) - len(experts) :]
        if made.needs.normalises and base is None:
            notes.append(f"{made.name} divides by the sum of the weights, so that the base's share is lost in it")
    if base is None:
        notes.append(f"step {found.numbers[0]} is the base of {made.name}: the deltas are the updates since then")
    weighted = list(zip(experts, weights, strict=True))
    recipe = _recipe(base or found.steps[0].path, weighted, method, parameters, common)
    unweighted: list[float | None] = [None] * (len(found.steps) - len(experts))
    return Window(found.run, found.steps, (*unweighted, *weights), decay or "", tuple(notes), recipe)


def _given_to_experts(name: str, found: Steps, experts: Sequence[Step], weights: Sequence[float]) -> list[float]:
    """The weights that are given, one for each expert of a method."""
    if len(weights) != len(experts):
        numbers = told([step.number for step in experts])
        of_base = f"; step {found.numbers[0]} is the base" if len(experts) < len(found.steps) else ""
        count = f"{len(weights)} weights for the {len(experts)} experts of {name}"
        raise CfmergeError(f"--weights: {count}: {numbers}{of_base}")
    return [_finite(weight) for weight in weights]


def _recipe(
    base: str | Path,
    experts: Sequence[tuple[Step, float]],
    method: str | Method,
    parameters: Mapping[str, Any],
    common: Mapping[str, Any],
) -> Recipe:
    named = [Expert(str(step.path), f"step-{step.number}", float(weight)) for step, weight in experts]
    return as_recipe(base, named, method, parameters, common)


def _given(found: Steps, weights: Sequence[float]) -> list[float]:
    """The weights that are given, one for each step; they sum to 1."""
    if len(weights) != len(found.steps):
        raise CfmergeError(f"--weights: {len(weights)} weights for {len(found.steps)} steps: {told(found.numbers)}")
    finite = [_finite(weight) for weight in weights]
    total = math.fsum(finite)
    if abs(total - 1) > NEAR:
        scaled = ",".join(f"{weight / total:.9g}" for weight in finite) if total else ""
        way_out = f"in these shares they are --weights {scaled}" if scaled else "nothing is left to divide by"
        raise CfmergeError(
            f"--weights: they sum to {total:g}, expected 1: the model would be scaled by {total:g}; {way_out}"
        )
    return finite


def _finite(weight: float) -> float:
    if not math.isfinite(weight):
        raise CfmergeError(f"--weights: a weight must be finite, found {weight}")
    return float(weight)


def _extra(everything: Steps, found: Steps, number: int | None) -> Step:
    """The step of that number, in the window or not; None: the newest of the window."""
    if number is None:
        return found.steps[-1]
    step = next((step for step in everything.steps if step.number == number), None)
    if step is None:
        raise CfmergeError(not_there(everything, "--extra-from", number))
    return step


def _check_adapters(found: Steps, base: str | Path | None) -> None:
    """Raises `CfmergeError` where the steps are adapters, and the model that they change is not named."""
    if base is None and is_adapter(found.steps[-1].path):
        raise CfmergeError(
            f"{found.steps[-1].path}: is an adapter; name the model that the run's adapters change: --base PATH"
        )
