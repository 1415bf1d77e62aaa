"""What the tests of files share: files by hand, and equality to the last bit."""

import io
import json
import zipfile
from collections import deque

import numpy as np
from gymnasium import spaces
from stable_baselines3.common import utils

from sb3_bridge.files.model_zip import (
    load_zip,
    save_zip,
)

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


def edited(content=None, **entries):
    """A file of ours (or that one) in which entries were replaced (bytes or text), or removed (None).

    Packed as earlier versions did, without a seal, unless a ``_format`` is among the entries.
    """
    file, changed = io.BytesIO(content or b""), io.BytesIO()
    if content is None:
        save_zip(file, {"x": 1}, PARAMS)
    with zipfile.ZipFile(file) as old, zipfile.ZipFile(changed, "w") as new:
        contents = {name: old.read(name) for name in old.namelist()} | {"_format": None} | entries
        for name, content in contents.items():
            if content is not None:
                new.writestr(name, content)
    changed.seek(0)
    return changed


def with_json(attributes):
    return edited(data=json.dumps(attributes))


def kind_of(value: object) -> str:
    """An id that is the same in every process: no addresses."""
    return type(value).__name__


def small_box(low, high, dtype):
    return spaces.Box(np.array(low, dtype), np.array(high, dtype), dtype=dtype)
