"""Checkpoints in parts, by Orbax: each process writes what its devices hold, and any number of processes reads it again.

For states that are too large for one process, or for the one file of ``save``.
"""

from __future__ import annotations

import errno
import os
import uuid
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from grpo_jax import shards
from grpo_jax.config import GRPOConfig
from grpo_jax.training.checkpoint import check_fits, key_like, named, plain, shapes
from grpo_jax.training.loop import TrainState, in_parts
from grpo_jax.worlds.base import World

_LEAVES, _DIGESTS = "leaves", "digests"


def save_parts(path: str | os.PathLike[str], state: TrainState) -> None:
    """Writes a state, of one process or of several, into a new directory; of several, all must call it.

    The directory appears under its name once all parts are written: what is there is whole. Orbax is imported here.

    Args:
      path: the directory, on a file system that all processes share; what it will lie in must exist.
      state: as ``run`` returns it, or hands it to a callback; what lies on several devices stays there.

    Raises:
      FileExistsError: something of this name is there.
      FileNotFoundError: what it will lie in does not exist, or not for all processes.
      OSError: it cannot be written; names the directory.
      ValueError: several processes, and a state that is not spread over them.
    """
    import orbax.checkpoint as ocp

    path = Path(path).absolute()
    if shards.largest(os.path.lexists(path)):
        raise FileExistsError(
            f"{path} exists already: give each checkpoint a directory of its own, or remove that one"
        )
    if not is_shared(path.parent):
        raise FileNotFoundError(
            f"{path.parent} does not exist, or the processes do not share it: make it first, on a file system that all of them"
            " see"
        )
    leaves = {name: plain(leaf) for name, leaf in named(state)}
    here = [name for name, leaf in leaves.items() if jax.process_count() > 1 and leaf.is_fully_addressable]
    if here:
        raise ValueError(
            f"the state lies in each process by itself ({here[0]} and {len(here) - 1} more leaves): save one that run(mesh=...)"
            " returned, or handed to its callback"
        )
    content = {_LEAVES: leaves, _DIGESTS: _digests([*leaves.values()])}
    try:
        with ocp.StandardCheckpointer() as checkpointer:
            checkpointer.save(path, content)
    except Exception as error:  # Orbax raises what it likes, where a disk is full, too
        raise OSError(errno.EIO, f"cannot write it ({type(error).__name__}: {error})", str(path)) from error


def restore_parts(
    path: str | os.PathLike[str],
    config: GRPOConfig,
    env: World,
    *,
    n_seeds: int | None = None,
    mesh: Mesh | None = None,
) -> TrainState:
    """Reads a state that ``save_parts`` wrote, straight onto the devices that will hold it.

    Args:
      path: the directory.
      config: the config of the run.
      env: the world of the run.
      n_seeds: leading axis of a vmapped run's state; None: a single run.
      mesh: that ``run`` will have: of any number of devices that divides ``config.n_shards`` (or the seeds), and of several
        processes, which then all call this. None: one device.

    Returns:
      The state, for ``run(..., state=..., mesh=mesh)``.

    Raises:
      FileNotFoundError: no such directory, in any one of the processes.
      ValueError: not of ``save_parts``, damaged, of another config or environment; or a mesh that does not fit.
    """
    import orbax.checkpoint as ocp

    path = Path(path).absolute()
    if shards.largest(not path.is_dir()):
        raise FileNotFoundError(f"{path} is no directory, or not for all processes: they must share it")
    template = shapes(config, env, n_seeds)
    like = named(template)
    expected = {name: jax.eval_shape(plain, leaf) for name, leaf in like}
    target = {
        name: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=home)
        for (name, leaf), home in zip(expected.items(), _homes(template, config, n_seeds, mesh), strict=True)
    }
    with ocp.StandardCheckpointer() as checkpointer:
        check_fits(path, _shapes_in(path, checkpointer), expected)
        leaves = _read(path, checkpointer, target, _whole(mesh))
    return jax.tree.unflatten(
        jax.tree.structure(template), [key_like(leaves[name], leaf) for name, leaf in like]
    )


