"""Brax' bare environments as worlds: without its wrappers, which start over by themselves."""

from __future__ import annotations

import functools
import os
import sys
from typing import Any

import jax
import numpy as np
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

    def picture(self, state: PyTree) -> np.ndarray:
        if hasattr(self.env, "sys"):
            model, moved = self.env.sys.mj_model, state.pipeline_state
            positions, velocities = moved.q, moved.qd
        else:
            model, moved = self.env.mj_model, state.data
            positions, velocities = moved.qpos, moved.qvel
        return _draw(model, moved, positions, velocities)

    def _see(self, state: PyTree) -> jax.Array:
        return floats(state.obs if self.observation is None else state.obs[self.observation])


def _draw(model: Any, moved: Any, positions: Any, velocities: Any) -> np.ndarray:
    """What MuJoCo's own renderer shows, without a window."""
    mujoco = load("mujoco", "brax")
    data = mujoco.MjData(model)
    data.qpos, data.qvel = positions, velocities
    for name in ("mocap_pos", "mocap_quat"):
        if getattr(moved, name, None) is not None and getattr(data, name).size:
            setattr(data, name, getattr(moved, name))
    mujoco.mj_forward(model, data)
    renderer = _renderer(model)
    renderer.update_scene(data, 0 if model.ncam else -1)
    picture: np.ndarray = renderer.render()
    return picture


@functools.lru_cache(maxsize=1)
def _renderer(model: Any) -> Any:
    """One is kept: to make one takes longer than to draw."""
    try:
        # GLFW without a screen ends the process at the second try.
        has_screen = sys.platform != "linux" or os.environ.get("DISPLAY") or os.environ.get("WAYLAND_DISPLAY")
        if "glfw" in load("mujoco.gl_context", "brax").GLContext.__module__ and not has_screen:
            raise RuntimeError("there is no screen")
        return load("mujoco", "brax").Renderer(model, height=240, width=320)
    except Exception as error:  # what a missing library raises depends on the library
        raise NotImplementedError(
            f"MuJoCo cannot draw here ({type(error).__name__}: {str(error).partition(chr(10))[0]}); without a window it"
            " needs the environment variable MUJOCO_GL=egl, or osmesa, before the start, and that library"
        ) from error


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
