"""Branches of many states in lock step: their returns, what they cost, and that nobody notices them."""

from __future__ import annotations

from typing import Any

import gymnasium as gym
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from gymnasium import spaces
from gymnasium.wrappers import TimeLimit
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
from sb3_bridge.functions.reward import Reward, resolve_reward


def lean(observations: Any, uniforms: Any) -> np.ndarray:
    """A policy of CartPole that keeps it up for a while; no random numbers."""
    return (observations[:, 2] + 0.3 * observations[:, 3] > 0).astype(np.int64)


def walk(
    env: Any, brancher: Brancher | None, n_steps: int, n_actions: int = 2
) -> tuple[list[int], np.ndarray]:
    """Random steps from a reset; handles and observations ``[T * N, ...]`` of the states before each of them."""
    rng = np.random.default_rng(7)
    observation, handles, seen = env.reset(), [], []
    for _ in range(n_steps):
        if brancher is not None:
            handles.append(brancher.take())
        seen.append(observation)
        observation = env.step(rng.integers(0, n_actions, env.num_envs))[0]
    return handles, np.concatenate(seen)


def both(n_states: int, n_actions: int = 2) -> np.ndarray:
    return np.broadcast_to(np.arange(n_actions), (n_states, n_actions))


def cartpole(limit: int) -> Any:
    return lambda: Monitor(TimeLimit(gym.make("CartPole-v1").unwrapped, limit))


def directly(
    states: np.ndarray, times: np.ndarray, limit: int, horizon: int, gamma: float, value: float
) -> Any:
    """Branches of CartPole by setting its state: returns [B, 2] and the number of steps."""
    env: Any = gym.make("CartPole-v1").unwrapped
    returns, n_steps = np.zeros((len(states), 2)), 0
    for index, (state, time) in enumerate(zip(states, times, strict=True)):
        for candidate in range(2):
            env.reset()
            env.state, env.steps_beyond_terminated = state, None
            action = candidate
            for k in range(horizon):
                observation, reward, terminated, _, _ = env.step(action)
                n_steps += 1
                returns[index, candidate] += gamma**k * reward
                over = terminated or time + k + 1 >= limit
                if over or k + 1 == horizon:
                    returns[index, candidate] += 0.0 if terminated else gamma ** (k + 1) * value
                    break
                action = int(lean(observation[None], None)[0])
    return returns, n_steps


@pytest.mark.parametrize("horizon", [1, 5, 30])
@pytest.mark.parametrize("value", [None, 3.0])
def test_returns_are_those_of_stepping_one_by_one(horizon, value):
    limit = 20  # cuts branches and episodes; random episodes also end by falling
    env = DummyVecEnv([cartpole(limit)] * 2)
    brancher = Brancher(env)
    rng, handles, states, times = np.random.default_rng(0), [], [], []
    env.seed(1)
    env.reset()
    for _ in range(40):
        handles.append(brancher.take())
        states += [one.unwrapped.state for one in env.envs]
        times += [one.env._elapsed_steps for one in env.envs]  # type: ignore[attr-defined]
        env.step(rng.integers(0, 2, 2))
    critic = None if value is None else lambda observations: np.full(len(observations), value)
    returns, n_steps = brancher.branch(handles, both(80), lean, horizon=horizon, gamma=0.9, value=critic)
    expected, n_expected = directly(np.array(states), np.array(times), limit, horizon, 0.9, value or 0.0)
    assert returns.dtype == np.float32 and n_steps == n_expected
    np.testing.assert_allclose(returns, expected, rtol=1e-5)
    if horizon == 30:
        assert n_steps < 80 * 2 * 20  # terminations and the time limit were met


def test_chunks_change_nothing(monkeypatch):
    env = DummyVecEnv([cartpole(500)])
    results = []
    for size in (256, 3):
        monkeypatch.setattr(branching, "POOL_SIZE", size)
        brancher = Brancher(env)
        env.seed(0)
        handles, _ = walk(env, brancher, 30)
        results.append(brancher.branch(handles, both(30), lean, horizon=12, gamma=0.9))
    np.testing.assert_array_equal(results[0][0], results[1][0])
    assert results[0][1] == results[1][1]


