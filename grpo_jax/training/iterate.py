"""Iterate: the stages of the loop one after the other, on all environments or on shards of them."""

from __future__ import annotations

import jax

from grpo_jax import counter, shards
from grpo_jax.config import GRPOConfig
from grpo_jax.noise import as_key
from grpo_jax.training.loop import TrainState, collect, compare, improve, iteration_keys
from grpo_jax.training.metrics import episode_metrics, nonfinite_state
from grpo_jax.types import Environments, Metrics, PyTree
from grpo_jax.worlds.base import World


def iteration(
    config: GRPOConfig,
    env: World,
    state: TrainState,
    n_iterations: int | jax.Array,
    *,
    mesh: jax.sharding.Mesh | None = None,
) -> tuple[TrainState, Metrics]:
    """The whole algorithm once: ``collect``, ``compare``, ``improve``.

    Args:
      config: the settings.
      env: the world that is both acted and branched in.
      state: the state before.
      n_iterations: iterations of the whole run, for decaying rates.
      mesh: devices over which the shards of the environments are spread; None: all on one.

    Returns:
      The state afterwards, and scalar metrics.
    """
    if config.n_shards == 1:
        return _iteration(config, env, state, n_iterations)

    def one(environments: Environments, shared: PyTree, index: jax.Array) -> tuple[Environments, PyTree]:
        config, env, rest, n_iterations = shared
        part = shard_config(config), shard_state(rest.replace(environments=environments), index)
        after, metrics = _iteration(part[0], env, part[1], n_iterations)
        after = after.replace(
            key=iteration_keys(rest.key).next,
            simulator_steps=counter.merge(rest.simulator_steps, counter.over_shards(after.simulator_steps)),
        )
        metrics["simulator_steps"] = counter.to_float(after.simulator_steps)
        return after.environments, (after.replace(environments=None), metrics)

    shared = config, env, state.replace(environments=None), n_iterations
    environments, (after, metrics) = shards.over_shards(
        one, state.environments, shared, config.n_shards, mesh
    )
    return after.replace(environments=environments), metrics


def shard_config(config: GRPOConfig) -> GRPOConfig:
    """The settings of one of the ``n_shards`` parts of the environments."""
    n = config.n_shards
    return config.replace(n_envs=config.n_envs // n, batch_size=config.batch_size // n, n_shards=1)


def shard_state(state: TrainState, index: jax.Array | int) -> TrainState:
    """The state of one part: with randomness of its own, and a count of simulator steps of its own.

    Args:
      state: with the environments of that part.
      index: of the part.
    """
    return state.replace(key=as_key(jax.random.fold_in(state.key, index)), simulator_steps=counter.zero())


def _iteration(
    config: GRPOConfig, env: World, state: TrainState, n_iterations: int | jax.Array
) -> tuple[TrainState, Metrics]:
    progress = state.iteration / n_iterations
    before = state
    state, trajectory = collect(
        config, env, state, keep_next_observation=config.bootstrap, keep_states=False, progress=progress
    )
    comparison = compare(config, env, state, trajectory, progress)
    state, metrics = improve(config, state, comparison, progress)
    metrics |= episode_metrics(state.environments, trajectory)
    metrics["nonfinite_state"] = nonfinite_state(
        (before.learner, before.environments), (state.learner, state.environments), trajectory
    )
    return state, metrics


def guarded_iteration(
    config: GRPOConfig,
    env: World,
    state: TrainState,
    n_iterations: int | jax.Array,
    *,
    strict: bool,
    mesh: jax.sharding.Mesh | None = None,
) -> tuple[TrainState, Metrics]:
    """An iteration whose state afterwards is good: where it would not be, the state is the one before.

    Args:
      config: the settings.
      env: the world that is both acted and branched in.
      state: the state before.
      n_iterations: iterations of the whole run, for decaying rates.
      strict: whether a group return, a loss or a gradient that is not finite also undoes the iteration; otherwise such
        groups and minibatches are left out of training, and counted.
      mesh: see :func:`iteration`.

    Returns:
      The state afterwards, and the metrics of what was tried.
    """
    after, metrics = iteration(config, env, state, n_iterations, mesh=mesh)
    faults = metrics["nonfinite_state"]
    if strict:
        faults += metrics["nonfinite_groups"] + metrics["nonfinite_updates"]
    return jax.lax.cond(faults > 0, lambda new, old: old, lambda new, old: new, after, state), metrics
