"""A learned world: an ensemble of probabilistic networks that predicts what the next observation will be.

The ensemble is that of PETS (arXiv:1805.12114) and MBPO (arXiv:1906.08253): Gaussian heads with bounded log-variances
predict the *change* of the observation. ``grpo_jax.learning.model`` trains it.
"""

from __future__ import annotations

import dataclasses
import functools
import math

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax import struct

from grpo_jax.noise import bits_to_uniform, draw_bits
from grpo_jax.spaces import ActionSpace, Box, Space, encode, is_image
from grpo_jax.types import Observation, Params, Step
from grpo_jax.worlds.base import RewardFunction, World, example_action

N_MEMBERS = 5
WIDTHS = (64, 64)
MAX_UNCERTAINTY = 3.0
"""Where a branch is cut: disagreement summed along it, in standard deviations of a one-step change."""


class Prediction(struct.PyTreeNode):
    """What each of E members says; the D + R targets are the normalised change and, if it is learned, the reward.

    Attributes:
      mean: ``[E, ..., D + R]``.
      log_variance: ``[E, ..., D + R]``.
      end_logit: ``[E, ...]``, of termination.
    """

    mean: jax.Array
    log_variance: jax.Array
    end_logit: jax.Array


class MemberDense(nn.Module):
    """E dense layers side by side; ``[E, ..., n_in] -> [E, ..., width]``."""

    width: int

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        n_members, n_in = x.shape[0], x.shape[-1]
        kernel = self.param("kernel", _lecun_uniform, (n_members, n_in, self.width))
        bias = self.param("bias", nn.initializers.zeros, (n_members, self.width))
        bias = bias.reshape(n_members, *(1,) * (x.ndim - 2), self.width)
        return jnp.einsum("e...i,eio->e...o", x, kernel) + bias


class MemberBounds(nn.Module):
    """Squeezes log-variances ``[E, ..., n]`` softly between two learned bounds, as in PETS."""

    @nn.compact
    def __call__(self, log_variance: jax.Array) -> jax.Array:
        n_members, n_targets = log_variance.shape[0], log_variance.shape[-1]
        shape = (n_members, *(1,) * (log_variance.ndim - 2), n_targets)
        high = self.param("high", nn.initializers.constant(0.5), (n_members, n_targets)).reshape(shape)
        low = self.param("low", nn.initializers.constant(-10.0), (n_members, n_targets)).reshape(shape)
        log_variance = high - nn.softplus(high - log_variance)
        return low + nn.softplus(log_variance - low)


class Ensemble(nn.Module):
    """E networks; ``[E, ..., n_in] -> Prediction``.

    A linear path leads past the hidden layers: over a short time step most physics is nearly linear.

    Attributes:
      widths: hidden layers.
      n_targets: D + R.
    """

    widths: tuple[int, ...]
    n_targets: int

    @nn.compact
    def __call__(self, x: jax.Array) -> Prediction:
        hidden = x
        for width in self.widths:
            hidden = nn.silu(MemberDense(width)(hidden))
        output = MemberDense(2 * self.n_targets + 1, name="output")(hidden)
        mean, log_variance, end_logit = jnp.split(output, [self.n_targets, 2 * self.n_targets], axis=-1)
        mean = mean + MemberDense(self.n_targets, name="linear")(x)
        log_variance = MemberBounds(name="bounds")(log_variance)
        return Prediction(mean, log_variance, end_logit[..., 0])


class Normaliser(struct.PyTreeNode):
    """What the training data look like.

    Attributes:
      mean: ``[D]`` of the observations.
      std: ``[D]``, 1 where nothing varies.
      target_mean: ``[D + R]`` of the changes and rewards.
      target_std: ``[D + R]``, 1 where nothing varies; 0 before the first training: nothing ever changes.
      low: ``[D]``, the least that is predicted.
      high: ``[D]``, the most that is predicted.
    """

    mean: jax.Array
    std: jax.Array
    target_mean: jax.Array
    target_std: jax.Array
    low: jax.Array
    high: jax.Array


class LearnedState(struct.PyTreeNode):
    """An observation ``[D]``, its axes joined, and the disagreement ``[]`` that was collected on the way to it."""

    observation: jax.Array
    uncertainty: jax.Array


