"""The zip: SB3's own writer and reader are the oracle, damage is named, and no pickle runs unasked."""

import base64
import io
import json
import os
import pathlib
import pickle
import threading
import time
import warnings
import zipfile

import cloudpickle
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import stable_baselines3
import torch
from flax import linen, serialization
from gymnasium import spaces
from sb3.files.checks import PARAMS, assert_same, edited, kind_of, round_trip, with_json
from stable_baselines3 import A2C, DQN, PPO, SAC, TD3
from stable_baselines3.common import utils
from stable_baselines3.common.save_util import load_from_zip_file, save_to_zip_file

import grpo_jax
from sb3_bridge.files.model_zip import load_zip, save_zip


def test_parameters_keep_dtype_shape_and_bits():
    tree = {
        "a": {
            name: np.array([[0, 1], [1, 0]]).astype(name)
            for name in ("float64", "int8", "bool", "uint32", "float16")
        },
        "bfloat16": np.asarray(jnp.array([1.5, -jnp.inf], jnp.bfloat16)),
        "nan": np.array([0x7FC00001, 0xFFC00002], np.uint32).view(np.float32),
        "empty": np.zeros((0, 3)),
        "nothing": {},
        "0-d": np.array(3, np.int64),
        "scalar": np.float32(0.1),
        "plain": {"count": 3, "rate": 1e-3, "on": False, "none": None},
        "fortran": np.asfortranarray(np.arange(6.0).reshape(2, 3)),
        "strided": np.arange(10)[::3],
    }
    _, loaded = round_trip({}, {"policy": tree, "policy.optimizer": {"mu": jnp.ones(2, jnp.bfloat16)}})
    expected = {"policy": tree, "policy.optimizer": {"mu": np.ones(2, jnp.bfloat16)}}
    flat, flat_expected = (
        jax.tree_util.tree_flatten_with_path(t, is_leaf=lambda x: x is None)[0] for t in (loaded, expected)
    )
    assert len(flat) == len(flat_expected) == 17
    for (path, leaf), (path_expected, leaf_expected) in zip(flat, flat_expected, strict=True):
        assert path == path_expected
        assert_same(leaf, leaf_expected)
    assert loaded["policy"]["nothing"] == {}
    assert loaded["policy"]["empty"].flags.writeable


def test_parameters_are_stored_in_native_byte_order():
    _, loaded = round_trip({}, {"policy": {"x": np.array([1, 2], ">f4")}})
    assert_same(loaded["policy"]["x"], np.array([1, 2], "f4"))


def test_keys_are_stored_as_words(key):
    words = jax.random.key_data(key)
    data, params = round_trip({"key": words}, {"policy": {"key": words}})
    assert_same(data["key"], np.asarray(words))
    assert_same(params["policy"]["key"], np.asarray(words))
    for arguments in (({"key": key}, PARAMS), ({"nested": [key]}, PARAMS), ({}, {"policy": {"key": key}})):
        with pytest.raises(TypeError, match=r"\['(key|nested|policy)'\].* typed PRNG key.*key_data"):
            round_trip(*arguments)


@pytest.mark.parametrize(
    ("tree", "message"),
    [
        ({"x": [np.zeros(2)]}, r"params\['policy'\]\['x'\] is a list"),
        ({"x": torch.zeros(2)}, r"params\['policy'\]\['x'\] is a Tensor"),
        ({"x": np.array([None])}, r"params\['policy'\]\['x'\] has dtype object"),
        ({"x": np.array(["text"])}, r"params\['policy'\]\['x'\] has dtype <U4"),
        ({1: np.zeros(2)}, "the name 1 must be a string"),
    ],
)
def test_parameters_that_are_no_arrays_are_refused(tree, message):
    with pytest.raises(TypeError, match=message):
        round_trip({}, {"policy": tree})


@pytest.fixture(scope="module")
def ppo():
    model = PPO(
        "MlpPolicy",
        "CartPole-v1",
        n_steps=64,
        n_epochs=1,
        seed=3,
        device="cpu",
        policy_kwargs={"net_arch": [8]},
    )
    return model.learn(128)


def attributes_of(model):
    excluded = {*model._excluded_save_params(), "policy"}
    return {name: value for name, value in vars(model).items() if name not in excluded}


