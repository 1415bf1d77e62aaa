"""Policies with the contract of SB3's, over the flax networks of ``grpo_jax``; files name them by this module."""

from grpo_jax.policies.networks import CNN
from sb3_bridge.policies.optimizer import Optimizer
from sb3_bridge.policies.policy import CnnPolicy, GRPOPolicy, MlpPolicy, MultiInputPolicy

__all__ = ["CNN", "CnnPolicy", "GRPOPolicy", "MlpPolicy", "MultiInputPolicy", "Optimizer"]
