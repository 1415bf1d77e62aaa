"""Servers in this process and in workers: what became of kept states, interrupts, dead workers, replaced environments."""

from __future__ import annotations

import functools
import multiprocessing
import os
import random
import signal
import subprocess
import sys
import threading
import types
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
import torch
from gymnasium import spaces
from gymnasium.wrappers import TimeLimit
from sb3.clones import kinds, shared_kinds
from stable_baselines3.common.monitor import Monitor
from stable_baselines3.common.vec_env import DummyVecEnv, SubprocVecEnv

from sb3_bridge.clones import processes as servers
from sb3_bridge.clones.brancher import Brancher
from sb3_bridge.clones.copying import Unclonable

pytestmark = pytest.mark.filterwarnings("ignore:os.fork")  # JAX warns of all forks; workers do without it
forked = functools.partial(SubprocVecEnv, start_method="fork")  # another start imports all anew
spawned = functools.partial(SubprocVecEnv, start_method="spawn")


def still(observations: Any, uniforms: Any) -> np.ndarray:
    return np.zeros(len(uniforms), np.int64)


def agrees(env: Any, brancher: Brancher, actions: Any) -> bool:
    """Whether a replay of the step that is made now gives what the environments do."""
    replayed = brancher.replay(brancher.take(), actions)
    observation, rewards, done, infos = env.step(actions)
    brancher.free()
    real = [info.get("terminal_observation", seen) for info, seen in zip(infos, observation, strict=True)]
    return (
        np.array_equal(replayed[0], np.array(real))
        and np.array_equal(replayed[1].astype(np.float32), np.float32(rewards))
        and np.array_equal(replayed[2] | replayed[3], done)
    )


@pytest.mark.parametrize("make", [DummyVecEnv, forked, spawned])
def test_a_replay_is_what_the_environments_do(make):
    for name in ["CartPole-v1", "FrozenLake-v1"] if make is not spawned else ["FrozenLake-v1"]:
        env = make([lambda name=name: Monitor(gym.make(name))] * 2)
        brancher = Brancher(env)
        env.seed(5)
        env.reset()
        rng = np.random.default_rng(0)
        assert all(agrees(env, brancher, rng.integers(0, env.action_space.n, 2)) for _ in range(30))
        env.close()


def test_a_replay_finds_what_functions_forget_out_of_reach_as_soon_as_it_shows():
    env = DummyVecEnv([lambda: kinds.HalfSavedHidden(late=1500)])
    brancher = Brancher(env)
    assert brancher.report.way == "get_state/set_state"
    env.reset()
    agreed = []
    for step in range(1600):
        if step % 50:
            env.step(np.ones(1, np.int64))
        else:  # now and then: replicas have an age of their own
            agreed.append(agrees(env, brancher, np.ones(1, np.int64)))
    assert all(agreed[:29]) and not any(agreed[31:])


def test_copies_that_keep_themselves_apart_are_trusted_with_a_table_that_all_share():
    calls: list[str] = []

    def save(env: Any) -> Any:
        calls.append("save")
        return env.seen(), env.time

    def restore(env: Any, state: Any) -> None:
        calls.append("restore")
        env.table[env.handle], env.time = state

    env = DummyVecEnv([kinds.OwnHandle])
    brancher = Brancher(env, (save, restore))
    env.reset()
    calls.clear()
    returns, _ = brancher.branch([brancher.take()], np.arange(3)[None], still, horizon=1, gamma=7.0)
    np.testing.assert_allclose(returns[0] * 7, [1.0, 2.0, 3.0], rtol=1e-6)
    assert calls == ["save"] + ["restore"] * 3 and agrees(env, brancher, np.array([2]))


class LateNoise(kinds.Counter):
    """Draws from global generators after 80 steps."""

    def __init__(self) -> None:
        super().__init__()
        self.calls = 0

    def add(self, amount: float) -> None:
        self.calls += 1
        self.x += amount
        if self.calls > 80:
            self.x += np.random.normal() + random.random() + float(torch.rand(1))