def test_a_ppo_models_attributes_survive_as_in_sb3s_own_file(ppo, tmp_path):
    data = attributes_of(ppo)
    assert len(data["ep_info_buffer"]) > 1 and data["lr_schedule"](0.5) == 3e-4
    loaded, _ = round_trip(data)
    ppo.save(tmp_path / "ppo")
    oracle, _, _ = load_from_zip_file(tmp_path / "ppo")
    # SB3 keeps the tuples and numbers of JSON; there are none here that it would change.
    assert_same(loaded, oracle)
    assert_same(loaded, data)
    file = io.BytesIO()
    save_zip(file, data, PARAMS)
    assert_same(load_from_zip_file(file)[0], oracle)


@pytest.mark.parametrize(
    "name", ["m", "m.zip", "m.v1", "new/folder/m", "folder.zip", "folder", "folder.v1", "twice"]
)
@pytest.mark.parametrize("kind", [str, pathlib.Path])
def test_paths_are_treated_as_by_sb3(name, kind, tmp_path):
    outcomes = []
    for who, save in (("ours", save_zip), ("sb3", save_to_zip_file)):
        root = tmp_path / who
        for folder in ("folder.zip", "folder", "folder.v1", "twice.zip", "twice.zip_2"):
            (root / folder).mkdir(parents=True)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            save(kind(root / name), {"x": 1}, {})
        files = sorted(str(path.relative_to(root)) for path in root.rglob("*") if path.is_file())
        outcomes.append((files, [warning.category for warning in caught]))
    assert outcomes[0] == outcomes[1] and len(outcomes[0][0]) == 1


def test_paths_are_read_as_by_sb3(tmp_path):
    save_zip(tmp_path / "model", {"x": 1}, PARAMS)
    for path in (tmp_path / "model", str(tmp_path / "model"), str(tmp_path / "model.zip")):
        assert load_zip(path)[0] == {"x": 1}
    with pytest.raises(FileNotFoundError, match="missing"):
        load_zip(tmp_path / "missing")


@pytest.mark.parametrize("kind", ["ours", "sb3"])
def test_file_objects_are_treated_as_by_sb3(kind, tmp_path):
    save = save_zip if kind == "ours" else lambda path, data, params: save_to_zip_file(path, data, {})
    load = load_zip if kind == "ours" else load_from_zip_file
    with open(tmp_path / "file", "wb") as file:
        save(file, {"x": 1}, PARAMS)
        assert not file.closed
    with open(tmp_path / "file", "rb") as file:
        assert load(file)[0] == {"x": 1}
        assert not file.closed
        with pytest.raises(ValueError, match="writable"):
            save(file, {"x": 1}, PARAMS)
    with pytest.raises(ValueError, match="closed"):
        load(file)
    for path in (None, 3, io.StringIO()):
        with pytest.raises(TypeError):
            save(path, {"x": 1}, PARAMS)
        with pytest.raises(TypeError):
            load(path)


def test_the_file_says_what_wrote_it(tmp_path, capsys):
    save_zip(tmp_path / "model", {}, PARAMS)
    with zipfile.ZipFile(tmp_path / "model.zip") as archive:
        names = [
            "data",
            "policy.msgpack",
            "_stable_baselines3_version",
            "_grpo_jax_version",
            "_format",
            "system_info.txt",
        ]
        assert archive.namelist() == names
        assert archive.read("_stable_baselines3_version").decode() == stable_baselines3.__version__
        assert archive.read("_grpo_jax_version").decode() == grpo_jax.__version__
    load_zip(tmp_path / "model")
    assert capsys.readouterr().out == ""
    load_zip(tmp_path / "model", print_system_info=True)
    ours = capsys.readouterr().out
    load_from_zip_file(tmp_path / "model", print_system_info=True)
    assert ours == capsys.readouterr().out
    assert f"- JAX: {jax.__version__}\n" in ours and f"- PyTorch: {torch.__version__}\n" in ours


@pytest.mark.parametrize(
    ("algorithm", "env_id"),
    [
        (PPO, "CartPole-v1"),
        (A2C, "CartPole-v1"),
        (DQN, "CartPole-v1"),
        (SAC, "Pendulum-v1"),
        (TD3, "Pendulum-v1"),
    ],
)
def test_files_of_other_algorithms_name_their_owner(algorithm, env_id, tmp_path):
    algorithm("MlpPolicy", env_id, policy_kwargs={"net_arch": [4]}, device="cpu").save(tmp_path / "m")
    with pytest.raises(ValueError, match=rf"m .*load it with stable_baselines3\.{algorithm.__name__}$"):
        load_zip(tmp_path / "m", load_data=False)


