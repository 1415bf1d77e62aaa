"""What comes out of a VecEnv: brought to one form where it comes in, and what the wrappers did to it."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np
from gymnasium import spaces
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


class VecStep(NamedTuple):
    """One step of N environments, checked and owned: a VecEnv may write over what it returned.

    Attributes:
      observation: ``[N, *shape]``, a dict of such arrays for ``Dict``; of the next episode where one ended.
      rewards: ``[N]`` float32.
      dones: bool ``[N]``.
      truncated: bool ``[N]``, ended by a time limit alone.
      infos: of each environment.
    """

    observation: Any
    rewards: np.ndarray
    dones: np.ndarray
    truncated: np.ndarray
    infos: list[dict[str, Any]]


def step(env: VecEnv, actions: np.ndarray, number: int) -> VecStep:
    """Steps all environments, and checks what they return.

    Args:
      env: the environments.
      actions: ``[N, *A]``; lent to the environments as a copy.
      number: of the step, for errors.

    Raises:
      ValueError: NaN or inf, or a wrong shape, in an observation or a reward; names environment, step and field.
    """
    observation, rewards, dones, infos = env.step(actions.copy())
    rewards = np.array(rewards, np.float32)
    dones = np.array(dones).astype(bool)
    for name, array in (("rewards", rewards), ("dones", dones)):
        if array.shape != (env.num_envs,):
            raise ValueError(
                f"{type(env).__name__}.step() gave {name} of shape {list(array.shape)}, expected [{env.num_envs}]"
            )
    where = f"at step {number} of the rollout"
    _check_finite("reward", rewards, where)
    cut = [bool(info.get("TimeLimit.truncated", False)) for info in infos]
    return VecStep(
        checked_observation(env, observation, where), rewards, dones, dones & np.array(cut, bool), list(infos)
    )


def checked_observation(env: VecEnv, observation: Any, where: str) -> Any:
    """A copy of the observations ``[N, *shape]`` of all environments.

    Raises:
      ValueError: a wrong shape, NaN or inf; names the environment and the field.
    """
    owned = _map(np.array, observation)
    for name, array, space in _fields(owned, env.observation_space):
        expected = (env.num_envs, *(space.shape or ()))
        if array.shape != expected:
            raise ValueError(
                f"Unexpected observation shape {array.shape} {where}: please use {expected} for {name} of"
                f" {env.num_envs} environments with the observation space {space}"
            )
        _check_finite(name, array, where)
    return owned


def _check_finite(name: str, array: np.ndarray, where: str) -> None:
    if array.dtype.kind == "f" and not np.isfinite(array).all():
        index = tuple(int(i) for i in np.argwhere(~np.isfinite(array))[0])
        entry = f" in its entry {list(index[1:])}" if len(index) > 1 else ""
        raise ValueError(
            f"found invalid values {where}: {name} of environment {index[0]} is {array[index]}{entry}; it must be"
            " finite: check the environment (SB3's VecCheckNan tells the action before it)"
        )


def reached_observation(result: VecStep, needed: np.ndarray, space: spaces.Space) -> Any:
    """Observations that a step reached: where an episode ended its last one, not the next episode's first.

    Args:
      result: of the step.
      needed: bool ``[N]``, whose last observation anybody will look at.
      space: of one environment.

    Returns:
      ``[N, *shape]``; where an episode ended and ``needed`` is False, any observation.

    Raises:
      ValueError: a last observation that is needed is missing, or has another shape than the others.
    """
    if not result.dones.any():
        return result.observation
    reached = _map(np.array, result.observation)
    for index in np.flatnonzero(result.dones).tolist():
        final = result.infos[index].get("terminal_observation")
        for name, array, part in _fields(reached, space):
            value = final[name] if isinstance(final, dict) and isinstance(reached, dict) else final
            if value is not None and np.shape(value) == array.shape[1:]:
                array[index] = value
                if needed[index]:
                    _check_finite(f"the last observation ({name})", array, "at an episode's end")
            elif needed[index]:
                got = "is missing" if value is None else f"has shape {np.shape(value)}"
                raise ValueError(
                    f"Unexpected observation shape: info['terminal_observation'] of environment {index} {got}, please use"
                    f" {array.shape[1:]} for {name} of {part}. A VecEnvWrapper that changes observations must change this one"
                    " too; candidates='episodes' needs it only where a time limit cut the episode"
                )
    return reached


def _fields(tree: Any, space: spaces.Space) -> Iterator[tuple[str, np.ndarray, spaces.Space]]:
    if isinstance(space, spaces.Dict):
        for name, part in space.spaces.items():
            yield name, tree[name], part
    else:
        yield "the observation", tree, space


def _map(function: Any, tree: Any) -> Any:
    if isinstance(tree, dict):
        return {name: function(part) for name, part in tree.items()}
    return function(tree)


@dataclasses.dataclass(frozen=True)
class View:
    """What the VecEnv's wrappers make of what an environment gives; statistics are read, never updated.

    Attributes:
      wrappers: that change observations or rewards, innermost first.
    """

    wrappers: tuple[VecEnvWrapper, ...]

    def original(self, observations: Any) -> Any:
        """As a reward function sees them: through all wrappers but VecNormalize."""
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


class Unnormalized:
    """What environments gave before VecNormalize changed it, as the policy's space has it.

    Args:
      env: in all its wrappers.

    Raises:
      ValueError: a wrapper outside of VecNormalize changes observations once more, in a way that is not known here.
    """

    def __init__(self, env: VecEnv):
        outside: list[VecEnvWrapper] = []
        while isinstance(env, VecEnvWrapper) and not isinstance(env, VecNormalize):
            outside.insert(0, env)
            env = env.venv
        self._normalizer = env if isinstance(env, VecNormalize) else None
        self._transposed: list[VecTransposeImage] = []
        if self._normalizer is None or not self._normalizer.norm_obs:
            return
        for wrapper in outside:
            if isinstance(wrapper, VecTransposeImage):
                self._transposed.append(wrapper)
            elif wrapper.observation_space != wrapper.venv.observation_space:
                raise ValueError(
                    f"reward_function sees observations as they were before VecNormalize, but {type(wrapper).__name__}"
                    f" outside of it changes them again: put VecNormalize outside of {type(wrapper).__name__}"
                )

    @property
    def changes_observations(self) -> bool:
        """Whether what the policy sees differs from what environments give."""
        return self._normalizer is not None and self._normalizer.norm_obs

    def observation(self, seen: Any) -> Any:
        """Of the last step or reset, ``[N, *shape]``; ``seen`` itself where nothing changes it."""
        if self._normalizer is None or not self._normalizer.norm_obs:
            return seen
        return self._transpose(self._normalizer.get_original_obs())

    def rewards(self, seen: np.ndarray) -> np.ndarray:
        """Of the last step, ``[N]``."""
        if self._normalizer is None or not self._normalizer.norm_reward:
            return seen
        return self._normalizer.get_original_reward()

    def final(self, infos: list[dict[str, Any]]) -> list[dict[str, Any]]:
        """Infos whose ``terminal_observation`` is unnormalised."""
        if self._normalizer is None or not self._normalizer.norm_obs:
            return infos
        normalizer, key = self._normalizer, "terminal_observation"
        return [{key: normalizer.unnormalize_obs(info[key])} if key in info else {} for info in infos]

    def _transpose(self, observation: Any) -> Any:
        for wrapper in self._transposed:
            observation = wrapper.transpose_observations(observation)
        return observation
