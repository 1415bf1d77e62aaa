"""The replay check: the cheapest way by which copies of an environment repeat what the real one does."""

from __future__ import annotations

import copy
import hashlib
import time
import timeit
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import gymnasium
import numpy as np

from sb3_bridge.clones.changes import Fingerprint, SharedState, fingerprint
from sb3_bridge.clones.copying import GENERATORS, Unclonable
from sb3_bridge.clones.core_state import (
    ACTION_MASKS,
    Functions,
    choices_of,
    cores_for,
    layers_of,
    links,
    spaces_of,
)
from sb3_bridge.clones.sandbox import CAN_FORK, global_generators, going_on, here, in_child
from sb3_bridge.clones.snapshot import Cloner, CloneReport, Replica

_HEAVY = 1024  # bytes of an attribute above which it is worth finding out that it never changes
_ACTIONS = 12  # length of a replayed branch
_STEPS = 1000  # at most, to see an episode's end
_SECONDS = 0.5  # the same, for slow environments
_POINTS = (0, 1, 7)  # steps after which branches start; more before the first episode's end
_LOOKS = (1, 10, 100)  # steps after which attributes that seem constant are looked at

Original = Callable[[gymnasium.Env], Any]
"""Makes of the real environment what is played."""


class _Alone(NamedTuple):
    """What the environment does with nobody looking; for the last two see :class:`CloneReport`."""

    first: Any  # the observation of the reset, as a digest
    actions: list[Any]
    end: int | None  # steps of the first episode, None where it did not end
    transitions: list[tuple[Any, ...]]  # one for each action
    constants: tuple[tuple[int, str], ...]
    varying: tuple[tuple[int, str], ...]


def check(env: gymnasium.Env, functions: Functions | None = None, seed: int = 0) -> CloneReport:
    """Finds the cheapest way by which an environment's states can be saved, and measures it.

    On Linux the real environment is played in forked children: one plays it alone, another one with snapshots taken and
    replicas stepped beside it, and both must see the same. This process, its generators and its files stay as they are.
    Elsewhere, and where the environment uses JAX, copies are played in this process.

    Args:
      env: in its wrappers, reset or not.
      functions: the user's pair, tried instead of all others.
      seed: of the environment's reset and of the random actions.

    Returns:
      The report; where nothing passes, with the reasons.
    """
    forks = can_fork(env)
    play = in_child if forks else here
    reasons: list[str] = []
    alone: _Alone | None = None
    for core in cores_for(env.unwrapped, functions):
        original = bare if forks else partial(copied, core.name, functions)
        try:
            if alone is None or not forks:
                alone = _Alone(*play(partial(_play_alone, original, env, seed)))
            return CloneReport(
                *play(partial(_play_watched, original, env, core.name, functions, alone, seed))
            )
        except Unclonable as error:
            if forks and alone is None:  # whatever saves its states, it cannot be played
                return CloneReport("", reason=str(error))
            reasons.append(f"{core.name}: {error}")
    if functions is None and hasattr(type(env.unwrapped), "__deepcopy__"):
        reasons.append(
            "its own __deepcopy__ is used beside a pair only: pass dynamics=(get_state, set_state)"
        )
    return CloneReport("", reason="\n".join(reasons))


def signature(env: gymnasium.Env, varying: tuple[tuple[int, str], ...]) -> bytes:
    """Equal for environments made alike: classes, spaces, and all attributes but the ``varying`` ones."""
    layers, prints = layers_of(env), sorted(_prints(env).items())
    gymnasiums = ("_np_random", "_np_random_seed")
    made = [item for item in prints if item[0] not in varying and item[0][1] not in gymnasiums]
    whole = list(map(id, map(type, layers))), list(map(str, spaces_of(layers))), made
    return hashlib.blake2b(repr(whole).encode(), digest_size=16).digest()


def can_fork(env: gymnasium.Env) -> bool:
    """Whether the environment can be played in a forked child, as :func:`bare`; else :func:`copied` must be played here."""
    return CAN_FORK and not SharedState([type(layer) for layer in layers_of(env)]).uses_jax


def bare(env: gymnasium.Env) -> Any:
    """The real environment without wrappers that change no transition, and without its window; in a child only."""
    layers: list[Any] = layers_of(env)
    if getattr(layers[-1], "render_mode", None) == "human":
        layers[-1].render_mode = None
    return Replica(layers, [], {}).layers[0]


def copied(way: str, functions: Functions | None, env: gymnasium.Env) -> Any:
    """A replica of the environment, whose states are saved in a ``way`` that may still prove wrong."""
    return Cloner(env, CloneReport(way), functions).replica().layers[0]


