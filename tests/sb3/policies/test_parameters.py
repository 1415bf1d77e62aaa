"""Parameters by name, as tensors that may be changed and frozen, in files and copies."""

from __future__ import annotations

import copy
import pickle

import cloudpickle
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import torch
from sb3.policies.cases import (
    ACTIONS,
    IMAGE,
    OBSERVATIONS,
    TWO,
    VECTOR,
    batch_of,
    fitting,
    make,
    rate,
)
from stable_baselines3.common import policies as sb3

from sb3_bridge import GRPO
from sb3_bridge.policies import CnnPolicy
from sb3_bridge.policies.model import TORCH_ONLY


def test_parameters_have_names():
    policy = make(IMAGE, cls=CnnPolicy, net_arch=None)
    shapes = {name: tuple(tensor.shape) for name, tensor in policy.state_dict().items()}
    assert shapes == {
        "actor.output.bias": (2,),
        "actor.output.kernel": (512, 2),
        "critic.output.bias": (1,),
        "critic.output.kernel": (512, 1),
        "features_extractor.Conv_0.bias": (32,),
        "features_extractor.Conv_0.kernel": (8, 8, 3, 32),
        "features_extractor.Conv_1.bias": (64,),
        "features_extractor.Conv_1.kernel": (4, 4, 32, 64),
        "features_extractor.Conv_2.bias": (64,),
        "features_extractor.Conv_2.kernel": (3, 3, 64, 64),
        "features_extractor.Dense_0.bias": (512,),
        "features_extractor.Dense_0.kernel": (64, 512),
    }
    assert [name for name, _ in policy.named_parameters()] == list(policy.state_dict())
    assert [tuple(tensor.shape) for tensor in policy.parameters()] == list(shapes.values())
    theirs = sb3.ActorCriticCnnPolicy(IMAGE, TWO, rate)
    count = sum(tensor.numel() for tensor in theirs.parameters())
    assert sum(tensor.numel() for tensor in policy.parameters()) == count


@pytest.mark.parametrize("kind", ["torch", "numpy", "jax"])
def test_parameters_go_from_one_policy_to_another(kind):
    source, target = make(seed=1), make(seed=2)
    convert = {"torch": lambda leaf: leaf, "numpy": np.asarray, "jax": lambda leaf: jnp.asarray(leaf.numpy())}
    result = target.load_state_dict({name: convert[kind](leaf) for name, leaf in source.state_dict().items()})
    assert (result.missing_keys, result.unexpected_keys) == ([], [])
    jax.tree.map(np.testing.assert_array_equal, source.state, target.state)
    batch = batch_of(VECTOR, 3)
    torch.testing.assert_close(
        source.predict_values(torch.as_tensor(batch)), target.predict_values(batch), rtol=0, atol=0
    )


def test_state_dict_gives_copies():
    policy = make()
    before = policy.parameters_to_vector()
    for tensor in policy.state_dict().values():
        tensor += 1
    np.testing.assert_array_equal(policy.parameters_to_vector(), before)


def test_wrong_parameters_are_named_and_change_nothing():
    policy = make()
    before = policy.parameters_to_vector()
    good = policy.state_dict()
    wrong = {name: leaf + 1 for name, leaf in good.items() if name != "actor.output.bias"}
    with pytest.raises(RuntimeError, match="MlpPolicy: missing: actor.output.bias; unexpected: extra$"):
        policy.load_state_dict({**wrong, "extra": torch.zeros(1)})
    for strict in (True, False):
        with pytest.raises(RuntimeError, match=r"actor.output.bias has shape \[3\], expected \[2\]"):
            policy.load_state_dict({**wrong, "actor.output.bias": np.zeros(3)}, strict=strict)
    np.testing.assert_array_equal(policy.parameters_to_vector(), before)
    result = policy.load_state_dict({**wrong, "extra": torch.zeros(1)}, strict=False)
    assert (result.missing_keys, result.unexpected_keys) == (["actor.output.bias"], ["extra"])
    torch.testing.assert_close(policy.state_dict()["actor.output.kernel"], wrong["actor.output.kernel"])


def test_parameters_as_one_vector():
    source, target = make(seed=1), make(seed=2)
    vector = source.parameters_to_vector()
    # 4 x 8 + 8, behind them 8 x 2 + 2 and 8 x 1 + 1.
    assert (vector.shape, vector.dtype) == ((2 * 40 + 18 + 9,), np.float32)
    target.load_from_vector(vector)
    jax.tree.map(np.testing.assert_array_equal, source.state, target.state)
    with pytest.raises(ValueError, match=r"shape \[3\], expected \[107\]"):
        target.load_from_vector(np.zeros(3))


