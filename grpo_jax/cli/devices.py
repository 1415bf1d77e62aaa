"""Devices: what ``--devices`` asks for."""

from __future__ import annotations

from jax.sharding import Mesh

from grpo_jax import shards
from grpo_jax.cli.runs import Run


def mesh_of(devices: str) -> Mesh | None:
    """The devices that ``--devices`` asks for; None: the default one."""
    if devices != "all" and not devices.isdecimal():
        raise ValueError(f"--devices={devices!r} must be a number of devices, or all")
    mesh = shards.make_mesh(None if devices == "all" else int(devices))
    return None if mesh.devices.size == 1 else mesh


def check(mesh: Mesh | None, run: Run) -> None:
    """Refuses devices that cannot share a run evenly, before anything is written."""
    for _, program in run.programs() if mesh is not None else ():
        seeds = program.n_seeds * len(program.configs) if program.seeds or program.settings else None
        shards.check_mesh(mesh, program.configs[0].n_shards, seeds)
