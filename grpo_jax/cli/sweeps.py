"""Sweeps on the command line: the programs of one, and what is written when they are done."""

from __future__ import annotations

import csv
import dataclasses
import io
import math
import operator
from pathlib import Path
from typing import Any

import jax
import numpy as np

from grpo_jax.cli import plots, progress
from grpo_jax.cli.runs import Run, RunDirectory
from grpo_jax.files import write_atomically
from grpo_jax.training.loop import TrainState, iterations_for
from grpo_jax.training.sweep import Part, Sweep, join
from grpo_jax.worlds.base import World

_MAX_LINES = 10
"""So many settings that failed, and seeds of each, are named; twice as many settings are printed."""


def directories(directory: RunDirectory, run: Run) -> list[tuple[list[int], Run, RunDirectory]]:
    """The settings, the run and the directory of each program; of a single one, the directory itself."""
    programs = run.programs()
    if len(programs) == 1:
        return [(*programs[0], directory)]
    return [(indices, program, directory.program(i)) for i, (indices, program) in enumerate(programs)]


def prepare(child: RunDirectory, program: Run) -> None:
    """Begins the directory of a program, which is ``locked``, or checks that it is this program's.

    Raises:
      ValueError: another run lies there.
    """
    if child.is_new():
        child.create(program)
        return
    there = child.read()
    free = {name: getattr(program, name) for name in ("total_timesteps", "checkpoint_every", "keep")}
    if dataclasses.replace(there, **free) != program:
        raise ValueError(f"{child.path} holds another run than this sweep's: move it away")


def result(directory: RunDirectory, run: Run) -> Sweep:
    """What a finished sweep came to, read from its directory.

    Raises:
      FileNotFoundError, ValueError: it is not finished, or damaged.
    """
    parts = []
    for indices, program, child in directories(directory, run):
        _, state = child.restore(program)
        if state is None:
            raise FileNotFoundError(f"{child.path} has no checkpoint: the sweep is not finished")
        metrics: dict[str, np.ndarray] = {}
        if child.metrics.stat().st_size:  # none, where all failed at once
            metrics = child.read_metrics(("decision_steps", "episode_return"))
        parts.append(Part(indices, state, metrics, iterations_for(program.configs[0], run.total_timesteps)))
    return join(run.settings, run.configs, run.n_seeds, parts)


def best(directory: RunDirectory, run: Run, checkpoint: Path | None) -> tuple[Run, World, TrainState]:
    """The best setting of a finished sweep as a run of its seeds, its world and state: of the last checkpoint, or of another.

    Raises:
      FileNotFoundError, ValueError: the sweep is not finished, or no setting has a score.
    """
    if not directory.best_config.exists():
        raise FileNotFoundError(
            f"directory={directory.path} has no best setting yet: go on by `grpo-jax resume {directory.path}`"
        )
    index = result(directory, run).best
    for indices, program, child in directories(directory, run):
        if index in indices:
            world, state = child.restore(program, checkpoint)
            assert state is not None
            first = indices.index(index) * run.n_seeds
            seeds = slice(first, first + run.n_seeds) if run.n_seeds > 1 else first
            state = jax.tree.map(operator.itemgetter(seeds), state)
            print(f"the best setting: {_words(run.settings[index])}")
            run = dataclasses.replace(run, config=run.configs[index], settings=())
            return run, world, state
    raise ValueError(f"directory={directory.path}: no setting of this sweep has a score")


def sum_up(directory: RunDirectory, run: Run) -> bool:
    """Writes and prints what a sweep came to; whether any setting has a score.

    Raises:
      OSError: the table or the best config cannot be written.
    """
    done = result(directory, run)
    places = {p: child for indices, _, child in directories(directory, run) for p in indices}
    rows = [
        {"setting": p, **row, "program": "." if places[p].path == directory.path else places[p].path.name}
        for p, row in enumerate(done.rows())
    ]
    text = io.StringIO()
    table = csv.DictWriter(text, list(rows[0]), lineterminator="\n")
    table.writeheader()
    table.writerows(rows)
    write_atomically(directory.sweep_table, text.getvalue().encode())
    if done.best is not None:
        write_atomically(directory.best_config, (done.configs[done.best].to_json() + "\n").encode())
    else:
        directory.best_config.unlink(missing_ok=True)
    try:
        if done.metrics:
            plots.sweep(
                directory.sweep_picture, done, [_words(s) for s in done.settings], title=f"GRPO on {run.env}"
            )
    except (OSError, ValueError) as error:
        progress.warn(f"no picture of the sweep was drawn ({error})")
    _print(done, run)
    return done.best is not None


def _print(done: Sweep, run: Run) -> None:
    order = sorted(range(len(done.settings)), key=lambda p: (-done.scores[p], p))
    rows = done.rows()
    shown = [[_cell(rows[p][name]) for name in rows[p]] for p in order[: 2 * _MAX_LINES]]
    progress.print_table(list(rows[0]), shown)
    if len(order) > len(shown):
        print(f"... and {len(order) - len(shown)} more in sweep.csv")
    failed = np.flatnonzero(np.any(done.failed_at > 0, axis=1))
    for p in failed[:_MAX_LINES]:
        seeds = np.flatnonzero(done.failed_at[p])
        told = [f"iteration {done.failed_at[p, seed]} of seed {seed}" for seed in seeds[:_MAX_LINES]]
        more = [f"{len(seeds) - _MAX_LINES} more"] if len(seeds) > _MAX_LINES else []
        progress.warn(
            f"{_words(done.settings[p])}: numbers became NaN or inf in {', '.join(told + more)}; they count as"
            " the worst, and their states are those of the iteration before"
        )
    if len(failed) > _MAX_LINES:
        progress.warn(f"so they did in {len(failed) - _MAX_LINES} more settings, which sweep.csv names")
    if done.best is None:
        progress.warn(
            "no setting has a score: lower learning_rate, or make runs longer until an episode ends"
        )
    else:
        print(
            f"best of {len(order)} settings, {run.n_seeds} seeds each: {_words(done.settings[done.best])}, score"
            f" {done.scores[done.best]:.2f} (interquartile mean of the returns of the last tenth of training)"
        )


def _words(setting: dict[str, Any]) -> str:
    return ", ".join(f"{name}={_cell(value)}" for name, value in setting.items())


def _cell(value: Any) -> str:
    if not isinstance(value, float):
        return str(value)
    return "-" if math.isnan(value) else f"{value:.6g}"
