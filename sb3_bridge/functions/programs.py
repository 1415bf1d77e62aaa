"""Compiled programs that die with the user's function that they call.

JAX keeps a compiled program, and its static arguments, as long as the function that was given to ``jax.jit``. With a
user's function among the static arguments of a module's own jitted function both would stay for ever: 26 MiB for each
new lambda. So every user's function gets programs of its own, which hold it weakly and are dropped when it dies.
"""

from __future__ import annotations

import contextlib
import functools
import types
import weakref
from collections.abc import Callable
from typing import Any

import jax


class Borrowed:
    """A user's function, or the object of a bound method, held weakly: compiled programs and JAX's caches may keep it."""

    def __init__(self, function: Callable[..., Any]):
        self._method = function.__func__ if isinstance(function, types.MethodType) else None
        owner = function if self._method is None else function.__self__  # type: ignore[attr-defined]
        self.owner: Callable[[], Any] = weakref.ref(owner)
        self._hash = hash((id(owner), id(self._method)))

    def __call__(self, *arguments: Any) -> Any:
        owner = self.owner()
        if owner is None:
            raise RuntimeError("a function was deleted before a program that calls it: keep a reference")
        return owner(*arguments) if self._method is None else self._method(owner, *arguments)

    def __hash__(self) -> int:
        return self._hash

    def __eq__(self, other: object) -> bool:
        if self is other or not isinstance(other, Borrowed):
            return self is other
        owner = self.owner()
        return owner is not None and owner is other.owner() and self._method is other._method


def borrow(function: Callable[..., Any]) -> Callable[..., Any]:
    """The function held weakly, or itself where Python has no weak reference to it."""
    try:
        return function if isinstance(function, Borrowed) else Borrowed(function)
    except TypeError:
        return function


class OwnedJit:
    """``jax.jit`` (or another ``jit``) of a module's function, with a set of compiled programs for each user's function that they call.

    Where a program calls a user's function it must be given that function's ``borrowed`` form.
    """

    def __init__(self, function: Callable[..., Any], jit: Callable[..., Any] = jax.jit, **options: Any):
        self._jit = functools.partial(jit, **options)
        self._function, self._shared = function, self._jit(function)
        self._programs: dict[tuple[int, ...], Any] = {}

    def of(self, *owners: Any) -> Any:
        """The jitted function whose programs are dropped as soon as one of the owners dies.

        Owners are user's functions (``UserFunction`` too), or any other objects; None and what Python has no weak
        reference to are left out. Without any the programs stay, and all callers share them.
        """
        alive = [owner for owner in map(_owner, owners) if owner is not None]
        if not alive:
            return self._shared
        key = tuple(map(id, alive))
        if key not in self._programs:
            # A function object of its own: it is what JAX's caches are bound to.
            own = functools.wraps(self._function)(functools.partial(self._function))
            self._programs[key] = self._jit(own)
            for owner in alive:
                weakref.finalize(owner, self._programs.pop, key, None).atexit = False
        return self._programs[key]


def _owner(owner: Any) -> Any:
    """What a user's function lives in; None where it cannot be watched."""
    function = borrow(getattr(owner, "function", owner)) if callable(owner) else owner
    with contextlib.suppress(TypeError):
        return function.owner() if isinstance(function, Borrowed) else weakref.ref(function)()
    return None
