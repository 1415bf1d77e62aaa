"""Action masks: which actions environments allow, asked for as sb3-contrib's MaskablePPO asks."""

from __future__ import annotations

from typing import Any

import gymnasium
import numpy as np
from stable_baselines3.common.vec_env import DummyVecEnv, SubprocVecEnv, VecEnv

from sb3_bridge.clones.core_state import ACTION_MASKS, choices_of
from sb3_bridge.clones.processes import died, uninterrupted


class InfoMasks(gymnasium.Wrapper):
    """Gives as ``action_masks()`` what an environment tells in ``info["action_mask"]``, as Gymnasium's Taxi does.

    Raises:
      ValueError: a reset, or a step that ends no episode, tells no mask.
    """

    _mask: np.ndarray | None = None

    def reset(self, **arguments: Any) -> tuple[Any, dict[str, Any]]:
        observation, info = self.env.reset(**arguments)
        self._take(info, "reset()", is_needed=True)
        return observation, info

    def step(self, action: Any) -> tuple[Any, Any, bool, bool, dict[str, Any]]:
        observation, reward, terminated, truncated, info = self.env.step(action)
        self._take(info, f"step({action!r})", is_needed=not (terminated or truncated))
        return observation, reward, terminated, truncated, info

    def action_masks(self) -> np.ndarray:
        """The mask of the last reset or step; see sb3-contrib's ``MaskablePPO``."""
        if self._mask is None:
            raise gymnasium.error.ResetNeeded(f"{ACTION_MASKS}() was called before reset() told a mask")
        return self._mask

    def _take(self, info: dict[str, Any], where: str, *, is_needed: bool) -> None:
        mask = info.get("action_mask")
        if mask is None and is_needed:
            raise ValueError(
                f"{where} of {self.env} told no info['action_mask'], which InfoMasks needs of every state in which an action"
                " follows: let the environment tell it each time, or give it a method action_masks()"
            )
        self._mask = (
            None if mask is None else np.array(mask)
        )  # a copy: the environment may write into its own


def has_masks(env: VecEnv) -> bool:
    """Whether the environments tell which actions they allow.

    Raises:
      ValueError: some do and some do not; or they do, and the actions are those of a Box.
    """
    base = env.unwrapped
    try:
        found = env.has_attr(ACTION_MASKS)
        if found and not isinstance(
            base, SubprocVecEnv
        ):  # which would pickle the environment with its method
            found = callable(env.get_attr(ACTION_MASKS)[0])
    except (AttributeError, NotImplementedError):  # a VecEnv that knows no attributes
        found = False
    if not found and isinstance(base, DummyVecEnv):
        have = [one.has_wrapper_attr(ACTION_MASKS) for one in base.envs]
        if any(have) and not all(have):
            raise ValueError(
                f"environment {have.index(True)} has {ACTION_MASKS}(), environment {have.index(False)} has not: give it to all"
            )
    if found and isinstance(env.action_space, gymnasium.spaces.Box):
        raise ValueError(
            f"the environment has {ACTION_MASKS}(), but {env.action_space} has no actions to forbid: rename the method, or make"
            " the actions Discrete"
        )
    return found


def read_masks(env: VecEnv, where: str) -> np.ndarray:
    """What the environments allow now, bool ``[N, n]``; errors as those of :func:`checked_masks`, which say ``where``."""
    base = env.unwrapped
    try:
        with uninterrupted():
            masks = env.env_method(ACTION_MASKS)
    except (EOFError, ConnectionError) as error:
        if isinstance(base, SubprocVecEnv):  # a worker died
            raise died(base) from error
        raise
    return checked_masks(masks, env.action_space, env.num_envs, f"{ACTION_MASKS}() {where}")


def checked_masks(
    masks: Any, space: gymnasium.Space, n: int, name: str, row: str = "environment"
) -> np.ndarray:
    """Masks for ``n`` states, bool ``[n, P]``; for errors ``name`` is whose they are, and a state's is that of a ``row``.

    Raises:
      ValueError: a wrong shape, anything but bool (or integers that are 0 or 1), or a state in which no action is allowed.
    """
    nvec = choices_of(space)
    try:
        array = np.asarray(masks)
    except ValueError:  # rows of different lengths
        array = np.asarray(None)
    expected = (n, sum(nvec))
    if array.shape != expected or not nvec:
        got = f"shape {list(array.shape)}" if array.dtype != object else "rows that are no equal arrays"
        needs = "discrete actions" if not nvec else f"bool {list(expected)} for {n} states with {space}"
        raise ValueError(f"{name} gave {got}, expected {needs}")
    if array.dtype != bool and not (array.dtype.kind in "iu" and np.isin(array, (0, 1)).all()):
        raise ValueError(f"{name} gave {array.dtype} numbers, expected bool: True where an action is allowed")
    array = array.astype(bool)
    if len(nvec) == 1:
        allowed = array.any(axis=1)
    else:
        starts = np.cumsum((0, *nvec[:-1]))
        allowed = np.logical_or.reduceat(array, starts, axis=1).all(axis=1)
    if not allowed.all():
        which = int(np.flatnonzero(~allowed)[0])
        part = "" if len(nvec) == 1 else " of one of its parts"
        raise ValueError(
            f"{name} allows no action{part} in {row} {which}: an episode that cannot go on must end (terminated=True)"
        )
    return array
