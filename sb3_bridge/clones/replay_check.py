"""The replay check: the cheapest way by which copies of an environment repeat what the real one does."""

from __future__ import annotations

import copy
import hashlib
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import gymnasium
import numpy as np

from sb3_bridge.clones.copying import GENERATORS, PLAIN, Unclonable
from sb3_bridge.clones.core_state import Functions, cores_for
from sb3_bridge.clones.fingerprint import fingerprint
from sb3_bridge.clones.layers import construction, layers_of
from sb3_bridge.clones.sandbox import CAN_FORK, global_generators, global_generators_kept, going_on, in_child
from sb3_bridge.clones.shared_state import SharedState
from sb3_bridge.clones.snapshot import Cloner, CloneReport, Replica

_HEAVY = 1024  # bytes of an attribute above which it is worth finding out that it never changes
_ACTIONS = 12  # length of a replayed branch
_STEPS = 1000  # at most, to see an episode's end
_SECONDS = 0.5  # the same, for slow environments
_POINTS = (0, 1, 7)  # steps after which branches start; more before the first episode's end
_LOOKS = (1, 10, 100)  # steps after which attributes that seem constant are looked at


@dataclass
class _Run:
    """Transitions of a run, each an episode's end followed by a reset; observations as digests."""

    transitions: list[tuple[Any, ...]] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)

    def step(self, env: gymnasium.Env, action: Any) -> bool:
        action = copy.deepcopy(action)  # the environment may change it in place
        going_on()
        started = time.perf_counter()
        observation, reward, terminated, truncated, _ = env.step(action)
        self.seconds.append(time.perf_counter() - started)
        over = bool(terminated or truncated)
        row = (_digest(observation), float(reward), bool(terminated), bool(truncated))
        self.transitions.append((*row, _digest(env.reset()[0]) if over else b""))
        return over


@dataclass
class _Alone:
    """What the environment does with nobody looking.

    Attributes:
      first: the observation of the reset.
      actions: that were played.
      end: steps of the first episode, None where it did not end.
      transitions: one for each action.
      step_us, constants, varying: see :class:`CloneReport`.
    """

    first: bytes
    actions: list[Any]
    end: int | None
    transitions: list[tuple[Any, ...]]
    step_us: float
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
    uses_jax = SharedState([type(layer) for layer in layers_of(env)]).uses_jax
    reasons = []
    alone: _Alone | None = None
    for core in cores_for(env.unwrapped, functions):
        way = core.name
        try:
            if CAN_FORK and not uses_jax:
                alone = alone or _Alone(*in_child(partial(_play_alone, _bare, env, seed)))
                found = in_child(partial(_play_watched, _bare, env, way, functions, alone, seed))
            else:
                twin = partial(_twin, way, functions)
                once = _Alone(*_here(partial(_play_alone, twin, env, seed)))
                found = _here(partial(_play_watched, twin, env, way, functions, once, seed))
            return CloneReport(*found)
        except Unclonable as error:
            reasons.append(f"{way}: {error}")
            if alone is None and CAN_FORK and not uses_jax:  # whatever saves its states, it cannot be played
                return CloneReport("", reason=str(error))
    return CloneReport("", reason="\n".join(reasons))


def signature(env: gymnasium.Env, varying: tuple[tuple[int, str], ...]) -> bytes:
    """Equal for environments made alike: classes, and all attributes but the ``varying`` ones."""
    layers, parts = layers_of(env), []
    for index, layer in enumerate(layers):
        parts.append(f"{type(layer).__module__}.{type(layer).__qualname__} {id(type(layer))}")
        hidden = construction(layer) | {"_np_random", "_np_random_seed"}  # Gymnasium's
        hidden |= {name for place, name in varying if place == index}
        for name, value in sorted(vars(layer).items()):
            if isinstance(value, gymnasium.Space):
                parts.append(f"{name} {value}")
            elif name not in hidden and not (isinstance(layer, gymnasium.Wrapper) and name == "env"):
                found = fingerprint(value)
                parts.append(f"{name} {type(value).__qualname__ if found is None else found.digest.hex()}")
    return hashlib.blake2b("\n".join(parts).encode(), digest_size=16).digest()


