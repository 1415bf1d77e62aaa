"""The command line, in this process, on tiny runs."""

from __future__ import annotations

import dataclasses
import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

import grpo_jax
from grpo_jax.cli import main, recorder, render, runs
from grpo_jax.cli.runs import RunDirectory
from grpo_jax.training.checkpoint import restore_like

TINY = ["--n-envs", "4", "--n-steps", "16", "--batch-size", "32", "--horizon", "8", "--no-cache"]
"""64 decision states an iteration."""


def assert_refused(arguments: list[str], named: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*arguments, "--no-cache"]) == 2
    message = capsys.readouterr().err
    assert message.startswith("error: ") and named in message and message.count("\n") == 1


def train(out: Path, *arguments: str, total: int = 256) -> int:
    return main(
        ["train", "CartPole-v1", "--out", str(out), "--total-timesteps", str(total), *TINY, *arguments]
    )


def parameters(out: Path) -> Any:
    directory = RunDirectory(out)
    _, state = directory.restore(directory.read())
    assert state is not None
    return jax.tree.map(lambda leaf: jax.random.key_data(leaf) if _is_key(leaf) else leaf, state)


def _is_key(leaf: jax.Array) -> bool:
    return bool(jax.numpy.issubdtype(leaf.dtype, jax.dtypes.prng_key))


def interrupted_after(monkeypatch: pytest.MonkeyPatch, iterations: int) -> None:
    """Has Ctrl-C come while the iterations run, as a terminal would send it."""
    record = recorder.Recorder.__call__

    def pressed(self: recorder.Recorder, chunk: grpo_jax.Chunk, rates: dict[str, float]) -> None:
        record(self, chunk, rates)
        if chunk.iteration >= iterations:
            signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr(recorder.Recorder, "__call__", pressed)


