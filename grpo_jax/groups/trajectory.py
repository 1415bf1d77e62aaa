"""Trajectory groups: whole episodes, compared as the papers compare completions of one prompt; nothing is branched."""

from __future__ import annotations

import chex
import jax
import jax.numpy as jnp

from grpo_jax import shards
from grpo_jax.config import Baseline, Scale, TrajectoryForm
from grpo_jax.groups.advantage import (
    SCALES,
    SPREAD_FLOOR,
    Advantages,
    group_advantages,
    has_spread,
    offset_of,
)
from grpo_jax.groups.returns import returns_to_go


def trajectory_advantages(
    rewards: jax.Array,
    alive: jax.Array,
    *,
    group_size: int,
    gamma: float | jax.Array,
    form: TrajectoryForm = "outcome",
    baseline: Baseline = "mean",
    scale: Scale = "group",
    spread_floor: float | jax.Array = SPREAD_FLOOR,
) -> Advantages:
    """Advantages of every step of the episodes of each group.

    Args:
      rewards: ``[T, N]``, environments of a group next to each other; N = n_groups * group_size.
      alive: ``[T, N]`` bool, steps of the first episode.
      group_size: G episodes from one and the same reset.
      gamma: discount factor.
      form: ``outcome``: every step gets its episode's advantage (GRPO, arXiv:2402.03300, section 4.1.2);
        ``process``: every step gets that of its own return to go, compared with the group's at equal time among the
        episodes that are still running (after section 4.1.3 and GR2PO, arXiv:2609.19850).
      baseline: see :func:`group_advantages`; ``policy`` is the mean, weights being equal.
      scale: see :func:`group_advantages`.
      spread_floor: see :func:`group_advantages`.

    Returns:
      ``Advantages`` with fields ``[T, N, 1]`` and ``[T, N]``: groups of one executed action each.
    """
    chex.assert_rank([rewards, alive], 2)
    n_steps, n_envs = rewards.shape
    n_groups = n_envs // group_size
    to_go = returns_to_go(rewards, alive, gamma)
    if form == "outcome":
        returns, valid = to_go[:1], alive[:1]
    else:
        returns, valid = to_go, alive
    rows = (returns.shape[0] * n_groups, group_size)
    valid = valid.reshape(rows)
    count = jnp.maximum(jnp.sum(valid, axis=1, keepdims=True), 1)
    result = group_advantages(
        returns.reshape(rows),
        jnp.where(valid, 1.0 / count, 0.0),
        valid,
        jnp.zeros(rows[0], jnp.int32),
        baseline=baseline,
        scale=scale,
        spread_floor=spread_floor,
    )

    def per_step(of_group: jax.Array) -> jax.Array:
        spread = jnp.broadcast_to(of_group[:, None] if of_group.ndim == 1 else of_group, rows)
        return jnp.broadcast_to(spread.reshape(returns.shape[0], n_envs), (n_steps, n_envs))

    return Advantages(
        advantage=jnp.where(alive, per_step(result.advantage), 0.0)[..., None],
        active=per_step(result.active) & alive,
        spread=per_step(result.spread),
        finite=per_step(result.finite),
        below_floor=per_step(result.below_floor) & alive,
    )


def episode_advantages(
    returns: jax.Array,
    valid: jax.Array,
    group: jax.Array | None,
    *,
    baseline: Baseline = "mean",
    scale: Scale = "batch",
    spread_floor: float | jax.Array = SPREAD_FLOOR,
    magnitude: jax.Array | None = None,
) -> Advantages:
    """Advantages of single steps, each compared with the other steps of its group; groups may differ in size.

    Args:
      returns: ``[B]``, what was earned from each step on.
      valid: ``[B]`` bool, the return is known.
      group: ``[B]`` int, steps of a shard with equal numbers are compared: the time since the reset (GR2PO,
        arXiv:2609.19850). None: all steps, those of other shards too, are one group.
      baseline: ``mean`` (or ``policy``, weights being equal), or ``leave_one_out``.
      scale: see :func:`group_advantages`.
      spread_floor: see :func:`group_advantages`.
      magnitude: ``[B]`` of the numbers that a return was computed from, where it is the difference of larger ones, whose
        rounding it inherits; None: that of the return.

    Returns:
      ``Advantages`` with fields ``[B, 1]`` and ``[B]``: groups of one executed action each.
    """
    chex.assert_rank([returns, valid], 1)
    chex.assert_equal_shape([returns, valid])
    returns = jnp.asarray(returns)
    known = valid & jnp.isfinite(returns)
    if group is None:
        segment = jnp.zeros(returns.shape, jnp.int32)

        def total(values: jax.Array) -> jax.Array:
            return shards.total(jnp.sum(values, keepdims=True))

        def greatest(values: jax.Array) -> jax.Array:
            return shards.greatest(jnp.max(values, where=known, initial=-jnp.inf, keepdims=True))

    else:
        chex.assert_equal_shape([returns, group])
        n_steps = returns.shape[0]
        _, segment = jnp.unique(group, return_inverse=True, size=n_steps)

        def total(values: jax.Array) -> jax.Array:
            return jax.ops.segment_sum(values, segment, num_segments=n_steps)

        def greatest(values: jax.Array) -> jax.Array:
            return jax.ops.segment_max(jnp.where(known, values, -jnp.inf), segment, num_segments=n_steps)

    high, low = greatest(returns), -greatest(-returns)
    offset = offset_of(low, high)
    returns = returns - offset[segment]
    n_known = total(known.astype(returns.dtype))
    count = jnp.maximum(n_known, 1.0)
    mean = total(jnp.where(known, returns, 0.0)) / count
    deviation = jnp.where(known, returns - mean[segment], 0.0)
    variance = total(deviation**2) / count
    spread = jnp.sqrt(variance)
    finite = (total((valid & ~known).astype(returns.dtype)) == 0) & jnp.isfinite(variance)
    largest = jnp.maximum(jnp.abs(low), jnp.abs(high)) if magnitude is None else greatest(magnitude)
    largest = jnp.where(n_known > 0, largest, 0.0)
    differs, above = has_spread(spread, low, high, largest, spread_floor)
    comparable = finite & (count > 1)
    active = (comparable & above)[segment] & known

    advantage = deviation
    if baseline == "leave_one_out":
        advantage = deviation * (count / jnp.maximum(count - 1.0, 1.0))[segment]
    advantage = advantage / SCALES[scale](spread[segment], deviation**2, active)
    return Advantages(
        advantage=jnp.where(active, advantage, 0.0)[:, None],
        active=active,
        spread=spread[segment],
        finite=finite[segment],
        below_floor=(comparable & differs & ~above)[segment] & known,
    )
