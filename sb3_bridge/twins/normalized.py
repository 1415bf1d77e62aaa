"""A twin behind VecNormalize: the policy sees what the wrapper would make of it, by the statistics of the moment."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from stable_baselines3.common.vec_env import VecNormalize

from grpo_jax.types import Observation, PyTree
from grpo_jax.worlds.base import Step, World, WrappedWorld


class Scale(NamedTuple):
    """``clip((x - mean) / deviation, -limit, limit)``; float32."""

    mean: np.ndarray
    deviation: np.ndarray
    limit: np.ndarray

    def __call__(self, x: jax.Array) -> jax.Array:
        return jnp.clip((x - self.mean) / self.deviation, -self.limit, self.limit).astype(jnp.float32)


@struct.dataclass
class Normalized(WrappedWorld):
    """A world as it is seen through VecNormalize; its states are those of the world.

    Attributes:
      world: the world underneath.
      observation: what becomes of an observation; None: nothing.
      reward: what becomes of a reward; None: nothing.
    """

    observation: Scale | None
    reward: Scale | None

    def action_mask(self, state: PyTree) -> jax.Array | None:
        return self.world.action_mask(state)

    def reset(self, key: jax.Array) -> tuple[Observation, PyTree]:
        observation, state = self.world.reset(key)
        return _scaled(self.observation, observation), state

    def step(self, key: jax.Array, state: PyTree, action: jax.Array) -> Step:
        step = self.world.step(key, state, action)
        return step.replace(
            observation=_scaled(self.observation, step.observation),
            reward=_scaled(self.reward, step.reward),
            task_reward=step.counted_reward,
        )


def normalized(world: World, normalizer: VecNormalize | None, is_own_reward: bool) -> World:
    """The world through a ``normalizer``; the user's reward function (not ``is_own_reward``) stays as it is."""
    if normalizer is None:
        return world

    def scale(mean: Any, variance: Any, limit: float) -> Scale:
        parts = mean, np.sqrt(variance + normalizer.epsilon), limit
        return Scale(*(np.asarray(part, np.float32) for part in parts))

    observed = paid = None
    if normalizer.norm_obs:
        seen: Any = normalizer.obs_rms
        observed = scale(seen.mean, seen.var, normalizer.clip_obs)
    if normalizer.norm_reward and is_own_reward:
        paid = scale(0.0, normalizer.ret_rms.var, normalizer.clip_reward)
    return Normalized(world, observed, paid)


def _scaled(scale: Scale | None, x: Any) -> Any:
    return x if scale is None else scale(x)
