"""Snapshots: restored environments repeat themselves, the original is untouched, what cannot be saved is refused."""

from __future__ import annotations

import collections
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
from gymnasium import spaces
from gymnasium.wrappers import FrameStackObservation, TimeLimit
from sb3.clones.kinds import play
from sb3.envs import RandomEnv
from stable_baselines3.common.monitor import Monitor

from sb3_bridge.clones.copying import Unclonable
from sb3_bridge.clones.core_state import cores_for
from sb3_bridge.clones.replay_check import check
from sb3_bridge.clones.snapshot import Cloner, CloneReport

pytestmark = pytest.mark.usefixtures("quick_forks")

IDS = ["CartPole-v1", "MountainCarContinuous-v0", "FrozenLake-v1", "Taxi-v4", "Blackjack-v1"]


def sampled(env: Any, n: int, seed: int) -> list[Any]:
    env.action_space.seed(seed)
    return [env.action_space.sample() for _ in range(n)]


@pytest.mark.parametrize("name", IDS)
def test_every_restore_repeats_what_the_original_does(name):
    env = gym.make(name)
    report = check(env)
    assert report.passed and report.way == "attributes", report.reason
    assert min(report.snapshot_us, report.restore_us, report.step_us) > 0
    cloner = Cloner(env, report)
    env.reset(seed=3)
    replica, actions = cloner.replica(), sampled(env, 40, 1)
    for start in (0, 9):
        snapshot = cloner.save()
        future = play(env, actions[start : start + 9])
        for _ in range(2):
            cloner.restore(replica, snapshot)
            assert play(replica.layers[0], actions[start : start + 9]) == future


def test_wrappers_with_state_are_part_of_it_and_monitor_is_not(tmp_path):
    env = Monitor(FrameStackObservation(gym.make("CartPole-v1"), 3), str(tmp_path / "run"))
    report = check(env)
    assert report.passed, report.reason
    cloner = Cloner(env, report)
    first, _ = env.reset(seed=0)
    replica = cloner.replica()
    cloner.restore(replica, cloner.save())
    observation = replica.step(1)[0]
    assert observation.shape == (3, 4)
    np.testing.assert_array_equal(observation[1], first[2])
    assert not any(isinstance(layer, Monitor) for layer in replica.layers)
    for _ in range(400):
        if any(replica.step(0)[2:4]):
            break
    assert env.get_episode_rewards() == [] and (tmp_path / "run.monitor.csv").read_text().count("\n") == 2
    env.close()


def test_new_seeds_replace_the_future_and_equal_seeds_share_it():
    env = gym.make("FrozenLake-v1")
    cloner = Cloner(env, check(env))
    env.reset(seed=0)
    snapshot, replica = cloner.save(), cloner.replica()

    def future(seed: int | None) -> list[Any]:
        words = None if seed is None else np.random.default_rng(seed).integers(0, 2**64, 4, np.uint64)
        cloner.restore(replica, snapshot, words)
        return play(replica.layers[0], [2, 1] * 10)

    assert future(1) == future(1)
    assert len({str(future(seed)) for seed in range(8)}) > 4
    assert future(None) == play(env, [2, 1] * 10)


class Custom(gym.Env):
    """Everything that a state may be made of."""

    observation_space = spaces.Box(-np.inf, np.inf, (3,), np.float64)
    action_space = spaces.Discrete(3)

    def __init__(self) -> None:
        self.table = {(i, j): [float(i), j] for i in range(40) for j in range(40)}
        self.reset(seed=0)

    def reset(self, *, seed: int | None = None, options: Any = None) -> Any:
        super().reset(seed=seed)
        self.own = np.random.default_rng(seed if seed is not None else int(self.np_random.integers(1000)))
        self.position = np.zeros(2)
        self.same = self.position
        self.recent: Any = collections.deque([0, 0], maxlen=2)
        self.nested = {"counts": [0, 0], "marks": {1}}
        self.time = 0
        return self._seen(), {}

    def _seen(self) -> np.ndarray:
        return np.array(
            [self.same[0], self.nested["counts"][0] + sum(self.recent), len(self.nested["marks"])]
        )

    def step(self, action: Any) -> Any:
        self.position += self.own.normal(size=2) + action + self.table[self.time % 40, 1][0]
        self.recent.append(int(action))
        self.nested["counts"][0] += int(action)
        self.nested["marks"].add(self.time % 7)
        self.time += 1
        return self._seen(), float(self.same.sum()), self.time >= 23, False, {}


def test_aliases_containers_and_own_generators_are_restored_and_heavy_constants_left_out():
    report = check(Custom())
    assert report.passed and report.way == "attributes", report.reason
    assert report.constants == ((0, "table"),)


def test_a_constant_that_changes_after_all_is_found():
    env = Custom()
    cloner: Any = Cloner(env, check(env))
    cloner.replica()
    assert cloner.changed_constants() == []
    env.table[0, 1] = [5.0, 1]
    assert cloner.changed_constants() == ["Custom.table"]
    replica = cloner.replica()
    cloner.restore(replica, cloner.save())
    assert replica.layers[-1].table[0, 1] == [5.0, 1]
    assert cloner.changed_constants() == []


