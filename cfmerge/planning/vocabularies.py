"""One vocabulary for base, experts and output: which tokens it has, and which row of each model is which token's."""

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from cfmerge.errors import CfmergeError, and_more, nearest
from cfmerge.formats import Source
from cfmerge.formats.tokenizers import (
    FILES,
    config_edits,
    has_tokenizer,
    read_vocabulary,
    same_tokenizer,
    token_edits,
    tokenizer_files,
)
from cfmerge.formats.vocabularies import OfVocabulary, Rows, filled_by_base, filled_by_donors
from cfmerge.models import Parameter, classify
from cfmerge.models.vocabulary import (
    Vocabulary,
    another_tokenizer,
    extra,
    moved,
    rows_for,
    token_rows,
    union,
    vocabulary_axes,
)
from cfmerge.planning.pair import Paired
from cfmerge.recipe import Expert, Recipe


class Spoken(NamedTuple):
    """The base in the output's vocabulary, notes, and what changes in the files beside the output."""

    base: Source
    notes: list[str]
    edits: Mapping[str, Mapping[str, Any]]


@dataclasses.dataclass(frozen=True)
class Model:
    """One model's vocabulary, how many rows its tensors of tokens have, and their axes by name."""

    source: Source
    vocabulary: Vocabulary
    rows: int
    axes: Mapping[str, int]


def one_vocabulary(recipe: Recipe, base: Source, paired: Paired, specs: Sequence[Expert], sums: bool = False) -> Spoken:
    """The base, and in place the experts, in the vocabulary of the output.

    Models whose tokenizers are the same files, and whose embeddings have as many rows, stay as they are.

    Raises:
        CfmergeError: a tokenizer is another, or has tokens that the output would lack.
    """
    asked = recipe.vocabulary or ""
    if asked not in {"", "base", "union", *(spec.name for spec in specs)}:
        names = ["base", "union", *(spec.name for spec in specs)]
        raise CfmergeError(
            f"vocabulary: expected base, union or an expert's name, found {asked!r}{nearest(asked, names)}"
        )
    if asked and not has_tokenizer(base.side_files):
        raise CfmergeError(f"vocabulary: {asked}: base {base.path} has no tokenizer beside it")
    ours = None if _all_alike(base, paired.experts) else _model(base, None)
    if ours is None:
        return Spoken(base, [], {})
    theirs = [_of_expert(ours, spec, expert, names) for spec, expert, names in _zipped(specs, paired)]
    by_name = {spec.name: model for spec, model in zip(specs, theirs, strict=True)}
    _check(asked, ours, by_name, specs)
    output = _output(asked, ours, by_name)
    count = ours.rows if output is ours.vocabulary else max(ours.rows, output.size)
    if (output is not ours.vocabulary) and (sums or recipe.side_files is not None):
        what = "statistics are kept in the base's vocabulary" if sums else "side_files names another tokenizer's place"
        raise CfmergeError(f"vocabulary: {asked}: {what}; leave one of the two out")
    notes = _notes(asked, ours, by_name, output)
    rows = [_rows(model, output, count) for model in theirs]
    donors = _donors(ours, theirs, rows, paired)
    side_files, edits = _files(asked, base, ours, by_name, output, count)
    spoken: Source = base
    if output is not ours.vocabulary:
        spoken = OfVocabulary(base, _rows(ours, output, count, True), filled_by_donors(donors), side_files)
    for number, (model, own, sources) in enumerate(zip(theirs, rows, paired.sources, strict=True)):
        if model.vocabulary.ids == output.ids and model.rows == count:
            continue
        known = _known(base, own, sources, ours.axes)
        fill = filled_by_base(spoken, known, ours.axes)
        paired.experts[number] = OfVocabulary(model.source, {name: own[name] for name in known}, fill)
    return Spoken(spoken, notes, edits)


def _zipped(specs: Sequence[Expert], paired: Paired) -> Any:
    return zip(specs, paired.experts, paired.sources, strict=True)


# --- the models -------------------------------------------------------------------------------------------------------


def _parameters(source: Source) -> dict[str, Parameter]:
    return classify({n: (info.shape, info.dtype.name) for n, info in source.tensors.items()}, source.config)


def _all_alike(base: Source, experts: Sequence[Source]) -> bool:
    """Whether all models have one tokenizer, or none, and as many rows."""
    if not all(_alike(base, expert) for expert in experts):
        return False
    rows = [token_rows(_parameters(source), source.config) for source in (base, *experts)]
    return all(count in {0, rows[0]} for count in rows)


def _alike(base: Source, expert: Source) -> bool:
    """Whether an expert has the base's tokenizer, or none, as a part of a model has."""
    return not has_tokenizer(expert.side_files) or same_tokenizer(base.side_files, expert.side_files)


def _model(source: Source, vocabulary: Vocabulary | None) -> Model | None:
    """A model with its vocabulary, read or given; None if it has none, or no tensor of tokens."""
    parameters = _parameters(source)
    rows = token_rows(parameters, source.config)
    if not rows or not (vocabulary or has_tokenizer(source.side_files)):
        return None
    vocabulary = vocabulary or read_vocabulary(source.side_files)
    return None if vocabulary is None else Model(source, vocabulary, rows, vocabulary_axes(parameters, rows))


