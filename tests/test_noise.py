from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from grpo_jax import noise

SEEDS = [0, 1, 123_456_789, 2**31 - 1, -1]


def draws(key):
    """Everything that consumers of keys do with them."""
    many = jax.random.split(key, (2, 3))
    return {
        "bits8": jax.random.bits(key, (7,), jnp.uint8),
        "bits16": jax.random.bits(key, (3, 5), jnp.uint16),
        "bits32": jax.random.bits(key, (2, 1, 3), jnp.uint32),
        "scalar": jax.random.bits(key),
        "none": jax.random.bits(key, (0, 4)),
        "split": jax.random.key_data(many),
        "fold_in": jax.random.key_data(jax.random.fold_in(key, 2**32 - 1)),
        "uniform": jax.random.uniform(many[1, 2], (11,), minval=-2.0, maxval=3.0),
        "normal": jax.random.normal(jax.random.fold_in(key, 5), (4, 2)),
        "randint": jax.random.randint(many[0, 1], (9,), -3, 1000),
        "bernoulli": jax.random.bernoulli(key, 0.3, (10,)),
    }


def assert_same(ours, plain):
    for name, expected in plain.items():
        assert ours[name].dtype == expected.dtype, name
        np.testing.assert_array_equal(ours[name], expected, err_msg=name)


@pytest.fixture(scope="module")
def plain_draws():
    return jax.jit(jax.vmap(draws))(jnp.stack([jax.random.key(seed) for seed in SEEDS]))


def test_a_vmapped_and_jitted_key_draws_what_jax_draws(plain_draws):
    keys = jnp.stack([noise.as_key(jax.random.key(seed)) for seed in SEEDS])
    assert_same(jax.jit(jax.vmap(draws))(keys), plain_draws)


@pytest.mark.parametrize("i", [1, 4])
def test_an_eager_key_draws_what_jax_draws(plain_draws, i):
    plain = {name: values[i] for name, values in plain_draws.items()}
    assert_same(draws(noise.as_key(jax.random.key(SEEDS[i]))), plain)


def test_64_bit_words_and_seeds_are_those_of_jax():
    with jax.enable_x64(True):
        for seed in (3, -3, 2**40 + 17):
            plain, ours = jax.random.key(seed), jax.random.key(seed, impl=noise.PRNG)
            np.testing.assert_array_equal(jax.random.key_data(ours), jax.random.key_data(plain))
            expected = jax.random.bits(plain, (3, 2), jnp.uint64)
            np.testing.assert_array_equal(jax.random.bits(ours, (3, 2), jnp.uint64), expected)


@pytest.mark.parametrize("seed", SEEDS)
def test_a_key_made_with_our_implementation_is_the_key_of_jax(seed):
    ours = jax.random.key(seed, impl=noise.PRNG)
    np.testing.assert_array_equal(jax.random.key_data(ours), jax.random.key_data(jax.random.key(seed)))


def test_draw_bits_gives_each_key_its_own_block(key):
    keys = jax.random.split(key, (2, 3))
    bits = noise.draw_bits(keys, (4, 5))
    assert bits.shape == (2, 3, 4, 5)
    assert bits.dtype == jnp.uint32
    for i in range(2):
        for j in range(3):
            plain = jax.random.wrap_key_data(jax.random.key_data(keys[i, j]))
            np.testing.assert_array_equal(bits[i, j], jax.random.bits(plain, (4, 5), jnp.uint32))
    assert len(np.unique(bits)) == bits.size


def test_too_many_numbers_from_one_key_are_refused(key):
    with pytest.raises(ValueError, match="split the key"):
        jax.jit(lambda key: jax.random.bits(key, (2**16, 2**16))).lower(key)


def test_bits_to_uniform_at_the_ends(compiled):
    to_uniform = compiled(noise.bits_to_uniform)
    low, high = to_uniform(jnp.array([0, 2**32 - 1], jnp.uint32))
    assert low.dtype == jnp.float32
    assert float(low) == 2.0**-24
    assert float(high) == 1.0 - 2.0**-24
    assert np.all(np.isfinite(jax.scipy.special.ndtri(jnp.stack([low, high]))))


def test_bits_to_uniform_is_symmetric_and_uniform(key):
    bits = noise.draw_bits(key, (100_000,))
    uniforms = np.asarray(noise.bits_to_uniform(bits), np.float64)
    np.testing.assert_array_equal(uniforms + np.asarray(noise.bits_to_uniform(~bits), np.float64), 1.0)
    histogram = np.histogram(uniforms, bins=20, range=(0, 1))[0]
    # Chi-squared with 19 degrees of freedom: 43.8 is its 0.999 quantile.
    assert np.sum((histogram - 5000) ** 2 / 5000) < 43.8


def test_bits_to_keys_keeps_the_words():
    words = jnp.arange(12, dtype=jnp.uint32).reshape(2, 3, 2)
    keys = noise.bits_to_keys(words)
    assert keys.shape == (2, 3)
    np.testing.assert_array_equal(jax.random.key_data(keys), words)


def test_split_gives_fresh_keys(key):
    keys = noise.split(key, 1000)
    assert keys.shape == (1000,)
    words = np.asarray(jax.random.key_data(keys))
    assert len(np.unique(words, axis=0)) == 1000
    assert not np.any(np.all(words == np.asarray(jax.random.key_data(key)), axis=1))


def test_as_key_takes_both_kinds_of_jax_keys_and_its_own(key):
    typed, legacy = noise.as_key(jax.random.key(7)), noise.as_key(jax.random.PRNGKey(7))
    assert typed.dtype == legacy.dtype == key.dtype
    for other in (legacy, noise.as_key(typed)):
        np.testing.assert_array_equal(jax.random.key_data(typed), jax.random.key_data(other))


@pytest.mark.parametrize(
    "wrong",
    [
        0,
        jnp.array([0.0, 1.0]),
        jnp.array([0, 1, 2], jnp.uint32),
        jnp.zeros((4, 2), jnp.uint32),
        pytest.param(lambda: jax.random.split(jax.random.key(0), 3), id="several"),
        pytest.param(lambda: jax.random.key(0, impl="rbg"), id="rbg"),
    ],
)
def test_as_key_refuses_what_is_not_one_threefry_key(wrong):
    with pytest.raises(TypeError, match=r"key.*jax\.random\.key\("):
        noise.as_key(wrong() if callable(wrong) else wrong)


def test_the_kernel_of_other_devices_gives_the_same_bits(monkeypatch):
    """JAX's own, which runs on a CPU too."""
    keys = noise.draw_bits(noise.as_key(jax.random.key(7)), (5, 2))
    low = jnp.arange(12, dtype=jnp.uint32).reshape(3, 4)
    arguments = [(low * 0, low), (jnp.uint32(2**32 - 1), jnp.uint32(5)), (low[:0], low[:0])]

    def hashed():
        some = [noise.threefry2x32(keys[0], *counters) for counters in arguments]
        return some, jax.vmap(lambda key: noise.threefry2x32(key, low, low + 1))(keys)

    written_out = hashed()
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    assert "threefry2x32" in str(jax.make_jaxpr(hashed)())
    jax.tree.map(np.testing.assert_array_equal, hashed(), written_out)
