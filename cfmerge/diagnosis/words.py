"""Names and numbers as findings tell them."""

from collections.abc import Sequence

from cfmerge.models.patterns import tell

MOST = 6  # names that are told one by one


def listed(names: Sequence[str]) -> str:
    """`'a', 'b' and 'c'`; of many names the first, and how many more."""
    shown = [repr(name) for name in names]
    if len(shown) > MOST:
        return f"{', '.join(shown[: MOST - 1])} and {len(shown) - MOST + 1} more"
    return " and ".join(filter(None, (", ".join(shown[:-1]), shown[-1] if shown else "")))


def experts(names: Sequence[str]) -> str:
    """`expert 'a'`, or `experts 'a' and 'b'`."""
    return f"expert{'' if len(names) == 1 else 's'} {listed(names)}"


def times(count: int) -> str:
    """How often: twice, 3 times."""
    return {1: "once", 2: "twice"}.get(count, f"{count} times")


def span(values: Sequence[float], form: str) -> str:
    """The least and the largest value, such as `38% to 42%`; one of them where they are told alike."""
    return " to ".join(dict.fromkeys(f"{value:{form}}" for value in (min(values), max(values))))


def tensors(names: Sequence[str], others: Sequence[str]) -> str:
    """A few patterns for many names."""
    return tell(list(names), list(others))
