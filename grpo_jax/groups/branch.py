"""Branch: from every decision state, one rollout world for every candidate. The hot loop.

Monte-Carlo rollouts of a policy after a forced first action are Tesauro & Galperin's (NeurIPS 1996) and the *vine* of
TRPO (arXiv:1502.05477, section 5.2); common random numbers are PEGASUS' (UAI 2000). Actions that persist find rewards that
independent ones do not (temporally extended exploration, arXiv:2006.01782; action persistence, arXiv:2002.06836).
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable

import chex
import jax
import jax.numpy as jnp
from flax import struct
from jax.experimental.layout import Layout, with_layout_constraint

from grpo_jax import counter, shards
from grpo_jax.config import Backup
from grpo_jax.groups.branch_return import add_reward, back_up, ends, open_end
from grpo_jax.noise import KEY_WORDS, as_key, bits_to_keys, bits_to_uniform, draw_bits, split
from grpo_jax.policies.distributions import allowed, for_space
from grpo_jax.spaces import encoded_size
from grpo_jax.types import Counter, Observation, PyTree, backend, tree_bytes
from grpo_jax.worlds.base import World

Act = Callable[[Observation, jax.Array | None, jax.Array], jax.Array]
"""``(observations [..., *O], action_mask, uniforms [..., n_uniforms]) -> actions in the world's units [..., *A]``."""

Value = Callable[[Observation], jax.Array]
"""``observations [..., *O] -> values [...]``."""

# Measured on a CPU: from some hundreds of branches on a step costs the same, until they leave a core's cache. Large states
# leave it sooner: Craftax (26 kB) makes 11,900 steps/s with 17 branches side by side, 11,000 with 68 and 8,700 with 272.
CPU_BRANCHES, CPU_BYTES = 4096, 2 << 20
# Measured on an H100: CartPole makes 1.1e9 steps/s with 2^16 branches side by side, 1.7e9 with 2^18, 2.27e9 with 2^20 and
# 2.33e9 with 2^21; Breakout 0.25e9, 0.27e9, 0.30e9 and 0.31e9.
DEVICE_BRANCHES, DEVICE_BYTES = 1 << 20, 4 << 30
DEVICE_SHARE = 1 / 16
"""Most of a device's memory that states and observations of the branches of a chunk may take: a step holds two of them, and
what a network computes from them."""


class Branches(struct.PyTreeNode):
    """What the branches of all groups came to.

    Attributes:
      returns: ``[B, G]`` group returns.
      simulator_steps: world steps that were spent; those after an end are not counted.
    """

    returns: jax.Array
    simulator_steps: Counter


@dataclasses.dataclass(frozen=True)
class _Rules:
    """How branches are made; see :func:`group_returns`."""

    world: World
    act: Act
    horizon: int
    gamma: float | jax.Array
    n_uniforms: int
    n_rollouts: int
    backup: Backup
    persistence: float | jax.Array | None
    past_truncation: bool
    value: Value | None
    common_random_numbers: bool


class _Progress(struct.PyTreeNode):
    """How far all branches of a chunk have come; every leaf ``[G, M, C, ...]``.

    States come last: an innermost axis of many elements is what a CPU's vector units want.
    """

    state: PyTree
    action: jax.Array  # of the next step
    total: jax.Array  # discounted reward so far
    discount: jax.Array  # gamma ** steps, of the next reward
    alive: jax.Array
    cut: Observation  # of the last state that a branch reached; None without a critic
    open_end: jax.Array  # bool: worth something beyond the branch
    n_steps: Counter