def _step(
    env: gymnasium.Env, action: Any, seconds: list[tuple[float, float]] | None = None
) -> tuple[Any, ...]:
    """A transition, an episode's end being followed by a reset; observations as digests."""
    action = copy.deepcopy(action)  # the environment may change it in place
    going_on()
    started, worked = time.perf_counter(), time.thread_time()
    observation, reward, terminated, truncated, _ = env.step(action)
    if seconds is not None:
        seconds.append((time.perf_counter() - started, time.thread_time() - worked))
    row = (_digest(observation), _digest(float(reward)), bool(terminated), bool(truncated))
    return (*row, _digest(env.reset()[0]) if terminated or truncated else None)


def _allowed(env: gymnasium.Env, action: Any, space: Any) -> Any:
    """The action, or in the place of its parts that the environment forbids now others, drawn by the space's generator."""
    if not env.has_wrapper_attr(ACTION_MASKS):
        return action
    mask = np.asarray(env.get_wrapper_attr(ACTION_MASKS)(), bool)
    parts = np.array(action).reshape(-1)
    for index, allowed in enumerate(np.split(mask, np.cumsum(choices_of(space))[:-1])):
        if not allowed[parts[index]]:
            parts[index] = space.np_random.choice(np.flatnonzero(allowed))
    return parts.reshape(np.shape(action))[()]


def _play_alone(original: Original, real: gymnasium.Env, seed: int) -> tuple[Any, ...]:
    """The fields of what ``original(real)`` does."""
    env = original(real)
    space = copy.deepcopy(env.action_space)
    space.seed(seed)
    before = _prints(env)
    first, layers, seen = _digest(env.reset(seed=seed)[0]), layers_of(env), _prints(env)
    heavy = {
        key: vars(layers[key[0]])[key[1]] for key, found in seen.items() if found and found.size > _HEAVY
    }
    same = {key for key, value in heavy.items() if not isinstance(value, GENERATORS)}
    actions: list[Any] = []
    transitions: list[tuple[Any, ...]] = []
    end, started = None, time.perf_counter()
    while len(actions) < _STEPS and (end is None or len(actions) < end + _ACTIONS):
        actions.append(_allowed(env, space.sample(), space))
        transitions.append(_step(env, actions[-1]))
        if end is None and any(transitions[-1][2:4]):
            end = len(actions)
        if len(actions) in (*_LOOKS, end):
            same = {key for key in same if _is_same(heavy[key], vars(layers[key[0]]).get(key[1]), seen[key])}
        if time.perf_counter() - started > _SECONDS and len(actions) >= 4 * _ACTIONS:
            break
    after = _prints(env)
    same = {key for key in same if _is_same(heavy[key], vars(layers[key[0]]).get(key[1]), seen[key])}
    varying = tuple(key for key in before | after if before.get(key) != after.get(key))
    return first, actions, end, transitions, tuple(sorted(same)), varying


def _usual(seconds: list[tuple[float, float]]) -> float:
    """Microseconds of a step, from pairs of wall and CPU seconds: of CPU, on which other programs weigh less, unless it waits."""
    wall, worked = np.median(np.array(seconds), axis=0) * 1e6
    return float(wall if wall > 8 * worked else worked)


def _is_same(before: Any, now: Any, seen: Fingerprint | None) -> bool:
    return now is before and fingerprint(now) == seen


def _prints(env: gymnasium.Env) -> dict[tuple[int, str], Fingerprint | None]:
    """Fingerprints of all attributes of all layers."""
    layers = list(enumerate(layers_of(env)))
    names = [(index, name) for index, layer in layers for name in vars(layer).keys() - links(layer)]
    return {(index, name): fingerprint(vars(layers[index][1])[name]) for index, name in names}


