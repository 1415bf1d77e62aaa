"""Copies of values: what is copied, what is shared, what is left out and what is refused."""

from __future__ import annotations

import enum
import functools
import math
import weakref
from typing import Any

import gymnasium as gym
import numpy as np
import pygame
import pytest
from gymnasium.utils import EzPickle
from sb3.clones import kinds

import grpo_jax
from sb3_bridge.clones.changes import fingerprint
from sb3_bridge.clones.copying import Stream, Unclonable, copy_value, quiet
from sb3_bridge.clones.snapshot import Cloner, CloneReport


def twice(value: Any) -> Any:
    """Into the form of a snapshot, and back."""
    return copy_value(copy_value(value, {}), {})


class Colour(enum.Enum):
    RED = 1


def at_module_level(x: int, scale: float = 2.0) -> float:
    return x * scale


@pytest.mark.parametrize(
    "value", [Colour.RED, math, at_module_level, dict, len, math.sin, "".join, (1, "a"), np.float32(2)]
)
def test_what_never_changes_is_shared(value):
    assert twice(value) is value


def test_windows_are_left_out_by_their_class_and_a_games_rectangles_are_not():
    parts = {
        "window": 10,
        "surface": pygame.Surface((2, 2)),
        "at": [pygame.Rect(1, 2, 3, 4)],
        "clock": pygame.time.Clock(),
    }
    copied = twice(parts)
    assert copied["surface"] is None and copied["clock"] is None and copied["window"] == 10
    assert copied["at"] == parts["at"] and copied["at"][0] is not parts["at"][0]


def test_functions_share_their_variables_with_each_other_and_not_with_the_original():
    def made() -> Any:
        count, seen = 0, [0]

        def add(n: int, log: Any = seen) -> int:
            nonlocal count
            count += n
            log.append(n)
            return again(0) if n > 5 else count

        def again(n: int) -> int:
            return add(n)

        return add, lambda: (count, len(seen))

    add, look = made()
    add(1)
    twin, look_twin = twice((add, look))
    assert twin(9) == 10 and look_twin() == (10, 4) and look() == (1, 2)


def test_generators_stay_shared_and_their_methods_follow():
    generator = np.random.default_rng(0)
    parts = {
        "one": generator,
        "other": [generator],
        "draw": generator.random,
        "half": functools.partial(generator.normal, 3.0),
    }
    assert type(copy_value(parts, {})["one"]) is Stream
    copied = twice(parts)
    assert copied["one"] is copied["other"][0] is not generator
    expected = np.random.default_rng(0)
    assert [copied["draw"](), copied["half"]()] == [expected.random(), expected.normal(3.0)]
    assert generator.random() == np.random.default_rng(0).random()


@pytest.mark.parametrize(
    "value",
    [(x for x in ()), weakref.WeakValueDictionary(), weakref.ref(Colour), open(__file__)],  # noqa: SIM115
)
def test_what_would_stay_bound_to_the_original_is_refused(value):
    with pytest.raises(Unclonable, match="cannot be copied"):
        copy_value([{"deep": value}], {})


class Inner(kinds.Counter, EzPickle):
    def __init__(self) -> None:
        EzPickle.__init__(self)
        super().__init__()


def test_an_environment_within_is_copied_as_it_is_and_not_made_anew():
    class Outer(kinds.Counter):
        def __init__(self) -> None:
            super().__init__()
            self.env, self.back = Inner(), weakref.ref(self)

        def add(self, amount: float) -> None:
            self.env.add(amount)
            self.back().x += self.env.seen()  # type: ignore[union-attr]

    env = Outer()
    env.reset(seed=0)
    env.step(2)
    cloner = Cloner(env, CloneReport("attributes"))
    replica = cloner.replica()
    assert replica.step(1)[0] == env.step(1)[0] == 8.0
    assert replica.layers[0].back() is replica.layers[0]


class Thing:
    __slots__ = ("x",)

    def __init__(self, x: int):
        self.x = x


def test_an_id_that_is_used_again_names_nobody_else():
    env: Any = kinds.Counter()
    env.screen, env.thing = Thing(0), None
    cloner, old, others = Cloner(env, CloneReport("attributes")), id(env.screen), []
    cloner.save()
    env.screen = None
    for _ in range(10_000):
        others.append(Thing(7))
        if id(others[-1]) == old:
            env.thing = others.pop()
            break
    replica = cloner.replica()
    assert env.thing is None or replica.layers[0].thing.x == 7


def test_replicas_are_of_a_class_that_is_not_finalised():
    ended = []

    class Ending(kinds.Counter):
        def __del__(self) -> None:
            ended.append(self.x)

    env = Ending()
    cloner = Cloner(env, CloneReport("attributes"))
    del cloner.replica().layers[:]
    assert ended == [] and isinstance(cloner.replica().layers[0], Ending)
    assert quiet(Ending).__qualname__ == Ending.__qualname__ and quiet(kinds.Counter) is kinds.Counter
    del env, cloner
    assert ended == [0.0]


def test_generators_within_are_seeded_anew_too():
    class Dice(kinds.Counter):
        def __init__(self) -> None:
            super().__init__()
            self.parts = {"dice": [np.random.default_rng(1)]}

        def add(self, amount: float) -> None:
            self.x += self.parts["dice"][0].random()

    env = Dice()
    env.reset(seed=0)
    cloner = Cloner(env, CloneReport("attributes"))
    replica, snapshot = cloner.replica(), cloner.save()

    def drawn(seed: int | None) -> float:
        cloner.restore(replica, snapshot, None if seed is None else np.full(4, seed, np.uint64))
        return replica.step(0)[0].item()

    assert drawn(1) == drawn(1) != drawn(2)
    assert drawn(None) == env.step(0)[0].item() != drawn(1)


def test_fingerprints_see_what_changed_and_read_large_arrays_in_place():
    table = {"rows": [np.zeros(1000), {"a": (1, 2.0)}], "call": lambda: table["rows"]}
    before = fingerprint(table)
    assert before is not None and fingerprint(table) == before and not before.refers
    table["rows"][0][999] = 1e-9  # type: ignore[index]
    assert fingerprint(table) != before
    assert fingerprint([gym.make("CartPole-v1")]).refers and fingerprint(x for x in ()) is None  # type: ignore[union-attr]


def test_a_world_is_nobodys_own():
    """Programs are compiled for each world there is; it never changes."""
    world = grpo_jax.make("CartPole-v1")
    assert copy_value({"world": world, "others": [world]}, {})["others"][0] is world
