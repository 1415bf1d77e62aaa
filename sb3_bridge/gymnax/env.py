"""One gymnax environment as a ``gymnasium.Env``, what is behind ``gymnasium.make("gymnax/CartPole-v1")``."""

from __future__ import annotations

import copy
import functools
from typing import Any

import gymnasium
import jax
import numpy as np

import grpo_jax
from grpo_jax.noise import KEY_WORDS, bits_to_keys, draw_bits
from grpo_jax.types import Observation, PyTree, Step
from grpo_jax.worlds.base import World
from grpo_jax.worlds.pictures import Renderer
from sb3_bridge.functions.programs import OwnedJit
from sb3_bridge.gymnax.spaces import to_gymnasium, to_numpy, to_world_actions

RENDER_FPS = 30


class GymnaxEnv(gymnasium.Env[Any, Any]):
    """A world that is stepped one transition at a time.

    Time limits are the world's own and come as truncations: do not add a ``TimeLimit``. For speed prefer
    :class:`sb3_bridge.GymnaxVecEnv`, which steps all environments in one program; both give the same episodes for
    the same seeds.

    Args:
      env: a gymnax id, a bare gymnax ``Environment`` or a ``grpo_jax`` World.
      render_mode: None or ``"rgb_array"``.

    Raises:
      ValueError, TypeError: what is wrong with which argument, and the fix.
    """

    metadata: dict[str, Any] = {"render_modes": ["rgb_array"], "render_fps": RENDER_FPS}  # noqa: RUF012 (as Gymnasium declares it)

    def __init__(self, env: Any, render_mode: str | None = None):
        check_render_mode(render_mode)
        self.world = make_world(env)
        self.observation_space = to_gymnasium(self.world.observation_space)
        self.action_space = to_gymnasium(self.world.action_space)
        self.render_mode = render_mode
        self._words: np.ndarray | jax.Array | None = None
        self._state: PyTree | None = None
        self._is_over = False
        self._renderer: Renderer | None = None

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[Any, dict[str, Any]]:
        """Starts an episode; ``seed=None`` goes on with the present stream of random numbers.

        Raises:
          ValueError: options were given, for which gymnax has no use, or seed is not one.
        """
        check_options(options)
        words = None if seed is None else seed_words(seed)
        super().reset(seed=seed)
        if words is not None:
            self._words = words
        elif self._words is None:
            self._words = self.np_random.integers(2**32, size=KEY_WORDS, dtype=np.uint32)
        self._words, observation, self._state = _reset.of(owner_of(self.world))(self.world, self._words)
        self._is_over = False
        return to_numpy(self.observation_space, observation), {}

    def step(self, action: Any) -> tuple[Any, float, bool, bool, dict[str, Any]]:
        """One step.

        Raises:
          gymnasium.error.ResetNeeded: before the first reset, or behind the end of an episode.
          ValueError, TypeError: an action of the wrong shape, dtype or range.
        """
        if self._state is None:
            raise gymnasium.error.ResetNeeded("step() was called before reset(): call reset() first")
        if self._is_over:
            raise gymnasium.error.ResetNeeded(
                "step() was called behind the end of an episode: call reset() first"
            )
        action = to_world_actions(self.action_space, action)
        self._words, step = _step.of(owner_of(self.world))(self.world, self._words, self._state, action)
        self._state = step.state
        terminated, truncated = bool(step.terminated), bool(step.truncated)
        self._is_over = terminated or truncated
        observation = to_numpy(self.observation_space, step.observation)
        return observation, float(step.reward), terminated, truncated, {}

    def render(self) -> np.ndarray | None:
        """A picture uint8 ``[height, width, 3]``, None without a render mode; see :class:`Renderer` for errors."""
        if self.render_mode is None:
            return None
        if self._state is None:
            raise gymnasium.error.ResetNeeded("render() was called before reset(): call reset() first")
        self._renderer = self._renderer or Renderer()
        return self._renderer.frame(self.world, self._state)

    def close(self) -> None:
        """Frees the renderer; may be called twice."""
        if self._renderer is not None:
            self._renderer.close()
            self._renderer = None

    def __deepcopy__(self, memo: dict[int, Any]) -> GymnaxEnv:
        # The world is immutable and names the compiled programs: a copy of it would compile them again.
        memo[id(self.world)] = self.world
        clone = type(self).__new__(type(self))
        memo[id(self)] = clone
        for name, value in vars(self).items():
            setattr(clone, name, None if name == "_renderer" else copy.deepcopy(value, memo))
        return clone


def make_world(env: Any) -> World:
    """``grpo_jax.make``, which is run once for an id: worlds are immutable, and checking one takes a while."""
    return _world_of_id(env) if isinstance(env, str) else grpo_jax.make(env)


@functools.lru_cache(maxsize=128)
def _world_of_id(env_id: str) -> World:
    return grpo_jax.make(env_id)


def check_render_mode(render_mode: str | None) -> None:
    """Raises ValueError unless render_mode is one that we have."""
    if render_mode not in (None, "rgb_array"):
        raise ValueError(
            f"render_mode={render_mode!r} must be None or 'rgb_array'; to watch, use 'rgb_array' with"
            " gymnasium.wrappers.HumanRendering or VecEnv.render('human')"
        )


def check_options(options: dict[str, Any] | None) -> None:
    """Raises ValueError where reset options ask for something that we cannot do."""
    if options:
        raise ValueError(
            f"options={options!r}: gymnax environments have no reset options; set parameters with"
            " grpo_jax.make(env, params) and pass that world"
        )


def seed_words(seed: int) -> np.ndarray:
    """The words of a seed's PRNG key, uint32 ``[2]``; as ``jax.random.key(seed)``, for up to 64 bits.

    Raises:
      ValueError: not an integer from 0 to 2**64 - 1.
    """
    if isinstance(seed, bool) or not isinstance(seed, int | np.integer) or not 0 <= int(seed) < 2**64:
        raise ValueError(f"seed={seed!r} must be an integer from 0 to 2**64 - 1, or None")
    return np.array([int(seed) >> 32, int(seed) & 0xFFFFFFFF], np.uint32)


def next_key(words: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Goes one step along an environment's stream of random numbers.

    Args:
      words: uint32 ``[2]``. Words and not a typed key: those take jit's slow path at every call.

    Returns:
      The words to go on with, and a typed key to consume.
    """
    drawn = draw_bits(bits_to_keys(words), (2, KEY_WORDS))
    return drawn[0], bits_to_keys(drawn[1])


def owner_of(world: World) -> World | None:
    """For ``OwnedJit.of``: the world, if functions of the user are part of it; else its programs are everybody's."""
    parts = vars(world).values()
    is_own = any(callable(part) or (isinstance(part, World) and owner_of(part) is not None) for part in parts)
    return world if is_own else None


def _start(world: World, words: jax.Array) -> tuple[jax.Array, Observation, PyTree]:
    words, key = next_key(words)
    return words, *world.reset(key)


def _advance(world: World, words: jax.Array, state: PyTree, action: jax.Array) -> tuple[jax.Array, Step]:
    words, key = next_key(words)
    return words, world.step(key, state, action)


_reset, _step = OwnedJit(_start), OwnedJit(_advance)
