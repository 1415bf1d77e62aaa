"""A policy in torch and back: equal answers to observations that neither was made with."""

from __future__ import annotations

import flax.linen as nn
import gymnasium
import jax
import numpy as np
import pytest
import torch
from gymnasium import spaces
from sb3.policies.cases import CLASSES, IMAGE, MIXED, TWO, VECTOR, batch_of, make, rate
from stable_baselines3 import A2C, PPO
from stable_baselines3.common import policies as sb3
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.torch_layers import BaseFeaturesExtractor, CombinedExtractor, NatureCNN

from grpo_jax.policies.networks import CNN
from sb3_bridge import GRPO
from sb3_bridge.policies import CnnPolicy, MlpPolicy, MultiInputPolicy
from sb3_bridge.policies import torch_policy as conversion
from sb3_bridge.policies.layers import TORCH_ACTIVATIONS
from sb3_bridge.policies.torch_layers import FeatureMapsCNN, FeatureMapsCombined

SMALL = spaces.Box(0, 255, (2, 9, 11), np.uint8, seed=0)
TINY = spaces.Box(0, 255, (1, 2, 2), np.uint8, seed=0)
FLOATS = spaces.Box(0, 1, (3, 36, 40), seed=0)
MAPS = {"small": SMALL, "tiny": TINY, "hand": spaces.MultiDiscrete([2, 3]), "x": VECTOR}
STRETCHED = spaces.Box(np.array([-2.0, 0.0], np.float32), np.array([2.0, 10.0], np.float32), seed=0)
HALF_BOUNDED = spaces.Box(np.array([0.0, -1.0], np.float32), np.array([np.inf, 1.0], np.float32), seed=0)
CASES = {
    "Discrete": (VECTOR, spaces.Discrete(3), MlpPolicy, {}),
    "MultiDiscrete": (spaces.Discrete(5, seed=0), spaces.MultiDiscrete([2, 4]), MlpPolicy, {"net_arch": []}),
    "MultiBinary": (VECTOR, spaces.MultiBinary(3), MlpPolicy, {"net_arch": {"pi": [4]}}),
    "Box": (VECTOR, STRETCHED, MlpPolicy, {"net_arch": {"vf": [4, 3]}, "log_std_init": -0.5}),
    "double": (
        spaces.Box(-1, 1, (2, 3), np.float64, seed=0),
        spaces.Box(-0.1, 0.3, (2, 2), np.float64),
        MlpPolicy,
        {},
    ),
    "unbounded": (VECTOR, spaces.Box(-np.inf, np.inf, (2,)), MlpPolicy, {"net_arch": {"pi": [3], "vf": [5]}}),
    "half bounded": (spaces.MultiBinary((2, 3), seed=0), HALF_BOUNDED, MlpPolicy, {}),
    "no critic": (VECTOR, TWO, MlpPolicy, {"has_critic": False}),
    "bytes": (spaces.Box(0, 3, (4,), np.uint8, seed=0), TWO, MlpPolicy, {"activation_fn": "gelu"}),
    "flat image": (IMAGE, TWO, MlpPolicy, {}),
    "image": (IMAGE, STRETCHED, CnnPolicy, {"net_arch": None}),
    "two extractors": (IMAGE, TWO, CnnPolicy, {"share_features_extractor": False}),
    "features": (IMAGE, TWO, CnnPolicy, {"features_extractor_kwargs": {"features_dim": 9}}),
    "normalised": (FLOATS, TWO, CnnPolicy, {"normalize_images": False}),
    "channels last": (spaces.Box(0, 255, (36, 40, 3), np.uint8, seed=0), TWO, CnnPolicy, {"net_arch": []}),
    "small image": (SMALL, TWO, CnnPolicy, {}),
    "maps by name": (
        spaces.Box(0, 1, (6, 5, 7), seed=0),
        TWO,
        MlpPolicy,
        {"features_extractor_class": CNN, "features_extractor_kwargs": {"activation": torch.nn.SiLU}},
    ),
    "Dict": (MIXED, STRETCHED, MultiInputPolicy, {"features_extractor_kwargs": {"cnn_output_dim": 7}}),
    "Dict of maps": (spaces.Dict(MAPS, seed=0), TWO, MultiInputPolicy, {"share_features_extractor": False}),
}
OWN_CLASSES = {"channels last", "small image", "maps by name", "Dict of maps"}
"""What SB3's own extractors cannot see."""


