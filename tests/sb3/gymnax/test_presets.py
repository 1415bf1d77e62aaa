"""``GRPO.from_preset``: the SB3 object with a preset's settings."""

import inspect
import math

import jax
import numpy as np
import pytest
from gymnasium import spaces as gymnasium_spaces

import grpo_jax
from grpo_jax import GRPOConfig
from grpo_jax.config import field_names, scheduled
from grpo_jax.policies.networks import CNN
from sb3_bridge import GRPO, CnnPolicy, MlpPolicy, WorldVecEnv
from sb3_bridge.gymnax import presets
from sb3_bridge.settings import config_of

RATES = ("learning_rate", "clip_range", "clip_range_high", "ent_coef", "persistence")
DECAYING = GRPOConfig(
    learning_rate_decay="linear",
    clip_range_decay="cosine",
    clip_range_high=0.3,
    ent_coef=0.1,
    ent_coef_decay="linear",
    persistence=0.9,
    persistence_decay="cosine",
)


def of_the_algorithm(config: GRPOConfig, remaining: float) -> GRPOConfig:
    """A config as the SB3 object has it at a remaining progress: rates of that moment, networks are the policy's."""
    default = GRPOConfig()
    changes = {name: getattr(default, name) for name in presets.POLICY}
    for name in RATES:
        decay = presets.DECAYING[name]
        changes[decay] = "none"
        if (value := getattr(config, name)) is not None:
            changes[name] = float(scheduled(value, getattr(config, decay), 0, 1.0 - remaining))
    return config.replace(**changes)


def assert_same(found: GRPOConfig, expected: GRPOConfig) -> None:
    for name in field_names():
        one, other = getattr(found, name), getattr(expected, name)
        assert one == (pytest.approx(other, abs=1e-7) if isinstance(other, float) else other), name


def test_every_field_is_an_argument_or_known_to_be_missing():
    taken = set(inspect.signature(GRPO).parameters)
    elsewhere = {"n_envs", *presets.DECAYING.values(), *presets.POLICY, *presets.MISSING}
    assert set(field_names()) - elsewhere <= taken
    assert not elsewhere & taken


@pytest.mark.parametrize("env_id", [env_id for env_id in grpo_jax.preset_ids() if "/" not in env_id])
def test_a_model_has_its_presets_settings(env_id, recwarn):
    model = GRPO.from_preset(env_id, seed=0)
    config, world = grpo_jax.preset(env_id), model.env.world
    assert model.chosen_dynamics == "simulator" and not recwarn.list
    for remaining in (1.0, 0.7, 0.2, 0.0):
        model._current_progress_remaining = remaining
        assert_same(config_of(model), of_the_algorithm(config, remaining))
    ours = grpo_jax.make_policy(config, world.observation_space, world.action_space)
    theirs = model.policy.structure
    for part in ("actor", "critic", "features_extractor", "share_features_extractor", "distribution"):
        assert getattr(theirs, part) == getattr(ours, part), part


@pytest.mark.parametrize("remaining", [1.0, 0.6, 0.0])
def test_rates_decay_with_the_remaining_progress(remaining):
    arguments = presets.arguments_of(DECAYING, grpo_jax.make("CartPole-v1").observation_space)
    model = GRPO(env=WorldVecEnv("CartPole-v1", n_envs=DECAYING.n_envs), **arguments)
    model._current_progress_remaining = remaining
    assert_same(config_of(model), of_the_algorithm(DECAYING, remaining))


def test_two_iterations_are_those_of_grpo_jax():
    """From one start and with one key, the SB3 object makes the same numbers: nothing of the preset is lost."""
    settings = {"n_steps": 8, "n_epochs": 2, "horizon": 8}
    config = grpo_jax.preset("CartPole-v1").replace(learning_rate_decay="none", **settings)
    world, key = grpo_jax.make("CartPole-v1"), jax.random.key(3)
    start = jax.jit(grpo_jax.init)(config, world, key)
    model = GRPO.from_preset("CartPole-v1", learning_rate=config.learning_rate, **settings)
    model._last_obs = model.env.reset()
    model.env.move_to(lambda: start.environments)
    model.policy.state = model.policy.state.replace(params=start.params)
    model.key_words = np.asarray(jax.random.key_data(start.key))
    model.learn(2 * config.n_states, reset_num_timesteps=False)  # which would reset the environments
    end, _ = grpo_jax.run(config, world, key, 2 * config.n_states)
    jax.tree.map(
        lambda one, other: np.testing.assert_allclose(
            one, other, atol=1e-5
        ),  # Adam enlarges what two programs round
        model.policy.state.params,
        end.params,
    )
    assert model.simulator_steps == grpo_jax.count(end.simulator_steps)


