"""Workers of a SubprocVecEnv: they give what one process gives, need nothing of this package, and nobody notices."""

from __future__ import annotations

import pathlib
import subprocess
import sys
import types
from typing import Any

import cloudpickle
import gymnasium as gym
import numpy as np
import pytest
from stable_baselines3.common.monitor import Monitor
from stable_baselines3.common.vec_env import DummyVecEnv, SubprocVecEnv

from sb3_bridge.clones import processes as servers
from sb3_bridge.clones.brancher import Brancher


def pendulum(n_envs: int) -> list[Any]:
    return [lambda: Monitor(gym.make("Pendulum-v1"))] * n_envs


def swing(observations: Any, uniforms: Any) -> np.ndarray:
    return (3.0 * np.asarray(uniforms)[:, :1] - 1.5 + np.asarray(observations)[:, 2:]).astype(np.float32)


def slippery(observations: Any, uniforms: Any) -> np.ndarray:
    return np.minimum((uniforms[:, 0] * 4).astype(np.int64), 3)


def both(n_states: int, n_actions: int = 2) -> np.ndarray:
    return np.broadcast_to(np.arange(n_actions), (n_states, n_actions))


def test_workers_give_what_one_process_gives():
    results = []
    for make in (DummyVecEnv, SubprocVecEnv):
        env = make(pendulum(2))
        brancher = Brancher(env)
        env.seed(3)
        observation = env.reset()
        handles, seen = [], []
        for _ in range(6):
            handles.append(brancher.take())
            observation, *_ = env.step(np.asarray(observation)[:, 2:])
            seen.append(observation)
        actions = np.linspace(-2, 2, 12 * 3).reshape(12, 3, 1)
        value = lambda observations: np.asarray(observations).sum(axis=1)
        returns, n_steps = brancher.branch(
            handles,
            actions,
            swing,
            horizon=9,
            gamma=0.9,
            value=value,
            n_rollouts=2,
            common_random_numbers=False,
        )
        results.append((np.array(seen), returns, n_steps))
        env.close()
    for one, two in zip(*results, strict=True):
        np.testing.assert_array_equal(one, two)


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
    class Remote:
        def send(self, message):
            self.sent = message

        def recv(self):
            return True

    remote = Remote()
    servers.Workers(types.SimpleNamespace(remotes=[remote]), None)
    parcel = cloudpickle.dumps(remote.sent)
    done = subprocess.run([sys.executable, "-c", ALONE], input=parcel, capture_output=True, timeout=120)
    assert done.returncode == 0, done.stderr.decode()
    assert done.stdout.decode().strip() == "(1, 4) [1.]"


def test_an_error_in_a_worker_arrives_and_the_worker_lives():
    env = SubprocVecEnv(pendulum(2))
    brancher = Brancher(env)
    env.reset()
    brancher.take()
    with pytest.raises(RuntimeError, match="a branch in environment 0 raised 99"):
        brancher.branch([99], np.zeros((2, 1, 1)), swing, horizon=1, gamma=1.0)
    assert env.step(np.zeros((2, 1)))[0].shape == (2, 3)
    env.close()


@pytest.mark.parametrize("kind", [DummyVecEnv, SubprocVecEnv])
def test_a_run_with_branches_sees_what_a_run_without_sees(kind, tmp_path):
    def run(name: str, branches: bool) -> tuple[list[Any], list[str]]:
        files = [str(tmp_path / f"{name}{index}") for index in range(2)]
        env = kind([lambda file=file: Monitor(gym.make("FrozenLake-v1"), file) for file in files])
        brancher = Brancher(env) if branches else None
        env.seed(11)
        rng, rows, handles = np.random.default_rng(1), [env.reset().tolist()], []
        for step in range(120):
            if brancher is not None:
                handles.append(brancher.take())
                if step % 40 == 39:
                    actions = both(len(handles) * 2, 4)
                    brancher.branch(handles, actions, slippery, horizon=5, gamma=0.9, seed=step)
                    handles = []
            observation, reward, done, infos = env.step(rng.integers(0, 4, 2))
            episodes = [(info.get("episode") or {}).get("l") for info in infos]
            rows.append((observation.tolist(), reward.tolist(), done.tolist(), episodes))
        env.close()
        lines = [pathlib.Path(f"{file}.monitor.csv").read_text().splitlines()[1:] for file in files]
        return rows, [",".join(line.split(",")[:2]) for file in lines for line in file]

    with_branches, without = run("with", True), run("without", False)
    assert with_branches == without
    assert len(without[1]) > 10