@pytest.fixture(scope="module", autouse=True)
def compile_once(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Tests share their compiled programs, in a cache that is gone afterwards."""
    from jax.experimental.compilation_cache import compilation_cache

    names = (
        "jax_compilation_cache_dir",
        "jax_persistent_cache_min_compile_time_secs",
        "jax_enable_compilation_cache",
    )
    before = [getattr(jax.config, name) for name in names]
    compilation_cache.reset_cache()
    for name, value in zip(names, (str(tmp_path_factory.mktemp("xla")), 0.5, True), strict=True):
        jax.config.update(name, value)
    yield
    compilation_cache.reset_cache()
    for name, value in zip(names, before, strict=True):
        jax.config.update(name, value)


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of four iterations that nothing disturbed."""
    out = tmp_path_factory.mktemp("cli") / "run"
    assert train(out, "--seed", "3") == 0
    return out


def test_a_run_leaves_its_files(finished: Path) -> None:
    directory = RunDirectory(finished)
    assert {path for path in directory.files if not path.exists()} == {directory.parts, directory.kept}
    config = json.loads(directory.config.read_text())
    assert (config["env"], config["seed"], config["n_seeds"], config["total_timesteps"]) == (
        "CartPole-v1",
        3,
        1,
        256,
    )
    assert config["versions"] == {"grpo_jax": grpo_jax.__version__, "jax": jax.__version__}
    # Typed flags, and the preset's where nothing was typed.
    settings = grpo_jax.preset("CartPole-v1").replace(n_envs=4, n_steps=16, batch_size=32, horizon=8)
    assert directory.read().config == settings
    assert directory.learning_curve.read_bytes().startswith(b"\x89PNG")
    assert list(directory.tensorboard.glob("events.*"))


def test_the_run_is_that_of_the_library(finished: Path) -> None:
    run = RunDirectory(finished).read()
    _, metrics = grpo_jax.run(run.config, grpo_jax.make(run.env), jax.random.key(3), run.total_timesteps)
    columns = RunDirectory(finished).read_metrics(("iteration", "decision_steps", "entropy"))
    assert columns["iteration"].tolist() == [[1, 2, 3, 4]]
    assert columns["decision_steps"].tolist() == [[64, 128, 192, 256]]
    np.testing.assert_allclose(columns["entropy"][0], metrics["entropy"], rtol=1e-6)
    header = RunDirectory(finished).metrics.read_text().splitlines()[0].split(",")
    assert header[:3] == ["seed", "iteration", "decision_steps"]
    assert set(header[2:]) == set(metrics)


def test_the_policy_file_holds_the_last_policy(finished: Path) -> None:
    state = parameters(finished)
    policy = restore_like(finished / "policy.msgpack", state.learner.policy)
    jax.tree.map(np.testing.assert_array_equal, policy, state.learner.policy)


def test_tensorboard_has_all_rooms(finished: Path) -> None:
    content = b"".join(path.read_bytes() for path in (finished / "tensorboard").iterdir())
    for tag in (
        "rollout/episode_return",
        "train/approx_kl",
        "grpo/frac_zero_std",
        "time/decision_steps_per_second",
        "time/simulator_steps_per_second",
    ):
        assert tag.encode() in content


@pytest.mark.parametrize("n_seeds", [1, 2])
def test_ctrl_c_and_resume_end_like_an_undisturbed_run(
    n_seeds: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    seeds = ["--n-seeds", str(n_seeds)]
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    assert train(whole, *seeds) == 0
    with monkeypatch.context() as patch:
        interrupted_after(patch, 1)
        assert train(parts, *seeds) == 130
    assert f"grpo-jax resume {parts}" in capsys.readouterr().out
    assert not (parts / "policy.msgpack").exists()
    assert int(np.max(parameters(parts).iteration)) < 4
    # A killed run has rows behind its checkpoint, and a half-written last one.
    metrics = parts / "metrics.csv"
    rows = metrics.read_text()
    metrics.write_text(rows + (whole / "metrics.csv").read_text().splitlines()[-1] + "\n0,4,25")
    assert main(["resume", str(parts), "--no-cache"]) == 0
    assert metrics.read_text() == (whole / "metrics.csv").read_text()
    jax.tree.map(np.testing.assert_array_equal, parameters(parts), parameters(whole))
    assert (parts / "policy.msgpack").read_bytes() == (whole / "policy.msgpack").read_bytes()


def test_several_seeds(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert train(tmp_path, "--n-seeds", "2") == 0
    output = capsys.readouterr().out
    assert "over seeds" in output and "seed 1" in output
    columns = RunDirectory(tmp_path).read_metrics(("iteration", "policy_loss"))
    assert columns["iteration"].tolist() == [[1, 2, 3, 4]] * 2
    assert len(np.unique(columns["policy_loss"][:, -1])) == 2
    assert main(["evaluate", str(tmp_path), "--n-episodes", "4", "--no-cache"]) == 0
    assert "4 sampled episodes of each seed" in capsys.readouterr().out


def test_resume_makes_a_finished_run_longer_but_not_shorter(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert train(tmp_path) == 0
    assert main(["resume", str(tmp_path), "--total-timesteps", "320", "--no-cache"]) == 0
    assert RunDirectory(tmp_path).read().total_timesteps == 320
    assert RunDirectory(tmp_path).read_metrics(("iteration",))["iteration"].tolist() == [[1, 2, 3, 4, 5]]
    capsys.readouterr()
    assert main(["resume", str(tmp_path), "--total-timesteps", "64", "--no-cache"]) == 2
    assert capsys.readouterr().err.startswith("error: total_timesteps=64 ")
    assert main(["resume", str(tmp_path), "--no-cache"]) == 0
    assert "all iterations are done" in capsys.readouterr().out


def test_resume_without_a_checkpoint_starts_anew(finished: Path, tmp_path: Path) -> None:
    RunDirectory(tmp_path).create(RunDirectory(finished).read())
    assert main(["evaluate", str(tmp_path), "--no-cache"]) == 2
    assert main(["resume", str(tmp_path), "--no-cache"]) == 0
    jax.tree.map(np.testing.assert_array_equal, parameters(tmp_path), parameters(finished))


def test_a_run_is_not_overwritten_unasked(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    assert train(tmp_path) == 0
    before = (tmp_path / "checkpoint.msgpack").read_bytes()
    assert train(tmp_path, "--seed", "1") == 2
    message = capsys.readouterr().err
    assert f"grpo-jax resume {tmp_path}" in message and "--overwrite" in message
    assert (tmp_path / "checkpoint.msgpack").read_bytes() == before
    assert train(tmp_path, "--seed", "1", "--overwrite") == 0
    assert (tmp_path / "checkpoint.msgpack").read_bytes() != before
    assert (tmp_path / "notes.txt").read_text() == "mine"


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["train", "CartPole-v1", "--horizon", "0"], "horizon=0"),
        (["train", "CartPole-v1", "--learning-rate", "nan"], "learning_rate=nan"),
        (["train", "CartPole-v1", "--batch-size", "0"], "batch_size=0"),
        (["train", "CartPole-v1", "--gamma", "1.5"], "gamma=1.5 must be finite and between 0 and 1"),
        (["train", "CartPole-v1", "--kl-coef", "inf"], "kl_coef=inf must be finite"),
        (["train", "CartPole-v1", "--net-arch", "0"], "net_arch=(0,) must hold positive layer sizes"),
        (["train", "CartPole-v1", "--n-seeds", "0"], "n_seeds=0"),
        (["train", "CartPole-v1", "--total-timesteps", "0"], "total_timesteps=0"),
        (["train", "CartPole-v1", "--network", "cnn"], "network='cnn'"),
        (["train", "CartPole-v9"], "did you mean CartPole-v1"),
        (["resume", "nowhere"], "directory=nowhere"),
        (["evaluate", "nowhere"], "directory=nowhere"),
    ],
)
def test_bad_input_is_one_line(
    arguments: list[str],
    named: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    assert_refused(arguments, named, capsys)
    assert not list(tmp_path.iterdir())  # nothing was written


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["train", "CartPole-v1", "--horizn", "3"], "--horizn"),
        (["train", "CartPole-v1", "--horizon", "x"], "--horizon"),
        (["train", "CartPole-v1", "--n-steps", "1.5"], "--n-steps"),
        (["train", "CartPole-v1", "--baseline", "x"], "--baseline"),
        (["train"], "ENV"),
        ([], "train"),
    ],
)
def test_what_cannot_be_parsed(arguments: list[str], named: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(arguments) == 2
    message = capsys.readouterr().err
    assert named in message and "Traceback" not in message


def test_training_that_blows_up(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise FloatingPointError("not finite")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(grpo_jax, "run", fail)
        assert train(tmp_path) == 1
    last = tmp_path / "checkpoint.msgpack"
    assert (
        capsys.readouterr().err == f"error: not finite. The last good checkpoint is {last}, of iteration 0\n"
    )


def test_ctrl_c_before_anything_is_trained(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def press(*_: Any, **__: Any) -> None:
        signal.raise_signal(signal.SIGINT)

    before = signal.getsignal(signal.SIGINT)  # ignored, where a shell put this process in the background
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(grpo_jax, "run", press)
        assert train(tmp_path) == 130
    assert "Traceback" not in capsys.readouterr().err
    assert signal.getsignal(signal.SIGINT) is before


def test_help_shows_every_field_and_the_presets_values(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", "CartPole-v1", "--help"]) == 0
    output = capsys.readouterr().out
    for field in dataclasses.fields(grpo_jax.GRPOConfig):
        shown = f"--{field.name.replace('_', '-')}" in output
        assert shown == (field.name != "optimizer")  # a function, which cannot be typed
    plain = " ".join(output.replace("│", " ").split())
    assert f"(default: {grpo_jax.preset('CartPole-v1').horizon})" in plain.split("Steps of a branch")[1][:60]
    steps = grpo_jax.preset_timesteps("CartPole-v1")
    assert f"(default: {steps})" in plain and "[traced]" not in plain


def test_an_id_in_another_argument_is_not_the_env(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[runs.Run] = []
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("grpo_jax.cli.commands._go_on", lambda directory, run, *_: seen.append(run) or 0)
    assert main(["train", "--out", "CartPole-v1", "Acrobot-v1", "--no-cache"]) == 0
    assert seen[0].env == "Acrobot-v1"
    assert seen[0].config == grpo_jax.preset("Acrobot-v1")
    assert seen[0].total_timesteps == grpo_jax.preset_timesteps("Acrobot-v1")


def test_envs(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    known = {
        "CartPole-v1": grpo_jax.Expectation(499.96, 0.25),
        "Catch-bsuite": grpo_jax.Expectation(1.0, 0.5),
    }
    monkeypatch.setattr(grpo_jax, "preset_expectation", known.get)
    monkeypatch.setattr(grpo_jax, "preset_timesteps", lambda env_id: 1_999_872)
    monkeypatch.setattr(grpo_jax, "preset_ids", lambda: ["CartPole-v1", "Catch-bsuite"])
    assert main(["envs"]) == 0
    output = capsys.readouterr().out
    assert "…" not in output  # nothing is cut off in 80 columns
    lines = output.splitlines()
    rows = {line.split()[0]: line for line in lines if line.split() and line.split()[0] in grpo_jax.env_ids()}
    assert len(rows) == 25
    steps = f"{grpo_jax.preset_timesteps('CartPole-v1'):,}"
    assert all(word in rows["CartPole-v1"] for word in ("Box(4)", "Discrete(2)", steps))
    assert rows["CartPole-v1"].split()[-2:] == ["500", "0.2"]
    assert rows["Catch-bsuite"].split()[-2:] == ["1.00", "0.5"]
    assert rows["FrozenLake-misc"].split()[-3:] == ["-", "-", "-"]


def test_evaluate(finished: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = ["evaluate", str(finished), "--n-episodes", "16", "--no-cache"]
    assert main([*command, "--deterministic"]) == 0
    output = capsys.readouterr().out
    told = ": last checkpoint, at iteration 4; most probable actions; episodes of seed 3\n"
    assert all(word in output for word in (told, "16 deterministic episodes", "median", "length", "±"))
    assert main([*command, "--seed", "1"]) == 0
    first = capsys.readouterr().out
    assert main([*command, "--seed", "2"]) == 0
    assert first.splitlines()[-2] != capsys.readouterr().out.splitlines()[-2]


def test_evaluate_with_a_plan(finished: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = ["evaluate", str(finished), "--n-episodes", "2", "--no-cache", "--plan"]
    assert main([*command, "--plan-horizon", "3", "--plan-rollouts", "2"]) == 0
    assert re.search(r"planned: [\d,]+ simulator steps, 12 for a decision", capsys.readouterr().out)
    assert main([*command, "--plan-rollouts", "1"]) == 2
    assert "n_rollouts=1" in capsys.readouterr().err
    assert main(["evaluate", str(finished), "--plan-horizon", "3"]) == 2
    assert "give --plan too" in capsys.readouterr().err


def test_render(finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("pygame")
    from PIL import Image

    gif = tmp_path / "episode.gif"
    assert main(["evaluate", str(finished), "--n-episodes", "2", "--render", str(gif), "--no-cache"]) == 0
    with Image.open(gif) as image:
        assert image.n_frames > 1  # type: ignore[attr-defined]
        colors = image.convert("RGB").getcolors(1 << 20)
    assert colors is not None and len(colors) > 2
    assert f"{gif}: " in capsys.readouterr().out
    assert [path.name for path in tmp_path.iterdir()] == ["episode.gif"]


@pytest.mark.parametrize("name", ["episode.avi", "nowhere/episode.mp4"])
def test_render_refuses_a_bad_path(name: str, finished: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["evaluate", str(finished), "--render", name, "--no-cache"]) == 2
    assert name in capsys.readouterr().err


def test_render_refuses_what_has_no_picture(tmp_path: Path) -> None:
    world = grpo_jax.make("FrozenLake-misc")
    with pytest.raises(ValueError, match=r"no picture of FrozenLake-misc.*CartPole-v1.*PointRobot-misc"):
        render.check(world, tmp_path / "episode.gif")


def test_render_names_what_is_missing(
    finished: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "pygame", None)  # as if it were not installed
    assert main(["evaluate", str(finished), "--render", "episode.gif", "--no-cache"]) == 2
    assert "pip install pygame" in capsys.readouterr().err


def test_groups_without_spread_are_loud(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", "CartPole-v1", "--out", str(tmp_path / "run"), *TINY, "--horizon", "1"]) == 0
    message = capsys.readouterr().err
    assert message.count("WARNING") == 1
    assert "horizon=1" in message and "reward_function" in message


def test_programs_are_kept_in_the_users_cache(tmp_path: Path) -> None:
    # In a process of its own: the cache of this one shall stay as it is.
    environment = {**os.environ, "XDG_CACHE_HOME": str(tmp_path)}
    environment.pop("JAX_COMPILATION_CACHE_DIR", None)
    code = (
        "import jax, sys, grpo_jax\n"
        "light = {'tyro', 'matplotlib', 'tensorboardX', 'gymnax'} & set(sys.modules)\n"
        "from grpo_jax.cli import main\n"
        "print(light, jax.config.jax_compilation_cache_dir)\n"
        "main(['evaluate', 'nowhere', '--no-cache']); print(jax.config.jax_compilation_cache_dir)\n"
        "main(['evaluate', 'nowhere']); print(jax.config.jax_compilation_cache_dir)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=100
    )
    assert done.stdout.splitlines() == ["set() None", "None", str(tmp_path / "grpo-jax" / "xla")], done.stderr
