"""What a run shows on the terminal, and hears from it: progress, warnings, results, signals."""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from grpo_jax import shards
from grpo_jax.cli.runs import Run
from grpo_jax.config import GRPOConfig
from grpo_jax.training.evaluate import Episodes
from grpo_jax.training.run import Chunk

PLAIN_SECONDS = 10.0
"""How often a line is printed where stdout is no terminal."""


class Progress:
    """A progress bar, or now and then a plain line where stdout is no terminal; a context manager."""

    def __init__(self, decision_steps: int = 0, simulator_steps: int = 0) -> None:
        """Prepares, without printing yet.

        Args:
          decision_steps: that were done before, of all seeds: rates count from there.
          simulator_steps: as many.
        """
        from rich import progress
        from rich.console import Console

        self._before = (decision_steps, simulator_steps)
        self._printed = -PLAIN_SECONDS
        self._bar: progress.Progress | None = None
        self._compiling = contextlib.ExitStack()
        console = Console()
        if console.is_terminal:
            self._bar = progress.Progress(
                progress.BarColumn(bar_width=10),
                progress.TaskProgressColumn(),
                progress.TextColumn("{task.fields[line]}"),
                progress.TimeRemainingColumn(compact=True),
                console=console,
            )

    def __enter__(self) -> Progress:
        self._compiling.enter_context(waiting("compiling"))
        return self

    def __exit__(self, *_: Any) -> None:
        self._compiling.close()
        if self._bar is not None:
            self._bar.stop()

    def __call__(self, chunk: Chunk) -> dict[str, float]:
        """Shows a chunk.

        Returns:
          Steps a second since training began here, of all seeds together, by name.
        """
        now = (chunk.decision_steps, chunk.simulator_steps)
        decisions, simulated = (
            (after - before) / max(chunk.seconds, 1e-9)
            for after, before in zip(now, self._before, strict=True)
        )
        reward = f"return {_over_seeds(chunk.metrics['episode_return'])}"
        entropy = f"entropy {np.nanmean(chunk.metrics['entropy'][..., -1]):.2f}"
        self._compiling.close()
        if self._bar is not None:
            if not self._bar.tasks:
                self._bar.start()
                self._task = self._bar.add_task("", total=chunk.n_iterations, line="")
            # Short: a bar and its line share 80 columns.
            line = f"{reward}  {_short(decisions)} steps/s  {_short(simulated)} simulated/s  {entropy}"
            self._bar.update(self._task, completed=chunk.iteration, line=line)
        elif time.monotonic() - self._printed > PLAIN_SECONDS or chunk.iteration == chunk.n_iterations:
            self._printed = time.monotonic()
            line = f"{reward}, {rates_text(decisions, simulated)}, {entropy}"
            print(f"iteration {chunk.iteration}/{chunk.n_iterations}: {line}", flush=True)
        return {"decision_steps_per_second": decisions, "simulator_steps_per_second": simulated}


@contextlib.contextmanager
def waiting(what: str) -> Iterator[None]:
    """Shows for how long something goes on: on a terminal all the time, elsewhere in a line now and then.

    Args:
      what: goes on, such as "compiling".
    """
    from rich import progress
    from rich.console import Console

    console = Console()
    if console.is_terminal:
        columns = (
            progress.SpinnerColumn(),
            progress.TextColumn("{task.description}"),
            progress.TimeElapsedColumn(),
        )
        with progress.Progress(*columns, console=console, transient=True) as bar:
            bar.add_task(f"{what} ...", total=None)
            yield
        return
    start, done = time.monotonic(), threading.Event()

    def tell() -> None:
        with contextlib.suppress(OSError, ValueError):  # nobody reads any more: others will notice
            while not done.wait(PLAIN_SECONDS):
                print(f"{what} for {time.monotonic() - start:.0f} s", flush=True)

    thread = threading.Thread(target=tell, daemon=True)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()


def drop_output() -> None:
    """Sends what is still to be printed nowhere: the pipe behind stdout is closed."""
    with contextlib.suppress(OSError, ValueError):  # a stdout that is no file
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, sys.stdout.fileno())
        os.close(nowhere)


class Stopped(KeyboardInterrupt):
    """A signal asked this process to end.

    Attributes:
      signum: which one.
    """

    def __init__(self, signum: int) -> None:
        super().__init__(signum)
        self.signum = signum


class Interrupt:
    """Makes the first Ctrl-C or SIGTERM a wish to stop after the chunk that is running; a context manager.

    Attributes:
      requested: the signal that came; None: none. A second one stops at once, by ``Stopped``.
      can_wait: whether iterations run that can be saved; elsewhere the first signal stops at once.
    """

    requested: int | None = None
    can_wait = False

    def __enter__(self) -> Interrupt:
        self._previous: dict[int, Any] = {}
        if threading.current_thread() is threading.main_thread():  # elsewhere Python allows no handlers
            self._previous = {
                signum: signal.signal(signum, self._handle) for signum in (signal.SIGINT, signal.SIGTERM)
            }
        return self

    def __exit__(self, *_: object) -> None:
        for signum, previous in self._previous.items():
            signal.signal(signum, previous)

    def agree(self) -> None:
        """Makes a signal that came to one of several processes a wish of all; all call it."""
        if heard := shards.largest(self.requested or 0):  # else one that came meanwhile would be forgotten
            self.requested = heard

    def _handle(self, signum: int, _: object) -> None:
        if self.requested is not None or not self.can_wait:
            raise Stopped(signum)
        self.requested = signum
        print(f"{signal_name(signum)}: saving after the iterations that are running ...", flush=True)


