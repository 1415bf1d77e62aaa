"""Sweep: many settings, each with many seeds, in one program; and which of them did best."""

from __future__ import annotations

import difflib
import itertools
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import chex
import jax
import numpy as np

from grpo_jax import shards
from grpo_jax.config import GRPOConfig, field_names
from grpo_jax.noise import as_key
from grpo_jax.training.agents import check_block, default_block, stack_configs
from grpo_jax.training.loop import TrainState, check_arguments, init, iterations_for
from grpo_jax.training.memory import bounded
from grpo_jax.training.run import Callback, Chunk, advance, check_cadence, first_states
from grpo_jax.worlds.base import World

Setting = dict[str, Any]
"""The swept fields of one config, and their values."""

LAST_SHARE = 0.1
"""Share of a run's iterations, the last ones, whose returns are its final return."""


class Part(NamedTuple):
    """What one program of a sweep came to, A agents: each of its settings with each seed, settings first.

    Attributes:
      indices: of its settings, among all.
      state: leaves ``[A, ...]``.
      metrics: ``[A, n_iterations]`` each.
      last: the iteration that all agents would have reached without a fault.
    """

    indices: Sequence[int]
    state: TrainState
    metrics: Mapping[str, np.ndarray]
    last: int


class Sweep(NamedTuple):
    """What ``sweep`` returns, for P settings and S seeds.

    Attributes:
      settings: P, the swept fields of each.
      configs: P, whole.
      states: P, leaves ``[S, ...]``; None where a callback stopped the sweep before.
      metrics: ``[P, S, n_iterations]`` each; NaN behind an agent's fault, and where a program has fewer iterations.
      failed_at: int ``[P, S]``: the iteration in which an agent's numbers became NaN or inf; 0: none. Its state is the one
        before.
      final_returns: ``[P, S]``: mean ``episode_return`` of the last tenth of the iterations; NaN for agents that failed, or
        whose first episode has not ended.
      scores: ``[P]``: interquartile mean of ``final_returns`` over the seeds, NaN counted as minus infinity: the worst.
    """

    settings: tuple[Setting, ...]
    configs: tuple[GRPOConfig, ...]
    states: tuple[TrainState | None, ...]
    metrics: dict[str, np.ndarray]
    failed_at: np.ndarray
    final_returns: np.ndarray
    scores: np.ndarray

    @property
    def best(self) -> int | None:
        """Index of the setting with the best score; None where none has one."""
        best = int(np.argmax(self.scores))
        return best if np.isfinite(self.scores[best]) else None

    def rows(self) -> list[dict[str, Any]]:
        """A table: for each setting its fields, its score, median, smallest and largest final return, seeds that failed."""
        rows = []
        for p, setting in enumerate(self.settings):
            known = self.final_returns[p][~np.isnan(self.final_returns[p])]
            spread = [float(f(known)) if known.size else np.nan for f in (np.median, np.min, np.max)]
            numbers = dict(zip(("median", "min", "max"), spread, strict=True))
            failed = int(np.sum(self.failed_at[p] > 0))
            rows.append({**setting, "score": float(self.scores[p]), **numbers, "failed": failed})
        return rows


