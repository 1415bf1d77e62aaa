"""The zip of a model: SB3's layout, parameters without pickle, and a JSON that is read without running code.

Entries: ``data`` (JSON), one ``<name>.msgpack`` for each tree of parameters, the versions, ``system_info.txt``. A value that
JSON would change is an object of up to three keys: ``:plain:`` (a form of ours, the only one that is read back unless
``allow_pickle=True``), ``:type:`` and ``:serialized:`` (SB3's pickle, so that SB3's own tools read the file).
"""

from __future__ import annotations

import base64
import contextlib
import functools
import importlib
import io
import json
import math
import os
import pathlib
import pickle
import pkgutil
import sys
import types
import warnings
import zipfile
from collections import OrderedDict, deque
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple, TypeVar

import cloudpickle  # type: ignore[import-untyped]
import flax
import jax
import jax.numpy as jnp
import numpy as np
import stable_baselines3
import torch
from flax import linen, serialization, traverse_util
from gymnasium import spaces
from stable_baselines3.common import utils
from stable_baselines3.common.buffers import BaseBuffer
from stable_baselines3.common.policies import BasePolicy
from stable_baselines3.common.save_util import open_path

import grpo_jax
from grpo_jax.training.checkpoint import write_atomically
from grpo_jax.types import PyTree
from sb3_bridge.gymnax.presets import CosineSchedule

KIND, PLAIN, TYPE, PICKLED = ":kind:", ":plain:", ":type:", ":serialized:"
PARAMETERS = ".msgpack"

File = str | pathlib.Path | io.BufferedIOBase
Policy = TypeVar("Policy")


class NotPlainError(Exception):
    """A value that :func:`encode` has no plain form for."""


# --- The file ---------------------------------------------------------------------------------------------------------


def save_zip(path: File, data: dict[str, Any], params: dict[str, PyTree]) -> None:
    """Writes a model; a save that fails leaves the old file as it was.

    Args:
      path: the file (``.zip`` is added where there is no suffix; a missing folder is made and a folder of that name is
        stepped aside for, both with a warning, as SB3 does), or a writable binary file object.
      data: attributes by name: anything, see :func:`encode` for what is loaded again without a pickle.
      params: nested dicts of arrays (NumPy, JAX) and plain numbers, by name.

    Raises:
      TypeError: a value that cannot be stored, or a path that is none.
    """
    attributes = {_checked_name(name): _to_entry(name, value) for name, value in data.items()}
    content = io.BytesIO()
    with zipfile.ZipFile(content, "w") as archive:
        archive.writestr("data", json.dumps(attributes, indent=4, allow_nan=False))
        for name, tree in params.items():
            plain = _storable(tree, f"params[{name!r}]")
            archive.writestr(_checked_name(name) + PARAMETERS, serialization.msgpack_serialize(plain))
        archive.writestr("_stable_baselines3_version", stable_baselines3.__version__)
        archive.writestr("_grpo_jax_version", grpo_jax.__version__)
        archive.writestr("system_info.txt", _system_info())
    if isinstance(path, str | pathlib.Path):
        write_atomically(_target(pathlib.Path(path)), content.getvalue())
    else:
        open_path(path, "w").write(content.getvalue())


