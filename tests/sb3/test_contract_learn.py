"""Training behind SB3's contract: ``learn``, callbacks, logger, schedules and warnings, with PPO as the oracle.

Everything runs on both paths: ``"host"`` steps a ``DummyVecEnv``, whose environments are cloned, ``"device"`` a
``GymnaxVecEnv``, of the same worlds. What is about PPO's own numbers compares episodes, as PPO does.
"""

import csv
import itertools
import json
import re
import sys
import warnings
from collections import Counter

import gymnasium as gym
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax import struct
from gymnasium import spaces
from stable_baselines3 import PPO
from stable_baselines3.common.callbacks import (
    BaseCallback,
    CallbackList,
    CheckpointCallback,
    ConvertCallback,
    EvalCallback,
    EveryNTimesteps,
    ProgressBarCallback,
    StopTrainingOnMaxEpisodes,
    StopTrainingOnNoModelImprovement,
    StopTrainingOnRewardThreshold,
)
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.logger import KVWriter, Logger, configure
from stable_baselines3.common.monitor import Monitor, load_results
from stable_baselines3.common.results_plotter import X_EPISODES, X_TIMESTEPS, ts2xy
from stable_baselines3.common.vec_env import DummyVecEnv, VecMonitor
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from toys import Line

from grpo_jax.spaces import Box, Discrete
from grpo_jax.training.diagnose import SPREAD_ITERATIONS, NoSpreadWarning
from sb3_bridge import GRPO, GymnaxVecEnv
from sb3_bridge.gymnax.env import GymnaxEnv
from sb3_bridge.rollout import host as collect

pytestmark = pytest.mark.usefixtures("quick_compiles")

torch.set_num_threads(1)
KINDS = ["host", "device"]
on_both = pytest.mark.parametrize("kind", KINDS)
N_ENVS, N_STEPS = 2, 16
ROLLOUT = N_ENVS * N_STEPS


@struct.dataclass
class Walk(Line):
    """``Line`` in which all numbers are traced, so that one program is compiled for all.

    With ``is_paid`` every step goes right and earns ``pay``: actions do not matter.
    """

    goal: int = 3
    limit: int = 5
    is_paid: bool = False
    pay: float = 1.0

    def step(self, key, state, action):
        step = super().step(key, state, jnp.where(self.is_paid, 1, action))
        return step.replace(reward=jnp.where(self.is_paid, jnp.float32(self.pay), step.reward))


LINE = Walk(Discrete(2))
"""Ends by the goal or by the clock, in 3 to 5 steps; the observation is ``[position, time]``."""
FIXED = Walk(Discrete(2), goal=1000)
"""Ends by the clock, in 5 steps."""
CONSTANT = Walk(Discrete(2), goal=1000, is_paid=True)
NAN = Walk(Discrete(2), goal=1000, is_paid=True, pay=float("nan"))
BOX = Walk(Box(np.float32([-2]), np.float32([2]), (1,)))
LONG_BOX = Walk(BOX.action_space, goal=1000, limit=1000)


def venv(kind, world=LINE, n_envs=N_ENVS):
    if kind == "device":
        env = GymnaxVecEnv(world, n_envs=n_envs)
    else:
        env = DummyVecEnv([lambda: Monitor(GymnaxEnv(world)) for _ in range(n_envs)])
    env.seed(0)
    return env


def make(algorithm, kind, world=LINE, *, env=None, **settings):
    common = {"n_steps": N_STEPS, "batch_size": 16, "n_epochs": 2, "seed": 0, "device": "cpu"}
    common |= {"policy_kwargs": {"net_arch": [8]}}
    if algorithm is GRPO and settings.get("candidates") != "episodes":
        common["horizon"] = 4
    return algorithm("MlpPolicy", venv(kind, world) if env is None else env, **common | settings)


class Table(KVWriter):
    """What is logged, row by row."""

    def __init__(self):
        self.rows = []

    def write(self, key_values, key_excluded, step=0):
        self.rows.append(dict(key_values) | {"step": step})

    def close(self):
        pass


def log_of(model, *args, **kwargs):
    """Trains, and returns the rows that were logged."""
    table = Table()
    model.set_logger(Logger(None, [table]))
    model.learn(*args, **kwargs)
    return table.rows


class Recorder(BaseCallback):
    """Notes every event, and each step's locals; stops at call ``stop_at`` with ``answer``."""

    def __init__(self, stop_at=None, answer=False):
        super().__init__()
        self.events, self.steps, self.names = [], [], []
        self.stop_at, self.answer = stop_at, answer

    def _note(self, name):
        self.events.append((name, self.n_calls, self.num_timesteps, self.model.num_timesteps))

    def _on_training_start(self):
        self._note("training_start")
        self.names = sorted(self.locals)

    def _on_rollout_start(self):
        self._note("rollout_start")

    def _on_step(self):
        self._note("step")
        self.steps.append(dict(self.locals))
        return self.answer if self.n_calls == self.stop_at else True

    def _on_rollout_end(self):
        self._note("rollout_end")

    def _on_training_end(self):
        self._note("training_end")


def describe(value):
    """Types, dtypes, shapes and keys, without the values."""
    if isinstance(value, np.ndarray):
        return ("array", str(value.dtype), value.shape)
    if isinstance(value, dict):
        return {name: describe(part) for name, part in value.items()}
    return type(value).__name__


def flat(model):
    leaves = [
        leaf for part in model.get_parameters().values() for leaf in part.values() if hasattr(leaf, "numpy")
    ]
    return np.concatenate([np.ravel(np.asarray(leaf, np.float64)) for leaf in leaves])


def weights(model):
    return np.concatenate([np.ravel(leaf.numpy()) for leaf in model.policy.state_dict().values()])


# ---- learn


@on_both
def test_total_timesteps_is_a_lower_bound_in_whole_rollouts(kind):
    counts = {}
    for algorithm in (PPO, GRPO):
        model, counts[algorithm] = make(algorithm, kind), []
        for total, resets in [
            (1, True),
            (32, True),
            (33, True),
            (32, False),
            (1, False),
            (0, False),
            (31, True),
        ]:
            assert model.learn(total, reset_num_timesteps=resets) is model
            counts[algorithm].append((model.num_timesteps, model._total_timesteps, model._n_updates))
    assert [count[0] for count in counts[GRPO]] == [32, 32, 64, 96, 128, 128, 32]
    assert counts[GRPO] == counts[PPO]


