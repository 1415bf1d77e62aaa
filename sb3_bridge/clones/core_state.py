"""The means by which an environment's state is saved and restored, beyond its Python attributes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import gymnasium
import numpy as np

from sb3_bridge.clones.copying import Replica, copy_value, is_mujoco, mujoco_module

Functions = tuple[Callable[[gymnasium.Env], Any], Callable[[gymnasium.Env, Any], None]]
"""A user's ``(save, restore)``: ``save(env.unwrapped) -> state``, ``restore(env.unwrapped, state)``."""

MUJOCO = "MuJoCo state"
"""The name of that means."""

# What a MuJoCo step leaves behind and the next one may read before it computes it anew. They lag one substep behind
# the positions, so a forward pass would not give them back.
_MUJOCO_DERIVED = [
    "xpos",
    "xquat",
    "xmat",
    "xipos",
    "ximat",
    "xanchor",
    "xaxis",
    "geom_xpos",
    "geom_xmat",
    "site_xpos",
    "site_xmat",
    "subtree_com",
    "subtree_linvel",
    "subtree_angmom",
    "cinert",
    "cvel",
    "cdof",
    "cacc",
    "cfrc_int",
    "cfrc_ext",
    "sensordata",
    "qacc",
    "qfrc_actuator",
    "qfrc_passive",
    "qfrc_bias",
    "qfrc_constraint",
    "actuator_force",
    "actuator_length",
    "actuator_velocity",
    "ten_length",
    "ten_velocity",
    "energy",
]


class Core:
    """How the innermost environment is saved, beyond its Python attributes."""

    name = "attributes"
    with_attributes = True
    hidden: frozenset[str] = frozenset()  # attributes that are not saved as such

    def save(self, env: Any, memo: dict[int, Any]) -> Any:
        return None

    def restore(self, env: Any, saved: Any, replica: Replica) -> None:
        pass


class _ByFunctions(Core):
    """The state by a pair of functions; Python attributes are theirs to save."""

    with_attributes = False

    def __init__(self, name: str, save: Callable[[Any], Any], restore: Callable[[Any, Any], Any]):
        self.name, self._save, self._restore = name, save, restore

    def save(self, env: Any, memo: dict[int, Any]) -> Any:
        return copy_value(self._save(env), memo)

    def restore(self, env: Any, saved: Any, replica: Replica) -> None:
        self._restore(env, copy_value(saved, dict(replica.memo)))


class _ByMuJoCo(Core):
    """MuJoCo's integration state, what is derived from it, and Python attributes."""

    name = MUJOCO
    hidden = frozenset({"model", "data"})

    def __init__(self, env: Any):
        mujoco = mujoco_module()
        self._spec = mujoco.mjtState.mjSTATE_INTEGRATION
        self._size = mujoco.mj_stateSize(env.model, self._spec)
        self._get, self._set = mujoco.mj_getState, mujoco.mj_setState
        self._data: Any = None
        self._views: list[np.ndarray] = []

    @staticmethod
    def _derived(data: Any) -> list[np.ndarray]:
        views = (getattr(data, name, None) for name in _MUJOCO_DERIVED)
        return [view.reshape(-1) for view in views if view is not None and view.size]

    def save(self, env: Any, memo: dict[int, Any]) -> Any:
        if env.data is not self._data:
            self._data, self._views = env.data, self._derived(env.data)
        state = np.empty(self._size)
        self._get(env.model, env.data, state, self._spec)
        return state, np.concatenate(self._views)

    def restore(self, env: Any, saved: Any, replica: Replica) -> None:
        state, derived = saved
        self._set(env.model, env.data, state, self._spec)
        if replica.extra is None or replica.extra[0] is not env.data:
            replica.extra = (env.data, self._derived(env.data))
        start = 0
        for view in replica.extra[1]:
            end = start + len(view)
            view[:] = derived[start:end]
            start = end


def _ale_save(env: Any) -> Any:
    try:
        return env.clone_state(include_rng=True)
    except TypeError:
        return env.clone_state()


def _ale_restore(env: Any, state: Any) -> None:
    env.restore_state(state)


def means_for(env: gymnasium.Env, functions: Functions | None = None) -> list[str]:
    """Names of the means that an environment may be saved by, cheapest first; a user's pair leaves no other."""
    core = env.unwrapped
    if functions is not None:
        return ["snapshot functions"]
    found = []
    if callable(getattr(core, "get_state", None)) and callable(getattr(core, "set_state", None)):
        found.append("get_state/set_state")
    if is_mujoco(core):
        found.append(MUJOCO)
    if callable(getattr(core, "clone_state", None)) and callable(getattr(core, "restore_state", None)):
        found.append("clone_state/restore_state")
    return [*found, "attributes", "deepcopy"]


def core_for(core: Any, means: str, functions: Functions | None) -> Core:
    if means == "snapshot functions":
        assert functions is not None
        return _ByFunctions(means, *functions)
    if means == "get_state/set_state":
        return _ByFunctions(means, lambda env: env.get_state(), lambda env, state: env.set_state(state))
    if means == MUJOCO:
        return _ByMuJoCo(core)
    if means == "clone_state/restore_state":
        return _ByFunctions(means, _ale_save, _ale_restore)
    return Core()
