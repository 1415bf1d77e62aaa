"""Baselines and scales against numbers computed by hand, and what must hold for any returns."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from grpo_jax.config import GRPOConfig
from grpo_jax.groups.advantage import group_advantages

RETURNS = np.array([[1.0, 2.0, 6.0], [4.0, 4.0, 10.0], [-1.0, 0.0, 1.0]])
WEIGHTS = np.array([[0.5, 0.25, 0.25], [0.2, 0.3, 0.5], [0.1, 0.1, 0.8]])
EXECUTED = np.array([1, 2, 0])
ALL = np.ones((3, 3), bool)

# Means 3, 6, 0; sums of squared deviations 14, 24, 2.
STD = np.sqrt([14 / 3, 8.0, 2 / 3])
BATCH_STD = np.sqrt((14 / 3 + 8.0 + 2 / 3) / 3)  # 2.1082

# Shrinkage. Variances of the means 14/6, 4, 1/3. State 0: the others' means 6 and 0 have mean 3 and (unbiased) variance
# 18, of which (4 + 1/3) / 2 = 13/6 is noise: the true means' variance is 18 - 13/6 = 95/6, the shrinkage 13/108.
# State 1: 3 and 0: mean 1.5, variance 4.5, noise (7/3 + 1/3) / 2 = 4/3: 8/27. State 2: 3 and 6: mean 4.5, variance
# 4.5, noise (7/3 + 4) / 2 = 19/6: 19/27.
LEAVE_ONE_OUT = np.array([[4.0, 3.5, 1.5], [7.0, 7.0, 4.0], [0.5, 0.0, -0.5]])
SHRINKAGE = np.array([[13 / 108], [8 / 27], [19 / 27]])
BY_HAND = {
    "policy": [[-1.5, -0.5, 3.5], [-3.0, -3.0, 3.0], [-1.7, -0.7, 0.3]],
    "mean": [[-2.0, -1.0, 3.0], [-2.0, -2.0, 4.0], [-1.0, 0.0, 1.0]],
    "leave_one_out": [[-3.0, -1.5, 4.5], [-3.0, -3.0, 6.0], [-1.5, 0.0, 1.5]],
    "executed": [[0.0, -1.5, 0.0], [0.0, 0.0, 6.0], [-1.5, 0.0, 0.0]],
    "shrinkage": RETURNS - (1 - SHRINKAGE) * LEAVE_ONE_OUT - SHRINKAGE * np.array([[3.0], [1.5], [4.5]]),
}
BASELINES = list(BY_HAND)
SCALES = ["none", "group", "batch"]
jitted = jax.jit(group_advantages, static_argnames=("baseline", "scale"))


@pytest.mark.parametrize("function", [group_advantages, jitted], ids=["plain", "jit"])
@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("baseline", BASELINES)
def test_by_hand(baseline, scale, function):
    divisor = {"none": 1.0, "group": STD[:, None], "batch": BATCH_STD}[scale]
    result = function(RETURNS, WEIGHTS, ALL, EXECUTED, baseline=baseline, scale=scale)
    np.testing.assert_allclose(result.advantage, np.array(BY_HAND[baseline]) / divisor, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(result.spread, STD, rtol=1e-6)
    assert np.all(result.active) and np.all(result.finite)


def test_by_hand_with_forbidden_candidates():
    """Returns and weights of forbidden candidates are garbage that must not matter."""
    valid = np.array([[True, True, False], [True, False, True]])
    returns = np.array([[1.0, 4.0, np.nan], [0.0, -1e30, 2.0]])
    weights = np.array([[0.25, 0.75, 9.0], [0.5, np.nan, 0.5]])
    expected = {
        "policy": [[-2.25, 0.75, 0.0], [-1.0, 0.0, 1.0]],
        "mean": [[-1.5, 1.5, 0.0], [-1.0, 0.0, 1.0]],
        "leave_one_out": [[-3.0, 3.0, 0.0], [-2.0, 0.0, 2.0]],
        "executed": [[-3.0, 0.0, 0.0], [0.0, 0.0, 2.0]],
    }
    for baseline, advantage in expected.items():
        result = jitted(returns, weights, valid, np.array([0, 2]), baseline=baseline, scale="none")
        np.testing.assert_allclose(result.advantage, advantage, rtol=1e-6, atol=1e-7)
        np.testing.assert_allclose(result.spread, [1.5, 1.0], rtol=1e-6)
        assert np.all(result.active) and np.all(result.finite)


def test_the_defaults_are_the_configs():
    config = GRPOConfig()
    np.testing.assert_array_equal(
        group_advantages(RETURNS, WEIGHTS, ALL, EXECUTED).advantage,
        group_advantages(
            RETURNS,
            WEIGHTS,
            ALL,
            EXECUTED,
            baseline=config.baseline,
            scale=config.advantage_scale,
            spread_floor=config.spread_floor,
        ).advantage,
    )


def test_two_actions_keep_only_their_sign_under_the_groups_own_scale():
    """Why the batch's scale is the default."""
    returns, half = np.array([[0.0, 1.0], [0.0, 100.0]]), np.full((2, 2), 0.5)
    run = functools.partial(jitted, returns, half, half > 0, np.zeros(2, int), baseline="mean")
    np.testing.assert_allclose(run(scale="group").advantage, [[-1, 1], [-1, 1]], rtol=1e-6)
    ratio = run(scale="batch").advantage
    np.testing.assert_allclose(ratio[1] / ratio[0], [100.0, 100.0], rtol=1e-5)


