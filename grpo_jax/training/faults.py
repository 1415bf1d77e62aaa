"""Faults: where NaN or inf came from. The iteration that failed is done once more, one stage after the other."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from grpo_jax import shards
from grpo_jax.config import GRPOConfig
from grpo_jax.training import loop
from grpo_jax.training.iterate import shard_config, shard_state
from grpo_jax.training.loop import Comparison, TrainState
from grpo_jax.types import PyTree, Trajectory
from grpo_jax.worlds.base import RewardOverride, World

KINDS = ("nonfinite_state", "nonfinite_groups", "nonfinite_updates")
"""Metrics that count faults."""

_ADVICE = {
    "world": "Check the world (and what wraps it) for divisions by zero and for numbers that grow without bound",
    "reward function": "Check the reward_function for divisions by zero and logarithms, or bound what it returns",
    "statistics": "Bound the observations (their squares must fit a float), or use normalize_observations=False",
    "critic": "Lower learning_rate or vf_coef, or scale the rewards down",
    "optimizer": "Lower learning_rate or max_grad_norm",
}


_ROOT = float(np.sqrt(np.finfo(np.float32).max))
"""What is larger has a square that is inf in float32."""


class NonFiniteError(FloatingPointError):
    """Something became NaN or inf in training.

    Attributes:
      state: the last good state: before the iteration that failed (of several seeds, each seed's own last one).
      iteration: the one that failed, from 1.
      stage: where: ``"world"``, ``"reward function"``, ``"statistics"``, ``"critic"``, ``"optimizer"``, or ``""``.
    """

    def __init__(self, message: str, state: TrainState, iteration: int, stage: str) -> None:
        super().__init__(message)
        self.state, self.iteration, self.stage = state, iteration, stage


def raise_faults(
    config: GRPOConfig, env: World, state: TrainState, metrics: Mapping[str, Any], n_iterations: int
) -> None:
    """Raises where the metrics of guarded, strict iterations count a fault.

    Args:
      config: the settings; of several seeds, traced fields ``[n_seeds]``.
      env: the world.
      state: what these iterations left: with a fault, the state before it.
      metrics: ``[n]``, or ``[n_seeds, n]``.
      n_iterations: of the whole run.

    Raises:
      NonFiniteError: says at which iteration, in which stage, in which environment and step.
    """
    faulty = np.any([np.asarray(metrics[kind]) > 0 for kind in KINDS], axis=0)
    if not np.any(faulty):
        return
    (config, one), where = shards.gather((config, state)), ""
    if faulty.ndim == 2:
        seed = int(np.argmax(np.any(faulty, axis=1)))
        config, one = jax.tree.map(lambda leaf: leaf[seed], (config, one))
        where = f" of seed {seed}"
    iteration = int(one.iteration) + 1
    stage, what = _locate(config, env, one, n_iterations)
    advice = _ADVICE.get(stage, "Check the reward (reward_function) and the world, or lower learning_rate")
    place = f"in the {stage}: " if stage else ""
    raise NonFiniteError(
        f"training stopped at iteration {iteration}{where}, {place}{what}. {advice}."
        f" The state after iteration {iteration - 1} is good, and kept",
        state,
        iteration,
        stage,
    )


def _locate(config: GRPOConfig, env: World, state: TrainState, n_iterations: int) -> tuple[str, str]:
    """Stage and what was wrong there."""
    if config.n_shards > 1:
        return _locate_in_shards(config, env, state, n_iterations)
    progress = state.iteration / n_iterations
    keep = config.bootstrap
    acted, trajectory = jax.jit(loop.collect, static_argnames=("keep_next_observation", "keep_states"))(
        config, env, state, keep_next_observation=keep, keep_states=False, progress=progress
    )
    found = _in_trajectory(env, trajectory) or _in_environments(state, acted)
    if found is not None:
        return found
    comparison = jax.jit(loop.compare)(config, env, acted, trajectory, progress)
    found = _in_comparison(config, env, comparison)
    if found is not None:
        return found
    after, metrics = jax.jit(loop.improve)(config, acted, comparison, progress)
    return _in_learner(config, acted, after, comparison, jax.device_get(metrics))


def _locate_in_shards(
    config: GRPOConfig, env: World, state: TrainState, n_iterations: int
) -> tuple[str, str]:
    """The first shard in which something is wrong; its own part of the batch then has to tell."""
    part_config, found = shard_config(config), ("", "")
    n = part_config.n_envs
    for shard in range(config.n_shards):
        rows = slice(shard * n, (shard + 1) * n)
        environments = jax.tree.map(lambda leaf, rows=rows: leaf[rows], state.environments)
        part = shard_state(state.replace(environments=environments), shard)
        found = _locate(part_config, env, part, n_iterations)
        if found[0]:
            return found[0], f"{found[1]} (counted within shard {shard} of {config.n_shards})"
    return found


def _in_trajectory(env: World, trajectory: Trajectory) -> tuple[str, str] | None:
    rewarded = "reward function" if isinstance(env, RewardOverride) else "world"
    task = trajectory.reward if trajectory.task_reward is None else trajectory.task_reward
    looked_at: tuple[tuple[str, str, PyTree], ...] = (
        ("world", "the observation", trajectory.observation),
        ("world", "the reward", task),
        (rewarded, "the reward", trajectory.reward),
    )
    for stage, name, tree in looked_at:
        for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
            if at := _first(leaf):
                step, index, *_ = at
                part = jax.tree_util.keystr(path)
                value = np.asarray(leaf)[tuple(at)]
                return (
                    stage,
                    f"{name}{part} of environment {index} at step {step} of the rollout is {value:g}",
                )
    return None


def _in_environments(before: TrainState, after: TrainState) -> tuple[str, str] | None:
    for path, leaf in jax.tree_util.tree_leaves_with_path(after.environments.replace(state=None)):
        if at := _first(leaf):
            name = jax.tree_util.keystr(path).lstrip(".")
            return (
                "world",
                f"{name} of environment {at[0]} is {np.asarray(leaf)[tuple(at)]:g} after the last step",
            )
    old = jax.tree.leaves(before.environments.state)
    for (path, leaf), was in zip(
        jax.tree_util.tree_leaves_with_path(after.environments.state), old, strict=True
    ):
        if jnp.issubdtype(leaf.dtype, jnp.floating) and not np.any(np.isnan(np.asarray(was))):
            places = np.argwhere(np.isnan(np.asarray(leaf)))
            if places.size:
                name = jax.tree_util.keystr(path).lstrip(".")
                return "world", f"{name} of environment {places[0][0]}'s state is nan after the last step"
    return None


def _in_comparison(config: GRPOConfig, env: World, comparison: Comparison) -> tuple[str, str] | None:
    batch, advantages, _ = comparison
    for name, leaf in (("value", batch.value), ("target (a lambda-return)", batch.value_target)):
        if leaf is not None and (at := _first(leaf)):
            number = float(np.asarray(leaf)[tuple(at)])
            return "critic", f"the {name} of {_state_of(config, at[0])} is {number:g}"
    bad = np.flatnonzero(~np.asarray(advantages.finite) & np.asarray(batch.alive & batch.compared))
    if not bad.size:
        return None
    stage = "reward function" if isinstance(env, RewardOverride) else "world"
    how = "are not finite, or so large that their squares are not"
    if config.candidates in ("trajectory", "episodes"):
        return stage, f"returns that {_state_of(config, int(bad[0]))} is compared by {how}"
    others = f" (and {bad.size - 1} other states)" if bad.size > 1 else ""
    return stage, f"returns of the candidates of {_state_of(config, int(bad[0]))}{others} {how}"


def _in_learner(
    config: GRPOConfig,
    before: TrainState,
    after: TrainState,
    comparison: Comparison,
    metrics: Mapping[str, Any],
) -> tuple[str, str]:
    batch = comparison.batch
    if any(_first(leaf) for leaf in jax.tree.leaves(after.learner.policy.statistics)):
        row, size = _largest(batch.observation)
        what = "the mean or the variance of the observations is not finite any more; the largest of them is"
        return "statistics", f"{what} {size:g}, of {_state_of(config, row)}"
    n_updates = float(metrics["nonfinite_updates"])
    if n_updates:
        stage = "optimizer"
        what = f"{n_updates:.0f} minibatches of this iteration had a loss or a gradient that is not finite"
        if batch.value_target is not None:
            row, size = _largest(batch.value_target)
            if size > _ROOT:
                stage = "critic"
                what += f"; the largest target is {size:g}, of {_state_of(config, row)}"
        row, size = _largest(batch.observation)
        if size > _ROOT:
            what += f"; the largest observation is {size:g}, of {_state_of(config, row)}"
        return stage, what
    for path, leaf in jax.tree_util.tree_leaves_with_path(after.learner):
        if _first(leaf):
            return "optimizer", f"learner{jax.tree_util.keystr(path)} is not finite after the updates"
    return "", "but the fault did not come again when its stages were done one by one"


def _first(leaf: Any) -> tuple[int, ...]:
    """Where the first number is that is not finite; empty: nowhere."""
    if not jnp.issubdtype(leaf.dtype, jnp.floating):
        return ()
    places = np.argwhere(~np.isfinite(np.asarray(leaf)))
    return tuple(int(i) for i in places[0]) if places.size else ()


def _largest(tree: PyTree) -> tuple[int, float]:
    """Row and magnitude of the largest number of leaves ``[B, ...]``."""
    sizes = [
        np.abs(np.asarray(leaf, np.float64)).reshape(leaf.shape[0], -1).max(axis=1)
        for leaf in jax.tree.leaves(tree)
    ]
    size = np.nan_to_num(np.max(sizes, axis=0), nan=np.inf, posinf=np.inf)
    return int(np.argmax(size)), float(np.max(size))


def _state_of(config: GRPOConfig, row: int) -> str:
    step, index = divmod(row, config.n_envs)
    return f"environment {index} at step {step} of the rollout"
