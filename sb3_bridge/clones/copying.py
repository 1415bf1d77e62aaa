"""Copies of values, whatever they are made of."""

from __future__ import annotations

import copy
import copyreg
import enum
import functools
import io
import operator
import random
import sys
import types
import weakref
from collections.abc import Callable
from typing import Any

import gymnasium
import numpy as np
from gymnasium.envs.registration import EnvSpec

PLAIN = {bool, int, float, complex, str, bytes, type(None), type(Ellipsis), range, slice, type}
"""Types whose values never change and refer to nothing that does."""
PLAIN |= {types.ModuleType, EnvSpec, np.ufunc, np.str_, np.bytes_}
PLAIN |= {np.dtype(kind).type for kind in "?bBhHiIlLqQefdgFD"}

_SHARED = (type, enum.Enum, types.ModuleType, types.CodeType, np.dtype)
# Copies of these would still work on what the original works on, or are not possible at all.
_REFUSED: tuple[type, ...] = (
    *(types.GeneratorType, types.CoroutineType, types.AsyncGeneratorType, io.IOBase),
    *(weakref.WeakKeyDictionary, weakref.WeakValueDictionary, weakref.WeakSet),
)
# What draws on a screen, by the module that its class comes from. A game's pygame.Rect is its state, and no part of this.
_WINDOWS = """
    pyglet. OpenGL. glfw. tkinter. _tkinter. matplotlib. mpl_toolkits. PIL.ImageTk. pygame.surface. pygame.time. pygame.font.
    pygame.display. pygame.mixer. pygame.window. gymnasium.envs.mujoco.mujoco_rendering.
""".split()  # noqa: SIM905

Memo = dict[Any, Any]
"""Copies by the id of what they were made of. Whoever fills one keeps the originals alive as long as it is used."""


class Unclonable(ValueError):
    """An environment whose state cannot be saved and restored; says why."""


class Stream:
    """The state of a random generator, as a snapshot keeps it."""

    __slots__ = ("bits", "kind", "state")

    def __init__(self, generator: Any):
        self.kind, self.bits = type(generator), None
        if isinstance(generator, np.random.Generator):
            bits = generator.bit_generator
            self.bits, self.state = type(bits), bits.state
        elif isinstance(generator, np.random.RandomState):
            self.state = generator.get_state(legacy=False)
        else:
            self.state = generator.getstate()

    def of_kind(self, target: Any) -> Any:
        """``target`` itself where it is such a generator, else a new one; in whatever state."""
        if type(target) is self.kind and (self.bits is None or type(target.bit_generator) is self.bits):
            return target
        return self.kind() if self.bits is None else self.kind(self.bits())

    def set(self, target: Any) -> Any:
        """The generator at this state: ``target`` itself where it is of this kind, else a new one."""
        target = self.of_kind(target)
        if self.bits is not None:
            target.bit_generator.state = self.state
        elif isinstance(target, np.random.RandomState):
            target.set_state(self.state)  # type: ignore[arg-type]
        else:
            target.setstate(self.state)
        return target


GENERATORS = (np.random.Generator, np.random.RandomState, random.Random)


def reseed(target: Any, words: np.ndarray, number: int) -> None:
    """Seeds generator ``number`` of an environment from uint64 ``words`` [4]."""
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


def copy_value(value: Any, memo: Memo) -> Any:
    """A deep copy that shares nothing that can change with the original; windows become None.

    Functions with closures or defaults, bound methods and partials are bound to the copies of what they refer to.
    Random generators become :class:`Stream` in the copy, and generators again in the copy of the copy: what is copied
    once is the form that snapshots keep. ``memo`` also says what takes the place of an object.

    Raises:
      Unclonable: an object that cannot be copied.
      Exception: whatever an object's own pickling raises.
    """
    kind = type(value)
    if kind in PLAIN:
        return value
    known = memo.get(id(value), memo)
    if known is not memo:
        return known
    copier = _FOUND.get(kind)
    if copier is None:
        copier = _FOUND[kind] = _copier_for(kind)
    copied = memo[id(value)] = copier(value, memo)
    return copied


