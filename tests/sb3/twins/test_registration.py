"""Twins of one's own, and how the settings of a run in a twin follow from what its groups had to tell."""

from __future__ import annotations

import io
import re
from pathlib import Path
from typing import Any

import gymnasium as gym
import jax.numpy as jnp
import numpy as np
import pytest
from flax import struct
from sb3.sleds import Sled, dummy, make, told
from stable_baselines3.common.vec_env import SubprocVecEnv

from grpo_jax import GRPOConfig
from grpo_jax.spaces import Box, Discrete
from grpo_jax.types import Step
from grpo_jax.worlds.base import World
from grpo_jax.worlds.classic import classic
from sb3_bridge import GRPO, register_twin
from sb3_bridge.settings import config_of
from sb3_bridge.twins import pace
from sb3_bridge.twins.check import first_difference
from sb3_bridge.twins.twin import NoTwin


class Known(Sled):
    """A sled that has a twin; each has its own edge."""


@struct.dataclass
class SledWorld(World):
    """What ``Known`` does; its limit is the environment's own, no TimeLimit."""

    limit: int = struct.field(pytree_node=False, default=11)
    observation_space, action_space = Box(-8, 8, (2,)), Discrete(3)  # type: ignore[arg-type]

    def reset(self, key: Any) -> Any:
        raise NotImplementedError

    def step(self, key: Any, state: Any, action: Any) -> Step:
        where = jnp.stack([state["where"] + 0.25 * state["speed"], state["speed"] + 0.125 * (action - 1.0)])
        reached = state | {"where": where[0], "speed": where[1], "time": state["time"] + 1}
        fell, late = jnp.abs(where[0]) > state["edge"], reached["time"] >= self.limit
        return Step(where, reached, 4.0 + where[0], fell, late)


def state_of(env: Any) -> Any:
    if env.edge > 50:
        raise ValueError(f"edge={env.edge} is beyond the world")
    return {"where": env.where[0], "speed": env.where[1], "edge": float(env.edge), "time": env.time}


def of_env(env: Any) -> World:
    return SledWorld(env.limit)


@pytest.mark.parametrize("vec_env", [dummy, lambda make_env, n_envs: SubprocVecEnv([make_env] * n_envs)])
def test_a_registered_twin_is_used(vec_env):
    register_twin(Known, world=of_env, state_of=state_of)
    env = vec_env(lambda: Known(limit=7), 2)
    try:
        model = make(env, horizon=4)
        model.learn(32)
        assert model.chosen_dynamics == "twin" and 32 * 3 < model.simulator_steps <= 32 * 12
    finally:
        env.close()


def test_a_world_that_does_something_else_is_refused():
    register_twin(Known, world=SledWorld(), state_of=state_of)
    with pytest.raises(NoTwin, match=r"at step \d+: the twin's truncated is False, the environment's True"):
        make(dummy(lambda: Known(limit=7)), dynamics="twin")
    with pytest.raises(
        NoTwin, match="environment 0: its state cannot be taken: edge=60.0 is beyond the world"
    ):
        make(dummy(lambda: Known(edge=60.0)), dynamics="twin")
    register_twin(
        Known, world=SledWorld(), state_of=lambda env: state_of(env) | {"where": np.float16(env.where[0])}
    )
    with pytest.raises(NoTwin, match=r"step makes a state .* of what state_of gave.*cast in one of them"):
        make(dummy(Known), dynamics="twin")
    register_twin(Known, world=lambda env: env, state_of=state_of)
    with pytest.raises(NoTwin, match="which is no grpo_jax World"):
        make(dummy(Known), dynamics="twin")


@pytest.mark.parametrize(
    "wrong", [{"env_class": Known()}, {"env_class": int}, {"world": 3}, {"state_of": {"where": 1}}]
)
def test_what_is_no_twin_is_a_type_error(wrong):
    arguments = {"env_class": Known, "world": SledWorld(), "state_of": state_of} | wrong
    with pytest.raises(TypeError, match=f"{next(iter(wrong))}=.* must be"):
        register_twin(arguments.pop("env_class"), **arguments)


def test_the_example_of_the_documentation():
    page = (Path(__file__).parents[3] / "docs" / "dynamics.md").read_text()
    (block,) = [one for one in re.findall(r"```python\n(.*?)```", page, re.DOTALL) if "register_twin(" in one]
    exec(compile(block, "docs/dynamics.md", "exec"), {"__name__": "example"})


