"""Rules carried out on trees in memory: the equations of `rules` by `merge_params`, and nothing else."""

from collections.abc import Sequence
from typing import Any

from cfmerge.products.in_memory import merge_params
from cfmerge.temporal.rules import All, Base, Ema, Last, Paint, Rule, rule


def combined(how: str | Rule, base: Any, experts: Sequence[Any], *, seed: int = 0) -> Any:
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
        experts: trees of the same structure.
        seed: for techniques that draw numbers.

    Raises:
        CfmergeError: an unknown rule, parts of it that disagree, or trees that do not fit together.
    """
    chosen = rule(how)
    chosen.check()
    if not experts or isinstance(chosen, Base):
        return base
    match chosen:
        case Last():
            return experts[-1]
        case Paint():
            return _pair(chosen, base, base, experts[-1], len(experts), seed)
        case Ema():
            running, begun = (base, 0) if chosen.seed == "base" else (experts[0], 1)
            for number, expert in enumerate(experts[begun:], begun + 1):
                running = _pair(chosen, base, running, expert, number, seed)
            return running
        case All():
            elements = [base, *experts] if chosen.with_base else list(experts)
            if len(elements) < chosen.method.needs.experts[0]:
                return elements[-1]
            named = {str(number): tree for number, tree in enumerate(elements, 0 if chosen.with_base else 1)}
            timed = chosen.by_time != "uniform"
            weights = dict(zip(named, chosen.weights(len(elements)), strict=True)) if timed else None
            return merge_params(base, named, chosen.method, weights=weights, seed=seed)


def _pair(rule: Paint | Ema, base: Any, running: Any, newest: Any, number: int, seed: int) -> Any:
    experts = {f"before {number}": running, str(number): newest}
    weights = None if rule.weight is None else dict(zip(experts, rule.weights, strict=True))
    return merge_params(base, experts, rule.method, weights=weights, seed=seed)
