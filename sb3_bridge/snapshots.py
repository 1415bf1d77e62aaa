"""Snapshots of one Gymnasium environment: how its state is saved, restored into a replica, and proved to be complete.

A replica is a copy of the real environment that branches run in; the real one is only ever read. This module needs no
JAX: it also runs in the workers of a ``SubprocVecEnv``.
"""

from __future__ import annotations

import collections
import copy
import enum
import io
import pickle
import random
import sys
import time
import types
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import gymnasium
import numpy as np
from gymnasium import wrappers
from stable_baselines3.common.monitor import Monitor

Functions = tuple[Callable[[gymnasium.Env], Any], Callable[[gymnasium.Env, Any], None]]
"""A user's ``(save, restore)``: ``save(env.unwrapped) -> state``, ``restore(env.unwrapped, state)``."""

# Wrappers that change no transition: replicas do without them. A class derived from one may do more, and is kept.
_TRANSPARENT = (
    Monitor,
    wrappers.PassiveEnvChecker,
    wrappers.OrderEnforcing,
    wrappers.RecordEpisodeStatistics,
    wrappers.RecordVideo,
    wrappers.RenderCollection,
    wrappers.HumanRendering,
)
_RENDERING = frozenset(
    {"renderer", "mujoco_renderer", "screen", "clock", "surf", "viewer", "window", "window_surface"}
)
_NO_STATE = frozenset({"env", "spec", "_cached_spec", "_saved_kwargs", "_ezpickle_args", "_ezpickle_kwargs"})
_HEAVY = 1024  # bytes of an attribute above which it is worth finding out that it never changes

_PLAIN = {
    bool,
    int,
    float,
    complex,
    str,
    bytes,
    type(None),
    type(Ellipsis),
    range,
    slice,
    type,
    np.str_,
    np.bytes_,
}
_PLAIN |= {types.FunctionType, types.BuiltinFunctionType, types.ModuleType, np.ufunc}
_PLAIN |= {np.dtype(kind).type for kind in "?bBhHiIlLqQefdgFD"}

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

MUJOCO = "MuJoCo state"
"""The name of that means."""

_CHECK_ACTIONS = 12  # length of a replayed branch
_CHECK_STEPS = 1000  # at most, to see an episode's end
_CHECK_SECONDS = 0.5  # the same, for slow environments
_CHECK_POINTS = (0, 1, 7)  # steps after which branches start; more before the first episode's end


class Unclonable(ValueError):
    """An environment whose state cannot be saved and restored; says why."""


@dataclass(frozen=True)
class CloneReport:
    """What the replay check found.

    Attributes:
      means: how states are saved; empty where the environment is refused.
      reason: why it is refused, empty otherwise; one line for each means that was tried.
      snapshot_us: microseconds to save a state.
      restore_us: microseconds to restore one into a replica.
      step_us: microseconds of a step of a replica.
      constants: ``(layer, attribute)`` that were seen never to change and are not part of snapshots.
    """

    means: str
    reason: str = ""
    snapshot_us: float = 0.0
    restore_us: float = 0.0
    step_us: float = 0.0
    constants: tuple[tuple[int, str], ...] = ()

    @property
    def passed(self) -> bool:
        """Whether restored environments repeat themselves and leave the original untouched."""
        return bool(self.means)

    @property
    def description(self) -> str:
        """One line for the log."""
        if not self.passed:
            return f"cannot be cloned exactly: {'; '.join(self.reason.splitlines())}"
        return (
            f"exact clones by {self.means} (replay check passed; {self.snapshot_us:.1f} us a snapshot,"
            f" {self.restore_us:.1f} a restore, {self.step_us:.1f} a step)"
        )


# Copies -------------------------------------------------------------------------------------------------------------


class _Stream(NamedTuple):
    """State of a random generator that an attribute holds."""

    kind: type
    state: Any


class _Stand:
    """Stands in a snapshot for an environment of the wrapper chain, whose own attributes are saved apart."""


