"""What every run of the benchmark records, whatever library it measures: times, curve, machine, row.

Standard library and NumPy only: it is imported in virtual environments that hold a peer and nothing of ours, and
before everything else there, for it keeps a run to its core before thread pools are made.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import math
import os
import pathlib
import platform
import resource
import sys
import time
import tomllib
from collections.abc import Callable, Iterable, Sequence
from typing import Any

Job = dict[str, Any]
"""``library``, ``env``, ``seed``, ``cache``; and, where given, ``core``, ``started`` (seconds since the epoch),
``n_envs`` and ``total_timesteps`` in place of the settings' own."""

Row = dict[str, Any]

PHASES = ("import", "compile", "train", "evaluate")
N_POINTS = 24
"""Evaluations of a run, about: fixed in advance, at equal distances in decision steps."""

CURVE_EPISODES = 32
FINAL_EPISODES = 128


class Clock:
    """Wall and CPU seconds of a run by phase; the time until now goes to the phase that ``lap`` names.

    Attributes:
      wall: seconds by phase.
      cpu: seconds of the process, all threads, by phase.
    """

    def __init__(self, started: float | None = None) -> None:
        """Books everything since the start of the process as import.

        Args:
          started: when the process was started, in seconds since the epoch; None: now.
        """
        self.wall = dict.fromkeys(PHASES, 0.0)
        self.cpu = dict.fromkeys(PHASES, 0.0)
        self._cpu = time.process_time()
        self._wall = time.perf_counter()
        self.cpu["import"] = self._cpu
        self.wall["import"] = max(0.0, time.time() - started) if started is not None else 0.0

    def lap(self, phase: str) -> None:
        """The time since the last lap was spent on ``phase``."""
        cpu, wall = time.process_time(), time.perf_counter()
        self.cpu[phase] += cpu - self._cpu
        self.wall[phase] += wall - self._wall
        self._cpu, self._wall = cpu, wall

    def move(self, source: str, target: str, share: float) -> None:
        """Books a share, 0 to 1, of what was booked as ``source`` as ``target``."""
        for times in (self.wall, self.cpu):
            moved = share * times[source]
            times[source] -= moved
            times[target] += moved


def finite(values: Iterable[float]) -> list[float | None]:
    """Plain numbers; None, which JSON has, in place of NaN and infinities, which it has not."""
    return [float(value) if math.isfinite(value) else None for value in values]


def point(clock: Clock, decision_steps: int, simulator_steps: int, returns: Sequence[float]) -> Row:
    """A point of a curve.

    Args:
      clock: with the training so far booked.
      decision_steps: so far.
      simulator_steps: so far.
      returns: ``[n_episodes]`` of an evaluation, undiscounted.
    """
    n = len(returns)
    mean = math.fsum(returns) / n
    std = math.sqrt(math.fsum((value - mean) ** 2 for value in returns) / n)
    mean_or_none, std_or_none = finite((mean, std))
    return {
        "decision_steps": int(decision_steps),
        "simulator_steps": int(simulator_steps),
        "train_seconds": clock.wall["train"],
        "train_cpu_seconds": clock.cpu["train"],
        "return_mean": mean_or_none,
        "return_std": std_or_none,
    }


