"""What comes out of a VecEnv: brought to one form where it comes in, and what the wrappers did to it."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

import numpy as np
from gymnasium import spaces
from stable_baselines3.common.vec_env import (
    SubprocVecEnv,
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
from sb3_bridge.clones.processes import died, reach, uninterrupted
from sb3_bridge.numbers import LARGEST, BadNumberError, bad_entry

_KNOWN = (VecNormalize, VecTransposeImage, VecExtractDictObs)
_UNCHANGING = (VecMonitor, VecCheckNan, VecVideoRecorder)


class VecStep(NamedTuple):
    """One step of N environments, checked and owned: a VecEnv may write over what it returned."""

    observation: Any  # [N, *shape], a dict of such arrays for Dict; of the next episode where one ended
    rewards: np.ndarray  # float32 [N]
    dones: np.ndarray  # bool [N]
    truncated: np.ndarray  # bool [N], ended by a time limit alone
    infos: list[dict[str, Any]]


def step(env: VecEnv, actions: np.ndarray, number: int) -> VecStep:
    """Steps all environments with a copy of ``actions`` ``[N, *A]``; ``number`` is the step's, for errors.

    Raises:
      ValueError: NaN or inf, or a wrong shape, in an observation or a reward; names environment, step and field.
    """
    observation, rewards, dones, infos = _stepped(env, actions.copy())
    rewards, dones = np.array(rewards, np.float32), np.array(dones, bool)
    if rewards.shape != (env.num_envs,) or dones.shape != (env.num_envs,):
        name, array = ("dones", dones) if rewards.shape == (env.num_envs,) else ("rewards", rewards)
        raise ValueError(
            f"{type(env).__name__}.step() gave {name} of shape {list(array.shape)}, expected [{env.num_envs}]"
        )
    where = f"at step {number} of the rollout"
    _check_normalized(env, where)
    _check_finite("reward", rewards, where)
    observation = checked_observation(env, observation, where)
    pairs = zip(dones.tolist(), infos, strict=True)
    truncated = np.array([done and bool(info.get("TimeLimit.truncated", False)) for done, info in pairs])
    return VecStep(observation, rewards, dones, truncated, list(infos))


def _stepped(env: VecEnv, actions: np.ndarray) -> Any:
    """``env.step(actions)``; a worker that dies is named, and an interrupt leaves none of its answers to the next call."""
    base = env.unwrapped
    if not isinstance(base, SubprocVecEnv) or type(env).step is not VecEnv.step:
        return env.step(actions)
    try:
        try:
            with uninterrupted():
                env.step_async(actions)
            for index in range(base.num_envs):
                reach(base, index, "")
            with uninterrupted():
                return env.step_wait()
        except KeyboardInterrupt:
            if base.waiting:
                base.step_wait()
            raise
    except (EOFError, ConnectionError) as error:
        raise died(base) from error


def checked_observation(env: VecEnv, observation: Any, where: str) -> Any:
    """A copy of the observations ``[N, *shape]`` of all environments; errors as those of ``step``."""
    owned = _owned(observation)
    for name, array, space in _fields(owned, env.observation_space):
        expected = (env.num_envs, *space.shape)  # type: ignore[misc]
        if array.shape != expected:
            raise ValueError(
                f"Unexpected observation shape {array.shape} {where}: please use {expected} for {name} of"
                f" {env.num_envs} environments with the observation space {space}"
            )
        _check_finite(name, array, where)
    return owned


def _check_finite(name: str, array: np.ndarray, where: str) -> None:
    if index := bad_entry(array):
        entry = f" in its entry {list(index[1:])}" if len(index) > 1 else ""
        raise BadNumberError(
            f"found invalid values {where}: {name} of environment {index[0]} is {array[index]}{entry}; it must be"
            f" finite, and below {LARGEST:g}: check the environment (SB3's VecCheckNan tells the action before it)"
        )


def _check_normalized(env: VecEnv, where: str) -> None:
    """What went into VecNormalize, which spreads it over all environments, or clips it away."""
    while isinstance(env, VecEnvWrapper):
        if isinstance(env, VecNormalize):
            _check_finite("reward", np.asarray(env.old_reward), where)
            original = getattr(env, "old_obs", np.zeros(0))
            for name, part in (
                original.items() if isinstance(original, dict) else [("the observation", original)]
            ):
                _check_finite(name, np.asarray(part), where)
        env = env.venv


def reached_observation(result: VecStep, needed: np.ndarray, space: spaces.Space) -> Any:
    """Observations ``[N, *shape]`` that a step reached: where an episode ended its last one, not the next one's first.

    Only those that are ``needed`` bool ``[N]`` must be there, in the shape of the others: else a ValueError.
    """
    if not result.dones.any():
        return result.observation
    reached = _owned(result.observation)
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


def _owned(tree: Any) -> Any:
    return {name: np.array(part) for name, part in tree.items()} if isinstance(tree, dict) else np.array(tree)


def unwrapped(env: VecEnv) -> tuple[VecEnv, list[VecEnvWrapper]]:
    """The innermost VecEnv, and its wrappers, innermost first."""
    wrappers: list[VecEnvWrapper] = []
    while isinstance(env, VecEnvWrapper):
        wrappers.insert(0, env)
        env = env.venv
    return env, wrappers


def _through(wrappers: Iterable[VecEnvWrapper], observations: Any) -> Any:
    """What wrappers make of observations; statistics are read, never updated."""
    for wrapper in wrappers:
        if isinstance(wrapper, VecTransposeImage):
            observations = wrapper.transpose_observations(observations)
        elif isinstance(wrapper, VecExtractDictObs):
            observations = observations[wrapper.key]
        elif isinstance(wrapper, VecNormalize):
            observations = wrapper.normalize_obs(observations)
    return observations


class View(NamedTuple):
    """What ``wrappers``, innermost first, make of what an environment gives."""

    wrappers: list[VecEnvWrapper]

    def original(self, observations: Any) -> Any:
        """As a reward function sees them: through all wrappers but VecNormalize."""
        return _through((one for one in self.wrappers if not isinstance(one, VecNormalize)), observations)

    def seen(self, observations: Any) -> Any:
        """As the policy sees them."""
        return _through(self.wrappers, observations)

    def rewards(self, rewards: np.ndarray) -> np.ndarray:
        """The environments' rewards ``[n]`` as the learner sees them."""
        for wrapper in self.wrappers:
            if isinstance(wrapper, VecNormalize):
                rewards = wrapper.normalize_reward(rewards)
        return rewards


