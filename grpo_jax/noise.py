"""Random numbers: threefry that compiles fast, drawn in bulk.

JAX lowers threefry to a loop of many small kernels on a CPU, which takes 0.25 to 0.5 CPU seconds to compile at *every*
call of ``jax.random``. Mostly written out, the same function gives the same bits, compiles 1.6 to 2.6 times faster and
runs up to 4 times faster where there are many keys; one iteration compiles in a sixth less time
(``benchmarks/compile_time.py``). Keys of this kind go through all of ``jax.random``, so environments draw with it too.
On other devices JAX's own kernel is used: on an H100 it draws 218e9 words a second, what is written out 59e9, and
``rbg``, whose bits would be others, 306e9 (``benchmarks/gpu.py``).

Numbers are drawn as raw words, in bulk; every consumer turns its slice into keys, uniforms or an order. That is
also what lets the candidates of a state share their randomness.
"""

from __future__ import annotations

import math

import jax
import jax.extend.random
import jax.numpy as jnp
import numpy as np

from grpo_jax.types import backend

KEY_WORDS = 2
"""32-bit words in one threefry key."""


def threefry2x32(key: jax.Array, high: jax.Array, low: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The Threefry-2x32 hash with 20 rounds (Salmon et al. 2011, doi:10.1145/2063384.2063405).

    Args:
      key: uint32 ``[2]``.
      high: uint32 ``[...]``, high words of the counters.
      low: uint32 ``[...]``, low words of the counters.

    Returns:
      Two arrays of words, uint32 ``[...]`` each.
    """
    if backend() != "cpu":
        a, b = jax.extend.random.threefry2x32_p.bind(key[0], key[1], high, low)
        return a, b
    schedule = (key[0], key[1], key[0] ^ key[1] ^ jnp.uint32(0x1BD11BDA))
    a, b = _four_rounds(high + schedule[0], low + schedule[1], (13, 15, 26, 6))
    a, b = a + schedule[1], b + schedule[2] + jnp.uint32(1)

    def eight_rounds(_: jax.Array, carry: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
        a, b, s0, s1, s2, block = carry
        a, b = _four_rounds(a, b, (17, 29, 16, 24))
        a, b = a + s2, b + s0 + block
        a, b = _four_rounds(a, b, (13, 15, 26, 6))
        return a + s0, b + s1 + block + jnp.uint32(1), s2, s0, s1, block + jnp.uint32(2)

    # The loop is there to be a wall: without it XLA may inline the hash that made the key into every use of it.
    carry = (a, b, *schedule, jnp.uint32(2))
    a, b, *_ = jax.lax.fori_loop(0, 2, eight_rounds, carry)
    return a, b


def _four_rounds(a: jax.Array, b: jax.Array, rotations: tuple[int, ...]) -> tuple[jax.Array, jax.Array]:
    for rotation in rotations:
        a = a + b
        b = a ^ ((b << jnp.uint32(rotation)) | (b >> jnp.uint32(32 - rotation)))
    return a, b


def _hash_range(key: jax.Array, shape: tuple[int, ...]) -> tuple[jax.Array, jax.Array]:
    """Words of the counters 0, 1, 2, ...; the layout of ``jax_threefry_partitionable``."""
    n = math.prod(shape)
    if n >= 2**32:
        raise ValueError(f"{n} random numbers from one key are too many: split the key")
    low = jax.lax.iota(jnp.uint32, n).reshape(shape)
    return threefry2x32(key, jnp.zeros_like(low), low)


def _seed(seed: jax.Array) -> jax.Array:
    high = (seed >> 32) if seed.dtype.itemsize == 8 else jnp.zeros_like(seed)
    return jnp.stack([high.astype(jnp.uint32), seed.astype(jnp.uint32)])


def _split(key: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    return jnp.stack(_hash_range(key, tuple(shape)), axis=-1)


def _fold_in(key: jax.Array, data: int | jax.Array) -> jax.Array:
    low = jnp.asarray(data, jnp.uint32)
    # Zeros that vmap gives the axes of ``low``: JAX's kernel, lowered for the CPU of a machine with a GPU, needs both alike.
    high = low ^ low
    return jnp.stack(threefry2x32(key, high, low))


def _random_bits(key: jax.Array, bit_width: int, shape: tuple[int, ...]) -> jax.Array:
    high, low = _hash_range(key, tuple(shape))
    if bit_width == 64:
        return (high.astype(jnp.uint64) << 32) | low.astype(jnp.uint64)
    return (high ^ low).astype(f"uint{bit_width}")


PRNG = jax.extend.random.define_prng_impl(
    key_shape=(KEY_WORDS,),
    seed=_seed,
    split=_split,
    random_bits=_random_bits,
    fold_in=_fold_in,
    name="threefry2x32_unrolled",
    tag="gro",
)
"""The implementation behind every key in this package; ``jax.random.key(0)`` and a key of it give the same bits."""


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
    return jax.random.wrap_key_data(bits, impl=PRNG)


def split(key: jax.Array, n: int) -> jax.Array:
    """``n`` fresh keys; keys ``[n]``."""
    return bits_to_keys(draw_bits(key, (n, KEY_WORDS)))


def as_key(key: jax.Array) -> jax.Array:
    """A key of this package's kind out of ``jax.random.key(0)`` or the older ``jax.random.PRNGKey(0)``.

    Raises:
      TypeError: not one key, or one of another generator than threefry.
    """
    if not isinstance(key, (jax.Array, np.ndarray)):
        raise TypeError(f"key={key!r} must be a PRNG key, such as jax.random.key(0)")
    is_typed = jnp.issubdtype(key.dtype, jax.dtypes.prng_key)
    words = jax.random.key_data(key) if is_typed else key
    if words.shape != (KEY_WORDS,) or words.dtype != jnp.uint32:
        raise TypeError(
            f"key must be one threefry PRNG key, as jax.random.key(seed) gives it, got {key.dtype}{list(key.shape)};"
            " vmap over several"
        )
    return bits_to_keys(words)
