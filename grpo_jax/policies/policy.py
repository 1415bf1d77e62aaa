"""A policy: static structure, whose parameters and observation statistics are arguments."""

from __future__ import annotations

from dataclasses import dataclass

import jax
import jax.numpy as jnp
from flax import struct

from grpo_jax import spaces
from grpo_jax.config import GRPOConfig
from grpo_jax.noise import split
from grpo_jax.policies import distributions, normalize
from grpo_jax.policies.distributions import Categorical, Distribution
from grpo_jax.policies.networks import Actor, Critic, initialise
from grpo_jax.policies.normalize import RunningStatistics
from grpo_jax.types import Observation, Params


class PolicyState(struct.PyTreeNode):
    """What a policy knows.

    Attributes:
      params: ``{"actor": ..., "critic": ...}``; no critic where nothing is bootstrapped.
      statistics: of the encoded observations, or None.
    """

    params: Params
    statistics: RunningStatistics | None


@dataclass(frozen=True)
class Policy:
    """Actor, critic and action distribution over two spaces; hashable, so it is static under ``jit``."""

    observation_space: spaces.Space
    action_space: spaces.ActionSpace
    distribution: Distribution
    actor: Actor
    critic: Critic | None
    normalize_observations: bool

    def init(self, key: jax.Array) -> PolicyState:
        """Fresh parameters from a PRNG key."""
        example = jax.eval_shape(self._encode, _example_observation(self.observation_space))
        actor_key, critic_key = key, key
        params = {}
        if self.critic is not None:
            actor_key, critic_key = split(key, 2)
            params["critic"] = initialise(self.critic, critic_key, example, output_gain=1.0)
        params["actor"] = initialise(self.actor, actor_key, example, output_gain=0.01)
        statistics = normalize.initial(example) if self.normalize_observations else None
        return PolicyState(params, statistics)

    def parameters(
        self, state: PolicyState, observation: Observation, action_mask: jax.Array | None = None
    ) -> jax.Array:
        """Distribution parameters ``[..., P]`` for observations ``[..., *shape]``, forbidden actions masked."""
        output = self.actor.apply({"params": state.params["actor"]}, self._normalized(state, observation))
        assert isinstance(output, jax.Array)
        if action_mask is not None and isinstance(self.distribution, Categorical):
            return self.distribution.apply_mask(output, action_mask)
        return output

    def value(self, state: PolicyState, observation: Observation) -> jax.Array:
        """State values ``[...]``; only with a critic."""
        assert self.critic is not None, "this policy has no critic: bootstrap=False"
        value = self.critic.apply({"params": state.params["critic"]}, self._normalized(state, observation))
        assert isinstance(value, jax.Array)
        return value

    def to_world(self, action: jax.Array) -> jax.Array:
        """The policy's action in the world's units.

        A Gaussian lives on [-1, 1] whatever the bounds of the box are: it is stretched to them and clipped.
        """
        space = self.action_space
        if not isinstance(space, spaces.Box):
            return action
        if not space.is_bounded:
            return jnp.clip(action, space.low, space.high)
        return jnp.clip(space.low + (action + 1.0) * 0.5 * (space.high - space.low), space.low, space.high)

    def update_statistics(self, state: PolicyState, observation: Observation) -> PolicyState:
        """Adds a batch of raw observations ``[N, *shape]`` to the statistics, if any are kept."""
        if state.statistics is None:
            return state
        return state.replace(statistics=normalize.update(state.statistics, self._encode(observation)))

    def _encode(self, observation: Observation) -> jax.Array:
        return spaces.encode(self.observation_space, observation)

    def _normalized(self, state: PolicyState, observation: Observation) -> jax.Array:
        encoded = self._encode(observation)
        return encoded if state.statistics is None else normalize.normalize(state.statistics, encoded)


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
    torso = "cnn" if image and config.network in ("cnn", "auto") else "mlp"
    rank = len(observation_space.shape) if isinstance(observation_space, spaces.Box) else 1
    distribution = distributions.for_space(action_space)
    gaussian = isinstance(distribution, distributions.Gaussian)
    n_outputs = distribution.n_uniforms if gaussian else distribution.n_parameters
    # Convolutions end in a dense layer of their own.
    default_widths = () if torso == "cnn" else (64, 64)
    widths = default_widths if config.net_arch is None else config.net_arch
    critic_widths = widths if config.critic_net_arch is None else config.critic_net_arch
    critic = Critic(torso, rank, critic_widths, config.activation) if config.bootstrap else None
    return Policy(
        observation_space=observation_space,
        action_space=action_space,
        distribution=distribution,
        actor=Actor(torso, rank, widths, config.activation, n_outputs, gaussian, config.log_std_init),
        critic=critic,
        normalize_observations=config.normalize_observations,
    )


def _example_observation(space: spaces.Space) -> Observation:
    if isinstance(space, spaces.Dict):
        return {name: _example_observation(part) for name, part in space.spaces}
    dtype = jnp.result_type(float) if isinstance(space, spaces.Box) else jnp.int32
    return jax.ShapeDtypeStruct(space.shape, dtype)
