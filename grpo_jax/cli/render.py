"""Render: one episode of a policy as a GIF or a video, drawn by gymnax or by the environment's own suite."""

from __future__ import annotations

import contextlib
import ctypes.util
import functools
import os
import sys
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from grpo_jax.cli import video
from grpo_jax.groups.plan import Plan
from grpo_jax.noise import as_key, split
from grpo_jax.policies.policy import Policy, PolicyState
from grpo_jax.training.evaluate import play_step
from grpo_jax.training.loop import TrainState
from grpo_jax.types import Observation, PyTree
from grpo_jax.worlds.base import World
from grpo_jax.worlds.pictures import Renderer, caption, fps, write_gif

MAX_FRAMES = 500
"""Where longer episodes are cut."""


def without_window() -> None:
    """Keeps pygame and MuJoCo from looking for a screen; MuJoCo asks once, when it is imported, and must then find EGL."""
    for name in ("SDL_VIDEODRIVER", "SDL_AUDIODRIVER"):
        os.environ.setdefault(name, "dummy")
    is_headless = sys.platform == "linux" and not os.environ.get("DISPLAY")
    if is_headless and ctypes.util.find_library("EGL"):
        os.environ.setdefault("MUJOCO_GL", "egl")


def check(world: World, path: Path) -> None:
    """Finds out before the work whether an episode can be drawn.

    Raises:
      ValueError: there is no picture of this environment, or what draws it is missing, or the path is no ``.gif`` or
        ``.mp4`` in a directory that exists.
      ModuleNotFoundError: pygame is missing, or what writes a video.
    """
    if path.suffix.lower() not in (".gif", ".mp4"):
        raise ValueError(f"render={str(path)!r} must end in .gif or .mp4")
    if path.suffix.lower() == ".mp4":
        video.check()
    if not path.absolute().parent.is_dir():
        raise ValueError(f"render={str(path)!r} is in a directory that does not exist")
    without_window()
    import gymnasium

    try:
        with contextlib.closing(Renderer()) as renderer:
            renderer.frame(world, jax.device_get(jax.jit(world.reset)(as_key(jax.random.key(0)))[1]))
    except NotImplementedError as error:
        raise ValueError(f"render: {error}") from error
    except gymnasium.error.DependencyNotInstalled as error:
        raise ModuleNotFoundError(
            "render: this picture needs pygame: `pip install pygame`, or `pip install 'grpo-jax[render]'`"
        ) from error


def render(
    state: TrainState,
    world: World,
    key: jax.Array,
    path: Path,
    *,
    deterministic: bool = False,
    plan: Plan | None = None,
) -> tuple[int, float]:
    """Writes one episode, at most ``MAX_FRAMES`` pictures of it, as a GIF or a video; all or not at all.

    Args:
      state: a training state of a single seed.
      world: the world to play in.
      key: PRNG key.
      path: a ``.gif`` or ``.mp4`` file.
      deterministic: the most probable action (or the mean) instead of a sampled one.
      plan: acts by comparison; see ``evaluate``.

    Returns:
      The number of frames and the return up to the last of them.

    Raises:
      ValueError, ModuleNotFoundError: as :func:`check`.
    """
    check(world, path)
    states, returns = episode(state, world, key, deterministic=deterministic, plan=plan)
    with contextlib.closing(Renderer()) as renderer:
        frames = (
            caption(renderer.frame(world, state), f"step {step}, return {earned:.2f}")
            for step, (state, earned) in enumerate(zip(states, returns, strict=True), start=1)
        )
        write = video.write_mp4 if path.suffix.lower() == ".mp4" else write_gif
        n_frames = write(path, frames, fps(world))
    return n_frames, float(returns[-1])


def episode(
    state: TrainState,
    world: World,
    key: jax.Array,
    *,
    deterministic: bool = False,
    plan: Plan | None = None,
    max_frames: int = MAX_FRAMES,
) -> tuple[list[PyTree], np.ndarray]:
    """The world states of one episode, after each step, and the return up to each.

    Args:
      state: a training state of a single seed.
      world: the world to play in.
      key: PRNG key.
      deterministic: the most probable action (or the mean) instead of a sampled one.
      plan: acts by comparison; see ``evaluate``.
      max_frames: where to cut.
    """
    policy_state = state.learner.policy
    states, rewards, ended = jax.device_get(
        _play(state.policy, policy_state, world, as_key(key), deterministic, max_frames, plan)
    )
    length = int(np.argmax(ended)) + 1 if np.any(ended) else max_frames
    returns = np.cumsum(np.asarray(rewards[:length], np.float64))
    return [jax.tree.map(lambda leaf, i=i: leaf[i], states) for i in range(length)], returns


@functools.partial(jax.jit, static_argnames=("policy", "deterministic", "max_frames"))
def _play(
    policy: Policy,
    policy_state: PolicyState,
    world: World,
    key: jax.Array,
    deterministic: bool,
    max_frames: int,
    plan: Plan | None,
) -> tuple[PyTree, jax.Array, jax.Array]:
    """States, the rewards that led to them, and whether they are an end; ``[max_frames, ...]``."""
    reset_key, play_key = split(key, 2)

    def body(carry: tuple[Observation, PyTree, jax.Array], k: jax.Array) -> tuple[Any, Any]:
        observation, states, alive = carry
        step, _ = play_step(
            policy,
            policy_state,
            world,
            jax.random.fold_in(play_key, k),
            states,
            observation,
            deterministic=deterministic,
            plan=plan,
            alive=alive,
        )
        reward, ended = step.counted_reward, step.terminated | step.truncated
        shown = jax.tree.map(lambda leaf: leaf[0], (step.state, reward, ended))
        return (step.observation, step.state, alive & ~ended), shown

    first = jax.tree.map(lambda leaf: leaf[None], world.reset(reset_key))
    return jax.lax.scan(body, (*first, jnp.ones(1, bool)), jnp.arange(max_frames))[1]
