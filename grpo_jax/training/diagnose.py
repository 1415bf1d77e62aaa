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
    """The groups of a run have nothing to tell: all candidates earn the same."""


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


def warn_without_spread(config: GRPOConfig, frac_zero_std: Any) -> None:
    """Warns where more than 99% of the groups had no spread, and says which parameter to change and why.

    Args:
      config: of the run.
      frac_zero_std: that metric of the first iterations, any shape.
    """
    share = float(np.mean(frac_zero_std))
    if share <= 0.99:
        return
    why = f"{share:.1%} of the groups had no spread so far: their candidates all earned the same return."
    if config.candidates == "trajectory":
        advice = "Raise group_size, or use a reward_function that tells the episodes of a group apart."
    elif config.candidates == "episodes":
        advice = (
            f"n_envs={config.n_envs} times n_steps={config.n_steps} must hold several whole episodes, with different"
            " rewards: raise n_steps, or use bootstrap=True (a critic values what the rollout cuts), or a"
            " reward_function that tells episodes apart."
        )
    else:
        advice = (
            f"A branch of horizon={config.horizon} steps ends before an action shows its consequence. Raise horizon"
            " to the number of steps until it does, or use bootstrap=True (a critic values the branch's end), or a"
            " reward_function that shows the consequence earlier."
        )
    warnings.warn(f"{why} Such groups teach nothing. {advice}", NoSpreadWarning, stacklevel=3)
