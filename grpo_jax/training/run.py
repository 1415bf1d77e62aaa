"""Run: training in chunks, with the host looking in between them."""

from __future__ import annotations

import functools
import time
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct

from grpo_jax import counter, shards
from grpo_jax.cache import compile_loop, compile_quickly
from grpo_jax.config import GRPOConfig
from grpo_jax.noise import as_key
from grpo_jax.training.agents import check_block, default_block, over_agents, stack_configs
from grpo_jax.training.diagnose import SPREAD_ITERATIONS, warn_without_spread
from grpo_jax.training.faults import raise_faults
from grpo_jax.training.iterate import guarded_iteration
from grpo_jax.training.loop import TrainState, check_arguments, in_parts, init, iterations_for
from grpo_jax.training.memory import bounded
from grpo_jax.training.self_play import against, check_opponent
from grpo_jax.worlds.base import World

CHUNK_SECONDS = 0.25
"""How often the host looks, about; a chunk is at least one iteration."""


MAX_CHUNK = 256
"""Iterations in the longest chunk. The trip count is dynamic and the buffers have this size: one program, and one entry
in a compilation cache, for runs and chunks of every length."""


class Chunk(NamedTuple):
    """What a callback sees.

    Attributes:
      state: the state after the chunk; leaves ``[n_seeds, ...]`` where there are several.
      metrics: NumPy arrays ``[n_iterations of the chunk]``, or ``[n_seeds, n_iterations]``.
      iteration: iterations done so far, of n_iterations.
      n_iterations: iterations of the whole run.
      decision_steps: so far, all seeds together.
      simulator_steps: so far, all seeds together.
      seconds: wall time since the first chunk was done being compiled.
      compile_seconds: wall time that compiling took.
    """

    state: TrainState
    metrics: dict[str, np.ndarray]
    iteration: int
    n_iterations: int
    decision_steps: int
    simulator_steps: int
    seconds: float
    compile_seconds: float


class _Table(struct.PyTreeNode):
    """Metrics of a chunk.

    Attributes:
      values: ``[MAX_CHUNK, n_metrics]``, or ``[n_seeds, MAX_CHUNK, n_metrics]``.
      names: of the columns.
    """

    values: jax.Array
    names: tuple[str, ...] = struct.field(pytree_node=False)

    def columns(self, length: int) -> dict[str, np.ndarray]:
        """The first ``length`` rows, on the host: ``[length]`` or ``[n_seeds, length]`` for each name."""
        rows = np.moveaxis(np.asarray(shards.gather(self.values))[..., :length, :], -1, 0)
        return dict(zip(self.names, np.ascontiguousarray(rows), strict=True))


Callback = Callable[[Chunk], bool | None]
"""Called between chunks; training stops where it returns False."""


