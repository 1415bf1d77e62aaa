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

_LONGEST = jnp.iinfo(jnp.int32).max


class FunctionState(struct.PyTreeNode):
    """An observation and the number of steps since the reset (int32)."""

    observation: Observation
    time: jax.Array


@struct.dataclass
class FunctionWorld(World):
    """A world made of functions of observations; without a reward until ``override_reward`` gives it one.

    Attributes:
      transition: ``(state, action) -> next_state``, or ``-> (next_state, terminated)`` with bool ``[]`` or ``[1]``.
      initial_state: ``key -> state``.
      terminated: ``state -> bool``, another reason to end, judged on the state that is reached; or None.
      max_steps: time limit of an episode, in steps; a truncation. int32's largest number, or more, means none.
      observation_space: static.
      action_space: static.
    """

    transition: Callable[[Any, Any], Any] = struct.field(pytree_node=False)
    initial_state: Callable[[jax.Array], Any] = struct.field(pytree_node=False)
    terminated: Callable[[Any], Any] | None = struct.field(pytree_node=False)
    max_steps: int = struct.field(pytree_node=False)
    observation_space: Space = struct.field(pytree_node=False)
    action_space: ActionSpace = struct.field(pytree_node=False)

    def at(self, observation: Observation, time: jax.Array | None = None) -> FunctionState:
        """The state of visited observations.

        Args:
          observation: ``[..., *shape]``, a dict of such arrays for ``Dict``.
          time: steps since the reset, ``[...]`` or what broadcasts to it; None for 0.

        Returns:
          Leaves ``[..., *]``.
        """
        observation = _arrays(self.observation_space, observation)
        time = jnp.int32(0) if time is None else jnp.asarray(time, jnp.int32)
        return FunctionState(
            observation, jnp.broadcast_to(time, _leading(self.observation_space, observation))
        )

    def reset(self, key: jax.Array) -> tuple[Observation, FunctionState]:
        state = self.at(self.initial_state(key))
        return state.observation, state

    def step(self, key: jax.Array, state: FunctionState, action: jax.Array) -> Step:
        del key
        reached = self.transition(state.observation, action)
        if not isinstance(reached, tuple):
            reached = (reached, False)
        if len(reached) != 2:
            raise ValueError(
                f"transition returned a tuple of {len(reached)}, expected next_state or (next_state, terminated)"
            )
        observation, ended = _arrays(self.observation_space, reached[0]), _flag(reached[1])
        if self.terminated is not None:
            ended |= _flag(self.terminated(observation))
        time = jnp.minimum(state.time, _LONGEST - 1) + 1
        return Step(
            observation=observation,
            state=FunctionState(observation, time),
            reward=jnp.zeros((), jnp.result_type(float)),
            terminated=ended,
            truncated=(time >= self.max_steps) if self.max_steps < _LONGEST else jnp.bool_(False),
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
    """The world of a user's transition function.

    Args:
      transition: ``(state, action) -> next_state``, or ``-> (next_state, terminated)``, for one state, in JAX.
      initial_state: ``key -> state``.
      reward_function: see ``override_reward``.
      observation_space: of the states.
      action_space: of the actions.
      terminated: ``state -> bool``, another reason to end, judged on the state that is reached; or None.
      max_steps: time limit of an episode, in steps; a truncation. int32's largest number, or more, means none.

    Raises:
      TypeError: a function cannot be traced, or the transition changes the shape of a state.
      ValueError: ``max_steps`` below 1, a state or a reward of the wrong shape, or a reward that is not finite.
    """
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


def _leading(space: Space, observation: Observation) -> tuple[int, ...]:
    """Axes before those of the space."""
    while isinstance(space, Dict):
        name, space = space.spaces[0]
        observation = observation[name]
    return observation.shape[: observation.ndim - len(space.shape)]


def _flag(ended: Any) -> jax.Array:
    return jnp.asarray(ended, bool).reshape(())
