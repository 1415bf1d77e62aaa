"""A small environment whose every field can be spoilt."""

import gymnasium as gym
import numpy as np
from gymnasium import spaces


class Track(gym.Env):
    """Moves on by the action; from ``bad_at`` on, one field of one step is spoilt."""

    observation_space = spaces.Box(-np.inf, np.inf, (2,), np.float32)
    action_space = spaces.Discrete(2)

    def __init__(self, field="", value=np.nan, bad_at=7, length=5):
        self.field, self.value, self.bad_at, self.length, self.total = field, value, bad_at, length, 0

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.time = 0
        return self._seen(), {}

    def _seen(self):
        return np.array([self.time, 0.5], np.float32)

    def step(self, action):
        self.time, self.total = self.time + 1, self.total + 1
        observation, reward = self._seen(), float(action)
        if self.total == self.bad_at:
            if self.field == "observation":
                observation[1] = self.value
            elif self.field == "reward":
                reward = self.value
        return observation, reward, False, self.time >= self.length, {}