@on_both
def test_nothing_to_do_asks_nothing_of_the_env(kind):
    events = []
    for algorithm in (PPO, GRPO):
        recorder, model = Recorder(), make(algorithm, kind)
        before = weights(model)
        model.learn(0, recorder)
        np.testing.assert_array_equal(weights(model), before)
        events.append(recorder.events)
    assert events[0] == events[1] == [("training_start", 0, 0, 0), ("training_end", 0, 0, 0)]


@on_both
@pytest.mark.parametrize("interval", [1, 2, 4, None])
def test_log_interval(kind, interval):
    logs = [log_of(make(algorithm, kind), 3 * ROLLOUT, log_interval=interval) for algorithm in (PPO, GRPO)]
    what = [
        [(row["time/iterations"], row["time/total_timesteps"], row["step"]) for row in rows] for rows in logs
    ]
    expected = [(i, i * ROLLOUT, i * ROLLOUT) for i in (1, 2, 3) if interval and i % interval == 0]
    assert what[0] == what[1] == expected


@on_both
def test_runs_have_names_and_numbers_in_tensorboard(kind, tmp_path):
    for algorithm in (PPO, GRPO):
        model = make(algorithm, kind, tensorboard_log=str(tmp_path / algorithm.__name__))
        model.learn(ROLLOUT)
        model.learn(ROLLOUT, reset_num_timesteps=False)
        model.learn(ROLLOUT)
        model.learn(ROLLOUT, tb_log_name="other")
        model.logger.close()
    folders = [sorted(path.name for path in (tmp_path / name).iterdir()) for name in ("PPO", "GRPO")]
    assert folders[1] == ["GRPO_1", "GRPO_2", "other_1"]
    assert folders[1] == [name.replace("PPO", "GRPO") for name in folders[0]]
    files = [len(list((tmp_path / name / f"{name}_1").iterdir())) for name in ("PPO", "GRPO")]
    assert files == [2, 2]  # the continued run is in its folder


@pytest.mark.filterwarnings("ignore::tqdm.TqdmExperimentalWarning")
@on_both
def test_progress_bar_moves_and_ends_full(kind, capsys):
    bars = []
    for algorithm in (PPO, GRPO):
        callback, model = ProgressBarCallback(), make(algorithm, kind)
        model.learn(2 * ROLLOUT, callback)
        bars.append((callback.pbar.n, callback.pbar.total))
        model.learn(ROLLOUT, callback, reset_num_timesteps=False)
        bars.append((callback.pbar.n, callback.pbar.total))
    assert bars[2:] == bars[:2] == [(2 * ROLLOUT, 2 * ROLLOUT), (ROLLOUT, ROLLOUT)]
    capsys.readouterr()
    make(GRPO, kind).learn(ROLLOUT, progress_bar=True)
    captured = capsys.readouterr()
    assert "100%" in captured.out + captured.err and "32/32" in captured.out + captured.err


@on_both
def test_progress_bar_with_a_callback(kind, monkeypatch, capsys):
    shown = []
    monkeypatch.setattr(
        ProgressBarCallback, "_on_training_start", lambda self: setattr(self, "pbar", Bar(shown))
    )
    recorder = Recorder()
    make(GRPO, kind).learn(2 * ROLLOUT, recorder, progress_bar=True)
    assert sum(shown) == 2 * ROLLOUT and len(recorder.steps) == 2 * N_STEPS
    assert shown == [N_ENVS] * 2 * N_STEPS


class Bar:
    def __init__(self, shown):
        self.update, self.refresh, self.close = shown.append, list, list


# ---- callbacks


@on_both
def test_events_are_those_of_ppo(kind):
    recorders = []
    for algorithm in (PPO, GRPO):
        recorders.append(Recorder())
        model = make(algorithm, kind)
        model.learn(ROLLOUT + 1, recorders[-1])
        model.learn(ROLLOUT, recorders[-1], reset_num_timesteps=False)
    ppo, grpo = recorders
    assert grpo.events == ppo.events
    assert Counter(name for name, *_ in grpo.events) == {
        "training_start": 2,
        "rollout_start": 3,
        "step": 3 * N_STEPS,
        "rollout_end": 3,
        "training_end": 2,
    }
    steps = [event[1:] for event in grpo.events if event[0] == "step"]
    assert steps == [(i, i * N_ENVS, i * N_ENVS) for i in range(1, 3 * N_STEPS + 1)]
    assert set(ppo.names) <= set(grpo.names)


@pytest.mark.parametrize("world", [LINE, BOX], ids=["Discrete", "Box"])
def test_locals_are_those_of_ppo(world):
    """Names, types, dtypes and shapes; of infos, for each way in which a step can end. ``make_vec_env``'s is the host's."""
    shared = (
        "actions",
        "clipped_actions",
        "new_obs",
        "rewards",
        "dones",
        "infos",
        "n_steps",
        "n_rollout_steps",
    )
    seen = []
    for kind, algorithm in itertools.product(KINDS, (PPO, GRPO)):
        recorder, model = Recorder(), make(algorithm, kind, world)
        model.learn(2 * ROLLOUT, recorder)
        kinds = set()
        for index, step in enumerate(recorder.steps):
            assert step["self"] is model and step["env"] is model.get_env() and step["callback"] is recorder
            assert step["n_steps"] == index % N_STEPS and step["n_rollout_steps"] == N_STEPS
            whole = {name: describe(step[name]) for name in shared if name != "infos"}
            kinds.add(json.dumps(whole, sort_keys=True))
            assert type(step["infos"]) is list and len(step["infos"]) == N_ENVS
            for done, info in zip(step["dones"], step["infos"], strict=True):
                kinds.add(
                    json.dumps((bool(done), info["TimeLimit.truncated"], describe(info)), sort_keys=True)
                )
        seen.append(kinds)
    assert seen == [seen[0]] * 4
    assert len(seen[0]) == 4  # the step; its info; that of a goal; that of a time limit


