"""Clones prove themselves while they are used: what the check at construction cannot see ends them, and says why.

Each environment is an ordinary one for its first ``LATE`` steps, or ``LATER`` where replicas age by themselves. Episodes are
so short that the check at construction plays some forty steps of it.
"""

from __future__ import annotations

import functools
import itertools
import os
import re
from collections.abc import Callable
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
from gymnasium.wrappers import TimeLimit
from sb3.clones.kinds import HalfSaved, HalfSavedHidden
from sb3.envs import DictOfOne
from sb3.sleds import Sled, Uncopyable, make
from stable_baselines3.common.logger import Logger, SeqWriter
from stable_baselines3.common.monitor import Monitor
from stable_baselines3.common.vec_env import DummyVecEnv, SubprocVecEnv, VecNormalize

from sb3_bridge import GRPO
from sb3_bridge.clones.copying import Unclonable

LATE, LATER = 200, 300
ITERATION = 2 * 64  # environments, steps
SHARED: dict[str, float] = {"tide": 0.0}


class Late(Sled):
    """Counts its steps, those of all episodes."""

    def __init__(self, late: int = LATE):
        super().__init__()
        self.late, self.age = late, 0

    def step(self, action: Any) -> Any:
        self.age += 1
        observation, reward, *rest = super().step(action)
        return observation, reward + (self.change() if self.age > self.late else 0.0), *rest

    def change(self) -> float:
        """What happens once the time has come; its reward is added."""
        return 0.0


class Drawing(Late):
    """Draws from the generator that all share."""

    def change(self) -> float:
        return np.random.normal()


class Sharing(Late):
    """Counts in a dict that copies share."""

    def change(self) -> float:
        SHARED["tide"] += 1.0
        return SHARED["tide"]


class Opening(Late):
    """Holds an open file, which nobody can copy."""

    log: Any = None

    def change(self) -> float:
        self.log = opened()
        return 0.0


@functools.lru_cache
def opened() -> Any:
    return open(os.devnull)


@pytest.fixture(autouse=True, scope="module")
def closed():
    yield
    opened().close()


class Ending(Late):
    """Ends by a dict that copies share: seen in neither reward nor observation, but in the end alone."""

    def step(self, action: Any) -> Any:
        observation, reward, terminated, truncated, info = super().step(action)
        return observation, reward, terminated or SHARED["tide"] % 3 == 1, truncated, info

    def change(self) -> float:
        SHARED["tide"] += 1.0
        return 0.0


def half_saved() -> gym.Env:
    return HalfSavedHidden(LATER)


class Broken(Sled):
    """Takes the place of another one: pays by a dict that copies share, from the start."""

    def step(self, action: Any) -> Any:
        SHARED["tide"] += 1.0
        observation, _, *rest = super().step(action)
        return observation, SHARED["tide"], *rest


# The environment, and what the error says: the field, or why no state can be kept any longer.
FAULTS: dict[str, tuple[Callable[[], gym.Env], str]] = {
    "half saved": (half_saved, "environment [01]: .* clone's (reward|observation) is"),
    "draws": (Drawing, "environment [01]: .* clone's reward is"),
    "shares": (Sharing, "environment [01]: .* clone's reward is"),
    "opens a file": (Opening, r"Opening\.log cannot be copied"),
    "ends otherwise": (Ending, "environment [01]: .* clone's end of the episode is"),
}


class Told(SeqWriter):
    """What the logger was told in words."""

    def __init__(self) -> None:
        self.lines: list[str] = []

    def write_sequence(self, sequence: list[str]) -> None:
        self.lines.append(" ".join(map(str, sequence)))

    def write(self, *_: Any) -> None: ...

    def close(self) -> None: ...


def model_of(env: Any, dynamics: str, **settings: Any) -> GRPO:
    SHARED["tide"] = 0.0
    np.random.seed(0)
    common = {"n_steps": 64, "batch_size": 64, "horizon": 2, "branch_every": 1, "dynamics": dynamics}
    model = make(env, **common | settings)
    assert model.chosen_dynamics == "clone"
    return model


def must_be_refused(env: Any, message: str, **learn: Any) -> None:
    model = model_of(env, "clone")
    model.learn(ITERATION, **learn)  # nothing shows yet
    with pytest.raises(Unclonable) as caught:
        model.learn(7 * ITERATION, reset_num_timesteps=False, **learn)
    assert isinstance(caught.value, ValueError)
    assert caught.match(r"dynamics='clone' cannot be gone on with: at step \d+ of the rollout")
    assert caught.match(message)
    assert model.num_timesteps <= 6 * ITERATION, "found within an iteration or two"


