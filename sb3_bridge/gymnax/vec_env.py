"""gymnax as an SB3 VecEnv: all environments are stepped in one compiled program."""

from __future__ import annotations

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

from grpo_jax.cache import loop_jit
from grpo_jax.noise import KEY_WORDS
from grpo_jax.training.rollout import start, step_environments
from grpo_jax.types import Environments, Observation
from grpo_jax.worlds.base import World
from sb3_bridge.clones.core_state import ACTION_MASKS
from sb3_bridge.functions.programs import OwnedJit
from sb3_bridge.gymnax.env import RENDER_FPS, OfOneWorld, check_options, next_key, owner_of, seed_words
from sb3_bridge.gymnax.spaces import to_numpy, to_world_actions


class WorldVecEnv(OfOneWorld, VecEnv):
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
        self._attributes: list[dict[str, Any]] = [{} for _ in range(n_envs)]
        super().__init__(int(n_envs), *self._set_world(env, render_mode))
        self.spec = gymnasium.registry.get(f"gymnax/{self._env_id}")
        self.metadata: dict[str, Any] = {**self.metadata, "render_fps": RENDER_FPS}
        self._environments: Environments | None = None
        self._pending: Callable[[], Environments] | None = None
        self._actions: np.ndarray | None = None
        self._start_time = time.time()
        self._results: ResultsWriter | None = None
        if monitor_dir is not None:
            name = self.spec.id if self.spec else str(env)
            header: dict[str, float | str] = {"t_start": self._start_time, "env_id": name}
            self._results = ResultsWriter(os.path.join(monitor_dir, "0"), header=header)
        if seed is not None:
            self.seed(seed)

    @property
    def program_owner(self) -> World | None:
        """For ``OwnedJit.of``: what the compiled programs of the world live as long as; None: as the process."""
        return owner_of(self.world)

    @property
    def environments(self) -> Environments:
        """Where the environments stand, on the device: a copy, every leaf ``[n_envs, ...]``; see :meth:`move_to`."""
        return jax.tree.map(jnp.copy, self._started("environments was read"))

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
        """Puts the environments where ``where()`` says, which is asked only once somebody wants to know.

        ``step`` donates what it was given: copy what is to be used again.
        """
        self._pending = where

    def place(self) -> Callable[[], list[np.ndarray]]:
        """A function that fetches where the environments stand now: streams of random numbers, then leaves ``[n_envs, ...]``."""
        words, environments = np.array(self._words), self._started("place() was called")
        return lambda: [words, *jax.device_get([_data(leaf) for leaf in jax.tree.leaves(environments)])]

    def put(self, place: Sequence[np.ndarray]) -> None:
        """Brings environments that were reset to what ``place()()`` gave; one of another world or number is a ValueError."""
        leaves, structure = jax.tree.flatten(self._started("put() was called"))
        own: list[Any] = [self._words, *map(_data, leaves)]
        kinds = [[(leaf.shape, leaf.dtype) for leaf in one] for one in (own, place)]
        if kinds[0] != kinds[1]:
            raise ValueError("the place is one of another world, or of another number of environments")
        pairs = zip(leaves, place[1:], strict=True)
        self._words, self._pending, self._actions = jnp.asarray(place[0]), None, None
        self._environments = jax.tree.unflatten(structure, [_like(leaf, new) for leaf, new in pairs])

    def seed(self, seed: int | None = None) -> Sequence[int | None]:
        """Seeds environment ``i`` with ``seed + i``, from the next reset on; None: with random numbers of NumPy."""
        if seed is not None:
            seed_words(seed)  # raises if it is none
        return super().seed(None if seed is None else int(seed))

    def reset(self) -> VecEnvObs:
        """Starts all episodes anew; without a new seed the streams of random numbers go on."""
        for options in self._options:
            check_options(options)
        words = self._words
        if words is None:
            words = np.random.default_rng().integers(2**32, size=(self.num_envs, KEY_WORDS), dtype=np.uint32)
        seeds = zip(np.asarray(words), self._seeds, strict=True)
        words = np.stack([own if seed is None else seed_words(seed) for own, seed in seeds])
        self._words, environments = _reset.of(self.program_owner)(self.world, words)
        self._environments, self._pending, self._actions = environments, None, None
        self.reset_infos = [{} for _ in range(self.num_envs)]
        self._reset_seeds()
        self._reset_options()
        return to_numpy(self.observation_space, environments.observation)

    def step_async(self, actions: np.ndarray) -> None:
        """Takes the actions ``[n_envs, ...]``; raises where shape, dtype or range are wrong."""
        self._started("step() was called")
        self._actions = to_world_actions(self.action_space, actions, (self.num_envs,))

    def step_wait(self) -> VecEnvStepReturn:
        """Steps; observations are the first of the next episode where one ended, rewards are float32 ``[n_envs]``."""
        if self._actions is None:
            raise RuntimeError("step_wait() was called without actions: call step_async(actions) first")
        actions, self._actions = self._actions, None
        self._words, self._environments, reward, ended, cut, final = _step.of(self.program_owner)(
            self.world, self._words, self._started("step() was called"), actions
        )
        dones = np.array(ended)
        infos: list[dict[str, Any]] = [{"TimeLimit.truncated": False} for _ in range(self.num_envs)]
        if dones.any():  # only then is any of this fetched from the device
            final = to_numpy(self.observation_space, final)
            returns, lengths = self._environments.last_return, self._environments.last_length
            cut, returns, lengths = map(np.asarray, (cut, returns, lengths))
            seconds = self.seconds()
            for i in np.flatnonzero(dones):
                infos[i] = {
                    "TimeLimit.truncated": bool(cut[i]),
                    "terminal_observation": jax.tree.map(lambda leaf, i=i: leaf[i].copy(), final),
                    "episode": {"r": round(float(returns[i]), 6), "l": int(lengths[i]), "t": seconds},
                }
                self.reset_infos[i] = {}
                self.write_episode(infos[i]["episode"])
        observations = to_numpy(self.observation_space, self._environments.observation)
        return observations, np.array(reward, np.float32), dones, infos

    def __getstate__(self) -> dict[str, Any]:
        if self._pending is not None:
            self._started("it was copied")
        return {**super().__getstate__(), "_results": None}

    def get_images(self) -> Sequence[np.ndarray | None]:
        """Pictures uint8 ``[height, width, 3]`` of all environments; see :class:`Renderer` for errors."""
        return self._images(range(self.num_envs))

    def _images(self, indices: Sequence[int]) -> list[np.ndarray]:
        if self.render_mode is None:
            raise RuntimeError("render_mode=None: make the WorldVecEnv with render_mode='rgb_array'")
        states = self._started("render() was called").state
        return [self._frame(jax.tree.map(lambda leaf, i=i: leaf[i], states)) for i in indices]

    def _masks(self) -> np.ndarray:
        states = self._started("action_masks() was called").state
        return np.array(_mask.of(self.program_owner)(self.world, states), bool)

    def close(self) -> None:
        """Frees the renderer and closes ``monitor.csv``; may be called twice."""
        if self._results is not None:
            self._results.close()
            self._results = None
        super().close()

    def get_attr(self, attr_name: str, indices: VecEnvIndices = None) -> list[Any]:
        """What :meth:`set_attr` put there for each environment, else an attribute of this object."""
        if attr_name.startswith("_"):
            raise AttributeError(f"attr_name={attr_name!r} is private")
        own = [self._attributes[i] for i in self._indices(indices)]
        return [noted[attr_name] if attr_name in noted else getattr(self, attr_name) for noted in own]

    def set_attr(self, attr_name: str, value: Any, indices: VecEnvIndices = None) -> None:
        """Notes a value for :meth:`get_attr`, since there are no environment objects; raises for what all share."""
        chosen = self._indices(indices)
        if attr_name in vars(self) or hasattr(type(self), attr_name):
            raise AttributeError(
                f"attr_name={attr_name!r} is shared by all environments of a WorldVecEnv and cannot be set; make a"
                " new one, of grpo_jax.make(env, params) for other parameters"
            )
        for index in chosen:
            self._attributes[index][attr_name] = value

    def env_method(self, method_name: str, *args: Any, indices: VecEnvIndices = None, **kwargs: Any) -> list:
        """Calls ``render``, ``action_masks``, or a function that :meth:`set_attr` put there; there are no other methods."""
        chosen = self._indices(indices)
        if method_name == "render":
            return self._images(chosen)
        if method_name == ACTION_MASKS:
            return list(self.action_masks()[chosen])
        if not all(method_name in self._attributes[i] for i in chosen):
            raise AttributeError(
                f"method_name={method_name!r}: a WorldVecEnv has no environment objects with methods other than"
                " 'render'; make_vec_env('gymnax/<id>') has them"
            )
        return [self._attributes[i][method_name](*args, **kwargs) for i in chosen]

    def env_is_wrapped(self, wrapper_class: type[Any], indices: VecEnvIndices = None) -> list[bool]:
        """True for SB3's ``Monitor`` alone: ``info["episode"]`` has the true returns and lengths, as its does."""
        return [wrapper_class is Monitor for _ in self._indices(indices)]

    def _indices(self, indices: VecEnvIndices) -> list[int]:
        chosen = [int(i) for i in self._get_indices(indices)]
        if not all(-self.num_envs <= index < self.num_envs for index in chosen):
            raise IndexError(f"indices={indices!r}: there are {self.num_envs} environments")
        return chosen

    def _started(self, what: str) -> Environments:
        if self._pending is not None:
            where, self._pending = self._pending, None
            self._environments = where()
        if self._environments is None:
            raise RuntimeError(f"{what} before reset(): call reset() first")
        return self._environments


