"""Snapshots of one Gymnasium environment: its states saved, and restored into replicas."""

from __future__ import annotations

import copy
import itertools
import sys
from dataclasses import dataclass
from typing import Any, NamedTuple

import gymnasium
import numpy as np

from sb3_bridge.clones.changes import Fingerprint, fingerprint
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
from sb3_bridge.clones.core_state import (
    Functions,
    chain_of,
    construction,
    cores_for,
    layers_of,
    links,
    spaces_of,
)

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

    # Of each layer: plain values, others, number of attributes.
    layers: list[tuple[dict[str, Any], list[tuple[str, Any]], int]]
    core: Any
    streams: list[tuple[int, Stream]]  # of spaces that drew numbers


class Replica:
    """A copy of an environment for branches: its wrappers and itself, outermost first, and the spaces that they hold.

    ``memo`` says what takes the place of the parts of a snapshot, ``n_adopted`` how many constants are among it.
    """

    def __init__(self, layers: list[Any], spaces: list[gymnasium.Space], memo: Memo):
        self.layers, self.spaces, self.memo, self.n_adopted = layers, spaces, memo, 0
        for upper, lower in itertools.pairwise(layers):
            upper.env = lower
        self.step = layers[0].step


class _Constant(NamedTuple):
    value: Any  # kept alive: its id is a key of replicas' memos
    seen: Fingerprint
    shared: Any  # what replicas have in its place; None where each has its own


