"""Evaluate: whole episodes of a policy, many side by side."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from flax import struct

from grpo_jax import counter
from grpo_jax.cache import LoopJit
from grpo_jax.groups.plan import Plan, plan_actions
from grpo_jax.noise import KEY_WORDS, as_key, bits_to_keys, bits_to_uniform, draw_bits, split
from grpo_jax.policies.policy import Policy, PolicyState
from grpo_jax.training.loop import TrainState
from grpo_jax.types import Counter, Observation, PyTree, Step
from grpo_jax.worlds.base import World


class Episodes(struct.PyTreeNode):
    """Episodes of a policy.

    Attributes:
      returns: ``[n_episodes]`` undiscounted, in the task's own reward.
      lengths: ``[n_episodes]`` int32, in steps.
      finished: ``[n_episodes]`` bool, False where ``max_steps`` came before the end.
      simulator_steps: world steps that a plan took; else 0.
    """

    returns: jax.Array
    lengths: jax.Array
    finished: jax.Array
    simulator_steps: Counter


def evaluate(
    state: TrainState,
    env: World,
    key: jax.Array,
    n_episodes: int = 128,
    *,
    deterministic: bool = False,
    max_steps: int = 100_000,
    plan: Plan | None = None,
) -> jax.Array:
    """Returns of whole episodes, ``[n_episodes]``; :func:`evaluate_episodes` also gives their lengths."""
    return evaluate_episodes(
        state, env, key, n_episodes, deterministic=deterministic, max_steps=max_steps, plan=plan
    ).returns


def evaluate_episodes(
    state: TrainState,
    env: World,
    key: jax.Array,
    n_episodes: int = 128,
    *,
    deterministic: bool = False,
    max_steps: int = 100_000,
    plan: Plan | None = None,
) -> Episodes:
    """Plays ``n_episodes`` side by side, each until its first end; steps behind an end do not count.

    Args:
      state: a training state.
      env: the world to play in.
      key: PRNG key.
      n_episodes: how many.
      deterministic: the most probable action (or the mean) instead of a sampled one.
      max_steps: where to stop episodes that never end.
      plan: acts by comparison, ``Plan.of(config)``: the candidates of every state are followed in ``env`` before one is
        taken; see ``grpo_jax.groups.plan``. None: the policy alone acts.

    Raises:
      TypeError: state is no ``TrainState`` or env no ``World``, swapped ones included; plan is no ``Plan``.
      ValueError: n_episodes or max_steps below 1.
    """
    if not isinstance(state, TrainState) or not isinstance(env, World):
        raise TypeError(
            f"state={type(state).__name__} and env={type(env).__name__} must be a TrainState and a World, in that order"
        )
    if n_episodes < 1 or max_steps < 1:
        raise ValueError(f"n_episodes={n_episodes} and max_steps={max_steps} must be at least 1")
    if plan is not None and not isinstance(plan, Plan):
        raise TypeError(f"plan={plan!r} must be a Plan, as Plan.of(config) makes it, or None")
    arguments = (env, as_key(key), n_episodes, deterministic, max_steps, plan)
    return _play(state.policy, state.learner.policy, *arguments)


def play_step(
    policy: Policy,
    policy_state: PolicyState,
    env: World,
    key: jax.Array,
    states: PyTree,
    observation: Observation,
    *,
    deterministic: bool,
    plan: Plan | None,
    alive: jax.Array,
) -> tuple[Step, Counter]:
    """One step of N worlds, leaves ``[N, ...]``, and the world steps that were planned for it where ``alive [N]``."""
    words = draw_bits(key, (len(alive), KEY_WORDS + policy.distribution.n_uniforms))
    parameters = policy.parameters(policy_state, observation, jax.vmap(env.action_mask)(states))
    if deterministic:
        action = policy.distribution.mode(parameters)
    else:
        action = policy.distribution.sample(parameters, bits_to_uniform(words[:, KEY_WORDS:]))
    simulator_steps = counter.zero()
    if plan is not None:
        own_key = jax.random.fold_in(key, 1)  # apart from the noise of the real step
        planned = plan_actions(plan, env, policy, policy_state, states, parameters, action, own_key, alive)
        action, simulator_steps = planned.action, planned.simulator_steps
    step = jax.vmap(env.step)(bits_to_keys(words[:, :KEY_WORDS]), states, policy.to_world(action))
    return step, simulator_steps


@functools.partial(LoopJit, static_argnames=("policy", "n_episodes", "deterministic", "max_steps"))
def _play(
    policy: Policy,
    policy_state: PolicyState,
    env: World,
    key: jax.Array,
    n_episodes: int,
    deterministic: bool,
    max_steps: int,
    plan: Plan | None,
) -> Episodes:
    reset_key, play_key = split(key, 2)
    observation, world_state = jax.vmap(env.reset)(split(reset_key, n_episodes))

    def body(
        carry: tuple[jax.Array, PyTree, Observation, Episodes],
    ) -> tuple[jax.Array, PyTree, Observation, Episodes]:
        k, world_state, observation, episodes = carry
        plays = ~episodes.finished
        step, simulator_steps = play_step(
            policy,
            policy_state,
            env,
            jax.random.fold_in(play_key, k),
            world_state,
            observation,
            deterministic=deterministic,
            plan=plan,
            alive=plays,
        )
        reward = step.counted_reward
        episodes = Episodes(
            returns=episodes.returns + jnp.where(plays, reward, 0.0),
            lengths=episodes.lengths + plays,
            finished=episodes.finished | step.terminated | step.truncated,
            simulator_steps=counter.merge(episodes.simulator_steps, simulator_steps),
        )
        return k + 1, step.state, step.observation, episodes

    def goes_on(carry: tuple[jax.Array, PyTree, Observation, Episodes]) -> jax.Array:
        k, _, _, episodes = carry
        return (k < max_steps) & ~jnp.all(episodes.finished)

    nothing = Episodes(
        returns=jnp.zeros(n_episodes, jnp.result_type(float)),
        lengths=jnp.zeros(n_episodes, jnp.int32),
        finished=jnp.zeros(n_episodes, bool),
        simulator_steps=counter.zero(),
    )
    *_, episodes = jax.lax.while_loop(goes_on, body, (jnp.int32(0), world_state, observation, nothing))
    return episodes
