"""The command ``grpo-jax envs``."""

from __future__ import annotations

import grpo_jax
from grpo_jax import spaces
from grpo_jax.cli.progress import print_table
from grpo_jax.worlds.make import SUITES


def envs(suite: str) -> int:
    """Prints the environments of a suite; those of gymnax with their spaces and what to expect of their presets."""
    if suite != "gymnax":  # making one takes seconds
        print("\n".join(grpo_jax.env_ids(suite)))
        return 0
    rows, presets = [], grpo_jax.preset_ids()
    for env_id in grpo_jax.env_ids():
        world = grpo_jax.make(env_id)
        rows.append(
            (
                env_id,
                _describe(world.observation_space),
                _describe(world.action_space),
                f"{grpo_jax.preset_timesteps(env_id):,}" if env_id in presets else "-",
                *_expected(env_id),
            )
        )
    columns = ("id", "observations", "actions", "timesteps", "score", "sec")
    print_table(columns, rows)  # fits 80 characters
    print("timesteps: decision steps of the preset's run; -: no preset, the default settings")
    print("score, sec: median return to expect of it, sampled policy; seconds of training on one CPU core")
    print(f"--suite NAME lists those of another suite, where it is installed: {', '.join(SUITES)}")
    return 0


def _expected(env_id: str) -> tuple[str, str]:
    """Score and seconds to expect of the preset; "-" where they are not known."""
    expected = grpo_jax.preset_expectation(env_id)
    if expected is None:
        return "-", "-"
    score, seconds = expected
    digits = 0 if abs(score) >= 100 else 1 if abs(score) >= 10 else 2
    return f"{score:.{digits}f}", f"{seconds:.{1 if seconds < 100 else 0}f}"


def _describe(space: spaces.Space) -> str:
    content = (
        space.n if isinstance(space, spaces.Discrete | spaces.MultiBinary) else getattr(space, "shape", "")
    )
    return f"{type(space).__name__}({str(content).strip('(),').replace(' ', '')})"
