"""The definition of a branch's return, for JAX's arrays and NumPy's alike, against a rollout in plain Python."""

import functools

import jax.numpy as jnp
import numpy as np
import pytest

from grpo_jax.groups.branch_return import add_reward, back_up, ends, open_end

both = pytest.mark.parametrize("xp", [jnp, np], ids=["jax", "numpy"])


def assert_array(value, expected, xp):
    assert isinstance(value, xp.ndarray)
    np.testing.assert_array_equal(value, expected)


@both
def test_what_ends_a_branch_and_what_stays_open(xp):
    terminated, truncated = xp.array([False, False, True, True]), xp.array([False, True, False, True])
    assert_array(ends(terminated, truncated, False), [False, True, True, True], xp)
    assert_array(ends(terminated, truncated, True), [False, False, True, True], xp)
    # A critic values the horizon and a truncation; a termination never, not even beside a truncation.
    assert_array(open_end(terminated), [True, True, False, False], xp)


@both
def test_branches_are_backed_up_along_any_axis(xp):
    totals = xp.array([[1.0, 3.0], [-2.0, 8.0]])
    assert_array(back_up(totals, "mean", 1), [2.0, 3.0], xp)
    assert_array(back_up(totals, "max", 1), [3.0, 8.0], xp)
    assert_array(back_up(totals, "max", 0), [1.0, 8.0], xp)


@both
@pytest.mark.parametrize("past_truncation", [False, True])
def test_a_return_is_that_of_plain_python(xp, past_truncation):
    """Three branches of three steps, gamma 1/2: one runs to the horizon, one is truncated, one terminates."""
    rewards = np.array([[1.0, 2.0, 4.0], [8.0, 16.0, 32.0], [64.0, 128.0, np.nan]])
    terminated = np.array([[0, 0, 0], [0, 0, 0], [0, 1, 0]], bool)
    truncated = np.array([[0, 0, 0], [1, 0, 0], [0, 1, 0]], bool)
    values = 1024.0
    total, discount, alive = xp.zeros(3), xp.ones(3), xp.ones(3, bool)
    is_open = xp.zeros(3, bool)
    for k in range(3):
        keep = functools.partial(lambda alive, earned: xp.where(alive, earned, 0.0), alive)
        total = add_reward(total, discount, xp.array(rewards[:, k]), keep)
        discount = xp.where(alive, discount * 0.5, discount)
        is_open = xp.where(alive, open_end(xp.array(terminated[:, k])), is_open)
        alive = alive & ~ends(xp.array(terminated[:, k]), xp.array(truncated[:, k]), past_truncation)
    total = add_reward(total, discount, values, lambda earned: xp.where(is_open, earned, 0.0))
    cut = 8 + 0.5 * values if not past_truncation else 8 + 8 + 8 + 0.125 * values
    assert_array(total, [1 + 1 + 1 + 0.125 * values, cut, 64 + 64], xp)
