"""Presets: settings that are known to work, by environment id; the numbers stand in ``presets.toml``."""

from __future__ import annotations

import functools
import tomllib
from importlib import resources
from typing import Any, NamedTuple

from grpo_jax.config import GRPOConfig

DEFAULT_TIMESTEPS = 100_000
"""Decision steps of a run without a preset."""

_OF_THE_RUN = ("total_timesteps", "expected_return", "expected_seconds")
"""What a preset says of the whole run; everything else but its family is a field of the config."""


class Expectation(NamedTuple):
    """What a preset's run came to when it was measured.

    Attributes:
      episode_return: median over seeds of the sampled policy's mean return after ``preset_timesteps``.
      seconds: CPU seconds of training on one core, compiling not counted.
    """

    episode_return: float
    seconds: float


def preset(env_id: str) -> GRPOConfig:
    """The preset of an environment id; the defaults where there is none."""
    entry = _table().get(env_id, {})
    return GRPOConfig().replace(**{name: value for name, value in entry.items() if name not in _OF_THE_RUN})


def preset_timesteps(env_id: str) -> int:
    """Decision steps that the preset of an id is meant for."""
    return int(_table().get(env_id, {}).get("total_timesteps", DEFAULT_TIMESTEPS))


def preset_expectation(env_id: str) -> Expectation | None:
    """The score and time to expect of the preset of an id; None where they were not measured."""
    entry = _table().get(env_id, {})
    if "expected_return" not in entry or "expected_seconds" not in entry:
        return None
    return Expectation(float(entry["expected_return"]), float(entry["expected_seconds"]))


def preset_ids() -> list[str]:
    """The ids that have a preset."""
    return list(_table())


@functools.cache
def _table() -> dict[str, dict[str, Any]]:
    """What each preset says, its family's settings included."""
    text = resources.files("grpo_jax").joinpath("presets.toml").read_text(encoding="utf-8")
    entries = tomllib.loads(text)
    families = entries.pop("families")
    return {env_id: families[entry.pop("family")] | entry for env_id, entry in entries.items()}
