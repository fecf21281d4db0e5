"""Rules carried out on trees in memory: the equations of `rules` by `merge_params`, and nothing else."""

from collections.abc import Mapping, Sequence
from typing import Any

from cfmerge.products.in_memory import merge_params
from cfmerge.temporal.rules import All, Base, Ema, Last, Paint, Rule, name_of, name_through, rule


def combined(how: str | Rule, base: Any, experts: Sequence[Any] | Mapping[str, Any], *, seed: int = 0) -> Any:
    """The model that a rule makes of a base and the experts that have come, oldest first.

        >>> base = {"w": jnp.zeros(2)}
        >>> experts = [{"w": jnp.ones(2)}, {"w": 3 * jnp.ones(2)}]
        >>> [float(temporal.combined(how, base, experts)["w"][0]) for how in ("base", "last", "all")]
        [0.0, 3.0, 2.0]
        >>> float(temporal.combined("ema(weight=0.5)", base, experts)["w"][0])  # 0.5 * 0.5 + 0.5 * 3
        1.75

    Args:
        how: a rule, or its text; see `temporal.rule`.
        base: a tree of parameters.
        experts: trees of the same structure; a mapping `{task: tree}` names them.
        seed: for techniques that draw numbers. With the tasks' names these are the numbers that a store draws.

    Raises:
        CfmergeError: an unknown rule, parts of it that disagree, or trees that do not fit together.
    """
    chosen = rule(how)
    chosen.check()
    if not experts or isinstance(chosen, Base):
        return base
    tasks = experts if isinstance(experts, Mapping) else {str(number): tree for number, tree in enumerate(experts, 1)}
    named = {name_of(number, task): tree for number, (task, tree) in enumerate(tasks.items(), 1)}
    names = list(named)
    match chosen:
        case Last():
            return named[names[-1]]
        case Paint():
            return _pair(chosen, base, {"base": base, names[-1]: named[names[-1]]}, seed)
        case Ema():
            running, begun = (base, 0) if chosen.seed == "base" else (named[names[0]], 1)
            for number, name in enumerate(names[begun:], begun):
                running = _pair(chosen, base, {name_through(number): running, name: named[name]}, seed)
            return running
        case All():
            elements = {"base": base, **named} if chosen.with_base else named
            if len(elements) < chosen.method.needs.experts[0]:
                return named[names[-1]]
            timed = chosen.by_time != "uniform"
            weights = dict(zip(elements, chosen.weights(len(elements)), strict=True)) if timed else None
            return merge_params(base, elements, chosen.method, weights=weights, seed=seed)


def _pair(rule: Paint | Ema, base: Any, experts: Mapping[str, Any], seed: int) -> Any:
    weights = None if rule.weight is None else dict(zip(experts, rule.weights, strict=True))
    return merge_params(base, experts, rule.method, weights=weights, seed=seed)
