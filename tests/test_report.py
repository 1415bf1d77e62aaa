"""The benchmark's report, on made-up rows."""

import importlib.util
import json
import math
import pathlib
import re
from typing import Any

import numpy as np
import pytest

import grpo_jax

PATH = pathlib.Path(__file__).parents[1] / "benchmarks" / "report.py"
SPEC = importlib.util.spec_from_file_location("benchmark_report", PATH)
assert SPEC is not None and SPEC.loader is not None
report = importlib.util.module_from_spec(SPEC)
SPEC.loader.exec_module(report)

REFERENCES = {
    "CartPole-v1": {
        "random": 20.0,
        "best": 500,
        "target": 475,
        "threshold": 475,
        "how": "every step pays 1.",
    },
    "Acrobot-v1": {"random": -500.0, "target": -85, "threshold": -85},
    "SimpleBandit-bsuite": {"random": 0.5, "best": 0.5, "aggregate": False},
}


def make_row(
    library: str = "grpo_jax",
    env: str = "CartPole-v1",
    seed: int = 0,
    final: float = 480.0,
    returns: tuple[float, ...] = (100.0, 480.0, 470.0, 490.0, 500.0),
    **fields: Any,
) -> dict[str, Any]:
    """A run with an evaluation every 1,000 decision steps and CPU second; import takes 1 s, compiling 4 s."""
    curve = [
        {
            "decision_steps": 1000 * k,
            "simulator_steps": 5000 * k if library == "grpo_jax" else 0,
            "train_seconds": 2.0 * k,
            "train_cpu_seconds": 1.0 * k,
            "return_mean": value,
            "return_std": 0.0,
        }
        for k, value in enumerate(returns, start=1)
    ]
    compiling = fields.pop("compile_seconds", 4.0)
    times = {
        "import_seconds": 1.0,
        "compile_seconds": compiling,
        "train_seconds": 5.0,
        "evaluate_seconds": 0.5,
    }
    row = {
        "library": library,
        "env": env,
        "seed": seed,
        "settings": "preset" if library == "grpo_jax" else "RL Zoo",
        "cache": "cold",
        "total_timesteps": 5000,
        "decision_steps": 5000,
        "simulator_steps": curve[-1]["simulator_steps"],
        "versions": {"jax": "0.10.2"},
        "machine": {"cpus": 2, "platform": "Linux", "jax_backend": "cpu", "device": "cpu", "processor": "x"},
        **times,
        "cpu": times,
        "peak_memory_mb": 300.0,
        "config": {},
        "curve": curve,
        "final_returns": [final - 1, final + 1],
        "nonfinite": False,
    }
    return {**row, **fields}


def cells(text: str, *starts: str) -> list[str]:
    """Cells of the one table line that begins with these."""
    lines = [re.split(r" \| ", line.strip("| ")) for line in text.splitlines() if line.startswith("| ")]
    (found,) = [line for line in lines if tuple(line[: len(starts)]) == starts]
    return found


def test_a_score_is_the_median_of_the_seeds_means():
    rows = [make_row(seed=seed, final=final) for seed, final in enumerate((480.0, 300.0, 490.0))]
    rows += [make_row("sb3", seed=seed, final=final) for seed, final in enumerate((400.0, 420.0))]
    line = cells(report.scores_section(rows, REFERENCES), "CartPole-v1")
    assert line[1:5] == ["20.0", "500", "-", "475"]
    assert line[5:] == ["**480 (300 to 490)**", "410 (400 to 420)", "yes", "ours (ranges overlap)"]


def test_a_row_where_ppo_wins_stays_and_is_marked():
    rows = [make_row(final=300.0), make_row("sb3", final=450.0)]
    text = report.scores_section(rows, REFERENCES)
    assert cells(text, "CartPole-v1")[5:] == ["300", "**450**", "no", "◄ SB3 PPO"]
    assert "(1 of 1)" in text
    level = report.scores_section([make_row(final=497.0), make_row("sb3", final=500.0)], REFERENCES)
    assert cells(level, "CartPole-v1")[5:] == ["**497**", "**500**", "yes", "level"]


def test_missing_peers_leave_a_dash():
    rows = [make_row(), make_row("sb3"), make_row(env="Acrobot-v1", final=-80.0), make_row(env="Unknown-v0")]
    text = report.scores_section(rows, REFERENCES)
    assert cells(text, "Acrobot-v1")[5:] == ["**-80.0**", "-", "yes", "one library"]
    assert cells(text, "Unknown-v0")[1:7] == ["-", "unknown", "-", "-", "**480**", "-"]
    assert cells(text, "Acrobot-v1")[2] == "unknown"


