"""Actor and critic on one features extractor."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from grpo_jax import GRPOConfig
from grpo_jax.policies.policy import make_policy
from grpo_jax.spaces import Box, Discrete

OBSERVATION, ACTION = Box(0, 255, (10, 10, 2), np.uint8), Discrete(3)


def policy_of(shares):
    config = GRPOConfig(network="cnn", bootstrap=True, share_features_extractor=shares)
    return make_policy(config, OBSERVATION, ACTION)


@pytest.mark.parametrize("shares", [True, False])
def test_both_at_once_are_what_they_are_alone(shares, compiled):
    policy = policy_of(shares)
    state = policy.init(jax.random.key(0))
    seen = np.random.default_rng(0).integers(0, 256, (5, 10, 10, 2), np.uint8)
    mask = jnp.array([[True, False, True]] * 5)
    parameters, value = compiled(policy.parameters_and_value)(state, seen, mask)
    np.testing.assert_allclose(parameters, policy.parameters(state, seen, mask), rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(value, policy.value(state, seen), rtol=1e-5, atol=1e-6)

    def loss(params, together):
        state_ = state.replace(params=params)
        both = (policy.parameters(state_, seen), policy.value(state_, seen))
        both = policy.parameters_and_value(state_, seen) if together else both
        return jnp.sum(both[0] ** 2) + jnp.sum(both[1] ** 2)

    one, other = (jax.grad(loss)(state.params, together) for together in (True, False))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5), one, other)


def test_gradients_go_through_shared_features_once():
    """Two passes through an extractor, which is nearly all of this network, take nearly twice the operations."""

    def operations(shares, together):
        policy = policy_of(shares)
        state = policy.init(jax.random.key(0))

        def loss(params, seen):
            state_ = state.replace(params=params)
            both = (policy.parameters(state_, seen), policy.value(state_, seen))
            both = policy.parameters_and_value(state_, seen) if together else both
            return jnp.sum(both[0]) + jnp.sum(both[1])

        seen = np.zeros((5, 10, 10, 2), np.uint8)
        program = jax.jit(jax.grad(loss)).lower(state.params, seen).compile()
        return program.cost_analysis()["flops"]

    assert operations(True, True) < 0.8 * operations(True, False)
    assert operations(False, True) == operations(False, False)
