"""What a preset of ``grpo_jax`` is as arguments of the SB3 object."""

from __future__ import annotations

import math
from typing import Any

from stable_baselines3.common.type_aliases import Schedule
from stable_baselines3.common.utils import LinearSchedule

import grpo_jax
from grpo_jax import spaces
from grpo_jax.config import Decay, GRPOConfig, field_names
from grpo_jax.policies.networks import CNN
from sb3_bridge.gymnax.registration import NAMESPACE
from sb3_bridge.gymnax.vec_env import GymnaxVecEnv

DECAYING = {
    "learning_rate": "learning_rate_decay",
    "clip_range": "clip_range_decay",
    "clip_range_high": "clip_range_decay",
    "ent_coef": "ent_coef_decay",
    "persistence": "persistence_decay",
}
"""Fields that become a schedule of the remaining progress, and what says which."""

POLICY = (
    "network",
    "share_features_extractor",
    "net_arch",
    "critic_net_arch",
    "activation",
    "log_std_init",
)
"""Fields that make the policy: its name and ``policy_kwargs``."""

MISSING = (
    "max_branches",
    "normalize_observations",
    "sapo_temperature",
    "sapo_temperature_negative",
    "tpo_temperature",
    "optimizer",
)
"""Fields that the SB3 object has no argument for: only their defaults can be had. All others are its arguments."""


class CosineSchedule:
    """From ``start`` to 0 along half a cosine of the remaining progress, which goes from 1 to 0."""

    def __init__(self, start: float):
        self.start = start

    def __call__(self, progress_remaining: float) -> float:
        return self.start * 0.5 * (1.0 - math.cos(math.pi * progress_remaining))

    def __repr__(self) -> str:
        return f"CosineSchedule(start={self.start})"


def find_preset(env: str | GymnaxVecEnv) -> tuple[str, GymnaxVecEnv]:
    """The id whose preset is asked for, and the environments: those given, or as many as the preset steps."""
    if isinstance(env, GymnaxVecEnv):
        if env.spec is None:
            raise ValueError(
                "env was not made from an id, and presets go by id: use GymnaxVecEnv('CartPole-v1', ...), or"
                " GRPO('MlpPolicy', env, ...) with settings of your own"
            )
        return _checked(env.spec.id.removeprefix(f"{NAMESPACE}/")), env
    if not isinstance(env, str):
        raise TypeError(f"env={env!r} must be a gymnax id such as 'CartPole-v1', or a GymnaxVecEnv")
    env_id = env.removeprefix(f"{NAMESPACE}/")
    if env_id not in grpo_jax.preset_ids():
        grpo_jax.make(env_id)  # says which ids there are
    config = grpo_jax.preset(_checked(env_id))
    return env_id, GymnaxVecEnv(env_id, n_envs=config.n_envs, render_mode="rgb_array")


def arguments_of(config: GRPOConfig, observation_space: spaces.Space) -> dict[str, Any]:
    """Arguments of ``GRPO``, ``env`` apart, that mean what the config means.

    Rates that decay become schedules of the remaining progress. SB3 asks them when a rollout is done, ``grpo_jax`` before
    it begins: they are one rollout ahead here, and 0 in the last one, as PPO's are.

    Args:
      config: the settings; ``n_envs`` is the environments' matter.
      observation_space: of the world, for which ``network="auto"`` chooses.

    Raises:
      ValueError: a field has no counterpart, or is an optax schedule; names it and what to use.
    """
    default = GRPOConfig()
    for name in MISSING:
        if getattr(config, name) != getattr(default, name):
            raise ValueError(
                f"{name}={getattr(config, name)!r} has no counterpart in sb3_bridge.GRPO: use grpo_jax.train, or"
                f" {name}={getattr(default, name)!r}"
            )
    elsewhere = {"n_envs", *DECAYING, *DECAYING.values(), *POLICY, *MISSING}
    given = {name: getattr(config, name) for name in field_names() if name not in elsewhere}
    for name, decay in DECAYING.items():
        given[name] = _schedule(name, getattr(config, name), getattr(config, decay))
    policy, policy_kwargs = _policy(config, observation_space)
    return {"policy": policy, **given, "policy_kwargs": policy_kwargs}


def _checked(env_id: str) -> str:
    if env_id not in grpo_jax.preset_ids():
        raise ValueError(
            f"env={env_id!r} has no preset, but {', '.join(grpo_jax.preset_ids())} have: use"
            f" GRPO('MlpPolicy', '{NAMESPACE}/{env_id}', ...) with settings of your own"
        )
    return env_id


def _schedule(name: str, value: Any, decay: Decay) -> float | Schedule | None:
    if callable(value):
        raise ValueError(
            f"{name}={value!r} is a schedule of optimizer steps, SB3's are of the remaining progress: use a number and"
            f" {DECAYING[name]}"
        )
    if value is None or decay == "none":
        return value
    return LinearSchedule(value, 0.0, 1.0) if decay == "linear" else CosineSchedule(value)


def _policy(config: GRPOConfig, observation_space: spaces.Space) -> tuple[str, dict[str, Any]]:
    """The name of the policy and its arguments: the networks that :func:`grpo_jax.make_policy` makes."""
    convolutional = config.network != "mlp" and spaces.is_image(observation_space)
    arguments: dict[str, Any] = {
        "activation_fn": config.activation,
        "log_std_init": config.log_std_init,
        "share_features_extractor": config.share_features_extractor,
    }
    if config.net_arch is not None or config.critic_net_arch is not None:
        default = () if convolutional else (64, 64)
        actor = default if config.net_arch is None else config.net_arch
        critic = actor if config.critic_net_arch is None else config.critic_net_arch
        arguments["net_arch"] = {"pi": list(actor), "vf": list(critic)}
    if not convolutional:
        return "MlpPolicy", arguments
    # By name: maps of bits in 4 to 10 channels are no images to SB3.
    arguments["features_extractor_class"] = CNN
    arguments["features_extractor_kwargs"] = {"activation": config.activation}
    return "CnnPolicy", arguments