# Invariants. Quarters of small integers: sums of them are exact, so no spread is an accident of rounding.

N_STATES, N_GROUP = 3, 4
matrices = st.lists(
    st.lists(st.integers(-40, 40).map(lambda n: n / 4), min_size=N_GROUP, max_size=N_GROUP),
    min_size=N_STATES,
    max_size=N_STATES,
).map(np.array)
weight_matrices = st.lists(
    st.lists(st.integers(1, 9), min_size=N_GROUP, max_size=N_GROUP), min_size=N_STATES, max_size=N_STATES
).map(lambda rows: np.array(rows, float) / np.sum(rows, axis=1, keepdims=True))
everything = np.ones((N_STATES, N_GROUP), bool)
first = np.zeros(N_STATES, int)
quick = settings(deadline=None, max_examples=15, derandomize=True, database=None)
for_all = pytest.mark.parametrize(("baseline", "scale"), [(b, s) for b in BASELINES for s in SCALES])


@quick
@given(returns=matrices, weights=weight_matrices)
def test_policy_baseline_sums_to_zero_under_the_weights(returns, weights):
    for scale in SCALES:
        advantage = jitted(returns, weights, everything, first, baseline="policy", scale=scale).advantage
        np.testing.assert_allclose(np.sum(weights * advantage, axis=1), 0.0, atol=2e-5)


@for_all
@quick
@given(returns=matrices, weights=weight_matrices, shift=matrices)
def test_adding_a_constant_to_a_group_changes_nothing(baseline, scale, returns, weights, shift):
    # Shrinkage looks at other groups' means: there the constant is one for all.
    constant = shift[:1, :1] if baseline == "shrinkage" else shift[:, :1]
    run = functools.partial(jitted, baseline=baseline, scale=scale)
    before, after = (run(r, weights, everything, first) for r in (returns, returns + constant))
    np.testing.assert_allclose(
        after.advantage, before.advantage, atol=5e-4 if baseline == "shrinkage" else 2e-5
    )
    np.testing.assert_array_equal(after.active, before.active)


@for_all
@quick
@given(returns=matrices, weights=weight_matrices, data=st.data())
def test_candidates_and_states_can_be_permuted(baseline, scale, returns, weights, data):
    order = np.array(data.draw(st.permutations(range(N_GROUP))))
    rows = np.array(data.draw(st.permutations(range(N_STATES))))
    executed = np.array([0, 2, 3])
    moved = np.argsort(order)[executed][rows]
    run = functools.partial(jitted, baseline=baseline, scale=scale)
    before = run(returns, weights, everything, executed)
    after = run(returns[rows][:, order], weights[rows][:, order], everything, moved)
    np.testing.assert_allclose(after.advantage, before.advantage[rows][:, order], atol=2e-5)
    np.testing.assert_array_equal(after.active, before.active[rows])


@pytest.mark.parametrize("scale", ["group", "batch"])
@pytest.mark.parametrize("baseline", BASELINES)
@quick
@given(returns=matrices, weights=weight_matrices, factor=st.sampled_from([0.5, 2.0, 64.0, 1024.0]))
def test_scales_undo_a_rescaling_of_returns(baseline, scale, returns, weights, factor):
    run = functools.partial(jitted, baseline=baseline, scale=scale)
    before, after = (run(r, weights, everything, first) for r in (returns, factor * returns))
    np.testing.assert_allclose(after.advantage, before.advantage, rtol=1e-5, atol=2e-5)


