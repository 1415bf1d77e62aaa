"""What a preset of ``grpo_jax`` is as arguments of the SB3 object."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from stable_baselines3.common.utils import LinearSchedule

import grpo_jax
from grpo_jax import spaces
from grpo_jax.config import GRPOConfig, field_names
from grpo_jax.policies.networks import CNN
from sb3_bridge.gymnax.registration import NAMESPACE
from sb3_bridge.gymnax.vec_env import WorldVecEnv

RATES = ("learning_rate", "clip_range", "clip_range_high", "ent_coef", "persistence")
DECAYING = {name: f"{name.removesuffix('_high')}_decay" for name in RATES}
"""Fields that become a schedule of the remaining progress, and what says which."""

POLICY = ("network", "share_features_extractor", "net_arch", "critic_net_arch", "activation", "log_std_init")
"""Fields that make the policy: its name and ``policy_kwargs``."""

MISSING = (
    "max_branches",
    "n_shards",
    "normalize_observations",
    "sapo_temperature",
    "sapo_temperature_negative",
    "tpo_temperature",
    "optimizer",
)
"""Fields that the SB3 object has no argument for: only their defaults can be had. All others are its arguments."""


@dataclass(frozen=True)
class CosineSchedule:
    """From ``start`` to 0 along half a cosine of the remaining progress, which goes from 1 to 0."""

    start: float

    def __call__(self, progress_remaining: float) -> float:
        return self.start * 0.5 * (1.0 - math.cos(math.pi * progress_remaining))


def find_preset(env: str | WorldVecEnv) -> tuple[str, WorldVecEnv]:
    """The id whose preset is asked for, and the environments: those given, or as many as the preset steps."""
    env_id: Any = env
    if isinstance(env, WorldVecEnv):
        if env._env_id is None:
            raise ValueError(
                "env was not made from an id, and presets go by id: use WorldVecEnv('CartPole-v1', ...), or"
                " GRPO('MlpPolicy', env, ...) with settings of your own"
            )
        env_id = env._env_id
    if not isinstance(env_id, str):
        raise TypeError(
            f"env={env!r} must be a gymnax id such as 'CartPole-v1', one of a suite such as 'pgx/connect_four', or a WorldVecEnv"
        )
    env_id = env_id.removeprefix(f"{NAMESPACE}/")
    if env_id not in grpo_jax.preset_ids():
        grpo_jax.make(env_id)  # says which ids there are
        name = env_id if "/" in env_id else f"{NAMESPACE}/{env_id}"
        raise ValueError(
            f"env={env_id!r} has no preset, but {', '.join(grpo_jax.preset_ids())} have: use"
            f" GRPO('MlpPolicy', '{name}', ...) with settings of your own"
        )
    if isinstance(env, str):
        env = WorldVecEnv(env_id, grpo_jax.preset(env_id).n_envs, render_mode="rgb_array")
    return env_id, env


def arguments_of(config: GRPOConfig, observation_space: spaces.Space) -> dict[str, Any]:
    """Arguments of ``GRPO``, ``env`` apart, that mean what the config means.

    Rates that decay become schedules of the remaining progress. SB3 asks them when a rollout is done, ``grpo_jax`` before
    it begins: they are one rollout ahead here, and 0 in the last one, as PPO's are. A field that has no counterpart, or
    is an optax schedule, raises a ValueError.
    """
    values = {name: getattr(config, name) for name in field_names()}
    for name in MISSING:
        default = getattr(GRPOConfig(), name)
        if values[name] != default:
            raise ValueError(
                f"{name}={values[name]!r} has no counterpart in sb3_bridge.GRPO: use grpo_jax.train, or"
                f" {name}={default!r}"
            )
    for name, decay in DECAYING.items():
        value = values[name]
        if callable(value):
            raise ValueError(
                f"{name}={value!r} is a schedule of optimizer steps, SB3's are of the remaining progress: use a"
                f" number and {decay}"
            )
        if value is not None and values[decay] != "none":
            is_linear = values[decay] == "linear"
            values[name] = LinearSchedule(value, 0.0, 1.0) if is_linear else CosineSchedule(value)
    elsewhere = {"n_envs", *DECAYING.values(), *POLICY, *MISSING}
    given = {name: value for name, value in values.items() if name not in elsewhere}
    policy, policy_kwargs = _policy(config, observation_space)
    return {"policy": policy, **given, "policy_kwargs": policy_kwargs}


def _policy(config: GRPOConfig, observation_space: spaces.Space) -> tuple[str, dict[str, Any]]:
    """The name of the policy and its arguments: the networks that :func:`grpo_jax.make_policy` makes."""
    convolutional = config.network != "mlp" and spaces.is_image(observation_space)
    default = () if convolutional else (64, 64)
    actor = default if config.net_arch is None else config.net_arch
    critic = actor if config.critic_net_arch is None else config.critic_net_arch
    arguments: dict[str, Any] = {
        "activation_fn": config.activation,
        "log_std_init": config.log_std_init,
        "share_features_extractor": config.share_features_extractor,
        "net_arch": {"pi": list(actor), "vf": list(critic)},
    }
    if not convolutional:
        return "MlpPolicy", arguments
    # By name: maps of bits in 4 to 10 channels are no images to SB3.
    extractor = {
        "features_extractor_class": CNN,
        "features_extractor_kwargs": {"activation": config.activation},
    }
    return "CnnPolicy", arguments | extractor
