"""Whatever ends a run, ``resume`` goes on and ends like the run that nothing ended."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import grpo_jax
from grpo_jax.cli import main, recorder
from grpo_jax.cli.runs import Run, RunDirectory
from grpo_jax.training import checkpoint

pytestmark = pytest.mark.usefixtures("looks_often")

SMALL = [
    "--n-envs",
    "4",
    "--n-steps",
    "8",
    "--batch-size",
    "32",
    "--horizon",
    "4",
    "--net-arch",
    "8",
    "--no-cache",
]
"""32 decision states an iteration; ten iterations."""


def train(out: Path, *arguments: str) -> int:
    return main(["train", "CartPole-v1", "--out", str(out), "--total-timesteps", "320", *SMALL, *arguments])


def resume(out: Path, *arguments: str) -> int:
    return main(["resume", str(out), "--no-cache", *arguments])


def content(out: Path) -> list[bytes]:
    """What does not depend on the clock."""
    return [(out / name).read_bytes() for name in ("metrics.csv", "policy.msgpack", "checkpoint.msgpack")]


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that nothing disturbed."""
    out = tmp_path_factory.mktemp("whole") / "run"
    assert train(out) == 0
    return out


class Died(BaseException):
    """The process is gone, as far as the files can tell."""


def dies(patch: pytest.MonkeyPatch, owner: Any, name: str, at: int, *, after: bool = False) -> None:
    """Lets a run die at the n-th call of a function."""
    function, n = getattr(owner, name), 0

    def call(*arguments: Any, **options: Any) -> Any:
        nonlocal n
        n += 1
        if n == at and not after:
            raise Died
        result = function(*arguments, **options)
        if n == at:
            raise Died
        return result

    patch.setattr(owner, name, call)


MOMENTS: dict[str, tuple[Any, str, int, bool]] = {
    "before the first checkpoint": (recorder, "to_bytes", 1, False),
    "behind the first checkpoint": (recorder.Recorder, "checkpoint", 1, True),
    "before the first rows": (recorder.Recorder, "_add_rows", 1, False),
    "behind the first rows": (recorder.Recorder, "_add_rows", 1, True),
    "among the rows": (recorder.Recorder, "_add_rows", 7, True),
    "before the second checkpoint": (recorder, "write_atomically", 2, False),
    "behind the second checkpoint": (recorder, "write_atomically", 2, True),
    "before the last checkpoint": (recorder.Recorder, "checkpoint", 4, False),
    "behind the last checkpoint": (recorder.Recorder, "checkpoint", 4, True),
    "before the policy": (grpo_jax, "save", 1, False),
}


@pytest.mark.parametrize("moment", MOMENTS)
def test_any_moment_of_death(moment: str, whole: Path, tmp_path: Path) -> None:
    owner, name, at, after = MOMENTS[moment]
    with pytest.MonkeyPatch.context() as patch:
        dies(patch, owner, name, at, after=after)
        with pytest.raises(Died):
            train(tmp_path, "--checkpoint-every", "4")
    (tmp_path / ".checkpoint.msgpack.abcd1234.tmp").touch()  # what a kill leaves, and an exception does not
    assert resume(tmp_path) == 0
    assert content(tmp_path) == content(whole)
    assert not list(tmp_path.glob(".*.tmp"))


def test_a_kill_is_no_exception(whole: Path, tmp_path: Path) -> None:
    """The same with a real process, which takes its lock and its half-written files with it."""
    out = tmp_path / "run"
    code = (
        "import os, signal, sys\n"
        "from grpo_jax.cli import main, recorder\n"
        "rows = recorder.Recorder._add_rows\n"
        "def add(self, chunk):\n"
        "    rows(self, chunk)\n"
        "    self._csv.write(b'0,9'); os.kill(os.getpid(), signal.SIGKILL)\n"
        "recorder.Recorder._add_rows = add\n"
        "main(sys.argv[1:])\n"
    )
    arguments = ["train", "CartPole-v1", "--out", str(out), "--total-timesteps", "320", *SMALL]
    done = subprocess.run([sys.executable, "-c", code, *arguments], timeout=200, capture_output=True)
    assert done.returncode == -signal.SIGKILL, done.stderr
    assert (out / "metrics.csv").read_bytes().endswith(b"0,9")
    assert resume(out) == 0
    assert content(out) == content(whole)


