"""Plain forms: values as JSON that is read without running code.

In a plain form, an object with the key ``:kind:`` describes a value that JSON does not know.
"""

from __future__ import annotations

import base64
import contextlib
import functools
import importlib
import inspect
import math
import operator
import pathlib
import sys
import types
from collections import OrderedDict, deque
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import torch
from flax import linen
from gymnasium import spaces
from stable_baselines3.common import utils
from stable_baselines3.common.buffers import BaseBuffer
from stable_baselines3.common.policies import BasePolicy

from sb3_bridge.gymnax.presets import CosineSchedule

KIND = ":kind:"


class NotPlainError(Exception):
    """A value that :func:`encode` has no plain form for."""


def encode(value: Any) -> Any:
    """The plain form of a value.

    Known are None, booleans, numbers, strings, lists, tuples, dicts, deques; NumPy arrays, scalars, dtypes and PCG64
    generators, JAX arrays (loaded as NumPy); Gymnasium's Box, Discrete, MultiDiscrete, MultiBinary and Dict spaces with
    their random states; SB3's schedules (closures of its old makers are loaded as the classes that replaced them); torch
    devices, paths; and what ``_TRUSTED`` lists, by name. In any nesting; anything else, their subclasses too, is a
    NotPlainError.
    """
    if value is None or type(value) in (bool, int, str) or (type(value) is float and math.isfinite(value)):
        return value
    if type(value) is list:
        return [encode(item) for item in value]
    # Our own keys begin with a colon: a user's must not be mistaken for one.
    if type(value) is dict and all(type(key) is str and not key.startswith(":") for key in value):
        return {key: encode(item) for key, item in value.items()}
    if isinstance(value, jax.Array):
        refuse_key(value, "the value")
        return encode(np.asarray(value))
    for name, kind in _KINDS.items():
        if kind.holds(value):
            return {KIND: name} | {field: encode(part) for field, part in kind.to_fields(value).items()}
    raise NotPlainError


def decode(form: Any) -> Any:
    """The value of a plain form; calls nothing but what ``_KINDS`` names. What ``encode`` does not write is any error."""
    if not isinstance(form, dict):
        return [decode(item) for item in form] if isinstance(form, list) else form
    fields = {name: decode(part) for name, part in form.items() if name != KIND}
    if KIND not in form:
        return fields
    if form[KIND] not in _KINDS:
        raise ValueError(f"unknown kind {form[KIND]!r}")
    return _KINDS[form[KIND]].to_value(**fields)


def refuse_key(array: Any, where: str) -> None:
    """Raises a TypeError for a typed PRNG key."""
    if isinstance(array, jax.Array) and jnp.issubdtype(array.dtype, jax.dtypes.prng_key):
        raise TypeError(f"{where} is a typed PRNG key, which no file holds: store jax.random.key_data(key)")


def trusted_name(value: Any) -> tuple[str, str] | None:
    """Module and name under which a file may store a function or class; None: it may not."""
    if not callable(value):
        return None
    for module in filter(sys.modules.__contains__, _TRUSTED):
        # vars: getattr would ask a module's __getattr__, which warns of deprecated names.
        members = vars(sys.modules[module])
        name = getattr(value, "__name__", None)
        if isinstance(value, functools.partial):  # optax.nadam is one, and has no name of its own
            name = next((name for name, member in members.items() if member is value), None)
        if isinstance(name, str) and members.get(name) is value and _TRUSTED[module](value):
            return module, name
    return None


def _subclass_of(*bases: type) -> Callable[[Any], bool]:
    return lambda value: isinstance(value, type) and issubclass(value, bases)


def _is_function(value: Any, package: str) -> bool:
    function = value.func if isinstance(value, functools.partial) else value
    is_own = str(function.__module__).split(".")[0] == package  # not imported for the package's own use
    return is_own and callable(function) and not isinstance(function, type)