@on_both
def test_locals_of_a_box_hold_the_action_before_and_after_clipping(kind):
    recorder = Recorder()
    make(GRPO, kind, BOX).learn(2 * ROLLOUT, recorder)
    actions = np.concatenate([step["actions"] for step in recorder.steps])
    clipped = np.concatenate([step["clipped_actions"] for step in recorder.steps])
    assert (np.abs(actions) > 2).any()
    np.testing.assert_array_equal(clipped, np.clip(actions, -2, 2))


@on_both
def test_steps_tell_one_story(kind):
    """Each observation follows from the one before; episodes add up to what their infos say."""
    recorder = Recorder()
    make(GRPO, kind).learn(3 * ROLLOUT, recorder)
    now, paid, ends = np.zeros((N_ENVS, 2)), np.zeros(N_ENVS), Counter()
    for step in recorder.steps:
        expected = now + np.stack([step["actions"] > 0, np.ones(N_ENVS)], axis=1)
        paid += step["rewards"]
        np.testing.assert_array_equal(step["rewards"], expected[:, 0])
        np.testing.assert_array_equal(step["dones"], (expected[:, 0] >= 3) | (expected[:, 1] >= 5))
        now = step["new_obs"]
        for i in range(N_ENVS):
            info, reached = step["infos"][i], expected[i]
            assert info["TimeLimit.truncated"] == (reached[1] >= 5 and reached[0] < 3)
            if not step["dones"][i]:
                np.testing.assert_array_equal(now[i], reached)
                assert set(info) == {"TimeLimit.truncated"}
                continue
            np.testing.assert_array_equal(now[i], [0, 0])
            np.testing.assert_array_equal(info["terminal_observation"], reached)
            assert (info["episode"]["r"], info["episode"]["l"]) == (paid[i], reached[1])
            paid[i] = 0
            ends[info["TimeLimit.truncated"]] += 1
    assert min(ends[True], ends[False]) > 3


@on_both
@pytest.mark.parametrize(
    ("stop_at", "answer"), [(1, False), (5, np.bool_(False)), (N_STEPS, False), (N_STEPS + 3, None)]
)
def test_a_callback_stops_at_its_step(kind, stop_at, answer):
    recorders = []
    for algorithm in (PPO, GRPO):
        recorder, model = Recorder(stop_at, answer), make(algorithm, kind)
        before = weights(model)
        model.learn(3 * ROLLOUT, recorder)
        recorders.append(recorder)
        assert model.num_timesteps == stop_at * N_ENVS
        assert np.array_equal(weights(model), before) == (stop_at <= N_STEPS)  # nothing is learned of a part
    assert recorders[0].events == recorders[1].events
    assert [name for name, *_ in recorders[1].events[-2:]] == ["step", "training_end"]

    # What follows goes on from there.
    stopped, resumed, starts = recorders[1].steps[-1], Recorder(), []

    class Start(BaseCallback):
        def _on_step(self):
            return True

        def _on_rollout_end(self):
            starts.append(np.asarray(self.model._trajectory.environments.observation)[0])

    model.learn(ROLLOUT, [resumed, Start()], reset_num_timesteps=False)
    assert model.num_timesteps == stop_at * N_ENVS + ROLLOUT
    np.testing.assert_array_equal(starts[0], stopped["new_obs"])
    first = resumed.steps[0]
    expected = stopped["new_obs"] + np.stack([first["actions"] > 0, np.ones(N_ENVS)], axis=1)
    reached = [
        info["terminal_observation"] if done else observation
        for observation, done, info in zip(first["new_obs"], first["dones"], first["infos"], strict=True)
    ]
    np.testing.assert_array_equal(reached, expected)
    clocks = [info["episode"]["l"] for step in resumed.steps for info in step["infos"] if "episode" in info]
    assert clocks and max(clocks) <= 5


@on_both
def test_one_of_several_callbacks_stops_for_all(kind):
    events = []
    for algorithm in (PPO, GRPO):
        recorders = [Recorder(), Recorder(stop_at=3), Recorder()]
        make(algorithm, kind).learn(ROLLOUT, CallbackList([recorders[0], CallbackList(recorders[1:])]))
        events.append([recorder.events for recorder in recorders])
    assert events[0] == events[1]
    assert [sum(name == "step" for name, *_ in each) for each in events[1]] == [3, 3, 3]


@on_both
def test_a_function_is_a_callback(kind):
    for algorithm in (PPO, GRPO):
        seen = []

        def function(variables, names, seen=seen):
            seen.append(
                (variables["self"].num_timesteps, variables["infos"][0]["TimeLimit.truncated"], names)
            )
            return len(seen) < 4

        model = make(algorithm, kind).learn(ROLLOUT, function)
        assert [count for count, *_ in seen] == [2, 4, 6, 8] and model.num_timesteps == 8
        assert all("__name__" in names for *_, names in seen)
        seen.clear()
        make(algorithm, kind).learn(ROLLOUT, [ConvertCallback(function)])
        assert len(seen) == 4


# ---- SB3's own callbacks


@on_both
def test_eval_callback(kind, tmp_path):
    """As often, at the same steps, with the same files and keys as for PPO."""
    found = []
    for algorithm in (PPO, GRPO):
        folder, scored = tmp_path / algorithm.__name__, []
        callback = EvalCallback(
            venv(kind, CONSTANT),
            callback_on_new_best=Count(scored),
            callback_after_eval=Count(scored),
            n_eval_episodes=3,
            eval_freq=5,
            log_path=str(folder),
            best_model_save_path=str(folder),
            verbose=0,
        )
        rows = log_of(make(algorithm, kind), 2 * ROLLOUT, callback)
        with np.load(folder / "evaluations.npz") as data:
            results = {name: data[name].tolist() for name in data.files}
        keys = [sorted(name for name in row if name.startswith("eval/")) for row in rows]
        found.append((results, keys, len(scored), sorted(path.name for path in folder.iterdir())))
        assert callback.best_mean_reward == callback.last_mean_reward == 5
    assert found[0] == found[1]
    results, keys, n_scored, files = found[1]
    assert results == {
        "timesteps": [10, 20, 30, 40, 50, 60],
        "results": [[5] * 3] * 6,
        "ep_lengths": [[5] * 3] * 6,
    }
    assert ["eval/mean_ep_length", "eval/mean_reward"] in keys and n_scored == 7
    assert files == ["best_model.zip", "evaluations.npz"]
    GRPO.load(tmp_path / "GRPO" / "best_model", env=venv(kind)).learn(1)