@struct.dataclass
class LearnedWorld(World):
    """A world that was learned from transitions. It knows no time limit.

    A step draws from the mean of the members' Gaussians; all noise comes from the key, so branches with common keys
    share it. Predictions stay within what training saw, and are cut (``truncated``) where the members' disagreement,
    summed along the branch, passes ``max_uncertainty``.

    Attributes:
      params: of the ensemble; traced, like all arrays: training anew compiles nothing.
      normaliser: of its inputs and targets.
      starts: ``[S, D]`` visited observations, which ``reset`` draws from.
      max_uncertainty: ``[]``, in standard deviations of a one-step change.
      ensemble: static structure.
      reward_function: ``(state, action, next_state) -> []`` for one transition, or None: the reward is learned.
      observation_space: D real numbers of any shape, no image; static.
      action_space: static.
    """

    params: Params
    normaliser: Normaliser
    starts: jax.Array
    max_uncertainty: jax.Array
    ensemble: Ensemble = struct.field(pytree_node=False)
    reward_function: RewardFunction | None = struct.field(pytree_node=False)
    observation_space: Space = struct.field(pytree_node=False)
    action_space: ActionSpace = struct.field(pytree_node=False)

    def at(self, observation: Observation, time: jax.Array | None = None) -> LearnedState:
        """The state of an observation: ``[..., *shape]`` -> leaves ``[..., *]``; its disagreement starts at 0."""
        del time  # there is no clock
        observation = jnp.asarray(observation, self.starts.dtype)
        batch = observation.shape[: observation.ndim - len(self.observation_space.shape)]  # type: ignore[union-attr]
        flat = observation.reshape(*batch, self.starts.shape[1])
        return LearnedState(flat, jnp.zeros(batch, flat.dtype))

    def reset(self, key: jax.Array) -> tuple[jax.Array, LearnedState]:
        row = jnp.int32(bits_to_uniform(draw_bits(key, ())) * self.starts.shape[0])
        start = self.starts[row]
        return self._shaped(start), LearnedState(start, jnp.zeros((), start.dtype))

    def predict(self, observation: jax.Array, action: jax.Array) -> Prediction:
        """What each member says: observations ``[..., D]``, actions ``[..., *A]`` in the world's units."""
        inputs = self.inputs(observation, action)
        inputs = jnp.broadcast_to(inputs, (N_MEMBERS, *inputs.shape))
        prediction = self.ensemble.apply({"params": self.params}, inputs)
        assert isinstance(prediction, Prediction)
        return prediction

    def inputs(self, observation: jax.Array, action: jax.Array) -> jax.Array:
        """What a member sees, ``[..., D + A]``: actions are one-hot, or scaled to [-1, 1]."""
        observation = (observation - self.normaliser.mean) / self.normaliser.std
        space = self.action_space
        action = encode(space, action)
        if isinstance(space, Box):
            if space.is_bounded:
                width = np.where(space.high > space.low, space.high - space.low, 1.0)
                action = 2.0 * (action - space.low) / width - 1.0
            action = action.reshape(*observation.shape[:-1], -1)
        return jnp.concatenate([observation, action.astype(observation.dtype)], axis=-1)

    def step(self, key: jax.Array, state: LearnedState, action: jax.Array) -> Step:
        n_targets = self.ensemble.n_targets
        uniforms = bits_to_uniform(draw_bits(key, (n_targets + 1,)))
        prediction = self.predict(state.observation, action)
        std = jnp.sqrt(jnp.mean(jnp.exp(prediction.log_variance), axis=0))
        noise = std * jax.scipy.special.ndtri(uniforms[:n_targets])
        observation, reward, end = self.reached(state.observation, action, prediction, noise)
        uncertainty = state.uncertainty + disagreement(prediction)
        return Step(
            observation=self._shaped(observation),
            state=LearnedState(observation, uncertainty),
            reward=reward,
            terminated=uniforms[n_targets] < end,
            truncated=uncertainty > self.max_uncertainty,
        )

    def reached(
        self,
        observation: jax.Array,
        action: jax.Array,
        prediction: Prediction,
        noise: jax.Array | float = 0.0,
    ) -> tuple[jax.Array, jax.Array, jax.Array]:
        """What the members' mean and some noise on it lead to, for one transition.

        Args:
          observation: ``[D]``.
          action: ``[*A]`` in the world's units.
          prediction: of the two.
          noise: ``[D + R]`` on the normalised targets.

        Returns:
          Next observation ``[D]``, reward ``[]``, probability of termination ``[]``.
        """
        targets = jnp.mean(prediction.mean, axis=0) + noise
        targets = self.normaliser.target_mean + targets * self.normaliser.target_std
        n_features = observation.shape[0]
        # A real observation may lie beyond the training data: it stays there, but nothing moves further out.
        low = jnp.minimum(self.normaliser.low, observation)
        high = jnp.maximum(self.normaliser.high, observation)
        reached = jnp.clip(observation + targets[:n_features], low, high)
        if self.reward_function is None:
            reward = targets[n_features]
        else:
            reward = self.reward_function(self._shaped(observation), action, self._shaped(reached))
        reward = jnp.asarray(reward, jnp.result_type(float)).reshape(())
        return reached, reward, jnp.mean(nn.sigmoid(prediction.end_logit))

    def _shaped(self, observation: jax.Array) -> jax.Array:
        return observation.reshape(self.observation_space.shape)  # type: ignore[union-attr]


