"""What policy_kwargs mean, and what is refused."""

from __future__ import annotations

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import torch
from sb3.policies.cases import (
    CLASSES,
    TWO,
    VECTOR,
    make,
    rate,
)
from stable_baselines3.common import policies as sb3

from grpo_jax.policies.networks import ACTIVATIONS
from sb3_bridge.policies import CnnPolicy, MlpPolicy, layers
from sb3_bridge.policies.optimizer import to_optimizer
from sb3_bridge.policies.policy import to_policy_class


def test_arguments_are_kept():
    given = {
        "net_arch": {"pi": [3]},
        "activation_fn": torch.nn.ELU,
        "ortho_init": False,
        "use_sde": True,
        "log_std_init": -2.0,
        "full_std": False,
        "use_expln": True,
        "squash_output": True,
        "features_extractor_class": None,
        "features_extractor_kwargs": {},
        "share_features_extractor": False,
        "normalize_images": False,
        "optimizer_class": optax.adamw,
        "optimizer_kwargs": {"b1": 0.8},
        "has_critic": False,
    }
    policy = make(**given)
    assert {name: getattr(policy, name) for name in given} == given
    parameters = policy._get_constructor_parameters()
    assert {name: parameters[name] for name in given} == given
    again = MlpPolicy(**parameters)
    assert again.structure == policy.structure
    assert policy.state_dict().keys() == {
        f"actor.{layer}.{part}" for layer in ("MLP_0.Dense_0", "output") for part in ("kernel", "bias")
    }
    policy.anything = 3
    assert policy.anything == 3


def test_positional_arguments_are_in_sb3s_order():
    policy = MlpPolicy(VECTOR, TWO, rate, [3], nn.relu, False, False, -1.0)
    assert policy.structure.actor.widths == policy.structure.critic.widths == (3,)
    assert policy.structure.actor.activation == "relu"
    assert not policy.structure.orthogonal


def test_a_squashed_output_needs_sde_as_in_sb3():
    for cls in (MlpPolicy, sb3.ActorCriticPolicy):
        with pytest.raises(AssertionError, match="squash_output"):
            cls(VECTOR, TWO, rate, squash_output=True)
        with pytest.raises(AssertionError, match="reset_noise"):
            cls(VECTOR, TWO, rate, net_arch=[8]).reset_noise()


def test_the_device_is_torchs():
    policy = make()
    assert policy.device == torch.device("cpu")
    assert policy.to("meta") is policy
    assert policy.device == torch.device("meta")
    assert policy.obs_to_tensor(VECTOR.sample())[0].device.type == "meta"
    assert policy.cpu().device == torch.device("cpu")
    with pytest.raises(TypeError, match="takes a device alone"):
        policy.to(torch.float64)


def test_the_training_mode():
    policy = make()
    policy.set_training_mode(True)
    assert policy.training
    policy.predict(VECTOR.sample())
    assert not policy.training


@pytest.mark.parametrize(
    ("given", "net_arch", "widths"),
    [
        (None, {"pi": [64, 64], "vf": [64, 64]}, ((64, 64), (64, 64))),
        ([], [], ((), ())),
        ([3, 4], [3, 4], ((3, 4), (3, 4))),
        ((3,), [3], ((3,), (3,))),
        ({"pi": [3]}, {"pi": [3]}, ((3,), ())),
        ({"vf": [3]}, {"vf": [3]}, ((), (3,))),
        ({}, {}, ((), ())),
    ],
)
def test_net_arch(given, net_arch, widths):
    actual = layers.to_net_arch(given, convolutional=False)
    assert actual == net_arch
    assert layers.widths_of(actual) == widths
    if not isinstance(given, tuple):
        assert sb3.ActorCriticPolicy(VECTOR, TWO, rate, net_arch=given).net_arch == net_arch
    assert layers.to_net_arch(None, convolutional=True) == []


def test_the_old_form_of_net_arch_warns_as_in_sb3():
    given = [{"pi": [3], "vf": [4]}]
    for cls in (MlpPolicy, sb3.ActorCriticPolicy):
        with pytest.warns(UserWarning, match="net_arch=dict"):
            assert cls(VECTOR, TWO, rate, net_arch=given).net_arch == given[0]


@pytest.mark.parametrize("given", [64, [0], [3.5], ["a"], {"qf": [3]}, {"pi": 3}, [3, {"pi": [3]}], [True]])
def test_what_is_no_net_arch(given):
    with pytest.raises(ValueError, match="net_arch=.* must be a list of at most 256 layer sizes"):
        layers.to_net_arch(given, convolutional=False)


@pytest.mark.parametrize("cls", layers.TORCH_ACTIVATIONS, ids=lambda cls: cls.__name__)
def test_torch_activations_are_the_same_functions(cls):
    x = np.concatenate([np.linspace(-8, 8, 1001), [-30.0, 30.0, 0.0, 3.0, -3.0, 6.0]]).astype(np.float32)
    activation = layers.to_activation(cls)
    function = ACTIVATIONS[activation] if isinstance(activation, str) else activation
    np.testing.assert_allclose(function(x), cls()(torch.as_tensor(x)), rtol=2e-5, atol=1e-6)
    assert hash(layers.to_activation(cls)) == hash(activation)


@pytest.mark.parametrize("given", ["tanh", nn.tanh, jnp.tanh, torch.nn.Tanh])
def test_one_function_has_one_form(given):
    assert layers.to_activation(given) == "tanh"


def test_a_function_is_an_activation():
    assert layers.to_activation(jax.nn.softplus) is jax.nn.softplus
    assert make(activation_fn=torch.nn.GELU).structure == make(activation_fn=torch.nn.GELU).structure


