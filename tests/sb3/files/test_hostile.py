"""Files that somebody made to do harm: they change parameters, nothing else, and are refused before they cost anything."""

from __future__ import annotations

import hashlib
import io
import json
import os
import resource
import struct
import time
import zipfile

import numpy as np
import pytest
from flax import serialization
from gymnasium import spaces
from sb3.files.checks import PARAMS, edited
from sb3.files.models import ROLLOUT, assert_equal_parameters, make, make_env, saved

from sb3_bridge import GRPO, MlpPolicy
from sb3_bridge.files.model_zip import MAX_BYTES, load_zip, save_zip
from sb3_bridge.files.plain import encode


@pytest.fixture(scope="module")
def model():
    return make("host", env=make_env("host", 1)).learn(ROLLOUT)


@pytest.fixture(scope="module")
def content(model):
    return saved(model).getvalue()


def with_attributes(content, **attributes):
    """The file with other attributes."""
    data = json.loads(zipfile.ZipFile(io.BytesIO(content)).read("data"))
    return edited(content, data=json.dumps(data | attributes))


def plain(value):
    return {":type:": "x", ":plain:": encode(value)}


@pytest.mark.parametrize("allow_pickle", [False, True])
@pytest.mark.parametrize("name", ["predict", "learn", "save", "load", "get_env", "_setup_model", "logger"])
def test_a_file_cannot_replace_what_the_class_has(name, allow_pickle, content):
    with pytest.warns(UserWarning, match=f"left out {name}, which no file may set"):
        loaded = GRPO.load(with_attributes(content, **{name: plain((1, 2))}), allow_pickle=allow_pickle)
    assert name not in vars(loaded)


@pytest.mark.parametrize("written", [None, "x", plain((1,))])
def test_the_env_that_is_passed_wins(written, content):
    env = make_env("host", 1)
    file = with_attributes(content, env=written)
    if written is None:
        loaded = GRPO.load(file, env=env)
    else:
        with pytest.warns(UserWarning, match="left out env"):
            loaded = GRPO.load(file, env=env)
    assert loaded.get_env() is env
    assert GRPO.load(with_attributes(content, env=written), env=env, allow_pickle=True).get_env() is env


def test_a_file_does_not_choose_where_training_writes(content, tmp_path):
    file = with_attributes(content, tensorboard_log=str(tmp_path / "theirs"))
    with pytest.warns(UserWarning, match="left out tensorboard_log"):
        assert GRPO.load(file, allow_pickle=True).tensorboard_log is None
    assert GRPO.load(file, tensorboard_log=str(tmp_path / "mine")).tensorboard_log == str(tmp_path / "mine")
    assert not list(tmp_path.iterdir())


class Own(GRPO):
    """A user's, with an attribute of its own."""

    def __init__(self, *args, temper=1.0, **kwargs):
        super().__init__(*args, **kwargs)
        self.temper = temper


def test_attributes_of_a_subclass_come_back_from_a_file_that_is_trusted():
    file = saved(make("host", env=make_env("host", 1), cls=Own, temper=2.0))
    assert Own.load(file, allow_pickle=True).temper == 2.0
    assert Own.load(file, temper=3.0).temper == 3.0
    with pytest.warns(UserWarning, match="left out temper.*allow_pickle=True"):
        assert Own.load(file).temper == 1.0


WRONG = {
    "n_steps": [0, -1, 2.5, True, "8", None, 2**70],
    "n_envs": [0, "1", plain(np.zeros(3))],
    "num_timesteps": [-1, 1.5, None],
    "_n_iterations": [-3],
    "gamma": ["0.9", None, plain(float("nan")), plain(float("inf")), [0.9]],
    "learning_rate": ["fast", None, plain(float("nan"))],
    "normalize_advantage": [1, "yes", None],
    "surrogate": [None, 3],
    "verbose": ["loud", -2],
    "key_words": [plain(np.zeros(2, np.int32)), plain(np.zeros(3, np.uint32)), [0, 1]],
    "episode_time": [plain(np.array([-1], np.int32)), plain(np.zeros(1))],
    "_last_obs": [plain(np.array([[np.nan] * 4], np.float32)), [[0.0] * 4], "x"],
    "_last_episode_starts": [plain(np.zeros(1)), [True]],
    "ep_info_buffer": [[], {"r": 1}],
    "observation_space": [3, None],
    "policy_class": ["MlpPolicy", 3],
    "policy_kwargs": [None, []],
    "_frac_zero_std": [["x"], 3],
    "reward_function": ["print", 3],
}


