"""The policies behind SB3's contract; SB3's own ActorCriticPolicy, on the same inputs, is the oracle."""

from __future__ import annotations

import copy
import pickle

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import torch
from gymnasium import spaces
from stable_baselines3.common import policies as sb3
from stable_baselines3.common.torch_layers import BaseFeaturesExtractor, CombinedExtractor, NatureCNN

from grpo_jax import spaces as own_spaces
from grpo_jax.policies.networks import CNN, Combined, Flatten
from sb3_bridge.policies import extractor, layers, optimizer
from sb3_bridge.policies import spaces as seen_spaces
from sb3_bridge.policies.policy import CnnPolicy, MlpPolicy, MultiInputPolicy

VECTOR = spaces.Box(-5, 5, (4,), seed=0)
TWO = spaces.Discrete(2)
IMAGE = spaces.Box(0, 255, (3, 36, 40), np.uint8, seed=0)
MIXED = spaces.Dict({"image": IMAGE, "hand": spaces.Discrete(3), "x": VECTOR}, seed=0)
OBSERVATIONS = {
    "vector": VECTOR,
    "double": spaces.Box(-1, 1, (3,), np.float64, seed=0),
    "matrix": spaces.Box(-1, 1, (2, 3), seed=0),
    "bytes": spaces.Box(0, 255, (4,), np.uint8, seed=0),
    "Discrete": spaces.Discrete(5, seed=0),
    "MultiDiscrete": spaces.MultiDiscrete([2, 3], seed=0),
    "MultiBinary": spaces.MultiBinary(4, seed=0),
    "bits": spaces.MultiBinary((2, 3), seed=0),
    "image": IMAGE,
    "Dict": MIXED,
}
ACTIONS = {
    "Discrete": spaces.Discrete(3),
    "MultiDiscrete": spaces.MultiDiscrete([2, 4]),
    "MultiBinary": spaces.MultiBinary(3),
    "Box": spaces.Box(np.array([-2.0, 0.0], np.float32), np.array([2.0, 10.0], np.float32)),
    "double": spaces.Box(-0.1, 0.3, (2,), np.float64),
    "matrix": spaces.Box(-1, 1, (2, 2)),
}
CLASSES = {
    MlpPolicy: sb3.ActorCriticPolicy,
    CnnPolicy: sb3.ActorCriticCnnPolicy,
    MultiInputPolicy: sb3.MultiInputActorCriticPolicy,
}


def rate(progress):
    return 3e-4 * progress


def make(observation_space=VECTOR, action_space=TWO, cls=MlpPolicy, **arguments):
    settings = {"net_arch": [8], "seed": 0, **arguments}
    return cls(observation_space, action_space, rate, **settings)


def fitting(space):
    if isinstance(space, spaces.Dict):
        return MultiInputPolicy
    return CnnPolicy if space == IMAGE else MlpPolicy


def batch_of(space, n):
    samples = [space.sample() for _ in range(n)]
    if isinstance(space, spaces.Dict):
        return {name: np.stack([sample[name] for sample in samples]) for name in space.spaces}
    return np.stack(samples)


@pytest.fixture(scope="module", params=OBSERVATIONS)
def pair(request):
    """Our policy and SB3's on one observation space."""
    space = OBSERVATIONS[request.param]
    cls = fitting(space)
    return make(space, cls=cls), CLASSES[cls](space, TWO, rate, net_arch=[8])


# predict


@pytest.mark.parametrize("deterministic", [True, False])
def test_predict_returns_what_sb3_returns(pair, deterministic):
    space = pair[0].observation_space
    for observation, shape in ((space.sample(), ()), (batch_of(space, 3), (3,)), (batch_of(space, 1), (1,))):
        results = [policy.predict(observation, deterministic=deterministic) for policy in pair]
        for actions, state in results:
            assert type(actions) is np.ndarray
            assert (actions.shape, actions.dtype, state) == (shape, np.int64, None)


