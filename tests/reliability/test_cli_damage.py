"""Damaged files, full disks, spoiled numbers: what the command line keeps, says and returns."""

from __future__ import annotations

import contextlib
import importlib.util
import json
import resource
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import jax
import msgpack
import numpy as np
import pytest
from flax import serialization

import grpo_jax
from grpo_jax import files
from grpo_jax.cli import main, recorder
from grpo_jax.cli.runs import RunDirectory
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
BENCHMARKS = Path(__file__).parents[2] / "benchmarks" / "reliability"


def train(out: Path, *arguments: str, total: int = 320) -> int:
    length = ["--total-timesteps", str(total)]
    return main(["train", "CartPole-v1", "--out", str(out), *length, *SMALL, *arguments])


def resume(out: Path, *arguments: str) -> int:
    return main(["resume", str(out), "--total-timesteps", "384", "--no-cache", *arguments])


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("whole") / "run"
    assert train(out) == 0
    return out


@pytest.fixture
def copy(whole: Path, tmp_path: Path) -> RunDirectory:
    return RunDirectory(Path(shutil.copytree(whole, tmp_path / "copy")))


def rows(directory: RunDirectory) -> list[bytes]:
    return directory.metrics.read_bytes().splitlines(keepends=True)


@pytest.mark.parametrize("damage", ["missing", "header alone", "last row cut", "one digit", "one row less"])
def test_rows_that_are_gone(damage: str, copy: RunDirectory, capsys: pytest.CaptureFixture[str]) -> None:
    lines = rows(copy)
    if damage == "missing":
        copy.metrics.unlink()
    else:
        changed = {
            "header alone": lines[:1],
            "last row cut": [*lines[:-1], lines[-1][:-3]],
            "one digit": [*lines[:3], lines[3].replace(b"1", b"2", 1), *lines[4:]],
            "one row less": lines[:3] + lines[4:],
        }
        copy.metrics.write_bytes(b"".join(changed[damage]))
    assert resume(copy.path) == 2
    message = capsys.readouterr().err
    assert f"error: {copy.metrics} does not hold the rows up to iteration 10" in message
    assert f"grpo-jax resume {copy.path} --new-metrics" in message
    assert resume(copy.path, "--new-metrics") == 0
    assert copy.read_metrics(("iteration",))["iteration"].tolist() == [[11, 12]]
    assert (copy.path / "metrics.csv.damaged").exists() == (damage != "missing")
    assert resume(copy.path) == 0  # what was given up stays so


def test_rows_behind_the_checkpoint_are_dropped_with_a_message(
    copy: RunDirectory, capsys: pytest.CaptureFixture[str]
) -> None:
    with copy.metrics.open("ab") as file:
        file.write(b"0,11,352,1,2\n0,12")
    assert resume(copy.path) == 0
    assert f"note: {copy.metrics}: what lies behind the checkpoint's iteration 10" in capsys.readouterr().out
    assert copy.read_metrics(("iteration",))["iteration"][0].tolist() == list(range(1, 13))


def older(directory: RunDirectory) -> None:
    """Makes of a run what version 0.1.0 would have written."""
    config = json.loads(directory.config.read_text())
    for name in ("checksum", "format", "checkpoint_every", "keep"):
        config.pop(name)
    directory.config.write_text(json.dumps(config))
    payload = files.unseal(directory.checkpoint, directory.checkpoint.read_bytes(), "checkpoint", (2,))[1]
    leaves = {}
    for name, packed in msgpack.unpackb(payload)["leaves"].items():
        shape, dtype, data = msgpack.unpackb(packed.data)
        leaves[name] = np.frombuffer(data, dtype).reshape(shape)
    content = serialization.msgpack_serialize({"format": checkpoint.UNSEALED_FORMAT, "leaves": leaves})
    directory.checkpoint.write_bytes(content)
    directory.best.unlink(missing_ok=True)
    lines = [line.decode().strip().split(",") for line in rows(directory)]
    kept = [i for i, name in enumerate(lines[0]) if name != "nonfinite_state"]
    directory.metrics.write_text("".join(",".join(line[i] for i in kept) + "\n" for line in lines))


def test_runs_older_than_checksums_go_on(copy: RunDirectory, capsys: pytest.CaptureFixture[str]) -> None:
    older(copy)
    header = rows(copy)[0]
    assert resume(copy.path) == 0
    warned = capsys.readouterr().err
    assert warned.count("WARNING") == 2
    assert f"{copy.config} is older than" in warned and f"{copy.checkpoint} is older than" in warned
    assert rows(copy)[0] == header  # its columns stay
    assert copy.read_metrics(("iteration",))["iteration"][0].tolist() == list(range(1, 13))
    assert resume(copy.path) == 0 and "WARNING" not in capsys.readouterr().err
    older(copy)
    copy.metrics.write_bytes(header)
    assert resume(copy.path) == 2
    assert "0 rows of 12 are there" in capsys.readouterr().err


def test_a_damaged_best_checkpoint_stops_nothing(
    copy: RunDirectory, capsys: pytest.CaptureFixture[str]
) -> None:
    copy.best.write_bytes(copy.checkpoint.read_bytes()[:-1])
    assert resume(copy.path) == 0
    assert f"{copy.best} is damaged" in capsys.readouterr().err