def _copy(value: Any, memo: dict[int, Any]) -> Any:
    """``copy.deepcopy``, with short ways for what environments are mostly made of."""
    kind = type(value)
    if kind in _PLAIN:
        return value
    if kind is tuple:
        copied = tuple([_copy(item, memo) for item in value])
        return value if all(map(_same, copied, value)) else copied
    known = memo.get(id(value))
    if known is not None:
        return known
    if kind is np.ndarray and not value.dtype.hasobject:
        result: Any = value.copy("K")
    elif kind is list:
        result = memo[id(value)] = []
        result.extend([_copy(item, memo) for item in value])
    elif kind is dict:
        result = memo[id(value)] = {}
        result.update({_copy(key, memo): _copy(item, memo) for key, item in value.items()})
    elif kind is collections.deque:
        result = memo[id(value)] = collections.deque(maxlen=value.maxlen)
        result.extend([_copy(item, memo) for item in value])
    elif issubclass(kind, enum.Enum):
        return value
    else:
        return copy.deepcopy(value, memo)
    memo[id(value)] = result
    return result


def _same(first: Any, second: Any) -> bool:
    return first is second


def _stream_of(value: Any) -> _Stream | None:
    if isinstance(value, np.random.Generator):
        return _Stream(type(value.bit_generator), value.bit_generator.state)
    if isinstance(value, np.random.RandomState):
        return _Stream(np.random.RandomState, value.get_state(legacy=False))
    if type(value) is random.Random:
        return _Stream(random.Random, value.getstate())
    return None


def _set_stream(target: Any, stream: _Stream) -> Any:
    """The generator at a saved state: ``target`` itself where it is of that kind, else a new one."""
    if stream.kind is np.random.RandomState:
        target = target if isinstance(target, np.random.RandomState) else np.random.RandomState()
        target.set_state(stream.state)
    elif stream.kind is random.Random:
        target = target if type(target) is random.Random else random.Random()
        target.setstate(stream.state)
    else:
        if not (isinstance(target, np.random.Generator) and type(target.bit_generator) is stream.kind):
            target = np.random.Generator(stream.kind())
        target.bit_generator.state = stream.state
    return target


def _reseed(target: Any, words: np.ndarray, number: int) -> None:
    """Seeds one of an environment's generators (its ``number`` told apart) from uint64 ``words`` [4]."""
    if isinstance(target, np.random.RandomState | random.Random):
        target.seed(int(words[0] + np.uint64(number)) & 0xFFFFFFFF)
        return
    bits = target.bit_generator
    if type(bits) is np.random.PCG64:  # the state itself: a tenth of the cost of a seed sequence
        one, two, three, four = words.tolist()
        state: Any = {"state": one << 64 | two, "inc": (three << 64 | four) + 2 * number & (1 << 128) - 1 | 1}
        bits.state = {"bit_generator": "PCG64", "state": state, "has_uint32": 0, "uinteger": 0}
    else:
        bits.state = type(bits)([*words.tolist(), number]).state


def _leaf_spaces(space: Any) -> Iterator[gymnasium.Space]:
    parts = getattr(space, "spaces", None)
    if parts is None:
        yield space
        return
    yield space
    for part in parts.values() if hasattr(parts, "values") else parts:
        yield from _leaf_spaces(part)


class _Fingerprint(pickle.Pickler):
    """Bytes that tell whether a value changed; environments, spaces and code stand for themselves."""

    def persistent_id(self, value: Any) -> Any:
        atoms = (gymnasium.Env, gymnasium.Space, types.FunctionType, types.ModuleType, type)
        return id(value) if isinstance(value, atoms) else None

    @classmethod
    def of(cls, value: Any) -> bytes | None:
        buffer = io.BytesIO()
        try:
            cls(buffer, protocol=4).dump(value)
        except Exception:  # whatever a value's own pickling raises: its changes cannot be seen
            return None
        return buffer.getvalue()


