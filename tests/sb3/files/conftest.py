"""Fixtures of the tests of files."""

import pickle
import sys

import cloudpickle
import pytest
from sb3.files.models import KINDS, ROLLOUT, make, make_ppo


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
    """Whatever unpickles fails, but for what a copy of an environment answers through its pipe."""
    loads = pickle.loads

    def refuse(*args, **kwargs):
        if sys._getframe(1).f_globals["__name__"] == "sb3_bridge.clones.sandbox":
            return loads(*args, **kwargs)
        raise AssertionError("something was unpickled")

    for module in (pickle, cloudpickle):
        for name in ("load", "loads"):
            monkeypatch.setattr(module, name, refuse)
    monkeypatch.setattr(pickle, "Unpickler", refuse)
