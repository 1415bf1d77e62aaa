"""``Trading-v0``: an environment as people write one who trade, small, and with an answer that can be known.

The log-return of the price is a fraction of the one before it, and noise: ``r' = MOMENTUM r + NOISE e``, e normal. What
pays is to hold a position with the sign of the last return, and to turn it only where more is to be expected than
turning costs.
"""

from __future__ import annotations

from typing import Any

import gymnasium
import numpy as np
import numpy.typing as npt

ID = "Trading-v0"
MOMENTUM, NOISE = 0.5, 0.01
COST = 0.001
"""Of a change of the position by one, as a share of the capital."""
WINDOW, EPISODE_STEPS = 10, 250


class Trading(gymnasium.Env[npt.NDArray[np.float32], np.int64]):
    """One asset, a position of -1, 0 or 1 times the capital.

    Observation, ``[WINDOW + 1]`` float32: the last returns, oldest first, in units of their noise; the position held.
    Action: the position to hold from now on, plus 1. Reward: what the position earned in this step, less the cost of its
    change, in percent of the capital. Episodes of ``EPISODE_STEPS`` days are cut, never ended.
    """

    def __init__(self) -> None:
        self.observation_space = gymnasium.spaces.Box(-np.inf, np.inf, (WINDOW + 1,), np.float32)
        self.action_space = gymnasium.spaces.Discrete(3)

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[npt.NDArray[np.float32], dict[str, Any]]:
        super().reset(seed=seed)
        self.returns, self.position = np.zeros(WINDOW), 0
        for _ in range(2 * WINDOW):  # until the first day is as likely as any other
            self._next_day()
        return self._observation(), {}

    def step(self, action: np.int64) -> tuple[npt.NDArray[np.float32], float, bool, bool, dict[str, Any]]:
        position = int(action) - 1
        cost = COST * abs(position - self.position)
        self.position = position
        self._next_day()
        return self._observation(), 100.0 * (position * float(self.returns[-1]) - cost), False, False, {}

    def _next_day(self) -> None:
        newest = MOMENTUM * self.returns[-1] + NOISE * self.np_random.standard_normal()
        self.returns = np.append(self.returns[1:], newest)

    def _observation(self) -> npt.NDArray[np.float32]:
        return np.append(self.returns / NOISE, self.position).astype(np.float32)


gymnasium.register(ID, entry_point=Trading, max_episode_steps=EPISODE_STEPS)
