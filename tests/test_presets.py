from __future__ import annotations

import math

import jax
import pytest

from grpo_jax import (
    Expectation,
    GRPOConfig,
    env_ids,
    make,
    make_policy,
    preset,
    preset_expectation,
    preset_ids,
    preset_timesteps,
    presets,
    spaces,
)

OF_GYMNAX = [env_id for env_id in preset_ids() if "/" not in env_id]
"""Those of other suites: worlds/test_suite_presets.py."""


def test_there_are_presets_and_they_are_of_ids_that_there_are():
    assert {"CartPole-v1", "Pendulum-v1"} <= set(OF_GYMNAX) <= set(env_ids())
    assert len(preset_ids()) == len(set(preset_ids()))


@pytest.mark.parametrize("env_id", OF_GYMNAX)
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


@pytest.mark.parametrize(
    ("env_id", "near"),
    [
        ("cartpole", "CartPole-v1"),
        ("CartPole", "CartPole-v1"),
        ("CartPole-v0", "CartPole-v1"),
        ("breakout", "Breakout-MinAtar"),
        ("gymnax/Pendulum-v1", "Pendulum-v1"),
        ("LunarLander-v3", ""),
        ("connect_four", "pgx/connect_four"),
        ("navix/Navix-DoorKey-6x6-v0", "navix/Navix-DoorKey-5x5-v0"),
        ("", ""),
        (None, ""),
    ],
)
def test_an_id_without_a_preset_is_an_error_that_names_near_ones(env_id, near):
    for function in (preset, preset_timesteps):
        with pytest.raises(ValueError, match=r"env_id=.* has no preset; did you mean .*GRPOConfig") as error:
            function(env_id)
        assert near in str(error.value).split("did you mean")[1].split(",")[0]


def test_a_preset_does_not_remember_what_was_made_of_it():
    changed = preset("CartPole-v1").replace(horizon=3)
    assert preset("CartPole-v1").horizon != changed.horizon


@pytest.mark.parametrize("env_id", preset_ids())
def test_a_preset_says_both_or_none_of_what_to_expect(env_id):
    entry = presets._table()[env_id]
    assert ("expected_return" in entry) == ("expected_seconds" in entry)
    expected = preset_expectation(env_id)
    assert expected is None or (math.isfinite(expected.episode_return) and expected.seconds > 0)


def test_what_to_expect_is_no_setting(monkeypatch):
    entry = {"total_timesteps": 512, "expected_return": 9, "expected_seconds": 0.25, "horizon": 3}
    monkeypatch.setattr(presets, "_table", lambda: {"CartPole-v1": entry, "Catch-bsuite": {"horizon": 2}})
    assert preset("CartPole-v1") == GRPOConfig(horizon=3)
    assert preset_expectation("CartPole-v1") == Expectation(episode_return=9.0, seconds=0.25)
    assert preset_expectation("Catch-bsuite") is None and preset_expectation("NoSuchWorld-v0") is None
