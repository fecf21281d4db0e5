r"""Joint moments: how the features of several models vary together over the same inputs.

Matching by activations and ZipIt! compare neurons by what they do on the same unlabelled inputs. For each space the
features of all models stand side by side, `x = [model 0 | model 1 | ...]` of `O = n_0 + n_1 + ...` entries. Kept are

    mean        m = E[x]                  (O,)
    covariance  C = E[(x - m)(x - m)^T]   (O, O)
    correlation C_ij / max(sqrt(C_ii C_jj), 1e-7)

over all tokens: the examples, and the positions in them. They are sums, so batches are added as they come. The sums are
in float64 on the host, each batch about its own mean (Chan, Golub and LeVeque, 1979: updating formulae for variances),
so that large means do not cancel.
"""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from cfmerge.errors import CfmergeError, and_more, nearest
from cfmerge.formats import FileSink, Folder, Totals
from cfmerge.formats.safetensors import SafetensorsFile

HOLDS = "joint_moments"  # what the file says that it holds
SMALLEST = 1e-7  # denominator of a correlation
PARTS = ("tokens", "mean", "covariance")  # of a space in the file


class SpaceMoments(NamedTuple):
    """The moments of one space: of `O = sum(widths)` features, over so many tokens.

        >>> moments = cfmerge.align.Moments()
        >>> moments.add("hidden", [np.array([[1.0], [3.0]]), np.array([[0.0, 2.0], [0.0, 4.0]])])
        >>> moments.of("hidden").mean
        array([2., 0., 3.])

    Attributes:
        tokens: their number.
        mean: `(O,)`.
        covariance: `(O, O)`, divided by the number of tokens.
        widths: the number of features of each model.
    """

    tokens: int
    mean: np.ndarray
    covariance: np.ndarray
    widths: tuple[int, ...]


