"""Which actions a group holds, and what they weigh."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tabular

from grpo_jax.config import GRPOConfig
from grpo_jax.groups import candidates
from grpo_jax.policies.distributions import Categorical, Gaussian, for_space
from grpo_jax.spaces import Box, Discrete, MultiBinary, MultiDiscrete

RNG = np.random.default_rng(0)
enumerate_actions = jax.jit(candidates.enumerate_actions, static_argnums=0)
sample_actions = jax.jit(candidates.sample_actions, static_argnums=0)


def factor_probabilities(nvec, logits, mask):
    """Probability of each category of each factor, forbidden ones 0, in NumPy."""
    parts, start = [], 0
    for n in nvec:
        part = np.where(mask[start : start + n], np.exp(logits[start : start + n]), 0.0)
        parts.append(part / part.sum())
        start += n
    return parts


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("space", [Discrete(4), MultiDiscrete((2, 3, 2)), MultiBinary(3)], ids=str)
def test_enumeration(space, masked):
    distribution = for_space(space)
    nvec = space.nvec
    everything = list(itertools.product(*map(range, nvec)))
    n_states, n_actions = 6, len(everything)
    logits = RNG.normal(size=(n_states, sum(nvec))).astype(np.float32)
    mask = np.ones(logits.shape, bool)
    if masked:
        mask = RNG.random(logits.shape) < 0.6
        edges = np.cumsum((0, *nvec[:-1]))
        mask[:, edges] = True  # at least one category of each factor
        mask[0] = True
        mask[1] = np.isin(np.arange(sum(nvec)), edges)  # a single action is left
    parameters = distribution.apply_mask(logits, jnp.asarray(mask)) if masked else jnp.asarray(logits)
    executed_row = RNG.integers(n_actions, size=n_states)
    executed = np.array(everything)[executed_row].reshape(n_states, *space.shape)

    group = enumerate_actions(
        distribution, parameters, jnp.asarray(executed, jnp.int32), jnp.asarray(mask) if masked else None
    )

    assert group.action.shape == (n_states, n_actions, *space.shape)
    assert group.action.dtype == jnp.int32
    np.testing.assert_array_equal(group.executed, executed_row)
    weights = np.exp(group.log_weight)
    for b in range(n_states):
        np.testing.assert_array_equal(np.reshape(group.action[b], (n_actions, -1)), everything)
        factors = factor_probabilities(nvec, logits[b], mask[b])
        expected = np.array([np.prod([p[i] for p, i in zip(factors, a, strict=True)]) for a in everything])
        np.testing.assert_array_equal(group.valid[b], expected > 0)
        np.testing.assert_allclose(weights[b], expected, rtol=1e-5)
        np.testing.assert_allclose(np.exp(group.log_prob[b]), expected, rtol=1e-5)
    np.testing.assert_allclose(np.sum(weights * group.valid, axis=1), 1.0, rtol=1e-5)
    if masked:
        assert np.sum(group.valid[1]) == 1
        assert np.all(
            weights[~np.asarray(group.valid)] == 0.0
        )  # exactly: nothing leaks to a forbidden action
    assert np.all(np.isfinite(group.log_prob)) and np.all(np.isfinite(group.log_weight))


@pytest.mark.parametrize(
    "space", [Discrete(3), MultiDiscrete((2, 3)), Box(-1, 1, (2,)), Box(-1, 1, (2, 2))], ids=str
)
def test_sampling(space):
    distribution = for_space(space)
    n_states, group_size = 5, 4
    parameters = jnp.asarray(RNG.normal(size=(n_states, distribution.n_parameters)), jnp.float32)
    uniforms = jnp.asarray(RNG.random((n_states, group_size, distribution.n_uniforms)), jnp.float32)
    executed = jax.jit(distribution.sample)(parameters, uniforms[:, 0])

    group = sample_actions(distribution, parameters, executed, uniforms[:, 1:])

    assert group.action.shape == (n_states, group_size, *space.shape)
    np.testing.assert_array_equal(group.action[:, 0], executed)
    np.testing.assert_array_equal(group.executed, 0)
    np.testing.assert_allclose(np.exp(group.log_weight), 1 / group_size, rtol=1e-6)
    assert np.all(group.valid)
    log_prob = jax.jit(jax.vmap(distribution.log_prob, in_axes=(None, 1), out_axes=1))(
        parameters, group.action
    )
    np.testing.assert_allclose(group.log_prob, log_prob, rtol=1e-5, atol=1e-6)


def test_samples_are_distributed_as_the_policy():
    logits = jnp.asarray([[0.0, 1.0, -1.0]])
    uniforms = jax.random.uniform(jax.random.key(0), (1, 20_000, 1))
    group = sample_actions(Categorical((3,), ()), logits, jnp.zeros(1, jnp.int32), uniforms)
    counts = np.bincount(group.action[0, 1:], minlength=3) / 20_000
    np.testing.assert_allclose(counts, tabular.softmax(np.array([0.0, 1.0, -1.0])), atol=0.015)


def test_sampling_never_draws_a_forbidden_action():
    distribution = Categorical((4,), ())
    mask = jnp.asarray([[False, True, False, True]])
    parameters = distribution.apply_mask(jnp.zeros((1, 4)), mask)
    uniforms = jax.random.uniform(jax.random.key(0), (1, 1000, 1))
    group = sample_actions(distribution, parameters, jnp.ones(1, jnp.int32), uniforms)
    assert set(np.unique(group.action)) == {1, 3}


def test_executed_only():
    distribution = Categorical((3,), ())
    logits = jnp.asarray([[0.0, 1.0, 2.0], [1.0, 1.0, 1.0]])
    group = candidates.executed_only(distribution, logits, jnp.asarray([2, 0]))
    np.testing.assert_array_equal(group.action, [[2], [0]])
    np.testing.assert_allclose(np.exp(group.log_prob), [[0.66524096], [1 / 3]], rtol=1e-6)
    np.testing.assert_array_equal(np.exp(group.log_weight), 1.0)
    np.testing.assert_array_equal(group.executed, 0)


@pytest.mark.parametrize(
    ("asked", "distribution", "expected", "size"),
    [
        ("auto", Categorical((4,), ()), "enumerate", 4),
        ("auto", Categorical((4, 4, 4), (3,)), "enumerate", 64),
        ("auto", Categorical((65,), ()), "sample", 8),
        ("auto", Gaussian((2,)), "sample", 8),
        ("enumerate", Categorical((64,), ()), "enumerate", 64),
        ("sample", Categorical((4,), ()), "sample", 8),
        ("trajectory", Categorical((4,), ()), "trajectory", 8),
        ("trajectory", Gaussian((2,)), "trajectory", 8),
    ],
)
def test_resolve(asked, distribution, expected, size):
    config = GRPOConfig(candidates=asked, baseline="mean", group_size=8)
    assert candidates.resolve(config, distribution) == expected
    assert candidates.n_candidates(config, distribution) == size


def test_resolve_refuses():
    config = GRPOConfig(candidates="enumerate")
    with pytest.raises(ValueError, match="a Box takes candidates='sample'"):
        candidates.resolve(config, Gaussian((2,)))
    with pytest.raises(ValueError, match=r"compare 65 actions a state, above max_enumerated=64"):
        candidates.resolve(config, Categorical((65,), ()))
    assert candidates.resolve(config.replace(max_enumerated=65), Categorical((65,), ())) == "enumerate"
