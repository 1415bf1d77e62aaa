"""Running mean and variance of observations, kept in the training state."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import struct

from grpo_jax import counter, shards
from grpo_jax.types import Counter, PyTree

CLIP = 10.0
"""Normalised observations are clipped to +-10 standard deviations, as in SB3's VecNormalize."""


class RunningStatistics(struct.PyTreeNode):
    """Mean and variance of all observations seen.

    Means and no sums: a sum stands still in float32 once it is 2**24 times what is added to it.

    Attributes:
      mean: ``[*shape]``, or a dict of such arrays.
      variance: the same; the mean square deviation.
      count: of observations, exact.
    """

    mean: PyTree
    variance: PyTree
    count: Counter


def initial(example: PyTree) -> RunningStatistics:
    """Statistics of nothing yet: they leave observations as they are."""
    dtype = jnp.result_type(float)

    def zeros(leaf: jax.Array) -> jax.Array:
        return jnp.zeros(leaf.shape, dtype)

    return RunningStatistics(jax.tree.map(zeros, example), jax.tree.map(zeros, example), counter.zero())


def update(statistics: RunningStatistics, batch: PyTree) -> RunningStatistics:
    """Adds a batch ``[N, *shape]``, and those of all shards (Chan et al. 1979, parallel form of Welford's algorithm, divided by the count)."""
    n_new = jax.tree.leaves(batch)[0].shape[0] * shards.count()
    count = counter.add(statistics.count, jnp.uint32(n_new))
    share = n_new / counter.to_float(count)  # of the batch in all that was seen

    def moved_mean(mean: jax.Array, batch: jax.Array) -> jax.Array:
        return mean + (shards.mean(jnp.mean(batch, axis=0)) - mean) * share

    def moved_variance(variance: jax.Array, mean: jax.Array, batch: jax.Array) -> jax.Array:
        batch_mean = shards.mean(jnp.mean(batch, axis=0))
        own = shards.mean(jnp.mean((batch - batch_mean) ** 2, axis=0))
        # The squares of the means' distance first: it is what else could be lost beside a large variance.
        return variance + (own - variance + (batch_mean - mean) ** 2 * (1.0 - share)) * share

    return RunningStatistics(
        mean=jax.tree.map(moved_mean, statistics.mean, batch),
        variance=jax.tree.map(moved_variance, statistics.variance, statistics.mean, batch),
        count=count,
    )


def normalize(statistics: RunningStatistics, observation: PyTree) -> PyTree:
    """Observations with mean 0 and variance 1, clipped; ``[..., *shape]``."""
    is_known = (statistics.count.low > 1) | (statistics.count.high > 0)

    def scaled(observation: jax.Array, mean: jax.Array, variance: jax.Array) -> jax.Array:
        variance = jnp.where(is_known, variance, 1.0)
        return jnp.clip((observation - mean) / jnp.sqrt(variance + 1e-8), -CLIP, CLIP)

    return jax.tree.map(scaled, observation, statistics.mean, statistics.variance)
