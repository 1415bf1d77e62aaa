"""Running mean and variance of observations, kept in the training state."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import struct

from grpo_jax.types import PyTree

CLIP = 10.0
"""Normalised observations are clipped to +-10 standard deviations, as in SB3's VecNormalize."""


class RunningStatistics(struct.PyTreeNode):
    """Mean and sum of squared deviations of all observations seen; both ``[*shape]``, ``count`` ``[]``."""

    mean: jax.Array
    sum_squares: jax.Array
    count: jax.Array


def initial(example: jax.Array) -> RunningStatistics:
    """Statistics of nothing yet: they leave observations as they are."""
    dtype = jnp.result_type(float)
    return RunningStatistics(
        jnp.zeros(example.shape, dtype), jnp.zeros(example.shape, dtype), jnp.zeros((), dtype)
    )


def update(statistics: RunningStatistics, batch: jax.Array) -> RunningStatistics:
    """Adds a batch ``[N, *shape]`` (Chan et al. 1979, parallel form of Welford's algorithm)."""
    n_new = jnp.asarray(batch.shape[0], statistics.count.dtype)
    mean = jnp.mean(batch, axis=0)
    sum_squares = jnp.sum((batch - mean) ** 2, axis=0)
    total = statistics.count + n_new
    delta = mean - statistics.mean
    return RunningStatistics(
        mean=statistics.mean + delta * n_new / total,
        sum_squares=statistics.sum_squares + sum_squares + delta**2 * statistics.count * n_new / total,
        count=total,
    )


def normalize(statistics: RunningStatistics, observation: PyTree) -> jax.Array:
    """Observations with mean 0 and variance 1, clipped; ``[..., *shape]``."""
    variance = jnp.where(
        statistics.count > 1, statistics.sum_squares / jnp.maximum(statistics.count, 1.0), 1.0
    )
    scaled = (observation - statistics.mean) / jnp.sqrt(variance + 1e-8)
    return jnp.clip(scaled, -CLIP, CLIP)
