"""What a run in a twin does by itself: how its settings follow from how much groups differed, and from how long it has run.

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

PERSISTENCE, EXPLORED = 0.8, 10_000
"""Sampled actions persist with this probability at first, and ever less until so many decision steps are done.

MountainCarContinuous-v0 finds its goal so (90 after 10,000 steps, where it stood still without), Pendulum-v1 loses nothing.
"""

Pace = dict[str, Any]
"""``spread``, that of the last iteration's groups, and ``largest`` of all; whether a critic is used only where groups do
not differ (``critic_if_silent``), whether the last ones did not (``is_silent``), and whether any did (``has_spoken``)."""


def start() -> Pace:
    """That of a run in which nothing was compared yet."""
    flags = dict.fromkeys(("critic_if_silent", "is_silent", "has_spoken"), False)
    return {"spread": 0.0, "largest": 0.0, **flags}


def persistence(n_decisions: int) -> float:
    """With which probability an action persists after so many decision steps, where nobody said."""
    return PERSISTENCE * max(0.0, 1.0 - n_decisions / EXPLORED)


def paced(config: GRPOConfig, pace: Pace) -> GRPOConfig:
    """The settings of the next iteration."""
    if pace["largest"] > 0:
        share = min(1.0, STEEPNESS * pace["spread"] / pace["largest"])
        config = config.replace(learning_rate=float(config.learning_rate) * share)  # type: ignore[arg-type]
    if pace["critic_if_silent"]:
        config = config.replace(bootstrap=pace["is_silent"] and not pace["has_spoken"])
    return config


def noted(config: GRPOConfig, pace: Pace, metrics: Any) -> Pace:
    """The pace after an update with ``config``, by its ``metrics``."""
    spread, few = float(metrics["group_spread"]), float(metrics["frac_zero_std"]) > 1.0 - FEW
    return pace | {
        "spread": spread,
        "largest": max(pace["largest"], spread),
        "is_silent": pace["critic_if_silent"] and few and not config.bootstrap,
        "has_spoken": pace["has_spoken"] or not (few or config.bootstrap),
    }