# fmt: off
_ELEMENTWISE = (
    "abs", "absolute", "arcsinh", "arctan", "cos", "exp", "expm1", "log1p", "sign", "sin", "sinc", "sinh", "sqrt",
    "square", "tanh",
)
# fmt: on
_TRUSTED: dict[str, Callable[[Any], bool]] = {
    "sb3_bridge.policies": _subclass_of(torch.nn.Module, linen.Module),
    "jax.nn": lambda value: _is_function(value, "jax"),
    "jax.nn.initializers": lambda value: _is_function(value, "jax"),
    # By name: this module has functions that read files, and unpickle them.
    "jax.numpy": lambda value: isinstance(value, type(jnp.float32)) or value.__name__ in _ELEMENTWISE,
    "flax.linen": _subclass_of(linen.Module),
    "optax": lambda value: _is_function(value, "optax"),
    "numpy": _subclass_of(np.generic),
    "torch.nn": _subclass_of(torch.nn.Module),
    "torch.optim": _subclass_of(torch.optim.Optimizer),
    "stable_baselines3.common.policies": _subclass_of(torch.nn.Module),
    "stable_baselines3.common.torch_layers": _subclass_of(torch.nn.Module),
    "stable_baselines3.common.buffers": _subclass_of(BaseBuffer),
}
"""Modules whose functions and classes are stored by name -> which of them. A file can call for nothing else."""


def _to_reference(module: str, name: str) -> Any:
    may_be_looked_up = module in _TRUSTED and not name.startswith("_")
    value = vars(importlib.import_module(module)).get(name) if may_be_looked_up else None
    if value is None or not _TRUSTED[module](value):
        raise ValueError(f"{module}.{name} is not among the functions and classes that a file may name")
    return value


def _dtype_name(dtype: np.dtype) -> str:
    text = dtype.name if dtype.kind == "V" else dtype.str  # the first for bfloat16 and its like
    with contextlib.suppress(TypeError):
        if np.dtype(text) == dtype and not dtype.hasobject:
            return text
    raise NotPlainError


def _to_dtype(text: str) -> np.dtype:
    dtype = np.dtype(str(text))
    if dtype.hasobject:
        raise ValueError(f"dtype {text!r} holds Python objects")
    return dtype


def _array_fields(value: Any) -> dict[str, Any]:
    content = base64.b64encode(value.tobytes()).decode()
    return {"dtype": _dtype_name(value.dtype), "shape": list(value.shape), "content": content}


def _to_array(dtype: str, shape: list[int], content: str) -> np.ndarray:
    numbers, element = base64.b64decode(content, validate=True), _to_dtype(dtype)
    if math.prod(shape) * element.itemsize != len(numbers):
        raise ValueError(f"{len(numbers)} bytes for {element}{shape}")
    return np.ndarray(tuple(shape), element, numbers).copy()


def _is_scalar(value: Any) -> bool:
    # But strings, which lose zeros at their ends as arrays, and what a user derived from a scalar.
    kinds = isinstance(value, np.generic) and value.dtype.kind not in "SU"
    return kinds and type(value) is np.asarray(value).dtype.type


def _to_generator(state: dict[str, Any]) -> np.random.Generator:
    generator = np.random.Generator(np.random.PCG64(0))
    generator.bit_generator.state = state
    return generator


def _to_box(
    seed: Any, low: np.ndarray, high: np.ndarray, bounded_below: np.ndarray, bounded_above: np.ndarray
) -> spaces.Box:
    space = spaces.Box(low, high, low.shape, low.dtype.type, seed)
    # The bounds of an integer space do not tell whether it was made without any.
    space.bounded_below, space.bounded_above = bounded_below, bounded_above
    return space


def _to_discrete(seed: Any, n: np.integer, start: np.integer) -> spaces.Discrete:
    # Gymnasium 1.1 knows int64 only, and has no argument for it.
    other = {} if n.dtype == np.int64 else {"dtype": n.dtype.type}
    return spaces.Discrete(n, seed, start, **other)


_CLOSURES: dict[str, type] = {
    "get_linear_fn.<locals>.func": utils.LinearSchedule,
    "constant_fn.<locals>.func": utils.ConstantSchedule,
    "get_schedule_fn.<locals>.<lambda>": utils.FloatSchedule,
}
"""Functions that SB3's deprecated makers return, by name -> the class with the same arguments."""


