"""The zip of a model: exact round trips, SB3's own reader as the oracle, and nothing run that a file brings."""

import base64
import functools
import importlib
import io
import json
import os
import pathlib
import pickle
import sys
import threading
import types
import warnings
import zipfile
from collections import OrderedDict, deque

import cloudpickle
import hypothesis.extra.numpy as hnp
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import stable_baselines3
import torch
from flax import linen, serialization
from gymnasium import spaces
from hypothesis import given
from hypothesis import strategies as st
from stable_baselines3 import A2C, DQN, PPO, SAC, TD3
from stable_baselines3.common import utils
from stable_baselines3.common.policies import ActorCriticPolicy
from stable_baselines3.common.save_util import load_from_zip_file, save_to_zip_file

import grpo_jax
from sb3_bridge.files.model_zip import (
    load_zip,
    policy_from_file,
    policy_to_file,
    save_zip,
)
from sb3_bridge.files.plain import NotPlainError, decode, encode

PARAMS = {"policy": {"params": {"dense": {"kernel": np.ones((2, 3), np.float32)}}}}


def assert_same(actual, expected):
    """Equal, and of equal types all the way down."""
    assert type(actual) is type(expected), (actual, expected)
    if isinstance(expected, np.ndarray | np.generic):
        assert actual.dtype == expected.dtype and actual.shape == expected.shape
        assert np.asarray(actual).tobytes() == np.asarray(expected).tobytes()
    elif isinstance(expected, dict):
        assert_same(list(actual.items()), list(expected.items()))
    elif isinstance(expected, list | tuple | deque):
        assert len(actual) == len(expected)
        assert getattr(actual, "maxlen", None) == getattr(expected, "maxlen", None)
        for one, other in zip(actual, expected, strict=True):
            assert_same(one, other)
    elif isinstance(expected, np.random.Generator):
        assert actual.bit_generator.state == expected.bit_generator.state
    elif isinstance(
        expected, spaces.Space | utils.FloatSchedule | utils.LinearSchedule | utils.ConstantSchedule
    ):
        # A box writes its bounds down for printing once it was printed.
        names = vars(expected).keys() - {"low_repr", "high_repr"}
        assert names == vars(actual).keys() - {"low_repr", "high_repr"}
        for name in names:
            assert_same(vars(actual)[name], vars(expected)[name])
    elif isinstance(expected, float):
        assert repr(actual) == repr(expected)
    else:
        assert actual == expected


def round_trip(data, params=PARAMS, **kwargs):
    file = io.BytesIO()
    save_zip(file, data, params)
    return load_zip(file, **kwargs)


def edited(**entries):
    """A file of ours in which entries were replaced (bytes or text), or removed (None)."""
    file, changed = io.BytesIO(), io.BytesIO()
    save_zip(file, {"x": 1}, PARAMS)
    with zipfile.ZipFile(file) as old, zipfile.ZipFile(changed, "w") as new:
        contents = {name: old.read(name) for name in old.namelist()} | entries
        for name, content in contents.items():
            if content is not None:
                new.writestr(name, content)
    return changed


def with_json(attributes):
    return edited(data=json.dumps(attributes))


# --- Round trips ------------------------------------------------------------------------------------------------------


def small_box(low, high, dtype):
    return spaces.Box(np.array(low, dtype), np.array(high, dtype), dtype=dtype)


def seeded(space):
    space.seed(7)
    space.sample()
    return space


