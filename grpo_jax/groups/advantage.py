"""Advantage: how much better a candidate is than its group.

An advantage is a return beyond a baseline (one function each, in ``BASELINES``), divided by a scale (in ``SCALES``), in
those groups that have a spread to learn from (``has_spread``).
"""

from __future__ import annotations

from collections.abc import Callable

import chex
import jax
import jax.numpy as jnp
from flax import struct

from grpo_jax import shards
from grpo_jax.config import Baseline, Scale

SPREAD_FLOOR = 1e-6
"""A group's standard deviation that counts as none, as a share of its largest return: what float32 can tell apart after
a sum of some hundred rewards."""
ROUNDING = 4.0
"""Returns that differ by up to so many times the float's epsilon, as a share of the largest, are equal."""


class Advantages(struct.PyTreeNode):
    """Advantages and what they were made of.

    Attributes:
      advantage: ``[B, G]``, 0 for candidates that are not valid and in groups that are not active.
      active: ``[B]`` bool: at least two valid candidates, all returns finite, spread above the floor.
      spread: ``[B]`` standard deviation of a group's returns, unweighted.
      finite: ``[B]`` bool, no return of the group is NaN or inf.
      below_floor: ``[B]`` bool, the returns differ, but by no more than the floor: not active for that alone.
    """

    advantage: jax.Array
    active: jax.Array
    spread: jax.Array
    finite: jax.Array
    below_floor: jax.Array


class GroupReturns(struct.PyTreeNode):
    """What a baseline is made of; numbers of candidates that are not valid are 0.

    Attributes:
      returns: ``[B, G]`` group returns, less ``offset``.
      weights: ``[B, G]`` w_i, summing to 1.
      count: ``[B]`` float, valid candidates.
      mean: ``[B]`` of ``returns``.
      variance: ``[B]`` of the returns.
      offset: ``[B]``, taken off all returns of a group where they are large beside their differences.
      active: ``[B]`` bool, see :class:`Advantages`.
      executed: ``[B]`` int, the executed candidate.
    """

    returns: jax.Array
    weights: jax.Array
    count: jax.Array
    mean: jax.Array
    variance: jax.Array
    offset: jax.Array
    active: jax.Array
    executed: jax.Array


def group_advantages(
    returns: jax.Array,
    weights: jax.Array,
    valid: jax.Array,
    executed: jax.Array,
    *,
    baseline: Baseline = "policy",
    scale: Scale = "batch",
    spread_floor: float | jax.Array = SPREAD_FLOOR,
) -> Advantages:
    """A_i = (R_i - b) / scale.

    Args:
      returns: ``[B, G]`` group returns.
      weights: ``[B, G]`` w_i, summing to 1 over the valid candidates.
      valid: ``[B, G]`` bool.
      executed: ``[B]`` int, the executed candidate.
      baseline: one of ``BASELINES``.
      scale: one of ``SCALES``.
      spread_floor: a standard deviation up to ``spread_floor * max |R|`` of the group counts as none.

    Returns:
      ``Advantages``.
    """
    chex.assert_rank([returns, weights, valid, executed], [2, 2, 2, 1])
    chex.assert_equal_shape([returns, weights, valid])
    finite = jnp.all(jnp.isfinite(returns) | ~valid, axis=1)
    # Zeros for what must not count: NaN times 0 would still be NaN.
    usable = valid & finite[:, None]
    weights = jnp.where(usable, weights, 0.0)
    high = jnp.max(jnp.where(usable, returns, -jnp.inf), axis=1)
    low = jnp.min(jnp.where(usable, returns, jnp.inf), axis=1)
    offset = offset_of(low, high)
    returns = jnp.where(usable, returns - offset[:, None], 0.0)
    count = jnp.sum(usable, axis=1).astype(returns.dtype)
    mean = jnp.sum(returns, axis=1) / jnp.maximum(count, 1.0)
    deviation = jnp.where(usable, returns - mean[:, None], 0.0)
    variance = jnp.sum(deviation**2, axis=1) / jnp.maximum(count, 1.0)
    finite &= jnp.isfinite(variance)  # returns so large that their squares overflow
    spread = jnp.sqrt(variance)
    largest = jnp.where(count > 0, jnp.maximum(jnp.abs(low), jnp.abs(high)), 0.0)
    differs, above = has_spread(spread, low, high, largest, spread_floor)
    comparable = finite & (count > 1)
    active = comparable & above

    group = GroupReturns(returns, weights, count, mean, variance, offset, active, executed)
    advantage = BASELINES[baseline](group)
    divisor = jnp.asarray(SCALES[scale](spread, variance, active), advantage.dtype)
    advantage = advantage / (divisor[:, None] if divisor.ndim else divisor)
    advantage = jnp.where(usable & active[:, None], advantage, 0.0)
    return Advantages(advantage, active, spread, finite, comparable & differs & ~above)


def has_spread(
    spread: jax.Array,
    low: jax.Array,
    high: jax.Array,
    largest: jax.Array,
    floor: float | jax.Array,
) -> tuple[jax.Array, jax.Array]:
    """Whether a group's returns differ at all, and whether by more than the floor; all ``[N]``.

    Both are relative to the size of the returns: how rewards are scaled changes neither.

    Args:
      spread: standard deviation of the group's returns.
      low: the least of them.
      high: the largest of them.
      largest: magnitude of what they were computed from, at least that of the returns themselves.
      floor: share of ``largest``.

    Returns:
      ``differs``: by more than rounding; ``above``: it differs, and its spread is above the floor.
    """
    rounding = ROUNDING * jnp.finfo(spread.dtype).eps * largest
    differs = high > low + rounding
    return differs, differs & (spread > floor * largest)


