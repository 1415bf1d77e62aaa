"""Runs side by side: which directories are seeds of one setting, and the numbers that they left."""

from __future__ import annotations

import dataclasses
import re
import struct
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from grpo_jax.cli import sweeps
from grpo_jax.cli.runs import Run, RunDirectory
from grpo_jax.config import GRPOConfig, field_names
from grpo_jax.worlds.suites import nearest

SECONDS = "seconds"
"""A column that ``metrics.csv`` does not have: TensorBoard's files know when a chunk was done."""

_MAX_EVENT_BYTES = 1 << 20
_MAX_WORDS = 3


@dataclasses.dataclass(frozen=True)
class Line:
    """One setting in one environment, with all of its seeds.

    Attributes:
      env: the environment's id.
      config: the settings.
      paths: directories of its runs.
      seeds: of the runs, and whether each is a seed of several.
      metrics: name -> ``[n_seeds, n_iterations]``.
      seconds: of training all of them, of a sweep's program an equal share; NaN: not known, or not asked for.
      rules: what else decides whether two runs are seeds of one setting.
    """

    env: str
    config: GRPOConfig
    paths: tuple[Path, ...]
    seeds: tuple[tuple[int, bool], ...]
    metrics: dict[str, np.ndarray]
    seconds: float
    rules: tuple[Any, ...]

    @property
    def n_seeds(self) -> int:
        """Seeds of all its runs."""
        return len(next(iter(self.metrics.values())))

    def joined(self, other: Line) -> Line | None:
        """Both as one, of the iterations that both have; None where they are not seeds of one setting, or the same seeds."""
        same = (self.env, self.config, self.rules) == (other.env, other.config, other.rules)
        if not same or set(self.seeds) & set(other.seeds):
            return None
        metrics = {}
        for name, values in self.metrics.items():
            n = min(values.shape[1], other.metrics[name].shape[1])
            metrics[name] = np.concatenate([values[:, :n], other.metrics[name][:, :n]])
        return dataclasses.replace(
            self,
            paths=self.paths + other.paths,
            seeds=self.seeds + other.seeds,
            metrics=metrics,
            seconds=self.seconds + other.seconds,
        )


def read(paths: Sequence[Path], names: Sequence[str]) -> list[Line]:
    """The lines of run directories, each setting of a sweep one of its own.

    Args:
      paths: run directories. Runs of equal settings and other seeds become one line.
      names: columns of ``metrics.csv``, or ``SECONDS``.

    Raises:
      FileNotFoundError: no run, or one without rows.
      ValueError: a column that there is not (suggests the nearest), or damaged files.
    """
    if not paths:
        raise ValueError("name at least one run directory, as in runs/CartPole-v1")
    lines: list[Line] = []
    for path in paths:
        for line in _lines_of(RunDirectory(path), names):
            for i, before in enumerate(lines):
                if (joined := before.joined(line)) is not None:
                    lines[i] = joined
                    break
            else:
                lines.append(line)
    return lines


def labels(lines: Sequence[Line]) -> list[str]:
    """What tells each line from the others of its environment: settings that differ, where they are few, or directories."""
    words = [differences(line, [other for other in lines if other.env == line.env]) for line in lines]
    short = [
        ", ".join(word) if 0 < len(word) <= _MAX_WORDS else _directories(line)
        for word, line in zip(words, lines, strict=True)
    ]
    named = [(line.env, label) for line, label in zip(lines, short, strict=True)]
    return [
        label if named.count(name) == 1 else _directories(line)
        for line, label, name in zip(lines, short, named, strict=True)
    ]


def differences(line: Line, others: Sequence[Line]) -> list[str]:
    """The settings, such as ``horizon=8``, in which a line differs from any of the others."""
    return [
        f"{name}={_word(getattr(line.config, name))}"
        for name in field_names()
        if any(getattr(other.config, name) != getattr(line.config, name) for other in others)
    ]


