"""What a trained policy compares: the candidates of one decision state, followed step by step, and of many visited ones."""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from grpo_jax import spaces
from grpo_jax.config import GRPOConfig
from grpo_jax.groups.advantage import group_advantages
from grpo_jax.groups.branch import group_returns
from grpo_jax.groups.branch_return import add_reward, back_up, ends, open_end
from grpo_jax.groups.plan import Plan, propose
from grpo_jax.noise import KEY_WORDS, as_key, bits_to_keys, bits_to_uniform, draw_bits, split
from grpo_jax.training.evaluate import play_step
from grpo_jax.training.loop import TrainState
from grpo_jax.types import Group, Observation, PyTree
from grpo_jax.worlds.base import World

Array = Any  # of JAX, and of NumPy once it is on the host


class Fan(NamedTuple):
    """The group of one decision state, followed.

    Attributes:
      action: ``[G, *A]`` candidates, in the world's units.
      valid: bool ``[G]``: False for actions that are forbidden here.
      returns: ``[G, M]`` of each branch, as training counts them: discounted, with the critic's value where it was cut.
      advantage: ``[G]`` beyond the baseline of the run's settings, in units of return.
      earned: ``[G, M, H + 1]`` undiscounted reward so far; NaN behind an end.
      observation: ``[G, M, H + 1, D]`` flat vectors, NaN behind an end; None where observations are no vectors.
    """

    action: Array
    valid: Array
    returns: Array
    advantage: Array
    earned: Array
    observation: Array | None


class Visited(NamedTuple):
    """Decision states of an episode each, and whether the episode still goes on there; leaves ``[T, N, ...]``."""

    observation: Observation
    state: PyTree
    alive: jax.Array


@functools.partial(jax.jit, static_argnames=("n_episodes", "n_steps"))
def visit(state: TrainState, world: World, key: jax.Array, *, n_episodes: int, n_steps: int) -> Visited:
    """The states before each of the first ``n_steps`` steps of N episodes of the sampled policy.

    Args:
      state: a training state of a single seed.
      world: where it plays.
      key: PRNG key.
      n_episodes: N.
      n_steps: T.
    """
    reset_key, play_key = split(as_key(key), 2)
    observation, states = jax.vmap(world.reset)(split(reset_key, n_episodes))

    def body(carry: Visited, k: jax.Array) -> tuple[Visited, Visited]:
        step, _ = play_step(
            state.policy,
            state.learner.policy,
            world,
            jax.random.fold_in(play_key, k),
            carry.state,
            carry.observation,
            deterministic=False,
            plan=None,
            alive=carry.alive,
        )
        ended = step.terminated | step.truncated
        return Visited(step.observation, step.state, carry.alive & ~ended), carry

    first = Visited(observation, states, jnp.ones(n_episodes, bool))
    return jax.lax.scan(body, first, jnp.arange(n_steps))[1]


@functools.partial(jax.jit, static_argnames=("n_branches",))
def fan(
    state: TrainState,
    world: World,
    config: GRPOConfig,
    decision: PyTree,
    observation: Observation,
    key: jax.Array,
    *,
    n_branches: int,
) -> Fan:
    """Follows the candidates of one decision state, and keeps what happens at each step.

    Args:
      state: a training state of a single seed.
      world: what is stepped.
      config: how the run compares: candidates, horizon, discount, baseline.
      decision: the world's state, without a batch axis.
      observation: of it.
      key: PRNG key; all candidates share their random numbers.
      n_branches: M branches of each candidate.
    """
    policy, policy_state = state.policy, state.learner.policy
    n_uniforms = policy.distribution.n_uniforms
    draw_key, branch_key = split(as_key(key), 2)
    group = _propose(state, world, config, _in_batch(decision), _in_batch(observation), draw_key)
    actions = policy.to_world(group.action)[0]

    def branch(action: jax.Array, key: jax.Array) -> tuple[jax.Array, Any]:
        def body(carry: tuple[Any, ...], words: jax.Array) -> tuple[tuple[Any, ...], Any]:
            world_state, action, seen, total, earned, discount, alive, is_open = carry
            step = world.step(bits_to_keys(words[:KEY_WORDS]), world_state, action)
            total = jnp.where(alive, add_reward(total, discount, step.reward), total)
            earned = jnp.where(alive, earned + step.counted_reward, earned)
            discount = jnp.where(alive, discount * config.gamma, discount)
            is_open = jnp.where(alive, open_end(step.terminated), is_open)
            seen = jax.tree.map(lambda old, new: jnp.where(alive, new, old), seen, step.observation)
            shown = (earned, _vector(world, step.observation), alive)
            alive &= ~ends(step.terminated, step.truncated, config.branch_past_truncation)
            mask = world.action_mask(step.state)
            following = policy.act(policy_state, step.observation, mask, bits_to_uniform(words[KEY_WORDS:]))
            return (
                step.state,
                following.astype(action.dtype),
                seen,
                total,
                earned,
                discount,
                alive,
                is_open,
            ), shown

        nothing, yes = jnp.zeros((), jnp.result_type(float)), jnp.bool_(True)
        first = (decision, action, observation, nothing, nothing, nothing + 1, yes, ~yes)
        words = draw_bits(key, (config.horizon, KEY_WORDS + n_uniforms))
        (_, _, seen, total, _, discount, _, is_open), shown = jax.lax.scan(body, first, words)
        if config.bootstrap:
            total = jnp.where(is_open, add_reward(total, discount, policy.value(policy_state, seen)), total)
        return total, shown

    keys = split(branch_key, n_branches)
    over_group = jax.vmap(jax.vmap(branch, in_axes=(None, 0)), in_axes=(0, None))
    returns, shown = over_group(actions, keys)
    earned, seen, alive = shown

    def from_start(values: jax.Array, first: jax.Array) -> jax.Array:
        start = jnp.broadcast_to(first, (*values.shape[:2], 1, *values.shape[3:]))
        shown = alive.reshape(alive.shape + (1,) * (values.ndim - 3))
        return jnp.concatenate([start, jnp.where(shown, values, jnp.nan)], axis=2)

    first = _vector(world, observation)
    return Fan(
        action=actions,
        valid=group.valid[0],
        returns=returns,
        advantage=_advantages(config, group, back_up(returns, config.backup, axis=1)[None])[0],
        earned=from_start(earned, jnp.zeros(())),
        observation=None if first is None else from_start(seen, first),
    )