def must_go_on_without_clones(env: Any, message: str, **learn: Any) -> None:
    told = Told()
    model = model_of(env, "auto")
    model.set_logger(Logger(None, [told]))
    while model.chosen_dynamics == "clone" and (found := model.num_timesteps) < 6 * ITERATION:
        model.learn(ITERATION, reset_num_timesteps=False, **learn)
    assert model.chosen_dynamics in ("learned", "episodes")
    model.learn(ITERATION, reset_num_timesteps=False)
    assert model.num_timesteps == found + 2 * ITERATION
    (line,) = [line for line in told.lines if "follows candidates in clones no longer" in line]
    assert re.search(message, line) and re.search(r"at step \d+ of the rollout", line), line


@pytest.mark.parametrize("judge", [must_be_refused, must_go_on_without_clones])
@pytest.mark.parametrize("fault", FAULTS)
def test_what_shows_late_ends_the_use_of_clones(fault, judge):
    env, message = FAULTS[fault]
    judge(DummyVecEnv([env, env]), message)


@pytest.mark.parametrize(
    ("fault", "judge"), [("draws", must_be_refused), ("opens a file", must_go_on_without_clones)]
)
def test_it_does_in_other_processes_too(fault, judge):
    make_env, message = FAULTS[fault]
    env = SubprocVecEnv([make_env] * 2)
    try:
        judge(env, message)
    finally:
        env.close()


def replacing(vec_env: DummyVecEnv, make_env: Callable[[], gym.Env]) -> Callable[..., bool]:
    """A callback that puts another environment in place of the second one, once, in the second iteration."""
    calls = itertools.count()

    def callback(variables: Any, _: Any) -> bool:
        if next(calls) == 64 + 20:
            other = make_env()
            other.reset(seed=1)
            vec_env.envs[1] = other
        return True

    return callback


@pytest.mark.parametrize("judge", [must_be_refused, must_go_on_without_clones])
@pytest.mark.parametrize(
    ("other", "message"), [(Broken, "changes when a replica is stepped"), (Uncopyable, "generator")]
)
def test_an_environment_that_is_replaced_by_one_without_clones_is_found(other, message, judge):
    env = DummyVecEnv([Sled, Sled])
    judge(env, message, callback=replacing(env, other))


def test_an_environment_that_is_replaced_by_another_one_is_followed():
    """As curricula do: the clones are then those of the new one, with other parameters."""
    env = DummyVecEnv([Sled, Sled])
    model = model_of(env, "clone")
    model.learn(4 * ITERATION, callback=replacing(env, lambda: Monitor(Sled(limit=5, edge=0.5))))
    assert isinstance(env.envs[1], Monitor) and model.chosen_dynamics == "clone"
    assert 4 * ITERATION * 3 < model.simulator_steps <= 4 * ITERATION * 3 * 2


ORDINARY: dict[str, Callable[[], Any]] = {
    "plain": lambda: DummyVecEnv([Sled, lambda: Monitor(Sled(6))]),
    "counter": lambda: DummyVecEnv([Late, Late]),
    # What its functions forget is an attribute, which is saved too.
    "half saved": lambda: DummyVecEnv([lambda: HalfSaved(LATE)] * 2),
    "normalized": lambda: VecNormalize(DummyVecEnv([Sled, Sled])),
    "normalized rewards": lambda: VecNormalize(DummyVecEnv([Sled, Sled]), norm_obs=False),
    "time limit": lambda: DummyVecEnv([lambda: TimeLimit(Sled(10_000, 1e6), 7)] * 2),
    "random": lambda: DummyVecEnv([lambda: gym.make("FrozenLake-v1")] * 2),
}


@pytest.mark.parametrize("kind", ORDINARY)
def test_ordinary_environments_are_never_refused(kind):
    for seed in range(2 if kind in ("plain", "random") else 1):
        model = model_of(ORDINARY[kind](), "clone", seed=seed)
        model.learn(4 * ITERATION)
        assert model.chosen_dynamics == "clone" and model.simulator_steps > 4 * ITERATION * 2


def test_ordinary_dicts_are_never_refused():
    for wrap in (lambda env: env, VecNormalize):
        env = wrap(DummyVecEnv([lambda: DictOfOne(Sled())] * 2))
        model = model_of(env, "clone", policy="MultiInputPolicy")
        model.learn(4 * ITERATION)
        assert model.chosen_dynamics == "clone"