@pytest.mark.parametrize(
    ("data", "owner"),
    [
        (
            {"policy_class": {"__module__": "sb3_contrib.ppo_recurrent.policies"}, "clip_range": 1},
            "sb3_contrib",
        ),
        ({"x": 1}, "the Stable-Baselines3 algorithm that saved it"),
        (None, "the Stable-Baselines3 algorithm that saved it"),
    ],
)
def test_files_of_unknown_algorithms_are_refused(data, owner):
    entries = {"policy.msgpack": None, "policy.pth": b"", "data": None if data is None else json.dumps(data)}
    with pytest.raises(ValueError, match=owner):
        load_zip(edited(**entries))


def user_data():
    return {
        "gamma": 0.9,
        "reward_function": lambda x: x + 1,
        "lr_schedule": utils.FloatSchedule(lambda p: 2 * p),
    }


def test_allow_pickle_restores_everything():
    data, _ = round_trip(user_data(), allow_pickle=True)
    assert data["reward_function"](1) == 2 and data["lr_schedule"](0.5) == 1.0 and data["gamma"] == 0.9
    # As SB3's reader does.
    file = io.BytesIO()
    save_zip(file, user_data(), PARAMS)
    assert load_from_zip_file(file)[0]["reward_function"](1) == 2


def test_pickles_keep_jaxs_functions_themselves():
    kwargs = {"activation_fn": linen.relu, "optimizer_class": optax.adam, "user": lambda x: x}
    data, _ = round_trip({"policy_kwargs": kwargs}, allow_pickle=True)
    assert data["policy_kwargs"]["activation_fn"] is linen.relu
    assert data["policy_kwargs"]["optimizer_class"] is optax.adam


@pytest.mark.parametrize(
    "content",
    [b"nonsense", pickle.dumps(3)[:-1], b"cno_such_module\nx\n."],
    ids=["nonsense", "cut", "module"],
)
def test_a_broken_pickle_warns_and_names_custom_objects(content):
    entry = {":type:": "x", ":serialized:": base64.b64encode(content).decode()}
    file = with_json({"thing": entry, "gamma": 0.9})
    with pytest.warns(UserWarning, match=r"pickle of 'thing'.*custom_objects=\{'thing': ...\}") as caught:
        assert load_zip(file, allow_pickle=True)[0] == {"gamma": 0.9}
    assert len(caught) == 1
    assert load_zip(file, allow_pickle=True, custom_objects={"thing": 1})[0] == {"thing": 1, "gamma": 0.9}


def test_what_cannot_be_stored_names_the_attribute_and_leaves_the_old_file(tmp_path):
    save_zip(tmp_path / "m", {"x": 1}, PARAMS)
    for data in ({"lock": threading.Lock()}, {"lock": {"deep": [threading.Lock()]}}):
        with pytest.raises(TypeError, match=r"'lock'.*neither.*exclude=\['lock'\]"):
            save_zip(tmp_path / "m", data, PARAMS)
    with pytest.raises(TypeError, match="the name 3 must be a string"):
        save_zip(tmp_path / "m", {3: 1}, PARAMS)
    assert load_zip(tmp_path / "m")[0] == {"x": 1}
    assert os.listdir(tmp_path) == ["m.zip"]
    file = io.BytesIO(b"old")
    with pytest.raises(TypeError):
        save_zip(file, {"lock": threading.Lock()}, PARAMS)
    assert file.getvalue() == b"old"


def test_a_disk_that_fails_leaves_the_old_file(tmp_path, monkeypatch):
    save_zip(tmp_path / "m", {"x": 1}, PARAMS)

    def fail(*_):
        raise OSError("no space left")

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(OSError, match="no space"):
        save_zip(tmp_path / "m", {"x": 2}, PARAMS)
    assert load_zip(tmp_path / "m")[0] == {"x": 1}
    assert os.listdir(tmp_path) == ["m.zip"]


def test_what_killed_saves_left_is_removed(tmp_path):
    paths = [tmp_path / f".{name}.zip.abcd1234.tmp" for name in "mno"]
    for path, seconds in zip(paths, (0, 1000, 0), strict=True):
        path.write_bytes(b"half")
        os.utime(path, (time.time() - seconds,) * 2)
    save_zip(tmp_path / "m", {"x": 1}, PARAMS)
    assert sorted(os.listdir(tmp_path)) == [paths[2].name, "m.zip"]  # somebody may be writing that one


def test_a_link_stays_a_link(tmp_path):
    (tmp_path / "real").mkdir()
    save_zip(tmp_path / "real" / "m", {"x": 1}, PARAMS)
    (tmp_path / "link.zip").symlink_to(tmp_path / "real" / "m.zip")
    save_zip(tmp_path / "link", {"x": 2}, PARAMS)
    assert (tmp_path / "link.zip").is_symlink()
    assert load_zip(tmp_path / "real" / "m")[0] == {"x": 2}


