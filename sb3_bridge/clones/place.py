"""Where an environment stands, in a form that a file holds, and back into another one that was made alike."""

from __future__ import annotations

import base64
import inspect
import io
import pickle
import sys
import types
from collections import deque
from typing import Any, NamedTuple

import gymnasium
import numpy as np
from gymnasium import wrappers
from gymnasium.envs.registration import EnvSpec
from stable_baselines3.common.monitor import Monitor

from sb3_bridge.clones.changes import fingerprint
from sb3_bridge.clones.copying import Stream, Unclonable, copy_value
from sb3_bridge.clones.core_state import chain_of, cores_for
from sb3_bridge.clones.snapshot import Cloner, CloneReport, Snapshot

_MOST_BYTES = 1 << 24  # of an environment's state: larger ones are not kept
_ATOMS = (bool, int, float, str, type(None))
_FIXED = (types.ModuleType, EnvSpec, np.ufunc)
"""What never changes: it stays what it is in an environment."""
_STATISTICS: dict[type, tuple[str, ...]] = {
    Monitor: ("rewards", "needs_reset", "total_steps", "current_reset_info"),
    wrappers.RecordEpisodeStatistics: ("episode_count", "episode_returns", "episode_lengths"),
    wrappers.OrderEnforcing: ("_has_reset",),
}
"""Of the wrappers that copies do without, what goes on in each."""


class Kept(NamedTuple):
    """A state that is kept in memory."""

    cloner: Cloner
    snapshot: Snapshot
    constants: list[dict[str, str]]
    statistics: list[dict[str, Any]]


def keep(env: gymnasium.Env, cloner: Cloner | None, functions: Any) -> Kept:
    """The present state; ``cloner`` where the environment was checked.

    Raises:
      Unclonable: it cannot be copied, or is too large to be kept beside.
    """
    if cloner is None:
        report = CloneReport(cores_for(env.unwrapped, functions)[0].name)
        cloner = Cloner(env, report, functions)
        if (
            size := sum(_size(value) for layer in cloner.layers for value in vars(layer).values())
        ) > _MOST_BYTES:
            raise Unclonable(f"its state has {size >> 20} MiB")
    snapshot = cloner.save()
    return Kept(cloner, snapshot, cloner.constants(), [_statistics(layer) for layer in chain_of(env)])


def _size(value: Any) -> int:
    if isinstance(value, dict):
        value = list(value.values())
    if isinstance(value, list | tuple | deque):
        return sum(map(_size, value))
    return int(getattr(value, "nbytes", 0)) or sys.getsizeof(value)


def _statistics(layer: Any) -> dict[str, Any]:
    names = [name for name in _STATISTICS.get(type(layer), ()) if hasattr(layer, name)]
    return copy_value({name: getattr(layer, name) for name in names}, {})


def to_form(kept: Kept) -> dict[str, Any]:
    """Plain values, arrays and generators; what is nothing of these is a pickle among it, as text.

    Raises:
      Unclonable: it cannot be pickled.
    """
    cloner, snapshot, constants, statistics = kept
    form: dict[str, Any] = {"way": cloner.way, "statistics": statistics}
    layers = [plain | dict(others) for plain, others, _ in snapshot.layers]
    world: Any = sys.modules.get("grpo_jax.worlds.base")
    fixed_kinds = _FIXED if world is None else (*_FIXED, world.World)
    fixed = [dict(names) for names in constants]
    for layer, names in zip(layers, fixed, strict=True):
        names |= {name: "" for name, value in layer.items() if isinstance(value, fixed_kinds)}
        for name in names.keys() & layer.keys():
            del layer[name]
    core = [] if snapshot.core is None else [snapshot.core]
    state = [layers, fixed, core, [list(pair) for pair in snapshot.streams]]
    if _is_plain(state, {}) and _is_plain(statistics, {}):
        return form | {"state": copy_value(state, {})}  # generators in place of streams
    file = io.BytesIO()
    try:
        _Pickler(file, cloner).dump(state)
    except Unclonable:
        raise
    except Exception as error:
        raise Unclonable(f"it cannot be pickled ({type(error).__name__}: {error})") from error
    return form | {"pickled": base64.b64encode(file.getvalue()).decode()}