@pytest.mark.parametrize("make", [DummyVecEnv, forked])
def test_numbers_from_outside_that_come_late_are_found_and_generators_do_not_move(make):
    env = make([LateNoise])
    brancher = Brancher(env)
    env.reset()
    agreed = []
    for step in range(100):
        agreed.append(agrees(env, brancher, np.ones(1, np.int64)))
        if step == 90:
            before = random.getstate(), np.random.normal(), torch.get_rng_state().tolist()
            np.random.seed(3)
            brancher.branch([brancher.take()], np.zeros((1, 3), int), still, horizon=5, gamma=1.0)
            after = random.getstate(), torch.get_rng_state().tolist()
            assert after == (before[0], before[2])
            drawn = np.random.normal()
            np.random.seed(3)
            assert np.random.normal() == drawn
    assert all(agreed[:79]) and not all(agreed[80:])
    env.close()


def test_the_second_of_two_normal_numbers_is_still_there_after_branches_and_replays():
    env = DummyVecEnv([kinds.Counter] * 2)
    brancher = Brancher(env)
    env.reset()
    np.random.seed(0)
    expected = [np.random.normal() for _ in range(6)]
    np.random.seed(0)
    found = []
    for index in range(6):
        found.append(np.random.normal())
        handle = brancher.take()
        if index % 2:
            brancher.replay(handle, np.array([1, 1]))
        brancher.branch([handle], np.zeros((2, 3), int), still, horizon=3, gamma=1.0)
    assert found == expected


def test_an_environment_that_is_replaced_is_followed_or_refused():
    env = DummyVecEnv([kinds.Counter] * 2)
    brancher = Brancher(env)
    env.reset()
    handles = [brancher.take()]
    env.step(np.array([1, 1]))
    env.envs[1] = TimeLimit(kinds.Closure(), 5)
    env.envs[1].reset()
    handles.append(brancher.take())
    actions = np.broadcast_to(np.arange(3), (4, 3))
    returns, _ = brancher.branch(handles, actions, still, horizon=2, gamma=1.0)
    np.testing.assert_allclose(returns[0] * 7, [3.0, 5.0, 7.0], rtol=1e-5)
    np.testing.assert_allclose(returns[3] * 7, [3.003, 5.003, 7.003], rtol=1e-5)
    assert agrees(env, brancher, np.array([0, 2]))
    env.envs[0] = shared_kinds.ClassAttribute()
    with pytest.raises(Unclonable, match="ClassAttribute.total"):
        brancher.take()


def test_an_inner_wrapper_that_is_replaced_in_a_wrapper_is_followed():
    env = DummyVecEnv([lambda: TimeLimit(kinds.Counter(), 50)])
    brancher = Brancher(env)
    env.reset()
    outer: Any = env.envs[0]
    outer.env = TimeLimit(outer.env, 3)
    outer.env._elapsed_steps = 0
    assert all(agrees(env, brancher, np.ones(1, np.int64)) for _ in range(8))


@pytest.mark.parametrize("make", [DummyVecEnv, forked])
def test_an_environment_that_cannot_be_copied_any_more_says_so(make):
    env = make([kinds.Counter])
    brancher = Brancher(env)
    env.reset()
    brancher.take()
    env.set_attr("log", shared_kinds.Freed())
    with pytest.raises(Unclonable, match="Counter.log cannot be copied: Freed has a __del__"):
        brancher.take()
    env.close()


@pytest.mark.parametrize("make", [DummyVecEnv, forked])
def test_actions_are_lent_as_copies(make):
    env = make([kinds.Rescaling])
    brancher = Brancher(env)
    env.reset()
    handle = brancher.take()
    actions = np.array([[[0.5, 0.25], [0.1, 0.1]]], np.float32)
    seen: list[Any] = []

    class Rewards:
        framework = "numpy"

        def batch(self, states: Any, actions: Any, next_states: Any) -> Any:
            seen.append(np.array(actions))
            return np.zeros(len(actions), np.float32)

    act = lambda observations, uniforms: np.full((len(uniforms), 2), 0.2, np.float32)
    states = np.zeros((1, 2), np.float32)
    brancher.branch([handle], actions, act, horizon=2, gamma=1.0, reward=Rewards(), observations=states)
    np.testing.assert_array_equal(np.concatenate(seen)[:2], actions[0])
    np.testing.assert_array_equal(actions[0, 0], np.float32([0.5, 0.25]))
    env.close()


