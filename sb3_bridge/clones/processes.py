"""Where replicas are stepped: a server for each environment, in this process or in a SubprocVecEnv's workers."""

from __future__ import annotations

import contextlib
import itertools
import multiprocessing.connection
import os
import select
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from typing import Any

import cloudpickle  # type: ignore[import-untyped]
import gymnasium
import numpy as np
from gymnasium import spaces
from stable_baselines3.common.vec_env import DummyVecEnv, SubprocVecEnv

from sb3_bridge.clones import place
from sb3_bridge.clones.copying import Unclonable, forget_classes
from sb3_bridge.clones.core_state import ACTION_MASKS, Functions
from sb3_bridge.clones.replay_check import check, signature
from sb3_bridge.clones.sandbox import global_generators_kept, keep_normal, kept_normal
from sb3_bridge.clones.snapshot import Cloner, CloneReport, Replica

_DRAWING = {
    "step",
    "replay",
    "play",
    "masks_at",
}  # methods that run an environment's code, which may draw from global generators
_TIMEOUT = 3600.0  # no lock step of branches takes an hour
_NUMBERS = itertools.count()


class Server:
    """One environment's snapshots and replicas; for a SubprocVecEnv it lives in the worker. ``env`` is only read."""

    def __init__(self, env: gymnasium.Env, functions: Functions | None):
        self.env, self._functions = env, functions
        self._cloner: Cloner | None = None
        self._pools: dict[Cloner, dict[int, Replica]] = {}
        self._active: dict[int, Replica] = {}
        self._kept: dict[int, tuple[Cloner, Any]] = {}
        self._normal = (0, 0.0)
        self._place: Any = None
        self._tells_masks = False

    def check(self) -> tuple[Any, ...]:
        """The replay check's report, as a plain tuple."""
        return tuple(vars(check(self.env, self._functions)).values())

    def signature(self, varying: tuple[tuple[int, str], ...]) -> bytes:
        """Equal for environments made alike: one check will do for them."""
        return signature(self.env, varying)

    def prepare(self, report: tuple[Any, ...]) -> None:
        """Takes over what the check of this environment, or of one made alike, found."""
        self._cloner = Cloner(self.env, CloneReport(*report), self._functions)

    def take(self, number: int) -> None:
        """Keeps the present state. An environment that was replaced, or wrapped anew, is checked first."""
        if self._cloner is None or not self._cloner.follows(self.env):
            self.prepare(self.check())
        assert self._cloner is not None
        self._kept[number] = (self._cloner, self._cloner.save())

    def keep_place(self) -> None:
        """Keeps the present state for :meth:`kept_place`, whatever is kept for branches."""
        self._place = None
        known = self._cloner is not None and self._cloner.follows(self.env)
        self._place = place.keep(self.env, self._cloner if known else None, self._functions)

    def kept_place(self) -> dict[str, Any]:
        """What ``keep_place`` kept, as a file holds it; the environment was proved to be cloned meanwhile."""
        if self._cloner is None or self._cloner.way != self._place.cloner.way:
            raise Unclonable("its state was not saved in the way that proved itself")
        return place.to_form(self._place)

    def put(self, form: dict[str, Any], is_trusted: bool) -> None:
        """Brings the environment, which was just reset, to such a place."""
        place.put(self.env, self._functions, form, is_trusted)

    def masks_at(self, number: int) -> np.ndarray:
        """Which actions a replica allows in a kept state."""
        return _masks(self._restored(0, number, None))

    def begin(self, tells_masks: bool = False) -> None:
        """Branches begin, until ``free``: keeps what each ``step`` would have to look for.

        With ``tells_masks`` a ``step`` says too which actions are allowed in the states that are reached.
        """
        self._normal, self._tells_masks = kept_normal(), tells_masks

    def free(self) -> None:
        """Forgets all kept states, and the replicas of an environment that was replaced."""
        keep_normal(self._normal)
        self._normal = (0, 0.0)
        self._kept.clear()
        self._active.clear()
        self._pools = {cloner: pool for cloner, pool in self._pools.items() if cloner is self._cloner}

    def changed_constants(self) -> list[str]:
        """See ``Cloner.changed_constants``."""
        return [] if self._cloner is None else self._cloner.changed_constants()

    def _restored(self, slot: int, number: int, seed: np.ndarray | None) -> Replica:
        cloner, saved = self._kept[number]
        pool = self._pools.setdefault(cloner, {})
        if slot in pool:
            cloner.restore(pool[slot], saved, seed)
        else:
            pool[slot] = cloner.replica(saved, seed)
        return pool[slot]

    def step(
        self, begins: list[tuple[int, int]], seeds: np.ndarray, slots: list[int], actions: np.ndarray
    ) -> Any:
        """Restores ``(slot, handle)`` with ``seeds`` [n_begins, 4], then steps ``slots`` with ``actions``; see ``Reached``."""
        for (slot, number), seed in zip(begins, seeds, strict=True):
            self._active[slot] = self._restored(slot, number, seed)
        lent = np.array(actions)  # an environment may change its action in place
        replicas = [self._active[slot] for slot in slots]
        steps = [_played(replica, one) for replica, one in zip(replicas, lent, strict=True)]
        if not self._tells_masks:
            return self._stack(steps)
        ended = [bool(one[2]) for one in steps]  # and behind an end there is nothing to ask
        pairs = zip(replicas, ended, strict=True)
        return *self._stack(steps), [None if over else _masks(one) for one, over in pairs]

    def replay(self, number: int, action: np.ndarray) -> Any:
        """What ``action`` leads to from a kept state, with the generators as they were then; like ``step``, n = 1."""
        return self._stack([_played(self._restored(0, number, None), np.array(action)[()])])

    def _stack(self, steps: list[tuple[Any, ...]]) -> Any:
        observations, rewards, terminated, truncated, _ = zip(*steps, strict=True)
        return (
            _stack(self.env.observation_space, list(observations)),
            np.array(rewards, np.float64).reshape(-1),
            np.array(terminated, bool).reshape(-1),
            np.array(truncated, bool).reshape(-1),
        )


