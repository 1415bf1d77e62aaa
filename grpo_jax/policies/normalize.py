"""Running mean and variance of observations, kept in the training state."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import struct

from grpo_jax.types import PyTree

CLIP = 10.0
"""Normalised observations are clipped to +-10 standard deviations, as in SB3's VecNormalize."""


class RunningStatistics(struct.PyTreeNode):
    """Mean and sum of squared deviations of all observations seen.

    Attributes:
      mean: ``[*shape]``, or a dict of such arrays.
      sum_squares: the same.
      count: ``[]``.
    """

    mean: PyTree
    sum_squares: PyTree
    count: jax.Array


def initial(example: PyTree) -> RunningStatistics:
    """Statistics of nothing yet: they leave observations as they are."""
    dtype = jnp.result_type(float)

    def zeros(leaf: jax.Array) -> jax.Array:
        return jnp.zeros(leaf.shape, dtype)

    return RunningStatistics(jax.tree.map(zeros, example), jax.tree.map(zeros, example), jnp.zeros((), dtype))


def update(statistics: RunningStatistics, batch: PyTree) -> RunningStatistics:
    """Adds a batch ``[N, *shape]`` (Chan et al. 1979, parallel form of Welford's algorithm)."""
    count = statistics.count
    n_new = jnp.asarray(jax.tree.leaves(batch)[0].shape[0], count.dtype)
    total = count + n_new

    def moved_mean(mean: jax.Array, batch: jax.Array) -> jax.Array:
        return mean + (jnp.mean(batch, axis=0) - mean) * n_new / total

    def moved_squares(sum_squares: jax.Array, mean: jax.Array, batch: jax.Array) -> jax.Array:
        batch_mean = jnp.mean(batch, axis=0)
        own = jnp.sum((batch - batch_mean) ** 2, axis=0)
        return sum_squares + own + (batch_mean - mean) ** 2 * count * n_new / total

    return RunningStatistics(
        mean=jax.tree.map(moved_mean, statistics.mean, batch),
        sum_squares=jax.tree.map(moved_squares, statistics.sum_squares, statistics.mean, batch),
        count=total,
    )


def normalize(statistics: RunningStatistics, observation: PyTree) -> PyTree:
    """Observations with mean 0 and variance 1, clipped; ``[..., *shape]``."""
    count = statistics.count

    def scaled(observation: jax.Array, mean: jax.Array, sum_squares: jax.Array) -> jax.Array:
        variance = jnp.where(count > 1, sum_squares / jnp.maximum(count, 1.0), 1.0)
        return jnp.clip((observation - mean) / jnp.sqrt(variance + 1e-8), -CLIP, CLIP)

    return jax.tree.map(scaled, observation, statistics.mean, statistics.sum_squares)
