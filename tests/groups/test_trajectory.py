"""Trajectory groups against numbers computed by hand; columns are environments, rows time."""

import functools

import jax
import numpy as np
import pytest

from grpo_jax.groups.advantage import group_advantages
from grpo_jax.groups.trajectory import episode_advantages, trajectory_advantages

# Two groups of two: lengths 3 (not ended), 2; and 1, 3.
ENDED = np.array([[0, 0, 1, 0], [0, 1, 0, 0], [0, 0, 1, 1]], bool)
ALIVE = np.array([[1, 1, 1, 1], [1, 1, 0, 1], [1, 0, 0, 1]], bool)
# What is paid behind an end is garbage.
REWARDS = np.array([[1.0, 2.0, 5.0, 0.0], [2.0, 6.0, np.nan, 2.0], [4.0, 9e9, np.inf, 8.0]])

jitted = jax.jit(trajectory_advantages, static_argnames=("group_size", "form", "baseline", "scale"))
run = functools.partial(jitted, REWARDS, ALIVE, group_size=2, gamma=0.5)


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


# Steps at times 0, 1, 0, 1, 2, 0: the third group has one member, a return of the first is not known.
STEP_RETURNS = np.array([1.0, 4.0, 5.0, 8.0, 3.0, 99.0])
STEP_VALID = np.array([1, 1, 1, 1, 1, 0], bool)
STEP_TIME = np.array([0, 1, 0, 1, 2, 0])

episode_jitted = jax.jit(episode_advantages, static_argnames=("baseline", "scale"))


@pytest.mark.parametrize("function", [episode_advantages, episode_jitted], ids=["plain", "jit"])
@pytest.mark.parametrize(("baseline", "factor"), [("mean", 1.0), ("policy", 1.0), ("leave_one_out", 2.0)])
@pytest.mark.parametrize("scale", ["none", "group", "batch"])
def test_steps_are_compared_with_those_at_equal_time(function, baseline, factor, scale):
    """Group 0: 1, 5 about 3; group 1: 4, 8 about 6; both spreads are 2."""
    result = function(STEP_RETURNS, STEP_VALID, STEP_TIME, baseline=baseline, scale=scale)
    size = 2.0 if scale == "none" else 1.0
    expected = factor * size * np.array([-1, -1, 1, 1, 0, 0])
    np.testing.assert_allclose(result.advantage[:, 0], expected, rtol=1e-6)
    np.testing.assert_array_equal(result.active, [1, 1, 1, 1, 0, 0])
    np.testing.assert_allclose(result.spread, [2, 2, 2, 2, 0, 2], rtol=1e-6)
    assert np.all(result.finite)


def test_one_group_of_all_steps_is_a_group_of_group_advantages():
    returns = np.random.default_rng(0).normal(size=9)
    together = episode_advantages(returns, np.ones(9, bool), np.zeros(9, int), scale="group")
    weights, valid = np.full((1, 9), 1 / 9), np.ones((1, 9), bool)
    group = group_advantages(returns[None], weights, valid, np.zeros(1, int), baseline="mean", scale="group")
    np.testing.assert_allclose(together.advantage[:, 0], group.advantage[0], rtol=1e-5)


def test_one_return_that_is_not_finite_silences_its_group_and_is_told():
    returns = STEP_RETURNS.copy()
    returns[0] = np.nan
    result = episode_jitted(returns, STEP_VALID, STEP_TIME)
    np.testing.assert_array_equal(result.finite, [0, 1, 0, 1, 1, 0])
    np.testing.assert_array_equal(result.active, [0, 1, 0, 1, 0, 0])
    assert np.all(np.isfinite(result.advantage))


@pytest.mark.parametrize("scale", ["none", "group", "batch"])
def test_thousands_of_steps_beside_a_large_constant(scale):
    """Half of 4096 steps earn 0.25 more: advantages are -1/8 and 1/8, whatever all of them earn; equal ones have none."""
    returns = np.arange(4096) % 2 / 4
    valid, group = np.ones(4096, bool), np.zeros(4096, int)
    expected = (np.arange(4096) % 2 - 0.5) * (0.25 if scale == "none" else 2.0)
    for constant in (0.0, 2.0**14):
        result = episode_jitted(returns + constant, valid, group, scale=scale)
        np.testing.assert_allclose(result.advantage[:, 0], expected, rtol=1e-5)
    equal = episode_jitted(np.full(4096, 0.1), valid, group, scale=scale)
    assert not np.any(equal.active) and not np.any(equal.below_floor)


def test_differences_of_large_numbers_are_judged_by_their_size():
    """What a critic of 1e4 leaves over is rounding up to 1e-2, however it compares with itself."""
    rng = np.random.default_rng(0)
    returns, valid, group = 1e-3 * rng.normal(size=64), np.ones(64, bool), np.zeros(64, int)
    alone = episode_jitted(returns, valid, group)
    assert np.all(alone.active) and not np.any(alone.below_floor)
    result = episode_jitted(returns, valid, group, magnitude=np.full(64, 1e4))
    assert not np.any(result.active)
    lower = episode_jitted(
        returns + 0.5 * (np.arange(64) % 2), valid, group, magnitude=np.full(64, 1e4), spread_floor=1e-4
    )
    assert not np.any(lower.active) and np.all(lower.below_floor)