@pytest.fixture(scope="module", params=CASES)
def pair(request):
    """A policy with all parameters away from 0, and the equal one of torch."""
    space, actions, cls, kwargs = CASES[request.param]
    policy = make(space, actions, cls, **kwargs)
    noise = np.random.default_rng(0).normal(0, 0.1, policy.parameters_to_vector().shape)
    policy.load_from_vector(policy.parameters_to_vector() + noise.astype(np.float32))
    return policy, conversion.to_torch(policy), request.param


def assert_equal_answers(ours, theirs, atol=2e-5):
    space = ours.action_space
    batch = batch_of(ours.observation_space, 7)
    obs, _ = ours.obs_to_tensor(batch)
    tolerance = {"rtol": 1e-4, "atol": atol}
    with torch.no_grad():
        means = [policy.get_distribution(obs).mode().float() for policy in (ours, theirs)]
        drawn = theirs.get_distribution(obs).sample()
        answers = ours.evaluate_actions(obs, drawn), theirs.evaluate_actions(obs, drawn)
    torch.testing.assert_close(*means, **tolerance)
    actions = [policy.predict(batch, deterministic=True)[0] for policy in (ours, theirs)]
    assert actions[0].shape == actions[1].shape == (7, *space.shape)
    np.testing.assert_allclose(*actions, **tolerance)
    for mine, other in zip(*answers, strict=True):
        torch.testing.assert_close(torch.zeros_like(other) if mine is None else mine, other, **tolerance)
    assert np.ptp(np.asarray(answers[0][1])) > 0


def test_the_twin_gives_the_same_answers(pair):
    policy, torch_policy, name = pair
    assert type(torch_policy) is CLASSES[type(policy)]
    is_own = isinstance(torch_policy.features_extractor, FeatureMapsCNN | FeatureMapsCombined)
    assert is_own == (name in OWN_CLASSES)
    assert_equal_answers(policy, torch_policy)


def test_the_way_back(pair):
    policy, torch_policy, name = pair
    back = conversion.from_torch(torch_policy)
    assert type(back) is type(policy)
    named, returned = policy.state_dict(), back.state_dict()
    assert named.keys() == {key for key in returned if policy.has_critic or not key.startswith("critic")}
    for key, leaf in named.items():
        if name == "MultiBinary" and key.startswith("actor.output"):
            differences = [logits[..., 1::2] - logits[..., ::2] for logits in (leaf, returned[key])]
            torch.testing.assert_close(*differences)
        else:
            exact = {} if "actor" in key else {"rtol": 0, "atol": 0}
            torch.testing.assert_close(leaf, returned[key], **exact)
    if policy.has_critic:
        assert_equal_answers(back, torch_policy)


@pytest.mark.parametrize("cls", TORCH_ACTIVATIONS, ids=lambda cls: cls.__name__)
def test_activations_are_the_same(cls):
    policy = make(activation_fn=cls)
    torch_policy = conversion.to_torch(policy)
    assert torch_policy.activation_fn is cls
    assert_equal_answers(policy, torch_policy)
    assert conversion.from_torch(torch_policy).structure == policy.structure


def test_the_twin_is_a_copy_and_draws_no_random_numbers_of_the_users():
    policy = make(IMAGE, cls=CnnPolicy)
    torch.manual_seed(0)
    before, sample = policy.parameters_to_vector(), torch.rand(1)
    torch.manual_seed(0)
    torch_policy = conversion.to_torch(policy)
    assert torch.equal(torch.rand(1), sample)
    assert policy.observation_space.np_random is not torch_policy.observation_space.np_random
    torch.nn.init.zeros_(torch_policy.action_net.weight)
    np.testing.assert_array_equal(policy.parameters_to_vector(), before)


