"""Sweeps on the command line, in this process, on tiny runs."""

from __future__ import annotations

import csv
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

import grpo_jax
from grpo_jax.cli import main, sweeps
from grpo_jax.cli.flags import swept
from grpo_jax.cli.runs import Run, RunDirectory
from tests.test_cli import assert_refused, compile_once, interrupted_after, parameters, train  # noqa: F401  (a fixture among them)

RATES = ("--sweep", "learning_rate=1e-3,1e-2", "--n-seeds", "2")
BOTH = ("--sweep", "learning_rate=1e-3,1e-2", "horizon=8,4", "--n-seeds", "2")


def table(out: Path) -> list[dict[str, str]]:
    return list(csv.DictReader((out / "sweep.csv").read_text().splitlines()))


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One program that nothing disturbed: two settings, two seeds, four iterations."""
    out = tmp_path_factory.mktemp("sweep") / "run"
    assert train(out, *RATES) == 0
    return out


def test_a_sweep_leaves_a_table_a_picture_and_the_best_config(finished: Path) -> None:
    rows = table(finished)
    assert [row["learning_rate"] for row in rows] == ["0.001", "0.01"]
    assert {row["program"] for row in rows} == {"."} and {row["failed"] for row in rows} == {"0"}
    best = max(rows, key=lambda row: float(row["score"]))
    config = grpo_jax.GRPOConfig.from_json((finished / "best_config.json").read_text())
    assert config == RunDirectory(finished).read().config.replace(learning_rate=float(best["learning_rate"]))
    assert (finished / "sweep.png").read_bytes().startswith(b"\x89PNG")
    assert not (finished / "best.msgpack").exists()


def test_the_sweep_is_that_of_the_library(finished: Path) -> None:
    run = RunDirectory(finished).read()
    result = grpo_jax.sweep(
        run.config, grpo_jax.make(run.env), jax.random.key(0), 256, n_seeds=2, learning_rate=[1e-3, 1e-2]
    )
    lines = (finished / "metrics.csv").read_text().splitlines()
    assert lines[0].split(",")[:4] == ["setting", "seed", "iteration", "decision_steps"]
    assert [line.split(",")[:3] for line in lines[1:6]] == [
        ["0", "0", "1"],
        ["0", "1", "1"],
        ["1", "0", "1"],
        ["1", "1", "1"],
        ["0", "0", "2"],
    ]
    columns = RunDirectory(finished).read_metrics(("entropy",))
    np.testing.assert_allclose(columns["entropy"].reshape(2, 2, 4), result.metrics["entropy"], rtol=1e-5)
    np.testing.assert_allclose([float(row["score"]) for row in table(finished)], result.scores, rtol=1e-5)


def test_the_best_setting_trains_on(finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Run] = []
    monkeypatch.setattr("grpo_jax.cli.commands._go_on", lambda directory, run, *_: seen.append(run) or 0)
    best = str(finished / "best_config.json")
    options = ["--out", str(tmp_path / "a"), "--from-config", best, "--no-cache"]
    assert main(["train", "CartPole-v1", *options]) == 0
    assert (
        main(["train", "--from-config", best, "CartPole-v1", "--out", str(tmp_path / "b"), "--gamma", "0.5"])
        == 0
    )
    config = grpo_jax.GRPOConfig.from_json(Path(best).read_text())
    assert [run.config for run in seen] == [config, config.replace(gamma=0.5)]
    assert seen[0].total_timesteps == grpo_jax.preset_timesteps("CartPole-v1")


def test_evaluate_plays_the_best_setting(finished: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["evaluate", str(finished), "--n-episodes", "4", "--no-cache"]) == 0
    output = capsys.readouterr().out
    best = max(table(finished), key=lambda row: float(row["score"]))
    assert f"the best setting: learning_rate={best['learning_rate']}" in output
    assert "4 sampled episodes of each seed" in output and "seed 1" in output and "seed 2" not in output


@pytest.mark.parametrize("options", [RATES, BOTH], ids=["one program", "two programs"])
def test_ctrl_c_and_resume_end_like_an_undisturbed_sweep(
    options: tuple[str, ...],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    assert train(whole, *options) == 0
    with monkeypatch.context() as patch:
        interrupted_after(patch, 2)
        assert train(parts, *options) == 130
    assert f"grpo-jax resume {parts}" in capsys.readouterr().out
    assert not (parts / "sweep.csv").exists() and not (parts / "program_2").exists()
    assert main(["evaluate", str(parts), "--no-cache"]) == 2
    assert f"go on by `grpo-jax resume {parts}`" in capsys.readouterr().err
    # A killed sweep has rows behind its checkpoint, and a half-written last one.
    first = next(parts.rglob("metrics.csv"))
    rows = (whole / first.relative_to(parts)).read_text().splitlines()
    first.write_text(first.read_text() + rows[-1] + "\n0,0,4,25")
    assert main(["resume", str(parts), "--no-cache"]) == 0
    names = [
        "sweep.csv",
        "best_config.json",
        *(str(path.relative_to(whole)) for path in whole.rglob("metrics.csv")),
    ]
    assert len(names) == (3 if options is RATES else 4)
    for name in names:
        assert (parts / name).read_bytes() == (whole / name).read_bytes(), name
    for path in whole.rglob("policy.msgpack"):
        assert (parts / path.relative_to(whole)).read_bytes() == path.read_bytes()


def test_fields_that_shape_a_program_have_directories_of_their_own(tmp_path: Path) -> None:
    assert train(tmp_path / "all", *BOTH) == 0
    rows = table(tmp_path / "all")
    assert [(row["learning_rate"], row["horizon"], row["program"]) for row in rows] == [
        ("0.001", "8", "program_1"),
        ("0.001", "4", "program_2"),
        ("0.01", "8", "program_1"),
        ("0.01", "4", "program_2"),
    ]
    second = RunDirectory(tmp_path / "all" / "program_2")
    assert [setting["horizon"] for setting in second.read().settings] == [4, 4]
    # A program is a sweep by itself, and nothing but that.
    assert train(tmp_path / "alone", *RATES, "--horizon", "4") == 0
    assert second.metrics.read_bytes() == (tmp_path / "alone" / "metrics.csv").read_bytes()
    assert main(["evaluate", str(tmp_path / "all"), "--n-episodes", "2", "--no-cache"]) == 0
    assert train(tmp_path / "all", *RATES) == 2
    assert train(tmp_path / "all", *RATES, "--overwrite") == 0
    assert not second.path.exists()


def test_what_diverges_is_named_and_never_the_best(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ("--sweep", "learning_rate=1e38,1e-3", "--n-seeds", "2", "--checkpoint-every", "1")
    assert train(tmp_path / "some", *command) == 0
    captured = capsys.readouterr()
    message = " ".join(captured.err.split())
    assert (
        "learning_rate=1e+38: numbers became NaN or inf in iteration 1 of seed 0, iteration 1 of seed 1;"
        in message
    )
    assert "encountered" not in message  # no complaint of NumPy's about what is infinite
    assert [row["failed"] for row in table(tmp_path / "some")] == ["2", "0"]
    assert '"learning_rate": 0.001' in (tmp_path / "some" / "best_config.json").read_text()
    assert main(["resume", str(tmp_path / "some"), "--no-cache"]) == 0
    assert table(tmp_path / "some")[0]["score"] == "-inf"
    capsys.readouterr()
    assert train(tmp_path / "all", "--sweep", "learning_rate=1e38") == 1
    assert "no setting has a score" in " ".join(capsys.readouterr().err.split())
    assert not (tmp_path / "all" / "best_config.json").exists()


def test_a_sweep_is_made_longer(finished: Path, tmp_path: Path) -> None:
    assert train(tmp_path, *RATES, total=128) == 0
    assert main(["resume", str(tmp_path), "--total-timesteps", "256", "--no-cache"]) == 0
    assert len((tmp_path / "metrics.csv").read_text().splitlines()) == 1 + 4 * 4
    assert int(parameters(tmp_path).iteration.min()) == 4


@pytest.mark.parametrize(
    ("argument", "field", "values"),
    [
        ("learning-rate=1e-4,3", "learning_rate", [1e-4, 3]),
        ("baseline=policy,mean", "baseline", ["policy", "mean"]),
        ("kl_coef=None,0.1", "kl_coef", [None, 0.1]),
        ("net_arch=(64,64),(32,)", "net_arch", [(64, 64), (32,)]),
        ("bootstrap=True,False", "bootstrap", [True, False]),
        ("gamma=0.9", "gamma", [0.9]),
    ],
)
def test_values_are_read_as_they_are_written(argument: str, field: str, values: list[Any]) -> None:
    assert swept([argument]) == {field: values}


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["--sweep", "learning_rate"], "--sweep 'learning_rate' must be a field and its values"),
        (["--sweep", "gamma=0.9", "gamma=0.8"], "each field once"),
        (["--sweep", "learning_rates=1e-3"], "did you mean learning_rate?"),
        (["--sweep", "gamma=0.9,1.5"], "gamma=1.5 must be finite"),
        (["--sweep", "gamma=0.9,", "horizon=0"], "horizon=0 must be an integer"),
        (["--sweep", "gamma=0.9", "horizon=4,8", "--zipped"], "1 of gamma, 2 of horizon"),
        (["--sweep", "network=mlp,cnn"], "network='cnn'"),
        (["--from-config", "nowhere.json"], "nowhere.json"),
        (["--from-config", "words.json"], "holds no settings"),
        (["--from-config", "other.json"], "has no field env"),
    ],
)
def test_bad_input_is_one_line_and_writes_nothing(
    arguments: list[str],
    named: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "words.json").write_text("words")
    (tmp_path / "other.json").write_text('{"env": "CartPole-v1"}')
    assert_refused(["train", "CartPole-v1", *arguments], named, capsys)
    assert len(list(tmp_path.iterdir())) == 2


def test_settings_survive_the_file_that_holds_them() -> None:
    settings = ({"net_arch": (8, 8), "gamma": 0.5}, {"net_arch": None, "gamma": 1.0})
    run = Run("CartPole-v1", grpo_jax.GRPOConfig(), 0, 2, 100, settings=settings)
    assert Run.from_json(run.to_json()) == (run, True)
    assert run.vmapped == run.n_agents == 4 and len(run.programs()) == 2
    plain = Run("CartPole-v1", grpo_jax.GRPOConfig(), 0, 1, 100)
    assert "settings" not in plain.to_json() and Run.from_json(plain.to_json()) == (plain, True)
    with pytest.raises(ValueError, match="a sweep of 1001 settings is more than 1000"):
        Run("CartPole-v1", grpo_jax.GRPOConfig(), 0, 2, 100, settings=({"gamma": 0.5},) * 1001)
    with pytest.raises(TypeError, match="no field gama"):
        Run("CartPole-v1", grpo_jax.GRPOConfig(), 0, 2, 100, settings=({"gama": 0.5},))


def test_a_program_of_another_sweep_is_not_touched(tmp_path: Path) -> None:
    run = Run("CartPole-v1", grpo_jax.GRPOConfig(), 0, 2, 100, settings=({"gamma": 0.5},))
    child = RunDirectory(tmp_path)
    child.create(run)
    sweeps.prepare(child, Run("CartPole-v1", grpo_jax.GRPOConfig(), 0, 2, 900, settings=({"gamma": 0.5},)))
    with pytest.raises(ValueError, match="holds another run"):
        sweeps.prepare(
            child, Run("CartPole-v1", grpo_jax.GRPOConfig(), 0, 2, 100, settings=({"gamma": 0.6},))
        )
