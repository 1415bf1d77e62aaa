"""Plan: act by comparison. The candidates of the present state are followed, and the policy's own action is left for a better one.

Rollout policy improvement (Tesauro & Galperin, NeurIPS 1996): one step of policy iteration, made where the policy acts. Taking
whatever did best in a few branches loses to the policy where they are noisy, or short and judged by a wrong critic. Here the
policy acts as ever, and gives way only to what was better beyond the noise of the differences, in branches that are long
beside those of training. ``docs/planning.md`` has what that brings, and what did not hold.
"""

from __future__ import annotations

import functools
import math
from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp
from flax import struct

from grpo_jax.config import GRPOConfig
from grpo_jax.groups import candidates
from grpo_jax.groups.branch import group_returns
from grpo_jax.noise import as_key, bits_to_uniform, draw_bits, split
from grpo_jax.policies.distributions import Categorical
from grpo_jax.policies.policy import Policy, PolicyState
from grpo_jax.types import Counter, Group, PyTree
from grpo_jax.worlds.base import World

HORIZON = 64


class Plan(struct.PyTreeNode):
    """How the candidates of the present state are compared.

    Attributes:
      horizon: steps of a branch, the candidate's own included. Long beside those of training: what the critic believes of a
        state some steps ahead is what the policy has learned already. [static]
      n_rollouts: M >= 2 branches of each candidate; all candidates share their random numbers. [static]
      group_size: candidates, where actions are drawn; else all actions are candidates. [static]
      max_enumerated: up to how many actions all are compared. [static]
      past_truncation: whether branches go on behind a truncation. [static]
      gamma: discount factor.
      confidence: standard errors of the mean by which a candidate must be better than the policy's own action.

    Raises:
      ValueError: a number that is too small.
    """

    horizon: int = struct.field(pytree_node=False, default=HORIZON)
    n_rollouts: int = struct.field(pytree_node=False, default=8)
    group_size: int = struct.field(pytree_node=False, default=8)
    max_enumerated: int = struct.field(pytree_node=False, default=GRPOConfig.max_enumerated)
    past_truncation: bool = struct.field(pytree_node=False, default=False)
    gamma: float | jax.Array = GRPOConfig.gamma
    confidence: float | jax.Array = 3.0

    def __post_init__(self) -> None:
        for name, least in (("horizon", 1), ("n_rollouts", 2), ("group_size", 2)):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < least:
                raise ValueError(f"plan: {name}={value!r} must be an integer of at least {least}")
        if isinstance(self.gamma, float | int) and not 0 <= self.gamma <= 1:
            raise ValueError(f"plan: gamma={self.gamma} must lie in [0, 1]")
        if isinstance(self.confidence, float | int) and not 0 <= self.confidence < math.inf:
            raise ValueError(f"plan: confidence={self.confidence} must be a number of at least 0")

    @classmethod
    def of(cls, config: GRPOConfig, **changes: Any) -> Plan:
        """What suits a policy that was trained with a config: its discount and candidates, and at least its horizon."""
        names = ("group_size", "max_enumerated", "gamma")
        settings: dict[str, Any] = {name: getattr(config, name) for name in names}
        settings["past_truncation"] = config.branch_past_truncation
        settings["horizon"] = max(HORIZON, config.horizon)
        settings["group_size"] = max(2, config.group_size)
        return cls(**(settings | changes))


class Planned(NamedTuple):
    """What acting by comparison came to.

    Attributes:
      action: ``[N, *A]`` in the policy's units.
      simulator_steps: world steps that this took.
    """

    action: jax.Array
    simulator_steps: Counter