def _data(leaf: jax.Array) -> jax.Array:
    return jax.random.key_data(leaf) if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key) else leaf


def _like(leaf: jax.Array, data: Any) -> jax.Array:
    is_key = jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)
    return jax.random.wrap_key_data(data, impl=jax.random.key_impl(leaf)) if is_key else jnp.asarray(data)


def _start(world: World, words: jax.Array) -> tuple[jax.Array, Environments]:
    words, keys = jax.vmap(next_key)(words)
    return words, start(world, keys)


def _advance(
    world: World, words: jax.Array, environments: Environments, actions: jax.Array
) -> tuple[jax.Array, Environments, jax.Array, jax.Array, jax.Array, Observation]:
    """A step, after which ended episodes start over: words, environments, reward, ended, cut, observations before that."""
    words, keys = jax.vmap(next_key)(words)
    fresh_words, reset_keys = jax.vmap(next_key)(words)
    environments, step = step_environments(world, environments, actions, keys, reset_keys)
    ended = step.terminated | step.truncated
    words = jnp.where(ended[:, None], fresh_words, words)
    return words, environments, step.reward, ended, step.truncated & ~step.terminated, step.observation


_reset = OwnedJit(_start)
_mask = OwnedJit(lambda world, states: jax.vmap(world.action_mask)(states))
_step = OwnedJit(_advance, jit=loop_jit, donate_argnames=("words", "environments"))

GymnaxVecEnv = WorldVecEnv
"""The name that it had when all worlds were gymnax'."""
