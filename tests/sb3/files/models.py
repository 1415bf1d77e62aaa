"""Small models that are saved, on both paths, and what of them must come back."""

from __future__ import annotations

import io

import chex
import gymnasium
import jax
import numpy as np
from gymnasium import spaces
from stable_baselines3 import PPO
from stable_baselines3.common.env_util import make_vec_env
from toys import Line

import grpo_jax
from grpo_jax import spaces as own_spaces
from sb3_bridge import GRPO, WorldVecEnv
from sb3_bridge.files.model_zip import load_zip

SETTINGS = {"n_steps": 8, "batch_size": 8, "n_epochs": 2, "seed": 0, "policy_kwargs": {"net_arch": [8]}}


KINDS = ("host", "device")


N_ENVS = 2


ROLLOUT = N_ENVS * SETTINGS["n_steps"]


OBSERVATIONS = np.random.default_rng(0).uniform(-0.2, 0.2, (16, 4)).astype(np.float32)


class Lane(gymnasium.Env):
    """Eight steps to the left or right from 0. Its state is known from the number of steps: 0 behind every eighth."""

    observation_space = spaces.Box(-8, 8, (2,), np.float32)
    action_space = spaces.Discrete(2)

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.where = np.zeros(2, np.float32)
        return self.where.copy(), {}

    def step(self, action):
        self.where += np.array([2.0 * action - 1.0, 1.0], np.float32)
        return self.where.copy(), float(self.where[0]), False, bool(self.where[1] >= 8), {}


def upright(state, action, next_state):
    """A reward whose spread is seen within few steps."""
    return 1.0 - abs(next_state[2])


def make_env(kind, n_envs=N_ENVS):
    if kind == "host":
        return make_vec_env("CartPole-v1", n_envs)
    return WorldVecEnv(grpo_jax.make("CartPole-v1", reward_function=upright), n_envs)


def make_lane(kind, n_envs=N_ENVS):
    """Environments that stand at a reset behind every rollout, and whose reset is always the same."""
    if kind == "host":
        return make_vec_env(Lane, n_envs)
    return WorldVecEnv(Line(action_space=own_spaces.Discrete(2), goal=100, limit=8), n_envs)


def make(kind, env=None, cls=GRPO, **changes):
    if kind == "device":
        changes = {"horizon": 4, **changes}
    policy = changes.pop("policy", "MlpPolicy")
    return cls(policy, make_env(kind) if env is None else env, **{**SETTINGS, **changes})


def make_ppo(env=None, **changes):
    return PPO("MlpPolicy", make_env("host") if env is None else env, **{**SETTINGS, **changes})


def saved(model, **changes):
    """The model's file, at its beginning."""
    file = io.BytesIO()
    model.save(file, **changes)
    file.seek(0)
    return file


def parameters_of(model):
    return {
        f"{owner}/{name}": np.asarray(leaf)
        for owner, entry in model.get_parameters().items()
        for name, leaf in entry.items()
        if hasattr(leaf, "numpy")
    }


def assert_equal_parameters(one, other):
    jax.tree.map(np.testing.assert_array_equal, parameters_of(one), parameters_of(other))


def differ(one, other):
    pairs = zip(parameters_of(one).values(), parameters_of(other).values(), strict=True)
    return any(np.any(left != right) for left, right in pairs)


STATE = (
    "num_timesteps",
    "_n_updates",
    "simulator_steps",
    "_n_iterations",
    "_n_optimizer_steps",
    "_episode_num",
    "key_words",
    "episode_time",
)


def assert_equal_state(one, other):
    """Everything that training goes on from, as their files hold it."""
    functions = {"learning_rate": None, "reward_function": None}  # of the user's: not compared
    (data, params), (expected, expected_params) = (
        load_zip(saved(model), custom_objects=functions) for model in (one, other)
    )
    chex.assert_trees_all_equal(params, expected_params)
    for name in STATE:
        np.testing.assert_array_equal(data[name], expected[name], err_msg=name)
    assert episodes_of(one) == episodes_of(other)


def episodes_of(model):
    return [(episode["r"], episode["l"]) for episode in model.ep_info_buffer or ()]


def raised(function):
    """The type of the error that a call ends with."""
    try:
        function()
    except Exception as error:
        return type(error)
    raise AssertionError("no error was raised")


def reference_of(model):
    """Parameters of the reference policy by name, as the model's file holds them; None: there is none."""
    return load_zip(saved(model))[1].get("reference")
