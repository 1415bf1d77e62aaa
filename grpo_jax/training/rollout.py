"""Rollout: the policy acts in its environments, which start over by themselves."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import struct
from jax.extend.core import ClosedJaxpr, Jaxpr

from grpo_jax.groups.branch import any_of_all
from grpo_jax.noise import KEY_WORDS, bits_to_keys, bits_to_uniform, draw_bits
from grpo_jax.policies.distributions import allowed
from grpo_jax.policies.policy import Policy, PolicyState
from grpo_jax.types import Environments, Observation, PyTree, Step, Trajectory, backend, tree_bytes
from grpo_jax.worlds.base import World


class ResetLimits(NamedTuple):
    """How episodes start over on a kind of device.

    Attributes:
      bytes_at_once: first states that are made side by side.
      cheap: numbers that resets of all environments may compute; below it that is done at every step.
      share: of the environments, those that are reset at once, at least.
    """

    bytes_at_once: int
    cheap: int
    share: float


# A thousand first states of Craftax at once cost 57 times as much each as eight do. A loop over those that ended takes longer
# to compile and, in small worlds, as long to run as resets of all.
CPU_RESETS = ResetLimits(bytes_at_once=1 << 19, cheap=1 << 21, share=1 / 64)

# Rounds of a loop cost as much as there are kernels in them: with a CPU's limits 4,096 environments of Breakout took 70 ms to
# step 32 times on an H100.
DEVICE_RESETS = ResetLimits(bytes_at_once=1 << 30, cheap=1 << 27, share=1 / 8)


class _Previous(struct.PyTreeNode):
    """The actions before ``[N, *A]``, and whether they belong to the running rollout and episode; bool ``[N]``."""

    action: jax.Array
    can_persist: jax.Array


_Carry = tuple[Environments, _Previous | None]


def start(world: World, keys: jax.Array) -> Environments:
    """Resets one environment for each key ``[N]``; equal keys give equal states."""
    n_envs, dtype = keys.shape[0], jnp.result_type(float)
    most, _ = _size_up(world, keys)
    if n_envs <= most:
        observation, state = jax.vmap(world.reset)(keys)
    else:
        n_chunks = -(-n_envs // most)
        chunks = keys[jnp.arange(n_chunks * most) % n_envs].reshape(n_chunks, most)
        first = jax.lax.map(jax.vmap(world.reset), chunks)
        observation, state = jax.tree.map(
            lambda leaf: leaf.reshape(n_chunks * most, *leaf.shape[2:])[:n_envs], first
        )
    return Environments(
        state=state,
        observation=observation,
        episode_return=jnp.zeros(n_envs, dtype),
        episode_length=jnp.zeros(n_envs, jnp.int32),
        last_return=jnp.zeros(n_envs, dtype),
        last_length=jnp.zeros(n_envs, dtype),
    )


def step_environments(
    world: World,
    environments: Environments,
    actions: jax.Array,
    step_keys: jax.Array,
    reset_keys: jax.Array,
) -> tuple[Environments, Step]:
    """Steps all environments once; those whose episode ends start over and are counted.

    Args:
      world: what is stepped.
      environments: where they stand.
      actions: ``[N, *A]`` in the world's units.
      step_keys: ``[N]``.
      reset_keys: ``[N]``, used where an episode ends.

    Returns:
      The environments afterwards, and the step itself with what was reached before any reset.
    """
    step = jax.vmap(world.step)(step_keys, environments.state, actions)
    ended = step.terminated | step.truncated
    observation, state = _start_over(world, reset_keys, ended, (step.observation, step.state))
    task_reward = step.counted_reward
    episode_return = environments.episode_return + task_reward
    episode_length = environments.episode_length + 1
    environments = Environments(
        state=state,
        observation=observation,
        episode_return=jnp.where(ended, 0.0, episode_return),
        episode_length=jnp.where(ended, 0, episode_length),
        last_return=jnp.where(ended, episode_return, environments.last_return),
        last_length=jnp.where(ended, episode_length, environments.last_length),
    )
    return environments, step


def _start_over(
    world: World, keys: jax.Array, ended: jax.Array, reached: tuple[Observation, PyTree]
) -> tuple[Observation, PyTree]:
    """First observations and states, each drawn from its own key, where an episode ``ended [N]``; else what was reached.

    A reset may cost hundreds of steps, and few episodes end at once: only those are reset, some at a time, while there are
    any. The numbers are the same, and the first states no pool's: each is new.
    """
    n_envs = ended.shape[0]
    limits = reset_limits()
    most, n_numbers = _size_up(world, keys)
    if n_envs * n_numbers < limits.cheap:

        def start_over(fresh: jax.Array, reached: jax.Array) -> jax.Array:
            return jnp.where(ended.reshape(-1, *(1,) * (reached.ndim - 1)), fresh, reached)

        return jax.tree.map(start_over, jax.vmap(world.reset)(keys), reached)
    n_at_once = min(n_envs, most, max(4, int(n_envs * limits.share)))
    n_ended = jnp.cumsum(ended)

    def unfinished(carry: tuple[jax.Array, PyTree]) -> jax.Array:
        return any_of_all(carry[0] < n_ended[-1])

    def reset_some(carry: tuple[jax.Array, PyTree]) -> tuple[jax.Array, PyTree]:
        n_done, reached = carry
        rows = jnp.searchsorted(
            n_ended, n_done + 1 + jnp.arange(n_at_once)
        )  # N, which is no row, behind the last
        fresh = jax.vmap(world.reset)(keys[jnp.minimum(rows, n_envs - 1)])
        return n_done + n_at_once, jax.tree.map(
            lambda old, new: old.at[rows].set(new, mode="drop"), reached, fresh
        )

    return jax.lax.while_loop(unfinished, reset_some, (jnp.zeros_like(n_ended[-1]), reached))[1]


def reset_limits() -> ResetLimits:
    """Those of the default device."""
    return CPU_RESETS if backend() == "cpu" else DEVICE_RESETS


def _size_up(world: World, keys: jax.Array) -> tuple[int, int]:
    """How many resets side by side fit a cache, and how many numbers one computes."""
    program, first = jax.make_jaxpr(lambda keys: world.reset(keys[0]), return_shape=True)(keys)
    return max(1, reset_limits().bytes_at_once // max(1, tree_bytes(first))), _count_numbers(program.jaxpr)


def _count_numbers(program: Jaxpr) -> int:
    """Numbers that a program computes; a loop of unknown length counts as one round of it."""
    total = 0
    for equation in program.eqns:
        parts = jax.tree.leaves(list(equation.params.values()))
        inner = [part.jaxpr if isinstance(part, ClosedJaxpr) else part for part in parts]
        counts = [_count_numbers(part) for part in inner if isinstance(part, Jaxpr)]
        rounds = equation.params["length"] if equation.primitive.name == "scan" else 1
        own = sum(math.prod(getattr(out.aval, "shape", ())) for out in equation.outvars)
        total += rounds * sum(counts) if counts else own
    return total


def rollout(
    world: World,
    policy: Policy,
    policy_state: PolicyState,
    environments: Environments,
    key: jax.Array,
    n_steps: int,
    keep_next_observation: bool,
    persistence: float | jax.Array | None = None,
    keep: Callable[[jax.Array, PyTree], PyTree] | None = None,
) -> tuple[Environments, Trajectory]:
    """T steps of the sampled policy in every environment.

    Args:
      world: what is stepped.
      policy: static structure.
      policy_state: its parameters, the same for all steps.
      environments: where they stand.
      key: PRNG key.
      n_steps: T.
      keep_next_observation: whether a critic will want to value what was reached.
      persistence: probability of a step, but the first of a rollout and of an episode, to repeat the action before it,
        whatever the policy would do, where the present state allows it; None: 0.
      keep: ``(time [], world states [N, ...])`` before a step -> those that ``Trajectory.branched`` holds of that step;
        None: the trajectory holds all.

    Returns:
      The environments afterwards, and the trajectory ``[T, N]``.
    """
    n_envs, n_uniforms = environments.episode_length.shape[0], policy.distribution.n_uniforms
    n_drawn = n_uniforms + (persistence is not None)  # the last one decides whether the action persists
    words = draw_bits(key, (n_steps, n_envs, 2 * KEY_WORDS + n_drawn))

    def step_all(carry: _Carry, drawn: tuple[jax.Array, jax.Array]) -> tuple[_Carry, Trajectory]:
        (envs, previous), (time, words) = carry, drawn
        step_keys = bits_to_keys(words[..., :KEY_WORDS])
        reset_keys = bits_to_keys(words[..., KEY_WORDS : 2 * KEY_WORDS])
        uniforms = bits_to_uniform(words[..., 2 * KEY_WORDS :])
        mask = jax.vmap(world.action_mask)(envs.state)
        parameters = policy.parameters(policy_state, envs.observation, mask)
        action = policy.distribution.sample(parameters, uniforms[..., :n_uniforms])
        if previous is not None and persistence is not None:
            persists = previous.can_persist & (uniforms[..., n_uniforms] < persistence)
            persists &= allowed(policy.distribution, mask, previous.action)
            action = jnp.where(persists.reshape(-1, *(1,) * (action.ndim - 1)), previous.action, action)
        after, step = step_environments(world, envs, policy.to_world(action), step_keys, reset_keys)
        trajectory = Trajectory(
            environments=envs if keep is None else envs.replace(state=None),
            action_mask=mask,
            distribution=parameters,
            action=action,
            reward=step.reward,
            task_reward=step.task_reward,
            terminated=step.terminated,
            truncated=step.truncated,
            next_observation=step.observation if keep_next_observation else None,
            branched=None if keep is None else keep(time, envs.state),
        )
        if previous is not None:
            previous = _Previous(action, ~trajectory.ended)
        return (after, previous), trajectory

    previous = None
    if persistence is not None:
        actions = jax.eval_shape(
            lambda: policy.distribution.sample(
                policy.parameters(policy_state, environments.observation),
                jnp.zeros((n_envs, n_uniforms), jnp.result_type(float)),
            )
        )
        previous = _Previous(jnp.zeros(actions.shape, actions.dtype), jnp.zeros(n_envs, bool))
    drawn = jnp.arange(n_steps), words
    (environments, _), trajectory = jax.lax.scan(step_all, (environments, previous), drawn)
    return environments, trajectory
