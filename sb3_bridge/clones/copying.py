"""How values, random streams and the layers of an environment are copied."""

from __future__ import annotations

import collections
import copy
import enum
import io
import pickle
import random
import sys
import types
from collections.abc import Iterator
from typing import Any, NamedTuple

import gymnasium
import numpy as np
from gymnasium import wrappers
from stable_baselines3.common.monitor import Monitor

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
RENDERING = frozenset(
    {"renderer", "mujoco_renderer", "screen", "clock", "surf", "viewer", "window", "window_surface"}
)
NO_STATE = frozenset({"env", "spec", "_cached_spec", "_saved_kwargs", "_ezpickle_args", "_ezpickle_kwargs"})

PLAIN = {
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
PLAIN |= {types.FunctionType, types.BuiltinFunctionType, types.ModuleType, np.ufunc}
PLAIN |= {np.dtype(kind).type for kind in "?bBhHiIlLqQefdgFD"}


class Unclonable(ValueError):
    """An environment whose state cannot be saved and restored; says why."""


class Stream(NamedTuple):
    """State of a random generator that an attribute holds."""

    kind: type
    state: Any


def copy_value(value: Any, memo: dict[int, Any]) -> Any:
    """``copy.deepcopy``, with short ways for what environments are mostly made of."""
    kind = type(value)
    if kind in PLAIN:
        return value
    if kind is tuple:
        copied = tuple([copy_value(item, memo) for item in value])
        return value if all(map(_same, copied, value)) else copied
    known = memo.get(id(value))
    if known is not None:
        return known
    if kind is np.ndarray and not value.dtype.hasobject:
        result: Any = value.copy("K")
    elif kind is list:
        result = memo[id(value)] = []
        result.extend([copy_value(item, memo) for item in value])
    elif kind is dict:
        result = memo[id(value)] = {}
        result.update({copy_value(key, memo): copy_value(item, memo) for key, item in value.items()})
    elif kind is collections.deque:
        result = memo[id(value)] = collections.deque(maxlen=value.maxlen)
        result.extend([copy_value(item, memo) for item in value])
    elif issubclass(kind, enum.Enum):
        return value
    else:
        return copy.deepcopy(value, memo)
    memo[id(value)] = result
    return result


def _same(first: Any, second: Any) -> bool:
    return first is second


def stream_of(value: Any) -> Stream | None:
    if isinstance(value, np.random.Generator):
        return Stream(type(value.bit_generator), value.bit_generator.state)
    if isinstance(value, np.random.RandomState):
        return Stream(np.random.RandomState, value.get_state(legacy=False))
    if type(value) is random.Random:
        return Stream(random.Random, value.getstate())
    return None


def set_stream(target: Any, stream: Stream) -> Any:
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


def reseed(target: Any, words: np.ndarray, number: int) -> None:
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


class Fingerprint(pickle.Pickler):
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
    """A copy of an environment for branches; the real one is only ever read.

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


def mujoco_module() -> Any:
    """The module, loaded by whoever made a MuJoCo environment."""
    return sys.modules.get("mujoco")


def is_mujoco(env: gymnasium.Env) -> bool:
    mujoco = mujoco_module()
    return (
        mujoco is not None
        and isinstance(getattr(env, "model", None), mujoco.MjModel)
        and isinstance(getattr(env, "data", None), mujoco.MjData)
    )


def replicate(env: gymnasium.Env, shared: dict[int, Any], *, by_itself: bool) -> list[gymnasium.Env]:
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
            if name in RENDERING and value is not None:
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
    if is_mujoco(layer):
        model, data = values["model"], values["data"]
        model_copy = memo.get(id(model)) or copy.deepcopy(model)
        memo[id(model)] = model_copy
        memo[id(data)] = data_copy = mujoco_module().MjData(model_copy)
        mujoco_module().mj_copyData(data_copy, model_copy, data)
    for name, value in values.items():
        try:
            twin.__dict__[name] = value if name in NO_STATE - {"env"} else copy.deepcopy(value, memo)
        except Exception as error:
            raise Unclonable(f"{type(layer).__name__}.{name} cannot be copied: {error}") from error
    return twin


def spaces_of(layers: list[gymnasium.Env]) -> list[gymnasium.Space]:
    """Every space that a layer holds as an attribute, parts included, once; they have generators of their own."""
    found: dict[int, gymnasium.Space] = {}
    for layer in layers:
        for name in sorted(vars(layer)):
            value = vars(layer)[name]
            if isinstance(value, gymnasium.Space):
                found |= {id(space): space for space in _leaf_spaces(value)}
    return list(found.values())
