"""The bridge to Stable-Baselines3 and Gymnasium; importing it registers the ids ``gymnax/<id>``."""

from sb3_bridge.grpo import GRPO
from sb3_bridge.policies import CnnPolicy, MlpPolicy, MultiInputPolicy
from sb3_bridge.registration import register_envs
from sb3_bridge.vec_env import GymnaxVecEnv

__all__ = ["GRPO", "CnnPolicy", "GymnaxVecEnv", "MlpPolicy", "MultiInputPolicy", "register_envs"]

register_envs()