class Chosen(torch.nn.Module):
    """What people export."""

    def __init__(self, policy):
        super().__init__()
        self.policy = policy

    def forward(self, obs):
        return self.policy._predict(obs, deterministic=True), self.policy.predict_values(obs)


@pytest.mark.parametrize("name", ["Box", "image", "small image"])
@pytest.mark.filterwarnings("ignore")  # of torch's tracers, about checks of shapes
def test_what_is_exported_knows_other_observations(name):
    space, actions, cls, kwargs = CASES[name]
    policy = make(space, actions, cls, **kwargs)
    module = Chosen(conversion.to_torch(policy))
    first, other = (policy.obs_to_tensor(batch_of(space, 2))[0] for _ in range(2))
    with torch.no_grad():
        chosen, values = torch.jit.trace(module, (first,))(other)
    torch.testing.assert_close(values, policy.predict_values(other), rtol=1e-4, atol=1e-5)
    expected = policy.predict(other.numpy(), deterministic=True)[0]
    clipped = np.clip(chosen, actions.low, actions.high) if isinstance(actions, spaces.Box) else chosen
    np.testing.assert_allclose(clipped, expected, rtol=1e-4, atol=1e-5)


# Whole models


def learner(env="Pendulum-v1", policy="MlpPolicy", **arguments):
    settings = {"n_steps": 16, "batch_size": 8, "n_epochs": 1, "candidates": "episodes", "seed": 0}
    return GRPO(policy, env, policy_kwargs={"net_arch": [8]}, **{**settings, **arguments})


class Pictures(gymnasium.Env):
    """Small pictures, channels last."""

    observation_space, action_space = spaces.Box(0, 255, (9, 11, 2), np.uint8), TWO

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        return self.np_random.integers(0, 256, (9, 11, 2), np.uint8), {}

    def step(self, action):
        seen = self.np_random.integers(0, 256, (9, 11, 2), np.uint8)
        return seen, float(action), bool(self.np_random.random() < 0.2), False, {}


@pytest.mark.parametrize(("env", "policy"), [("Pendulum-v1", "MlpPolicy"), (Pictures, "CnnPolicy")])
def test_a_model_becomes_a_ppo(env, policy, tmp_path):
    model = learner(make_vec_env(env, 2), policy, gamma=0.9, ent_coef=lambda progress: 0.01 * progress)
    model.learn(32)
    ppo = conversion.to_sb3(model)
    assert (ppo.gamma, ppo.n_steps, ppo.n_envs, ppo.num_timesteps, ppo.seed) == (0.9, 16, 2, 32, 0)
    assert ppo.env is model.env
    ppo.save(tmp_path / "ppo")
    loaded = PPO.load(tmp_path / "ppo")
    batch = batch_of(model.observation_space, 5)
    expected = model.predict(batch, deterministic=True)[0]
    for other in (ppo, loaded):
        np.testing.assert_allclose(
            other.predict(batch, deterministic=True)[0], expected, rtol=1e-4, atol=1e-5
        )
    ppo.learn(32)
    assert not torch.equal(ppo.policy.action_net.weight, loaded.policy.action_net.weight)
    np.testing.assert_array_equal(model.predict(batch, deterministic=True)[0], expected)


def taken_over(source, **arguments):
    given, policy = conversion.arguments_from(source)
    model = GRPO(**{**given, "candidates": "episodes", **arguments})
    conversion.load_torch(model.policy, policy)
    return model


@pytest.mark.parametrize(("algorithm", "arguments"), [(PPO, {"batch_size": 8}), (A2C, {})])
def test_a_model_of_sb3_trains_on_here(algorithm, arguments, tmp_path):
    arguments = {"n_steps": 16, "gamma": 0.9, "policy_kwargs": {"net_arch": [8]}, **arguments}
    source = algorithm("MlpPolicy", "Pendulum-v1", **arguments)
    source.learn(16)
    model = taken_over(source, batch_size=8)
    assert (model.gamma, model.n_steps, type(model.policy)) == (0.9, 16, MlpPolicy)
    assert_equal_answers(model.policy, source.policy)
    before = model.policy.parameters_to_vector()
    model.learn(16)
    assert not np.array_equal(model.policy.parameters_to_vector(), before)
    model.save(tmp_path / "model")
    loaded = GRPO.load(tmp_path / "model")
    jax.tree.map(np.testing.assert_array_equal, loaded.policy.state, model.policy.state)
    alone = taken_over(source.policy, env="Pendulum-v1", bootstrap=False, n_steps=16, batch_size=8)
    assert not alone.policy.has_critic
    torch.testing.assert_close(
        alone.policy.get_distribution(np.ones((1, 3), np.float32)).mode(),
        source.policy.get_distribution(torch.ones(1, 3)).mode(),
    )


