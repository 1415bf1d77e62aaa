"""Craftax as worlds: without its auto-reset, and with its time limit told apart from death."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from flax import struct

from grpo_jax.spaces import ActionSpace, Space, from_gymnasium
from grpo_jax.types import PyTree, Step
from grpo_jax.worlds.base import World, strong
from grpo_jax.worlds.classic import NO_LIMIT
from grpo_jax.worlds.suites import floats, load, making, once, settled

IDS = (
    "Craftax-Symbolic-v1",
    "Craftax-Pixels-v1",
    "Craftax-Classic-Symbolic-v1",
    "Craftax-Classic-Pixels-v1",
)


@struct.dataclass
class CraftaxWorld(World):
    """A Craftax environment.

    Attributes:
      params: its ``EnvParams``; traced.
      env: the environment without auto-reset.
      observation_space: static.
      action_space: static.
    """

    params: PyTree
    env: Any = struct.field(pytree_node=False)
    observation_space: Space = struct.field(pytree_node=False)
    action_space: ActionSpace = struct.field(pytree_node=False)

    def reset(self, key: jax.Array) -> tuple[jax.Array, PyTree]:
        observation, state = strong(self.env.reset_env(key, self.params))
        return floats(observation), state

    def step(self, key: jax.Array, state: PyTree, action: jax.Array) -> Step:
        # Craftax calls its time limit an end like any other: it must not know it.
        endless = self.params.replace(max_timesteps=NO_LIMIT)
        observation, new, reward, done, _ = self.env.step_env(key, state, action, endless)
        is_late = new.timestep >= self.params.max_timesteps
        return settled(state, floats(observation), new, reward, done, is_late)

    def picture(self, state: PyTree) -> np.ndarray:
        return np.asarray(_renderer(type(self.env).__module__)(state)).astype(np.uint8)


@functools.cache
def _renderer(module: str) -> Callable[[PyTree], jax.Array]:
    """Draws a state of the environments of ``craftax.craftax`` or of ``craftax.craftax_classic``."""
    package = ".".join(module.split(".")[:2])
    size = load(f"{package}.constants", "craftax").BLOCK_PIXEL_SIZE_HUMAN
    return jax.jit(load(f"{package}.renderer", "craftax").make_craftax_pixel_renderer(size))


def ids() -> tuple[str, ...]:
    """Craftax' environments."""
    load("craftax.craftax_env", "craftax")
    return IDS


def from_id(name: str, *, params: PyTree = None, **options: Any) -> CraftaxWorld:
    """The world of an environment.

    Args:
      name: as Craftax has it, such as ``"Craftax-Classic-Symbolic-v1"``.
      params: its ``EnvParams``; None: the default ones.
      options: fields of ``EnvParams`` to replace, such as ``max_timesteps``.
    """
    env = _environment(name)
    params = strong((env.default_params if params is None else params).replace(**options))
    return CraftaxWorld(
        params,
        env,
        from_gymnasium(env.observation_space(params), "observation space"),
        from_gymnasium(env.action_space(params), "action space"),  # type: ignore[arg-type]
    )


@once
def _environment(name: str) -> Any:
    with making(f"craftax/{name}"):
        return load("craftax.craftax_env", "craftax").make_craftax_env_from_name(name, auto_reset=False)