@functools.partial(jax.jit, static_argnames=("n_branches",))
def compare(
    state: TrainState,
    world: World,
    config: GRPOConfig,
    states: PyTree,
    observation: Observation,
    key: jax.Array,
    *,
    n_branches: int,
) -> jax.Array:
    """Returns of the candidates of N decision states, branch by branch: ``[N, M, G]``.

    Args:
      state: a training state of a single seed.
      world: what is stepped.
      config: how the run compares.
      states: world states, leaves ``[N, ...]``.
      observation: of them.
      key: PRNG key; the candidates of a state share their random numbers.
      n_branches: M branches of each candidate.
    """
    policy, policy_state = state.policy, state.learner.policy
    draw_key, branch_key = split(as_key(key), 2)
    group = _propose(state, world, config, states, observation, draw_key)

    def repeated(tree: PyTree) -> PyTree:
        return jax.tree.map(lambda leaf: jnp.repeat(leaf, n_branches, axis=0), tree)

    branches = group_returns(
        world,
        functools.partial(policy.act, policy_state),
        branch_key,
        repeated(states),
        policy.to_world(repeated(group.action)),
        horizon=config.horizon,
        gamma=config.gamma,
        n_uniforms=policy.distribution.n_uniforms,
        past_truncation=config.branch_past_truncation,
        value=functools.partial(policy.value, policy_state) if config.bootstrap else None,
        max_branches=config.max_branches,
        alive=repeated(group.valid),
    )
    returns = branches.returns.reshape(-1, n_branches, branches.returns.shape[1])
    return jnp.where(group.valid[:, None], returns, jnp.nan)


def _propose(
    state: TrainState,
    world: World,
    config: GRPOConfig,
    states: PyTree,
    observation: Observation,
    key: jax.Array,
) -> Group:
    """The candidates of N states, the first draw of the policy in the place of the executed action."""
    policy = state.policy
    own_key, group_key = split(key, 2)
    mask = jax.vmap(world.action_mask)(states)
    parameters = policy.parameters(state.learner.policy, observation, mask)
    uniforms = bits_to_uniform(draw_bits(own_key, (len(parameters), policy.distribution.n_uniforms)))
    own = policy.distribution.sample(parameters, uniforms)
    return propose(Plan.of(config), policy, parameters, own, mask, group_key)


def _advantages(config: GRPOConfig, group: Group, returns: jax.Array) -> jax.Array:
    weights, valid, executed = jnp.exp(group.log_weight), group.valid, group.executed
    # Unscaled: a picture has no batch to take a scale from.
    return group_advantages(
        returns,
        weights,
        valid,
        executed,
        baseline=config.baseline,
        scale="none",
        spread_floor=config.spread_floor,
    ).advantage


def _in_batch(tree: PyTree) -> PyTree:
    return jax.tree.map(lambda leaf: jnp.asarray(leaf)[None], tree)


def _vector(world: World, observation: Observation) -> jax.Array | None:
    """The numbers of an observation that is a vector; None of any other."""
    space = world.observation_space
    return observation if isinstance(space, spaces.Box) and len(space.shape) == 1 else None