# Layers -------------------------------------------------------------------------------------------------------------


def layers_of(env: gymnasium.Env) -> list[gymnasium.Env]:
    """The environment and its wrappers, outermost first, without those that change no transition."""
    layers = []
    while isinstance(env, gymnasium.Wrapper):
        if type(env) not in _TRANSPARENT:
            layers.append(env)
        env = env.env
    return [*layers, env]


def _all_layers(env: gymnasium.Env) -> Iterator[gymnasium.Env]:
    while isinstance(env, gymnasium.Wrapper):
        yield env
        env = env.env
    yield env


class Replica:
    """A copy of an environment for branches.

    Attributes:
      layers: its wrappers and itself, outermost first.
      step: of the outermost.
      constants: for each layer, its own copies of attributes that never change.
    """

    def __init__(self, layers: list[gymnasium.Env]):
        self.layers = layers
        self.step = layers[0].step
        self.constants: list[dict[str, Any]] = [{} for _ in layers]
        self.extra: Any = None  # what a means keeps for it
        self.spaces: list[gymnasium.Space] = []
        self.memo: dict[int, Any] = {}


def _mujoco() -> Any:
    """The module, loaded by whoever made a MuJoCo environment."""
    return sys.modules.get("mujoco")


def _is_mujoco(env: gymnasium.Env) -> bool:
    mujoco = _mujoco()
    return (
        mujoco is not None
        and isinstance(getattr(env, "model", None), mujoco.MjModel)
        and isinstance(getattr(env, "data", None), mujoco.MjData)
    )


def _replicate(env: gymnasium.Env, shared: dict[int, Any], *, by_itself: bool) -> list[gymnasium.Env]:
    """New layers, attribute by attribute: a class's own pickling may forget what was changed since it was made.

    Args:
      env: the real one, or a layer of a replica.
      shared: objects by id that the copy takes over, or others in their place.
      by_itself: let the innermost environment copy itself.
    """
    memo = dict(shared)
    everything = list(_all_layers(env))
    for layer in everything:
        for name, value in vars(layer).items():
            if name in _RENDERING and value is not None:
                memo[id(value)] = None
    copies: list[gymnasium.Env] = []
    inner: Any = None
    for layer in reversed(everything):
        if type(layer) in _TRANSPARENT:
            memo[id(layer)] = inner
            continue
        own = inner is None and by_itself
        inner = copy.deepcopy(layer, memo) if own else _blank_copy(layer, memo)
        memo[id(layer)] = inner
        copies.insert(0, inner)
    core: Any = copies[-1]
    if getattr(core, "render_mode", None) == "human":
        core.render_mode = None
    return copies


def _blank_copy(layer: gymnasium.Env, memo: dict[int, Any]) -> gymnasium.Env:
    twin = object.__new__(type(layer))
    memo[id(layer)] = twin
    values = vars(layer)
    if _is_mujoco(layer):
        model, data = values["model"], values["data"]
        model_copy = memo.get(id(model)) or copy.deepcopy(model)
        memo[id(model)] = model_copy
        memo[id(data)] = data_copy = _mujoco().MjData(model_copy)
        _mujoco().mj_copyData(data_copy, model_copy, data)
    for name, value in values.items():
        try:
            twin.__dict__[name] = value if name in _NO_STATE - {"env"} else copy.deepcopy(value, memo)
        except Exception as error:
            raise Unclonable(f"{type(layer).__name__}.{name} cannot be copied: {error}") from error
    return twin


# Means --------------------------------------------------------------------------------------------------------------


class _Core:
    """How the innermost environment is saved, beyond its Python attributes."""

    name = "attributes"
    with_attributes = True
    hidden: frozenset[str] = frozenset()  # attributes that are not saved as such

    def save(self, env: Any, memo: dict[int, Any]) -> Any:
        return None

    def restore(self, env: Any, saved: Any, replica: Replica) -> None:
        pass


