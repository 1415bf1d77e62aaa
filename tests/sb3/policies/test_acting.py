"""Actions, values and densities; SB3's own ActorCriticPolicy, on the same inputs, is the oracle."""

from __future__ import annotations

import io
import multiprocessing
import warnings

import gymnasium
import jax
import jax.numpy as jnp
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
    fitting,
    make,
    rate,
)
from stable_baselines3.common import policies as sb3
from stable_baselines3.common.vec_env import SubprocVecEnv

from sb3_bridge.policies import CnnPolicy, MultiInputPolicy


@pytest.fixture(scope="module", params=OBSERVATIONS)
def pair(request):
    """Our policy and SB3's on one observation space."""
    space = OBSERVATIONS[request.param]
    cls = fitting(space)
    return make(space, cls=cls), CLASSES[cls](space, TWO, rate, net_arch=[8])


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
    with pytest.raises(expected.type) as actual:
        make(space, cls=cls).predict(observation)
    # Their first words are what people's code looks for.
    assert str(actual.value)[:25] == str(expected.value)[:25]


def test_an_empty_batch_is_refused():
    with pytest.raises(RuntimeError, match=r"batch of observations is empty: its shape is \[0, 4\]"):
        make().predict(np.zeros((0, 4), np.float32))


def test_gymnasiums_reset_is_told_from_an_observation():
    with pytest.raises(
        ValueError, match="passed a tuple to the predict.. function .* pass the observation alone"
    ):
        make().predict((VECTOR.sample(), {}))


def test_sampled_actions_follow_the_distribution():
    policy = make(action_space=ACTIONS["Discrete"])
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


@pytest.mark.parametrize("name", ACTIONS)
def test_densities_are_those_of_the_policy_in_the_units_of_the_space(name):
    space = ACTIONS[name]
    policy = make(action_space=space, log_std_init=-0.5)
    obs, is_vectorized = policy.obs_to_tensor(batch_of(VECTOR, 5))
    assert is_vectorized
    actions = torch.as_tensor(np.stack([space.sample() for _ in range(5)]))
    values, log_prob, entropy = policy.evaluate_actions(obs, actions)
    assert (values.shape, log_prob.shape, entropy.shape) == ((5, 1), (5,), (5,))
    own, units, log_volume = policy.structure.distribution, actions.numpy(), 0.0
    if isinstance(space, spaces.Box):
        half = (space.high - space.low) / 2
        units, log_volume = (units - (space.high + space.low) / 2) / half, np.log(half).sum()
    parameters = policy.structure.parameters(policy.state, jnp.asarray(obs.numpy()))
    expected = own.log_prob(parameters, jnp.asarray(units)) - log_volume
    np.testing.assert_allclose(log_prob, expected, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(entropy, own.entropy(parameters) + log_volume, rtol=1e-4, atol=1e-5)
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
    policy = make(action_space=ACTIONS[name])
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


# What cannot be answered


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_an_observation_that_is_not_finite_is_named(bad):
    policy, batch = make(), batch_of(VECTOR, 3)
    batch[1, 2] = bad
    obs, message = torch.as_tensor(batch), rf"observation must be finite: it is {bad} at index \[1, 2\]"
    entrances = (
        policy.predict_values,
        policy.get_distribution,
        policy,
        lambda obs: policy.evaluate_actions(obs, TWO.sample()),
    )
    for enter, given in [(policy.predict, batch), *((enter, obs) for enter in entrances)]:
        with pytest.raises(ValueError, match=message):
            enter(given)
    with pytest.raises(ValueError, match=r"at index \[0, 2\]"):
        policy.predict(batch[1])


def test_the_entry_that_is_not_finite_is_named():
    observation = MIXED.sample()
    observation["x"][1] = np.nan
    with pytest.raises(ValueError, match=r"observation\['x'\] must be finite: it is nan at index \[0, 1\]"):
        make(MIXED, cls=MultiInputPolicy).predict(observation)


class Entered(torch.nn.Module):
    """A module around one of a policy's functions, as people write it for ONNX."""

    def __init__(self, function):
        super().__init__()
        self.function = function

    def forward(self, obs):
        return self.function(obs)


@pytest.mark.parametrize("export", ["jit.trace", "export", "compile", "onnx"])
@pytest.mark.parametrize("name", ["__call__", "_predict", "predict_values", "get_distribution"])
def test_torch_cannot_make_a_constant_of_a_policy(name, export):
    obs, module = torch.as_tensor(batch_of(VECTOR, 2)), Entered(getattr(make(), name))
    exports = {
        "jit.trace": lambda: torch.jit.trace(module, (obs,)),
        "export": lambda: torch.export.export(module, (obs,), strict=False),
        "compile": lambda: torch.compile(module, backend="eager")(obs),
        "onnx": lambda: torch.onnx.export(module, (obs,), io.BytesIO(), dynamo=False),
    }
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of deprecated exporters
        with pytest.raises(RuntimeError, match=r"use model.to_torch\(\)"):
            exports[export]()


def _report(function, pipe):
    try:
        pipe.send(function())
    except RuntimeError as error:
        pipe.send(error)


def _in_a_fork(function):
    context = multiprocessing.get_context("fork")
    here, there = context.Pipe()
    process = context.Process(target=_report, args=(function, there))
    process.start()
    try:
        assert here.poll(60), "the child hangs"
        return here.recv()
    finally:
        process.kill()
        process.join()


@pytest.mark.skipif("fork" not in multiprocessing.get_all_start_methods(), reason="no fork here")
@pytest.mark.filterwarnings("ignore")  # JAX's and Python's, of the same danger
def test_a_forked_child_says_why_it_cannot_act():
    policy, observation = make(), VECTOR.sample()
    policy.predict(observation)
    for function in (lambda: policy.predict(observation), lambda: policy(torch.zeros(1, 4)), make):
        assert "Start processes by 'spawn' or 'forkserver'" in str(_in_a_fork(function))
    # What computes nothing goes on, such as workers that step environments.
    vector = policy.parameters_to_vector()
    np.testing.assert_array_equal(_in_a_fork(policy.parameters_to_vector), vector)
    env = SubprocVecEnv([lambda: gymnasium.make("CartPole-v1")], start_method="fork")
    env.reset()
    assert env.step(np.array([0]))[0].shape == (1, 4)
    env.close()
    policy.predict(observation)
