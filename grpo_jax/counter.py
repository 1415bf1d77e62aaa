"""Counts beyond 32 bits on devices that have no 64-bit integers."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from grpo_jax import shards
from grpo_jax.types import Counter


def zero() -> Counter:
    """A counter at 0."""
    return Counter(high=jnp.uint32(0), low=jnp.uint32(0))


def add(counter: Counter, amount: jax.Array) -> Counter:
    """Adds a non-negative amount below 2**32 (scalar integer); the carry goes into the high word."""
    low = counter.low + jnp.asarray(amount, jnp.uint32)
    return Counter(high=counter.high + (low < counter.low).astype(jnp.uint32), low=low)


def merge(left: Counter, right: Counter) -> Counter:
    """The sum of two counters."""
    total = add(left, right.low)
    return Counter(high=total.high + right.high, low=total.low)


def over_shards(counter: Counter) -> Counter:
    """The sum of all shards' counters."""
    # Sums of half words fit a word for up to 65,536 shards.
    low, middle, high = shards.total((counter.low & 0xFFFF, counter.low >> 16, counter.high))
    return add(add(Counter(high + (middle >> 16), jnp.zeros_like(low)), (middle & 0xFFFF) << 16), low)


def to_float(counter: Counter) -> jax.Array:
    """The count as a float, rounded to its precision: for metrics."""
    dtype = jnp.result_type(float)
    return counter.high.astype(dtype) * 2.0**32 + counter.low.astype(dtype)


def to_int(counter: Counter) -> int:
    """The exact count, on the host; a counter of several seeds is summed."""
    import numpy as np

    high, low = (int(np.sum(np.asarray(word, np.uint64))) for word in (counter.high, counter.low))
    return high * 2**32 + low
