from __future__ import annotations

import jax
import pytest

from grpo_jax import GRPOConfig, env_ids, make, make_policy, preset, preset_ids, preset_timesteps, spaces


def test_there_are_presets_and_they_are_of_gymnax_ids():
    assert {"CartPole-v1", "Pendulum-v1"} <= set(preset_ids()) <= set(env_ids())
    assert len(preset_ids()) == len(set(preset_ids()))


@pytest.mark.parametrize("env_id", preset_ids())
def test_a_preset_fits_its_environment(env_id, key):
    config = preset(env_id)
    assert isinstance(config, GRPOConfig)
    assert config != GRPOConfig()
    assert preset_timesteps(env_id) >= config.n_states
    world = make(env_id)
    policy = make_policy(config, world.observation_space, world.action_space)
    params = jax.eval_shape(policy.init, key).params
    assert ("critic" in params) == config.bootstrap
    if config.candidates == "enumerate":
        assert not isinstance(world.action_space, spaces.Box)


def test_without_a_preset_there_are_the_defaults():
    assert preset("NoSuchWorld-v0") == GRPOConfig()
    assert preset_timesteps("NoSuchWorld-v0") == 100_000


def test_a_preset_does_not_remember_what_was_made_of_it():
    changed = preset("CartPole-v1").replace(horizon=3)
    assert preset("CartPole-v1").horizon != changed.horizon
