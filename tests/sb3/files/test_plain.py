"""Plain forms: exact round trips, and nothing looked up that a file may not name."""

import functools
import importlib
import io
import json
import pathlib
import pickle
import sys
import types
import warnings
import zipfile
from collections import OrderedDict, deque

import hypothesis.extra.numpy as hnp
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import torch
from flax import linen
from gymnasium import spaces
from hypothesis import given
from hypothesis import strategies as st
from sb3.files.checks import PARAMS, assert_same, kind_of, round_trip, small_box, with_json
from stable_baselines3.common import utils
from stable_baselines3.common.policies import ActorCriticPolicy
from stable_baselines3.common.save_util import load_from_zip_file

from sb3_bridge.files.model_zip import (
    load_zip,
    save_zip,
)
from sb3_bridge.files.plain import NotPlainError, decode, encode


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