def test_rows_of_a_batch_are_acted_on_one_by_one(pair):
    policy = pair[0]
    batch = batch_of(policy.observation_space, 6)
    together, _ = policy.predict(batch, deterministic=True)
    rows = [jax.tree.map(lambda leaf, i=i: leaf[i], batch) for i in range(6)]
    assert together.tolist() == [int(policy.predict(row, deterministic=True)[0]) for row in rows]


@pytest.mark.parametrize("name", ACTIONS)
def test_actions_of_every_space(name):
    space = ACTIONS[name]
    ours, theirs = make(action_space=space), sb3.ActorCriticPolicy(VECTOR, space, rate, net_arch=[8])
    for observation in (VECTOR.sample(), batch_of(VECTOR, 3)):
        for deterministic in (True, False):
            actions, _ = ours.predict(observation, deterministic=deterministic)
            expected, _ = theirs.predict(observation, deterministic=deterministic)
            assert actions.shape == expected.shape
            # SB3 leaves bits and doubles as float32: ours come as the space says.
            assert actions.dtype == space.dtype
            for action in actions if observation.ndim == 2 else [actions]:
                assert space.contains(action[()] if action.shape == () else action)


@pytest.mark.parametrize("name", ["Box", "double"])
def test_gaussian_actions_keep_their_bounds(name):
    space = ACTIONS[name]
    policy = make(action_space=space, log_std_init=2.0)
    actions, _ = policy.predict(np.zeros((200, 4), np.float32))
    assert all(space.contains(action) for action in actions)
    np.testing.assert_array_equal(actions.min(axis=0), space.low)
    np.testing.assert_array_equal(actions.max(axis=0), space.high)


def test_the_state_comes_back():
    state = (np.zeros(1),)
    assert make().predict(VECTOR.sample(), state, np.array([True]))[1] is state


def test_channels_last_images_are_transposed():
    policy = make(IMAGE, spaces.Box(-1, 1, (2,)), CnnPolicy)
    images = batch_of(IMAGE, 2)
    expected, _ = policy.predict(images, deterministic=True)
    assert np.ptp(expected, axis=0).min() > 0
    actions, _ = policy.predict(np.moveaxis(images, 1, -1), deterministic=True)
    np.testing.assert_array_equal(actions, expected)
    single, _ = policy.predict(np.moveaxis(images[0], 0, -1), deterministic=True)
    np.testing.assert_allclose(single, expected[0], rtol=1e-4, atol=1e-6)
    named = spaces.Dict({"image": IMAGE})
    policy = make(named, spaces.Box(-1, 1, (2,)), MultiInputPolicy)
    np.testing.assert_array_equal(
        policy.predict({"image": images}, deterministic=True)[0],
        policy.predict({"image": np.moveaxis(images, 1, -1)}, deterministic=True)[0],
    )


@pytest.mark.parametrize(
    ("space", "observation"),
    [
        ("vector", (np.zeros(4), {})),
        ("vector", np.zeros(3)),
        ("vector", np.zeros((2, 2, 4))),
        ("vector", {"x": np.zeros(4)}),
        ("image", np.zeros((3, 30, 40), np.uint8)),
        ("Discrete", np.zeros((2, 2), np.int64)),
        ("MultiDiscrete", np.zeros(3, np.int64)),
        ("MultiBinary", np.zeros(5, np.int8)),
        ("Dict", np.zeros(4)),
        ("Dict", {"unknown": np.zeros(4)}),
        ("Dict", {"image": IMAGE.sample(), "hand": np.int64(1), "x": np.zeros(5)}),
    ],
)
def test_errors_are_of_sb3s_types(space, observation):
    space = OBSERVATIONS[space]
    cls = fitting(space)
    with pytest.raises(Exception) as expected:  # noqa: PT011
        CLASSES[cls](space, TWO, rate).predict(observation)
    with pytest.raises(expected.type):
        make(space, cls=cls).predict(observation)


def test_gymnasiums_reset_is_told_from_an_observation():
    with pytest.raises(ValueError, match="pass the observation alone"):
        make().predict((VECTOR.sample(), {}))


