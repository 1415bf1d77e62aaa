"""Fingerprints of values, which tell whether one changed; nothing is copied for them, however large it is."""

from __future__ import annotations

import contextlib
import hashlib
import pickle
import types
import zlib
from collections.abc import Iterator
from typing import Any, NamedTuple

import gymnasium
import numpy as np

from sb3_bridge.clones.copying import PLAIN


class Fingerprint(NamedTuple):
    """Of a value: equal where nothing in it changed.

    Attributes:
      digest: of all that it is made of.
      size: bytes of that.
      refers: whether an environment is among it.
    """

    digest: bytes
    size: int
    refers: bool


_HASHED: list[dict[tuple[int, int], int]] = []


@contextlib.contextmanager
def large_ones_hashed_once() -> Iterator[None]:
    """Arrays that many values refer to are read once; only while nothing changes them."""
    _HASHED.append({})
    try:
        yield
    finally:
        _HASHED.clear()


class _Hash(pickle.Pickler):
    """Pickles into a hash: nothing of the value is ever copied."""

    def __init__(self) -> None:
        self._hash, self.size, self.refers = hashlib.blake2b(digest_size=16), 0, False
        super().__init__(self, protocol=5, buffer_callback=self._buffer)

    def write(self, data: Any) -> None:
        self._hash.update(data)
        self.size += len(data)

    def _buffer(self, buffer: pickle.PickleBuffer) -> None:
        raw = buffer.raw()
        known = _HASHED[0] if _HASHED else {}
        place = (
            (np.frombuffer(raw, np.uint8).__array_interface__["data"][0], len(raw)) if len(raw) else (0, 0)
        )
        if place not in known:
            known[place] = zlib.crc32(raw)
        self._hash.update(b"%d %d" % (known[place], len(raw)))
        self.size += len(raw)

    def digest(self) -> bytes:
        return self._hash.digest()

    def persistent_id(self, value: Any) -> Any:
        if isinstance(value, gymnasium.Env):
            self.refers = True
            return f"env {type(value).__qualname__}"
        if isinstance(value, types.ModuleType):
            return f"module {value.__name__}"
        return f"class {value.__module__}.{value.__qualname__}" if isinstance(value, type) else None

    def reducer_override(self, value: Any) -> Any:
        if not isinstance(value, types.FunctionType):
            return NotImplemented
        code = value.__code__
        content = []
        for cell in value.__closure__ or ():
            try:
                content.append(cell.cell_contents)
            except ValueError:
                content.append("empty")
        constants = [constant for constant in code.co_consts if type(constant) in PLAIN]
        place = (value.__module__, value.__qualname__, code.co_code, code.co_names, constants)
        return object, (), (place, value.__defaults__, value.__kwdefaults__, content)


def fingerprint(value: Any) -> Fingerprint | None:
    """The fingerprint of a value; None where its own pickling raises, so that its changes cannot be seen."""
    pickler = _Hash()
    try:
        pickler.dump(value)
    except Exception:
        return None
    return Fingerprint(pickler.digest(), pickler.size, pickler.refers)
