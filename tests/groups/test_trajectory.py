"""Trajectory groups against numbers computed by hand; columns are environments, rows time."""

import functools

import jax
import numpy as np
import pytest

from grpo_jax.groups.trajectory import first_episode, returns_to_go, trajectory_advantages

# Two groups of two: lengths 3 (not ended), 2; and 1, 3.
ENDED = np.array([[0, 0, 1, 0], [0, 1, 0, 0], [0, 0, 1, 1]], bool)
ALIVE = np.array([[1, 1, 1, 1], [1, 1, 0, 1], [1, 0, 0, 1]], bool)
# What is paid behind an end is garbage.
REWARDS = np.array([[1.0, 2.0, 5.0, 0.0], [2.0, 6.0, np.nan, 2.0], [4.0, 9e9, np.inf, 8.0]])
# gamma 0.5
TO_GO = np.array([[3.0, 5.0, 5.0, 3.0], [4.0, 6.0, 0.0, 6.0], [4.0, 0.0, 0.0, 8.0]])

jitted = jax.jit(trajectory_advantages, static_argnames=("group_size", "form", "baseline", "scale"))
run = functools.partial(jitted, REWARDS, ALIVE, group_size=2, gamma=0.5)


@pytest.mark.parametrize("wrap", [lambda f: f, jax.jit], ids=["plain", "jit"])
def test_episodes_and_returns(wrap):
    np.testing.assert_array_equal(wrap(first_episode)(ENDED), ALIVE)
    np.testing.assert_allclose(wrap(returns_to_go)(REWARDS, ALIVE, 0.5), TO_GO)


def test_only_the_first_episode_counts():
    ended = np.array([[True], [False], [True], [False]])
    np.testing.assert_array_equal(first_episode(ended)[:, 0], [True, False, False, False])
    assert np.all(first_episode(np.zeros((4, 1), bool)))


@pytest.mark.parametrize("plain", [False, True])
def test_outcome(plain):
    """Returns 3, 5 and 5, 3: every step of an episode gets the episode's advantage, none behind its end."""
    function = trajectory_advantages if plain else jitted
    kwargs = {"group_size": 2, "gamma": 0.5, "form": "outcome"}
    result = function(REWARDS, ALIVE, **kwargs, baseline="mean", scale="none")
    expected = np.array([[-1, 1, 1, -1], [-1, 1, 0, -1], [-1, 0, 0, -1]], float)
    np.testing.assert_allclose(result.advantage[..., 0], expected)
    np.testing.assert_array_equal(result.active, ALIVE)
    np.testing.assert_allclose(result.spread, np.ones((3, 4)))
    assert np.all(result.finite)


@pytest.mark.parametrize(("baseline", "factor"), [("mean", 1.0), ("policy", 1.0), ("leave_one_out", 2.0)])
@pytest.mark.parametrize("scale", ["none", "group", "batch"])
def test_process(baseline, factor, scale):
    """Group 0: to go 3, 5 then 4, 6, then one alone. Group 1: 5, 3, then one alone twice."""
    result = run(form="process", baseline=baseline, scale=scale)
    expected = factor * np.array([[-1, 1, 1, -1], [-1, 1, 0, 0], [0, 0, 0, 0]], float)  # all spreads are 1
    np.testing.assert_allclose(result.advantage[..., 0], expected, rtol=1e-6)
    active = np.array([[1, 1, 1, 1], [1, 1, 0, 0], [0, 0, 0, 0]], bool)
    np.testing.assert_array_equal(result.active, active)
    assert np.all(np.isfinite(result.advantage))


# One group of three with lengths 3, 3, 1 and different spreads over time.
THREE = np.array([[0.0, 4.0, 8.0], [1.0, 1.0, np.nan], [3.0, 1.0, np.nan]])
THREE_ALIVE = np.array([[1, 1, 1], [1, 1, 0], [1, 1, 0]], bool)
# gamma 1: to go 4, 6, 8; then 4, 2; then 3, 1.


def test_process_normalises_at_equal_time_among_the_living():
    function = functools.partial(
        jitted, THREE, THREE_ALIVE, group_size=3, gamma=1.0, form="process", baseline="mean"
    )
    std = np.sqrt(8 / 3)
    np.testing.assert_allclose(
        function(scale="none").advantage[..., 0], [[-2, 0, 2], [1, -1, 0], [1, -1, 0]], atol=1e-6
    )
    np.testing.assert_allclose(
        function(scale="group").advantage[..., 0], [[-2 / std, 0, 2 / std], [1, -1, 0], [1, -1, 0]], rtol=1e-6
    )
    root = np.sqrt((8 / 3 + 1 + 1) / 3)  # of the mean variance of the three times
    np.testing.assert_allclose(
        function(scale="batch").advantage[..., 0],
        np.array([[-2, 0, 2], [1, -1, 0], [1, -1, 0]]) / root,
        rtol=1e-6,
    )
    np.testing.assert_allclose(function(scale="none").spread[:, 0], [std, 1.0, 1.0], rtol=1e-6)


def test_outcome_with_unequal_lengths():
    result = jitted(
        THREE, THREE_ALIVE, group_size=3, gamma=1.0, form="outcome", baseline="leave_one_out", scale="none"
    )
    np.testing.assert_allclose(result.advantage[..., 0], [[-3, 0, 3], [-3, 0, 0], [-3, 0, 0]], atol=1e-6)


def test_groups_do_not_mix():
    """The second group's returns are of no concern to the first."""
    other = REWARDS.copy()
    other[0, 2:] += 100.0
    for form in ("outcome", "process"):
        kwargs = {"group_size": 2, "gamma": 0.5, "form": form, "scale": "group"}
        before, after = jitted(REWARDS, ALIVE, **kwargs), jitted(other, ALIVE, **kwargs)
        np.testing.assert_array_equal(before.advantage[:, :2], after.advantage[:, :2])


def test_a_broken_episode_breaks_its_group_alone():
    rewards = REWARDS.copy()
    rewards[1, 1] = np.nan  # alive
    for form in ("outcome", "process"):
        result = jitted(rewards, ALIVE, group_size=2, gamma=0.5, form=form)
        assert np.all(np.isfinite(result.advantage))
        np.testing.assert_array_equal(result.advantage[:, :2][:1], 0.0)
        assert not np.any(result.finite[0, :2]) and np.all(result.finite[:, 2:])
        np.testing.assert_allclose(result.advantage[0, 2:, 0], [1, -1], rtol=1e-6)