class Cloner:
    """Saves one environment's states and restores them into replicas.

    Args:
      env: the real environment, in its wrappers. It is only read.
      report: of the check of this environment, or of another one made alike.
      functions: the user's, where they were checked.

    Raises:
      Unclonable: the check refused the environment.
    """

    def __init__(self, env: gymnasium.Env, report: CloneReport, functions: Functions | None = None):
        if not report.passed:
            raise Unclonable(report.reason)
        self.way, self.layers, self._chain = report.way, layers_of(env), list(chain_of(env))
        core = self.layers[-1]
        self._core = next(one for one in cores_for(core, functions) if one.name == report.way)
        self._spaces = spaces_of(self.layers)
        self._hidden = [links(layer) for layer in self.layers]
        self._hidden[-1] |= self._core.hidden
        if getattr(core, "render_mode", None) == "human":
            self._hidden[-1].add("render_mode")
        # Whether replicas are made by the environment's own deep copy; known once a state was saved. What does not vary
        # is theirs then, as handles are.
        self.copies_itself = False
        always = {name for index, name in report.varying if index == len(self.layers) - 1}
        self._own = {name: value for name, value in vars(core).items() if name not in always}
        self._marks = [_Layer() for _ in self.layers]
        marks = dict(zip(map(id, self.layers), self._marks, strict=True))
        # What copiers of a library's objects find: the environment, and what they keep from one time to the next.
        self._memo: Memo = {"env": core, "kept": {}} | {id(space): space for space in self._spaces}
        mark: Any = None
        for layer in reversed(self._chain):  # a wrapper that is left out is what it wraps
            self._memo[id(layer)] = mark = marks.get(id(layer), mark)
        self._awaited = set(report.constants)
        self._constants: list[dict[str, Any]] = [{} for _ in self.layers]
        self._adopted: dict[tuple[int, str], _Constant] = {}
        self._dropped: list[_Constant] = []

    def follows(self, env: gymnasium.Env) -> bool:
        """Whether ``env`` is still made of the layers that this cloner knows."""
        return list(map(id, chain_of(env))) == list(map(id, self._chain))

    def save(self) -> Snapshot:
        """The present state.

        Raises:
          Unclonable: an attribute cannot be copied.
        """
        if self._awaited:
            self._adopt()
        memo, saved = dict(self._memo), []
        core = self.layers[-1]
        self._core.tidy(core)
        for layer, hidden, left_out in zip(self.layers, self._hidden, self._constants, strict=True):
            if layer is core and self.copies_itself:
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
                    if not self._core.by_itself or layer is not core:
                        why = f"{type(layer).__name__}.{name} cannot be copied: {error}"
                        raise Unclonable(why) from error
                    hidden.add(name)  # left to the functions, and to the environment's own deep copy
                    self.copies_itself = True
                    return self.save()
            saved.append((plain, others, len(values)))
        drew = [(i, space._np_random) for i, space in enumerate(self._spaces) if space._np_random is not None]
        streams = [(i, copy_value(generator, memo)) for i, generator in drew]
        return Snapshot(saved, self._core.save(core, memo), streams)

    def replica(self, snapshot: Snapshot | None = None, words: np.ndarray | None = None) -> Replica:
        """A new replica, restored to a snapshot (None: the present state) as by :meth:`restore`.

        Raises:
          Unclonable: what cannot be copied.
        """
        snapshot = self.save() if snapshot is None else snapshot
        core = self.layers[-1]
        twins = [blank(layer) for layer in self.layers]
        if self.copies_itself:
            try:
                twins[-1] = deep_copy(core)
            except Exception as error:
                names = ", ".join(sorted(self._hidden[-1] - construction(core)))
                raise Unclonable(f"{type(core).__name__} cannot be copied ({names}): {error}") from error
        memo: Memo = {}
        spaces = [copy.deepcopy(space, memo) for space in self._spaces]
        twin_of = dict(zip(map(id, self._spaces), spaces, strict=True))
        for twin, layer in zip(twins, self.layers, strict=True):
            for name, value in vars(layer).items():
                if id(value) in twin_of or name in construction(layer):
                    vars(twin)[name] = twin_of.get(id(value), value)
        if "render_mode" in self._hidden[-1]:
            twins[-1].render_mode = None
        self._core.blank(core, twins[-1])
        marks = dict(zip(map(id, self._marks), twins, strict=True))
        replica = Replica(twins, spaces, {**twin_of, **marks, "kept": {}})
        self.restore(replica, snapshot, words)
        return replica

    def restore(self, replica: Replica, snapshot: Snapshot, words: np.ndarray | None = None) -> None:
        """Brings a replica of this cloner to one of its snapshots.

        ``words``, uint64 ``[4]``, are a seed for all random generators in place of their saved states.
        """
        if replica.n_adopted < len(self._adopted) + len(self._dropped):
            self._give_constants(replica)
        memo = dict(replica.memo)
        drawn: list[Any] = []  # generators, once each

        def generator(stream: Stream, current: Any) -> Any:
            if id(stream) not in memo:  # if two were one when last restored, one of them is made anew
                target = stream.of_kind(None if any(current is one for one in drawn) else current)
                drawn.append(target)
                memo[id(stream)] = target if words is not None else stream.set(target)
            return memo[id(stream)]

        for index, (plain, others, n_attributes) in enumerate(snapshot.layers):
            values = vars(replica.layers[index])
            for name, constant in self._constants[index].items():
                values[name] = memo[id(constant)]
            values.update(plain)
            for name, item in others:
                if type(item) is Stream:
                    values[name] = generator(item, values.get(name))
                else:
                    values[name] = copy_value(item, memo)
            if len(values) != n_attributes:
                kept = {*plain, *(name for name, _ in others), *self._constants[index], *self._hidden[index]}
                if self.copies_itself and index == len(self.layers) - 1:
                    kept |= self._own.keys()
                for name in values.keys() - kept:
                    del values[name]
        for position, stream in snapshot.streams:
            space = replica.spaces[position]
            space._np_random = generator(stream, space._np_random)
        core = replica.layers[-1]
        self._core.restore(core, snapshot.core, memo)
        if words is not None:
            drawn += memo.get("generators", ())
            if self._core.by_itself:  # its functions may have set others
                drawn += [value for value in vars(core).values() if isinstance(value, GENERATORS)]
            for number, one in enumerate({id(one): one for one in drawn}.values()):
                reseed(one, words, number)

    def parts(self) -> dict[str, Any]:
        """What a snapshot refers to and does not hold, by names that are the same for environments made alike."""
        parts: dict[str, list[Any]] = {"layer": [*self._marks], "space": [*self._spaces]}
        return {f"{kind} {i}": one for kind, ones in parts.items() for i, one in enumerate(ones)}

    def constants(self) -> list[dict[str, str]]:
        """Of each layer the attributes that are no part of snapshots, and digests of them."""
        adopted = self._adopted
        return [
            {name: adopted[index, name].seen.digest.hex() for name in names if (index, name) in adopted}
            for index, names in enumerate(self._constants)
        ]

    def put(self, snapshot: Snapshot) -> None:
        """Brings the real environment to a state: that of another one made alike, or one that was saved before."""
        real = object.__new__(Replica)
        marks = dict(zip(map(id, self._marks), self.layers, strict=True))
        real.layers, real.spaces, real.n_adopted = self.layers, self._spaces, sys.maxsize
        real.memo = {**marks, **{id(space): space for space in self._spaces}, "kept": {}}
        self.restore(real, snapshot)

    def _adopt(self) -> None:
        """Constants that exist by now: some are made by the first reset only."""
        for index, name in [key for key in self._awaited if key[1] in vars(self.layers[key[0]])]:
            self._awaited.discard((index, name))
            value = vars(self.layers[index])[name]
            found = fingerprint(value)
            if found is None:
                continue
            self._constants[index][name] = self._memo[id(value)] = value
            shared: Any = None
            if type(value) is np.ndarray and not value.dtype.hasobject:
                shared = value.view()
                shared.flags.writeable = False
            elif not found.refers:
                shared = value if found.size > _LARGE else copy_value(copy_value(value, {}), {})
            self._adopted[index, name] = _Constant(value, found, shared)

    def _give_constants(self, replica: Replica) -> None:
        replica.n_adopted = len(self._adopted) + len(self._dropped)
        for value, _, shared in self._adopted.values():
            if id(value) not in replica.memo:
                if shared is None:
                    memo = {key: item for key, item in self._memo.items() if key != id(value)}
                    shared = copy_value(copy_value(value, memo), dict(replica.memo))
                replica.memo[id(value)] = shared

    def changed_constants(self) -> list[str]:
        """Attributes held to be constant that were changed in place; from now on they are part of snapshots.

        Raises:
          Unclonable: one that is too large for that.
        """
        changed = []
        for (index, name), constant in list(self._adopted.items()):
            value, before, shared = constant
            is_copy = shared is not None and type(value) is not np.ndarray and before.size <= _LARGE
            if fingerprint(value) == before and not (is_copy and fingerprint(shared) != before):
                continue
            label = f"{type(self.layers[index]).__name__}.{name}"
            if before.size > _LARGE:
                raise Unclonable(
                    f"{label} ({before.size >> 20} MiB) never changed at first, but does now: it is too large to be saved"
                    " with every state"
                )
            changed.append(label)
            self._dropped.append(self._adopted.pop((index, name)))
            del self._constants[index][name]
            self._memo.pop(id(value), None)
        return sorted(changed)
