"""A run directory: what a run leaves on disk, so that it can be resumed, evaluated, plotted and compared.

====================== ==================================================================================
``config.json``        environment, config, seeds, length and versions: all that ``resume`` needs
``checkpoint.msgpack`` the whole training state, every few seconds and at the end
``policy.msgpack``     the policy alone (parameters and observation statistics), at the end
``metrics.csv``        one row for each iteration and seed
``tensorboard/``       the same, mean over seeds and over the iterations between two looks of the host
``learning_curve.png`` return against decision steps, at the end
====================== ==================================================================================
"""

from __future__ import annotations

import dataclasses
import json
import shutil
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

import grpo_jax
from grpo_jax.config import GRPOConfig
from grpo_jax.files import write_atomically
from grpo_jax.training.checkpoint import restore, save
from grpo_jax.training.loop import TrainState
from grpo_jax.training.run import Chunk
from grpo_jax.worlds.base import World

CHECKPOINT_SECONDS = 10.0
"""How often a checkpoint is written while training goes on, about."""

_INDEX = ("seed", "iteration", "decision_steps")
_TAGS = {
    "rollout": ("episode_return", "episode_length", "n_episodes"),
    "grpo": ("group_spread", "frac_zero_std", "nonfinite_groups"),
    "time": ("simulator_steps",),
}


@dataclasses.dataclass(frozen=True)
class Run:
    """All that decides what a run computes.

    Attributes:
      env: a gymnax id.
      config: the settings.
      seed: of the run's key; several seeds are split off this one.
      n_seeds: runs side by side.
      total_timesteps: decision steps of each seed.
    """

    env: str
    config: GRPOConfig
    seed: int
    n_seeds: int
    total_timesteps: int

    @property
    def vmapped(self) -> int | None:
        """``n_seeds`` as ``grpo_jax.run`` and ``restore`` want it: a single run has no axis of seeds."""
        return None if self.n_seeds == 1 else self.n_seeds

    def to_json(self) -> str:
        """One readable JSON object, the versions that wrote it included."""
        content = vars(self) | {
            "versions": {"grpo_jax": grpo_jax.__version__, "jax": jax.__version__},
            "config": json.loads(self.config.to_json()),
        }
        return json.dumps(content, indent=2) + "\n"


class RunDirectory:
    """Where the files of a run lie."""

    def __init__(self, path: Path) -> None:
        """Names the files; nothing is touched."""
        self.path = path
        self.config = path / "config.json"
        self.checkpoint = path / "checkpoint.msgpack"
        self.policy = path / "policy.msgpack"
        self.metrics = path / "metrics.csv"
        self.tensorboard = path / "tensorboard"
        self.learning_curve = path / "learning_curve.png"
        self.files = tuple(vars(self).values())[1:]

    def create(self, run: Run, *, overwrite: bool = False) -> None:
        """Makes the directory and writes ``config.json``.

        Args:
          run: what will be run.
          overwrite: removes the files of an older run first; other files are left alone.

        Raises:
          FileExistsError: the directory holds a run already.
        """
        if self.config.exists() and not overwrite:
            raise FileExistsError(
                f"out={self.path} already holds a run; go on with it by `grpo-jax resume {self.path}`,"
                " choose another --out, or pass --overwrite"
            )
        self.path.mkdir(parents=True, exist_ok=True)
        for file in self.files:
            if file.is_dir():
                shutil.rmtree(file)
            else:
                file.unlink(missing_ok=True)
        self.write(run)

    def write(self, run: Run) -> None:
        """Writes ``config.json``."""
        write_atomically(self.config, run.to_json().encode())

    def read(self) -> Run:
        """What ``config.json`` says.

        Raises:
          FileNotFoundError: the directory holds no run.
          ValueError: ``config.json`` is damaged.
        """
        try:
            content = json.loads(self.config.read_text(encoding="utf-8"))
            config = GRPOConfig.from_json(json.dumps(content["config"]))
            names = ("env", "seed", "n_seeds", "total_timesteps")
            return Run(config=config, **{name: content[name] for name in names})
        except (FileNotFoundError, NotADirectoryError) as error:
            raise FileNotFoundError(
                f"directory={self.path} holds no run: {self.config} is missing"
            ) from error
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(f"{self.config} is damaged ({type(error).__name__}: {error})") from error

    def restore(self, run: Run, world: World) -> TrainState | None:
        """The state of the last checkpoint, None where the run was stopped before the first.

        Raises:
          ValueError: the checkpoint is damaged, or of another run.
        """
        if not self.checkpoint.exists():
            return None
        return restore(self.checkpoint, run.config, world, n_seeds=run.vmapped)

    def read_metrics(self, names: Sequence[str]) -> dict[str, np.ndarray]:
        """Columns of ``metrics.csv``, each ``[n_seeds, n_iterations]``."""
        with self.metrics.open(encoding="utf-8") as file:
            header = file.readline().strip().split(",")
        columns = [header.index(name) for name in ("seed", *names)]
        table = np.loadtxt(self.metrics, delimiter=",", skiprows=1, usecols=columns, ndmin=2)
        n_seeds = len(np.unique(table[:, 0]))
        by_seed = table.reshape(-1, n_seeds, len(columns)).transpose(2, 1, 0)
        return dict(zip(names, by_seed[1:], strict=True))