def _play_watched(
    original: Original, real: gymnasium.Env, way: str, functions: Functions | None, alone: _Alone, seed: int
) -> tuple[Any, ...]:
    """The fields of the report of what ``original(real)`` and replicas of it do."""
    env = original(real)
    space = copy.deepcopy(env.action_space)
    space.seed(seed + 1)
    if _digest(env.reset(seed=seed)[0]) != alone.first:
        raise Unclonable("reset(seed=...) gives different observations: they do not depend on the seed alone")
    report = CloneReport(way, constants=alone.constants, varying=alone.varying)
    watch = _Watch(Cloner(env, report, functions), alone, space)
    last = len(alone.actions) - _ACTIONS
    end = alone.end or last
    points = {*_POINTS, last // 2, end - _ACTIONS // 2, end - 1, end, last}
    snapshots = []
    for index, action in enumerate(alone.actions):
        if index in points and 0 <= index <= last:
            snapshot = watch.cloner.save()
            snapshots.append((index, snapshot))
            watch.branch(snapshot, index, [space.sample() for _ in range(_ACTIONS)])
        if _step(env, action) != alone.transitions[index]:
            raise Unclonable(
                f"step {index + 1} differs from what the environment does alone: taking snapshots or stepping replicas"
                " touches it, as through a library that both use"
            )
    # Old snapshots must not have been changed by all that was done since; the replicas change their parts.
    watch.replicas.reverse()
    middle = snapshots[int(np.random.default_rng(seed).integers(len(snapshots)))]
    for index, snapshot in (snapshots[0], snapshots[-1], middle):
        watch.branch(snapshot, index, alone.actions[:_ACTIONS])
    return watch.report()


class _Watch:
    """Steps replicas beside the environment, and compares."""

    def __init__(self, cloner: Cloner, alone: _Alone, space: gymnasium.Space):
        self.cloner, self._alone, self._space = cloner, alone, space
        self.replicas = [cloner.replica(), cloner.replica()]
        self._shared = SharedState([type(layer) for layer in (*cloner.layers, *self.replicas[0].layers)])
        self._before = global_generators()
        self._seconds: list[tuple[float, float]] = []  # of steps of replicas, which draw nothing

    def branch(self, snapshot: Any, index: int, others: list[Any]) -> None:
        """Restored replicas must do what the environment does, and twice the same for other actions."""
        one, two = self.replicas
        self._shared.accept()
        self._before = global_generators()
        self.cloner.restore(one, snapshot)
        self.cloner.restore(two, snapshot)
        replayed, other, taken = [], [], []
        for action, different in zip(self._alone.actions[index : index + _ACTIONS], others, strict=True):
            replayed.append(_step(one.layers[0], action, self._seconds))
            taken.append(_allowed(two.layers[0], different, self._space))
            other.append(_step(two.layers[0], taken[-1], self._seconds))
        self._check_shared()
        expected = self._alone.transitions[index : index + _ACTIONS]
        _compare(replayed, expected, f"after a restore at step {index}, the same actions do not repeat")
        self.cloner.restore(one, snapshot)
        again = [_step(one.layers[0], different, self._seconds) for different in taken]
        _compare(again, other, f"two restores of step {index} do not agree on")

    def _check_shared(self, *, all_of_it: bool = False) -> None:
        # Who copies itself may keep its copies apart in what all share, as by handles of their own.
        changed = self._shared.changed(all_of_it=all_of_it, but_containers=self.cloner.copies_itself)
        if changed is not None:
            raise Unclonable(
                f"{changed}, changes when a replica is stepped: the real environment would see that"
            )
        now = global_generators()
        drawn = [name for name, state in self._before.items() if now[name] != state]
        if drawn:
            raise Unclonable(
                f"reset or step draws numbers from outside of the environment (the generator of {drawn[0]}, which all"
                " share): draw from self.np_random"
            )

    def report(self) -> tuple[Any, ...]:
        """The fields of the report; in a worker, its class cannot be pickled."""
        self._check_shared(all_of_it=True)
        changed = self.cloner.changed_constants()
        if changed:
            raise Unclonable(f"{', '.join(changed)} seemed constant, but changed")
        snapshot = self.cloner.save()
        save_us = _microseconds(self.cloner.save)
        restore_us = _microseconds(lambda: self.cloner.restore(self.replicas[0], snapshot))
        alone = self._alone
        return self.cloner.way, "", save_us, restore_us, _usual(self._seconds), alone.constants, alone.varying


def _compare(got: list[tuple[Any, ...]], wanted: list[tuple[Any, ...]], message: str) -> None:
    names = ("the observation", "the reward", "termination", "truncation", "the observation after the reset")
    for step, (mine, theirs) in enumerate(zip(got, wanted, strict=True)):
        for name, value, reference in zip(names, mine, theirs, strict=True):
            if value != reference:
                raise Unclonable(
                    f"{message} {name} {step + 1} steps later: a part of the state is not saved, or numbers come from"
                    " outside of the environment (a clock, the operating system)"
                )


def _digest(observation: Any) -> Any:
    """Equal where observations are, bit for bit, NaN included: a difference of the last digit is one of the state."""
    if isinstance(observation, dict):
        return {name: _digest(value) for name, value in observation.items()}
    if isinstance(observation, tuple | list):
        return [_digest(value) for value in observation]
    array = np.asarray(observation)
    return array.shape, array.dtype.str, hashlib.blake2b(array.tobytes(), digest_size=16).digest()


def _microseconds(function: Callable[[], Any]) -> float:
    """Of one call; the quickest of some repeats, as other programs only ever make it slower."""
    once = min(timeit.repeat(function, timer=time.thread_time, number=1, repeat=2))
    n_calls = max(1, min(200, int(0.002 / max(once, 1e-7))))
    return min(timeit.repeat(function, timer=time.thread_time, number=n_calls, repeat=5)) / n_calls * 1e6
