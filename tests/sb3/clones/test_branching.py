"""Branches of many states in lock step: their returns, what they cost, and what the policy sees of them."""

from __future__ import annotations

from typing import Any

import gymnasium as gym
import numpy as np
import pytest
from gymnasium import spaces
from stable_baselines3.common.monitor import Monitor
from stable_baselines3.common.vec_env import (
    DummyVecEnv,
    VecFrameStack,
    VecMonitor,
    VecNormalize,
    VecTransposeImage,
)

from sb3_bridge.clones import brancher as branching
from sb3_bridge.clones.brancher import Brancher
from sb3_bridge.clones.copying import Unclonable

pytestmark = pytest.mark.usefixtures("quick_forks")


def both(n_states: int, n_actions: int = 2) -> np.ndarray:
    return np.broadcast_to(np.arange(n_actions), (n_states, n_actions))


class Repeat(gym.Env):
    """Pays for an action that is the one before, and a little by chance."""

    observation_space = spaces.Box(0, 1, (1,), np.float32)
    action_space = spaces.Discrete(2)
    last = 0

    def reset(self, *, seed: int | None = None, options: Any = None) -> Any:
        super().reset(seed=seed)
        self.last = 0
        return np.zeros(1, np.float32), {}

    def step(self, action: Any) -> Any:
        reward = float(action == self.last) + 0.001 * self.np_random.random()
        self.last = int(action)
        return np.zeros(1, np.float32), reward, False, False, {}


def coin(observations: Any, uniforms: Any) -> np.ndarray:
    return (uniforms[:, 0] < 0.5).astype(np.int64)


@pytest.fixture(scope="module")
def repeated() -> Any:
    env = DummyVecEnv([Repeat])
    brancher = Brancher(env)

    def returns(candidate: int = 0, horizon: int = 2, **settings: Any) -> np.ndarray:
        """Of 64 equal states, four candidates that are the same action each."""
        env.seed(0)
        env.reset()
        handles = [brancher.take() for _ in range(64)]
        same_action = np.full((64, 4), candidate)
        return brancher.branch(handles, same_action, coin, horizon=horizon, gamma=1.0, **settings)[0]

    return returns


def test_common_random_numbers_give_equal_candidates_equal_returns(repeated):
    shared, own = repeated(horizon=5), repeated(horizon=5, common_random_numbers=False)
    np.testing.assert_array_equal(shared, shared[:, :1].repeat(4, axis=1))
    assert (own != own[:, :1]).any(axis=1).all()
    assert len(np.unique(shared)) == 64  # states differ: nobody knows the real future
    np.testing.assert_array_equal(shared, repeated(horizon=5))
    assert (repeated(horizon=5, seed=1) != shared).all()


def test_rollouts_are_backed_up_by_mean_or_max(repeated):
    mean, best = repeated(n_rollouts=16), repeated(n_rollouts=16, backup="max")
    np.testing.assert_allclose(best, 2.0, atol=0.003)
    assert mean.mean() == pytest.approx(1.5, abs=0.05) and len(np.unique(mean.round(2))) > 4


@pytest.mark.parametrize("persistence", [None, 0.0, 0.6, 1.0])
def test_actions_persist(repeated, persistence):
    settings = {"n_rollouts": 8, "common_random_numbers": False, "persistence": persistence}
    found = repeated(candidate=1, **settings).mean(), repeated(candidate=0, **settings).mean()
    again = 0.5 + 0.5 * (persistence or 0.0)
    assert found == (pytest.approx(again, abs=0.04), pytest.approx(1 + again, abs=0.04))


def swing(observations: Any, uniforms: Any) -> np.ndarray:
    return (3.0 * np.asarray(uniforms)[:, :1] - 1.5 + np.asarray(observations)[:, 2:]).astype(np.float32)


def test_box_actions_are_clipped_as_the_environment_wants_them():
    env = DummyVecEnv([lambda: Monitor(gym.make("Pendulum-v1"))])
    brancher = Brancher(env)
    env.seed(0)
    env.reset()
    theta, speed = env.envs[0].unwrapped.state  # type: ignore[attr-defined]
    actions = np.array([-9.0, -2.0, 0.5, 2.0, 7.0]).reshape(1, 5, 1)
    returns, n_steps = brancher.branch([brancher.take()], actions, swing, horizon=1, gamma=1.0)
    angle = (theta + np.pi) % (2 * np.pi) - np.pi
    torque = np.clip(actions[0, :, 0], -2, 2)
    np.testing.assert_allclose(returns[0], -(angle**2 + 0.1 * speed**2 + 0.001 * torque**2), rtol=1e-5)
    assert n_steps == 5


