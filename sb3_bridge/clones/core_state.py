"""How the state of an innermost environment is saved and restored, beyond its Python attributes."""

from __future__ import annotations

import copy
import sys
from collections.abc import Callable
from typing import Any

import gymnasium
import numpy as np

from sb3_bridge.clones.copying import Memo, copy_value, deep_copy

Functions = tuple[Callable[[gymnasium.Env], Any], Callable[[gymnasium.Env, Any], None]]
"""A user's ``(save, restore)``: ``save(env.unwrapped) -> state``, ``restore(env.unwrapped, state)``."""

MUJOCO, DEEPCOPY = "MuJoCo state", "deepcopy"


class Core:
    """Nothing beyond the attributes.

    Attributes:
      name: for the log.
      hidden: attributes that are not saved as such.
      by_itself: whether a replica's innermost environment may be the original's own deep copy.
    """

    name = "attributes"
    hidden: frozenset[str] = frozenset()
    by_itself = False

    def blank(self, env: Any, twin: Any) -> None:
        """Gives a new replica what is not saved."""

    def save(self, env: Any, memo: Memo) -> Any:
        """The state beyond the attributes."""

    def restore(self, twin: Any, saved: Any, memo: Memo) -> Any:
        """Brings a replica to a saved state, its attributes being restored already; returns the replica."""
        return twin


class ByFunctions(Core):
    """A pair of functions, and the attributes: what the pair leaves out is saved all the same."""

    by_itself = True

    def __init__(self, name: str, save: Callable[[Any], Any], restore: Callable[[Any, Any], Any]):
        self.name, self._save, self._restore = name, save, restore

    def save(self, env: Any, memo: Memo) -> Any:
        state = self._save(env)
        memo.setdefault("alive", []).append(state)
        return copy_value(state, memo)

    def restore(self, twin: Any, saved: Any, memo: Memo) -> Any:
        self._restore(twin, copy_value(saved, memo))
        return twin


class ByDeepCopy(Core):
    """The environment's own ``__deepcopy__``; a restored replica is a new copy each time."""

    name = DEEPCOPY
    by_itself = True

    def save(self, env: Any, memo: Memo) -> Any:
        return deep_copy(env, {})

    def restore(self, twin: Any, saved: Any, memo: Memo) -> Any:
        return deep_copy(saved, {})


class ByMuJoCo(Core):
    """All arrays of MuJoCo's data, and the attributes."""

    name = MUJOCO
    hidden = frozenset({"model", "data"})

    def __init__(self, env: Any):
        mujoco = sys.modules["mujoco"]
        self._spec = mujoco.mjtState.mjSTATE_INTEGRATION
        self._size = mujoco.mj_stateSize(env.model, self._spec)
        self._get, self._set = mujoco.mj_getState, mujoco.mj_setState
        self._views: dict[
            int, tuple[Any, list[np.ndarray]]
        ] = {}  # of each data object, which is kept alive here
        self._model: tuple[Any, Any] = (None, None)

    def _arrays(self, data: Any) -> list[np.ndarray]:
        """Views of what a step leaves behind and the next one may read before it computes it anew."""
        if id(data) not in self._views:
            found = (getattr(data, name, None) for name in _MUJOCO_DERIVED)
            views = [view.reshape(-1) for view in found if view is not None and view.size]
            self._views[id(data)] = (data, views)
        return self._views[id(data)][1]

    def blank(self, env: Any, twin: Any) -> None:
        if self._model[0] is not env.model:  # half a megabyte each: many would not fit a processor's cache
            self._model = (env.model, copy.deepcopy(env.model))
        twin.model = self._model[1]
        twin.data = copy.deepcopy(env.data)

    def save(self, env: Any, memo: Memo) -> Any:
        state = np.empty(self._size)
        self._get(env.model, env.data, state, self._spec)
        return state, np.concatenate(self._arrays(env.data))

    def restore(self, twin: Any, saved: Any, memo: Memo) -> Any:
        state, derived = saved
        self._set(twin.model, twin.data, state, self._spec)
        start = 0
        for view in self._arrays(twin.data):
            view[:] = derived[start : start + len(view)]
            start += len(view)
        return twin


# These lag one substep behind the positions, so a forward pass would not give them back.
_MUJOCO_DERIVED = """
    xpos xquat xmat xipos ximat xanchor xaxis geom_xpos geom_xmat site_xpos site_xmat
    subtree_com subtree_linvel subtree_angmom cinert cvel cdof cacc cfrc_int cfrc_ext
    sensordata qacc qfrc_actuator qfrc_passive qfrc_bias qfrc_constraint actuator_force
    actuator_length actuator_velocity ten_length ten_velocity energy
""".split()  # noqa: SIM905


def is_mujoco(env: gymnasium.Env) -> bool:
    mujoco = sys.modules.get("mujoco")  # loaded by whoever made a MuJoCo environment
    return (
        mujoco is not None
        and isinstance(getattr(env, "model", None), mujoco.MjModel)
        and isinstance(getattr(env, "data", None), mujoco.MjData)
    )


def _ale_save(env: Any) -> Any:
    try:
        return env.clone_state(include_rng=True)
    except TypeError:
        return env.clone_state()


def cores_for(core: Any, functions: Functions | None = None) -> list[Core]:
    """The ways that an innermost environment may be saved by, cheapest first; a user's pair leaves no other."""
    if functions is not None:
        return [ByFunctions("snapshot functions", *functions)]
    found: list[Core] = []
    if callable(getattr(core, "get_state", None)) and callable(getattr(core, "set_state", None)):
        pair = ByFunctions(
            "get_state/set_state", lambda env: env.get_state(), lambda env, state: env.set_state(state)
        )
        found.append(pair)
    if is_mujoco(core):
        found.append(ByMuJoCo(core))
    if callable(getattr(core, "clone_state", None)) and callable(getattr(core, "restore_state", None)):
        name = "clone_state/restore_state"
        found.append(ByFunctions(name, _ale_save, lambda env, state: env.restore_state(state)))
    found.append(Core())
    if hasattr(type(core), "__deepcopy__"):
        found.append(ByDeepCopy())
    return found
