from __future__ import annotations

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from grpo_jax.noise import as_key
from grpo_jax.policies import networks
from grpo_jax.policies.networks import ACTIVATIONS, CNN, Actor, Combined, Critic, Flatten

initialise = jax.jit(networks.initialise, static_argnums=(0, 3, 4))
apply = jax.jit(lambda module, params, x: module.apply({"params": params}, x), static_argnums=0)


def kernels(params, path=()):
    """Every kernel as a matrix, by the names of its layers."""
    for name, value in params.items():
        if isinstance(value, dict):
            yield from kernels(value, (*path, name))
        elif name == "kernel":
            yield "/".join(path), np.asarray(value, np.float64).reshape(-1, value.shape[-1])


def biases(params):
    return [leaf for path, leaf in jax.tree_util.tree_leaves_with_path(params) if path[-1].key == "bias"]


NETWORKS = {
    "mlp": (Actor((64, 16), "tanh", 3), (8,), 0.01),
    "wide": (Actor((4,), "relu", 20), (6,), 0.5),
    "critic": (Critic((8, 8), jax.nn.relu), (5,), 1.0),
    "small-map": (CNN("relu"), (10, 10, 4), 1.0),
    "large-map": (CNN("relu"), (36, 40, 2), 1.0),
    "few-features": (CNN("relu", 7), (36, 40, 1), 1.0),
}


@pytest.fixture(scope="module", params=NETWORKS)
def network(request):
    module, shape, gain = NETWORKS[request.param]
    params = initialise(module, as_key(jax.random.key(0)), jnp.zeros(shape), gain)
    return request.param, module, shape, gain, params


def test_kernels_are_orthogonal_with_their_gains(network):
    _, _, _, output_gain, params = network
    seen = 0
    for name, kernel in kernels(params):
        gain = output_gain if name == "output" else np.sqrt(2)
        rows, columns = kernel.shape
        gram = kernel.T @ kernel if rows >= columns else kernel @ kernel.T
        np.testing.assert_allclose(gram, gain**2 * np.eye(len(gram)), atol=1e-5)
        seen += 1
    assert seen >= 2


def test_biases_are_zero(network):
    params = network[-1]
    assert len(biases(params)) == len(list(kernels(params)))
    assert all(np.all(np.asarray(bias) == 0) for bias in biases(params))


@pytest.mark.parametrize("batch", [(), (3,), (2, 3)])
def test_output_shapes_and_rows(network, batch):
    name, module, shape, _, params = network
    x = np.random.default_rng(0).normal(size=(*batch, *shape)).astype(np.float32)
    output = apply(module, params, x)
    expected = {
        "mlp": (3,),
        "wide": (20,),
        "critic": (),
        "small-map": (128,),
        "large-map": (512,),
        "few-features": (7,),
    }[name]
    assert output.shape == (*batch, *expected)
    if batch:
        first = (0,) * len(batch)
        np.testing.assert_allclose(output[first], apply(module, params, x[first]), rtol=1e-3, atol=1e-5)


EXPECTED_SHAPES = {
    "mlp": {"MLP_0/Dense_0": (8, 64), "MLP_0/Dense_1": (64, 16), "output": (16, 3)},
    "wide": {"MLP_0/Dense_0": (6, 4), "output": (4, 20)},
    "critic": {"MLP_0/Dense_0": (5, 8), "MLP_0/Dense_1": (8, 8), "output": (8, 1)},
    # A 3x3 convolution without padding leaves 8x8 of 10x10.
    "small-map": {"Conv_0": (3 * 3 * 4, 16), "Dense_0": (8 * 8 * 16, 128)},
    # 36x40 -> 8x9 -> 3x3 -> 1x1.
    "large-map": {
        "Conv_0": (8 * 8 * 2, 32),
        "Conv_1": (4 * 4 * 32, 64),
        "Conv_2": (3 * 3 * 64, 64),
        "Dense_0": (64, 512),
    },
    "few-features": {
        "Conv_0": (8 * 8, 32),
        "Conv_1": (4 * 4 * 32, 64),
        "Conv_2": (3 * 3 * 64, 64),
        "Dense_0": (64, 7),
    },
}


