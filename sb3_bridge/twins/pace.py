"""How the settings of an update in a twin follow from how much the groups before it differed.

Normalised advantages say nothing of how large they were: with a policy that has learned a task, the few groups that
differ by chance would move it as far as all groups did at first, and it would never settle.
"""

from __future__ import annotations

from typing import Any

from grpo_jax.config import GRPOConfig

STEEPNESS = 30.0
"""The learning rate falls where groups differed, on average, by less than one part in so many of what they once did."""
FEW = 0.1
"""Share of the groups that differ below which a critic is asked as well, until there once were more."""

Pace = dict[str, float]
"""``spread``, that of the last iteration's groups; ``largest`` of all; ``is_silent``, ``has_spoken``: see ``FEW``; 0 or 1."""


def start() -> Pace:
    """That of a run in which nothing was compared yet."""
    return {"spread": 0.0, "largest": 0.0, "is_silent": 0.0, "has_spoken": 0.0}


def paced(config: GRPOConfig, pace: Pace, *, critic_if_silent: bool) -> GRPOConfig:
    """The settings of the next iteration; ``critic_if_silent``: a critic is used only where groups do not differ."""
    if pace["largest"] > 0:
        share = min(1.0, STEEPNESS * pace["spread"] / pace["largest"])
        config = config.replace(learning_rate=float(config.learning_rate) * share)  # type: ignore[arg-type]
    if critic_if_silent:
        config = config.replace(bootstrap=pace["is_silent"] > pace["has_spoken"])
    return config


def noted(config: GRPOConfig, pace: Pace, metrics: Any) -> Pace:
    """The pace after an update with ``config``, by its ``metrics``."""
    differ = 1.0 - float(metrics["frac_zero_std"])
    spread = float(metrics["group_spread"])
    has_spoken = pace["has_spoken"] or float(not config.bootstrap and differ >= FEW)
    is_silent = float(not config.bootstrap and differ < FEW)
    largest = max(pace["largest"], spread)
    return {"spread": spread, "largest": largest, "is_silent": is_silent, "has_spoken": has_spoken}
