"""The benchmark's report, on made-up rows."""

import importlib
import json
import math
import pathlib
import re
import sys
from typing import Any

import numpy as np
import pytest

import grpo_jax

BENCHMARKS = pathlib.Path(__file__).parents[1] / "benchmarks"
sys.path.insert(0, str(BENCHMARKS))
try:
    scores, sections, plots, report = map(importlib.import_module, ("scores", "sections", "plots", "report"))
finally:
    sys.path.remove(str(BENCHMARKS))

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
        "settings": "preset" if library == "grpo_jax" else "RL Zoo's",
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
    line = cells(sections.scores_section(rows, REFERENCES), "CartPole-v1")
    assert line[1:5] == ["20.0", "500", "-", "475"]
    assert line[5:] == ["**480 (300 to 490)**", "410 (400 to 420)", "yes", "ours (they overlap)"]


def test_a_row_where_ppo_wins_stays_and_is_marked():
    rows = [make_row(final=300.0), make_row("sb3", final=450.0)]
    text = sections.scores_section(rows, REFERENCES)
    assert cells(text, "CartPole-v1")[5:] == ["300", "**450**", "no", "◄ SB3 PPO"]
    assert "(1 of 1)" in text
    level = sections.scores_section([make_row(final=497.0), make_row("sb3", final=500.0)], REFERENCES)
    assert cells(level, "CartPole-v1")[5:] == ["**497**", "**500**", "yes", "level"]


def test_missing_peers_leave_a_dash():
    rows = [make_row(), make_row("sb3"), make_row(env="Acrobot-v1", final=-80.0), make_row(env="Unknown-v0")]
    text = sections.scores_section(rows, REFERENCES)
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
        expected = scores.NEVER if k is None else (1000 * k, 5000 * k, 1.0 * k, 5.0 + k)
        assert scores.reached(row, 475, evaluations) == expected


def test_a_seed_that_never_gets_there_counts_as_infinite():
    rows = [make_row(seed=0), make_row(seed=1, returns=(500.0, 500.0)), make_row(seed=2, returns=(9.0, 9.0))]
    rows += [make_row("sb3", seed=seed, returns=(9.0, 9.0)) for seed in range(2)]
    text = sections.time_section(rows, REFERENCES)
    assert cells(text, "CartPole-v1", "grpo_jax", "cold")[3:9] == [
        "475",
        "2 of 3",
        "2,000 (1,000 to never)",
        "10,000 (5,000 to never)",
        "2.00 (1.00 to never)",
        "7.00 (6.00 to never)",
    ]
    assert cells(text, "CartPole-v1", "SB3 PPO", "cold")[4:9] == ["0 of 2", *["never"] * 4]
    assert scores.median([1.0, math.inf]) == math.inf


def test_cold_and_warm_caches_are_apart_in_the_times_and_one_run_in_the_scores():
    rows = [make_row(cache="warm", compile_seconds=0.5, final=470.0), make_row(cache="cold", final=480.0)]
    text = sections.time_section(rows, REFERENCES)
    assert cells(text, "CartPole-v1", "grpo_jax", "cold")[8] == "7.00"
    assert cells(text, "CartPole-v1", "grpo_jax", "warm")[8] == "3.50"
    (row,) = scores.one_row_a_seed(rows)
    assert row["cache"] == "cold"


def test_compiling_that_cannot_be_told_apart_is_within_training():
    row = make_row("sbx", compile_seconds=None)
    assert scores.reached(row, 475).total == 1.0 + 2.0
    assert cells(sections.costs_section([row], REFERENCES), "CartPole-v1", "SBX PPO")[8] == "within training"