@pytest.mark.parametrize(
    ("returns", "first", "stays"),
    [
        ((100.0, 480.0, 470.0, 490.0, 500.0), 2, 4),
        ((475.0, 475.0), 1, 1),
        ((100.0, 474.9, 480.0), 3, None),
        ((100.0, float("nan"), 200.0), None, None),
        ((), None, None),
    ],
)
def test_time_to_a_threshold(returns, first, stays):
    row = make_row(returns=returns) if returns else make_row(curve=[])
    for evaluations, k in ((1, first), (2, stays)):
        expected = report.NEVER if k is None else (1000 * k, 5000 * k, 1.0 * k, 5.0 + k)
        assert report.reached(row, 475, evaluations) == expected


def test_a_seed_that_never_gets_there_counts_as_infinite():
    rows = [make_row(seed=0), make_row(seed=1, returns=(500.0, 500.0)), make_row(seed=2, returns=(9.0, 9.0))]
    rows += [make_row("sb3", seed=seed, returns=(9.0, 9.0)) for seed in range(2)]
    text = report.time_section(rows, REFERENCES)
    assert cells(text, "CartPole-v1", "grpo_jax", "cold")[3:8] == [
        "475",
        "2 of 3",
        "2,000 (1,000 to never)",
        "2.00 (1.00 to never)",
        "7.00 (6.00 to never)",
    ]
    assert cells(text, "CartPole-v1", "SB3 PPO", "cold")[4:8] == ["0 of 2", "never", "never", "never"]
    assert report.median([1.0, math.inf]) == math.inf


def test_cold_and_warm_caches_are_apart_in_the_times_and_one_run_in_the_scores():
    rows = [make_row(cache="warm", compile_seconds=0.5, final=470.0), make_row(cache="cold", final=480.0)]
    text = report.time_section(rows, REFERENCES)
    assert cells(text, "CartPole-v1", "grpo_jax", "cold")[7] == "7.00"
    assert cells(text, "CartPole-v1", "grpo_jax", "warm")[7] == "3.50"
    (row,) = report.one_row_a_seed(rows)
    assert row["cache"] == "cold"


def test_compiling_that_cannot_be_told_apart_is_within_training():
    row = make_row("sbx", compile_seconds=None)
    assert report.reached(row, 475).total == 1.0 + 2.0
    assert cells(report.costs_section([row], REFERENCES), "CartPole-v1", "SBX PPO")[8] == "within training"


def test_a_run_that_ends_in_nan_is_shown_and_counts_as_the_worst():
    broken = make_row(seed=1, nonfinite=True, final_returns=[480.0, float("nan")])
    rows = [make_row(seed=0), broken, make_row(seed=2, final=490.0)]
    text = report.scores_section(rows, REFERENCES)
    assert cells(text, "CartPole-v1")[5] == "**480 (NaN to 490)** ‡ 1 of 3 non-finite"
    assert "Non-finite: grpo_jax on CartPole-v1, seed 1." in report.provenance_section(rows)
    (scores,) = report.normalised("grpo_jax", ["CartPole-v1"], rows, REFERENCES)
    np.testing.assert_allclose(scores, [460 / 480, 0.0, 470 / 480])


def test_interquartile_mean_by_hand():
    # Of eight scores two go at each end: (2 + 3 + 4 + 5) / 4. Of five, one: (2 + 3 + 4) / 3.
    assert report.interquartile_mean(np.array([[7.0, 0.0, 5.0, 3.0], [2.0, 4.0, 100.0, -9.0]])) == 3.5
    assert report.interquartile_mean(np.array([9.0, 1.0, 2.0, 3.0, 4.0])) == 3.0
    assert report.interquartile_mean(np.array([1.0, 2.0])) == 1.5


def test_the_bootstrap_draws_within_an_environment():
    # Without a spread within the environments there is no interval, however far apart they are.
    assert report.bootstrap_interval([np.zeros(3), np.ones(3)], 50) == (0.5, 0.5, 0.5)
    # Two seeds of one environment: a draw is 0, 1/2 or 1, so the 95% interval is all of [0, 1].
    assert report.bootstrap_interval([np.array([0.0, 1.0])], 500) == (0.5, 0.0, 1.0)


def test_comparisons_take_what_both_ran_and_what_can_be_learned():
    rows = [make_row(library, final=final) for library, final in (("grpo_jax", 500.0), ("sb3", 260.0))]
    rows += [make_row(library, "SimpleBandit-bsuite", final=0.5) for library in ("grpo_jax", "sb3")]
    rows += [make_row(env="Acrobot-v1", final=-80.0), make_row("rejax", "Acrobot-v1", final=-290.0)]
    sb3, rejax = report.compare(rows, REFERENCES)
    assert (sb3.envs, sb3.ours[0], sb3.theirs[0]) == (["CartPole-v1"], 1.0, 0.5)
    # No best score is known: the best median stands for it.
    assert (rejax.envs, rejax.ours[0], rejax.theirs[0]) == (["Acrobot-v1"], 1.0, 0.5)