def load_zip(
    path: File,
    *,
    custom_objects: dict[str, Any] | None = None,
    allow_pickle: bool = False,
    load_data: bool = True,
    print_system_info: bool = False,
) -> tuple[dict[str, Any], dict[str, PyTree]]:
    """Reads what :func:`save_zip` wrote, running nothing that the file brings unless ``allow_pickle`` is set.

    Args:
      path: the file, also without its ``.zip``, or a readable binary file object.
      custom_objects: attributes that replace those of the file, which are then not read at all.
      allow_pickle: unpickles what has no plain form. A pickle runs whatever its author wants: for trusted files only.
      load_data: False: parameters alone, ``data`` is ``{}``.
      print_system_info: prints what the file was saved with.

    Returns:
      data: without what is stored as a pickle only; one warning names all of these.
      params: nested dicts of writable NumPy arrays.

    Raises:
      FileNotFoundError: no such file.
      ValueError: not such a file, a damaged one, or another algorithm's: names the path, the entry and the fix.
    """
    if custom_objects is not None and not isinstance(custom_objects, dict):
        raise ValueError(f"custom_objects={custom_objects!r} must be a dict (attribute -> object) or None")
    with _archive(path) as archive:
        names = archive.namelist()
        if print_system_info:
            _print_system_info(path, archive)
        stored = [name for name in names if name.endswith(PARAMETERS)]
        if not stored:
            raise _no_parameters(path, archive)
        params = {
            name.removesuffix(PARAMETERS): _restored(path, name, _read(path, archive, name))
            for name in stored
        }
        if not load_data:
            return {}, params
        if "data" not in names:
            raise ValueError(
                f"{path} has no entry 'data': it is not a model's or policy's file, or was damaged"
            )
        attributes = _parse(path, _read(path, archive, "data"))
    return _from_entries(path, attributes, custom_objects or {}, allow_pickle), params


def policy_to_file(policy: Any, path: File) -> None:
    """Writes a policy alone: its constructor's arguments as ``data``, its ``state_dict()`` as ``params["policy"]``.

    Raises:
      TypeError: as :func:`save_zip`.
    """
    arrays = {name: _to_numpy(tensor) for name, tensor in policy.state_dict().items()}
    tree = traverse_util.unflatten_dict(arrays, sep=".")
    save_zip(path, policy._get_constructor_parameters(), {"policy": tree})


def policy_from_file(
    cls: Callable[..., Policy],
    path: File,
    device: torch.device | str = "auto",
    *,
    custom_objects: dict[str, Any] | None = None,
    allow_pickle: bool = False,
) -> Policy:
    """Reads a policy that :func:`policy_to_file` wrote.

    Args:
      cls: the policy's class, called with the stored arguments.
      path: as in :func:`load_zip`.
      device: the torch device the policy is moved to.
      custom_objects: as in :func:`load_zip`.
      allow_pickle: as in :func:`load_zip`.

    Raises:
      FileNotFoundError: no such file.
      ValueError: no policy's file, or not one of ``cls``.
    """
    data, params = load_zip(path, custom_objects=custom_objects, allow_pickle=allow_pickle)
    if "policy_class" in data or "policy" not in params:
        raise ValueError(f"{path} holds a whole model, not a policy alone: use GRPO.load(path).policy")
    try:
        policy: Any = cls(**data)
    except TypeError as error:
        raise ValueError(
            f"{path} does not hold what the policy is made from ({error}); pass what is missing in custom_objects"
        ) from error
    arrays = traverse_util.flatten_dict(params["policy"], sep=".")
    policy.load_state_dict({name: _to_torch(array) for name, array in arrays.items()})
    return policy.to(utils.get_device(device))


def _target(path: pathlib.Path) -> pathlib.Path:
    """Where SB3's ``open_path`` would write."""
    if path.suffix == "":
        path = pathlib.Path(f"{path}.zip")
    while path.is_dir():
        warnings.warn(f"{path} is a folder: saving to {path}_2 instead", stacklevel=3)
        path = pathlib.Path(f"{path}_2")
    if not path.parent.exists():
        warnings.warn(f"the folder {path.parent} does not exist: making it", stacklevel=3)
        path.parent.mkdir(parents=True, exist_ok=True)
    # A link goes on pointing to the file it points to.
    return pathlib.Path(os.path.realpath(path))


def _system_info() -> str:
    versions = {"JAX": jax.__version__, "Flax": flax.__version__, "GRPO-JAX": grpo_jax.__version__}
    ours = "".join(f"- {name}: {version}\n" for name, version in versions.items())
    return utils.get_system_info(print_info=False)[1] + ours


