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


class Shelves(gym.Env):
    """Takes a thing from each of some shelves, until they are empty; ``action_masks`` says what is left.

    What is gone cannot be taken: that is an error, or, if ``is_lenient``, ends the episode. Paid is the way between things.
    """

    def __init__(self, n_things: int = 4, n_shelves: int = 1, is_lenient: bool = False):
        self.observation_space = spaces.Box(0, 1, (n_shelves * n_things,), np.float32)
        self._is_single, self._is_lenient = n_shelves == 1, is_lenient
        self.action_space = (
            spaces.Discrete(n_things) if self._is_single else spaces.MultiDiscrete([n_things] * n_shelves)
        )

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[Any, dict]:
        super().reset(seed=seed)
        nvec = np.ravel(self.action_space.n if self._is_single else self.action_space.nvec)
        self.is_left = np.ones((len(nvec), nvec[0]), bool)
        self.place = np.zeros(len(nvec), int)
        return self.is_left.reshape(-1).astype(np.float32), {}

    def step(self, action: Any) -> tuple[Any, float, bool, bool, dict]:
        rows, things = np.arange(len(self.place)), np.ravel(action)
        is_there = self.is_left[rows, things].all()
        if not is_there and not self._is_lenient:
            raise RuntimeError(f"{action} is gone")
        reward = -float(np.abs(things - self.place).sum())
        self.place, self.is_left[rows, things] = things, False
        over = not is_there or not self.is_left.any()
        return self.is_left.reshape(-1).astype(np.float32), reward, over, False, {}

    def action_masks(self) -> np.ndarray:
        assert self.is_left.any(), "asked behind the end"
        return self.is_left.reshape(-1).copy()


class Masker(gym.Wrapper):
    """As sb3-contrib's ``ActionMasker``: the masks are those of a function of the environment."""

    def __init__(self, env: gym.Env, function: Any):
        super().__init__(env)
        self._function = function

    def action_masks(self) -> Any:
        return self._function(self.env)
