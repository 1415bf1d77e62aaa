"""The replay check: what copies can be trusted with, and that nobody notices that it ran."""

from __future__ import annotations

import os
import pathlib
import random
import re
from typing import Any

import numpy as np
import pytest
import torch
from gymnasium.wrappers import TimeLimit
from sb3.clones import kinds, shared_kinds
from stable_baselines3.common.monitor import Monitor
from stable_baselines3.common.vec_env import DummyVecEnv, SubprocVecEnv

from sb3_bridge.clones import replay_check, sandbox
from sb3_bridge.clones.brancher import Brancher
from sb3_bridge.clones.changes import SharedState
from sb3_bridge.clones.copying import Unclonable
from sb3_bridge.clones.replay_check import check
from sb3_bridge.clones.snapshot import Cloner
from sb3_bridge.gymnax.env import GymnaxEnv

pytestmark = pytest.mark.usefixtures("quick_forks")


def generators() -> list[Any]:
    state: Any = np.random.get_state()
    return [random.getstate(), state[1].tolist(), state[2:], torch.get_rng_state().tolist()]


@pytest.mark.parametrize("kind", kinds.CLONED)
@pytest.mark.parametrize("wrap", [lambda env: env, lambda env: Monitor(TimeLimit(env, 17))])
def test_state_that_is_reached_by_other_ways_than_attributes_is_copied(kind: Any, wrap: Any):
    env, alone = wrap(kind()), wrap(kind())
    report = check(env)
    assert report.passed, report.reason
    cloner = Cloner(env, report)
    actions = np.random.default_rng(0).integers(0, 3, 60).tolist()
    env.reset(seed=1), alone.reset(seed=1)
    replica, wanted, found = cloner.replica(), [], []
    for start in range(0, 60, 10):
        cloner.restore(replica, cloner.save())
        future = kinds.play(replica.layers[0], actions[start : start + 20])
        found += kinds.play(env, actions[start : start + 10])
        wanted += kinds.play(alone, actions[start : start + 10])
        assert future[:10] == found[-10:]
    assert found == wanted


@pytest.mark.parametrize(
    ("kind", "reason"), shared_kinds.REFUSED, ids=lambda value: getattr(value, "__name__", "")
)
def test_what_replicas_would_share_is_refused_by_name_and_nothing_happened(
    kind, reason, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    env = kind()
    env.reset(seed=0)

    def state() -> list[Any]:
        shared = {name: repr(value) for name, value in vars(kind).items() if not callable(value)}
        outside = [
            dict(shared_kinds.LIBRARY),
            shared_kinds.CALLS[:],
            os.listdir(),
            repr(kind.add.__defaults__),
        ]
        return [env.seen(), env.time, generators(), shared, *outside]

    before = state()
    report = check(env)
    assert not report.passed and re.search(reason, report.reason), report.reason
    assert state() == before


def test_a_file_that_is_open_gets_no_line_and_is_named(tmp_path):
    path = tmp_path / "log.txt"
    with open(path, "a", buffering=1) as file:
        file.write("before\n")
        report = check(shared_kinds.FileDescriptor(file.fileno()))
        assert not report.passed and f"writes to {path}" in report.reason
    assert path.read_text() == "before\n"


def test_a_monitor_that_writes_is_no_reason_and_writes_nothing(tmp_path):
    env = Monitor(kinds.Counter(), str(tmp_path / "run"))
    before = pathlib.Path(tmp_path / "run.monitor.csv").read_text()
    assert check(env).passed
    env.reset()
    assert pathlib.Path(tmp_path / "run.monitor.csv").read_text() == before
    env.close()


@pytest.mark.parametrize("method", ["socket", "program", "hang", "crash", "thread"])
def test_what_leaves_the_process_or_never_ends_is_refused(method, monkeypatch):
    class Leaving(kinds.Counter):
        def add(self, amount: float) -> None:
            super().add(amount)
            if method == "socket":
                import socket

                socket.create_connection(("127.0.0.1", 9), timeout=1)
            elif method == "program":
                os.system("true")
            elif method == "hang":
                import time

                time.sleep(60)
            elif method == "crash":
                os.abort()
            else:
                raise RuntimeError("not from this thread")

    monkeypatch.setattr(sandbox, "_SILENCE_SECONDS", 0.5)
    reasons = {"socket": "uses a connection", "program": "starts a program", "hang": "did not end within"}
    reasons |= {"crash": "died", "thread": "RuntimeError not from this thread"}
    report = check(Leaving())
    assert not report.passed and reasons[method] in report.reason


def test_global_generators_and_the_environment_are_as_they_were():
    env = kinds.Closure()
    env.reset(seed=3)
    env.step(2)
    before, seen = generators(), env.seen()
    assert check(env).passed
    assert generators() == before and env.seen() == seen == 3.001


def test_without_a_fork_copies_are_compared_and_generators_are_kept(monkeypatch):
    monkeypatch.setattr(replay_check, "CAN_FORK", False)
    before = generators()
    report = check(kinds.Callback())
    assert report.passed, report.reason
    for kind in (shared_kinds.NumpyGlobal, shared_kinds.RandomGlobal, shared_kinds.TorchGlobal):
        assert "draws numbers from outside" in check(kind()).reason
    assert generators() == before


def test_environments_on_jax_are_not_forked():
    for kind, uses_jax in [(GymnaxEnv, True), (kinds.Closure, False)]:
        assert SharedState([kind]).uses_jax == uses_jax


def test_attributes_that_the_functions_of_an_environment_forget_are_saved_all_the_same():
    env = kinds.HalfSaved(late=1500)
    report = check(env)
    assert report.way == "get_state/set_state", report.reason
    cloner = Cloner(env, report)
    replica = cloner.replica()
    env.reset(seed=0)
    for _ in range(1495):
        if env.step(0)[2]:
            env.reset()
    cloner.restore(replica, cloner.save())
    actions = [1] * 12
    assert kinds.play(replica.layers[0], actions) == kinds.play(env, actions)


def test_a_second_environment_with_other_parameters_is_checked_too():
    class Either(kinds.Counter):
        def __init__(self, outside: bool):
            super().__init__()
            self.outside = outside

        def add(self, amount: float) -> None:
            self.x += np.random.normal() if self.outside else amount

    for order in [(True,), (False, True), (False, False, True)]:
        with pytest.raises(Unclonable, match="draws numbers from outside"):
            Brancher(DummyVecEnv([lambda outside=outside: Either(outside) for outside in order]))
    Brancher(DummyVecEnv([lambda: Either(False)] * 2))


def test_environments_made_alike_are_checked_once(monkeypatch):
    checks = []
    monkeypatch.setattr("sb3_bridge.clones.processes.check", lambda *args: checks.append(1) or check(*args))
    Brancher(DummyVecEnv([kinds.Closure] * 5))
    assert len(checks) == 1
    Brancher(DummyVecEnv([lambda late=late: kinds.Limited(late) for late in (9, 9, 8, 8)]))
    assert len(checks) == 3


@pytest.mark.filterwarnings("ignore:os.fork")  # JAX warns of all forks; workers do without it
def test_workers_refuse_as_one_process_does():
    env = SubprocVecEnv([shared_kinds.ClassAttribute], start_method="fork")
    with pytest.raises(Unclonable, match=r"ClassAttribute.total"):
        Brancher(env)
    env.close()
