"""Train: a whole run in one program."""

from __future__ import annotations

import functools
from typing import NamedTuple

import jax

from grpo_jax.cache import LoopJit
from grpo_jax.config import GRPOConfig
from grpo_jax.noise import as_key
from grpo_jax.training.diagnose import SPREAD_ITERATIONS, warn_without_spread
from grpo_jax.training.faults import raise_faults
from grpo_jax.training.iterate import guarded_iteration
from grpo_jax.training.loop import TrainState, check_arguments, init, iterations_for
from grpo_jax.types import Metrics, is_traced
from grpo_jax.worlds.base import World


class Result(NamedTuple):
    """What ``train`` returns: the last state, and metrics with a leading axis ``[n_iterations]``."""

    state: TrainState
    metrics: Metrics


def train(
    config: GRPOConfig, env: World, key: jax.Array, total_timesteps: int, *, state: TrainState | None = None
) -> Result:
    """A whole training run as one pure function: jit it, vmap it over keys or config fields, shard it.

    Called outside of any transformation it is jitted, raises afterwards where anything became NaN or inf, and warns
    (``NoSpreadWarning``) if there was nothing to learn from the groups. Inside of one, groups and minibatches that are
    not finite are left out and counted, and a state that is not finite stays what it was before that iteration:
    ``nonfinite_groups``, ``nonfinite_updates``, ``nonfinite_state``. Statistics of episodes are NaN before the first one
    has finished (0 under ``jax_debug_nans``).

    Args:
      config: the settings; traced fields may be tracers or arrays.
      env: a world, as ``make`` returns it.
      key: PRNG key ``[]``; one key, one run, bit for bit.
      total_timesteps: decision steps, rounded up to whole iterations of n_envs * n_steps (steps behind the end of a
        trajectory group's episodes included).
      state: a state to go on from, for total_timesteps *more* steps and with its own key; None: a fresh one.

    Returns:
      The last state and the metrics of all iterations.

    Raises:
      TypeError: config is no ``GRPOConfig`` or env no ``World``, swapped ones included.
      ValueError: total_timesteps below 1, or a config that does not fit the env.
      NonFiniteError: something became NaN or inf; says when and where, and holds the last good state.
    """
    check_arguments(config, env)
    n_iterations = iterations_for(config, total_timesteps)
    # Jitted in transformations too: a vmap of what is not would compile each of its operations alone.
    traced = is_traced(config, env, key, state)
    result = _train_jitted(config, env, as_key(key), state, n_iterations, jax.debug_nans.value, not traced)
    if traced:
        return result
    last = n_iterations + (0 if state is None else int(state.iteration))
    raise_faults(config, env, result.state, result.metrics, last)
    first = {name: values[:SPREAD_ITERATIONS] for name, values in result.metrics.items()}
    warn_without_spread(config, first["frac_zero_std"], first["frac_below_floor"])
    return result


def _train(
    config: GRPOConfig, env: World, key: jax.Array, state: TrainState | None, n_iterations: int, strict: bool
) -> Result:
    state = init(config, env, key) if state is None else state
    last = state.iteration + n_iterations

    def body(state: TrainState, _: None) -> tuple[TrainState, Metrics]:
        return guarded_iteration(config, env, state, last, strict=strict)

    return Result(*jax.lax.scan(body, state, None, length=n_iterations))


@functools.partial(LoopJit, static_argnames=("n_iterations", "debug_nans", "strict"))
def _train_jitted(
    config: GRPOConfig,
    env: World,
    key: jax.Array,
    state: TrainState | None,
    n_iterations: int,
    debug_nans: bool,
    strict: bool,
) -> Result:
    del debug_nans  # is read while tracing (``unknown``), so each setting needs a program of its own
    return _train(config, env, key, state, n_iterations, strict)
