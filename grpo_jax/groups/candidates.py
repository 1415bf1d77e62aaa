"""Candidates: which actions of a decision state are compared."""

from __future__ import annotations

import math

import chex
import jax
import jax.numpy as jnp

from grpo_jax.config import GRPOConfig
from grpo_jax.policies.distributions import Categorical, Distribution
from grpo_jax.types import Group


def resolve(config: GRPOConfig, distribution: Distribution) -> str:
    """What ``candidates="auto"`` means for a distribution: ``enumerate``, ``sample`` or ``trajectory``.

    Raises:
      ValueError: enumeration of a space that cannot be enumerated.
    """
    n_actions = distribution.n_actions if isinstance(distribution, Categorical) else None
    if config.candidates == "enumerate":
        if n_actions is None:
            raise ValueError("candidates='enumerate' needs discrete actions; a Box takes candidates='sample'")
        if n_actions > config.max_enumerated:
            raise ValueError(
                f"candidates='enumerate' would compare {n_actions} actions a state, above"
                f" max_enumerated={config.max_enumerated}; raise it or use candidates='sample'"
            )
    if config.candidates != "auto":
        return config.candidates
    return "enumerate" if n_actions is not None and n_actions <= config.max_enumerated else "sample"


def n_candidates(config: GRPOConfig, distribution: Distribution) -> int:
    """Candidates in a state group, G."""
    if resolve(config, distribution) == "enumerate":
        assert isinstance(distribution, Categorical)
        return distribution.n_actions
    return config.group_size


def enumerate_actions(
    distribution: Categorical,
    parameters: jax.Array,
    executed: jax.Array,
    action_mask: jax.Array | None = None,
) -> Group:
    """All actions of every state, weighted by the policy: w_i = pi_old(a_i|s).

    All-action gradients: Mean Actor-Critic (arXiv:1709.00503), Expected Policy Gradients (arXiv:1706.05374).

    Args:
      distribution: over a discrete (product) space of G actions.
      parameters: ``[B, P]`` of pi_old.
      executed: ``[B, *A]`` the actions that were really executed.
      action_mask: bool ``[B, P]``, or None.

    Returns:
      A group ``[B, G]``.
    """
    chex.assert_rank(parameters, 2)
    n_states = parameters.shape[0]
    actions = jnp.asarray(distribution.actions())
    log_prob = distribution.log_prob(parameters[:, None], actions)
    if action_mask is None:
        valid = jnp.ones(log_prob.shape, bool)
    else:
        valid = distribution.allows(action_mask[:, None], actions)
    return Group(
        action=jnp.broadcast_to(actions, (n_states, *actions.shape)),
        log_prob=log_prob,
        log_weight=log_prob,
        valid=valid,
        executed=distribution.index(executed).astype(jnp.int32),
    )


def sample_actions(
    distribution: Distribution,
    parameters: jax.Array,
    executed: jax.Array,
    uniforms: jax.Array,
) -> Group:
    """K draws from the policy, the executed action first among them, weighted by 1/K.

    Args:
      distribution: of pi_old.
      parameters: ``[B, P]`` of pi_old, masked already.
      executed: ``[B, *A]`` the actions that were really executed, themselves draws from pi_old.
      uniforms: ``[B, K-1, n_uniforms]`` for the other draws.

    Returns:
      A group ``[B, K]``.
    """
    chex.assert_rank([parameters, uniforms], [2, 3])
    others = distribution.sample(parameters[:, None], uniforms)
    actions = jnp.concatenate([executed[:, None].astype(others.dtype), others], axis=1)
    log_prob = distribution.log_prob(parameters[:, None], actions)
    return Group(
        action=actions,
        log_prob=log_prob,
        log_weight=jnp.full(log_prob.shape, -math.log(actions.shape[1]), log_prob.dtype),
        valid=jnp.ones(log_prob.shape, bool),
        executed=jnp.zeros(actions.shape[0], jnp.int32),
    )


def executed_only(distribution: Distribution, parameters: jax.Array, executed: jax.Array) -> Group:
    """Groups ``[B, 1]`` of the executed action alone: a step of a trajectory, compared with other episodes."""
    log_prob = distribution.log_prob(parameters, executed)[:, None]
    return Group(
        action=executed[:, None],
        log_prob=log_prob,
        log_weight=jnp.zeros_like(log_prob),
        valid=jnp.ones(log_prob.shape, bool),
        executed=jnp.zeros(log_prob.shape[0], jnp.int32),
    )
