"""A tiny policy with its learner and a batch that it enumerated itself, for tests of the update."""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from grpo_jax.config import GRPOConfig
from grpo_jax.groups import candidates
from grpo_jax.learning.update import init_learner, loss, update
from grpo_jax.policies.policy import make_policy
from grpo_jax.spaces import Box, Discrete
from grpo_jax.types import Batch

N, A, D = 8, 3, 4  # decision states, actions, features
BASE = GRPOConfig(
    n_envs=2, n_steps=4, batch_size=N, n_epochs=1, net_arch=(5,), learning_rate=0.01, max_grad_norm=1e6
)
RNG = np.random.default_rng(0)
OBSERVATION = RNG.normal(size=(N, D)).astype(np.float32)
ADVANTAGE = RNG.normal(size=(N, A)).astype(np.float32)
KEY = jax.random.key(3)

run_update = jax.jit(update, static_argnums=1)
loss_gradient = jax.jit(jax.grad(loss, has_aux=True), static_argnums=2)
values = jax.jit(lambda policy, state, observation: policy.value(state, observation), static_argnums=0)
logits = jax.jit(lambda policy, state, observation: policy.parameters(state, observation), static_argnums=0)


def setup(config=BASE, seed=0, **batch):
    """A policy with random parameters, its learner, and a batch that it enumerated itself."""
    space = Box(np.full(D, -np.inf), np.full(D, np.inf), (D,))
    policy = make_policy(config, space, Discrete(A))
    learner = init_learner(config, policy, jax.random.key(seed))
    rng = np.random.default_rng(seed)
    params = jax.tree.map(
        lambda leaf: jnp.asarray(0.5 * rng.normal(size=leaf.shape), leaf.dtype), learner.policy.params
    )
    learner = learner.replace(policy=learner.policy.replace(params=params))
    return policy, learner, make_batch(policy, learner.policy, **batch)


def make_batch(policy, state, **changes):
    observation = jnp.asarray(changes.pop("observation", OBSERVATION))
    parameters = logits(policy, state, observation)
    group = candidates.enumerate_actions(policy.distribution, parameters, jnp.zeros(N, jnp.int32))
    batch = Batch(
        observation=observation,
        action_mask=None,
        group=group,
        advantage=jnp.asarray(ADVANTAGE),
        active=jnp.ones(N, bool),
        alive=jnp.ones(N, bool),
        compared=jnp.ones(N, bool),
        distribution=parameters,
    )
    return batch.replace(**changes)


def assert_same(left, right):
    jax.tree.map(np.testing.assert_array_equal, left, right)


def assert_close(left, right, **kwargs):
    jax.tree.map(functools.partial(np.testing.assert_allclose, **kwargs), left, right)


def by_hand(params, policy, state, batch, clip_low=0.2, clip_high=0.2):
    """PPO's loss in ratios, as the paper writes it."""
    logits = policy.parameters(state.replace(params=params), batch.observation)
    log_pi = jax.nn.log_softmax(logits)
    old = jax.nn.softmax(batch.distribution)
    ratio = jnp.exp(log_pi) / old
    clipped = jnp.clip(ratio, 1 - clip_low, 1 + clip_high)
    objective = old * jnp.minimum(ratio * batch.advantage, clipped * batch.advantage)
    return -jnp.mean(jnp.sum(objective, axis=1))


by_hand_gradient = jax.jit(jax.value_and_grad(by_hand), static_argnums=1)
