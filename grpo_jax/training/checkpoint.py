"""Checkpoints: one sealed msgpack file, without pickle, written all or not at all."""

from __future__ import annotations

import functools
import json
import os
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import msgpack
import numpy as np

from grpo_jax.config import GRPOConfig
from grpo_jax.files import UNSEALED, UnsealedWarning, is_sealed, read_sealed, seal, write_atomically
from grpo_jax.training.loop import TrainState, init
from grpo_jax.types import PyTree, tree_bytes
from grpo_jax.worlds.base import World

KIND, VERSION = "checkpoint", 2
UNSEALED_FORMAT = "grpo-jax checkpoint 1"
"""What files before version 2 have instead of a seal: their content is msgpack's alone, without a checksum."""

PARTS_NOTE = "parts"
"""The note of a file that holds no state itself: the name of the parts (``save_parts``) that it lies in."""

_ARRAY = 1  # the msgpack extension that flax.serialization writes arrays as: (shape, dtype, bytes)
_MAX_NOTES = 1 << 16
_MAX_STATE = (1 << 32) - (1 << 24)  # msgpack reads no more than 4 GiB again


def save(path: str | os.PathLike[str], state: PyTree, *, notes: dict[str, Any] | None = None) -> None:
    """Writes a state (of one run, or of vmapped runs); a failed save leaves the old file as it was.

    Args:
      path: the file; its directory must exist.
      state: a ``TrainState``, or any pytree of arrays and PRNG keys.
      notes: further facts, as JSON has them, for ``read_notes``.

    Raises:
      OSError: names the file.
      ValueError: the state has 4 GiB or more.
    """
    write_atomically(Path(path), to_bytes(state, notes))


def to_bytes(state: PyTree, notes: dict[str, Any] | None = None) -> bytes:
    """What ``save`` writes."""
    check_size(state)
    leaves = {}
    for name, leaf in named(state):
        array = np.asarray(plain(leaf))
        packed = msgpack.packb((array.shape, array.dtype.name, array.tobytes()))
        leaves[name] = msgpack.ExtType(_ARRAY, packed)
    content = {"notes": json.dumps(notes or {}), "leaves": leaves}
    return seal(KIND, VERSION, msgpack.packb(content))


def check_size(state: PyTree) -> None:
    """Raises ValueError where arrays, or shapes of arrays, are too many bytes for the one file of ``save``."""
    n_bytes = tree_bytes(state)
    if n_bytes > _MAX_STATE:
        raise ValueError(
            f"a state of {n_bytes:,} bytes does not fit a checkpoint, which holds {_MAX_STATE:,}: lower n_envs or the number"
            " of seeds, or train in Python with grpo_jax.save_parts"
        )


def restore(
    path: str | os.PathLike[str], config: GRPOConfig, env: World, *, n_seeds: int | None = None
) -> TrainState:
    """Reads a state that ``save`` wrote; training goes on from it bit for bit.

    Args:
      path: the file.
      config: the config of the run.
      env: the world of the run.
      n_seeds: leading axis of a vmapped run's state; None: a single run.

    Raises:
      FileNotFoundError: no such file.
      ValueError: no checkpoint, a damaged one, one of another config, environment or number of seeds, or one whose
        numbers no training leaves; names the first differences.

    Warns:
      UnsealedWarning: the file is older than checksums: damage would not be noticed.
    """
    return restore_state(path, shapes(config, env, n_seeds))


def shapes(config: GRPOConfig, env: World, n_seeds: int | None = None) -> TrainState:
    """Shapes and dtypes of a run's state; nothing is computed. Arguments as for ``restore``."""
    first: Callable[[jax.Array], TrainState] = functools.partial(init, config, env)
    key = jax.eval_shape(lambda: jax.random.key(0))
    if n_seeds is not None:
        first = jax.vmap(first)
        key = jax.eval_shape(lambda: jax.random.split(jax.random.key(0), n_seeds))
    state: TrainState = jax.eval_shape(first, key)
    return state


def restore_state(path: str | os.PathLike[str], template: TrainState) -> TrainState:
    """``restore`` into known ``shapes``."""
    state = restore_like(path, template)
    assert isinstance(state, TrainState)
    _check_numbers(Path(path), state)
    return state


