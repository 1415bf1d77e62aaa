"""Flips single bits of the files of a finished run, and counts what happens to a flip.

noticed: the command that reads the file refuses it and names it. harmless: all that is read is what was written.
silent: something else was read, and nobody said so. Files: all that ``resume`` and ``evaluate`` read.

    python benchmarks/reliability/flip_bits.py --flips 1000
"""

from __future__ import annotations

import argparse
import contextlib
import io
import pathlib
import random
import tempfile
import warnings
from collections import Counter
from collections.abc import Callable
from typing import Any

import cli_runs
import jax
import numpy as np

from grpo_jax.cli.recorder import Recorder
from grpo_jax.cli.runs import RunDirectory
from grpo_jax.files import UnsealedWarning
from grpo_jax.training.checkpoint import restore_like

FILES = ("config.json", "checkpoint.msgpack", "best.msgpack", "policy.msgpack", "metrics.csv")


def readers(directory: RunDirectory) -> dict[str, Callable[[], Any]]:
    """For each file, what reads it as ``resume`` and ``evaluate`` do; it returns all that was read."""
    run = directory.read()
    state = directory.restore(run)[1]
    assert state is not None
    policy = state.learner.policy

    def rows() -> bytes:
        with Recorder(directory, run, state):  # verifies them
            return directory.metrics.read_bytes()

    return {
        "config.json": directory.read,
        "checkpoint.msgpack": lambda: _arrays(directory.restore(run)),
        "best.msgpack": lambda: _arrays(directory.restore(run, directory.best)),
        "policy.msgpack": lambda: _arrays(restore_like(directory.policy, policy)),
        "metrics.csv": rows,
    }


def _arrays(tree: Any) -> list[bytes]:
    is_key = lambda leaf: jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key)  # noqa: E731
    leaves = (jax.random.key_data(leaf) if is_key(leaf) else leaf for leaf in jax.tree.leaves(tree))
    return [np.asarray(leaf).tobytes() for leaf in leaves]


def flip(content: bytes, rng: random.Random) -> bytes:
    """The content with one bit flipped."""
    bit = rng.randrange(8 * len(content))
    flipped = bytearray(content)
    flipped[bit // 8] ^= 1 << bit % 8
    return bytes(flipped)


def flip_all(folder: pathlib.Path, n_flips: int, seed: int) -> dict[str, Counter[str]]:
    """Trains a short run in ``folder`` and flips bits of each of its files in turn; outcomes by file."""
    length = ["--total-timesteps", "4096", "--checkpoint-every", "4"]
    ended = cli_runs.inside(
        ["train", cli_runs.ENV, "--out", str(folder), *length, *cli_runs.SMALL, "--no-cache"]
    )
    assert ended.status == 0, ended.output
    directory, rng = RunDirectory(folder), random.Random(seed)
    read = readers(directory)
    expected = {name: read[name]() for name in FILES}
    counts: dict[str, Counter[str]] = {name: Counter() for name in FILES}
    for i in range(n_flips):
        name = FILES[i % len(FILES)]
        path = folder / name
        content = path.read_bytes()
        path.write_bytes(flip(content, rng))
        try:
            with contextlib.redirect_stdout(io.StringIO()), warnings.catch_warnings():
                warnings.simplefilter("error", UnsealedWarning)  # it must not pass for an old file
                outcome = "harmless" if read[name]() == expected[name] else "silent"
        except (ValueError, OSError) as error:
            outcome = "noticed" if str(path) in str(error) else "refused without its name"
        except UnsealedWarning:
            outcome = "taken for an old file"
        path.write_bytes(content)
        counts[name][outcome] += 1
    return counts


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--flips", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=pathlib.Path)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        counts = flip_all(pathlib.Path(folder) / "run", options.flips, options.seed)
    cli_runs.report("flip_bits", {name: dict(outcomes) for name, outcomes in counts.items()}, options.out)


if __name__ == "__main__":
    main()
