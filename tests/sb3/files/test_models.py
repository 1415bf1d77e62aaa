"""Saved models: what comes back, what may be given instead, and that learning goes on; PPO is the oracle."""

from __future__ import annotations

import copy
import io
import json
import pathlib
import re
import zipfile

import flax.linen as nn
import gymnasium
import jax
import numpy as np
import optax
import pytest
import torch
from sb3.files.checks import edited
from sb3.files.models import (
    KINDS,
    N_ENVS,
    OBSERVATIONS,
    ROLLOUT,
    assert_equal_parameters,
    assert_equal_state,
    differ,
    make,
    make_env,
    raised,
    saved,
)
from stable_baselines3 import PPO
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.save_util import load_from_zip_file
from stable_baselines3.common.utils import FloatSchedule
from stable_baselines3.common.vec_env import DummyVecEnv

from sb3_bridge import GRPO, MlpPolicy
from sb3_bridge.files.model_zip import load_zip


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("form", [str, pathlib.Path, io.BytesIO])
def test_a_loaded_model_is_the_saved_one_to_the_last_bit(kind, form, trained, tmp_path, no_pickle):
    model = trained[kind]
    if form is io.BytesIO:
        path = saved(model)
    else:
        path = form(tmp_path / "model")
        model.save(path)
        assert [file.name for file in tmp_path.iterdir()] == ["model.zip"]
    loaded = GRPO.load(path)
    assert_equal_state(loaded, model)
    np.testing.assert_array_equal(
        loaded.predict(OBSERVATIONS, deterministic=True)[0],
        model.predict(OBSERVATIONS, deterministic=True)[0],
    )
    tensors = torch.as_tensor(OBSERVATIONS)
    logits, expected = (m.policy.get_distribution(tensors).distribution.logits for m in (loaded, model))
    torch.testing.assert_close(logits, expected, rtol=0, atol=0)
    again = GRPO.load(path if form is not io.BytesIO else saved(model))
    np.testing.assert_array_equal(loaded.predict(OBSERVATIONS)[0], again.predict(OBSERVATIONS)[0])


@pytest.mark.parametrize("kind", KINDS)
def test_attributes_survive(kind, trained):
    model = trained[kind]
    loaded, file = GRPO.load(saved(model)), saved(model)
    names = json.loads(zipfile.ZipFile(file).read("data")).keys() - {
        "policy_class",
        "n_envs",
        "_environments",
    }
    assert len(names) > 40
    for name in names:
        expected, got = getattr(model, name), getattr(loaded, name)
        if isinstance(expected, FloatSchedule):
            assert type(got) is FloatSchedule and got(0.5) == expected(0.5), name
        else:
            np.testing.assert_equal(got, expected, err_msg=name)
    assert loaded.env is None


def test_a_missing_file_is_ppos_error(tmp_path):
    assert raised(lambda: GRPO.load(tmp_path / "no")) is raised(lambda: PPO.load(tmp_path / "no"))


def test_sb3_reads_the_file(trained, tmp_path):
    model = trained["host"]
    model.save(tmp_path / "model")
    data, params, variables = load_from_zip_file(tmp_path / "model")
    assert (params, variables) == ({}, None)
    assert data["policy_class"] is MlpPolicy
    assert data["num_timesteps"] == 2 * ROLLOUT
    assert data["observation_space"] == model.observation_space
    assert data["policy_kwargs"] == {"net_arch": [8]}
    assert data["clip_range"](1.0) == 0.2
    np.testing.assert_array_equal(data["key_words"], model.key_words)


def test_the_file_holds_what_ppos_does(trained, ppo, tmp_path):
    """Attributes by PPO's names, but for what is made from others and for PPO's buffer."""
    ours, theirs = (load_from_zip_file(saved(model))[0] for model in (trained["host"], ppo))
    missing = theirs.keys() - ours.keys()
    assert missing <= {"lr_schedule", "rollout_buffer_class"}
    assert not {"env", "device", "policy", "rollout_buffer", "_logger"} & ours.keys()


