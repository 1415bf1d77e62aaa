"""Devices: what ``--devices`` asks for."""

from __future__ import annotations

from typing import NamedTuple

import jax
from jax.sharding import Mesh

from grpo_jax import shards
from grpo_jax.cli.flags import Resume, Train
from grpo_jax.cli.runs import Run
from grpo_jax.training.memory import bounded
from grpo_jax.worlds.base import World


class Place(NamedTuple):
    """Where a run goes on: what of ``grpo_jax.run``'s arguments is no setting of the run.

    Attributes:
      mesh: the devices; None: the default one.
      memory_limit: of each of them; None: as much as there is.
    """

    mesh: Mesh | None
    memory_limit: str | None


def place_of(options: Train | Resume) -> Place:
    """What ``--devices``, ``--distributed`` and ``--memory-limit`` ask for."""
    return Place(_mesh_of(options.devices), options.memory_limit)


def _mesh_of(devices: str) -> Mesh | None:
    if jax.process_count() > 1:
        if devices not in ("1", "all"):
            raise ValueError(f"--devices={devices}: --distributed takes all devices of all processes")
        return shards.make_mesh()
    if devices != "all" and not devices.isdecimal():
        raise ValueError(f"--devices={devices!r} must be a number of devices, or all")
    mesh = shards.make_mesh(None if devices == "all" else int(devices))
    return None if mesh.devices.size == 1 else mesh


def check(place: Place, run: Run, world: World) -> None:
    """Refuses devices that cannot share a run evenly, or have too little memory for it, before anything is written."""
    mesh, limit = place
    for _, program in run.programs():
        config = program.configs[0]
        if mesh is not None:
            seeds = program.n_seeds * len(program.configs) if program.seeds or program.settings else None
            shards.check_mesh(mesh, config.n_shards, seeds)
        if limit is not None:
            bounded(config, world, limit, n_agents=program.n_agents, mesh=mesh)
