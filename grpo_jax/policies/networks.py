"""Actors and critics in flax; observations come encoded (``spaces.encode``), batch axes are free."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from grpo_jax.noise import bits_to_uniform, draw_bits
from grpo_jax.types import Params

ACTIVATIONS: dict[str, Callable[[jax.Array], jax.Array]] = {
    "tanh": nn.tanh,
    "relu": nn.relu,
    "elu": nn.elu,
    "gelu": nn.gelu,
    "silu": nn.silu,
    "leaky_relu": nn.leaky_relu,
}


class MLP(nn.Module):
    """Dense layers with an activation after each; ``[..., n_in] -> [..., widths[-1]]``."""

    widths: tuple[int, ...]
    activation: str

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        for width in self.widths:
            x = ACTIVATIONS[self.activation](nn.Dense(width)(x))
        return x


class Flatten(nn.Module):
    """Joins the axes of one observation; ``[..., *shape] -> [..., prod(shape)]``."""

    rank: int

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        return x.reshape(*x.shape[: x.ndim - self.rank], -1)


class CNN(nn.Module):
    """Convolutions for feature maps ``[..., height, width, channels]``, by the size of the map.

    From 36 pixels on the three layers of Mnih et al. 2015 (doi:10.1038/nature14236) and 512 features; below, one
    3x3 layer of 16 channels and 128 features, the network of MinAtar (arXiv:1903.03176).
    """

    activation: str

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        activation = ACTIVATIONS[self.activation]
        if min(x.shape[-3:-1]) >= 36:
            layers, n_features = [(32, 8, 4), (64, 4, 2), (64, 3, 1)], 512
        else:
            layers, n_features = [(16, 3, 1)], 128
        for channels, kernel, stride in layers:
            x = activation(nn.Conv(channels, (kernel, kernel), (stride, stride), padding="VALID")(x))
        x = x.reshape(*x.shape[:-3], -1)
        return activation(nn.Dense(n_features)(x))


class Actor(nn.Module):
    """Observations to distribution parameters ``[..., P]``.

    Attributes:
      torso: ``"mlp"`` or ``"cnn"``, before the dense layers.
      rank: axes of one encoded observation.
      widths: sizes of the dense layers.
      activation: a name in ``ACTIVATIONS``.
      n_outputs: logits, or means.
      gaussian: appends log standard deviations, learned and the same in every state.
      log_std_init: where they start.
    """

    torso: str
    rank: int
    widths: tuple[int, ...]
    activation: str
    n_outputs: int
    gaussian: bool = False
    log_std_init: float = 0.0

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        x = _torso(self.torso, self.rank, self.activation)(x)
        x = MLP(self.widths, self.activation)(x)
        x = nn.Dense(self.n_outputs, name="output")(x)
        if not self.gaussian:
            return x
        start = nn.initializers.constant(self.log_std_init)
        log_std = self.param("log_std", start, (self.n_outputs,))
        return jnp.concatenate([x, jnp.broadcast_to(log_std, x.shape)], axis=-1)


class Critic(nn.Module):
    """Observations to state values ``[...]``; the attributes of :class:`Actor`."""

    torso: str
    rank: int
    widths: tuple[int, ...]
    activation: str

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        x = _torso(self.torso, self.rank, self.activation)(x)
        x = MLP(self.widths, self.activation)(x)
        return nn.Dense(1, name="output")(x)[..., 0]


def initialise(module: nn.Module, key: jax.Array, example: jax.Array, output_gain: float) -> Params:
    """Parameters of an actor or critic: orthogonal kernels, zero biases.

    Gains as in Andrychowicz et al. 2021 (arXiv:2006.05990): sqrt(2) for relu-like and tanh hidden layers, a small one
    for the actor's output. All kernels come from one draw, since XLA compiles every draw anew.

    Args:
      module: an actor or a critic.
      key: PRNG key.
      example: one encoded observation, or its shape and dtype.
      output_gain: gain of the layer named ``output``.
    """
    shapes = jax.eval_shape(module.init, key, example)["params"]
    leaves, structure = jax.tree_util.tree_flatten_with_path(shapes)
    sizes = [math.prod(leaf.shape) for _, leaf in leaves]
    normal = jax.scipy.special.ndtri(bits_to_uniform(draw_bits(key, (sum(sizes),))))
    filled, start = [], 0
    for (path, leaf), size in zip(leaves, sizes, strict=True):
        names = [str(entry.key) for entry in path]
        if names[-1] == "kernel":
            gain = output_gain if names[-2] == "output" else math.sqrt(2.0)
            filled.append(gain * _orthogonal(normal[start : start + size].reshape(-1, leaf.shape[-1])))
        elif names[-1] == "log_std":
            filled.append(jnp.full(leaf.shape, getattr(module, "log_std_init", 0.0)))
        else:
            filled.append(jnp.zeros(leaf.shape))
        filled[-1] = filled[-1].reshape(leaf.shape).astype(leaf.dtype)
        start += size
    return jax.tree_util.tree_unflatten(structure, filled)


def _orthogonal(normal: jax.Array) -> jax.Array:
    """A matrix with orthonormal rows or columns, whichever are fewer (QR of a normal matrix)."""
    tall = normal if normal.shape[0] >= normal.shape[1] else normal.T
    q, r = jnp.linalg.qr(tall)
    q = q * jnp.sign(jnp.diagonal(r))  # makes the distribution uniform
    return q if normal.shape[0] >= normal.shape[1] else q.T


def _torso(kind: str, rank: int, activation: str) -> Any:
    return CNN(activation, name="torso") if kind == "cnn" else Flatten(rank, name="torso")
