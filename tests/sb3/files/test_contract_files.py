"""The contract of SB3 for files, parameters and ``predict``; SB3's PPO, treated alike, is the oracle."""

from __future__ import annotations

import base64
import copy
import functools
import io
import json
import pathlib
import pickle
import re
import zipfile

import cloudpickle
import flax.linen as nn
import gymnasium
import jax
import numpy as np
import optax
import pytest
import torch
from gymnasium import spaces
from stable_baselines3 import A2C, PPO
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.evaluation import evaluate_policy
from stable_baselines3.common.save_util import load_from_zip_file
from stable_baselines3.common.utils import FloatSchedule, LinearSchedule
from stable_baselines3.common.vec_env import DummyVecEnv
from toys import Line

import grpo_jax
from grpo_jax import spaces as own_spaces
from sb3_bridge import GRPO, GymnaxVecEnv, MlpPolicy
from sb3_bridge.files import model_zip as serialization

pytestmark = pytest.mark.usefixtures("quick_compiles")

SETTINGS = {"n_steps": 8, "batch_size": 8, "n_epochs": 2, "seed": 0, "policy_kwargs": {"net_arch": [8]}}
KINDS = ("host", "device")
N_ENVS = 2
ROLLOUT = N_ENVS * SETTINGS["n_steps"]
OBSERVATIONS = np.random.default_rng(0).uniform(-0.2, 0.2, (16, 4)).astype(np.float32)


class Lane(gymnasium.Env):
    """Eight steps to the left or right from 0. Its state is known from the number of steps: 0 behind every eighth."""

    observation_space = spaces.Box(-8, 8, (2,), np.float32)
    action_space = spaces.Discrete(2)

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.where = np.zeros(2, np.float32)
        return self.where.copy(), {}

    def step(self, action):
        self.where += np.array([2.0 * action - 1.0, 1.0], np.float32)
        return self.where.copy(), float(self.where[0]), False, bool(self.where[1] >= 8), {}


class Anything(gymnasium.Env):
    """Observations drawn from any space, an action space of any kind."""

    def __init__(self, observation_space, action_space):
        self.observation_space, self.action_space = observation_space, action_space

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        return self.observation_space.sample(), {}

    def step(self, action):
        return self.observation_space.sample(), 0.0, False, False, {}


class OwnPolicy(MlpPolicy):
    """A policy of a user's module."""


class OwnGRPO(GRPO):
    """An algorithm of a user's module."""


def upright(state, action, next_state):
    """A reward whose spread is seen within few steps."""
    return 1.0 - abs(next_state[2])


def make_env(kind, n_envs=N_ENVS):
    if kind == "host":
        return make_vec_env("CartPole-v1", n_envs)
    return GymnaxVecEnv(grpo_jax.make("CartPole-v1", reward_function=upright), n_envs)


def make_lane(kind, n_envs=N_ENVS):
    """Environments that stand at a reset behind every rollout, and whose reset is always the same."""
    if kind == "host":
        return make_vec_env(Lane, n_envs)
    return GymnaxVecEnv(Line(action_space=own_spaces.Discrete(2), goal=100, limit=8), n_envs)


def make(kind, env=None, cls=GRPO, **changes):
    if kind == "device":
        changes = {"horizon": 4, **changes}
    policy = changes.pop("policy", "MlpPolicy")
    return cls(policy, make_env(kind) if env is None else env, **{**SETTINGS, **changes})


def make_ppo(env=None, **changes):
    return PPO("MlpPolicy", make_env("host") if env is None else env, **{**SETTINGS, **changes})


def saved(model, **changes):
    """The model's file, at its beginning."""
    file = io.BytesIO()
    model.save(file, **changes)
    file.seek(0)
    return file


def parameters_of(model):
    return {
        f"{owner}/{name}": np.asarray(leaf)
        for owner, entry in model.get_parameters().items()
        for name, leaf in entry.items()
    }


def assert_equal_parameters(one, other):
    jax.tree.map(np.testing.assert_array_equal, parameters_of(one), parameters_of(other))