def _print_system_info(path: File, archive: zipfile.ZipFile) -> None:
    print("== SAVED MODEL SYSTEM INFO ==")
    if "system_info.txt" in archive.namelist():
        print(_read(path, archive, "system_info.txt").decode(errors="replace"))
    else:
        print(f"{path} has no system_info.txt")


@contextlib.contextmanager
def _archive(path: File) -> Iterator[zipfile.ZipFile]:
    file = open_path(path, "r", suffix="zip")
    try:
        try:
            archive = zipfile.ZipFile(file)
        except Exception as error:  # a damaged directory raises more than BadZipFile
            raise ValueError(f"{path} is not a zip file, or is cut off or damaged ({error})") from error
        with archive:
            yield archive
    finally:
        if isinstance(path, str | pathlib.Path):
            file.close()


def _read(path: File, archive: zipfile.ZipFile, name: str) -> bytes:
    try:
        return archive.read(name)
    except Exception as error:
        raise _damaged(path, name, error) from error


def _parse(path: File, content: bytes) -> dict[str, Any]:
    try:
        attributes = json.loads(content.decode())
        if not isinstance(attributes, dict):
            raise TypeError(f"expected an object, got {type(attributes).__name__}")
    except Exception as error:
        raise _damaged(path, "data", error) from error
    return attributes


def _damaged(path: File, name: str, error: Exception) -> ValueError:
    return ValueError(f"{path}: entry {name!r} is damaged ({type(error).__name__}: {error})")


# What tells SB3's algorithms apart in their files, the first that fits.
_ATTRIBUTES = {
    "clip_range": "PPO",
    "target_entropy": "SAC",
    "policy_delay": "TD3",
    "exploration_schedule": "DQN",
    "gae_lambda": "A2C",
}


def _no_parameters(path: File, archive: zipfile.ZipFile) -> ValueError:
    names = archive.namelist()
    if not any(name.endswith(".pth") for name in names):
        return ValueError(
            f"{path} holds no parameters (no entry *{PARAMETERS}; it has {', '.join(names) or 'none'})"
        )
    attributes = _parse(path, _read(path, archive, "data")) if "data" in names else {}
    if "sb3_contrib" in str(attributes.get("policy_class")):
        return ValueError(f"{path} was saved by an algorithm of sb3_contrib: load it with that one")
    known = [algorithm for attribute, algorithm in _ATTRIBUTES.items() if attribute in attributes]
    owner = f"stable_baselines3.{known[0]}" if known else "the Stable-Baselines3 algorithm that saved it"
    return ValueError(f"{path} holds torch parameters (*.pth) of another algorithm: load it with {owner}")


# --- Parameters -------------------------------------------------------------------------------------------------------


def _storable(tree: PyTree, where: str) -> PyTree:
    """The tree as msgpack takes it; native byte order, because msgpack's form has none."""
    if isinstance(tree, dict):
        return {_checked_name(name): _storable(branch, f"{where}[{name!r}]") for name, branch in tree.items()}
    if tree is None or type(tree) in (bool, int, float):
        return tree
    if isinstance(tree, np.ndarray | np.generic | jax.Array):
        _refuse_key(tree, where)
        array = np.asarray(tree)
        array = array.astype(array.dtype.newbyteorder("="), copy=False)
        with contextlib.suppress(TypeError):
            if np.dtype(array.dtype.name) == array.dtype and not array.dtype.hasobject:
                return array[()] if isinstance(tree, np.generic) else array
        raise TypeError(f"{where} has dtype {array.dtype}, which cannot be stored: cast it to numbers")
    raise TypeError(f"{where} is a {type(tree).__name__}: parameters are nested dicts of NumPy or JAX arrays")


def _restored(path: File, name: str, content: bytes) -> PyTree:
    try:
        return _writable(serialization.msgpack_restore(content))
    except Exception as error:
        raise _damaged(path, name, error) from error


