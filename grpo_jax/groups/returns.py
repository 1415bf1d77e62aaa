"""Returns of the executed steps: lambda-returns, returns to go, and which episodes they belong to."""

from __future__ import annotations

import chex
import jax
import jax.numpy as jnp


def first_episode(ended: jax.Array) -> jax.Array:
    """Which steps belong to the first episode of each environment; bool ``[T, N]`` -> bool ``[T, N]``."""
    chex.assert_rank(ended, 2)
    ends_before = jnp.cumsum(ended, axis=0) - ended
    return ends_before == 0


def ends_within(ended: jax.Array) -> jax.Array:
    """Which steps belong to an episode that ends within the rollout; bool ``[T, N]`` -> bool ``[T, N]``."""
    chex.assert_rank(ended, 2)
    return jnp.cumsum(ended[::-1], axis=0)[::-1] > 0


def returns_to_go(rewards: jax.Array, alive: jax.Array, gamma: float | jax.Array) -> jax.Array:
    """Discounted sums of the rewards of the first episode from each step on; ``[T, N]`` -> ``[T, N]``."""
    chex.assert_equal_shape([rewards, alive])

    def backwards(future: jax.Array, step: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        reward, is_alive = step
        total = jnp.where(is_alive, reward + gamma * future, 0.0)
        return total, total

    _, totals = jax.lax.scan(backwards, jnp.zeros_like(rewards[0]), (rewards, alive), reverse=True)
    return totals


def lambda_returns(
    rewards: jax.Array,
    values: jax.Array,
    next_values: jax.Array,
    terminated: jax.Array,
    ended: jax.Array,
    gamma: float | jax.Array,
    gae_lambda: float | jax.Array,
) -> jax.Array:
    """TD(lambda) returns of the executed trajectories (GAE plus value, arXiv:1506.02438, eq. 16).

    Args:
      rewards: ``[T, N]``.
      values: ``[T, N]`` V(s_t).
      next_values: ``[T, N]`` V of the state that was reached, before any reset.
      terminated: ``[T, N]`` bool, no value beyond.
      ended: ``[T, N]`` bool, terminated or truncated: the next row is another episode.
      gamma: discount factor.
      gae_lambda: lambda.

    Returns:
      ``[T, N]``.
    """
    chex.assert_equal_shape([rewards, values, next_values, terminated, ended])
    deltas = rewards + gamma * jnp.where(terminated, 0.0, next_values) - values

    def backwards(gae: jax.Array, step: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        delta, end = step
        gae = delta + gamma * gae_lambda * jnp.where(end, 0.0, gae)
        return gae, gae

    _, advantages = jax.lax.scan(backwards, jnp.zeros_like(rewards[0]), (deltas, ended), reverse=True)
    return advantages + values
