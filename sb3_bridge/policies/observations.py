"""What a user passes as an observation, as the arrays that networks take."""

from __future__ import annotations

from typing import Any

import gymnasium
import numpy as np
from stable_baselines3.common.preprocessing import is_image_space, maybe_transpose
from stable_baselines3.common.utils import is_vectorized_observation

from grpo_jax.types import Observation
from sb3_bridge.policies.compiled import check_not_exported
from sb3_bridge.policies.parameters import to_arrays


def to_batch(observation: Any, space: gymnasium.Space) -> tuple[Observation, bool]:
    """Observations ``[N, *shape]`` as SB3 makes them, images with the channels first, and whether they had the axis N.

    Raises:
      ValueError: a wrong shape, or what Gymnasium's ``reset`` returned.
      RuntimeError: an empty batch.
      AssertionError, KeyError: a dict for another space, or an entry that the space does not have; as in SB3.
    """
    if isinstance(observation, tuple) and len(observation) == 2 and isinstance(observation[1], dict):
        raise ValueError(
            "You have passed a tuple to the predict() function instead of a Numpy array or a Dict: pass the observation"
            " alone. You are probably mixing Gym API with SB3 VecEnv API: `obs, info = env.reset()` (Gym) vs"
            " `obs = vec_env.reset()` (SB3 VecEnv), see"
            " https://stable-baselines3.readthedocs.io/en/master/guide/vec_envs.html#vecenv-api-vs-gym-api"
        )
    if isinstance(observation, dict):
        assert isinstance(space, gymnasium.spaces.Dict), (
            f"The observation provided is a dict but the obs space is {space}"
        )
        pairs = {name: _to_batch(value, space.spaces[name]) for name, value in observation.items()}
        return {name: batch for name, (batch, _) in pairs.items()}, any(
            is_many for _, is_many in pairs.values()
        )
    return _to_batch(observation, space)


def _to_batch(observation: Any, space: gymnasium.Space) -> tuple[np.ndarray, bool]:
    array = np.asarray(observation)
    if array.ndim >= 3 and is_image_space(space):
        array = maybe_transpose(array, space)
    is_vectorized = is_vectorized_observation(array, space)
    if array.size == 0:
        raise RuntimeError(f"the batch of observations is empty: its shape is {list(array.shape)}")
    return array.reshape((-1, *(space.shape or ()))), is_vectorized


def to_finite_arrays(observation: Any) -> Any:
    """Observations (torch, NumPy or JAX, dicts of them too) as arrays.

    Raises:
      ValueError: NaN or inf.
      RuntimeError: torch traces or exports.
    """
    check_not_exported()
    arrays = to_arrays(observation)
    for name, leaf in arrays.items() if isinstance(arrays, dict) else [("", arrays)]:
        array = np.asarray(leaf)
        if array.dtype.kind == "f" and not np.isfinite(array).all():
            place = np.argwhere(~np.isfinite(array))[0]
            raise ValueError(
                f"observation{f'[{name!r}]' if name else ''} must be finite: it is {array[tuple(place)]} at index"
                f" {place.tolist()}"
            )
    return arrays
