"""Tiny tabular MDPs: solved exactly with NumPy, and as worlds that the library can step."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct

from grpo_jax.groups.branch import group_returns
from grpo_jax.spaces import Box, Discrete
from grpo_jax.types import Step
from grpo_jax.worlds.base import World


@dataclass(frozen=True)
class MDP:
    """States in layers, so that every episode ends after at most ``n_layers`` steps.

    Attributes:
      transition: ``[S, A, S]`` probabilities; what a row lacks to 1 is the probability of termination.
      reward: ``[S, A]``.
      start: ``[S]`` probabilities.
      n_layers: longest episode.
    """

    transition: np.ndarray
    reward: np.ndarray
    start: np.ndarray
    n_layers: int

    @property
    def n_states(self) -> int:
        return self.reward.shape[0]

    @property
    def n_actions(self) -> int:
        return self.reward.shape[1]


def random_mdp(seed: int, n_layers: int = 3, width: int = 2, n_actions: int = 3) -> MDP:
    """A random layered MDP; a tenth to a half of the mass terminates at each step, all of it in the last layer."""
    rng = np.random.default_rng(seed)
    n_states = n_layers * width
    transition = np.zeros((n_states, n_actions, n_states))
    for layer in range(n_layers - 1):
        here = slice(layer * width, (layer + 1) * width)
        there = slice((layer + 1) * width, (layer + 2) * width)
        stay = rng.uniform(0.5, 0.9, (width, n_actions, 1))
        transition[here, :, there] = stay * rng.dirichlet(np.ones(width), (width, n_actions))
    start = np.zeros(n_states)
    start[:width] = rng.dirichlet(np.ones(width))
    return MDP(transition, rng.normal(size=(n_states, n_actions)), start, n_layers)


def softmax(logits: np.ndarray) -> np.ndarray:
    exponent = np.exp(logits - logits.max(-1, keepdims=True))
    return exponent / exponent.sum(-1, keepdims=True)


def action_values(mdp: MDP, pi: np.ndarray, gamma: float) -> np.ndarray:
    """Q ``[S, A]`` of a policy ``[S, A]``, by dynamic programming backwards over the layers."""
    q = mdp.reward.copy()
    for _ in range(mdp.n_layers):
        q = mdp.reward + gamma * mdp.transition @ np.sum(pi * q, axis=1)
    return q


def occupancy(mdp: MDP, pi: np.ndarray, gamma: float) -> np.ndarray:
    """sum_t gamma^t P(s_t = s), ``[S]``, forwards in time."""
    now, total = mdp.start.copy(), np.zeros(mdp.n_states)
    for t in range(mdp.n_layers):
        total += gamma**t * now
        now = np.einsum("s,sa,sat->t", now, pi, mdp.transition)
    return total


def objective(mdp: MDP, pi: jax.Array, gamma: float) -> jax.Array:
    """J = start @ V with V from the Bellman equation, solved at once; differentiable."""
    p_pi = jnp.einsum("sa,sat->st", pi, mdp.transition)
    r_pi = jnp.sum(pi * mdp.reward, axis=1)
    return mdp.start @ jnp.linalg.solve(jnp.eye(mdp.n_states) - gamma * p_pi, r_pi)


@struct.dataclass
class BeliefWorld(World):
    """An MDP whose state is a distribution over states: branches give Q itself instead of a sample of it.

    A state is the mass ``[S]`` that has not terminated, an action a matrix ``[S, A]`` of action probabilities, a
    reward the expected reward of that mass. The world terminates once no mass is left.
    """

    transition: jax.Array
    reward: jax.Array

    @property
    def observation_space(self) -> Box:  # type: ignore[override]
        return Box(np.zeros(self.reward.shape[0]), np.ones(self.reward.shape[0]), (self.reward.shape[0],))

    @property
    def action_space(self) -> Box:  # type: ignore[override]
        return Box(np.zeros(self.reward.shape), np.ones(self.reward.shape), self.reward.shape)

    def reset(self, key: jax.Array) -> tuple[jax.Array, jax.Array]:
        raise NotImplementedError("branches start where the test says")

    def step(self, key: jax.Array, state: jax.Array, action: jax.Array) -> Step:
        taken = state[:, None] * action
        after = jnp.einsum("sa,sat->t", taken, self.transition)
        return Step(
            observation=after,
            state=after,
            reward=jnp.sum(taken * self.reward),
            terminated=jnp.sum(after) < 1e-12,
            truncated=jnp.bool_(False),
        )


@functools.partial(jax.jit, static_argnames="horizon")
def belief_returns(transition: Any, reward: Any, pi: Any, gamma: Any, horizon: int) -> jax.Array:
    """Q ``[S, A]`` through the library's branches: from each state one candidate for each action."""
    dtype = jnp.result_type(float)
    world, pi = (
        BeliefWorld(jnp.asarray(transition, dtype), jnp.asarray(reward, dtype)),
        jnp.asarray(pi, dtype),
    )

    def act(observation: jax.Array, mask: None, uniforms: jax.Array) -> jax.Array:
        return jnp.broadcast_to(pi, (*uniforms.shape[:-1], *pi.shape))

    n_states, n_actions = pi.shape
    one_hot = jnp.eye(n_actions, dtype=dtype)[None, :, None, :]
    return group_returns(
        world,
        act,
        jax.random.key(0),
        jnp.eye(n_states, dtype=dtype),
        jnp.broadcast_to(one_hot, (n_states, n_actions, n_states, n_actions)),
        horizon=horizon,
        gamma=gamma,
    ).returns


