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
_POLICIES: dict[Kind, tuple[str, Any]] = {
    "mlp": ("MlpPolicy", Flatten),
    "cnn": ("CnnPolicy", CNN),
    "multi_input": ("MultiInputPolicy", Combined),
}
"""Name and extractor of each policy."""
_OWN: dict[Any, Any] = {FlattenExtractor: Flatten, NatureCNN: CNN, CombinedExtractor: Combined}
_OWN |= {ours: ours for ours in _OWN.values()}
_OPTIONS = {Flatten: (), CNN: ("features_dim",), Combined: ("cnn_output_dim",)}


def to_features_extractor(
    kind: Kind,
    space: gymnasium.Space,
    features_extractor_class: Any = None,
    features_extractor_kwargs: Mapping[str, Any] | None = None,
    normalize_images: bool = True,
) -> nn.Module:
    """The flax module that turns observations into features.

    A module of the user's sees observations as ``[B, *shape]``: one-hot where they are categories, images with the
    channels last and divided by 255; a dict of such arrays for a ``Dict`` space. It gives ``[B, F]``. SB3's own three
    classes mean ours; their arguments are ``features_dim`` for convolutions (where our own CNN is named also
    ``activation``, and feature maps of any number of channels do) and ``cnn_output_dim`` for the combined one, as in SB3.
    """
    is_dict, (name, default) = isinstance(space, gymnasium.spaces.Dict), _POLICIES[kind]
    if is_dict != (kind == "multi_input"):
        flat = "CnnPolicy" if is_image(space, normalize_images) else "MlpPolicy"
        fitting, meant = ("MultiInputPolicy", "not for") if is_dict else (flat, "for")
        raise ValueError(f"{name} is {meant} Dict observations: use {fitting} for {space}")
    given, arguments = features_extractor_class, dict(features_extractor_kwargs or {})
    is_class = isinstance(given, type)
    own = default if given is None else _OWN.get(given) if is_class else None
    if own is None:
        if not (is_class and issubclass(given, nn.Module)):
            is_torch = is_class and issubclass(given, torch.nn.Module)
            raise TypeError(
                f"features_extractor_class={given!r}: {'torch cannot run in JAX: write it' if is_torch else 'it must be'}"
                " as a class derived from flax.linen.Module, from observations [B, *shape] (images with the channels"
                " last) to features [B, F]; its arguments go into features_extractor_kwargs"
            )
        return given(**arguments)
    arguments.pop("normalized_image", None)  # what normalize_images=False tells us
    by_name = (
        given is CNN
    )  # who names our CNN says that the maps are for it, also those that are no image to SB3
    options = (*_OPTIONS[own], "activation") if by_name else _OPTIONS[own]
    if unknown := sorted(arguments.keys() - set(options)):
        raise TypeError(
            f"features_extractor_kwargs={arguments!r}: {', '.join(unknown)} is not known; {own.__name__} takes"
            f" {', '.join(options) or 'no arguments'}"
        )
    encoded = to_observation_space(space, normalize_images)
    if own is CNN:
        if is_dict or not spaces.is_image(encoded) or not (by_name or is_image(space, normalize_images)):
            maps = isinstance(space, gymnasium.spaces.Box) and len(space.shape) == 3
            raise AssertionError(
                f"CnnPolicy is for images (Box, uint8, from 0 to 255, 3x3 pixels or more), not for {space}: use MlpPolicy"
                + maps * ", or normalize_images=False in policy_kwargs for images that are normalised already"
            )
        return CNN(to_activation(arguments.get("activation", "relu")), arguments.get("features_dim"))
    if isinstance(encoded, spaces.Dict) != (own is Combined):
        why = (
            "a Flatten extractor joins no Dict"
            if is_dict
            else "a Combined extractor is for Dict observations"
        )
        raise ValueError(f"{why}: leave features_extractor_class out for {space}")
    if not isinstance(encoded, spaces.Dict):
        return Flatten(spaces.encoded_rank(encoded))
    parts: Any = space
    ranks = tuple((name, spaces.encoded_rank(part)) for name, part in encoded.spaces)
    found = (name for name, part in encoded.spaces if spaces.is_image(part))
    images = tuple(name for name in found if is_image(parts[name], normalize_images))
    return Combined(ranks, images, "relu", arguments.get("cnn_output_dim", 256))
