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

PERSISTENCE, EXPLORED, SILENT = 0.8, 10_000, 10
"""Sampled actions persist with this probability at first, and ever less until so many decision steps are done; enumerated
ones do from when in so many rollouts few groups differed, and none did before.

MountainCarContinuous-v0 finds its goal so (90 after 10,000 steps, where it stood still without) and so does MountainCar-v0
(-122 after 60,000, where it stayed at -200); Pendulum-v1 loses nothing; CartPole-v1 and Acrobot-v1 would, and differ in time: with four
rollouts in place of ten two of five seeds of Acrobot-v1 did not, and stood at -150.
"""

Pace = dict[str, Any]
"""``spread``, that of the last iteration's groups, and ``largest`` of all; whether a critic is used only where groups do
not differ (``critic_if_silent``), whether the last ones did not (``is_silent``), whether any did (``has_spoken``), and in
how many rollouts before they did not (``n_silent``)."""


def start() -> Pace:
    """That of a run in which nothing was compared yet."""
    flags = dict.fromkeys(("critic_if_silent", "is_silent", "has_spoken"), False)
    return {"spread": 0.0, "largest": 0.0, "n_silent": 0, **flags}


def persistence(pace: Pace, n_decisions: int, is_sampled: bool) -> float | None:
    """With which probability an action persists after so many decision steps, where nobody said."""
    if is_sampled:  # 0.0 in the end: None would compile anew
        return PERSISTENCE * max(0.0, 1.0 - n_decisions / EXPLORED)
    return PERSISTENCE if stays_silent(pace) else None


def paced(config: GRPOConfig, pace: Pace) -> GRPOConfig:
    """The settings of the next iteration."""
    if pace["largest"] > 0:
        share = min(1.0, STEEPNESS * pace["spread"] / pace["largest"])
        config = config.replace(learning_rate=float(config.learning_rate) * share)  # type: ignore[arg-type]
    if pace["critic_if_silent"]:
        config = config.replace(bootstrap=pace["is_silent"] and not pace["has_spoken"])
    return config


def stays_silent(pace: Pace) -> bool:
    """Whether so many rollouts had nothing to tell at first that actions persist from then on."""
    n_silent: int = pace.get("n_silent", 0)
    return n_silent >= SILENT


def noted(config: GRPOConfig, pace: Pace, metrics: Any) -> Pace:
    """The pace after an update with ``config``, by its ``metrics``."""
    spread, few = float(metrics["group_spread"]), float(metrics["frac_zero_std"]) > 1.0 - FEW
    is_silent = few and pace["critic_if_silent"] and not config.bootstrap
    return pace | {
        "spread": spread,
        "largest": max(pace["largest"], spread),
        "is_silent": is_silent,
        "n_silent": pace.get("n_silent", 0) + (is_silent and not pace["has_spoken"]),
        "has_spoken": pace["has_spoken"] or not (few or config.bootstrap),
    }