def _copier_for(kind: type) -> Callable[[Any, Memo], Any]:
    if kind in _COPIERS:
        return _COPIERS[kind]
    for base in kind.__mro__:
        if base in BASES:
            return BASES[base]
    if any(f"{base.__module__}.".startswith(tuple(_WINDOWS)) for base in kind.__mro__):
        return lambda value, memo: None
    # Worlds never change, and each copy of one would compile its programs anew; workers may not have the class.
    world: Any = sys.modules.get("grpo_jax.worlds.base")
    shared = _SHARED if world is None else (*_SHARED, world.World)
    is_array = kind.__module__.startswith(("jaxlib.", "jax.")) and kind.__name__ == "ArrayImpl"
    if is_array or issubclass(kind, shared):
        return lambda value, memo: value
    if issubclass(kind, GENERATORS):
        return lambda value, memo: Stream(value)
    if issubclass(kind, gymnasium.Env):
        return _env
    if issubclass(kind, _REFUSED):
        return _refuse("objects cannot be copied")
    if hasattr(kind, "__del__"):
        return _refuse("has a __del__, which would free for a copy what the original still uses")
    return (lambda value, memo: value.__deepcopy__(memo)) if hasattr(kind, "__deepcopy__") else _object


def _refuse(why: str) -> Callable[[Any, Memo], Any]:
    def refuse(value: Any, memo: Memo) -> Any:
        raise Unclonable(f"{type(value).__name__} {why}")

    return refuse


def _tuple(value: Any, memo: Memo) -> Any:
    if PLAIN.issuperset(map(type, value)):
        return value
    copied = tuple([copy_value(item, memo) for item in value])
    if all(map(operator.is_, copied, value)):
        return value
    return memo.get(id(value), copied)  # a tuple that contains itself was copied meanwhile


def _list(value: Any, memo: Memo) -> Any:
    if PLAIN.issuperset(map(type, value)):
        return value[:]
    result = memo[id(value)] = []
    result.extend([copy_value(item, memo) for item in value])
    return result


def _dict(value: Any, memo: Memo) -> Any:
    result = memo[id(value)] = {}
    result.update({copy_value(key, memo): copy_value(item, memo) for key, item in value.items()})
    return result


def _array(value: Any, memo: Memo) -> Any:
    base = value.base
    # A view of what something else refers to as well: a view of the copy of that.
    is_view = type(base) is np.ndarray and sys.getrefcount(base) > 3 and not base.dtype.hasobject
    if is_view and base.flags.c_contiguous and (id(base) in memo or 0 < base.nbytes <= 16 * value.nbytes):
        offset = value.__array_interface__["data"][0] - base.__array_interface__["data"][0]
        return np.ndarray(value.shape, value.dtype, copy_value(base, memo), offset, value.strides)
    if not value.dtype.hasobject:
        return value.copy("K")
    if value.dtype != object:
        raise Unclonable("a structured array of objects cannot be copied")
    result = memo[id(value)] = np.empty_like(value)
    for index in np.ndindex(value.shape):
        result[index] = copy_value(value[index], memo)
    return result


def is_global(function: Any) -> bool:
    """Whether a function is found under its name in its module: all share it, as they share the module."""
    found: Any = sys.modules.get(function.__module__ or "")
    for name in function.__qualname__.split("."):
        found = getattr(found, name, None)
    return found is function


def _cell(value: Any, memo: Memo) -> Any:
    result = memo[id(value)] = types.CellType()
    try:
        content = value.cell_contents
    except ValueError:
        return result  # still empty
    result.cell_contents = copy_value(content, memo)
    return result


def _function(value: Any, memo: Memo) -> Any:
    defaults, cells = copy_value(value.__defaults__, memo), value.__closure__ or ()
    if defaults is value.__defaults__ and not value.__kwdefaults__ and (not cells or is_global(value)):
        return value
    cells = tuple([copy_value(cell, memo) for cell in cells])
    if id(value) in memo:  # one that calls itself was copied meanwhile
        return memo[id(value)]
    code, name = value.__code__, value.__name__
    result = memo[id(value)] = types.FunctionType(code, value.__globals__, name, defaults, cells or None)
    result.__kwdefaults__ = copy_value(value.__kwdefaults__, memo)
    for name in ("__qualname__", "__module__", "__doc__"):
        setattr(result, name, getattr(value, name))
    result.__dict__.update({name: copy_value(item, memo) for name, item in vars(value).items()})
    return result