class Count(BaseCallback):
    """Adds to a list at each call."""

    def __init__(self, calls):
        super().__init__()
        self.calls = calls

    def _on_step(self):
        self.calls.append(self.num_timesteps)
        return True


@on_both
def test_checkpoints(kind, tmp_path):
    for algorithm in (PPO, GRPO):
        callback = CheckpointCallback(5, str(tmp_path / algorithm.__name__), name_prefix="m")
        make(algorithm, kind).learn(2 * ROLLOUT, callback)
    files = [sorted(path.name for path in (tmp_path / name).iterdir()) for name in ("PPO", "GRPO")]
    assert files[0] == files[1] == sorted(f"m_{n}_steps.zip" for n in (10, 20, 30, 40, 50, 60))
    model = GRPO.load(tmp_path / "GRPO" / "m_10_steps", env=venv(kind))
    assert model.num_timesteps == 10
    assert model.learn(ROLLOUT, reset_num_timesteps=False).num_timesteps == 10 + ROLLOUT


@on_both
def test_training_stops_where_sb3_says(kind):
    """The environments behind these decisions do not depend on actions, so PPO must stop at the same step."""

    def reward_threshold():
        stop = StopTrainingOnRewardThreshold(reward_threshold=4.9)
        return EvalCallback(venv(kind, CONSTANT), callback_on_new_best=stop, eval_freq=7, verbose=0)

    def no_improvement():
        stop = StopTrainingOnNoModelImprovement(max_no_improvement_evals=2, min_evals=1)
        return EvalCallback(venv(kind, CONSTANT), callback_after_eval=stop, eval_freq=4, verbose=0)

    expected = {
        reward_threshold: 7 * N_ENVS,
        no_improvement: 4 * 4 * N_ENVS,  # the first is the best, three are no better
        lambda: StopTrainingOnMaxEpisodes(max_episodes=4): 4 * 5 * N_ENVS,  # per environment
        lambda: EveryNTimesteps(14, Recorder(stop_at=2)): 28,
    }
    for build, n_timesteps in expected.items():
        stops = [make(algorithm, kind, FIXED).learn(200, build()).num_timesteps for algorithm in (PPO, GRPO)]
        assert stops == [n_timesteps, n_timesteps]


@on_both
def test_every_n_timesteps(kind):
    calls = []
    for algorithm in (PPO, GRPO):
        calls.append([])
        make(algorithm, kind).learn(2 * ROLLOUT, EveryNTimesteps(12, Count(calls[-1])))
    assert calls[0] == calls[1] == [12, 24, 36, 48, 60]


# ---- the device's path


def run_with(callback, world=LINE, **settings):
    env = GymnaxVecEnv(world, n_envs=N_ENVS)
    model = make(GRPO, "device", env=env, **settings)
    model.learn(3 * ROLLOUT, callback() if callback else None)
    return model, env


CALLBACKS = {
    "recorder": Recorder,
    "function": lambda: lambda variables, names: True,
    "evaluation": lambda: EvalCallback(
        venv("device"), n_eval_episodes=2, eval_freq=5, deterministic=False, verbose=0
    ),
    "every": lambda: EveryNTimesteps(10, Recorder()),
    "list": lambda: [Recorder(), Recorder()],
    "looks": lambda: Looks(),
}


class Looks(BaseCallback):
    """Asks the model and the environments for all that it can, and changes nothing."""

    def _on_step(self):
        self.training_env.environments  # noqa: B018
        self.training_env.get_attr("world")
        self.model.predict(self.locals["new_obs"])
        self.model.get_parameters()
        return True


@pytest.fixture(scope="module")
def plain_run():
    return run_with(None)


@pytest.mark.parametrize("name", CALLBACKS)
def test_a_run_with_callbacks_is_the_same_run(name, plain_run):
    (plain, plain_env), (model, env) = plain_run, run_with(CALLBACKS[name])
    np.testing.assert_array_equal(flat(model), flat(plain))
    np.testing.assert_array_equal(model.key_words, plain.key_words)
    np.testing.assert_array_equal(model._last_obs, plain._last_obs)
    np.testing.assert_array_equal(model._last_episode_starts, plain._last_episode_starts)
    jax.tree.map(np.testing.assert_array_equal, env.environments, plain_env.environments)
    episodes = [[(info["r"], info["l"]) for info in each.ep_info_buffer] for each in (model, plain)]
    assert episodes[0] == episodes[1] and len(episodes[0]) > 10
    assert (model.num_timesteps, model.simulator_steps) == (plain.num_timesteps, plain.simulator_steps)


def test_the_host_path_is_the_same_run_with_callbacks():
    models = [make(GRPO, "host").learn(2 * ROLLOUT, callback) for callback in (None, Recorder(), Looking())]
    for model in models[1:]:
        np.testing.assert_array_equal(flat(model), flat(models[0]))


class Looking(BaseCallback):
    """Samples actions, which must not move the stream that training draws from."""

    def _on_step(self):
        self.model.predict(self.locals["new_obs"], deterministic=False)
        return True


def test_the_environments_stand_where_the_step_left_them():
    class Stands(BaseCallback):
        def _on_step(self):
            env, step = self.training_env, self.locals
            np.testing.assert_array_equal(env.environments.observation, step["new_obs"])
            states = env.get_attr("environments", 1)[0].state
            np.testing.assert_array_equal(states, step["new_obs"].astype(np.int32))
            lengths = np.asarray(env.environments.episode_length)
            np.testing.assert_array_equal(lengths, step["new_obs"][:, 1])
            return True

        def _on_rollout_end(self):
            np.testing.assert_array_equal(self.training_env.environments.observation, self.locals["new_obs"])

    callback = Stands()
    make(GRPO, "device").learn(2 * ROLLOUT, callback)
    assert callback.n_calls == 2 * N_STEPS