def differ(one, other):
    pairs = zip(parameters_of(one).values(), parameters_of(other).values(), strict=True)
    return any(np.any(left != right) for left, right in pairs)


COUNTERS = (
    "num_timesteps",
    "_n_updates",
    "simulator_steps",
    "_n_iterations",
    "_n_optimizer_steps",
    "_episode_num",
)


def assert_equal_state(one, other):
    """Everything that training goes on from."""
    assert_equal_parameters(one, other)
    assert {name: getattr(one, name) for name in COUNTERS} == {
        name: getattr(other, name) for name in COUNTERS
    }
    np.testing.assert_array_equal(one.key_words, other.key_words)
    jax.tree.map(np.testing.assert_array_equal, one._reference, other._reference)
    np.testing.assert_array_equal(one.episode_time, other.episode_time)
    assert episodes_of(one) == episodes_of(other)


def episodes_of(model):
    return [(episode["r"], episode["l"]) for episode in model.ep_info_buffer or ()]


def raised(function):
    """The type of the error that a call ends with."""
    try:
        function()
    except Exception as error:
        return type(error)
    raise AssertionError("no error was raised")


@pytest.fixture(scope="module")
def trained():
    """A model of each kind, trained for two rollouts. Tests do not change them."""
    return {kind: make(kind).learn(2 * ROLLOUT) for kind in KINDS}


@pytest.fixture(scope="module")
def ppo():
    """PPO, trained alike."""
    return make_ppo().learn(2 * ROLLOUT)


@pytest.fixture
def no_pickle(monkeypatch):
    """Whatever unpickles fails."""

    def refuse(*_args, **_kwargs):
        raise AssertionError("something was unpickled")

    for module in (pickle, cloudpickle):
        for name in ("load", "loads"):
            monkeypatch.setattr(module, name, refuse)
    monkeypatch.setattr(pickle, "Unpickler", refuse)


# Saving and loading


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
    loaded = GRPO.load(saved(model))
    expected, got = vars(model), vars(loaded)
    assert expected.keys() - got.keys() == {"_logger"}  # which learn makes
    # What is made anew, as in SB3, or stands for itself.
    others = {
        "policy",
        "env",
        "_logger",
        "_reward",
        "_alternatives",
        "_trajectory",
        "_last_obs",
        "_last_episode_starts",
        "key_words",
        "episode_time",
    }
    spaces_ = {"observation_space", "action_space"}
    for name in expected.keys() - others - spaces_ - {"lr_schedule", "clip_range"}:
        assert got[name] == expected[name], name
    for name in ("_last_obs", "_last_episode_starts", "key_words", "episode_time"):
        np.testing.assert_array_equal(got[name], expected[name])
    for name in spaces_:
        assert got[name] == expected[name]
    for name in ("lr_schedule", "clip_range"):
        assert type(got[name]) is FloatSchedule
        assert got[name](0.5) == expected[name](0.5)
    assert loaded.env is None


@pytest.mark.parametrize("name", ["model", "model.zip", "model.v1", "folder/model"])
def test_names_of_files_are_ppos(name, trained, ppo, tmp_path):
    names = {}
    for owner, model in {"grpo": trained["host"], "ppo": ppo}.items():
        folder = tmp_path / owner
        folder.mkdir()
        if "/" in name:
            with pytest.warns(UserWarning, match="does not exist"):
                model.save(folder / name)
        else:
            model.save(folder / name)
        names[owner] = sorted(str(path.relative_to(folder)) for path in folder.rglob("*"))
        assert type(model).load(folder / name).num_timesteps == 2 * ROLLOUT
    assert names["grpo"] == names["ppo"]


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
    model.device = model.policy._device = torch.device("cuda")
    file = saved(model)
    with zipfile.ZipFile(file) as archive:
        content = archive.read("data").decode()
    assert "cuda" not in content
    assert '"device"' not in content
    _, params = serialization.load_zip(saved(model))
    assert {type(leaf) for leaf in jax.tree.leaves(params)} == {np.ndarray}
    assert GRPO.load(saved(model)).device == torch.device("cpu")


