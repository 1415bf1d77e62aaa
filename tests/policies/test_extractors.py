"""Features extractors behind a policy: shared or not, this package's or the user's."""

from __future__ import annotations

import math

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from grpo_jax import spaces
from grpo_jax.policies.networks import CNN
from grpo_jax.policies.policy import assemble
from tests.policies.test_policy import MAP, VECTOR, init, policy_of


@pytest.mark.parametrize("share", [False, True])
def test_a_shared_extractor_learns_from_actor_and_critic(share, key):
    policy = policy_of(MAP, bootstrap=True, share_features_extractor=share)
    state = init(policy, key)
    observations = np.random.default_rng(0).normal(size=(2, 10, 10, 4)).astype(np.float32)
    learned = {"features_extractor"} if share else {"features_extractor", "critic_features_extractor"}
    assert set(state.params) == {"actor", "critic"} | learned

    @jax.jit
    def gradients(params):
        def outputs(params, function):
            return jnp.sum(function(state.replace(params=params), observations) ** 2)

        return [jax.grad(outputs)(params, function) for function in (policy.parameters, policy.value)]

    of_actor, of_critic = gradients(state.params)
    for name in sorted(learned):
        reached = tuple(
            all(np.any(leaf != 0) for leaf in jax.tree.leaves(gradient[name]))
            for gradient in (of_actor, of_critic)
        )
        assert reached == (
            (True, True) if share else (name == "features_extractor", name != "features_extractor")
        )


def test_without_a_critic_there_is_one_extractor(key):
    params = jax.eval_shape(policy_of(MAP).init, key).params
    assert set(params) == {"features_extractor", "actor"}


def test_extractors_that_are_not_shared_start_differently(key):
    params = jax.jit(policy_of(MAP, bootstrap=True).init)(key).params
    kernels = [
        params[name]["Conv_0"]["kernel"] for name in ("features_extractor", "critic_features_extractor")
    ]
    assert not np.allclose(*kernels, atol=1e-3)


def test_channels_first_is_channels_last_transposed(key):
    last = policy_of(spaces.Box(0, 255, (6, 8, 2), "uint8"), bootstrap=True)
    first = policy_of(spaces.Box(0, 255, (2, 6, 8), "uint8", channels_first=True), bootstrap=True)
    image = np.random.default_rng(0).integers(0, 256, (3, 6, 8, 2), np.uint8)
    state = init(last, key)
    jax.tree.map(np.testing.assert_array_equal, state, init(first, key))
    transposed = np.moveaxis(image, -1, -3)
    outputs = [
        jax.jit(lambda x, policy=policy: (policy.parameters(state, x), policy.value(state, x)))(x)
        for policy, x in ((last, image), (first, transposed))
    ]
    jax.tree.map(np.testing.assert_array_equal, *outputs)


class Normed(nn.Module):
    """A user's extractor: it wants exactly one batch axis."""

    width: int = 5

    @nn.compact
    def __call__(self, x):
        if isinstance(x, dict):
            x = jnp.concatenate(
                [leaf.reshape(leaf.shape[0], math.prod(leaf.shape[1:])) for leaf in x.values()], axis=-1
            )
        assert x.ndim == 2
        return nn.LayerNorm()(nn.Dense(self.width)(x))


def user_policy(extractor, observation_space=VECTOR, **changes):
    settings = {"widths": (8,), "critic_widths": (8,), "share_features_extractor": True, **changes}
    return assemble(observation_space, spaces.Discrete(3), features_extractor=extractor, **settings)