def test_layer_sizes(network):
    name, *_, params = network
    assert {layer: kernel.shape for layer, kernel in kernels(params)} == EXPECTED_SHAPES[name]


def test_keys_make_different_networks_and_equal_keys_equal_ones():
    module = Actor((8,), "tanh", 2)
    example = jnp.zeros(3)
    keys = [as_key(jax.random.key(seed)) for seed in (0, 0, 1)]
    first, again, other = (initialise(module, key, example, 0.01) for key in keys)
    for (name, one), (_, two), (_, three) in zip(*map(kernels, (first, again, other)), strict=True):
        np.testing.assert_array_equal(one, two)
        assert not np.allclose(one, three, atol=1e-4), name


def test_the_layers_of_one_network_differ():
    params = initialise(Actor((6, 6), "tanh", 6), as_key(jax.random.key(0)), jnp.zeros(6), np.sqrt(2.0))
    matrices = [kernel for _, kernel in kernels(params)]
    assert len(matrices) == 3
    for i in range(3):
        assert not np.allclose(matrices[i], matrices[i - 1], atol=1e-2)


@pytest.mark.parametrize("log_std_init", [0.0, -1.5])
def test_log_std_is_learned_and_the_same_in_every_state(log_std_init):
    actor = Actor((8,), "tanh", 2, gaussian=True, log_std_init=log_std_init)
    params = initialise(actor, as_key(jax.random.key(0)), jnp.zeros(3), 0.01)
    np.testing.assert_array_equal(params["log_std"], [log_std_init] * 2)
    x = np.random.default_rng(0).normal(size=(5, 3)).astype(np.float32)
    output = apply(actor, params, x)
    assert output.shape == (5, 4)
    np.testing.assert_array_equal(output[:, 2:], np.full((5, 2), log_std_init, np.float32))
    assert np.ptp(output[:, :2], axis=0).min() > 0
    gradient = jax.jit(jax.grad(lambda params: apply(actor, params, x)[:, 2:].sum()))(params)
    np.testing.assert_array_equal(gradient["log_std"], [5.0, 5.0])


@pytest.mark.parametrize(
    ("activation", "expected"),
    [
        ("tanh", np.tanh(-0.5)),
        ("relu", 0.0),
        ("elu", np.exp(-0.5) - 1),
        ("gelu", -0.154286),
        ("silu", -0.5 / (1 + np.exp(0.5))),
        ("leaky_relu", -0.005),
    ],
)
def test_activations(activation, expected):
    assert activation in ACTIVATIONS
    actor = Actor((1,), activation, 1)
    params = initialise(actor, as_key(jax.random.key(0)), jnp.zeros(1), 1.0)
    ones = jax.tree.map(lambda leaf: jnp.ones_like(leaf) if leaf.ndim == 2 else leaf, params)
    output = apply(actor, ones, jnp.array([-0.5]))
    np.testing.assert_allclose(output[0], expected, rtol=1e-5, atol=1e-7)


def test_an_untrained_policy_is_nearly_uniform():
    actor = Actor((64, 64), "tanh", 4)
    params = initialise(actor, as_key(jax.random.key(0)), jnp.zeros(4), 0.01)
    logits = apply(actor, params, jax.random.normal(jax.random.key(1), (100, 4)) * 3)
    assert np.abs(logits).max() < 0.2
    assert np.abs(logits).max() > 0


def test_any_function_is_an_activation():
    twice = lambda x: 2 * x
    critic = Critic((3,), twice)
    params = initialise(critic, as_key(jax.random.key(0)), jnp.zeros(2))
    x = np.array([0.5, -1.0])
    hidden, output = params["MLP_0"]["Dense_0"]["kernel"], params["output"]["kernel"]
    np.testing.assert_allclose(apply(critic, params, x), (2 * x @ hidden @ output)[0], rtol=1e-5)
    networks.check_activation(twice)


