"""Advantage: how much better a candidate is than its group."""

from __future__ import annotations

import chex
import jax
import jax.numpy as jnp
from flax import struct

from grpo_jax.config import Baseline, Scale


class Advantages(struct.PyTreeNode):
    """Advantages and what they were made of.

    Attributes:
      advantage: ``[B, G]``, 0 for candidates that are not valid and in groups that are not active.
      active: ``[B]`` bool: at least two valid candidates, all returns finite, spread above the floor.
      spread: ``[B]`` standard deviation of a group's returns, unweighted.
      finite: ``[B]`` bool, no return of the group is NaN or inf.
    """

    advantage: jax.Array
    active: jax.Array
    spread: jax.Array
    finite: jax.Array


def group_advantages(
    returns: jax.Array,
    weights: jax.Array,
    valid: jax.Array,
    executed: jax.Array,
    *,
    baseline: Baseline = "policy",
    scale: Scale = "batch",
    spread_floor: float | jax.Array = 1e-5,
) -> Advantages:
    """A_i = (R_i - b) / scale.

    Args:
      returns: ``[B, G]`` group returns.
      weights: ``[B, G]`` w_i, summing to 1 over the valid candidates.
      valid: ``[B, G]`` bool.
      executed: ``[B]`` int, the executed candidate.
      baseline: ``policy``: sum_i w_i R_i; ``mean``; ``leave_one_out``: the mean of the others (RLOO,
        arXiv:2402.14740); ``executed``: the same, and every other candidate's advantage is 0; ``shrinkage``: the mean
        of the others shrunk towards the other groups' means (after arXiv:2511.03710).
      scale: ``none`` (Dr. GRPO, arXiv:2503.20783), ``group`` (GRPO, arXiv:2402.03300): the group's standard
        deviation; ``batch`` (after Lite PPO, arXiv:2508.08221): the root mean square deviation within all active groups.
      spread_floor: a standard deviation up to ``spread_floor * max(1, mean |R|)`` counts as none.

    Returns:
      ``Advantages``.
    """
    chex.assert_rank([returns, weights, valid, executed], [2, 2, 2, 1])
    chex.assert_equal_shape([returns, weights, valid])
    finite = jnp.all(jnp.isfinite(returns) | ~valid, axis=1)
    # Zeros for what must not count: NaN times 0 would still be NaN.
    usable = valid & finite[:, None]
    returns = jnp.where(usable, returns, 0.0)
    weights = jnp.where(usable, weights, 0.0)
    count = jnp.sum(usable, axis=1).astype(returns.dtype)
    mean = jnp.sum(returns, axis=1) / jnp.maximum(count, 1.0)
    deviation = jnp.where(usable, returns - mean[:, None], 0.0)
    variance = jnp.sum(deviation**2, axis=1) / jnp.maximum(count, 1.0)
    finite &= jnp.isfinite(variance)  # returns so large that their squares overflow
    spread = jnp.sqrt(variance)
    size = jnp.maximum(1.0, jnp.sum(jnp.abs(returns), axis=1) / jnp.maximum(count, 1.0))
    active = finite & (count > 1) & (spread > spread_floor * size)

    advantage = returns - _baseline(returns, weights, count, mean, variance, active, baseline)
    if baseline == "executed":
        advantage = jnp.where(jnp.arange(returns.shape[1]) == executed[:, None], advantage, 0.0)
    if scale == "group":
        advantage = advantage / jnp.where(active, spread, 1.0)[:, None]
    elif scale == "batch":
        n_active = jnp.sum(active).astype(returns.dtype)
        mean_variance = jnp.sum(jnp.where(active, variance, 0.0)) / jnp.maximum(n_active, 1.0)
        advantage = advantage / jnp.where(n_active > 0, jnp.sqrt(mean_variance), 1.0)
    advantage = jnp.where(usable & active[:, None], advantage, 0.0)
    return Advantages(advantage, active, spread, finite)


def _baseline(
    returns: jax.Array,
    weights: jax.Array,
    count: jax.Array,
    mean: jax.Array,
    variance: jax.Array,
    active: jax.Array,
    baseline: Baseline,
) -> jax.Array:
    """The baseline ``[B, 1]`` or ``[B, G]``."""
    if baseline == "policy":
        return jnp.sum(weights * returns, axis=1, keepdims=True)
    if baseline == "mean":
        return mean[:, None]
    others = jnp.maximum(count - 1.0, 1.0)[:, None]
    leave_one_out = (jnp.sum(returns, axis=1, keepdims=True) - returns) / others
    if baseline in ("leave_one_out", "executed"):
        return leave_one_out
    # James-Stein: the noisier a group's mean is, compared with how much true means differ, the more the mean of the
    # other groups is worth. Neither uses the group's own numbers, so the baseline stays independent of the action.
    noise = variance / jnp.maximum(count - 1.0, 1.0)  # of a group's mean: its unbiased variance over its size
    n_active = jnp.sum(active).astype(returns.dtype)
    n_others = n_active - active

    def of_other_groups(values: jax.Array) -> jax.Array:
        values = jnp.where(active, values, 0.0)
        return (jnp.sum(values) - values) / jnp.maximum(n_others, 1.0)

    # Centred first: the difference of two large squares would be all rounding.
    center = jnp.sum(jnp.where(active, mean, 0.0)) / jnp.maximum(n_active, 1.0)
    shift_of_others = of_other_groups(mean - center)
    observed = of_other_groups((mean - center) ** 2) - shift_of_others**2
    noise_of_others = of_other_groups(noise)
    # Means differ by their noise too: what is left of their (unbiased) variance without it is that of the true means.
    between = jnp.maximum(observed * n_others / jnp.maximum(n_others - 1.0, 1.0) - noise_of_others, 0.0)
    shrinkage = noise_of_others / jnp.maximum(noise_of_others + between, jnp.finfo(returns.dtype).tiny)
    shrinkage = jnp.where(n_others > 1, shrinkage, 0.0)  # one other mean tells nothing about how means differ
    return (1.0 - shrinkage[:, None]) * leave_one_out + (shrinkage * (center + shift_of_others))[:, None]
