"""A policy: static structure, whose parameters and observation statistics are arguments."""

from __future__ import annotations

import math
from dataclasses import dataclass

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax import struct

from grpo_jax import spaces
from grpo_jax.config import GRPOConfig
from grpo_jax.noise import split
from grpo_jax.policies import distributions, normalize
from grpo_jax.policies.distributions import Categorical, Distribution
from grpo_jax.policies.networks import (
    CNN,
    Activation,
    Actor,
    Combined,
    Critic,
    Flatten,
    check_activation,
    initialise,
    is_own,
)
from grpo_jax.policies.normalize import RunningStatistics
from grpo_jax.types import Observation, Params


class PolicyState(struct.PyTreeNode):
    """What a policy knows.

    Attributes:
      params: ``{"features_extractor": ..., "critic_features_extractor": ..., "actor": ..., "critic": ...}``; only what
        has parameters: no critic where nothing is bootstrapped, no extractor that merely flattens.
      statistics: of the encoded observations, or None.
    """

    params: Params
    statistics: RunningStatistics | None


@dataclass(frozen=True)
class Policy:
    """Features extractor, actor, critic and action distribution over two spaces.

    Hashable, so it is static under ``jit``: equal policies share their programs.

    Attributes:
      observation_space: what is seen.
      action_space: what is done.
      distribution: over the actions.
      features_extractor: encoded observations to features. ``Flatten``, ``CNN``, ``Combined``, or any flax module that
        maps ``[B, *shape]`` (a dict of such arrays for ``Dict``) to ``[B, F]`` and keeps nothing but parameters.
      share_features_extractor: whether actor and critic learn one extractor together.
      actor: head on the features.
      critic: head on the features, or None.
      normalize_observations: whether running statistics are kept.
      orthogonal: how the modules of this package start, see ``networks.initialise``.
    """

    observation_space: spaces.Space
    action_space: spaces.ActionSpace
    distribution: Distribution
    features_extractor: nn.Module
    share_features_extractor: bool
    actor: Actor
    critic: Critic | None
    normalize_observations: bool
    orthogonal: bool = True

    def __post_init__(self) -> None:
        extractor = self.features_extractor
        if not isinstance(extractor, nn.Module):
            raise TypeError(f"features_extractor={extractor!r} must be an instance of a flax.linen.Module")
        try:
            hash(extractor)
        except TypeError as error:
            raise TypeError(
                f"features_extractor={type(extractor).__name__} must be hashable: use tuples for lists, FrozenDict for"
                " dicts among its attributes"
            ) from error

    def init(self, key: jax.Array) -> PolicyState:
        """Fresh parameters from a PRNG key.

        Raises:
          ValueError: a features extractor of the user's keeps more than parameters, or gives no ``[B, F]``.
        """
        example = jax.eval_shape(self._encode, _example_observation(self.observation_space))
        actor_key, critic_key, *extractor_keys = split(key, 4)
        params = {}
        names = ["features_extractor"]
        if self.critic is not None and not self.share_features_extractor:
            names.append("critic_features_extractor")
        for name, extractor_key in zip(names, extractor_keys, strict=False):
            if extractor_params := self._init_extractor(extractor_key, example):
                params[name] = extractor_params
        features = jax.eval_shape(self._extract, params.get("features_extractor", {}), example)
        if self.critic is not None:
            params["critic"] = initialise(self.critic, critic_key, features, 1.0, self.orthogonal)
        elif not params:
            actor_key = key  # nothing else draws from it
        params["actor"] = initialise(self.actor, actor_key, features, 0.01, self.orthogonal)
        statistics = normalize.initial(example) if self.normalize_observations else None
        return PolicyState(params, statistics)

    def parameters(
        self, state: PolicyState, observation: Observation, action_mask: jax.Array | None = None
    ) -> jax.Array:
        """Distribution parameters ``[..., P]`` for observations ``[..., *shape]``, forbidden actions masked.

        Raises:
          ValueError: an action mask for a Box.
        """
        return self._act(state, self._features(state, "features_extractor", observation), action_mask)

    def value(self, state: PolicyState, observation: Observation) -> jax.Array:
        """State values ``[...]``; only with a critic."""
        name = "features_extractor" if self.share_features_extractor else "critic_features_extractor"
        return self._judge(state, self._features(state, name, observation))

    def parameters_and_value(
        self, state: PolicyState, observation: Observation, action_mask: jax.Array | None = None
    ) -> tuple[jax.Array, jax.Array]:
        """Both at once: gradients go through features that are shared once, where they would go through them twice."""
        if not self.share_features_extractor:
            return self.parameters(state, observation, action_mask), self.value(state, observation)
        features = self._features(state, "features_extractor", observation)
        return self._act(state, features, action_mask), self._judge(state, features)

    def _act(self, state: PolicyState, features: jax.Array, action_mask: jax.Array | None) -> jax.Array:
        output = self.actor.apply({"params": state.params["actor"]}, features)
        assert isinstance(output, jax.Array)
        if action_mask is None:
            return output
        if not isinstance(self.distribution, Categorical):
            raise ValueError(
                f"action_mask: no action of a Box can be forbidden, {self.action_space} has no mask"
            )
        return self.distribution.apply_mask(output, action_mask)

    def _judge(self, state: PolicyState, features: jax.Array) -> jax.Array:
        assert self.critic is not None, "this policy has no critic: bootstrap=False"
        value = self.critic.apply({"params": state.params["critic"]}, features)
        assert isinstance(value, jax.Array)
        return value

    def act(
        self, state: PolicyState, observation: Observation, action_mask: jax.Array | None, uniforms: jax.Array
    ) -> jax.Array:
        """Sampled actions ``[..., *A]`` in the world's units, by uniform numbers ``[..., n_uniforms]``."""
        parameters = self.parameters(state, observation, action_mask)
        return self.to_world(self.distribution.sample(parameters, uniforms))

    def to_world(self, action: jax.Array) -> jax.Array:
        """The policy's action in the world's units, within its bounds."""
        space = self.action_space
        if not isinstance(space, spaces.Box):
            return action
        return jnp.clip(self.stretch(action), space.low, space.high)

    def stretch(self, action: jax.Array) -> jax.Array:
        """The policy's action in the world's units, before it is clipped.

        A Gaussian lives on [-1, 1] whatever the bounds of the box are: it is stretched to them.
        """
        space = self.action_space
        if not isinstance(space, spaces.Box) or not space.is_bounded:
            return action
        return space.low + (action + 1.0) * 0.5 * (space.high - space.low)

    def update_statistics(self, state: PolicyState, observation: Observation) -> PolicyState:
        """Adds a batch of raw observations ``[N, *shape]`` to the statistics, if any are kept."""
        if state.statistics is None:
            return state
        return state.replace(statistics=normalize.update(state.statistics, self._encode(observation)))

    def _encode(self, observation: Observation) -> spaces.Encoded:
        return spaces.encode(self.observation_space, observation)

    def _features(self, state: PolicyState, name: str, observation: Observation) -> jax.Array:
        encoded = self._encode(observation)
        if state.statistics is not None:
            encoded = normalize.normalize(state.statistics, encoded)
        return self._extract(state.params.get(name, {}), encoded)

    def _init_extractor(self, key: jax.Array, example: spaces.Encoded) -> Params:
        if not is_own(self.features_extractor):
            example = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct((1, *leaf.shape), leaf.dtype), example)
        return initialise(self.features_extractor, key, example, orthogonal=self.orthogonal)

    def _extract(self, params: Params, encoded: spaces.Encoded) -> jax.Array:
        """Features ``[..., F]``; a module of the user's sees all batch axes as one."""
        if is_own(self.features_extractor):
            features = self.features_extractor.apply({"params": params}, encoded)
            assert isinstance(features, jax.Array)
            return features
        batch, flat = _flatten_batch(self.observation_space, encoded)
        features = self.features_extractor.apply({"params": params}, flat)
        shape = getattr(features, "shape", None)
        if shape is None or len(shape) != 2 or shape[0] != math.prod(batch):
            seen = jax.tree.map(lambda leaf: list(leaf.shape), flat)
            got = type(features).__name__ if shape is None else list(shape)
            raise ValueError(
                f"features_extractor={type(self.features_extractor).__name__} must turn a batch [B, ...] into features"
                f" [B, F]; for {seen} it gave {got}"
            )
        assert isinstance(features, jax.Array)
        return features.reshape(*batch, shape[1])


