"""Metrics: what an iteration says about its episodes, its groups and its critic; all scalars."""

from __future__ import annotations

import itertools
from typing import Any

import jax
import jax.numpy as jnp

from grpo_jax import shards
from grpo_jax.groups.advantage import Advantages
from grpo_jax.learning.losses import mean_over
from grpo_jax.learning.update import Learner
from grpo_jax.types import Batch, Environments, Metrics, PyTree, Trajectory


def unknown() -> float:
    """What a metric says that is not known: NaN, but 0 under ``jax_debug_nans``, which allows none in an output."""
    return 0.0 if jax.debug_nans.value else jnp.nan


def episode_metrics(environments: Environments, trajectory: Trajectory) -> Metrics:
    """Episode statistics: means over the environments of their last finished episode, NaN before the first."""
    known = environments.last_length > 0
    n_known = shards.total(jnp.sum(known))

    def mean(values: jax.Array) -> jax.Array:
        total = shards.total(jnp.sum(jnp.where(known, values, 0.0)))
        return jnp.where(n_known > 0, total / jnp.maximum(n_known, 1), unknown())

    return {
        "episode_return": mean(environments.last_return),
        "episode_length": mean(environments.last_length),
        "n_episodes": shards.total(jnp.sum(trajectory.ended)).astype(jnp.result_type(float)),
    }


def group_metrics(batch: Batch, advantages: Advantages) -> Metrics:
    """How much there was to learn from the groups."""
    compared = batch.alive & batch.compared
    return {
        "group_spread": mean_over(compared, advantages.spread),
        # 1 also where no step belongs to a group: nothing can be learned then either.
        "frac_zero_std": 1.0 - mean_over(compared, advantages.active),
        "frac_below_floor": mean_over(compared, advantages.below_floor),
        "nonfinite_groups": shards.total(jnp.sum(compared & ~advantages.finite)).astype(
            jnp.result_type(float)
        ),
    }


def explained_variance(value: jax.Array, target: jax.Array) -> jax.Array:
    """1 - Var(target - value) / Var(target): 1 for a perfect critic, 0 for a constant one; NaN where nothing varies."""
    variance = _variance(target)
    varies = variance > 0
    explained = 1.0 - _variance(target - value) / jnp.where(varies, variance, 1.0)
    return jnp.where(varies, explained, unknown())


def nonfinite_state(
    before: tuple[Learner, Environments], after: tuple[Learner, Environments], trajectory: Trajectory
) -> jax.Array:
    """How many parts of what an iteration saw and left are not finite: learner, optimizer, environments, world states.

    An optimizer's and a world's own states may begin with inf, or NaN as a mark: what was there before is no fault.
    """
    (learner_before, environments_before), (learner, environments) = before, after
    seen = environments.replace(state=None), trajectory.observation, trajectory.reward, trajectory.task_reward
    was_finite = jnp.isfinite(_vector(learner_before.optimizer))
    flags = (
        ~jnp.all(jnp.isfinite(_vector(learner.replace(optimizer=None)))),
        jnp.any(was_finite & ~jnp.isfinite(_vector(learner.optimizer))),
        ~jnp.all(jnp.isfinite(_vector(seen))),
        jnp.any(_holds_nan(environments.state) & ~_holds_nan(environments_before.state)),
    )
    return jnp.sum(shards.total(jnp.stack(flags).astype(jnp.int32)) > 0).astype(jnp.result_type(float))


def _variance(values: jax.Array) -> jax.Array:
    """Over all shards."""
    center = shards.mean(jnp.mean(values))
    return shards.mean(jnp.mean((values - center) ** 2))


def _vector(tree: PyTree) -> jax.Array:
    """All floats of a tree, one after the other: one kernel instead of one a leaf."""
    return jnp.concatenate([jnp.zeros(0), *(leaf.ravel() for leaf in _floats(tree))])


def _holds_nan(tree: PyTree) -> jax.Array:
    """Whether NaN is in each leaf of floats; leaves of one shape are looked at together."""
    groups = itertools.groupby(sorted(_floats(tree), key=_shape), key=_shape)
    stacks = [jnp.stack(list(group)) for _, group in groups]
    found = [jnp.any(jnp.isnan(stack), axis=tuple(range(1, stack.ndim))) for stack in stacks]
    return jnp.concatenate([jnp.zeros(0, bool), *found])


def _shape(leaf: jax.Array) -> Any:
    return leaf.shape, leaf.dtype.name


def _floats(tree: PyTree) -> list[jax.Array]:
    return [leaf for leaf in jax.tree.leaves(tree) if jnp.issubdtype(leaf.dtype, jnp.floating)]