def sweep(
    config: GRPOConfig,
    env: World,
    key: jax.Array,
    total_timesteps: int,
    *,
    n_seeds: int | None = None,
    zipped: bool = False,
    callback: Callback | None = None,
    callback_every: int | None = None,
    callback_at: int | None = None,
    state: TrainState | None = None,
    block: int | None = None,
    quick_compile: bool = False,
    mesh: jax.sharding.Mesh | None = None,
    memory_limit: int | str | None = None,
    **fields: Iterable[Any],
) -> Sweep:
    """Trains every setting with every seed: ``sweep(config, env, key, steps, n_seeds=8, learning_rate=[1e-3, 3e-3])``.

    Settings that differ in traced fields only (real numbers) are one program, compiled once. Fields that shape a program, such
    as ``horizon``, are swept too: a program for each of their values, one after the other. Seed s of every setting has the
    same key, that of seed s of ``run(config, env, key, ..., n_seeds)``, and trains like it.

    An agent (one setting, one seed) whose numbers become NaN or inf keeps its last good state, and the others go on.

    Args:
      config: the settings that are not swept.
      env: a world, as ``make`` returns it.
      key: PRNG key.
      total_timesteps: decision steps of each agent.
      n_seeds: seeds of each setting, from keys split off ``key``; None: one, from ``key`` itself.
      zipped: whether the fields' values belong together, one setting for each position; False: every combination.
      callback: called after each chunk with what its program did, as by ``run``: metrics ``[P, S, n]`` of the program's
        settings, state ``[P * S, ...]``. The sweep stops where it returns False.
      callback_every: as in ``run``.
      callback_at: as in ``run``.
      state: a callback's state to go on from, where all settings are one program.
      block: agents side by side, as in ``run``.
      quick_compile: as in ``run``.
      mesh: as in ``run``; the devices share the agents of a program.
      memory_limit: as in ``run``.
      **fields: values of each swept field.

    Returns:
      A ``Sweep``.

    Raises:
      TypeError: config is no ``GRPOConfig`` or env no ``World``; an unknown field; a schedule; values that are no list.
      ValueError: a value that cannot be, named before anything is compiled; bad arguments.

    Warns:
      NoSpreadWarning: as in ``run``, over all agents of a program.
    """
    check_arguments(config, env)
    check_block(block)
    check_cadence(callback_every, callback_at)
    if n_seeds is not None and n_seeds < 1:
        raise ValueError(f"n_seeds={n_seeds} must be at least 1")
    settings = expand(config, fields, zipped=zipped)
    configs = [config.replace(**setting) for setting in settings]
    programs = programs_of(configs)
    if state is not None and len(programs) > 1:
        raise ValueError(
            f"state cannot be gone on from: these settings are {len(programs)} programs, with a state of their own each;"
            " sweep one value of each static field at a time, or use `grpo-jax train --sweep`, which resumes"
        )
    for indices in programs:
        check_program(configs[indices[0]], env, total_timesteps)
    parts, is_stopped = [], False

    def seen(chunk: Chunk) -> bool | None:
        nonlocal is_stopped
        assert callback is not None
        shape = (-1, n_seeds or 1, chunk.metrics["decision_steps"].shape[-1])
        metrics = {name: values.reshape(shape) for name, values in chunk.metrics.items()}
        answer = callback(chunk._replace(metrics=metrics))
        is_stopped = answer is not None and not answer
        return answer

    for indices in programs:
        last, metrics = run_settings(
            [configs[p] for p in indices],
            env,
            key,
            total_timesteps,
            n_seeds=n_seeds,
            block=block,
            state=state,
            callback=None if callback is None else seen,
            callback_every=callback_every,
            callback_at=callback_at,
            quick_compile=quick_compile,
            mesh=mesh,
            memory_limit=memory_limit,
        )
        last = shards.gather(last)
        reached = int(np.max(np.asarray(last.iteration)))
        n_iterations = iterations_for(configs[indices[0]], total_timesteps)
        parts.append(Part(indices, last, metrics, reached if is_stopped else n_iterations))
        if is_stopped:
            break
    return join(settings, configs, n_seeds or 1, parts)


def expand(config: GRPOConfig, fields: Mapping[str, Iterable[Any]], *, zipped: bool) -> list[Setting]:
    """The settings of a sweep, validated: all combinations of the fields' values, the last field's fastest, or zipped.

    Raises:
      TypeError: an unknown field, a schedule, or values that are no list.
      ValueError: no field, no value, zipped values of different number, or a value that cannot be.
    """
    if not fields:
        raise ValueError(
            "a sweep needs fields, such as learning_rate=[1e-3, 3e-3]; for seeds alone: run(..., n_seeds=8)"
        )
    values = {name: _values(name, given) for name, given in fields.items()}
    lengths = {name: len(known) for name, known in values.items()}
    if zipped and len(set(lengths.values())) > 1:
        told = ", ".join(f"{length} of {name}" for name, length in lengths.items())
        raise ValueError(f"zipped=True needs as many values of each field: there are {told}")
    together = zip(*values.values(), strict=True) if zipped else itertools.product(*values.values())
    settings = [dict(zip(values, chosen, strict=True)) for chosen in together]
    # As the config holds them: 1 as 1.0, lists as tuples.
    return [{name: getattr(config.replace(**setting), name) for name in setting} for setting in settings]


def programs_of(configs: Sequence[GRPOConfig]) -> list[list[int]]:
    """Indices of the configs that share a program: those of one structure, which static fields and None are part of."""
    programs: dict[Any, list[int]] = {}
    for index, config in enumerate(configs):
        programs.setdefault(jax.tree.structure(config), []).append(index)
    return list(programs.values())


def check_program(config: GRPOConfig, env: World, total_timesteps: int) -> None:
    """Raises where a program cannot be, before anything is compiled."""
    iterations_for(config, total_timesteps)
    jax.eval_shape(lambda key: init(config, env, key), jax.eval_shape(lambda: jax.random.key(0)))


def run_settings(
    configs: Sequence[GRPOConfig],
    env: World,
    key: jax.Array,
    total_timesteps: int,
    *,
    n_seeds: int | None,
    block: int | None = None,
    mesh: jax.sharding.Mesh | None = None,
    memory_limit: int | str | None = None,
    **options: Any,
) -> tuple[TrainState, dict[str, np.ndarray]]:
    """Trains configs of one structure, each with every seed; ``options``: those of ``run``.

    Returns:
      The last states and the metrics, with an axis of agents: all seeds of the first config, then those of the next one.
    """
    if memory_limit is not None:
        n_agents = len(configs) * (n_seeds or 1)
        first, block = bounded(configs[0], env, memory_limit, n_agents=n_agents, block=block, mesh=mesh)
        configs = [config.replace(max_branches=first.max_branches) for config in configs]
    agents, keys = _agents(configs, key, n_seeds)
    block = block or default_block(configs[0], env, len(keys), mesh)
    n_iterations = iterations_for(configs[0], total_timesteps)
    return advance(agents, env, keys, n_iterations, block=block, freeze=True, mesh=mesh, **options)