def find_view(env: VecEnv) -> tuple[VecEnv, View]:
    """The innermost VecEnv, and what its wrappers do; raises Unclonable where that is not known of one."""
    base, wrappers = unwrapped(env)
    for wrapper in reversed(wrappers):
        if isinstance(wrapper, VecFrameStack):
            raise Unclonable(
                "VecFrameStack keeps frames outside of the environments, where no branch has its own: stack them in each"
                " environment with gymnasium.wrappers.FrameStackObservation"
            )
        if type(wrapper) not in _KNOWN + _UNCHANGING:
            raise Unclonable(
                f"what {type(wrapper).__name__} does to observations and rewards is not known for branches: use a"
                " gymnasium.Wrapper around each environment"
            )
    return base, View(wrappers)


class Unnormalized:
    """What environments gave in the last step or reset before VecNormalize changed it, as the policy's space has it.

    Raises ValueError where a wrapper outside of VecNormalize changes observations once more, in a way not known here.
    """

    def __init__(self, env: VecEnv):
        wrappers = unwrapped(env)[1]
        places = [index for index, one in enumerate(wrappers) if isinstance(one, VecNormalize)]
        self._normalizer: Any = wrappers[places[-1]] if places else None
        self._outside = wrappers[places[-1] + 1 :] if places else []
        self.changes_observations = self._normalizer is not None and self._normalizer.norm_obs
        for wrapper in self._outside if self.changes_observations else ():
            is_other = wrapper.observation_space != wrapper.venv.observation_space
            if is_other and not isinstance(wrapper, VecTransposeImage):
                raise ValueError(
                    f"reward_function sees observations as they were before VecNormalize, but {type(wrapper).__name__}"
                    f" outside of it changes them again: put VecNormalize outside of {type(wrapper).__name__}"
                )

    def observation(self, seen: Any) -> Any:
        """``[N, *shape]``; ``seen`` itself where nothing changes it."""
        if not self.changes_observations:
            return seen
        return _owned(_through(self._outside, self._normalizer.get_original_obs()))

    def step(self, result: VecStep) -> VecStep:
        """The last step as it was, last observations of episodes included."""
        if self._normalizer is not None and self._normalizer.norm_reward:
            result = result._replace(rewards=self._normalizer.get_original_reward())
        if not self.changes_observations:
            return result
        unnormalize, key = self._normalizer.unnormalize_obs, "terminal_observation"
        infos = [{key: unnormalize(info[key])} if key in info else {} for info in result.infos]
        return result._replace(observation=self.observation(result.observation), infos=infos)