@pytest.mark.parametrize("kind", KINDS)
def test_no_device_is_named_in_the_file(kind, trained):
    """A file that is written beside a GPU is plain numbers, and loads without one."""
    model = make(kind)
    model.device = torch.device("cuda")
    file = saved(model)
    with zipfile.ZipFile(file) as archive:
        content = archive.read("data").decode()
    assert "cuda" not in content
    assert '"device"' not in content
    _, params = load_zip(saved(model))
    assert {type(leaf) for leaf in jax.tree.leaves(params)} == {np.ndarray}
    assert GRPO.load(saved(model)).device == torch.device("cpu")


def test_exclude_and_include_are_ppos(trained, ppo):
    for model in (trained["host"], ppo):
        names = json.loads(zipfile.ZipFile(saved(model, exclude=["gamma", "seed"])).read("data")).keys()
        assert not {"gamma", "seed", "policy", "env"} & names
        names = json.loads(zipfile.ZipFile(saved(model, include=["env", "policy"])).read("data")).keys()
        assert "env" in names
        assert "policy" not in names
    # What was left out has its default.
    changed = make("host", gamma=0.5)
    assert GRPO.load(saved(changed)).gamma == 0.5
    assert GRPO.load(saved(changed, exclude=["gamma"])).gamma == 0.99
    with pytest.warns(UserWarning, match="left out env, stored as a pickle"):
        assert GRPO.load(saved(changed, include=["env"])).env is None
    assert isinstance(GRPO.load(saved(changed, include=["env"]), allow_pickle=True).env, DummyVecEnv)
    file = saved(changed, exclude=["policy_kwargs", "n_envs"])
    loaded = GRPO.load(file, env=make_env("host"), policy_kwargs={"net_arch": [8]})
    assert_equal_parameters(loaded, changed)
    assert raised(lambda: GRPO.load(saved(changed, exclude=["action_space"]))) is raised(
        lambda: PPO.load(saved(ppo, exclude=["action_space"]))
    )


@pytest.mark.parametrize("device", ["auto", "cpu", "cuda", torch.device("cpu")])
def test_devices_are_ppos(device, trained, ppo):
    loaded, theirs = GRPO.load(saved(trained["host"]), device=device), PPO.load(saved(ppo), device=device)
    assert loaded.device == theirs.device
    assert loaded.policy.device == theirs.policy.device
    assert_equal_parameters(loaded, trained["host"])


def test_keyword_arguments_and_custom_objects_replace_attributes(trained, ppo):
    for model in (trained["host"], ppo):
        loaded = type(model).load(
            saved(model),
            custom_objects={"gamma": 0.5, "n_epochs": 7, "learning_rate": 0.1},
            n_epochs=3,
            clip_range=0.4,
            verbose=0,
        )
        assert (loaded.gamma, loaded.n_epochs, loaded.learning_rate) == (0.5, 3, 0.1)
        assert loaded.lr_schedule(1.0) == 0.1
        assert loaded.clip_range(1.0) == 0.4


def test_rl_zoos_custom_objects(trained, ppo):
    """What ``rl_zoo3.enjoy`` passes: schedules that stand for none."""
    objects = {"learning_rate": 0.0, "lr_schedule": lambda _: 0.0, "clip_range": lambda _: 0.0}
    for kind, model in (("host", trained["host"]), ("device", trained["device"]), ("host", ppo)):
        loaded = type(model).load(
            saved(model),
            env=make_env(kind, 1),
            custom_objects=objects,
            device="cpu",
            seed=3,
            tensorboard_log=None,
        )
        assert (loaded.lr_schedule(1.0), loaded.clip_range(1.0), loaded.seed, loaded.n_envs) == (
            0.0,
            0.0,
            3,
            1,
        )
        np.testing.assert_array_equal(
            loaded.predict(OBSERVATIONS, deterministic=True)[0],
            model.predict(OBSERVATIONS, deterministic=True)[0],
        )