def test_pictures_show_the_step():
    """``render`` in a callback shows what that step reached."""
    env = GymnaxVecEnv("CartPole-v1", n_envs=1, seed=0, render_mode="rgb_array")
    frames, states = [], []

    class Film(BaseCallback):
        def _on_step(self):
            if self.n_calls in (2, 7):
                frames.append(self.training_env.render("rgb_array"))
                states.append(self.training_env.environments)
                np.testing.assert_array_equal(states[-1].observation, self.locals["new_obs"])
            return True

    make(GRPO, "device", env=env, n_steps=8, batch_size=8, n_epochs=1, horizon=2, bootstrap=True).learn(
        8, Film()
    )
    assert not np.array_equal(frames[0], frames[1])
    for frame, state in zip(frames, states, strict=True):
        env.environments = state
        np.testing.assert_array_equal(env.render("rgb_array"), frame)
    env.close()


@pytest.mark.filterwarnings("ignore::tqdm.TqdmExperimentalWarning")
def test_which_callbacks_see_every_step(monkeypatch, tmp_path):
    replays = []
    replay = collect._Steps.replay
    monkeypatch.setattr(collect._Steps, "replay", lambda *args: replays.append(1) or replay(*args))
    asking = [
        Recorder(),
        [Recorder()],
        CallbackList([ProgressBarCallback(), Recorder()]),
        CheckpointCallback(1000, str(tmp_path)),
        EveryNTimesteps(1000, Recorder()),
        lambda variables, names: True,
    ]
    for callback in asking:
        replays.clear()
        make(GRPO, "device").learn(2 * ROLLOUT, callback)
        assert len(replays) == 2, callback
    for callback in (None, ProgressBarCallback(), [], [ProgressBarCallback()], CallbackList([])):
        replays.clear()
        make(GRPO, "device").learn(2 * ROLLOUT, callback, progress_bar=callback is None)
        assert not replays, callback


@pytest.mark.parametrize("progress_bar", [False, True])
def test_without_callbacks_there_is_no_python_per_step(progress_bar, monkeypatch):
    monkeypatch.setattr(
        ProgressBarCallback, "_on_training_start", lambda self: setattr(self, "pbar", Bar([]))
    )
    endless = Walk(Discrete(2), goal=1000, limit=1000)
    counts = []
    for n_steps in (N_STEPS, 8 * N_STEPS):
        model = make(GRPO, "device", endless, n_steps=n_steps)
        model.learn(2 * n_steps)  # compiled
        calls = Counter()

        def count(frame, event, argument, calls=calls):
            if event == "call":
                calls[frame.f_code.co_filename] += 1

        sys.setprofile(count)
        try:
            model.learn(2 * n_steps, reset_num_timesteps=False, progress_bar=progress_bar)
        finally:
            sys.setprofile(None)
        counts.append(sum(calls.values()))
    assert abs(counts[1] - counts[0]) < 7 * N_STEPS / 2 and counts[0] > 100, (
        counts
    )  # not even every second step


def test_a_callback_may_use_the_training_env():
    """As with PPO: an evaluation in the training env disturbs the rollout, but training goes on."""

    class Uses(BaseCallback):
        def _on_step(self):
            if self.n_calls in (3, N_STEPS):
                self.training_env.step(np.zeros(N_ENVS, int))
            if self.n_calls in (5, 2 * N_STEPS):
                self.training_env.reset()
            return True

        def _on_rollout_end(self):
            self.training_env.step(np.zeros(N_ENVS, int))

    for algorithm in (PPO, GRPO):
        assert make(algorithm, "device").learn(3 * ROLLOUT, Uses()).num_timesteps == 3 * ROLLOUT


# ---- logger


@pytest.mark.parametrize(
    ("kind", "world", "candidates"),
    [
        ("host", LINE, "episodes"),
        ("host", BOX, "episodes"),
        ("host", LINE, "auto"),
        ("device", LINE, "auto"),
    ],
)
def test_all_of_ppos_keys_are_logged_with_a_critic(kind, world, candidates):
    settings = {"clip_range_vf": 0.2}
    ppo = log_of(make(PPO, kind, world, **settings), 3 * ROLLOUT)
    settings |= {"bootstrap": True, "candidates": candidates}
    grpo = log_of(make(GRPO, kind, world, **settings), 3 * ROLLOUT)
    for theirs, ours in zip(ppo, grpo, strict=True):
        extra = {name for name in ours if name.startswith("grpo/")}
        assert set(ours) == set(theirs) | extra
        counts = [name for name in theirs if isinstance(theirs[name], int)]
        assert counts and all(isinstance(ours[name], int) for name in counts)
        assert all(np.isfinite(value) for value in ours.values())
    assert {"grpo/group_spread", "grpo/frac_zero_std", "grpo/simulator_steps"} <= set(grpo[1])
    assert ("grpo/world_error" in grpo[1]) == (candidates == "auto")
    assert (grpo[1]["grpo/simulator_steps"] > 0) == (candidates == "auto")
    assert ("train/std" in grpo[1]) == (world is BOX)


@on_both
def test_without_a_critic_its_keys_are_absent(kind):
    theirs = log_of(make(PPO, kind), 2 * ROLLOUT)[1]
    ours = log_of(make(GRPO, kind, bootstrap=False), 2 * ROLLOUT)[1]
    missing = {name for name in theirs if name not in ours}
    assert missing == {"train/value_loss", "train/explained_variance"}