def test_a_run_that_ends_in_nan_is_shown_and_counts_as_the_worst():
    broken = make_row(seed=1, nonfinite=True, final_returns=[480.0, float("nan")])
    rows = [make_row(seed=0), broken, make_row(seed=2, final=490.0)]
    text = sections.scores_section(rows, REFERENCES)
    assert cells(text, "CartPole-v1")[5] == "**480 (NaN to 490)** ‡ 1 of 3 non-finite"
    assert "Non-finite: grpo_jax on CartPole-v1, seed 1." in sections.provenance_section(rows)
    (found,) = scores.normalised("grpo_jax", ["CartPole-v1"], rows, REFERENCES)
    np.testing.assert_allclose(found, [460 / 480, 0.0, 470 / 480])


def test_interquartile_mean_by_hand():
    # Of eight scores two go at each end: (2 + 3 + 4 + 5) / 4. Of five, one: (2 + 3 + 4) / 3.
    assert scores.interquartile_mean(np.array([7.0, 0.0, 5.0, 3.0, 2.0, 4.0, 100.0, -9.0])) == 3.5
    np.testing.assert_array_equal(
        scores.interquartile_mean(np.array([[9.0, 1.0, 2.0, 3.0, 4.0], [0.0, 0.0, 0.0, 3.0, -math.inf]])),
        [3.0, 0.0],
    )
    assert scores.interquartile_mean(np.array([1.0, 2.0])) == 1.5


def test_from_five_seeds_on_the_interquartile_mean_stands_for_them():
    values = [10.0, 20.0, 30.0, 40.0, 500.0]
    found = scores.middle(values)
    assert found.value == 30.0 and found.n == 5
    assert 10.0 <= found.low < 30.0 < found.high <= 500.0  # the mean of three draws, all of one value at most
    assert scores.middle(values[1:]) == (35.0, 20.0, 500.0, 4)
    row = [make_row(seed=seed, final=value) for seed, value in enumerate(values)]
    line = cells(sections.scores_section(row, REFERENCES), "CartPole-v1")
    assert re.fullmatch(r"\*\*30\.0 \[\d+\.?\d*, \d+\.?\d*\]\*\*", line[5])
    # One broken seed of five is cut off like the lowest; its interval knows of it. Two of five are not cut off.
    assert scores.middle([-math.inf, *values[1:]])[:2] == (30.0, -math.inf)
    assert scores.middle([-math.inf, -math.inf, *values[2:]]).value == -math.inf


def test_the_bootstrap_draws_within_an_environment():
    # Without a spread within the environments there is no interval, however far apart they are.
    assert scores.bootstrap_interval([np.zeros(3), np.ones(3)], 50) == (0.5, 0.5, 0.5)
    # Two seeds of one environment: a draw is 0, 1/2 or 1, so the 95% interval is all of [0, 1].
    assert scores.bootstrap_interval([np.array([0.0, 1.0])], 500) == (0.5, 0.0, 1.0)


def test_comparisons_take_what_both_ran_and_what_can_be_learned():
    rows = [make_row(library, final=final) for library, final in (("grpo_jax", 500.0), ("sb3", 260.0))]
    rows += [make_row(library, "SimpleBandit-bsuite", final=0.5) for library in ("grpo_jax", "sb3")]
    rows += [make_row(env="Acrobot-v1", final=-80.0), make_row("rejax", "Acrobot-v1", final=-290.0)]
    sb3, rejax = scores.compare(rows, REFERENCES)
    assert (sb3.envs, sb3.ours[0], sb3.theirs[0]) == (["CartPole-v1"], 1.0, 0.5)
    # No best score is known: the best median stands for it.
    assert (rejax.envs, rejax.ours[0], rejax.theirs[0]) == (["Acrobot-v1"], 1.0, 0.5)


def mctx_row(final=26.0, search_final=80.0, **fields):
    """A run of mctx that took 40,000 simulator steps: 8 a decision step."""
    row = make_row(
        "mctx", final=final, returns=(1.0, 2.0, 3.0, 4.0, 5.0), settings="tried on Breakout", **fields
    )
    for k, point in enumerate(row["curve"], start=1):
        point |= {"simulator_steps": 8000 * k, "search_return_mean": 10.0 * k, "search_return_std": 0.0}
    found = {"search_final_returns": [search_final - 2, search_final + 2], "search_simulator_steps_a_move": 8}
    return row | found | {"simulator_steps": 40_000}