def run(
    config: GRPOConfig,
    env: World,
    key: jax.Array,
    total_timesteps: int,
    *,
    callback: Callback | None = None,
    callback_every: int | None = None,
    callback_at: int | None = None,
    state: TrainState | None = None,
    n_seeds: int | None = None,
    block: int | None = None,
    quick_compile: bool = False,
    opponent_every: int | None = None,
    mesh: jax.sharding.Mesh | None = None,
    memory_limit: int | str | None = None,
) -> tuple[TrainState, dict[str, np.ndarray]]:
    """Trains like ``train``, number for number, but returns to the host a few times a second.

    Args:
      config: the settings.
      env: a world, as ``make`` returns it.
      key: PRNG key.
      total_timesteps: decision steps of the whole run (of each seed), those of ``state`` included.
      callback: called after each chunk, for progress, logging, checkpoints, early stop.
      callback_every: iterations in a chunk, at most ``MAX_CHUNK``; None: as many as take ``CHUNK_SECONDS``.
      callback_at: the callback also sees the state at each multiple of so many iterations; None: at none in particular.
      state: a state to go on from.
      n_seeds: trains this many seeds in one program, from keys split off ``key``; None: one run, from ``key`` itself.
      block: seeds that are computed side by side, the blocks one after the other; None: what suits the backend and the
        size of a run. Results do not depend on it but by rounding.
      quick_compile: on a CPU, halves the time to compile for loops that are a quarter slower and round differently: for
        runs of seconds. Without effect elsewhere, and where XLA does not know how (from jax 0.11 on).
      opponent_every: self-play: the opponent in ``env`` is the policy itself, as it was at the start and then at each
        multiple of so many iterations; a state to go on from is its own first opponent. None: ``env``'s own opponent.
      mesh: devices, as ``make_mesh`` gives them: the ``config.n_shards`` parts of the environments are spread over them, or,
        with one part each, the ``n_seeds``. Numbers do not depend on how many there are but by rounding. None: one device.
        Devices of several hosts (``jax.distributed``): each process calls this alike; where one's callback stops, all do.
      memory_limit: bytes of each device, or text such as ``"8GiB"``, that an estimate of what is needed (:func:`memory`) keeps
        to: by fewer branches and seeds side by side. Results do not depend on it but by rounding. None: no limit.

    Returns:
      The last state and the metrics of the iterations that ran, with ``n_seeds`` as leading axis if given.

    Raises:
      NonFiniteError: something became NaN or inf; says when and where, and holds the last good state.
      TypeError: config is no ``GRPOConfig`` or env no ``World``, swapped ones included.
      ValueError: a ``memory_limit`` that cannot be kept to; bad arguments, such as ``opponent_every`` in a world without an opponent or with several seeds.

    Warns:
      NoSpreadWarning: there was nothing to learn from the groups of the first iterations; says what to change.
    """
    check_arguments(config, env)
    n_iterations = iterations_for(config, total_timesteps)
    if n_seeds is not None and n_seeds < 1:
        raise ValueError(f"n_seeds={n_seeds} must be at least 1")
    check_block(block)
    if block is not None and n_seeds is None:
        raise ValueError(f"block={block} is a number of seeds side by side: give n_seeds, too")
    check_cadence(callback_every, callback_at)
    if opponent_every is not None:
        check_opponent(env)
        if opponent_every < 1 or n_seeds is not None:
            raise ValueError(
                f"opponent_every={opponent_every}, n_seeds={n_seeds}: at least 1 iteration, and one seed, which is its own"
                " opponent; run several one after the other"
            )
    if memory_limit is not None:
        n_agents = n_seeds or 1
        config, block = bounded(config, env, memory_limit, n_agents=n_agents, block=block, mesh=mesh)
    configs, keys = config, as_key(key)
    if n_seeds is not None:
        block = block or default_block(config, env, n_seeds, mesh)
        configs, keys = stack_configs([config] * n_seeds), jax.random.split(keys, n_seeds)
    return advance(
        configs,
        env,
        keys,
        n_iterations,
        block=None if n_seeds is None else block,
        state=state,
        callback=callback,
        callback_every=callback_every,
        callback_at=callback_at,
        quick_compile=quick_compile,
        opponent_every=opponent_every,
        mesh=mesh,
    )


def check_cadence(callback_every: int | None, callback_at: int | None) -> None:
    """Refuses what ``run`` cannot call back at."""
    if callback_every is not None and not 1 <= callback_every <= MAX_CHUNK:
        raise ValueError(f"callback_every={callback_every} must be None or from 1 to {MAX_CHUNK} iterations")
    if callback_at is not None and callback_at < 1:
        raise ValueError(f"callback_at={callback_at} must be None or at least 1 iteration")


