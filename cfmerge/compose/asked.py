"""What a recipe may ask of a composed result: what is of one checkpoint is refused by name."""

from collections.abc import Sequence

from cfmerge.errors import CfmergeError, and_more, nearest
from cfmerge.methods import registry
from cfmerge.planning.work import Job
from cfmerge.recipe import Recipe, rule_option

OF_A_MODEL = {
    "adapter_out": "a composed result is no adapter",
    "chat_template": "a composed result has no tokenizer; each task's model has the base's",
    "format": "a composed result lies in safetensors; `cfmerge materialise --format` says in which a model does",
    "layers": "a composed result has the base's layers; make the stack first, and compose over it",
    "side_files": "a composed result has no files beside its tensors; each task's model has the base's",
    "statistics": "a composed result keeps every expert apart, and no statistics of them",
}
NO_UNION = "each task's model has the base's vocabulary"
NO_DROP = "the base is no part of a composed result, so that nothing of it can be left out"


def check_asked(recipe: Recipe) -> None:
    """Raises `CfmergeError` if a recipe asks for a thing that only one checkpoint can have."""
    plain, system = Recipe("", []), recipe.method.partition("(")[0].strip()
    known = registry("composer", "method", "transform")
    if system.isidentifier() and system not in known and not recipe.plugins:
        raise CfmergeError(f"unknown system {system!r}{nearest(system, registry('composer'))}")
    for key, why in OF_A_MODEL.items():
        if (found := getattr(recipe, key)) != getattr(plain, key):
            shown = "" if key == "layers" else f": {found}"
            raise CfmergeError(f"`{key}{shown}`: {why}; leave it out")
    if recipe.vocabulary not in {None, "base"}:
        raise CfmergeError(f"`vocabulary: {recipe.vocabulary}`: {NO_UNION}; leave it out, or say base")
    if recipe.heads == "drop":
        raise CfmergeError(f"`heads: drop`: {NO_DROP}; keep-base leaves the base's, export keeps each task's own")


def check_jobs(jobs: Sequence[Job]) -> None:
    """Raises `CfmergeError` if a rule skips a tensor of the base."""
    skipped = [job.name for job in jobs if job.assignment.action == "skip"]
    if skipped:
        way_out = rule_option(skipped[0], "keep-base")
        raise CfmergeError(f"tensor {and_more(skipped)}: a rule says skip; {NO_DROP}: {way_out}")
