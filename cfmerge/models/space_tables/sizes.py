"""Sizes as expressions of a config's keys: `head_dim or hidden_size / num_attention_heads`."""

from collections.abc import Mapping
from typing import Any

from cfmerge.errors import CfmergeError


def evaluate(expression: str, config: Mapping[str, Any], what: str) -> int | None:
    """The number that an expression gives; None if the config has not what it needs.

    Args:
        expression: alternatives with `or` between them, of which the first is taken that the config can tell; each a
            number, a key (`text_config.hidden_size` lies in a part), or several with `/` between them.
        config: the model's.
        what: whose size it is, for messages.
    """
    for alternative in expression.split(" or "):
        numbers = [_number(word.strip(), config) for word in alternative.split("/")]
        if None in numbers:
            continue
        first, *divisors = [number for number in numbers if number is not None]
        for divisor in divisors:
            if first % divisor:
                raise CfmergeError(f"spaces: {what} is {expression} of the config: {first} is no multiple of {divisor}")
            first //= divisor
        return first
    return None


def _number(word: str, config: Mapping[str, Any]) -> int | None:
    if word.isdigit():
        return int(word)
    found: Any = config
    for key in word.split("."):
        found = found.get(key) if isinstance(found, Mapping) else None
    return found if isinstance(found, int) and not isinstance(found, bool) and found > 0 else None