def test_the_first_update_is_ppos():
    """Same parameters, an environment that ignores actions, one step on the whole batch: equal values, not only keys."""
    settings = {"n_epochs": 1, "batch_size": ROLLOUT, "n_steps": N_STEPS, "ent_coef": 0.1, "vf_coef": 0.7}
    ppo = make(PPO, "host", CONSTANT, **settings)
    grpo = make(GRPO, "host", CONSTANT, candidates="episodes", **settings)
    copy_parameters(ppo, grpo)
    theirs, ours = (log_of(model, 2 * ROLLOUT)[1] for model in (ppo, grpo))
    for name in ("entropy_loss", "value_loss", "explained_variance", "loss", "clip_range", "learning_rate"):
        np.testing.assert_allclose(ours[f"train/{name}"], theirs[f"train/{name}"], rtol=1e-4, err_msg=name)
    for name in ("policy_gradient_loss", "approx_kl", "clip_fraction"):
        np.testing.assert_allclose(ours[f"train/{name}"], theirs[f"train/{name}"], atol=1e-5, err_msg=name)
    assert ours["train/n_updates"] == theirs["train/n_updates"] == 1
    assert theirs["train/value_loss"] > 0.1 and theirs["train/entropy_loss"] < -0.1
    for name in ("rollout/ep_rew_mean", "rollout/ep_len_mean"):
        assert ours[name] == theirs[name] == 5


def copy_parameters(ppo, grpo):
    """Gives the networks of ``grpo`` the numbers of those of ``ppo``, for ``net_arch=[8]``."""
    theirs = ppo.policy.state_dict()
    names = {
        "actor.MLP_0.Dense_0": "mlp_extractor.policy_net.0",
        "actor.output": "action_net",
        "critic.MLP_0.Dense_0": "mlp_extractor.value_net.0",
        "critic.output": "value_net",
    }
    parameters = grpo.get_parameters()
    for ours, name in names.items():
        parameters["policy"][f"{ours}.kernel"] = theirs[f"{name}.weight"].mT
        parameters["policy"][f"{ours}.bias"] = theirs[f"{name}.bias"]
    grpo.set_parameters(parameters)


def test_parameters_that_were_set_are_copies():
    model = make(GRPO, "host")
    parameters = model.get_parameters()
    model.set_parameters(parameters)
    before = flat(model)
    for leaf in parameters["policy"].values():
        leaf += 1
    np.testing.assert_array_equal(flat(model), before)


def test_clip_fraction_counts_as_ppo():
    """All ratios beyond the bounds, whatever the advantages: none at the first minibatch, every one at the second."""
    settings = {"batch_size": ROLLOUT, "learning_rate": 0.05, "clip_range": 1e-6, "max_grad_norm": 1e9}
    kinds = [(PPO, {}), (GRPO, {"candidates": "episodes"}), (GRPO, {})]
    rows = [log_of(make(algorithm, "host", **settings, **own), 2 * ROLLOUT)[1] for algorithm, own in kinds]
    assert [row["train/clip_fraction"] for row in rows] == [0.5, 0.5, 0.5]


@pytest.mark.parametrize("target_kl", [1e-9, 100.0])
def test_n_updates_counts_epochs_that_were_begun(target_kl):
    counts = []
    for algorithm, own in [(PPO, {}), (GRPO, {"candidates": "episodes"}), (GRPO, {})]:
        rows = log_of(make(algorithm, "host", target_kl=target_kl, learning_rate=0.01, **own), 3 * ROLLOUT)
        counts.append([row["train/n_updates"] for row in rows[1:]])
    # Of two minibatches each: the first changes the policy, the second finds it too far.
    assert counts == [[2, 4] if target_kl == 100 else [1, 2]] * 3


@on_both
def test_log_files(kind, tmp_path):
    """The four formats hold the same, as for PPO; TensorBoard leaves out what PPO leaves out."""
    keys = []
    for algorithm in (PPO, GRPO):
        folder = tmp_path / algorithm.__name__
        model = make(algorithm, kind)
        logger = configure(str(folder), ["csv", "json", "tensorboard", "log"])
        model.set_logger(logger)
        assert model.logger is logger
        model.learn(3 * ROLLOUT)
        assert model.logger is logger
        logger.close()
        with open(folder / "progress.csv", newline="") as file:
            table = list(csv.DictReader(file))
        lines = [json.loads(line) for line in (folder / "progress.json").read_text().splitlines()]
        assert len(table) == len(lines) == 3
        for row, line in zip(table, lines, strict=True):
            assert {name: float(value) for name, value in row.items() if value} == pytest.approx(line)
        events = EventAccumulator(str(folder)).Reload()
        scalars = set(events.Tags()["scalars"])
        assert [event.step for event in events.Scalars("rollout/ep_rew_mean")] == [32, 64, 96]
        assert [event.step for event in events.Scalars("train/loss")] == [64, 96]
        text = (folder / "log.txt").read_text()
        assert text.count("total_timesteps") == 3 and "approx_kl" in text
        ours = {name for name in lines[-1] if name.startswith("grpo/")}
        keys.append((set(lines[-1]) - ours, scalars - ours))
        absent = {"time/iterations", "time/time_elapsed", "time/total_timesteps", "train/n_updates"}
        assert set(lines[-1]) - scalars == absent
    missing = {"train/value_loss", "train/explained_variance"} if kind == "device" else set()
    assert keys[1] == tuple(names - missing for names in keys[0])


@pytest.mark.parametrize("kind", [*KINDS, "episodes"])
@pytest.mark.parametrize("verbose", [0, 1])
def test_what_is_printed(kind, verbose, capsys):
    printed = []
    for algorithm, own in ((PPO, {}), (GRPO, {"candidates": "episodes"} if kind == "episodes" else {})):
        capsys.readouterr()
        make(algorithm, kind, verbose=verbose, **own).learn(2 * ROLLOUT, log_interval=2)
        captured = capsys.readouterr()
        assert captured.err == ""
        printed.append(captured.out.splitlines())
    if verbose == 0:
        assert printed == [[], []]
        return
    theirs, ours = (
        {line.split("|")[1].strip() for line in lines if line.startswith("|")} for lines in printed
    )
    critic = {"value_loss", "explained_variance"} if kind == "device" else set()
    assert theirs - ours == critic
    assert {"grpo/", "group_spread", "frac_zero_std", "simulator_steps"} <= ours - theirs
    before = [[line for line in lines if not line.startswith(("|", "-"))] for lines in printed]
    assert set(before[0]) <= set(before[1])
    (told,) = set(before[1]) - set(before[0])
    expected = {
        "episodes": "GRPO: the episodes of a rollout are compared, nothing is branched; with a critic",
        "device": "GRPO: all 2 actions of every state are followed for 4 steps in the simulator; without a critic",
        "host": "GRPO: all 2 actions of every state are followed for 4 steps in exact clones by attributes (replay check"
        " passed; # us a snapshot, # a restore, # a step); with a critic (dynamics='auto': branches take # ms a decision"
        " step)",
    }
    numbers = re.escape(expected[kind]).replace("\\#", r"\d+(\.\d+)?(e[+-]\d+)?")
    assert re.fullmatch(numbers, told), told


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


