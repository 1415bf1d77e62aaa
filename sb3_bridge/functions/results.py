"""What a user's function must return, and how errors show it and its arguments."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np

Arguments = tuple[Any, ...]  # of a user's function; each an array, or a dict of arrays

_ARRAYS = (np.ndarray, np.generic, jax.Array, float, int, list)

# Of the kinds of dtypes: what they are called, and which kinds may be cast to them.
_KINDS = {
    "f": ("real numbers", "biuf"),
    "i": ("integers", "biu"),
    "u": ("integers", "biu"),
    "b": ("booleans", "b"),
}


class Unfit(ValueError):
    """The function returned, but not what its form must return."""


@dataclass(frozen=True)
class Output:
    """One array that a user's function must return for each sample.

    Attributes:
      name: what errors call it; empty for the only output of a function.
      shape: of one sample. A number ``[]`` may also come as ``[1]``.
      dtype: what the array is cast to. Real numbers take all but complex ones, integers take no real numbers, and
        booleans take only booleans.
    """

    name: str
    shape: tuple[int, ...]
    dtype: np.dtype

    def fit(self, part: Any, lead: tuple[int, ...] = (), asarray: Callable[[Any], Any] = np.asarray) -> Any:
        """What a user returned as an array ``[*lead, *shape]``, not cast yet; ``lead`` is ``(N,)`` for a batch.

        Raises:
          Unfit: no array, or of another shape or kind of number.
        """
        what, (noun, kinds) = f"{self.name} of " if self.name else "", _KINDS[self.dtype.kind]
        if hasattr(part, "detach"):
            part = part.detach().cpu()
            part = (part.double() if part.is_floating_point() else part).numpy()  # NumPy knows no bfloat16
        array = asarray(part) if isinstance(part, _ARRAYS) else None
        if array is None or array.dtype.kind not in kinds:
            got = type(part).__name__ if array is None else f"{array.dtype} numbers"
            raise Unfit(f"returned {what}{got}, expected one array of {noun}")
        shape = (*lead, *self.shape)
        # A batch of one may have lost its axis to a `squeeze()`.
        fits = array.shape == shape or (lead == (1,) and array.shape == self.shape)
        if not (fits or (self.shape == () and array.shape == (*lead, 1))):
            sizes = ", ".join([*("N" for _ in lead), *map(str, self.shape)])
            other = "" if self.shape else f" or [{'N, ' * len(lead)}1]"
            n = f" with N={lead[0]}" if lead else ""
            raise Unfit(f"returned {what}shape {list(array.shape)}, expected [{sizes}]{other}{n}")
        return array.reshape(shape)

    def shown(self, value: Any) -> str:
        """One sample's value as text."""
        return f"{self.name}={_text(value)}" if self.name else _text(value)


def length(arguments: Any, name: str = "transitions") -> int:
    """N of arrays ``[N, ...]``.

    Raises:
      ValueError: they differ in it, or have no axis.
    """
    lengths = {np.shape(leaf)[:1] for leaf in jax.tree.leaves(arguments)}
    if len(lengths) != 1 or lengths == {()}:
        raise ValueError(f"{name} must be arrays [N, ...] of one N, got shapes {shapes(arguments)}")
    return lengths.pop()[0]


def take(tree: Any, index: Any) -> Any:
    """Rows of every array."""
    return jax.tree.map(lambda leaf: leaf[index], tree)


def finite_rows(leaves: list[np.ndarray]) -> np.ndarray:
    """Which rows of all arrays ``[N, ...]`` are finite, bool ``[N]``."""
    return np.all([np.isfinite(leaf).reshape(len(leaf), -1).all(axis=1) for leaf in leaves], axis=0)


def differ(one: np.ndarray, many: np.ndarray, tolerance: float) -> np.ndarray:
    """Which of N samples differ by more than a part of their size, and a tenth of it of the largest; bool ``[N]``."""
    if one.dtype.kind == "f":
        finite = np.where(np.isfinite(one), np.abs(one), 0.0)
        allowed = tolerance * np.abs(many) + 0.1 * tolerance * np.maximum(1.0, np.max(finite, axis=0))
        differs = ~((np.abs(one - many) <= allowed) | np.isclose(one, many, 0.0, 0.0, equal_nan=True))
    else:
        # Rounding may take pixels one apart; all other integers are categories.
        differs = np.abs(one.astype(int) - many) > (one.dtype.kind == "u")
    return differs.reshape(len(one), -1).any(axis=1)


def shapes(tree: Any) -> str:
    """Shapes of arrays as text."""
    return str(jax.tree.map(lambda leaf: list(np.shape(leaf)), tree))


def shown(names: Sequence[str], arguments: Arguments, row: int) -> str:
    """One sample's arguments as text."""
    return ", ".join(f"{name}={_text(part)}" for name, part in zip(names, take(arguments, row), strict=True))


def first_line(error: Exception) -> str:
    """An error in one line; of ``Unfit`` only the message."""
    line = (str(error).strip().splitlines() or [""])[0]
    return line if isinstance(error, Unfit) else f"{type(error).__name__}: {line}"


def _text(tree: Any) -> str:
    if isinstance(tree, dict):
        return "{" + ", ".join(f"{name!r}: {_text(part)}" for name, part in tree.items()) + "}"
    text = np.array2string(np.asarray(tree), precision=6, separator=", ", threshold=64, edgeitems=2)
    return " ".join(text.split())
