"""Brax' bare environments as worlds: without its wrappers, which start over by themselves."""

from __future__ import annotations

from typing import Any

import jax
from flax import struct

from grpo_jax.spaces import Box, Space
from grpo_jax.types import Observation, PyTree, Step
from grpo_jax.worlds.base import World, strong
from grpo_jax.worlds.classic import TimeLimited
from grpo_jax.worlds.suites import box, floats, fresh_key, load, making, once, settled


@struct.dataclass
class BraxWorld(World):
    """An environment of Brax, or one with its interface; its state is Brax' ``State``.

    Attributes:
      env: the bare environment.
      observation: the entry that is seen where observations are a dict; None: they are one array.
      observation_space: static.
      action_space: static.
    """

    env: Any = struct.field(pytree_node=False)
    observation: str | None = struct.field(pytree_node=False)
    observation_space: Space = struct.field(pytree_node=False)
    action_space: Box = struct.field(pytree_node=False)

    def reset(self, key: jax.Array) -> tuple[Observation, PyTree]:
        state = strong(self.env.reset(key))
        return self._see(state), state

    def step(self, key: jax.Array, state: PyTree, action: jax.Array) -> Step:
        old = jax.tree.map(lambda leaf: leaf, state)  # new dicts: step() writes into those that it is given
        if "rng" in old.info:  # of noise, commands and pushes
            old.info["rng"] = fresh_key(old.info["rng"], key)
        new = self.env.step(old, action)
        return settled(state, self._see(new), new, new.reward, new.done, False)

    def _see(self, state: PyTree) -> jax.Array:
        return floats(state.obs if self.observation is None else state.obs[self.observation])


def wrap(env: Any, episode_length: int, observation: str | None = None) -> TimeLimited:
    """The world of a bare environment with Brax' interface, whose episodes are cut after ``episode_length`` steps.

    Raises:
      ValueError: ``episode_length`` is no integer of at least 1.
    """
    if isinstance(episode_length, bool) or not isinstance(episode_length, int) or episode_length < 1:
        raise ValueError(f"episode_length={episode_length!r} must be an integer of at least 1")
    seen = jax.eval_shape(env.reset, jax.random.key(0)).obs
    space = box((seen if observation is None else seen[observation]).shape)
    world = BraxWorld(env, observation, space, box((env.action_size,), -1, 1))
    return TimeLimited(world, episode_length)


def ids() -> tuple[str, ...]:
    """Brax' environments."""
    return tuple(load("brax.envs", "brax")._envs)


def from_id(name: str, *, episode_length: int = 1000, **options: Any) -> TimeLimited:
    """The world of an environment.

    Args:
      name: as Brax has it, such as ``"ant"``.
      episode_length: steps of an episode, a truncation.
      options: of its constructor, such as ``backend="spring"``.
    """
    return wrap(_environment(name, **options), episode_length)


@once
def _environment(name: str, **options: Any) -> Any:
    with making(f"brax/{name}"):
        return load("brax.envs", "brax").get_environment(name, **options)
