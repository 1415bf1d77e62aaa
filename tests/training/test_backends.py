"""What is chosen by the backend (kernels of noise, chunks, resets, blocks) changes no number: a GPU's choices on a CPU."""

from __future__ import annotations

import jax
import numpy as np
import pytest

import grpo_jax
from grpo_jax.types import backend

SMALL = grpo_jax.GRPOConfig(n_envs=8, n_steps=8, batch_size=32, n_epochs=2, horizon=4, net_arch=(8,))

REGIMES = {
    "enumerate": (
        "CartPole-v1",
        {"bootstrap": True, "normalize_observations": True, "branch_every": 2},
        None,
    ),
    "sample, seeds": ("Pendulum-v1", {"group_size": 3, "persistence": 0.3}, 3),
    "episodes, shards": ("CartPole-v1", {"candidates": "episodes", "bootstrap": True, "n_shards": 4}, None),
}


@pytest.fixture(autouse=True)
def no_traces_of_others():
    jax.clear_caches()  # traces do not know which backend was asked for
    yield
    jax.clear_caches()


@pytest.mark.parametrize("name", REGIMES)
def test_a_gpus_choices_come_to_the_same_numbers(name, monkeypatch):
    env_id, settings, n_seeds = REGIMES[name]
    env, config = grpo_jax.make(env_id), SMALL.replace(**settings)
    ends = []
    for asked in ("cpu", "gpu"):
        jax.clear_caches()
        monkeypatch.setattr(jax, "default_backend", lambda asked=asked: asked)
        state, metrics = grpo_jax.run(config, env, jax.random.key(0), 3 * config.n_states, n_seeds=n_seeds)
        one = state if n_seeds is None else jax.tree.map(lambda leaf: leaf[1], state)
        plan = grpo_jax.Plan.of(config) if name == "enumerate" else None
        played = grpo_jax.evaluate(one, env, jax.random.key(1), 4, max_steps=8, plan=plan)
        ends.append((state.learner.policy, state.environments.observation, metrics["episode_return"], played))
    for a, b in zip(*map(jax.tree.leaves, ends), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5)


def test_the_cpu_of_a_machine_with_a_gpu_draws_what_any_cpu_draws(monkeypatch):
    """The default backend is the GPU there, and JAX's own kernel is lowered for the CPU."""

    def draw(keys, data):
        folded = jax.vmap(jax.random.fold_in, (None, 0))(keys[0], data)
        return jax.vmap(lambda key: jax.random.normal(key, (3,)))(folded), jax.vmap(jax.random.fold_in)(
            keys, data
        )

    keys, data = grpo_jax.noise.split(grpo_jax.noise.as_key(jax.random.key(2)), 5), np.arange(5)
    drawn = []
    for asked in ("cpu", "gpu"):
        jax.clear_caches()
        monkeypatch.setattr(jax, "default_backend", lambda asked=asked: asked)
        numbers, folded = jax.jit(draw)(keys, data)
        drawn.append((np.asarray(numbers), np.asarray(jax.random.key_data(folded))))
    np.testing.assert_array_equal(drawn[0][1], drawn[1][1])
    np.testing.assert_allclose(drawn[0][0], drawn[1][0], rtol=1e-6)


def test_the_default_device_says_which_backend_it_is(monkeypatch):
    assert backend() == "cpu"
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    assert backend() == "gpu"
    for device in ("cpu", jax.devices("cpu")[0]):
        with jax.default_device(device):
            assert backend() == "cpu"