def _played(replica: Replica, action: Any) -> tuple[Any, ...]:
    try:
        return replica.step(action)
    except ValueError as error:
        if "read-only" in str(error):
            raise Unclonable(f"a replica writes to data that never changed at first: {error}") from error
        raise


def _masks(replica: Replica) -> np.ndarray:
    return np.array(replica.layers[0].get_wrapper_attr(ACTION_MASKS)())


def _stack(space: spaces.Space, observations: list[Any]) -> Any:
    if isinstance(space, spaces.Dict):
        return {name: _stack(part, [one[name] for one in observations]) for name, part in space.items()}
    return np.array(observations, space.dtype)


def _guard(method: str) -> Any:
    if method in _DRAWING:
        return global_generators_kept(with_normal=method != "step")
    return contextlib.nullcontext()


class Local:
    """Servers in this process; ``serve(env, functions)`` makes one."""

    def __init__(self, env: DummyVecEnv, functions: Any, serve: Callable[..., Any] = Server):
        self._env, self._servers = env, [serve(one, functions) for one in env.envs]

    def call(self, method: str, arguments: list[tuple[Any, ...] | None]) -> list[Any]:
        with _guard(method):
            answers: list[Any] = []
            servers = zip(self._servers, self._env.envs, arguments, strict=True)
            for index, (server, env, args) in enumerate(servers):
                server.env = env  # it may have been replaced
                try:
                    answers.append(None if args is None else getattr(server, method)(*args))
                except Unclonable as error:
                    raise Unclonable(f"environment {index}: {error}") from error
            return answers


class _Load:
    """Unpickles to what ``function(*arguments)`` returns."""

    def __init__(self, function: Callable[..., Any], *arguments: Any):
        self._reduced = (function, arguments)

    def __reduce__(self) -> Any:
        return self._reduced


def _install(functions: Any, server: Callable[..., Any], name: str) -> str:
    """In a worker: gives environments the method that SB3's ``env_method`` calls; returns its name."""
    servers: dict[int, Any] = {}
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches all processes: the main one decides
    parent = os.getppid()

    def follow() -> (
        None
    ):  # forked workers keep each other's pipes open: none would notice that the main process died
        while os.getppid() == parent:
            time.sleep(1.0)
        os._exit(1)

    if "follow" not in [thread.name for thread in threading.enumerate()]:
        threading.Thread(target=follow, name="follow", daemon=True).start()

    def serve(env: gymnasium.Env, number: int, method: str, arguments: tuple[Any, ...]) -> tuple[Any, ...]:
        try:
            if id(env) not in servers:
                servers[id(env)] = server(env, functions)
            with _guard(method):
                return name, number, True, getattr(servers[id(env)], method)(*arguments)
        except Exception as error:  # it would end the worker: the main process raises it
            return name, number, False, (isinstance(error, Unclonable), str(error), traceback.format_exc())

    setattr(gymnasium.Env, name, serve)
    return name