def advance(
    config: GRPOConfig,
    env: World,
    keys: jax.Array,
    n_iterations: int,
    *,
    block: int | None,
    state: TrainState | None = None,
    freeze: bool = False,
    callback: Callback | None = None,
    callback_every: int | None = None,
    callback_at: int | None = None,
    quick_compile: bool = False,
    opponent_every: int | None = None,
    mesh: jax.sharding.Mesh | None = None,
) -> tuple[TrainState, dict[str, np.ndarray]]:
    """``run`` for agents whose settings differ: ``config`` and ``keys`` have an axis ``[A]`` with ``block``, none without.

    With ``freeze``, an agent whose numbers are not finite keeps its last good state, and the others go on, until none is
    left; its metrics are NaN behind the iteration that failed. Else ``NonFiniteError``, as from ``run``.
    """
    if mesh is not None:
        shards.check_mesh(mesh, config.n_shards, None if block is None else len(keys))
    # A chunk may write over the state before it where nobody else holds that: no caller, no callback, no opponent.
    is_free = state is None and callback is None and opponent_every is None
    program = _chunk_in_place if is_free else _chunk
    clock = time.perf_counter()
    if state is None:
        state = first_states(config, env, keys, block)
    if mesh is not None:
        state = shards.place(state, mesh, in_parts(state, config.n_shards, has_agents=block is not None))
        if block is not None:  # agents lie in parts, or their environments do, which the program sees to
            config = shards.place(config, mesh, config.n_shards == 1)
    if opponent_every is not None:
        env = against(env, state)
    done = int(np.max(np.asarray(shards.gather(state.iteration))))
    arguments = (config, env, state, np.int32(0), np.int32(n_iterations))
    lowered = program.lower(*arguments, block, jax.debug_nans.value, mesh)
    proceed = (compile_quickly if quick_compile else compile_loop)(lowered)
    jax.block_until_ready(state)
    compile_seconds = time.perf_counter() - clock
    history: list[dict[str, np.ndarray]] = []
    is_new = done == 0
    length, start = callback_every or 1, time.perf_counter()
    while done < n_iterations:
        length = min(length, MAX_CHUNK, n_iterations - done)
        if callback_at is not None:
            length = min(length, callback_at - done % callback_at)
        if opponent_every is not None:
            length = min(length, opponent_every - done % opponent_every)
        length = shards.agreed(length)  # which follows from a clock
        clock = time.perf_counter()
        state, table = proceed(config, env, state, np.int32(length), np.int32(n_iterations))
        metrics = table.columns(length)
        per_iteration = (time.perf_counter() - clock) / length
        if freeze:
            metrics, n_rows = _without_frozen(metrics, np.asarray(shards.gather(state.iteration)) - done)
            if not n_rows:
                break
        else:
            raise_faults(config, env, state, metrics, n_iterations)
            n_rows = length
        done += n_rows
        history.append(metrics)
        if opponent_every is not None and done % opponent_every == 0:
            env = against(env, state)
        if is_new and (done >= SPREAD_ITERATIONS or done == n_iterations):
            is_new = False
            first = _joined(history)
            warn_without_spread(
                config, *(_known(first[name]) for name in ("frac_zero_std", "frac_below_floor"))
            )
        is_stopped = False
        if callback is not None:
            chunk = Chunk(
                state=state,
                metrics=metrics,
                iteration=done,
                n_iterations=n_iterations,
                decision_steps=counter.to_int(shards.gather(state.decision_steps)),
                simulator_steps=counter.to_int(shards.gather(state.simulator_steps)),
                seconds=time.perf_counter() - start,
                compile_seconds=compile_seconds,
            )
            # `is not None`: np.bool_(False) stops, forgetting to return anything does not.
            answer = callback(chunk)
            is_stopped = answer is not None and not answer
        if shards.largest(is_stopped):
            break
        if n_rows < length:  # no agent is left
            break
        if callback_every is None:
            length = max(1, min(2 * length, round(CHUNK_SECONDS / max(per_iteration, 1e-9))))
    return state, _joined(history)


def first_state(config: GRPOConfig, env: World, key: jax.Array, *, n_seeds: int | None = None) -> TrainState:
    """The state that ``run`` begins with; arguments as there."""
    if n_seeds is None:
        return first_states(config, env, as_key(key), None)
    keys = jax.random.split(as_key(key), n_seeds)
    return first_states(stack_configs([config] * n_seeds), env, keys, default_block(config, env, n_seeds))