def restore_like(path: str | os.PathLike[str], template: PyTree) -> PyTree:
    """Reads a pytree of the structure, shapes and dtypes of ``template`` (arrays, or shapes of arrays)."""
    path = Path(path)
    expected = {name: jax.eval_shape(plain, leaf) for name, leaf in named(template)}
    version, content = _read(path, tree_bytes(expected))
    notes, stored = _unpack(path, content, 4 * len(expected) + 1000)
    if not stored and PARTS_NOTE in notes:
        raise ValueError(
            f"{path} only names its state, which lies in parts: grpo_jax.restore_parts reads them, from checkpoint.parts/"
            f"{notes[PARTS_NOTE]!s:.60} beside it"
        )
    if version == UNSEALED:
        warnings.warn(
            f"{path} is older than checksums: damage of it is not noticed. The next save writes one",
            UnsealedWarning,
            stacklevel=3,
        )
        _modernize(stored)
    check_fits(path, {name: (shape, dtype) for name, (shape, dtype, _) in stored.items()}, expected)
    for name, leaf in expected.items():
        data, size = stored[name][2], leaf.size * leaf.dtype.itemsize
        if len(data) != size:
            raise ValueError(f"{path} is damaged: {name} has {len(data)} bytes, expected {size}")
        if leaf.dtype == bool and max(data, default=0) > 1:
            raise ValueError(f"{path} is damaged: {name} holds bytes that are neither True nor False")
    leaves = []
    for (_, like), (name, leaf) in zip(named(template), expected.items(), strict=True):
        array = np.frombuffer(stored[name][2], leaf.dtype).reshape(leaf.shape)
        # A copy: the file's bytes are not aligned, and not ours to write over.
        leaves.append(key_like(jnp.array(array), like))
    return jax.tree.unflatten(jax.tree.structure(template), leaves)


def check_fits(
    path: Path, there: Mapping[str, tuple[tuple[int, ...], str]], expected: Mapping[str, Any]
) -> None:
    """Refuses leaves, by their names shapes and dtypes, that are not the expected ones (arrays, or shapes of arrays)."""
    differences = [f"{name} is missing" for name in expected if name not in there]
    differences += [f"{name} is not expected" for name in there if name not in expected]
    for name, leaf in expected.items():
        shape, dtype = there.get(name, (leaf.shape, leaf.dtype.name))
        if (tuple(shape), dtype) != (leaf.shape, leaf.dtype.name):
            differences.append(f"{name} is {dtype}{list(shape)}, expected {leaf.dtype}{list(leaf.shape)}")
    if differences:
        raise ValueError(
            f"{path} does not fit this config and env: {'; '.join(differences[:4])}"
            f"{f' and {len(differences) - 4} more' if len(differences) > 4 else ''}"
        )


def read_notes(path: str | os.PathLike[str], max_bytes: int = 64 << 20) -> dict[str, Any]:
    """The notes that a checkpoint was saved with; none in files that are older than notes.

    Raises:
      FileNotFoundError: no such file.
      ValueError: it is damaged, no checkpoint, or larger than ``max_bytes``.
    """
    path = Path(path)
    if not is_sealed(path):
        return {}
    _, content = read_sealed(path, KIND, (VERSION,), max_bytes)
    return _unpack(path, content, 1 << 20)[0]


_Leaves = dict[str, tuple[tuple[int, ...], str, bytes]]


def _read(path: Path, n_bytes: int) -> tuple[int, bytes]:
    """Version and content; ``n_bytes``: of the leaves that are expected. A larger file is refused, unread."""
    # Room for another network than the expected one, whose differences are then told.
    return read_sealed(path, KIND, (VERSION,), max(2 * n_bytes, 64 << 20), unsealed=True)


def _unpack(path: Path, content: bytes, max_leaves: int) -> tuple[dict[str, Any], _Leaves]:
    """Notes, and shape, dtype and bytes of each leaf. No object in the file can be larger than the file itself."""
    try:
        # Arrays and maps are not unpacked: a megabyte of them would be a hundred in memory.
        unpacker = msgpack.Unpacker(max_array_len=0, max_map_len=0, max_buffer_size=0)
        unpacker.feed(content)
        notes, leaves, marked = {}, {}, False
        for _ in range(_bounded(unpacker.read_map_header(), 3)):
            match unpacker.unpack():
                case "format":
                    marked = unpacker.unpack() == UNSEALED_FORMAT
                case "notes":
                    text = unpacker.unpack()
                    _bounded(len(text), _MAX_NOTES)
                    notes, marked = json.loads(text), True
                case "leaves":
                    for _ in range(_bounded(unpacker.read_map_header(), max_leaves)):
                        name, array = unpacker.unpack(), unpacker.unpack()
                        if not isinstance(name, str) or array.code != _ARRAY or name in leaves:
                            raise ValueError(f"a leaf {name!r} that is no array")
                        leaves[name] = _array_parts(array.data)
                case other:
                    raise ValueError(f"an entry {other!r}")
        if not marked or not isinstance(notes, dict) or unpacker.tell() != len(content):
            raise ValueError("no format, or more than one object")
    except Exception as error:
        raise ValueError(f"{path} is not a grpo-jax checkpoint ({type(error).__name__}: {error})") from error
    return notes, leaves


