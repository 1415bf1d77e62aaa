"""Values of what a rollout's steps reached."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from grpo_jax.groups.compare import _next_values
from grpo_jax.types import Environments, Trajectory

T, N = 6, 3


def trajectory(terminated, truncated, seed):
    """One where each state's observation is a number of its own, and so is each last one of an episode."""
    seen = jnp.asarray(np.random.default_rng(seed).normal(size=(T, N)))
    last = 100.0 + jnp.arange(T * N, dtype=float).reshape(T, N)
    following = jnp.concatenate([seen[1:], last[-1:]])
    ended = terminated | truncated
    environments = Environments(None, seen, None, jnp.zeros((T, N), int), None, None)
    reached = jnp.where(ended, last, following)
    return Trajectory(environments, None, None, None, jnp.zeros((T, N)), None, terminated, truncated, reached)


@pytest.mark.parametrize("share", [0.0, 0.1, 0.5, 1.0])
@pytest.mark.parametrize("seed", [0, 1])
def test_values_of_what_was_reached_are_the_critics(share, seed, compiled):
    generator = np.random.default_rng(seed)
    terminated, truncated = jnp.asarray(generator.random((2, T, N)) < share)
    seen = trajectory(terminated, truncated, seed)
    asked = []

    def value(observation):
        asked.append(observation.shape)
        return jnp.sin(observation) + observation

    got = compiled(lambda one: _next_values(value, one, value(one.observation)))(seen)
    counts = np.asarray(~terminated)
    np.testing.assert_allclose(got[counts], value(seen.next_observation)[counts], rtol=1e-6)
    assert asked[1:-1] and all(shape == (N,) for shape in asked[1:-1]), "N states at a time, never all again"


def test_seeds_in_one_program_have_values_of_their_own():
    many = [trajectory(*(jnp.asarray(np.random.default_rng(k).random((2, T, N)) < 0.3)), k) for k in range(4)]
    stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *many)
    got = jax.jit(jax.vmap(lambda one: _next_values(jnp.sin, one, jnp.sin(one.observation))))(stacked)
    for mine, one in zip(got, many, strict=True):
        counts = np.asarray(~one.terminated)
        np.testing.assert_allclose(mine[counts], jnp.sin(one.next_observation)[counts], rtol=1e-6)
