"""The loop: one iteration is rollout, groups, update; a run is many iterations in one program."""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import struct

from grpo_jax import counter
from grpo_jax.config import GRPOConfig
from grpo_jax.groups import candidates
from grpo_jax.groups.advantage import Advantages, group_advantages
from grpo_jax.groups.branch import group_returns
from grpo_jax.groups.trajectory import first_episode, trajectory_advantages
from grpo_jax.learning.losses import lambda_returns
from grpo_jax.learning.update import Learner, init_learner, update, update_reference
from grpo_jax.noise import as_key, bits_to_uniform, draw_bits, split
from grpo_jax.policies.distributions import Categorical
from grpo_jax.policies.policy import Policy, PolicyState, make_policy
from grpo_jax.training.diagnose import SPREAD_ITERATIONS, check_finite, warn_without_spread
from grpo_jax.training.rollout import Environments, Trajectory, rollout, start
from grpo_jax.types import Batch, Counter, Group, Metrics, Params
from grpo_jax.worlds.base import World


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


class Result(NamedTuple):
    """What ``train`` returns: the last state, and metrics with a leading axis ``[n_iterations]``."""

    state: TrainState
    metrics: Metrics


def init(config: GRPOConfig, env: World, key: jax.Array) -> TrainState:
    """The state before the first iteration.

    Args:
      config: the settings.
      env: a world, as ``make`` returns it.
      key: PRNG key of the whole run; one key, one run, bit for bit.
    """
    if not isinstance(config, GRPOConfig):
        raise TypeError(f"config={config!r} must be a GRPOConfig; grpo_jax.preset(id) gives one")
    if not isinstance(env, World):
        raise TypeError(f"env={env!r} must be a World; grpo_jax.make(env) makes one")
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


def iteration(
    config: GRPOConfig, env: World, state: TrainState, n_iterations: int | jax.Array
) -> tuple[TrainState, Metrics]:
    """Rollout, groups, update: the whole algorithm once.

    Args:
      config: the settings.
      env: the world that is both acted and branched in.
      state: the state before.
      n_iterations: iterations of the whole run, for decaying rates.

    Returns:
      The state afterwards, and scalar metrics.
    """
    policy = state.policy
    learner = state.learner
    next_key, reset_key, rollout_key, group_key, update_key = split(state.key, 5)
    environments = state.environments
    is_trajectory = config.candidates == "trajectory"
    if is_trajectory:
        environments = _restart_groups(config, env, environments, reset_key)
    environments, trajectory = rollout(
        env, policy, learner.policy, environments, rollout_key, config.n_steps, config.bootstrap
    )
    if is_trajectory:
        batch, advantages, branches = _trajectory_groups(config, policy, trajectory)
    else:
        batch, advantages, branches = _state_groups(
            config, env, policy, learner.policy, trajectory, group_key
        )
    if learner.reference is not None:
        reference = policy.parameters(learner.reference, batch.observation, batch.action_mask)
        batch = batch.replace(reference=reference)
    progress = state.iteration / n_iterations
    learner, metrics = update(config, policy, learner, batch, update_key, progress)
    learner = learner.replace(policy=policy.update_statistics(learner.policy, batch.observation))
    learner = update_reference(config, learner, state.iteration)

    n_decisions = jnp.sum(batch.alive, dtype=jnp.int32)
    state = state.replace(
        learner=learner,
        environments=environments,
        key=next_key,
        iteration=state.iteration + 1,
        decision_steps=counter.add(state.decision_steps, n_decisions),
        simulator_steps=counter.merge(state.simulator_steps, branches),
    )
    metrics |= _episode_metrics(environments, trajectory)
    metrics |= _group_metrics(batch, advantages)
    metrics["decision_steps"] = counter.to_float(state.decision_steps)
    metrics["simulator_steps"] = counter.to_float(state.simulator_steps)
    return state, metrics


