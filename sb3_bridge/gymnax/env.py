"""One gymnax environment as a ``gymnasium.Env``, what is behind ``gymnasium.make("gymnax/CartPole-v1")``."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable
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


class OfOneWorld:
    """What steps a world: its spaces and pictures, and copies that stand where the original does and go their own way.

    The world of an id is made again where the copy is unpickled; a deep copy shares it: worlds are immutable, and name
    the compiled programs. Renderers and files stay with the original.
    """

    world: World
    _env_id: str | None
    _words: np.ndarray | jax.Array | None = None
    _renderer: Renderer | None = None
    _is_masked: bool

    def _set_world(self, env: Any, render_mode: str | None) -> tuple[gymnasium.Space, gymnasium.Space]:
        """Observation and action space of the world, which it makes."""
        if render_mode not in (None, "rgb_array"):
            raise ValueError(
                f"render_mode={render_mode!r} must be None or 'rgb_array'; to watch, use 'rgb_array' with"
                " gymnasium.wrappers.HumanRendering or VecEnv.render('human')"
            )
        self.world, self.render_mode = make_world(env), render_mode
        self._env_id = env if isinstance(env, str) else None
        self._is_masked = _has_mask(self.world)
        return to_gymnasium(self.world.observation_space), to_gymnasium(self.world.action_space)

    @property
    def action_masks(self) -> Callable[[], np.ndarray]:
        """``action_masks()``: what is allowed now, bool ``[n]`` or ``[n_envs, n]``; not there where nothing is ever forbidden."""
        if not self._is_masked:
            raise AttributeError(f"{type(self).__name__} has no action_masks: {self.world} forbids no action")
        return self._masks

    def _masks(self) -> np.ndarray:
        raise NotImplementedError

    def _frame(self, state: PyTree) -> np.ndarray:
        self._renderer = self._renderer or Renderer()
        return self._renderer.frame(self.world, state)

    def close(self) -> None:
        """Frees the renderer; may be called twice."""
        if self._renderer is not None:
            self._renderer.close()
            self._renderer = None

    def __getstate__(self) -> dict[str, Any]:
        left_out = {"_renderer"} if self._env_id is None else {"_renderer", "world"}
        return {name: value for name, value in vars(self).items() if name not in left_out}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        if self._env_id is not None:
            self.world = make_world(self._env_id)

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        clone = memo[id(self)] = type(self).__new__(type(self))
        memo[id(self.world)] = self.world
        clone.__setstate__(copy.deepcopy(self.__getstate__(), memo))
        return clone


class GymnaxEnv(OfOneWorld, gymnasium.Env[Any, Any]):
    """A world that is stepped one transition at a time.

    Time limits are the world's own and come as truncations: do not add a ``TimeLimit``. For speed prefer
    :class:`sb3_bridge.WorldVecEnv`, which steps all environments in one program; both give the same episodes for
    the same seeds.

    Args:
      env: a gymnax id, a bare gymnax ``Environment`` or a ``grpo_jax`` World.
      render_mode: None or ``"rgb_array"``.

    Raises:
      ValueError, TypeError: what is wrong with which argument, and the fix.
    """

    metadata: dict[str, Any] = {"render_modes": ["rgb_array"], "render_fps": RENDER_FPS}  # noqa: RUF012 (as Gymnasium declares it)

    def __init__(self, env: Any, render_mode: str | None = None):
        self.observation_space, self.action_space = self._set_world(env, render_mode)
        self._state: PyTree | None = None
        self._is_over = False

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[Any, dict[str, Any]]:
        """Starts an episode; ``seed=None`` goes on with the present stream of random numbers."""
        check_options(options)
        words = self._words if seed is None else seed_words(seed)
        super().reset(seed=seed)
        if words is None:
            words = self.np_random.integers(2**32, size=KEY_WORDS, dtype=np.uint32)
        self._words, observation, self._state = _reset.of(owner_of(self.world))(self.world, words)
        self._is_over = False
        return to_numpy(self.observation_space, observation), {}

    def step(self, action: Any) -> tuple[Any, float, bool, bool, dict[str, Any]]:
        """One step; raises for an action of the wrong shape, dtype or range, and where a reset is needed."""
        if self._state is None or self._is_over:
            when = "before reset()" if self._state is None else "after an episode ended"
            raise gymnasium.error.ResetNeeded(f"step() was called {when}: call reset() first")
        action = to_world_actions(self.action_space, action)
        self._words, step = _step.of(owner_of(self.world))(self.world, self._words, self._state, action)
        self._state = step.state
        terminated, truncated = bool(step.terminated), bool(step.truncated)
        self._is_over = terminated or truncated
        observation = to_numpy(self.observation_space, step.observation)
        return observation, float(step.reward), terminated, truncated, {}

    def _masks(self) -> np.ndarray:
        if self._state is None:
            raise gymnasium.error.ResetNeeded("action_masks() was called before reset(): call reset() first")
        return np.array(_mask.of(owner_of(self.world))(self.world, self._state), bool)

    def render(self) -> np.ndarray | None:
        """A picture uint8 ``[height, width, 3]``, None without a render mode; see :class:`Renderer` for errors."""
        if self.render_mode is None:
            return None
        if self._state is None:
            raise gymnasium.error.ResetNeeded("render() was called before reset(): call reset() first")
        return self._frame(self._state)


_make_once = functools.lru_cache(maxsize=128)(grpo_jax.make)


def make_world(env: Any) -> World:
    """``grpo_jax.make``, which is run once for an id: worlds are immutable, and checking one takes a while."""
    return _make_once(env) if isinstance(env, str) else grpo_jax.make(env)


def _has_mask(world: World) -> bool:
    if type(world).action_mask is World.action_mask:
        return False
    states = jax.eval_shape(world.reset, jax.random.key(0))[1]
    return jax.eval_shape(world.action_mask, states) is not None


def check_options(options: dict[str, Any] | None) -> None:
    """Raises ValueError where reset options ask for something that we cannot do."""
    if options:
        raise ValueError(
            f"options={options!r}: gymnax environments have no reset options; set parameters with"
            " grpo_jax.make(env, params) and pass that world"
        )


def seed_words(seed: int) -> np.ndarray:
    """The words of a seed's PRNG key, uint32 ``[2]``; as ``jax.random.key(seed)``, for up to 64 bits."""
    if isinstance(seed, bool) or not isinstance(seed, int | np.integer) or not 0 <= int(seed) < 2**64:
        raise ValueError(f"seed={seed!r} must be an integer from 0 to 2**64 - 1, or None")
    return np.array([int(seed) >> 32, int(seed) & 0xFFFFFFFF], np.uint32)


def next_key(words: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Goes along a stream of random numbers: from words uint32 ``[2]`` to the next words and a typed key to consume."""
    # Words and not a typed key, which takes jit's slow path at every call.
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
_mask = OwnedJit(lambda world, state: world.action_mask(state))
