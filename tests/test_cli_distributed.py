"""Several processes on the command line, over loopback: they stop together, one that is lost ends all, any number goes on,
also from states that lie in parts.
"""

from __future__ import annotations

import contextlib
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import jax
import numpy as np
import pytest
from processes import environment, free_port

import grpo_jax
from grpo_jax.cli import main, parts
from grpo_jax.cli.runs import RunDirectory

pytestmark = pytest.mark.timeout(1_200)  # up to four processes compile side by side

SMALL = (
    "--n-envs 8 --n-steps 4 --batch-size 16 --n-epochs 1 --horizon 4 --net-arch 8 --n-shards 4"
    " --learning-rate-decay none --checkpoint-every 2 --no-cache"
)

SLOWLY = """
import sys, time
from grpo_jax.cli import main, progress
from grpo_jax.training import run
run.CHUNK_SECONDS = 0.0  # chunks of one iteration
show = progress.Progress.__call__
def slowly(self, chunk):
    time.sleep(0.3)
    return show(self, chunk)
progress.Progress.__call__ = slowly
raise SystemExit(main(sys.argv[1:]))
"""

IN_PARTS = "from grpo_jax.cli import parts; parts.BYTES = 0\n" + SLOWLY
TOO_LARGE = "from grpo_jax.training import checkpoint; checkpoint._MAX_STATE = 1000\n" + IN_PARTS


@contextlib.contextmanager
def started(
    n: int, path: Path, *arguments: str, script: str = SLOWLY
) -> Iterator[list[subprocess.Popen[str]]]:
    """The processes of a run; each has its own working directory: what the first one writes the others do not see."""
    together = ["--distributed", "--coordinator", f"localhost:{free_port()}", "--num-processes", str(n)]
    processes = []
    for index in range(n):
        place = path if index == 0 else path / f"host_{index}"
        place.mkdir(exist_ok=True)
        processes.append(
            subprocess.Popen(
                [sys.executable, "-c", script, *arguments, *together, "--process-id", str(index)],
                cwd=place,
                env=environment(),
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
            )
        )
    try:
        yield processes
    finally:
        for process in processes:
            process.kill()
            process.communicate()


def wait_for(iteration: int, run: Path, processes: list[subprocess.Popen[str]], agent: str = "0") -> None:
    row, metrics = f"\n{agent},{iteration},", run / "metrics.csv"
    while not metrics.exists() or row not in metrics.read_text():
        for process in processes:
            assert process.poll() is None, process.communicate()
        time.sleep(0.1)


def ends(processes: list[subprocess.Popen[str]]) -> list[tuple[int, str, str]]:
    told = [process.communicate(timeout=600) for process in processes]
    return [(process.returncode, *words) for process, words in zip(processes, told, strict=True)]


def test_four_processes_stop_together_two_lose_one_and_one_ends_where_a_run_alone_does(
    tmp_path: Path,
) -> None:
    run = tmp_path / "run"
    with started(
        4, tmp_path, "train", "CartPole-v1", "--out", "run", "--total-timesteps", "9600", *SMALL.split()
    ) as four:
        wait_for(3, run, four)
        four[2].send_signal(signal.SIGTERM)  # to one that does not write
        stopped = ends(four)
    assert [status for status, _, _ in stopped] == [143] * 4, stopped
    assert "4 in 4 processes" in stopped[0][1] and "go on with: grpo-jax resume run" in stopped[0][1]
    assert not any("iteration" in out for _, out, _ in stopped[1:])  # JAX' own words about gloo are all
    assert not any(list((tmp_path / f"host_{index}").iterdir()) for index in (1, 2, 3))
    _, state = RunDirectory(run).restore(RunDirectory(run).read())
    assert state is not None
    reached = int(state.iteration)
    assert f"stopped at iteration {reached};" in stopped[0][1]

    with started(2, tmp_path, "resume", "run", "--no-cache") as two:
        wait_for(reached + 3, run, two)
        two[1].kill()
        began = time.monotonic()
        first, second = ends(two)
    assert time.monotonic() - began < 60
    assert first[0] not in (0, 2) and second[0] == -signal.SIGKILL
    for _, _, err in (first, second):
        assert "another process of the run was lost" in err
        assert "The last good checkpoint is run/checkpoint.msgpack, of iteration" in err
        assert "grpo-jax resume run --distributed" in err

    _, state = RunDirectory(run).restore(RunDirectory(run).read())
    assert state is not None and int(state.iteration) > reached
    steps = (int(state.iteration) + 2) * 32
    assert main(["resume", str(run), "--total-timesteps", str(steps), "--no-cache"]) == 0
    check_ends_as_a_run_alone(run, steps)


