import functools

import jax
import numpy as np
import pytest
from toys import MaskedLine

import grpo_jax
from grpo_jax.noise import as_key, split
from grpo_jax.spaces import Discrete
from grpo_jax.training.rollout import rollout, start


@functools.partial(jax.jit, static_argnames=("n_steps", "n_envs", "keep"))
def roll(env, n_steps, n_envs=2, keep=True, persistence=None):
    config = grpo_jax.GRPOConfig(n_envs=n_envs, batch_size=n_envs)
    policy = grpo_jax.make_policy(config, env.observation_space, env.action_space)
    key = as_key(jax.random.key(0))
    environments = start(env, split(key, n_envs))
    return rollout(env, policy, policy.init(key), environments, key, n_steps, keep, persistence)


def test_episodes_start_over_and_are_counted():
    environments, trajectory = roll(MaskedLine(Discrete(2), goal=3), 7)
    # Positions of the decision states: three steps to the goal, then from the start again.
    np.testing.assert_array_equal(trajectory.observation[:, 0, 0], [0, 1, 2, 0, 1, 2, 0])
    np.testing.assert_array_equal(trajectory.next_observation[:, 0, 0], [1, 2, 3, 1, 2, 3, 1])
    np.testing.assert_array_equal(trajectory.terminated[:, 0], [0, 0, 1, 0, 0, 1, 0])
    np.testing.assert_array_equal(trajectory.truncated, False)
    np.testing.assert_array_equal(environments.last_return, 1 + 2 + 3)
    np.testing.assert_array_equal(environments.last_length, 3)
    np.testing.assert_array_equal(environments.episode_return, 1)
    np.testing.assert_array_equal(environments.episode_length, 1)


def test_a_time_limit_truncates_and_does_not_terminate():
    _, trajectory = roll(MaskedLine(Discrete(2), goal=100, limit=2), 4)
    np.testing.assert_array_equal(trajectory.truncated[:, 0], [0, 1, 0, 1])
    np.testing.assert_array_equal(trajectory.terminated, False)


def test_statistics_are_unknown_before_the_first_end():
    environments, trajectory = roll(MaskedLine(Discrete(2), goal=9), 4, keep=False)
    np.testing.assert_array_equal(environments.last_return, 0.0)
    np.testing.assert_array_equal(environments.last_length, 0.0)  # 0 says that none has finished
    assert trajectory.next_observation is None


def test_states_are_the_decision_states_of_the_environment():
    env = grpo_jax.make("CartPole-v1")
    _, trajectory = roll(env, 20)
    state = np.stack([trajectory.state.x, trajectory.state.x_dot, trajectory.state.theta], axis=-1)
    np.testing.assert_array_equal(state, trajectory.observation[..., :3])
    ended = np.asarray(trajectory.terminated | trajectory.truncated)
    goes_on = ~ended[:-1]
    np.testing.assert_array_equal(
        np.asarray(trajectory.next_observation)[:-1][goes_on], np.asarray(trajectory.observation)[1:][goes_on]
    )


@pytest.mark.parametrize("env_id", ["CartPole-v1", "Pendulum-v1"])
def test_actions_persist_until_the_episode_ends(env_id):
    _, trajectory = roll(grpo_jax.make(env_id), 400, n_envs=4, persistence=1.0)
    action = np.asarray(trajectory.action).reshape(400, 4)
    same = action[1:] == action[:-1]
    ended = np.asarray(trajectory.ended)[:-1]
    assert same[~ended].all()
    assert ended.any() and not same[ended].all()  # the policy is asked again


def test_persistence_is_a_probability():
    _, trajectory = roll(grpo_jax.make("Pendulum-v1"), 150, n_envs=64, persistence=0.7)
    action = np.asarray(trajectory.action).reshape(150, 64)
    share = (action[1:] == action[:-1]).mean()  # a Gaussian never repeats itself by chance
    assert abs(share - 0.7) < 4 * np.sqrt(0.7 * 0.3 / (149 * 64))
    _, trajectory = roll(grpo_jax.make("Pendulum-v1"), 50, persistence=0.0)
    action = np.asarray(trajectory.action)
    assert (action[1:] != action[:-1]).all()
