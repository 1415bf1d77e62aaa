"""Policies with the contract of SB3's, over the flax networks of ``grpo_jax``."""

from sb3_bridge.policies.policy import CnnPolicy, GRPOPolicy, MlpPolicy, MultiInputPolicy

__all__ = ["CnnPolicy", "GRPOPolicy", "MlpPolicy", "MultiInputPolicy"]
