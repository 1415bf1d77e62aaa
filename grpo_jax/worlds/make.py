"""One door to all worlds."""

from __future__ import annotations

from typing import Any

from grpo_jax.types import PyTree
from grpo_jax.worlds import gymnax
from grpo_jax.worlds.base import RewardFunction, World, check_world, override_reward


def make(env: Any, params: PyTree | None = None, *, reward_function: RewardFunction | None = None) -> World:
    """Makes a world out of whatever can be stepped purely.

    Args:
      env: a gymnax id (``"CartPole-v1"``), a bare gymnax ``Environment``, or a :class:`World`.
      params: ``EnvParams`` of a gymnax environment; None: its defaults.
      reward_function: ``(state, action, next_state) -> reward``, replaces the reward that GRPO maximises
        (see :func:`override_reward`); episode statistics go on counting the environment's own.

    Returns:
      A world, checked.

    Raises:
      ValueError, TypeError: what is wrong with which argument, and the fix.
    """
    if isinstance(env, World):
        if params is not None:
            raise ValueError(
                "params= is for gymnax environments; set a World's parameters on the World itself"
            )
        world = env
    elif isinstance(env, str):
        world = gymnax.from_id(env, params)
    else:
        world = gymnax.from_environment(env, params)
    check_world(world)
    return world if reward_function is None else override_reward(world, reward_function)
