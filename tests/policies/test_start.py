"""How networks start under vmap: no batch of LAPACK's, which may never return on a CPU with two cores."""

from __future__ import annotations

import os
import re
import subprocess
import sys

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import grpo_jax
from grpo_jax.policies import networks
from grpo_jax.policies.networks import Actor
from grpo_jax.policies.policy import assemble
from tests.policies.test_policy import VECTOR

# Runs in a process of its own, without the flags of the tests.
PROGRAM = """
import jax, grpo_jax
config = grpo_jax.GRPOConfig(n_envs=2, bootstrap=True, network="cnn", net_arch=(64,))
world = grpo_jax.make("Breakout-MinAtar")
start = lambda key: grpo_jax.init(config, world, key).params
starts = jax.jit(jax.vmap(start))(jax.random.split(jax.random.key(0), 8))
print(jax.block_until_ready(starts)["critic"]["output"]["kernel"].shape)
"""


def test_seeds_side_by_side_return_without_any_flag():
    environment = {name: value for name, value in os.environ.items() if name != "XLA_FLAGS"}
    run = subprocess.run(
        [sys.executable, "-c", PROGRAM],
        env=environment,
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )
    assert (run.returncode, run.stdout.strip()) == (0, "(8, 64, 1)"), run.stderr


def lapack_ranks(function, *args):
    """Ranks of the first results of all calls of LAPACK in a program."""
    text = jax.jit(function).lower(*args).as_text()
    calls = re.findall(r"custom_call @lapack_\w+.*?-> \(?tensor<([0-9x]*)", text)
    return [len(shape.strip("x").split("x")) for shape in calls]


@pytest.mark.parametrize("env", ["Breakout-MinAtar", "Pendulum-v1"])
def test_own_networks_start_without_lapack(env):
    config = grpo_jax.GRPOConfig(bootstrap=True)
    world = grpo_jax.make(env)
    keys = jax.random.split(jax.random.key(0), 4)
    assert lapack_ranks(jax.vmap(lambda key: grpo_jax.init(config, world, key)), keys) == []


class Users(nn.Module):
    @nn.compact
    def __call__(self, x):
        return nn.Dense(5, kernel_init=nn.initializers.orthogonal())(x)


def test_modules_of_the_users_start_one_after_the_other(key):
    space = grpo_jax.spaces.Discrete(2)
    policy = assemble(VECTOR, space, features_extractor=Users(), critic_widths=(8,))
    keys = jax.random.split(key, 6).reshape(2, 3)

    def init(key):
        return policy.init(key).params["features_extractor"]["Dense_0"]["kernel"]

    starts = {
        "vmap of vmap": jax.vmap(jax.vmap(init)),
        "vmap in map": lambda keys: jax.lax.map(jax.vmap(init), keys),
    }
    assert set(lapack_ranks(jax.vmap(lambda x: jnp.linalg.qr(x)[0]), jnp.ones((3, 4, 4)))) == {3}
    alone = jax.jit(init)(keys[1, 2])
    for start in starts.values():
        ranks = lapack_ranks(start, keys)
        assert ranks
        assert max(ranks) == 2
        np.testing.assert_allclose(jax.jit(start)(keys)[1, 2], alone, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("shape", [(1, 1), (1, 3), (5, 1), (7, 7), (40, 9), (9, 40)])
def test_starts_are_the_q_of_a_positive_qr(shape):
    normal = np.random.default_rng(0).normal(size=shape).astype(np.float32)
    tall = normal if shape[0] >= shape[1] else normal.T
    q, r = np.linalg.qr(tall.astype(np.float64))
    expected = q * np.sign(np.diag(r))
    ours = networks._orthogonal(jnp.asarray(normal))
    np.testing.assert_allclose(ours, expected if shape[0] >= shape[1] else expected.T, atol=2e-6)


def test_seeds_start_as_they_do_alone(key):
    keys = jax.random.split(key, 3)
    start = lambda key: networks.initialise(Actor((16,), "tanh", 3), key, jnp.zeros(8), 0.01)
    together = jax.jit(jax.vmap(start))(keys)
    for i in range(3):
        alone = jax.jit(start)(keys[i])
        jax.tree.map(lambda a, b, i=i: np.testing.assert_allclose(a[i], b, atol=1e-6), together, alone)
