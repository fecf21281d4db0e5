"""Checkpoints zipped: ZipIt! of models on disk, written as a checkpoint or as a trunk with heads."""

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from cfmerge import align
from cfmerge.errors import CfmergeError, nearest
from cfmerge.formats import Source, open_checkpoint
from cfmerge.formats.named import Tensors
from cfmerge.formats.outputs import format_by_name
from cfmerge.formats.staged import StagedDirectory, StagedFile
from cfmerge.models.space_tables import describe, read_table


def zip_checkpoints(
    models: Mapping[str, str | Path],
    output: str | Path,
    *,
    moments: str | Path | None = None,
    from_weights: bool = False,
    stop_at: str | None = None,
    spaces: str | Path | None = None,
    head: str | None = None,
    overwrite: bool = False,
    download: bool = False,
    cache_dir: str | None = None,
    **options: Any,
) -> align.Zipped:
    """The zip of checkpoints that do not share an initialisation, which is written: ZipIt!.

    A zip all through whose heads fit together is a checkpoint like the first model, with its config. Any other is a
    directory with a trunk and a head for each model, which `cfmerge.align.load_zipped` reads.

        >>> table = {"spaces": {"layer.weight": "hidden, in -", "layer.bias": "hidden"}}
        >>> try:
        ...     cfmerge.zip_checkpoints({"math": "math", "code": "code"}, "zipped", spaces=table, from_weights=True)
        ... except cfmerge.CfmergeError as error:
        ...     print(error)
        zip: all spaces of 'math' are inputs or outputs: there is nothing to zip

    Args:
        models: `{name: path}`, two or more of one architecture.
        output: the directory to make.
        moments: a file of joint moments, `cfmerge.align.Moments`, of these models by these names.
        from_weights: similarities from weights in place of moments, an extension of ZipIt!.
        stop_at: the last space that is zipped, as `cfmerge spaces` names them; None: all.
        spaces: a table of one's own; None: that of the family.
        head: the model whose head a checkpoint has; None: the mean of all heads.
        overwrite: what is at the output is replaced.
        download, cache_dir: as in `merge`.
        **options: of `cfmerge.align.zip_models`: `method`, `width`, `budget`, `penalty`, `reset_norms`, ...

    Raises:
        CfmergeError: neither moments nor `from_weights`, or both; an unknown `head`, or one with `stop_at`; models that
            cannot be read, or do not fit together.
    """
    if moments is None and not from_weights:
        raise CfmergeError(
            "zip: give joint moments of the models' features, moments=FILE (--moments FILE; examples/zipit_torch.py "
            "collects them), or take similarities from weights, from_weights=True (--from-weights)"
        )
    if moments is not None and from_weights:
        raise CfmergeError("zip: similarities are of moments or of weights; leave `moments` or `from_weights` out")
    if head is not None and head not in models:
        raise CfmergeError(f"zip: head: there is no model {head!r}{nearest(head, models)}")
    if head is not None and stop_at is not None:
        raise CfmergeError(
            f"zip: head: a zip that stops at {stop_at!r} keeps the head of every model; leave `head` out, or `stop_at`"
        )
    sources = {name: open_checkpoint(path, download=download, cache_dir=cache_dir) for name, path in models.items()}
    _check_output(Path(output), overwrite, sources.values())
    table = read_table(spaces) if spaces is not None else None
    own = [describe(_shapes(source), source.config, table).spaces for source in sources.values()]
    first = next(iter(sources))
    if not any(one.sizes for one in own):
        raise CfmergeError(f"zip: all spaces of {first!r} are inputs or outputs: there is nothing to zip")
    zipped = align.zip_models(
        own,
        {name: Tensors(source) for name, source in sources.items()},
        align.Moments.load(Path(moments)) if moments is not None else "weights",
        stop_at=stop_at,
        **options,
    )
    if stop_at is None and (head is not None or zipped.differing is None):
        zipped.write(output, models[head or first], head, overwrite=overwrite)
    else:
        zipped.save(output, overwrite=overwrite)
    return zipped


def _check_output(output: Path, overwrite: bool, sources: Iterable[Source]) -> None:
    """Raises `CfmergeError`, before anything is computed, if the output may not be written."""
    staged = StagedDirectory if format_by_name(output, None) is None else StagedFile
    inputs = [path for source in sources for path in (*source.files, source.path)]
    staged(output, overwrite=overwrite, inputs=inputs).check()


def _shapes(source: Source) -> dict[str, tuple[int, ...]]:
    return {name: info.shape for name, info in source.tensors.items()}