class _ByFunctions(_Core):
    """The state by a pair of functions; Python attributes are theirs to save."""

    with_attributes = False

    def __init__(self, name: str, save: Callable[[Any], Any], restore: Callable[[Any, Any], Any]):
        self.name, self._save, self._restore = name, save, restore

    def save(self, env: Any, memo: dict[int, Any]) -> Any:
        return _copy(self._save(env), memo)

    def restore(self, env: Any, saved: Any, replica: Replica) -> None:
        self._restore(env, _copy(saved, dict(replica.memo)))


class _ByMuJoCo(_Core):
    """MuJoCo's integration state, what is derived from it, and Python attributes."""

    name = MUJOCO
    hidden = frozenset({"model", "data"})

    def __init__(self, env: Any):
        mujoco = _mujoco()
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


class Snapshot(NamedTuple):
    """A saved state; opaque, restored by the cloner that saved it."""

    layers: list[
        tuple[dict[str, Any], list[tuple[str, Any]], int]
    ]  # plain values, others, number of attributes
    core: Any
    streams: list[tuple[int, _Stream]]  # of spaces that drew numbers


class Cloner:
    """Saves one environment's states and restores them into replicas.

    Args:
      env: the real environment, in its wrappers. It is only read.
      means: one of :func:`means_for`.
      functions: the user's, where that is the means.
      constants: ``(layer, attribute)`` to leave out as long as they are the objects that they are now.
    """

    def __init__(
        self,
        env: gymnasium.Env,
        means: str,
        functions: Functions | None = None,
        constants: tuple[tuple[int, str], ...] = (),
    ):
        self._env, self.layers = env, layers_of(env)
        self._core = _core_for(self.layers[-1], means, functions)
        self._spaces = _spaces_of(self.layers)
        self._hidden: list[frozenset[str]] = [
            _NO_STATE
            | _RENDERING
            | {
                name
                for name, value in vars(layer).items()
                if isinstance(value, gymnasium.Space | gymnasium.Env)
            }
            for layer in self.layers
        ]
        self._hidden[-1] |= self._core.hidden
        self._stands = [_Stand() for _ in self.layers]
        self._memo: dict[int, Any] = {
            id(layer): stand for layer, stand in zip(self.layers, self._stands, strict=True)
        }
        self._memo |= {id(space): space for space in self._spaces}
        for layer in self.layers:  # references to what is never copied
            self._memo |= {
                id(vars(layer)[name]): None for name in _RENDERING if vars(layer).get(name) is not None
            }
        self._constants: list[dict[str, Any]] = [{} for _ in self.layers]
        for layer_index, name in constants:
            if name in vars(self.layers[layer_index]):
                self._constants[layer_index][name] = vars(self.layers[layer_index])[name]
        self._prints = _fingerprints(self._constants)
        self._first: Replica | None = None
        self._first_prints: dict[tuple[int, str], bytes | None] = {}

    @property
    def means(self) -> str:
        """How states are saved."""
        return self._core.name

    def save(self) -> Snapshot:
        """The present state."""
        memo = dict(self._memo)
        with_attributes, last = self._core.with_attributes, len(self.layers) - 1
        saved_layers = []
        for index, layer in enumerate(self.layers):
            hidden, constants = self._hidden[index], self._constants[index]
            plain: dict[str, Any] = {}
            others: list[tuple[str, Any]] = []
            values = vars(layer)
            for name, value in values.items():
                if type(value) in _PLAIN:
                    if name not in hidden and (with_attributes or index < last):
                        plain[name] = value
                    continue
                if name in hidden:
                    continue
                if constants and name in constants and constants[name] is value:
                    continue
                stream = _stream_of(value)
                if stream is not None:
                    others.append((name, stream))
                elif with_attributes or index < last:
                    try:
                        others.append((name, _copy(value, memo)))
                    except Exception as error:
                        raise Unclonable(
                            f"{type(layer).__name__}.{name} cannot be copied: {error}"
                        ) from error
            saved_layers.append((plain, others, len(values)))
        streams = []
        for number, space in enumerate(self._spaces):
            generator = space._np_random
            if generator is not None:
                streams.append(
                    (number, _Stream(type(generator.bit_generator), generator.bit_generator.state))
                )
        return Snapshot(saved_layers, self._core.save(self.layers[-1], memo), streams)

    def replica(self) -> Replica:
        """A new replica, to be restored before it is stepped.

        Raises:
          Unclonable: what cannot be copied.
        """
        if self._first is None:
            self._first = self._new_replica(
                self._env, {id(space): copy.deepcopy(space) for space in self._spaces}
            )
            self._first_prints = _fingerprints(self._first.constants)
            return self._first
        shared = {id(value): value for values in self._first.constants for value in values.values()}
        if _is_mujoco(
            self._first.layers[-1]
        ):  # half a megabyte each: many models would not fit a processor's cache
            model = vars(self._first.layers[-1])["model"]
            shared[id(model)] = model
        return self._new_replica(self._first.layers[0], shared)

    def _new_replica(self, env: gymnasium.Env, shared: dict[int, Any]) -> Replica:
        try:
            layers = _replicate(env, shared, by_itself=False)
        except Unclonable:
            if self._core.with_attributes:
                raise
            layers = _replicate(env, shared, by_itself=True)  # its state comes by other means
        replica = Replica(layers)
        replica.spaces = _spaces_of(layers)
        if len(replica.spaces) != len(self._spaces):
            raise Unclonable(f"{type(layers[-1]).__name__} changes its spaces when it is copied")
        for index, values in enumerate(self._constants):
            own = vars(layers[index])
            replica.constants[index] = {name: own[name] for name in values if name in own}
        replica.memo = {id(stand): layer for stand, layer in zip(self._stands, layers, strict=True)} | {
            id(mine): its for mine, its in zip(self._spaces, replica.spaces, strict=True)
        }
        return replica

    def restore(self, replica: Replica, snapshot: Snapshot, words: np.ndarray | None = None) -> None:
        """Brings a replica to a saved state.

        Args:
          replica: of this cloner.
          snapshot: of this cloner.
          words: uint64 ``[4]``, a seed for all random generators in place of their saved states.
        """
        memo: dict[int, Any] | None = None
        number = 0
        for index, (plain, others, n_attributes) in enumerate(snapshot.layers):
            values = vars(replica.layers[index])
            constants = replica.constants[index]
            if constants:
                values.update(constants)
            values.update(plain)
            for name, value in others:
                if type(value) is _Stream:
                    if words is None:
                        values[name] = _set_stream(values.get(name), value)
                    else:
                        if _stream_of(values.get(name)) is None:
                            values[name] = _set_stream(None, value)
                        _reseed(values[name], words, number)
                        number += 1
                else:
                    if memo is None:
                        memo = dict(replica.memo)
                    values[name] = _copy(value, memo)
            if len(values) != n_attributes and (
                index < len(snapshot.layers) - 1 or self._core.with_attributes
            ):
                kept = {*plain, *(name for name, _ in others), *constants, *self._hidden[index]}
                for name in [name for name in values if name not in kept]:
                    del values[name]
        for position, stream in snapshot.streams:
            space = replica.spaces[position]
            space._np_random = _set_stream(space._np_random, stream)
            if words is not None:
                _reseed(space._np_random, words, number)
                number += 1
        self._core.restore(replica.layers[-1], snapshot.core, replica)

    def changed_constants(self) -> list[str]:
        """Attributes held to be constant that were changed in place; from now on they are part of snapshots."""
        now = [(self._prints, _fingerprints(self._constants))]
        if self._first is not None:  # all replicas share its constants
            now.append((self._first_prints, _fingerprints(self._first.constants)))
        changed = {where for before, after in now for where in after if after[where] != before[where]}
        for index, name in changed:
            self._constants[index].pop(name, None)
            if self._first is not None:
                self._first.constants[index].pop(name, None)
        return sorted(f"{type(self.layers[index]).__name__}.{name}" for index, name in changed)


