"""Presets: settings that are known to work, by environment id; the numbers stand in ``presets.toml``."""

from __future__ import annotations

import functools
import tomllib
from importlib import resources
from typing import Any

from grpo_jax.config import GRPOConfig

DEFAULT_TIMESTEPS = 100_000
"""Decision steps of a run without a preset."""


def preset(env_id: str) -> GRPOConfig:
    """The preset of an environment id; the defaults where there is none."""
    settings = dict(_table().get(env_id, {}))
    settings.pop("total_timesteps", None)
    return GRPOConfig().replace(**settings)


def preset_timesteps(env_id: str) -> int:
    """Decision steps that the preset of an id is meant for."""
    return int(_table().get(env_id, {}).get("total_timesteps", DEFAULT_TIMESTEPS))


def preset_ids() -> list[str]:
    """The ids that have a preset."""
    return list(_table())


@functools.cache
def _table() -> dict[str, dict[str, Any]]:
    text = resources.files("grpo_jax").joinpath("presets.toml").read_text(encoding="utf-8")
    return tomllib.loads(text)
