"""Forbidden actions: a knapsack is packed, and only things that still fit may be chosen.

    python examples/masks.py [--timesteps 8000]

The environment says what it allows by ``action_masks()``, as for sb3-contrib's MaskablePPO; nothing has to be switched on.
Takes 18 CPU seconds.
"""

from __future__ import annotations

import argparse
import itertools
from collections.abc import Sequence

import gymnasium as gym
import numpy as np
from stable_baselines3.common.env_util import make_vec_env

from sb3_bridge import GRPO

N_THINGS = 6


class Knapsack(gym.Env):
    """Six things of random weight and value; a bag holds a weight of 1.5. An episode ends where nothing fits any more."""

    observation_space = gym.spaces.Box(0.0, 2.0, (2 * N_THINGS + 1,), np.float32)
    action_space = gym.spaces.Discrete(N_THINGS)

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.weights, self.values = self.np_random.uniform(0.2, 1.0, (2, N_THINGS))
        self.is_left, self.room = np.ones(N_THINGS, bool), 1.5
        return self.see(), {}

    def see(self):
        things = np.concatenate([self.weights * self.is_left, self.values * self.is_left])
        return np.append(things, self.room).astype(np.float32)

    def step(self, action):
        assert self.action_masks()[action], f"thing {action} does not fit, or is packed"
        self.is_left[action] = False
        self.room -= self.weights[action]
        return self.see(), float(self.values[action]), not self.action_masks().any(), False, {}

    def action_masks(self) -> np.ndarray:
        """Bool ``[6]``, True where an action is allowed."""
        return self.is_left & (self.weights <= self.room)

    def best(self) -> float:
        """The largest value that fits, of all 64 choices."""
        choices = np.array(list(itertools.product((False, True), repeat=N_THINGS)))
        return float((choices @ self.values)[choices @ self.weights <= 1.5].max())


def play(env: Knapsack, seed: int, choose) -> tuple[float, float]:
    """What was packed in an episode, and what could have been; ``choose(observation, mask)`` gives the action."""
    observation, _ = env.reset(seed=seed)
    total, best, over = 0.0, env.best(), False
    while not over:
        observation, reward, over, _, _ = env.step(choose(observation, env.action_masks()))
        total += reward
    return total, best


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--timesteps", type=int, default=8_000, help="decision steps")
    options = parser.parse_args(argv)

    env = make_vec_env(Knapsack, n_envs=8, seed=0)
    model = GRPO(
        "MlpPolicy",
        env,
        n_steps=64,
        batch_size=128,
        dynamics="clone",  # in copies of the environment, which are asked for their masks, too
        horizon=N_THINGS,
        gamma=1.0,
        learning_rate=1e-3,
        seed=0,
    )
    model.learn(options.timesteps)

    generator = np.random.default_rng(0)
    choosers = {
        "random": lambda observation, mask: generator.choice(np.flatnonzero(mask)),
        "policy": lambda observation, mask: model.predict(observation, action_masks=mask, deterministic=True)[
            0
        ],
    }
    for name, choose in choosers.items():
        packed, possible = np.transpose([play(Knapsack(), seed, choose) for seed in range(1_000, 1_200)])
        print(f"{name}: {packed.mean() / possible.mean():.1%} of the value that fits (200 episodes)")


if __name__ == "__main__":
    main()
