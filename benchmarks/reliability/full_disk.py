"""Puts a small full file system under a run, and under each of its folders, and counts how the runs end.

A run whose disk is full must end, with one line for each thing that could not be written; what it lost must come back,
byte for byte, from ``resume`` on a larger disk. Needs the right to mount a tmpfs; ``--limit-files`` bounds the size of
each file instead (RLIMIT_FSIZE), which anyone may.

    python benchmarks/reliability/full_disk.py
"""

from __future__ import annotations

import argparse
import contextlib
import os
import pathlib
import resource
import shutil
import subprocess
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

import cli_runs

SIZES = (4, 8, 16, 24, 32, 40, 48, 64, 80, 96, 112, 128, 160, 192, 224, 256, 320)
"""KiB of the whole run directory."""


@contextlib.contextmanager
def mounted(path: pathlib.Path, kib: int) -> Iterator[Callable[[int], None]]:
    """A tmpfs of some KiB; yields what makes it larger."""

    def resize(kib: int) -> None:
        subprocess.run(["mount", "-o", f"remount,size={kib}k", path], check=True)

    path.mkdir(parents=True, exist_ok=True)
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={kib}k", "tmpfs", path], check=True)
    try:
        yield resize
    finally:
        subprocess.run(["umount", path], check=True)


@contextlib.contextmanager
def limited(path: pathlib.Path, kib: int) -> Iterator[Callable[[int], None]]:
    """No file may grow beyond some KiB; yields what raises that."""
    path.mkdir(parents=True, exist_ok=True)
    before, hard = resource.getrlimit(resource.RLIMIT_FSIZE)

    def resize(kib: int) -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (kib << 10, hard))

    resize(kib)
    try:
        yield resize
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (before, hard))


def full_for_a_while(ballast: pathlib.Path) -> Callable[[], Any]:
    """Makes a child fill the disk before its second look at a run, and free it before the fifth."""

    def prepare() -> None:
        from grpo_jax.cli.recorder import Recorder

        record, n = Recorder.__call__, 0

        def call(self: Any, chunk: Any, rates: Any) -> None:
            nonlocal n
            n += 1
            if n == 2:
                with contextlib.suppress(OSError), ballast.open("wb", buffering=0) as file:
                    while True:
                        file.write(bytes(1 << 10))
            if n == 5:
                ballast.unlink()
            record(self, chunk, rates)

        Recorder.__call__ = call  # type: ignore[method-assign]

    return prepare


def full_folder(folder: pathlib.Path) -> Callable[[], Any]:
    """Makes a child mount a full file system on a folder of its run, as soon as that is made."""

    def prepare() -> None:
        from grpo_jax.cli.runs import RunDirectory

        create = RunDirectory.create

        def call(self: Any, *arguments: Any, **options: Any) -> None:
            create(self, *arguments, **options)
            folder.mkdir()
            subprocess.run(["mount", "-t", "tmpfs", "-o", "size=4k", "tmpfs", folder], check=True)
            (folder / "ballast").write_bytes(bytes(4096))

        RunDirectory.create = call  # type: ignore[method-assign]

    return prepare


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--limit-files", action="store_true")
    parser.add_argument("--out", type=pathlib.Path)
    options = parser.parse_args()
    cli_runs.preload()
    place = limited if options.limit_files else mounted
    counts: Counter[str] = Counter()
    with tempfile.TemporaryDirectory() as folder:
        root = pathlib.Path(folder)
        os.environ.setdefault("XDG_CACHE_HOME", str(root / "cache"))
        log, whole, out = root / "log", root / "whole", root / "run"
        small = [*cli_runs.SMALL, "--checkpoint-every", "4", "--keep", "2", "--total-timesteps", "8192"]

        def train(path: pathlib.Path) -> list[str]:
            return ["train", cli_runs.ENV, "--out", str(path), *small]

        def count(what: str, ended: cli_runs.Ended, statuses: tuple[int, ...]) -> None:
            messages = [line for line in ended.output.splitlines() if line.startswith(("error", "WARNING"))]
            fine = ended.status in statuses and messages and "Traceback" not in ended.output
            counts[f"{what}: {'told, status ' + str(ended.status) if fine else 'WRONG'}"] += 1
            if not fine:
                print(f"{what}: {ended.status}\n{ended.output}", flush=True)

        def compare(what: str) -> None:
            different = cli_runs.differences(whole, out)
            counts[f"{what}: {'equal' if not different else 'WRONG'}"] += 1
            if different:
                print(what, different, flush=True)

        reference = cli_runs.command(train(whole), log)
        assert reference.status == 0, reference.output
        for kib in SIZES:
            with place(out, kib) as resize:
                ended = cli_runs.command(train(out), log)
                if ended.status == 0 and not any(word in ended.output for word in ("WARNING", "error")):
                    counts["directory: large enough"] += 1
                    continue
                count("directory", ended, (0, 1, 2))
                resize(1 << 20)
                again = ["resume", str(out)] if (out / "config.json").exists() else train(out)
                ended = cli_runs.command(again, log)
                gap = "lacks iterations" in ended.output
                counts[f"directory, then resumed: {'a gap, told' if gap else f'status {ended.status}'}"] += 1
                if not gap:
                    compare("directory, then resumed")
            shutil.rmtree(out, ignore_errors=True)
        if not options.limit_files:
            for name in ("tensorboard", "checkpoints"):
                ended = cli_runs.command(train(out), log, full_folder(out / name))
                subprocess.run(["umount", out / name], check=True)
                count(name, ended, (0,))
                compare(name)
                shutil.rmtree(out)
            with mounted(out, 1024):
                ended = cli_runs.command(
                    [*train(out), "--checkpoint-every", "1"], log, full_for_a_while(out / "ballast")
                )
                count("full for a while", ended, (0,))
                compare("full for a while")
    cli_runs.report("full_disk", dict(counts), options.out)


if __name__ == "__main__":
    main()
