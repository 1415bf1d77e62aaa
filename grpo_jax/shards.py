"""Shards: parts of the environments that collect, compare and shuffle on their own, on as many devices as there are.

What an iteration needs from all of them goes through :func:`total` and its kin: sums for gradients, counts and statistics. They
do nothing outside of :func:`over_shards`, so that every stage is written once. The numbers depend on ``n_shards``, which
belongs to the settings, and not on the number of devices, but by rounding.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils
from jax.flatten_util import ravel_pytree
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from grpo_jax.types import PyTree

DEVICES, SHARDS = "devices", "shards"
"""Names of the axes: of the mesh, and of the shards that share a device."""


def make_mesh(n_devices: int | None = None) -> Mesh:
    """A mesh of the first devices, for ``run(..., mesh=...)``.

    Args:
      n_devices: how many; None: all.

    Raises:
      ValueError: there are not so many.
    """
    devices = jax.devices()
    n_devices = len(devices) if n_devices is None else n_devices
    if isinstance(n_devices, bool) or not isinstance(n_devices, int) or not 1 <= n_devices <= len(devices):
        cuda = "; for NVIDIA's GPUs: pip install 'grpo-jax[cuda]'" if devices[0].platform == "cpu" else ""
        raise ValueError(
            f"n_devices={n_devices!r} must be an integer from 1 to {len(devices)}, the devices that JAX sees"
            f" ({devices[0].device_kind}){cuda}"
        )
    return Mesh(devices[:n_devices], (DEVICES,))


def check_mesh(mesh: Any, n_shards: int, n_agents: int | None) -> None:
    """Refuses a mesh over which neither shards nor agents (seeds, settings) can be spread evenly.

    Raises:
      TypeError: it is no mesh of one axis named ``"devices"``.
      ValueError: names the field to change.
    """
    if not isinstance(mesh, Mesh) or mesh.axis_names != (DEVICES,):
        raise TypeError(
            f"mesh={mesh!r} must be a mesh with the one axis {DEVICES!r}; grpo_jax.make_mesh() makes it"
        )
    n_devices = mesh.devices.size
    if n_agents is not None and n_shards == 1:
        if n_agents % n_devices:
            raise ValueError(
                f"n_seeds={n_agents} (times the settings of a sweep) must be a multiple of the {n_devices} devices of the mesh"
            )
    elif n_shards % n_devices:
        raise ValueError(
            f"n_shards={n_shards} must be a multiple of the {n_devices} devices of the mesh:"
            f" config.replace(n_shards={n_devices})"
        )


def shardings(mesh: Mesh, in_parts: PyTree) -> PyTree:
    """Where arrays lie on a mesh; ``in_parts``: bools, which are divided along axis 0, and which are whole on each device."""
    spread, whole = (NamedSharding(mesh, spec) for spec in (PartitionSpec(DEVICES), PartitionSpec()))
    return jax.tree.map(lambda parts: spread if parts else whole, in_parts)


def place(tree: PyTree, mesh: Mesh, in_parts: PyTree) -> PyTree:
    """Puts arrays on the devices of a mesh; ``in_parts`` as for ``shardings``, a prefix of the tree."""
    homes = shardings(mesh, in_parts)
    if jax.process_count() == 1:
        return jax.device_put(tree, homes)
    return jax.tree.map(
        lambda home, part: jax.tree.map(lambda leaf: _of_all_processes(leaf, home), part), homes, tree
    )


def _of_all_processes(leaf: Any, sharding: NamedSharding) -> jax.Array:
    """An array that every process has, on the devices of all: each puts its own part. What lies there already stays."""
    if isinstance(leaf, jax.Array) and leaf.sharding.is_equivalent_to(sharding, leaf.ndim):
        return leaf

    def spread(leaf: Any) -> jax.Array:
        known = np.asarray(leaf)
        return jax.make_array_from_callback(known.shape, sharding, lambda index: known[index])

    return _by_words(spread, leaf)


def _by_words(convert: Callable[[Any], Any], leaf: Any) -> Any:
    """``convert`` of an array, of PRNG keys that of their words."""
    if not jnp.issubdtype(jnp.result_type(leaf), jax.dtypes.prng_key):
        return convert(leaf)
    return jax.random.wrap_key_data(convert(jax.random.key_data(leaf)), impl=jax.random.key_impl(leaf))


def gather(tree: PyTree) -> PyTree:
    """Arrays that lie on several hosts, whole on each of them: what ``save`` and ``evaluate`` take. All processes call it."""
    if jax.process_count() == 1:
        return tree

    def whole(leaf: Any) -> Any:
        if not isinstance(leaf, jax.Array):
            return leaf
        if leaf.is_fully_replicated:
            return jnp.asarray(np.asarray(leaf))
        return jnp.asarray(multihost_utils.process_allgather(leaf, tiled=True))

    return jax.tree.map(functools.partial(_by_words, whole), tree)


def agreed(number: int) -> int:
    """The number that the first process has, in all of them."""
    if jax.process_count() == 1:
        return number
    return int(multihost_utils.broadcast_one_to_all(np.int32(number)))


def wait() -> None:
    """Comes back once all processes are here."""
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices("here")


def largest(number: int) -> int:
    """The largest number that any process has, in all of them."""
    if jax.process_count() == 1:
        return number
    return int(np.max(multihost_utils.process_allgather(np.int32(number))))


def from_first(tree: PyTree) -> PyTree:
    """The arrays that the first process has, whole in all of them; the others give some of the same shapes and dtypes."""

    def heard(leaf: Any) -> jax.Array:
        return jnp.asarray(multihost_utils.broadcast_one_to_all(np.asarray(leaf)))

    return tree if jax.process_count() == 1 else jax.tree.map(functools.partial(_by_words, heard), tree)


def over_devices(function: Callable[[PyTree], PyTree], tree: PyTree, mesh: Mesh) -> PyTree:
    """Runs a function of agents ``[A, ...]`` on each device, with its part of them; nothing goes from one to another."""
    spread = PartitionSpec(DEVICES)
    mapped = jax.shard_map(function, mesh=mesh, in_specs=(spread,), out_specs=spread, check_vma=False)
    return mapped(tree)


def over_shards(
    function: Callable[[PyTree, PyTree, jax.Array], tuple[PyTree, PyTree]],
    own: PyTree,
    shared: PyTree,
    n_shards: int,
    mesh: Mesh | None,
) -> tuple[PyTree, PyTree]:
    """Runs a function on every shard of the environments.

    Args:
      function: ``(own, shared, index) -> (own, shared)`` for one shard; what it returns as shared must be the same in all,
        made of :func:`total` and of what was shared before.
      own: leaves ``[N, ...]``; a shard gets ``[N / n_shards, ...]``.
      shared: what all shards have.
      n_shards: a multiple of the devices.
      mesh: the devices; None: all shards on one.

    Returns:
      Both, ``own`` with leaves ``[N, ...]``.
    """

    def on_device(own: PyTree, shared: PyTree, index: jax.Array) -> tuple[PyTree, PyTree]:
        n_here = index.shape[0]
        parts = jax.tree.map(lambda leaf: leaf.reshape(n_here, leaf.shape[0] // n_here, *leaf.shape[1:]), own)
        mapped = jax.vmap(function, in_axes=(0, None, 0), out_axes=(0, None), axis_name=SHARDS)
        parts, shared = mapped(parts, shared, index)
        joined = jax.tree.map(lambda leaf: leaf.reshape(n_here * leaf.shape[1], *leaf.shape[2:]), parts)
        return joined, shared

    index = jnp.arange(n_shards)
    if mesh is None:
        return on_device(own, shared, index)
    spread, whole = PartitionSpec(DEVICES), PartitionSpec()
    return jax.shard_map(
        on_device, mesh=mesh, in_specs=(spread, whole, spread), out_specs=(spread, whole), check_vma=False
    )(own, shared, index)


def total(tree: PyTree) -> PyTree:
    """Sums of arrays over all shards, in one reduction a dtype; the tree itself outside of shards."""
    if not (names := _names()):
        return tree
    leaves, structure = jax.tree.flatten(tree)
    kinds: dict[Any, list[int]] = {}
    for i, leaf in enumerate(leaves):
        kinds.setdefault(leaf.dtype, []).append(i)
    for members in kinds.values():
        vector, unravel = ravel_pytree([leaves[i] for i in members])
        for i, summed in zip(members, unravel(jax.lax.psum(vector, names)), strict=True):
            leaves[i] = summed
    return jax.tree.unflatten(structure, leaves)


def greatest(values: jax.Array) -> jax.Array:
    """The largest over all shards, element by element."""
    return jax.lax.pmax(values, names) if (names := _names()) else values


def mean(values: jax.Array) -> jax.Array:
    """The mean over all shards, element by element."""
    return jax.lax.pmean(values, names) if (names := _names()) else values


def count() -> int:
    """Shards that are summed over; 1 outside of them."""
    return int(jax.lax.axis_size(names)) if (names := _names()) else 1


def side_by_side() -> int:
    """Shards that share this device's memory; 1 outside of them."""
    return int(jax.lax.axis_size(SHARDS)) if _is_bound(SHARDS) else 1


def within() -> bool:
    """Whether the code that is traced belongs to a shard."""
    return bool(_names())


def _names() -> tuple[str, ...]:
    if not _is_bound(SHARDS):  # agents on devices of their own have nothing in common
        return ()
    return (DEVICES, SHARDS) if _is_bound(DEVICES) else (SHARDS,)


def _is_bound(name: str) -> bool:
    try:
        jax.lax.axis_size(name)
    except NameError:
        return False
    return True
