"""Presets of other suites: each is of an id that there is, fits its environment and trains."""

from __future__ import annotations

import collections
import importlib.util
import sys
import types

import jax
import numpy as np
import pytest

import grpo_jax
from grpo_jax import spaces
from grpo_jax.cli.flags import parse
from grpo_jax.worlds.make import SUITES

pytestmark = pytest.mark.filterwarnings("ignore")  # suites warn of much that is not ours

IDS = [env_id for env_id in grpo_jax.preset_ids() if "/" in env_id]


def test_each_suite_has_two():
    counted = collections.Counter(env_id.partition("/")[0] for env_id in IDS)
    assert set(counted) == set(SUITES) and min(counted.values()) >= 2


@pytest.mark.timeout(900)  # Craftax takes more than a minute to compile
@pytest.mark.parametrize("env_id", IDS)
def test_two_iterations_of_a_preset(env_id):
    suite = env_id.partition("/")[0]
    if importlib.util.find_spec({"playground": "mujoco_playground"}.get(suite, suite)) is None:
        pytest.skip(f"{suite} is not installed: pip install '.[{suite}]'")
    assert env_id in grpo_jax.env_ids(suite)
    config, world = grpo_jax.preset(env_id), grpo_jax.make(env_id)
    if config.candidates == "enumerate":
        assert not isinstance(world.action_space, spaces.Box)
    config = config.replace(n_envs=4, n_steps=max(4, config.branch_every), batch_size=16, n_epochs=1)
    state, metrics = grpo_jax.run(config, world, jax.random.key(0), 2 * config.n_states)
    assert int(state.iteration) == 2 and not metrics["nonfinite_updates"].any()
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(state.learner.policy))
    assert (grpo_jax.count(state.simulator_steps) > 0) == (config.candidates != "episodes")


@pytest.mark.parametrize("env_id", IDS)
def test_the_command_line_takes_a_preset(env_id):
    options = parse(["train", env_id])
    assert grpo_jax.GRPOConfig(**vars(options.config)) == grpo_jax.preset(env_id)
    assert options.total_timesteps == grpo_jax.preset_timesteps(env_id) >= grpo_jax.preset(env_id).n_states


@pytest.mark.parametrize("env_id", IDS)
def test_sb3s_object_takes_a_preset(env_id, monkeypatch):
    """In a stand-in for the suite: the settings are what counts."""
    sb3 = pytest.importorskip("sb3_bridge", reason="Stable-Baselines3 is not installed", exc_type=ImportError)
    suite, _, name = env_id.partition("/")
    world = grpo_jax.make("CartPole-v1")
    stand_in = types.SimpleNamespace(ids=lambda: (name,), from_id=lambda name: world)
    monkeypatch.setitem(sys.modules, f"grpo_jax.worlds.{suite}", stand_in)
    config = grpo_jax.preset(env_id)
    for env in (env_id, sb3.WorldVecEnv(env_id, n_envs=config.n_envs)):
        model = sb3.GRPO.from_preset(env)
        assert (model.n_envs, model.n_steps, model.horizon) == (config.n_envs, config.n_steps, config.horizon)
        assert (model.candidates, model.bootstrap) == (config.candidates, config.bootstrap)