def _here(work: Callable[[], Any]) -> Any:
    with global_generators_kept():
        try:
            return work()
        except Unclonable:
            raise
        except (
            Exception
        ) as error:  # an environment's own code may raise anything: it is refused, with the reason
            raise Unclonable(f"{type(error).__name__} {error}".strip()) from error


def _bare(env: gymnasium.Env) -> Any:
    """The real environment without wrappers that change no transition, and without its window; in a child only."""
    layers: list[Any] = layers_of(env)
    if getattr(layers[-1], "render_mode", None) == "human":
        layers[-1].render_mode = None
    return Replica(layers, [], {}).layers[0]


def _twin(way: str, functions: Functions | None, env: gymnasium.Env) -> Any:
    return Cloner(env, way, functions).replica().layers[0]


def _play_alone(original: Callable[[gymnasium.Env], Any], real: gymnasium.Env, seed: int) -> tuple[Any, ...]:
    """The fields of what ``original(real)`` does."""
    env = original(real)
    space = copy.deepcopy(env.action_space)
    space.seed(seed)
    before = _prints(env)
    first = _digest(env.reset(seed=seed)[0])
    layers = layers_of(env)
    heavy = {key: vars(layers[key[0]])[key[1]] for key, (_, size, _) in _prints(env).items() if size > _HEAVY}
    held = {key: value for key, value in heavy.items() if not isinstance(value, GENERATORS)}
    seen = _prints(env, held)
    actions: list[Any] = []
    run, end = _Run(), None
    started = time.perf_counter()
    while len(actions) < _STEPS and (end is None or len(actions) < end + _ACTIONS):
        actions.append(space.sample())
        ended = run.step(env, actions[-1]) and end is None
        if ended:
            end = len(actions)
        if ended or len(actions) in _LOOKS:
            seen = _same(env, held, seen)
        if time.perf_counter() - started > _SECONDS and len(actions) >= 4 * _ACTIONS:
            break
    step_us = float(np.median(run.seconds)) * 1e6
    seen = _same(env, held, seen)
    after = _prints(env)
    varying = tuple(key for key in before | after if before.get(key) != after.get(key))
    return first, actions, end, run.transitions, step_us, tuple(seen), varying


def _prints(env: gymnasium.Env, keys: Any = None) -> dict[tuple[int, str], tuple[bytes, int, bool]]:
    """Fingerprints of attributes, of all where no ``keys`` are given."""
    found = {}
    for index, layer in enumerate(layers_of(env)):
        for name, value in vars(layer).items():
            is_link = isinstance(value, gymnasium.Env | gymnasium.Space) or name in construction(layer)
            if is_link or (keys is not None and (index, name) not in keys):
                continue
            if type(value) in PLAIN and keys is not None:
                continue
            one = fingerprint(value)
            if one is not None:
                found[index, name] = (one.digest, one.size, one.refers)
    return found


def _same(env: gymnasium.Env, held: dict[Any, Any], seen: dict[Any, Any]) -> dict[Any, Any]:
    """Those of ``seen`` that are still the same objects, and unchanged."""
    layers = layers_of(env)
    still = {key for key in seen if vars(layers[key[0]]).get(key[1]) is held[key]}
    now = _prints(env, still)
    return {key: value for key, value in seen.items() if key in still and now.get(key) == value}


