"""Callbacks: their events, what they see, where they stop training; PPO is the oracle."""

import itertools
import json
from collections import Counter

import numpy as np
import pytest
from sb3.contract import (
    BOX,
    CONSTANT,
    FIXED,
    KINDS,
    LINE,
    N_ENVS,
    N_STEPS,
    ROLLOUT,
    Count,
    Recorder,
    log_of,
    make,
    on_both,
    venv,
    weights,
)
from stable_baselines3 import PPO
from stable_baselines3.common.callbacks import (
    CallbackList,
    CheckpointCallback,
    ConvertCallback,
    EvalCallback,
    EveryNTimesteps,
    StopTrainingOnMaxEpisodes,
    StopTrainingOnNoModelImprovement,
    StopTrainingOnRewardThreshold,
)

from sb3_bridge import GRPO


def describe(value):
    """Types, dtypes, shapes and keys, without the values."""
    if isinstance(value, np.ndarray):
        return ("array", str(value.dtype), value.shape)
    if isinstance(value, dict):
        return {name: describe(part) for name, part in value.items()}
    return type(value).__name__


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


BUSY = pytest.mark.filterwarnings("ignore:.*most of the run")  # on a busy machine


@BUSY
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


@BUSY
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
    stopped, resumed = recorders[1].steps[-1], Recorder()
    model.learn(ROLLOUT, resumed, reset_num_timesteps=False)
    assert model.num_timesteps == stop_at * N_ENVS + ROLLOUT
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
