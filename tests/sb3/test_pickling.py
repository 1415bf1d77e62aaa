"""Models pickle and deep-copy, as PPO's do, and go on training as if nothing had happened."""

import copy
import pickle

import cloudpickle
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from stable_baselines3 import PPO
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.ppo import MlpPolicy as TorchMlpPolicy

from sb3_bridge import GRPO, WorldVecEnv

SMALL = {"n_steps": 16, "batch_size": 16, "n_epochs": 1, "policy_kwargs": {"net_arch": [8]}, "seed": 0}
WAYS = {
    "pickle": lambda model: pickle.loads(pickle.dumps(model)),
    "cloudpickle": lambda model: cloudpickle.loads(cloudpickle.dumps(model)),
    "deepcopy": copy.deepcopy,
}


def lean(state, action, next_state):
    return 1.0 - jnp.abs(next_state[..., 2])


def glide(state, action):
    return state + 0.01 * (2 * action - 1)


REGIMES = {
    "clone": (lambda: make_vec_env("CartPole-v1", 1, seed=0), {"dynamics": "clone", "horizon": 4}),
    "simulator": (lambda: WorldVecEnv("CartPole-v1", 1, seed=0), {"horizon": 4, "bootstrap": True}),
    "learned": (lambda: make_vec_env("CartPole-v1", 1, seed=0), {"dynamics": "learned", "horizon": 4}),
    "function": (
        lambda: make_vec_env("CartPole-v1", 1, seed=0),
        {"dynamics": glide, "reward_function": lean, "horizon": 4},
    ),
}


def parameters(model):
    return np.concatenate([leaf.numpy().ravel() for leaf in model.policy.state_dict().values()])


@pytest.mark.parametrize(
    ("regime", "way"),
    [
        ("clone", "pickle"),
        ("clone", "deepcopy"),
        ("simulator", "pickle"),
        ("learned", "deepcopy"),
        ("function", "cloudpickle"),
    ],
)
def test_a_copy_goes_on_as_the_original_does(regime, way):
    env, settings = REGIMES[regime]
    model = GRPO("MlpPolicy", env(), **SMALL, **settings).learn(32)
    twin = WAYS[way](model)
    assert twin.chosen_dynamics == model.chosen_dynamics == regime
    np.testing.assert_array_equal(parameters(twin), parameters(model))
    before = parameters(model)
    for one in (model, twin):
        one.learn(16, reset_num_timesteps=False)
    assert (parameters(model) != before).any()
    np.testing.assert_array_equal(parameters(twin), parameters(model))
    assert twin.num_timesteps == model.num_timesteps == 48


def test_copies_share_nothing_that_learns():
    model = GRPO("MlpPolicy", REGIMES["clone"][0](), candidates="episodes", **SMALL).learn(16)
    twin, before = copy.deepcopy(model), parameters(model)
    twin.learn(16)
    np.testing.assert_array_equal(parameters(model), before)


def test_a_loaded_model_without_an_env_pickles(tmp_path):
    GRPO("MlpPolicy", REGIMES["clone"][0](), candidates="episodes", **SMALL).learn(16).save(
        tmp_path / "model"
    )
    model = pickle.loads(pickle.dumps(GRPO.load(tmp_path / "model")))
    observation = np.zeros(4, np.float32)
    assert (
        model.predict(observation, deterministic=True)[0]
        == GRPO.load(tmp_path / "model").predict(observation, deterministic=True)[0]
    )


def test_a_policy_of_torch_trains_on_and_comes_back(tmp_path):
    env = make_vec_env("CartPole-v1", 1, seed=0)
    ppo = PPO("MlpPolicy", env, n_steps=16, batch_size=16, n_epochs=1, seed=0).learn(32)
    observations = np.random.default_rng(0).normal(size=(7, 4)).astype(np.float32)
    model = GRPO.from_torch(ppo, env, candidates="episodes", n_steps=16)
    np.testing.assert_array_equal(
        model.predict(observations, deterministic=True)[0], ppo.predict(observations, deterministic=True)[0]
    )
    taken = model.policy.predict_values(torch.as_tensor(observations))
    with torch.no_grad():
        np.testing.assert_allclose(taken, ppo.policy.predict_values(torch.as_tensor(observations)), atol=1e-5)
    model.learn(32)
    model.to_sb3().save(tmp_path / "ppo")
    back = PPO.load(tmp_path / "ppo")
    np.testing.assert_array_equal(
        back.predict(observations, deterministic=True)[0], model.predict(observations, deterministic=True)[0]
    )
    torch_policy = model.to_torch()
    with torch.no_grad():
        values = torch_policy.predict_values(torch.as_tensor(observations))
    np.testing.assert_allclose(values, model.policy.predict_values(torch.as_tensor(observations)), atol=1e-5)


def test_sb3s_own_policy_classes_are_accepted():
    model = GRPO(TorchMlpPolicy, REGIMES["clone"][0](), candidates="episodes", **SMALL)
    np.testing.assert_array_equal(
        parameters(model),
        parameters(GRPO("MlpPolicy", REGIMES["clone"][0](), candidates="episodes", **SMALL)),
    )
    assert jax.tree.leaves(model.policy.state.params)
