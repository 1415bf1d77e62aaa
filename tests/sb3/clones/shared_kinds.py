"""Environments whose copies would share with them what cannot be copied, one for each way; all are refused."""

from __future__ import annotations

import ctypes
import os
import random
from typing import Any

import numpy as np
from gymnasium import spaces
from sb3.clones.kinds import Counter

LIBRARY: dict[int, float] = {}


class Handle(Counter):
    """A handle of a library that keeps the state, and frees it at the end."""

    def __init__(self) -> None:
        super().__init__()
        self.handle = len(LIBRARY)
        LIBRARY[self.handle] = 0.0

    def add(self, amount: float) -> None:
        LIBRARY[self.handle] += amount

    def seen(self) -> float:
        return LIBRARY[self.handle]

    def clear(self) -> None:
        LIBRARY[self.handle] = 0.0

    def __del__(self) -> None:
        LIBRARY.pop(self.handle, None)


class Native(Counter):
    """The same, where Python does not see the library's state."""

    def __init__(self) -> None:
        super().__init__()
        self.address = _allocate()

    def _cell(self) -> Any:
        return ctypes.c_double.from_address(self.address)

    def add(self, amount: float) -> None:
        self._cell().value += amount

    def seen(self) -> float:
        return self._cell().value

    def clear(self) -> None:
        self._cell().value = 0.0


def _allocate() -> int:
    cell = ctypes.c_double(0.0)
    ctypes.pythonapi.Py_IncRef(ctypes.py_object(cell))
    return ctypes.addressof(cell)


class ClassAttribute(Counter):
    total = 0

    def add(self, amount: float) -> None:
        super().add(amount)
        type(self).total += 1


class ClassTable(Counter):
    visits: dict[str, int] = {}  # noqa: RUF012

    def clear(self) -> None:
        super().clear()
        self.visits["episodes"] = self.visits.get("episodes", 0) + 1


class ClassCounted(Counter):
    """Counts in an attribute of its class, and is finalised: its replicas are of a class of their own."""

    total = 0

    def add(self, amount: float) -> None:
        super().add(amount)
        type(self).total += 1

    def __del__(self) -> None:
        pass


class ModuleGlobal(Counter):
    def add(self, amount: float) -> None:
        super().add(amount)
        _count()


CALLS = [0]


def _count() -> None:
    CALLS[0] += 1


class MethodDefault(Counter):
    def add(self, amount: float, seen: list[float] = []) -> None:  # noqa: B006
        seen.append(amount)
        super().add(amount)


class ClassSpace(Counter):
    """Draws from a space that belongs to the class."""

    noise = spaces.Box(-1, 1, (1,), np.float64)

    def add(self, amount: float) -> None:
        self.x += amount + float(self.noise.sample()[0])


class NumpyGlobal(Counter):
    def add(self, amount: float) -> None:
        self.x += amount + np.random.normal()


class RandomGlobal(Counter):
    def clear(self) -> None:
        self.x = random.random()


class TorchGlobal(Counter):
    def add(self, amount: float) -> None:
        import torch

        self.x += amount + float(torch.rand(1))


class Freed:
    """Frees something when it ends."""

    def __del__(self) -> None:
        pass


class Nested(Counter):
    def __init__(self) -> None:
        super().__init__()
        self.parts = {"arm": [Freed()]}


class Writer(Counter):
    """Appends a line to a file for every episode."""

    def __init__(self, path: str = "episodes.csv") -> None:
        super().__init__()
        self.path = path

    def clear(self) -> None:
        super().clear()
        with open(self.path, "a") as file:
            file.write("episode\n")


class FileDescriptor(Counter):
    """Writes into a file that is open already."""

    def __init__(self, number: int = 0) -> None:
        super().__init__()
        self.number = number

    def add(self, amount: float) -> None:
        super().add(amount)
        os.write(self.number, b"step\n")


REFUSED: list[tuple[Any, str]] = [
    (Handle, "LIBRARY, a global of .*changes when a replica is stepped"),
    (Native, "differs from what the environment does alone|do not (repeat|agree)"),
    (ClassAttribute, "ClassAttribute.total, an attribute of the class, changes"),
    (ClassTable, "ClassTable.visits, an attribute of the class, changes"),
    (ClassCounted, "class attributes of ClassCounted, changes"),
    (ModuleGlobal, "CALLS, a global of .*, changes"),
    (MethodDefault, "a default argument of MethodDefault.add, changes"),
    (ClassSpace, "ClassSpace.noise, an attribute of the class, changes"),
    (NumpyGlobal, "draws numbers from outside"),
    (RandomGlobal, "draws numbers from outside"),
    (TorchGlobal, "draws numbers from outside"),
    (Nested, "Nested.parts cannot be copied: Freed has a __del__"),
    (Writer, r"opens episodes.csv for writing"),
]
