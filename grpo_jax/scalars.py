"""Numbers and switches as people give them: Python's, NumPy's, JAX's; as Python's, or refused."""

from __future__ import annotations

import math
import operator
from numbers import Real
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np


def as_integer(value: Any) -> Any:
    """The int that an integer of NumPy's or JAX's is; anything else as it is."""
    try:
        return value if isinstance(value, bool) else operator.index(value)
    except TypeError:
        return value


def as_number(value: Any) -> Any:
    """The float that a real number or a NumPy array of one is; anything else, JAX's arrays too, as it is."""
    if isinstance(value, (np.ndarray, np.generic)) and value.ndim == 0:
        value = value.item()
    if not isinstance(value, Real) or isinstance(value, bool):
        return value
    try:
        return float(value)
    except OverflowError:  # an integer or a fraction beyond floats
        return math.inf


def as_switch(value: Any) -> Any:
    """The bool that NumPy's is; anything else as it is."""
    return bool(value) if isinstance(value, np.bool_) else value


def check_number(name: str, value: Any, low: float, high: float) -> None:
    """Refuses what is no finite number, or array of such, between two bounds; a tracer's value is not known yet.

    Raises:
      TypeError: no number.
      ValueError: out of bounds, or not finite.
    """
    is_array = isinstance(value, (np.ndarray, jax.Array))
    kinds = (np.floating, np.integer)
    if not (any(jnp.issubdtype(value.dtype, kind) for kind in kinds) if is_array else type(value) is float):
        raise TypeError(f"{name}={value!r} must be a number")
    if isinstance(value, jax.core.Tracer):  # has no value yet
        return
    numbers = np.asarray(value)
    if not np.all(np.isfinite(numbers) & (low <= numbers) & (numbers <= high)):
        raise ValueError(f"{name}={value!r} must be finite and between {low:g} and {high:g}")
