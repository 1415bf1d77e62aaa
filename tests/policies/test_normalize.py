from __future__ import annotations

import hypothesis.extra.numpy as hnp
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from grpo_jax import counter
from grpo_jax.policies import normalize
from grpo_jax.types import Counter

update = jax.jit(normalize.update)
# A few fixed sizes: every size is compiled once.
BATCHES = st.lists(
    st.sampled_from([1, 2, 5]).flatmap(
        lambda n: hnp.arrays(np.float32, (n, 2), elements=st.floats(-100, 100, width=32))
    ),
    min_size=1,
    max_size=6,
)


@given(BATCHES)
def test_statistics_are_those_of_all_batches_together(batches):
    statistics = normalize.initial(jnp.zeros(2))
    for batch in batches:
        statistics = update(statistics, batch)
    together = np.concatenate(batches).astype(np.float64)
    assert counter.to_int(statistics.count) == len(together)
    np.testing.assert_allclose(statistics.mean, together.mean(0), rtol=1e-4, atol=1e-3)
    np.testing.assert_allclose(statistics.variance, together.var(0), rtol=1e-3, atol=1e-2)


def test_a_small_spread_around_a_large_mean_survives():
    # The sum of squares minus the squared sum would lose all digits here.
    rng = np.random.default_rng(0)
    batches = 1000 + rng.normal(size=(50, 20, 1)).astype(np.float32) * np.float32(0.1)
    statistics = normalize.initial(jnp.zeros(1))
    for batch in batches:
        statistics = update(statistics, batch)
    together = batches.astype(np.float64).reshape(-1, 1)
    np.testing.assert_allclose(statistics.variance, together.var(0), rtol=0.02)


@pytest.mark.parametrize("seen", [2**24, 2**33 + 5])
def test_nothing_stands_still_beyond_what_float32_counts(seen):
    statistics = normalize.RunningStatistics(
        jnp.zeros(1), jnp.ones(1), Counter(jnp.uint32(seen >> 32), jnp.uint32(seen % 2**32))
    )
    batch = jnp.array([[1.0], [-1.0], [1.0]])
    for _ in range(50):
        statistics = update(statistics, batch)
    assert counter.to_int(statistics.count) == seen + 150
    np.testing.assert_allclose(statistics.variance, 1.0, rtol=1e-6)
    large = statistics
    for _ in range(50):
        large = update(large, 1e4 * batch)
    expected = (1e8 * 150 - 1.0 * 150) / counter.to_int(large.count) + 1.0
    np.testing.assert_allclose(large.variance, expected, rtol=1e-4)


@pytest.mark.parametrize("shape", [(), (3,), (2, 3)])
def test_shapes(shape):
    statistics = normalize.update(normalize.initial(jnp.zeros(shape)), jnp.ones((4, *shape)))
    assert statistics.mean.shape == statistics.variance.shape == shape
    assert statistics.count.low.shape == ()
    assert normalize.normalize(statistics, jnp.ones((5, 6, *shape))).shape == (5, 6, *shape)


def test_nothing_seen_leaves_observations_as_they_are(compiled):
    statistics = normalize.initial(jnp.zeros(3))
    observation = jnp.array([[1.5, -9.0, 0.25], [0.0, 3.0, 1e-3]])
    np.testing.assert_array_equal(compiled(normalize.normalize)(statistics, observation), observation)


def test_one_observation_has_no_variance_yet():
    statistics = normalize.update(normalize.initial(jnp.zeros(2)), jnp.array([[5.0, -3.0]]))
    np.testing.assert_array_equal(normalize.normalize(statistics, jnp.array([6.0, -3.5])), [1.0, -0.5])


def test_normalized_observations_by_hand(compiled):
    statistics = normalize.update(normalize.initial(jnp.zeros(1)), jnp.array([[1.0], [5.0]]))
    # Mean 3, standard deviation 2.
    normalized = compiled(normalize.normalize)(statistics, jnp.array([[3.0], [5.0], [-1.0]]))
    np.testing.assert_allclose(normalized, [[0.0], [1.0], [-2.0]], atol=1e-6)


def test_observations_are_clipped_at_ten_standard_deviations():
    statistics = normalize.update(normalize.initial(jnp.zeros(1)), jnp.array([[-1.0], [1.0]]))
    np.testing.assert_allclose(
        normalize.normalize(statistics, jnp.array([[9.0], [11.0], [-1e6], [jnp.inf]])),
        [[9.0], [10.0], [-10.0], [10.0]],
        rtol=1e-6,
    )


def test_a_constant_coordinate_stays_finite():
    statistics = normalize.update(normalize.initial(jnp.zeros(1)), jnp.full((8, 1), 2.0))
    np.testing.assert_array_equal(normalize.normalize(statistics, jnp.array([[2.0], [3.0]])), [[0.0], [10.0]])


def test_every_entry_of_a_dict_has_statistics_of_its_own(compiled):
    batch = {"a": jnp.array([[1.0], [5.0]]), "b": jnp.array([[[2.0, 0.0]], [[2.0, -2.0]]])}
    empty = normalize.initial({"a": jnp.zeros(1), "b": jnp.zeros((1, 2))})
    statistics = compiled(normalize.update)(empty, batch)
    assert counter.to_int(statistics.count) == 2
    for name, leaf in batch.items():
        alone = normalize.update(normalize.initial(leaf[0]), leaf)
        np.testing.assert_array_equal(statistics.mean[name], alone.mean)
        np.testing.assert_array_equal(statistics.variance[name], alone.variance)
    normalized = normalize.normalize(statistics, batch)
    np.testing.assert_allclose(normalized["a"], [[-1.0], [1.0]], rtol=1e-5)
    np.testing.assert_allclose(normalized["b"], [[[0.0, 1.0]], [[0.0, -1.0]]], rtol=1e-5, atol=1e-6)
