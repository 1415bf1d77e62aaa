"""Batches of host branches: rows put together, and a user's reward function that is asked for many at once."""

from __future__ import annotations

from typing import Any, Protocol

import jax
import numpy as np

_SMALLEST_BATCH = 16
_REWARD_BATCH = 4096  # transitions that a user's reward function gets in one call
_REWARD_BYTES = 1 << 25


class Rewards(Protocol):
    """A user's reward function."""

    @property
    def framework(self) -> str:
        """``"jax"``, where a batch of a new size is compiled."""
        ...

    def batch(self, states: Any, actions: Any, next_states: Any) -> np.ndarray:
        """Rewards float32 ``[n]`` of n transitions."""
        ...


class Pending:
    """Transitions whose rewards the user's function is still to be asked for: one call for many lock steps."""

    def __init__(self, reward: Rewards, totals: np.ndarray):
        self._reward, self._totals = reward, totals
        self._parts: list[tuple[np.ndarray, np.ndarray, Any, Any, Any]] = []
        self._n_rows = 0

    def add(self, branch: np.ndarray, discount: np.ndarray, origin: Any, action: Any, reached: Any) -> None:
        """Transitions from ``origin`` to ``reached``, as a reward function sees them."""
        self._parts.append((branch, discount, origin, action, reached))
        self._n_rows += len(branch)
        n_bytes = sum(leaf.nbytes for leaf in jax.tree.leaves(reached)) // len(branch) * self._n_rows
        if self._n_rows >= _REWARD_BATCH or n_bytes >= _REWARD_BYTES:
            self.ask()

    def ask(self) -> None:
        """Adds the rewards of all that waits to the totals."""
        if not self._parts:
            return
        branch, discount, *transitions = (concatenate(list(part)) for part in zip(*self._parts, strict=True))
        if self._reward.framework == "jax":  # compiles for every size; the others would only compute more
            rows = padded(np.arange(len(branch)))
            transitions = [rows_of(part, rows) for part in transitions]
        rewards = self._reward.batch(*transitions)[: len(branch)]
        np.add.at(self._totals, branch, discount * rewards)
        self._parts, self._n_rows = [], 0


def concatenate(parts: list[Any]) -> Any:
    """Trees ``[n_i, ...]`` as one ``[n, ...]``."""
    if len(parts) == 1:
        return parts[0]
    return jax.tree.map(lambda *leaves: np.concatenate(leaves), *parts)


def rows_of(tree: Any, rows: Any) -> Any:
    """Rows of a tree ``[n, ...]``."""
    return jax.tree.map(lambda leaf: np.asarray(leaf)[rows], tree)


def padded(rows: np.ndarray) -> np.ndarray:
    """Rows, the first one repeated up to a power of two: what is compiled by size is compiled a few times only."""
    size = max(_SMALLEST_BATCH, 1 << (len(rows) - 1).bit_length())
    return np.concatenate([rows, np.full(size - len(rows), rows[0])])
