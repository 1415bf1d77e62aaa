"""Real transitions, and the replay that keeps the last of them for a learned world."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from flax import struct

from grpo_jax.policies.policy import Policy

LARGEST = 1e15  # beyond, squares overflow


class Transitions(struct.PyTreeNode):
    """Real steps; leaves ``[..., *]``, ``[T, N, *]`` where their order matters.

    Attributes:
      observation: ``[..., *shape]``; ``[..., D]``, its axes joined, in the replay.
      action: ``[..., *A]`` in the world's units.
      reward: ``[...]``.
      next_observation: as ``observation``, what was reached, before any reset.
      terminated: bool ``[...]``.
      truncated: bool ``[...]``; nothing that is learned.
    """

    observation: jax.Array
    action: jax.Array
    reward: jax.Array
    next_observation: jax.Array
    terminated: jax.Array
    truncated: jax.Array


class Replay(struct.PyTreeNode):
    """The last transitions, in a ring.

    Attributes:
      data: ``[capacity, *]``.
      n_seen: int32, how many were ever put in.
    """

    data: Transitions
    n_seen: jax.Array

    @property
    def capacity(self) -> int:
        """How many transitions there is room for."""
        return int(self.data.reward.shape[0])

    @property
    def count(self) -> jax.Array:
        """How many transitions are held; int32."""
        return jnp.minimum(self.n_seen, self.capacity)


def transitions_of(policy: Policy, trajectory: Any) -> Transitions:
    """What a recorded ``training.rollout.Trajectory`` ``[T, N]`` teaches.

    Raises:
      ValueError: it was collected without ``keep_next_observation``.
    """
    if trajectory.next_observation is None:
        raise ValueError("trajectory.next_observation is None; collect with keep_next_observation=True")
    return Transitions(
        observation=trajectory.observation,
        action=policy.to_world(trajectory.action),
        reward=trajectory.reward,
        next_observation=trajectory.next_observation,
        terminated=trajectory.terminated,
        truncated=trajectory.truncated,
    )


@jax.jit
def remember(replay: Replay, transitions: Transitions) -> Replay:
    """Puts transitions ``[..., *]`` in the place of the oldest ones; those with NaN, inf or beyond 1e15 are left out.

    Raises:
      ValueError: more at once than the replay has room for.
    """
    n_axes = transitions.reward.ndim
    if transitions.reward.size > replay.capacity:
        raise ValueError(
            f"{transitions.reward.size} transitions at once are more than capacity={replay.capacity}; raise it"
        )
    joined = join_axes(transitions, replay.data.observation)
    flat: Transitions = jax.tree.map(lambda leaf: leaf.reshape(-1, *leaf.shape[n_axes:]), joined)
    numbers = jnp.concatenate([flat.observation, flat.next_observation, flat.reward[:, None]], axis=-1)
    sound = jnp.all(jnp.abs(numbers) < LARGEST, axis=-1)  # False for NaN
    slots = (replay.n_seen + jnp.cumsum(sound) - 1) % replay.capacity
    slots = jnp.where(sound, slots, replay.capacity)
    data = jax.tree.map(
        lambda old, new: old.at[slots].set(new.astype(old.dtype), mode="drop"), replay.data, flat
    )
    return Replay(data, replay.n_seen + jnp.sum(sound, dtype=jnp.int32))


def join_axes(transitions: Transitions, like: jax.Array) -> Transitions:
    """Observations ``[..., D]`` out of ``[..., *shape]``, in the dtype of ``like [_, D]``, and rewards in it, too."""
    batch = transitions.reward.shape

    def join(observation: jax.Array) -> jax.Array:
        return jnp.asarray(observation, like.dtype).reshape(*batch, like.shape[1])

    return transitions.replace(
        observation=join(transitions.observation),
        next_observation=join(transitions.next_observation),
        reward=jnp.asarray(transitions.reward, like.dtype),
    )
