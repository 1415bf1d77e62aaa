"""Gymnasium's spaces and observations as the networks of ``grpo_jax`` see them."""

from __future__ import annotations

from typing import Any

import gymnasium
import numpy as np
from stable_baselines3.common.preprocessing import check_for_nested_spaces, is_image_space, maybe_transpose
from stable_baselines3.common.utils import is_vectorized_observation

from grpo_jax import spaces
from grpo_jax.types import Observation
from sb3_bridge.policies.compiled import check_not_exported
from sb3_bridge.policies.parameters import to_arrays


def to_observation_space(space: gymnasium.Space, normalize_images: bool = True) -> spaces.Space:
    """The space as the networks see it, with SB3's view of what an image is.

    Images (uint8 from 0 to 255 in three dimensions, where they are normalised) are divided by 255; the smallest of their
    dimensions is the channels', first or last. Errors are of SB3's types.
    """
    check_for_nested_spaces(space)
    if isinstance(space, gymnasium.spaces.Dict):
        parts = ((name, to_observation_space(part, normalize_images)) for name, part in space.spaces.items())
        return spaces.Dict(tuple(parts))
    assert 0 not in (space.shape or ()), f"observation_space={space} has an axis of length 0: drop it"
    if isinstance(space, gymnasium.spaces.Box):
        # Only uint8 is divided by 255 in grpo_jax, and here only images are.
        divided = normalize_images and is_image_space(space)
        channels_first = is_image(space, normalize_images) and int(np.argmin(space.shape)) == 0
        dtype = "uint8" if divided else "float32"
        return spaces.Box(space.low, space.high, space.shape, dtype, channels_first)
    if isinstance(space, gymnasium.spaces.MultiBinary) and len(space.shape) != 1:
        return spaces.Box(np.float32(0), np.float32(1), space.shape)  # type: ignore[arg-type]
    return spaces.from_gymnasium(space, "observation_space")


def to_action_space(space: gymnasium.Space) -> spaces.ActionSpace:
    """The space of a policy's actions; errors are of SB3's types."""
    if isinstance(space, gymnasium.spaces.MultiBinary):
        assert len(space.shape) == 1, f"action_space={space} must be one-dimensional: flatten it"
    assert 0 not in (space.shape or ()), f"action_space={space} has an axis of length 0: drop it"
    action_space = spaces.from_gymnasium(space, "action_space")
    if isinstance(action_space, spaces.Dict):
        raise NotImplementedError(f"action_space={space}: use Box, Discrete, MultiDiscrete or MultiBinary")
    return action_space


def is_image(space: gymnasium.Space, normalize_images: bool) -> bool:
    """Whether SB3 takes a space for an image; without normalising, every Box of three dimensions is one."""
    return is_image_space(space, normalized_image=not normalize_images)


def stretch_of(space: spaces.ActionSpace) -> tuple[np.ndarray, np.ndarray]:
    """Where 0 and 1 of a policy's own units lie in the environment's: ``[*A]`` middle and half width, float32.

    A Gaussian acts on [-1, 1], stretched to the bounds of a Box; where a bound is missing, nothing is stretched.
    """
    if not isinstance(space, spaces.Box) or not space.is_bounded:
        return np.zeros(space.shape, np.float32), np.ones(space.shape, np.float32)
    half = (space.high - space.low) / 2
    return (space.high + space.low) / 2, np.where(half > 0, half, np.float32(1))


def to_batch(observation: Any, space: gymnasium.Space) -> tuple[Observation, bool]:
    """Observations ``[N, *shape]`` as SB3 makes them, images with the channels first, and whether they had the axis N."""
    if isinstance(observation, tuple) and len(observation) == 2 and isinstance(observation[1], dict):
        raise ValueError(
            "You have passed a tuple to the predict() function as env.reset() of Gymnasium returns it (and a VecEnv does"
            " not): pass the observation alone, `obs, info = env.reset()`"
        )
    if isinstance(observation, dict):
        assert isinstance(space, gymnasium.spaces.Dict), (
            f"The observation provided is a dict but the obs space is {space}"
        )
        pairs = {name: to_batch(value, space.spaces[name]) for name, value in observation.items()}
        return {name: batch for name, (batch, _) in pairs.items()}, any(many for _, many in pairs.values())
    array = np.asarray(observation)
    if array.ndim >= 3 and is_image_space(space):
        array = maybe_transpose(array, space)
    is_vectorized = is_vectorized_observation(array, space)
    if array.size == 0:
        raise RuntimeError(f"the batch of observations is empty: its shape is {list(array.shape)}")
    return array.reshape((-1, *(space.shape or ()))), is_vectorized


def to_finite_arrays(observation: Any) -> Any:
    """Observations (torch, NumPy or JAX, dicts of them too) as arrays, without NaN and inf."""
    check_not_exported()
    arrays = to_arrays(observation)
    for name, leaf in arrays.items() if isinstance(arrays, dict) else [("", arrays)]:
        array = np.asarray(leaf)
        if array.dtype.kind == "f" and not np.isfinite(array).all():
            place = np.argwhere(~np.isfinite(array))[0]
            value = f"{array[tuple(place)]} at index {place.tolist()}"
            raise ValueError(f"observation{f'[{name!r}]' if name else ''} must be finite: it is {value}")
    return arrays