class Opaque:
    """Like a SWIG object."""

    def __init__(self) -> None:
        self.x = 0.0

    def __reduce_ex__(self, protocol: Any) -> Any:
        raise TypeError("cannot pickle this")


class Sealed(gym.Env):
    """A state that cannot be copied attribute by attribute; its functions save it, and may lie."""

    observation_space = spaces.Box(-np.inf, np.inf, (1,), np.float64)
    action_space = spaces.Discrete(2)

    def __init__(self, honest: bool = True) -> None:
        self.world, self.honest = Opaque(), honest

    def __deepcopy__(self, memo: Any) -> Sealed:
        return type(self)(self.honest)

    def reset(self, *, seed: int | None = None, options: Any = None) -> Any:
        super().reset(seed=seed)
        self.world.x = 0.0
        return np.array([0.0]), {}

    def step(self, action: Any) -> Any:
        self.world.x += 1.0 + action
        return np.array([self.world.x]), self.world.x, self.world.x > 30, False, {}

    def get_state(self) -> float:
        return self.world.x if self.honest else 1.0

    def set_state(self, state: float) -> None:
        self.world.x = state


def test_hooks_come_first_and_a_false_hook_is_refused_with_the_reason():
    assert cores_for(Sealed())[0].name == "get_state/set_state"
    report = check(Sealed())
    assert report.way == "get_state/set_state", report.reason
    report = check(Sealed(honest=False))
    assert not report.passed
    assert "get_state/set_state: after a restore at step 0, the same actions do not repeat" in report.reason
    assert "attributes: Sealed.world cannot be copied: cannot pickle this" in report.reason
    with pytest.raises(Unclonable, match="Sealed.world"):
        Cloner(Sealed(), report)


def test_a_users_pair_is_used_instead_of_everything_else():
    def save(env: Any) -> float:
        return env.world.x

    def restore(env: Any, state: float) -> None:
        env.world.x = state

    assert check(Sealed(honest=False), (save, restore)).way == "snapshot functions"
    report = check(Sealed(), (lambda env: None, lambda env, state: None))
    assert not report.passed and report.reason.count("\n") == 0


class Copied(Sealed):
    """Copied by its own ``__deepcopy__`` alone."""

    get_state: Any = None

    def __deepcopy__(self, memo: Any) -> Copied:
        twin = type(self)()
        twin.world.x = self.world.x
        return twin


def test_an_environment_that_copies_itself_needs_a_pair_of_functions():
    report = check(TimeLimit(Copied(), 9))
    assert not report.passed and "Copied.world cannot be copied" in report.reason
    assert "pass dynamics=(get_state, set_state)" in report.reason
    assert report.description.startswith("cannot be cloned exactly: ")
    assert check(TimeLimit(Copied(), 9), (Sealed.get_state, Sealed.set_state)).passed


def test_generators_of_spaces_are_part_of_the_state():
    report = check(RandomEnv(spaces.Box(-1, 1, (2,)), spaces.Discrete(2)))
    assert report.passed, report.reason


def test_changes_made_after_construction_are_copied():
    env = gym.make("Pendulum-v1")
    env.unwrapped.g = 2.5
    cloner = Cloner(env, check(env))
    env.reset(seed=0)
    replica = cloner.replica()
    cloner.restore(replica, cloner.save())
    action = np.ones(1, np.float32)
    np.testing.assert_array_equal(replica.step(action)[0], env.step(action)[0])
    env.unwrapped.g = 7.0
    cloner.restore(replica, cloner.save())
    np.testing.assert_array_equal(replica.step(action)[0], env.step(action)[0])


def test_rendering_is_not_copied():
    env = gym.make("CartPole-v1", render_mode="rgb_array")
    env.reset(seed=0)
    env.render()
    report = check(env)
    assert report.passed, report.reason
    replica = Cloner(env, report).replica()
    assert replica.layers[-1].screen is None and env.unwrapped.screen is not None  # type: ignore[attr-defined]
    env.close()


@pytest.mark.parametrize("name", ["InvertedPendulum-v5", "Hopper-v5", "HalfCheetah-v5", "Reacher-v5"])
def test_mujoco_repeats_bit_for_bit(name):
    pytest.importorskip("mujoco", reason="gymnasium[mujoco] is not installed")
    env = gym.make(name)
    report = check(env)
    assert report.way == "MuJoCo state", report.reason
    env.unwrapped.model.opt.gravity[2] = -5.0  # a change after construction
    cloner = Cloner(env, report)
    env.reset(seed=1)
    replica, actions = cloner.replica(), sampled(env, 60, 4)
    for start in range(0, 60, 20):
        snapshot = cloner.save()
        future = play(env, actions[start : start + 20])
        cloner.restore(replica, snapshot)
        play(replica.layers[0], actions[:5])
        cloner.restore(replica, snapshot)
        assert play(replica.layers[0], actions[start : start + 20]) == future
    env.close()


def test_a_report_is_one_line():
    report = CloneReport("attributes", snapshot_us=1.25, restore_us=2.0, step_us=3.0)
    assert report.description == (
        "exact clones by attributes (replay check passed; 1.2 us a snapshot, 2.0 a restore, 3.0 a step)"
    )
    assert CloneReport("", reason="a: b\nc: d").description == "cannot be cloned exactly: a: b; c: d"