def test_sampled_actions_follow_the_distribution():
    policy = make(action_space=ACTIONS["Discrete"], ortho_init=False)
    observation = np.array([1.0, -2.0, 3.0, 0.5], np.float32)
    actions, _ = policy.predict(np.tile(observation, (20_000, 1)))
    probabilities = policy.get_distribution(torch.as_tensor(observation[None])).distribution.probs[0].numpy()
    assert np.ptp(probabilities) > 0.05
    np.testing.assert_allclose(np.bincount(actions, minlength=3) / 20_000, probabilities, atol=0.015)


def test_a_policy_has_random_numbers_of_its_own():
    batch = batch_of(VECTOR, 64)
    first, again, other = make(seed=1), make(seed=1), make(seed=2)
    np.random.seed(0)
    before = np.random.get_state()[1].copy()
    actions = [policy.predict(batch)[0] for policy in (first, again)]
    np.testing.assert_array_equal(*actions)
    np.testing.assert_array_equal(np.random.get_state()[1], before)
    assert not np.array_equal(first.predict(batch)[0], actions[0])
    first.seed(1)
    np.testing.assert_array_equal(first.predict(batch)[0], actions[0])
    kernels = [policy.state_dict()["actor.MLP_0.Dense_0.kernel"] for policy in (first, again, other)]
    assert torch.equal(kernels[0], kernels[1])
    assert not torch.allclose(kernels[0], kernels[2])


def test_equal_policies_share_their_programs():
    assert make(seed=0)._functions is make(seed=1, activation_fn=torch.nn.Tanh)._functions
    assert make()._functions is not make(activation_fn="relu")._functions


# Values, densities


@pytest.mark.parametrize("name", ACTIONS)
def test_densities_are_those_of_sb3s_distribution(name):
    space = ACTIONS[name]
    policy = make(action_space=space, ortho_init=False, log_std_init=-0.5)
    obs, is_vectorized = policy.obs_to_tensor(batch_of(VECTOR, 5))
    assert is_vectorized
    actions = torch.as_tensor(np.stack([space.sample() for _ in range(5)]))
    values, log_prob, entropy = policy.evaluate_actions(obs, actions)
    assert (values.shape, log_prob.shape, entropy.shape) == ((5, 1), (5,), (5,))
    distribution = policy.get_distribution(obs)
    # SB3's distributions want flat actions.
    flat = actions.reshape(5, -1).float() if len(space.shape) else actions
    torch.testing.assert_close(log_prob, distribution.log_prob(flat).float(), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(entropy, distribution.entropy().float(), rtol=1e-4, atol=1e-5)
    assert np.ptp(log_prob.numpy()) > 0
    torch.testing.assert_close(values, policy.predict_values(obs))
    expected = policy.structure.value(policy.state, jnp.asarray(obs.numpy()))
    np.testing.assert_allclose(values[:, 0].numpy(), expected, rtol=1e-5, atol=1e-6)
    drawn, forward_values, forward_log_prob = policy(obs)
    assert drawn.shape == (5, *space.shape)
    torch.testing.assert_close(forward_values, values)
    torch.testing.assert_close(forward_log_prob, policy.evaluate_actions(obs, drawn)[1])


@pytest.mark.parametrize("name", ["Box", "matrix"])
def test_the_mode_is_the_distributions(name):
    policy = make(action_space=ACTIONS[name], ortho_init=False)
    batch = batch_of(VECTOR, 5) / 10
    obs, _ = policy.obs_to_tensor(batch)
    mean = policy.get_distribution(obs).mode().numpy().reshape(5, *ACTIONS[name].shape)
    expected = np.clip(mean, ACTIONS[name].low, ACTIONS[name].high)
    np.testing.assert_allclose(policy.predict(batch, deterministic=True)[0], expected, rtol=1e-5, atol=1e-5)


def test_without_a_critic_there_are_no_values():
    policy = make(has_critic=False)
    obs, _ = policy.obs_to_tensor(batch_of(VECTOR, 2))
    assert policy.evaluate_actions(obs, torch.tensor([0, 1]))[0] is None
    assert not [name for name in policy.state_dict() if name.startswith("critic")]
    with pytest.raises(RuntimeError, match="no critic"):
        policy.predict_values(obs)


# Parameters


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


def test_copies_do_not_change_the_policy():
    policy = make()
    before = policy.parameters_to_vector()
    for tensor in (*policy.state_dict().values(), *policy.parameters()):
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


def test_a_deep_copy_is_a_policy_of_its_own():
    policy = make(activation_fn=jax.nn.softplus)
    twin = copy.deepcopy(policy)
    batch = batch_of(VECTOR, 64)
    assert twin.structure == policy.structure
    np.testing.assert_array_equal(twin.predict(batch)[0], policy.predict(batch)[0])
    twin.load_from_vector(0 * twin.parameters_to_vector())
    assert np.any(policy.parameters_to_vector())


def test_a_policy_can_be_pickled():
    policy = make(seed=3)
    twin = pickle.loads(pickle.dumps(policy))
    assert twin._functions is policy._functions
    batch = batch_of(VECTOR, 64)
    np.testing.assert_array_equal(twin.predict(batch)[0], policy.predict(batch)[0])


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


# Arguments


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
    with pytest.raises(ValueError, match="net_arch=.* must be a list of layer sizes"):
        layers.to_net_arch(given, convolutional=False)


@pytest.mark.parametrize("cls", layers.TORCH_ACTIVATIONS, ids=lambda cls: cls.__name__)
def test_torch_activations_are_the_same_functions(cls):
    x = np.concatenate([np.linspace(-8, 8, 1001), [-30.0, 30.0, 0.0, 3.0, -3.0, 6.0]]).astype(np.float32)
    activation = layers.to_activation(cls)
    function = layers.ACTIVATIONS[activation] if isinstance(activation, str) else activation
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
        (nn.PReLU, TypeError, "activation_fn: .* must be a name or a function"),
        (3, TypeError, "activation_fn: "),
        ("sine", ValueError, "activation_fn: activation='sine' must be one of tanh"),
    ],
)
def test_what_is_no_activation(given, error, message):
    with pytest.raises(error, match=message):
        make(activation_fn=given)


