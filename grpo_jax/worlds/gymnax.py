"""gymnax environments as worlds: exact branching with ``step_env``, time limits as truncations."""

from __future__ import annotations

import functools
import importlib
import sys
from types import ModuleType
from typing import Any, cast

import jax
from flax import struct

from grpo_jax.spaces import ActionSpace, Space, from_gymnasium
from grpo_jax.types import Observation, PyTree, Step
from grpo_jax.worlds.base import World, strong
from grpo_jax.worlds.suites import settled, unknown_id

EXCLUDED = ("MNISTBandit-bsuite",)
"""Ids that need a download."""


@struct.dataclass
class GymnaxWorld(World):
    """A gymnax ``Environment`` with its parameters.

    Attributes:
      env: the bare environment (its wrappers forward ``step_env`` past themselves, so they are refused).
      params: its ``EnvParams``; traced, so physics can be vmapped over.
      observation_space: static.
      action_space: static.
    """

    params: PyTree
    env: Any = struct.field(pytree_node=False)
    observation_space: Space = struct.field(pytree_node=False)
    action_space: ActionSpace = struct.field(pytree_node=False)

    def reset(self, key: jax.Array) -> tuple[Observation, PyTree]:
        observation, state = strong(self.env.reset_env(key, self.params))
        return observation, state

    def step(self, key: jax.Array, state: PyTree, action: jax.Array) -> Step:
        # step_env knows no time limit and never resets; what it pays after the end is the caller's to mask.
        observation, next_state, reward, terminated, _ = self.env.step_env(key, state, action, self.params)
        truncated = self.env.is_truncated(strong(next_state, like=state), self.params)
        return settled(state, observation, next_state, reward, terminated, truncated)


class _Later(ModuleType):
    """Stands for a module until something of it is asked for."""

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        if sys.modules.get(self.__name__) is self:
            del sys.modules[self.__name__]
        return getattr(importlib.import_module(self.__name__), name)


def import_gymnax() -> ModuleType:
    """gymnax, without what only its pictures take.

    They are drawn with pyplot and seaborn, which bring pandas and SciPy's statistics: most of the time that gymnax takes to
    import. gymnax finds what stands for both, and loads them when it draws; everybody else imports them as ever.
    """
    if "gymnax" not in sys.modules:
        later = {name: _Later(name) for name in ("matplotlib.pyplot", "seaborn") if name not in sys.modules}
        sys.modules.update(later)
        try:
            import gymnax
        finally:
            for name, module in later.items():
                if sys.modules.get(name) is module:
                    del sys.modules[name]
    import gymnax

    environment = importlib.import_module("gymnax.environments.environment").Environment
    if not (hasattr(gymnax, "registered_envs") and hasattr(environment, "is_truncated")):
        raise ImportError(
            f"{gymnax.__file__} is not the gymnax that is needed: another package put its own files there"
            " (popgym-arcade does). Keep that package in another environment, and here run:"
            " pip install --force-reinstall --no-deps 'gymnax>=1.0.1,<2'"
        )
    return cast(ModuleType, gymnax)


def env_ids() -> list[str]:
    """The gymnax ids that run without a download."""
    return [env_id for env_id in import_gymnax().registered_envs if env_id not in EXCLUDED]


@functools.lru_cache(maxsize=128)
def _environment(env_id: str) -> Any:
    """One environment object an id, so that two worlds of the same id share their traces."""
    return import_gymnax().make(env_id)[0]


def from_id(env_id: str, params: PyTree | None = None) -> GymnaxWorld:
    """The world of a gymnax id.

    Raises:
      ValueError: unknown id; suggests the nearest ones.
    """
    known = env_ids()
    if env_id not in known:
        why = " (it downloads a data set)" if env_id in EXCLUDED else ""
        raise unknown_id(env_id, known, f"a gymnax id that can be used here{why}")
    return from_environment(_environment(env_id), params)


def from_environment(env: Any, params: PyTree | None = None) -> GymnaxWorld:
    """The world of a gymnax ``Environment`` object, with its default parameters if none are given.

    Raises:
      TypeError: not a bare gymnax environment.
    """
    if not isinstance(env, import_gymnax().environments.environment.Environment):
        raise TypeError(
            f"env={env!r} is not a gymnax Environment; pass an id, a bare Environment (unwrapped: the"
            " library normalises, flattens and logs itself) or a World"
        )
    params = env.default_params if params is None else params
    return GymnaxWorld(
        params=strong(params),
        env=env,
        observation_space=from_gymnasium(env.observation_space(params), "observation space"),
        action_space=from_gymnasium(env.action_space(params), "action space"),  # type: ignore[arg-type]
    )
