"""What the networks of ``grpo_jax`` have and SB3's have not, in torch; of module level, so that SB3 can save them."""

from __future__ import annotations

from collections.abc import Mapping

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
      activation_fn: behind each layer.
      channels_first: False: maps are ``[height, width, channels]``.
    """

    def __init__(
        self,
        observation_space: gymnasium.Space,
        features_dim: int | None = None,
        activation_fn: type[nn.Module] = nn.ReLU,
        channels_first: bool = True,
    ) -> None:
        shape = observation_space.shape
        assert shape is not None
        n_channels, *pixels = shape if channels_first else (shape[-1], *shape[:-1])
        is_large = min(pixels) >= 36
        layers = [(32, 8, 4), (64, 4, 2), (64, 3, 1)] if is_large else [(16, 3, 1)]
        super().__init__(observation_space, features_dim or (512 if is_large else 128))
        self.channels_first = channels_first
        modules: list[nn.Module] = []
        for n_maps, kernel, stride in layers:
            modules += [nn.Conv2d(n_channels, n_maps, kernel, stride), activation_fn()]
            n_channels = n_maps
        self.cnn = nn.Sequential(*modules, nn.Flatten())
        with torch.no_grad():
            n_flat = self.cnn(torch.zeros(1, shape[0] if channels_first else shape[-1], *pixels)).shape[1]
        self.linear = nn.Sequential(nn.Linear(n_flat, self.features_dim), activation_fn())

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
        parts: dict[str, nn.Module] = {}
        sizes = []
        for name, space in observation_space.spaces.items():
            if name in channels_first:
                parts[name] = FeatureMapsCNN(space, cnn_output_dim, nn.ReLU, channels_first[name])
                sizes.append(cnn_output_dim)
            else:
                parts[name] = nn.Flatten()
                sizes.append(gymnasium.spaces.flatdim(space))
        super().__init__(observation_space, sum(sizes))
        self.extractors = nn.ModuleDict(parts)

    def forward(self, observations: dict[str, torch.Tensor]) -> torch.Tensor:
        """Features ``[N, F]``."""
        return torch.cat([part(observations[name]) for name, part in self.extractors.items()], dim=1)
