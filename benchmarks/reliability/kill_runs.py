"""Kills CLI runs at random moments, resumes them, and compares what they leave with the run that was not killed.

Half of the kills come at a random time, the others at a random call that writes: before or after an fsync, a rename, a
write of rows. Each is a SIGKILL. Some resumed runs are killed as well.

    python benchmarks/reliability/kill_runs.py --kills 50
"""

from __future__ import annotations

import argparse
import os
import pathlib
import random
import shutil
import signal
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from typing import Any

import cli_runs


def die_at(n: int) -> Callable[[], Any]:
    """Makes a child kill itself at the n-th of its calls that write to a run directory."""

    def prepare() -> None:
        left = n

        def counted(function: Callable[..., Any]) -> Callable[..., Any]:
            def call(*arguments: Any, **options: Any) -> Any:
                nonlocal left
                left -= 1
                if left == 0:
                    os.kill(os.getpid(), signal.SIGKILL)
                result = function(*arguments, **options)
                left -= 1
                if left == 0:
                    os.kill(os.getpid(), signal.SIGKILL)
                return result

            return call

        from grpo_jax.cli.recorder import Recorder

        os.fsync, os.replace = counted(os.fsync), counted(os.replace)
        Recorder._write_pending = counted(Recorder._write_pending)  # type: ignore[method-assign]

    return prepare


def kill_one(
    arguments: list[str], out: pathlib.Path, log: pathlib.Path, rng: random.Random, seconds: float
) -> str:
    """Starts or resumes a run and kills it; what it died of: ``time``, ``call``, or ``""`` if it ended before."""
    log.unlink(missing_ok=True)
    if rng.random() < 0.5:
        pid = cli_runs.start(arguments, log, die_at(rng.randrange(1, 60)))
        return "call" if cli_runs.finish(pid, log).status == -signal.SIGKILL else ""
    pid = cli_runs.start(arguments, log)
    time.sleep(rng.uniform(0.0, seconds))
    os.kill(pid, signal.SIGKILL)
    return "time" if cli_runs.finish(pid, log).status == -signal.SIGKILL else ""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--timesteps", type=int, default=400_000)
    parser.add_argument("--minutes", type=float, default=600.0, help="stop after so long, and report")
    parser.add_argument("--checkpoint-every", default="10s")
    parser.add_argument("--out", type=pathlib.Path)
    options = parser.parse_args()
    cli_runs.preload()
    rng = random.Random(options.seed)
    counts: Counter[str] = Counter()
    with tempfile.TemporaryDirectory() as folder:
        root = pathlib.Path(folder)
        os.environ.setdefault("XDG_CACHE_HOME", str(root / "cache"))
        log, whole, out = root / "log", root / "whole", root / "run"

        def train(path: pathlib.Path) -> list[str]:
            length = [
                "--total-timesteps",
                str(options.timesteps),
                "--checkpoint-every",
                options.checkpoint_every,
            ]
            return ["train", cli_runs.ENV, "--out", str(path), *length, *cli_runs.SMALL]

        for _ in range(2):  # the second one finds its programs in the cache
            clock = time.monotonic()
            ended = cli_runs.command([*train(whole), "--overwrite"], log)
            assert ended.status == 0, ended.output
            seconds = time.monotonic() - clock
        deadline = time.monotonic() + 60.0 * options.minutes
        while counts["kills"] < options.kills and time.monotonic() < deadline:
            shutil.rmtree(out, ignore_errors=True)
            arguments = train(out)
            for _ in range(1 + (rng.random() < 0.3)):
                how = kill_one(arguments, out, log, rng, seconds)
                counts["kills"] += bool(how)
                counts[f"killed by {how or 'nothing'}"] += 1
                if (out / "config.json").exists():
                    arguments = ["resume", str(out)]
            had_checkpoint = (out / "checkpoint.msgpack").exists()
            counts["with a checkpoint"] += had_checkpoint
            ended = cli_runs.command(arguments, log)
            different = cli_runs.differences(whole, out)
            leftover = [path.name for path in out.glob(".*.tmp")]
            equal = ended.status == 0 and not different and not leftover
            counts["runs equal byte for byte" if equal else "runs that differ"] += 1
            if not equal:
                print(f"status {ended.status}, different {different}, left {leftover}\n{ended.output}")
    cli_runs.report("kill_runs", dict(counts) | {"seconds of a run": round(seconds, 1)}, options.out)


if __name__ == "__main__":
    main()