def test_of_several_settings_the_best_are_shown():
    rows = [
        make_row("rejax", seed=seed, settings=settings, final=final)
        for settings, final in (("rejax config", 300.0), ("rejax defaults", 200.0))
        for seed in range(2)
    ]
    assert {row["settings"] for row in report.at_best_settings(rows)} == {"rejax config"}


def test_curves_are_medians_over_seeds():
    rows = [make_row(seed=0, returns=(1.0, 2.0, 9.0)), make_row(seed=1, returns=(3.0, float("nan")))]
    expected = [[6000.0, 12000.0], [2.0, 2.0], [1.0, 2.0], [3.0, 2.0]]
    np.testing.assert_array_equal(report.curve(rows, report.AXES["all_steps"][1]), expected)
    assert report.AXES["total_seconds"][1](rows[0], rows[0]["curve"][0]) == 6.0
    assert report.curve([], report.AXES["all_steps"][1]).shape == (4, 0)


def test_a_gpu_is_named_or_said_to_be_missing():
    machine = {"cpus": 8, "platform": "Linux", "jax_backend": "gpu", "device": "NVIDIA X", "processor": "x"}
    assert "has not run on a GPU" in report.provenance_section([make_row()])
    text = report.provenance_section([make_row(), make_row(seed=1, machine=machine)])
    assert "accelerator: NVIDIA X" in text and "has not run on a GPU" not in text


def test_writes_markdown_and_pictures(tmp_path):
    (tmp_path / "rows").mkdir()
    rows = [make_row(library, seed=seed) for library in ("grpo_jax", "sb3") for seed in range(2)]
    rows.append(make_row(env="Acrobot-v1", final=-80.0, returns=(-300.0,)))
    for i, row in enumerate(rows):
        (tmp_path / "rows" / f"{i}.json").write_text(json.dumps(row))
    text = report.write(report.read(tmp_path), REFERENCES, tmp_path / "docs")
    assert (tmp_path / "docs" / "benchmark_table.md").read_text() == text
    pictures = {f"images/{path.name}" for path in (tmp_path / "docs" / "images").glob("bench_*.png")}
    assert pictures == set(re.findall(r"\]\((images/[^)]*)\)", text)) and len(pictures) == 5
    for section in re.split(r"\n## ", text):
        widths = {line.count(" | ") for line in section.splitlines() if line.startswith("| ")}
        assert len(widths) <= 1
    with pytest.raises(SystemExit, match="no rows"):
        report.write([], REFERENCES, tmp_path)


def test_pages_are_refreshed_line_by_line():
    rows = [make_row(final=400.0), make_row("sb3", final=300.0), make_row("sbx", final=500.0)]
    line = "| CartPole-v1 | 1 | 2 | 3 | 4 | 5 |"
    others = ["# CartPole-v1", "| CartPole-v1 | of another table |", "| Acrobot-v1 | 1 | 2 | 3 | 4 | 5 |", ""]
    new, *kept = report.refresh("\n".join([line, *others]), rows, REFERENCES).split("\n")
    assert kept == others
    row = rows[0]
    seconds, steps = row["cpu"]["train_seconds"], f"{row['decision_steps']:,}"
    assert (
        new
        == f"| CartPole-v1 | 400 | {steps} | {seconds:.2f} | 500 | 500 SBX PPO, {steps} steps, {seconds:.2f} s |"
    )


def test_references_know_every_environment():
    references = report.read_references()
    assert set(references) == set(grpo_jax.env_ids())
    for known in references.values():
        assert known["how"] and math.isfinite(known["random"])
        top = known.get("best", known.get("bound", math.inf))
        if known.get("aggregate", True):
            assert known["random"] < top and known.get("threshold", -math.inf) < top


def test_best_score_of_frozen_lake_is_that_of_value_iteration():
    """16 states, four actions, two thirds of them slip to the side; a policy that does not know the time."""
    tiles = "SFFFFHFHFFFHHFFG"
    moves = ((0, -1), (1, 0), (0, 1), (-1, 0))
    transition, reward = np.zeros((16, 4, 16)), np.zeros((16, 4))
    for state in (s for s in range(16) if tiles[s] in "SF"):
        for action in range(4):
            for slip in (-1, 0, 1):
                row, column = np.add(divmod(state, 4), moves[(action + slip) % 4]).clip(0, 3)
                transition[state, action, 4 * row + column] += 1 / 3
                reward[state, action] += (tiles[4 * row + column] == "G") / 3
    value = np.zeros(16)
    for _ in range(2000):
        value = (reward + transition @ value).max(1)
    states, policy = np.arange(16), (reward + transition @ value).argmax(1)
    limited = np.zeros(16)
    for _ in range(100):
        limited = reward[states, policy] + transition[states, policy] @ limited
    assert report.read_references()["FrozenLake-misc"]["best"] == pytest.approx(limited[0], abs=5e-4)