class Recorder:
    """Writes a run to its directory as it goes on; a context manager.

    Rows and events of iterations behind the state that is gone on from are dropped: they will come again.
    """

    def __init__(self, directory: RunDirectory, run: Run, state: TrainState | None) -> None:
        """Opens the files.

        Args:
          directory: where to; created already.
          run: what is run.
          state: the state that is gone on from; None: the run begins.
        """
        from tensorboardX import SummaryWriter

        self._directory, self._n_seeds = directory, run.n_seeds
        done = 0 if state is None else int(np.max(np.asarray(state.iteration)))
        steps = 0 if state is None else grpo_jax.count(state.decision_steps) // run.n_seeds
        _drop_rows(directory.metrics, behind=done)
        self._csv = directory.metrics.open("a", encoding="utf-8")
        if not done:
            shutil.rmtree(directory.tensorboard, ignore_errors=True)
        self._events = SummaryWriter(
            str(directory.tensorboard),
            purge_step=steps + 1 if done else None,
            flush_secs=10,
            filename_suffix=f".{done}",  # a resumed run has a file of its own, even within the same second
        )
        self._saved = time.monotonic()

    def __enter__(self) -> Recorder:
        return self

    def __exit__(self, *_: Any) -> None:
        self._csv.close()
        self._events.close()

    def __call__(self, chunk: Chunk, rates: dict[str, float]) -> None:
        """Adds a chunk's metrics, and a checkpoint where the last one is old.

        Args:
          chunk: what ``grpo_jax.run`` hands to its callback.
          rates: further scalars for TensorBoard, by their name behind ``time/``.
        """
        # Rows before the checkpoint: whatever a checkpoint has done is in the file.
        self._add_rows(chunk)
        self._add_events(chunk, rates)
        if time.monotonic() - self._saved > CHECKPOINT_SECONDS:
            self.checkpoint(chunk.state)

    def checkpoint(self, state: TrainState) -> None:
        """Writes the whole state."""
        save(self._directory.checkpoint, state)
        self._saved = time.monotonic()

    def _add_rows(self, chunk: Chunk) -> None:
        names = [name for name in sorted(chunk.metrics) if name not in _INDEX]
        if self._csv.tell() == 0:
            self._csv.write(",".join((*_INDEX, *names)) + "\n")
        columns = [np.atleast_2d(chunk.metrics[name]) for name in ("decision_steps", *names)]
        table = np.stack(columns, axis=-1).swapaxes(0, 1).tolist()  # [iteration][seed][column]
        row = ",".join(["%d", "%d", *["%.9g"] * len(columns)]) + "\n"  # 9 digits hold a float32 exactly
        first = chunk.iteration - len(table) + 1
        self._csv.writelines(
            row % (seed, first + i, *values)
            for i, seeds in enumerate(table)
            for seed, values in enumerate(seeds)
        )
        self._csv.flush()

    def _add_events(self, chunk: Chunk, rates: dict[str, float]) -> None:
        step = chunk.decision_steps // self._n_seeds
        for name, values in chunk.metrics.items():
            known = values[~np.isnan(values)]
            if known.size and name != "decision_steps":
                room = next((room for room, names in _TAGS.items() if name in names), "train")
                self._events.add_scalar(f"{room}/{name}", float(known.mean()), step)
        for name, rate in rates.items():
            self._events.add_scalar(f"time/{name}", rate, step)


def _drop_rows(path: Path, *, behind: int) -> None:
    """Cuts metrics.csv behind an iteration, and a last row that was not written to its end."""
    if not path.exists():
        return
    with path.open("r+b") as file:
        end = len(file.readline()) if behind else 0
        for line in file:
            if not line.endswith(b"\n") or int(line.split(b",", 2)[1]) > behind:
                break
            end += len(line)
        file.truncate(end)
