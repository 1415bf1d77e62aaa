"""Where replicas are stepped: a server for each environment, in this process or in a SubprocVecEnv's workers."""

from __future__ import annotations

import dataclasses
import sys
import traceback
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, Protocol

import cloudpickle  # type: ignore[import-untyped]
import gymnasium
import numpy as np
from gymnasium import spaces

from sb3_bridge.clones import copying as copies
from sb3_bridge.clones import core_state as means
from sb3_bridge.clones import replay_check
from sb3_bridge.clones import snapshot as snapshots
from sb3_bridge.clones.copying import Replica, Unclonable, layers_of
from sb3_bridge.clones.core_state import Functions
from sb3_bridge.clones.replay_check import check
from sb3_bridge.clones.snapshot import AnyCloner, CloneReport, make_cloner

if TYPE_CHECKING:
    from stable_baselines3.common.vec_env import DummyVecEnv, SubprocVecEnv

_METHOD = "_grpo_branch_server"


class Server:
    """One environment's snapshots and replicas; for a SubprocVecEnv it lives in the worker.

    Args:
      env: the real one; it is only read.
      functions: the user's pair, or None.
    """

    def __init__(self, env: gymnasium.Env, functions: Functions | None):
        self._env, self._functions = env, functions
        self._cloner: AnyCloner | None = None
        self._replicas: list[Replica] = []
        self._kept: dict[int, Any] = {}

    def signature(self) -> str:
        """Equal for environments made alike: one check will do for them."""
        layers = layers_of(self._env)
        return repr(
            [f"{type(layer).__module__}.{type(layer).__qualname__}" for layer in layers]
            + [str(self._env.spec)]
        )

    def check(self) -> tuple[Any, ...]:
        """The replay check's report, as a plain tuple."""
        return tuple(getattr(check(self._env, self._functions), name) for name in _REPORT)

    def prepare(self, report: tuple[Any, ...]) -> None:
        self._cloner = make_cloner(self._env, CloneReport(*report), self._functions)

    def take(self, number: int) -> None:
        assert self._cloner is not None
        self._kept[number] = self._cloner.save()

    def free(self) -> None:
        self._kept.clear()

    def changed_constants(self) -> list[str]:
        assert self._cloner is not None
        return self._cloner.changed_constants()

    def step(
        self, begins: list[tuple[int, int]], words: np.ndarray, slots: Sequence[int], actions: np.ndarray
    ) -> tuple[Any, np.ndarray, np.ndarray, np.ndarray]:
        """Restores ``(slot, snapshot)`` with seeds ``words`` [n_begins, 4], then steps ``slots`` with ``actions``.

        Returns:
          Observations ``[n, ...]`` (a dict for Dict spaces), rewards float64, terminated and truncated bool ``[n]``.
        """
        assert self._cloner is not None
        replicas = self._replicas
        for (slot, number), seed in zip(begins, words, strict=True):
            while slot >= len(replicas):
                replicas.append(self._cloner.replica())
            self._cloner.restore(replicas[slot], self._kept[number], seed)
        observations, rewards, terminated, truncated = [], [], [], []
        for slot, action in zip(slots, actions, strict=True):
            observation, reward, over, cut, _ = replicas[slot].step(action)
            observations.append(observation)
            rewards.append(reward)
            terminated.append(over)
            truncated.append(cut)
        return (
            _stack(self._env.observation_space, observations),
            np.array(rewards, np.float64).reshape(-1),
            np.array(terminated, bool),
            np.array(truncated, bool),
        )


_REPORT = tuple(field.name for field in dataclasses.fields(CloneReport))


def _stack(space: spaces.Space, observations: list[Any]) -> Any:
    if isinstance(space, spaces.Dict):
        return {
            name: _stack(part, [seen[name] for seen in observations]) for name, part in space.spaces.items()
        }
    return np.array(observations, space.dtype)


class Group(Protocol):
    """The servers of all environments, wherever they are."""

    def call(self, method: str, arguments: list[tuple[Any, ...] | None]) -> list[Any]:
        """One call of each server, side by side; None where there is nothing to do for one."""
        ...


class Local:
    """Servers in this process."""

    def __init__(self, env: DummyVecEnv, functions: Functions | None):
        self._servers = [Server(one, functions) for one in env.envs]

    def call(self, method: str, arguments: list[tuple[Any, ...] | None]) -> list[Any]:
        return [
            None if args is None else getattr(server, method)(*args)
            for server, args in zip(self._servers, arguments, strict=True)
        ]


class _Call:
    """Pickles as a call of ``function``: unpickles to what that returns."""

    def __init__(self, function: Callable[..., Any], *arguments: Any):
        self._reduced = (function, arguments)

    def __reduce__(self) -> Any:
        return self._reduced


def _install(functions: Functions | None, method: str) -> str:
    """In a worker: gives environments the method that SB3's ``env_method`` calls; returns its name."""
    servers: dict[int, Server] = {}

    def serve(env: gymnasium.Env, name: str, arguments: tuple[Any, ...]) -> tuple[bool, Any]:
        try:
            if id(env) not in servers:
                servers[id(env)] = Server(env, functions)
            return True, getattr(servers[id(env)], name)(*arguments)
        except Exception as error:  # it would end the worker: the main process raises it
            return False, (isinstance(error, Unclonable), str(error), traceback.format_exc())

    setattr(gymnasium.Env, method, serve)
    return method


class Workers:
    """Servers in the workers of a SubprocVecEnv, spoken to in SB3's own protocol."""

    def __init__(self, env: SubprocVecEnv, functions: Functions | None):
        self._env = env
        # By value: a worker needs neither this package nor JAX. These are all that Server is made of.
        modules = (copies, means, snapshots, replay_check, sys.modules[__name__])
        for module in modules:
            cloudpickle.register_pickle_by_value(module)
        try:
            parcel = cloudpickle.dumps(_Call(_install, functions, _METHOD))
        finally:
            for module in modules:
                cloudpickle.unregister_pickle_by_value(module)
        for remote in env.remotes:
            remote.send(("has_attr", _Call(cloudpickle.loads, parcel)))
        installed = [remote.recv() for remote in env.remotes]
        if not all(installed):
            raise Unclonable("the workers of this SubprocVecEnv take no method for branches")

    def call(self, method: str, arguments: list[tuple[Any, ...] | None]) -> list[Any]:
        for remote, args in zip(self._env.remotes, arguments, strict=True):
            if args is not None:
                remote.send(("env_method", (_METHOD, (method, args), {})))
        answers: list[Any] = [
            (True, None) if args is None else remote.recv()
            for remote, args in zip(self._env.remotes, arguments, strict=True)
        ]
        for index, (is_fine, answer) in enumerate(answers):
            if not is_fine:
                refused, message, trace = answer
                if refused:
                    raise Unclonable(message)
                raise RuntimeError(f"a branch in environment {index} raised {message}\n{trace}")
        return [answer for _, answer in answers]