def _writable(tree: PyTree) -> PyTree:
    if isinstance(tree, dict):
        return {name: _writable(branch) for name, branch in tree.items()}
    if isinstance(tree, np.ndarray):
        return tree.copy()
    if tree is None or isinstance(tree, bool | int | float | np.generic):
        return tree
    raise TypeError(f"unexpected {type(tree).__name__}")


def _refuse_key(array: Any, where: str) -> None:
    if isinstance(array, jax.Array) and jnp.issubdtype(array.dtype, jax.dtypes.prng_key):
        raise TypeError(f"{where} is a typed PRNG key, which no file holds: store jax.random.key_data(key)")


def _to_numpy(tensor: Any) -> np.ndarray:
    if not isinstance(tensor, torch.Tensor):
        return np.asarray(tensor)
    tensor = tensor.detach().cpu()
    if tensor.dtype == torch.bfloat16:  # which torch does not hand to NumPy
        return tensor.view(torch.int16).numpy().view(jnp.bfloat16)
    return tensor.numpy()


def _to_torch(array: np.ndarray) -> torch.Tensor:
    if array.dtype == jnp.bfloat16:
        return torch.from_numpy(array.view(np.int16)).view(torch.bfloat16)
    return torch.from_numpy(array)


def _checked_name(name: Any) -> str:
    if not isinstance(name, str) or not name:
        raise TypeError(f"the name {name!r} must be a string, and not an empty one")
    return name


# --- Attributes -------------------------------------------------------------------------------------------------------


def _to_entry(name: str, value: Any) -> Any:
    entry: dict[str, Any] = {TYPE: str(type(value))}
    try:
        if _is_json(value):
            return value
        entry[PLAIN] = encode(value)
    except (NotPlainError, RecursionError):  # a container that holds itself recurses
        pass
    except TypeError as error:
        raise TypeError(f"data[{name!r}]: {error}") from error
    try:
        entry[PICKLED] = base64.b64encode(_pickle(value)).decode()
    except Exception as error:
        if PLAIN not in entry:
            raise TypeError(
                f"{name!r} ({type(value).__name__}) can be stored neither in a plain form nor as a pickle"
                f" ({type(error).__name__}: {error}); leave it out: save(path, exclude=[{name!r}])"
            ) from error
    return entry


def _from_entries(
    path: File, attributes: dict[str, Any], custom_objects: dict[str, Any], allow_pickle: bool
) -> dict[str, Any]:
    data: dict[str, Any] = {}
    left_out = []
    for name, entry in attributes.items():
        if name in custom_objects:
            data[name] = custom_objects[name]
        elif not isinstance(entry, dict) or not {PLAIN, PICKLED} & entry.keys():
            data[name] = entry
        elif PLAIN in entry:
            try:
                data[name] = decode(entry[PLAIN])
            except Exception as error:
                raise ValueError(
                    f"{path}: {name!r} in entry 'data' cannot be read ({type(error).__name__}: {error}); if the file is"
                    f" sound otherwise, pass custom_objects={{{name!r}: ...}}"
                ) from error
        elif not allow_pickle:
            left_out.append(name)
        else:
            try:
                data[name] = pickle.loads(base64.b64decode(entry[PICKLED]))
            except Exception as error:
                warnings.warn(
                    f"{path}: the pickle of {name!r} cannot be read ({type(error).__name__}: {error}) and was left out;"
                    f" pass custom_objects={{{name!r}: ...}} in its place",
                    stacklevel=3,
                )
    if left_out:
        objects = ", ".join(f"{name!r}: ..." for name in left_out)
        warnings.warn(
            f"{path}: left out {', '.join(left_out)}, stored as a pickle, which could run any code: pass"
            f" custom_objects={{{objects}}} or, if you trust the file, allow_pickle=True",
            stacklevel=3,
        )
    return data


class _Pickler(cloudpickle.Pickler):
    """Keeps JAX's functions by name: jitted ones are otherwise taken apart, and load as other functions."""

    def reducer_override(self, value: Any) -> Any:
        found = _trusted_name(value)
        if found is None:
            return super().reducer_override(value)
        return pkgutil.resolve_name, (":".join(found),)


