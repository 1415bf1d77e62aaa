"""The loop: an iteration collects, compares and improves."""

from __future__ import annotations

import dataclasses
import functools
import math
from numbers import Real
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct

from grpo_jax import counter, shards
from grpo_jax.config import GRPOConfig, scheduled
from grpo_jax.groups import candidates
from grpo_jax.groups.advantage import Advantages
from grpo_jax.groups.branch import Branches
from grpo_jax.groups.compare import (
    branched,
    compare_branches,
    compare_episodes,
    compare_trajectories,
    follow,
    keep_branched,
    propose,
)
from grpo_jax.learning.update import Learner, init_learner, update, update_reference
from grpo_jax.noise import as_key, split
from grpo_jax.policies.policy import Policy, PolicyState, make_policy
from grpo_jax.training.metrics import explained_variance, group_metrics
from grpo_jax.training.rollout import rollout, start
from grpo_jax.types import Batch, Counter, Environments, Group, Metrics, Params, PyTree, Trajectory
from grpo_jax.worlds.base import World


class Keys(NamedTuple):
    """The PRNG keys that an iteration takes."""

    next: jax.Array
    reset: jax.Array
    rollout: jax.Array
    groups: jax.Array
    update: jax.Array


def iteration_keys(key: jax.Array) -> Keys:
    """The keys of an iteration, from the one in its state."""
    return Keys(*split(key, len(Keys._fields)))


class TrainState(struct.PyTreeNode):
    """Everything that a run needs to go on, bit for bit.

    Attributes:
      learner: parameters, optimizer, reference.
      environments: where the environments stand.
      key: typed PRNG key.
      iteration: int32, iterations that are done.
      decision_steps: real environment steps.
      simulator_steps: world steps spent in branches.
      policy: static structure of the policy.
    """

    learner: Learner
    environments: Environments
    key: jax.Array
    iteration: jax.Array
    decision_steps: Counter
    simulator_steps: Counter
    policy: Policy = struct.field(pytree_node=False)

    @property
    def params(self) -> Params:
        """Parameters of the actor and, if there is one, the critic."""
        return self.learner.policy.params


def in_parts(state: TrainState, n_shards: int, *, has_agents: bool) -> PyTree:
    """Which leaves of a state lie in parts on the devices of a mesh, as bools, a prefix of it.

    Environments do; of several agents (seeds, settings) all do where their environments are not divided.
    """
    if has_agents:
        return n_shards == 1
    names = [field.name for field in dataclasses.fields(state) if field.name != "policy"]
    return state.replace(**{name: name == "environments" for name in names})


class Comparison(NamedTuple):
    """What ``compare`` found.

    Attributes:
      batch: what the update learns from, ``[n_steps * n_envs, ...]``.
      advantages: of its groups.
      simulator_steps: world steps that this took.
    """

    batch: Batch
    advantages: Advantages
    simulator_steps: Counter


def check_arguments(config: GRPOConfig, env: World) -> None:
    """Refuses what is no config or no world, or more decision states than an iteration can count.

    Raises:
      TypeError: names the argument; says so where the two are swapped.
      ValueError: 2**31 decision states or more.
    """
    if isinstance(config, World) and isinstance(env, GRPOConfig):
        raise TypeError(
            "config and env are swapped: the config comes first, then the env, as in train(config, env, key, ...)"
        )
    if not isinstance(config, GRPOConfig):
        raise TypeError(f"config={config!r} must be a GRPOConfig; grpo_jax.preset(id) gives one")
    if not isinstance(env, World):
        raise TypeError(f"env={env!r} must be a World; grpo_jax.make(env) makes one")
    if config.n_states >= 2**31:
        raise ValueError(
            f"n_envs={config.n_envs} times n_steps={config.n_steps} must be less than 2**31: the decision states of an"
            " iteration are counted in 32 bits"
        )


