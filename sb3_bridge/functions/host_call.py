"""Functions on the host, inside of compiled programs.

Through a primitive of our own instead of ``jax.pure_callback``: that one hands its arguments over as JAX arrays, and
copies those above 100 kB that are not 64-byte aligned in the client's thread pool. On one core the only thread of the
pool is the one that waits for the copy, which is a deadlock (seen in jax 0.10; jax-ml/jax#24255). Our primitive gets
NumPy views from XLA, and nothing in it waits for JAX.
"""

from __future__ import annotations

import collections
import contextlib
import functools
import math
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend.core import Primitive
from jax.interpreters import batching, mlir


def call(function: Any, arguments: Any) -> list[jax.Array]:
    """The outputs ``[*shape]`` of one sample, traceable under ``jit`` and ``vmap``.

    However deep it is vmapped, and inside of loops: the host is called once for the whole batch.

    Args:
      function: hashable; its ``outputs`` have ``shape`` and ``dtype`` for one sample, and ``on_host`` gives them
        ``[N, *shape]`` for arguments ``[N, *shape]``, into which it must not write.
      arguments: a tree of arrays.
    """
    leaves, structure = jax.tree.flatten(arguments)
    return _call.bind(*leaves, function=function, structure=structure, batch_rank=0)


@contextlib.contextmanager
def original_errors() -> Iterator[None]:
    """Inside it, an error of a host function under ``jit`` arrives as itself, not as JAX's wrapper."""
    _last_error.clear()
    try:
        yield
    except jax.errors.JaxRuntimeError as error:
        if _last_error and str(_last_error[-1]) in str(error):
            raise _last_error.pop() from None
        raise


_last_error: collections.deque[Exception] = collections.deque(maxlen=1)


def _run(
    *leaves: np.ndarray, function: Any, structure: Any, batch_rank: int, results: Any
) -> tuple[np.ndarray, ...]:
    """What XLA calls; ``results`` are the shapes and dtypes that it wants."""
    n_samples = math.prod(leaves[0].shape[:batch_rank])
    if n_samples == 0:
        return tuple(np.zeros(result.shape, result.dtype) for result in results)
    flat = [leaf.reshape(n_samples, *leaf.shape[batch_rank:]) for leaf in leaves]
    try:
        outputs = function.on_host(jax.tree.unflatten(structure, flat))
    except Exception as error:
        _last_error.append(error)
        raise
    return tuple(
        output.reshape(result.shape).astype(result.dtype)
        for output, result in zip(outputs, results, strict=True)
    )


# The primitive. Operands are the leaves of the arguments, all with the same `batch_rank` leading axes; the results are
# the outputs, [*batch, *shape] each.

_call = Primitive("host_call")
_call.multiple_results = True


@_call.def_impl
def _call_at_once(*leaves: Any, **params: Any) -> list[jax.Array]:
    results = _result_shapes(*leaves, **params)
    return list(map(jnp.asarray, _run(*map(np.asarray, leaves), results=results, **params)))


@_call.def_abstract_eval
def _result_shapes(*leaves: Any, function: Any, batch_rank: int, **_: Any) -> list[Any]:
    batch_shape = leaves[0].shape[:batch_rank]
    return [jax.core.ShapedArray((*batch_shape, *output.shape), output.dtype) for output in function.outputs]


def _batch(leaves: Any, axes: Any, *, batch_rank: int, **params: Any) -> tuple[list[jax.Array], list[int]]:
    size = next(leaf.shape[axis] for leaf, axis in zip(leaves, axes, strict=True) if axis is not None)
    leaves = [
        jnp.broadcast_to(leaf, (size, *leaf.shape)) if axis is None else jnp.moveaxis(leaf, axis, 0)
        for leaf, axis in zip(leaves, axes, strict=True)
    ]
    results = _call.bind(*leaves, batch_rank=batch_rank + 1, **params)
    return results, [0] * len(results)


def _lower(ctx: Any, *operands: Any, **params: Any) -> Any:
    results, _, _ = mlir.emit_python_callback(
        ctx,
        functools.partial(_run, results=ctx.avals_out, **params),
        None,
        list(operands),
        ctx.avals_in,
        ctx.avals_out,
        has_side_effect=False,
        returns_token=False,
    )
    return results


batching.primitive_batchers[_call] = _batch
mlir.register_lowering(_call, _lower)