def group_returns(
    world: World,
    act: Act,
    key: jax.Array,
    states: PyTree,
    actions: jax.Array,
    *,
    horizon: int,
    gamma: float | jax.Array,
    n_uniforms: int = 1,
    n_rollouts: int = 1,
    backup: Backup = "mean",
    persistence: float | jax.Array | None = None,
    past_truncation: bool = False,
    value: Value | None = None,
    common_random_numbers: bool = True,
    max_branches: int = 0,
    alive: jax.Array | None = None,
) -> Branches:
    """Returns of the candidates of each decision state.

    R_i = sum_k gamma^k r_k over at most ``horizon`` steps, stopped by termination or truncation, plus
    gamma^k V(s_k) where the branch was cut after k steps by the horizon or by truncation, if ``value`` is given.

    Args:
      world: what is stepped.
      act: the policy that branches follow after their candidate.
      key: PRNG key; every state draws from a key of its own, so chunking changes no number.
      states: world states, leaves ``[B, ...]``.
      actions: ``[B, G, *A]`` in the world's units.
      horizon: H >= 1, the candidate's own step included.
      gamma: discount factor.
      n_uniforms: uniform numbers that ``act`` takes.
      n_rollouts: M branches of each candidate.
      backup: ``"mean"`` or (optimistic) ``"max"`` over the M branches.
      persistence: probability of a step behind the candidate's own to repeat the action before it, whatever the
        policy would do, where the state that was reached allows it; None: 0.
      past_truncation: whether branches go on behind a truncation, as behind a mere time limit they can.
      value: the critic, or None.
      common_random_numbers: the candidates of a state share all random numbers; else each draws its own.
      max_branches: branches side by side, 0 for what suits the device; states are run in chunks of that size.
      alive: bool ``[B]`` or ``[B, G]``, states or candidates whose branches are wanted; None for all.

    Returns:
      ``Branches`` with returns ``[B, G]``; 0 where not ``alive``.

    Raises:
      ValueError: horizon or n_rollouts below 1.
    """
    if horizon < 1 or n_rollouts < 1:
        raise ValueError(f"horizon={horizon} and n_rollouts={n_rollouts} must be at least 1")
    n_states, n_group = actions.shape[:2]
    chex.assert_tree_shape_prefix(states, (n_states,))
    alive = jnp.ones(n_states, bool) if alive is None else alive
    alive = jnp.broadcast_to(alive.reshape(n_states, -1), (n_states, n_group))

    if max_branches == 0:
        state = jax.eval_shape(lambda tree: jax.tree.map(lambda leaf: leaf[0], tree), states)
        max_branches = max(1, default_branches(world, state) // shards.side_by_side())
    chunk = chunk_size(n_states, n_group * n_rollouts, max_branches)
    n_chunks = -(-n_states // chunk)
    keys = split(as_key(key), 2 * n_states).reshape(n_states, 2)  # for the world, for the policy
    rules = _Rules(
        world=world,
        act=act,
        horizon=horizon,
        gamma=gamma,
        n_uniforms=n_uniforms,
        n_rollouts=n_rollouts,
        backup=backup,
        persistence=persistence,
        past_truncation=past_truncation,
        value=value,
        common_random_numbers=common_random_numbers,
    )

    def run(rows: jax.Array) -> tuple[jax.Array, Counter]:
        # Behind the last state real ones come again: made-up ones could step into NaN. They are dead, so they count for
        # nothing.
        some_keys, start, first, wanted = jax.tree.map(
            lambda leaf: leaf[rows % n_states], (keys, states, actions, alive)
        )
        return _run_chunk(rules, some_keys, start, first, wanted & (rows < n_states)[:, None])

    if n_chunks == 1:
        of_all = _run_chunk(rules, keys, states, actions, alive)
        returns, n_steps = jax.tree.map(lambda leaf: leaf[None], of_all)
    else:
        # The rows, not what they hold, are cut into chunks: a padded copy of all states may be gigabytes.
        returns, n_steps = jax.lax.map(run, jnp.arange(n_chunks * chunk).reshape(n_chunks, chunk))
    returns = returns.reshape(n_chunks * chunk, n_group)[:n_states]
    steps, _ = jax.lax.scan(lambda total, n: (counter.merge(total, n), None), counter.zero(), n_steps)
    return Branches(returns, steps)


def default_branches(world: World, state: PyTree) -> int:
    """Branches side by side where nothing else was asked for, by the bytes of one state and its observation."""
    branches, total_bytes = CPU_BRANCHES, CPU_BYTES
    if backend() != "cpu":
        branches, total_bytes = DEVICE_BRANCHES, int(min(DEVICE_BYTES, DEVICE_SHARE * device_memory()))
    branch_bytes = max(1, tree_bytes(state) + 4 * encoded_size(world.observation_space))
    return max(1, min(branches, total_bytes // branch_bytes))


def device_memory() -> float:
    """Bytes that programs may take of this process' first device; inf where it does not say."""
    limit: float = (jax.local_devices()[0].memory_stats() or {}).get("bytes_limit", math.inf)
    return limit


def chunk_size(n_states: int, branches_per_state: int, max_branches: int) -> int:
    """States in a chunk: as many as ``max_branches`` allows, evenly spread over the chunks."""
    most = max(1, max_branches // branches_per_state)
    n_chunks = -(-n_states // most)
    return -(-n_states // n_chunks)


def _run_chunk(
    rules: _Rules, keys: jax.Array, states: PyTree, actions: jax.Array, wanted: jax.Array
) -> tuple[jax.Array, Counter]:
    """All branches of C states side by side; ``(returns [C, G], number of world steps)``."""
    n_group = actions.shape[1]
    # Two draws: XLA drops the first where the world ignores its key.
    key_words = _draw(rules, keys[:, 0], n_group, KEY_WORDS)
    n_drawn = rules.n_uniforms + (rules.persistence is not None)  # the last one: does the action persist?
    uniforms = bits_to_uniform(_draw(rules, keys[:, 1], n_group, n_drawn))

    def body(carry: tuple[jax.Array, _Progress]) -> tuple[jax.Array, _Progress]:
        k, progress = carry
        progress, observation = _advance(rules, progress, key_words[k])
        # The action after the last step is one too many. It is cheaper than a `cond`, which costs a third of the
        # loop's speed, or than a last step outside of the loop, for which the world would be compiled twice.
        return k + 1, progress.replace(action=_next_action(rules, progress, observation, uniforms[k]))

    def unfinished(carry: tuple[jax.Array, _Progress]) -> jax.Array:
        k, progress = carry
        return (k < rules.horizon) & any_of_all(progress.alive)

    progress = _start(rules, keys, states, actions, wanted)
    if rules.horizon > 1:
        _, progress = jax.lax.while_loop(unfinished, body, (jnp.int32(0), progress))
    else:
        progress, _ = _advance(rules, progress, key_words[0])
    total = progress.total
    if rules.value is not None:
        value = rules.value(_in_rows(progress.cut))
        total = add_reward(total, progress.discount, value, functools.partial(_where, progress.open_end))
    return back_up(total, rules.backup, axis=1).T, progress.n_steps


def _draw(rules: _Rules, keys: jax.Array, n_group: int, n_words: int) -> jax.Array:
    """uint32 ``[H, S, M, C, words]`` of S random streams: one for all candidates of a state, or one each."""
    n_streams = 1 if rules.common_random_numbers else n_group
    bits = draw_bits(keys, (n_streams, rules.n_rollouts, rules.horizon, n_words))
    return jnp.transpose(bits, (3, 1, 2, 0, 4))


def _start(
    rules: _Rules, keys: jax.Array, states: PyTree, actions: jax.Array, wanted: jax.Array
) -> _Progress:
    """All branches in their decision states, about to take their candidates."""
    shape = (actions.shape[1], rules.n_rollouts, actions.shape[0])
    dtype = jnp.result_type(float)
    cut = None
    if rules.value is not None:
        first = jax.tree.map(lambda leaf: leaf[0], (keys[:, 0], states, actions[:, 0]))
        seen = jax.eval_shape(rules.world.step, *first).observation  # not every world can be reset
        cut = jax.tree.map(lambda leaf: jnp.zeros((*shape, *leaf.shape), leaf.dtype), seen)
    return _Progress(
        state=jax.tree.map(lambda leaf: jnp.broadcast_to(leaf, (*shape, *leaf.shape[1:])), states),
        action=jnp.broadcast_to(jnp.swapaxes(actions, 0, 1)[:, None], (*shape, *actions.shape[2:])),
        total=jnp.zeros(shape, dtype),
        discount=jnp.ones(shape, dtype),
        alive=jnp.broadcast_to(wanted.T[:, None], shape),
        cut=cut,
        open_end=jnp.zeros(shape, bool),
        n_steps=counter.zero(),
    )


def _advance(rules: _Rules, progress: _Progress, key_words: jax.Array) -> tuple[_Progress, Observation]:
    """One step of all branches; also what was observed then."""
    step_group = jax.vmap(jax.vmap(rules.world.step))  # over M, C
    shared = rules.common_random_numbers
    step_all = jax.vmap(step_group, in_axes=(None if shared else 0, 0, 0))  # over G
    step_keys = bits_to_keys(key_words)
    step = step_all(step_keys[0] if shared else step_keys, progress.state, progress.action)
    if rules.horizon > 1:  # else no policy reads it, only the critic, in the end
        step = step.replace(observation=_in_rows(step.observation))
    alive, cut = progress.alive, progress.cut
    if rules.value is not None:
        cut = jax.tree.map(lambda old, new: jnp.where(_expand(alive, new), new, old), cut, step.observation)
    progress = progress.replace(
        state=step.state,
        # What a world pays or does after an end never counts, not even NaN.
        total=add_reward(progress.total, progress.discount, step.reward, functools.partial(_where, alive)),
        discount=jnp.where(alive, progress.discount * rules.gamma, progress.discount),
        cut=cut,
        open_end=jnp.where(alive, open_end(step.terminated), progress.open_end),
        alive=alive & ~ends(step.terminated, step.truncated, rules.past_truncation),
        n_steps=counter.add(progress.n_steps, jnp.sum(alive, dtype=jnp.int32)),
    )
    return progress, step.observation


def _next_action(
    rules: _Rules, progress: _Progress, observation: Observation, uniforms: jax.Array
) -> jax.Array:
    """What the policy does next in every branch, or the action before, where it persists; ``[G, M, C, *A]``."""
    uniforms = jnp.broadcast_to(uniforms, (*progress.alive.shape, uniforms.shape[-1]))
    mask = jax.vmap(jax.vmap(jax.vmap(rules.world.action_mask)))(progress.state)
    action = rules.act(observation, mask, uniforms[..., : rules.n_uniforms]).astype(progress.action.dtype)
    if rules.persistence is None:
        return action
    # What is forbidden now is not held: the policy is asked.
    can_persist = allowed(for_space(rules.world.action_space), mask, progress.action)
    persists = can_persist & (uniforms[..., rules.n_uniforms] < rules.persistence)
    return jnp.where(_expand(persists, action), progress.action, action)


def _in_rows(observation: Observation) -> Observation:
    """Observations ``[G, M, C, ...]`` as a network reads them: on a CPU, maps lie one after the other in memory.

    XLA would put the branches innermost, where the world writes them, and the first matrix product then takes two to three
    times as long.
    """
    if backend() != "cpu":
        return observation

    def in_rows(leaf: jax.Array) -> jax.Array:
        if leaf.ndim < 5:  # a vector, or less, lies well as it is
            return leaf
        return with_layout_constraint(leaf, Layout(major_to_minor=tuple(range(leaf.ndim))))

    return jax.tree.map(in_rows, observation)


def _where(counts: jax.Array, earned: jax.Array) -> jax.Array:
    return jnp.where(counts, earned, 0.0)


def _expand(mask: jax.Array, leaf: jax.Array) -> jax.Array:
    return mask.reshape(*mask.shape, *(1,) * (leaf.ndim - mask.ndim))


@jax.custom_batching.custom_vmap
def any_of_all(flags: jax.Array) -> jax.Array:
    """Whether any of the flags is set, in any of the runs that are vmapped: bool ``[...]`` -> ``[]``.

    One answer for all runs: a loop with a batched condition would copy its whole carry at every step.
    """
    return jnp.any(flags)


@any_of_all.def_vmap
def _any_of_batch(axis_size: int, in_batched: list[bool], flags: jax.Array) -> tuple[jax.Array, bool]:
    del axis_size, in_batched
    return any_of_all(flags), False
