"""The return of a branch, defined once for all who follow branches: the device (``branch``) and the host.

R = sum_k gamma^k r_k over at most H steps, stopped by termination or truncation, plus gamma^K V(s_K) where the branch
was cut after K steps by the horizon or by truncation. Everything here uses operators and methods of arrays alone, so that
JAX's arrays and NumPy's are both welcome; shapes are any that broadcast.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from grpo_jax.config import Backup

Array = Any  # of JAX or of NumPy


def ends(terminated: Array, truncated: Array, past_truncation: bool) -> Array:
    """Whether a step ends its branch before the horizon; bool, of bools.

    Args:
      terminated: the task itself ended.
      truncated: a time limit cut the episode.
      past_truncation: whether branches go on where a time limit cuts the episode.
    """
    return terminated if past_truncation else terminated | truncated


def add_reward(
    total: Array,
    discount: Array | float,
    reward: Array,
    keep: Callable[[Array], Array] = lambda earned: earned,
) -> Array:
    """The return after one more step (or with the value of an open end): total + discount * reward.

    Args:
      total: what the branch earned so far, discounted.
      discount: gamma^k, after k steps.
      reward: of the step; or V(s_k) of the state where the branch was cut.
      keep: puts 0 in the place of what was earned in branches for which this does not count, NaN included.
    """
    return total + keep(discount * reward)


def open_end(terminated: Array) -> Array:
    """Whether the last step of a branch leaves something to be earned, which a critic values; bool.

    It does where the branch reached the horizon or was truncated, never where the task terminated, even if a time
    limit came at the same step.
    """
    return ~terminated


def back_up(totals: Array, backup: Backup, axis: int) -> Array:
    """One return for each candidate, from those of its branches along ``axis``: their mean, or (optimistic) maximum."""
    return totals.max(axis=axis) if backup == "max" else totals.mean(axis=axis)
