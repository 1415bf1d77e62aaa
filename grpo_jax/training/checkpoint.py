"""Checkpoints: one msgpack file, without pickle, written all or not at all."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import serialization

from grpo_jax.config import GRPOConfig
from grpo_jax.files import write_atomically
from grpo_jax.training.loop import TrainState, init
from grpo_jax.types import PyTree
from grpo_jax.worlds.base import World

FORMAT = "grpo-jax checkpoint 1"


def save(path: str | os.PathLike[str], state: PyTree) -> None:
    """Writes a state (of one run, or of vmapped runs); a failed save leaves the old file as it was.

    Args:
      path: the file; its directory must exist.
      state: a ``TrainState``, or any pytree of arrays and PRNG keys.
    """
    leaves = {name: np.asarray(_plain(leaf)) for name, leaf in _named(state)}
    write_atomically(Path(path), serialization.msgpack_serialize({"format": FORMAT, "leaves": leaves}))


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
      ValueError: no checkpoint, or one of another config, environment or number of seeds; names the first differences.
    """

    def template(key: jax.Array) -> TrainState:
        return init(config, env, key)

    key = jax.eval_shape(lambda: jax.random.key(0))
    if n_seeds is not None:
        template, key = (
            jax.vmap(template),
            jax.eval_shape(lambda: jax.random.split(jax.random.key(0), n_seeds)),
        )
    state = restore_like(path, jax.eval_shape(template, key))
    assert isinstance(state, TrainState)
    return state


def restore_like(path: str | os.PathLike[str], template: PyTree) -> PyTree:
    """Reads a pytree of the structure, shapes and dtypes of ``template`` (arrays, or shapes of arrays)."""
    path = Path(path)
    try:
        content = serialization.msgpack_restore(path.read_bytes())
    except FileNotFoundError:
        raise
    except Exception as error:
        raise ValueError(f"{path} is not a grpo-jax checkpoint ({type(error).__name__}: {error})") from error
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        raise ValueError(f"{path} is not a grpo-jax checkpoint of format {FORMAT!r}")
    stored: dict[str, Any] = content["leaves"]
    expected = {name: jax.eval_shape(_plain, leaf) for name, leaf in _named(template)}
    differences = [f"{name} is missing" for name in expected if name not in stored]
    differences += [f"{name} is not expected" for name in stored if name not in expected]
    for name, leaf in expected.items():
        if name in stored and (stored[name].shape != leaf.shape or stored[name].dtype != leaf.dtype):
            differences.append(
                f"{name} is {stored[name].dtype}{list(stored[name].shape)}, expected {leaf.dtype}{list(leaf.shape)}"
            )
    if differences:
        raise ValueError(
            f"{path} does not fit this config and env: {'; '.join(differences[:4])}"
            f"{f' and {len(differences) - 4} more' if len(differences) > 4 else ''}"
        )
    leaves = [_like(stored[name], leaf) for name, leaf in _named(template)]
    return jax.tree.unflatten(jax.tree.structure(template), leaves)


def _named(tree: PyTree) -> list[tuple[str, Any]]:
    return [
        (jax.tree_util.keystr(path), leaf) for path, leaf in jax.tree_util.tree_flatten_with_path(tree)[0]
    ]


def _is_key(leaf: Any) -> bool:
    return jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)


def _plain(leaf: Any) -> Any:
    return jax.random.key_data(leaf) if _is_key(leaf) else leaf


def _like(stored: np.ndarray, template: Any) -> jax.Array:
    array = jnp.asarray(stored)
    if not _is_key(template):
        return array
    # The template may be a mere shape, which key_impl refuses.
    return jax.random.wrap_key_data(array, impl=jax.random.key_impl(jnp.empty((), template.dtype)))
