"""The bridge to Stable-Baselines3 and Gymnasium; importing it registers the ids ``gymnax/<id>``."""

from sb3_bridge.grpo import GRPO
from sb3_bridge.gymnax.registration import register_envs
from sb3_bridge.gymnax.vec_env import GymnaxVecEnv, WorldVecEnv
from sb3_bridge.masks import InfoMasks
from sb3_bridge.planner import Planner
from sb3_bridge.policies import CnnPolicy, MlpPolicy, MultiInputPolicy
from sb3_bridge.twins.registry import register_twin

__all__ = [
    "GRPO",
    "CnnPolicy",
    "GymnaxVecEnv",
    "InfoMasks",
    "MlpPolicy",
    "MultiInputPolicy",
    "Planner",
    "WorldVecEnv",
    "register_envs",
    "register_twin",
]

register_envs()
