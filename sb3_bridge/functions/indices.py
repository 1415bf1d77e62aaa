"""Finds indices out of range in a function of JAX, which reads the nearest element instead of raising an error."""

from __future__ import annotations

import contextlib
import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.lax import GatherScatterMode

from sb3_bridge.functions.user_function import Arguments, UserFunction, length, take, traced


def find_out_of_range(form: UserFunction, arguments: Arguments) -> str | None:
    """The first index out of range whose value changes a result of N transitions, in words; None where there is none.

    Only plain indexing is looked at: negative indices and ``jnp.take`` with a ``mode`` are right, and so is an element
    that ``jnp.where`` replaces afterwards. (``x.at[i].get(mode="clip")`` is traced as ``x[i]`` where i is a traced number.)
    Bodies of loops are not looked into.
    """
    lead = (length(arguments),) if form.takes_batch else ()
    samples = [arguments] if lead else [take(arguments, i) for i in range(length(arguments))]
    samples = [jax.tree.map(jnp.asarray, sample) for sample in samples]
    with contextlib.suppress(Exception):  # JAX's data structures may change; the function was tried already
        program = jax.make_jaxpr(lambda *given: traced(form, given, lead))(*samples[0])
        if not re.search("dynamic_slice|PROMISE_IN_BOUNDS", str(program)):
            return None  # as good as always; to run a program operation by operation takes a second
        for sample in samples:
            found: list[str] = []
            results = _run(program, sample, found, None)
            for fill in (0, 77) if found else ():
                for one, other in zip(results, _run(program, sample, [], fill), strict=True):
                    if not np.array_equal(one, other, equal_nan=one.dtype.kind == "f"):
                        return found[0]
    return None


def _run(program: Any, arguments: Any, found: list[str], fill: int | None) -> list[Any]:
    """Runs a traced program; ``fill``, if it is not None, replaces what indices out of range read."""
    values: dict[Any, Any] = dict(zip(program.jaxpr.constvars, program.consts, strict=True))
    values |= zip(program.jaxpr.invars, jax.tree.leaves(arguments), strict=True)

    def read(atom: Any) -> Any:
        return atom.val if hasattr(atom, "val") else values[atom]

    for equation in program.jaxpr.eqns:
        primitive, operands = equation.primitive, [read(atom) for atom in equation.invars]
        params = primitive.get_bind_params(equation.params)
        functions, params = params if isinstance(params, tuple) else ((), params)  # by version of JAX
        outside = _outside(primitive.name, params, operands)
        found += outside
        if primitive.name in ("jit", "pjit"):
            results = _run(equation.params["jaxpr"], operands, found, fill)
        elif outside and fill is not None and primitive.name == "dynamic_slice":
            results = [jnp.full_like(operands[0], fill, shape=params["slice_sizes"])]
        else:
            if outside and fill is not None:
                params = params | {"mode": GatherScatterMode.FILL_OR_DROP, "fill_value": fill}
            results = primitive.bind(*functions, *operands, **params)
        values |= zip(
            equation.outvars, results if isinstance(results, list | tuple) else [results], strict=True
        )
    return [read(atom) for atom in program.jaxpr.outvars]


def _outside(name: str, params: dict[str, Any], operands: list[Any]) -> list[str]:
    """The first index that is out of range, if any."""
    if name == "dynamic_slice":
        axes, starts = range(np.ndim(operands[0])), np.array([operands[1:]])
    elif name == "gather" and params["mode"] == GatherScatterMode.PROMISE_IN_BOUNDS:
        axes = params["dimension_numbers"].start_index_map
        starts = np.asarray(operands[1]).reshape(-1, len(axes))
    else:
        return []
    shape = np.shape(operands[0])
    for column, axis in enumerate(axes):
        for start in starts[:, column].tolist():
            if not 0 <= start <= shape[axis] - params["slice_sizes"][axis]:
                index = start if start >= 0 else start - shape[axis]  # JAX added the size to a negative one
                return [f"index {index} of axis {axis} of an array of shape {list(shape)}"]
    return []
