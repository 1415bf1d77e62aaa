"""``grpo-jax plot`` and ``grpo-jax report``: which runs are one curve, what is drawn, and the numbers of the table."""

from __future__ import annotations

import csv
import shutil
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from toys import Line, MaskedLine

import grpo_jax
from grpo_jax.cli import curves, decision, group_plots, main, plots, recorder
from grpo_jax.cli.runs import RunDirectory
from grpo_jax.spaces import Discrete
from grpo_jax.training.run import first_state

TINY = [
    "--n-envs",
    "4",
    "--n-steps",
    "16",
    "--batch-size",
    "32",
    "--horizon",
    "4",
    "--n-seeds",
    "2",
    "--no-cache",
]
CONFIG = grpo_jax.GRPOConfig(n_envs=4, n_steps=4, batch_size=16, horizon=3, gamma=0.5, net_arch=(4,))
KEY = jax.random.key(0)


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Runs of two seeds: ``a`` and ``b`` of the same settings, ``c`` of a larger learning rate; b is shorter by an iteration."""
    folder = tmp_path_factory.mktemp("runs")
    for name, *more in (("a",), ("b", "--seed", "5"), ("c", "--learning-rate", "0.01")):
        out = ["--out", str(folder / name), "--total-timesteps", "256"]
        assert main(["train", "CartPole-v1", *out, *TINY, *more]) == 0
    metrics = folder / "b" / "metrics.csv"
    metrics.write_text("".join(metrics.read_text().splitlines(keepends=True)[:-2]))
    return folder


def column(path: Path, name: str) -> np.ndarray:
    """``[n_seeds, n_iterations]``, by a reader of its own."""
    with (path / "metrics.csv").open() as file:
        rows = list(csv.DictReader(file))
    return np.array([[float(row[name]) for row in rows if row["seed"] == seed] for seed in ("0", "1")])


@pytest.fixture
def drawn(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """The figures that are written."""
    figures: list[Any] = []
    write = plots.write
    for module in (plots, group_plots):
        monkeypatch.setattr(
            module, "write", lambda figure, path: (figures.append(figure), write(figure, path))
        )
    return figures


def test_runs_of_equal_settings_are_seeds_of_one_line(runs: Path) -> None:
    lines = curves.read([runs / name for name in "abc"], ("entropy", "decision_steps"))
    assert [line.n_seeds for line in lines] == [4, 2]
    assert curves.labels(lines) == ["learning_rate=0.0025", "learning_rate=0.01"]
    expected = np.concatenate([column(runs / name, "entropy")[:, :3] for name in "ab"])
    np.testing.assert_array_equal(lines[0].metrics["entropy"], expected)
    assert lines[0].metrics["decision_steps"].tolist() == [[64, 128, 192]] * 4
    assert lines[1].metrics["entropy"].shape == (2, 4)


def test_the_same_seeds_are_not_counted_twice(runs: Path, tmp_path: Path) -> None:
    shutil.copytree(runs / "a", tmp_path / "copy")
    lines = curves.read([runs / "a", tmp_path / "copy", runs / "b"], ("entropy",))
    assert [(line.n_seeds, len(line.paths)) for line in lines] == [(4, 2), (2, 1)]
    assert curves.labels(lines) == [f"{runs / 'a'} and 1 more", str(tmp_path / "copy")]


def test_settings_of_a_sweep_are_lines(tmp_path: Path) -> None:
    sweep = ["--sweep", "learning_rate=0.001,0.01", "gamma=0.9,0.8", "--zipped", "--total-timesteps", "64"]
    assert main(["train", "CartPole-v1", "--out", str(tmp_path / "s"), *TINY, *sweep]) == 0
    lines = curves.read([tmp_path / "s"], ("entropy", curves.SECONDS))
    assert curves.labels(lines) == ["learning_rate=0.001, gamma=0.9", "learning_rate=0.01, gamma=0.8"]
    table = RunDirectory(tmp_path / "s").read_metrics(("entropy",))["entropy"]
    np.testing.assert_array_equal(np.concatenate([line.metrics["entropy"] for line in lines]), table)
    whole = {float(line.metrics[curves.SECONDS].max()) for line in lines}
    assert len(whole) == 1 and lines[0].seconds == pytest.approx(whole.pop() / 2)


def test_seconds_go_on_where_a_run_went_on(runs: Path, tmp_path: Path) -> None:
    shutil.copytree(runs / "a", tmp_path / "a")
    directory, rate = RunDirectory(tmp_path / "a"), "time/decision_steps_per_second"
    events = recorder._Events(directory, 0, 0)  # of both seeds: 128 of 256 steps a second
    events.add({rate: 256.0}, 64)
    events.add({rate: 128.0, "rollout/episode_return": 3.0}, 192)  # behind the checkpoint: it came again
    events.close()
    events = recorder._Events(directory, 11, 128)
    events.add({rate: 64.0}, 256)
    events.close()
    (line,) = curves.read([tmp_path / "a"], ("decision_steps", curves.SECONDS))
    # 0.5 s for the first 64 steps of each seed; the next file counts from step 128, and from the last time before it.
    expected = np.interp([64, 128, 192, 256], [0, 64, 256], [0.0, 0.5, 0.5 + 2 * 128 / 64])
    np.testing.assert_allclose(line.metrics[curves.SECONDS], [expected] * 2)
    assert line.seconds == pytest.approx(4.5)
    shutil.rmtree(directory.tensorboard)
    (line,) = curves.read([tmp_path / "a"], ("decision_steps", curves.SECONDS))
    assert np.isnan(line.seconds)


def test_seconds_are_those_that_the_run_told(runs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    import re

    out = runs.parent / "timed"
    assert main(["train", "CartPole-v1", "--out", str(out), "--total-timesteps", "256", *TINY]) == 0
    told = float(re.findall(r"trained in ([\d.]+) s", capsys.readouterr().out)[0])
    (line,) = curves.read([out], ("entropy", curves.SECONDS))
    assert line.seconds == pytest.approx(told, abs=0.051)


def test_curves_show_medians_and_the_middle_half(runs: Path, tmp_path: Path, drawn: list[Any]) -> None:
    arguments = [*(str(runs / name) for name in "abc"), "--out", str(tmp_path / "x.png"), "--key", "entropy"]
    assert main(["plot", *arguments, "--x", "simulator_steps", "--log-x"]) == 0
    (axes,) = drawn[0].axes
    assert axes.get_xscale() == "log" and axes.get_xlabel() == "simulator steps of each seed (log axis)"
    assert axes.get_title() == "CartPole-v1" and axes.get_ylabel().startswith("entropy\n")
    assert [text.get_text() for text in axes.get_legend().get_texts()] == [
        "learning_rate=0.0025 (4 seeds)",
        "learning_rate=0.01 (2 seeds)",
    ]
    y = np.concatenate([column(runs / name, "entropy")[:, :3] for name in "ab"])
    x = np.concatenate([column(runs / name, "simulator_steps")[:, :3] for name in "ab"])
    np.testing.assert_allclose(axes.lines[0].get_xdata(), x.mean(axis=0))
    np.testing.assert_allclose(axes.lines[0].get_ydata(), np.median(y, axis=0))
    band = axes.collections[0].get_paths()[0].vertices[:, 1]
    np.testing.assert_allclose(
        (band.min(), band.max()), (np.quantile(y, 0.25, axis=0).min(), np.quantile(y, 0.75, axis=0).max())
    )
    assert (tmp_path / "x.png").read_bytes().startswith(b"\x89PNG")
    assert main(["plot", str(runs / "c"), "--out", str(tmp_path / "x.svg")]) == 0
    assert drawn[1].axes[0].get_xlabel() == "decision steps of each seed (linear axis)"
    assert b"<svg" in (tmp_path / "x.svg").read_bytes()


def test_environments_have_panels_of_their_own(tmp_path: Path, drawn: list[Any]) -> None:
    curve = plots.Curve("x", np.arange(3.0), np.ones((2, 3)))
    panels = {f"env {i}": [curve] for i in range(5)}
    plots.curves(tmp_path / "x.png", panels, x_label="steps", log_x=True)
    assert [axes.get_title() for axes in drawn[0].axes if axes.axison] == list(panels)
    assert drawn[0].axes[0].lines[0].get_xdata().tolist() == [1.0, 2.0]  # no logarithm of 0
    with pytest.raises(ValueError, match="7 environments do not fit"):
        plots.curves(tmp_path / "y.png", {str(i): [curve] for i in range(7)}, x_label="steps")


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["plot"], "name at least one run"),
        (["report", "nowhere"], "directory=nowhere holds no run"),
        (["plot", "a", "--key", "episode_retrun"], "no column 'episode_retrun'; did you mean episode_return"),
        (["plot", "a", "--out", "x.jpg"], "out='x.jpg' must end in .png"),
        (
            ["plot", "a", "--out", "nowhere/x.png"],
            "out='nowhere/x.png' is in a directory that does not exist",
        ),
        (["plot", "a", "--group", "--map", "0", "1"], "--group and --map are two pictures"),
        (["plot", "a", "b", "--group"], "2 runs were named"),
        (["plot", "a", "--group", "--branches", "1"], "branches=1 must be at least 2"),
        (["plot", "a", "--map", "0", "4"], "numbers 0 to 3, and no 4"),
        (["report", "a", "--out", "x.txt"], "out='x.txt' must end in .md"),
    ],
)
def test_what_cannot_be_drawn(
    arguments: list[str],
    named: str,
    runs: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(runs)
    assert main(arguments) == 2
    message = capsys.readouterr().err
    assert named in message and message.startswith("error: ") and message.count("\n") == 1
    assert sorted(path.name for path in runs.iterdir()) == ["a", "b", "c"]


def test_report(runs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["report", *(str(runs / name) for name in "acb"), "--out", str(tmp_path / "report.md")]) == 0
    output = capsys.readouterr().out
    rows = [
        line.split("|")[1:-1]
        for line in (tmp_path / "report.md").read_text().splitlines()
        if line.startswith("| `")
    ]
    rows = [[cell.strip() for cell in row] for row in rows]
    returns = np.concatenate([column(runs / name, "episode_return")[:, :3] for name in "ab"])
    ours = next(row for row in rows if "/b`" in row[0])
    final = returns[:, -1]
    expected = [np.median(final), final.min(), final.max(), np.median(returns, axis=0).max()]
    assert ours[1:6] == ["4", *(f"{value:.2f}" for value in expected)]
    simulated = np.concatenate([column(runs / name, "simulator_steps")[:, :3] for name in "ab"])[:, -1]
    assert ours[6:8] == ["192", f"{np.median(simulated):,.0f}"] and float(ours[8]) > 0
    assert [row[9] for row in rows if row is not ours] == ["`learning_rate=0.01`"]
    assert [float(row[2]) for row in rows] == sorted(
        (float(row[2]) for row in rows), reverse=True
    )  # the best one first
    for row in rows:
        assert all(cell in output for cell in row[1:9])


def state_of(world: Any, config: grpo_jax.GRPOConfig = CONFIG) -> grpo_jax.TrainState:
    state: grpo_jax.TrainState = first_state(config, world, KEY)
    return state


def test_a_fan_holds_what_its_branches_earn() -> None:
    world = Line(Discrete(2), goal=4, limit=10)
    decision_state = jnp.array([2, 5], jnp.int32)
    observation = decision_state.astype(jnp.float32)
    state = state_of(world)
    fan = jax.device_get(decision.fan(state, world, CONFIG, decision_state, observation, KEY, n_branches=64))
    assert fan.action.tolist() == [0, 1] and fan.valid.all()
    assert (fan.observation[:, :, 0] == observation).all()
    assert (fan.observation[0, :, 1] == (2, 6)).all() and (fan.observation[1, :, 1] == (3, 6)).all()
    # Rewards are positions: what was earned is their sum, up to the goal.
    positions = fan.observation[..., 1:, 0]
    rewards = np.nan_to_num(positions)
    np.testing.assert_allclose(np.nanmax(fan.earned, axis=2), rewards.sum(axis=2))
    np.testing.assert_allclose(fan.returns, (rewards * 0.5 ** np.arange(3)).sum(axis=2))
    ended = (positions == 4)[..., :-1]
    assert ended.any() and np.isnan(positions[..., 1:][ended]).all()
    # By the policy's own mean, as the config asks for.
    logits = state.policy.parameters(state.learner.policy, observation[None])[0]
    weights, means = jax.nn.softmax(logits), fan.returns.mean(axis=1)
    np.testing.assert_allclose(fan.advantage, means - weights @ means, rtol=1e-4, atol=1e-5)
    # As training counts them: the library's own branches agree, up to noise.
    returns = decision.compare(
        state, world, CONFIG, decision_state[None], observation[None], KEY, n_branches=64
    )
    assert returns.shape == (1, 64, 2)
    error = np.hypot(fan.returns.std(axis=1), np.std(returns[0], axis=0)) / 8
    assert (np.abs(means - returns[0].mean(axis=0)) < 4 * error + 1e-5).all()


def test_a_fan_ends_with_the_critics_value() -> None:
    config = CONFIG.replace(horizon=1, bootstrap=True)
    world = Line(Discrete(2), goal=4, limit=10)
    state, position = state_of(world, config), jnp.array([3, 5], jnp.int32)
    fan = decision.fan(state, world, config, position, position.astype(jnp.float32), KEY, n_branches=2)
    value = state.policy.value(state.learner.policy, jnp.array([3.0, 6.0]))
    np.testing.assert_allclose(
        fan.returns, [[3 + 0.5 * value] * 2, [4.0] * 2], rtol=1e-5
    )  # the goal is an end


def test_what_is_forbidden_is_no_candidate() -> None:
    world = MaskedLine(Discrete(2), goal=4, limit=10)
    state, start = state_of(world), jnp.zeros(2, jnp.int32)
    fan = decision.fan(state, world, CONFIG, start, jnp.zeros(2), KEY, n_branches=2)
    assert fan.valid.tolist() == [False, True]
    returns = decision.compare(state, world, CONFIG, start[None], jnp.zeros((1, 2)), KEY, n_branches=2)
    assert np.isnan(returns[0, :, 0]).all() and np.isfinite(returns[0, :, 1]).all()


def test_visited_states_end_with_their_episode() -> None:
    visited = decision.visit(
        state_of(world := Line(Discrete(2), goal=9, limit=5)), world, KEY, n_episodes=3, n_steps=8
    )
    assert np.asarray(visited.alive).T.tolist() == [[True] * 5 + [False] * 3] * 3
    assert visited.observation[:5, :, 1].T.tolist() == [[0, 1, 2, 3, 4]] * 3


def test_best_actions_are_told_from_noise() -> None:
    rng = np.random.default_rng(0)
    noise, shared = rng.normal(size=(2, 16))
    forbidden = np.full(16, np.nan)
    states = [
        (shared, shared + 0.1, shared - 3),  # random numbers are shared: the difference is sure
        (shared, noise, shared - 9),
        (forbidden, shared - 1, shared),
        (forbidden, shared, forbidden),
        (shared, shared, shared),
    ]
    best, gain, is_sure = group_plots.best_actions(np.array(states).swapaxes(1, 2))
    assert best[[0, 2, 3]].tolist() == [1, 2, 1]
    assert is_sure.tolist() == [True, False, True, False, False]
    np.testing.assert_allclose(gain[[0, 2, 3, 4]], [0.1, 1.0, 0.0, 0.0], atol=1e-12)


def test_group_and_map_of_a_run(
    runs: Path, tmp_path: Path, drawn: list[Any], capsys: pytest.CaptureFixture[str]
) -> None:
    out = ["--out", str(tmp_path / "x.png"), "--branches", "4"]
    assert main(["plot", str(runs / "a"), *out, "--group", "--step", "2", "--dimension", "2"]) == 0
    assert "action 0: return" in capsys.readouterr().out
    branches, bars = drawn[0].axes
    assert len(branches.lines) == 8 and branches.get_ylabel() == "observation[2]"
    assert len(branches.lines[0].get_xdata()) == 5  # --horizon 4, and the decision state
    assert len(bars.patches) == 2
    assert main(["plot", str(runs / "a"), *out, "--group", "--step", "499"]) == 2
    assert "choose a smaller --step" in capsys.readouterr().err
    assert main(["plot", str(runs / "a"), *out, "--map", "2", "3"]) == 0
    assert " visited states have an action" in capsys.readouterr().out
    assert drawn[1].axes[0].get_xlabel() == "observation[2] (linear axis)"
