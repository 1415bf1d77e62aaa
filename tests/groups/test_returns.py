"""Returns of executed steps against numbers computed by hand; columns are environments, rows time."""

import jax
import numpy as np
import pytest

from grpo_jax.groups.returns import ends_within, first_episode, lambda_returns, returns_to_go

jit_or_not = pytest.mark.parametrize("wrap", [lambda f: f, jax.jit], ids=["plain", "jit"])

# Lengths 3 (not ended), 2, 1 and 3.
ENDED = np.array([[0, 0, 1, 0], [0, 1, 0, 0], [0, 0, 1, 1]], bool)
ALIVE = np.array([[1, 1, 1, 1], [1, 1, 0, 1], [1, 0, 0, 1]], bool)
# What is paid behind an end is garbage.
REWARDS = np.array([[1.0, 2.0, 5.0, 0.0], [2.0, 6.0, np.nan, 2.0], [4.0, 9e9, np.inf, 8.0]])
# gamma 0.5
TO_GO = np.array([[3.0, 5.0, 5.0, 3.0], [4.0, 6.0, 0.0, 6.0], [4.0, 0.0, 0.0, 8.0]])


@jit_or_not
def test_episodes_and_returns(wrap):
    np.testing.assert_array_equal(wrap(first_episode)(ENDED), ALIVE)
    np.testing.assert_allclose(wrap(returns_to_go)(REWARDS, ALIVE, 0.5), TO_GO)


def test_only_the_first_episode_counts():
    ended = np.array([[True], [False], [True], [False]])
    np.testing.assert_array_equal(first_episode(ended)[:, 0], [True, False, False, False])
    assert np.all(first_episode(np.zeros((4, 1), bool)))


def test_which_episodes_end_within_a_rollout():
    ended = np.array([[0, 1, 0], [1, 0, 0], [0, 0, 0]], bool)
    np.testing.assert_array_equal(ends_within(ended), [[1, 1, 0], [1, 0, 0], [0, 0, 0]])


@jit_or_not
@pytest.mark.parametrize(
    ("gae_lambda", "expected"),
    [
        # gamma 1/2. Environment 0: never ends, cut after three rows. Environment 1: terminates, then truncated.
        (0.0, [[1 + 5.0, 1.0], [2 + 10.0, 2 + 15.0], [3 + 20.0, 3 + 20.0]]),
        (1.0, [[1 + 1 + 0.25 * (3 + 20.0), 1.0], [2 + 0.5 * 23.0, 2 + 15.0], [23.0, 23.0]]),
        # G = r + gamma ((1 - lambda) V' + lambda G'): 2 + 0.5 (10 + 11.5) = 12.75; 1 + 0.5 (5 + 6.375) = 6.6875.
        (0.5, [[6.6875, 1.0], [12.75, 17.0], [23.0, 23.0]]),
    ],
)
def test_lambda_returns(gae_lambda, expected, wrap):
    rewards = np.array([[1.0, 1.0], [2.0, 2.0], [3.0, 3.0]])
    values = np.array([[7.0, 7.0], [10.0, 8.0], [20.0, 9.0]])
    next_values = np.array([[10.0, 99.0], [20.0, 30.0], [40.0, 40.0]])
    terminated = np.array([[False, True], [False, False], [False, False]])
    ended = np.array([[False, True], [False, True], [False, False]])
    targets = wrap(lambda_returns)(rewards, values, next_values, terminated, ended, 0.5, gae_lambda)
    np.testing.assert_allclose(targets, expected, rtol=1e-6)