# ---- monitors


def monitored(kind, folder):
    if kind == "monitor":
        return make_vec_env(lambda: GymnaxEnv(LINE), n_envs=2, seed=0, monitor_dir=str(folder))
    if kind == "vec_monitor":
        return VecMonitor(GymnaxVecEnv(LINE, n_envs=2, seed=0), str(folder / "0"))
    return GymnaxVecEnv(LINE, n_envs=2, seed=0, monitor_dir=folder)


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
        env = VecMonitor(GymnaxVecEnv(LINE, n_envs=2, seed=0, monitor_dir=folder), str(folder / "1"))
        make(GRPO, "device", env=env).learn(2 * ROLLOUT, callback)
        running = np.array(env.episode_lengths)
        env.close()
        table = load_results(str(folder))
        rows.append((table.r.tolist(), table.l.tolist(), running.tolist(), env.episode_count))
        assert env.episode_count * 2 == len(table)  # the inner and the outer file
        np.testing.assert_array_equal(running, env.venv.environments.episode_length)
    assert [sorted(part) for part in rows[0][:2]] == [sorted(part) for part in rows[1][:2]]
    assert rows[0][2:] == rows[1][2:]


# ---- schedules and attributes


@on_both
def test_schedules_are_asked_as_ppo_asks(kind):
    settings = {
        "learning_rate": lambda left: 1e-3 * left,
        "clip_range": lambda left: 0.1 + 0.2 * left,
        "clip_range_vf": lambda left: 0.3 * left + 0.1,
    }
    logs = []
    for algorithm in (PPO, GRPO):
        own = {"bootstrap": True} if algorithm is GRPO else {}
        model = make(algorithm, kind, **settings, **own)
        rows = log_of(model, 4 * ROLLOUT)
        rows += log_of(model, ROLLOUT, reset_num_timesteps=False)
        model.logger.dump(0)  # what the last iteration logged
        rows = [*rows, model.logger.output_formats[0].rows[-1]]
        names = ("train/learning_rate", "train/clip_range", "train/clip_range_vf")
        logs.append([[row.get(name) for name in names] for row in rows])
    assert logs[1] == logs[0]
    expected = [[1e-3 * left, 0.1 + 0.2 * left, 0.3 * left + 0.1] for left in (0.75, 0.5, 0.25)]
    assert logs[1][1:4] == [pytest.approx(row) for row in expected]


@on_both
def test_no_schedule_is_asked_for_what_lies_behind_the_end(kind):
    asked = []

    def schedule(left):
        asked.append(left)
        return 1e-3 * left

    model = make(GRPO, kind, learning_rate=schedule)
    rows = log_of(model, ROLLOUT + 1)
    assert min(asked) == 0 and max(asked) == 1 and len(rows) == 2
    assert rows[1]["train/learning_rate"] == pytest.approx(1e-3 / (ROLLOUT + 1))


@on_both
@pytest.mark.parametrize("name", ["learning_rate", "clip_range"])
def test_schedules_are_what_is_trained_with(kind, name):
    """A learning rate that falls to 0 learns nothing more; without room to clip, a second minibatch adds nothing."""
    total = 4 * ROLLOUT

    def weights_at_each_rollout(**settings):
        seen = []

        class Watch(BaseCallback):
            def _on_step(self):
                return True

            def _on_rollout_start(self):
                seen.append(weights(self.model))

        model = make(GRPO, kind, **settings).learn(total, Watch())
        return [*seen, weights(model)]

    if name == "learning_rate":
        seen = weights_at_each_rollout(learning_rate=lambda left: 1e-2 if left > 0.4 else 0.0)
        moved = [not np.array_equal(a, b) for a, b in itertools.pairwise(seen)]
        assert moved == [True, True, False, False]
    else:
        settings = {"learning_rate": 1e-2, "n_epochs": 2, "batch_size": ROLLOUT, "max_grad_norm": 1e9}
        tight = weights_at_each_rollout(**settings, clip_range=lambda left: 0.2 if left > 0.8 else 1e-9)
        wide = weights_at_each_rollout(**settings, clip_range=0.2)
        same = [np.array_equal(a, b) for a, b in zip(tight, wide, strict=True)]
        assert same == [True, False, False, False, False]  # left is 0.75 at the first update


@on_both
def test_attributes_that_change_in_training_take_effect(kind):
    class Change(BaseCallback):
        def _on_step(self):
            return True

        def _on_rollout_end(self):
            if self.num_timesteps == 2 * ROLLOUT:
                self.model.ent_coef = 10.0

    rows = {}
    for algorithm in (PPO, GRPO):
        model = make(algorithm, kind, learning_rate=0.0)
        log_of(model, 3 * ROLLOUT, Change())
        rows[algorithm] = model.logger.output_formats[0].rows
        loss = [row["train/loss"] for row in rows[algorithm][1:]]
        entropy = -rows[algorithm][2]["train/entropy_loss"]
        # With learning_rate=0 the entropy stays log 2, and so does all of the loss but its bonus, nearly.
        assert entropy == pytest.approx(np.log(2), abs=1e-3)
        policy = [row["train/policy_gradient_loss"] for row in rows[algorithm][1:]]
        if algorithm is GRPO and kind == "device":
            assert loss[0] == pytest.approx(policy[0], abs=1e-6)
            assert loss[1] == pytest.approx(policy[1] - 10 * entropy, rel=1e-5)
        assert loss[1] < loss[0] - 4