BREAKOUT = {"Breakout-MinAtar": {"random": 0.4, "published": 28, "threshold": 30, "bound": 900}}


def test_a_run_with_a_search_plays_twice():
    bare, searching = scores.players([mctx_row(env="Breakout-MinAtar")])
    assert (bare["library"], scores.score(bare)) == ("mctx", 26.0)
    assert (searching["library"], scores.score(searching)) == ("mctx_search", 80.0)
    assert scores.reached(searching, 30)[:2] == (3000, 24_000) and scores.reached(bare, 30) == scores.NEVER
    text = sections.costs_section([bare, searching], BREAKOUT)
    assert cells(text, "Breakout-MinAtar")[1:3] == ["mctx, bare", "tried on Breakout"]
    assert "1 rows" in sections.provenance_section([bare, searching])


def test_the_summary_tells_all_costs_and_the_best_peer_by_its_settings():
    env = {"env": "Breakout-MinAtar"}
    rows = [
        make_row(final=43.0, **env),
        make_row("rejax", final=6.0, **env, settings="rejax's own for Breakout"),
    ]
    rows.append(make_row("purejaxrl", final=25.0, **env, settings="PureJaxRL's for MinAtar, fewer steps"))
    ours = ["Breakout-MinAtar", "43.0", "5,000", "25,000", "5.00", "10.0", "≤ 900", "28.0"]
    line = cells(sections.summary("Breakout-MinAtar", rows, BREAKOUT), "Breakout-MinAtar")
    assert line == [*ours, "25.0 PPO, PureJaxRL's, 5,000 steps, 5.00 s (cold 10.0)"]
    assert len(line) == len(sections.HEAD)
    # Ours is ahead of every bare policy, and a search at play is ahead of ours: marked, and told apart.
    rows += scores.players([mctx_row(**env)])
    line = cells(sections.summary("Breakout-MinAtar", rows, BREAKOUT), "Breakout-MinAtar")
    counts = "5,000 steps and 40,000 simulated, 5.00 s (cold 10.0)"
    assert line == [*ours, f"◄ 80.0 mctx with search, {counts}; 26.0 mctx, bare, {counts}"]
    text = sections.summary_section(rows, BREAKOUT)
    assert text.count("◄ 80.0") == 2 and "a peer wins 1 of 1" in text  # in the short table and in that of all
    # A bare policy that is ahead as well is marked as well; of rejax's the name of the settings is told.
    rows[1] |= {"final_returns": [60.0, 60.0]}
    line = cells(sections.summary("Breakout-MinAtar", rows, BREAKOUT), "Breakout-MinAtar")
    assert line[-1].endswith("; ◄ 60.0 rejax PPO, rejax's own for Breakout, 5,000 steps, 5.00 s (cold 10.0)")


def test_mctx_is_read_where_it_had_spent_what_ours_spends():
    env = {"env": "Breakout-MinAtar"}
    rows = [make_row(final=43.0, **env), *scores.players([mctx_row(**env)])]
    line = cells(sections.equal_section(rows, BREAKOUT), "Breakout-MinAtar")
    # 25,000 simulator steps: the third of its evaluations, at 24,000. 5 s: the fifth and last.
    assert line[1:] == ["43.0", "25,000", "5.00", "3.00", "30.0", "5.00", "50.0"]
    rows[0] |= {"simulator_steps": 7999, "cpu": rows[0]["cpu"] | {"train_seconds": 5.5}}
    line = cells(sections.equal_section(rows, BREAKOUT), "Breakout-MinAtar")
    assert line[4:] == ["-", "-", "5.00 †", "50.0 †"]
    assert "no row" in sections.equal_section([make_row()], REFERENCES)