def signal_name(signum: int) -> str:
    """What people call it."""
    return "Ctrl-C" if signum == signal.SIGINT else signal.Signals(signum).name


def note(message: str) -> None:
    """Prints what was done without being asked for, and is no trouble."""
    print(f"note: {message}", flush=True)


def warn(message: str) -> None:
    """Prints a loud warning to stderr."""
    from rich.console import Console

    Console(stderr=True, soft_wrap=True).print(f"WARNING: {message}", style="bold yellow", highlight=False)


def rates_text(decisions: float, simulated: float) -> str:
    """Rates of decision and simulator steps, readable."""
    return f"{_short(decisions)} decision steps/s, {_short(simulated)} simulator steps/s"


def print_start(run: Run, path: Path, iteration: int) -> None:
    """Prints one line: what begins, or goes on from an iteration, where, and with which settings."""
    default, devices = GRPOConfig(), jax.devices()
    changes = [
        f"{name}={value}" for name, value in vars(run.config).items() if value != getattr(default, name)
    ]
    seeds = f"seed {run.seed}" if run.n_seeds == 1 else f"{run.n_seeds} seeds from seed {run.seed}"
    if run.settings:
        seeds = f"{len(run.settings)} settings of {', '.join(run.settings[0])}, {seeds}"
    device = devices[0].device_kind + (f" (1 of {len(devices)})" if len(devices) > 1 else "")
    if jax.process_count() > 1:
        device = f"{devices[0].device_kind} ({len(devices)} in {jax.process_count()} processes)"
    done = f"from iteration {iteration} " if iteration else ""
    length = f"{done}to {run.total_timesteps:,} decision steps"
    settings = ", ".join(changes) or "default settings"
    print(f"{run.env} | {settings} | {device} | {seeds} | {length} | {path}", flush=True)


def print_results(episodes: Episodes, seconds: float, *, deterministic: bool) -> None:
    """Prints a table of returns, by seed and over all seeds.

    Args:
      episodes: ``[n_seeds, n_episodes]``.
      seconds: that playing them took.
      deterministic: how they were played.
    """
    from rich import box
    from rich.console import Console
    from rich.table import Table

    returns, lengths = np.asarray(episodes.returns, np.float64), np.asarray(episodes.lengths)
    n_seeds, n_episodes = returns.shape
    how = "deterministic" if deterministic else "sampled"
    title = f"{n_episodes} {how} episodes{' of each seed' if n_seeds > 1 else ''} ({seconds:.1f} s)"
    table = Table(title=title, box=box.SIMPLE, title_justify="left", title_style="bold")
    for name in ("", "return", "min", "median", "max", "length"):
        table.add_column(name, justify="left" if name == "" else "right", no_wrap=True)

    def add(
        name: str, mean: float, std: float, returns: np.ndarray, lengths: np.ndarray, **style: Any
    ) -> None:
        numbers = (np.min(returns), np.median(returns), np.max(returns), np.mean(lengths))
        table.add_row(name, f"{mean:.2f} ± {std:.2f}", *(f"{number:.2f}" for number in numbers), **style)

    for seed, (of_seed, length) in enumerate(zip(returns, lengths, strict=True)):
        name = f"seed {seed}" if n_seeds > 1 else "episodes"
        add(name, of_seed.mean(), of_seed.std(), of_seed, length, end_section=seed == n_seeds - 1)
    if n_seeds > 1:
        means = returns.mean(axis=1)
        add("over seeds", means.mean(), means.std(), means, lengths, style="bold")
    Console().print(table)
    if n_cut := int(np.sum(~np.asarray(episodes.finished))):
        print(f"{n_cut} episodes never ended and were cut; their returns count up to there.")


def print_table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Prints a plain table."""
    from rich import box
    from rich.console import Console
    from rich.table import Table

    table = Table(*columns, box=box.SIMPLE, padding=(0, 1, 0, 0))
    for column in table.columns:
        column.no_wrap = True
    for row in rows:
        table.add_row(*row)
    Console().print(table)


def error(message: object) -> None:
    """Prints one line to stderr."""
    print(f"error: {' '.join(str(message).split())}", file=sys.stderr)


def _over_seeds(values: np.ndarray) -> str:
    last = values[..., -1]
    if np.all(np.isnan(last)):
        return "-"
    return f"{np.nanmean(last):.1f}" + (f" ± {np.nanstd(last):.1f}" if last.size > 1 else "")


def _short(number: float) -> str:
    for size, letter in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if number >= size:
            return f"{number / size:.3g}{letter}"
    return f"{number:.0f}"
