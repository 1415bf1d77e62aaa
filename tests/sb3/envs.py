"""Toy environments for the contract tests."""

from __future__ import annotations

from typing import Any

import gymnasium as gym
import numpy as np
from gymnasium import spaces


class RandomEnv(gym.Env):
    """Random observations of any space, unless an episode's seed says so always the same ones; keeps its actions.

    Pays for the first number of the action; ends by truncation.
    """

    def __init__(self, observation_space: spaces.Space, action_space: spaces.Space, length: int = 5):
        self.observation_space, self.action_space, self._length = observation_space, action_space, length
        self.actions: list[Any] = []

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[Any, dict]:
        super().reset(seed=seed)
        if seed is not None:
            self.observation_space.seed(seed)
        self._time = 0
        return self.observation_space.sample(), {}

    def step(self, action: Any) -> tuple[Any, float, bool, bool, dict]:
        self.actions.append(np.copy(action))
        self._time += 1
        reward = float(np.ravel(action)[0])
        return self.observation_space.sample(), reward, False, self._time >= self._length, {}


class Recorder(gym.Wrapper):
    """Keeps the true transitions ``(state, action, next_state)``, whatever wrappers outside make of them."""

    def __init__(self, env: gym.Env):
        super().__init__(env)
        self.transitions: list[tuple[Any, Any, Any]] = []

    def reset(self, **arguments: Any) -> tuple[Any, dict]:
        self._state, info = self.env.reset(**arguments)
        return self._state, info

    def step(self, action: Any) -> tuple[Any, Any, bool, bool, dict]:
        result = self.env.step(action)
        self.transitions.append((self._state, np.copy(action), result[0]))
        self._state = result[0]
        return result


class DictOfOne(gym.ObservationWrapper):
    """The observation as a dict with one entry."""

    def __init__(self, env: gym.Env):
        super().__init__(env)
        self.observation_space = spaces.Dict({"only": env.observation_space})

    def observation(self, observation: Any) -> dict[str, Any]:
        return {"only": observation}


class PaidAfter(gym.Wrapper):
    """Pays ``reward(state, action, next_state)`` in place of the environment's own reward."""

    def __init__(self, env: gym.Env, reward: Any):
        super().__init__(env)
        self._reward = reward

    def reset(self, **arguments: Any) -> tuple[Any, dict]:
        self._state, info = self.env.reset(**arguments)
        return self._state, info

    def step(self, action: Any) -> tuple[Any, float, bool, bool, dict]:
        state, (self._state, _, terminated, truncated, info) = self._state, self.env.step(action)
        return self._state, float(self._reward(state, action, self._state)), terminated, truncated, info
