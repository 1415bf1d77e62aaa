"""What changes: fingerprints of values, and what all instances of an environment share beside their attributes."""

from __future__ import annotations

import hashlib
import pickle
import sys
import types
import zlib
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, NamedTuple

import gymnasium

from sb3_bridge.clones.copying import PLAIN

# Libraries that keep nothing of an environment's state in their classes and globals.
_FOREIGN = """
    gymnasium numpy stable_baselines3 torch jax jaxlib flax scipy pandas cloudpickle pygame mujoco matplotlib
    grpo_jax sb3_bridge gymnax chex optax Box2D
""".split()  # noqa: SIM905
_JAX = {"jax", "jaxlib", "flax", "gymnax", "brax", "jumanji", "pgx", "grpo_jax", "sb3_bridge"}
_LARGE = 1 << 20  # bytes above which a value is looked at once at the end only


class Fingerprint(NamedTuple):
    """Of a value: equal where nothing in it changed."""

    digest: bytes
    size: int  # bytes that were read
    refers: bool  # whether an environment is among it


class _Hash(pickle.Pickler):
    """Pickles into a hash: nothing of the value is ever copied."""

    def __init__(self) -> None:
        self.hash, self.size, self.refers = hashlib.blake2b(digest_size=16), 0, False
        super().__init__(self, protocol=5, buffer_callback=self._buffer)

    def write(self, data: Any) -> None:
        self.hash.update(data)
        self.size += len(data)

    def _buffer(self, buffer: pickle.PickleBuffer) -> None:
        raw = buffer.raw()
        self.hash.update(b"%d %d" % (zlib.crc32(raw), len(raw)))
        self.size += len(raw)

    def persistent_id(self, value: Any) -> Any:
        if isinstance(value, gymnasium.Env):
            self.refers = True
            return f"env {type(value).__qualname__}"
        if type(value).__module__.startswith(("gymnax.", "grpo_jax.")):
            return f"pure {id(value)}"  # worlds never change; what they compiled does
        if isinstance(value, types.ModuleType):
            return f"module {value.__name__}"
        return f"class {value.__module__}.{value.__qualname__}" if isinstance(value, type) else None

    def reducer_override(self, value: Any) -> Any:
        if not isinstance(value, types.FunctionType):
            return NotImplemented
        code = value.__code__
        content = [_content(cell) for cell in value.__closure__ or ()]
        constants = [constant for constant in code.co_consts if type(constant) in PLAIN]
        place = (value.__module__, value.__qualname__, code.co_code, code.co_names, constants)
        return object, (), (place, value.__defaults__, value.__kwdefaults__, content)


def _content(cell: types.CellType) -> Any:
    try:
        return cell.cell_contents
    except ValueError:
        return None  # still empty


def fingerprint(value: Any) -> Fingerprint | None:
    """The fingerprint of a value; None where its own pickling raises, so that its changes cannot be seen."""
    pickler = _Hash()
    try:
        pickler.dump(value)
    except Exception:
        return None
    return Fingerprint(pickler.hash.digest(), pickler.size, pickler.refers)


class SharedState:
    """What replicas and the real environment share, and whether it changes; ``kinds`` are their classes."""

    def __init__(self, kinds: list[type]):
        self.uses_jax = (
            False  # whether a method refers to JAX, whose threads do not live on in a forked child
        )
        self._seen: set[int] = set()
        # By name and holder: a replica's class may have the name of another.
        self._found: dict[tuple[str, int], Callable[[], Any]] = {}
        for kind in kinds:
            self._visit_class(kind, is_env=True)
        self._before = {key: fingerprint(get()) for key, get in self._found.items()}

    def changed(self, *, all_of_it: bool = False, but_containers: bool = False) -> str | None:
        """Names something that changed since it was accepted: ``all_of_it``, large values too; in dicts, lists and sets
        ``but_containers`` allows copies to have entries of their own.
        """
        for key, before in self._before.items():
            if before is None or (before.size > _LARGE and not all_of_it):
                continue
            value = self._found[key]()
            if not (but_containers and isinstance(value, dict | list | set)) and fingerprint(value) != before:
                return key[0]
        return None

    def accept(self) -> None:
        """From now on changes count from the present state."""
        for key, before in self._before.items():
            if before is not None and before.size <= _LARGE:
                self._before[key] = fingerprint(self._found[key]())

    def _visit_class(self, kind: type, is_env: bool = False) -> None:
        for base in kind.__mro__:
            is_ours = is_env and base.__module__.split(".")[0] in ("sb3_bridge", "gymnax")
            if id(base) in self._seen or (_is_foreign(base.__module__) and not is_ours):
                continue
            self._seen.add(id(base))
            names = f"the list of class attributes of {base.__qualname__}"
            self._add(names, partial(sorted, vars(base)), id(base))
            for name, value in list(vars(base).items()):
                functions = _functions(value)
                for function in functions:
                    self._visit_function(function)
                is_special = name == "_abc_impl" or (name.startswith("__") and name.endswith("__"))
                if not functions and not is_special:
                    get = partial(getattr, base, name, None)
                    self._add(f"{base.__qualname__}.{name}, an attribute of the class", get)

    def _visit_function(self, function: types.FunctionType) -> None:
        if id(function) in self._seen:
            return
        self._seen.add(id(function))
        for defaults in ("__defaults__", "__kwdefaults__"):
            if getattr(function, defaults):
                get = partial(getattr, function, defaults)
                self._add(f"a default argument of {function.__qualname__}", get)
        for name, cell in zip(function.__code__.co_freevars, function.__closure__ or (), strict=True):
            if name != "__class__":
                label = f"{name}, a variable of {function.__qualname__}"
                self._visit_value(label, partial(_content, cell), set())
        self._visit_names(function.__globals__, function.__module__, set(_names(function.__code__)))

    def _visit_names(self, values: dict[str, Any], module: str, names: set[str]) -> None:
        for name in sorted(names & set(values)):
            self._visit_value(f"{name}, a global of {module}", partial(values.get, name), names)

    def _visit_value(self, label: str, get: Callable[[], Any], names: set[str]) -> None:
        value = get()
        origin = value.__name__ if isinstance(value, types.ModuleType) else type(value).__module__
        self.uses_jax |= origin.split(".")[0] in _JAX
        if isinstance(value, types.ModuleType):
            if not _is_foreign(value.__name__) and id(value) not in self._seen:
                self._seen.add(id(value))
                self._visit_names(vars(value), value.__name__, names)
        elif isinstance(value, type):
            self._visit_class(value)
        elif isinstance(value, types.FunctionType):
            if not _is_foreign(value.__module__ or ""):
                self._visit_function(value)
        elif not isinstance(value, types.BuiltinFunctionType):
            self._add(label, get)

    def _add(self, label: str, get: Callable[[], Any], holder: int = 0) -> None:
        self._found.setdefault((label, holder), get)


def _functions(value: Any) -> list[types.FunctionType]:
    """The functions that an entry of a class is made of."""
    is_property = isinstance(value, property)
    parts = (value.fget, value.fset) if is_property else (getattr(value, "__func__", value),)
    return [part for part in parts if isinstance(part, types.FunctionType)]


def _names(code: types.CodeType) -> Iterator[str]:
    yield from code.co_names
    for constant in code.co_consts:
        if isinstance(constant, types.CodeType):
            yield from _names(constant)


def _is_foreign(module: str) -> bool:
    root = module.split(".")[0]
    return root in _FOREIGN or root in sys.stdlib_module_names
