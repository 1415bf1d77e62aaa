"""Diagnose: what the metrics of a run say is wrong, and what to change."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from typing import Any

import numpy as np

from grpo_jax.config import GRPOConfig

SPREAD_ITERATIONS = 10
"""Iterations without any spread that are worth a warning."""


class NoSpreadWarning(UserWarning):
    """There is nothing to learn from the groups of a run: their candidates all earn the same, or nearly so."""


def check_finite(metrics: Mapping[str, Any]) -> None:
    """Raises FloatingPointError where metrics say that losses, gradients or group returns were not finite."""
    n_updates = float(np.sum(metrics["nonfinite_updates"]))
    n_groups = float(np.sum(metrics["nonfinite_groups"]))
    if n_updates or n_groups:
        raise FloatingPointError(
            f"{n_groups:.0f} groups had a return that is NaN or inf and {n_updates:.0f} minibatches a loss or"
            " gradient that is not finite. They were left out of training. Check the reward (reward_function)"
            " and the world for divisions by zero, or lower learning_rate"
        )


def warn_without_spread(config: GRPOConfig, frac_zero_std: Any, frac_below_floor: Any = 0.0) -> None:
    """Warns where more than 99% of the groups had no spread, and says which parameter to change and why.

    Args:
      config: of the run.
      frac_zero_std: that metric of the first iterations, any shape.
      frac_below_floor: the same; of those groups, the ones whose candidates did differ, by less than the floor.
    """
    share, below = float(np.mean(frac_zero_std)), float(np.mean(frac_below_floor))
    if share <= 0.99:
        return
    if below > 0.01:
        what = (
            f"The candidates of {below:.1%} of the groups differed, but by no more than spread_floor="
            f"{_number(config.spread_floor)} times their largest return: such groups are left out"
            f" ({max(share - below, 0.0):.1%} of the groups were equal). If these differences are real, lower"
            " spread_floor (float32 can tell apart about 1e-6), or subtract the constant part of the reward."
        )
        warnings.warn(what, NoSpreadWarning, stacklevel=3)
        return
    why = f"{share:.1%} of the groups had no spread so far: their candidates all earned the same return."
    if config.candidates == "trajectory":
        advice = "Raise group_size, or use a reward_function that differs between the episodes of a group."
    elif config.candidates == "episodes":
        advice = (
            f"n_envs={config.n_envs} times n_steps={config.n_steps} must hold several whole episodes, with different"
            " rewards: raise n_steps, or use bootstrap=True (a critic values what the rollout cuts), or a"
            " reward_function that differs between episodes."
        )
    else:
        advice = (
            f"A branch of horizon={config.horizon} steps ends before an action shows its consequence. Raise horizon"
            " to the number of steps until it does, or use bootstrap=True (a critic values the branch's end), or a"
            " reward_function that shows the consequence earlier."
        )
    warnings.warn(f"{why} Such groups teach nothing. {advice}", NoSpreadWarning, stacklevel=3)


def _number(value: Any) -> str:
    """A traced setting that may be a number or an array."""
    return f"{float(np.mean(value)):g}"