# What is refused


class Own(BaseFeaturesExtractor):
    """A user's extractor."""

    def __init__(self, space):
        super().__init__(space, 4)

    def forward(self, observations):
        return observations


class Derived(sb3.ActorCriticPolicy):
    """A user's policy."""


def replaced():
    policy = sb3.ActorCriticPolicy(VECTOR, TWO, rate, net_arch=[8])
    policy.mlp_extractor.policy_net[1] = torch.nn.Hardtanh()
    return policy


def longer():
    policy = sb3.ActorCriticPolicy(VECTOR, TWO, rate, net_arch=[8])
    policy.action_net = torch.nn.Sequential(policy.action_net, torch.nn.Tanh())
    return policy


@pytest.mark.parametrize(
    ("policy", "error", "message"),
    [
        (lambda: Derived(VECTOR, TWO, rate), TypeError, "policy=Derived must be SB3's MlpPolicy"),
        (lambda: make(), TypeError, "policy=MlpPolicy must be SB3's"),
        (
            lambda: sb3.ActorCriticPolicy(VECTOR, STRETCHED, rate, use_sde=True),
            NotImplementedError,
            "use_sde=True",
        ),
        (
            lambda: sb3.ActorCriticPolicy(VECTOR, TWO, rate, features_extractor_class=Own),
            TypeError,
            "features_extractor_class=Own is torch's",
        ),
        (
            lambda: sb3.ActorCriticPolicy(VECTOR, TWO, rate, activation_fn=torch.nn.Hardtanh),
            TypeError,
            "Hardtanh.* no counterpart in JAX",
        ),
        (replaced, TypeError, r"the torch policy has \(1\): Hardtanh.* where \(1\): Tanh"),
        (longer, TypeError, "the torch policy has .action_net.: Sequential"),
    ],
)
def test_what_jax_does_not_have_is_named(policy, error, message):
    with pytest.raises(error, match=message):
        conversion.from_torch(policy())


def test_other_spaces_are_refused():
    source = sb3.ActorCriticPolicy(VECTOR, TWO, rate, net_arch=[8])
    for target in (make(spaces.Box(-1, 1, (4,))), make(action_space=spaces.Discrete(3))):
        with pytest.raises(ValueError, match="spaces do not match"):
            conversion.load_torch(target, source)


class Normed(nn.Module):
    """A user's extractor."""

    @nn.compact
    def __call__(self, x):
        return nn.LayerNorm()(x)


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        (
            {"activation_fn": jax.nn.soft_sign},
            "activation_fn=.* has no counterpart in torch here: only ELU, ",
        ),
        ({"features_extractor_class": Normed}, "features_extractor_class=Normed is JAX's"),
    ],
)
def test_what_torch_does_not_have_is_named(kwargs, message):
    with pytest.raises(TypeError, match=message):
        conversion.to_torch(make(**kwargs))


@pytest.mark.parametrize(
    ("space", "extractor"), [(IMAGE, NatureCNN), (MIXED, CombinedExtractor)], ids=["image", "Dict"]
)
def test_a_policy_of_sb3s_own_making_comes_over(space, extractor):
    cls = sb3.ActorCriticCnnPolicy if space is IMAGE else sb3.MultiInputActorCriticPolicy
    source = cls(space, STRETCHED, rate, share_features_extractor=False, normalize_images=True)
    source.set_training_mode(False)
    assert type(source.features_extractor) is extractor
    assert_equal_answers(conversion.from_torch(source), source)
