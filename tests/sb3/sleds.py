"""Toys for what is compared where: a sled that can be cloned, and variants that cannot."""

from __future__ import annotations

import itertools
import time
from typing import Any

import gymnasium as gym
import jax.numpy as jnp
import numpy as np
import torch
from gymnasium import spaces
from sb3.contract import log_of
from stable_baselines3.common.vec_env import DummyVecEnv

from sb3_bridge import GRPO

SMALL = {"n_steps": 8, "batch_size": 8, "n_epochs": 1, "policy_kwargs": {"net_arch": [8]}, "device": "cpu"}


class Sled(gym.Env):
    """A sled on ice that is pushed left, not at all, or right: linear, and random in nothing but where it starts.

    All its numbers are exact in float32. Pays for where it is, ends beyond ``edge``, is cut after ``limit`` steps.
    """

    observation_space = spaces.Box(-8, 8, (2,), np.float32)
    action_space = spaces.Discrete(3)

    def __init__(self, limit: int = 11, edge: float = 2.0):
        self.limit, self.edge = limit, edge

    def reset(self, *, seed: int | None = None, options: Any = None) -> Any:
        super().reset(seed=seed)
        self.time = 0
        self.where = self.np_random.integers(-64, 65, 2).astype(np.float32) / 64
        return self.where.copy(), {}

    def step(self, action: Any) -> Any:
        self.time += 1
        self.where = glide(self.where, action)
        fell, reward = bool(abs(self.where[0]) > self.edge), 4.0 + float(self.where[0])
        return self.where.copy(), reward, fell, self.time >= self.limit, {}


def glide(state: Any, action: Any) -> np.ndarray:
    where, speed = state
    return np.array([where + 0.25 * speed, speed + 0.125 * (action - 1.0)], np.float32)


def glide_jax(state: Any, action: Any) -> Any:
    return jnp.stack([state[0] + 0.25 * state[1], state[1] + 0.125 * (action - 1.0)])


def glide_torch(state: Any, action: Any) -> Any:
    return torch.stack([state[:, 0] + 0.25 * state[:, 1], state[:, 1] + 0.125 * (action - 1.0)], dim=1)


def fares(state: Any, action: Any, next_state: Any) -> Any:
    """What ``Sled`` pays."""
    return 4.0 + next_state[0]


TIDE = {"height": 0}


class Tidal(Sled):
    """Pays by a tide that all sleds share, copies too."""

    def step(self, action: Any) -> Any:
        TIDE["height"] += 1
        observation, _, *ends = super().step(action)
        return observation, float(TIDE["height"]), *ends


class Uncopyable(Sled):
    """Holds what nobody can copy."""

    def __init__(self):
        super().__init__()
        self.stream = (number for number in range(10))


class Slow(Sled):
    """A step takes two milliseconds."""

    def step(self, action: Any) -> Any:
        time.sleep(2e-3)
        return super().step(action)


class Camera(gym.ObservationWrapper):
    """Pictures instead of numbers."""

    observation_space = spaces.Box(0, 255, (36, 36, 1), np.uint8)

    def observation(self, observation: Any) -> np.ndarray:
        return np.full((36, 36, 1), 128 + 16 * observation[0], np.uint8)


class Remote(gym.Env):
    """A ``Sled`` in a library's memory: what this object holds is a handle, and a copy gets a sled of its own."""

    observation_space, action_space = Sled.observation_space, Sled.action_space
    sleds: dict[int, Sled] = {}  # noqa: RUF012
    numbers = itertools.count()

    def __init__(self):
        self.number = next(self.numbers)
        self.sleds[self.number] = Sled()
        self.handle = (number for number in range(10))  # nobody can copy it

    def __deepcopy__(self, memo: Any) -> Remote:
        return Remote()

    def reset(self, *, seed: int | None = None, options: Any = None) -> Any:
        super().reset(seed=seed)
        return self.sleds[self.number].reset(seed=seed)

    def step(self, action: Any) -> Any:
        return self.sleds[self.number].step(action)


def dummy(make: Any, n_envs: int = 1) -> DummyVecEnv:
    return DummyVecEnv([make] * n_envs)


def make(env: Any, policy: str = "MlpPolicy", **settings: Any) -> GRPO:
    return GRPO(policy, env, **{**SMALL, "seed": 0, **settings})


def filmed(make_env: Any, **settings: Any) -> GRPO:
    small = {"net_arch": [8], "features_extractor_kwargs": {"features_dim": 8}}
    return make(dummy(lambda: Camera(make_env())), "CnnPolicy", policy_kwargs=small, verbose=1, **settings)


def parameters(model: GRPO) -> np.ndarray:
    return np.concatenate([np.ravel(np.asarray(leaf)) for leaf in model.policy.state_dict().values()])


def told(capsys: Any) -> str:
    """The one line that says what is compared."""
    (line,) = [line for line in capsys.readouterr().out.splitlines() if line.startswith("GRPO:")]
    return line


def steady(model: GRPO) -> GRPO:
    """With logits so far apart that its draws do not depend on random numbers."""
    state = model.policy.state_dict()
    for name in ("actor.output.kernel", "actor.output.bias"):
        state[name] = 1e5 * (state[name] + 0.01 * torch.arange(3))
    model.policy.load_state_dict(state)
    return model


def updates_of(model: GRPO, *arguments: Any, **settings: Any) -> list[dict[str, Any]]:
    """Trains, and returns what each update logged, that of the last iteration included."""
    log_of(model, *arguments, **settings)
    model.logger.dump(0)
    return model.logger.output_formats[0].rows[1:]  # type: ignore[attr-defined]
