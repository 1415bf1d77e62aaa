"""Devices: what ``--devices`` asks for."""

from __future__ import annotations

import jax
from jax.sharding import Mesh

from grpo_jax import shards
from grpo_jax.cli.flags import Resume, Train
from grpo_jax.cli.runs import Run


def mesh_of(options: Train | Resume) -> Mesh | None:
    """The devices that ``--devices`` or ``--distributed`` asks for; None: the default one."""
    devices = options.devices
    if jax.process_count() > 1:
        if devices not in ("1", "all"):
            raise ValueError(f"--devices={devices}: --distributed takes all devices of all processes")
        return shards.make_mesh()
    if devices != "all" and not devices.isdecimal():
        raise ValueError(f"--devices={devices!r} must be a number of devices, or all")
    mesh = shards.make_mesh(None if devices == "all" else int(devices))
    return None if mesh.devices.size == 1 else mesh


def check(mesh: Mesh | None, run: Run) -> None:
    """Refuses devices that cannot share a run evenly, before anything is written."""
    if run.settings and jax.process_count() > 1:
        raise ValueError(
            "--sweep with --distributed: settings do not lie on several processes; give each process settings of its own,"
            " without --distributed"
        )
    for _, program in run.programs() if mesh is not None else ():
        seeds = program.n_seeds * len(program.configs) if program.seeds or program.settings else None
        shards.check_mesh(mesh, program.configs[0].n_shards, seeds)
