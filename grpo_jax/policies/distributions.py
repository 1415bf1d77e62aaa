"""Action distributions as pure functions of parameter arrays.

``sample`` turns uniform numbers into an action instead of consuming a key: candidates that share their
uniforms are coupled (common random numbers), and noise can be drawn in bulk. Parameters are ``[..., P]``,
actions ``[..., *shape]``, uniforms ``[..., n_uniforms]``; leading axes broadcast.
"""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np

from grpo_jax.spaces import ActionSpace, Box

MASKED_LOGIT = -1e9
"""Logit of a forbidden action: its probability is exactly 0, its logarithm and gradients stay finite.

Where a mask allows no action at all, all are equally likely: nothing becomes NaN, and nothing is learned, for these logits
are constants.
"""


@dataclass(frozen=True)
class Categorical:
    """A product of independent categorical distributions: Discrete, MultiDiscrete and MultiBinary actions.

    Attributes:
      nvec: number of categories of each factor.
      shape: shape of an action, ``()`` for Discrete, else ``(len(nvec),)``.
    """

    nvec: tuple[int, ...]
    shape: tuple[int, ...]

    @property
    def n_parameters(self) -> int:
        """Length P of the parameter vector: the factors' logits, one after the other."""
        return sum(self.nvec)

    @property
    def n_uniforms(self) -> int:
        """Uniform numbers that one action takes."""
        return len(self.nvec)

    @property
    def n_actions(self) -> int:
        """Size of the product space."""
        return math.prod(self.nvec)

    def sample(self, logits: jax.Array, uniforms: jax.Array) -> jax.Array:
        """The action at quantile ``uniforms`` (inverse cumulative distribution); int32 ``[..., *shape]``."""
        actions = []
        for i, part in enumerate(self._split(logits)):
            cumulative = jnp.cumsum(jax.nn.softmax(part), axis=-1)
            threshold = uniforms[..., i : i + 1] * cumulative[..., -1:]
            # Strictly below the last step, so that an action of probability 0 is never drawn.
            actions.append(jnp.sum(cumulative[..., :-1] <= threshold, axis=-1, dtype=jnp.int32))
        return self._join(actions)

    def mode(self, logits: jax.Array) -> jax.Array:
        """The most probable action; int32 ``[..., *shape]``."""
        return self._join([jnp.argmax(part, axis=-1).astype(jnp.int32) for part in self._split(logits)])

    def log_prob(self, logits: jax.Array, action: jax.Array) -> jax.Array:
        """log pi(a); ``[...]``."""
        total = jnp.zeros((), logits.dtype)
        for i, part in enumerate(self._split(logits)):
            chosen = action[..., i] if self.shape else action
            # A masked sum instead of a gather: its gradient needs no scatter.
            hot = chosen[..., None] == jnp.arange(part.shape[-1])
            total = total + jnp.sum(jnp.where(hot, jax.nn.log_softmax(part), 0.0), axis=-1)
        return total

    def entropy(self, logits: jax.Array) -> jax.Array:
        """Entropy in nats; ``[...]``."""
        total = jnp.zeros((), logits.dtype)
        for part in self._split(logits):
            log_probs = jax.nn.log_softmax(part)
            total = total - jnp.sum(jnp.exp(log_probs) * log_probs, axis=-1)
        return total

    def kl(self, logits: jax.Array, other_logits: jax.Array) -> jax.Array:
        """KL(p || q) in nats, exact; ``[...]``."""
        total = jnp.zeros((), logits.dtype)
        for p, q in zip(self._split(logits), self._split(other_logits), strict=True):
            log_p, log_q = jax.nn.log_softmax(p), jax.nn.log_softmax(q)
            total = total + jnp.sum(jnp.exp(log_p) * (log_p - log_q), axis=-1)
        return total

    def apply_mask(self, logits: jax.Array, mask: jax.Array) -> jax.Array:
        """Forbids actions by a mask, bool ``[..., P]``; where it allows none, see ``MASKED_LOGIT``."""
        chex.assert_axis_dimension(mask, -1, self.n_parameters)
        return jnp.where(mask, logits, MASKED_LOGIT)

    def allows(self, mask: Any, action: Any) -> Any:
        """Whether a mask bool ``[..., P]`` allows actions ``[..., *shape]``: every factor's category; bool ``[...]``.

        Of NumPy arrays it is a NumPy array.
        """
        allowed: Any = True
        for i, part in enumerate(self._split(mask)):
            chosen = action[..., i] if self.shape else action
            allowed = allowed & (part & (chosen[..., None] == np.arange(part.shape[-1]))).any(axis=-1)
        return allowed

    def actions(self) -> np.ndarray:
        """Every action of the product space; int32 ``[n_actions, *shape]``."""
        grid = np.stack(np.unravel_index(np.arange(self.n_actions), self.nvec), axis=-1)
        return grid.reshape(self.n_actions, *self.shape).astype(np.int32)

    def index(self, action: jax.Array) -> jax.Array:
        """The row of ``actions()`` that an action is; int32 ``[...]``."""
        if not self.shape:
            return action
        strides = np.cumprod((1, *self.nvec[:0:-1]))[::-1]
        return jnp.sum(action * strides.astype(np.int32), axis=-1, dtype=jnp.int32)

    def _split(self, logits: jax.Array) -> list[jax.Array]:
        chex.assert_axis_dimension(logits, -1, self.n_parameters)
        edges = np.cumsum((0, *self.nvec))
        return [logits[..., lo:hi] for lo, hi in itertools.pairwise(edges)]

    def _join(self, factors: list[jax.Array]) -> jax.Array:
        return jnp.stack(factors, axis=-1) if self.shape else factors[0]