def test_a_failed_save_leaves_the_old_file(trained, monkeypatch, tmp_path):
    path = tmp_path / "model.zip"
    trained["host"].save(path)
    before = path.read_bytes()

    def fail(*_args, **_kwargs):
        raise OSError("the disk is full")

    other = make("host", seed=1)
    for target, name in ((serialization, "_system_info"), (serialization.os, "replace")):
        with monkeypatch.context() as patch:
            patch.setattr(target, name, fail)
            with pytest.raises(OSError, match="disk is full"):
                other.save(path)
        assert path.read_bytes() == before
    other.save(path)
    assert_equal_parameters(GRPO.load(path), other)


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


def test_files_of_other_algorithms_are_refused(ppo, trained):
    for algorithm, name in ((ppo, "PPO"), (A2C("MlpPolicy", make_env("host")), "A2C")):
        with pytest.raises(ValueError, match=f"load it with stable_baselines3.{name}"):
            GRPO.load(saved(algorithm))
        with pytest.raises(ValueError, match=f"load it with stable_baselines3.{name}"):
            trained["host"].set_parameters(saved(algorithm))


@pytest.mark.parametrize("device", ["auto", "cpu", "cuda", torch.device("cpu")])
def test_devices_are_ppos(device, trained, ppo):
    loaded, theirs = GRPO.load(saved(trained["host"]), device=device), PPO.load(saved(ppo), device=device)
    assert loaded.device == theirs.device
    assert loaded.policy.device == theirs.policy.device
    assert_equal_parameters(loaded, trained["host"])


# What is given to load


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


def test_what_is_no_custom_objects_is_refused(trained):
    with pytest.raises(ValueError, match="custom_objects"):
        GRPO.load(saved(trained["host"]), custom_objects=[("gamma", 1)])


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


# Learning goes on


@pytest.mark.parametrize("kind", KINDS)
def test_learning_goes_on_in_the_same_environments(kind, tmp_path):
    """The environments' state is not in the file: with ``force_reset=False`` they stand where they stood."""
    whole = make(kind).learn(2 * ROLLOUT).learn(2 * ROLLOUT, reset_num_timesteps=False)
    at_once = make(kind).learn(4 * ROLLOUT)
    half = make(kind).learn(2 * ROLLOUT)
    half.save(tmp_path / "half")
    loaded = GRPO.load(tmp_path / "half", env=half.get_env(), force_reset=False)
    assert_equal_state(loaded, half)
    loaded.learn(2 * ROLLOUT, reset_num_timesteps=False)
    assert_equal_state(loaded, whole)
    assert_equal_state(loaded, at_once)
    assert differ(loaded, half)
    assert len(loaded.ep_info_buffer) > 0
    assert loaded.simulator_steps == whole.simulator_steps > half.simulator_steps > 0


class SaveAt(BaseCallback):
    """Saves before the given rollout."""

    def __init__(self, path, iteration):
        super().__init__()
        self.path, self.iteration = path, iteration

    def _on_rollout_start(self):
        if self.model._n_iterations == self.iteration:
            self.model.save(self.path)

    def _on_step(self):
        return True


@pytest.mark.parametrize("kind", KINDS)
def test_learning_goes_on_in_the_middle_of_a_schedule(kind, tmp_path, no_pickle):
    """In new environments, which stand at their (only) first state as the old ones did when the file was written."""
    model = make(
        kind,
        make_lane(kind),
        learning_rate=LinearSchedule(1e-2, 1e-4, 1.0),
        clip_range=LinearSchedule(0.3, 0.1, 1.0),
        kl_coef=0.1,
        reference="ema",
        reference_decay=0.5,
    )
    model.learn(4 * ROLLOUT, callback=SaveAt(tmp_path / "half", 2))
    loaded = GRPO.load(tmp_path / "half", env=make_lane(kind))
    assert (loaded.num_timesteps, loaded._n_updates, loaded._n_iterations) == (2 * ROLLOUT, 4, 2)
    assert differ(loaded, model)
    assert np.any(jax.tree.leaves(loaded._reference)[0] != jax.tree.leaves(loaded.policy.state)[0])
    loaded.learn(2 * ROLLOUT, reset_num_timesteps=False)
    assert_equal_state(loaded, model)
    assert loaded.policy.optimizer.param_groups[0]["lr"] == model.policy.optimizer.param_groups[0]["lr"]
    assert loaded.policy.optimizer.param_groups[0]["lr"] == pytest.approx(1e-4)