def row(
    job: Job,
    clock: Clock,
    *,
    settings: str,
    config: dict[str, Any],
    total_timesteps: int,
    curve: list[Row],
    final_returns: Iterable[float],
    packages: Iterable[str],
    nonfinite: bool = False,
    compile_apart: bool = True,
    device: tuple[str | None, str] = (None, "cpu"),
) -> Row:
    """The row of a run, as ``report.py`` reads it.

    Args:
      job: what was asked for.
      clock: with everything booked.
      settings: where the settings are from, in words.
      config: the settings.
      total_timesteps: decision steps that were asked for.
      curve: points; the last is at the end of training.
      final_returns: ``[FINAL_EPISODES]`` of the sampled policy at the end.
      packages: distributions whose versions count.
      nonfinite: whether a number of the training was not finite.
      compile_apart: False where compiling cannot be told apart from training, which then holds it.
      device: JAX's backend, None without JAX, and the name of the device.
    """
    wall = {f"{phase}_seconds": seconds for phase, seconds in clock.wall.items()}
    cpu = {f"{phase}_seconds": seconds for phase, seconds in clock.cpu.items()}
    if not compile_apart:
        wall["compile_seconds"] = cpu["compile_seconds"] = None  # type: ignore[assignment]
    last = curve[-1] if curve else {"decision_steps": 0, "simulator_steps": 0}
    returns = finite(final_returns)
    return {
        "library": job["library"],
        "env": job["env"],
        "seed": job["seed"],
        "settings": settings,
        "cache": job["cache"],
        "total_timesteps": total_timesteps,
        "decision_steps": last["decision_steps"],
        "simulator_steps": last["simulator_steps"],
        "versions": versions(packages),
        "machine": machine(*device),
        **wall,
        "cpu": cpu,
        "peak_memory_mb": peak_memory_mb(),
        "config": json.loads(json.dumps(config, default=str)),
        "curve": curve,
        "final_returns": returns,
        "nonfinite": bool(nonfinite) or None in returns,
    }


def versions(packages: Iterable[str]) -> dict[str, str]:
    """Versions of distributions, and Python's."""
    found = {name.replace("-", "_"): importlib.metadata.version(name) for name in packages}
    return {"python": platform.python_version(), **found}


def machine(backend: str | None, device: str) -> dict[str, Any]:
    return {
        "cpus": os.cpu_count(),
        "platform": platform.platform(),
        "jax_backend": backend,
        "device": device,
        "processor": processor(),
    }


def processor() -> str:
    """Its name, where Linux tells it."""
    try:
        lines = pathlib.Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def peak_memory_mb() -> float:
    """Largest resident memory of the process so far, in 1e6 bytes."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak * (1.0 if sys.platform == "darwin" else 1024.0) / 1e6


def settings_of(job: Job) -> tuple[dict[str, Any], int, str]:
    """Settings of a job's library, decision steps and where the settings are from.

    Read from the library's TOML beside this file: the table of the environment's id, or one that names it in ``envs``, or
    that of its family (what stands behind the id's last hyphen), or ``defaults``.
    """
    tables = tomllib.loads(pathlib.Path(__file__).with_name(f"{job['library']}.toml").read_text())
    env = job["env"]
    names = [env, *(name for name, known in tables.items() if env in known.get("envs", ()))]
    names += [env.rsplit("-", 1)[1], "defaults"]
    known = next(tables[name] for name in names if name in tables)
    config = {
        name: value for name, value in known.items() if name not in ("envs", "settings", "total_timesteps")
    }
    return config, job.get("total_timesteps") or known["total_timesteps"], known["settings"]


def every(n_iterations: int, n_points: int = N_POINTS) -> int:
    """Iterations between evaluations, so that there are about ``n_points``, or one an iteration."""
    return max(1, round(n_iterations / n_points))


def read_job() -> tuple[Job, pathlib.Path]:
    """The job and the path of its row from the command line; keeps the process to the job's core."""
    parser = argparse.ArgumentParser(description="One run of the benchmark; started by benchmarks/bench.py.")
    parser.add_argument("job", help="JSON")
    parser.add_argument("row", type=pathlib.Path)
    arguments = parser.parse_args()
    job = json.loads(arguments.job)
    if job.get("core") is not None and hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, {job["core"]})
    return job, arguments.row


def write(path: pathlib.Path, result: Row) -> None:
    """Writes a row as a whole or not at all."""
    temporary = path.with_suffix(".part")
    temporary.write_text(json.dumps(result, allow_nan=False) + "\n")
    os.replace(temporary, path)


def measure(job: Job, path: pathlib.Path, run: Callable[[Job, Clock], Row]) -> None:
    """Runs a job and writes its row; called when the imports are done."""
    write(path, run(job, Clock(job.get("started"))))