@pytest.mark.parametrize(
    ("signum", "status", "name"), [(signal.SIGINT, 130, "Ctrl-C"), (signal.SIGTERM, 143, "SIGTERM")]
)
@pytest.mark.parametrize("when", ["training", "compiling", "evaluating"])
def test_signals(
    when: str,
    signum: signal.Signals,
    status: int,
    name: str,
    whole: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def sends(function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any, **options: Any) -> Any:
            signal.raise_signal(signum)
            return function(*arguments, **options)

        return call

    before = signal.getsignal(signum)
    with monkeypatch.context() as patch:
        if when == "training":
            patch.setattr(recorder.Recorder, "_add_rows", sends(recorder.Recorder._add_rows))
        elif when == "compiling":
            patch.setattr(grpo_jax, "run", sends(grpo_jax.run))
        else:
            patch.setattr("grpo_jax.cli.evaluation.play", sends(lambda *_, **__: None))
        assert train(tmp_path) == status
    captured = capsys.readouterr()
    assert f"go on with: grpo-jax resume {tmp_path}" in captured.out
    assert (f"{name}: saving after" in captured.out) == (when == "training")
    assert (captured.err == f"error: stopped by {name}\n") == (when != "training")
    assert signal.getsignal(signum) is before
    assert resume(tmp_path) == 0
    assert content(tmp_path) == content(whole)


def test_a_second_one_is_refused_and_touches_nothing(
    whole: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """That a dead owner holds no lock is what the kill above shows."""
    directory = RunDirectory(tmp_path)
    directory.create(RunDirectory(whole).read())
    with directory.locked():
        before = {path: path.read_bytes() for path in tmp_path.iterdir()}
        for start in (resume, lambda out: train(out, "--overwrite")):
            assert start(tmp_path) == 2
            message = capsys.readouterr().err
            assert f"directory={tmp_path} is in use: process {os.getpid()} trains there" in message
        assert {path: path.read_bytes() for path in tmp_path.iterdir()} == before
    assert resume(tmp_path) == 0
    assert content(tmp_path) == content(whole)


def test_cadence_in_iterations_the_last_and_the_best_are_kept(tmp_path: Path) -> None:
    assert train(tmp_path, "--checkpoint-every", "3", "--keep", "2") == 0
    directory = RunDirectory(tmp_path)
    run = directory.read()
    assert (run.checkpoint_every, run.keep) == ("3", 2)
    assert sorted(os.listdir(directory.kept)) == [
        "iteration_000000009.msgpack",
        "iteration_000000010.msgpack",
    ]
    assert (directory.kept / "iteration_000000010.msgpack").read_bytes() == directory.checkpoint.read_bytes()
    columns = directory.read_metrics(("iteration", "episode_return"))
    saved = [2, 5, 8, 9]
    returns = columns["episode_return"][0, saved]
    best = checkpoint.read_notes(directory.best)
    assert best["episode_return"] == pytest.approx(returns.max())
    assert best["iteration"] == saved[int(returns.argmax())] + 1
    path = directory.kept / "iteration_000000009.msgpack"
    assert (
        main(["evaluate", str(tmp_path), "--n-episodes", "2", "--checkpoint", str(path), "--no-cache"]) == 0
    )
    assert main(["evaluate", str(tmp_path), "--checkpoint", str(tmp_path / "no"), "--no-cache"]) == 2
    assert resume(tmp_path, "--total-timesteps", "384", "--checkpoint-every", "1", "--keep", "3") == 0
    assert len(os.listdir(directory.kept)) == 3
    assert checkpoint.read_notes(directory.best)["episode_return"] >= best["episode_return"]


def test_cadence_in_seconds(whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    saved: list[int] = []
    save = recorder.Recorder.checkpoint

    def spy(self: recorder.Recorder, *arguments: Any) -> None:
        saved.append(self._done)
        save(self, *arguments)

    monkeypatch.setattr(recorder.Recorder, "checkpoint", spy)
    assert train(tmp_path / "always", "--checkpoint-every", "0s") == 0
    assert saved == [*range(11), 10]
    saved.clear()
    assert train(tmp_path / "never", "--checkpoint-every", "1000s") == 0
    assert saved == [0, 10]
    assert content(tmp_path / "never") == content(tmp_path / "always") == content(whole)
    for text in ("", "0", "-1s", "1.5", "nans", "infs", "10 m"):
        with pytest.raises(ValueError, match="checkpoint_every="):
            Run("CartPole-v1", grpo_jax.GRPOConfig(), 0, 1, 320, checkpoint_every=text)