def _method(value: Any, memo: Memo) -> Any:
    function, owner = copy_value(value.__func__, memo), copy_value(value.__self__, memo)
    return (
        value if owner is value.__self__ and function is value.__func__ else types.MethodType(function, owner)
    )


def _builtin(value: Any, memo: Memo) -> Any:
    owner = value.__self__
    if owner is None or isinstance(owner, types.ModuleType | type):
        return value
    copied = copy_value(owner, memo)
    if copied is owner:
        return value
    return _call(copied, value.__name__) if type(copied) is Stream else getattr(copied, value.__name__)


def _call(owner: Any, name: str) -> Any:
    """A method of a generator that a snapshot keeps as a :class:`Stream`: it is there in the copy of the copy."""
    return lambda *args, **kwargs: getattr(owner, name)(*args, **kwargs)


def _reference(value: Any, memo: Memo) -> Any:
    target = value()
    if target is None:
        return value
    if id(target) not in memo:  # nothing else would keep a copy alive
        raise Unclonable(f"a weak reference to {type(target).__name__} cannot be copied")
    return weakref.ref(memo[id(target)])


def _cached(value: Any, memo: Memo) -> Any:
    function = copy_value(value.__wrapped__, memo)
    return (
        value if function is value.__wrapped__ else functools.lru_cache(**value.cache_parameters())(function)
    )


def _env(value: Any, memo: Memo) -> Any:
    """Attribute by attribute: a class's own pickling may make it anew, without what happened since."""
    result = memo[id(value)] = blank(value)
    result.__dict__.update({name: copy_value(item, memo) for name, item in vars(value).items()})
    return result


def _object(value: Any, memo: Memo) -> Any:
    """By what pickling an object would use."""
    reducer = copyreg.dispatch_table.get(type(value))
    reduced: Any = reducer(value) if reducer else value.__reduce_ex__(4)
    if isinstance(reduced, str):
        return value
    memo.setdefault("alive", []).append(reduced)  # nothing else holds these: their ids must not be used again
    return copy._reconstruct(value, memo, *reduced, deepcopy=copy_value)  # type: ignore[attr-defined]


def _stream(value: Any, memo: Memo) -> Any:
    memo.setdefault("generators", []).append(value.set(None))
    return memo["generators"][-1]


_COPIERS: dict[type, Callable[[Any, Memo], Any]] = {
    tuple: _tuple,
    list: _list,
    dict: _dict,
    np.ndarray: _array,
    types.FunctionType: _function,
    types.CellType: _cell,
    types.MethodType: _method,
    types.BuiltinFunctionType: _builtin,
    types.MethodWrapperType: _builtin,
    weakref.ref: _reference,
    functools._lru_cache_wrapper: _cached,
    Stream: _stream,
}

BASES: dict[type, Callable[[Any, Memo], Any]] = {}
"""Copiers for classes of a library, and all that are derived from them."""

_FOUND: dict[type, Callable[[Any, Memo], Any]] = {}
_QUIET: dict[type, type] = {}


def forget_classes() -> None:
    """Of users: else this module could not be sent to workers that do not have them."""
    _FOUND.clear()
    _QUIET.clear()


def quiet(kind: type) -> type:
    """The class, or one derived from it whose objects are not finalised: the original still uses what that frees."""
    if not hasattr(kind, "__del__"):
        return kind
    if kind not in _QUIET:
        names: dict[str, Any] = {"__del__": lambda self: None}
        names |= {name: getattr(kind, name) for name in ("__module__", "__qualname__")}
        _QUIET[kind] = type(kind)(kind.__name__, (kind,), names)
    return _QUIET[kind]


def blank(env: gymnasium.Env) -> Any:
    """An environment of the same class without attributes, which nothing finalises."""
    return object.__new__(quiet(type(env)))


def deep_copy(env: gymnasium.Env) -> Any:
    """An environment's copy by its own ``__deepcopy__`` or pickling, which nothing finalises."""
    twin = copy.deepcopy(env)
    if quiet(type(twin)) is not type(twin):
        twin.__class__ = quiet(type(twin))
    return twin
