"""What the command line says: help by stage, examples that hold, hints, elapsed time, and silence where nobody reads."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import grpo_jax
from grpo_jax.cli import main, progress, video
from grpo_jax.cli.flags import parse
from grpo_jax.cli.help import EXAMPLES, STAGES


def test_every_setting_belongs_to_one_stage() -> None:
    listed = [name for _, names in STAGES.values() for name in names]
    assert sorted(listed) == sorted(
        field.name for field in dataclasses.fields(grpo_jax.GRPOConfig) if field.name != "optimizer"
    )


def test_the_settings_of_all_stages_reach_the_config() -> None:
    typed = [
        "--n-envs",
        "3",
        "--group-size",
        "5",
        "--horizon",
        "7",
        "--baseline",
        "mean",
        "--net-arch",
        "9",
        "8",
    ]
    options: Any = parse(["train", "Pendulum-v1", *typed])
    expected = grpo_jax.preset("Pendulum-v1").replace(
        n_envs=3, group_size=5, horizon=7, baseline="mean", net_arch=(9, 8)
    )
    assert grpo_jax.GRPOConfig(**vars(options.config)) == expected


@pytest.mark.parametrize("command", list(EXAMPLES))
def test_help_ends_with_examples_that_are_understood(
    command: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([*command.split(), "--help"]) == 0
    help_, _, examples = capsys.readouterr().out.partition("examples:\n")
    assert f"usage: grpo-jax {command}".strip() in help_
    lines = examples.splitlines()
    assert len(lines) >= 2 and all(len(line) <= 100 for line in lines)
    for line in lines:
        program, *arguments = shlex.split(line.strip().split("   ")[0])
        assert program == "grpo-jax" and arguments[0].startswith(command)
        if not {"--help", "--version"} & set(arguments):
            assert type(parse(arguments)).__name__.lower() == arguments[0]


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--version"]) == 0
    assert capsys.readouterr().out.startswith(f"grpo-jax {grpo_jax.__version__}, jax 0.")


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["tran", "CartPole-v1"], "no command 'tran': did you mean train?"),
        (["Evaluate", "runs/x"], "no command 'Evaluate': did you mean evaluate?"),
        (["xyzzy"], "no command 'xyzzy'; there are train, resume, evaluate, plot, report, envs"),
        (["train", "CartPole-v1", "--learning-rat", "1"], "--learning-rate"),
        (["train", "cartpole-v1"], "did you mean CartPole-v1?"),
        (["train", "breakout"], "did you mean Breakout-MinAtar"),
        (["train", "CartPole-v0"], "did you mean CartPole-v1?"),
        (["train", "Brax/ant"], "there is no suite 'Brax'; did you mean brax?"),
        (["train", "LunarLander-v3"], "GRPO('MlpPolicy', 'LunarLander-v3')"),
        (["train", "halfcheetah-v5"], "GRPO('MlpPolicy', 'HalfCheetah-v5')"),
        (["train", "ALE/Pong-v5"], "GRPO('CnnPolicy', 'ale_py:ALE/Pong-v5')"),
        (["train", "PongNoFrameskip-v4"], "is a Gymnasium environment"),
        (["evaluate", "x", "--n-episods", "3"], "--n-episodes"),
    ],
)
def test_misspelled_words_are_understood(
    arguments: list[str], named: str, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("ale_py")  # which registers Breakout-v4 with Gymnasium, whoever imported it
    assert main(arguments) == 2
    message = " ".join(capsys.readouterr().err.replace("│", " ").split())
    assert named in message and "Traceback" not in message
    others = {"cartpole-v1": "Acrobot", "LunarLander-v3": "did you mean", "Brax/ant": "navix?"}
    assert others.get(arguments[1] if arguments[1:] else "", "Traceback") not in message


def test_nothing_is_said_where_nobody_reads() -> None:
    process = subprocess.Popen(
        [sys.executable, "-m", "grpo_jax", "--version"],  # little enough to be written as Python ends
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env={name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"},
    )
    assert process.stdout is not None
    assert process.stderr is not None
    process.stdout.close()
    assert (process.wait(100), process.stderr.read()) == (141, b"")
    process.stderr.close()


def test_a_pipe_that_rich_finds_closed_is_no_error(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def closed(*_: Any) -> None:
        try:
            raise BrokenPipeError
        except BrokenPipeError:
            raise SystemExit(1)  # noqa: B904 - as rich does

    monkeypatch.setattr("grpo_jax.cli.commands.envs", closed)
    assert main(["envs"]) == 141
    assert capsys.readouterr() == ("", "")


def test_a_run_that_nobody_watches_any_more_says_how_to_go_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def closed(*_: Any) -> None:
        raise BrokenPipeError

    monkeypatch.setattr("grpo_jax.cli.commands._go_on", closed)
    assert main(["train", "CartPole-v1", "--out", str(tmp_path), "--no-cache"]) == 141
    assert f"grpo-jax resume {tmp_path}" in capsys.readouterr().err


@pytest.fixture
def patience(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(progress, "PLAIN_SECONDS", 0.02)


def test_compiling_shows_for_how_long(
    patience: None, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def compile_(limit: int = 500) -> str:
        output = ""
        with progress.Progress() as show:
            while "compiling" not in output and (limit := limit - 1):
                show._compiling  # noqa: B018 - what is waited for goes on by itself
                output += capsys.readouterr().out
                progress.threading.Event().wait(0.01)
        return output

    assert "compiling for 0 s" in compile_()
    monkeypatch.setenv("FORCE_COLOR", "1")  # as on a terminal
    assert "0:00:0" in compile_()


def test_what_was_waited_for_is_over_when_a_block_is_left(patience: None) -> None:
    before = progress.threading.active_count()
    with contextlib.suppress(RuntimeError), progress.waiting("compiling"):
        assert progress.threading.active_count() == before + 1
        raise RuntimeError
    assert progress.threading.active_count() == before


@pytest.mark.parametrize("module", ["imageio_ffmpeg", "cv2"])
def test_videos(module: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cv2: Any = pytest.importorskip("cv2")
    pytest.importorskip(module)
    other = {"imageio_ffmpeg": "cv2", "cv2": "imageio_ffmpeg"}[module]
    monkeypatch.setitem(sys.modules, other, None)
    frames = [np.full((51, 75, 3), (250, 40, 10 * i), np.uint8) for i in range(8)]
    assert video.write_mp4(tmp_path / "episode.mp4", frames, 20) == 8
    assert [path.name for path in tmp_path.iterdir()] == ["episode.mp4"]
    reader = cv2.VideoCapture(str(tmp_path / "episode.mp4"))
    seen = [reader.read()[1] for _ in frames]
    assert not reader.read()[0]
    for i, frame in enumerate(seen):  # blue, green, red
        assert frame.shape == (52, 76, 3)
        np.testing.assert_allclose(frame.mean(axis=(0, 1)), (10 * i, 40, 250), atol=12)


def test_what_writes_videos_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for module in ("imageio_ffmpeg", "cv2"):
        monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(ModuleNotFoundError, match="pip install imageio-ffmpeg"):
        video.write_mp4(tmp_path / "episode.mp4", [np.zeros((4, 4, 3), np.uint8)], 20)


@pytest.mark.parametrize("module", ["stable_baselines3", "torch", "gymnasium"])
def test_the_bridge_names_the_extra_that_is_missing(module: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in sys.modules if name.split(".")[0] in ("sb3_bridge", module)]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, module, None)
    try:
        with pytest.raises(ImportError, match=rf"needs {module}.*pip install 'grpo-jax\[sb3\]'"):
            import sb3_bridge  # noqa: F401
    finally:
        for name in [name for name in sys.modules if name.split(".")[0] == "sb3_bridge"]:
            del sys.modules[name]


def test_another_fault_of_the_bridge_is_not_called_a_missing_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in sys.modules if name.split(".")[0] == "sb3_bridge"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "optax", None)
    try:
        with pytest.raises(ModuleNotFoundError) as caught:
            import sb3_bridge  # noqa: F401
        assert "sb3_bridge needs" not in str(caught.value)
    finally:
        for name in [name for name in sys.modules if name.split(".")[0] == "sb3_bridge"]:
            del sys.modules[name]


@pytest.mark.parametrize("module", ["Box2D", "mujoco"])
def test_gymnasium_names_what_its_environments_need(module: str, monkeypatch: pytest.MonkeyPatch) -> None:
    gymnasium = pytest.importorskip("gymnasium")
    sb3_bridge = pytest.importorskip("sb3_bridge")
    env_id, extra = {"Box2D": ("LunarLander-v3", "box2d"), "mujoco": ("HalfCheetah-v5", "mujoco")}[module]
    for name in list(sys.modules):
        if name.split(".")[0] == module or name.startswith(f"gymnasium.envs.{extra}"):
            monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(gymnasium.error.DependencyNotInstalled, match=rf"gymnasium\[{extra}\]"):
        sb3_bridge.GRPO("MlpPolicy", env_id)