@pytest.mark.parametrize(
    ("batch", "named"), [((), False), ((4,), False), ((2, 3), False), ((0,), False), ((2, 3), True)]
)
def test_a_module_of_the_users_sees_one_batch_axis(batch, named, key):
    space = spaces.Dict((("a", spaces.Box(0, 1, (2, 2))), ("b", spaces.Discrete(2)))) if named else VECTOR
    policy = user_policy(Normed(), space)
    state = jax.jit(policy.init)(key)
    assert set(state.params) == {"features_extractor", "actor", "critic"}
    extractor = state.params["features_extractor"]
    np.testing.assert_array_equal(extractor["LayerNorm_0"]["scale"], np.ones(5))
    assert np.ptp(extractor["Dense_0"]["kernel"]) > 0
    rng = np.random.default_rng(0)
    if named:
        observation = {"a": rng.uniform(size=(*batch, 2, 2)), "b": np.zeros(batch, np.int32)}
    else:
        observation = rng.normal(size=(*batch, 3))
    outputs = jax.jit(lambda x: (policy.parameters(state, x), policy.value(state, x)))
    parameters, value = outputs(observation)
    assert (parameters.shape, value.shape) == ((*batch, 3), batch)
    if batch and 0 not in batch:
        row = jax.tree.map(lambda leaf: leaf[(0,) * len(batch)], observation)
        first = parameters[(0,) * len(batch)]
        np.testing.assert_allclose(outputs(row)[0], first, rtol=1e-4, atol=1e-6)


class Wrong(nn.Module):
    form: str

    def __call__(self, x):
        return {"scalar": x[:, 0], "stack": x[:, None], "sum": x.sum(0, keepdims=True), "none": None}[
            self.form
        ]


@pytest.mark.parametrize(
    ("form", "got"), [("scalar", r"\[1\]"), ("stack", r"\[1, 1, 3\]"), ("none", "NoneType")]
)
def test_an_extractor_gives_rows_of_features(form, got, key):
    with pytest.raises(ValueError, match=rf"Wrong must turn a batch .*\[B, F\]; for \[1, 3\] it gave {got}"):
        user_policy(Wrong(form)).init(key)


def test_an_extractor_keeps_its_rows_apart(key):
    policy = user_policy(Wrong("sum"))
    state = policy.init(key)  # one row: nothing to be seen yet
    with pytest.raises(ValueError, match=r"for \[2, 3\] it gave \[1, 3\]"):
        policy.parameters(state, jnp.ones((2, 3)))


class Listed(nn.Module):
    widths: list


@pytest.mark.parametrize(
    ("extractor", "message"),
    [(Normed, "instance of a flax.linen.Module"), ("cnn", "instance of a"), (Listed([1]), "use tuples")],
)
def test_what_is_no_extractor(extractor, message):
    with pytest.raises(TypeError, match=f"features_extractor=.*{message}"):
        user_policy(extractor)


def test_equal_arguments_give_equal_policies():
    def make(**changes):
        return user_policy(Normed(), spaces.Box(-5, 5, (3,)), activation=jax.nn.relu, **changes)

    assert make() == make()
    assert hash(make()) == hash(make())
    different = [
        make(orthogonal=False),
        make(share_features_extractor=False),
        make(widths=(9,)),
        make(critic_widths=None),
        user_policy(Normed(6), activation=jax.nn.relu),
    ]
    assert len({make(), *different}) == 1 + len(different)


def test_unknown_activations_are_refused_at_once():
    with pytest.raises(ValueError, match="activation='sine' must be one of"):
        user_policy(Normed(), activation="sine")


@pytest.mark.parametrize("orthogonal", [True, False])
def test_orthogonal_reaches_every_part(orthogonal, key):
    policy = assemble(
        MAP,
        spaces.Discrete(2),
        features_extractor=CNN("relu", 6),
        critic_widths=(4,),
        widths=(4,),
        orthogonal=orthogonal,
    )
    params = jax.jit(policy.init)(key).params
    kernels = [
        params["features_extractor"]["Dense_0"]["kernel"],
        params["critic_features_extractor"]["Dense_0"]["kernel"],
        params["actor"]["MLP_0"]["Dense_0"]["kernel"],
        params["critic"]["MLP_0"]["Dense_0"]["kernel"],
    ]
    for kernel in kernels:
        gram = np.asarray(kernel.T @ kernel)
        assert np.allclose(gram, 2 * np.eye(len(gram)), atol=1e-4) == orthogonal