@pytest.mark.parametrize("name", WRONG)
def test_attributes_of_another_kind_are_refused_by_name(name, content):
    for value in WRONG[name]:
        with pytest.raises(ValueError, match=rf"{name}=.* is not "):
            GRPO.load(with_attributes(content, **{name: value}))


def test_arguments_and_custom_objects_win(content):
    wrong = with_attributes(content, gamma="high", n_epochs=-1)
    loaded = GRPO.load(wrong, custom_objects={"gamma": 0.5}, n_epochs=3)
    assert (loaded.gamma, loaded.n_epochs) == (0.5, 3)


@pytest.mark.parametrize(
    "attributes",
    [
        {"policy_kwargs": {"net_arch": [10**9]}},
        {"policy_kwargs": {"net_arch": [10**14]}},
        {"policy_kwargs": {"net_arch": {"pi": [8], "vf": [10**5, 10**5]}}},
        {"policy_kwargs": {"net_arch": [1] * 10**5}},
        {"observation_space": plain(spaces.Discrete(10**10))},
        {"action_space": plain(spaces.Discrete(10**9))},
    ],
    ids=lambda attributes: next(iter(attributes)),
)
def test_networks_are_bounded_by_the_files_parameters(attributes, content):
    before, started = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.process_time()
    with pytest.raises(ValueError, match=r"parameters: the file holds fewer|at most 256 layer sizes"):
        GRPO.load(with_attributes(content, **attributes))
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 200_000  # KiB
    assert time.process_time() - started < 60


def test_a_policys_network_is_bounded_too(model, tmp_path):
    model.policy.save(tmp_path / "policy")
    huge = with_attributes((tmp_path / "policy.zip").read_bytes(), net_arch=[10**9])
    with pytest.raises(ValueError, match="net_arch=.*the file holds fewer"):
        MlpPolicy.load(huge)


def leaves_changed(content, entry, change):
    tree = serialization.msgpack_restore(zipfile.ZipFile(io.BytesIO(content)).read(entry))
    name = next(name for name, leaf in tree.items() if leaf.dtype == np.float32)
    tree[name] = change(tree[name].copy())
    return edited(content, **{entry: serialization.msgpack_serialize(tree)})


@pytest.mark.parametrize("entry", ["policy.msgpack", "policy.optimizer.msgpack"])
@pytest.mark.parametrize(
    "change",
    [
        lambda leaf: leaf * np.float32("nan"),
        lambda leaf: leaf.astype(np.int32),
        lambda leaf: leaf.astype(complex),
    ],
    ids=["nan", "int", "complex"],
)
def test_parameters_that_are_no_numbers_are_refused(entry, change, content):
    owner = entry.removesuffix(".msgpack")
    file = leaves_changed(content, entry, change)
    for load in (GRPO.load, make("host", env=make_env("host", 1)).set_parameters):
        with pytest.raises(ValueError, match=rf"{owner}\[.*\] holds"):
            load(file)


def test_parameters_for_anything_else_are_refused(content):
    for name in ("env", "rollout_buffer", "policy.optimizer.state", "../policy"):
        file = edited(content, **{f"{name}.msgpack": serialization.msgpack_serialize({"x": np.zeros(2)})})
        with pytest.raises(ValueError, match="is an invalid object name"):
            GRPO.load(file)


def compressed(entries):
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED, compresslevel=9) as archive:
        for name, content in entries.items():
            archive.writestr(name, content)
    file.seek(0)
    return file


