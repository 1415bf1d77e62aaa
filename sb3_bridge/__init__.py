"""The bridge to Stable-Baselines3 and Gymnasium; importing it registers the ids ``gymnax/<id>``."""

try:
    from sb3_bridge.grpo import GRPO
    from sb3_bridge.gymnax.registration import register_envs
    from sb3_bridge.gymnax.vec_env import GymnaxVecEnv, WorldVecEnv
    from sb3_bridge.masks import InfoMasks
    from sb3_bridge.planner import Planner
    from sb3_bridge.policies import CnnPolicy, MlpPolicy, MultiInputPolicy
    from sb3_bridge.twins.registry import register_twin
except ModuleNotFoundError as error:
    if (error.name or "").partition(".")[0] not in ("stable_baselines3", "torch", "gymnasium"):
        raise
    raise ImportError(
        f"sb3_bridge needs {error.name}, which is not installed: pip install 'grpo-jax[sb3]' (in a clone: '.[sb3]')"
    ) from error

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