def check_ends_as_a_run_alone(run: Path, steps: int) -> None:
    there = RunDirectory(run).read()
    _, found = RunDirectory(run).restore(there)
    expected, _ = grpo_jax.run(there.config, grpo_jax.make(there.env), jax.random.key(0), steps)
    assert found is not None and grpo_jax.count(found.decision_steps) == steps
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, atol=2e-5),
        found.learner.policy,
        expected.learner.policy,
    )
    np.testing.assert_allclose(found.environments.observation, expected.environments.observation, atol=2e-5)
    rows = (run / "metrics.csv").read_text().splitlines()[1:]
    assert [int(row.split(",")[1]) for row in rows] == list(range(1, steps // 32 + 1))


def test_large_states_lie_in_parts_that_any_number_of_processes_reads(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = tmp_path / "run"

    def named() -> set[str | None]:
        files = (run / "checkpoint.msgpack", run / "best.msgpack", *(run / "checkpoints").glob("*.msgpack"))
        assert all(file.stat().st_size < 1_000 for file in files if file.exists())
        return {parts.name_in(file) for file in files if file.exists()}

    there = ("CartPole-v1", "--out", str(run), "--total-timesteps", "9600", "--keep", "2", *SMALL.split())
    with started(2, tmp_path, "train", *there, script=IN_PARTS) as two:
        wait_for(7, run, two)
        two[1].kill()
        first, _ = ends(two)
    assert first[0] not in (0, 2) and "The last good checkpoint is" in first[2]
    (run / "checkpoint.parts" / "iteration_000000099_0.orbax-checkpoint-tmp").mkdir()  # as a kill leaves it

    monkeypatch.setattr(parts, "BYTES", 0)
    _, state = RunDirectory(run).restore(RunDirectory(run).read())
    assert state is not None
    steps = (int(state.iteration) + 3) * 32
    assert main(["resume", str(run), "--total-timesteps", str(steps), "--no-cache"]) == 0
    assert {path.name for path in (run / "checkpoint.parts").iterdir()} == named()
    check_ends_as_a_run_alone(run, steps)
    assert main(["evaluate", str(run), "--checkpoint", str(run / "best.msgpack"), "--no-cache"]) == 0
    with pytest.raises(ValueError, match=r"only names its state, .*grpo_jax.restore_parts reads them"):
        grpo_jax.restore(
            run / "checkpoint.msgpack",
            state_of := RunDirectory(run).read().config,
            grpo_jax.make("CartPole-v1"),
        )
    (name,) = {parts.name_in(run / "checkpoint.msgpack")}
    state = grpo_jax.restore_parts(
        run / "checkpoint.parts" / str(name), state_of, grpo_jax.make("CartPole-v1")
    )
    assert grpo_jax.count(state.decision_steps) == steps

    steps += 128
    with started(
        4, tmp_path, "resume", str(run), "--total-timesteps", str(steps), "--no-cache", script=IN_PARTS
    ) as four:
        ended = ends(four)
    assert [status for status, _, _ in ended] == [0] * 4, ended
    assert {path.name for path in (run / "checkpoint.parts").iterdir()} == named()
    check_ends_as_a_run_alone(run, steps)
    with started(2, tmp_path, "resume", str(run), "--no-cache", script=IN_PARTS) as two:
        ended = ends(two)  # there is nothing left to do but to play
    assert [status for status, _, _ in ended] == [0] * 2, ended
    assert "all iterations are done" in ended[0][1] and "sampled episodes" in ended[0][1]


def test_a_state_that_is_too_large_without_a_shared_directory_is_refused_by_all(tmp_path: Path) -> None:
    with started(
        2, tmp_path, "train", "CartPole-v1", "--out", "run", *SMALL.split(), script=TOO_LARGE
    ) as two:
        ended = ends(two)
    assert [status for status, _, _ in ended] == [2, 2], ended
    assert "does not fit a checkpoint, which holds 1,000" in ended[0][2]


@pytest.mark.parametrize("name", ["../../elsewhere", "iteration_1", 7, "iteration_000000001_0/.."])
def test_a_checkpoint_that_names_what_are_no_parts_is_refused(name: object, tmp_path: Path) -> None:
    grpo_jax.save(tmp_path / "checkpoint.msgpack", {}, notes={"parts": name})
    with pytest.raises(ValueError, match="names parts that cannot be"):
        parts.name_in(tmp_path / "checkpoint.msgpack")


def test_the_programs_of_a_sweep_lie_on_several_processes_and_one_goes_on(tmp_path: Path) -> None:
    swept = "--sweep learning_rate=1e-3,1e-2 horizon=2,4 --n-seeds 2"
    small = f"{SMALL} {swept} --n-shards 1 --total-timesteps 320".split()
    with started(2, tmp_path, "train", "CartPole-v1", "--out", "run", *small) as two:
        wait_for(3, tmp_path / "run" / "program_2", two, agent="0,0")
        two[1].send_signal(signal.SIGTERM)
        stopped = ends(two)
    assert [status for status, _, _ in stopped] == [143] * 2, stopped
    assert "all programs of this sweep go on with: grpo-jax resume run" in stopped[0][1]
    assert not list((tmp_path / "host_1").iterdir())
    assert main(["resume", str(tmp_path / "run"), "--no-cache"]) == 0
    with started(2, tmp_path, "train", "CartPole-v1", "--out", "both", *small) as two:
        ended = ends(two)
    assert [status for status, _, _ in ended] == [0, 0], ended
    assert "best of 4 settings, 2 seeds each" in ended[0][1] and not ended[1][1].count("best of")
    assert main(["train", "CartPole-v1", "--out", str(tmp_path / "alone"), *small]) == 0
    tables = [
        np.genfromtxt(tmp_path / name / "sweep.csv", delimiter=",", names=True, usecols=range(6))
        for name in ("run", "both", "alone")
    ]
    for name in tables[0].dtype.names or ():
        for table in tables[:2]:
            np.testing.assert_allclose(table[name], tables[2][name], atol=1e-4)


def test_what_the_first_process_refuses_ends_all_without_noise(tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "config.json").write_text("of an older run")
    with started(2, tmp_path, "train", "CartPole-v1", "--out", "run", *SMALL.split()) as two:
        first, second = ends(two)
    assert (first[0], second[0]) == (2, 2), (first, second)
    assert "already holds a run" in first[2]
    assert second[2] == ""


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ("--coordinator localhost:1", "--coordinator: add --distributed"),
        ("--distributed --num-processes 2", "--coordinator and --process-id missing"),
        (
            "--distributed --coordinator localhost:1 --num-processes 2 --process-id 2",
            "--process-id=2 must be from 0 to --num-processes=2 less 1",
        ),
    ],
)
def test_flags_that_do_not_fit_are_refused(
    flags: str, words: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["train", "CartPole-v1", "--out", str(tmp_path / "run"), *flags.split()]) == 2
    assert words in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_parts_are_removed_only_where_all_checkpoints_can_be_read(tmp_path: Path) -> None:
    root, names = tmp_path / "checkpoint.parts", [f"iteration_{i:09d}_0" for i in range(3)]
    for name in (*names, "mine"):
        (root / name).mkdir(parents=True)
    best, last = tmp_path / "best.msgpack", tmp_path / "checkpoint.msgpack"
    grpo_jax.save(last, {}, notes={"parts": names[2]})
    best.write_bytes(last.read_bytes()[:-1])
    parts.remove_unused(root, (last, best))
    assert len(list(root.iterdir())) == 4
    grpo_jax.save(best, {}, notes={"parts": names[0]})
    parts.remove_unused(root, (last, best, tmp_path / "none.msgpack"))
    assert {path.name for path in root.iterdir()} == {names[0], names[2], "mine"}
