"""Classic control as Gymnasium has it: step by step beside Gymnasium's own environments, with parameters of all kinds."""

from __future__ import annotations

from typing import Any, NamedTuple

import gymnasium as gym
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from gymnasium.envs.classic_control import (
    AcrobotEnv,
    CartPoleEnv,
    Continuous_MountainCarEnv,
    MountainCarEnv,
    PendulumEnv,
)

from grpo_jax.spaces import from_gymnasium
from grpo_jax.worlds.base import check_world
from grpo_jax.worlds.classic import NO_LIMIT, TASKS, TimeLimited, TimeLimitedState, classic

N_STEPS = 400
CLASSES = {
    "CartPole": CartPoleEnv,
    "Acrobot": AcrobotEnv,
    "Pendulum": PendulumEnv,
    "MountainCar": MountainCarEnv,
    "MountainCarContinuous": Continuous_MountainCarEnv,
}
SPECIAL = {
    "is_euler": lambda env: env.kinematics_integrator == "euler",
    "sutton_barto": lambda env: env._sutton_barto_reward,
    "is_book": lambda env: env.book_or_nips == "book",
    **{f"torque_{i}": lambda env, i=i: env.AVAIL_TORQUE[i] for i in range(3)},
}
# Task, what its environment is made with, what is changed afterwards, whether random play gets to an end.
CASES: dict[str, tuple[str, dict[str, Any], dict[str, Any], bool]] = {
    "cart pole": ("CartPole", {}, {}, True),
    "another pole": (
        "CartPole",
        {},
        {"length": 1.0, "gravity": 5.0, "masspole": 0.3, "force_mag": 4.0},
        True,
    ),
    "semi-implicit": ("CartPole", {}, {"kinematics_integrator": "semi-implicit euler", "tau": 0.03}, True),
    "Sutton and Barto": ("CartPole", {"sutton_barto_reward": True}, {"polemass_length": 0.2}, True),
    "narrow": ("CartPole", {}, {"x_threshold": 0.1, "theta_threshold_radians": 3.0, "total_mass": 3.0}, True),
    "acrobot": ("Acrobot", {}, {"AVAIL_TORQUE": [-3.0, 0.5, 4.0]}, True),
    "nips": ("Acrobot", {}, {"book_or_nips": "nips", "dt": 0.1, "MAX_VEL_1": 2.0, "MAX_VEL_2": 3.0}, False),
    "links": (
        "Acrobot",
        {},
        {"LINK_MASS_1": 0.5, "LINK_MASS_2": 2.0, "LINK_LENGTH_1": 1.5, "LINK_MOI": 0.7},
        False,
    ),
    "centres": ("Acrobot", {}, {"LINK_COM_POS_1": 0.2, "LINK_COM_POS_2": 0.9}, False),
    "pendulum": ("Pendulum", {}, {}, False),
    "on the moon": (
        "Pendulum",
        {"g": 1.6},
        {"m": 0.5, "l": 2.0, "dt": 0.1, "max_speed": 3, "max_torque": 1.5},
        False,
    ),
    "car": ("MountainCar", {}, {}, False),
    "fast car": (
        "MountainCar",
        {"goal_velocity": 0.03},
        {"force": 0.003, "gravity": 0.002, "max_speed": 0.05},
        True,
    ),
    "near goal": (
        "MountainCar",
        {},
        {"goal_position": -0.45, "min_position": -0.6, "max_position": -0.4},
        True,
    ),
    "continuous car": ("MountainCarContinuous", {}, {"power": 0.005}, True),
    "narrow road": (
        "MountainCarContinuous",
        {"goal_velocity": 0.01},
        {"min_position": -0.62, "power": 0.01},
        True,
    ),
    "weak car": (
        "MountainCarContinuous",
        {},
        {"min_action": -0.3, "max_action": 0.6, "max_speed": 0.01},
        False,
    ),
}


class Played(NamedTuple):
    """What an environment of Gymnasium did; leaves ``[N_STEPS, ...]``."""

    states: dict[str, np.ndarray]
    actions: np.ndarray
    observations: np.ndarray
    rewards: np.ndarray
    terminated: np.ndarray


def state_of(name: str, env: Any) -> dict[str, Any]:
    state = dict(zip([one for one, _, _ in TASKS[name].start], env.state, strict=True))
    return state | {
        one: SPECIAL.get(one, lambda env, one=one: getattr(env, one))(env)
        for one, _ in TASKS[name].parameters
    }


def play(case: str) -> Played:
    """Random actions, each kept for some steps, in episodes that start anew at their ends."""
    name, arguments, changes, _ = CASES[case]
    env, random, rows = CLASSES[name](**arguments), np.random.default_rng(0), []
    for attribute, value in changes.items():
        assert hasattr(env, attribute)
        setattr(env, attribute, value)
    env.action_space.seed(0)
    env.reset(seed=0)
    for number in range(N_STEPS):
        if number == 0 or random.random() < 0.15:
            action = env.action_space.sample()
        state = state_of(name, env)
        observation, reward, terminated, _, _ = env.step(action)
        rows.append((state, action, observation, reward, terminated))
        if terminated:
            env.reset()
    return _stacked(rows)


def _stacked(rows: list[Any]) -> Played:
    states, *rest = zip(*rows, strict=True)
    columns = {name: np.asarray([state[name] for state in states]) for name in states[0]}
    floats = {name: leaf if leaf.dtype == bool else leaf.astype(float) for name, leaf in columns.items()}
    return Played(floats, *map(np.asarray, rest))


