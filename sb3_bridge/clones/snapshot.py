"""Snapshots of one Gymnasium environment: its states saved, and restored into replicas."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any, NamedTuple

import gymnasium
import numpy as np

from sb3_bridge.clones.copying import (
    NO_STATE,
    PLAIN,
    RENDERING,
    Fingerprint,
    Replica,
    Stream,
    Unclonable,
    copy_value,
    is_mujoco,
    layers_of,
    replicate,
    reseed,
    set_stream,
    spaces_of,
    stream_of,
)
from sb3_bridge.clones.core_state import Functions, core_for


@dataclass(frozen=True)
class CloneReport:
    """What the replay check found.

    Attributes:
      means: how states are saved; empty where the environment is refused.
      reason: why it is refused, empty otherwise; one line for each means that was tried.
      snapshot_us: microseconds to save a state.
      restore_us: microseconds to restore one into a replica.
      step_us: microseconds of a step of a replica.
      constants: ``(layer, attribute)`` that were seen never to change and are not part of snapshots.
    """

    means: str
    reason: str = ""
    snapshot_us: float = 0.0
    restore_us: float = 0.0
    step_us: float = 0.0
    constants: tuple[tuple[int, str], ...] = ()

    @property
    def passed(self) -> bool:
        """Whether restored environments repeat themselves and leave the original untouched."""
        return bool(self.means)

    @property
    def description(self) -> str:
        """One line for the log."""
        if not self.passed:
            return f"cannot be cloned exactly: {'; '.join(self.reason.splitlines())}"
        return (
            f"exact clones by {self.means} (replay check passed; {self.snapshot_us:.1f} us a snapshot,"
            f" {self.restore_us:.1f} a restore, {self.step_us:.1f} a step)"
        )


class _Stand:
    """Stands in a snapshot for an environment of the wrapper chain, whose own attributes are saved apart."""


class Snapshot(NamedTuple):
    """A saved state; opaque, restored by the cloner that saved it."""

    layers: list[
        tuple[dict[str, Any], list[tuple[str, Any]], int]
    ]  # plain values, others, number of attributes
    core: Any
    streams: list[tuple[int, Stream]]  # of spaces that drew numbers


class Cloner:
    """Saves one environment's states and restores them into replicas.

    Args:
      env: the real environment, in its wrappers. It is only read.
      means: one of :func:`means_for`.
      functions: the user's, where that is the means.
      constants: ``(layer, attribute)`` to leave out as long as they are the objects that they are now.
    """

    def __init__(
        self,
        env: gymnasium.Env,
        means: str,
        functions: Functions | None = None,
        constants: tuple[tuple[int, str], ...] = (),
    ):
        self._env, self.layers = env, layers_of(env)
        self._core = core_for(self.layers[-1], means, functions)
        self._spaces = spaces_of(self.layers)
        self._hidden: list[frozenset[str]] = [
            NO_STATE
            | RENDERING
            | {
                name
                for name, value in vars(layer).items()
                if isinstance(value, gymnasium.Space | gymnasium.Env)
            }
            for layer in self.layers
        ]
        self._hidden[-1] |= self._core.hidden
        self._stands = [_Stand() for _ in self.layers]
        self._memo: dict[int, Any] = {
            id(layer): stand for layer, stand in zip(self.layers, self._stands, strict=True)
        }
        self._memo |= {id(space): space for space in self._spaces}
        for layer in self.layers:  # references to what is never copied
            self._memo |= {
                id(vars(layer)[name]): None for name in RENDERING if vars(layer).get(name) is not None
            }
        self._constants: list[dict[str, Any]] = [{} for _ in self.layers]
        for layer_index, name in constants:
            if name in vars(self.layers[layer_index]):
                self._constants[layer_index][name] = vars(self.layers[layer_index])[name]
        self._prints = _fingerprints(self._constants)
        self._first: Replica | None = None
        self._first_prints: dict[tuple[int, str], bytes | None] = {}

    @property
    def means(self) -> str:
        """How states are saved."""
        return self._core.name

    def save(self) -> Snapshot:
        """The present state."""
        memo = dict(self._memo)
        with_attributes, last = self._core.with_attributes, len(self.layers) - 1
        saved_layers = []
        for index, layer in enumerate(self.layers):
            hidden, constants = self._hidden[index], self._constants[index]
            plain: dict[str, Any] = {}
            others: list[tuple[str, Any]] = []
            values = vars(layer)
            for name, value in values.items():
                if type(value) in PLAIN:
                    if name not in hidden and (with_attributes or index < last):
                        plain[name] = value
                    continue
                if name in hidden:
                    continue
                if constants and name in constants and constants[name] is value:
                    continue
                stream = stream_of(value)
                if stream is not None:
                    others.append((name, stream))
                elif with_attributes or index < last:
                    try:
                        others.append((name, copy_value(value, memo)))
                    except Exception as error:
                        raise Unclonable(
                            f"{type(layer).__name__}.{name} cannot be copied: {error}"
                        ) from error
            saved_layers.append((plain, others, len(values)))
        streams = []
        for number, space in enumerate(self._spaces):
            generator = space._np_random
            if generator is not None:
                streams.append((number, Stream(type(generator.bit_generator), generator.bit_generator.state)))
        return Snapshot(saved_layers, self._core.save(self.layers[-1], memo), streams)

    def replica(self) -> Replica:
        """A new replica, to be restored before it is stepped.

        Raises:
          Unclonable: what cannot be copied.
        """
        if self._first is None:
            self._first = self._new_replica(
                self._env, {id(space): copy.deepcopy(space) for space in self._spaces}
            )
            self._first_prints = _fingerprints(self._first.constants)
            return self._first
        shared = {id(value): value for values in self._first.constants for value in values.values()}
        if is_mujoco(
            self._first.layers[-1]
        ):  # half a megabyte each: many models would not fit a processor's cache
            model = vars(self._first.layers[-1])["model"]
            shared[id(model)] = model
        return self._new_replica(self._first.layers[0], shared)

    def _new_replica(self, env: gymnasium.Env, shared: dict[int, Any]) -> Replica:
        try:
            layers = replicate(env, shared, by_itself=False)
        except Unclonable:
            if self._core.with_attributes:
                raise
            layers = replicate(env, shared, by_itself=True)  # its state comes by other means
        replica = Replica(layers)
        replica.spaces = spaces_of(layers)
        if len(replica.spaces) != len(self._spaces):
            raise Unclonable(f"{type(layers[-1]).__name__} changes its spaces when it is copied")
        for index, values in enumerate(self._constants):
            own = vars(layers[index])
            replica.constants[index] = {name: own[name] for name in values if name in own}
        replica.memo = {id(stand): layer for stand, layer in zip(self._stands, layers, strict=True)} | {
            id(mine): its for mine, its in zip(self._spaces, replica.spaces, strict=True)
        }
        return replica

    def restore(self, replica: Replica, snapshot: Snapshot, words: np.ndarray | None = None) -> None:
        """Brings a replica to a saved state.

        Args:
          replica: of this cloner.
          snapshot: of this cloner.
          words: uint64 ``[4]``, a seed for all random generators in place of their saved states.
        """
        memo: dict[int, Any] | None = None
        number = 0
        for index, (plain, others, n_attributes) in enumerate(snapshot.layers):
            values = vars(replica.layers[index])
            constants = replica.constants[index]
            if constants:
                values.update(constants)
            values.update(plain)
            for name, value in others:
                if type(value) is Stream:
                    if words is None:
                        values[name] = set_stream(values.get(name), value)
                    else:
                        if stream_of(values.get(name)) is None:
                            values[name] = set_stream(None, value)
                        reseed(values[name], words, number)
                        number += 1
                else:
                    if memo is None:
                        memo = dict(replica.memo)
                    values[name] = copy_value(value, memo)
            if len(values) != n_attributes and (
                index < len(snapshot.layers) - 1 or self._core.with_attributes
            ):
                kept = {*plain, *(name for name, _ in others), *constants, *self._hidden[index]}
                for name in [name for name in values if name not in kept]:
                    del values[name]
        for position, stream in snapshot.streams:
            space = replica.spaces[position]
            space._np_random = set_stream(space._np_random, stream)
            if words is not None:
                reseed(space._np_random, words, number)
                number += 1
        self._core.restore(replica.layers[-1], snapshot.core, replica)

    def changed_constants(self) -> list[str]:
        """Attributes held to be constant that were changed in place; from now on they are part of snapshots."""
        now = [(self._prints, _fingerprints(self._constants))]
        if self._first is not None:  # all replicas share its constants
            now.append((self._first_prints, _fingerprints(self._first.constants)))
        changed = {where for before, after in now for where in after if after[where] != before[where]}
        for index, name in changed:
            self._constants[index].pop(name, None)
            if self._first is not None:
                self._first.constants[index].pop(name, None)
        return sorted(f"{type(self.layers[index]).__name__}.{name}" for index, name in changed)


def _fingerprints(constants: list[dict[str, Any]]) -> dict[tuple[int, str], bytes | None]:
    return {
        (index, name): Fingerprint.of(value)
        for index, values in enumerate(constants)
        for name, value in values.items()
    }


class _WholeCloner:
    """Snapshots are copies of the whole environment, made by its own ``__deepcopy__`` if it has one."""

    means = "deepcopy"

    def __init__(self, env: gymnasium.Env):
        self._env = env

    def save(self) -> Any:
        return replicate(self._env, {}, by_itself=True)

    def replica(self) -> Replica:
        return Replica(self.save())

    def restore(self, replica: Replica, snapshot: Any, words: np.ndarray | None = None) -> None:
        replica.layers = replicate(snapshot[0], {}, by_itself=True)
        replica.step = replica.layers[0].step
        if words is not None:
            number = 0
            for layer in replica.layers:
                for value in vars(layer).values():
                    if stream_of(value) is not None:
                        reseed(value, words, number)
                        number += 1

    def changed_constants(self) -> list[str]:
        return []


AnyCloner = Cloner | _WholeCloner


def make_cloner(env: gymnasium.Env, report: CloneReport, functions: Functions | None = None) -> AnyCloner:
    """The cloner that a replay check approved.

    Args:
      env: the one that was checked, or another one made alike.
      report: of the check.
      functions: the user's, if they were checked.
    """
    if not report.passed:
        raise Unclonable(report.reason)
    if report.means == _WholeCloner.means:
        return _WholeCloner(env)
    return Cloner(env, report.means, functions, report.constants)