def _fingerprints(constants: list[dict[str, Any]]) -> dict[tuple[int, str], bytes | None]:
    return {
        (index, name): _Fingerprint.of(value)
        for index, values in enumerate(constants)
        for name, value in values.items()
    }


class _WholeCloner:
    """Snapshots are copies of the whole environment, made by its own ``__deepcopy__`` if it has one."""

    means = "deepcopy"

    def __init__(self, env: gymnasium.Env):
        self._env = env

    def save(self) -> Any:
        return _replicate(self._env, {}, by_itself=True)

    def replica(self) -> Replica:
        return Replica(self.save())

    def restore(self, replica: Replica, snapshot: Any, words: np.ndarray | None = None) -> None:
        replica.layers = _replicate(snapshot[0], {}, by_itself=True)
        replica.step = replica.layers[0].step
        if words is not None:
            number = 0
            for layer in replica.layers:
                for value in vars(layer).values():
                    if _stream_of(value) is not None:
                        _reseed(value, words, number)
                        number += 1

    def changed_constants(self) -> list[str]:
        return []


AnyCloner = Cloner | _WholeCloner


def _spaces_of(layers: list[gymnasium.Env]) -> list[gymnasium.Space]:
    """Every space that a layer holds as an attribute, parts included, once; they have generators of their own."""
    found: dict[int, gymnasium.Space] = {}
    for layer in layers:
        for name in sorted(vars(layer)):
            value = vars(layer)[name]
            if isinstance(value, gymnasium.Space):
                found |= {id(space): space for space in _leaf_spaces(value)}
    return list(found.values())