def train(
    config: GRPOConfig, env: World, key: jax.Array, total_timesteps: int, *, state: TrainState | None = None
) -> Result:
    """A whole training run as one pure function: jit it, vmap it over keys or config fields, shard it.

    Called outside of any transformation it is jitted, checks afterwards that nothing became NaN or inf, and warns
    (``NoSpreadWarning``) if the groups had nothing to tell.

    Args:
      config: the settings; traced fields may be tracers or arrays.
      env: a world, as ``make`` returns it.
      key: PRNG key ``[]``; one key, one run, bit for bit.
      total_timesteps: decision steps, rounded up to whole iterations of n_envs * n_steps (steps behind the end of a
        trajectory group's episodes included).
      state: a state to go on from, for total_timesteps *more* steps and with its own key; None: a fresh one.

    Returns:
      The last state and the metrics of all iterations.

    Raises:
      ValueError: total_timesteps below 1, or a config that does not fit the env.
      FloatingPointError: losses, gradients or group returns were not finite.
    """
    n_iterations = iterations_for(config, total_timesteps)
    if _is_traced(config, env, key, state):
        return _train(config, env, as_key(key), state, n_iterations)
    result = _train_jitted(config, env, as_key(key), state, n_iterations)
    check_finite(result.metrics)
    warn_without_spread(config, result.metrics["frac_zero_std"][:SPREAD_ITERATIONS])
    return result