def _is_closure(value: Any) -> bool:
    is_sb3s = isinstance(value, types.FunctionType) and value.__module__ == utils.__name__
    return is_sb3s and value.__qualname__ in _CLOSURES


class _Kind(NamedTuple):
    """How values of one class, or those that a function accepts, are taken apart and made again."""

    of: type | Callable[[Any], bool]
    to_fields: Callable[[Any], dict[str, Any]]
    to_value: Callable[..., Any]

    def holds(self, value: Any) -> bool:
        return type(value) is self.of if isinstance(self.of, type) else self.of(value)


def _text(owner: type, to_text: Callable[[Any], str] = str) -> _Kind:
    return _Kind(owner, lambda value: {"text": to_text(value)}, lambda text: owner(str(text)))


def _pairs(owner: type) -> _Kind:
    return _Kind(owner, lambda x: {"items": [list(pair) for pair in x.items()]}, lambda items: owner(items))


def _space(owner: type, to_value: Callable[..., Any]) -> _Kind:
    names = tuple(inspect.signature(to_value).parameters)
    fields = operator.attrgetter("_np_random", *names[1:])  # the first argument is the seed
    return _Kind(owner, lambda space: dict(zip(names, fields(space), strict=True)), to_value)


def _schedule(owner: type) -> _Kind:
    names = inspect.signature(owner).parameters.keys()
    return _Kind(lambda x: type(x) is owner and vars(x).keys() == names, lambda x: dict(vars(x)), owner)


_KINDS: dict[str, _Kind] = {
    "float": _text(float, repr),
    "tuple": _Kind(tuple, lambda x: {"items": list(x)}, lambda items: tuple(items)),
    "dict": _pairs(dict),
    "OrderedDict": _pairs(OrderedDict),
    "deque": _Kind(
        deque,
        lambda x: {"items": list(x), "maxlen": x.maxlen},
        lambda items, maxlen: deque(items, maxlen),
    ),
    "path": _text(type(pathlib.Path())),
    "device": _text(torch.device),
    "dtype": _Kind(lambda x: isinstance(x, np.dtype), lambda x: {"text": _dtype_name(x)}, _to_dtype),
    "ndarray": _Kind(np.ndarray, _array_fields, _to_array),
    "scalar": _Kind(_is_scalar, _array_fields, lambda **fields: _to_array(**fields)[()]),
    "generator": _Kind(
        lambda x: type(x) is np.random.Generator and type(x.bit_generator) is np.random.PCG64,
        lambda x: {"state": dict(x.bit_generator.state)},
        _to_generator,
    ),
    "Box": _space(spaces.Box, _to_box),
    "Discrete": _space(spaces.Discrete, _to_discrete),
    "MultiDiscrete": _space(
        spaces.MultiDiscrete,
        lambda seed, nvec, start: spaces.MultiDiscrete(nvec, nvec.dtype.type, seed, start),
    ),
    "MultiBinary": _space(spaces.MultiBinary, lambda seed, n: spaces.MultiBinary(n, seed)),
    "Dict": _Kind(
        spaces.Dict,
        # Gymnasium sorts a dict's keys, and takes an OrderedDict as it is.
        lambda x: {"seed": x._np_random, "parts": OrderedDict(x.spaces)},
        lambda seed, parts: spaces.Dict(parts, seed),
    ),
    "FloatSchedule": _schedule(utils.FloatSchedule),
    "LinearSchedule": _schedule(utils.LinearSchedule),
    "ConstantSchedule": _schedule(utils.ConstantSchedule),
    "CosineSchedule": _schedule(CosineSchedule),
    "schedule_closure": _Kind(
        _is_closure,
        lambda x: {"schedule": _CLOSURES[x.__qualname__](**inspect.getclosurevars(x).nonlocals)},
        lambda schedule: schedule,
    ),
    # SB3 stores it in place of the schedule when a policy is saved alone.
    "dummy_schedule": _Kind(
        lambda x: x is BasePolicy._dummy_schedule, lambda _: {}, lambda: BasePolicy._dummy_schedule
    ),
    "reference": _Kind(
        lambda x: trusted_name(x) is not None,
        lambda x: dict(zip(("module", "name"), trusted_name(x) or (), strict=True)),
        _to_reference,
    ),
}