def _play_watched(
    original: Callable[[gymnasium.Env], Any],
    real: gymnasium.Env,
    way: str,
    functions: Functions | None,
    alone: _Alone,
    seed: int,
) -> tuple[Any, ...]:
    """The fields of the report of what ``original(real)`` and replicas of it do."""
    env = original(real)
    space = copy.deepcopy(env.action_space)
    space.seed(seed + 1)
    rng = np.random.default_rng(seed)
    if _digest(env.reset(seed=seed)[0]) != alone.first:
        raise Unclonable("reset(seed=...) gives different observations: they do not depend on the seed alone")
    watch = _Watch(Cloner(env, way, functions, alone.constants, alone.varying), alone)
    actions, run = alone.actions, _Run()
    last = len(actions) - _ACTIONS
    end = alone.end or last
    points = {*_POINTS, last // 2, end - _ACTIONS // 2, end - 1, end, last}
    snapshots = []
    for index, action in enumerate(actions):
        if index in points and 0 <= index <= last:
            snapshot = watch.cloner.save()
            snapshots.append((index, snapshot))
            watch.branch(snapshot, index, [space.sample() for _ in range(_ACTIONS)])
        run.step(env, action)
        if run.transitions[-1] != alone.transitions[index]:
            raise Unclonable(
                f"step {index + 1} differs from what the environment does alone: taking snapshots or stepping replicas"
                " touches it, as through a library that both use"
            )
    # Old snapshots must not have been changed by all that was done since.
    watch.swap()
    for index, snapshot in (snapshots[0], snapshots[-1], snapshots[int(rng.integers(len(snapshots)))]):
        watch.branch(snapshot, index, actions[:_ACTIONS])
    return tuple(vars(watch.report()).values())  # in a worker, its class cannot be pickled


class _Watch:
    """Steps replicas beside the environment, and compares."""

    def __init__(self, cloner: Cloner, alone: _Alone):
        self.cloner, self._alone = cloner, alone
        self._one, self._two = cloner.replica(), cloner.replica()
        kinds = [type(layer) for layer in (*cloner.layers, *self._one.layers)]
        self._shared = SharedState(kinds)
        self._before = global_generators()

    def swap(self) -> None:
        """Lets the replicas change their parts."""
        self._one, self._two = self._two, self._one

    def branch(self, snapshot: Any, index: int, others: list[Any]) -> None:
        """Restored replicas must do what the environment does, and twice the same for other actions."""
        one, two = self._one, self._two
        self._shared.accept()
        self._before = global_generators()
        self.cloner.restore(one, snapshot)
        self.cloner.restore(two, snapshot)
        replayed, other, again = _Run(), _Run(), _Run()
        for action, different in zip(self._alone.actions[index : index + _ACTIONS], others, strict=True):
            replayed.step(one.layers[0], action)
            other.step(two.layers[0], different)
        self._check_shared()
        expected = self._alone.transitions[index : index + _ACTIONS]
        where = f"after a restore at step {index}, the same actions do not repeat"
        _compare(replayed.transitions, expected, where)
        self.cloner.restore(one, snapshot)
        for different in others:
            again.step(one.layers[0], different)
        _compare(again.transitions, other.transitions, f"two restores of step {index} do not agree on")

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

    def report(self) -> CloneReport:
        """What was measured."""
        self._check_shared(all_of_it=True)
        changed = self.cloner.changed_constants()
        if changed:
            raise Unclonable(f"{', '.join(changed)} seemed constant, but changed")
        snapshot = self.cloner.save()
        return CloneReport(
            self.cloner.way,
            snapshot_us=_microseconds(self.cloner.save),
            restore_us=_microseconds(lambda: self.cloner.restore(self._one, snapshot)),
            step_us=self._alone.step_us,
            constants=self._alone.constants,
            varying=self._alone.varying,
        )


def _compare(got: list[tuple[Any, ...]], wanted: list[tuple[Any, ...]], message: str) -> None:
    names = ("the observation", "the reward", "termination", "truncation", "the observation after the reset")
    for step, (mine, theirs) in enumerate(zip(got, wanted, strict=True)):
        for name, value, reference in zip(names, mine, theirs, strict=True):
            is_nan = value != value and reference != reference
            if value != reference and not is_nan:
                raise Unclonable(
                    f"{message} {name} {step + 1} steps later: a part of the state is not saved, or numbers come from"
                    " outside of the environment (a clock, the operating system)"
                )


def _digest(observation: Any) -> bytes:
    """Bit for bit, NaN included: a difference of the last digit is a difference of the state."""
    found = hashlib.blake2b(digest_size=16)

    def add(value: Any) -> None:
        if isinstance(value, dict):
            for name in sorted(value, key=str):
                found.update(str(name).encode())
                add(value[name])
        elif isinstance(value, tuple | list):
            found.update(b"%d" % len(value))
            for item in value:
                add(item)
        else:
            array = np.ascontiguousarray(value)
            found.update(f"{array.shape} {array.dtype}".encode() + array.tobytes())

    add(observation)
    return found.digest()


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