# ---- warnings and errors


def test_arguments_without_a_meaning_are_named_once():
    cases = [
        (
            "host",
            BOX,
            {"use_sde": True, "sde_sample_freq": 4},
            ["use_sde", "sde_sample_freq"],
            ["gae_lambda"],
        ),
        (
            "host",
            LINE,
            {"candidates": "episodes", "horizon": 7, "branch_every": 2, "group_size": 4},
            ["horizon", "branch_every", "group_size"],
            ["n_rollouts"],
        ),
        ("host", LINE, {"bootstrap": False, "gae_lambda": 0.9}, ["gae_lambda"], ["horizon", "group_size"]),
        ("device", LINE, {"gae_lambda": 0.9, "vf_coef": 0.1}, ["gae_lambda", "vf_coef"], ["horizon"]),
        ("device", LINE, {"clip_range_vf": 0.2}, ["clip_range_vf"], []),
        ("device", LINE, {"candidates": "episodes", "backup": "max"}, ["backup"], ["gae_lambda"]),
    ]
    for kind, world, settings, named, silent in cases:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            make(GRPO, kind, world, **settings)
        (warning,) = caught
        text = str(warning.message)
        assert warning.category is UserWarning and "no meaning" in text, text
        assert all(name in text for name in named) and not any(name in text for name in silent), text
        assert warning.filename == __file__


@pytest.mark.parametrize("kind", ["host", "device"])
def test_actions_persist_in_rollouts(kind):
    """Persistence is a function of the remaining progress here: all actions are repeated, then none has to be."""
    actions = []

    class Watch(BaseCallback):
        def _on_step(self) -> bool:
            actions.append(np.array(self.locals["actions"]))
            return True

    model = make(GRPO, kind, LONG_BOX, n_steps=8, persistence=lambda remaining: float(remaining > 0.75))
    model.learn(2 * 8 * model.n_envs, callback=Watch())
    taken = np.stack(actions)  # [2 * 8, N, 1]
    assert (taken[1:8] == taken[:1]).all()
    assert (taken[9:] != taken[8:-1]).any()


def test_arguments_with_a_meaning_are_silent():
    make(GRPO, "device", gae_lambda=0.9, vf_coef=0.1, clip_range_vf=0.2, bootstrap=True)
    make(GRPO, "host", gae_lambda=0.9, vf_coef=0.1, clip_range_vf=0.2)
    make(GRPO, "host", candidates="episodes", gae_lambda=0.9, vf_coef=0.1, clip_range_vf=0.2)
    make(
        GRPO,
        "host",
        branch_every=2,
        max_enumerated=8,
        n_rollouts=2,
        backup="max",
        group_size=4,
        persistence=0.5,
    )
    # Set to their defaults, they say nothing.
    settings = {
        "horizon": None,
        "branch_every": None,
        "group_size": 8,
        "use_sde": False,
        "sde_sample_freq": -1,
    }
    make(GRPO, "host", candidates="episodes", **settings)


@pytest.mark.parametrize("batch_size", [12, 16, 33])
def test_batches_that_do_not_divide_the_rollout(batch_size):
    """Warned of where PPO warns, and trained with the rest as PPO trains with it."""
    told = []
    for algorithm in (PPO, GRPO):
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            model = make(algorithm, "host", batch_size=batch_size).learn(1)
        told.append([warning.category for warning in caught])
        texts = [str(warning.message) for warning in caught]
        assert model._n_updates == 2
    assert told[0] == told[1] == ([UserWarning] if ROLLOUT % batch_size else [])
    assert all(f"={batch_size} " in text and "16" in text for text in texts)


def no_spread(caught):
    return [warning for warning in caught if warning.category is NoSpreadWarning]


@pytest.mark.parametrize(("kind", "candidates"), [("host", "episodes"), ("host", "auto"), ("device", "auto")])
def test_groups_without_spread_are_told_of_once_they_persist(kind, candidates):
    model = make(GRPO, kind, CONSTANT, bootstrap=False, candidates=candidates)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        rows = log_of(model, (SPREAD_ITERATIONS + 2) * ROLLOUT)
    assert len(no_spread(caught)) == len(caught) == 1
    assert all(row["grpo/frac_zero_std"] == 1 for row in rows[1:])
    assert ("Raise horizon" in str(caught[0].message)) == (candidates == "auto")
    assert ("raise n_steps" in str(caught[0].message)) == (candidates == "episodes")


def test_some_groups_without_spread_are_no_warning():
    """The first rollout holds no whole episode; later ones do."""
    model = make(GRPO, "host", candidates="episodes", bootstrap=False, n_steps=2, batch_size=4)
    rows = log_of(model, 20 * 4)
    shares = [row["grpo/frac_zero_std"] for row in rows[1:]]
    assert shares[0] == 1 and min(shares) < 1


@pytest.mark.parametrize(("kind", "candidates"), [("host", "episodes"), ("host", "auto"), ("device", "auto")])
@pytest.mark.parametrize("bootstrap", [True, False])
def test_rewards_that_are_nan_are_an_error_and_teach_nothing(kind, candidates, bootstrap):
    settings = {"bootstrap": bootstrap, "clip_range_vf": 0.2 if bootstrap else None}
    model = make(GRPO, kind, NAN, candidates=candidates, **settings)
    before = flat(model)
    with pytest.raises((FloatingPointError, ValueError), match=r"(?i)nan"):
        model.learn(3 * ROLLOUT)
    np.testing.assert_array_equal(flat(model), before)
    assert model.num_timesteps == ROLLOUT and model._n_updates == 0


@on_both
def test_a_reward_function_that_is_nan_is_an_error_and_teaches_nothing(kind):
    def reward(state, action, next_state):
        return jnp.where(next_state[..., 0] == 2, jnp.nan, next_state[..., 0])  # none of the drawn ones

    model = make(GRPO, kind, reward_function=reward)
    before = flat(model)
    with pytest.raises((FloatingPointError, ValueError), match=r"(?i)nan"):
        model.learn(3 * ROLLOUT)
    np.testing.assert_array_equal(flat(model), before)