def _of_expert(ours: Model, spec: Expert, expert: Source, names: Mapping[str, str]) -> Model:
    """An expert's model; one without a tokenizer, or with the base's, has the base's tokens."""
    try:
        found = _model(expert, ours.vocabulary if _alike(ours.source, expert) else None)
    except CfmergeError as error:
        raise CfmergeError(f"expert {spec.name!r}: {error}") from None
    if found is None:
        return ours
    paired = {
        their: ours.axes[our]
        for our, their in names.items()
        if our in ours.axes and their in expert.tensors and expert.tensors[their].shape[ours.axes[our]] == found.rows
    }
    same = found.vocabulary.ids == ours.vocabulary.ids and not another_tokenizer(ours.vocabulary, found.vocabulary)
    vocabulary = ours.vocabulary if same else found.vocabulary
    return Model(expert, vocabulary, found.rows, {**found.axes, **paired})


def _check(asked: str, ours: Model, experts: Mapping[str, Model], specs: Sequence[Expert]) -> None:
    problems = []
    for spec in specs:
        theirs = experts[spec.name]
        why = another_tokenizer(ours.vocabulary, theirs.vocabulary)
        if why:
            problems.append(
                f"expert {spec.name!r} ({spec.path}): its tokenizer is another than the base's: {why}. Its embeddings "
                "have no rows of the base's tokens; leave it out, or merge it with a base of its own"
            )
            continue
        more = extra(ours.vocabulary, theirs.vocabulary)
        if more and not asked and theirs.rows != ours.rows:
            problems.append(
                f"expert {spec.name!r} ({spec.path}) has {len(more)} tokens that the base lacks, "
                f"{and_more([repr(one) for one in more])}, and {theirs.rows} rows of embeddings, the base {ours.rows}. "
                "Give them to the output, --vocabulary union; or leave them out, --vocabulary base"
            )
    if problems:
        raise CfmergeError("\n".join(problems))


def _output(asked: str, ours: Model, experts: Mapping[str, Model]) -> Vocabulary:
    if asked in {"", "base"}:
        return ours.vocabulary
    if asked != "union":
        named = experts[asked].vocabulary
        return ours.vocabulary if named.ids == ours.vocabulary.ids else named
    joined = union(ours.vocabulary, {name: model.vocabulary for name, model in experts.items()})
    return ours.vocabulary if joined.ids == ours.vocabulary.ids else joined


# --- rows -------------------------------------------------------------------------------------------------------------


def _rows(model: Model, output: Vocabulary, count: int, is_base: bool = False) -> dict[str, Rows]:
    """The rows of every tensor of tokens; the base's padding stays where it is."""
    index = rows_for(output, model.vocabulary, model.rows, count)
    if is_base:
        padding = [row for row in range(min(count, model.rows)) if row not in output.tokens]
        index[padding] = padding
    return {name: Rows(axis, index) for name, axis in model.axes.items()}


def _known(base: Source, own: Iterable[str], names: Mapping[str, str], axes: Mapping[str, int]) -> dict[str, str]:
    """`{name in the expert: the tensor of the base that it is}` of an expert's tensors of tokens."""
    back = {name: name for name in own} | {their: our for our, their in names.items()}
    stored = {name: back[name] if back[name] in axes else base.ties.get(back[name], "") for name in own}
    return {name: our for name, our in stored.items() if our in axes}


def _donors(ours: Model, theirs: Sequence[Model], rows: Sequence[Mapping[str, Rows]], paired: Paired) -> Any:
    """`{name of the base: the experts that have it, and their rows}`."""
    return {
        name: [
            (model.source, names[name], own[names[name]])
            for model, own, names in zip(theirs, rows, paired.sources, strict=True)
            if model is not ours and names.get(name) in own
        ]
        for name in ours.axes
    }


# --- notes and files --------------------------------------------------------------------------------------------------


def _notes(asked: str, ours: Model, experts: Mapping[str, Model], output: Vocabulary) -> list[str]:
    base, notes = ours.vocabulary, []
    for name, model in experts.items():
        other, more = moved(base, model.vocabulary), extra(base, model.vocabulary)
        if other:
            notes.append(
                f"expert {name!r}: {len(other)} tokens have other ids than in the base, "
                f"{and_more([repr(one) for one in other])}: its rows are taken by token"
            )
        lost = [token for token in more if token not in output.ids]
        if lost:
            way_out = "" if asked else "; to give them to the output: --vocabulary union"
            notes.append(
                f"expert {name!r}: {len(lost)} tokens that the base lacks are left out, and their rows with them: "
                f"{and_more([repr(one) for one in lost])}{way_out}"
            )
        if model.rows != ours.rows and not more:
            notes.append(
                f"expert {name!r}: its embeddings have {model.rows} rows, the base's {ours.rows}; they differ in "
                "padding, which is the base's"
            )
    new = [token for token in output.ids if token not in base.ids]
    if new:
        told = and_more([f"{token!r} (id {output.ids[token]})" for token in new])
        notes.append(f"the output has {len(new)} tokens more than the base: {told}")
    gone = [token for token in base.ids if token not in output.ids]
    if gone:
        told = and_more([repr(token) for token in gone])
        notes.append(f"the output lacks {len(gone)} tokens of the base, {told}: it has the tokenizer of {asked!r}")
    return notes


def _files(
    asked: str, base: Source, ours: Model, experts: Mapping[str, Model], output: Vocabulary, count: int
) -> tuple[dict[str, Any], dict[str, dict[str, Any]]]:
    """The side files of the output, and the edits in them."""
    files = dict(base.side_files)
    if output is ours.vocabulary:
        return files, {}
    edits: dict[str, dict[str, Any]] = {}
    if asked == "union":
        edits = token_edits(files, ours.vocabulary, output)
    else:
        kept = {name: path for name, path in files.items() if not FILES.match(name)}
        files = {**kept, **tokenizer_files(experts[asked].source.side_files)}
    tokens = ours.vocabulary.tokens
    return files, edits | config_edits(files, (ours.rows, count), lambda n: output.ids.get(tokens.get(n, ""), n))