@struct.dataclass
class TabularState:
    position: jax.Array
    time: jax.Array
    ended: jax.Array


@struct.dataclass
class TabularWorld(World):
    """A tabular MDP that is really sampled, and nasty behind an end: it pays NaN and comes back to life.

    Attributes:
      cumulative: ``[S, A, S]`` running sums of the transition probabilities; beyond the last: termination.
      reward: ``[S, A]``.
      start: ``[S]`` running sums of the start probabilities.
      time_limit: int32 ``[]``, truncates once this many steps are done.
    """

    cumulative: jax.Array
    reward: jax.Array
    start: jax.Array
    time_limit: jax.Array

    @property
    def observation_space(self) -> Discrete:  # type: ignore[override]
        return Discrete(self.reward.shape[0])

    @property
    def action_space(self) -> Discrete:  # type: ignore[override]
        return Discrete(self.reward.shape[1])

    def reset(self, key: jax.Array) -> tuple[jax.Array, TabularState]:
        position = jnp.sum(self.start <= jax.random.uniform(key), dtype=jnp.int32)
        return position, TabularState(position, jnp.int32(0), jnp.bool_(False))

    def step(self, key: jax.Array, state: TabularState, action: jax.Array) -> Step:
        cumulative = self.cumulative[state.position, action]
        reached = jnp.sum(cumulative <= jax.random.uniform(key), dtype=jnp.int32)
        terminated = (reached == self.reward.shape[0]) & ~state.ended
        truncated = (state.time + 1 >= self.time_limit) & ~state.ended
        position = jnp.where(reached == self.reward.shape[0], 0, reached)
        return Step(
            observation=position,
            state=TabularState(position, state.time + 1, terminated | truncated),
            reward=jnp.where(state.ended, jnp.nan, self.reward[state.position, action]),
            terminated=terminated,
            truncated=truncated,
        )


def sampled_world(transition: Any, reward: Any, start: Any = None, time_limit: int = 10**6) -> TabularWorld:
    """The world of ``transition [S, A, S]`` and ``reward [S, A]``."""
    dtype = jnp.result_type(float)
    transition = np.asarray(transition, float)
    start = np.eye(len(transition))[0] if start is None else start
    # Rounded up to 1 where a row is complete, so that no uniform number terminates by accident.
    cumulative = np.cumsum(transition, axis=-1)
    cumulative = np.where(cumulative > 1 - 1e-6, 1.0, cumulative)
    return TabularWorld(
        cumulative=jnp.asarray(cumulative, dtype),
        reward=jnp.asarray(reward, dtype),
        start=jnp.asarray(np.cumsum(start)[:-1], dtype),
        time_limit=jnp.int32(time_limit),
    )


def states_at(positions: Any, time: int = 0) -> TabularState:
    """World states ``[B]`` at given positions."""
    positions = jnp.asarray(positions, jnp.int32)
    return TabularState(
        positions, jnp.full(positions.shape, time, jnp.int32), jnp.zeros(positions.shape, bool)
    )