def _pickle(value: Any) -> bytes:
    content = io.BytesIO()
    _Pickler(content).dump(value)
    return content.getvalue()


# --- Plain forms ------------------------------------------------------------------------------------------------------


def encode(value: Any) -> Any:
    """The plain form of a value: JSON, in which an object with the key ``:kind:`` stands for what JSON has not.

    Known are None, booleans, numbers, strings, lists, tuples, dicts, deques; NumPy arrays, scalars, dtypes and PCG64
    generators, JAX arrays (loaded as NumPy); Gymnasium's Box, Discrete, MultiDiscrete, MultiBinary and Dict spaces with
    their random states; SB3's schedules (its old closures are loaded as the classes that replaced them); torch devices,
    paths; what ``_TRUSTED`` lists, by name. In any nesting. Subclasses of these are not known.

    Raises:
      NotPlainError: anything else.
      TypeError: a typed PRNG key.
    """
    if _is_json(value):
        return value
    if type(value) is list:
        return [encode(item) for item in value]
    if type(value) is dict and all(_is_plain_key(key) for key in value):
        return {key: encode(item) for key, item in value.items()}
    if isinstance(value, jax.Array):
        _refuse_key(value, "the value")
        return encode(np.asarray(value))
    for name, kind in _KINDS.items():
        if kind.holds(value):
            return {KIND: name} | {field: encode(part) for field, part in kind.to_fields(value).items()}
    raise NotPlainError


def decode(form: Any) -> Any:
    """The value of a plain form; calls nothing but what ``_KINDS`` names.

    Raises:
      Exception: of any type, for a form that :func:`encode` does not write.
    """
    if isinstance(form, list):
        return [decode(item) for item in form]
    if not isinstance(form, dict):
        return form
    fields = {name: decode(part) for name, part in form.items() if name != KIND}
    if KIND not in form:
        return fields
    if form[KIND] not in _KINDS:
        raise ValueError(f"unknown kind {form[KIND]!r}")
    return _KINDS[form[KIND]].to_value(**fields)


def _is_json(value: Any) -> bool:
    """Whether JSON gives back the very same."""
    if type(value) is float:
        return math.isfinite(value)
    if type(value) is list:
        return all(_is_json(item) for item in value)
    if type(value) is dict:
        return all(_is_plain_key(key) and _is_json(item) for key, item in value.items())
    return value is None or type(value) in (bool, int, str)


def _is_plain_key(key: Any) -> bool:
    # Our own keys begin with a colon: a user's must not be mistaken for one.
    return type(key) is str and not key.startswith(":")


def _dtype_fields(dtype: np.dtype) -> dict[str, Any]:
    if not dtype.hasobject and dtype.names is None and dtype.subdtype is None:
        for text in (dtype.str, dtype.name):  # the second for bfloat16 and its like
            with contextlib.suppress(TypeError):
                if np.dtype(text) == dtype:
                    return {"text": text}
    raise NotPlainError


def _to_dtype(text: str) -> np.dtype:
    dtype = np.dtype(str(text))
    if dtype.hasobject:
        raise ValueError(f"dtype {text!r} holds Python objects")
    return dtype


def _array_fields(array: np.ndarray) -> dict[str, Any]:
    content = base64.b64encode(array.tobytes()).decode()
    return {"dtype": _dtype_fields(array.dtype)["text"], "shape": list(array.shape), "content": content}


def _to_array(dtype: str, shape: list[int], content: str) -> np.ndarray:
    numbers, element = base64.b64decode(content, validate=True), _to_dtype(dtype)
    if math.prod(shape) * element.itemsize != len(numbers):
        raise ValueError(f"{len(numbers)} bytes for {element}{shape}")
    return np.ndarray(tuple(shape), element, numbers).copy()


