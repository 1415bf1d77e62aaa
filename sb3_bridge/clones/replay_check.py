"""The replay check: the cheapest means by which copies of an environment repeat what the original does."""

from __future__ import annotations

import copy
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import gymnasium
import numpy as np

from sb3_bridge.clones.copying import (
    NO_STATE,
    PLAIN,
    RENDERING,
    Fingerprint,
    Replica,
    Unclonable,
    copy_value,
    layers_of,
    stream_of,
)
from sb3_bridge.clones.core_state import Functions, means_for
from sb3_bridge.clones.snapshot import AnyCloner, CloneReport, make_cloner

_HEAVY = 1024  # bytes of an attribute above which it is worth finding out that it never changes
_CHECK_ACTIONS = 12  # length of a replayed branch
_CHECK_STEPS = 1000  # at most, to see an episode's end
_CHECK_SECONDS = 0.5  # the same, for slow environments
_CHECK_POINTS = (0, 1, 7)  # steps after which branches start; more before the first episode's end


class _Failed(Exception):
    pass


@dataclass
class _Run:
    """Transitions of a run, an episode's end followed by a reset."""

    transitions: list[tuple[Any, ...]] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)

    def step(self, env: gymnasium.Env, action: Any) -> bool:
        action = copy_value(action, {})
        started = time.perf_counter()
        observation, reward, terminated, truncated, _ = env.step(action)
        self.seconds.append(time.perf_counter() - started)
        over = bool(terminated or truncated)
        row = (copy_value(observation, {}), float(reward), bool(terminated), bool(truncated))
        self.transitions.append((*row, copy_value(env.reset()[0], {}) if over else None))
        return over


def check(env: gymnasium.Env, functions: Functions | None = None, seed: int = 0) -> CloneReport:
    """Finds the cheapest means by which an environment repeats itself, and measures it.

    All of it runs on copies; the environment itself is only read.

    Args:
      env: in its wrappers, reset or not.
      functions: the user's pair, tried instead of all others.
      seed: of the copies and of the random actions.

    Returns:
      The report; where no means passes, with the reasons.
    """
    reasons = []
    for means in means_for(env, functions):
        try:
            return _check_means(env, means, functions, seed)
        except (
            Exception
        ) as error:  # an environment's own code may raise anything: it is refused, with the reason
            told = (
                str(error) if isinstance(error, _Failed | Unclonable) else f"{type(error).__name__} {error}"
            )
            reasons.append(f"{means}: {told.strip()}")
    return CloneReport("", reason="\n".join(reasons))


def _check_means(env: gymnasium.Env, means: str, functions: Functions | None, seed: int) -> CloneReport:
    def cloner_of(real: gymnasium.Env, constants: tuple[tuple[int, str], ...] = ()) -> AnyCloner:
        return make_cloner(real, CloneReport(means, constants=constants), functions)

    source = cloner_of(env)
    # `original` plays the real environment, `twin` is the same one with nobody looking.
    original, twin = source.replica().layers[0], source.replica().layers[0]
    rng = np.random.default_rng(seed)
    space = copy.deepcopy(env.action_space)
    space.seed(seed)

    heavy = _heavy_attributes(twin)
    first = copy_value(twin.reset(seed=seed)[0], {})
    actions: list[Any] = []
    expected, end = _Run(), None
    started = time.perf_counter()
    while len(actions) < _CHECK_STEPS and (end is None or len(actions) < end + _CHECK_ACTIONS):
        actions.append(space.sample())
        if expected.step(twin, actions[-1]) and end is None:
            end = len(actions)
        if len(actions) % 50 == 0 or expected.transitions[-1][-1] is not None:
            heavy = [entry for entry in heavy if entry.same()]
        if time.perf_counter() - started > _CHECK_SECONDS and len(actions) >= 4 * _CHECK_ACTIONS:
            break
    step_us = float(np.median(expected.seconds)) * 1e6
    constants = tuple((entry.layer, entry.name) for entry in heavy if entry.same())

    if not _equal(first, original.reset(seed=seed)[0]):
        raise _Failed(
            "two copies give different observations after reset(seed=...): it does not depend on the seed alone"
        )
    cloner = cloner_of(original, constants)
    one, two = cloner.replica(), cloner.replica()
    seen = _Run()
    last = len(actions) - _CHECK_ACTIONS
    points = {
        *_CHECK_POINTS,
        last // 2,
        (end or last) - _CHECK_ACTIONS // 2,
        (end or last) - 1,
        end or last,
        last,
    }
    snapshots: list[tuple[int, Any]] = []
    for index, action in enumerate(actions):
        if index in points and 0 <= index <= last:
            snapshot = cloner.save()
            snapshots.append((index, snapshot))
            others = [space.sample() for _ in range(_CHECK_ACTIONS)]
            _check_branches(cloner, (one, two), snapshot, index, actions, others, expected)
        seen.step(original, action)
        if not _equal(seen.transitions[-1], expected.transitions[index]):
            raise _Failed(
                f"step {index + 1} differs from that of an untouched copy: taking snapshots or stepping replicas touches"
                " the original, or it uses random numbers that are no part of it (np.random, random)"
            )
    # Late: an old snapshot must not have been changed by all that was done since.
    for index, snapshot in (snapshots[0], snapshots[-1], snapshots[int(rng.integers(len(snapshots)))]):
        _check_branches(cloner, (two, one), snapshot, index, actions, actions[:_CHECK_ACTIONS], expected)
    if cloner.changed_constants():
        raise _Failed("an attribute that seemed constant changed")
    snapshot = cloner.save()
    return CloneReport(
        means,
        snapshot_us=_microseconds(cloner.save),
        restore_us=_microseconds(lambda: cloner.restore(one, snapshot)),
        step_us=step_us,
        constants=constants,
    )


