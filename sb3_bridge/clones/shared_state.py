"""What all instances of an environment share beside their attributes: class attributes, and globals that methods read."""

from __future__ import annotations

import sys
import types
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

from sb3_bridge.clones.fingerprint import fingerprint

# Libraries that keep nothing of an environment's state in their classes and globals.
_FOREIGN = {
    "gymnasium",
    "numpy",
    "stable_baselines3",
    "torch",
    "jax",
    "jaxlib",
    "flax",
    "scipy",
    "pandas",
    "cloudpickle",
}
_FOREIGN |= {"pygame", "mujoco", "matplotlib", "grpo_jax", "sb3_bridge", "gymnax", "chex", "optax"}
_JAX = {"jax", "jaxlib", "flax", "gymnax", "brax", "jumanji", "pgx"}
_LARGE = 1 << 20  # bytes above which a value is looked at once at the end only


class SharedState:
    """What replicas and the real environment share, and whether it changes.

    Args:
      kinds: classes of the environment, its wrappers and its replicas.

    Attributes:
      uses_jax: whether a method refers to JAX, whose threads do not live on in a forked child.
    """

    def __init__(self, kinds: list[type]):
        self.uses_jax = False
        self._seen: set[int] = set()
        self._found: dict[
            tuple[str, int], Callable[[], Any]
        ] = {}  # a replica's class may have the name of another
        for kind in kinds:
            self._visit_class(kind, is_env=True)
        self._before = {key: fingerprint(get()) for key, get in self._found.items()}

    def changed(self, *, all_of_it: bool = False, but_containers: bool = False) -> str | None:
        """Names something that changed since it was accepted, None where nothing did.

        Args:
          all_of_it: look at large values too.
          but_containers: leave out dicts, lists and sets, in which copies may have entries of their own.
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
            if id(base) in self._seen or (
                _is_foreign(base.__module__) and not (is_env and _is_ours(base.__module__))
            ):
                continue
            self._seen.add(id(base))
            label = f"the list of class attributes of {base.__qualname__}"
            self._add(label, partial(_attributes, base), id(base))
            for name, value in list(vars(base).items()):
                functions = list(_functions(value))
                for function in functions:
                    self._visit_function(function)
                if (
                    not functions
                    and not (name.startswith("__") and name.endswith("__"))
                    and name != "_abc_impl"
                ):
                    self._add(
                        f"{base.__qualname__}.{name}, an attribute of the class",
                        partial(getattr, base, name, None),
                    )

    def _visit_function(self, function: types.FunctionType) -> None:
        if id(function) in self._seen:
            return
        self._seen.add(id(function))
        for defaults in ("__defaults__", "__kwdefaults__"):
            if getattr(function, defaults):
                self._add(
                    f"a default argument of {function.__qualname__}", partial(getattr, function, defaults)
                )
        for name, cell in zip(function.__code__.co_freevars, function.__closure__ or (), strict=True):
            if name != "__class__":
                content = partial(getattr, cell, "cell_contents", None)
                self._visit_value(f"{name}, a variable of {function.__qualname__}", content, set())
        names = set(_names(function.__code__))
        self._visit_names(function.__globals__, function.__module__, names)

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


def _functions(value: Any) -> Iterator[types.FunctionType]:
    """The functions that an entry of a class is made of."""
    if isinstance(value, types.FunctionType):
        yield value
    elif isinstance(value, staticmethod | classmethod):
        yield from _functions(value.__func__)
    elif isinstance(value, property):
        for part in (value.fget, value.fset):
            yield from _functions(part)


def _attributes(kind: type) -> list[str]:
    return sorted(vars(kind))


def _names(code: types.CodeType) -> Iterator[str]:
    yield from code.co_names
    for constant in code.co_consts:
        if isinstance(constant, types.CodeType):
            yield from _names(constant)


def _is_ours(module: str) -> bool:
    return module.split(".")[0] in ("sb3_bridge", "gymnax")


def _is_foreign(module: str) -> bool:
    root = module.split(".")[0]
    return root in _FOREIGN or root in sys.stdlib_module_names