def test_other_policy_arguments_are_ppos_error(trained, ppo):
    for model in (trained["host"], ppo):
        load = type(model).load
        assert load(saved(model), policy_kwargs={"net_arch": [8]}).policy_kwargs == {"net_arch": [8]}
        with pytest.raises(ValueError, match="policy kwargs do not equal the stored policy kwargs"):
            load(saved(model), policy_kwargs={"net_arch": [9]})


@pytest.mark.parametrize("env_id", ["Acrobot-v1", "Pendulum-v1"])
def test_other_spaces_are_ppos_error(env_id, trained, ppo):
    for model in (trained["host"], trained["device"], ppo):
        with pytest.raises(ValueError, match="spaces do not match"):
            type(model).load(saved(model), env=gymnasium.make(env_id))
        with pytest.raises(ValueError, match="spaces do not match"):
            type(model).load(saved(model)).set_env(make_vec_env(env_id, N_ENVS))


def test_a_new_seed_starts_a_new_stream(trained):
    file = saved(trained["host"])
    kept, same, other = (GRPO.load(copy.copy(file), **given) for given in ({}, {"seed": 0}, {"seed": 1}))
    fresh = make("host")
    np.testing.assert_array_equal(kept.key_words, trained["host"].key_words)
    np.testing.assert_array_equal(same.key_words, fresh.key_words)
    assert np.any(other.key_words != same.key_words)
    assert not np.array_equal(other.predict(OBSERVATIONS)[0], same.predict(OBSERVATIONS)[0])


class OwnPolicy(MlpPolicy):
    """A policy of a user's module."""


class OwnGRPO(GRPO):
    """An algorithm of a user's module."""


def test_subclasses_load_as_themselves(trained):
    model = make("host", cls=OwnGRPO)
    loaded = OwnGRPO.load(saved(model))
    assert type(loaded) is OwnGRPO
    assert_equal_parameters(loaded, model)
    assert type(OwnGRPO.load(saved(trained["host"]))) is OwnGRPO


def test_a_policy_class_of_the_users_is_passed(tmp_path):
    model = make("host", policy=OwnPolicy)
    model.save(tmp_path / "model")
    with (
        pytest.warns(UserWarning, match="left out policy_class"),
        pytest.raises(KeyError, match=r"custom_objects=\{'policy_class': \.\.\.\}"),
    ):
        GRPO.load(tmp_path / "model")
    for loaded in (
        GRPO.load(tmp_path / "model", custom_objects={"policy_class": OwnPolicy}),
        GRPO.load(tmp_path / "model", allow_pickle=True),
    ):
        assert type(loaded.policy).__name__ == "OwnPolicy"
        assert_equal_parameters(loaded, model)


POLICY_KWARGS = {
    "optimizer": {"optimizer_class": optax.adamw, "optimizer_kwargs": {"weight_decay": 0.1}},
    "flax": {"activation_fn": nn.relu},
    "torch": {"activation_fn": torch.nn.ReLU, "ortho_init": False},
    "extractor": {"features_extractor_class": nn.Dense, "features_extractor_kwargs": {"features": 5}},
    "dict": {"net_arch": {"pi": [4], "vf": [5, 3]}, "share_features_extractor": False},
}


@pytest.mark.parametrize("name", POLICY_KWARGS)
def test_policy_arguments_come_back_without_a_pickle(name, no_pickle):
    arguments = {"net_arch": [8], **POLICY_KWARGS[name]}
    model = make("host", policy_kwargs=arguments)
    if name == "optimizer":
        model.learn(ROLLOUT)
    loaded = GRPO.load(saved(model), env=model.get_env(), force_reset=False)
    assert loaded.policy_kwargs == model.policy_kwargs == arguments
    assert loaded.policy.structure == model.policy.structure
    assert_equal_state(loaded, model)
    np.testing.assert_array_equal(
        loaded.predict(OBSERVATIONS, deterministic=True)[0],
        model.predict(OBSERVATIONS, deterministic=True)[0],
    )
    if name == "optimizer":  # which goes on, too
        for one in (model, loaded):
            one.get_env().seed(1)
            one.learn(ROLLOUT)
        assert_equal_parameters(loaded, model)