def means_for(env: gymnasium.Env, functions: Functions | None = None) -> list[str]:
    """Names of the means that an environment may be saved by, cheapest first; a user's pair leaves no other."""
    core = env.unwrapped
    if functions is not None:
        return ["snapshot functions"]
    found = []
    if callable(getattr(core, "get_state", None)) and callable(getattr(core, "set_state", None)):
        found.append("get_state/set_state")
    if _is_mujoco(core):
        found.append(MUJOCO)
    if callable(getattr(core, "clone_state", None)) and callable(getattr(core, "restore_state", None)):
        found.append("clone_state/restore_state")
    return [*found, "attributes", "deepcopy"]


def _core_for(core: Any, means: str, functions: Functions | None) -> _Core:
    if means == "snapshot functions":
        assert functions is not None
        return _ByFunctions(means, *functions)
    if means == "get_state/set_state":
        return _ByFunctions(means, lambda env: env.get_state(), lambda env, state: env.set_state(state))
    if means == MUJOCO:
        return _ByMuJoCo(core)
    if means == "clone_state/restore_state":
        return _ByFunctions(means, _ale_save, _ale_restore)
    return _Core()


def make_cloner(env: gymnasium.Env, report: CloneReport, functions: Functions | None = None) -> AnyCloner:
    """The cloner that a replay check approved.

    Args:
      env: the one that was checked, or another one made alike.
      report: of the check.
      functions: the user's, if they were checked.
    """
    if not report.passed:
        raise Unclonable(report.reason)
    if report.means == _WholeCloner.means:
        return _WholeCloner(env)
    return Cloner(env, report.means, functions, report.constants)


# Replay check -------------------------------------------------------------------------------------------------------


class _Failed(Exception):
    pass


@dataclass
class _Run:
    """Transitions of a run, an episode's end followed by a reset."""

    transitions: list[tuple[Any, ...]] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)

    def step(self, env: gymnasium.Env, action: Any) -> bool:
        action = _copy(action, {})
        started = time.perf_counter()
        observation, reward, terminated, truncated, _ = env.step(action)
        self.seconds.append(time.perf_counter() - started)
        over = bool(terminated or truncated)
        row = (_copy(observation, {}), float(reward), bool(terminated), bool(truncated))
        self.transitions.append((*row, _copy(env.reset()[0], {}) if over else None))
        return over


