"""The layers of an environment, and how the state of the innermost one is saved beyond its Python attributes."""

from __future__ import annotations

import copy
import sys
from collections.abc import Callable, Iterator
from typing import Any

import gymnasium
import numpy as np
from gymnasium import wrappers
from gymnasium.utils import EzPickle, RecordConstructorArgs
from stable_baselines3.common.monitor import Monitor

from sb3_bridge.clones import box2d, decoration
from sb3_bridge.clones.copying import Memo, Unclonable, copy_value

Functions = tuple[Callable[[gymnasium.Env], Any], Callable[[gymnasium.Env, Any], None]]
"""A user's ``(save, restore)``: ``save(env.unwrapped) -> state``, ``restore(env.unwrapped, state)``."""

MUJOCO = "MuJoCo state"

ACTION_MASKS = "action_masks"
"""The method of an environment that says which actions are allowed, ``() -> bool [n]``, as sb3-contrib's MaskablePPO asks for it;
for MultiDiscrete and MultiBinary the masks of all parts, one after the other."""


def choices_of(space: gymnasium.Space) -> tuple[int, ...]:
    """Choices of each part of an action, of which a mask has as many entries; none of a Box."""
    if isinstance(space, gymnasium.spaces.MultiBinary):
        return (2,) * space.n
    nvec: Any = getattr(space, "nvec", getattr(space, "n", ()))
    return tuple(np.ravel(nvec).tolist())


# Wrappers that change no transition: replicas do without them. A class derived from one may do more, and is kept.
_TRANSPARENT: tuple[type, ...] = (
    Monitor,
    wrappers.PassiveEnvChecker,
    wrappers.OrderEnforcing,
    wrappers.RecordEpisodeStatistics,
)
_TRANSPARENT += (wrappers.RecordVideo, wrappers.RenderCollection, wrappers.HumanRendering)
# How Gymnasium remembers what a class was made with; nothing reads it later.
_CONSTRUCTION = {EzPickle: ("_ezpickle_args", "_ezpickle_kwargs"), RecordConstructorArgs: ("_saved_kwargs",)}


def layers_of(env: gymnasium.Env) -> list[gymnasium.Env]:
    """The environment and its wrappers, outermost first, without those that change no transition."""
    return [layer for layer in chain_of(env) if type(layer) not in _TRANSPARENT]


def chain_of(env: gymnasium.Env) -> Iterator[gymnasium.Env]:
    """The environment and all its wrappers, outermost first."""
    while isinstance(env, gymnasium.Wrapper):
        yield env
        env = env.env
    yield env


def _parts(space: Any) -> Iterator[gymnasium.Space]:
    yield space
    parts = getattr(space, "spaces", None) or ()
    for part in parts.values() if hasattr(parts, "values") else parts:
        yield from _parts(part)


def spaces_of(layers: list[gymnasium.Env]) -> list[gymnasium.Space]:
    """Every space that a layer holds as an attribute, parts included, once; they have generators of their own."""
    held = [vars(layer)[name] for layer in layers for name in sorted(vars(layer))]
    spaces = [value for value in held if isinstance(value, gymnasium.Space)]
    return list({id(part): part for space in spaces for part in _parts(space)}.values())


def construction(layer: gymnasium.Env) -> set[str]:
    """Attributes in which Gymnasium keeps what a layer was made with."""
    return {name for kind, names in _CONSTRUCTION.items() if isinstance(layer, kind) for name in names}


def links(layer: gymnasium.Env) -> set[str]:
    """Attributes that are no state: the wrapped layer, spaces, and what the layer was made with."""
    spaces = {name for name, value in vars(layer).items() if isinstance(value, gymnasium.Space)}
    return spaces | construction(layer) | ({"env"} if isinstance(layer, gymnasium.Wrapper) else set())


class Core:
    """Nothing beyond the attributes."""

    name = "attributes"  # for the log
    hidden: frozenset[str] = frozenset()  # attributes that are not saved as such
    by_itself = False  # whether a replica's innermost environment may be the original's own deep copy

    def blank(self, env: Any, twin: Any) -> None:
        """Gives a new replica what is not saved."""

    def tidy(self, env: Any) -> None:
        """Removes from an environment, before its state is taken, what is of no use to it."""

    def save(self, env: Any, memo: Memo) -> Any:
        """The state beyond the attributes."""

    def restore(self, twin: Any, saved: Any, memo: Memo) -> None:
        """Brings a replica to a saved state, its attributes being restored already."""


