"""Compare: from a trajectory to what the update learns from; the stages of ``groups/``, put together."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from grpo_jax.config import GRPOConfig
from grpo_jax.groups import candidates
from grpo_jax.groups.advantage import Advantages, group_advantages
from grpo_jax.groups.branch import Branches, group_returns
from grpo_jax.groups.returns import ends_within, first_episode, lambda_returns
from grpo_jax.groups.trajectory import episode_advantages, trajectory_advantages
from grpo_jax.noise import bits_to_uniform, draw_bits
from grpo_jax.policies.distributions import Categorical
from grpo_jax.policies.policy import Policy, PolicyState
from grpo_jax.types import Batch, Group, PyTree, Trajectory
from grpo_jax.worlds.base import World


def propose(config: GRPOConfig, policy: Policy, trajectory: Trajectory, key: jax.Array) -> Group:
    """The candidate actions of every decision state: ``[n_steps * n_envs, G]``."""
    flat = _flat(trajectory)
    distribution = policy.distribution
    assert flat.distribution is not None
    if candidates.resolve(config, distribution) == "enumerate":
        assert isinstance(distribution, Categorical)
        return candidates.enumerate_actions(distribution, flat.distribution, flat.action, flat.action_mask)
    persists = config.persistence is not None
    shape = (config.n_states, config.group_size - 1 + persists, distribution.n_uniforms)
    uniforms = bits_to_uniform(draw_bits(key, shape))
    executed = flat.action
    if persists:  # what was executed may be no draw from the policy: another one takes its place
        executed, uniforms = distribution.sample(flat.distribution, uniforms[:, 0]), uniforms[:, 1:]
    return candidates.sample_actions(distribution, flat.distribution, executed, uniforms)


def branched(config: GRPOConfig, iteration: jax.Array | int) -> jax.Array:
    """The decision states whose candidates are followed in an iteration; bool ``[n_steps * n_envs]``."""
    time, index = jnp.arange(config.n_steps)[:, None], jnp.arange(config.n_envs)
    return ((time + index + iteration) % config.branch_every == 0).reshape(-1)


def keep_branched(config: GRPOConfig, iteration: jax.Array, time: jax.Array, states: PyTree) -> PyTree:
    """Of the states ``[n_envs, ...]`` at one step of a rollout those that are :func:`branched`, in their order.

    Leaves ``[ceil(n_envs / branch_every), ...]``: where fewer are branched at this step, the last one is any. ``()`` where
    none ever is.
    """
    if config.candidates in ("trajectory", "episodes"):
        return ()
    first = -(time + iteration) % config.branch_every
    rows = jnp.minimum(first + jnp.arange(0, config.n_envs, config.branch_every), config.n_envs - 1)
    return jax.tree.map(lambda leaf: leaf[rows], states)


def follow(
    config: GRPOConfig,
    env: World,
    policy: Policy,
    policy_state: PolicyState,
    trajectory: Trajectory,
    group: Group,
    wanted: jax.Array,
    key: jax.Array,
    persistence: jax.Array | None = None,
) -> Branches:
    """Follows every valid candidate of the states that are ``wanted [B]`` in a world of its own; returns of others are 0."""
    distribution = policy.distribution
    every, kept, actions = config.branch_every, trajectory.branched, policy.to_world(group.action)
    states = _flat(trajectory.state if kept is None else kept)
    # A step that is forbidden may be any nonsense: it is not made.
    alive = None if trajectory.action_mask is None else group.valid
    if every > 1:
        rows = jnp.flatnonzero(wanted, size=config.n_states // every)
        actions, alive = jax.tree.map(lambda leaf: leaf[rows], (actions, alive))
        if kept is None:
            states = jax.tree.map(lambda leaf: leaf[rows], states)
        elif config.n_envs % every:
            time, index = rows // config.n_envs, rows % config.n_envs
            places = time * -(-config.n_envs // every) + index // every
            states = jax.tree.map(lambda leaf: leaf[places], states)

    branches = group_returns(
        env,
        functools.partial(policy.act, policy_state),
        key,
        states,
        actions,
        horizon=config.horizon,
        gamma=config.gamma,
        n_uniforms=distribution.n_uniforms,
        n_rollouts=config.n_rollouts,
        backup=config.backup,
        persistence=persistence,
        past_truncation=config.branch_past_truncation,
        value=functools.partial(policy.value, policy_state) if config.bootstrap else None,
        common_random_numbers=config.common_random_numbers,
        max_branches=config.max_branches,
        alive=alive,
    )
    if every > 1:
        nothing = jnp.zeros(group.valid.shape, branches.returns.dtype)
        branches = branches.replace(returns=nothing.at[rows].set(branches.returns))
    return branches


def compare_branches(
    config: GRPOConfig,
    policy: Policy,
    policy_state: PolicyState,
    trajectory: Trajectory,
    group: Group,
    branches: Branches,
    wanted: jax.Array,
) -> tuple[Batch, Advantages]:
    """Compares the candidates of every state that is ``wanted [B]`` with each other.

    With a critic the others are learned from too, see :func:`_with_executed`.
    """
    advantages = group_advantages(
        branches.returns,
        jnp.exp(group.log_weight),
        group.valid & wanted[:, None],
        group.executed,
        baseline=config.baseline,
        scale=config.advantage_scale,
        spread_floor=config.spread_floor,
    )
    if config.baseline == "executed":
        # Only the executed action is learned from, and it was drawn by the policy already: its weight is 1.
        group = group.replace(log_weight=jnp.zeros_like(group.log_weight))
    batch = _batch(_flat(trajectory), group, advantages, jnp.ones_like(wanted)).replace(compared=wanted)
    if config.bootstrap:
        values, targets = _critic(config, policy, policy_state, trajectory)
        batch = batch.replace(value=values.reshape(-1), value_target=targets.reshape(-1))
        # What persists was not the policy's own choice.
        if config.branch_every > 1 and config.persistence is None:
            batch = _with_executed(config, batch)
    return batch, advantages


def _with_executed(config: GRPOConfig, batch: Batch) -> Batch:
    """Gives the states that were not branched the advantage of their executed action, as in :func:`compare_episodes`.

    Where few states are branched, the groups alone would starve the policy.
    """
    assert batch.value is not None
    assert batch.value_target is not None
    group, is_branched = batch.group, batch.compared[:, None]
    executed = episode_advantages(
        batch.value_target - batch.value,
        ~batch.compared,
        None,
        scale=config.advantage_scale,
        spread_floor=config.spread_floor,
        magnitude=jnp.maximum(jnp.abs(batch.value_target), jnp.abs(batch.value)),
    )
    is_executed = jnp.arange(group.valid.shape[1]) == group.executed[:, None]
    group = group.replace(
        valid=jnp.where(is_branched, group.valid, is_executed),
        log_weight=jnp.where(is_branched, group.log_weight, 0.0),
    )
    return batch.replace(
        group=group,
        advantage=jnp.where(is_branched, batch.advantage, is_executed * executed.advantage),
        active=jnp.where(batch.compared, batch.active, executed.active),
    )


def compare_episodes(
    config: GRPOConfig, policy: Policy, policy_state: PolicyState, trajectory: Trajectory
) -> tuple[Batch, Advantages]:
    """Groups of the episodes that the rollout happens to hold.

    Without a critic a step is compared with the others at equal time since their reset, by returns to go; what the
    rollout cut is left out. With one, lambda-returns beyond what the critic expected are comparable wherever they were
    earned: all steps are one group, as in PPO with normalised advantages (arXiv:1707.06347; GAE arXiv:1506.02438).
    """
    ended = trajectory.ended
    values = targets = magnitude = None
    if config.bootstrap:
        values, targets = _critic(config, policy, policy_state, trajectory)
        returns, group = targets - values, None
        valid, magnitude = jnp.ones_like(ended), jnp.maximum(jnp.abs(targets), jnp.abs(values))
    else:
        nothing = jnp.zeros_like(trajectory.reward)
        returns = lambda_returns(trajectory.reward, nothing, nothing, ended, ended, config.gamma, 1.0)
        group, valid = trajectory.time, ends_within(ended)
    flat, returns, valid, group = _flat((trajectory, returns, valid, group))
    values, targets, magnitude = _flat((values, targets, magnitude))
    advantages = episode_advantages(
        returns,
        valid,
        group,
        baseline=config.baseline,
        scale=config.advantage_scale,
        spread_floor=config.spread_floor,
        magnitude=magnitude,
    )
    executed = candidates.executed_only(policy.distribution, flat.distribution, flat.action)
    batch = _batch(flat, executed, advantages, valid)
    return batch.replace(value=values, value_target=targets), advantages


def compare_trajectories(
    config: GRPOConfig, policy: Policy, trajectory: Trajectory
) -> tuple[Batch, Advantages]:
    """Groups of episodes from one reset: nothing is branched."""
    alive = first_episode(trajectory.ended)
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
    flat, advantages, alive = _flat((trajectory, advantages, alive))
    group = candidates.executed_only(policy.distribution, flat.distribution, flat.action)
    return _batch(flat, group, advantages, alive), advantages


def _critic(
    config: GRPOConfig, policy: Policy, policy_state: PolicyState, trajectory: Trajectory
) -> tuple[jax.Array, jax.Array]:
    """The critic's values of the decision states, and the lambda-returns it learns; both ``[T, N]``."""
    values = trajectory.value
    if values is None:
        values = policy.value(policy_state, trajectory.observation)
    targets = lambda_returns(
        trajectory.reward,
        values,
        _next_values(functools.partial(policy.value, policy_state), trajectory, values),
        trajectory.terminated,
        trajectory.ended,
        config.gamma,
        config.gae_lambda,
    )
    return values, targets