# The optimizer


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
    factory = optimizer.to_optimizer(**arguments_of)
    np.testing.assert_allclose(step_of(factory), step_of(expected), rtol=1e-6)
    np.testing.assert_allclose(jax.jit(lambda r: step_of(factory, r))(0.5), step_of(expected), rtol=1e-5)
    again = optimizer.to_optimizer(**arguments_of)
    assert (factory, hash(factory)) == (again, hash(again))
    assert factory != optimizer.to_optimizer(optax.sgd, {"momentum": 0.1})


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
        policy.optimizer.state = optimizer.init(policy.state.params)
    source.optimizer.state = optimizer.update(source.state.params, source.optimizer.state)[1]
    named = source.optimizer.state_dict()
    assert len(named) == 1 + 2 * len(source.state_dict())
    assert all(isinstance(leaf, torch.Tensor) for leaf in named.values())
    target.optimizer.load_state_dict({name: np.asarray(leaf) for name, leaf in named.items()})
    assert jax.tree.structure(target.optimizer.state) == jax.tree.structure(source.optimizer.state)
    jax.tree.map(np.testing.assert_array_equal, target.optimizer.state, source.optimizer.state)
    assert int(named["[0].count"]) == 1
    with pytest.raises(RuntimeError, match=r"the optimizer: missing: \[0\].count, "):
        target.optimizer.load_state_dict({})


# Spaces and extractors


