"""The program of one update, and what the logger is told of it."""

from __future__ import annotations

import functools
from typing import Any

import jax
import numpy as np

from grpo_jax.config import GRPOConfig
from grpo_jax.groups.branch import Branches
from grpo_jax.learning.update import Learner
from grpo_jax.noise import bits_to_keys
from grpo_jax.policies.policy import Policy
from grpo_jax.training import loop
from grpo_jax.types import Group, Metrics, Trajectory
from grpo_jax.worlds.base import World
from sb3_bridge.rollout.device import train_state


@functools.partial(jax.jit, static_argnames="policy")
def improve(
    config: GRPOConfig,
    world: World | None,
    policy: Policy,
    learner: Learner,
    trajectory: Trajectory,
    words: jax.Array,
    iteration: int,
    branches: tuple[Group, Branches] | None,
) -> tuple[loop.TrainState, Metrics]:
    """Groups and update of a rollout, in one program.

    Args:
      config: the settings.
      world: to follow candidates in, where they were not followed yet.
      policy: static structure.
      learner: parameters, optimizer, reference.
      trajectory: ``[n_steps, n_envs]``; without states where the world gives those of the observations.
      words: of the iteration's PRNG key, uint32 ``[2]``.
      iteration: its number.
      branches: candidates and their returns, where they were followed already.

    Returns:
      The state afterwards (its key as words), and scalar metrics.
    """
    state = train_state(policy, learner, None, words, iteration)
    if world is not None and trajectory.state is None:
        environments = trajectory.environments.replace(state=world.at(trajectory.observation))
        trajectory = trajectory.replace(environments=environments)
    comparison = loop.compare(config, world, state, trajectory, evaluated=branches)
    state, metrics = loop.improve(config, state, comparison)
    return state.replace(key=jax.random.key_data(state.key)), metrics


@jax.jit
def next_key(words: jax.Array) -> jax.Array:
    """Words of the key that the next iteration takes, where this one's draws are used up."""
    return jax.random.key_data(loop.iteration_keys(bits_to_keys(words)).next)


def record(
    logger: Any, config: GRPOConfig, metrics: Metrics, policy: Any, world_metrics: Metrics | None
) -> None:
    """PPO's keys under ``train/``, ours under ``grpo/``.

    Args:
      logger: SB3's.
      config: of the iteration.
      metrics: of the update.
      policy: whose standard deviation is told, if it has one.
      world_metrics: of a learned world; None without one.
    """

    def tell(name: str, value: Any) -> None:
        logger.record(name, float(value))

    tell("train/entropy_loss", -metrics["entropy"])
    tell("train/policy_gradient_loss", metrics["policy_loss"])
    for name in ("approx_kl", "clip_fraction", "loss"):
        tell(f"train/{name}", metrics[name])
    if config.bootstrap:
        tell("train/value_loss", metrics["value_loss"])
        tell("train/explained_variance", metrics["explained_variance"])
    log_std = policy.state.params["actor"].get("log_std")
    if log_std is not None:
        tell("train/std", np.exp(np.asarray(log_std)).mean())
    tell("train/clip_range", config.clip_range)
    if config.clip_range_vf is not None:
        tell("train/clip_range_vf", config.clip_range_vf)
    for name in ("group_spread", "frac_zero_std", "grad_norm", "kl"):
        if name in metrics:
            tell(f"grpo/{name}", metrics[name])
    if world_metrics is not None:
        for name in ("error", "one_step_error", "h_step_error", "end_error", "disagreement"):
            if name in world_metrics:
                tell(f"grpo/world_{name}", world_metrics[name])
        tell("grpo/world_used", config.candidates != "episodes")
