"""Between the spaces and arrays of ``grpo_jax`` and those of Gymnasium."""

from __future__ import annotations

from typing import Any

import gymnasium
import jax.numpy as jnp
import numpy as np

from grpo_jax import spaces
from grpo_jax.types import Observation


def to_gymnasium(space: spaces.Space) -> gymnasium.Space:
    """The Gymnasium space of a ``grpo_jax`` space; TypeError for anything else.

    Bounds at float32's largest value, gymnax's way to say "none", become infinite. That makes the spaces of the
    classic tasks equal to Gymnasium's, so that a model trained in one can be loaded with the other.
    """
    if isinstance(space, spaces.Discrete):
        return gymnasium.spaces.Discrete(space.n)
    if isinstance(space, spaces.MultiDiscrete):
        return gymnasium.spaces.MultiDiscrete(np.array(space.nvec))
    if isinstance(space, spaces.MultiBinary):
        return gymnasium.spaces.MultiBinary(space.n)
    if isinstance(space, spaces.Box):
        dtype, low, high = np.dtype(space.dtype), space.low, space.high
        if dtype.kind == "f":
            largest = np.finfo(np.float32).max
            low, high = np.where(low <= -largest, -np.inf, low), np.where(high >= largest, np.inf, high)
        return gymnasium.spaces.Box(low.astype(dtype), high.astype(dtype), space.shape, dtype.type)
    if isinstance(space, spaces.Dict):
        return gymnasium.spaces.Dict({name: to_gymnasium(part) for name, part in space.spaces})
    raise TypeError(
        f"space={space!r} must be one of grpo_jax.spaces: Box, Dict, Discrete, MultiBinary, MultiDiscrete"
    )


def to_numpy(space: gymnasium.Space, observation: Observation) -> Any:
    """Device observations ``[..., *space.shape]`` as fresh, writable NumPy arrays in the dtype of a Gymnasium space.

    A single ``Discrete`` observation is a ``np.int64``, as Gymnasium wants it.
    """
    if isinstance(space, gymnasium.spaces.Dict):
        return {name: to_numpy(part, observation[name]) for name, part in space.spaces.items()}
    array = np.array(observation, dtype=space.dtype)
    return array[()] if isinstance(space, gymnasium.spaces.Discrete) else array


def env_actions(space: gymnasium.Space, actions: np.ndarray) -> np.ndarray:
    """Actions in the dtype that environments are stepped with, within the bounds of a Box."""
    if isinstance(space, gymnasium.spaces.Box):
        actions = np.clip(actions, space.low, space.high)
    return actions.astype(space.dtype)


def to_world_actions(space: gymnasium.Space, action: Any, batch_shape: tuple[int, ...] = ()) -> np.ndarray:
    """Checks an action ``[*batch_shape, *space.shape]`` and casts it to int32, for ``Box`` to JAX's default float.

    ``batch_shape`` is ``(n_envs,)``, or ``()`` for one environment.

    Raises:
      ValueError: wrong shape, a category out of range, NaN or inf.
      TypeError: wrong kind of number.
    """
    array, expected = np.asarray(action), (*batch_shape, *(space.shape or ()))
    if array.shape != expected:
        what = f"{batch_shape[0]} environments with {space}" if batch_shape else space
        raise ValueError(f"action has shape {list(array.shape)}, expected {list(expected)} ({what})")
    if isinstance(space, gymnasium.spaces.Box):
        if array.dtype.kind not in "fiu":
            raise TypeError(f"action={action!r} has dtype {array.dtype}, expected floats for {space}")
        if not np.isfinite(array).all():
            raise ValueError(f"action={array} must be finite: the policy or a wrapper gave NaN or inf")
        return array.astype(jnp.result_type(float))
    # SB3's policies draw MultiBinary actions as whole floats.
    if array.dtype.kind not in "iubf" or not (array == np.floor(array)).all():
        raise TypeError(f"action={action!r} has dtype {array.dtype}, expected integers for {space}: cast it")
    n_values: Any = getattr(space, "nvec", space.n if isinstance(space, gymnasium.spaces.Discrete) else 2)
    if (array < 0).any() or (array >= n_values).any():
        raise ValueError(f"action={array} is out of range: {space} takes integers from 0 to {n_values - 1}")
    return array.astype(np.int32)
