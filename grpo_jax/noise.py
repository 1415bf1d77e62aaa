"""Random numbers drawn in bulk.

XLA compiles every call of ``jax.random`` anew (0.15 to 0.3 CPU seconds each on a CPU backend), and GRPO wants
the candidates of a state to share their randomness. Both ask for the same thing: draw raw bits once,
with one call, and let every consumer turn its slice into keys, uniforms or an order.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

KEY_WORDS = 2
"""32-bit words in one threefry key."""


def draw_bits(keys: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    """Raw random words, one block of ``shape`` for each key.

    Args:
      keys: typed PRNG keys ``[...]``.
      shape: shape of the block.

    Returns:
      uint32 ``[..., *shape]``.
    """
    draw = lambda key: jax.random.bits(key, shape, jnp.uint32)  # noqa: E731
    for _ in range(keys.ndim):
        draw = jax.vmap(draw)
    return draw(keys)


def bits_to_uniform(bits: jax.Array) -> jax.Array:
    """Uniform numbers strictly inside (0, 1), symmetric around 1/2; uint32 ``[...]`` -> float ``[...]``.

    Open at both ends, so that a normal quantile of them is finite.
    """
    top = (bits >> jnp.uint32(9)).astype(jnp.float32)
    return (top * jnp.float32(2.0**-23) + jnp.float32(2.0**-24)).astype(jnp.result_type(float))


def bits_to_keys(bits: jax.Array) -> jax.Array:
    """Typed PRNG keys out of their words; uint32 ``[..., 2]`` -> keys ``[...]``."""
    return jax.random.wrap_key_data(bits, impl="threefry2x32")


def as_key(key: jax.Array) -> jax.Array:
    """Accepts ``jax.random.key(0)`` as well as the older ``jax.random.PRNGKey(0)``; returns a typed key."""
    if jnp.issubdtype(key.dtype, jax.dtypes.prng_key):
        return key
    return jax.random.wrap_key_data(key)