def test_two_branchers_on_one_subprocess_env_do_not_meet():
    env = forked([kinds.Closure] * 2)
    one, two = Brancher(env), Brancher(env)
    env.reset()
    handles = [one.take()]
    env.step(np.array([2, 2]))
    two.take(), two.take()
    two.free()
    actions = np.broadcast_to(np.arange(3), (2, 3))
    returns, _ = one.branch(handles, actions, still, horizon=1, gamma=1.0)
    np.testing.assert_allclose(returns[0] * 7, [1.001 - 0.001, 2.0, 3.0], rtol=1e-2)
    env.close()


@pytest.mark.parametrize("number", [1, 2, 5])
@pytest.mark.parametrize("moment", ["send", "", "recv"])
def test_an_interrupt_leaves_no_answer_in_the_pipes(moment, number, ctrl_c, monkeypatch):
    env = forked([kinds.Counter] * 2)
    brancher = Brancher(env)
    env.reset()
    handles = [brancher.take()]
    reach, calls = servers.reach, []

    def interrupted(env: Any, index: int, method: str, *arguments: Any) -> Any:
        calls.append(method)
        if method == moment and calls.count(method) == number:
            signal.raise_signal(signal.SIGINT)  # while a message is written, awaited, read
        return reach(env, index, method, *arguments)

    monkeypatch.setattr(servers, "reach", interrupted)
    with pytest.raises(KeyboardInterrupt):
        brancher.branch(handles, np.zeros((2, 3), int), still, horizon=3, gamma=1.0)
    monkeypatch.undo()
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    assert not any(remote.poll(0.2) for remote in env.remotes)
    observation, *_ = env.step(np.array([1, 2]))
    assert observation.tolist() == [[2.0], [3.0]] and agrees(env, brancher, np.array([0, 1]))
    env.close()


def test_a_dead_worker_is_named():
    env = forked([kinds.Counter])  # of several, each would hold the others' pipes open
    brancher = Brancher(env)
    env.reset()
    os.kill(env.processes[0].pid, signal.SIGKILL)
    env.processes[0].join()
    with pytest.raises(RuntimeError, match=r"the worker of environment 0 .* was killed by SIGKILL"):
        brancher.take()
    env.close()


ALONE = """
import pickle, sys
for name in ("sb3_bridge", "grpo_jax", "jax", "flax"):
    sys.modules[name] = None  # importing it fails
import gymnasium as gym
import numpy as np
_, method = pickle.load(sys.stdin.buffer)
env = gym.make("CartPole-v1")
serve = getattr(env.unwrapped, method)
*_, fine, report = serve(1, "check", ())
assert fine, report
for call in [("prepare", (report,)), ("take", (0,)), ("step", ([(0, 0)], np.ones((1, 4), np.uint64), [0], np.array([1])))]:
    if call[0] == "take":
        env.reset(seed=1)
    *_, fine, answer = serve(1, *call)
    assert fine, answer
print(answer[0].shape, answer[1])
"""


def test_a_worker_needs_neither_this_package_nor_jax():
    (remote, worker), (sentinel, _other) = multiprocessing.Pipe(), multiprocessing.Pipe()
    worker.send(True)
    received: list[bytes] = []  # at once: the pipe does not hold it
    reading = threading.Thread(target=lambda: received.append(worker.recv_bytes()))
    reading.start()
    process = types.SimpleNamespace(sentinel=sentinel.fileno())
    servers.Workers(types.SimpleNamespace(remotes=[remote], processes=[process]), None)
    reading.join()
    (parcel,) = received
    done = subprocess.run([sys.executable, "-c", ALONE], input=parcel, capture_output=True, timeout=120)
    assert done.returncode == 0, done.stderr.decode()
    assert done.stdout.decode().strip() == "(1, 4) [1.]"


