"""``predict``: shapes, types, errors and random numbers; PPO is the oracle."""

from __future__ import annotations

import functools

import gymnasium
import numpy as np
import pytest
import torch
from gymnasium import spaces
from sb3.files.models import (
    KINDS,
    OBSERVATIONS,
    ROLLOUT,
    SETTINGS,
    assert_equal_state,
    make,
    raised,
)
from stable_baselines3 import PPO
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.vec_env import DummyVecEnv

from sb3_bridge import GRPO


class Anything(gymnasium.Env):
    """Observations drawn from any space, an action space of any kind."""

    def __init__(self, observation_space, action_space):
        self.observation_space, self.action_space = observation_space, action_space

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        return self.observation_space.sample(), {}

    def step(self, action):
        return self.observation_space.sample(), 0.0, False, False, {}


SPACES = {
    "vector": (spaces.Box(-1, 1, (3,)), spaces.Discrete(3)),
    "small": (spaces.Discrete(3), spaces.Discrete(3, dtype=np.int32)),
    "double": (spaces.Box(-1, 1, (3,), np.float64), spaces.Box(-2, 2, (2,), np.float64)),
    "matrix": (spaces.Box(-1, 1, (2, 3)), spaces.Box(-1, 1, (2, 2))),
    "one": (spaces.Discrete(5), spaces.Box(-1, 1, (1,))),
    "many": (spaces.MultiDiscrete([2, 3]), spaces.MultiDiscrete([2, 4])),
    "bits": (spaces.MultiBinary(4), spaces.MultiBinary(3)),
    "image": (spaces.Box(0, 255, (36, 36, 3), np.uint8), spaces.Box(-1, 1, (2,))),
    "dict": (
        spaces.Dict({"x": spaces.Box(-1, 1, (3,)), "which": spaces.Discrete(4)}),
        spaces.MultiDiscrete([2, 2]),
    ),
}


def batch_of(space, n):
    """``[n, ...]`` observations."""
    rows = [space.sample() for _ in range(n)]
    if isinstance(space, spaces.Dict):
        return {name: np.stack([row[name] for row in rows]) for name in space.spaces}
    return np.stack(rows)


@pytest.fixture(params=SPACES)
def pair(request):
    return pair_of(request.param)


def take(batch, index):
    return {k: v[index] for k, v in batch.items()} if isinstance(batch, dict) else batch[index]


@functools.cache
def pair_of(name):
    """A space, and GRPO and PPO in an environment that has it."""
    observation_space, action_space = SPACES[name]
    policy = {"image": "CnnPolicy", "dict": "MultiInputPolicy"}.get(name, "MlpPolicy")
    env = DummyVecEnv([lambda: Anything(observation_space, action_space)])
    settings = {**SETTINGS, "policy_kwargs": {"net_arch": []}}
    observation_space.seed(0)
    return observation_space, GRPO(policy, env, **settings), PPO(policy, env, **settings)


@pytest.mark.parametrize("deterministic", [True, False])
def test_predict_returns_what_ppos_does(pair, deterministic):
    space, grpo, ppo = pair
    batch = batch_of(space, 3)
    state, starts = (np.zeros(2),), np.ones(3, bool)
    for observation in (batch, take(batch, 0), take(batch, slice(0, 1))):
        ours, theirs = (model.predict(observation, deterministic=deterministic) for model in (grpo, ppo))
        assert (ours[1], type(ours[0])) == (theirs[1], type(theirs[0])) == (None, np.ndarray)
        assert ours[0].shape == theirs[0].shape
        # SB3's is float32 for MultiBinary and int64 for Discrete of int32: ours is the space's.
        assert ours[0].dtype == grpo.action_space.dtype
        assert ours[0].dtype == theirs[0].dtype or theirs[0].dtype != grpo.action_space.dtype
        for action in np.reshape(ours[0], (-1, *grpo.action_space.shape)):
            assert grpo.action_space.contains(action if action.shape else action[()])
    ours, theirs = (
        model.predict(batch, state=state, episode_start=starts, deterministic=deterministic)
        for model in (grpo, ppo)
    )
    assert ours[1] is theirs[1] is state


def test_a_single_observation_is_a_row_of_a_batch(pair):
    space, grpo, _ = pair
    batch = batch_of(space, 5)
    actions = grpo.predict(batch, deterministic=True)[0]
    for index in range(5):
        action = grpo.predict(take(batch, index), deterministic=True)[0]
        np.testing.assert_allclose(action, actions[index], rtol=1e-5, atol=1e-6)


def test_wrong_observations_are_ppos_errors(pair):
    space, grpo, ppo = pair
    good = take(batch_of(space, 1), 0)
    with_info = (good, {})
    wrong = {"x": np.zeros((2, 2, 7))} if isinstance(space, spaces.Dict) else np.zeros((2, 2, 7, 7, 7))
    for observation in (with_info, wrong):
        errors = [raised(lambda m=model, o=observation: m.predict(o)) for model in (grpo, ppo)]
        assert errors == [ValueError, ValueError]


def test_images_have_their_channels_first_or_last():
    space, model, _ = pair_of("image")
    assert model.observation_space.shape == (3, 36, 36)
    last = batch_of(space, 2)
    first = last.transpose(0, 3, 1, 2)
    for observation, moved in ((last, first), (last[0], first[0])):
        actions = model.predict(observation, deterministic=True)[0]
        np.testing.assert_array_equal(actions, model.predict(moved, deterministic=True)[0])
        assert np.any(actions != model.predict(255 - observation, deterministic=True)[0])


@pytest.mark.parametrize("kind", KINDS)
def test_sampled_actions_come_from_the_seed(kind):
    actions = []
    for seed in (0, 0, 1):
        model = make(kind, seed=seed)
        np.random.default_rng().random()  # no stream of anyone else's matters
        np.random.seed(len(actions))
        torch.manual_seed(len(actions))
        actions.append(np.stack([model.predict(np.zeros((16, 4), np.float32))[0] for _ in range(2)]))
    np.testing.assert_array_equal(actions[0], actions[1])
    assert np.any(actions[0] != actions[2])
    assert np.any(actions[0][0] != actions[0][1])
    model.set_random_seed(5)
    first = model.predict(np.zeros((16, 4), np.float32))[0]
    model.set_random_seed(5)
    np.testing.assert_array_equal(model.predict(np.zeros((16, 4), np.float32))[0], first)


class Predict(BaseCallback):
    """Asks for actions at every step."""

    def _on_step(self):
        self.model.predict(OBSERVATIONS)
        self.model.predict(OBSERVATIONS[0], deterministic=True)
        return True


@pytest.mark.parametrize("kind", KINDS)
def test_predict_does_not_disturb_training(kind):
    models = [make(kind).learn(2 * ROLLOUT, callback=callback) for callback in (None, Predict())]
    assert_equal_state(*models)