def check(env: gymnasium.Env, functions: Functions | None = None, seed: int = 0) -> CloneReport:
    """Finds the cheapest means by which an environment repeats itself, and measures it.

    All of it runs on copies; the environment itself is only read.

    Args:
      env: in its wrappers, reset or not.
      functions: the user's pair, tried instead of all others.
      seed: of the copies and of the random actions.

    Returns:
      The report; where no means passes, with the reasons.
    """
    reasons = []
    for means in means_for(env, functions):
        try:
            return _check_means(env, means, functions, seed)
        except (
            Exception
        ) as error:  # an environment's own code may raise anything: it is refused, with the reason
            told = (
                str(error) if isinstance(error, _Failed | Unclonable) else f"{type(error).__name__} {error}"
            )
            reasons.append(f"{means}: {told.strip()}")
    return CloneReport("", reason="\n".join(reasons))


def _check_means(env: gymnasium.Env, means: str, functions: Functions | None, seed: int) -> CloneReport:
    def cloner_of(real: gymnasium.Env, constants: tuple[tuple[int, str], ...] = ()) -> AnyCloner:
        return make_cloner(real, CloneReport(means, constants=constants), functions)

    source = cloner_of(env)
    # `original` plays the real environment, `twin` is the same one with nobody looking.
    original, twin = source.replica().layers[0], source.replica().layers[0]
    rng = np.random.default_rng(seed)
    space = copy.deepcopy(env.action_space)
    space.seed(seed)

    heavy = _heavy_attributes(twin)
    first = _copy(twin.reset(seed=seed)[0], {})
    actions: list[Any] = []
    expected, end = _Run(), None
    started = time.perf_counter()
    while len(actions) < _CHECK_STEPS and (end is None or len(actions) < end + _CHECK_ACTIONS):
        actions.append(space.sample())
        if expected.step(twin, actions[-1]) and end is None:
            end = len(actions)
        if len(actions) % 50 == 0 or expected.transitions[-1][-1] is not None:
            heavy = [entry for entry in heavy if entry.same()]
        if time.perf_counter() - started > _CHECK_SECONDS and len(actions) >= 4 * _CHECK_ACTIONS:
            break
    step_us = float(np.median(expected.seconds)) * 1e6
    constants = tuple((entry.layer, entry.name) for entry in heavy if entry.same())

    if not _equal(first, original.reset(seed=seed)[0]):
        raise _Failed(
            "two copies give different observations after reset(seed=...): it does not depend on the seed alone"
        )
    cloner = cloner_of(original, constants)
    one, two = cloner.replica(), cloner.replica()
    seen = _Run()
    last = len(actions) - _CHECK_ACTIONS
    points = {
        *_CHECK_POINTS,
        last // 2,
        (end or last) - _CHECK_ACTIONS // 2,
        (end or last) - 1,
        end or last,
        last,
    }
    snapshots: list[tuple[int, Any]] = []
    for index, action in enumerate(actions):
        if index in points and 0 <= index <= last:
            snapshot = cloner.save()
            snapshots.append((index, snapshot))
            others = [space.sample() for _ in range(_CHECK_ACTIONS)]
            _check_branches(cloner, (one, two), snapshot, index, actions, others, expected)
        seen.step(original, action)
        if not _equal(seen.transitions[-1], expected.transitions[index]):
            raise _Failed(
                f"step {index + 1} differs from that of an untouched copy: taking snapshots or stepping replicas touches"
                " the original, or it uses random numbers that are no part of it (np.random, random)"
            )
    # Late: an old snapshot must not have been changed by all that was done since.
    for index, snapshot in (snapshots[0], snapshots[-1], snapshots[int(rng.integers(len(snapshots)))]):
        _check_branches(cloner, (two, one), snapshot, index, actions, actions[:_CHECK_ACTIONS], expected)
    if cloner.changed_constants():
        raise _Failed("an attribute that seemed constant changed")
    snapshot = cloner.save()
    return CloneReport(
        means,
        snapshot_us=_microseconds(cloner.save),
        restore_us=_microseconds(lambda: cloner.restore(one, snapshot)),
        step_us=step_us,
        constants=constants,
    )