def first_states(config: GRPOConfig, env: World, keys: jax.Array, block: int | None) -> TrainState:
    """The states that ``advance`` begins with; arguments as there."""
    state: TrainState = compile_quickly(_init.lower(config, env, keys, block))(config, env, keys)
    return state


def _without_frozen(metrics: dict[str, np.ndarray], n_good: np.ndarray) -> tuple[dict[str, np.ndarray], int]:
    """Metrics that are NaN behind an agent's fault, and how many rows were reached by any agent.

    Args:
      metrics: ``[A, n]`` each.
      n_good: ``[A]`` iterations of these that each agent did; below 0 where it had failed before.
    """
    length = next(iter(metrics.values())).shape[-1]
    n_rows = max(0, int(n_good.max()))
    is_over = np.arange(length) > n_good[:, None]  # the row at n_good is the one that failed: it says how
    kept = ("decision_steps", "simulator_steps")
    masked = {
        name: (values if name in kept else np.where(is_over, np.nan, values))[:, :n_rows]
        for name, values in metrics.items()
    }
    return masked, n_rows


def _known(values: np.ndarray) -> np.ndarray:
    """What is no NaN of the first iterations."""
    first = values[..., :SPREAD_ITERATIONS]
    known = first[~np.isnan(first)]
    return known if known.size else np.zeros(1)


def _joined(history: list[dict[str, np.ndarray]]) -> dict[str, np.ndarray]:
    """Metrics of all chunks, one after the other."""
    names = history[0] if history else ()
    return {name: np.concatenate([part[name] for part in history], axis=-1) for name in names}


@functools.partial(jax.jit, static_argnames="block")
def _init(config: GRPOConfig, env: World, keys: jax.Array, block: int | None) -> TrainState:
    def one(agent: tuple[GRPOConfig, jax.Array]) -> TrainState:
        return init(agent[0], env, agent[1])

    agents = (config, keys)
    return one(agents) if block is None else over_agents(one, agents, block)


def _iterations(
    config: GRPOConfig,
    env: World,
    state: TrainState,
    length: jax.Array,
    n_iterations: jax.Array,
    block: int | None,
    debug_nans: bool,
    mesh: jax.sharding.Mesh | None,
) -> tuple[TrainState, _Table]:
    """``length`` iterations, at most ``MAX_CHUNK``; rows of the table are unspecified after ``length``."""
    del debug_nans  # is read while tracing ``iteration``, so each setting needs a program of its own

    def one(agent: tuple[GRPOConfig, TrainState]) -> tuple[TrainState, _Table]:
        config, state = agent
        # A jitted function of its own: one trace for the shapes and for the loop.
        advance = jax.jit(functools.partial(guarded_iteration, config, env, strict=True, mesh=mesh))
        names = sorted(jax.eval_shape(advance, state, n_iterations)[1])
        # One table instead of a buffer for each metric: a kernel to compile for each was a tenth of all.
        table = jnp.zeros((MAX_CHUNK, len(names)), jnp.result_type(float))

        def body(i: jax.Array, carry: tuple[TrainState, jax.Array]) -> tuple[TrainState, jax.Array]:
            state, table = carry
            state, metrics = advance(state, n_iterations)
            row = jnp.stack([metrics[name] for name in names]).astype(table.dtype)
            return state, jax.lax.dynamic_update_index_in_dim(table, row, i, axis=0)

        state, table = jax.lax.fori_loop(0, length, body, (state, table))
        return state, _Table(table, tuple(names))

    agents = (config, state)
    if block is None:
        return one(agents)
    if mesh is not None and config.n_shards == 1:
        return shards.over_devices(lambda agents: over_agents(one, agents, block), agents, mesh)
    return over_agents(one, agents, block)


_STATIC = ("block", "debug_nans", "mesh")
_chunk = jax.jit(_iterations, static_argnames=_STATIC)
_chunk_in_place = jax.jit(_iterations, static_argnames=_STATIC, donate_argnames="state")