def put(env: gymnasium.Env, functions: Any, form: dict[str, Any], is_trusted: bool) -> None:
    """Brings an environment, which was just reset, to where the one stood that a form was made of.

    Raises:
      Unclonable: the form is of another environment, or changes what no state is; or ``is_trusted`` is needed.
    """
    if form["way"] not in [core.name for core in cores_for(env.unwrapped, functions)]:
        raise Unclonable(f"its state was saved by {form['way']}, which this one does not know")
    cloner = Cloner(env, CloneReport(form["way"]), functions)
    cloner.save()  # finds out what cannot be copied, and is left to the environment
    if "state" in form:
        layers, fixed, core, streams = copy_value(form["state"], {})  # streams in place of generators
    elif is_trusted:
        content = io.BytesIO(base64.b64decode(form["pickled"]))
        layers, fixed, core, streams = _Unpickler(content, cloner).load()
    else:
        raise Unclonable(
            "its state is stored as a pickle, which could run any code: if you trust the file, allow_pickle=True"
        )
    chain = list(chain_of(env))
    if len(layers) != len(cloner.layers) or len(form["statistics"]) != len(chain):
        raise Unclonable("it is in other wrappers")
    saved = []
    for layer, values, names in zip(cloner.layers, layers, fixed, strict=True):
        own = vars(layer)
        for name, value in values.items():
            member = inspect.getattr_static(type(layer), name, None)
            if callable(member) or isinstance(member, property):
                raise Unclonable(f"the file would replace {type(layer).__name__}.{name}")
            if isinstance(value, str) and value != own.get(name) and not is_trusted:
                raise Unclonable(
                    f"the file would set {type(layer).__name__}.{name} to a text: if you trust it, allow_pickle=True"
                )
        for name, digest in names.items():
            if digest and (
                name not in own or (found := fingerprint(own[name])) is None or found.digest.hex() != digest
            ):
                raise Unclonable(
                    f"{type(layer).__name__}.{name} is another one than the file's environment was made with"
                )
        fixed_values = {name: own[name] for name in names if name in own}
        saved.append((fixed_values, list(values.items()), len(fixed_values) + len(values)))
    cloner.put(Snapshot(saved, core[0] if core else None, [tuple(pair) for pair in streams]))
    for layer, values in zip(chain, form["statistics"], strict=True):
        wanted = _STATISTICS.get(type(layer), ())
        vars(layer).update({name: value for name, value in values.items() if name in wanted})


def _is_plain(value: Any, seen: dict[int, Any]) -> bool:
    """Whether a file can hold a value without a pickle. One that is there twice it would make two of."""
    kind = type(value)
    if kind in _ATOMS or (isinstance(value, np.generic) and value.dtype.kind in "biuf"):
        return True
    if kind is not tuple and seen.setdefault(id(value), value) is not value:
        return False
    if kind is Stream:
        return value.bits is np.random.PCG64
    if kind is np.ndarray:
        return value.dtype.kind in "biufSU" and value.base is None
    if kind is dict:
        return all(type(key) in _ATOMS for key in value) and all(
            _is_plain(one, seen) for one in value.values()
        )
    return kind in (list, tuple, deque) and all(_is_plain(one, seen) for one in value)


_ROOM = __name__.rpartition(".")[0]


class _Pickler(pickle.Pickler):
    """Keeps by name what the other environment has itself: layers and spaces, and in workers the classes of this room."""

    def __init__(self, file: Any, cloner: Cloner):
        super().__init__(file, protocol=5)
        self._names = {id(one): name for name, one in cloner.parts().items()}

    def persistent_id(self, value: Any) -> Any:
        if isinstance(value, np.ndarray) and value.base is not None and value.flags.writeable:
            raise Unclonable("it holds views of arrays")
        if isinstance(value, type) and value.__module__.startswith(_ROOM):
            return value.__module__, value.__qualname__
        return self._names.get(id(value))


class _Unpickler(pickle.Unpickler):
    def __init__(self, file: Any, cloner: Cloner):
        super().__init__(file)
        self._parts = cloner.parts()

    def persistent_load(self, name: Any) -> Any:
        return getattr(sys.modules[name[0]], name[1]) if isinstance(name, tuple) else self._parts[name]
