"""Writes a run to its directory as it goes on: rows, events, checkpoints. What cannot be written does not stop a run."""

from __future__ import annotations

import contextlib
import hashlib
import os
import secrets
import shutil
import sys
import time
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

import grpo_jax
from grpo_jax import shards
from grpo_jax.cli import parts, progress
from grpo_jax.cli.own_files import check_own, open_rows
from grpo_jax.cli.runs import Run, RunDirectory
from grpo_jax.files import open_plain, write_atomically
from grpo_jax.training.checkpoint import PARTS_NOTE, check_size, read_notes, to_bytes
from grpo_jax.training.loop import TrainState
from grpo_jax.training.run import Chunk

_INDEX = ("seed", "iteration", "decision_steps")
_TAGS = {
    "rollout": ("episode_return", "episode_length", "n_episodes"),
    "grpo": ("group_spread", "frac_zero_std", "nonfinite_groups"),
    "time": ("simulator_steps",),
}
_FLUSH_SECONDS = 10.0
_MAX_UNSEALED_BYTES = 512 << 20


class Recorder:
    """Writes a run to its directory as it goes on; a context manager.

    Rows and events of iterations behind the state that is gone on from are dropped: they will come again.

    Attributes:
      gap: iterations, first and last, whose rows could not be written; None: there is none.
    """

    def __init__(
        self, directory: RunDirectory, run: Run, state: TrainState | None, *, new_metrics: bool = False
    ) -> None:
        """Repairs what a killed run left, and opens the files.

        Args:
          directory: where to; created and locked already.
          run: what is run.
          state: the state that is gone on from, as the last checkpoint has it; None: the run begins.
          new_metrics: whether rows that are lost are given up; what is there of them is set aside.

        Raises:
          ValueError: rows of iterations that are done are missing or damaged.
        """
        self._directory, self._run = directory, run
        seeds, settings = range(run.n_seeds), range(len(run.settings))
        self._agents = [f"{p},{seed}" for p in settings for seed in seeds] or [str(seed) for seed in seeds]
        self._done = 0 if state is None else int(np.max(np.asarray(state.iteration)))
        steps = 0 if state is None else grpo_jax.count(state.decision_steps) // run.n_agents
        size = directory.checkpoint.stat().st_size if self._done else 0
        notes = read_notes(directory.checkpoint, size) if self._done else {}
        if run.keep > 1:
            check_own(directory.kept)
        rows = _Rows.of(directory, run, self._done, notes, new_metrics=new_metrics)
        self._header, self._good, self._digest, self.gap = rows
        self._csv = open_rows(directory.metrics, self._good)
        self._pending, self._pending_first = b"", self._done + 1
        self._events = _Events(directory, self._done, steps)
        self._tried_at, self._tried_iteration, self._saved_iteration = (
            time.monotonic(),
            self._done,
            self._done,
        )
        self._best = _best_return(directory, max(size, 64 << 20))
        self._troubles: set[str] = set()

    def __enter__(self) -> Recorder:
        return self

    def __exit__(self, *_: Any) -> None:
        self._csv.close()
        self._events.close()

    def __call__(self, chunk: Chunk, rates: dict[str, float]) -> None:
        """Adds a chunk's metrics, and a checkpoint where it is time for one; what fails is told once.

        Args:
          chunk: what ``grpo_jax.run`` hands to its callback.
          rates: further scalars for TensorBoard, by their name behind ``time/``.
        """
        # Rows before the checkpoint: whatever a checkpoint has done is in the file.
        self._done = chunk.iteration
        self._add_rows(chunk)
        self._add_events(chunk, rates)
        if self.is_due(chunk):
            try:
                self.checkpoint(chunk.state, float(np.mean(chunk.metrics["episode_return"][..., -1])))
            except OSError as error:
                self._tell_once("checkpoint", f"{error}. Training goes on, and the next checkpoint is tried")

    def is_due(self, chunk: Chunk) -> bool:
        """Whether it is time for a checkpoint."""
        seconds, iterations = self._run.cadence
        if seconds is not None:
            is_due = time.monotonic() - self._tried_at > seconds
        else:
            is_due = chunk.iteration // (iterations or 1) > self._tried_iteration // (iterations or 1)
        return is_due and self._run.can_stop(chunk.iteration)

    def checkpoint(self, state: TrainState, episode_return: float = float("nan")) -> None:
        """Writes the whole state, and once more where it is the best so far.

        Args:
          state: of iteration ``chunk.iteration``, or the first one.
          episode_return: that the run's table shows for it; NaN: none yet.

        Raises:
          OSError: names the file; what was there before is kept.
        """
        self._tried_at, self._tried_iteration = time.monotonic(), self._done
        self._write_pending(sync=True)
        written = self._done
        if self._pending:
            written = self._pending_first - 1
        notes: dict[str, Any] = {
            "metrics": {"bytes": self._good, "sha256": self._digest.hexdigest(), "iteration": written},
            "gap": self.gap,
            "iteration": self._done,
        }
        if np.isfinite(episode_return):
            notes["episode_return"] = episode_return
        content = self.content(state, notes)
        write_atomically(self._directory.checkpoint, content)
        self._saved_iteration = self._done
        self._troubles.discard("checkpoint")
        try:
            if self._run.keep > 1 and self._done:
                self._keep(content)
            # The mean over a sweep's settings, good and bad ones, says nothing about a checkpoint.
            if episode_return > self._best and not self._run.settings:
                write_atomically(self._directory.best, content)
                self._best = episode_return
        except OSError as error:
            self._tell_once("copies", f"{error}. The checkpoint itself is written; training goes on")
        parts.remove_unused(
            self._directory.parts,
            (self._directory.checkpoint, self._directory.best, *self._directory.kept.glob("*.msgpack")),
        )

    def content(self, state: TrainState, notes: dict[str, Any]) -> bytes:
        """What a checkpoint's file holds: the state, or where its parts lie, which are written here."""
        if self._is_in_parts(state):
            return to_bytes({}, notes | {PARTS_NOTE: parts.write(self._directory.parts, state, self._done)})
        check_size(state)  # before anything is gathered
        return to_bytes(shards.gather(state), notes)

    def _is_in_parts(self, state: TrainState) -> bool:
        # States of a sweep are read whole by the one process that sums it up.
        return not self._run.settings and parts.suit(state, self._directory.path)

    def last_good(self) -> str:
        """Where the last checkpoint lies, in words."""
        return (
            f"The last good checkpoint is {self._directory.checkpoint}, of iteration {self._saved_iteration}"
        )

    def finish(self) -> None:
        """Writes what could not be written before, if that is possible now; sets ``gap`` otherwise."""
        self._write_pending(sync=True)
        if self._pending:
            first = self._pending_first if self.gap is None else self.gap[0]
            self.gap = (first, self._done)

    def _keep(self, content: bytes) -> None:
        kept = self._directory.kept
        kept.mkdir(exist_ok=True)
        write_atomically(kept / f"iteration_{self._done:09d}.msgpack", content)
        # Those behind this one are of a run that went on from here once already: they will come again.
        for old in sorted(kept.glob("iteration_*.msgpack"))[: -self._run.keep]:
            old.unlink()

    def _add_rows(self, chunk: Chunk) -> None:
        names = [name for name in sorted(chunk.metrics) if name not in _INDEX]
        first_names = (*(("setting",) if self._run.settings else ()), *_INDEX[:2])
        text = b""
        if not self._header:
            self._header = [*first_names, _INDEX[2], *names]
            text = (",".join(self._header) + "\n").encode()
        # A file that another version began keeps its columns.
        unknown = np.full_like(chunk.metrics["decision_steps"], np.nan)
        columns = [
            np.atleast_2d(chunk.metrics.get(name, unknown)) for name in self._header[len(first_names) :]
        ]
        table = np.stack(columns, axis=-1).swapaxes(0, 1).tolist()  # [iteration][agent][column]
        row = ",".join(["%s", "%d", *["%.9g"] * len(columns)]) + "\n"  # 9 digits hold a float32 exactly
        first = chunk.iteration - len(table) + 1
        text += "".join(
            row % (agent, first + i, *values)
            for i, agents in enumerate(table)
            for agent, values in zip(self._agents, agents, strict=True)
        ).encode()
        if not self._pending:
            self._pending_first = first
        self._pending += text
        self._write_pending()

    def _write_pending(self, *, sync: bool = False) -> None:
        """Adds rows to the file, all of them or none; they wait for the next try where that fails."""
        try:
            written = 0
            while written < len(self._pending):
                written += self._csv.write(self._pending[written:]) or 0
            if sync:  # a power cut must not take rows that a checkpoint counts on
                os.fsync(self._csv.fileno())
        except OSError as error:
            with contextlib.suppress(OSError):
                os.ftruncate(self._csv.fileno(), self._good)
            reason = f"{self._directory.metrics} cannot be written ({error.strerror})"
            self._tell_once("metrics", f"{reason}: its rows wait in memory, training goes on")
            return
        self._good += len(self._pending)
        self._digest.update(self._pending)
        self._pending = b""

    def _add_events(self, chunk: Chunk, rates: dict[str, float]) -> None:
        scalars = {f"time/{name}": rate for name, rate in rates.items()}
        for name, values in chunk.metrics.items():
            known = values[~np.isnan(values)]
            if known.size and name != "decision_steps":
                room = next((room for room, names in _TAGS.items() if name in names), "train")
                with np.errstate(invalid="ignore"):  # inf - inf, of an agent that failed
                    scalars[f"{room}/{name}"] = float(known.mean(dtype=np.float64))
        self._events.add(scalars, chunk.decision_steps // self._run.n_agents)

    def _tell_once(self, what: str, message: str) -> None:
        if what not in self._troubles:
            self._troubles.add(what)
            progress.warn(message)


class _Events:
    """TensorBoard's files. No thread: one that dies would leave a queue that nobody empties, and a run that waits."""

    def __init__(self, directory: RunDirectory, done: int, steps: int) -> None:
        check_own(directory.tensorboard)
        if not done:
            shutil.rmtree(directory.tensorboard, ignore_errors=True)
        self._path, self._done, self._steps = directory.tensorboard, done, steps
        self._writer: Any = None
        self._failed = False
        self._flushed_at = -_FLUSH_SECONDS

    def add(self, scalars: dict[str, float], step: int) -> None:
        if self._failed:
            return
        try:
            self._write(scalars, step)
        except (OSError, ValueError) as error:
            self._failed = True
            self.close()
            progress.warn(f"{self._path} cannot be written ({error}): training goes on without TensorBoard")

    def _write(self, scalars: dict[str, float], step: int) -> None:
        from tensorboardX.proto.event_pb2 import Event, SessionLog
        from tensorboardX.proto.summary_pb2 import Summary
        from tensorboardX.record_writer import RecordWriter

        def add(**content: Any) -> None:
            self._writer.write(Event(wall_time=time.time(), **content).SerializeToString())

        if self._writer is None:
            self._path.mkdir(exist_ok=True)
            # A name of its own, which nobody can have linked elsewhere, even within the same second.
            name = f"events.out.tfevents.{int(time.time())}.{self._done}.{secrets.token_hex(4)}"
            self._writer = RecordWriter(str(self._path / name))
            add(file_version="brain.Event:2")
            if self._done:  # hides the events behind the state that is gone on from
                add(step=self._steps + 1, session_log=SessionLog(status=SessionLog.START))
        values = [Summary.Value(tag=tag, simple_value=value) for tag, value in scalars.items()]
        add(step=step, summary=Summary(value=values))
        if time.monotonic() - self._flushed_at > _FLUSH_SECONDS:
            self._flushed_at = time.monotonic()
            self._writer.flush()

    def close(self) -> None:
        writer, self._writer = self._writer, None
        if writer is not None:
            with contextlib.suppress(OSError, ValueError):
                writer.close()


class _Rows(NamedTuple):
    """What ``metrics.csv`` holds of the iterations that are done.

    Attributes:
      header: its columns; empty: it is begun anew.
      n_bytes: of these rows and the header.
      digest: of them.
      gap: iterations whose rows were never written, known to the checkpoint.
    """

    header: list[str]
    n_bytes: int
    digest: Any
    gap: tuple[int, int] | None

    @classmethod
    def of(
        cls, directory: RunDirectory, run: Run, done: int, notes: dict[str, Any], *, new_metrics: bool
    ) -> _Rows:
        """Verifies the rows; says so where others, behind them, are going to be dropped."""
        path, known = directory.metrics, notes.get("metrics")  # none in files that are older than notes
        rows = cls([], 0, hashlib.sha256(), None)
        try:
            if done and known is None:
                rows = cls._unsealed(path, run.n_seeds, done)
            elif done and known is not None:
                rows = cls._sealed(path, done, **known, gap=notes.get("gap"))
        except (OSError, ValueError, TypeError) as error:
            if new_metrics:
                progress.warn(f"the rows up to iteration {done} are given up ({error})")
                with contextlib.suppress(FileNotFoundError):
                    path.replace(path.with_name("metrics.csv.damaged"))
                return rows
            raise ValueError(
                f"{path} does not hold the rows up to iteration {done}, which are done ({error}). Put back what was"
                f" there; or give them up: `grpo-jax resume {directory.path} --new-metrics`"
            ) from error
        with contextlib.suppress(FileNotFoundError):
            if path.stat().st_size > rows.n_bytes:
                progress.note(
                    f"{path}: what lies behind the checkpoint's iteration {done} is dropped; it comes again"
                )
        return rows

    @classmethod
    def _sealed(cls, path: Path, done: int, *, bytes: int, sha256: str, iteration: int, gap: Any) -> _Rows:
        digest = hashlib.sha256()
        with open_plain(path, sys.maxsize) as file:
            size = os.fstat(file.fileno()).st_size
            if not 0 <= bytes <= size:
                raise ValueError(f"{size} bytes of {bytes} are there")
            header = file.readline(1 << 16).decode().strip().split(",")
            file.seek(0)
            for start in range(0, bytes, 1 << 20):
                digest.update(file.read(min(1 << 20, bytes - start)))
        if digest.hexdigest() != sha256:
            raise ValueError("their checksum does not fit: they are damaged")
        gap = (iteration + 1, done) if iteration < done and gap is None else gap
        return cls(header if bytes else [], bytes, digest, gap and (int(gap[0]), int(gap[1])))

    @classmethod
    def _unsealed(cls, path: Path, n_seeds: int, done: int) -> _Rows:
        """Counts the rows of a run whose checkpoint is older than checksums."""
        digest, n_bytes = hashlib.sha256(), 0
        with open_plain(path, sys.maxsize) as file:
            header = file.readline(1 << 16)
            if tuple(header.decode().strip().split(",")[:3]) != _INDEX:
                raise ValueError("the first line names no columns")
            digest.update(header)
            n_bytes += len(header)
            for i in range(n_seeds * done):
                row = file.readline(1 << 16)
                whole = row.endswith(b"\n") and row.count(b",") == header.count(b",")
                if not (whole and row.startswith(b"%d,%d," % (i % n_seeds, i // n_seeds + 1))):
                    raise ValueError(f"{i} rows of {n_seeds * done} are there, in order and whole")
                digest.update(row)
                n_bytes += len(row)
        return cls(header.decode().strip().split(","), n_bytes, digest, None)


def _best_return(directory: RunDirectory, max_bytes: int) -> float:
    """The return of ``best.msgpack``; minus infinity where there is none, or none that can be read."""
    try:
        known = read_notes(directory.best, max_bytes).get("episode_return")
        if type(known) is float:
            return known
        reason = f"{directory.best} names no return"
    except FileNotFoundError:
        return -np.inf
    except (OSError, ValueError) as error:
        reason = str(error)
    progress.warn(f"{reason}: the next checkpoint with a return takes its place")
    return -np.inf