def plan_actions(
    plan: Plan,
    world: World,
    policy: Policy,
    policy_state: PolicyState,
    states: PyTree,
    parameters: jax.Array,
    own: jax.Array,
    key: jax.Array,
    alive: jax.Array | None = None,
) -> Planned:
    """Actions for N states, by comparison.

    Args:
      plan: how.
      world: what branches are made in.
      policy: what acts; its critic, if it has one, values the end of a branch.
      policy_state: its parameters.
      states: world states, leaves ``[N, ...]``.
      parameters: ``[N, P]`` of the policy's distribution in these states, masked already.
      own: ``[N, *A]`` the actions that the policy chose itself, in its units.
      key: PRNG key of the branches. No other step may draw from it: a plan must not know the noise that is to come.
      alive: bool ``[N]``, states that are wanted; None: all.
    """
    chex.assert_equal_shape_prefix([parameters, own], 1)
    draw_key, branch_key = split(as_key(key), 2)
    n_states = len(own)
    group = propose(plan, policy, parameters, own, jax.vmap(world.action_mask)(states), draw_key)

    wanted = group.valid if alive is None else group.valid & alive[:, None]

    def repeated(leaf: jax.Array) -> jax.Array:
        # A state for each branch: their returns are wanted one by one.
        return jnp.repeat(leaf, plan.n_rollouts, axis=0)

    branches = group_returns(
        world,
        functools.partial(policy.act, policy_state),
        branch_key,
        jax.tree.map(repeated, states),
        policy.to_world(repeated(group.action)),
        horizon=plan.horizon,
        gamma=plan.gamma,
        n_uniforms=policy.distribution.n_uniforms,
        past_truncation=plan.past_truncation,
        value=None if policy.critic is None else functools.partial(policy.value, policy_state),
        alive=repeated(wanted),
    )
    returns = branches.returns.reshape(n_states, plan.n_rollouts, -1)
    best = choose(returns, group.valid, group.executed, plan.confidence)
    action = jax.vmap(lambda actions, i: actions[i])(group.action, best)
    return Planned(action.astype(own.dtype), branches.simulator_steps)


def propose(
    plan: Plan,
    policy: Policy,
    parameters: jax.Array,
    own: jax.Array,
    action_mask: jax.Array | None,
    key: jax.Array,
) -> Group:
    """The candidates ``[N, G]`` of N states, the policy's own action among them (``executed``)."""
    distribution = policy.distribution
    sets = GRPOConfig(group_size=plan.group_size, max_enumerated=plan.max_enumerated)
    if candidates.resolve(sets, distribution) == "enumerate":
        assert isinstance(distribution, Categorical)
        return candidates.enumerate_actions(distribution, parameters, own, action_mask)
    shape = (len(own), plan.group_size - 1, distribution.n_uniforms)
    return candidates.sample_actions(distribution, parameters, own, bits_to_uniform(draw_bits(key, shape)))


def choose(returns: jax.Array, valid: jax.Array, own: jax.Array, confidence: float | jax.Array) -> jax.Array:
    """The candidate that is surely best, the policy's own where none is surely better.

    Random numbers are shared, so the difference to the own action is taken branch by branch; its mean, less ``confidence``
    times its standard error, is what counts.

    Args:
      returns: ``[N, M, G]`` of M >= 2 branches of each candidate.
      valid: bool ``[N, G]``.
      own: int ``[N]``, the policy's own candidate.
      confidence: how many standard errors.

    Returns:
      int32 ``[N]``.
    """
    chex.assert_rank([returns, valid, own], [3, 2, 1])
    returns = jnp.where(valid[:, None], returns, 0.0)  # of a step that is forbidden, whatever it returned
    difference = returns - jnp.take_along_axis(returns, own[:, None, None], axis=2)
    error = jnp.std(difference, axis=1, ddof=1) / jnp.sqrt(returns.shape[1])
    sure = jnp.where(valid, jnp.mean(difference, axis=1) - confidence * error, -jnp.inf)
    best = jnp.argmax(sure, axis=1).astype(own.dtype)
    floor = 1e-6 * jnp.max(jnp.abs(returns), axis=(1, 2))  # rounding is no difference
    return jnp.where(jnp.max(sure, axis=1) > floor, best, own)
