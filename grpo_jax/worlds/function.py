"""A user's ``f(state, action) -> next_state`` as a world: the state is the observation."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import struct

from grpo_jax.spaces import ActionSpace, Box, Dict, Space
from grpo_jax.types import Observation, Step
from grpo_jax.worlds.base import RewardFunction, World, check_world, override_reward


class FunctionState(struct.PyTreeNode):
    """An observation and the number of steps since the reset (int32)."""

    observation: Observation
    time: jax.Array


@struct.dataclass
class FunctionWorld(World):
    """A world made of functions of observations; without a reward until ``override_reward`` gives it one.

    Attributes:
      transition: ``(state, action) -> next_state``.
      initial_state: ``key -> state``.
      terminated: ``state -> bool []``, or None where the task never ends.
      max_steps: time limit of an episode, in steps; a truncation.
      observation_space: static.
      action_space: static.
    """

    transition: Callable[[Any, Any], Any] = struct.field(pytree_node=False)
    initial_state: Callable[[jax.Array], Any] = struct.field(pytree_node=False)
    terminated: Callable[[Any], Any] | None = struct.field(pytree_node=False)
    max_steps: int = struct.field(pytree_node=False)
    observation_space: Space = struct.field(pytree_node=False)
    action_space: ActionSpace = struct.field(pytree_node=False)

    def reset(self, key: jax.Array) -> tuple[Observation, FunctionState]:
        observation = _arrays(self.observation_space, self.initial_state(key))
        return observation, FunctionState(observation, jnp.int32(0))

    def step(self, key: jax.Array, state: FunctionState, action: jax.Array) -> Step:
        del key
        observation = _arrays(self.observation_space, self.transition(state.observation, action))
        time = state.time + 1
        ended = False if self.terminated is None else self.terminated(observation)
        return Step(
            observation=observation,
            state=FunctionState(observation, time),
            reward=jnp.zeros((), jnp.result_type(float)),
            terminated=jnp.asarray(ended, bool).reshape(()),
            truncated=time >= self.max_steps,
        )


def from_function(
    transition: Callable[[Any, Any], Any],
    *,
    initial_state: Callable[[jax.Array], Any],
    reward_function: RewardFunction,
    observation_space: Space,
    action_space: ActionSpace,
    terminated: Callable[[Any], Any] | None = None,
    max_steps: int = 1000,
) -> World:
    """The world of a user's transition function; see :class:`FunctionWorld` for the arguments."""
    if max_steps < 1:
        raise ValueError(f"max_steps={max_steps} must be at least 1")
    world = FunctionWorld(transition, initial_state, terminated, max_steps, observation_space, action_space)
    check_world(world)
    return override_reward(world, reward_function)


def _arrays(space: Space, observation: Any) -> Observation:
    """What a user's function returns, as arrays; numbers of a real-valued box are never rounded to integers."""
    if isinstance(space, Dict):
        return {name: _arrays(part, observation[name]) for name, part in space.spaces}
    array = jnp.asarray(observation)
    if isinstance(space, Box):
        is_real = jnp.issubdtype(space.dtype, jnp.floating)
        return array.astype(jnp.result_type(float) if is_real else space.dtype)
    return array.astype(jnp.int32)