@for_all
@quick
@given(returns=matrices, weights=weight_matrices, bad=st.sampled_from([np.nan, np.inf, -np.inf]))
def test_a_broken_group_leaves_the_others_alone(baseline, scale, returns, weights, bad):
    broken = returns.copy()
    broken[1, 2] = bad
    still = returns.copy()
    still[1] = 0.0  # a group without spread: present, and nothing to learn from
    run = functools.partial(jitted, baseline=baseline, scale=scale)
    result, without = (run(r, weights, everything, first) for r in (broken, still))
    np.testing.assert_array_equal(result.advantage, without.advantage)
    np.testing.assert_array_equal(result.advantage[1], 0.0)
    np.testing.assert_array_equal(result.finite, [True, False, True])
    assert not result.active[1]
    assert np.all(np.isfinite(result.advantage)) and np.all(np.isfinite(result.spread))


@for_all
def test_no_spread_is_inactive(baseline, scale):
    """Also for constants that have no exact float, and for all groups at once (a batch without any scale)."""
    returns = np.broadcast_to([[0.1], [-1e6 / 3], [0.0]], (3, 3))
    result = jitted(returns, WEIGHTS, ALL, EXECUTED, baseline=baseline, scale=scale)
    np.testing.assert_array_equal(result.advantage, 0.0)
    assert not np.any(result.active) and np.all(result.finite)


@for_all
def test_fewer_than_two_candidates_are_inactive(baseline, scale):
    valid = np.array([[True, False, False], [False, False, False], [True, True, True]])
    returns = np.where(valid, RETURNS, np.nan)
    result = jitted(returns, WEIGHTS, valid, EXECUTED, baseline=baseline, scale=scale)
    np.testing.assert_array_equal(result.active, [False, False, True])
    np.testing.assert_array_equal(result.advantage[:2], 0.0)
    assert np.all(np.isfinite(result.advantage)) and np.any(result.advantage[2] != 0.0)
    assert np.all(np.isfinite(result.spread)) and np.all(result.finite)


@pytest.mark.parametrize("size", [2.0**-40, 1.0, 2.0**40])
def test_the_spread_floor_is_a_share_of_the_largest_return(size):
    """Standard deviations 0.01, 0.01, 100, 0 at largest returns 0.02, 1000.02, 100, 7, in whatever unit."""
    returns = size * np.array([[0.0, 0.02], [1000.0, 1000.02], [-100.0, 100.0], [7.0, 7.0]])
    half = np.full((4, 2), 0.5)
    run = functools.partial(jitted, returns, half, half > 0, np.zeros(4, int), baseline="mean")
    default = run()
    np.testing.assert_array_equal(default.active, [True, True, True, False])
    assert not np.any(default.below_floor)
    high = run(spread_floor=1e-4)
    np.testing.assert_array_equal(high.active, [True, False, True, False])
    np.testing.assert_array_equal(high.below_floor, [False, True, False, False])  # the last one is equal
    np.testing.assert_array_equal(run(spread_floor=2.0).active, [False] * 4)
    np.testing.assert_array_equal(run(spread_floor=2.0).below_floor, [True, True, True, False])
    np.testing.assert_array_equal(run(spread_floor=0.0).active, [True, True, True, False])
    # The masked groups are not in the batch's scale.
    np.testing.assert_allclose(run(spread_floor=0.9).advantage[2], [-1.0, 1.0], rtol=1e-6)


@for_all
def test_a_large_constant_in_all_returns_changes_nothing(baseline, scale):
    """Quarters beside 2^18: what float32 holds exactly, though neither their sums nor their squares."""
    rng = np.random.default_rng(0)
    returns = rng.integers(-8, 8, (64, 16)) / 4
    weights = rng.integers(1, 9, (64, 16)).astype(float)
    weights /= weights.sum(axis=1, keepdims=True)
    run = functools.partial(jitted, baseline=baseline, scale=scale)
    everyone, executed = returns < 9, rng.integers(0, 16, 64)
    near, far = (run(r, weights, everyone, executed) for r in (returns, returns + 2.0**18))
    assert np.all(far.active)
    np.testing.assert_allclose(far.advantage, near.advantage, atol=0.05 if baseline == "shrinkage" else 1e-4)