@pytest.mark.parametrize(
    ("activation", "error", "message"),
    [
        ("sine", ValueError, "activation='sine' must be one of tanh, relu"),
        (3, TypeError, "must be a name or a function"),
        (nn.PReLU, TypeError, "must be a name or a function"),
        (nn.PReLU(), TypeError, "must be a name or a function"),
        ([], TypeError, "must be hashable"),
    ],
)
def test_what_is_no_activation(activation, error, message):
    with pytest.raises(error, match=message):
        networks.check_activation(activation)


COMBINED = Combined((("b", 2), ("map", 3), ("a", 1)), images=("map",), n_features=5)


@pytest.mark.parametrize("batch", [(), (2,), (2, 3)])
def test_combined_features_are_in_order_and_images_are_convolved(batch):
    rng = np.random.default_rng(0)
    shapes = {"a": (2,), "b": (2, 2), "map": (6, 6, 1)}
    observation = {name: rng.normal(size=batch + shape).astype(np.float32) for name, shape in shapes.items()}
    example = {name: jnp.zeros(shape) for name, shape in shapes.items()}
    params = initialise(COMBINED, as_key(jax.random.key(0)), example)
    assert set(params) == {"CNN_map"}
    features = apply(COMBINED, params, observation)
    assert features.shape == (*batch, 4 + 5 + 2)
    np.testing.assert_array_equal(features[..., :4], observation["b"].reshape(*batch, 4))
    np.testing.assert_array_equal(features[..., 9:], observation["a"])
    convolved = apply(CNN("relu", 5), params["CNN_map"], observation["map"])
    np.testing.assert_allclose(features[..., 4:9], convolved, rtol=1e-5, atol=1e-6)


def test_what_has_no_parameters_starts_with_none():
    key = as_key(jax.random.key(0))
    assert networks.initialise(Flatten(2), key, jnp.zeros((2, 3))) == {}
    assert networks.initialise(Combined((("x", 1),)), key, {"x": jnp.zeros(3)}) == {}


@pytest.mark.parametrize(
    ("module", "example", "layers"),
    [
        (Actor((64,), "tanh", 40, gaussian=True, log_std_init=-1.0), jnp.zeros(50), {"output": 64}),
        (CNN("relu", 16), jnp.zeros((36, 40, 3)), {"Conv_0": 8 * 8 * 3, "Dense_0": None}),
    ],
)
def test_without_orthogonal_kernels_layers_start_as_in_torch(module, example, layers):
    params = initialise(module, as_key(jax.random.key(0)), example, 0.01, False)
    for name, n_inputs in layers.items():
        layer = params[name]
        n_inputs = n_inputs or layer["kernel"].shape[0]
        assert layer["kernel"].size == n_inputs * layer["bias"].size
        bound = 1 / np.sqrt(n_inputs)
        torch.manual_seed(0)
        reference = torch.nn.Linear(n_inputs, 1_000)  # the start of convolutions is the same
        for mine, its in ((layer["kernel"], reference.weight), (layer["bias"], reference.bias)):
            assert bound * 0.8 < np.abs(mine).max() < bound
            assert np.std(mine) == pytest.approx(its.detach().numpy().std(), rel=0.3)
    if "log_std" in params:
        np.testing.assert_array_equal(params["log_std"], np.full(40, -1.0))


def test_other_modules_start_as_they_say():
    # Orthogonal initialisation knows no scale: all zeros would silence the layer for good.
    key = as_key(jax.random.key(0))
    params = initialise(nn.LayerNorm(), key, jnp.zeros((1, 4)))
    np.testing.assert_array_equal(params["scale"], np.ones(4))


def test_modules_with_a_state_are_refused():
    with pytest.raises(ValueError, match="BatchNorm keeps batch_stats beside its parameters"):
        networks.initialise(
            nn.BatchNorm(use_running_average=False), as_key(jax.random.key(0)), jnp.zeros((1, 4))
        )