def _next_values(value: Callable[[Any], jax.Array], trajectory: Trajectory, values: jax.Array) -> jax.Array:
    """Values ``[T, N]`` of what was reached: the next decision state's ``values``; the critic is asked only where there
    is none, N states at a time. Behind a terminal state the number means nothing.
    """
    n_envs = values.shape[1]
    is_last = jnp.zeros_like(trajectory.ended).at[-1].set(True)
    asked = (trajectory.truncated | is_last) & ~trajectory.terminated
    order, reached = jnp.argsort(~asked.reshape(-1)), _flat(trajectory.next_observation)

    def ask(carry: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        start, known = carry
        rows = jax.lax.dynamic_slice(order, (start,), (n_envs,))
        return start + n_envs, known.at[rows].set(value(jax.tree.map(lambda leaf: leaf[rows], reached)))

    known = jnp.roll(values, -1, axis=0).reshape(-1)
    n_asked = jnp.sum(asked)
    known = jax.lax.while_loop(lambda carry: carry[0] < n_asked, ask, (jnp.zeros_like(n_asked), known))[1]
    return known.reshape(values.shape)


def _batch(flat: Trajectory, group: Group, advantages: Advantages, alive: jax.Array) -> Batch:
    assert flat.distribution is not None
    return Batch(
        observation=flat.observation,
        action_mask=flat.action_mask,
        group=group,
        advantage=advantages.advantage,
        active=advantages.active,
        alive=alive,
        compared=alive,
        distribution=flat.distribution,
    )


def _flat(tree: Any) -> Any:
    """Leaves ``[T, N, ...]`` as ``[T * N, ...]``."""
    # Not -1: MJX has empty arrays.
    return jax.tree.map(lambda leaf: leaf.reshape(leaf.shape[0] * leaf.shape[1], *leaf.shape[2:]), tree)