def slippery(observations: Any, uniforms: Any) -> np.ndarray:
    return np.minimum((uniforms[:, 0] * 4).astype(np.int64), 3)


def frozen(common: bool, **kwargs: Any) -> np.ndarray:
    env = DummyVecEnv([lambda: gym.make("FrozenLake-v1")])
    brancher = Brancher(env)
    env.seed(0)
    env.reset()
    handles = [brancher.take() for _ in range(64)]
    same_action = np.full((64, 4), 2)
    settings = {"horizon": 30, "gamma": 0.95, "common_random_numbers": common, **kwargs}
    return brancher.branch(handles, same_action, slippery, **settings)[0]


def test_common_random_numbers_give_equal_candidates_equal_returns():
    shared, own = frozen(True), frozen(False)
    np.testing.assert_array_equal(shared, shared[:, :1].repeat(4, axis=1))
    assert (own != own[:, :1]).any()
    assert len(np.unique(shared)) > 1  # states differ: nobody knows the real future
    np.testing.assert_array_equal(shared, frozen(True))
    assert (frozen(True, seed=1) != shared).any()


def test_rollouts_are_backed_up_by_mean_or_max():
    mean, best = frozen(True, n_rollouts=16), frozen(True, n_rollouts=16, backup="max")
    assert (best >= mean).all() and (best > mean).any()
    # A uniform policy on the 4 x 4 lake reaches the goal in 1.4% of its episodes (value iteration, gamma=1: 0.0139).
    wins = frozen(False, n_rollouts=32, horizon=100, gamma=1.0)
    assert wins.mean() == pytest.approx(0.0139, abs=0.006)


@pytest.mark.parametrize("persistence", [0.0, 0.8, 1.0])
def test_actions_persist(persistence: float):
    """Against value iteration on the lake's own table, the last action being part of the state."""
    table = gym.make("FrozenLake-v1").unwrapped.P
    wins = np.zeros((16, 4))
    for _ in range(2000):
        ahead = persistence * wins + (1 - persistence) * wins.mean(axis=1, keepdims=True)
        wins = np.array(
            [
                [
                    sum(p * (reward + (not done) * ahead[to, a]) for p, to, reward, done in table[s][a])
                    for a in range(4)
                ]
                for s in range(16)
            ]
        )
    found = frozen(False, n_rollouts=32, horizon=100, gamma=1.0, persistence=persistence)
    assert found.mean() == pytest.approx(wins[0, 2], abs=0.006)


def pendulum(n_envs: int) -> list[Any]:
    return [lambda: Monitor(gym.make("Pendulum-v1"))] * n_envs


def swing(observations: Any, uniforms: Any) -> np.ndarray:
    return (3.0 * np.asarray(uniforms)[:, :1] - 1.5 + np.asarray(observations)[:, 2:]).astype(np.float32)


def test_box_actions_are_clipped_as_the_environment_wants_them():
    env = DummyVecEnv(pendulum(1))
    brancher = Brancher(env)
    env.seed(0)
    env.reset()
    states = env.envs[0].unwrapped.state  # type: ignore[attr-defined]
    handles = [brancher.take()]
    actions = np.array([-9.0, -2.0, 0.5, 2.0, 7.0]).reshape(1, 5, 1)
    returns, n_steps = brancher.branch(handles, actions, swing, horizon=1, gamma=1.0)
    theta, speed = states
    angle = (theta + np.pi) % (2 * np.pi) - np.pi
    torque = np.clip(actions[0, :, 0], -2, 2)
    np.testing.assert_allclose(returns[0], -(angle**2 + 0.1 * speed**2 + 0.001 * torque**2), rtol=1e-5)
    assert n_steps == 5


def near(state: Any, action: Any, next_state: Any) -> Any:
    return 1.0 - abs(next_state[2]) - 0.1 * abs(next_state[0]) + 0.5 * state[3] + action


