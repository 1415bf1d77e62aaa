"""Presets: settings that are known to work, by environment id; the numbers stand in ``presets.toml``."""

from __future__ import annotations

import difflib
import functools
import tomllib
from importlib import resources
from typing import Any, NamedTuple

from grpo_jax.config import GRPOConfig

DEFAULT_TIMESTEPS = 100_000
"""Decision steps of a run without a preset, or whose preset does not say."""

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
    """The preset of an environment id.

    Raises:
      ValueError: there is none; names the ids that come near.
    """
    entry = _entry(env_id)
    return GRPOConfig().replace(**{name: value for name, value in entry.items() if name not in _OF_THE_RUN})


def preset_timesteps(env_id: str) -> int:
    """Decision steps that the preset of an id is meant for.

    Raises:
      ValueError: there is no preset.
    """
    return int(_entry(env_id).get("total_timesteps", DEFAULT_TIMESTEPS))


def preset_expectation(env_id: str) -> Expectation | None:
    """The score and time to expect of the preset of an id; None where they were not measured."""
    entry = _table().get(env_id, {})
    if "expected_return" not in entry or "expected_seconds" not in entry:
        return None
    return Expectation(float(entry["expected_return"]), float(entry["expected_seconds"]))


def preset_ids() -> list[str]:
    """The ids that have a preset."""
    return list(_table())


def _entry(env_id: str) -> dict[str, Any]:
    table = _table()
    if not isinstance(env_id, str) or env_id not in table:
        # "cartpole" is nearer to "CartPole-v1" without its version and in small letters.
        plain: dict[str, str] = {}
        for known in table:
            for name in (known, known.rpartition("-")[0] or known, known.rpartition("/")[2]):
                plain.setdefault(name.lower(), known)
        near = difflib.get_close_matches(str(env_id).lower(), plain, n=6, cutoff=0.5)
        ids = list(dict.fromkeys(plain[name] for name in near))[:3] or list(table)[:3]
        raise ValueError(
            f"env_id={env_id!r} has no preset; did you mean {', '.join(map(repr, ids))}? preset_ids() lists all."
            " For other environments set what they need yourself: grpo_jax.GRPOConfig(horizon=64, ...)"
        )
    return table[env_id]


@functools.cache
def _table() -> dict[str, dict[str, Any]]:
    """What each preset says, its family's settings included."""
    text = resources.files("grpo_jax").joinpath("presets.toml").read_text(encoding="utf-8")
    entries = tomllib.loads(text)
    families = entries.pop("families")
    return {env_id: families[entry.pop("family")] | entry for env_id, entry in entries.items()}
