"""The ablation: which variants there are, the row of a short run, and the report of made-up rows."""

import dataclasses
import importlib.util
import json
import math
import pathlib
import sys
from typing import Any

import jax
import pytest

import grpo_jax

BENCHMARKS = pathlib.Path(__file__).parents[1] / "benchmarks"
REFERENCES = {"CartPole-v1": {"random": 20.0, "best": 500}, "Acrobot-v1": {"random": -500.0}}


@pytest.fixture(scope="module")
def ablation():
    """The module; it imports the runner that stands beside it."""
    sys.path.insert(0, str(BENCHMARKS))
    try:
        spec = importlib.util.spec_from_file_location("ablation", BENCHMARKS / "ablation.py")
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
    finally:
        sys.path.remove(str(BENCHMARKS))
    return module


@pytest.fixture
def restored():
    """Quick compiling is a setting of the process."""
    before = jax.config.read("jax_disable_most_optimizations")
    yield
    jax.config.update("jax_disable_most_optimizations", before)


def make_row(
    env: str, labels: list[tuple[str, str]], scores: list[Any], preset: bool = False
) -> dict[str, Any]:
    config = grpo_jax.GRPOConfig(horizon=16)
    return {
        "env": env,
        "labels": [list(label) for label in labels],
        "is_preset": preset,
        "config": config.to_json(),
        "scores": scores,
        "areas": scores,
        "nonfinite": [score is None for score in scores],
        "frac_zero_std": [0.25 for _ in scores],
        "decision_steps": 5000,
        "simulator_steps": 70_000.0,
        "cpu_seconds": {"compile": 4.0, "train": 2.0},
        "versions": {"jax": "0"},
        "machine": {"cpus": 2, "platform": "Linux"},
    }


def test_the_preset_is_a_level_of_every_factor_and_runs_once(ablation):
    for env_id in ("CartPole-v1", "Pendulum-v1"):
        found, _ = ablation.variants(env_id)
        assert [variant.is_preset for variant in found] == [True] + [False] * (len(found) - 1)
        assert {factor for factor, _ in found[0].labels} == set(ablation.FACTORS)
        assert (
            len({variant.name for variant in found})
            == len({variant.config for variant in found})
            == len(found)
        )


def test_one_thing_is_changed_at_a_time(ablation):
    allowed = {("candidates", "group_size"), ("n_rollouts", "backup")}
    found, _ = ablation.variants("CartPole-v1")
    for variant in found[1:]:
        changed = {
            field.name
            for field in dataclasses.fields(variant.config)
            if getattr(variant.config, field.name) != getattr(found[0].config, field.name)
        }
        assert len(changed) == 1 or any(changed <= set(pair) for pair in allowed), variant
    levels = {
        factor: [of[1] for variant in found for of in variant.labels if of[0] == factor]
        for factor in ablation.FACTORS
    }
    assert set(levels["surrogate"]) == {"ppo", "cispo", "sapo", "tpo"}
    assert {"all", "2", "4", "8", "16"} == set(levels["group_size"])
    assert {"1", "4, mean", "4, max"} <= set(levels["backup"]) and len(levels["horizon"]) >= 3


def test_what_the_config_refuses_is_left_out_in_words(ablation, monkeypatch):
    monkeypatch.setattr(grpo_jax, "preset", lambda env_id: grpo_jax.GRPOConfig(persistence=0.5))
    found, refused = ablation.variants("CartPole-v1", ["baseline"])
    assert len(refused) == 1 and refused[0].startswith("CartPole-v1, baseline executed: persistence=0.5")
    assert len(found) == 4


def test_longer_runs_and_more_branches_cost_more(ablation):
    found, _ = ablation.variants("CartPole-v1", ["backup"])
    one, four = found[0], found[1]
    assert (
        ablation.estimate(one, 2000, 5) < ablation.estimate(one, 4000, 5) < ablation.estimate(four, 4000, 5)
    )
    assert ablation.n_timesteps("CartPole-v1", 0.5) == round(0.5 * grpo_jax.preset_timesteps("CartPole-v1"))


def test_a_run_leaves_a_row_that_json_can_hold(ablation, restored):
    config = grpo_jax.GRPOConfig(n_envs=2, n_steps=4, batch_size=8, n_epochs=1, horizon=2, net_arch=(4,))
    row = ablation.measure("CartPole-v1", [["horizon", "2"]], False, config.to_json(), 16, 2, True)
    assert json.loads(json.dumps(row, allow_nan=False)) == row
    assert len(row["scores"]) == len(row["areas"]) == 2 and all(score >= 1 for score in row["scores"])
    assert row["decision_steps"] == 16 and row["nonfinite"] == [False, False]
    assert row["cpu_seconds"].keys() == {"compile", "train", "evaluate"}


def test_a_seed_that_is_not_finite_is_recorded(ablation, restored):
    config = grpo_jax.GRPOConfig(
        n_envs=2, n_steps=4, batch_size=8, n_epochs=1, horizon=2, net_arch=(4,), gamma=1.0, learning_rate=1e38
    )
    row = ablation.measure("Pendulum-v1", [["horizon", "2"]], False, config.to_json(), 64, 2, True)
    assert all(row["nonfinite"]) and json.dumps(row, allow_nan=False)
    assert ablation.finite(math.nan) is None and ablation.middle([None, 1.0, 2.0]) == 1.0


def test_scores_are_normalised_between_random_and_best(ablation):
    rows = [make_row("CartPole-v1", [("horizon", "16")], [260.0, None, 500.0], True)]
    rows += [make_row("Acrobot-v1", [("horizon", "4")], [-100.0, -90.0, -80.0])]
    assert ablation.scale("CartPole-v1", rows, REFERENCES) == (20.0, 500.0)
    assert ablation.scale("Acrobot-v1", rows, REFERENCES) == (
        -500.0,
        -90.0,
    )  # the best is not known: the best median
    assert ablation.normalised([260.0, None, 500.0], (20.0, 500.0)) == [0.5, 0.0, 1.0]


def test_the_report_has_every_row_and_a_picture_for_each_factor(ablation, tmp_path):
    rows = [
        make_row("CartPole-v1", [("horizon", "16"), ("surrogate", "ppo")], [480.0, 490.0, 500.0], True),
        make_row("CartPole-v1", [("horizon", "4")], [20.0, 68.0, None]),
        make_row("CartPole-v1", [("surrogate", "tpo")], [250.0, 260.0, 270.0]),
        make_row("Acrobot-v1", [("horizon", "4"), ("surrogate", "ppo")], [-100.0, -90.0, -80.0], True),
    ]
    ablation.report(rows, tmp_path)
    text = (tmp_path / "ablation_table.md").read_text()
    assert "| horizon H | H / 4 | -0.98 |  | -0.98 |" in text
    assert "| horizon H | H | preset | preset |  |" in text
    assert "| surrogate | tpo | -0.48 |  | -0.48 |" in text
    assert "| CartPole-v1 | horizon H | **16** | 490.00 (480.00 to 500.00) |" in text
    assert "1 of 3" in text
    drawn = {path.name for path in (tmp_path / "images").iterdir()}
    assert drawn == {"ablation_horizon.png", "ablation_surrogate.png"}


def test_no_rows_no_report(ablation, tmp_path):
    with pytest.raises(SystemExit, match="no rows"):
        ablation.report([], tmp_path)
