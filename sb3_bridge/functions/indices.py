"""Finds indices out of range in a function of JAX, which reads the nearest element instead of raising an error."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.lax import GatherScatterMode

_FILLS = (0, 77)


def find_out_of_range(function: Callable[..., Any], arguments: tuple[Any, ...]) -> str | None:
    """The first index out of range whose value changes the result, in words; None where there is none.

    Only plain indexing is looked at: negative indices and ``jnp.take`` with a ``mode`` are right, and so is an element
    that ``jnp.where`` replaces afterwards. (``x.at[i].get(mode="clip")`` is traced as ``x[i]`` where i is a traced number.)
    Bodies of loops are not looked into.

    Args:
      function: traceable.
      arguments: of one call.
    """
    arguments = jax.tree.map(jnp.asarray, arguments)
    program, leaves = jax.make_jaxpr(function)(*arguments), jax.tree.leaves(arguments)
    if not _indexes(program):  # as good as always; to run a program operation by operation takes a second
        return None
    found: list[str] = []
    results = _run(program, leaves, found, None)
    for fill in _FILLS if found else ():
        for one, other in zip(results, _run(program, leaves, [], fill), strict=True):
            if not np.array_equal(one, other, equal_nan=one.dtype.kind == "f"):
                return found[0]
    return None


def _indexes(program: Any) -> bool:
    return any(
        _indexes(equation.params["jaxpr"]) if _is_jit(equation) else _takes_indices(equation)
        for equation in program.jaxpr.eqns
    )


def _is_jit(equation: Any) -> bool:
    return equation.primitive.name in ("jit", "pjit")


def _takes_indices(equation: Any) -> bool:
    name, mode = equation.primitive.name, equation.params.get("mode")
    return name == "dynamic_slice" or (name == "gather" and mode == GatherScatterMode.PROMISE_IN_BOUNDS)


def _run(program: Any, leaves: list[Any], found: list[str], fill: int | None) -> list[Any]:
    """Runs a traced program; ``fill``, if it is not None, replaces what indices out of range read."""
    values: dict[Any, Any] = dict(zip(program.jaxpr.constvars, program.consts, strict=True))
    values |= zip(program.jaxpr.invars, leaves, strict=True)

    def read(atom: Any) -> Any:
        return atom.val if hasattr(atom, "val") else values[atom]

    for equation in program.jaxpr.eqns:
        primitive, operands = equation.primitive, [read(atom) for atom in equation.invars]
        if _is_jit(equation):
            values |= zip(
                equation.outvars, _run(equation.params["jaxpr"], operands, found, fill), strict=True
            )
            continue
        params = primitive.get_bind_params(equation.params)
        functions, params = params if isinstance(params, tuple) else ((), params)  # by version of JAX
        outside = _outside(equation, operands) if _takes_indices(equation) else None
        if outside is not None:
            found.append(outside)
        if outside is None or fill is None:
            results = primitive.bind(*functions, *operands, **params)
        elif primitive.name == "gather":
            mode = {"mode": GatherScatterMode.FILL_OR_DROP, "fill_value": fill}
            results = primitive.bind(*operands, **params | mode)
        else:
            results = jnp.full_like(operands[0], fill, shape=params["slice_sizes"])
        values |= zip(equation.outvars, results if primitive.multiple_results else [results], strict=True)
    return [read(atom) for atom in program.jaxpr.outvars]


def _outside(equation: Any, operands: list[Any]) -> str | None:
    """The first index that is out of range."""
    shape, sizes = np.shape(operands[0]), equation.params["slice_sizes"]
    if equation.primitive.name == "gather":
        axes = equation.params["dimension_numbers"].start_index_map
        starts = np.asarray(operands[1]).reshape(-1, len(axes))
    else:
        axes = range(len(shape))
        starts = np.array([[int(start) for start in operands[1:]]])
    for column, axis in enumerate(axes):
        for start in starts[:, column].tolist():
            if not 0 <= start <= shape[axis] - sizes[axis]:
                index = start if start >= 0 else start - shape[axis]  # JAX added the size to a negative one
                return f"index {index} of axis {axis} of an array of shape {list(shape)}"
    return None