SPACES = [
    small_box([-np.inf, -1, 0.1], [np.inf, np.inf, 0.3], np.float32),
    small_box([[-np.inf], [1e-300]], [[1e300], [2]], np.float64),
    spaces.Box(0, 255, (2, 3, 3), np.uint8),
    spaces.Box(-np.inf, np.inf, (2,), np.int32),
    spaces.Box(-1, 1, (), np.float16),
    spaces.Discrete(5),
    spaces.Discrete(5, start=-2),
    spaces.Discrete(3, dtype=np.int32),
    spaces.MultiDiscrete([2, 3], start=[1, -1]),
    spaces.MultiDiscrete(np.array([[1, 2], [3, 4]]), dtype=np.int32),
    spaces.MultiBinary(4),
    spaces.MultiBinary((2, 3)),
    spaces.Dict(OrderedDict(z=spaces.Discrete(2), a=spaces.Dict(b=spaces.MultiBinary(1)))),
    seeded(spaces.Discrete(9)),
    seeded(spaces.Dict(x=spaces.Box(-1, 1, (2,)), y=spaces.Discrete(4))),
]
SCHEDULES = [
    utils.ConstantSchedule(0.5),
    utils.LinearSchedule(1.0, 0.1, 0.5),
    utils.FloatSchedule(3e-4),
    utils.FloatSchedule(utils.LinearSchedule(1, 0, np.float64(0.5))),
]
NAMED = [linen.relu, linen.tanh, jnp.tanh, jnp.sin, jax.nn.silu, linen.gelu, jax.nn.initializers.orthogonal]
NAMED += [optax.adam, optax.nadam, torch.nn.ReLU, torch.optim.Adam, linen.PReLU, jnp.bfloat16, np.float64]
OTHERS = [
    torch.device("cpu"),
    torch.device("cuda:1"),
    pathlib.Path("a/b.zip"),
    np.dtype("f4"),
    np.dtype(jnp.bfloat16),
]
OTHERS += [np.asarray(jnp.arange(3, dtype=jnp.bfloat16)), np.asarray(jnp.bfloat16(2))[()]]
OTHERS += [np.random.default_rng(3), ActorCriticPolicy._dummy_schedule]

hashables = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(),
    lambda inner: st.tuples(inner, inner),
    max_leaves=3,
)
# NumPy's own pickles turn big-endian dates around.
dtypes = hnp.scalar_dtypes().filter(lambda dtype: dtype.kind not in "mM" or dtype.isnative)
leaves = (
    hashables
    | st.floats()
    | st.sampled_from([*SPACES, *SCHEDULES, *NAMED, *OTHERS])
    | hnp.arrays(dtypes | hnp.unicode_string_dtypes(), hnp.array_shapes(min_dims=0, min_side=0))
    | hnp.from_dtype(np.dtype(np.float32))
    | hnp.from_dtype(np.dtype(np.int8))
    | hnp.from_dtype(np.dtype(bool))
    | st.builds(
        small_box,
        st.lists(st.integers(-9, -1), min_size=2, max_size=2),
        st.just([1, np.inf]),
        st.just(np.float32),
    )
)
values = st.recursive(
    leaves,
    lambda inner: (
        st.lists(inner, max_size=4)
        | st.tuples(inner, inner)
        | st.dictionaries(st.sampled_from([":kind:", ":plain:", ":serialized:", "a", "b"]), inner)
        | st.dictionaries(hashables, inner, max_size=3)
        | st.dictionaries(st.text(), inner, max_size=3).map(OrderedDict)
        | st.builds(deque, st.lists(inner, max_size=3), st.none() | st.integers(2, 5))
    ),
    max_leaves=8,
)


@given(st.dictionaries(st.text(min_size=1), values, max_size=4))
def test_attributes_come_back_as_they_were_without_a_pickle(data):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pickle, "loads", None)
        loaded, params = round_trip(data)
    assert_same(loaded, data)
    assert_same(params, PARAMS)


@given(st.dictionaries(st.text(min_size=1), values, max_size=4))
def test_sb3_reads_the_same_attributes(data):
    file = io.BytesIO()
    save_zip(file, data, PARAMS)
    loaded, params, variables = load_from_zip_file(file)
    assert_same(loaded, data)
    assert params == {} and variables is None


def kind_of(value: object) -> str:
    """An id that is the same in every process: no addresses."""
    return type(value).__name__


@pytest.mark.parametrize("value", [*SPACES, *SCHEDULES, *NAMED, *OTHERS], ids=kind_of)
def test_every_known_kind_has_a_plain_form_and_sb3s(value):
    file = io.BytesIO()
    save_zip(file, {"x": value}, PARAMS)
    entry = json.loads(zipfile.ZipFile(file).read("data"))["x"]
    assert set(entry) == {":plain:", ":type:", ":serialized:"}
    assert entry[":type:"] == str(type(value))
    assert_same(decode(entry[":plain:"]), value)


def test_json_values_are_stored_as_they_are():
    data = {
        "gamma": 0.99,
        "seed": None,
        "net_arch": {"pi": [64, 64], "vf": []},
        "on": True,
        "t": 2**70,
        "s": "é\ud800",
    }
    file = io.BytesIO()
    save_zip(file, data, PARAMS)
    assert json.loads(zipfile.ZipFile(file).read("data")) == data
    assert_same(load_zip(file)[0], data)


