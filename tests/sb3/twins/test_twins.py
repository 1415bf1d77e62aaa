"""Twins: which environments have one, what they are refused for, and that branches in them are those of the environment."""

from __future__ import annotations

from typing import Any

import gymnasium as gym
import numpy as np
import pytest
from gymnasium import wrappers
from gymnasium.envs.classic_control import AcrobotEnv, CartPoleEnv, MountainCarEnv
from sb3.sleds import Sled, dummy, make, parameters, steady, told
from sb3.test_running_check import Told
from stable_baselines3.common.logger import Logger
from stable_baselines3.common.monitor import Monitor
from stable_baselines3.common.vec_env import (
    DummyVecEnv,
    SubprocVecEnv,
    VecFrameStack,
    VecMonitor,
    VecNormalize,
)

from sb3_bridge import GRPO
from sb3_bridge.settings import config_of
from sb3_bridge.twins import pace
from sb3_bridge.twins.twin import NoTwin, Twin
from sb3_bridge.update import follow

LENGTHS = {"n_steps": 32, "batch_size": 32, "horizon": 4, "branch_every": 1, "bootstrap": True}
IDS = (
    "CartPole-v0",
    "CartPole-v1",
    "Acrobot-v1",
    "Pendulum-v1",
    "MountainCar-v0",
    "MountainCarContinuous-v0",
)


def model_of(env: Any, dynamics: str = "twin", **settings: Any) -> GRPO:
    return make(env, dynamics=dynamics, **LENGTHS | settings)


def speed(state: Any, action: Any, next_state: Any) -> Any:
    return next_state[1]


class Seeded(MountainCarEnv):
    """A subclass that only starts elsewhere."""

    def reset(self, **arguments: Any) -> Any:
        super().reset(**arguments)
        self.state = (-0.5, 0.01)
        return np.array(self.state, np.float32), {}


class Windy(CartPoleEnv):
    """A subclass with a step of its own, which does the same."""

    def step(self, action: Any) -> Any:
        return super().step(action)


class Sticky(AcrobotEnv):
    """A subclass that replaces what its step calls."""

    def _dsdt(self, augmented: Any) -> Any:
        return super()._dsdt(augmented)


def patched() -> gym.Env:
    env = CartPoleEnv()
    env.step = lambda action, step=env.step: step(action)  # type: ignore[method-assign]
    return env


def noisy() -> gym.Env:
    env = AcrobotEnv()
    env.torque_noise_max = 0.5
    return env


class Late(gym.Wrapper):
    """Changes nothing for its first steps, and then the action, the reward, or the observation."""

    def __init__(self, env: gym.Env, what: str, late: int = 150):
        super().__init__(env)
        self.what, self.late, self.age = what, late, 0

    def step(self, action: Any) -> Any:
        self.age += 1
        is_late = self.age > self.late
        if is_late and self.what == "action":
            action = 1 - action
        observation, reward, *rest = self.env.step(action)
        if is_late and self.what == "reward":
            reward += 1e-3
        if is_late and self.what == "observation":
            observation = observation + np.float32(1e-3)
        if is_late and self.what == "end":
            rest[0] = True
        return observation, reward, *rest


@pytest.mark.parametrize("env_id", IDS)
@pytest.mark.filterwarnings("ignore:.*CartPole-v0 is out of date")
def test_gymnasiums_classic_control_has_twins(env_id, capsys):
    model = make(env_id, verbose=1)
    assert model.chosen_dynamics == "twin"
    assert "a JAX world, proved by replay" in told(capsys)


TRANSPARENT = {
    "subclass": lambda: dummy(lambda: Monitor(Seeded())),
    "statistics": lambda: dummy(lambda: wrappers.RecordEpisodeStatistics(gym.make("CartPole-v1"))),
    "two limits": lambda: dummy(lambda: wrappers.TimeLimit(gym.make("CartPole-v1"), 7)),
    "VecMonitor": lambda: VecMonitor(dummy(CartPoleEnv)),
    "VecNormalize of nothing": lambda: VecNormalize(dummy(CartPoleEnv), norm_obs=False, norm_reward=False),
    "wrapper that changes nothing": lambda: dummy(lambda: Late(CartPoleEnv(), "nothing")),
}


@pytest.mark.parametrize("kind", TRANSPARENT)
def test_what_changes_no_transition_changes_nothing(kind):
    model = model_of(TRANSPARENT[kind]())
    model.learn(64)
    assert model.chosen_dynamics == "twin"
    assert 64 * 2 <= model.simulator_steps <= 64 * 8 * 4
    rewards = gym.make("CartPole-v1").env  # the environments were stepped as often as was counted
    assert rewards is not None and model.num_timesteps == 64


