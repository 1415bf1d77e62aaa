"""The ids ``gymnax/<id>`` for ``gymnasium.make``: once ``sb3_bridge`` is imported.

Gymnasium 1.0 has no plugins; ``gymnasium.make("sb3_bridge:gymnax/CartPole-v1")`` imports it, as a process of a
SubprocVecEnv must, and as RL Zoo does with ``--gym-packages sb3_bridge``.
"""

from __future__ import annotations

import gymnasium

from grpo_jax.presets import preset_ids
from grpo_jax.worlds.make import SUITES

NAMESPACE = "gymnax"


def world_id(env_id: str) -> str | None:
    """What ``grpo_jax.make`` takes for ``"gymnax/<id>"`` or an id of another suite; None for Gymnasium's own ids."""
    suite, slash, _ = env_id.partition("/")
    is_one = bool(slash) and suite in (NAMESPACE, *SUITES)
    return env_id.removeprefix(f"{NAMESPACE}/") if is_one else None


def register_envs() -> None:
    """Registers ``gymnax/<id>`` for every gymnax id that runs without a download; may be called twice."""
    for env_id in preset_ids():  # every id has a preset; to ask gymnax would import it (1 s)
        if "/" not in env_id and f"{NAMESPACE}/{env_id}" not in gymnasium.registry:
            # Without max_episode_steps: the worlds truncate by themselves.
            entry_point = "sb3_bridge.gymnax.env:GymnaxEnv"
            gymnasium.register(f"{NAMESPACE}/{env_id}", entry_point, kwargs={"env": env_id})
