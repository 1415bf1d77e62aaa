"""Benchmarks that take hours: each run is a process of its own, and leaves one JSON row when it has ended.

What has a row is not run again, so a benchmark that was killed goes on where it was and loses only the run in
progress. Rows know nothing of the code they measured but its version: take another folder for other code.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import pathlib
import platform
import signal
import statistics
import sys
import warnings
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import gymnasium
import jax
import numpy as np
import stable_baselines3
import torch
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TimeElapsedColumn, TimeRemainingColumn
from scores import read
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.evaluation import evaluate_policy

import grpo_jax

N_EPISODES = 20
"""Episodes of a greedy evaluation, and of the mean over training episodes."""

Row = dict[str, Any]


def run(function: Callable[..., Row], jobs: Mapping[str, tuple[Any, ...]], out: pathlib.Path) -> int:
    """Runs the jobs that have no row in ``out/rows``, one after the other.

    Args:
      function: what a job calls; at the top of its module, for a fresh interpreter must find it.
      jobs: arguments of ``function``, plain data, by the name of the row.
      out: folder.

    Returns:
      How many jobs failed; what they raised has been printed.
    """
    folder = out / "rows"
    folder.mkdir(parents=True, exist_ok=True)
    missing = {name: arguments for name, arguments in jobs.items() if not _has(folder, name, arguments)}
    # A process for each job: memory and compiled programs of one do not weigh on the next.
    context = multiprocessing.get_context("spawn")
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # else a job would outlive the benchmark
    failed = 0
    columns = (BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TimeRemainingColumn())
    with Progress("{task.description}", *columns, speed_estimate_period=24 * 3600) as progress:
        task = progress.add_task("", total=len(jobs), completed=len(jobs) - len(missing))
        for name, arguments in missing.items():
            progress.update(task, description=name)
            process = context.Process(target=_job, args=(function, arguments, folder / f"{name}.json"))
            process.start()
            try:
                process.join()
            finally:
                process.kill()  # does nothing to a process that has ended
            failed += process.exitcode != 0
            progress.advance(task)
    if failed:
        print(f"{failed} of {len(missing)} runs failed and left no row; start again to try them again")
    return failed


def run_and_report(
    function: Callable[..., Row],
    jobs: Mapping[str, tuple[Any, ...]],
    out: pathlib.Path,
    table: Callable[[list[Row]], str],
    draw: Callable[[list[Row], pathlib.Path], None] | None = None,
) -> None:
    """Runs what is missing, writes ``out/table.md`` (and ``out/curves.png``) of all rows, and ends the program.

    Args:
      function: see ``run``.
      jobs: see ``run``; none where only the report is wanted.
      out: folder.
      table: Markdown of the rows.
      draw: makes the picture, if there is one.
    """
    failed = run(function, jobs, out) if jobs else 0
    results = read(out)
    if not results:
        raise SystemExit(f"{out / 'rows'} holds no rows")
    report = table(results)
    (out / "table.md").write_text(report)
    if draw is not None:
        draw(results, out / "curves.png")
    print(report, end="")
    raise SystemExit(min(failed, 1))


def greedy_return(model: Any, env_id: str, seed: int) -> float:
    """Mean return of greedy episodes in a fresh environment."""
    env = make_vec_env(env_id, seed=seed)  # with Monitor
    returns, _ = evaluate_policy(model, env, N_EPISODES, return_episode_rewards=True)
    env.close()
    return float(np.mean(returns))


def spread(values: Iterable[float | None], digits: int = 1) -> str:
    """``median (min to max)`` as it stands in a table; None: no value."""
    known = [value for value in values if value is not None]
    if not known:
        return "none"
    cells = [f"{value:,.{digits}f}" for value in (statistics.median(known), min(known), max(known))]
    return f"{cells[0]} ({cells[1]} to {cells[2]})"


def provenance(rows: list[Row]) -> str:
    """Versions and machines of the rows, a line each."""
    lines = {
        ", ".join(f"{name} {version}" for name, version in row["versions"].items())
        + f"; {row['machine']['cpus']} CPUs, {row['machine']['platform']}"
        for row in rows
    }
    return "\n".join(f"- {line}" for line in sorted(lines))


def _has(folder: pathlib.Path, name: str, arguments: tuple[Any, ...]) -> bool:
    """Whether there is a row; one of another run under that name would be reported as this one."""
    path = folder / f"{name}.json"
    if not path.exists():
        return False
    found = json.loads(path.read_text())["arguments"]
    if found != json.loads(json.dumps(arguments)):
        raise SystemExit(f"{path} is of another run, {found} and not {list(arguments)}: choose another --out")
    return True


def _job(function: Callable[..., Row], arguments: tuple[Any, ...], path: pathlib.Path) -> None:
    """Runs in the process of the job."""
    torch.set_num_threads(1)
    with warnings.catch_warnings(record=True) as caught:
        row = function(*arguments)
    row = {
        "versions": {
            "grpo_jax": grpo_jax.__version__,
            "jax": jax.__version__,
            "stable_baselines3": stable_baselines3.__version__,
            "gymnasium": gymnasium.__version__,
        },
        "machine": {
            "cpus": os.cpu_count(),
            "platform": platform.platform(),
            "jax_backend": jax.default_backend(),
        },
        "arguments": arguments,
        **row,
        "warnings": sorted({str(warning.message) for warning in caught}),
    }
    temporary = path.with_suffix(".part")
    temporary.write_text(json.dumps(row) + "\n")
    os.replace(temporary, path)  # a row is there as a whole or not at all