REFUSED = {
    "own step": (lambda: dummy(Windy), r"Windy\.step is not that of CartPoleEnv"),
    "own part of a step": (lambda: dummy(Sticky), r"Sticky\._dsdt is not that of AcrobotEnv"),
    "patched": (lambda: dummy(patched), r"CartPoleEnv\.step is not that of CartPoleEnv"),
    "noise": (lambda: dummy(noisy), "torque_noise_max=0.5 is noise"),
    "rewards": (
        lambda: dummy(
            lambda: wrappers.TransformReward(gym.make("CartPole-v1"), lambda reward: reward * 1.001)
        ),
        r"environment 0, after its action \d at step 0: the twin's reward is 1., the environment's 1.001",
    ),
    "actions": (
        lambda: dummy(lambda: wrappers.RescaleAction(gym.make("Pendulum-v1"), np.float32(-1), np.float32(1))),
        "the twin's observation is",
    ),
    "shapes": (
        lambda: dummy(lambda: wrappers.TimeAwareObservation(gym.make("CartPole-v1"))),
        r"the twin's observation has shape \[4\], the environment's \[5\]",
    ),
    "second one": (
        lambda: DummyVecEnv([CartPoleEnv, lambda: Late(CartPoleEnv(), "observation", 40)]),
        "environment 1, after its action . at step 40: the twin's observation is",
    ),
    "two kinds": (lambda: DummyVecEnv([Seeded, lambda: MountainCarEnv(), lambda: Other()]), "in common"),
    "VecFrameStack": (lambda: VecFrameStack(dummy(CartPoleEnv), 2), "VecFrameStack keeps frames"),
}


class Other(gym.Env):
    """Looks like a car, and is none."""

    observation_space, action_space = MountainCarEnv().observation_space, MountainCarEnv().action_space


@pytest.mark.parametrize("kind", REFUSED)
def test_what_is_no_twin_is_refused_with_the_reason(kind):
    make_env, why = REFUSED[kind]
    with pytest.raises(NoTwin, match=why) as caught:
        model_of(make_env())
    assert isinstance(caught.value, ValueError) and caught.value.is_known


def test_where_there_is_none_auto_goes_on_and_says_why_if_there_could_have_been(capsys):
    model = make(dummy(Windy), verbose=1)
    assert model.chosen_dynamics == "clone"
    assert "Windy.step is not that of CartPoleEnv; branches take" in told(capsys)
    assert make(dummy(Sled), verbose=1).chosen_dynamics == "clone"
    assert "twin" not in told(capsys)
    with pytest.raises(
        NoTwin, match=r"no twin of sb3\.sleds\.Sled is known.*register_twin\(Sled, world="
    ) as caught:
        model_of(dummy(Sled))
    assert not caught.value.is_known


def limited() -> gym.Env:
    return wrappers.TimeLimit(Seeded(), 6)


@pytest.mark.parametrize("rewarded", [False, True])
def test_branches_in_a_twin_are_those_of_clones(rewarded):
    """As many steps, and the same update: time limits and the user's reward included."""
    reward = {"reward_function": speed} if rewarded else {}
    made = {}
    for dynamics in ("twin", "clone"):
        env = DummyVecEnv([limited, lambda: wrappers.TimeLimit(Fares(), 9)])
        model = steady(model_of(env, dynamics, max_grad_norm=1e9, **reward))
        model.learn(64)
        made[dynamics] = model
    assert made["twin"].simulator_steps == made["clone"].simulator_steps < 64 * 3 * 4
    before = parameters(steady(model_of(dummy(limited), "twin", **reward)))
    after = {name: parameters(model) for name, model in made.items()}
    assert np.abs(after["twin"] - before).max() > 0
    np.testing.assert_allclose(after["twin"], after["clone"], atol=1e-5 * np.abs(before).max())


class Fares(MountainCarEnv):
    """A car with another goal, which it reaches."""

    def __init__(self) -> None:
        super().__init__(goal_velocity=0.01)
        self.goal_position = -0.48


def test_parameters_are_those_of_each_environment_whenever_they_change():
    def harder(variables: Any, _: Any) -> bool:
        core = variables["env"].envs[1].unwrapped
        core.length, core.force_mag = core.length + 0.01, core.force_mag + 0.1
        return True

    env = DummyVecEnv([lambda: gym.make("CartPole-v1")] * 2)
    env.envs[0].unwrapped.gravity = 3.0
    env.envs[0].unwrapped.kinematics_integrator = "verlet"
    model = model_of(env)
    model.learn(4 * 64, callback=harder)
    assert model.chosen_dynamics == "twin" and env.envs[1].unwrapped.length > 1.5


LATE = {"action": "observation", "reward": "reward", "observation": "observation", "end": "terminated"}


