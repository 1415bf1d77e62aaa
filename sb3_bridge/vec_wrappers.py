"""What the wrappers of a VecEnv make of the observations and rewards of a branch."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
from stable_baselines3.common.vec_env import (
    VecCheckNan,
    VecEnv,
    VecEnvWrapper,
    VecExtractDictObs,
    VecFrameStack,
    VecMonitor,
    VecNormalize,
    VecTransposeImage,
    VecVideoRecorder,
)

from sb3_bridge.clones.copying import Unclonable

_UNCHANGING = (VecMonitor, VecCheckNan, VecVideoRecorder)


@dataclasses.dataclass(frozen=True)
class View:
    """What the VecEnv's wrappers make of what an environment gives; statistics are read, never updated.

    Attributes:
      wrappers: that change observations or rewards, innermost first.
    """

    wrappers: tuple[VecEnvWrapper, ...]

    def original(self, observations: Any) -> Any:
        """As a reward function sees them: all wrappers but VecNormalize."""
        return self._through(observations, normalized=False)

    def seen(self, observations: Any) -> Any:
        """As the policy sees them."""
        return self._through(observations, normalized=True)

    def _through(self, observations: Any, normalized: bool) -> Any:
        for wrapper in self.wrappers:
            if isinstance(wrapper, VecTransposeImage):
                observations = wrapper.transpose_observations(observations)
            elif isinstance(wrapper, VecExtractDictObs):
                observations = observations[wrapper.key]
            elif normalized and isinstance(wrapper, VecNormalize):
                observations = wrapper.normalize_obs(observations)
        return observations

    def rewards(self, rewards: np.ndarray) -> np.ndarray:
        """The environments' rewards ``[n]`` as the learner sees them."""
        for wrapper in self.wrappers:
            if isinstance(wrapper, VecNormalize):
                rewards = wrapper.normalize_reward(rewards)
        return rewards


def find_view(env: VecEnv) -> tuple[VecEnv, View]:
    """The innermost VecEnv, and what its wrappers do.

    Raises:
      Unclonable: a wrapper whose effect on a branch is not known.
    """
    found: list[VecEnvWrapper] = []
    while isinstance(env, VecEnvWrapper):
        if type(env) in (VecNormalize, VecTransposeImage, VecExtractDictObs):
            found.insert(0, env)
        elif isinstance(env, VecFrameStack):
            raise Unclonable(
                "VecFrameStack keeps frames outside of the environments, where no branch has its own: stack them in each"
                " environment with gymnasium.wrappers.FrameStackObservation"
            )
        elif type(env) not in _UNCHANGING:
            raise Unclonable(
                f"what {type(env).__name__} does to observations and rewards is not known for branches: use a"
                " gymnasium.Wrapper around each environment"
            )
        env = env.venv
    return env, View(tuple(found))
