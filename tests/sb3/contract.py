"""What the tests of SB3's contract share: small worlds that run on both paths, and what is noted of a run.

``"host"`` steps a ``DummyVecEnv``, whose environments are cloned, ``"device"`` a ``WorldVecEnv``, of the same worlds. All
models share their shapes, so that each path compiles once.
"""

import functools

import gymnasium as gym
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax import struct
from stable_baselines3.common.callbacks import (
    BaseCallback,
)
from stable_baselines3.common.logger import KVWriter, Logger
from stable_baselines3.common.monitor import Monitor
from stable_baselines3.common.vec_env import DummyVecEnv, VecEnvWrapper
from toys import Line

from grpo_jax.spaces import Box, Discrete
from sb3_bridge import GRPO, WorldVecEnv
from sb3_bridge.gymnax.env import GymnaxEnv

torch.set_num_threads(1)


KINDS = ["host", "device"]


on_both = pytest.mark.parametrize("kind", KINDS)


N_ENVS, N_STEPS = 2, 16


ROLLOUT = N_ENVS * N_STEPS


@struct.dataclass
class Walk(Line):
    """``Line`` in which all numbers are traced, so that one program is compiled for all.

    With ``is_paid`` every step goes right and earns ``pay``: actions do not matter.
    """

    goal: int = 3
    limit: int = 5
    is_paid: bool = False
    pay: float = 1.0

    def step(self, key, state, action):
        step = super().step(key, state, jnp.where(self.is_paid, 1, action))
        return step.replace(reward=jnp.where(self.is_paid, jnp.float32(self.pay), step.reward))


LINE = Walk(Discrete(2))
"""Ends by the goal or by the clock, in 3 to 5 steps; the observation is ``[position, time]``."""


FIXED = Walk(Discrete(2), goal=1000)
"""Ends by the clock, in 5 steps."""


CONSTANT = Walk(Discrete(2), goal=1000, is_paid=True)


NAN = Walk(Discrete(2), goal=1000, is_paid=True, pay=float("nan"))


BOX = Walk(Box(np.float32([-2]), np.float32([2]), (1,)))


LONG_BOX = Walk(BOX.action_space, goal=1000, limit=1000)


def venv(kind, world=LINE, n_envs=N_ENVS):
    if kind == "device":
        env = WorldVecEnv(world, n_envs=n_envs)
    else:
        env = DummyVecEnv([lambda: Monitor(GymnaxEnv(world)) for _ in range(n_envs)])
    env.seed(0)
    return env


def make(algorithm, kind, world=LINE, *, env=None, **settings):
    common = {"n_steps": N_STEPS, "batch_size": 16, "n_epochs": 2, "seed": 0, "device": "cpu"}
    common |= {"policy_kwargs": {"net_arch": [8]}}
    if algorithm is GRPO and settings.get("candidates") not in ("episodes", "trajectory"):
        common["horizon"] = 4
        if kind != "device" and env is None and world is not LINE:
            common["dynamics"] = "clone"  # of a box too
    return algorithm("MlpPolicy", venv(kind, world) if env is None else env, **common | settings)


class Table(KVWriter):
    """What is logged, row by row."""

    def __init__(self):
        self.rows = []

    def write(self, key_values, key_excluded, step=0):
        self.rows.append(dict(key_values) | {"step": step})

    def close(self):
        pass


def log_of(model, *args, **kwargs):
    """Trains, and returns the rows that were logged."""
    table = Table()
    model.set_logger(Logger(None, [table]))
    model.learn(*args, **kwargs)
    return table.rows


class Recorder(BaseCallback):
    """Notes every event, and each step's locals; stops at call ``stop_at`` with ``answer``."""

    def __init__(self, stop_at=None, answer=False):
        super().__init__()
        self.events, self.steps, self.names = [], [], []
        self.stop_at, self.answer = stop_at, answer

    def _note(self, name):
        self.events.append((name, self.n_calls, self.num_timesteps, self.model.num_timesteps))

    def _on_training_start(self):
        self._note("training_start")
        self.names = sorted(self.locals)

    def _on_rollout_start(self):
        self._note("rollout_start")

    def _on_step(self):
        self._note("step")
        self.steps.append(dict(self.locals))
        return self.answer if self.n_calls == self.stop_at else True

    def _on_rollout_end(self):
        self._note("rollout_end")

    def _on_training_end(self):
        self._note("training_end")


class Count(BaseCallback):
    """Adds to a list at each call."""

    def __init__(self, calls):
        super().__init__()
        self.calls = calls

    def _on_step(self):
        self.calls.append(self.num_timesteps)
        return True


class Bar:
    def __init__(self, shown):
        self.update, self.refresh, self.close = shown.append, list, list


def flat(model):
    leaves = [
        leaf for part in model.get_parameters().values() for leaf in part.values() if hasattr(leaf, "numpy")
    ]
    return np.concatenate([np.ravel(np.asarray(leaf, np.float64)) for leaf in leaves])


def weights(model):
    return np.concatenate([np.ravel(leaf.numpy()) for leaf in model.policy.state_dict().values()])


def copy_parameters(ppo, grpo):
    """Gives the networks of ``grpo`` the numbers of those of ``ppo``, for ``net_arch=[8]``."""
    theirs = ppo.policy.state_dict()
    names = {
        "actor.MLP_0.Dense_0": "mlp_extractor.policy_net.0",
        "actor.output": "action_net",
        "critic.MLP_0.Dense_0": "mlp_extractor.value_net.0",
        "critic.output": "value_net",
    }
    parameters = grpo.get_parameters()
    for ours, name in names.items():
        parameters["policy"][f"{ours}.kernel"] = theirs[f"{name}.weight"].mT
        parameters["policy"][f"{ours}.bias"] = theirs[f"{name}.bias"]
    grpo.set_parameters(parameters)


ENV = "CartPole-v1"


def cartpole(n_envs=2, env_class=DummyVecEnv, **arguments):
    return env_class([functools.partial(gym.make, ENV, **arguments)] * n_envs)


def wrappers_of(env):
    """Classes of a VecEnv and what it wraps, from the outside."""
    classes = [type(env)]
    while isinstance(env, VecEnvWrapper):
        env = env.venv
        classes.append(type(env))
    return classes


def parameters_of(model):
    """One vector of all that training changes: policy and optimizer."""
    leaves = jax.tree.leaves((model.policy.state, model.policy.optimizer.state))
    return np.concatenate([np.ravel(np.asarray(leaf)) for leaf in leaves])


def actor_of(model):
    leaves = jax.tree.leaves(model.policy.state.params["actor"])
    return np.concatenate([np.ravel(np.asarray(leaf)) for leaf in leaves])