@dataclass(frozen=True)
class Gaussian:
    """Independent normal distributions over a box; parameters are the means, then the log standard deviations.

    Attributes:
      shape: shape of an action.
    """

    shape: tuple[int, ...]

    @property
    def n_uniforms(self) -> int:
        """Uniform numbers that one action takes."""
        return math.prod(self.shape)

    @property
    def n_parameters(self) -> int:
        """Length P of the parameter vector."""
        return 2 * self.n_uniforms

    def sample(self, parameters: jax.Array, uniforms: jax.Array) -> jax.Array:
        """The action at quantile ``uniforms`` of each coordinate; ``[..., *shape]``."""
        mean, log_std = self._split(parameters)
        normal = jax.scipy.special.ndtri(uniforms)
        return self._shaped(mean + jnp.exp(log_std) * normal)

    def mode(self, parameters: jax.Array) -> jax.Array:
        """The mean; ``[..., *shape]``."""
        return self._shaped(self._split(parameters)[0])

    def log_prob(self, parameters: jax.Array, action: jax.Array) -> jax.Array:
        """log density; ``[...]``."""
        mean, log_std = self._split(parameters)
        flat = action.reshape(*action.shape[: action.ndim - len(self.shape)], self.n_uniforms)
        z = (flat - mean) * jnp.exp(-log_std)
        return jnp.sum(-0.5 * z**2 - log_std - 0.5 * math.log(2 * math.pi), axis=-1)

    def entropy(self, parameters: jax.Array) -> jax.Array:
        """Differential entropy in nats; ``[...]``."""
        _, log_std = self._split(parameters)
        return jnp.sum(log_std + 0.5 * math.log(2 * math.pi * math.e), axis=-1)

    def kl(self, parameters: jax.Array, other: jax.Array) -> jax.Array:
        """KL(p || q) in nats, exact; ``[...]``."""
        mean, log_std = self._split(parameters)
        other_mean, other_log_std = self._split(other)
        ratio = jnp.exp(2 * (log_std - other_log_std))
        shift = ((mean - other_mean) * jnp.exp(-other_log_std)) ** 2
        return jnp.sum(other_log_std - log_std + 0.5 * (ratio + shift - 1.0), axis=-1)

    def _split(self, parameters: jax.Array) -> tuple[jax.Array, jax.Array]:
        chex.assert_axis_dimension(parameters, -1, self.n_parameters)
        return parameters[..., : self.n_uniforms], parameters[..., self.n_uniforms :]

    def _shaped(self, flat: jax.Array) -> jax.Array:
        return flat.reshape(*flat.shape[:-1], *self.shape)


Distribution = Categorical | Gaussian


def allowed(distribution: Distribution, mask: Any, action: Any) -> Any:
    """:meth:`Categorical.allows`; no mask (None), or one of a Gaussian's actions, forbids nothing: True."""
    if mask is None or not isinstance(distribution, Categorical):
        return True
    return distribution.allows(mask, action)


def for_space(space: ActionSpace) -> Distribution:
    """The distribution over an action space."""
    if isinstance(space, Box):
        return Gaussian(space.shape)
    return Categorical(space.nvec, space.shape)