def test_what_networks_see():
    seen = seen_spaces.to_observation_space
    assert seen(IMAGE) == own_spaces.Box(0, 255, (3, 36, 40), "uint8", channels_first=True)
    assert seen(IMAGE, False) == own_spaces.Box(0, 255, (3, 36, 40), channels_first=True)
    last = spaces.Box(0, 255, (36, 40, 3), np.uint8)
    assert seen(last) == own_spaces.Box(0, 255, (36, 40, 3), "uint8")
    floats = spaces.Box(0, 1, (3, 36, 40))
    assert seen(floats) == own_spaces.Box(0, 1, (3, 36, 40))
    assert seen(floats, False) == own_spaces.Box(0, 1, (3, 36, 40), channels_first=True)
    assert seen(OBSERVATIONS["bytes"]) == own_spaces.Box(0, 255, (4,))
    assert seen(spaces.MultiBinary((2, 3))) == own_spaces.Box(0, 1, (2, 3))
    assert seen(spaces.MultiBinary(3)) == own_spaces.MultiBinary(3)
    assert seen(spaces.Discrete(3)) == own_spaces.Discrete(3)


@pytest.mark.parametrize("normalize_images", [True, False])
@pytest.mark.parametrize("space", ["image", "bytes", "bits", "MultiDiscrete"])
def test_networks_see_what_sb3s_see(space, normalize_images):
    space = OBSERVATIONS[space]
    observation = batch_of(space, 2)
    expected = sb3.preprocess_obs(torch.as_tensor(observation), space, normalize_images)
    seen = own_spaces.encode(seen_spaces.to_observation_space(space, normalize_images), observation)
    if space == IMAGE:
        expected = expected.movedim(1, -1)
    np.testing.assert_allclose(seen, expected, rtol=1e-6)


@pytest.mark.parametrize(
    ("space", "cls", "kwargs", "extractor"),
    [
        (VECTOR, MlpPolicy, {}, Flatten(1)),
        (IMAGE, MlpPolicy, {}, Flatten(3)),
        (IMAGE, CnnPolicy, {}, CNN("relu")),
        (IMAGE, CnnPolicy, {"activation_fn": nn.tanh}, CNN("relu")),
        (IMAGE, CnnPolicy, {"features_extractor_kwargs": {"features_dim": 9}}, CNN("relu", 9)),
        (IMAGE, MlpPolicy, {"features_extractor_class": CNN}, CNN("relu")),
        (IMAGE, MlpPolicy, {"features_extractor_class": NatureCNN}, CNN("relu")),
        (spaces.Box(0, 1, (10, 10, 4)), CnnPolicy, {"normalize_images": False}, CNN("relu")),
        (MIXED, MultiInputPolicy, {}, Combined((("hand", 1), ("image", 3), ("x", 1)), ("image",))),
        (
            MIXED,
            MultiInputPolicy,
            {
                "features_extractor_class": CombinedExtractor,
                "features_extractor_kwargs": {"cnn_output_dim": 7},
            },
            Combined((("hand", 1), ("image", 3), ("x", 1)), ("image",), n_features=7),
        ),
    ],
)
def test_the_extractor_that_fits(space, cls, kwargs, extractor):
    given = {"features_extractor_class": None, "features_extractor_kwargs": None, "normalize_images": True}
    given |= {name: value for name, value in kwargs.items() if name in given}
    # A Dict space sorts its entries.
    assert extractor.to_features_extractor(cls.kind, space, **given) == extractor


def test_features_of_a_dict_are_as_many_as_sb3s():
    theirs = sb3.MultiInputActorCriticPolicy(MIXED, TWO, rate, net_arch=[8])
    kernel = make(MIXED, cls=MultiInputPolicy).state_dict()["actor.MLP_0.Dense_0.kernel"]
    assert kernel.shape[0] == theirs.features_dim == 3 + 256 + 4


def test_small_images_of_a_dict_are_flattened():
    space = spaces.Dict({"map": spaces.Box(0, 255, (1, 2, 2), np.uint8)})
    assert extractor.to_features_extractor("multi_input", space) == Combined((("map", 3),))


@pytest.mark.parametrize("share", [True, False])
def test_extractors_are_shared_as_in_sb3(share):
    ours = make(IMAGE, cls=CnnPolicy, share_features_extractor=share)
    theirs = sb3.ActorCriticCnnPolicy(IMAGE, TWO, rate, net_arch=[8], share_features_extractor=share)
    assert len(ours.parameters_to_vector()) == len(theirs.parameters_to_vector())
    names = {name.split(".")[0] for name in ours.state_dict()}
    assert ("critic_features_extractor" in names) == (not share)