def test_spaces_go_on_sampling_where_they_were():
    for space in (
        seeded(spaces.Box(-np.inf, 1, (3,))),
        seeded(spaces.Dict(a=spaces.MultiDiscrete([50, 60]))),
    ):
        copy = round_trip({"space": space})[0]["space"]
        np.testing.assert_equal([copy.sample() for _ in range(3)], [space.sample() for _ in range(3)])


def test_sb3s_old_schedule_functions_become_its_new_classes():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # they are deprecated
        linear, constant = utils.get_linear_fn(1.0, 0.1, 0.5), utils.constant_fn(0.2)
        wrapped = utils.get_schedule_fn(linear)
    data, _ = round_trip({"linear": linear, "constant": constant, "wrapped": wrapped})
    assert_same(data["linear"], utils.LinearSchedule(1.0, 0.1, 0.5))
    assert_same(data["constant"], utils.ConstantSchedule(0.2))
    assert_same(data["wrapped"], utils.FloatSchedule(utils.LinearSchedule(1.0, 0.1, 0.5)))
    for progress in (1.0, 0.8, 0.5, 0.2, 0.0):
        assert data["linear"](progress) == linear(progress)


def test_jax_arrays_are_loaded_as_numpy():
    data, _ = round_trip({"x": jnp.arange(3.0), "nested": {"y": [jnp.int32(2)]}})
    assert_same(data, {"x": np.arange(3, dtype=np.float32), "nested": {"y": [np.array(2, np.int32)]}})
    assert data["x"].flags.writeable


def test_policies_of_ours_are_found_by_name(monkeypatch):
    class MlpPolicy(torch.nn.Module):
        pass

    module = types.ModuleType("sb3_bridge.policies")
    module.MlpPolicy, module.CnnPolicy, module.helper = MlpPolicy, type("Other", (MlpPolicy,), {}), len
    monkeypatch.setitem(sys.modules, "sb3_bridge.policies", module)
    form = encode({"policy_class": MlpPolicy})["policy_class"]
    assert form == {":kind:": "reference", "module": "sb3_bridge.policies", "name": "MlpPolicy"}
    assert decode(form) is MlpPolicy
    with pytest.raises(ValueError, match="helper is not among"):
        decode({**form, "name": "helper"})
    for stranger in (module.CnnPolicy, type("MlpPolicy", (torch.nn.Module,), {})):
        with pytest.raises(NotPlainError):
            encode(stranger)


class UserArray(np.ndarray):
    pass


class UserFloat(float):
    pass


class UserScalar(np.float64):
    pass


def with_more(schedule):
    schedule.more = 1
    return schedule


@pytest.mark.parametrize(
    "value",
    [
        lambda progress: progress,
        utils.FloatSchedule(lambda progress: progress),
        np.zeros(2).view(UserArray),
        UserFloat(2),
        UserScalar(2),
        with_more(utils.LinearSchedule(1, 0, 1)),
        np.array([None, 1], object),
        np.zeros(2, [("a", "f4")]),
        optax.inject_hyperparams(optax.adam),
        jnp.load,
        functools.partial(optax.adam, b1=0.5),
        spaces.Text(3),
        optax.adam(1e-3),
        {"deep": [(print,)]},
    ],
    ids=kind_of,
)
def test_what_is_not_known_exactly_is_not_plain(value):
    with pytest.raises(NotPlainError):
        encode(value)


def test_lookalikes_of_sb3s_closures_are_not_taken_for_them():
    def get_linear_fn(start):
        def func(progress):
            return start

        return func

    with pytest.raises(NotPlainError):
        encode(get_linear_fn(1.0))


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


# --- SB3 as the oracle ------------------------------------------------------------------------------------------------


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


# --- What only a pickle can hold --------------------------------------------------------------------------------------


def user_data():
    return {
        "gamma": 0.9,
        "reward_function": lambda x: x + 1,
        "lr_schedule": utils.FloatSchedule(lambda p: 2 * p),
    }


def test_one_warning_names_all_that_was_left_out(tmp_path):
    save_zip(tmp_path / "m", user_data(), PARAMS)
    with pytest.warns(UserWarning, match="left out reward_function, lr_schedule") as caught:
        data, _ = load_zip(tmp_path / "m")
    assert data == {"gamma": 0.9}
    assert len(caught) == 1 and caught[0].filename == __file__
    message = str(caught[0].message)
    for part in (str(tmp_path / "m"), "{'reward_function': ..., 'lr_schedule': ...}", "allow_pickle=True"):
        assert part in message


