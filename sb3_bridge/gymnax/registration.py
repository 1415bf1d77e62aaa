"""The ids ``gymnax/<id>`` for ``gymnasium.make``.

Gymnasium 1.0 dropped the plugin entry points that registered a package's ids without an import: ids exist once
``sb3_bridge`` is imported, which ``gymnasium.make("sb3_bridge:gymnax/CartPole-v1")`` does by itself (as a process of
a SubprocVecEnv must, and as RL Zoo does with ``--gym-packages sb3_bridge``).
"""

from __future__ import annotations

import gymnasium

from grpo_jax.presets import preset_ids

NAMESPACE = "gymnax"


def register_envs() -> None:
    """Registers ``gymnax/<id>`` for every gymnax id that runs without a download; may be called twice.

    There is no ``max_episode_steps``: the worlds truncate by themselves, and Gymnasium's ``TimeLimit`` would count a
    second time.
    """
    for env_id in preset_ids():  # every id has a preset; to ask gymnax would import it (1 s)
        if "/" not in env_id and f"{NAMESPACE}/{env_id}" not in gymnasium.registry:
            gymnasium.register(
                id=f"{NAMESPACE}/{env_id}",
                entry_point="sb3_bridge.gymnax.env:GymnaxEnv",
                kwargs={"env": env_id},
            )