class Workers:
    """Servers in the workers of a SubprocVecEnv, spoken to in SB3's own protocol."""

    def __init__(self, env: SubprocVecEnv, functions: Any, serve: Callable[..., Any] = Server):
        self._env = env
        # Each group has a method of its own: two models may use one VecEnv.
        self._name, self._number = f"_grpo_branches_{os.getpid()}_{next(_NUMBERS)}", 0
        # By value: a worker needs neither this package nor JAX.
        rooms = {f"{one.rpartition('.')[0]}." for one in (__name__, serve.__module__)}
        modules = [module for name, module in sys.modules.items() if name.startswith(tuple(rooms))]
        forget_classes()
        for module in modules:
            cloudpickle.register_pickle_by_value(module)
        try:
            parcel = cloudpickle.dumps(_Load(_install, functions, serve, self._name))
        finally:
            for module in modules:
                cloudpickle.unregister_pickle_by_value(module)
        message = ("has_attr", _Load(cloudpickle.loads, parcel))
        if not all(self._ask([message] * len(env.remotes), lambda answer: isinstance(answer, bool))):
            raise Unclonable("the workers of this SubprocVecEnv take no method for branches")

    def call(self, method: str, arguments: list[tuple[Any, ...] | None]) -> list[Any]:
        if getattr(self._env, "closed", False):
            if method == "free":
                return []
            raise WorkerError("the SubprocVecEnv is closed: make it anew")
        self._number += 1
        mine = (self._name, self._number)
        messages: list[Any] = [
            None if args is None else ("env_method", (self._name, (self._number, method, args), {}))
            for args in arguments
        ]
        answers = self._ask(messages, lambda answer: isinstance(answer, tuple) and answer[:2] == mine)
        for index, answer in enumerate(answers):
            if answer is not None and not answer[2]:
                is_refused, message, trace = answer[3]
                if is_refused:
                    raise Unclonable(f"environment {index}: {message}")
                raise RuntimeError(f"a branch in environment {index} raised {message}\n{trace}")
        return [None if answer is None else answer[3] for answer in answers]

    def _ask(self, messages: list[Any], is_answer: Callable[[Any], bool]) -> list[Any]:
        """Sends to all workers, then reads all answers, also when interrupted: none is left for the next to read."""
        waiting: list[int] = []
        answers: list[Any] = [None] * len(messages)
        try:
            for index, message in enumerate(messages):
                if message is not None:
                    with uninterrupted():
                        reach(self._env, index, "send", message)
                        waiting.append(index)
            while waiting:
                reach(self._env, waiting[0], "")
                with uninterrupted():
                    answer = reach(self._env, waiting[0], "recv")
                    if is_answer(answer):  # else one that an interrupted call left
                        answers[waiting.pop(0)] = answer
        except WorkerError:
            raise
        except BaseException:
            for index in waiting:
                reach(self._env, index, "")
                while not is_answer(reach(self._env, index, "recv")):
                    reach(self._env, index, "")
            raise
        return answers


class WorkerError(RuntimeError):
    """A worker of a SubprocVecEnv that died, or gave no answer in time; all its workers were ended."""


@contextlib.contextmanager
def uninterrupted() -> Iterator[None]:
    """Ctrl-C waits for the end: half of a message, or an answer that nobody noted, would spoil all that come after it."""
    before = signal.getsignal(signal.SIGINT)
    if threading.current_thread() is not threading.main_thread() or not callable(before):
        yield
        return
    caught: list[Any] = []
    signal.signal(signal.SIGINT, lambda *arguments: caught.append(arguments))
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
    if caught:
        before(*caught[-1])


def reach(env: SubprocVecEnv, index: int, method: str, *arguments: Any) -> Any:
    """``remotes[index].send(*arguments)`` or ``.recv()``; an empty ``method`` waits for an answer, which comes before ``recv``.

    Raises:
      WorkerError: which environment's worker died, and of what; or gave no answer for as many seconds as the environment
        variable ``GRPO_JAX_WORKER_TIMEOUT`` says (3600; 0: any time).
    """
    remote, process = env.remotes[index], env.processes[index]
    seconds = float(os.environ.get("GRPO_JAX_WORKER_TIMEOUT") or _TIMEOUT)
    try:
        if not method and not _is_ready(remote.fileno(), process.sentinel, seconds or None):
            raise died(env, index, f"gave no answer for {seconds:g} s (GRPO_JAX_WORKER_TIMEOUT)")
        return getattr(remote, method)(*arguments) if method else None
    except (EOFError, ConnectionError) as error:
        raise died(env, index) from error


def died(env: SubprocVecEnv, index: int | None = None, why: str = "") -> WorkerError:
    """The error of a worker (None: of the first that ended) that died; ends the others, and closes the VecEnv."""
    if index is None:
        ended = multiprocessing.connection.wait([process.sentinel for process in env.processes], 1.0)
        index = next((i for i, process in enumerate(env.processes) if process.sentinel in ended), 0)
    process = env.processes[index]
    if not why:
        process.join(1.0)
        name = next((one.name for one in signal.Signals if process.exitcode == -one), "")
        why = f"was killed by {name}" if name else f"has ended with exit code {process.exitcode}"
    for one in env.processes:
        one.kill()
    for one, remote in zip(env.processes, env.remotes, strict=True):
        one.join()
        remote.close()
    env.waiting, env.closed = False, True
    return WorkerError(
        f"the worker of environment {index} (process {process.pid}) {why}: all workers were ended, the SubprocVecEnv must be"
        " made anew"
    )


def _is_ready(remote: int, sentinel: int, seconds: float | None) -> bool:
    """Waits for a message; an EOFError where the process ended and left none: others that were forked keep its pipe open."""
    if not hasattr(select, "poll"):
        found: Any = multiprocessing.connection.wait([remote, sentinel], seconds)
    else:
        poll = select.poll()
        poll.register(remote, select.POLLIN)
        poll.register(sentinel, select.POLLIN)
        found = [fd for fd, _ in poll.poll(None if seconds is None else 1e3 * seconds)]
    if found == [sentinel]:
        raise EOFError
    return bool(found)