@pytest.mark.parametrize("kind", KINDS)
def test_counters_are_ppos(kind, trained, ppo):
    models = (trained[kind], ppo)
    for again, model in zip((False, True), models, strict=True):
        loaded = type(model).load(saved(model), env=make_env("host" if again else kind))
        loaded.learn(ROLLOUT, reset_num_timesteps=False)
        assert (loaded.num_timesteps, loaded._n_updates) == (3 * ROLLOUT, 6)
        loaded.learn(ROLLOUT)
        assert (loaded.num_timesteps, loaded._n_updates) == (ROLLOUT, 8)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("force_reset", [True, False])
def test_the_number_of_environments_may_change(kind, force_reset, trained):
    n_envs = 4
    loaded = GRPO.load(saved(trained[kind]), env=make_env(kind, n_envs), force_reset=force_reset)
    assert (loaded.n_envs, loaded._last_obs) == (n_envs, None)
    loaded.learn(8 * n_envs, reset_num_timesteps=False)
    assert loaded.num_timesteps == 2 * ROLLOUT + 8 * n_envs
    assert loaded._last_obs.shape == (n_envs, 4)
    assert np.all(loaded.episode_time <= 8)


@pytest.mark.parametrize("kind", KINDS)
def test_an_environment_may_come_later(kind, trained, ppo):
    for model in (trained[kind], ppo):
        loaded = type(model).load(saved(model))
        with pytest.raises((ValueError, AssertionError)):
            loaded.learn(ROLLOUT, reset_num_timesteps=False)
        with pytest.raises(AssertionError, match="different from the number of environments"):
            loaded.set_env(make_env(kind if model is not ppo else "host", 3))
        loaded.set_env(make_env(kind if model is not ppo else "host"))
        assert loaded._last_obs is None
        loaded.learn(ROLLOUT, reset_num_timesteps=False)
        assert loaded.num_timesteps == 3 * ROLLOUT
    at_once = GRPO.load(saved(trained[kind]), env=make_env(kind))
    later = GRPO.load(saved(trained[kind]))
    later.set_env(make_env(kind))
    later.env.seed(0)  # as load does
    for loaded in (at_once, later):
        loaded.learn(ROLLOUT, reset_num_timesteps=False)
    assert_equal_state(at_once, later)


def test_a_model_may_change_its_path(trained):
    """What was trained in the simulator learns on from a gym env, and the other way round."""
    model = trained["device"]
    on_host = GRPO.load(saved(model), env=make_env("host"))  # warns of nothing: the constructor does
    assert_equal_parameters(on_host, model)
    assert on_host.bootstrap is False
    assert on_host.chosen_dynamics == "clone"
    on_host.learn(ROLLOUT, reset_num_timesteps=False)
    # Two actions of each state; four steps each, fewer where a branch ends.
    assert 0 < on_host.simulator_steps - model.simulator_steps <= ROLLOUT * 2 * 4
    assert differ(on_host, model)

    for given in ({}, {"candidates": "episodes"}):
        model = trained["host"] if not given else make("host", **given).learn(2 * ROLLOUT)
        on_device = GRPO.load(saved(model), env=make_env("device"), horizon=4, candidates="auto")
        assert_equal_parameters(on_device, model)
        assert on_device.bootstrap is True
        on_device.learn(ROLLOUT, reset_num_timesteps=False)
        assert 0 < on_device.simulator_steps - model.simulator_steps <= ROLLOUT * 2 * 4
        assert differ(on_device, model)