def iterations_for(config: GRPOConfig, total_timesteps: int) -> int:
    """Iterations that total_timesteps decision steps take, rounded up."""
    if isinstance(total_timesteps, bool) or total_timesteps != int(total_timesteps) or total_timesteps < 1:
        raise ValueError(f"total_timesteps={total_timesteps!r} must be an integer of at least 1")
    return -(-int(total_timesteps) // config.n_states)


def _train(
    config: GRPOConfig, env: World, key: jax.Array, state: TrainState | None, n_iterations: int
) -> Result:
    state = init(config, env, key) if state is None else state
    last = state.iteration + n_iterations

    def body(state: TrainState, _: None) -> tuple[TrainState, Metrics]:
        return iteration(config, env, state, last)

    return Result(*jax.lax.scan(body, state, None, length=n_iterations))


_train_jitted = functools.partial(jax.jit, static_argnames="n_iterations")(_train)


def _state_groups(
    config: GRPOConfig,
    env: World,
    policy: Policy,
    policy_state: PolicyState,
    trajectory: Trajectory,
    key: jax.Array,
) -> tuple[Batch, Advantages, Counter]:
    """Groups of candidate actions, each of which is followed in a world of its own."""
    candidate_key, branch_key = split(key, 2)
    flat = jax.tree.map(lambda leaf: leaf.reshape(-1, *leaf.shape[2:]), trajectory)
    distribution = policy.distribution
    if candidates.resolve(config, distribution) == "enumerate":
        assert isinstance(distribution, Categorical)
        group = candidates.enumerate_actions(distribution, flat.distribution, flat.action, flat.action_mask)
    else:
        shape = (config.n_states, config.group_size - 1, distribution.n_uniforms)
        uniforms = bits_to_uniform(draw_bits(candidate_key, shape))
        group = candidates.sample_actions(distribution, flat.distribution, flat.action, uniforms)

    def act(observation: Any, mask: jax.Array | None, uniforms: jax.Array) -> jax.Array:
        parameters = policy.parameters(policy_state, observation, mask)
        return policy.to_world(distribution.sample(parameters, uniforms))

    branches = group_returns(
        env,
        act,
        branch_key,
        flat.state,
        policy.to_world(group.action),
        horizon=config.horizon,
        gamma=config.gamma,
        n_uniforms=distribution.n_uniforms,
        n_rollouts=config.n_rollouts,
        backup=config.backup,
        value=functools.partial(policy.value, policy_state) if config.bootstrap else None,
        common_random_numbers=config.common_random_numbers,
        max_branches=config.max_branches,
    )
    advantages = group_advantages(
        branches.returns,
        jnp.exp(group.log_weight),
        group.valid,
        group.executed,
        baseline=config.baseline,
        scale=config.advantage_scale,
        spread_floor=config.spread_floor,
    )
    if config.baseline == "executed":
        # Only the executed action is learned from, and it was drawn by the policy already: its weight is 1.
        group = group.replace(log_weight=jnp.zeros_like(group.log_weight))
    batch = _batch(flat, group, advantages, jnp.ones(config.n_states, bool))
    if config.bootstrap:
        values = policy.value(policy_state, trajectory.observation)
        next_values = policy.value(policy_state, trajectory.next_observation)
        targets = lambda_returns(
            trajectory.reward,
            values,
            next_values,
            trajectory.terminated,
            trajectory.terminated | trajectory.truncated,
            config.gamma,
            config.gae_lambda,
        )
        batch = batch.replace(value=values.reshape(-1), value_target=targets.reshape(-1))
    return batch, advantages, branches.simulator_steps


def _trajectory_groups(
    config: GRPOConfig, policy: Policy, trajectory: Trajectory
) -> tuple[Batch, Advantages, Counter]:
    """Groups of episodes from one reset: nothing is branched."""
    alive = first_episode(trajectory.terminated | trajectory.truncated)
    advantages = trajectory_advantages(
        trajectory.reward,
        alive,
        group_size=config.group_size,
        gamma=config.gamma,
        form=config.trajectory_form,
        baseline=config.baseline,
        scale=config.advantage_scale,
        spread_floor=config.spread_floor,
    )
    flat, advantages, alive = jax.tree.map(
        lambda leaf: leaf.reshape(-1, *leaf.shape[2:]), (trajectory, advantages, alive)
    )
    group = candidates.executed_only(policy.distribution, flat.distribution, flat.action)
    return _batch(flat, group, advantages, alive), advantages, counter.zero()


def _batch(flat: Trajectory, group: Group, advantages: Advantages, alive: jax.Array) -> Batch:
    return Batch(
        observation=flat.observation,
        action_mask=flat.action_mask,
        group=group,
        advantage=advantages.advantage,
        active=advantages.active,
        alive=alive,
        distribution=flat.distribution,
    )


def _restart_groups(
    config: GRPOConfig, env: World, environments: Environments, key: jax.Array
) -> Environments:
    """Resets all environments, those of a group from one and the same key."""
    n_groups = config.n_envs // config.group_size
    keys = split(key, n_groups)
    fresh = start(env, jnp.repeat(keys, config.group_size, axis=0))
    return fresh.replace(last_return=environments.last_return, last_length=environments.last_length)


def _episode_metrics(environments: Environments, trajectory: Trajectory) -> Metrics:
    """Episode statistics: means over the environments of their last finished episode, NaN before the first."""
    known = ~jnp.isnan(environments.last_return)
    n_known = jnp.sum(known)

    def mean(values: jax.Array) -> jax.Array:
        return jnp.where(
            n_known > 0, jnp.sum(jnp.where(known, values, 0.0)) / jnp.maximum(n_known, 1), jnp.nan
        )

    ended = trajectory.terminated | trajectory.truncated
    return {
        "episode_return": mean(environments.last_return),
        "episode_length": mean(environments.last_length),
        "n_episodes": jnp.sum(ended).astype(jnp.result_type(float)),
    }


def _group_metrics(batch: Batch, advantages: Advantages) -> Metrics:
    """How much the groups had to tell."""
    share = batch.alive / jnp.maximum(jnp.sum(batch.alive), 1)

    def average(values: jax.Array) -> jax.Array:
        return jnp.sum(jnp.where(batch.alive, values * share, 0.0))

    return {
        "group_spread": average(advantages.spread),
        "frac_zero_std": average(1.0 - advantages.active),
        "nonfinite_groups": jnp.sum(batch.alive & ~advantages.finite).astype(jnp.result_type(float)),
    }


def _is_traced(*trees: Any) -> bool:
    return any(isinstance(leaf, jax.core.Tracer) for leaf in jax.tree.leaves(trees))
