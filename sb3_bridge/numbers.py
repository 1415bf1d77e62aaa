"""Numbers that nothing can be learned from: found before they become part of a model, and named where they came from."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from grpo_jax.training.diagnose import check_finite
from grpo_jax.types import Metrics, PyTree, Trajectory

LARGEST = 1e18
"""What is larger has a square that float32 does not hold: no network and no statistic goes on from it."""
KEPT = "The model keeps the parameters from before this iteration"


class BadNumberError(ValueError):
    """NaN, inf or something as large in what environments or a user's function gave."""


def bad_entry(array: np.ndarray) -> tuple[int, ...] | None:
    """The place of the first number that is NaN, inf, or larger than ``LARGEST``; None where there is none."""
    if array.dtype.kind != "f":
        return None
    flat = array.reshape(-1)
    if np.vdot(flat, flat) < LARGEST**2:  # the quick answer; False for NaN
        return None
    with np.errstate(invalid="ignore"):
        bad = np.argwhere(~(np.abs(array) < LARGEST))
    return tuple(int(i) for i in bad[0]) if len(bad) else None


def nan_parts(policy: PyTree, optimizer: PyTree, reference: PyTree) -> jax.Array:
    """Whether policy, optimizer and reference hold what they must not: bool ``[3]``. An optimizer may compare with infinity."""

    def any_of(bad: Any, tree: PyTree) -> jax.Array:
        leaves = [jnp.any(bad(x)) for x in jax.tree.leaves(tree) if jnp.issubdtype(x.dtype, jnp.inexact)]
        return jnp.any(jnp.stack(leaves)) if leaves else jnp.bool_(False)

    return jnp.stack(
        [
            any_of(lambda x: ~jnp.isfinite(x), policy),
            any_of(jnp.isnan, optimizer),
            any_of(jnp.isnan, reference),
        ]
    )


@contextlib.contextmanager
def of_iteration(number: int) -> Iterator[None]:
    """Inside it an error of numbers says in which iteration, from 1, it was, and what became of the model."""
    try:
        yield
    except (FloatingPointError, BadNumberError) as error:
        raise type(error)(f"iteration {number}: {error}. {KEPT}") from error


def check_rewards(trajectory: Trajectory) -> None:
    """Raises a FloatingPointError where a reward function returned what is no number, on a rollout of the host."""
    if isinstance(trajectory.reward, np.ndarray) and (found := bad_entry(trajectory.reward)):
        raise FloatingPointError(
            f"reward_function gave {trajectory.reward[found]} (NaN, inf, or beyond {LARGEST:g}) for environment {found[1]} at"
            f" step {found[0]}: check it for divisions by zero"
        )


def check_update(metrics: Metrics, trajectory: Trajectory, returns: Any) -> None:
    """Raises where an update was not of finite numbers, or would leave others in the model.

    Args:
      metrics: of the update, on the host, with ``nan_parts``.
      trajectory: ``[n_steps, n_envs]`` of the rollout, from which the place is found.
      returns: ``[n_steps * n_envs, G]`` of branches that were followed on the host, or None.

    Raises:
      FloatingPointError: names the stage, and the environment and step where they are known.
    """
    parts = [
        name
        for name, bad in zip(("policy", "optimizer", "reference"), metrics["nan_parts"], strict=True)
        if bad
    ]
    try:
        check_finite(metrics)
    except FloatingPointError as error:
        raise FloatingPointError(f"{_place(trajectory, returns)}{error}") from error
    if parts:
        raise FloatingPointError(
            f"{_place(trajectory, returns)}the update would leave NaN or inf in the {' and the '.join(parts)}: lower"
            " learning_rate or max_grad_norm"
        )


def _place(trajectory: Trajectory, returns: Any) -> str:
    """Where the first bad number is, for a message; empty where none is among what was kept."""
    stages = {
        "observation": trajectory.observation,
        "reward": trajectory.reward,
        "critic's value": trajectory.value,
        "next observation": trajectory.next_observation,
    }
    for stage, tree in stages.items():
        for leaf in jax.tree.leaves(jax.device_get(tree)):
            if found := bad_entry(np.asarray(leaf)):
                return f"{stage} of environment {found[1]} at step {found[0]} is no number: "
    if returns is not None and (found := bad_entry(np.asarray(returns))):
        step, index = divmod(found[0], trajectory.reward.shape[1])
        return f"branches of candidate {found[1]} of environment {index} from step {step} came to {returns[found]}: "
    return ""