def test_rounding_is_no_spread_and_no_reason_to_lower_the_floor():
    """Equal candidates whose rewards came in another order: 1000 of them, summed one by one in float32."""
    rewards = np.random.default_rng(0).uniform(0.5, 1.5, 1000).astype(np.float32)
    orders = [rewards, rewards[::-1], np.sort(rewards), np.roll(rewards, 500)]
    returns = np.array([[np.cumsum(order)[-1] for order in orders]])
    assert np.ptp(returns) > 0
    result = jitted(returns, np.full((1, 4), 0.25), returns > 0, np.zeros(1, int), baseline="mean")
    assert not result.active[0]


def shrinkage_baseline(returns):
    n_states, n_group = returns.shape
    weights = np.full(returns.shape, 1 / n_group)
    result = jitted(
        returns,
        weights,
        weights > 0,
        np.zeros(n_states, int),
        baseline="shrinkage",
        scale="none",
        spread_floor=0.0,
    )
    assert np.all(result.active)
    return returns - np.asarray(result.advantage)


def baselines_to_mix(returns):
    """Leave-one-out ``[B, G]`` and the mean of the other groups' means ``[B, 1]``."""
    n_states, n_group = returns.shape
    leave_one_out = (returns.sum(1, keepdims=True) - returns) / (n_group - 1)
    means = returns.mean(1, keepdims=True)
    return leave_one_out, (means.sum() - means) / (n_states - 1)


@pytest.mark.parametrize("between", [0.0, 0.3, 3.0])
def test_shrinkage_lies_between(between):
    rng = np.random.default_rng(0)
    returns = between * rng.normal(size=(20, 1)) + rng.normal(size=(20, 5))
    leave_one_out, others = baselines_to_mix(returns)
    mixed = shrinkage_baseline(returns)
    lower, upper = np.minimum(leave_one_out, others), np.maximum(leave_one_out, others)
    assert np.all(mixed >= lower - 1e-5) and np.all(mixed <= upper + 1e-5)


def test_shrinkage_without_noise_is_leave_one_out():
    rng = np.random.default_rng(1)
    returns = rng.normal(size=(20, 1)) + 1e-3 * rng.normal(size=(20, 5))
    leave_one_out, others = baselines_to_mix(returns)
    np.testing.assert_allclose(shrinkage_baseline(returns), leave_one_out, atol=1e-5)
    assert np.max(np.abs(leave_one_out - others)) > 1.0


def test_shrinkage_of_equal_means_is_mostly_the_others():
    rng = np.random.default_rng(2)
    shares = []
    for _ in range(20):
        returns = 7.0 + rng.normal(size=(20, 5))
        leave_one_out, others = baselines_to_mix(returns)
        distance = leave_one_out - others
        shares.append(np.sum((leave_one_out - shrinkage_baseline(returns)) * distance) / np.sum(distance**2))
    assert np.mean(shares) > 0.75


@pytest.mark.parametrize("between", [0.1, 0.5, 2.0])
def test_shrinkage_estimates_better_than_either(between):
    """Squared distance to the true mean, over many batches: next to the better of what it mixes."""
    rng = np.random.default_rng(3)
    errors = []
    for _ in range(60):
        truth = between * rng.normal(size=(20, 1))
        returns = truth + rng.normal(size=(20, 5))
        candidates = (shrinkage_baseline(returns), *baselines_to_mix(returns))
        errors.append([np.mean((candidate - truth) ** 2) for candidate in candidates])
    shrunk, leave_one_out, others = np.mean(errors, axis=0)
    assert shrunk < min(leave_one_out, others) + 0.03 * max(leave_one_out, others), (
        shrunk,
        leave_one_out,
        others,
    )


def test_shrinkage_of_two_groups_is_leave_one_out():
    """A single other mean tells nothing about how much means differ."""
    for n_groups in (1, 2):
        np.testing.assert_allclose(
            shrinkage_baseline(RETURNS[:n_groups]), LEAVE_ONE_OUT[:n_groups], rtol=1e-6
        )


def test_float64():
    with jax.enable_x64(True):
        result = jitted(jnp.asarray(RETURNS), WEIGHTS, ALL, EXECUTED, baseline="mean", scale="batch")
        assert result.advantage.dtype == jnp.float64
        np.testing.assert_allclose(result.advantage, np.array(BY_HAND["mean"]) / BATCH_STD, rtol=1e-14)