class Undrawn(Core):
    """Gymnasium's LunarLander; replicas do without the bodies that are there to be drawn."""

    hidden = frozenset({"render_mode"})

    def tidy(self, env: Any) -> None:
        decoration.tidy(env)

    def restore(self, twin: Any, saved: Any, memo: Memo) -> None:
        decoration.tidy(twin, most=0)


class ByFunctions(Core):
    """A pair of functions, and the attributes: what the pair leaves out is saved all the same."""

    by_itself = True

    def __init__(self, name: str, save: Callable[[Any], Any], restore: Callable[[Any, Any], Any]):
        self.name, self._save, self._restore = name, save, restore

    def save(self, env: Any, memo: Memo) -> Any:
        state = self._save(env)
        memo.setdefault("alive", []).append(state)
        return copy_value(state, memo)

    def restore(self, twin: Any, saved: Any, memo: Memo) -> None:
        self._restore(twin, copy_value(saved, memo))


class ByMuJoCo(Core):
    """All arrays of MuJoCo's data, and the attributes."""

    name = MUJOCO
    hidden = frozenset({"model", "data"})

    def __init__(self, env: Any):
        mujoco: Any = sys.modules["mujoco"]
        self._spec = mujoco.mjtState.mjSTATE_INTEGRATION
        self._size = mujoco.mj_stateSize(env.model, self._spec)
        self._get, self._set = mujoco.mj_getState, mujoco.mj_setState
        self._views: dict[int, tuple[Any, list[np.ndarray]]] = {}  # of each data object, which is kept alive
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
        twin.model, twin.data = self._model[1], copy.deepcopy(env.data)

    def save(self, env: Any, memo: Memo) -> Any:
        state = np.empty(self._size)
        self._get(env.model, env.data, state, self._spec)
        return state, np.concatenate(self._arrays(env.data))

    def restore(self, twin: Any, saved: Any, memo: Memo) -> None:
        state, derived = saved
        self._set(twin.model, twin.data, state, self._spec)
        start = 0
        for view in self._arrays(twin.data):
            view[:] = derived[start : start + len(view)]
            start += len(view)


# These lag one substep behind the positions, so a forward pass would not give them back.
_MUJOCO_DERIVED = """
    xpos xquat xmat xipos ximat xanchor xaxis geom_xpos geom_xmat site_xpos site_xmat
    subtree_com subtree_linvel subtree_angmom cinert cvel cdof cacc cfrc_int cfrc_ext
    sensordata qacc qfrc_actuator qfrc_passive qfrc_bias qfrc_constraint actuator_force
    actuator_length actuator_velocity ten_length ten_velocity energy
""".split()  # noqa: SIM905


def _is_mujoco(env: Any) -> bool:
    mujoco: Any = sys.modules.get("mujoco")  # loaded by whoever made a MuJoCo environment
    return (
        mujoco is not None
        and isinstance(getattr(env, "model", None), mujoco.MjModel)
        and isinstance(getattr(env, "data", None), mujoco.MjData)
    )


def _ale_save(env: Any) -> Any:
    setting = getattr(
        getattr(env, "ale", None), "getFloat", None
    )  # other environments have a clone_state too
    if setting is not None and setting("repeat_action_probability") > 0:
        raise Unclonable(
            "sticky actions: the emulator keeps the action before, which it may repeat, outside of the state that it gives; make the"
            " environment with repeat_action_probability=0.0"
        )
    try:
        return env.clone_state(include_rng=True)
    except TypeError:
        return env.clone_state()


def cores_for(core: Any, functions: Functions | None = None) -> list[Core]:
    """The ways that an innermost environment may be saved by, cheapest first; a user's pair leaves no other."""
    box2d.register()
    if functions is not None:
        return [ByFunctions("snapshot functions", *functions)]

    def pair(save: str, restore: str, saving: Callable[[Any], Any]) -> list[Core]:
        if not callable(getattr(core, save, None)) or not callable(getattr(core, restore, None)):
            return []
        return [ByFunctions(f"{save}/{restore}", saving, lambda env, state: getattr(env, restore)(state))]

    return [
        *pair("get_state", "set_state", lambda env: env.get_state()),
        *([ByMuJoCo(core)] if _is_mujoco(core) else []),
        *pair("clone_state", "restore_state", _ale_save),
        Undrawn() if decoration.is_decorated(core) else Core(),
    ]