def test_a_state_can_be_assigned():
    policy = make()
    batch = torch.as_tensor(batch_of(VECTOR, 3))
    assert policy.predict_values(batch).abs().max() > 0
    policy.state = jax.tree.map(jnp.zeros_like, policy.state)
    np.testing.assert_array_equal(policy.predict_values(batch), np.zeros((3, 1)))
    named = policy.state_dict_of(policy.state)
    jax.tree.map(np.testing.assert_array_equal, policy.state_from(named), policy.state)


COPIES = {
    "deepcopy": copy.deepcopy,
    "pickle": lambda policy: pickle.loads(pickle.dumps(policy)),
    "cloudpickle": lambda policy: cloudpickle.loads(cloudpickle.dumps(policy)),
}


@pytest.mark.parametrize("way", COPIES)
def test_a_copy_is_a_policy_of_its_own(way):
    policy = make(activation_fn=jax.nn.softplus, seed=3)
    frozen = dict(policy.named_parameters())["actor.output.bias"].requires_grad_(False)
    twin = COPIES[way](policy)
    batch = batch_of(VECTOR, 64)
    assert twin.structure == policy.structure
    assert twin._functions is policy._functions
    np.testing.assert_array_equal(twin.predict(batch)[0], policy.predict(batch)[0])
    before = policy.parameters_to_vector()
    twin.load_from_vector(0 * twin.parameters_to_vector())
    with torch.no_grad():
        dict(twin.named_parameters())["actor.output.kernel"].fill_(3)
    assert twin.parameters_to_vector().max() == 3
    np.testing.assert_array_equal(policy.parameters_to_vector(), before)
    copied = dict(twin.named_parameters())["actor.output.bias"]
    assert (copied.requires_grad, copied is frozen) == (False, False)


@pytest.mark.parametrize("name", ["vector", "Dict"])
def test_save_and_load(name, tmp_path):
    space = OBSERVATIONS[name]
    cls = fitting(space)
    policy = make(
        space,
        ACTIONS["Box"],
        cls,
        net_arch={"pi": [4], "vf": [5, 6]},
        activation_fn=torch.nn.ReLU,
        log_std_init=-1.0,
        optimizer_class=optax.sgd,
        optimizer_kwargs={"momentum": 0.5},
    )
    policy.save(tmp_path / "policy")
    loaded = cls.load(tmp_path / "policy")
    assert loaded.structure == policy.structure
    assert loaded.optimizer.factory == policy.optimizer.factory
    assert loaded.optimizer.param_groups == policy.optimizer.param_groups == [{"lr": 3e-4}]
    jax.tree.map(np.testing.assert_array_equal, loaded.state, policy.state)
    observation = batch_of(space, 2)
    for deterministic in (True, False):
        np.testing.assert_array_equal(
            loaded.predict(observation, deterministic=deterministic)[0],
            policy.predict(observation, deterministic=deterministic)[0],
        )


# Tensors that are changed in place


def _in_numpy(tensor):
    tensor.detach().numpy()[...] = 0.5


def _replaced(tensor):
    tensor.data = torch.full_like(tensor, 0.5)


WAYS = {
    "in place": lambda tensor: torch.nn.init.constant_(tensor, 0.5),
    "through data": lambda tensor: tensor.data.fill_(0.5),
    "data replaced": _replaced,
    "through a detached one": lambda tensor: tensor.detach().copy_(torch.tensor(0.5)),
    "in NumPy": _in_numpy,
}
READERS = {
    "predict": lambda policy: policy.predict(np.ones(4, np.float32), deterministic=True),
    "values": lambda policy: policy.predict_values(np.ones((1, 4), np.float32)).detach(),
    "state_dict": lambda policy: policy.state_dict()["actor.output.kernel"],
    "vector": lambda policy: policy.parameters_to_vector(),
    "state": lambda policy: policy.state.params["actor"]["output"]["kernel"],
    "copy": lambda policy: copy.deepcopy(policy).parameters_to_vector(),
}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("reader", READERS)
def test_what_is_done_to_a_parameter_is_done_to_the_policy(way, reader):
    policy, expected = make(), make()
    expected.load_from_vector(np.full_like(expected.parameters_to_vector(), 0.5))
    for tensor in policy.parameters():
        WAYS[way](tensor)
    jax.tree.map(np.testing.assert_array_equal, READERS[reader](policy), READERS[reader](expected))