def first_settings(
    configs: Sequence[GRPOConfig], env: World, key: jax.Array, n_seeds: int | None
) -> TrainState:
    """The states that ``run_settings`` begins with."""
    agents, keys = _agents(configs, key, n_seeds)
    return first_states(agents, env, keys, default_block(configs[0], env, len(keys)))


def join(
    settings: Sequence[Setting], configs: Sequence[GRPOConfig], n_seeds: int, parts: Sequence[Part]
) -> Sweep:
    """What the programs of a sweep came to, as one ``Sweep``."""
    n_settings = len(settings)
    n_rows = max((values.shape[-1] for part in parts for values in part.metrics.values()), default=0)
    metrics: dict[str, np.ndarray] = {}
    states: list[TrainState | None] = [None] * n_settings
    failed_at = np.zeros((n_settings, n_seeds), int)
    final_returns = np.full((n_settings, n_seeds), np.nan)
    for indices, state, of_part, last in parts:
        shape = (len(indices), n_seeds)
        chex.assert_shape(state.iteration, (len(indices) * n_seeds,))
        for name, values in of_part.items():
            empty = np.full((n_settings, n_seeds, n_rows), np.nan, values.dtype)
            metrics.setdefault(name, empty)[indices, :, : values.shape[-1]] = values.reshape(*shape, -1)
        iteration = np.asarray(state.iteration).reshape(shape)
        failed_at[indices] = np.where(iteration < last, iteration + 1, 0)
        if "episode_return" in of_part:
            final = final_return(of_part["episode_return"]).reshape(shape)
            final_returns[indices] = np.where(iteration < last, np.nan, final)
        for row, index in enumerate(indices):
            seeds = slice(row * n_seeds, (row + 1) * n_seeds)
            states[index] = jax.tree.map(lambda leaf, seeds=seeds: leaf[seeds], state)
    return Sweep(
        settings=tuple(settings),
        configs=tuple(configs),
        states=tuple(states),
        metrics=metrics,
        failed_at=failed_at,
        final_returns=final_returns,
        scores=interquartile_mean(final_returns),
    )


def interquartile_mean(final_returns: np.ndarray) -> np.ndarray:
    """Mean of the middle half of ``[P, S]`` (arXiv:2108.13264), a quarter left out at each end, rounded down; NaN is the worst."""
    ordered = np.sort(np.where(np.isnan(final_returns), -np.inf, final_returns), axis=1)
    n_seeds = ordered.shape[1]
    mean: np.ndarray = ordered[:, n_seeds // 4 : n_seeds - n_seeds // 4].mean(axis=1)
    return mean


def _agents(
    configs: Sequence[GRPOConfig], key: jax.Array, n_seeds: int | None
) -> tuple[GRPOConfig, jax.Array]:
    """The configs and the keys of all agents, ``[P * S]``."""
    keys = as_key(key)[None] if n_seeds is None else jax.random.split(as_key(key), n_seeds)
    agents = stack_configs([config for config in configs for _ in range(len(keys))])
    return agents, keys[np.tile(np.arange(len(keys)), len(configs))]


def _values(name: str, given: Any) -> list[Any]:
    """The values of a field, as a list."""
    if name not in field_names():
        near = difflib.get_close_matches(name, field_names(), n=1) or [", ".join(field_names(traced=True))]
        raise TypeError(
            f"{name!r} is no field of GRPOConfig that a sweep could vary; did you mean {near[0]}?"
        )
    if isinstance(given, (str, bytes, Mapping)) or not isinstance(given, Iterable):
        raise TypeError(
            f"{name}={given!r} must be a list of values; for one value use config.replace({name}=...)"
        )
    values = np.asarray(given).tolist() if isinstance(given, (np.ndarray, jax.Array)) else list(given)
    if not values:
        raise ValueError(f"{name}={given!r} has no value to try")
    for value in values:
        if callable(value) and name != "optimizer":
            raise TypeError(
                f"{name}={value!r} is a schedule, which cannot be swept: it is part of the program, not a number that flows"
                f" through it. Sweep numbers, with {name}_decay, or run schedules one after the other"
            )
    return values


def final_return(returns: np.ndarray) -> np.ndarray:
    """``[A]`` mean over the last iterations of ``[A, n]``, of what is known; NaN where nothing is."""
    last = returns[:, -max(1, round(LAST_SHARE * returns.shape[1])) :]
    known = ~np.isnan(last)
    total = np.sum(np.where(known, last, 0.0), axis=1)
    return np.where(known.any(axis=1), total / np.maximum(known.sum(axis=1), 1), np.nan)