def transitions(**changes: Any) -> tuple[Any, np.ndarray, dict[str, Any]]:
    """Three steps of a pole, the last of which ends just where the threshold is."""
    env = gym.make("CartPole-v1").unwrapped
    names = ("x", "x_dot", "theta", "theta_dot")
    states, rows = [], []
    for start in ([0.0, 0.1, 0.01, 0.2], [0.5, -0.3, -0.02, 0.1], [2.4, 1e-7, 0.0, 0.0]):
        env.reset(seed=0)
        env.state = np.array(start)
        states.append(dict(zip(names, start, strict=True)))
        rows.append(env.step(1)[:4])
    observation, reward, terminated, truncated = map(np.asarray, zip(*rows, strict=True))
    assert terminated.tolist() == [False, False, True]
    real = {"observation": observation, "reward": reward, "terminated": terminated, "truncated": truncated}
    parameters = dict(classic("CartPole").task.parameters)
    columns = {name: np.float32([state[name] for state in states]) for name in names}
    columns |= {
        name: np.full(3, value, bool if isinstance(value, bool) else np.float32)
        for name, value in parameters.items()
    }
    return columns, np.ones(3, np.int32), real | changes


def test_equal_is_what_rounding_can_explain():
    world, (states, actions, real) = classic("CartPole"), transitions()
    assert first_difference(world, states, actions, real) is None
    # At the border both are right; away from it, neither.
    for ends, found in (([False, False, False], None), ([True, False, True], 0)):
        answer = first_difference(world, states, actions, real | {"terminated": np.array(ends)})
        assert answer == found if found is None else answer[0] == found and "terminated" in answer[1]
    for name, row in (("observation", 1), ("reward", 0)):
        wrong = real[name].astype(np.float64).copy()
        wrong[row] += 1e-4
        index, why = first_difference(world, states, actions, real | {name: wrong})  # type: ignore[misc]
        assert index == row and f"the twin's {name} is" in why
    for name in ("length", "gravity", "force_mag", "tau", "masspole"):
        states = transitions()[0]
        states[name] = states[name] * np.float32(1.01)
        assert first_difference(world, states, actions, real) is not None, name


def test_the_pace_of_learning_follows_from_what_groups_have_to_tell():
    config, now = GRPOConfig(bootstrap=False), pace.start() | {"critic_if_silent": True}

    def after(spread: float, silent: float) -> tuple[float, bool]:
        nonlocal now, config
        now = pace.noted(config, now, {"group_spread": spread, "frac_zero_std": silent})
        config = pace.paced(GRPOConfig(learning_rate=1e-3, bootstrap=True), now)
        return config.learning_rate, config.bootstrap

    assert after(0.0, 1.0) == (1e-3, True)  # nothing differs: a critic is asked
    assert after(0.01, 0.0) == (1e-3, False)  # which speaks for one iteration
    assert after(0.0, 1.0)[1]
    assert after(3.0, 0.2) == (1e-3, False)
    assert after(3.0, 0.2) == (1e-3, False)  # now they differ by themselves
    assert after(0.3, 0.5) == (1e-3, False)  # a tenth is no reason yet
    rate, asks = after(0.01, 0.99)
    assert rate == pytest.approx(1e-3 * pace.STEEPNESS * 0.01 / 3.0) and not asks
    assert after(0.0, 1.0) == (0.0, False)
    assert after(3.0, 0.2) == (1e-3, False)
    assert pace.paced(GRPOConfig(bootstrap=True), now | {"critic_if_silent": False}).bootstrap


class Flat(Known):
    """Pays the same for whatever is done, and never ends."""

    def step(self, action: Any) -> Any:
        observation, _, _, truncated, info = super().step(action)
        return observation, 1.0, False, truncated, info


@struct.dataclass
class FlatWorld(SledWorld):
    """What ``Flat`` does."""

    def step(self, key: Any, state: Any, action: Any) -> Step:
        return super().step(key, state, action).replace(reward=jnp.float32(1), terminated=jnp.bool_(False))


def test_a_critic_is_asked_only_until_groups_differ_without_one(capsys):
    """The first update finds nothing, the second one asks the critic, the third is without one again."""
    register_twin(Known, world=SledWorld(), state_of=state_of)
    register_twin(Flat, world=FlatWorld(), state_of=state_of)
    model = make(dummy(Flat), horizon=2, verbose=1)
    assert told(capsys).endswith("; with a critic where they do not differ")
    asked = []
    for _ in range(3):
        asked.append(config_of(model).bootstrap)
        model.learn(8, reset_num_timesteps=False)
    assert asked == [False, True, False] and model.bootstrap
    file = io.BytesIO()
    model.save(file)
    again = GRPO.load(io.BytesIO(file.getvalue()), env=dummy(Flat))
    assert config_of(again).bootstrap and again._pace == model._pace
    again.set_env(dummy(Known))
    for _ in range(3):
        again.learn(8, reset_num_timesteps=False)
    assert again._pace["has_spoken"] and not config_of(again).bootstrap
    assert config_of(make(dummy(Flat), bootstrap=True)).bootstrap  # who asks for a critic has one