def test_a_bomb_is_refused_before_it_is_unpacked():
    file = compressed({"data": "{}", "policy.msgpack": bytes(2**28)})
    assert len(file.getvalue()) < 2**20
    with pytest.raises(ValueError, match="would be unpacked to"):
        load_zip(file)


def test_a_size_that_lies_is_found():
    content = bytearray(compressed({"data": "{}", "policy.msgpack": bytes(2**22)}).getvalue())
    for at in range(len(content) - 4):  # in both headers
        if content[at : at + 4] == struct.pack("<I", 2**22):
            content[at : at + 4] = struct.pack("<I", 100)
    with pytest.raises(ValueError, match="entry 'policy.msgpack' is damaged"):
        load_zip(io.BytesIO(content))


def nested_maps(depth, width):
    """``width`` names in each of so many dicts, one in the other."""
    names = b"".join(b"\xa4" + struct.pack(">I", number) + b"\xc0" for number in range(width - 1))
    return (b"\xdf" + struct.pack(">I", width) + names + b"\xa1x") * depth + b"\xc0"


@pytest.mark.parametrize(
    "entries",
    [
        {"policy.msgpack": b"\xdd" + struct.pack(">I", 2**24) + b"\xc0" * 2**24},
        {"policy.msgpack": b"\xdd" + struct.pack(">I", 9_999) + b"\x80" * 9_999},
        {"policy.msgpack": b"\x81\xa1x" + b"\xdc\x27\x00" * 400 + b"\xc0" * 9_983},
        {"policy.msgpack": nested_maps(200, 9_000)},
        {"data": b'{"x": [' + b"[]," * 10_000_000 + b"[]]}"},
        {"data": b'{"x": ' + b'{"a":' * 100_000 + b"1" + b"}" * 100_000 + b"}"},
    ],
    ids=lambda entries: next(iter(entries)),
)
def test_entries_that_are_made_of_too_much_are_refused(entries):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(ValueError, match="is damaged"):
        load_zip(
            compressed({"data": "{}", "policy.msgpack": serialization.msgpack_serialize(PARAMS)} | entries)
        )
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 600_000  # KiB


def test_what_is_no_plain_file_is_refused_at_once(tmp_path):
    os.mkfifo(tmp_path / "pipe.zip")
    (tmp_path / "folder.zip").mkdir()
    with open(tmp_path / "sparse.zip", "wb") as file:
        file.truncate(2**32)
    for name, why in (
        ("pipe", "a pipe"),
        ("folder", "a directory"),
        ("sparse", f"more than the {MAX_BYTES:,}"),
    ):
        with pytest.raises(ValueError, match=why):
            load_zip(tmp_path / name)
        with pytest.raises(ValueError, match=why):
            MlpPolicy.load(tmp_path / f"{name}.zip")
    with pytest.raises(ValueError, match="a device"):
        load_zip("/dev/zero")


def test_what_could_not_be_read_is_not_written(tmp_path, monkeypatch):
    monkeypatch.setattr("sb3_bridge.files.model_zip.MAX_BYTES", 10_000)
    save_zip(tmp_path / "m", {"x": 1}, PARAMS)
    with pytest.raises(ValueError, match="m would have .* bytes, more than"):
        save_zip(tmp_path / "m", {"x": 1}, {"policy": {"x": np.zeros(10_000)}})
    assert load_zip(tmp_path / "m")[0] == {"x": 1}


def test_files_of_earlier_versions_load(model, content):
    assert_equal_parameters(GRPO.load(edited(content)), model)


def test_a_file_of_a_later_version_is_refused_by_its_version(content):
    newer = bytearray(content)
    at = newer.rindex(b"grpo-jax model 2 ")
    newer[at : at + 17] = b"grpo-jax model 3 "
    newer[-64:] = hashlib.sha256(newer[:-64]).hexdigest().encode()
    with pytest.raises(ValueError, match="version 3 .* upgrade"):
        GRPO.load(io.BytesIO(newer))