def test_parameters_are_always_the_same_tensors():
    policy = make()
    tensors = dict(policy.named_parameters())
    policy.load_state_dict(make(seed=1).state_dict())
    assert all(tensor is tensors[name] for name, tensor in policy.named_parameters())
    assert all(torch.equal(tensors[name], leaf) for name, leaf in policy.state_dict().items())
    assert all(leaf is tensors[name] for name, leaf in policy.state_dict(keep_vars=True).items())
    torch.nn.utils.vector_to_parameters(torch.arange(107.0), policy.parameters())
    np.testing.assert_array_equal(policy.parameters_to_vector(), np.arange(107))


def test_a_parameter_of_another_shape_is_named():
    policy = make()
    dict(policy.named_parameters())["actor.output.bias"].data = torch.zeros(3)
    with pytest.raises(RuntimeError, match=r"actor.output.bias has shape \[3\], expected \[2\]"):
        policy.predict(VECTOR.sample())


def learner(**policy_kwargs):
    arguments = {"n_steps": 8, "batch_size": 8, "n_epochs": 1, "candidates": "episodes", "seed": 0}
    return GRPO("MlpPolicy", "CartPole-v1", policy_kwargs={"net_arch": [8], **policy_kwargs}, **arguments)


@pytest.mark.parametrize(
    "policy_kwargs", [{}, {"optimizer_class": optax.adamw, "optimizer_kwargs": {"weight_decay": 0.1}}]
)
def test_frozen_parameters_are_not_trained(policy_kwargs):
    model = learner(**policy_kwargs)
    tensors = dict(model.policy.named_parameters())
    with torch.no_grad():
        tensors["critic.output.bias"].fill_(7)
    frozen = {name for name in tensors if name.startswith("actor")} | {"critic.output.bias"}
    for name in frozen:
        tensors[name].requires_grad = False
    for expected in (set(tensors) - frozen, set(tensors)):
        before = model.policy.state_dict()
        model.learn(8)
        after = model.policy.state_dict()
        assert {name for name in after if not torch.equal(after[name], before[name])} == expected
        assert all(torch.equal(tensors[name], leaf) for name, leaf in after.items())
        model.policy.requires_grad_(True)


def test_no_torch_optimizer_trains_a_policy_silently():
    policy = make()
    obs = torch.as_tensor(batch_of(VECTOR, 2))
    assert not policy.predict_values(obs).requires_grad
    optimizer = torch.optim.SGD(policy.parameters(), 0.1)
    outputs = [policy.predict_values(obs), *policy.evaluate_actions(obs, torch.zeros(2))]
    outputs += [policy.get_distribution(obs).entropy(), policy(obs)[2]]
    for output in outputs:
        optimizer.zero_grad()
        with pytest.raises(RuntimeError, match=r"train model.to_torch\(\)"):
            output.sum().backward()
    with torch.no_grad():
        assert not policy.predict_values(obs).requires_grad
    with pytest.raises(TypeError, match="optimizer=SGD cannot train networks in JAX: pass an optax factory"):
        policy.optimizer = optimizer


@pytest.mark.parametrize("name", TORCH_ONLY)
def test_parts_of_torch_networks_are_refused_by_name(name):
    policy = make()
    assert hasattr(sb3.ActorCriticPolicy(VECTOR, ACTIONS["Box"], rate, net_arch=[8]), name)
    assert not hasattr(policy, name)
    with pytest.raises(AttributeError, match=rf"has no {name}: .* model.to_torch\(\)"):
        getattr(policy, name)
    with pytest.raises(AttributeError, match=rf"has no {name}: "):
        setattr(policy, name, torch.nn.Linear(1, 1))
    with pytest.raises(AttributeError, match="anything"):
        _ = policy.anything


@pytest.mark.parametrize(
    "do",
    [
        lambda policy: policy.apply(policy.init_weights),
        lambda policy: policy.double(),
        lambda policy: policy.share_memory(),
        lambda policy: policy.extract_features(torch.zeros(1, 4)),
        lambda policy: policy.make_features_extractor(),
    ],
)
def test_what_needs_torch_modules_is_refused(do):
    with pytest.raises(NotImplementedError, match=r"use model.to_torch\(\)"):
        do(make())