@pytest.mark.parametrize(
    ("given", "error", "message"),
    [
        (torch.nn.PReLU, TypeError, "PReLU.* has no counterpart.* pass a function of JAX arrays"),
        (torch.nn.ReLU(), TypeError, "not an instance"),
        (functools.partial(torch.nn.LeakyReLU, 0.2), TypeError, "no counterpart"),
        (torch.nn.functional.relu, TypeError, "pass a function of JAX arrays"),
        (torch.nn.Hardtanh, TypeError, "ELU, GELU, Identity, LeakyReLU"),
        (nn.PReLU, TypeError, "activation_fn: .* must be a name or a function"),
        (3, TypeError, "activation_fn: "),
        ("sine", ValueError, "activation_fn: activation='sine' must be one of tanh"),
    ],
)
def test_what_is_no_activation(given, error, message):
    with pytest.raises(error, match=message):
        make(activation_fn=given)


def step_of(factory, learning_rate=0.5):
    params = {"x": jnp.ones(2)}
    optimizer = factory(learning_rate)
    updates, _ = optimizer.update({"x": jnp.array([1e-5, 2.0])}, optimizer.init(params), params)
    return updates["x"]


def _no_optimizer(learning_rate):
    return learning_rate


def test_without_arguments_the_library_chooses():
    for kwargs in (None, {}):
        assert make(optimizer_kwargs=kwargs).optimizer.factory is None


@pytest.mark.parametrize(
    ("optimizer_class", "optimizer_kwargs", "expected"),
    [
        (optax.sgd, None, optax.sgd),
        (optax.sgd, {"momentum": 0.9, "nesterov": True}, lambda r: optax.sgd(r, 0.9, nesterov=True)),
        (optax.adamw, {"weight_decay": 0.1}, lambda rate: optax.adamw(rate, weight_decay=0.1)),
        (optax.rmsprop, {"eps": 1e-3}, lambda rate: optax.rmsprop(rate, eps=1e-3)),
        (None, {"b1": 0.5}, lambda rate: optax.adam(rate, b1=0.5, eps=1e-5)),
        (None, {"eps": 1e-3}, lambda rate: optax.adam(rate, eps=1e-3)),
    ],
)
def test_optimizers(optimizer_class, optimizer_kwargs, expected):
    arguments_of = {"optimizer_class": optimizer_class, "optimizer_kwargs": optimizer_kwargs}
    factory = to_optimizer(**arguments_of)
    np.testing.assert_allclose(step_of(factory), step_of(expected), rtol=1e-6)
    np.testing.assert_allclose(jax.jit(lambda r: step_of(factory, r))(0.5), step_of(expected), rtol=1e-5)
    again = to_optimizer(**arguments_of)
    assert (factory, hash(factory)) == (again, hash(again))
    assert factory != to_optimizer(optax.sgd, {"momentum": 0.1})


@pytest.mark.parametrize(
    ("optimizer_class", "optimizer_kwargs", "message"),
    [
        (torch.optim.Adam, None, "pass optax.adam$"),
        (torch.optim.RMSprop, None, "pass optax.rmsprop$"),
        (torch.optim.LBFGS, None, "such as optax.adam or optax.sgd"),
        (optax.adam(1e-3), None, "such as optax.adam .not called."),
        ("adam", None, "must be a function"),
        (None, {"betas": (0.9, 0.99)}, "adam takes no betas, but b1, b2, eps"),
        (optax.sgd, {"learning_rate": 1.0}, "the learning rate is an argument of the algorithm"),
        (optax.adam, {"b1": [0.9]}, "b1 must be hashable"),
        (_no_optimizer, None, "must return an optax.GradientTransformation"),
        (dict, None, "must be a function from a learning rate"),
    ],
)
def test_what_is_no_optimizer(optimizer_class, optimizer_kwargs, message):
    with pytest.raises(TypeError, match=message):
        make(optimizer_class=optimizer_class, optimizer_kwargs=optimizer_kwargs)


def test_the_optimizers_state_goes_from_one_policy_to_another():
    source, target = make(), make()
    assert source.optimizer.param_groups == [{"lr": 3e-4}]
    assert source.optimizer.state_dict() == {}
    adam = optax.adam(1e-3)
    for policy in (source, target):
        policy.optimizer.state = adam.init(policy.state.params)
    source.optimizer.state = adam.update(source.state.params, source.optimizer.state)[1]
    named = source.optimizer.state_dict()
    assert len(named) == 1 + 2 * len(source.state_dict())
    assert all(isinstance(leaf, torch.Tensor) for leaf in named.values())
    target.optimizer.load_state_dict({name: np.asarray(leaf) for name, leaf in named.items()})
    assert jax.tree.structure(target.optimizer.state) == jax.tree.structure(source.optimizer.state)
    jax.tree.map(np.testing.assert_array_equal, target.optimizer.state, source.optimizer.state)
    assert int(named["[0].count"]) == 1
    with pytest.raises(RuntimeError, match=r"the optimizer: missing: \[0\].count, "):
        target.optimizer.load_state_dict({})


# The class


@pytest.mark.parametrize("given", ["MlpPolicy", MlpPolicy, type("Own", (CnnPolicy,), {})])
def test_our_policies_are_what_they_are(given):
    assert to_policy_class(given) is given


@pytest.mark.parametrize("ours", CLASSES)
def test_sb3s_three_policies_are_ours(ours):
    assert to_policy_class(CLASSES[ours]) is ours


@pytest.mark.parametrize(
    "given", [type("Custom", (sb3.ActorCriticPolicy,), {}), sb3.BasePolicy, torch.nn.Linear, None, 3, make]
)
def test_other_policies_are_refused(given):
    with pytest.raises(TypeError, match="a policy of torch cannot run in JAX"):
        to_policy_class(given)
