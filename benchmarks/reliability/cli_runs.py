"""What the scripts of this folder share: commands in forked children of a process that has imported everything, and results."""

from __future__ import annotations

import contextlib
import io
import json
import os
import pathlib
import sys
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

ENV = "CartPole-v1"
SMALL = ["--n-envs", "4", "--n-steps", "16", "--batch-size", "32", "--horizon", "8"]
COMPARED = ("metrics.csv", "policy.msgpack", "checkpoint.msgpack")
"""Files that do not depend on the clock."""


class Ended(NamedTuple):
    """How a command ended: its exit status (negative: the signal that killed it) and all that it printed."""

    status: int
    output: str


def preload() -> None:
    """Imports what a command needs, without starting JAX's backend, which must not be forked."""
    import matplotlib.figure  # noqa: F401
    import rich.progress  # noqa: F401
    import tensorboardX.event_file_writer  # noqa: F401
    import tyro  # noqa: F401

    import grpo_jax.cli  # noqa: F401


def start(arguments: Iterable[str], log: pathlib.Path, before: Callable[[], Any] | None = None) -> int:
    """Forks a child that runs a command; its process id. ``before`` is called in the child, first."""
    pid = os.fork()
    if pid:
        return pid
    status = 70
    try:
        handle = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(handle, 1)
        os.dup2(handle, 2)
        from grpo_jax.cli import main

        if before is not None:
            before()
        status = main(list(arguments))
    except BaseException as error:
        print(f"Traceback: {type(error).__name__}: {error}", file=sys.stderr)
    finally:
        with contextlib.suppress(OSError):
            sys.stdout.flush()
            sys.stderr.flush()
        os._exit(status)


def finish(pid: int, log: pathlib.Path) -> Ended:
    """Waits for a child's end."""
    _, status = os.waitpid(pid, 0)
    code = os.waitstatus_to_exitcode(status)
    return Ended(code, log.read_text(errors="replace") if log.exists() else "")


def command(arguments: Iterable[str], log: pathlib.Path, before: Callable[[], Any] | None = None) -> Ended:
    """Runs a command in a forked child."""
    log.unlink(missing_ok=True)
    return finish(start(arguments, log, before), log)


def inside(arguments: Iterable[str]) -> Ended:
    """Runs a command in this process; SystemExit and exceptions are its own affair."""
    from grpo_jax.cli import main

    text = io.StringIO()
    with contextlib.redirect_stdout(text), contextlib.redirect_stderr(text):
        status = main(list(arguments))
    return Ended(status, text.getvalue())


def differences(left: pathlib.Path, right: pathlib.Path) -> list[str]:
    """Names of the files that differ between two finished runs."""
    return [
        name
        for name in COMPARED
        if not (right / name).exists() or (left / name).read_bytes() != (right / name).read_bytes()
    ]


def report(name: str, counts: dict[str, Any], out: pathlib.Path | None) -> None:
    """Prints counts, and adds them to a file of JSON lines."""
    line = json.dumps({"script": name} | counts)
    print(line)
    if out is not None:
        with out.open("a") as file:
            file.write(line + "\n")