def stepped(case: str, played: Played, wrap: Any = lambda function: function) -> Any:
    world = classic(CASES[case][0])
    step = wrap(jax.vmap(world.step, (None, 0, 0)))
    return step(jax.random.key(0), jax.tree.map(jnp.asarray, played.states), jnp.asarray(played.actions))


@pytest.mark.parametrize("case", CASES)
def test_every_step_is_gymnasiums(case, compiled):
    played = play(case)
    assert played.terminated.any() == CASES[case][3]
    step = stepped(case, played, compiled)
    # A share of the largest of each kind of number: a car's speeds are a hundredth of its places.
    for mine, real in (
        (step.observation, played.observations),
        (step.reward[:, None], played.rewards[:, None]),
    ):
        assert mine.dtype == jnp.float32 and mine.shape == real.shape
        assert (np.abs(mine - real).max(0) <= 3e-6 * np.maximum(np.abs(real).max(0), 1e-9)).all()
    np.testing.assert_array_equal(step.terminated, played.terminated)
    assert not step.truncated.any()
    # A state leads to the next one: nothing else of it changes.
    follows = ~played.terminated[:-1]
    for name, leaf in step.state.items():
        scale = max(1e-9, np.abs(played.states[name]).max())
        error = np.abs(np.asarray(leaf[:-1], float) - played.states[name][1:])[follows].max()
        assert leaf.dtype == (bool if name.startswith(("is_", "sutton")) else jnp.float32)
        assert error <= 5e-6 * scale, name


@pytest.mark.parametrize("case", [case for case in CASES if "car" not in case and "road" not in case])
def test_in_float64_it_is_gymnasium_to_the_last_digits(case):
    """So what differs is rounding alone; Gymnasium itself rounds torques, and the continuous car's state, to float32."""
    played = play(case)
    rounding = 1e-6 if CASES[case][0] == "Pendulum" else 1e-9
    with jax.enable_x64(True):
        step = stepped(case, played)
        assert step.observation.dtype == jnp.float64
        np.testing.assert_allclose(step.reward, played.rewards, rtol=rounding)
        follows = ~played.terminated[:-1]
        for name, leaf in step.state.items():
            np.testing.assert_allclose(
                np.asarray(leaf)[:-1][follows],
                played.states[name][1:][follows],
                rtol=rounding,
                atol=0.1 * rounding,
            )


def test_a_parameter_that_differs_is_seen():
    """The comparison above is worth something: a thousandth of any parameter that matters fails it."""
    for case, name in (
        ("cart pole", "masspole"),
        ("acrobot", "LINK_MOI"),
        ("pendulum", "l"),
        ("car", "gravity"),
    ):
        played = play(case)
        played.states[name][:] *= 1.001
        error = np.abs(stepped(case, played).observation - played.observations).max(0)
        assert (error > 3e-6 * np.abs(played.observations).max(0)).any(), name


@pytest.mark.parametrize("name", TASKS)
def test_it_is_a_world_with_gymnasiums_spaces_and_starts(name, key):
    env, world = CLASSES[name](), classic(name)
    check_world(world)
    assert world.observation_space == from_gymnasium(env.observation_space, "")
    assert world.action_space == from_gymnasium(env.action_space, "")
    observations, states = jax.vmap(world.reset)(jax.random.split(key, 200))
    starts = [np.asarray((env.reset(seed=i), env.state)[1], float) for i in range(200)]
    for index, (one, _, _) in enumerate(TASKS[name].start):
        real = np.asarray([start[index] for start in starts])
        spread = real.max() - real.min()
        np.testing.assert_allclose(
            [states[one].min(), states[one].max()], [real.min(), real.max()], atol=0.05 * spread
        )
    defaults = state_of(name, env)
    for one, value in TASKS[name].parameters:
        assert value == pytest.approx(defaults[one]) and (states[one] == jnp.asarray(value)).all()
    assert observations.shape == (200, *env.observation_space.shape)


def test_environments_side_by_side_may_differ(key):
    world = classic("CartPole")
    _, state = world.reset(key)
    states = jax.tree.map(lambda leaf: jnp.stack([leaf, leaf]), state) | {"gravity": jnp.array([9.8, 0.0])}
    speed = jax.vmap(world.step, (None, 0, None))(key, states, 1).state["theta_dot"]
    assert speed[0] != speed[1]


def test_a_time_limit_is_a_truncation(key):
    world = TimeLimited(classic("Pendulum"), 3)
    check_world(world)
    assert world.observation_space == classic("Pendulum").observation_space
    _, state = world.reset(key)
    cut = []
    for _ in range(4):
        step = world.step(key, state, jnp.zeros(1))
        state = step.state
        cut.append((bool(step.truncated), bool(step.terminated)))
    assert cut == [(False, False), (False, False), (True, False), (True, False)]
    limitless = TimeLimitedState(state.inner, jnp.int32(NO_LIMIT))
    step = world.step(key, limitless, jnp.zeros(1))
    assert int(step.state.left) == NO_LIMIT and not step.truncated
    env = gym.make("Pendulum-v1", max_episode_steps=3)
    env.reset(seed=0)
    assert [env.step(np.zeros(1, np.float32))[3] for _ in range(3)] == [False, False, True]