def _directories(line: Line) -> str:
    more = f" and {len(line.paths) - 1} more" if len(line.paths) > 1 else ""
    return f"{line.paths[0]}{more}"


def _word(value: Any) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value)


def _lines_of(directory: RunDirectory, names: Sequence[str]) -> Iterator[Line]:
    run = directory.read()
    for _, program, child in sweeps.directories(directory, run):
        metrics = _metrics(child, program, names)
        seconds = float(metrics[SECONDS][0, -1]) if SECONDS in names else np.nan
        for i, config in enumerate(program.configs):
            rows = slice(i * run.n_seeds, (i + 1) * run.n_seeds)
            yield Line(
                env=run.env,
                config=config,
                paths=(directory.path,),
                seeds=((run.seed, run.n_seeds > 1),),
                metrics={name: values[rows] for name, values in metrics.items()},
                seconds=seconds / len(program.configs),
                rules=(run.total_timesteps, run.opponent_every),
            )


def _metrics(directory: RunDirectory, run: Run, names: Sequence[str]) -> dict[str, np.ndarray]:
    """Columns of all agents of a program, ``[A, n_iterations]``."""
    path = directory.metrics
    if not path.exists() or not path.stat().st_size:
        raise FileNotFoundError(f"run={directory.path} has no rows yet: {path} is missing or empty")
    with path.open(encoding="utf-8") as file:
        header = file.readline().strip().split(",")
    columns = [name for name in names if name != SECONDS]
    for name in columns:
        if name not in header:
            near = nearest(name, header)
            hint = f"did you mean {' or '.join(near)}?" if near else f"it has {', '.join(header)}"
            raise ValueError(f"{path} has no column {name!r}; {hint}")
    try:
        metrics = directory.read_metrics([*columns, "decision_steps"])
    except ValueError as error:
        raise ValueError(f"{path} is damaged, or is being written: try again ({error})") from error
    steps = metrics["decision_steps"]
    if len(steps) != run.n_agents:
        raise ValueError(
            f"{path} holds {len(steps)} agents, and its config.json {run.n_agents}: it is damaged"
        )
    if SECONDS in names:
        known_steps = np.nanmax(steps, axis=0)
        seconds = _seconds(directory, run, known_steps)
        metrics[SECONDS] = np.broadcast_to(seconds, steps.shape)
    return {name: metrics[name] for name in names}


def _seconds(directory: RunDirectory, run: Run, steps: np.ndarray) -> np.ndarray:
    """Seconds of training, all agents together, after so many decision steps of each; NaN where no file tells."""
    points = [(0, 0.0)]
    names = (
        re.match(r"events\.out\.tfevents\.(\d+)\.(\d+)\.", path.name)
        for path in directory.tensorboard.glob("*")
    )
    for name in sorted(filter(None, names), key=lambda name: (int(name[1]), int(name[2]))):
        file = directory.tensorboard / name.string
        before, earlier = 0, 0.0
        for event in _events(file):
            if event.HasField(
                "session_log"
            ):  # what lies behind the state that this process went on from came again
                before = event.step - 1
                points = [point for point in points if point[0] <= before]
                earlier = points[-1][1]
            for value in event.summary.value:
                if value.tag == "time/decision_steps_per_second" and value.simple_value > 0:
                    done = (event.step - before) * run.n_agents
                    points.append((event.step, earlier + done / value.simple_value))
    known_steps, known_seconds = np.array(points).T
    if len(points) == 1:
        return np.full(steps.shape, np.nan)
    return np.interp(steps, known_steps, known_seconds)


def _events(path: Path) -> Iterator[Any]:
    """TensorBoard's events in a file, up to where it is torn."""
    from tensorboardX.proto.event_pb2 import Event

    with path.open("rb") as file:
        while len(head := file.read(12)) == 12:
            (size,) = struct.unpack("<Q", head[:8])
            body = file.read(size + 4) if size <= _MAX_EVENT_BYTES else b""
            if len(body) < size + 4:
                return
            yield Event.FromString(body[:size])