class Normed(nn.Module):
    """A user's extractor."""

    width: int

    @nn.compact
    def __call__(self, x):
        return nn.LayerNorm()(nn.Dense(self.width)(x))


def test_a_flax_extractor():
    policy = make(features_extractor_class=Normed, features_extractor_kwargs={"width": 6})
    named = policy.state_dict()
    assert named["features_extractor.Dense_0.kernel"].shape == (4, 6)
    assert torch.equal(named["features_extractor.LayerNorm_0.scale"], torch.ones(6))
    assert policy.net_arch == [8]
    assert policy.predict(batch_of(VECTOR, 3))[0].shape == (3,)
    assert policy.predict(VECTOR.sample())[0].shape == ()


class Torch(BaseFeaturesExtractor):
    """An extractor that cannot run in JAX."""


@pytest.mark.parametrize(
    ("space", "cls", "kwargs", "error", "message"),
    [
        (VECTOR, CnnPolicy, {}, AssertionError, "CnnPolicy is for images .*: use MlpPolicy$"),
        (spaces.Box(0, 1, (3, 36, 36)), CnnPolicy, {}, AssertionError, "normalize_images=False"),
        (MIXED, MlpPolicy, {}, ValueError, "use MultiInputPolicy"),
        (MIXED, CnnPolicy, {}, ValueError, "use MultiInputPolicy"),
        (VECTOR, MultiInputPolicy, {}, ValueError, "use MlpPolicy"),
        (IMAGE, MultiInputPolicy, {}, ValueError, "use CnnPolicy"),
        (spaces.Dict({"a": MIXED}), MultiInputPolicy, {}, NotImplementedError, "[Nn]ested"),
        (spaces.Tuple([VECTOR]), MlpPolicy, {}, NotImplementedError, "Tuple"),
        (VECTOR, MlpPolicy, {"features_extractor_class": Torch}, TypeError, "torch cannot run in JAX"),
        (VECTOR, MlpPolicy, {"features_extractor_class": Normed(3)}, TypeError, "it must be as a class"),
        (IMAGE, CnnPolicy, {"features_extractor_kwargs": {"width": 3}}, TypeError, "takes features_dim"),
        (VECTOR, MlpPolicy, {"features_extractor_kwargs": {"x": 3}}, TypeError, "takes no arguments"),
        (VECTOR, MlpPolicy, {"features_extractor_class": Combined}, ValueError, "Combined extractor is for"),
        (MIXED, MultiInputPolicy, {"features_extractor_class": Flatten}, ValueError, "joins no Dict"),
    ],
)
def test_what_does_not_fit(space, cls, kwargs, error, message):
    with pytest.raises(error, match=message):
        make(space, cls=cls, **kwargs)


@pytest.mark.parametrize(
    ("space", "cls"),
    [(VECTOR, CnnPolicy), (spaces.Box(0, 1, (3, 36, 36)), CnnPolicy)],
    ids=["vector", "floats"],
)
def test_sb3_refuses_the_same_images(space, cls):
    with pytest.raises(AssertionError):
        CLASSES[cls](space, TWO, rate)
    with pytest.raises(AssertionError):
        make(space, cls=cls)


def test_actions_that_no_policy_has():
    for space in (spaces.Dict({"a": TWO}), spaces.Tuple([TWO])):
        with pytest.raises(NotImplementedError, match="action_space"):
            make(action_space=space)
    with pytest.raises(AssertionError, match="must be one-dimensional"):
        make(action_space=spaces.MultiBinary((2, 2)))


def test_scaling_is_sb3s():
    policy = make(action_space=ACTIONS["Box"])
    np.testing.assert_allclose(policy.scale_action(np.array([0.0, 5.0])), [0.0, 0.0])
    np.testing.assert_allclose(policy.unscale_action(np.array([-1.0, 1.0])), [-2.0, 10.0])
    assert policy.is_vectorized_observation(batch_of(VECTOR, 2))
    assert not policy.is_vectorized_observation(VECTOR.sample())