def _check_branches(
    cloner: AnyCloner,
    replicas: tuple[Replica, Replica],
    snapshot: Any,
    index: int,
    actions: list[Any],
    others: list[Any],
    expected: _Run,
) -> None:
    """Restored replicas must do what the original will do, and twice the same for other actions."""
    one, two = replicas
    cloner.restore(one, snapshot)
    cloner.restore(two, snapshot)
    replayed, other = _Run(), _Run()
    for action, different in zip(actions[index : index + _CHECK_ACTIONS], others, strict=True):
        replayed.step(one.layers[0], action)
        other.step(two.layers[0], different)
    wanted = expected.transitions[index : index + _CHECK_ACTIONS]
    _compare(replayed.transitions, wanted, f"after a restore at step {index}, the same actions do not repeat")
    cloner.restore(one, snapshot)
    again = _Run()
    for different in others:
        again.step(one.layers[0], different)
    _compare(again.transitions, other.transitions, f"two restores of step {index} do not agree on")


def _compare(got: list[tuple[Any, ...]], wanted: list[tuple[Any, ...]], message: str) -> None:
    names = ("the observation", "the reward", "termination", "truncation", "the observation after the reset")
    for step, (mine, theirs) in enumerate(zip(got, wanted, strict=True)):
        for name, value, reference in zip(names, mine, theirs, strict=True):
            if not _equal(value, reference):
                raise _Failed(
                    f"{message} {name} {step + 1} steps later: a part of the state is not saved, or numbers come from"
                    " outside of the environment (np.random, random, a clock)"
                )


def _equal(first: Any, second: Any) -> bool:
    if isinstance(first, dict) and isinstance(second, dict):
        return first.keys() == second.keys() and all(_equal(first[name], second[name]) for name in first)
    if isinstance(first, tuple | list) and isinstance(second, tuple | list):
        return len(first) == len(second) and all(map(_equal, first, second))
    if first is None or second is None:
        return first is second
    one, two = np.asarray(first), np.asarray(second)
    # Bit for bit, NaN included: a difference of the last digit is a difference of the state.
    return one.shape == two.shape and one.dtype == two.dtype and one.tobytes() == two.tobytes()


@dataclass
class _Heavy:
    """An attribute that would be dear to copy, and what it was like at first."""

    env: gymnasium.Env
    layer: int
    name: str
    value: Any
    fingerprint: bytes

    def same(self) -> bool:
        value = vars(self.env).get(self.name)
        return value is self.value and Fingerprint.of(value) == self.fingerprint


def _heavy_attributes(env: gymnasium.Env) -> list[_Heavy]:
    found = []
    for index, layer in enumerate(layers_of(env)):
        for name, value in vars(layer).items():
            skipped = name in NO_STATE | RENDERING or type(value) in PLAIN or stream_of(value) is not None
            if skipped or isinstance(value, gymnasium.Env | gymnasium.Space):
                continue
            fingerprint = Fingerprint.of(value)
            if fingerprint is not None and len(fingerprint) > _HEAVY:
                found.append(_Heavy(layer, index, name, value, fingerprint))
    return found


def _microseconds(function: Callable[[], Any]) -> float:
    """Of one call; the quickest of some repeats, as other programs only ever make it slower."""
    function()
    started = time.perf_counter()
    function()
    once = max(time.perf_counter() - started, 1e-7)
    n_calls = max(1, min(200, int(0.002 / once)))
    best = float("inf")
    for _ in range(5):
        started = time.perf_counter()
        for _ in range(n_calls):
            function()
        best = min(best, (time.perf_counter() - started) / n_calls)
    return best * 1e6