def test_custom_objects_replace_what_is_in_the_file_without_a_warning():
    custom = {"reward_function": 1, "lr_schedule": 2, "gamma": 3, "not in the file": 4}
    assert round_trip(user_data(), custom_objects=custom)[0] == {
        "gamma": 3,
        "reward_function": 1,
        "lr_schedule": 2,
    }
    with pytest.raises(ValueError, match="custom_objects=.*must be a dict"):
        round_trip({}, custom_objects=["lr_schedule"])


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


# --- Hostile and damaged files ----------------------------------------------------------------------------------------


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


def test_no_module_is_imported_that_a_file_names(tmp_path, monkeypatch):
    (tmp_path / "evil_module.py").write_text(
        f"import os\nos.mkdir({str(tmp_path / 'mark')!r})\nrelu = print\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    for module in ("evil_module", "jax.nn.evil_module", "evil_module.jax.nn"):
        form = {":kind:": "reference", "module": module, "name": "relu"}
        with pytest.raises(ValueError, match="'f' in entry 'data'.*not among.*custom_objects"):
            load_zip(with_json({"f": {":plain:": {"activation_fn": [form]}}}), allow_pickle=True)
    assert not (tmp_path / "mark").exists() and "evil_module" not in sys.modules
    importlib.import_module("evil_module")
    assert (tmp_path / "mark").exists()


@pytest.mark.parametrize(
    ("module", "name"),
    [
        ("os", "system"),
        ("builtins", "eval"),
        ("jax.numpy", "load"),
        ("jax.numpy", "fromfile"),
        ("jax.numpy", "pi"),
        ("jax.nn", "initializers"),
        ("jax.nn", "relu.__globals__"),
        ("optax", "__getattr__"),
        ("optax", "functools"),
        ("optax", "Schedule"),
        ("optax", "GradientTransformation"),
        ("torch.nn", "functional"),
        ("torch.nn", "Parameter"),
        ("numpy", "load"),
        ("stable_baselines3.common.policies", "make_proba_distribution"),
        ("jax.nn", None),
        (["jax.nn"], "relu"),
        (None, "relu"),
    ],
)
def test_a_file_can_name_only_what_is_trusted(module, name):
    form = {":kind:": "reference", "module": module, "name": name}
    with pytest.raises(ValueError, match="'f' in entry 'data' cannot be read"):
        load_zip(with_json({"f": {":plain:": form}}))
    with pytest.raises(ValueError, match="'f' in entry 'data' cannot be read"):
        load_zip(with_json({"f": {":plain:": {":kind:": "FloatSchedule", "value_schedule": form}}}))


@pytest.mark.parametrize(
    "form",
    [
        {":kind:": "later"},
        {":kind:": ["tuple"]},
        {":kind:": "tuple"},
        {":kind:": "tuple", "items": 3},
        {":kind:": "dict", "items": [[[], 1]]},
        {":kind:": "deque", "items": [], "maxlen": -1},
        {":kind:": "float", "text": "one"},
        {":kind:": "float", "text": "1.0", "more": 1},
        {":kind:": "ndarray", "dtype": "<f4", "shape": [2], "content": "AAAA"},
        {":kind:": "ndarray", "dtype": "<f4", "shape": [10**12], "content": ""},
        {":kind:": "ndarray", "dtype": "<f4", "shape": [-1], "content": ""},
        {":kind:": "ndarray", "dtype": "<f4", "shape": [1], "content": "no base64!"},
        {":kind:": "ndarray", "dtype": "O", "shape": [1], "content": "AAAAAAAAAAA="},
        {":kind:": "dtype", "text": "O"},
        {":kind:": "device", "text": "abacus"},
        {":kind:": "Discrete", "seed": None, "n": 0, "start": 0},
        {":kind:": "Box", "seed": None, "low": 1, "high": 0, "bounded_below": 1, "bounded_above": 1},
        {":kind:": "Dict", "seed": None, "parts": {"a": 1}},
        {":kind:": "MultiBinary", "seed": None, "n": "x"},
        {":kind:": "generator", "state": {"bit_generator": "MT19937"}},
        {":kind:": "FloatSchedule", "value_schedule": "x"},
    ],
    ids=kind_of,
)
def test_a_tampered_form_is_named(form):
    with pytest.raises(ValueError, match="'thing' in entry 'data' cannot be read"):
        load_zip(with_json({"thing": {":plain:": form}}))
    assert load_zip(with_json({"thing": {":plain:": form}}), custom_objects={"thing": 1})[0] == {"thing": 1}


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
def test_any_damaged_byte_is_an_error_or_harmless(damage):
    data = {"x": (1, 2.5), "space": spaces.Discrete(3)}
    file = io.BytesIO()
    save_zip(file, data, PARAMS)
    content, n_errors = file.getvalue(), 0
    for i in range(len(content)):
        broken = (
            content[:i] if damage == "cut" else content[:i] + bytes([content[i] ^ 0x11]) + content[i + 1 :]
        )
        try:
            loaded = load_zip(io.BytesIO(broken))
        except ValueError:
            n_errors += 1
        else:
            assert_same(loaded, (data, PARAMS))
    assert n_errors == len(content) if damage == "cut" else n_errors > len(content) // 2


# --- Policies alone ---------------------------------------------------------------------------------------------------


class Net(torch.nn.Module):
    """A stand-in for a policy of ours: parameters and buffers of several dtypes, arguments of several kinds."""

    def __init__(self, space, activation_fn=None, net_arch=()):
        super().__init__()
        self.arguments = {"space": space, "activation_fn": activation_fn, "net_arch": net_arch}
        self.actor = torch.nn.Linear(2, 3)
        self.low_precision = torch.nn.Parameter(torch.randn(2).bfloat16())
        self.register_buffer("steps", torch.tensor(0))

    def _get_constructor_parameters(self):
        return dict(self.arguments)


def test_a_policy_alone(tmp_path):
    policy = Net(spaces.Box(-1, 1, (2,)), linen.relu, (64, 64))
    policy.steps += 5
    policy_to_file(policy, tmp_path / "policy.pkl")
    loaded = policy_from_file(Net, tmp_path / "policy.pkl")
    assert_same(loaded.arguments, policy.arguments)
    state, expected = loaded.state_dict(), policy.state_dict()
    assert list(state) == list(expected) == ["half", "actor.weight", "actor.bias", "steps"] or set(
        state
    ) == set(expected)
    for name, tensor in expected.items():
        assert state[name].dtype == tensor.dtype and torch.equal(state[name], tensor)
    with torch.no_grad():
        loaded.low_precision += 1  # trains on
    assert load_zip(tmp_path / "policy.pkl")[1]["policy"]["actor"]["weight"].shape == (3, 2)


def test_sb3s_own_policy_predicts_the_same_bits_after_a_round_trip(ppo, tmp_path):
    policy_to_file(ppo.policy, tmp_path / "policy")
    loaded = policy_from_file(ActorCriticPolicy, tmp_path / "policy", device="cpu")
    observations = np.random.default_rng(0).normal(size=(50, 4)).astype(np.float32)
    assert np.array_equal(
        loaded.predict(observations, deterministic=True)[0],
        ppo.policy.predict(observations, deterministic=True)[0],
    )
    tensor = torch.as_tensor(observations)
    assert torch.equal(loaded.predict_values(tensor), ppo.policy.predict_values(tensor))


def test_policy_files_and_model_files_are_told_apart(tmp_path):
    save_zip(tmp_path / "model", {"policy_class": ActorCriticPolicy}, PARAMS)
    save_zip(tmp_path / "other", {}, {"actor": {}})
    for name in ("model", "other"):
        with pytest.raises(ValueError, match=rf"{name} holds a whole model"):
            policy_from_file(Net, tmp_path / name)
    save_zip(tmp_path / "other", {"wrong": 1}, PARAMS)
    with pytest.raises(ValueError, match="other does not hold what the policy is made from.*custom_objects"):
        policy_from_file(Net, tmp_path / "other")


def test_a_policys_own_classes_are_passed_in_custom_objects(tmp_path):
    def mine(x):
        return x

    policy_to_file(Net(spaces.Discrete(2), mine), tmp_path / "policy")
    with pytest.warns(UserWarning, match="left out activation_fn"):
        assert policy_from_file(Net, tmp_path / "policy").arguments["activation_fn"] is None
    custom = {"activation_fn": mine}
    assert (
        policy_from_file(Net, tmp_path / "policy", custom_objects=custom).arguments["activation_fn"] is mine
    )
    pickled = policy_from_file(Net, tmp_path / "policy", allow_pickle=True).arguments["activation_fn"]
    assert pickled is not mine and pickled(3) == 3