def _is_scalar(value: Any) -> bool:
    # Strings apart, which lose zeros at their ends as arrays; and what a user derived from a scalar.
    return (
        isinstance(value, np.generic)
        and value.dtype.kind not in "SU"
        and type(value) is np.asarray(value).dtype.type
    )


def _generator_fields(generator: np.random.Generator) -> dict[str, Any]:
    if type(generator.bit_generator) is not np.random.PCG64:
        raise NotPlainError
    return {"state": dict(generator.bit_generator.state)}


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


def _to_multi_discrete(seed: Any, nvec: np.ndarray, start: np.ndarray) -> spaces.MultiDiscrete:
    return spaces.MultiDiscrete(nvec, nvec.dtype.type, seed, start)


def _code(maker: Callable[..., Any]) -> types.CodeType:
    return next(constant for constant in maker.__code__.co_consts if isinstance(constant, types.CodeType))


_CLOSURES: dict[types.CodeType, Callable[..., Any]] = {
    _code(utils.get_linear_fn): utils.LinearSchedule,
    _code(utils.constant_fn): utils.ConstantSchedule,
    _code(utils.get_schedule_fn): utils.FloatSchedule,
}
"""Code of the functions that SB3's deprecated makers return -> the class with the same arguments."""


def _closure_fields(closure: types.FunctionType) -> dict[str, Any]:
    cells = [cell.cell_contents for cell in closure.__closure__ or ()]
    arguments = dict(zip(closure.__code__.co_freevars, cells, strict=True))
    return {"schedule": _CLOSURES[closure.__code__](**arguments)}


def _subclass_of(*bases: type) -> Callable[[Any], bool]:
    return lambda value: isinstance(value, type) and issubclass(value, bases)


def _function_of(package: str) -> Callable[[Any], bool]:
    def may_be_named(value: Any) -> bool:
        function = value.func if isinstance(value, functools.partial) else value
        # Not what the package imported for its own use.
        is_own = str(function.__module__).split(".")[0] == package
        return is_own and callable(function) and not isinstance(function, type)

    return may_be_named


# fmt: off
_ELEMENTWISE = frozenset([
    "abs", "absolute", "arcsinh", "arctan", "cos", "exp", "expm1", "log1p",
    "sign", "sin", "sinc", "sinh", "sqrt", "square", "tanh",
])
# fmt: on

_TRUSTED: dict[str, Callable[[Any], bool]] = {
    "sb3_bridge.policies": _subclass_of(torch.nn.Module, linen.Module),
    "jax.nn": _function_of("jax"),
    "jax.nn.initializers": _function_of("jax"),
    # By name: this module has functions that read files, and unpickle them.
    "jax.numpy": lambda value: isinstance(value, type(jnp.float32)) or value.__name__ in _ELEMENTWISE,
    "flax.linen": _subclass_of(linen.Module),
    "optax": _function_of("optax"),
    "numpy": _subclass_of(np.generic),
    "torch.nn": _subclass_of(torch.nn.Module),
    "torch.optim": _subclass_of(torch.optim.Optimizer),
    "stable_baselines3.common.policies": _subclass_of(torch.nn.Module),
    "stable_baselines3.common.torch_layers": _subclass_of(torch.nn.Module),
    "stable_baselines3.common.buffers": _subclass_of(BaseBuffer),
}
"""Modules whose functions and classes are stored by name -> which of them. A file can call for nothing else."""


def _trusted_name(value: Any) -> tuple[str, str] | None:
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


def _reference_fields(value: Any) -> dict[str, Any]:
    module, name = _trusted_name(value) or ("", "")
    return {"module": module, "name": name}


def _to_reference(module: str, name: str) -> Any:
    may_be_looked_up = module in _TRUSTED and not name.startswith("_")
    value = vars(importlib.import_module(module)).get(name) if may_be_looked_up else None
    if value is None or not _TRUSTED[module](value):
        raise ValueError(f"{module}.{name} is not among the functions and classes that a file may name")
    return value


