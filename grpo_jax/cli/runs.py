"""A run directory: what a run leaves on disk, so that it can be resumed, evaluated, plotted and compared.

====================== ==================================================================================
``config.json``        environment, config, seeds, length and versions: all that ``resume`` needs
``checkpoint.msgpack`` the whole training state: before the first row, every few seconds, and at the end
``best.msgpack``       the one among those of the largest return (``episode_return``, mean over seeds)
``checkpoint.parts/``  where a state has 1 GiB or more: what these two then only name
``checkpoints/``       the last k of them, where ``keep`` is more than 1
``policy.msgpack``     the policy alone (parameters and observation statistics), at the end
``metrics.csv``        one row for each iteration and seed
``tensorboard/``       the same, mean over seeds and over the iterations between two looks of the host
``learning_curve.png`` return against decision steps, at the end
``sweep.csv``          of a sweep: a row for each setting, with its score, at the end
``sweep.png``          of a sweep: the same as a picture
``best_config.json``   of a sweep: the best setting, for ``train --from-config``
``program_1/``, ...    of a sweep whose settings are several programs: a run directory for each of them
====================== ==================================================================================

Each checkpoint knows how many bytes of ``metrics.csv`` belong to it, and their checksum.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import os
import shutil
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

import grpo_jax
from grpo_jax.cli import parts
from grpo_jax.cli.own_files import check_own, lock, open_own
from grpo_jax.config import GRPOConfig
from grpo_jax.files import (
    UnsealedWarning,
    read_bounded,
    remove_temporaries,
    write_atomically,
)
from grpo_jax.training.checkpoint import restore_state, shapes
from grpo_jax.training.loop import TrainState, iterations_for
from grpo_jax.training.parts import restore_parts
from grpo_jax.training.sweep import Setting, programs_of
from grpo_jax.types import tree_bytes
from grpo_jax.worlds.base import World

VERSION = 2
"""Of ``config.json``. Version 1 has no number and no checksum."""

_MAX_CONFIG_BYTES = 1 << 20
_MAX_FRESH_BYTES = 1 << 30
_MAX_LAYERS = 100
_MAX_SETTINGS = 1000


@dataclasses.dataclass(frozen=True)
class Run:
    """All that decides what a run computes, and how often it is saved.

    Attributes:
      env: a gymnax id.
      config: the settings.
      seed: of the run's key; several seeds are split off this one.
      n_seeds: runs side by side.
      total_timesteps: decision steps of each seed.
      checkpoint_every: seconds, as in ``"10s"``, or iterations, as in ``"100"``.
      keep: the last checkpoints that stay.
      opponent_every: of ``grpo_jax.run``: self-play.
      settings: of a sweep, the fields that differ from ``config``, with every seed each; empty: no sweep.

    Raises:
      TypeError, ValueError: one of them cannot be.
    """

    env: str
    config: GRPOConfig
    seed: int
    n_seeds: int
    total_timesteps: int
    checkpoint_every: str = "10s"
    keep: int = 1
    opponent_every: int | None = None
    settings: tuple[Setting, ...] = ()

    def __post_init__(self) -> None:
        if not isinstance(self.env, str) or len(self.env) > 200:
            raise TypeError(f"env={self.env!r:.200} must be an id")
        for name, least in (("seed", -(2**63)), ("n_seeds", 1), ("keep", 1)):
            value = getattr(self, name)
            if type(value) is not int or not least <= value < 2**63:
                raise ValueError(f"{name}={value!r} must be an integer of at least {least}")
        if (every := self.opponent_every) is not None and (type(every) is not int or every < 1):
            raise ValueError(f"opponent_every={every!r} must be an integer of at least 1")
        if every is not None and (self.n_seeds > 1 or self.settings):
            raise ValueError(
                f"opponent_every={every}, n_seeds={self.n_seeds}: in self-play one seed of one setting is its own opponent;"
                " run several one after the other"
            )
        if len(self.settings) > _MAX_SETTINGS:
            raise ValueError(
                f"a sweep of {len(self.settings)} settings is more than {_MAX_SETTINGS}: split it"
            )
        configs = self.configs
        for config in configs:
            iterations_for(config, self.total_timesteps)
        if self.settings:  # as the config holds them: JSON knows no tuples
            settings = [
                {name: getattr(config, name) for name in setting}
                for setting, config in zip(self.settings, configs, strict=True)
            ]
            object.__setattr__(self, "settings", tuple(settings))
        _ = self.cadence

    @property
    def seeds(self) -> int | None:
        """``n_seeds`` as ``grpo_jax.run`` wants it: a single run is no seed of several."""
        return None if self.n_seeds == 1 else self.n_seeds

    def can_stop(self, iteration: int) -> bool:
        """Whether going on from here ends like a run that never stopped: in self-play where the opponent is the policy."""
        return self.opponent_every is None or iteration % self.opponent_every == 0

    @property
    def configs(self) -> tuple[GRPOConfig, ...]:
        """Of all settings; of no sweep, the one."""
        return tuple(self.config.replace(**setting) for setting in self.settings or ({},))

    @property
    def n_agents(self) -> int:
        """Seeds of all settings."""
        return self.n_seeds * len(self.settings or (None,))

    @property
    def vmapped(self) -> int | None:
        """The axis of agents that the state has; None: a single run has none."""
        return None if self.n_agents == 1 and not self.settings else self.n_agents

    def programs(self) -> list[tuple[list[int], Run]]:
        """The runs that are one program each, and which settings these have."""
        if not self.settings:
            return [([0], self)]
        return [
            (indices, dataclasses.replace(self, settings=tuple(self.settings[p] for p in indices)))
            for indices in programs_of(self.configs)
        ]

    @property
    def cadence(self) -> tuple[float | None, int | None]:
        """``checkpoint_every`` as seconds, or as iterations; the other one is None."""
        text = self.checkpoint_every
        with contextlib.suppress(ValueError, AttributeError):
            seconds = float(text.removesuffix("s")) if text.endswith("s") else None
            iterations = int(text) if seconds is None else None
            if (seconds is not None and 0 <= seconds < float("inf")) or (iterations or 0) >= 1:
                return seconds, iterations
        raise ValueError(
            f"checkpoint_every={text!r} must be seconds, as in '60s', or iterations of at least 1, as in '10'"
        )

    def to_json(self) -> str:
        """One readable JSON object, the versions that wrote it and a checksum included."""
        content = vars(self) | {
            "config": json.loads(self.config.to_json()),
            "versions": {"grpo_jax": grpo_jax.__version__, "jax": jax.__version__},
            "format": VERSION,
        }
        if self.opponent_every is None:  # an entry that older versions do not know
            del content["opponent_every"]
        if not self.settings:  # as versions without sweeps wrote it
            del content["settings"]
        return json.dumps(content | {"checksum": _checksum(content)}, indent=2) + "\n"

    @classmethod
    def from_json(cls, text: str) -> tuple[Run, bool]:
        """The run that ``to_json`` wrote, and whether it has a checksum.

        Raises:
          ValueError, TypeError, KeyError, RecursionError: damaged, of another version, or values that cannot be.
        """
        content = json.loads(text)
        names = ["env", "seed", "n_seeds", "total_timesteps"]
        sealed = set(content) != {*names, "config", "versions"}
        if sealed:
            if content["format"] != VERSION:
                raise ValueError(f"format={content['format']!r:.20} is not {VERSION}: a newer one wrote it")
            checksum = content.pop("checksum")
            if checksum != _checksum(content):
                raise ValueError(
                    "its checksum does not fit; put back what was there. What can be changed of a run are options of"
                    " `grpo-jax resume`"
                )
            names += ["checkpoint_every", "keep", *({"opponent_every"} & set(content))]
            if unknown := set(content) - {*names, "config", "versions", "format", "settings"}:
                raise ValueError(f"it has unknown entries: {', '.join(sorted(unknown))!r:.60}")
        settings = tuple(content.get("settings", ()))
        for name in ("net_arch", "critic_net_arch"):
            if any(len(fields.get(name) or ()) > _MAX_LAYERS for fields in (content["config"], *settings)):
                raise ValueError(f"{name} has more than {_MAX_LAYERS} layers")
        config = GRPOConfig.from_json(json.dumps(content["config"]))
        return cls(config=config, settings=settings, **{name: content[name] for name in names}), sealed


class RunDirectory:
    """Where the files of a run lie."""

    def __init__(self, path: Path) -> None:
        """Names the files; nothing is touched."""
        self.path = path
        self.config = path / "config.json"
        self.checkpoint = path / "checkpoint.msgpack"
        self.best = path / "best.msgpack"
        self.parts = path / "checkpoint.parts"
        self.kept = path / "checkpoints"
        self.policy = path / "policy.msgpack"
        self.metrics = path / "metrics.csv"
        self.tensorboard = path / "tensorboard"
        self.learning_curve = path / "learning_curve.png"
        self.files = tuple(vars(self).values())[1:]
        self.sweep_table = path / "sweep.csv"
        self.sweep_picture = path / "sweep.png"
        self.best_config = path / "best_config.json"
        self.sweep_files = (self.sweep_table, self.sweep_picture, self.best_config)

    @contextlib.contextmanager
    def locked(self) -> Iterator[None]:
        """Keeps other processes from writing here; what killed ones left half-written is removed.

        Raises:
          FileNotFoundError: there is no such directory.
          ValueError: another process writes here; names it.
        """
        with open_own(self.path / ".lock", os.O_RDWR | os.O_CREAT) as file:
            lock(file, self.path)
            for path in (*self.files, *self.sweep_files, self.kept / "_"):
                remove_temporaries(path)
            yield

    def create(self, run: Run, *, overwrite: bool = False) -> None:
        """Writes ``config.json`` into the directory, which exists and is ``locked``.

        Args:
          run: what will be run.
          overwrite: removes the files of an older run first; other files are left alone.

        Raises:
          FileExistsError: the directory holds a run already.
        """
        self.check_free(overwrite=overwrite)
        for file in (*self.files, *self.sweep_files, *self.path.glob("program_[0-9]*")):
            if file.is_dir() and not file.is_symlink():
                shutil.rmtree(file)
            else:
                file.unlink(missing_ok=True)
        self.write(run)

    def program(self, index: int) -> RunDirectory:
        """The directory of one of a sweep's programs, from 0."""
        return RunDirectory(self.path / f"program_{index + 1}")

    def own(self) -> RunDirectory:
        """The directory as this process sees it alone."""
        return self

    def is_new(self) -> bool:
        """Whether no run lies there."""
        return not self.config.exists()

    def make(self) -> None:
        """Makes the directory, where there is none."""
        self.path.mkdir(parents=True, exist_ok=True)

    def make_program(self) -> None:
        """Makes the directory of a sweep's program, which is no link."""
        check_own(self.path)
        self.path.mkdir(exist_ok=True)

    def check_run(self) -> None:
        """Raises as ``read`` where the directory holds no run."""
        if self.is_new():
            self.read()

    def check_free(self, *, overwrite: bool = False) -> None:
        """Raises FileExistsError where the directory holds a run that is not to be overwritten."""
        if self.config.exists() and not overwrite:
            raise FileExistsError(
                f"out={self.path} already holds a run; go on with it by `grpo-jax resume {self.path}`,"
                " choose another --out, or pass --overwrite"
            )

    def write(self, run: Run) -> None:
        """Writes ``config.json``."""
        write_atomically(self.config, run.to_json().encode())

    def read(self) -> Run:
        """What ``config.json`` says.

        Raises:
          FileNotFoundError: the directory holds no run.
          ValueError: ``config.json`` is damaged, or says what cannot be.

        Warns:
          UnsealedWarning: it is older than checksums.
        """
        try:
            run, sealed = Run.from_json(read_bounded(self.config, _MAX_CONFIG_BYTES).decode())
        except (FileNotFoundError, NotADirectoryError) as error:
            raise FileNotFoundError(
                f"directory={self.path} holds no run: {self.config} is missing"
            ) from error
        except (AttributeError, KeyError, TypeError, ValueError, RecursionError) as error:
            raise ValueError(f"{self.config} is damaged ({type(error).__name__}: {error})") from error
        if not sealed:
            warnings.warn(
                f"{self.config} is older than checksums: damage of it is not noticed",
                UnsealedWarning,
                stacklevel=2,
            )
        return run

    def restore(
        self, run: Run, checkpoint: Path | None = None, *, mesh: Mesh | None = None
    ) -> tuple[World, TrainState | None]:
        """The world, and the state of the last checkpoint or of another; None where the run has none yet.

        A state that lies in parts is read straight onto the devices of a mesh.

        Raises:
          ValueError: the checkpoint is damaged, or of another run; ``config.json`` asks for what cannot be.
          FileNotFoundError: there is no such other checkpoint.
        """
        try:
            world = grpo_jax.make(run.env)
            template = shapes(run.configs[0], world, run.vmapped)
        except (ValueError, TypeError, ArithmeticError, MemoryError) as error:
            raise ValueError(f"{self.config} says what cannot be ({error})") from error
        path = checkpoint or self.checkpoint
        if path.exists() or path.is_symlink() or checkpoint is not None:
            if (name := parts.name_in(path)) is not None:
                return world, self.restore_parts(run, world, name, mesh)
            return world, restore_state(path, template)
        if (n_bytes := tree_bytes(template)) > _MAX_FRESH_BYTES:
            raise ValueError(
                f"{self.config} asks for a state of {n_bytes:,} bytes, and no checkpoint shows that it was ever made;"
                " begin such a run by `grpo-jax train`"
            )
        return world, None

    def restore_parts(self, run: Run, world: World, name: str, mesh: Mesh | None) -> TrainState:
        """The state that lies in parts of this name; of several processes all call it."""
        check_own(self.parts)
        return restore_parts(self.parts / name, run.configs[0], world, n_seeds=run.vmapped, mesh=mesh)

    def read_metrics(self, names: Sequence[str]) -> dict[str, np.ndarray]:
        """Columns of ``metrics.csv``, each ``[A, n_iterations]``: seeds, or the seeds of all settings."""
        with self.metrics.open(encoding="utf-8") as file:
            header = file.readline().strip().split(",")
        columns = [header.index(name) for name in ("iteration", *names)]
        table = np.loadtxt(self.metrics, delimiter=",", skiprows=1, usecols=columns, ndmin=2)
        n_agents = int(np.sum(table[:, 0] == table[0, 0]))
        by_agent = table.reshape(-1, n_agents, len(columns)).transpose(2, 1, 0)
        return dict(zip(names, by_agent[1:], strict=True))


def _checksum(content: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
