"""The program of one update, and what the logger is told of it."""

from __future__ import annotations

import functools
from typing import Any

import jax
import numpy as np

from grpo_jax.cache import quick_jit
from grpo_jax.config import GRPOConfig
from grpo_jax.groups.branch import Branches
from grpo_jax.learning.update import Learner
from grpo_jax.noise import bits_to_keys
from grpo_jax.policies.policy import Policy
from grpo_jax.training import loop
from grpo_jax.types import Group, Metrics, Trajectory
from grpo_jax.worlds.base import World
from sb3_bridge.functions.programs import OwnedJit
from sb3_bridge.numbers import nan_parts
from sb3_bridge.rollout.device import train_state


def _follow(
    config: GRPOConfig,
    world: World,
    policy: Policy,
    learner: Learner,
    trajectory: Trajectory,
    words: jax.Array,
    iteration: int,
) -> tuple[Group, Branches]:
    """The candidates of a rollout, and what came of them in the ``world``.

    Without states in the trajectory ``[n_steps, n_envs]`` the world gives those of the observations. ``words`` uint32
    ``[2]`` are the iteration's key's.
    """
    state = train_state(policy, learner, None, words, iteration)
    if trajectory.state is None and trajectory.branched is None:
        environments = trajectory.environments.replace(state=world.at(trajectory.observation))
        trajectory = trajectory.replace(environments=environments)
    return loop.evaluate_candidates(config, world, state, trajectory)


follow = OwnedJit(_follow, jit=quick_jit, static_argnames="policy")
"""``follow.of(*owners)`` is the program that branches; its owners are the user's functions that are part of the world.

It is not one with the update: a function on the host keeps a program out of the compilation cache."""


@functools.partial(jax.jit, static_argnames="policy")
def improve(
    config: GRPOConfig,
    policy: Policy,
    learner: Learner,
    trajectory: Trajectory,
    words: jax.Array,
    iteration: int,
    branches: tuple[Group, Branches] | None,
) -> tuple[loop.TrainState, Metrics]:
    """Groups and update of a rollout: the state afterwards (its key as words), and scalar metrics."""
    state = train_state(policy, learner, None, words, iteration)
    comparison = loop.compare(config, None, state, trajectory, evaluated=branches)
    state, metrics = loop.improve(config, state, comparison)
    learner = state.learner
    metrics["nan_parts"] = nan_parts(learner.policy, learner.optimizer, learner.reference)
    return state.replace(key=jax.random.key_data(state.key)), metrics


@quick_jit
def next_key(words: jax.Array) -> jax.Array:
    """Words of the key that the next iteration takes, where this one's draws are used up."""
    return jax.random.key_data(loop.iteration_keys(bits_to_keys(words)).next)


def record(
    logger: Any, config: GRPOConfig, metrics: Metrics, policy: Any, world_metrics: Metrics | None
) -> None:
    """PPO's keys under ``train/``, ours under ``grpo/``: of an update, of the policy, of a learned world if there is one."""
    told: dict[str, Any] = {
        "train/entropy_loss": -metrics["entropy"],
        "train/policy_gradient_loss": metrics["policy_loss"],
    }
    told |= {"train/clip_range": config.clip_range}
    told |= {f"train/{name}": metrics[name] for name in ("approx_kl", "clip_fraction", "loss")}
    if config.bootstrap:
        told |= {f"train/{name}": metrics[name] for name in ("value_loss", "explained_variance")}
    if "log_std" in policy.state.params["actor"]:
        told["train/std"] = np.exp(np.asarray(policy.state.params["actor"]["log_std"])).mean()
    if config.clip_range_vf is not None:
        told["train/clip_range_vf"] = config.clip_range_vf
    names = ("group_spread", "frac_zero_std", "frac_below_floor", "grad_norm", "kl")
    told |= {f"grpo/{name}": metrics[name] for name in names if name in metrics}
    if world_metrics is not None:
        names = ("error", "one_step_error", "h_step_error", "end_error", "disagreement")
        told |= {f"grpo/world_{name}": world_metrics[name] for name in names if name in world_metrics}
        told["grpo/world_used"] = config.candidates != "episodes"
    for name, value in told.items():
        logger.record(name, float(value))