def _check_branches(
    cloner: AnyCloner,
    replicas: tuple[Replica, Replica],
    snapshot: Any,
    index: int,
    actions: list[Any],
    others: list[Any],
    expected: _Run,
) -> None:
    """Restored replicas must do what the original will do, and twice the same for other actions."""
    one, two = replicas
    cloner.restore(one, snapshot)
    cloner.restore(two, snapshot)
    replayed, other = _Run(), _Run()
    for action, different in zip(actions[index : index + _CHECK_ACTIONS], others, strict=True):
        replayed.step(one.layers[0], action)
        other.step(two.layers[0], different)
    wanted = expected.transitions[index : index + _CHECK_ACTIONS]
    _compare(replayed.transitions, wanted, f"after a restore at step {index}, the same actions do not repeat")
    cloner.restore(one, snapshot)
    again = _Run()
    for different in others:
        again.step(one.layers[0], different)
    _compare(again.transitions, other.transitions, f"two restores of step {index} do not agree on")


def _compare(got: list[tuple[Any, ...]], wanted: list[tuple[Any, ...]], message: str) -> None:
    names = ("the observation", "the reward", "termination", "truncation", "the observation after the reset")
    for step, (mine, theirs) in enumerate(zip(got, wanted, strict=True)):
        for name, value, reference in zip(names, mine, theirs, strict=True):
            if not _equal(value, reference):
                raise _Failed(
                    f"{message} {name} {step + 1} steps later: a part of the state is not saved, or numbers come from"
                    " outside of the environment (np.random, random, a clock)"
                )


def _equal(first: Any, second: Any) -> bool:
    if isinstance(first, dict) and isinstance(second, dict):
        return first.keys() == second.keys() and all(_equal(first[name], second[name]) for name in first)
    if isinstance(first, tuple | list) and isinstance(second, tuple | list):
        return len(first) == len(second) and all(map(_equal, first, second))
    if first is None or second is None:
        return first is second
    one, two = np.asarray(first), np.asarray(second)
    # Bit for bit, NaN included: a difference of the last digit is a difference of the state.
    return one.shape == two.shape and one.dtype == two.dtype and one.tobytes() == two.tobytes()


@dataclass
class _Heavy:
    """An attribute that would be dear to copy, and what it was like at first."""

    env: gymnasium.Env
    layer: int
    name: str
    value: Any
    fingerprint: bytes

    def same(self) -> bool:
        value = vars(self.env).get(self.name)
        return value is self.value and _Fingerprint.of(value) == self.fingerprint


def _heavy_attributes(env: gymnasium.Env) -> list[_Heavy]:
    found = []
    for index, layer in enumerate(layers_of(env)):
        for name, value in vars(layer).items():
            skipped = name in _NO_STATE | _RENDERING or type(value) in _PLAIN or _stream_of(value) is not None
            if skipped or isinstance(value, gymnasium.Env | gymnasium.Space):
                continue
            fingerprint = _Fingerprint.of(value)
            if fingerprint is not None and len(fingerprint) > _HEAVY:
                found.append(_Heavy(layer, index, name, value, fingerprint))
    return found


def _microseconds(function: Callable[[], Any]) -> float:
    """Of one call; the quickest of some repeats, as other programs only ever make it slower."""
    function()
    started = time.perf_counter()
    function()
    once = max(time.perf_counter() - started, 1e-7)
    n_calls = max(1, min(200, int(0.002 / once)))
    best = float("inf")
    for _ in range(5):
        started = time.perf_counter()
        for _ in range(n_calls):
            function()
        best = min(best, (time.perf_counter() - started) / n_calls)
    return best * 1e6