@pytest.mark.parametrize("framework", ["jax", "numpy"])
def test_a_users_reward_sees_the_transitions_of_the_branch(framework):
    env = VecNormalize(DummyVecEnv([lambda: gym.make("CartPole-v1")]))
    brancher = Brancher(env)
    env.seed(0)
    env.reset()
    handles, original, states = [], [], []
    for _ in range(10):
        handles.append(brancher.take())
        original.append(env.get_original_obs())
        states.append(env.unwrapped.envs[0].unwrapped.state)  # type: ignore[attr-defined]
        env.step(np.array([1]))
    returns, _ = brancher.branch(
        handles,
        both(10),
        lambda observations, uniforms: np.ones(len(observations), np.int64),
        horizon=2,
        gamma=0.5,
        reward=Reward(near, framework, False),
        observations=np.concatenate(original),
    )
    simulator: Any = gym.make("CartPole-v1").unwrapped
    for index, state in enumerate(states):
        for candidate in range(2):
            simulator.reset()
            simulator.state, simulator.steps_beyond_terminated = state, None
            first, _, over, _, _ = simulator.step(candidate)
            expected = near(np.float32(state), candidate, first)
            if not over:
                second, *_ = simulator.step(1)
                expected += 0.5 * near(first, 1, second)
            assert returns[index, candidate] == pytest.approx(expected, rel=1e-4)


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


def test_images_and_dicts_reach_the_policy_transposed():
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


def test_states_that_are_not_wanted_cost_nothing():
    env = DummyVecEnv([cartpole(500)] * 2)
    brancher = Brancher(env)
    handles, _ = walk(env, brancher, 3)
    wanted = np.array([True, False, False, False, False, True])
    returns, n_steps = brancher.branch(handles, both(6), lean, horizon=1, gamma=1.0, wanted=wanted)
    assert n_steps == 4 and returns.tolist() == [[1, 1], [0, 0], [0, 0], [0, 0], [0, 0], [1, 1]]


def test_the_policy_is_asked_with_few_batch_sizes():
    env = DummyVecEnv([cartpole(500)])
    brancher = Brancher(env)
    handles, _ = walk(env, brancher, 300)
    sizes = set()

    @jax.jit
    def act(observations: Any, uniforms: Any) -> jax.Array:
        sizes.add(len(observations))
        return (uniforms[:, 0] > 0.5).astype(jnp.int32)

    brancher.branch(handles, both(300), act, horizon=40, gamma=1.0)
    assert sizes <= {16, 32, 64, 128, 256}


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


class Uncopyable(Picture):
    def __init__(self) -> None:
        self.stream = (number for number in range(10))  # a generator cannot be copied


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"horizon": 0}, "horizon=0"),
        ({"n_rollouts": 0}, "n_rollouts=0"),
        ({"actions": both(2)}, "actions are for 2 states"),
        (
            {"reward": resolve_reward(near, gym.make("CartPole-v1").observation_space, spaces.Discrete(2))},
            "observations",
        ),
    ],
)
def test_bad_arguments_are_told_early(settings, message):
    env = DummyVecEnv([cartpole(500)])
    brancher = Brancher(env)
    env.reset()
    arguments = {"actions": both(1), "act": lean, "horizon": 1, "gamma": 1.0, **settings}
    with pytest.raises(ValueError, match=message):
        brancher.branch([brancher.take()], **arguments)


def test_costs_are_estimated_from_the_check():
    brancher = Brancher(DummyVecEnv([cartpole(500)]))
    report = brancher.report
    branches = 100 * 2 * 3
    us = 100 * report.snapshot_us + branches * (report.restore_us + 7 * (report.step_us + branching.LOOP_US))
    assert brancher.seconds(100, 2, 7, 3) == pytest.approx(us * 1e-6)


def test_mujoco_branches_repeat_the_original():
    pytest.importorskip("mujoco", reason="gymnasium[mujoco] is not installed")
    env = DummyVecEnv([lambda: gym.make("InvertedPendulum-v5")])
    brancher = Brancher(env)
    env.seed(0)
    env.reset()
    handles = [brancher.take()]
    actions = np.linspace(-1, 1, 4).astype(np.float32).reshape(1, 4, 1)
    push = lambda observations, uniforms: np.zeros((len(observations), 1), np.float32)
    value = lambda observations: observations[:, 1]
    returns, _ = brancher.branch(handles, actions, push, horizon=3, gamma=1.0, value=value)
    real = [env.step(action)[0] for action in (actions[:, 2], np.zeros((1, 1)), np.zeros((1, 1)))]
    assert returns[0, 2] == np.float32(3.0 + real[-1][0, 1])
