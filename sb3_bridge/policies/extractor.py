"""What ``features_extractor_class`` and ``features_extractor_kwargs`` say about the features."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

import flax.linen as nn
import gymnasium
import torch
from stable_baselines3.common.torch_layers import CombinedExtractor, FlattenExtractor, NatureCNN

from grpo_jax import spaces
from grpo_jax.policies.networks import CNN, Combined, Flatten
from sb3_bridge.policies.layers import to_activation
from sb3_bridge.policies.spaces import is_image, to_observation_space

Kind = Literal["mlp", "cnn", "multi_input"]
POLICIES: dict[Kind, str] = {"mlp": "MlpPolicy", "cnn": "CnnPolicy", "multi_input": "MultiInputPolicy"}

_SB3_EXTRACTORS = {FlattenExtractor: "flatten", NatureCNN: "cnn", CombinedExtractor: "combined"}
_OWN_EXTRACTORS = {Flatten: "flatten", CNN: "cnn", Combined: "combined"}
_DEFAULTS: dict[Kind, str] = {"mlp": "flatten", "cnn": "cnn", "multi_input": "combined"}


def to_features_extractor(
    kind: Kind,
    space: gymnasium.Space,
    features_extractor_class: Any = None,
    features_extractor_kwargs: Mapping[str, Any] | None = None,
    normalize_images: bool = True,
) -> nn.Module:
    """The flax module that turns observations into features.

    A module of the user's sees observations as ``[B, *shape]``: one-hot where they are categories, images with the
    channels last and divided by 255; a dict of such arrays for a ``Dict`` space. It gives ``[B, F]``.

    Args:
      kind: which of the three policies asks.
      space: the observation space.
      features_extractor_class: a flax module class; SB3's own three mean ours; None: what the policy stands for.
      features_extractor_kwargs: its arguments: ``features_dim`` for convolutions (where our own CNN is named also
        ``activation``, and feature maps of any number of channels do), ``cnn_output_dim`` for the combined one, as in SB3.
      normalize_images: whether images are divided by 255; False also lets images of other dtypes be images.

    Raises:
      ValueError: another policy fits the space.
      AssertionError: convolutions on what is no image, as in SB3.
      TypeError: not a flax module class, or arguments that it does not take.
    """
    is_dict = isinstance(space, gymnasium.spaces.Dict)
    if is_dict and kind != "multi_input":
        raise ValueError(f"{POLICIES[kind]} is not for Dict observations: use MultiInputPolicy for {space}")
    if not is_dict and kind == "multi_input":
        fitting = "CnnPolicy" if is_image(space, normalize_images) else "MlpPolicy"
        raise ValueError(f"MultiInputPolicy is for Dict observations: use {fitting} for {space}")
    given = features_extractor_class
    own = _DEFAULTS[kind] if given is None else _lookup(given)
    if own is None:
        return _user_extractor(given, features_extractor_kwargs)
    arguments = dict(features_extractor_kwargs or {})
    arguments.pop("normalized_image", None)  # what normalize_images=False tells us
    # Who names our CNN says that the maps are for it, also those that are no image to SB3.
    by_name = given is CNN
    of_cnn = ("features_dim", "activation") if by_name else ("features_dim",)
    options = {"flatten": (), "cnn": of_cnn, "combined": ("cnn_output_dim",)}[own]
    unknown = sorted(set(arguments) - set(options))
    if unknown:
        takes = ", ".join(options) or "no arguments"
        raise TypeError(
            f"features_extractor_kwargs={arguments!r}: {', '.join(unknown)} is not known; the {own} extractor takes"
            f" {takes}"
        )
    encoded = to_observation_space(space, normalize_images)
    if own == "cnn":
        if is_dict or not spaces.is_image(encoded) or not (by_name or is_image(space, normalize_images)):
            raise AssertionError(_no_image(space))
        return CNN(to_activation(arguments.get("activation", "relu")), arguments.get("features_dim"))
    if own == "flatten":
        if is_dict:
            raise ValueError(
                f"a Flatten extractor joins no Dict: leave features_extractor_class out for {space}"
            )
        return Flatten(spaces.encoded_rank(encoded))
    if not isinstance(encoded, spaces.Dict):
        raise ValueError(f"a Combined extractor is for Dict observations, not for {space}")
    images = tuple(
        name
        for name, part in encoded.spaces
        if is_image(space[name], normalize_images) and spaces.is_image(part)  # type: ignore[index]
    )
    ranks = tuple((name, spaces.encoded_rank(part)) for name, part in encoded.spaces)
    return Combined(ranks, images, "relu", arguments.get("cnn_output_dim", 256))


def _lookup(extractor: Any) -> str | None:
    return {**_SB3_EXTRACTORS, **_OWN_EXTRACTORS}.get(extractor) if isinstance(extractor, type) else None


def _user_extractor(extractor: Any, arguments: Mapping[str, Any] | None) -> nn.Module:
    if not (isinstance(extractor, type) and issubclass(extractor, nn.Module)):
        is_torch = isinstance(extractor, type) and issubclass(extractor, torch.nn.Module)
        why = "torch cannot run in JAX: write it" if is_torch else "it must be"
        raise TypeError(
            f"features_extractor_class={extractor!r}: {why} as a class derived from flax.linen.Module, from"
            " observations [B, *shape] (images with the channels last) to features [B, F]; its arguments go into"
            " features_extractor_kwargs"
        )
    return extractor(**dict(arguments or {}))


def _no_image(space: gymnasium.Space) -> str:
    text = f"CnnPolicy is for images (Box, uint8, from 0 to 255, 3x3 pixels or more), not for {space}: use MlpPolicy"
    if isinstance(space, gymnasium.spaces.Box) and len(space.shape) == 3:
        return text + ", or normalize_images=False in policy_kwargs for images that are normalised already"
    return text
