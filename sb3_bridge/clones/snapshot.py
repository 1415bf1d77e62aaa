"""Snapshots of one Gymnasium environment: its states saved, and restored into replicas."""

from __future__ import annotations

import copy
import itertools
from dataclasses import dataclass
from typing import Any, NamedTuple

import gymnasium
import numpy as np

from sb3_bridge.clones.copying import (
    GENERATORS,
    PLAIN,
    Memo,
    Stream,
    Unclonable,
    blank,
    copy_value,
    deep_copy,
    reseed,
)
from sb3_bridge.clones.core_state import DEEPCOPY, Functions, cores_for
from sb3_bridge.clones.fingerprint import Fingerprint, fingerprint
from sb3_bridge.clones.layers import chain_of, construction, layers_of, spaces_of

_LARGE = 1 << 20  # bytes of a constant that replicas share with the environment


@dataclass(frozen=True)
class CloneReport:
    """What the replay check found.

    Attributes:
      way: how states are saved; empty where the environment is refused.
      reason: why it is refused, empty otherwise; one line for each way that was tried.
      snapshot_us: microseconds to save a state.
      restore_us: microseconds to restore one into a replica.
      step_us: microseconds of a step of a replica.
      constants: ``(layer, attribute)`` that were seen never to change and are not part of snapshots.
      varying: ``(layer, attribute)`` that did change; all others are what the environment was made with.
    """

    way: str
    reason: str = ""
    snapshot_us: float = 0.0
    restore_us: float = 0.0
    step_us: float = 0.0
    constants: tuple[tuple[int, str], ...] = ()
    varying: tuple[tuple[int, str], ...] = ()

    @property
    def passed(self) -> bool:
        """Whether restored environments repeat what the real one does, and leave it untouched."""
        return bool(self.way)

    @property
    def description(self) -> str:
        """One line for the log."""
        if not self.passed:
            return f"cannot be cloned exactly: {'; '.join(self.reason.splitlines())}"
        return (
            f"exact clones by {self.way} (replay check passed; {self.snapshot_us:.1f} us a snapshot,"
            f" {self.restore_us:.1f} a restore, {self.step_us:.1f} a step)"
        )


class _Layer:
    """Takes the place of a reference to the environment, or to one of its wrappers, in a snapshot."""


class Snapshot(NamedTuple):
    """A saved state; opaque, restored by the cloner that saved it."""

    layers: list[
        tuple[dict[str, Any], list[tuple[str, Any]], int]
    ]  # plain values, others, number of attributes
    core: Any
    streams: list[tuple[int, Stream]]  # of spaces that drew numbers


class Replica:
    """A copy of an environment for branches.

    Attributes:
      layers: its wrappers and itself, outermost first, without wrappers that change no transition.
      step: of the outermost.
      spaces: that it holds, and their parts.
      memo: what takes the place of the parts of a snapshot.
      constants: its own, or shared, attributes that never change.
    """

    def __init__(self, layers: list[Any], spaces: list[gymnasium.Space], memo: Memo):
        self.layers, self.spaces, self.memo = layers, spaces, memo
        self.constants: dict[tuple[int, str], Any] = {}
        self.n_adopted = 0
        self.link()

    def link(self) -> None:
        """Lets each wrapper wrap the next layer."""
        for upper, lower in itertools.pairwise(self.layers):
            upper.env = lower
        self.step = self.layers[0].step