@pytest.mark.parametrize("what", LATE)
def test_what_shows_late_ends_the_use_of_a_twin(what):
    # The check at the start plays its first 128 steps at least, in episodes of its own.
    env = DummyVecEnv([CartPoleEnv, *[lambda: Late(CartPoleEnv(), what, 200)] * 3])
    model = model_of(env)
    with pytest.raises(
        NoTwin, match="dynamics='twin' cannot be gone on with: environment [123], after"
    ) as caught:
        model.learn(4 * 256)
    assert caught.match(f"the twin's {LATE[what]} is")
    assert 4 * 200 <= model.num_timesteps <= 4 * 224

    env = DummyVecEnv([CartPoleEnv, *[lambda: Late(CartPoleEnv(), what, 200)] * 3])
    lines = Told()
    model = model_of(env, "auto")
    model.set_logger(Logger(None, [lines]))
    model.learn(4 * 256)
    assert model.num_timesteps == 4 * 256 and model.chosen_dynamics == "clone"
    (line,) = [line for line in lines.lines if "follows candidates in a twin no longer" in line]
    assert f"the twin's {LATE[what]} is" in line


def test_in_other_processes_it_is_the_same_run():
    runs = []
    for kind in (DummyVecEnv, SubprocVecEnv):
        env = kind([lambda: gym.make("Pendulum-v1", max_episode_steps=9)] * 2)
        try:
            model = model_of(env)
            model.learn(128)
            runs.append((parameters(model), model.simulator_steps))
        finally:
            env.close()
    np.testing.assert_array_equal(*[run[0] for run in runs])
    assert runs[0][1] == runs[1][1]


def test_faults_in_other_processes_are_named():
    env = SubprocVecEnv([CartPoleEnv, Windy])
    try:
        with pytest.raises(NoTwin, match=r"environment 1: Windy\.step"):
            model_of(env)
    finally:
        env.close()


def test_the_environment_is_only_read():
    env = DummyVecEnv([lambda: Monitor(gym.make("CartPole-v1"))])
    env.seed(3)
    env.reset()
    core = env.envs[0].unwrapped
    before = core.state.copy(), core.np_random.bit_generator.state["state"], np.random.get_state()[1].copy()
    model_of(env)
    assert (core.state == before[0]).all() and core.np_random.bit_generator.state["state"] == before[1]
    assert env.envs[0].get_episode_rewards() == []


def test_a_dict_of_what_the_twin_gives_is_another_observation():
    class Named(gym.ObservationWrapper):
        def __init__(self, env):
            super().__init__(env)
            self.observation_space = gym.spaces.Dict(only=env.observation_space)

        def observation(self, observation):
            return {"only": observation}

    with pytest.raises(NoTwin, match="the twin gives observation, .*the environment observation\\['only'\\]"):
        Twin(dummy(lambda: Named(CartPoleEnv())))


def test_sampled_actions_persist_at_first_and_then_no_more():
    model = make("Pendulum-v1", dynamics="twin", **LENGTHS)
    assert config_of(model).persistence == 0.8
    model.learn(64)
    assert config_of(model).persistence == pytest.approx(0.8 * (1 - 64 / 10_000))
    programs = follow.of()._cache_size()
    model._n_iterations = 10_000
    assert config_of(model).persistence == 0.0
    model.learn(32, reset_num_timesteps=False)
    assert follow.of()._cache_size() == programs


@pytest.mark.parametrize(
    ("env_id", "settings", "expected"),
    [
        ("CartPole-v1", {}, None),  # all actions are compared
        ("Pendulum-v1", {"persistence": 0}, None),
        ("Pendulum-v1", {"persistence": 0.3}, 0.3),
        ("Pendulum-v1", {"reward_function": speed}, None),
        ("Pendulum-v1", {"dynamics": "clone"}, None),
        ("Pendulum-v1", {"candidates": "episodes", "dynamics": "auto"}, None),
    ],
)
@pytest.mark.filterwarnings("ignore:GRPO compares episodes")
def test_elsewhere_none_persist_unless_asked_for(env_id, settings, expected):
    model = make(env_id, **LENGTHS | {"dynamics": "twin", **settings})
    assert config_of(model).persistence == expected


@pytest.mark.parametrize("given", [None, 0, 0.3])
def test_where_no_action_makes_a_difference_for_long_actions_persist(given, capsys):
    model = make(
        "MountainCar-v0", **LENGTHS | {"dynamics": "twin", "bootstrap": None, "persistence": given}, verbose=1
    )
    seen = []
    for _ in range(2 * pace.SILENT + 1):
        seen.append(config_of(model).persistence)
        model.learn(32, reset_num_timesteps=False)
    # A critic, under which actions do differ, is asked in every second rollout: after so many silent ones of the others.
    by_itself = [None] * (2 * pace.SILENT - 1) + [0.8] * 2
    assert seen == (by_itself if given is None else [given or None] * len(by_itself))
    assert ("from now on they persist" in capsys.readouterr().out) == (given is None)
    model._pace["has_spoken"] = True
    assert config_of(model).persistence == seen[-1], "it goes on so"
    del model._pace["n_silent"]  # a file from before
    assert config_of(model).persistence == (given or None)
