"""Statistics of episodes: the model's buffers and the files of monitors; PPO's are the oracle."""

import gymnasium as gym
import numpy as np
import pytest
from gymnasium import spaces
from sb3.contract import FIXED, LINE, N_ENVS, ROLLOUT, Recorder, log_of, make, on_both
from stable_baselines3 import PPO
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.monitor import Monitor, load_results
from stable_baselines3.common.results_plotter import X_EPISODES, X_TIMESTEPS, ts2xy
from stable_baselines3.common.vec_env import DummyVecEnv, VecMonitor

from sb3_bridge import GRPO, WorldVecEnv
from sb3_bridge.gymnax.env import GymnaxEnv


@on_both
@pytest.mark.parametrize("callback", [None, Recorder])
def test_statistics_cover_the_last_episodes(kind, callback):
    recorder = Recorder()
    model = make(GRPO, kind, FIXED, stats_window_size=3)
    rows = log_of(model, 3 * ROLLOUT, callback and recorder)
    assert model.ep_info_buffer.maxlen == model.ep_success_buffer.maxlen == 3
    assert len(model.ep_info_buffer) == 3 and [info["l"] for info in model.ep_info_buffer] == [5, 5, 5]
    assert rows[-1]["rollout/ep_len_mean"] == 5
    returns = [info["r"] for info in model.ep_info_buffer]
    assert rows[-1]["rollout/ep_rew_mean"] == pytest.approx(np.mean(returns))
    if callback:
        told = [
            info["episode"]["r"] for step in recorder.steps for info in step["infos"] if "episode" in info
        ]
        assert returns == told[-3:]
    model.learn(1)  # a new run starts with empty buffers
    assert len(model.ep_info_buffer) == 3 and model.num_timesteps == ROLLOUT


class Succeeding(gym.Env):
    """Episodes of 4 steps; every second one succeeds."""

    observation_space = spaces.Box(0, 100, (2,), np.float32)
    action_space = spaces.Discrete(2)

    def __init__(self):
        self.time = self.episode = 0

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.time, self.episode = 0, self.episode + 1
        return np.zeros(2, np.float32), {}

    def step(self, action):
        self.time += 1
        info = {"is_success": self.episode % 2 == 0}
        return np.full(2, self.time, np.float32), float(action), self.time == 4, False, info


def test_success_rate():
    logs, buffers = [], []
    for algorithm in (PPO, GRPO):
        model = make(algorithm, "host", env=DummyVecEnv([lambda: Monitor(Succeeding())] * N_ENVS))
        logs.append([row["rollout/success_rate"] for row in log_of(model, 3 * ROLLOUT)])
        buffers.append(list(model.ep_success_buffer))
    assert logs[0] == logs[1] == [0.5, 0.5, 0.5]
    assert buffers[0] == buffers[1] and buffers[1][:4] == [False, False, True, True]


def monitored(kind, folder):
    if kind == "monitor":
        return make_vec_env(lambda: GymnaxEnv(LINE), n_envs=2, seed=0, monitor_dir=str(folder))
    if kind == "vec_monitor":
        return VecMonitor(WorldVecEnv(LINE, n_envs=2, seed=0), str(folder / "0"))
    return WorldVecEnv(LINE, n_envs=2, seed=0, monitor_dir=folder)


# SB3 says so of any VecMonitor around environments that are monitored.
twice = pytest.mark.filterwarnings("ignore:The environment is already wrapped with a `Monitor`:UserWarning")


@twice
@pytest.mark.parametrize("callback", [None, Recorder])
@pytest.mark.parametrize("kind", ["monitor", "vec_monitor", "monitor_dir"])
def test_monitor_files(kind, callback, tmp_path):
    """Every episode is written, once, and read by SB3's results plotter; PPO's files are of the same form."""
    tables = []
    for algorithm in (PPO, GRPO):
        folder = tmp_path / algorithm.__name__
        folder.mkdir()
        env = monitored(kind, folder)
        recorder = Recorder()
        model = make(algorithm, "host" if kind == "monitor" else "device", env=env, stats_window_size=2)
        model.learn(3 * ROLLOUT, callback and recorder)
        table = load_results(str(folder))
        tables.append(table)
        env.close()
        steps, returns = ts2xy(table, X_TIMESTEPS)
        np.testing.assert_array_equal(steps, np.cumsum(table.l))
        np.testing.assert_array_equal(returns, table.r)
        assert ts2xy(table, X_EPISODES)[0].tolist() == list(range(len(table)))
        assert 3 * ROLLOUT - 2 * 5 < table.l.sum() <= 3 * ROLLOUT
        assert table.l.between(3, 5).all() and (table.t >= 0).all() and len(table) >= 18
        if callback:
            infos = [
                info["episode"] for step in recorder.steps for info in step["infos"] if "episode" in info
            ]
            assert sorted((info["r"], info["l"]) for info in infos) == sorted(
                zip(table.r, table.l, strict=True)
            )
    assert list(tables[0].columns) == list(tables[1].columns)
    assert [str(kind) for kind in tables[0].dtypes] == [str(kind) for kind in tables[1].dtypes]


@twice
def test_monitors_agree_with_and_without_callbacks(tmp_path):
    rows = []
    for name, callback in [("plain", None), ("called", Recorder())]:
        folder = tmp_path / name
        folder.mkdir()
        env = VecMonitor(WorldVecEnv(LINE, n_envs=2, seed=0, monitor_dir=folder), str(folder / "1"))
        make(GRPO, "device", env=env).learn(2 * ROLLOUT, callback)
        running = np.array(env.episode_lengths)
        env.close()
        table = load_results(str(folder))
        rows.append((table.r.tolist(), table.l.tolist(), running.tolist(), env.episode_count))
        assert env.episode_count * 2 == len(table)  # the inner and the outer file
        np.testing.assert_array_equal(running, env.venv.environments.episode_length)
    assert [sorted(part) for part in rows[0][:2]] == [sorted(part) for part in rows[1][:2]]
    assert rows[0][2:] == rows[1][2:]