def offset_of(low: jax.Array, high: jax.Array) -> jax.Array:
    """What to take off the returns of a group before their mean is taken; ``[N]``.

    0, but where returns are large beside their differences: there the mean would be all rounding. Subtracting one
    of them is exact.
    """
    size = jnp.maximum(jnp.abs(low), jnp.abs(high))
    return jnp.where(jnp.isfinite(size) & (high - low < 1e-4 * size), high, 0.0)


def policy(group: GroupReturns) -> jax.Array:
    """R_i - sum_j w_j R_j, the policy's own mean (all-action baseline of COMA, arXiv:1705.08926, eq. 4)."""
    return group.returns - jnp.sum(group.weights * group.returns, axis=1, keepdims=True)


def mean(group: GroupReturns) -> jax.Array:
    """R_i - mean_j R_j (GRPO, arXiv:2402.03300, section 4.1.2)."""
    return group.returns - group.mean[:, None]


def leave_one_out(group: GroupReturns) -> jax.Array:
    """R_i - the mean of the others (RLOO, arXiv:2402.14740, eq. 8)."""
    return group.returns - _mean_of_others(group)


def executed(group: GroupReturns) -> jax.Array:
    """``leave_one_out`` for the executed candidate, 0 for all others."""
    is_executed = jnp.arange(group.returns.shape[1]) == group.executed[:, None]
    return jnp.where(is_executed, leave_one_out(group), 0.0)


def shrinkage(group: GroupReturns) -> jax.Array:
    """R_i - the mean of the others, shrunk towards the other groups' means (after arXiv:2511.03710).

    James-Stein: the noisier a group's mean is, compared with how much true means differ, the more the mean of the other
    groups is worth. Neither uses the group's own numbers, so the baseline stays independent of the action; only that
    groups whose draws all coincide are masked depends on it, which biases few draws of few actions (docs/theory.md).
    """
    active, means = group.active, group.mean + group.offset
    noise = group.variance / jnp.maximum(group.count - 1.0, 1.0)  # of a mean: unbiased variance over size
    n_active = shards.total(jnp.sum(active)).astype(means.dtype)
    n_others = n_active - active

    def of_other_groups(values: jax.Array) -> jax.Array:
        values = jnp.where(active, values, 0.0)
        return (shards.total(jnp.sum(values)) - values) / jnp.maximum(n_others, 1.0)

    # Centred first: the difference of two large squares would be all rounding.
    center = shards.total(jnp.sum(jnp.where(active, means, 0.0))) / jnp.maximum(n_active, 1.0)
    shift_of_others = of_other_groups(means - center)
    observed = of_other_groups((means - center) ** 2) - shift_of_others**2
    noise_of_others = of_other_groups(noise)
    # Means differ by their noise too: what is left of their (unbiased) variance without it is that of the true means.
    between = jnp.maximum(observed * n_others / jnp.maximum(n_others - 1.0, 1.0) - noise_of_others, 0.0)
    share = noise_of_others / jnp.maximum(noise_of_others + between, jnp.finfo(means.dtype).tiny)
    share = jnp.where(n_others > 1, share, 0.0)  # one other mean tells nothing about how means differ
    others = center + shift_of_others - group.offset
    return group.returns - ((1.0 - share[:, None]) * _mean_of_others(group) + (share * others)[:, None])


def _mean_of_others(group: GroupReturns) -> jax.Array:
    others = jnp.maximum(group.count - 1.0, 1.0)[:, None]
    return (jnp.sum(group.returns, axis=1, keepdims=True) - group.returns) / others


BASELINES: dict[Baseline, Callable[[GroupReturns], jax.Array]] = {
    "policy": policy,
    "mean": mean,
    "leave_one_out": leave_one_out,
    "executed": executed,
    "shrinkage": shrinkage,
}
"""Returns beyond a baseline, ``[B, G]``, by the names that the config has for them."""


def unscaled(spread: jax.Array, square: jax.Array, active: jax.Array) -> jax.Array | float:
    """1 (Dr. GRPO, arXiv:2503.20783)."""
    del spread, square, active
    return 1.0


def by_group(spread: jax.Array, square: jax.Array, active: jax.Array) -> jax.Array:
    """The group's own standard deviation (GRPO, arXiv:2402.03300), ``[N]``."""
    del square
    return jnp.where(active, spread, 1.0)


def by_batch(spread: jax.Array, square: jax.Array, active: jax.Array) -> jax.Array:
    """The root mean square deviation within all active groups (after Lite PPO, arXiv:2508.08221), ``[]``."""
    del spread
    n_active, sum_of_squares = shards.total(
        (jnp.sum(active).astype(square.dtype), jnp.sum(jnp.where(active, square, 0.0)))
    )
    mean_square = sum_of_squares / jnp.maximum(n_active, 1.0)
    return jnp.where(n_active > 0, jnp.sqrt(mean_square), 1.0)


SCALES: dict[Scale, Callable[[jax.Array, jax.Array, jax.Array], jax.Array | float]] = {
    "none": unscaled,
    "group": by_group,
    "batch": by_batch,
}
"""What advantages are divided by, by the names that the config has for it: functions of ``[N]`` rows (groups, or steps)
with the standard deviation of their group, their mean square deviation from its mean, and whether they are active."""