def make_policy(
    config: GRPOConfig, observation_space: spaces.Space, action_space: spaces.ActionSpace
) -> Policy:
    """The policy that a config asks for.

    Raises:
      ValueError: ``network="cnn"`` for observations that are no feature maps.
    """
    image = spaces.is_image(observation_space)
    if config.network == "cnn" and not image:
        raise ValueError(
            f"network='cnn' needs observations [height, width, channels] of 3x3 pixels or more,"
            f" got {observation_space}; use network='mlp' or 'auto'"
        )
    convolutional = image and config.network in ("cnn", "auto")
    extractor: nn.Module
    if convolutional:
        extractor = CNN(config.activation)
    else:
        extractor = default_extractor(
            observation_space, config.activation, convolutions=config.network == "auto"
        )
    # Convolutions end in a dense layer of their own.
    default_widths = () if convolutional else (64, 64)
    widths = default_widths if config.net_arch is None else config.net_arch
    critic_widths = widths if config.critic_net_arch is None else config.critic_net_arch
    return assemble(
        observation_space,
        action_space,
        features_extractor=extractor,
        share_features_extractor=config.share_features_extractor,
        widths=widths,
        critic_widths=critic_widths if config.bootstrap else None,
        activation=config.activation,
        log_std_init=config.log_std_init,
        normalize_observations=config.normalize_observations,
    )