@contextlib.contextmanager
def no_file_beyond(n_bytes: int) -> Iterator[None]:
    """A write beyond that fails, as on a full disk."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (n_bytes, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_a_disk_that_is_full_from_the_start(
    tmp_path: Path, whole: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with no_file_beyond(100):
        assert train(tmp_path) == 2
    assert f"{tmp_path}/config.json" in capsys.readouterr().err
    with no_file_beyond((whole / "checkpoint.msgpack").stat().st_size - 200):
        assert train(tmp_path) == 2
    assert f"{tmp_path}/checkpoint.msgpack" in capsys.readouterr().err
    assert main(["resume", str(tmp_path), "--no-cache"]) == 0


def test_rows_and_events_that_do_not_fit(
    tmp_path: Path, whole: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    size = (whole / "checkpoint.msgpack").stat().st_size
    with no_file_beyond(size + 500):  # rows need more
        assert train(tmp_path, "--checkpoint-every", "1", total=1600) == 1
    captured = capsys.readouterr()
    directory = RunDirectory(tmp_path)
    for path in (directory.metrics, directory.tensorboard):
        assert captured.err.count(f"WARNING: {path} cannot be written") == 1
    written = len(rows(directory)) - 1
    assert 0 < written < 50 and rows(directory)[-1].endswith(b"\n")
    assert f"error: {directory.metrics} lacks iterations {written + 1} to 50" in captured.err
    assert checkpoint.read_notes(directory.checkpoint)["iteration"] == 50  # what was learned is there
    assert directory.policy.exists()
    assert main(["resume", str(tmp_path), "--no-cache"]) == 1  # the gap is told as long as it is there
    assert f"lacks iterations {written + 1} to 50" in capsys.readouterr().err


def test_a_disk_that_is_full_for_a_while(
    tmp_path: Path, whole: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    record, limits = recorder.Recorder.__call__, contextlib.ExitStack()

    def call(self: recorder.Recorder, chunk: grpo_jax.Chunk, rates: dict[str, float]) -> None:
        if chunk.iteration == 3:
            limits.enter_context(no_file_beyond(600))
        if chunk.iteration == 7:
            limits.close()
        record(self, chunk, rates)

    monkeypatch.setattr(recorder.Recorder, "__call__", call)
    assert train(tmp_path, "--checkpoint-every", "1") == 0
    warned = capsys.readouterr().err
    assert warned.count("cannot be written (File too large)") == 1  # the rows
    assert warned.count(f"what was there is kept: File too large: '{tmp_path}/checkpoint.msgpack'") == 1
    for name in ("metrics.csv", "checkpoint.msgpack", "policy.msgpack"):
        assert (tmp_path / name).read_bytes() == (whole / name).read_bytes()


def test_the_last_checkpoint_does_not_fit(
    tmp_path: Path, whole: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    save = recorder.Recorder.checkpoint

    def call(self: recorder.Recorder, *arguments: Any) -> None:
        with no_file_beyond(1000) if self._done == 10 else contextlib.nullcontext():
            save(self, *arguments)

    with monkeypatch.context() as patch:
        patch.setattr(recorder.Recorder, "checkpoint", call)
        assert train(tmp_path, "--checkpoint-every", "4") == 1
    message = capsys.readouterr().err
    assert f"'{tmp_path}/checkpoint.msgpack'. The last good checkpoint is" in message
    assert f"of iteration 8; go on with: grpo-jax resume {tmp_path}" in message
    assert main(["resume", str(tmp_path), "--no-cache"]) == 0
    assert (tmp_path / "metrics.csv").read_bytes() == (whole / "metrics.csv").read_bytes()


def test_spoiled_numbers_keep_and_name_the_last_good_checkpoint(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert train(tmp_path, "--checkpoint-every", "1", "--learning-rate", "3e38") == 1
    message = capsys.readouterr().err
    assert message.startswith("error: training stopped at iteration ") and "in the optimizer" in message
    iteration = int(message.split("at iteration ")[1].split(",")[0])
    path = tmp_path / "checkpoint.msgpack"
    assert f"The last good checkpoint is {path}, of iteration {iteration - 1}" in message
    _, state = RunDirectory(tmp_path).restore(RunDirectory(tmp_path).read())
    assert state is not None and int(state.iteration) == iteration - 1
    assert all(np.all(np.isfinite(leaf)) for leaf in jax.tree.leaves(state.params))


@pytest.fixture(scope="module")
def script() -> Iterator[Any]:
    """Loads a script of benchmarks/reliability."""

    def load(name: str) -> ModuleType:
        spec = importlib.util.spec_from_file_location(name, BENCHMARKS / f"{name}.py")
        assert spec is not None and spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        return module

    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(BENCHMARKS))
        yield load
    sys.modules.pop("cli_runs", None)


def test_flipped_bits(script: Any, tmp_path: Path) -> None:
    counts = script("flip_bits").flip_all(tmp_path / "run", 60, 7)
    assert {outcome for file in counts.values() for outcome in file} <= {"noticed", "harmless"}
    assert all(counts[name]["noticed"] == 12 for name in counts if name != "config.json")


def test_hostile_files(script: Any, tmp_path: Path) -> None:
    counts = script("hostile_files").attack(tmp_path, every=11)
    assert counts["refused"] > 25 and counts["WRONG"] == 0
    assert counts["files that ran"] == counts["files changed outside"] == 0
    assert counts["MiB of memory on top, at most"] < 1024