@pytest.fixture(scope="module")
def with_functions():
    """A model with a reward function and a schedule of the user, and its file."""
    model = make(
        "host",
        learning_rate=lambda progress: 1e-3 * progress,
        reward_function=lambda state, action, next_state: 1.0 - 2.0 * abs(next_state[2]),
    )
    return model, saved(model).getvalue()


def test_pickles_are_read_when_asked(with_functions):
    model, content = with_functions
    loaded = GRPO.load(io.BytesIO(content), env=make_env("host"), allow_pickle=True)
    assert loaded.lr_schedule(0.5) == 5e-4
    assert loaded.reward_function(None, None, np.array([0, 0, 0.25, 0])) == 0.5
    functions = {"learning_rate": model.learning_rate, "reward_function": model.reward_function}
    given = GRPO.load(io.BytesIO(content), env=make_env("host"), custom_objects=functions)
    by_name = GRPO.load(io.BytesIO(content), env=make_env("host"), **functions)
    without = GRPO.load(io.BytesIO(content), env=make_env("host"), **{**functions, "reward_function": None})
    for one in (loaded, given, by_name, without):
        one.learn(2 * ROLLOUT)
    assert_equal_state(given, by_name)
    assert_equal_state(given, loaded)
    assert differ(given, without)


def tampered(content, change):
    """The file with another ``data`` entry."""
    attributes = json.loads(zipfile.ZipFile(io.BytesIO(content)).read("data"))
    change(attributes)
    return edited(content, data=json.dumps(attributes))


def test_a_class_that_is_no_policy_is_refused(trained):
    content = saved(trained["host"]).getvalue()

    def point_elsewhere(attributes):
        attributes["policy_class"] = {
            ":plain:": {":kind:": "reference", "module": "flax.linen", "name": "Dense"},
            ":serialized:": "",
        }

    with pytest.raises(TypeError, match="policy="):
        GRPO.load(tampered(content, point_elsewhere))


def test_parameters_of_another_shape_are_ppos_error(trained, ppo):
    """A file whose attributes do not fit its parameters."""

    def widen(attributes):
        attributes["policy_kwargs"] = {"net_arch": [9]}

    for model in (trained["host"], ppo):
        with pytest.raises(RuntimeError):
            type(model).load(tampered(saved(model).getvalue(), widen))


def test_system_info_is_printed_as_by_ppo(trained, ppo, capsys):
    GRPO.load(saved(trained["host"]), print_system_info=True)
    ours = capsys.readouterr().out
    PPO.load(saved(ppo), print_system_info=True)
    theirs = capsys.readouterr().out
    titles = re.findall("==.*==", theirs)
    assert titles == ["== CURRENT SYSTEM INFO ==", "== SAVED MODEL SYSTEM INFO =="]
    assert re.findall("==.*==", ours) == titles
    assert ours.count("- Stable-Baselines3: ") == theirs.count("- Stable-Baselines3: ") == 2
    GRPO.load(saved(trained["host"]))
    assert capsys.readouterr().out == ""


def test_what_is_no_custom_objects_is_refused(trained):
    with pytest.raises(ValueError, match="custom_objects"):
        GRPO.load(saved(trained["host"]), custom_objects=[("gamma", 1)])


def test_one_warning_names_what_is_left_out(with_functions, no_pickle):
    model, content = with_functions
    with pytest.warns(UserWarning, match="left out") as record:
        loaded = GRPO.load(io.BytesIO(content), env=make_env("host"))
    assert len(record) == 1
    message = str(record[0].message)
    assert "left out learning_rate, reward_function, stored as a pickle" in message
    assert "custom_objects={'learning_rate': ..., 'reward_function': ...}" in message
    assert "allow_pickle=True" in message
    assert_equal_parameters(loaded, model)
    np.testing.assert_array_equal(
        loaded.predict(OBSERVATIONS, deterministic=True)[0],
        model.predict(OBSERVATIONS, deterministic=True)[0],
    )
    assert (loaded.learning_rate, loaded.reward_function) == (3e-4, None)