def test_an_error_in_a_worker_arrives_and_the_worker_lives():
    env = forked([kinds.Counter] * 2)
    brancher = Brancher(env)
    env.reset()
    brancher.take()
    with pytest.raises(RuntimeError, match="a branch in environment 0 raised 99"):
        brancher.branch([99], np.zeros((2, 1), int), still, horizon=1, gamma=1.0)
    assert env.step(np.zeros(2, int))[0].shape == (2, 1)
    env.close()


class Data(gym.Env):
    """Reads from a table that may change."""

    observation_space = spaces.Box(-np.inf, np.inf, (3,), np.float64)
    action_space = spaces.Discrete(2)

    def __init__(self, table: Any) -> None:
        self.table = table

    def _seen(self) -> np.ndarray:
        self.window = self.table[self.time : self.time + 3]
        return self.window.copy()

    def reset(self, *, seed: int | None = None, options: Any = None) -> Any:
        super().reset(seed=seed)
        self.time = 0
        return self._seen(), {}

    def step(self, action: Any) -> Any:
        self.time += 1 + int(action)
        return self._seen(), float(self.window[0]), self.time >= 40, False, {}


@pytest.mark.parametrize("is_shared", [False, True])
def test_large_constants_are_not_copied(is_shared):
    import tracemalloc

    table = np.arange(4_000_000.0)  # 32 MB
    env = DummyVecEnv([lambda: Data(table if is_shared else table.copy())] * 4)
    env.reset()
    tracemalloc.start()
    brancher = Brancher(env)
    handles = []
    for _ in range(8):
        handles.append(brancher.take())
        env.step(np.array([0, 1, 0, 1]))
    brancher.branch(handles, np.tile([0, 1], (32, 1)), still, horizon=6, gamma=1.0)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert brancher.report.constants == ((0, "table"),)
    assert peak < 24e6, "less than one copy of one table; what is imported for the first time counts too"


def test_a_replica_that_writes_to_what_seemed_constant_is_an_error():
    class Late(Data):
        def step(self, action: Any) -> Any:
            if self.time > 30:
                self.table[0] += 1
            return super().step(action)

    env = DummyVecEnv([lambda: Late(np.arange(4000.0))])
    env.reset()
    brancher = Brancher(DummyVecEnv([lambda: Data(np.arange(4000.0))]))
    brancher.group._env.envs[0] = env.envs[0]  # type: ignore[attr-defined]
    real: Any = env.envs[0]
    server: Any = brancher.group._servers[0]  # type: ignore[attr-defined]
    server.env = real
    server.prepare(("attributes", "", 0.0, 0.0, 0.0, ((0, "table"),), ()))
    real.time = 31
    before = real.table.copy()
    with pytest.raises(Unclonable, match="writes to data that never changed"):
        brancher.branch([brancher.take()], np.array([[0, 1]]), still, horizon=1, gamma=1.0)
    np.testing.assert_array_equal(real.table, before)


def test_a_large_constant_that_changes_is_an_error_and_one_that_is_replaced_is_followed():
    env = DummyVecEnv([lambda: Data(np.arange(200_000.0))])
    brancher = Brancher(env)
    env.reset()
    actions = np.array([[0, 1]])
    brancher.branch([brancher.take()], actions, still, horizon=2, gamma=1.0)
    real: Any = env.envs[0]
    real.table = real.table + 5.0
    returns, _ = brancher.branch([brancher.take()], actions, still, horizon=1, gamma=1.0)
    assert returns.tolist() == [[6.0, 7.0]] and agrees(env, brancher, np.array([1]))
    env = DummyVecEnv([lambda: Data(np.arange(200_000.0))])
    brancher = Brancher(env)
    env.reset()
    handle = brancher.take()
    env.envs[0].table[1] = 50.0  # type: ignore[attr-defined]
    with pytest.raises(Unclonable, match=r"Data.table \(1 MiB\) never changed at first, but does now"):
        brancher.branch([handle], actions, still, horizon=1, gamma=1.0)
