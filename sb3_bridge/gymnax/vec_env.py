"""gymnax as an SB3 VecEnv: all environments are stepped in one compiled program."""

from __future__ import annotations

import functools
import os
import time
from collections.abc import Callable, Sequence
from typing import Any

import gymnasium
import jax
import jax.numpy as jnp
import numpy as np
from stable_baselines3.common.monitor import Monitor, ResultsWriter
from stable_baselines3.common.vec_env.base_vec_env import VecEnv, VecEnvIndices, VecEnvObs, VecEnvStepReturn

from grpo_jax.noise import KEY_WORDS
from grpo_jax.training.rollout import start, step_environments
from grpo_jax.types import Environments, Observation
from grpo_jax.worlds.base import World
from sb3_bridge.gymnax.env import (
    RENDER_FPS,
    Renderer,
    check_options,
    check_render_mode,
    make_world,
    next_key,
    seed_words,
)
from sb3_bridge.gymnax.spaces import to_gymnasium, to_numpy, to_world_actions


class GymnaxVecEnv(VecEnv):
    """N gymnax environments with SB3's interface and, on top, SB3's ``Monitor``.

    It behaves as ``make_vec_env("gymnax/<id>", n_envs, seed)`` does, the same seeds give the same episodes, in one
    device program a step instead of N. Environments start over by themselves; the end of an episode has
    ``terminal_observation``, ``TimeLimit.truncated`` (True where only the time limit ended it) and
    ``episode = {"r", "l", "t"}`` in its info. Episode returns count the task's own reward, also where
    ``grpo_jax.make(..., reward_function=...)`` replaced what ``step`` returns.

    Args:
      env: a gymnax id, a bare gymnax ``Environment`` or a ``grpo_jax`` World.
      n_envs: how many.
      seed: environment ``i`` gets ``seed + i`` at the first reset, as by :meth:`seed`; None: unpredictable ones.
      render_mode: None or ``"rgb_array"``; ``render("human")`` shows the latter in a window.
      monitor_dir: where to write ``0.monitor.csv``, which SB3's ``results_plotter`` reads; None: nowhere.

    Attributes:
      world: the world that is stepped. Immutable and shared by all environments.
      spec: Gymnasium's ``EnvSpec`` of ``gymnax/<id>`` where env is an id, else None.

    Raises:
      ValueError, TypeError: what is wrong with which argument, and the fix.
    """

    def __init__(
        self,
        env: Any,
        n_envs: int = 1,
        seed: int | None = None,
        render_mode: str | None = None,
        monitor_dir: str | os.PathLike[str] | None = None,
    ):
        if isinstance(n_envs, bool) or not isinstance(n_envs, int | np.integer) or n_envs < 1:
            raise ValueError(f"n_envs={n_envs!r} must be an integer of at least 1")
        check_render_mode(render_mode)
        self.world: World = make_world(env)
        self.spec = gymnasium.registry.get(f"gymnax/{env}") if isinstance(env, str) else None
        self.render_mode = render_mode
        self._attributes: list[dict[str, Any]] = [{} for _ in range(n_envs)]
        super().__init__(
            int(n_envs),
            to_gymnasium(self.world.observation_space),
            to_gymnasium(self.world.action_space),
        )
        self.metadata: dict[str, Any] = {**self.metadata, "render_fps": RENDER_FPS}
        self._words: np.ndarray | jax.Array | None = None
        self._environments: Environments | None = None
        self._pending: Callable[[], Environments] | None = None
        self._actions: np.ndarray | None = None
        self._renderer: Renderer | None = None
        self._start_time = time.time()
        self._results: ResultsWriter | None = None
        if monitor_dir is not None:
            name = self.spec.id if self.spec else str(env)
            header: dict[str, float | str] = {"t_start": self._start_time, "env_id": name}
            self._results = ResultsWriter(os.path.join(monitor_dir, "0"), header=header)
        if seed is not None:
            self.seed(seed)

    @property
    def environments(self) -> Environments:
        """Where the environments stand, on the device: every leaf ``[n_envs, ...]``.

        For training that steps the same environments on the device: read it, go on from there with
        ``self.world``, and write back what comes out; ``step`` then continues from that. Both directions copy,
        because ``step`` donates its own buffers.

        Raises:
          RuntimeError: before the first reset.
          ValueError: written with another structure, shape or dtype.
        """
        return jax.tree.map(jnp.copy, self._started("environments was read"))

    @environments.setter
    def environments(self, environments: Environments) -> None:
        like = self._started("environments was written")
        given: Any = jax.tree.structure(environments)
        if given != jax.tree.structure(like):
            raise ValueError(
                f"environments has the structure {given}, this world's is {jax.tree.structure(like)}"
            )
        for (path, leaf), expected in zip(
            jax.tree_util.tree_flatten_with_path(environments)[0], jax.tree.leaves(like), strict=True
        ):
            if leaf.shape != expected.shape or leaf.dtype != expected.dtype:
                raise ValueError(
                    f"environments{jax.tree_util.keystr(path)} is {leaf.dtype}{list(leaf.shape)}, expected"
                    f" {expected.dtype}{list(expected.shape)} for n_envs={self.num_envs}"
                )
        self._environments = jax.tree.map(jnp.copy, environments)

    @property
    def writes_episodes(self) -> bool:
        """Whether a ``monitor.csv`` is kept."""
        return self._results is not None

    def write_episode(self, episode: dict[str, Any]) -> None:
        """Writes an episode ``{"r", "l", "t"}`` to ``monitor.csv``, if one is kept."""
        if self._results is not None:
            self._results.write_row(episode)

    def seconds(self) -> float:
        """Since this object was made, as Monitor counts them."""
        return round(time.time() - self._start_time, 6)

    def lend(self) -> Environments:
        """``environments`` without a copy: for programs that do not donate them, until the next ``step``."""
        return self._started("lend() was called")

    def move_to(self, where: Callable[[], Environments]) -> None:
        """Puts the environments where ``where()`` says, which is asked only once somebody wants to know."""
        self._pending = where

    def seed(self, seed: int | None = None) -> Sequence[int | None]:
        """Seeds environment ``i`` with ``seed + i``, from the next reset on; None: with random numbers of NumPy.

        Returns:
          The seeds.

        Raises:
          ValueError: not a seed.
        """
        if seed is not None:
            seed_words(seed)
            seed = int(seed)
        return super().seed(seed)

    def reset(self) -> VecEnvObs:
        """Starts all episodes anew; without a new seed the streams of random numbers go on.

        Returns:
          Observations ``[n_envs, ...]``, a dict of them for a Dict space.

        Raises:
          ValueError: :meth:`set_options` gave some, for which gymnax has no use.
        """
        for options in self._options:
            check_options(options)
        words = self._fresh_words() if self._words is None else np.array(self._words)
        for index, seed in enumerate(self._seeds):
            if seed is not None:
                words[index] = seed_words(seed)
        self._words, environments = _reset(self.world, words)
        self._environments, self._pending = environments, None
        self._actions = None
        self.reset_infos = [{} for _ in range(self.num_envs)]
        self._reset_seeds()
        self._reset_options()
        return to_numpy(self.observation_space, environments.observation)

    def step_async(self, actions: np.ndarray) -> None:
        """Takes the actions ``[n_envs, ...]``.

        Raises:
          RuntimeError: before the first reset.
          ValueError, TypeError: actions of the wrong shape, dtype or range.
        """
        self._started("step() was called")
        self._actions = to_world_actions(self.action_space, actions, (self.num_envs,))

    def step_wait(self) -> VecEnvStepReturn:
        """Steps.

        Returns:
          Observations ``[n_envs, ...]`` (the first of the next episode where one ended), rewards float32
          ``[n_envs]``, dones bool ``[n_envs]``, infos.

        Raises:
          RuntimeError: without :meth:`step_async` before.
        """
        if self._actions is None:
            raise RuntimeError("step_wait() was called without actions: call step_async(actions) first")
        actions, self._actions = self._actions, None
        self._words, environments, reward, ended, cut, final = _step(
            self.world, self._words, self._started("step() was called"), actions
        )
        self._environments = environments
        observations = to_numpy(self.observation_space, environments.observation)
        dones = np.array(ended)
        infos: list[dict[str, Any]] = [{"TimeLimit.truncated": False} for _ in range(self.num_envs)]
        if dones.any():
            self._tell_ends(infos, np.flatnonzero(dones), cut, final)
        return observations, np.array(reward, np.float32), dones, infos

    def _tell_ends(
        self, infos: list[dict[str, Any]], indices: np.ndarray, cut: jax.Array, final: Observation
    ) -> None:
        """Writes the ends of episodes into their infos; only then is any of this fetched from the device."""
        assert self._environments is not None
        truncated = np.asarray(cut)
        returns = np.asarray(self._environments.last_return)
        lengths = np.asarray(self._environments.last_length)
        final = to_numpy(self.observation_space, final)
        seconds = self.seconds()
        for index in indices.tolist():
            infos[index] = {
                "TimeLimit.truncated": bool(truncated[index]),
                "terminal_observation": jax.tree.map(lambda leaf, i=index: leaf[i].copy(), final),
                "episode": {"r": round(float(returns[index]), 6), "l": int(lengths[index]), "t": seconds},
            }
            self.reset_infos[index] = {}
            self.write_episode(infos[index]["episode"])

    def get_images(self) -> Sequence[np.ndarray | None]:
        """Pictures uint8 ``[height, width, 3]`` of all environments.

        Raises:
          NotImplementedError: gymnax has no picture of this world.
          RuntimeError: before the first reset, or without ``render_mode="rgb_array"``.
        """
        return self._images(range(self.num_envs))

    def _images(self, indices: Sequence[int]) -> list[np.ndarray]:
        if self.render_mode is None:
            raise RuntimeError(
                "render_mode=None: pass render_mode='rgb_array' to GymnaxVecEnv to get pictures"
            )
        states = self._started("render() was called").state
        renderer = self._renderer = self._renderer or Renderer()
        return [renderer.frame(self.world, jax.tree.map(lambda leaf, i=i: leaf[i], states)) for i in indices]

    def close(self) -> None:
        """Frees the renderer and closes ``monitor.csv``; may be called twice."""
        if self._results is not None:
            self._results.close()
            self._results = None
        if self._renderer is not None:
            self._renderer.close()
            self._renderer = None

    def get_attr(self, attr_name: str, indices: VecEnvIndices = None) -> list[Any]:
        """What each environment has under this name: what :meth:`set_attr` put there, else an attribute of this object.

        Raises:
          AttributeError: nothing has that name.
        """
        chosen = self._indices(indices)
        if attr_name.startswith("_"):
            raise AttributeError(f"attr_name={attr_name!r} is private")
        return [
            self._attributes[i][attr_name] if attr_name in self._attributes[i] else getattr(self, attr_name)
            for i in chosen
        ]

    def set_attr(self, attr_name: str, value: Any, indices: VecEnvIndices = None) -> None:
        """Notes a value for :meth:`get_attr`. There are no environment objects which it could change.

        Raises:
          AttributeError: the name is an attribute that all environments share, so that setting it would only seem
            to work.
        """
        chosen = self._indices(indices)
        if attr_name in vars(self) or hasattr(type(self), attr_name):
            raise AttributeError(
                f"attr_name={attr_name!r} is shared by all environments of a GymnaxVecEnv and cannot be set; make a"
                " new one, with grpo_jax.make(env, params) for other parameters"
            )
        for index in chosen:
            self._attributes[index][attr_name] = value

    def env_method(
        self, method_name: str, *method_args: Any, indices: VecEnvIndices = None, **method_kwargs: Any
    ) -> list:
        """Calls ``render``, or a function that :meth:`set_attr` put there.

        Raises:
          AttributeError: anything else: there are no environment objects which could have methods.
        """
        chosen = self._indices(indices)
        if method_name == "render":
            return self._images(chosen)
        if not all(method_name in self._attributes[i] for i in chosen):
            raise AttributeError(
                f"method_name={method_name!r}: a GymnaxVecEnv has no environment objects with methods other than"
                " 'render'; make_vec_env('gymnax/<id>') has them"
            )
        return [self._attributes[i][method_name](*method_args, **method_kwargs) for i in chosen]

    def env_is_wrapped(
        self, wrapper_class: type[gymnasium.Wrapper], indices: VecEnvIndices = None
    ) -> list[bool]:
        """True for SB3's ``Monitor``, False for everything else.

        What callers want to know by asking for ``Monitor`` is whether ``info["episode"]`` has the true returns
        and lengths. It does: ``evaluate_policy`` may use them, and need not warn.
        """
        return [wrapper_class is Monitor for _ in self._indices(indices)]

    def _indices(self, indices: VecEnvIndices) -> list[int]:
        chosen = [int(i) for i in self._get_indices(indices)]
        for index in chosen:
            if not -self.num_envs <= index < self.num_envs:
                raise IndexError(f"indices={indices!r}: there are {self.num_envs} environments")
        return chosen

    def _started(self, what: str) -> Environments:
        if self._pending is not None:
            self._environments, self._pending = self._pending(), None
        if self._environments is None:
            raise RuntimeError(f"{what} before reset(): call reset() first")
        return self._environments

    def _fresh_words(self) -> np.ndarray:
        return np.random.default_rng().integers(2**32, size=(self.num_envs, KEY_WORDS), dtype=np.uint32)


@jax.jit
def _reset(world: World, words: jax.Array) -> tuple[jax.Array, Environments]:
    words, keys = jax.vmap(next_key)(words)
    return words, start(world, keys)


@functools.partial(jax.jit, donate_argnames=("words", "environments"))
def _step(
    world: World, words: jax.Array, environments: Environments, actions: jax.Array
) -> tuple[jax.Array, Environments, jax.Array, jax.Array, jax.Array, Observation]:
    """One step of all environments, those whose episode ends start over.

    Args:
      world: what is stepped.
      words: uint32 ``[N, 2]``, one stream of random numbers for each environment.
      environments: where they stand.
      actions: ``[N, ...]``.

    Returns:
      words, environments, reward ``[N]``, ended bool ``[N]``, cut bool ``[N]`` (ended by the time limit alone), and
      the observations reached, before any reset.
    """
    words, keys = jax.vmap(next_key)(words)
    fresh_words, reset_keys = jax.vmap(next_key)(words)
    environments, step = step_environments(world, environments, actions, keys, reset_keys)
    ended = step.terminated | step.truncated
    words = jnp.where(ended[:, None], fresh_words, words)
    return words, environments, step.reward, ended, step.truncated & ~step.terminated, step.observation