class _Kind(NamedTuple):
    holds: Callable[[Any], bool]
    to_fields: Callable[[Any], dict[str, Any]]
    to_value: Callable[..., Any]


def _exactly(owner: type, to_fields: Callable[[Any], dict[str, Any]], to_value: Callable[..., Any]) -> _Kind:
    return _Kind(lambda value: type(value) is owner, to_fields, to_value)


def _space(owner: type, to_value: Callable[..., Any], *names: str) -> _Kind:
    def to_fields(space: Any) -> dict[str, Any]:
        return {"seed": space._np_random} | {name: getattr(space, name) for name in names}

    return _exactly(owner, to_fields, to_value)


def _schedule(owner: type, *names: str) -> _Kind:
    return _Kind(
        lambda value: type(value) is owner and vars(value).keys() == set(names),
        lambda schedule: dict(vars(schedule)),
        owner,
    )


_KINDS: dict[str, _Kind] = {
    "float": _exactly(float, lambda x: {"text": repr(x)}, lambda text: float(text)),
    "tuple": _exactly(tuple, lambda x: {"items": list(x)}, lambda items: tuple(items)),
    "dict": _exactly(
        dict, lambda x: {"items": [list(pair) for pair in x.items()]}, lambda items: dict(items)
    ),
    "OrderedDict": _exactly(
        OrderedDict, lambda x: {"items": [list(pair) for pair in x.items()]}, lambda items: OrderedDict(items)
    ),
    "deque": _exactly(
        deque, lambda x: {"items": list(x), "maxlen": x.maxlen}, lambda items, maxlen: deque(items, maxlen)
    ),
    "path": _exactly(type(pathlib.Path()), lambda x: {"text": str(x)}, lambda text: pathlib.Path(str(text))),
    "device": _exactly(torch.device, lambda x: {"text": str(x)}, lambda text: torch.device(str(text))),
    "dtype": _Kind(lambda value: isinstance(value, np.dtype), _dtype_fields, _to_dtype),
    "ndarray": _exactly(np.ndarray, _array_fields, _to_array),
    "scalar": _Kind(
        _is_scalar, lambda x: _array_fields(np.asarray(x)), lambda **fields: _to_array(**fields)[()]
    ),
    "generator": _exactly(np.random.Generator, _generator_fields, _to_generator),
    "Box": _space(spaces.Box, _to_box, "low", "high", "bounded_below", "bounded_above"),
    "Discrete": _space(spaces.Discrete, _to_discrete, "n", "start"),
    "MultiDiscrete": _space(spaces.MultiDiscrete, _to_multi_discrete, "nvec", "start"),
    "MultiBinary": _space(spaces.MultiBinary, lambda seed, n: spaces.MultiBinary(n, seed), "n"),
    "Dict": _exactly(
        spaces.Dict,
        # Gymnasium sorts a dict's keys, and takes an OrderedDict as it is.
        lambda x: {"seed": x._np_random, "parts": OrderedDict(x.spaces)},
        lambda seed, parts: spaces.Dict(parts, seed),
    ),
    "FloatSchedule": _schedule(utils.FloatSchedule, "value_schedule"),
    "LinearSchedule": _schedule(utils.LinearSchedule, "start", "end", "end_fraction"),
    "ConstantSchedule": _schedule(utils.ConstantSchedule, "val"),
    "CosineSchedule": _schedule(CosineSchedule, "start"),
    "schedule_closure": _Kind(
        lambda value: isinstance(value, types.FunctionType) and value.__code__ in _CLOSURES,
        _closure_fields,
        lambda schedule: schedule,
    ),
    # What stands for the schedule in an SB3 policy that is saved alone.
    "dummy_schedule": _Kind(
        lambda value: value is BasePolicy._dummy_schedule, lambda _: {}, lambda: BasePolicy._dummy_schedule
    ),
    "reference": _Kind(lambda value: _trusted_name(value) is not None, _reference_fields, _to_reference),
}
