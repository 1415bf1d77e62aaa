"""``device="cpu"`` where JAX's default is a GPU: what runs, and what is chosen for it, is the CPU's."""

from __future__ import annotations

import gymnasium as gym
import jax
import numpy as np
import pytest
from stable_baselines3.common.callbacks import BaseCallback

from grpo_jax.types import backend
from sb3_bridge import GRPO

SMALL = {"n_steps": 16, "batch_size": 16, "n_epochs": 1, "horizon": 4, "policy_kwargs": {"net_arch": [8]}}


class Seen(BaseCallback):
    def __init__(self):
        super().__init__()
        self.backends = set()

    def _on_step(self):
        self.backends.add(backend())
        return True

    _on_rollout_end = _on_step


@pytest.fixture
def of_a_machine_with_a_gpu(monkeypatch):
    jax.clear_caches()  # traces do not know which backend was asked for
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    yield
    jax.clear_caches()


@pytest.mark.parametrize("env", [lambda: gym.make("CartPole-v1"), lambda: "CartPole-v1"])
def test_the_cpu_is_asked_for_where_the_default_is_a_gpu(env, of_a_machine_with_a_gpu):
    seen = Seen()
    model = GRPO("MlpPolicy", env(), **SMALL, seed=0, device="cpu").learn(32, callback=seen)
    assert seen.backends == {"cpu"}
    assert backend() == "gpu"
    assert all(np.all(np.isfinite(leaf)) for leaf in jax.tree.leaves(model.policy.state.params))