def test_of_several_settings_the_best_are_shown():
    rows = [
        make_row("rejax", seed=seed, settings=settings, final=final)
        for settings, final in (("rejax config", 300.0), ("rejax defaults", 200.0))
        for seed in range(2)
    ]
    assert {row["settings"] for row in scores.at_best_settings(rows)} == {"rejax config"}


def test_curves_are_medians_over_seeds():
    rows = [make_row(seed=0, returns=(1.0, 2.0, 9.0)), make_row(seed=1, returns=(3.0, float("nan")))]
    expected = [[6000.0, 12000.0], [2.0, 2.0], [1.0, 2.0], [3.0, 2.0]]
    np.testing.assert_array_equal(plots.curve(rows, plots.AXES["all_steps"][1]), expected)
    assert plots.AXES["total_seconds"][1](rows[0], rows[0]["curve"][0]) == 6.0
    assert plots.curve([], plots.AXES["all_steps"][1]).shape == (4, 0)


def test_a_gpu_is_named_or_said_to_be_missing():
    machine = {"cpus": 8, "platform": "Linux", "jax_backend": "gpu", "device": "NVIDIA X", "processor": "x"}
    assert "has not run on a GPU" in sections.provenance_section([make_row()])
    text = sections.provenance_section([make_row(), make_row(seed=1, machine=machine)])
    assert "accelerator: NVIDIA X" in text and "has not run on a GPU" not in text


def test_writes_markdown_and_pictures(tmp_path):
    (tmp_path / "rows").mkdir()
    rows = [make_row(library, seed=seed) for library in ("grpo_jax", "sb3") for seed in range(2)]
    rows.append(make_row(env="Acrobot-v1", final=-80.0, returns=(-300.0,)))
    for i, row in enumerate(rows):
        (tmp_path / "rows" / f"{i}.json").write_text(json.dumps(row))
    text = report.write(scores.read(tmp_path), REFERENCES, tmp_path / "docs")
    assert (tmp_path / "docs" / "benchmark_table.md").read_text() == text
    pictures = {f"images/{path.name}" for path in (tmp_path / "docs" / "images").glob("bench_*.png")}
    assert pictures == set(re.findall(r"\]\((images/[^)]*)\)", text)) and len(pictures) == 5
    for section in re.split(r"\n## ", text):
        widths = {line.count(" | ") for line in section.splitlines() if line.startswith("| ")}
        assert len(widths) <= 1
    with pytest.raises(SystemExit, match="no rows"):
        report.write([], REFERENCES, tmp_path)


def test_curves_are_drawn_in_pages(tmp_path):
    envs = list(scores.read_references())[:7]
    rows = [make_row(env=env) for env in envs]
    wall = tmp_path / "bench_train_seconds.png"
    wall.touch()
    (tmp_path / "bench_train_seconds_3.png").touch()
    pages = plots.draw_curves("train_seconds", rows, scores.read_references(), tmp_path)
    assert [page.name for page in pages] == ["bench_train_seconds_1.png", "bench_train_seconds_2.png"]
    assert sorted(tmp_path.iterdir()) == pages
    assert [len(part) for part in plots.batched(range(25), plots.PANELS)] == [5, 5, 5, 5, 5]


def test_pages_are_refreshed_line_by_line():
    rows = [make_row(final=400.0), make_row("sb3", final=300.0), make_row("sbx", final=500.0)]
    line = "| CartPole-v1 | 1 | 2 | 3 | 4 | 5 | 6 | 7 | 8 |"
    others = ["# CartPole-v1", "| CartPole-v1 | of another table |", line.replace("CartPole", "Acrobot"), ""]
    new, *kept = report.refresh("\n".join([line, *others]), rows, REFERENCES).split("\n")
    assert kept == others
    assert new == sections.summary("CartPole-v1", rows, REFERENCES) and "500 SBX PPO" in new


def test_references_know_every_environment():
    references = scores.read_references()
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
    assert scores.read_references()["FrozenLake-misc"]["best"] == pytest.approx(limited[0], abs=5e-4)