def _shapes_in(path: Path, checkpointer: Any) -> dict[str, tuple[tuple[int, ...], str]]:
    """Shapes and dtypes of the leaves that are there, by their names."""
    try:
        stored = checkpointer.metadata(path).item_metadata
        if set(stored) != {_LEAVES, _DIGESTS}:
            raise ValueError(f"it has {sorted(stored)}")
        return {name: (leaf.shape, np.dtype(leaf.dtype).name) for name, leaf in stored[_LEAVES].items()}
    except Exception as error:
        raise ValueError(
            f"{path} is not a checkpoint in parts, or damaged ({type(error).__name__}: {error})"
        ) from error


def _read(path: Path, checkpointer: Any, target: dict[str, Any], whole: Any) -> dict[str, jax.Array]:
    """The leaves, verified."""
    digests = jax.ShapeDtypeStruct((len(target),), jnp.uint32, sharding=whole)
    try:
        read = checkpointer.restore(path, {_LEAVES: target, _DIGESTS: digests})
    except Exception as error:
        raise ValueError(f"{path} is damaged ({type(error).__name__}: {error})") from error
    names, leaves = list(target), read[_LEAVES]
    found = _digests([leaves[name] for name in names])
    wrong = np.flatnonzero(np.asarray(found) != np.asarray(read[_DIGESTS]))
    if wrong.size:
        raise ValueError(
            f"{path} is damaged: {', '.join(names[i] for i in wrong[:4])} {'is' if wrong.size == 1 else 'are'} not what was"
            " written"
        )
    return dict(leaves)


def _homes(template: TrainState, config: GRPOConfig, n_seeds: int | None, mesh: Mesh | None) -> list[Any]:
    """The sharding of each leaf."""
    if mesh is None:
        if jax.process_count() > 1:
            raise ValueError("mesh=None, and several processes: give the mesh that run will have")
        return [_whole(None)] * len(jax.tree.leaves(template))
    shards.check_mesh(mesh, config.n_shards, n_seeds)
    spread = shards.shardings(mesh, in_parts(template, config.n_shards, has_agents=n_seeds is not None))
    return jax.tree.leaves(
        jax.tree.map(lambda home, part: jax.tree.map(lambda _: home, part), spread, template)
    )


def _whole(mesh: Mesh | None) -> Any:
    return (
        jax.sharding.SingleDeviceSharding(jax.devices()[0]) if mesh is None else shards.shardings(mesh, False)
    )


def is_shared(directory: Path) -> bool:
    """Whether a directory exists, and is the same one for all processes, which all ask."""
    if jax.process_count() == 1:
        return directory.is_dir()
    mark = directory / f".shared.{shards.agreed(uuid.uuid4().int & 0x7FFFFFFF):08x}.tmp"
    if jax.process_index() == 0 and directory.is_dir():
        mark.touch()
    shards.wait()
    is_missing = shards.largest(not mark.exists())
    if jax.process_index() == 0:
        mark.unlink(missing_ok=True)
    return not is_missing


@jax.jit
def _digests(leaves: list[jax.Array]) -> jax.Array:
    """A number for each array, ``uint32[n]``, whatever devices it lies on: integers are added in any order."""
    return jnp.stack([_digest(leaf) for leaf in leaves])


def _digest(values: jax.Array) -> jax.Array:
    n_bits = 8 * values.dtype.itemsize
    if values.dtype == bool:
        words = values.astype(jnp.uint32)
    else:
        words = jax.lax.bitcast_convert_type(values, jnp.dtype(f"uint{min(n_bits, 32)}")).astype(jnp.uint32)
    place, stride = jnp.zeros(words.shape, jnp.uint32), 1
    for axis in reversed(range(words.ndim)):
        place += jax.lax.broadcasted_iota(jnp.uint32, words.shape, axis) * jnp.uint32(stride & 0xFFFFFFFF)
        stride *= words.shape[axis]
    return jnp.sum(_mixed(words ^ _mixed(place)), dtype=jnp.uint32)


def _mixed(words: jax.Array) -> jax.Array:
    """Bits that depend on all bits: the finaliser of MurmurHash3."""
    words = (words ^ (words >> 16)) * jnp.uint32(0x85EBCA6B)
    words = (words ^ (words >> 13)) * jnp.uint32(0xC2B2AE35)
    return words ^ (words >> 16)