class Cloner:
    """Saves one environment's states and restores them into replicas.

    Args:
      env: the real environment, in its wrappers. It is only read.
      way: how states are saved, a name of :func:`cores_for`.
      functions: the user's, where that is how states are saved.
      constants: ``(layer, attribute)`` to leave out as long as they are the objects that were first seen.
      varying: ``(layer, attribute)`` that change; where replicas are the environment's own deep copies, others are
        theirs, as handles are, until they change.
    """

    def __init__(
        self,
        env: gymnasium.Env,
        way: str,
        functions: Functions | None = None,
        constants: tuple[tuple[int, str], ...] = (),
        varying: tuple[tuple[int, str], ...] = (),
    ):
        self.layers = layers_of(env)
        core = self.layers[-1]
        self.way = way
        self._core = next(one for one in cores_for(core, functions) if one.name == way)
        self._n_saved = len(self.layers) - (way == DEEPCOPY)
        self._spaces = spaces_of(self.layers)
        self._hidden = [self._hidden_in(layer) for layer in self.layers]
        self._hidden[-1] |= self._core.hidden
        self._is_human = getattr(core, "render_mode", None) == "human"
        if self._is_human:
            self._hidden[-1] |= {"render_mode"}
        self._by_itself = False
        always = {name for index, name in varying if index == len(self.layers) - 1}
        self._own = {name: value for name, value in vars(core).items() if name not in always}
        self._marks = [_Layer() for _ in self.layers]
        marks = dict(zip(map(id, self.layers), self._marks, strict=True))
        self._chain = list(chain_of(env))
        self._memo: Memo = {id(space): space for space in self._spaces}
        mark: Any = None
        for layer in reversed(self._chain):  # a wrapper that is left out is what it wraps
            self._memo[id(layer)] = mark = marks.get(id(layer), mark)
        self._awaited, self._n_adopted = set(constants), 0
        self._constants: list[dict[str, Any]] = [{} for _ in self.layers]
        self._prints: dict[tuple[int, str], Fingerprint] = {}
        self._shared: dict[tuple[int, str], Any] = {}

    @staticmethod
    def _hidden_in(layer: gymnasium.Env) -> set[str]:
        found = {name for name, value in vars(layer).items() if isinstance(value, gymnasium.Space)}
        if isinstance(layer, gymnasium.Wrapper):
            found.add("env")
        return found | construction(layer)

    def follows(self, env: gymnasium.Env) -> bool:
        """Whether ``env`` is still made of the layers that this cloner knows."""
        chain = list(chain_of(env))
        return len(chain) == len(self._chain) and all(
            mine is its for mine, its in zip(self._chain, chain, strict=True)
        )

    def save(self) -> Snapshot:
        """The present state.

        Raises:
          Unclonable: an attribute cannot be copied.
        """
        if self._awaited:
            self._adopt()
        memo = dict(self._memo)
        saved = []
        for index in range(self._n_saved):
            layer, hidden, left_out = self.layers[index], self._hidden[index], self._constants[index]
            is_core = index == len(self.layers) - 1
            if is_core and self._by_itself:
                left_out = left_out | self._own
            plain: dict[str, Any] = {}
            others: list[tuple[str, Any]] = []
            values = vars(layer)
            for name, value in values.items():
                if name in hidden or (left_out and left_out.get(name, values) is value):
                    continue
                if type(value) in PLAIN:
                    plain[name] = value
                    continue
                try:
                    others.append((name, copy_value(value, memo)))
                except Exception as error:  # whatever a value's own pickling raises
                    if not self._core.by_itself or not is_core:
                        why = f"{type(layer).__name__}.{name} cannot be copied: {error}"
                        raise Unclonable(why) from error
                    hidden.add(name)  # left to the functions, and to the environment's own deep copy
                    self._by_itself = True
                    return self.save()
            saved.append((plain, others, len(values)))
        streams = [
            (number, copy_value(space._np_random, memo))
            for number, space in enumerate(self._spaces)
            if space._np_random is not None
        ]
        return Snapshot(saved, self._core.save(self.layers[-1], memo), streams)

    @property
    def copies_itself(self) -> bool:
        """Whether replicas are made by the environment's own deep copy; known once a state was saved."""
        return self._by_itself or self.way == DEEPCOPY

    def replica(self, *, is_blank: bool = False) -> Replica:
        """A new replica, in the present state; a blank one must be restored before it is stepped.

        Raises:
          Unclonable: what cannot be copied.
        """
        snapshot = None if is_blank else self.save()
        twins = [blank(layer) for layer in self.layers]
        if self._by_itself:
            try:
                twins[-1] = deep_copy(self.layers[-1], {})
            except Exception as error:
                names = ", ".join(sorted(self._hidden[-1] - construction(self.layers[-1])))
                raise Unclonable(
                    f"{type(self.layers[-1]).__name__} cannot be copied ({names}): {error}"
                ) from error
        memo: Memo = {}
        spaces = [copy.deepcopy(space, memo) for space in self._spaces]
        twin_of = dict(zip(map(id, self._spaces), spaces, strict=True))
        for twin, layer in zip(twins, self.layers, strict=True):
            for name in construction(layer):
                twin.__dict__[name] = vars(layer).get(name)
            spaces_here = {name: value for name, value in vars(layer).items() if id(value) in twin_of}
            twin.__dict__.update({name: twin_of[id(value)] for name, value in spaces_here.items()})
        if self._is_human:
            twins[-1].render_mode = None
        self._core.blank(self.layers[-1], twins[-1])
        memo = dict(zip(map(id, self._marks), twins, strict=True))
        memo |= {id(mine): its for mine, its in zip(self._spaces, spaces, strict=True)}
        replica = Replica(twins, spaces, memo)
        if snapshot is not None:
            self.restore(replica, snapshot)
        return replica

    def restore(self, replica: Replica, snapshot: Snapshot, words: np.ndarray | None = None) -> None:
        """Brings a replica to a saved state.

        Args:
          replica: of this cloner.
          snapshot: of this cloner.
          words: uint64 ``[4]``, a seed for all random generators in place of their saved states.
        """
        if replica.n_adopted < self._n_adopted:
            self._give_constants(replica)
        memo = dict(replica.memo)
        drawn: list[Any] = []  # generators, once each
        for index, (plain, others, n_attributes) in enumerate(snapshot.layers):
            values = vars(replica.layers[index])
            for name in self._constants[index]:
                values[name] = replica.constants[index, name]
            values.update(plain)
            for name, item in others:
                if type(item) is Stream and id(item) not in memo:
                    target = item.of_kind(values.get(name))
                    if any(
                        target is one for one in drawn
                    ):  # they were one generator when last restored, but are two
                        target = item.of_kind(None)
                    drawn.append(target)
                    memo[id(item)] = target if words is not None else item.set(target)
                values[name] = copy_value(item, memo)
            if len(values) != n_attributes:
                kept = {*plain, *(name for name, _ in others), *self._constants[index], *self._hidden[index]}
                if self._by_itself and index == len(self.layers) - 1:
                    kept |= self._own.keys()
                for name in [name for name in values if name not in kept]:
                    del values[name]
        for position, stream in snapshot.streams:
            space = replica.spaces[position]
            if id(stream) not in memo:
                memo[id(stream)] = stream.set(space._np_random)
                drawn.append(memo[id(stream)])
            space._np_random = memo[id(stream)]
        core = self._core.restore(replica.layers[-1], snapshot.core, memo)
        if core is not replica.layers[-1]:
            replica.layers[-1] = core
            replica.link()
        if words is not None:
            drawn += memo.get("generators", ())
            if self._core.by_itself:  # its functions may have set others
                drawn += [value for value in vars(core).values() if isinstance(value, GENERATORS)]
            for number, generator in enumerate({id(one): one for one in drawn}.values()):
                reseed(generator, words, number)

    def _adopt(self) -> None:
        """Constants that exist by now: some are made by the first reset only."""
        for index, name in [key for key in self._awaited if key[1] in vars(self.layers[key[0]])]:
            self._awaited.discard((index, name))
            value = vars(self.layers[index])[name]
            found = fingerprint(value)
            if found is None:
                continue
            self._constants[index][name] = self._memo[id(value)] = value
            self._prints[index, name] = found
            self._n_adopted += 1
            if found.refers:
                continue  # each replica has its own
            if type(value) is np.ndarray and not value.dtype.hasobject:
                shared = value.view()
                shared.flags.writeable = False
            else:
                shared = value if found.size > _LARGE else copy_value(copy_value(value, {}), {})
            self._shared[index, name] = shared

    def _give_constants(self, replica: Replica) -> None:
        replica.n_adopted = self._n_adopted
        for index, name in self._prints:
            if (index, name) not in replica.constants:
                value = self._constants[index][name]
                if (index, name) in self._shared:
                    mine = self._shared[index, name]
                else:
                    memo = {key: item for key, item in self._memo.items() if key != id(value)}
                    mine = copy_value(copy_value(value, memo), dict(replica.memo))
                replica.constants[index, name] = replica.memo[id(value)] = mine

    def changed_constants(self) -> list[str]:
        """Attributes held to be constant that were changed in place; from now on they are part of snapshots.

        Raises:
          Unclonable: one that is too large for that.
        """
        changed = []
        for (index, name), before in list(self._prints.items()):
            value, shared = self._constants[index][name], self._shared.get((index, name))
            after = fingerprint(value)
            is_copy = shared is not None and type(value) is not np.ndarray and before.size <= _LARGE
            if after == before and not (is_copy and fingerprint(shared) != before):
                continue
            label = f"{type(self.layers[index]).__name__}.{name}"
            if before.size > _LARGE:
                raise Unclonable(
                    f"{label} ({before.size >> 20} MiB) never changed at first, but does now: it is too large to be saved"
                    " with every state"
                )
            changed.append(label)
            del self._constants[index][name], self._prints[index, name]
            self._memo.pop(id(value), None)
        return sorted(changed)


def make_cloner(env: gymnasium.Env, report: CloneReport, functions: Functions | None = None) -> Cloner:
    """The cloner that a replay check approved.

    Args:
      env: the one that was checked, or another one made alike.
      report: of the check.
      functions: the user's, if they were checked.

    Raises:
      Unclonable: the check refused the environment.
    """
    if not report.passed:
        raise Unclonable(report.reason)
    return Cloner(env, report.way, functions, report.constants, report.varying)
