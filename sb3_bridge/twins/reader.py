"""What a twin must know of one environment: its state, and how it behaves; read where the environment lives."""

from __future__ import annotations

import copy
import functools
import inspect
import pickle
from collections.abc import Callable, Mapping
from typing import Any

import gymnasium
import numpy as np
from gymnasium.wrappers import TimeLimit

from sb3_bridge.clones.copying import Unclonable
from sb3_bridge.clones.core_state import cores_for
from sb3_bridge.clones.replay_check import bare, can_fork, copied
from sb3_bridge.clones.sandbox import going_on, here, in_child

NO_LIMIT = 2**31 - 1
_REPEATS = 0.5  # how often random play repeats an action: it gets further
# What a subclass may have of its own, because no step calls it.
_FREE = {
    "__init__",
    "reset",
    "render",
    "close",
    "__del__",
    "__repr__",
    "__str__",
    "__getstate__",
    "__setstate__",
}

StateOf = Callable[[Any], Any]
"""``env.unwrapped -> state``, a pytree of numbers and NumPy arrays; ValueError where there is no twin of it."""


def name_of(kind: type) -> str:
    """By which a class is known in all processes."""
    return f"{kind.__module__.replace('__mp_main__', '__main__')}.{kind.__qualname__}"


class Reader:
    """Reads one environment, which is never stepped; in a SubprocVecEnv it lives in the worker."""

    def __init__(self, env: gymnasium.Env, state_of: Mapping[str, StateOf]):
        self.env, self._state_of, self._family = env, state_of, ""

    def family(self) -> tuple[str, str]:
        """The name of the environment's class, and that of the class whose twin it may have; empty if there is none."""
        core: Any = self.env.unwrapped
        known = next((one for one in type(core).__mro__ if name_of(one) in self._state_of), None)
        if known is None:
            return name_of(type(core)), ""
        own = [name for one in known.__mro__ if one not in gymnasium.Env.__mro__ for name in vars(one)]
        for name in set(own) - _FREE:
            value, other = inspect.getattr_static(core, name), inspect.getattr_static(known, name)
            if value is not other and (callable(other) or isinstance(other, property)):
                raise Unclonable(f"{type(core).__name__}.{name} is not that of {known.__name__}")
        self._family = name_of(known)
        return name_of(type(core)), self._family

    def core(self) -> bytes:
        """The environment without its wrappers, pickled."""
        try:
            return pickle.dumps(self.env.unwrapped)
        except Exception as error:
            raise Unclonable(f"it cannot be sent to where its world is made: {error}") from error

    def take(self, env: gymnasium.Env | None = None) -> tuple[Any, np.int32]:
        """The present state, and the steps that are left until a ``TimeLimit``."""
        env = self.env if env is None else env
        left, core = NO_LIMIT, env
        while isinstance(core, gymnasium.Wrapper):
            if isinstance(core, TimeLimit):
                left = min(left, core._max_episode_steps - (core._elapsed_steps or 0))
            core = core.env
        try:
            return self._state_of[self._family](core), np.int32(left)
        except Exception as error:
            raise Unclonable(f"its state cannot be taken: {error}") from error

    def play(self, n_steps: int, seed: int) -> list[tuple[Any, ...]]:
        """Random play, episodes' ends and resets included; the environment itself stays as it is.

        Returns:
          ``(state and steps left, action, observation, reward, terminated, truncated alone)`` of each step.
        """
        if can_fork(self.env):
            return in_child(functools.partial(self._play, bare, n_steps, seed))
        original = functools.partial(copied, cores_for(self.env.unwrapped)[0].name, None)
        return here(functools.partial(self._play, original, n_steps, seed))

    def _play(self, original: Callable[[Any], Any], n_steps: int, seed: int) -> list[tuple[Any, ...]]:
        env = original(self.env)
        space, random = copy.deepcopy(env.action_space), np.random.default_rng(seed)
        space.seed(seed)
        env.reset(seed=seed)
        rows: list[tuple[Any, ...]] = []
        for _ in range(n_steps):
            going_on()
            action = rows[-1][1] if rows and random.random() < _REPEATS else space.sample()
            state = copy.deepcopy(self.take(env))
            observation, reward, terminated, truncated, _ = env.step(np.array(action)[()])
            rows.append(
                (
                    state,
                    action,
                    copy.deepcopy(observation),
                    float(reward),
                    bool(terminated),
                    bool(truncated and not terminated),
                )
            )
            if terminated or truncated:
                env.reset()
        return rows
