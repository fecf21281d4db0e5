"""Two parts of a chain that both survey the whole model: one after the other, in passes of their own."""

import dataclasses
from typing import Any, NamedTuple

from cfmerge.methods._base import Found, Method, Survey, Transform, chain
from cfmerge.methods._thresholds import model_of


class Turn(NamedTuple):
    """What two parts of a chain found, one after the other."""

    first: Any
    second: Any = None


def in_turn(first: Transform, second: Method) -> Method:
    """`chain(first, second)` where both may survey the model: `second` what `first`, informed, lets through."""
    if first.survey is None or second.survey is None:
        return chain(first, second)
    alone = chain(*(dataclasses.replace(part, survey=None, informed=None) for part in (first, second)))

    def survey(found: Any) -> Survey | None:
        turn = model_of(found) or Turn(None)
        given = turn.first if not isinstance(found, Found) else Found(turn.first, found.tensor)
        following = first.survey(given) if turn.second is None else None  # type: ignore[misc]
        if following is not None:
            return _then(following, Turn, found)
        behind = chain(first.informed(Found(turn.first)), second)  # type: ignore[misc]
        following = behind.survey(turn.second)
        return following and _then(following, lambda known: Turn(turn.first, known), found)

    def informed(found: Found) -> Method:
        turn = found.model
        return chain(first.informed(Found(turn.first, found.tensor)), second.informed(Found(turn.second)))  # type: ignore[misc]

    return dataclasses.replace(alone, parameters={}, origin=None, survey=survey, informed=informed)


def _then(survey: Survey, turn: Any, found: Any) -> Survey:
    """The survey, which returns the turn with what it found; what was found of tensors before is kept."""

    def combine(*totals: Any) -> Any:
        known = survey.combine(*totals)
        if isinstance(known, Found):
            return Found(turn(known.model), known.tensor)
        return Found(turn(known), found.tensor) if isinstance(found, Found) else turn(known)

    return survey._replace(combine=combine)