def test_overrides_replace_settings():
    env = WorldVecEnv("CartPole-v1", n_envs=4)
    model = GRPO.from_preset(
        env, horizon=7, learning_rate=1e-3, policy_kwargs={"net_arch": [8]}, batch_size=64
    )
    config = grpo_jax.preset("CartPole-v1")
    assert model.env is env and model.horizon == 7 and model.learning_rate == 1e-3
    assert model.n_epochs == config.n_epochs
    assert model.policy.structure.actor.widths == (8,)
    assert model.policy.structure.actor.activation == config.activation  # the preset's own arguments stay
    assert isinstance(GRPO.from_preset("gymnax/CartPole-v1").policy, MlpPolicy)


@pytest.mark.parametrize(
    ("env", "error", "message"),
    [
        ("CartPole", ValueError, "CartPole-v1"),
        (7, TypeError, "env=7 must be a gymnax id"),
        (WorldVecEnv(grpo_jax.make("CartPole-v1")), ValueError, "not made from an id"),
    ],
)
def test_what_has_no_preset_is_refused(env, error, message):
    with pytest.raises(error, match=message):
        GRPO.from_preset(env)


def test_an_id_without_a_preset_is_refused(monkeypatch):
    monkeypatch.setattr(grpo_jax, "preset_ids", lambda: ["Pendulum-v1"])
    for env in ("CartPole-v1", WorldVecEnv("CartPole-v1")):
        with pytest.raises(ValueError, match="env='CartPole-v1' has no preset, but Pendulum-v1"):
            GRPO.from_preset(env)


@pytest.mark.parametrize("name", presets.MISSING)
def test_what_the_sb3_object_cannot_have_is_refused(name):
    other = {"max_branches": 8, "n_shards": 2, "normalize_observations": True}.get(name, 0.5)
    config = GRPOConfig().replace(**{name: (lambda rate: None) if name == "optimizer" else other})
    with pytest.raises(ValueError, match=f"{name}=.* has no counterpart"):
        presets.arguments_of(config, grpo_jax.make("CartPole-v1").observation_space)


def test_a_schedule_of_optimizer_steps_is_refused():
    config = GRPOConfig(ent_coef=lambda n_updates: 0.1)
    with pytest.raises(ValueError, match="ent_coef=.* use a number and ent_coef_decay"):
        presets.arguments_of(config, grpo_jax.make("CartPole-v1").observation_space)


@pytest.mark.parametrize(
    "config",
    [
        GRPOConfig(activation="relu"),
        GRPOConfig(bootstrap=True, net_arch=(16,)),
        GRPOConfig(bootstrap=True, critic_net_arch=(8, 4), share_features_extractor=True),
        GRPOConfig(network="mlp", activation="elu", log_std_init=-1.0),
    ],
)
@pytest.mark.parametrize("env_id", ["SpaceInvaders-MinAtar", "Pendulum-v1"])  # 6 channels: no image to SB3
def test_networks_are_those_of_grpo_jax(env_id, config):
    world = grpo_jax.make(env_id)
    arguments = presets.arguments_of(config, world.observation_space)
    model = GRPO(env=WorldVecEnv(env_id, n_envs=config.n_envs), **arguments)
    assert model.policy.structure == grpo_jax.make_policy(config, world.observation_space, world.action_space)
    is_map = env_id.endswith("MinAtar") and config.network == "auto"
    assert isinstance(model.policy, CnnPolicy if is_map else MlpPolicy)


def test_a_model_of_a_preset_comes_back_from_its_file(tmp_path):
    arguments = presets.arguments_of(DECAYING, grpo_jax.make("Breakout-MinAtar").observation_space)
    model = GRPO(env=WorldVecEnv("Breakout-MinAtar", n_envs=16), **arguments)
    model.save(tmp_path / "model")
    again = GRPO.load(tmp_path / "model")
    assert again.policy.structure == model.policy.structure
    for name in ("clip_range", "ent_coef", "persistence", "learning_rate"):
        assert getattr(again, name)(0.3) == getattr(model, name)(0.3) > 0


def test_half_a_cosine():
    schedule = presets.CosineSchedule(2.0)
    assert [schedule(x) for x in (1.0, 0.5, 0.0)] == pytest.approx([2.0, 1.0, 0.0])
    assert schedule(0.25) == pytest.approx(1.0 - math.cos(math.pi / 4))
    assert repr(schedule) == "CosineSchedule(start=2.0)"


def test_cnn_by_name_takes_maps_of_any_number_of_channels():
    space = gymnasium_spaces.Box(0, 1, (10, 10, 7))
    kwargs = {"features_extractor_class": CNN, "features_extractor_kwargs": {"activation": "elu"}}
    policy = CnnPolicy(space, gymnasium_spaces.Discrete(3), lambda _: 1e-3, **kwargs)
    assert policy.structure.features_extractor == CNN("elu")
    with pytest.raises(TypeError, match="activation is not known; CNN takes features_dim"):
        CnnPolicy(
            gymnasium_spaces.Box(0, 255, (36, 36, 3), np.uint8),
            gymnasium_spaces.Discrete(3),
            lambda _: 1e-3,
            features_extractor_kwargs={"activation": "elu"},
        )