def init(config: GRPOConfig, env: World, key: jax.Array) -> TrainState:
    """The state before the first iteration.

    Args:
      config: the settings.
      env: a world, as ``make`` returns it.
      key: PRNG key of the whole run; one key, one run, bit for bit.
    """
    check_arguments(config, env)
    policy = make_policy(config, env.observation_space, env.action_space)
    candidates.resolve(config, policy.distribution)  # refuses what cannot be, before anything is traced
    keys = split(as_key(key), 3)
    env_keys = split(keys[1], config.n_envs)
    return TrainState(
        learner=init_learner(config, policy, keys[0]),
        environments=start(env, env_keys),
        key=keys[2],
        iteration=jnp.int32(0),
        decision_steps=counter.zero(),
        simulator_steps=counter.zero(),
        policy=policy,
    )


def collect(
    config: GRPOConfig,
    env: World,
    state: TrainState,
    *,
    keep_next_observation: bool,
    keep_states: bool = True,
    progress: jax.Array | float = 0.0,
) -> tuple[TrainState, Trajectory]:
    """The first part of an iteration: the policy acts.

    Args:
      config: the settings.
      env: the world that is acted in.
      state: the state before.
      keep_next_observation: whether the trajectory holds what was reached, which ``bootstrap`` needs.
      keep_states: whether it holds all world states; False: only those that ``compare`` branches.
      progress: share of the run that is done, in [0, 1], for a decaying persistence.

    Returns:
      The state with the environments moved on, and the trajectory ``[n_steps, n_envs]``.
    """
    keys = iteration_keys(state.key)
    environments = state.environments
    if config.candidates == "trajectory":
        environments = _restart_groups(config, env, environments, keys.reset)
    environments, trajectory = rollout(
        env,
        state.policy,
        state.learner.policy,
        environments,
        keys.rollout,
        config.n_steps,
        keep_next_observation,
        _persistence(config, state.learner, progress),
        None if keep_states else functools.partial(keep_branched, config, state.iteration),
    )
    return state.replace(environments=environments), trajectory


def compare(
    config: GRPOConfig,
    env: World | None,
    state: TrainState,
    trajectory: Trajectory,
    progress: jax.Array | float = 0.0,
    evaluated: tuple[Group, Branches] | None = None,
) -> Comparison:
    """The second part of an iteration: what was done is compared with what else could have been done.

    Args:
      config: the settings.
      env: the world that is branched in; None where nothing is, or was already.
      state: the state whose policy acted.
      trajectory: what it did, ``[n_steps, n_envs]``.
      progress: share of the run that is done, in [0, 1], for a decaying persistence.
      evaluated: candidates and their group returns, where they were followed elsewhere (on the host).

    Returns:
      A ``Comparison``.

    Raises:
      ValueError: candidates that are branched, but neither ``env`` nor ``evaluated``.
    """
    policy, learner = state.policy, state.learner
    trajectory = _with_distribution(policy, learner.policy, trajectory)
    if config.candidates == "trajectory":
        return Comparison(*compare_trajectories(config, policy, trajectory), counter.zero())
    if config.candidates == "episodes":
        return Comparison(*compare_episodes(config, policy, learner.policy, trajectory), counter.zero())
    wanted = branched(config, state.iteration)
    if evaluated is None:
        if env is None:
            raise ValueError(
                f"candidates={config.candidates!r} needs a world to branch in: env=None has none"
            )
        evaluated = evaluate_candidates(config, env, state, trajectory, progress)
    group, branches = evaluated
    batch, advantages = compare_branches(config, policy, learner.policy, trajectory, group, branches, wanted)
    return Comparison(batch, advantages, branches.simulator_steps)


def evaluate_candidates(
    config: GRPOConfig,
    env: World,
    state: TrainState,
    trajectory: Trajectory,
    progress: jax.Array | float = 0.0,
) -> tuple[Group, Branches]:
    """The candidates of all decision states, and the group returns of those that are branched; arguments of ``compare``."""
    policy, learner = state.policy, state.learner
    wanted = branched(config, state.iteration)
    group, branch_key = draw_group(config, policy, learner.policy, trajectory, state.key)
    persistence = _persistence(config, learner, progress)
    return group, follow(
        config, env, policy, learner.policy, trajectory, group, wanted, branch_key, persistence
    )


