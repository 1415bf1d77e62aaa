"""Convolutions by patches are convolutions."""

from __future__ import annotations

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from grpo_jax.noise import as_key
from grpo_jax.policies import networks
from grpo_jax.policies.networks import CNN, Conv, convolve

SHAPES = {  # images [N, H, W, C], channels, kernel, stride
    "minatar": ((5, 10, 10, 4), 16, 3, 1),
    "nature-1": ((2, 36, 40, 3), 8, 8, 4),
    "nature-2": ((2, 9, 11, 5), 7, 4, 2),
    "blocks-with-a-rest": ((1, 15, 14, 2), 3, 4, 2),
    "stride-that-does-not-divide": ((3, 11, 12, 2), 4, 3, 2),
    "stride-above-kernel": ((2, 9, 9, 1), 2, 2, 3),
    "one-pixel": ((2, 4, 5, 3), 2, 1, 1),
    "whole-map": ((2, 3, 3, 2), 4, 3, 1),
    "no-images": ((0, 5, 5, 2), 4, 3, 1),
}


def direct(images, kernel, stride):
    return jax.lax.conv_general_dilated(
        images, kernel, (stride, stride), "VALID", dimension_numbers=("NHWC", "HWIO", "NHWC")
    )


def draws(shape, channels, size):
    rng = np.random.default_rng(0)
    return rng.normal(size=shape).astype(np.float32), rng.normal(
        size=(size, size, shape[-1], channels)
    ).astype(np.float32)


@pytest.mark.parametrize(("name", "wrap"), [("minatar", lambda f: f), *((name, jax.jit) for name in SHAPES)])
def test_patches_give_the_convolution_and_its_gradients(name, wrap):
    shape, channels, size, stride = SHAPES[name]
    images, kernel = draws(shape, channels, size)

    def both(function, images, kernel):
        output, back = jax.vjp(functools.partial(function, stride=stride), images, kernel)
        return output, *back(jnp.cos(output))

    found = wrap(functools.partial(both, convolve))(images, kernel)
    wanted = jax.jit(functools.partial(both, direct))(images, kernel)
    for ours, expected in zip(found, wanted, strict=True):
        assert ours.shape == expected.shape
        np.testing.assert_allclose(ours, expected, rtol=1e-4, atol=1e-4)


def test_many_images_are_convolved_in_parts(monkeypatch):
    images, kernel = draws((7, 10, 10, 4), 16, 3)

    def loss(images, kernel):
        return jnp.sum(jnp.sin(convolve(images, kernel, 1)))

    whole = jax.jit(jax.grad(loss, (0, 1)))(images, kernel)
    monkeypatch.setattr(
        networks, "PATCH_BYTES", 3 * 8 * 8 * 36 * 4
    )  # three images, and one that is left over
    parts = jax.jit(jax.grad(lambda *a: loss(*a), (0, 1)))(images, kernel)
    assert "while" in str(jax.make_jaxpr(lambda *a: convolve(*a, 1))(images, kernel)) + str(
        jax.jit(lambda *a: convolve(*a, 1)).lower(images, kernel).as_text()
    )
    for ours, expected in zip(parts, whole, strict=True):
        np.testing.assert_allclose(ours, expected, rtol=1e-5, atol=1e-5)


INIT = jax.jit(lambda module, key, shape: module.init(key, jnp.zeros(shape)), static_argnums=(0, 2))


@pytest.mark.parametrize(
    ("batch", "dtype"), [((), np.float32), ((2, 3), bool), ((2, 3), np.uint8), ((2, 0), np.float32)]
)
def test_parameters_and_outputs_are_those_of_flax(batch, dtype):
    x = np.random.default_rng(0).uniform(0, 2, size=(*batch, 10, 9, 4)).astype(dtype)
    ours, flax = Conv(6, 4, 2), nn.Conv(6, (4, 4), (2, 2), padding="VALID")
    key = jax.random.key(0)
    params = INIT(ours, key, x.shape[-3:])
    jax.tree.map(np.testing.assert_array_equal, params, INIT(flax, key, x.shape[-3:]))
    params = jax.tree.map(lambda leaf: leaf + 0.1, params)
    found = ours.apply(params, x)  # not compiled: NumPy's types come as they are
    np.testing.assert_allclose(found, jax.jit(flax.apply)(params, x * 1.0), rtol=1e-5, atol=1e-5)


def test_seeds_side_by_side_inside_a_loop(key):
    module = CNN("relu", 8)
    x = np.random.default_rng(0).normal(size=(4, 10, 10, 4)).astype(np.float32)
    start = jax.jit(jax.vmap(lambda key: networks.initialise(module, key, x[0])))
    params = start(jax.random.split(as_key(key), 3))

    @jax.jit
    def looped(params):
        def body(total, image):
            return total + jax.vmap(lambda params: module.apply({"params": params}, image))(params), None

        return jax.lax.scan(body, jnp.zeros((3, 8)), x)[0]

    apply = jax.jit(lambda params, image: module.apply({"params": params}, image))
    alone = [
        sum(apply(jax.tree.map(lambda leaf, i=i: leaf[i], params), image) for image in x) for i in range(3)
    ]
    np.testing.assert_allclose(looped(params), alone, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("platform", "convolutions"), [("cpu", 0), ("cuda", 1), ("tpu", 1)])
def test_only_a_cpu_takes_patches(platform, convolutions):
    lowered = jax.jit(convolve, static_argnums=2).trace(*draws((2, 10, 10, 4), 16, 3), 1)
    text = lowered.lower(lowering_platforms=(platform,)).as_text()
    assert text.count("stablehlo.convolution") == convolutions