class Moments:
    """The joint moments of the features of several models that saw the same inputs, for each space.

        >>> moments = cfmerge.align.Moments(models=("left", "right"))
        >>> x = np.array([[1.0, 0.0], [2.0, 5.0], [3.0, 1.0]])
        >>> moments.add("hidden", [x, x[:, ::-1]])             # the features of each model, (tokens, n)
        >>> moments.correlation("hidden")[:2, 2:].round(2)     # left's features by right's
        array([[0.19, 1.  ],
               [1.  , 0.19]])
        >>> moments.save("both.safetensors")
        >>> cfmerge.align.Moments.load("both.safetensors").widths("hidden")
        (2, 2)

    Args:
        models: names of the models, in the order in which `add` gets their features.

    Raises:
        CfmergeError: fewer than two models, or two of one name.
    """

    def __init__(self, models: Sequence[str] = ("a", "b")):
        self.models = tuple(models)
        if len(self.models) < 2 or len(set(self.models)) < len(self.models):
            raise CfmergeError(f"moments: joint moments are of two models or more, each of its own name; got {models}")
        self._spaces: dict[str, SpaceMoments] = {}

    def __repr__(self) -> str:
        told = ", ".join(f"{name} {'+'.join(map(str, joint.widths))}" for name, joint in self._spaces.items())
        return f"<Moments of {', '.join(self.models)}: {told or 'no space'}>"

    @property
    def spaces(self) -> tuple[str, ...]:
        """The names of the spaces whose features were added."""
        return tuple(self._spaces)

    def of(self, space: str) -> SpaceMoments:
        """Tokens, mean, covariance and widths of one space.

        Raises:
            CfmergeError: no features of it were added.
        """
        if space not in self._spaces:
            raise CfmergeError(f"moments: there are none of space {space!r}{nearest(space, self._spaces)}")
        return self._spaces[space]

    def widths(self, space: str) -> tuple[int, ...]:
        """The number of features of each model."""
        return self.of(space).widths

    def slices(self, space: str) -> tuple[slice, ...]:
        """Where the features of each model lie among all."""
        ends = np.cumsum(self.widths(space)).tolist()
        return tuple(slice(end - width, end) for end, width in zip(ends, self.widths(space), strict=True))

    def covariance(self, space: str) -> np.ndarray:
        """`C = E[(x - m)(x - m)^T]`, `(O, O)`, over all tokens."""
        return self.of(space).covariance

    def second(self, space: str) -> np.ndarray:
        """`E[x x^T]`, `(O, O)`: inner products of features."""
        joint = self.of(space)
        return joint.covariance + np.outer(joint.mean, joint.mean)

    def correlation(self, space: str, *, dead: float = 0.0) -> np.ndarray:
        """Pearson's correlation of every two features, `(O, O)`; 0 for a dead one, with itself too.

        Args:
            space: its name.
            dead: the entry of two dead features of one value. With 1 they are alike, as behind a ReLU that never fires:
                they can be merged at no loss, and are, in place of features that live.
        """
        covariance = self.covariance(space)
        deviation = np.sqrt(np.diagonal(covariance))
        correlation = covariance / np.maximum(np.outer(deviation, deviation), SMALLEST)
        if dead:
            places = np.flatnonzero(self.dead(space))
            value = self.of(space).mean[places]
            correlation[np.ix_(places, places)] = np.where(value[:, None] == value, dead, 0.0)
        return correlation

    def dead(self, space: str) -> np.ndarray:
        """Which features never changed, `(O,)` of bool."""
        return np.diagonal(self.covariance(space)) == 0

    def add(self, space: str, features: Sequence[Any]) -> None:
        """Adds the features of a batch.

        Args:
            space: its name.
            features: an array `(tokens, n)` for each model, row t of each being of the same token: NumPy, JAX, or torch
                on the CPU.

        Raises:
            CfmergeError: not one array for each model, another number of tokens or features, a NaN or an infinity.
        """
        if len(features) != len(self.models):
            raise CfmergeError(
                f"moments: space {space!r}: features of {len(features)} models, expected of {len(self.models)}: "
                f"{', '.join(self.models)}"
            )
        arrays = [self._rows(space, *pair) for pair in zip(self.models, features, strict=True)]
        tokens = {len(rows) for rows in arrays}
        if len(tokens) > 1 or tokens == {0}:
            raise CfmergeError(
                f"moments: space {space!r}: the features of {' and '.join(self.models)} hold "
                f"{' and '.join(str(len(rows)) for rows in arrays)} tokens; give those of the same inputs, at least one"
            )
        widths = tuple(rows.shape[1] for rows in arrays)
        self._check(space, widths)
        self._put(space, _moments(np.concatenate(arrays, axis=1), widths))

    def merge(self, other: "Moments") -> None:
        """Adds the moments of other batches of the same models.

        Raises:
            CfmergeError: they are of other models.
        """
        if other.models != self.models:
            raise CfmergeError(
                f"moments: those of {', '.join(other.models)} cannot be added to those of {', '.join(self.models)}: "
                "joint moments are of the same models in the same order"
            )
        for space in other.spaces:
            self._check(space, other.widths(space))
        for space in other.spaces:
            self._put(space, other.of(space))

    def _put(self, space: str, joint: SpaceMoments) -> None:
        self._spaces[space] = _together(self._spaces[space], joint) if space in self._spaces else joint

    def _check(self, space: str, widths: tuple[int, ...]) -> None:
        known = self._spaces[space].widths if space in self._spaces else widths
        if known != widths:
            raise CfmergeError(
                f"moments: space {space!r}: the models {' and '.join(self.models)} have {_told(widths)} features, and "
                f"had {_told(known)} before"
            )

    def _rows(self, space: str, model: str, features: Any) -> np.ndarray:
        """The features of one model in float64."""
        where = f"moments: space {space!r}, model {model!r}"
        try:
            rows = np.asarray(features).astype(np.float64)
        except (TypeError, ValueError, RuntimeError) as error:  # of torch: on a device, with a gradient, bfloat16
            raise CfmergeError(
                f"{where}: the features are no NumPy array ({error}); of a torch tensor give x.detach().float().cpu()"
            ) from None
        if rows.ndim != 2:
            raise CfmergeError(
                f"{where}: features have shape (tokens, features), found {rows.shape}; give x.reshape(-1, x.shape[-1]) "
                "if the last axis is that of the features; of a torch convolution x.movedim(1, -1) before"
            )
        bad = np.flatnonzero(~np.isfinite(rows).all(axis=0))
        if len(bad):
            raise CfmergeError(
                f"{where}: {len(bad)} of {rows.shape[1]} features hold a NaN or an infinity, the first is {bad[0]}; "
                "does the model run on these inputs?"
            )
        return rows

    def save(self, path: str | Path, *, overwrite: bool = False) -> None:
        """Writes them as one safetensors file, which appears when it is complete.

        It holds `SPACE:tokens`, `SPACE:mean` and `SPACE:covariance`; its metadata tell that, models and widths.

        Raises:
            CfmergeError: it exists (without `overwrite`), is not called `.safetensors`, or there is nothing to save.
        """
        path = Path(path)
        if path.suffix != ".safetensors" or not self._spaces:
            lack = "moments of no space" if path.suffix == ".safetensors" else "must be called .safetensors"
            raise CfmergeError(f"{path}: {lack}")
        arrays = {
            f"{space}:{part}": np.asarray(getattr(joint, part))
            for space, joint in self._spaces.items()
            for part in PARTS
        }
        widths = {space: joint.widths for space, joint in self._spaces.items()}
        metadata = {"holds": HOLDS, "models": json.dumps(self.models), "widths": json.dumps(widths)}
        with FileSink(path, [Folder(stem=path.stem, sharded=False)], metadata=metadata, overwrite=overwrite) as sink:
            sink.declare({name: (array.shape, array.dtype) for name, array in arrays.items()})
            for name, array in arrays.items():
                sink.write(name, array)
            sink.finish(Totals())
            sink.commit()

    @staticmethod
    def load(path: str | Path) -> "Moments":
        """The moments that `save` wrote.

        Raises:
            CfmergeError: it is something else, a part of a space is missing or does not fit its widths, or holds NaN.
        """
        file = SafetensorsFile(Path(path))
        if file.metadata.get("holds") != HOLDS:
            raise CfmergeError(f"{path}: holds {_other(file)}")
        try:
            result = Moments(json.loads(file.metadata["models"]))
            widths = {space: tuple(map(int, own)) for space, own in json.loads(file.metadata["widths"]).items()}
        except (KeyError, ValueError, TypeError, AttributeError) as error:
            raise CfmergeError(f"{path}: its metadata do not tell models and widths ({error}); save it again") from None
        for space, own in widths.items():
            result._spaces[space] = _read(file, space, own, len(result.models))
        return result


