"""What the networks of ``grpo_jax`` have and SB3's have not, in torch; of module level, so that SB3 can save them."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import gymnasium
import torch
from stable_baselines3.common.torch_layers import BaseFeaturesExtractor
from torch import nn


class TanhGELU(nn.GELU):
    """The approximation of GELU that flax takes by default."""

    def __init__(self) -> None:
        super().__init__("tanh")


class FeatureMapsCNN(BaseFeaturesExtractor):
    """:class:`grpo_jax.policies.networks.CNN` on maps of any size and number of channels.

    Args:
      observation_space: a Box of three axes.
      features_dim: of the last layer; None: 512 for 36 pixels or more, else 128.
      activation: behind each layer.
      channels_first: False: maps are ``[height, width, channels]``.
    """

    def __init__(
        self,
        observation_space: gymnasium.Space,
        features_dim: int | None = None,
        activation: type[nn.Module] = nn.ReLU,
        channels_first: bool = True,
    ) -> None:
        shape: Any = observation_space.shape
        n_channels, *pixels = shape if channels_first else (shape[-1], *shape[:-1])
        is_large = min(pixels) >= 36
        super().__init__(observation_space, features_dim or (512 if is_large else 128))
        self.channels_first = channels_first
        modules: list[nn.Module] = []
        for n_maps, kernel, stride in [(32, 8, 4), (64, 4, 2), (64, 3, 1)] if is_large else [(16, 3, 1)]:
            modules += [nn.Conv2d(n_channels, n_maps, kernel, stride), activation()]
            n_channels, pixels = n_maps, [(n - kernel) // stride + 1 for n in pixels]
        self.cnn = nn.Sequential(*modules, nn.Flatten())
        n_flat = n_channels * math.prod(pixels)
        self.linear = nn.Sequential(nn.Linear(n_flat, self.features_dim), activation())

    def forward(self, observations: torch.Tensor) -> torch.Tensor:
        """Features ``[N, F]``."""
        return self.linear(self.cnn(observations if self.channels_first else observations.movedim(-1, 1)))


class FeatureMapsCombined(BaseFeaturesExtractor):
    """SB3's ``CombinedExtractor`` with :class:`FeatureMapsCNN` for images, small ones and those with channels last too.

    Args:
      observation_space: a Dict.
      channels_first: by the name of each image.
      cnn_output_dim: features of each image.
    """

    def __init__(
        self,
        observation_space: gymnasium.spaces.Dict,
        channels_first: Mapping[str, bool],
        cnn_output_dim: int,
    ) -> None:
        parts, n_features = observation_space.spaces, len(channels_first) * cnn_output_dim
        flat = {name: part for name, part in parts.items() if name not in channels_first}
        super().__init__(observation_space, n_features + sum(map(gymnasium.spaces.flatdim, flat.values())))
        modules = {
            name: nn.Flatten()
            if name in flat
            else FeatureMapsCNN(part, cnn_output_dim, nn.ReLU, channels_first[name])
            for name, part in parts.items()
        }
        self.extractors = nn.ModuleDict(modules)

    def forward(self, observations: dict[str, torch.Tensor]) -> torch.Tensor:
        """Features ``[N, F]``."""
        return torch.cat([part(observations[name]) for name, part in self.extractors.items()], dim=1)