def draw_group(
    config: GRPOConfig, policy: Policy, policy_state: PolicyState, trajectory: Trajectory, key: jax.Array
) -> tuple[Group, jax.Array]:
    """The candidates of an iteration with ``key``, and the key of their branches."""
    candidate_key, branch_key = split(iteration_keys(key).groups, 2)
    trajectory = _with_distribution(policy, policy_state, trajectory)
    return propose(config, policy, trajectory, candidate_key), branch_key


def _with_distribution(policy: Policy, policy_state: PolicyState, trajectory: Trajectory) -> Trajectory:
    if trajectory.distribution is not None:
        return trajectory
    distribution = policy.parameters(policy_state, trajectory.observation, trajectory.action_mask)
    return trajectory.replace(distribution=distribution)


def improve(
    config: GRPOConfig, state: TrainState, comparison: Comparison, progress: jax.Array | float = 0.0
) -> tuple[TrainState, Metrics]:
    """The third part of an iteration: the policy (and its critic) learn.

    Args:
      config: the settings.
      state: the state whose policy acted.
      comparison: of what it did.
      progress: share of the run that is done, in [0, 1], for decaying rates.

    Returns:
      The state afterwards, and scalar metrics.
    """
    batch, advantages, simulator_steps = comparison
    policy, learner, keys = state.policy, state.learner, iteration_keys(state.key)
    if learner.reference is not None:
        reference = policy.parameters(learner.reference, batch.observation, batch.action_mask)
        batch = batch.replace(reference=reference)
    learner, metrics = update(config, policy, learner, batch, keys.update, progress)
    if batch.value is not None and batch.value_target is not None:
        metrics["explained_variance"] = explained_variance(batch.value, batch.value_target)
    learner = learner.replace(policy=policy.update_statistics(learner.policy, batch.observation))
    learner = update_reference(config, learner, state.iteration)

    # Behind the first episode of a trajectory group nothing is decided; everywhere else every step counts.
    is_real = batch.alive if config.candidates == "trajectory" else jnp.ones_like(batch.alive)
    n_decisions = shards.total(jnp.sum(is_real, dtype=jnp.int32))
    state = state.replace(
        learner=learner,
        key=keys.next,
        iteration=state.iteration + 1,
        decision_steps=counter.add(state.decision_steps, n_decisions),
        simulator_steps=counter.merge(state.simulator_steps, simulator_steps),
    )
    metrics |= group_metrics(batch, advantages)
    metrics["decision_steps"] = counter.to_float(state.decision_steps)
    metrics["simulator_steps"] = counter.to_float(state.simulator_steps)
    return state, metrics


def iterations_for(config: GRPOConfig, total_timesteps: int) -> int:
    """Iterations that total_timesteps decision steps take, rounded up."""
    is_number = isinstance(total_timesteps, Real) and not isinstance(total_timesteps, (bool, np.bool_))
    if not is_number or not math.isfinite(total_timesteps) or total_timesteps % 1 or total_timesteps < 1:
        raise ValueError(f"total_timesteps={total_timesteps!r} must be an integer of at least 1")
    return -(-int(total_timesteps) // config.n_states)


def _persistence(config: GRPOConfig, learner: Learner, progress: jax.Array | float) -> jax.Array | None:
    """The persistence of an iteration, if there is any."""
    if config.persistence is None:
        return None
    return scheduled(config.persistence, config.persistence_decay, learner.n_updates, progress)


def _restart_groups(
    config: GRPOConfig, env: World, environments: Environments, key: jax.Array
) -> Environments:
    """Resets all environments, those of a group from one and the same key."""
    n_groups = config.n_envs // config.group_size
    first = start(env, split(key, n_groups))
    fresh = jax.tree.map(lambda leaf: jnp.repeat(leaf, config.group_size, axis=0), first)
    return fresh.replace(last_return=environments.last_return, last_length=environments.last_length)
