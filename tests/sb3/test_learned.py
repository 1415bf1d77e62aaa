"""Branches in a learned world: when it is used, what is logged of it, and what of it is in the file."""

from __future__ import annotations

import copy
import io
import itertools
import pickle
import zipfile
from types import SimpleNamespace
from typing import Any

import chex
import cloudpickle
import numpy as np
import pytest
from sb3.sleds import (
    Sled,
    Uncopyable,
    dummy,
    make,
    parameters,
    updates_of,
)
from stable_baselines3.common.monitor import Monitor
from stable_baselines3.common.vec_env import DummyVecEnv

from sb3_bridge import GRPO
from sb3_bridge.files.model_zip import load_zip

LEARNED = {"dynamics": "learned", "n_steps": 64, "batch_size": 64, "horizon": 4, "branch_every": 4}


def sleds() -> DummyVecEnv:
    return dummy(lambda: Monitor(Sled(16, edge=100)), 2)


@pytest.fixture(scope="module")
def learned_run():
    """A trained model, what was logged, and its file and a copy of its environments at half time."""
    model = make(sleds(), **LEARNED)
    rows = updates_of(model, 2 * 128)
    file = io.BytesIO()
    model.save(file)
    half = SimpleNamespace(
        file=file.getvalue(), env=copy.deepcopy(model.get_env()), parameters=parameters(model)
    )
    rows += updates_of(model, 2 * 128, reset_num_timesteps=False)
    return SimpleNamespace(model=model, rows=rows, half=half)


def test_a_learned_world_is_used_as_soon_as_it_predicts_well(learned_run):
    used = [row["grpo/world_used"] for row in learned_run.rows]
    assert used == [0, 1, 1, 1]
    steps = np.diff([0, *(row["grpo/simulator_steps"] for row in learned_run.rows)])
    assert [bool(count) for count in steps] == [bool(value) for value in used]
    assert steps[-1] <= 2 * 64 // 4 * 3 * 4


def test_a_learned_worlds_errors_are_logged(learned_run):
    for name in ("world_error", "world_one_step_error", "world_disagreement"):
        values = [row[f"grpo/{name}"] for row in learned_run.rows]
        assert np.isfinite(values).all() and values[-1] < values[0], name
    assert learned_run.rows[-1]["grpo/world_one_step_error"] < 0.7 <= learned_run.rows[0]["grpo/world_error"]


def test_a_learned_world_is_in_the_file_without_a_pickle(learned_run, monkeypatch):
    """Training goes on as if it had not been interrupted, bit for bit."""
    half = learned_run.half
    assert any("world" in name for name in zipfile.ZipFile(io.BytesIO(half.file)).namelist())

    def refuse(*_arguments: Any, **_settings: Any) -> Any:
        raise AssertionError("something was unpickled")

    with monkeypatch.context() as patch:
        for module, name in itertools.product((pickle, cloudpickle), ("load", "loads")):
            patch.setattr(module, name, refuse)
        patch.setattr(pickle, "Unpickler", refuse)
        loaded = GRPO.load(io.BytesIO(half.file), env=half.env, force_reset=False)
    assert loaded.chosen_dynamics == "learned"
    before = loaded.simulator_steps
    loaded.learn(2 * 128, reset_num_timesteps=False)
    np.testing.assert_array_equal(parameters(loaded), parameters(learned_run.model))
    assert loaded.simulator_steps == learned_run.model.simulator_steps
    assert loaded.simulator_steps > before
    assert (parameters(loaded) != half.parameters).any()


def test_a_learned_world_takes_the_users_reward():
    """In NumPy, too; then it is not learned, and no critic is needed."""
    reward = lambda state, action, next_state: np.square(next_state[0])
    model = make(sleds(), reward_function=reward, **LEARNED)
    assert model.bootstrap is False
    before = parameters(model)
    rows = updates_of(model, 2 * 128)
    assert rows[-1]["grpo/world_used"] == 1 and rows[-1]["grpo/simulator_steps"] > 0
    assert (parameters(model) != before).any()


def file_of(model: GRPO) -> io.BytesIO:
    file = io.BytesIO()
    model.save(file)
    file.seek(0)
    return file


def world_of(model: GRPO) -> Any:
    """The learned world in the model's file."""
    return load_zip(file_of(model), load_data=False)[1]["world"]


def test_a_learned_world_waits_in_a_model_that_has_no_env_yet():
    model = make(dummy(Uncopyable), dynamics="learned")
    model.learn(8)
    again = GRPO.load(file_of(GRPO.load(file_of(model))))  # saved without an env, and nothing is lost
    for _ in range(2):
        again.set_env(dummy(Uncopyable))
        chex.assert_trees_all_equal(world_of(again), world_of(model))


def test_a_rollout_larger_than_the_replay_is_learned_from_all_the_same(monkeypatch):
    monkeypatch.setattr("sb3_bridge.alternatives.CAPACITY", 12)
    model = make(dummy(Uncopyable, 2), dynamics="learned", n_steps=16, batch_size=32)
    model.learn(32)
    assert len(world_of(model)["replay"]["data"]["reward"]) == 12


def squares(state: Any, action: Any, next_state: Any) -> Any:
    return 1.0 + next_state[0] ** 2


@pytest.mark.parametrize("before", [None, squares], ids=["learned", "given"])
def test_a_learned_world_is_loaded_with_another_reward(before):
    model = make(sleds(), reward_function=before, **LEARNED)
    model.learn(128)
    after = {"reward_function": squares if before is None else None}
    with pytest.warns(UserWarning, match="learned anew"):
        loaded = GRPO.load(file_of(model), env=sleds(), custom_objects=after)
    assert loaded.chosen_dynamics == "learned"
    rows = updates_of(loaded, 3 * 128, reset_num_timesteps=False)
    assert [row["grpo/world_used"] for row in (rows[0], rows[-1])] == [0, 1]