def test_containers_that_hold_themselves_are_pickled():
    loop = [1]
    loop.append(loop)
    data, _ = round_trip({"loop": loop}, allow_pickle=True)
    assert data["loop"][0] == 1 and data["loop"][1] is data["loop"]


class Evil:
    """Makes a file when it is unpickled."""

    def __init__(self, mark):
        self.mark = mark

    def __reduce__(self):
        return os.mkdir, (str(self.mark),)


def test_no_pickle_is_run_unless_asked(tmp_path):
    mark = tmp_path / "mark"
    pickled = base64.b64encode(cloudpickle.dumps(Evil(mark))).decode()
    beside = {":type:": "x", ":serialized:": pickled, ":plain:": {":kind:": "tuple", "items": [1]}}
    alone = {":type:": "x", ":serialized:": pickled}
    deep = {"a": [{":serialized:": pickled}]}
    inner = {":plain:": [{":type:": "x", ":serialized:": pickled}]}
    assert load_zip(with_json({"x": beside}))[0] == {"x": (1,)}
    assert load_zip(with_json({"x": beside}), allow_pickle=True)[0] == {"x": (1,)}
    assert load_zip(with_json({"x": deep}), allow_pickle=True)[0] == {"x": deep}
    assert load_zip(with_json({"x": inner}), allow_pickle=True)[0] == {"x": inner[":plain:"]}
    with pytest.warns(UserWarning, match="left out x"):
        assert load_zip(with_json({"x": alone}))[0] == {}
    assert load_zip(with_json({"x": alone}), custom_objects={"x": 1})[0] == {"x": 1}
    assert load_zip(with_json({"x": alone}), load_data=False)[0] == {}
    assert not mark.exists()
    # The trap works: with the user's consent it goes off.
    load_zip(with_json({"x": alone}), allow_pickle=True)
    assert mark.exists()


@pytest.mark.parametrize(
    ("entries", "message"),
    [
        ({"data": None}, "has no entry 'data'"),
        ({"data": b"{"}, "entry 'data' is damaged"),
        ({"data": b"\xff\xfe"}, "entry 'data' is damaged"),
        ({"data": b"[1]"}, "entry 'data' is damaged.*expected an object, got list"),
        ({"data": b'{"x": ' + b"[" * 100_000}, "entry 'data' is damaged"),
        ({"policy.msgpack": None}, "holds no parameters .*it has data, "),
        ({"policy.msgpack": b""}, "entry 'policy.msgpack' is damaged"),
        ({"policy.msgpack": b"\xc1"}, "entry 'policy.msgpack' is damaged"),
        ({"policy.msgpack": b"\x91" * 100_000}, "entry 'policy.msgpack' is damaged"),
        ({"policy.msgpack": serialization.msgpack_serialize({"a": [1]})}, "damaged.*unexpected list"),
        (
            {"policy.msgpack": serialization.msgpack_serialize(PARAMS)[:-3]},
            "entry 'policy.msgpack' is damaged",
        ),
        ({"policy.msgpack": b"\x81\xa1a\xd4\x63\x00"}, "damaged.*unexpected ExtType"),
        ({"policy.msgpack": b"\x81\xa1a\xc7\x04\x01\x93\x91\x01\xa1O"}, "entry 'policy.msgpack' is damaged"),
    ],
    ids=kind_of,
)
def test_damaged_entries_are_named(entries, message):
    with pytest.raises(ValueError, match=message):
        load_zip(edited(**entries))


def test_no_zip_at_all_is_said_with_the_path(tmp_path):
    for content in (b"", b"not a zip", b"PK\x03\x04" + bytes(50)):
        (tmp_path / "m.zip").write_bytes(content)
        with pytest.raises(ValueError, match=r"m\.zip is not a zip file"):
            load_zip(tmp_path / "m.zip")


@pytest.mark.parametrize("damage", ["flip", "cut"])
def test_any_damaged_byte_is_an_error(damage):
    file = io.BytesIO()
    save_zip(file, {"x": (1, 2.5), "space": spaces.Discrete(3)}, PARAMS)
    content = file.getvalue()
    for i in range(len(content)):
        flipped = bytes([content[i] ^ 1 << i % 8])
        broken = content[:i] if damage == "cut" else content[:i] + flipped + content[i + 1 :]
        with pytest.raises(ValueError, match="damaged|its seal is gone"):
            load_zip(io.BytesIO(broken))
