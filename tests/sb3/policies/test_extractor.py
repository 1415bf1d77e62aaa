"""Spaces and features extractors as SB3 understands them."""

from __future__ import annotations

import flax.linen as nn
import numpy as np
import pytest
import torch
from gymnasium import spaces
from sb3.policies.cases import (
    ACTIONS,
    CLASSES,
    IMAGE,
    MIXED,
    OBSERVATIONS,
    TWO,
    VECTOR,
    batch_of,
    make,
    rate,
)
from stable_baselines3.common import policies as sb3
from stable_baselines3.common.torch_layers import BaseFeaturesExtractor, CombinedExtractor, NatureCNN

from grpo_jax import spaces as own_spaces
from grpo_jax.policies.networks import CNN, Combined, Flatten
from sb3_bridge.policies import CnnPolicy, MlpPolicy, MultiInputPolicy
from sb3_bridge.policies.extractor import to_features_extractor
from sb3_bridge.policies.spaces import to_action_space, to_observation_space


def test_what_networks_see():
    seen = to_observation_space
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
    seen = own_spaces.encode(to_observation_space(space, normalize_images), observation)
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
    assert to_features_extractor(cls.kind, space, **given) == extractor


def test_features_of_a_dict_are_as_many_as_sb3s():
    theirs = sb3.MultiInputActorCriticPolicy(MIXED, TWO, rate, net_arch=[8])
    kernel = make(MIXED, cls=MultiInputPolicy).state_dict()["actor.MLP_0.Dense_0.kernel"]
    assert kernel.shape[0] == theirs.features_dim == 3 + 256 + 4


def test_small_images_of_a_dict_are_flattened():
    space = spaces.Dict({"map": spaces.Box(0, 255, (1, 2, 2), np.uint8)})
    assert to_features_extractor("multi_input", space) == Combined((("map", 3),))


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
    if error is AssertionError and not kwargs:
        with pytest.raises(AssertionError):
            CLASSES[cls](space, TWO, rate)


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


class Bounded(spaces.Box):
    """A space of a user's class."""


class Choice(spaces.Discrete):
    """Another one."""


def test_spaces_of_derived_classes_are_those_of_gymnasium():
    box, choice = Bounded(-1, 3, (2,)), Choice(3)
    assert to_observation_space(box) == to_observation_space(spaces.Box(-1, 3, (2,)))
    assert to_action_space(box) == to_action_space(spaces.Box(-1, 3, (2,)))
    assert to_observation_space(choice) == to_action_space(choice) == own_spaces.Discrete(3)
    assert (type(box), type(choice)) == (Bounded, Choice)
    for space in (box, choice):
        action = make(space, space).predict(space.sample())[0]
        assert space.contains(action if space is box else action[()])


@pytest.mark.parametrize("shape", [(0,), (3, 0)])
def test_an_empty_axis_is_refused_early(shape):
    empty = spaces.Box(-1, 1, shape)
    with pytest.raises(AssertionError, match="observation_space=.* axis of length 0"):
        make(empty)
    with pytest.raises(AssertionError, match="action_space=.* axis of length 0"):
        make(action_space=empty)
