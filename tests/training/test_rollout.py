import jax
import numpy as np
from toys import MaskedLine

import grpo_jax
from grpo_jax.noise import as_key, split
from grpo_jax.spaces import Discrete
from grpo_jax.training.rollout import rollout, start


def roll(env, n_steps, n_envs=2, keep=True):
    config = grpo_jax.GRPOConfig(n_envs=n_envs, batch_size=n_envs)
    policy = grpo_jax.make_policy(config, env.observation_space, env.action_space)
    key = as_key(jax.random.key(0))
    environments = start(env, split(key, n_envs))
    return rollout(env, policy, policy.init(key), environments, key, n_steps, keep)


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
    assert np.isnan(environments.last_return).all()
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
