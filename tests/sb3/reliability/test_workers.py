"""Workers that die, hang or raise are named with what ended them; nothing hangs, and no process is left behind."""

from __future__ import annotations

import faulthandler
import functools
import os
import pathlib
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
from sb3.sleds import Sled, make
from stable_baselines3.common.vec_env import SubprocVecEnv

from sb3_bridge import vec_wrappers
from sb3_bridge.clones.brancher import Brancher
from sb3_bridge.clones.processes import WorkerError

pytestmark = pytest.mark.filterwarnings("ignore:os.fork")


class Ending(Sled):
    """Does something in a branch: a step of a copy, or of its own after ``age`` steps."""

    def __init__(self, what: str = "", age: int = 10**9):
        super().__init__()
        self.what, self.left = what, age

    def step(self, action):
        self.left -= 1
        if self.left < 0:
            if self.what == "raise":
                raise OSError("no simulator")
            faulthandler.disable()  # pytest's: a crash that is meant needs no report
            os.kill(os.getpid(), getattr(signal, self.what))
            time.sleep(0.2)
        return super().step(action)


def workers(what, age=10**9, start="fork", n=3):
    sleds = [functools.partial(Ending, what, age if index == 1 else 10**9) for index in range(n)]
    return SubprocVecEnv(sleds, start_method=start)


def are_gone(env):
    for process in env.processes:
        assert process.exitcode is not None
        assert not os.path.exists(f"/proc/{process.pid}")
    env.close()


@pytest.mark.parametrize(
    ("what", "message"),
    [
        ("SIGKILL", "environment 1 .* was killed by SIGKILL"),
        ("SIGSEGV", "environment 1 .* was killed by SIGSEGV"),
        ("SIGSTOP", r"environment 1 .* gave no answer for 2 s \(GRPO_JAX_WORKER_TIMEOUT\)"),
        ("raise", "environment 1 raised no simulator"),
    ],
)
def test_in_a_branch(what, message, monkeypatch):
    """Among three workers that were forked, which keep each other's pipes open."""
    env = workers(what)
    brancher = Brancher(env)
    env.reset()
    env.env_method("__setattr__", "left", 2, indices=[1])
    monkeypatch.setenv("GRPO_JAX_WORKER_TIMEOUT", "2")
    with pytest.raises(RuntimeError, match=message) as caught:
        brancher.branch(
            [brancher.take()],
            np.zeros((3, 2), int),
            lambda observations, uniforms: np.zeros(len(uniforms), np.int64),
            horizon=4,
            gamma=1.0,
        )
    assert isinstance(caught.value, WorkerError) == (what != "raise")
    if what == "raise":
        assert env.step(np.zeros(3, int))[0].shape[0] == 3
        env.close()
    are_gone(env)


@pytest.mark.parametrize(
    ("what", "message"),
    [("SIGKILL", "was killed by SIGKILL"), ("raise", "has ended with exit code 1")],
)
def test_in_a_step_of_learning(what, message):
    env = workers(what, age=20)
    model = make(env, dynamics="auto", candidates="episodes", n_steps=64, batch_size=64)
    with pytest.raises(WorkerError, match=f"environment 1 .* {message}"):
        model.learn(1000)
    are_gone(env)
    model.policy.predict(np.zeros((1, *env.observation_space.shape), np.float32))


def test_ctrl_c_in_branches_leaves_what_can_learn_again(ctrl_c):
    """The terminal's Ctrl-C, which all processes of its group get."""
    env = workers("")
    model = make(env, dynamics="clone", n_steps=64, batch_size=64, horizon=4)
    model.learn(3 * 64)
    follow = model._alternatives.brancher.group.call
    calls = []

    def interrupted(method, arguments):
        if method == "step" and not calls:
            calls.append(method)
            for process in env.processes:
                os.kill(process.pid, signal.SIGINT)
            os.kill(os.getpid(), signal.SIGINT)
        return follow(method, arguments)

    model._alternatives.brancher.group.call = interrupted
    with pytest.raises(KeyboardInterrupt):
        model.learn(3 * 64, reset_num_timesteps=False)
    assert calls and all(process.is_alive() for process in env.processes)
    model.learn(3 * 64, reset_num_timesteps=False)
    env.close()


ORPHANS = """
import functools, os, sys, time
from stable_baselines3.common.vec_env import SubprocVecEnv
from sb3.sleds import Sled
from sb3_bridge.clones.brancher import Brancher
if __name__ == "__main__":
    env = SubprocVecEnv([Sled] * 3, start_method=sys.argv[1])
    Brancher(env)
    print(*[process.pid for process in env.processes], flush=True)
    time.sleep(600)
"""


@pytest.mark.parametrize("start", ["fork", "forkserver", "spawn"])
def test_no_worker_outlives_a_main_process_that_is_killed(start, tmp_path):
    (tmp_path / "orphans.py").write_text(ORPHANS)
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    main = subprocess.Popen(
        [sys.executable, tmp_path / "orphans.py", start], stdout=subprocess.PIPE, env=environment
    )
    try:
        pids = [int(pid) for pid in main.stdout.readline().split()]
    finally:
        main.kill()
        main.communicate()
    assert len(pids) == 3
    waited = 0
    while any(os.path.exists(f"/proc/{pid}") and not is_zombie(pid) for pid in pids):
        time.sleep(0.2)
        waited += 1
        assert waited < 150, "a worker lives on"


def is_zombie(pid):
    try:
        return pathlib.Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except (FileNotFoundError, ProcessLookupError):
        return True


@pytest.mark.parametrize("moment", ["step_async", "step_wait"])
def test_an_interrupt_of_a_step_leaves_no_answer_in_the_pipes(moment, ctrl_c, monkeypatch):
    env = workers("", n=2)
    env.reset()
    whole, actions = getattr(env, moment), np.stack([env.action_space.sample()] * 2)

    def interrupted(*arguments):
        signal.raise_signal(signal.SIGINT)
        return whole(*arguments)

    monkeypatch.setattr(env, moment, interrupted)
    with pytest.raises(KeyboardInterrupt):
        vec_wrappers.step(env, actions, 1)
    monkeypatch.undo()
    assert not env.waiting and not any(remote.poll(0.2) for remote in env.remotes)
    assert vec_wrappers.step(env, actions, 1).observation.shape == (2, *env.observation_space.shape)
    env.close()
