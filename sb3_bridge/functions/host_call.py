"""Functions on the host, inside of compiled programs.

By a primitive of our own, which gets NumPy views from XLA and never waits for JAX. ``jax.pure_callback`` copies large
arguments in the client's thread pool, whose only thread on one core is the one that waits for the copy: a deadlock
(seen in jax 0.10; jax-ml/jax#24255).
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
    """The outputs ``[*shape]`` of one sample, traceable: the host is called once, however deep it is vmapped.

    ``function`` is a ``UserFunction``: its ``on_host`` gives its ``outputs`` ``[N, *shape]`` for arguments
    ``[N, *shape]``, a tree of arrays into which it must not write.
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


def _run(*leaves: Any, function: Any, structure: Any, batch_rank: int, results: Any) -> tuple[Any, ...]:
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
    pairs = zip(outputs, results, strict=True)
    return tuple(output.reshape(result.shape).astype(result.dtype) for output, result in pairs)


# The primitive. Operands are the leaves of the arguments, results the outputs, all with `batch_rank` leading axes.

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
    pairs = list(zip(leaves, axes, strict=True))
    size = next(leaf.shape[axis] for leaf, axis in pairs if axis is not None)
    leaves = [batching.bdim_at_front(leaf, axis, size) for leaf, axis in pairs]
    results = _call.bind(*leaves, batch_rank=batch_rank + 1, **params)
    return results, [0] * len(results)


def _lower(ctx: Any, *operands: Any, **params: Any) -> Any:
    run = functools.partial(_run, results=ctx.avals_out, **params)
    given = ctx, run, None, list(operands), ctx.avals_in, ctx.avals_out
    return mlir.emit_python_callback(*given, has_side_effect=False, returns_token=False)[0]


batching.primitive_batchers[_call] = _batch
mlir.register_lowering(_call, _lower)