def _moments(rows: np.ndarray, widths: tuple[int, ...]) -> SpaceMoments:
    """The moments of one batch `(tokens, O)`, which is changed; a feature that is the same in all rows varies by 0."""
    first = rows[0].copy()
    rows -= first
    mean = rows.mean(axis=0)
    rows -= mean
    return SpaceMoments(len(rows), first + mean, rows.T @ rows / len(rows), widths)


def _together(one: SpaceMoments, two: SpaceMoments) -> SpaceMoments:
    """The moments of the tokens of both."""
    tokens = one.tokens + two.tokens
    share, apart = two.tokens / tokens, two.mean - one.mean
    covariance = (1 - share) * one.covariance + share * two.covariance
    covariance += share * (1 - share) * np.outer(apart, apart)
    return SpaceMoments(tokens, one.mean + share * apart, covariance, one.widths)


def _told(widths: Sequence[int]) -> str:
    return " and ".join(map(str, widths))


# --- files --------------------------------------------------------------------------------------------------------


def _other(file: SafetensorsFile) -> str:
    """What a file holds in place of joint moments, and the way out."""
    out = "collect joint moments by cfmerge.activations.collect_joint_linen or collect_joint_nnx, or by Moments.add"
    if file.metadata.get("holds") == "input_gram":
        return f"input Grams, each of one model, which do not say how the features of two models vary together; {out}"
    found = and_more([repr(name) for name in file.tensors]) if file.tensors else "nothing"
    return f"no joint moments, but {found}; {out}"


def _read(file: SafetensorsFile, space: str, widths: tuple[int, ...], models: int) -> SpaceMoments:
    """The moments of one space in a file."""
    where, size = f"{file.path}: space {space!r}", sum(widths)
    if len(widths) != models:
        raise CfmergeError(f"{where}: it has the widths of {len(widths)} models, and the file is of {models}")
    missing = [f"{space}:{part}" for part in PARTS if f"{space}:{part}" not in file.tensors]
    if missing:
        raise CfmergeError(f"{where}: tensor {and_more([repr(name) for name in missing])} is missing; save it again")
    for part, shape in zip(PARTS, ((), (size,), (size, size)), strict=True):
        found = file.tensors[f"{space}:{part}"].shape
        if found != shape:
            raise CfmergeError(
                f"{where}: {part} has shape {found}, expected {shape}: the widths {'+'.join(map(str, widths))} are "
                f"{size} features"
            )
    tokens, mean, covariance = (np.asarray(file.read(f"{space}:{part}"), np.float64) for part in PARTS)
    if not (np.isfinite(mean).all() and np.isfinite(covariance).all()):
        raise CfmergeError(f"{where}: its moments hold a NaN or an infinity; collect them again")
    if tokens < 1 or (np.diagonal(covariance) < 0).any():
        raise CfmergeError(f"{where}: {int(tokens)} tokens, or a negative variance; the file is no moments' file")
    return SpaceMoments(int(tokens), mean, covariance, widths)
