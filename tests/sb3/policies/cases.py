"""Spaces of every kind, and policies of ours and of SB3's on them."""

from __future__ import annotations

import numpy as np
from gymnasium import spaces
from stable_baselines3.common import policies as sb3

from sb3_bridge.policies import CnnPolicy, MlpPolicy, MultiInputPolicy

VECTOR = spaces.Box(-5, 5, (4,), seed=0)
TWO = spaces.Discrete(2)
IMAGE = spaces.Box(0, 255, (3, 36, 40), np.uint8, seed=0)
MIXED = spaces.Dict({"image": IMAGE, "hand": spaces.Discrete(3), "x": VECTOR}, seed=0)
OBSERVATIONS = {
    "vector": VECTOR,
    "double": spaces.Box(-1, 1, (3,), np.float64, seed=0),
    "matrix": spaces.Box(-1, 1, (2, 3), seed=0),
    "bytes": spaces.Box(0, 255, (4,), np.uint8, seed=0),
    "Discrete": spaces.Discrete(5, seed=0),
    "MultiDiscrete": spaces.MultiDiscrete([2, 3], seed=0),
    "MultiBinary": spaces.MultiBinary(4, seed=0),
    "bits": spaces.MultiBinary((2, 3), seed=0),
    "image": IMAGE,
    "Dict": MIXED,
}
ACTIONS = {
    "Discrete": spaces.Discrete(3),
    "MultiDiscrete": spaces.MultiDiscrete([2, 4]),
    "MultiBinary": spaces.MultiBinary(3),
    "Box": spaces.Box(np.array([-2.0, 0.0], np.float32), np.array([2.0, 10.0], np.float32)),
    "double": spaces.Box(-0.1, 0.3, (2,), np.float64),
    "matrix": spaces.Box(-1, 1, (2, 2)),
}
CLASSES = {
    MlpPolicy: sb3.ActorCriticPolicy,
    CnnPolicy: sb3.ActorCriticCnnPolicy,
    MultiInputPolicy: sb3.MultiInputActorCriticPolicy,
}


def rate(progress):
    return 3e-4 * progress


def make(observation_space=VECTOR, action_space=TWO, cls=MlpPolicy, **arguments):
    settings = {"net_arch": [8], "ortho_init": False, "seed": 0, **arguments}
    return cls(observation_space, action_space, rate, **settings)


def fitting(space):
    if isinstance(space, spaces.Dict):
        return MultiInputPolicy
    return CnnPolicy if space == IMAGE else MlpPolicy


def batch_of(space, n):
    samples = [space.sample() for _ in range(n)]
    if isinstance(space, spaces.Dict):
        return {name: np.stack([sample[name] for sample in samples]) for name in space.spaces}
    return np.stack(samples)
