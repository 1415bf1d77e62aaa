"""Acting by comparison behind SB3's ``predict``: in a simulator, a twin and clones."""

from __future__ import annotations

import functools

import gymnasium as gym
import numpy as np
import pytest
from gymnasium import spaces
from stable_baselines3 import PPO
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.evaluation import evaluate_policy
from stable_baselines3.common.vec_env import DummyVecEnv, SubprocVecEnv, VecNormalize
from toys import MaskedLine

from grpo_jax.spaces import Discrete
from sb3_bridge import GRPO, Planner, WorldVecEnv

SMALL = {"n_steps": 16, "batch_size": 16, "policy_kwargs": {"net_arch": [4]}, "seed": 0}
SHORT = {"horizon": 6, "n_rollouts": 2, "seed": 0}


class Walk(gym.Env):
    """Goes left or right, by its own noise too, and is paid where it stands; an episode has 12 steps."""

    observation_space = spaces.Box(-99, 99, (2,), np.float32)

    def __init__(self, is_continuous: bool = False):
        self.action_space = spaces.Box(-1, 1, (1,), np.float32) if is_continuous else spaces.Discrete(2)

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.place, self.time = 0.0, 0
        return self.seen(), {}

    def seen(self):
        return np.array([self.place, self.time], np.float32)

    def step(self, action):
        self.place += (1.0 if np.sum(action) > 0 else -1.0) + 0.1 * self.np_random.uniform(-1, 1)
        self.time += 1
        return self.seen(), self.place, False, self.time >= 12, {}


def walks(n_envs=2, is_continuous=False, kind=DummyVecEnv):
    return kind([functools.partial(Walk, is_continuous)] * n_envs)


def end_of(planner, n_steps=12):
    """Where the environments stand after a whole episode, less one step."""
    env = planner.get_env()
    observation = env.reset()
    for _ in range(n_steps - 1):
        action, _ = planner.predict(observation)
        observation, *_ = env.step(action)
    return observation


# What it does


@pytest.mark.parametrize("is_continuous", [False, True])
def test_clones_show_which_way_pays(is_continuous):
    model = GRPO("MlpPolicy", walks(is_continuous=is_continuous), **SMALL)
    planner = Planner(model, **SHORT)
    np.testing.assert_allclose(end_of(planner)[:, 0], 11, atol=1.2)
    assert planner.simulator_steps > 0


def test_workers_show_it_too():
    env = walks(kind=SubprocVecEnv)
    planner = Planner(GRPO("MlpPolicy", env, **SMALL), **SHORT)
    np.testing.assert_allclose(end_of(planner)[:, 0], 11, atol=1.2)
    env.close()


def test_the_reward_function_judges_and_sees_what_was_not_normalized():
    def leftwards(state, action, next_state):
        return -next_state[..., 0]

    model = GRPO("MlpPolicy", VecNormalize(walks()), reward_function=leftwards, dynamics="clone", **SMALL)
    planner = Planner(model, **SHORT)
    end_of(planner)
    np.testing.assert_allclose(planner.get_env().get_original_obs()[:, 0], -11, atol=1.2)


@pytest.mark.parametrize("kind", ["simulator", "twin"])
def test_an_untrained_policy_keeps_the_pole_up(kind):
    made = WorldVecEnv("CartPole-v1", 2, seed=0) if kind == "simulator" else None
    model = GRPO("MlpPolicy", made or make_vec_env("CartPole-v1", 2, seed=0), **SMALL)
    planner = Planner(model, horizon=40, n_rollouts=4, confidence=1.0, seed=0)
    alone, planned = (
        evaluate_policy(one, planner.get_env(), n_eval_episodes=2, deterministic=False)[0]
        for one in (model, planner)
    )
    assert planned > 2 * alone


def test_the_environment_is_only_read():
    model = GRPO("MlpPolicy", walks(), **SMALL)
    planner, other = Planner(model, **SHORT), walks()
    planner.get_env().seed(3), other.seed(3)
    observation, same = planner.get_env().reset(), other.reset()
    for _ in range(14):  # beyond an end
        np.testing.assert_array_equal(observation, same)
        action, _ = planner.predict(observation)
        assert action.dtype == model.action_space.dtype and action.shape == (2,)
        observation, same = planner.get_env().step(action)[0], other.step(action)[0]


def test_another_environment_than_the_models():
    model = GRPO("MlpPolicy", walks(n_envs=3), **SMALL)
    planner = Planner(model, Walk(), **SHORT)
    assert planner.get_env().num_envs == 1
    action, state = planner.predict(planner.get_env().reset()[0], state=None)
    assert action.shape == () and state is None


def test_forbidden_actions_are_not_taken():
    env = WorldVecEnv(MaskedLine(Discrete(2)), 8)
    planner = Planner(GRPO("MlpPolicy", env, **SMALL), **SHORT)
    observation, masks = env.reset(), np.array(env.env_method("action_masks"))
    np.testing.assert_array_equal(planner.predict(observation)[0], 1)
    np.testing.assert_array_equal(planner.predict(observation, action_masks=masks)[0], 1)
    with pytest.raises(ValueError, match="not those of the planner's environment"):
        planner.predict(observation, action_masks=~masks)


def test_a_seed_repeats_it():
    model = GRPO("MlpPolicy", walks(is_continuous=True), **SMALL)
    observation = model.get_env().reset()
    first, second = (Planner(model, **SHORT).predict(observation)[0] for _ in range(2))
    np.testing.assert_array_equal(first, second)


# What is refused


def test_observations_of_another_state_or_number():
    env = WorldVecEnv("CartPole-v1", 2, seed=0)
    planner = Planner(GRPO("MlpPolicy", env, **SMALL), **SHORT)
    observation = env.reset()
    with pytest.raises(ValueError, match="the one that env gave last"):
        planner.predict(observation + 0.01)
    with pytest.raises(ValueError, match="is of 1 environments, env has 2"):
        planner.predict(observation[:1])


def test_what_cannot_be_planned_with():
    model = GRPO("MlpPolicy", walks(), **SMALL)
    with pytest.raises(TypeError, match="must be a GRPO"):
        Planner(PPO("MlpPolicy", walks()))
    with pytest.raises(ValueError, match="own steps"):
        Planner(model, dynamics="learned")
    with pytest.raises(ValueError, match="n_rollouts=1"):
        Planner(model, n_rollouts=1)


def test_an_environment_that_cannot_be_followed():
    class Open(Walk):
        def step(self, action):
            observation, reward, *rest = super().step(action)
            return observation, reward + np.random.default_rng().uniform(), *rest  # noise that no copy has

    model = GRPO("MlpPolicy", walks(), **SMALL)
    with pytest.raises(ValueError, match="no candidates can be followed"):
        Planner(model, DummyVecEnv([Open]), **SHORT)
