"""Environments that share state with their copies by other ways than plain attributes, one for each way."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import gymnasium as gym
import numpy as np
from gymnasium import spaces


class Counter(gym.Env):
    """Counts actions; an episode takes 23 steps. ``self.add`` and ``self.seen`` are how state is reached."""

    observation_space: Any = spaces.Box(-np.inf, np.inf, (1,), np.float64)
    action_space: Any = spaces.Discrete(3)

    def __init__(self) -> None:
        self.x, self.time = 0.0, 0

    def add(self, amount: float) -> None:
        self.x += amount

    def seen(self) -> float:
        return self.x

    def clear(self) -> None:
        self.x = 0.0

    def reset(self, *, seed: int | None = None, options: Any = None) -> Any:
        super().reset(seed=seed)
        self.clear()
        self.time = 0
        return np.array([self.seen()]), {}

    def step(self, action: Any) -> Any:
        self.add(1.0 + float(action))
        self.time += 1
        return np.array([self.seen()]), self.seen() / 7, self.time >= 23, False, {}


class Closure(Counter):
    """Functions over a variable and over the environment itself."""

    def __init__(self) -> None:
        super().__init__()
        total = 0.0

        def add(amount: float) -> None:
            nonlocal total
            total += amount

        def clear() -> None:
            nonlocal total
            total = 0.0

        self.add, self.seen, self.clear = add, lambda: total + 0.001 * self.time, clear  # type: ignore[method-assign]


class MethodsInDict(Counter):
    """Bound methods as handlers, nested."""

    def __init__(self) -> None:
        super().__init__()
        self.handlers = {"events": [("add", super().add)], "ask": (super().seen,)}

    def add(self, amount: float) -> None:
        self.handlers["events"][0][1](amount)

    def seen(self) -> float:
        return self.handlers["ask"][0]()  # type: ignore[operator]


class Partial(Counter):
    """A partial of a bound method, and one of a function of the environment."""

    def __init__(self) -> None:
        super().__init__()
        self.plus = functools.partial(Counter.add, self)
        self.ask = functools.partial(super().seen)

    def add(self, amount: float) -> None:
        self.plus(amount)

    def seen(self) -> float:
        return self.ask()


class Listener:
    def __init__(self, callback: Callable[[float], None]):
        self.callback = callback


class Callback(Counter):
    """An object that holds a callback, which holds the environment, by a default argument."""

    def __init__(self) -> None:
        super().__init__()

        def tell(amount: float, env: Any = self, log: Any = []) -> None:  # noqa: B006
            log.append(amount)
            env.x += amount + 0.01 * len(log)

        self.listeners = [Listener(tell)]

    def add(self, amount: float) -> None:
        for listener in self.listeners:
            listener.callback(amount)


class BuiltinMethod(Counter):
    """Built-in methods of what the environment holds: a list's, and its generator's."""

    def __init__(self) -> None:
        super().__init__()
        self.events: list[float] = []
        self.note, self.dice = self.events.append, np.random.default_rng(3)
        self.draw = self.dice.random

    def add(self, amount: float) -> None:
        self.note(amount)
        self.x += self.draw() * len(self.events)


class Cached(Counter):
    """A cache around a bound method."""

    def __init__(self) -> None:
        super().__init__()
        self.scaled = functools.lru_cache(4)(self._scaled)

    def _scaled(self, amount: float) -> float:
        self.x += 0.5
        return amount * 2

    def add(self, amount: float) -> None:
        self.x += self.scaled(amount)


class View(Counter):
    """One array is a view of another one, and a slot class holds a third."""

    class Holder:
        __slots__ = ("array",)

    def __init__(self) -> None:
        super().__init__()
        self.table = np.zeros((4, 2))
        self.column = self.table[:, 1]
        self.holder = View.Holder()
        self.holder.array = self.table

    def add(self, amount: float) -> None:
        self.column += amount

    def seen(self) -> float:
        return float(self.holder.array.sum())

    def clear(self) -> None:
        self.table[:] = 0


class Named(Counter):
    """Attributes that have the names of windows and clocks, and are numbers and look-back buffers."""

    def __init__(self) -> None:
        super().__init__()
        self.window, self.clock, self.screen, self.viewer = 10, 1, [2.0], {"surf": 10}
        self.lag, self.env, self.renderer = 10, 1, Listener(self.add)

    def add(self, amount: float) -> None:
        self.x += amount * self.lag / self.window + self.viewer["surf"] * self.clock
        self.screen[0] += self.env
        self.x += self.screen[0]


CLONED = [Closure, MethodsInDict, Partial, Callback, BuiltinMethod, Cached, View, Named]


class Limited(Counter):
    """Goes on counting for ever: a part that shows after 1,500 steps only."""

    def __init__(self, late: int = 1500) -> None:
        super().__init__()
        self.age, self.late = [0], late

    def step(self, action: Any) -> Any:
        self.age[0] += 1
        observation, reward, over, cut, info = super().step(action)
        return observation, reward + (self.age[0] > self.late), over, cut, info


class HalfSaved(Limited):
    """Its functions forget the age."""

    def get_state(self) -> Any:
        return {"x": self.x, "time": self.time}

    def set_state(self, state: Any) -> None:
        self.x, self.time = state["x"], state["time"]


class Hidden:
    """Cannot be copied by anyone: as what a C library holds."""

    def __init__(self) -> None:
        self.x, self.age = 0.0, 0

    def __reduce_ex__(self, protocol: Any) -> Any:
        raise TypeError("cannot pickle this")


class HalfSavedHidden(Counter):
    """The same, where the forgotten part is out of reach for Python; it shows after 60 steps."""

    def __init__(self, late: int = 1500) -> None:
        super().__init__()
        self.late, self.world = late, Hidden()

    def __deepcopy__(self, memo: Any) -> Any:
        return type(self)(self.late)

    def add(self, amount: float) -> None:
        self.world.age += 1
        self.world.x += amount + (self.world.age > self.late)

    def seen(self) -> float:
        return self.world.x

    def clear(self) -> None:
        self.world.x = 0.0

    def get_state(self) -> Any:
        return self.world.x, self.time

    def set_state(self, state: Any) -> None:
        self.world.x, self.time = state


class OwnHandle(Counter):
    """Keeps its state in a table of its class, under a handle; its copies have handles of their own."""

    table: dict[int, float] = {}  # noqa: RUF012

    def __init__(self) -> None:
        super().__init__()
        self.handle, self.lock = len(self.table), (number for number in ())
        self.clear()

    def __deepcopy__(self, memo: Any) -> Any:
        return type(self)()

    def add(self, amount: float) -> None:
        self.table[self.handle] += amount

    def seen(self) -> float:
        return self.table[self.handle]

    def clear(self) -> None:
        self.table[self.handle] = 0.0


class Rescaling(gym.Env):
    """Changes its action in place."""

    observation_space = spaces.Box(-np.inf, np.inf, (2,), np.float32)
    action_space = spaces.Box(-1, 1, (2,), np.float32)

    def reset(self, *, seed: int | None = None, options: Any = None) -> Any:
        super().reset(seed=seed)
        self.x = np.zeros(2, np.float32)
        return self.x.copy(), {}

    def step(self, action: Any) -> Any:
        action *= 3.0
        self.x = self.x + action
        return self.x.copy(), float(self.x.sum()), False, False, {}