def _array_parts(packed: bytes) -> tuple[tuple[int, ...], str, bytes]:
    unpacker = msgpack.Unpacker(max_array_len=0, max_map_len=0, max_buffer_size=0)
    unpacker.feed(packed)
    if unpacker.read_array_header() != 3:
        raise ValueError("a leaf that is not (shape, dtype, bytes)")
    shape = tuple(unpacker.unpack() for _ in range(_bounded(unpacker.read_array_header(), 32)))
    dtype, data = unpacker.unpack(), unpacker.unpack()
    if not (all(type(n) is int for n in shape) and isinstance(dtype, str) and isinstance(data, bytes)):
        raise ValueError("a leaf that is not (shape, dtype, bytes)")
    return shape, dtype, data


def _modernize(leaves: _Leaves) -> None:
    """Statistics of observations as version 2 has them: an exact count and a mean square, instead of floats and a sum."""
    counts = {
        name: np.frombuffer(data, dtype).reshape(shape)
        for name, (shape, dtype, data) in leaves.items()
        if name.endswith(".statistics.count")
    }
    for name, count in counts.items():
        del leaves[name]
        whole = count.astype(np.uint64)
        for word, part in (("high", whole >> np.uint64(32)), ("low", whole)):
            leaves[f"{name}.{word}"] = (count.shape, "uint32", part.astype(np.uint32).tobytes())
        prefix = name.removesuffix("count")
        for old in [other for other in leaves if other.startswith(f"{prefix}sum_squares")]:
            shape, dtype, data = leaves.pop(old)
            total = np.frombuffer(data, dtype).reshape(shape)
            count_axes = np.maximum(count, 1).reshape(*count.shape, *(1,) * (total.ndim - count.ndim))
            new = old.replace(f"{prefix}sum_squares", f"{prefix}variance", 1)
            leaves[new] = (shape, dtype, (total / count_axes).astype(dtype).tobytes())


def _bounded(number: int, most: int) -> int:
    if number > most:
        raise ValueError(f"{number} entries, more than {most}")
    return number


def _check_numbers(path: Path, state: TrainState) -> None:
    """Refuses numbers that no training leaves behind."""
    bad = [f"{name} is not finite" for name in nonfinite_leaves(state)]
    environments = state.environments
    counts = {
        ".iteration": state.iteration,
        ".learner.n_updates": state.learner.n_updates,
        ".environments.episode_length": environments.episode_length,
        ".environments.last_length": environments.last_length,
    }
    bad += [f"{name} is negative" for name, count in counts.items() if np.any(np.asarray(count) < 0)]
    if bad:
        raise ValueError(f"{path} holds what no training leaves: {'; '.join(bad[:4])}")


def nonfinite_leaves(state: TrainState) -> list[str]:
    """Names of the leaves that are not finite and must be: all but those of world states, which are the world's own."""
    return [
        name
        for name, leaf in named(state)
        if not name.startswith(".environments.state")
        and jnp.issubdtype(leaf.dtype, jnp.floating)
        and not np.all(np.isfinite(np.asarray(leaf)))
    ]


def named(tree: PyTree) -> list[tuple[str, Any]]:
    """The leaves of a tree by the names that checkpoints know them by."""
    return [
        (jax.tree_util.keystr(path), leaf) for path, leaf in jax.tree_util.tree_flatten_with_path(tree)[0]
    ]


def _is_key(leaf: Any) -> bool:
    return jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)


def plain(leaf: Any) -> Any:
    """An array; of PRNG keys their words."""
    return jax.random.key_data(leaf) if _is_key(leaf) else leaf


def key_like(array: jax.Array, template: Any) -> jax.Array:
    """An array; words of PRNG keys as such keys, where the template (an array, or its shape) has them."""
    if not _is_key(template):
        return array
    # The template may be a mere shape, which key_impl refuses.
    return jax.random.wrap_key_data(array, impl=jax.random.key_impl(jnp.empty((), template.dtype)))