def test_the_reference_is_the_policy_that_was_loaded(trained):
    """Who loads a model and adds ``kl_coef`` stays near that model, not near a random policy."""
    model = trained["host"]
    added = GRPO.load(saved(model), env=make_env("host"), kl_coef=0.1)
    added.learn(ROLLOUT, reset_num_timesteps=False)
    jax.tree.map(np.testing.assert_array_equal, added._reference, model.policy.state)
    fresh = make("host", kl_coef=0.1, seed=5)
    fresh.set_parameters(model.get_parameters())
    fresh.learn(ROLLOUT)
    jax.tree.map(np.testing.assert_array_equal, fresh._reference, model.policy.state)
    # A fixed one stays, in files too.
    again = GRPO.load(saved(added), env=make_env("host"))
    again.learn(ROLLOUT, reset_num_timesteps=False)
    jax.tree.map(np.testing.assert_array_equal, again._reference, model.policy.state)
    without = GRPO.load(saved(added), env=make_env("host"), kl_coef=None)
    assert without.learn(ROLLOUT, reset_num_timesteps=False)._reference is None


# Pickles


@pytest.fixture(scope="module")
def with_functions():
    """A model with a reward function and a schedule of the user, and its file."""
    model = make(
        "host",
        learning_rate=lambda progress: 1e-3 * progress,
        reward_function=lambda state, action, next_state: 1.0 - 2.0 * abs(next_state[2]),
    )
    return model, saved(model).getvalue()


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
    result = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(content)) as old, zipfile.ZipFile(result, "w") as new:
        for name in old.namelist():
            entry = old.read(name)
            if name == "data":
                attributes = json.loads(entry)
                change(attributes)
                entry = json.dumps(attributes).encode()
            new.writestr(name, entry)
    result.seek(0)
    return result