def test_the_policy_sees_what_the_wrappers_make_and_the_critic_their_reward():
    env = VecMonitor(VecNormalize(DummyVecEnv([lambda: gym.make("Pendulum-v1")]), gamma=0.9))
    brancher = Brancher(env)
    env.reset()
    for _ in range(20):
        env.step(np.ones((1, 1)))
    normalizer: Any = env.venv
    before = normalizer.obs_rms.mean.copy()
    asked = []

    def act(observations: Any, uniforms: Any) -> np.ndarray:
        asked.append(observations)
        return swing(observations, uniforms)

    returns, _ = brancher.branch([brancher.take()], np.zeros((1, 1, 1)), act, horizon=2, gamma=0.0)
    np.testing.assert_array_equal(normalizer.obs_rms.mean, before)
    simulator: Any = gym.make("Pendulum-v1").unwrapped
    simulator.reset()
    simulator.state = env.unwrapped.envs[0].unwrapped.state  # type: ignore[attr-defined]
    observation, reward, *_ = simulator.step(np.zeros(1, np.float32))
    np.testing.assert_array_equal(asked[0][0], normalizer.normalize_obs(observation))
    assert returns[0, 0] == normalizer.normalize_reward(np.array([reward]))[0]


class Picture(gym.Env):
    """A frame that a bright dot crosses."""

    observation_space = spaces.Dict(
        {"image": spaces.Box(0, 255, (36, 36, 3), np.uint8), "time": spaces.Discrete(10)}
    )
    action_space = spaces.Discrete(2)

    def _seen(self) -> dict[str, Any]:
        image = np.zeros((36, 36, 3), np.uint8)
        image[self.column, :, 0] = 255
        return {"image": image, "time": self.column}

    def reset(self, *, seed: int | None = None, options: Any = None) -> Any:
        super().reset(seed=seed)
        self.column = 0
        return self._seen(), {}

    def step(self, action: Any) -> Any:
        self.column += 1 + int(action)
        return self._seen(), float(action), self.column >= 8, False, {}


def test_images_and_dicts_reach_the_policy_transposed_in_few_batch_sizes():
    env = VecTransposeImage(DummyVecEnv([Picture]))
    brancher = Brancher(env)
    env.reset()
    shapes = []

    def act(observations: Any, uniforms: Any) -> np.ndarray:
        shapes.append((observations["image"].shape, observations["time"].tolist()[:2]))
        return np.zeros(len(uniforms), np.int64)

    returns, n_steps = brancher.branch([brancher.take()], both(1), act, horizon=2, gamma=1.0)
    assert shapes == [((16, 3, 36, 36), [1, 2])]
    assert returns.tolist() == [[0.0, 1.0]] and n_steps == 4
    handles = [brancher.take() for _ in range(40)]
    brancher.branch(handles, both(40), act, horizon=6, gamma=1.0)
    assert {shape[0] for shape, _ in shapes} <= {16, 32, 64, 128, 256}


class Uncopyable(Picture):
    def __init__(self) -> None:
        self.stream = (number for number in range(10))  # a generator cannot be copied


@pytest.mark.parametrize(
    ("env", "message"),
    [
        (lambda: VecFrameStack(DummyVecEnv([lambda: gym.make("CartPole-v1")]), 2), "FrameStackObservation"),
        (lambda: DummyVecEnv([lambda: Uncopyable()]), "Uncopyable.stream cannot be copied: generator"),
    ],
)
def test_what_cannot_be_branched_is_refused_with_the_reason(env, message):
    with pytest.raises(Unclonable, match=message):
        Brancher(env())


def test_costs_are_estimated_from_the_check_and_bad_arguments_told_early():
    env = DummyVecEnv([lambda: gym.make("CartPole-v1")])
    brancher = Brancher(env)
    report = brancher.report
    branches = 100 * 2 * 3
    us = 100 * report.snapshot_us + branches * (report.restore_us + 7 * (report.step_us + branching.LOOP_US))
    assert brancher.seconds(100, 2, 7, 3) == pytest.approx(us * 1e-6)
    env.reset()
    with pytest.raises(ValueError, match="actions are for 2 states, but 1 handles"):
        brancher.branch([brancher.take()], both(2), coin, horizon=1, gamma=1.0)
    with pytest.raises(ValueError, match="horizon=0"):
        brancher.branch([brancher.take()], both(1), coin, horizon=0, gamma=1.0)
