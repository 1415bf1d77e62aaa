"""The ids ``gymnax/<id>`` for ``gymnasium.make``.

Gymnasium 1.0 dropped the plugin entry points that registered a package's ids without an import: ids exist once
``sb3_bridge`` is imported, which ``gymnasium.make("sb3_bridge:gymnax/CartPole-v1")`` does by itself (as a process of
a SubprocVecEnv must, and as RL Zoo does with ``--gym-packages sb3_bridge``).
"""

from __future__ import annotations

import gymnasium

NAMESPACE = "gymnax"

IDS = (
    "CartPole-v1",
    "Pendulum-v1",
    "Acrobot-v1",
    "MountainCar-v0",
    "MountainCarContinuous-v0",
    "Asterix-MinAtar",
    "Breakout-MinAtar",
    "Freeway-MinAtar",
    "Seaquest-MinAtar",
    "SpaceInvaders-MinAtar",
    "Catch-bsuite",
    "DeepSea-bsuite",
    "MemoryChain-bsuite",
    "UmbrellaChain-bsuite",
    "DiscountingChain-bsuite",
    "SimpleBandit-bsuite",
    "FourRooms-misc",
    "MetaMaze-misc",
    "PointRobot-misc",
    "BernoulliBandit-misc",
    "GaussianBandit-misc",
    "Reacher-misc",
    "Swimmer-misc",
    "Pong-misc",
    "FrozenLake-misc",
)
"""``grpo_jax.env_ids()``, written out: asking gymnax would import it (1 s) for users who never make one."""


def register_envs() -> None:
    """Registers ``gymnax/<id>`` for every gymnax id that runs without a download; may be called twice.

    There is no ``max_episode_steps``: the worlds truncate by themselves, and Gymnasium's ``TimeLimit`` would count a
    second time.
    """
    for env_id in IDS:
        if f"{NAMESPACE}/{env_id}" not in gymnasium.registry:
            gymnasium.register(
                id=f"{NAMESPACE}/{env_id}",
                entry_point="sb3_bridge.gymnax.env:GymnaxEnv",
                kwargs={"env": env_id},
            )