class Bomb:
    """Runs a function when it is unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return pathlib.Path.touch, (self.path,)


def test_a_pickle_that_was_put_into_a_file_does_not_run(trained, tmp_path):
    content = saved(trained["host"]).getvalue()
    bomb = base64.b64encode(pickle.dumps(Bomb(tmp_path / "ran"))).decode()

    def plant(attributes):
        for entry in attributes.values():
            if isinstance(entry, dict) and ":type:" in entry:
                entry[":serialized:"] = bomb
        attributes["anything"] = {":type:": "x", ":serialized:": bomb}

    with pytest.warns(UserWarning, match="left out anything, stored as a pickle"):
        loaded = GRPO.load(tampered(content, plant))
    assert_equal_parameters(loaded, trained["host"])
    assert not (tmp_path / "ran").exists()
    # The bomb is one: SB3, or who asks for it, runs it.
    GRPO.load(tampered(content, plant), allow_pickle=True)
    assert (tmp_path / "ran").exists()


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


# Classes


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


# Parameters


def test_parameters_are_copies(trained):
    model = trained["host"]
    before = parameters_of(model)
    for entry in model.get_parameters().values():
        for tensor in entry.values():
            tensor += 1
    jax.tree.map(np.testing.assert_array_equal, parameters_of(model), before)
    assert {type(tensor) for tensor in model.get_parameters()["policy"].values()} == {torch.Tensor}


def test_parameters_are_taken_over(trained, ppo):
    for model, fresh in ((trained["host"], make("host", seed=1)), (ppo, make_ppo(seed=1))):
        assert (
            fresh.get_parameters().keys() == model.get_parameters().keys() == {"policy", "policy.optimizer"}
        )
        before = fresh.predict(OBSERVATIONS, deterministic=True)[0]
        fresh.set_parameters(model.get_parameters())
        after = fresh.predict(OBSERVATIONS, deterministic=True)[0]
        np.testing.assert_array_equal(after, model.predict(OBSERVATIONS, deterministic=True)[0])
        assert before.shape == after.shape


def test_parameters_are_taken_from_a_file(trained, tmp_path):
    model = trained["device"]
    model.save(tmp_path / "model")
    for path in (str(tmp_path / "model"), tmp_path / "model.zip", saved(model)):
        fresh = make("device", seed=1)
        fresh.set_parameters(path)
        assert_equal_parameters(fresh, model)
        assert fresh.num_timesteps == 0


def wrong_parameters(good, name):
    policy, optimizer = dict(good["policy"]), good["policy.optimizer"]
    first = next(iter(policy))
    return {
        "nothing": {},
        "policy alone": {"policy": policy},
        "optimizer alone": {"policy.optimizer": optimizer},
        "unknown object": {"policy": policy, "policy.optimizer": optimizer, "actor": {}},
        "missing name": {
            "policy": {k: v for k, v in policy.items() if k != first},
            "policy.optimizer": optimizer,
        },
        "unknown name": {"policy": {**policy, "more": torch.zeros(1)}, "policy.optimizer": optimizer},
        "wrong shape": {"policy": {**policy, first: torch.zeros(3, 3)}, "policy.optimizer": optimizer},
    }[name]


# The errors of SB3's PPO: with and without exact_match. None: it is taken.
ERRORS = {
    "nothing": (ValueError, None),
    "policy alone": (ValueError, None),
    "optimizer alone": (ValueError, None),
    "unknown object": (ValueError, ValueError),
    "missing name": (RuntimeError, None),
    "unknown name": (RuntimeError, None),
    "wrong shape": (RuntimeError, RuntimeError),
}


@pytest.mark.parametrize("name", ERRORS)
@pytest.mark.parametrize("exact_match", [True, False])
def test_wrong_parameters_are_ppos_errors(name, exact_match, trained, ppo):
    expected = ERRORS[name][0 if exact_match else 1]
    for model in (GRPO.load(saved(trained["host"])), PPO.load(saved(ppo))):
        given = wrong_parameters(model.get_parameters(), name)
        if expected is None:
            model.set_parameters(given, exact_match=exact_match)
        else:
            assert raised(lambda m=model, g=given: m.set_parameters(g, exact_match=exact_match)) is expected


@pytest.mark.parametrize("exact_match", [True, False])
def test_a_file_of_another_network_is_ppos_error(exact_match, trained, ppo, tmp_path):
    other = {"policy_kwargs": {"net_arch": [9]}}
    for model, wider in ((trained["host"], make("host", **other)), (ppo, make_ppo(**other))):
        wider.save(tmp_path / "wider")
        before = parameters_of(model) if model is not ppo else None
        with pytest.raises(RuntimeError):
            model.set_parameters(str(tmp_path / "wider"), exact_match=exact_match)
        if before is not None:
            jax.tree.map(np.testing.assert_array_equal, parameters_of(model), before)


@pytest.mark.parametrize("kind", KINDS)
def test_loaded_parameters_act_and_learn(kind, trained):
    """However they come in, they are those that predict uses and that training starts from."""
    good = trained[kind].get_parameters()

    def through_policy(model):
        model.policy.load_state_dict(good["policy"])
        model.policy.optimizer.load_state_dict(good["policy.optimizer"])

    def through_vector(model):
        model.policy.load_from_vector(trained[kind].policy.parameters_to_vector())
        model.policy.optimizer.load_state_dict(good["policy.optimizer"])

    models = []
    for load in (through_policy, through_vector, lambda model: model.set_parameters(good), lambda _: None):
        models.append(make(kind, seed=1))
        load(models[-1])
    logits = [
        model.policy.get_distribution(torch.as_tensor(OBSERVATIONS)).distribution.logits.numpy()
        for model in models
    ]
    expected = trained[kind].policy.get_distribution(torch.as_tensor(OBSERVATIONS)).distribution.logits
    for values in logits[:3]:
        np.testing.assert_array_equal(values, expected)
    assert np.any(logits[3] != logits[0])
    for model in models:
        model.learn(ROLLOUT)
    assert_equal_state(models[0], models[1])
    assert_equal_state(models[0], models[2])
    assert differ(models[0], models[3])
    assert differ(models[0], trained[kind])


# The policy alone


@pytest.mark.parametrize("kind", KINDS)
def test_a_policy_has_a_file_of_its_own(kind, trained, tmp_path, no_pickle):
    policy = trained[kind].policy
    policy.save(tmp_path / "policy.zip")
    loaded = MlpPolicy.load(tmp_path / "policy.zip")
    jax.tree.map(np.testing.assert_array_equal, loaded.state, policy.state)
    np.testing.assert_array_equal(
        loaded.predict(OBSERVATIONS, deterministic=True)[0],
        trained[kind].predict(OBSERVATIONS, deterministic=True)[0],
    )
    assert loaded.has_critic == (kind == "host")
    with pytest.raises(ValueError, match=r"GRPO\.load"):
        MlpPolicy.load(saved(trained[kind]))
    with pytest.raises(KeyError, match="policy_class"):
        GRPO.load(tmp_path / "policy.zip")


def test_a_copied_policy_stays_while_the_model_learns():
    model = make("host").learn(ROLLOUT)
    twin = copy.deepcopy(model.policy)
    before = {name: leaf.clone() for name, leaf in twin.state_dict().items()}
    np.testing.assert_array_equal(twin.predict(OBSERVATIONS)[0], model.predict(OBSERVATIONS)[0])
    model.learn(ROLLOUT, reset_num_timesteps=False)
    torch.testing.assert_close(twin.state_dict(), type(twin.state_dict())(before), rtol=0, atol=0)
    assert any(torch.any(leaf != before[name]) for name, leaf in model.policy.state_dict().items())


@pytest.mark.parametrize("kind", KINDS)
def test_evaluate_policy_takes_either(kind, trained):
    model = trained[kind]

    def evaluate(actor):
        env = make_env(kind)
        env.seed(3)
        return evaluate_policy(actor, env, n_eval_episodes=3, return_episode_rewards=True)

    assert evaluate(model) == evaluate(model.policy) == evaluate(GRPO.load(saved(model)))
    assert len(evaluate(model)[0]) == 3


# predict

SPACES = {
    "vector": (spaces.Box(-1, 1, (3,)), spaces.Discrete(3)),
    "small": (spaces.Discrete(3), spaces.Discrete(3, dtype=np.int32)),
    "double": (spaces.Box(-1, 1, (3,), np.float64), spaces.Box(-2, 2, (2,), np.float64)),
    "matrix": (spaces.Box(-1, 1, (2, 3)), spaces.Box(-1, 1, (2, 2))),
    "one": (spaces.Discrete(5), spaces.Box(-1, 1, (1,))),
    "many": (spaces.MultiDiscrete([2, 3]), spaces.MultiDiscrete([2, 4])),
    "bits": (spaces.MultiBinary(4), spaces.MultiBinary(3)),
    "image": (spaces.Box(0, 255, (36, 36, 3), np.uint8), spaces.Box(-1, 1, (2,))),
    "dict": (
        spaces.Dict({"x": spaces.Box(-1, 1, (3,)), "which": spaces.Discrete(4)}),
        spaces.MultiDiscrete([2, 2]),
    ),
}


def batch_of(space, n):
    """``[n, ...]`` observations."""
    rows = [space.sample() for _ in range(n)]
    if isinstance(space, spaces.Dict):
        return {name: np.stack([row[name] for row in rows]) for name in space.spaces}
    return np.stack(rows)


@pytest.fixture(params=SPACES)
def pair(request):
    return pair_of(request.param)


def take(batch, index):
    return {k: v[index] for k, v in batch.items()} if isinstance(batch, dict) else batch[index]


@functools.cache
def pair_of(name):
    """A space, and GRPO and PPO in an environment that has it."""
    observation_space, action_space = SPACES[name]
    policy = {"image": "CnnPolicy", "dict": "MultiInputPolicy"}.get(name, "MlpPolicy")
    env = DummyVecEnv([lambda: Anything(observation_space, action_space)])
    settings = {**SETTINGS, "policy_kwargs": {"net_arch": []}}
    observation_space.seed(0)
    return observation_space, GRPO(policy, env, **settings), PPO(policy, env, **settings)


@pytest.mark.parametrize("deterministic", [True, False])
def test_predict_returns_what_ppos_does(pair, deterministic):
    space, grpo, ppo = pair
    batch = batch_of(space, 3)
    state, starts = (np.zeros(2),), np.ones(3, bool)
    for observation in (batch, take(batch, 0), take(batch, slice(0, 1))):
        ours, theirs = (model.predict(observation, deterministic=deterministic) for model in (grpo, ppo))
        assert (ours[1], type(ours[0])) == (theirs[1], type(theirs[0])) == (None, np.ndarray)
        assert ours[0].shape == theirs[0].shape
        # SB3's is float32 for MultiBinary and int64 for Discrete of int32: ours is the space's.
        assert ours[0].dtype == grpo.action_space.dtype
        assert ours[0].dtype == theirs[0].dtype or theirs[0].dtype != grpo.action_space.dtype
        for action in np.reshape(ours[0], (-1, *grpo.action_space.shape)):
            assert grpo.action_space.contains(action if action.shape else action[()])
    ours, theirs = (
        model.predict(batch, state=state, episode_start=starts, deterministic=deterministic)
        for model in (grpo, ppo)
    )
    assert ours[1] is theirs[1] is state


def test_a_single_observation_is_a_row_of_a_batch(pair):
    space, grpo, _ = pair
    batch = batch_of(space, 5)
    actions = grpo.predict(batch, deterministic=True)[0]
    for index in range(5):
        action = grpo.predict(take(batch, index), deterministic=True)[0]
        np.testing.assert_allclose(action, actions[index], rtol=1e-5, atol=1e-6)


def test_wrong_observations_are_ppos_errors(pair):
    space, grpo, ppo = pair
    good = take(batch_of(space, 1), 0)
    with_info = (good, {})
    wrong = {"x": np.zeros((2, 2, 7))} if isinstance(space, spaces.Dict) else np.zeros((2, 2, 7, 7, 7))
    for observation in (with_info, wrong):
        errors = [raised(lambda m=model, o=observation: m.predict(o)) for model in (grpo, ppo)]
        assert errors == [ValueError, ValueError]


def test_images_have_their_channels_first_or_last():
    space, model, _ = pair_of("image")
    assert model.observation_space.shape == (3, 36, 36)
    last = batch_of(space, 2)
    first = last.transpose(0, 3, 1, 2)
    for observation, moved in ((last, first), (last[0], first[0])):
        actions = model.predict(observation, deterministic=True)[0]
        np.testing.assert_array_equal(actions, model.predict(moved, deterministic=True)[0])
        assert np.any(actions != model.predict(255 - observation, deterministic=True)[0])


@pytest.mark.parametrize("kind", KINDS)
def test_sampled_actions_come_from_the_seed(kind):
    actions = []
    for seed in (0, 0, 1):
        model = make(kind, seed=seed)
        np.random.default_rng().random()  # no stream of anyone else's matters
        np.random.seed(len(actions))
        torch.manual_seed(len(actions))
        actions.append(np.stack([model.predict(np.zeros((16, 4), np.float32))[0] for _ in range(2)]))
    np.testing.assert_array_equal(actions[0], actions[1])
    assert np.any(actions[0] != actions[2])
    assert np.any(actions[0][0] != actions[0][1])
    model.set_random_seed(5)
    first = model.predict(np.zeros((16, 4), np.float32))[0]
    model.set_random_seed(5)
    np.testing.assert_array_equal(model.predict(np.zeros((16, 4), np.float32))[0], first)


class Predict(BaseCallback):
    """Asks for actions at every step."""

    def _on_step(self):
        self.model.predict(OBSERVATIONS)
        self.model.predict(OBSERVATIONS[0], deterministic=True)
        return True


@pytest.mark.parametrize("kind", KINDS)
def test_predict_does_not_disturb_training(kind, trained):
    model = make(kind).learn(2 * ROLLOUT, callback=Predict())
    assert_equal_state(model, trained[kind])
