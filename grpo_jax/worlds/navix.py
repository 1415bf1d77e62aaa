"""Navix' grids as worlds: their symbols are one-hot maps, and nothing that is only drawn is part of a state."""

from __future__ import annotations

from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct

from grpo_jax.spaces import Discrete, Space
from grpo_jax.types import PyTree, Step
from grpo_jax.worlds.base import World, strong
from grpo_jax.worlds.suites import box, fresh_key, load, making, once, one_hot, settled

SIZES = (11, 7, 5)
"""Tags, colours and states (directions included); the last colour and the last state stand for all unknown ones.

The locked doors of KeyCorridor have the state 254.
"""


@struct.dataclass
class NavixWorld(World):
    """A Navix environment; its state is a ``Timestep``.

    Attributes:
      env: it has its own time limit, ``max_steps``, which is a truncation.
      observation_space: static.
      action_space: static.
    """

    env: Any = struct.field(pytree_node=False)
    observation_space: Space = struct.field(pytree_node=False)
    action_space: Discrete = struct.field(pytree_node=False)

    def reset(self, key: jax.Array) -> tuple[jax.Array, PyTree]:
        first = strong(_slim(self.env.reset(key)))
        return _see(first), first

    def step(self, key: jax.Array, state: PyTree, action: jax.Array) -> Step:
        inner = state.state.replace(key=fresh_key(state.state.key, key))
        # step() starts over by itself at the step behind an end.
        new = self.env._step(state.replace(state=inner), action)
        return settled(state, _see(new), _slim(new), new.reward, new.is_termination(), new.is_truncation())

    def picture(self, state: PyTree) -> np.ndarray:
        tiles = load("navix.rendering.cache", "navix").RenderingCache.init(jnp.asarray(state.state.grid))
        return np.asarray(load("navix.observations", "navix").rgb(state.state.replace(cache=tiles)))


def _see(timestep: PyTree) -> jax.Array:
    largest = jnp.asarray(SIZES, timestep.observation.dtype) - 1
    return one_hot(jnp.minimum(timestep.observation, largest), SIZES)


def _slim(timestep: PyTree) -> PyTree:
    """Without the tiles that pictures are made of: nine tenths of a state."""
    return timestep.replace(state=timestep.state.replace(cache=None))


def ids() -> tuple[str, ...]:
    """Navix' environments."""
    return tuple(load("navix", "navix").registry())


def from_id(
    name: str, *, observation: Literal["symbolic", "symbolic_first_person"] = "symbolic", **options: Any
) -> NavixWorld:
    """The world of an environment.

    Args:
      name: as Navix has it, such as ``"Navix-DoorKey-5x5-v0"``.
      observation: the whole grid, or what the agent sees of it.
      options: of ``navix.make``: ``max_steps`` (100) and others.

    Raises:
      ValueError: another observation.
    """
    if observation not in ("symbolic", "symbolic_first_person"):
        raise ValueError(f"observation={observation!r} must be 'symbolic' or 'symbolic_first_person'")
    env = _environment(name, observation, **options)
    shape = jax.eval_shape(env.reset, jax.random.key(0)).observation.shape
    return NavixWorld(env, box((*shape[:2], sum(SIZES)), 0, 1), Discrete(len(env.action_set)))


@once
def _environment(name: str, observation: str, **options: Any) -> Any:
    navix = load("navix", "navix")
    with making(f"navix/{name}"):
        return navix.make(name, observation_fn=getattr(navix.observations, observation), **options)