def default_extractor(space: spaces.Space, activation: Activation, *, convolutions: bool) -> nn.Module:
    """What joins an observation into one vector; the images of a ``Dict`` by convolutions, if they are asked for."""
    if not isinstance(space, spaces.Dict):
        return Flatten(spaces.encoded_rank(space))
    ranks = tuple((name, spaces.encoded_rank(part)) for name, part in space.spaces)
    images = tuple(name for name, part in space.spaces if convolutions and spaces.is_image(part))
    return Combined(ranks, images, activation)


def assemble(
    observation_space: spaces.Space,
    action_space: spaces.ActionSpace,
    *,
    features_extractor: nn.Module,
    share_features_extractor: bool = False,
    widths: tuple[int, ...] = (64, 64),
    critic_widths: tuple[int, ...] | None = None,
    activation: Activation = "tanh",
    log_std_init: float = 0.0,
    normalize_observations: bool = False,
    orthogonal: bool = True,
) -> Policy:
    """A policy out of its parts; equal arguments give equal policies.

    Args:
      observation_space: what is seen.
      action_space: what is done; it decides the distribution.
      features_extractor: see :class:`Policy`.
      share_features_extractor: whether the critic learns the actor's extractor with it.
      widths: dense layers of the actor.
      critic_widths: dense layers of the critic; None: no critic.
      activation: behind the dense layers.
      log_std_init: start of a Gaussian's log standard deviations.
      normalize_observations: whether running statistics are kept.
      orthogonal: how the modules of this package start, see ``networks.initialise``.

    Raises:
      TypeError: an activation or an extractor of the wrong kind.
      ValueError: an unknown activation.
    """
    check_activation(activation)
    distribution = distributions.for_space(action_space)
    gaussian = isinstance(distribution, distributions.Gaussian)
    n_outputs = distribution.n_uniforms if gaussian else distribution.n_parameters
    return Policy(
        observation_space=observation_space,
        action_space=action_space,
        distribution=distribution,
        features_extractor=features_extractor,
        share_features_extractor=share_features_extractor,
        actor=Actor(widths, activation, n_outputs, gaussian, log_std_init),
        critic=None if critic_widths is None else Critic(critic_widths, activation),
        normalize_observations=normalize_observations,
        orthogonal=orthogonal,
    )


def _flatten_batch(space: spaces.Space, encoded: spaces.Encoded) -> tuple[tuple[int, ...], spaces.Encoded]:
    """The batch axes of encoded observations, and the observations with one batch axis instead."""
    parts = list(space.spaces) if isinstance(space, spaces.Dict) else [("", space)]
    leaves = encoded if isinstance(encoded, dict) else {"": encoded}
    batch, flat = (), {}
    for name, part in parts:
        leaf = leaves[name]
        n_batch_axes = leaf.ndim - spaces.encoded_rank(part)
        batch = leaf.shape[:n_batch_axes]
        flat[name] = leaf.reshape(math.prod(batch), *leaf.shape[n_batch_axes:])
    return batch, flat if isinstance(encoded, dict) else flat[""]


def _example_observation(space: spaces.Space) -> Observation:
    if isinstance(space, spaces.Dict):
        return {name: _example_observation(part) for name, part in space.spaces}
    dtype = jnp.result_type(float) if isinstance(space, spaces.Box) else jnp.int32
    return jax.ShapeDtypeStruct(space.shape, dtype)
