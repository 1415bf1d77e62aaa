"""Evaluate: whole episodes of a policy, many side by side."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from flax import struct

from grpo_jax.noise import KEY_WORDS, as_key, bits_to_keys, bits_to_uniform, draw_bits, split
from grpo_jax.policies.policy import Policy, PolicyState
from grpo_jax.training.loop import TrainState
from grpo_jax.types import Observation, PyTree
from grpo_jax.worlds.base import World


class Episodes(struct.PyTreeNode):
    """Episodes of a policy.

    Attributes:
      returns: ``[n_episodes]`` undiscounted, in the task's own reward.
      lengths: ``[n_episodes]`` int32, in steps.
      finished: ``[n_episodes]`` bool, False where ``max_steps`` came before the end.
    """

    returns: jax.Array
    lengths: jax.Array
    finished: jax.Array


def evaluate(
    state: TrainState,
    env: World,
    key: jax.Array,
    n_episodes: int = 128,
    *,
    deterministic: bool = False,
    max_steps: int = 100_000,
) -> jax.Array:
    """Returns of whole episodes, ``[n_episodes]``; :func:`evaluate_episodes` also gives their lengths."""
    return evaluate_episodes(
        state, env, key, n_episodes, deterministic=deterministic, max_steps=max_steps
    ).returns


def evaluate_episodes(
    state: TrainState,
    env: World,
    key: jax.Array,
    n_episodes: int = 128,
    *,
    deterministic: bool = False,
    max_steps: int = 100_000,
) -> Episodes:
    """Plays ``n_episodes`` side by side, each until its first end; steps behind an end do not count.

    Args:
      state: a training state.
      env: the world to play in.
      key: PRNG key.
      n_episodes: how many.
      deterministic: the most probable action (or the mean) instead of a sampled one.
      max_steps: where to stop episodes that never end.

    Raises:
      TypeError: state is no ``TrainState`` or env no ``World``, swapped ones included.
      ValueError: n_episodes or max_steps below 1.
    """
    if not isinstance(state, TrainState) or not isinstance(env, World):
        raise TypeError(
            f"state={type(state).__name__} and env={type(env).__name__} must be a TrainState and a World, in that order"
        )
    if n_episodes < 1 or max_steps < 1:
        raise ValueError(f"n_episodes={n_episodes} and max_steps={max_steps} must be at least 1")
    return _play(state.policy, state.learner.policy, env, as_key(key), n_episodes, deterministic, max_steps)


@functools.partial(jax.jit, static_argnames=("policy", "n_episodes", "deterministic", "max_steps"))
def _play(
    policy: Policy,
    policy_state: PolicyState,
    env: World,
    key: jax.Array,
    n_episodes: int,
    deterministic: bool,
    max_steps: int,
) -> Episodes:
    reset_key, play_key = split(key, 2)
    observation, world_state = jax.vmap(env.reset)(split(reset_key, n_episodes))

    def body(
        carry: tuple[jax.Array, PyTree, Observation, Episodes],
    ) -> tuple[jax.Array, PyTree, Observation, Episodes]:
        k, world_state, observation, episodes = carry
        n_words = KEY_WORDS + policy.distribution.n_uniforms
        words = draw_bits(jax.random.fold_in(play_key, k), (n_episodes, n_words))
        mask = jax.vmap(env.action_mask)(world_state)
        parameters = policy.parameters(policy_state, observation, mask)
        if deterministic:
            action = policy.distribution.mode(parameters)
        else:
            action = policy.distribution.sample(parameters, bits_to_uniform(words[:, KEY_WORDS:]))
        step = jax.vmap(env.step)(bits_to_keys(words[:, :KEY_WORDS]), world_state, policy.to_world(action))
        reward = step.counted_reward
        plays = ~episodes.finished
        episodes = Episodes(
            returns=episodes.returns + jnp.where(plays, reward, 0.0),
            lengths=episodes.lengths + plays,
            finished=episodes.finished | step.terminated | step.truncated,
        )
        return k + 1, step.state, step.observation, episodes

    def goes_on(carry: tuple[jax.Array, PyTree, Observation, Episodes]) -> jax.Array:
        k, _, _, episodes = carry
        return (k < max_steps) & ~jnp.all(episodes.finished)

    nothing = Episodes(
        returns=jnp.zeros(n_episodes, jnp.result_type(float)),
        lengths=jnp.zeros(n_episodes, jnp.int32),
        finished=jnp.zeros(n_episodes, bool),
    )
    *_, episodes = jax.lax.while_loop(goes_on, body, (jnp.int32(0), world_state, observation, nothing))
    return episodes
