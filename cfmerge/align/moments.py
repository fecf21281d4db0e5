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

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from cfmerge.align import moments_file
from cfmerge.align.space_moments import SpaceMoments, moments_of, together
from cfmerge.errors import CfmergeError, nearest

SMALLEST = 1e-7  # denominator of a correlation


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
        self._put(space, moments_of(np.concatenate(arrays, axis=1), widths))

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
        self._spaces[space] = together(self._spaces[space], joint) if space in self._spaces else joint

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
        moments_file.write(Path(path), self.models, self._spaces, overwrite)

    @staticmethod
    def load(path: str | Path) -> "Moments":
        """The moments that `save` wrote.

        Raises:
            CfmergeError: it is something else, a part of a space is missing or does not fit its widths, or holds NaN.
        """
        models, spaces = moments_file.read(Path(path))
        result = Moments(models)
        result._spaces.update(spaces)
        return result


def _told(widths: Sequence[int]) -> str:
    return " and ".join(map(str, widths))
