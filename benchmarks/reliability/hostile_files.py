"""Gives the command line run directories whose files were made to do harm, one fault each.

Each must be refused by one clear line that names the file, without a traceback, within a minute and within one GiB of
memory; nothing of a file may run, and nothing outside of the run directory may change.

    python benchmarks/reliability/hostile_files.py
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import pathlib
import pickle
import resource
import shutil
import signal
import socket
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

import cli_runs
import msgpack

from grpo_jax.cli.runs import _checksum
from grpo_jax.files import seal, unseal

Case = tuple[str, str, Callable[[pathlib.Path], Any]]
"""Name, the file that the error must name (empty: it may be refused or replaced), and what is done to a run directory."""

READ = ("config.json", "checkpoint.msgpack", "metrics.csv")


class _Runs:
    """Leaves a file behind where it is unpickled."""

    def __init__(self, mark: pathlib.Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.mark),)


def _make(content: bytes | Callable[[pathlib.Path], Any]) -> Callable[[pathlib.Path], Any]:
    def replace(path: pathlib.Path) -> None:
        path.unlink()
        if isinstance(content, bytes):
            path.write_bytes(content)
        else:
            content(path)

    return replace


def _sparse(path: pathlib.Path) -> None:
    path.touch()
    os.truncate(path, 4 << 30)


def _socket(path: pathlib.Path) -> None:
    here = os.getcwd()
    os.chdir(path.parent)  # a socket's name must be short
    try:
        with socket.socket(socket.AF_UNIX) as server:
            server.bind(path.name)
    finally:
        os.chdir(here)


def kinds(mark: pathlib.Path) -> dict[str, Callable[[pathlib.Path], Any]]:
    """What a file is replaced by."""
    return {
        "a pipe": _make(os.mkfifo),
        "a directory": _make(lambda path: path.mkdir()),
        "a socket": _make(_socket),
        "an endless device": _make(lambda path: path.symlink_to("/dev/zero")),
        "a link to itself": _make(lambda path: path.symlink_to(path.name)),
        "4 GiB of nothing": _make(_sparse),
        "empty": _make(b""),
        "a pickle": _make(pickle.dumps(_Runs(mark))),
        "a pickle under a seal": _make(seal("checkpoint", 2, pickle.dumps(_Runs(mark)))),
        "a zip": _make(b"PK\x03\x04" + bytes(1000)),
        "another seal": _make(seal("policy", 2, b"x")),
        "a version of the future": _make(seal("checkpoint", 999, b"x")),
        "a seal alone": _make(b"grpo-jax checkpoint 2 999999999999999 " + b"0" * 64 + b"\n"),
        "bytes that are no text": _make(bytes(range(128, 256)) * 100),
        "deep lists": _make(b"[" * 500_000),
        "a million lists": _make(b"[" + b"[]," * 300_000 + b"[]]"),
        "deep msgpack": _make(seal("checkpoint", 2, b"\x91" * 500_000)),
        "a million maps": _make(seal("checkpoint", 2, b"\xdd\x00\x0f\x42\x40" + b"\x80" * 1_000_000)),
    }


def _config(change: Callable[[dict[str, Any]], Any]) -> Callable[[pathlib.Path], Any]:
    """Changes config.json, under a checksum that fits."""

    def apply(path: pathlib.Path) -> None:
        content = json.loads(path.read_text())
        content.pop("checksum")
        change(content)
        path.write_text(json.dumps(content | {"checksum": _checksum(content)}))

    return apply


def config_cases() -> Iterator[Case]:
    """Values that cannot be, in config.json."""
    values: dict[str, list[Any]] = {
        "env": ["../../etc/passwd", "os:system", "brax/ant", 3, None, "x" * 100_000, ["CartPole-v1"]],
        "seed": [-(2**70), 2**70, 1.5, "0", None],
        "n_seeds": [0, -1, 2**62, 1.0, True, "2", None, 10_000_000],
        "total_timesteps": [0, -5, 1.5, "x", None, float("nan"), [1]],
        "checkpoint_every": ["", "s", "-1s", "nans", "infs", "0", 5, None, "__import__('os')"],
        "keep": [0, -1, 1.5, "1", None],
        "format": [0, 1, 3, "2", None],
        "config": [None, [], "x", {"no_such_field": 1}, {"optimizer": "os.system"}],
        "unknown": [1],
    }
    settings: dict[str, list[Any]] = {
        "n_envs": [0, -1, 10**9, "4", 1.5, None],
        "n_steps": [0, -1, "x"],
        "net_arch": [[0], [-1], [10**12], [200_000, 200_000], ["64"], [1] * 5000, "64", {"pi": 1}],
        "critic_net_arch": [[1] * 5000, [0]],
        "horizon": [0, "64"],
        "learning_rate": [float("nan"), -1.0, "fast", "optax.constant_schedule(1.0)"],
        "optimizer": ["optax.adam"],
        "activation": ["os.system", 3],
        "gamma": [float("inf"), 2.0],
        "candidates": ["__import__('os').system('true')"],
    }
    for name, choices in values.items():
        for value in choices:
            yield f"{name}={value!r:.30}", "config.json", _config(lambda c, n=name, v=value: c.update({n: v}))
    for name, choices in settings.items():
        for value in choices:
            yield (
                f"config.{name}={value!r:.30}",
                "config.json",
                _config(lambda c, n=name, v=value: c["config"].update({n: v})),
            )
    for name in ("env", "config", "seed", "keep", "format"):
        yield f"no {name}", "config.json", _config(lambda c, n=name: c.pop(n))


def _leaves(change: Callable[[dict[str, Any]], Any]) -> Callable[[pathlib.Path], Any]:
    """Changes the arrays of a checkpoint ``{name: [shape, dtype, bytes]}``, under a seal that fits."""

    def apply(path: pathlib.Path) -> None:
        content = msgpack.unpackb(unseal(path, path.read_bytes(), "checkpoint", (2,))[1])
        arrays = {name: list(msgpack.unpackb(leaf.data)) for name, leaf in content["leaves"].items()}
        change(arrays)
        packed = {name: msgpack.ExtType(1, msgpack.packb(parts)) for name, parts in arrays.items()}
        path.write_bytes(seal("checkpoint", 2, msgpack.packb(content | {"leaves": packed})))

    return apply


def checkpoint_cases(directory: pathlib.Path) -> Iterator[Case]:
    """Arrays that do not belong into a checkpoint, for each of its arrays."""
    path = directory / "checkpoint.msgpack"
    content = msgpack.unpackb(unseal(path, path.read_bytes(), "checkpoint", (2,))[1])
    for name, leaf in content["leaves"].items():
        shape, dtype, data = msgpack.unpackb(leaf.data)
        changes: dict[str, list[Any]] = {
            "object": [shape, "object", data],
            "another type": [shape, "float64", data],
            "too large": [[10**9, *shape], dtype, data],
            "negative": [[-1, *shape], dtype, data],
            "cut": [shape, dtype, data[:-1]],
        }
        if dtype == "float32" and not name.startswith(".environments.state"):
            changes["nan"] = [shape, dtype, b"\x00\x00\xc0\x7f" + data[4:]]
        for what, parts in changes.items():
            yield f"{name} {what}", path.name, _leaves(lambda a, n=name, p=parts: a.update({n: p}))
        yield f"{name} missing", path.name, _leaves(lambda a, n=name: a.pop(n))
    for name, value in ((".iteration", b"\xff" * 4), (".learner.n_updates", b"\xff" * 4)):
        yield f"{name}=-1", path.name, _leaves(lambda a, n=name, v=value: a[n].__setitem__(2, v))
    for text in ("[" * 60_000, "[]", '{"metrics": 3}', '{"metrics": {"bytes": "x"}}', "x" * 100_000):
        yield f"notes {text:.20}", "", _notes(text)


def _notes(text: str) -> Callable[[pathlib.Path], Any]:
    def apply(path: pathlib.Path) -> None:
        content = msgpack.unpackb(unseal(path, path.read_bytes(), "checkpoint", (2,))[1])
        path.write_bytes(seal("checkpoint", 2, msgpack.packb(content | {"notes": text})))

    return apply


def metrics_cases() -> Iterator[Case]:
    """Rows that are missing or changed."""

    def change(edit: Callable[[list[bytes]], list[bytes]]) -> Callable[[pathlib.Path], Any]:
        return lambda path: path.write_bytes(b"".join(edit(path.read_bytes().splitlines(keepends=True))))

    yield "missing", "metrics.csv", lambda path: path.unlink()
    yield "header alone", "metrics.csv", change(lambda rows: rows[:1])
    yield "first row missing", "metrics.csv", change(lambda rows: rows[:1] + rows[2:])
    yield "last row missing", "metrics.csv", change(lambda rows: rows[:-1])
    yield "last row cut", "metrics.csv", change(lambda rows: [*rows[:-1], rows[-1][:9]])
    yield "rows swapped", "metrics.csv", change(lambda rows: [rows[0], rows[2], rows[1], *rows[3:]])


def link_cases(outside: pathlib.Path) -> Iterator[Case]:
    """Links to what lies outside; the name of the file is empty where a link may just be replaced."""
    for name in ("metrics.csv", "policy.msgpack", "learning_curve.png", "best.msgpack"):
        yield f"{name} a link out", "", lambda path: (path.unlink(), path.symlink_to(outside))
    for name in ("tensorboard", "checkpoints", ".lock"):
        yield (
            f"{name} a link out",
            name,
            lambda path: (
                shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True),
                path.symlink_to(outside if path.name == ".lock" else outside.parent),
            ),
        )


def all_cases(
    directory: pathlib.Path, outside: pathlib.Path, mark: pathlib.Path
) -> Iterator[tuple[str, Case]]:
    """The file that is changed, and the case."""
    for file in READ:
        for name, change in kinds(mark).items():
            yield file, (f"{file} {name}", file, change)
    for name, change in kinds(mark).items():
        yield (
            "best.msgpack",
            (f"best.msgpack {name}", "", change),
        )  # it stops nothing: a better one takes its place
    for case in config_cases():
        yield "config.json", case
    for case in checkpoint_cases(directory):
        yield "checkpoint.msgpack", case
    for case in metrics_cases():
        yield "metrics.csv", case
    for case in link_cases(outside):
        yield case[0].split(" ")[0], case


def _fingerprint(folder: pathlib.Path) -> str:
    digest = hashlib.sha256()
    for path in sorted(folder.rglob("*")):
        digest.update(str(path).encode() + (path.read_bytes() if path.is_file() else b""))
    return digest.hexdigest()


def attack(root: pathlib.Path, every: int = 1, *, verbose: bool = False) -> Counter[str]:
    """Runs the cases, or one in ``every``; outcomes."""
    original, folder, outside = root / "original", root / "run", root / "outside" / "mine.txt"
    length = ["--total-timesteps", "256", "--keep", "2", "--checkpoint-every", "2"]
    ended = cli_runs.inside(
        ["train", cli_runs.ENV, "--out", str(original), *length, *cli_runs.SMALL, "--no-cache"]
    )
    assert ended.status == 0, ended.output
    outside.parent.mkdir()
    outside.write_text("mine")
    before, counts = _fingerprint(outside.parent), Counter[str]()
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for i, (file, (name, named, change)) in enumerate(all_cases(original, outside, root / "it ran")):
        if i % every:
            continue
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(original, folder)
        change(folder / file)
        signal.alarm(60)  # a command that hangs ends the script
        ended = cli_runs.inside(["resume", str(folder), "--total-timesteps", "320", "--no-cache"])
        signal.alarm(0)
        lines = [line for line in ended.output.splitlines() if line.startswith("error: ")]
        refused = ended.status == 2 and len(lines) == 1 and str(folder) in lines[0]
        if named == "" and ended.status == 0:
            outcome = "replaced"
        elif named == "" and ended.status == 2 and len(lines) == 1:
            outcome = "refused"
        else:
            outcome = "refused" if refused else "WRONG"
        if outcome == "WRONG" or verbose:
            print(f"{outcome}: {name}: {ended.status} {lines or ended.output[-300:]}", flush=True)
        counts[outcome] += 1
    growth = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - peak
    counts["MiB of memory on top, at most"] = growth >> 10
    counts["files that ran"] = int((root / "it ran").exists())
    counts["files changed outside"] = int(_fingerprint(outside.parent) != before)
    return counts


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=pathlib.Path)
    parser.add_argument("--every", type=int, default=1)
    parser.add_argument("--verbose", action="store_true")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as root:
        counts = attack(pathlib.Path(root), options.every, verbose=options.verbose)
    cli_runs.report("hostile_files", dict(counts), options.out)


if __name__ == "__main__":
    main()