def disagreement(prediction: Prediction) -> jax.Array:
    """How far the members' means are apart: root mean square of their standard deviations, ``[...]``.

    In units of the targets' own standard deviation: 1 is as far as two random transitions.
    """
    return jnp.sqrt(jnp.mean(jnp.var(prediction.mean, axis=0), axis=-1))


def untrained(
    observation_space: Space,
    action_space: ActionSpace,
    key: jax.Array,
    *,
    reward_function: RewardFunction | None = None,
    max_uncertainty: float = MAX_UNCERTAINTY,
    n_starts: int = 256,
) -> LearnedWorld:
    """A world that has seen nothing yet.

    Args:
      observation_space: a floating Box of D numbers in any shape, no image.
      action_space: any.
      key: PRNG key of the first parameters.
      reward_function: JAX-traceable, of one transition; None: the reward is learned.
      max_uncertainty: where branches are cut.
      n_starts: visited observations that ``reset`` will draw from.

    Raises:
      NotImplementedError: observations that are images, categories or dicts.
    """
    check_vectors(observation_space)
    n_features = math.prod(observation_space.shape)  # type: ignore[union-attr]
    n_targets = n_features + (reward_function is None)
    dtype = jnp.result_type(float)
    ensemble = Ensemble(WIDTHS, n_targets)
    zeros, ones = jnp.zeros(n_features, dtype), jnp.ones(n_features, dtype)
    world = LearnedWorld(
        params={},
        normaliser=Normaliser(
            zeros, ones, jnp.zeros(n_targets, dtype), jnp.zeros(n_targets, dtype), zeros, zeros
        ),
        starts=jnp.zeros((n_starts, n_features), dtype),
        max_uncertainty=jnp.asarray(max_uncertainty, dtype),
        ensemble=ensemble,
        reward_function=reward_function,
        observation_space=observation_space,
        action_space=action_space,
    )
    inputs = jax.eval_shape(lambda: world.inputs(zeros, example_action(action_space)))
    return dataclasses.replace(world, params=_first_params(ensemble, inputs.shape[0], key))


@functools.partial(jax.jit, static_argnums=(0, 1))
def _first_params(ensemble: Ensemble, n_inputs: int, key: jax.Array) -> Params:
    return ensemble.init(key, jnp.zeros((N_MEMBERS, n_inputs), jnp.result_type(float)))["params"]


def _lecun_uniform(key: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    """Kernels ``[E, n_in, n_out]`` of variance 1 / n_in; this package's draws compile faster than flax's."""
    return (2.0 * bits_to_uniform(draw_bits(key, shape)) - 1.0) * np.sqrt(3.0 / shape[1]).item()


def check_vectors(space: Space) -> None:
    """Refuses observations that an ensemble of dense networks cannot predict.

    Raises:
      NotImplementedError: names the space and what to use instead.
    """
    if not (isinstance(space, Box) and jnp.issubdtype(space.dtype, jnp.floating)) or is_image(space):
        raise NotImplementedError(
            f"a learned world predicts real numbers, but observation_space={space}; use dynamics='clone' (exact, any"
            " observation), a transition function dynamics=f, or trajectory groups"
        )
