"""Branches on the host, over simulators of plain numbers."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from grpo_jax.groups.host_branch import Call, Reached, Settings, group_returns


class Numbers:
    """N simulators; a state is a number that each action is added to. It ends at 10 and is cut at 7, if it stops there."""

    def __init__(self, kept: np.ndarray):  # [T, N]
        self.kept, self.states = kept, [dict[int, float]() for _ in range(kept.shape[1])]
        self.asked: list[int] = []

    def step(self, calls: list[Call | None]) -> list[Reached | None]:
        return [None if call is None else self._step(index, call) for index, call in enumerate(calls)]

    def _step(self, index: int, call: Call) -> Reached:
        states = self.states[index]
        for slot, handle in call.begins:
            states[slot] = self.kept[handle, index]
        for slot, action in zip(call.slots, call.actions, strict=True):
            states[slot] += action
        now = np.array([states[slot] for slot in call.slots])
        self.asked.append(len(now))
        return Reached(now[:, None], now, now >= 10, now == 7)

    def seen(self, observations: Any) -> Any:
        return observations * 2

    def original(self, observations: Any) -> Any:
        return observations

    def rewards(self, rewards: np.ndarray) -> np.ndarray:
        return rewards

    def actions(self, actions: Any) -> np.ndarray:
        return np.asarray(actions)


def ahead(observations: Any, uniforms: np.ndarray) -> np.ndarray:
    return np.where(observations[:, 0] > 8, 3, 1)  # as it sees them: twice the number


def by_hand(state: float, action: int, horizon: int, gamma: float, value: float, past: bool) -> float:
    total = 0.0
    for k in range(horizon):
        state += action
        total += gamma**k * state
        if state >= 10:
            return total
        if (state == 7 and not past) or k + 1 == horizon:
            return total + gamma ** (k + 1) * value * 2 * state
        action = 3 if state > 4 else 1
    return total


@pytest.mark.parametrize("horizon", [1, 4])
@pytest.mark.parametrize("past", [False, True])
@pytest.mark.parametrize("pool", [1, 3, 64])
def test_returns_are_those_of_each_branch_by_itself(horizon, past, pool):
    kept = np.arange(6.0).reshape(3, 2)
    actions = np.broadcast_to(np.arange(1, 4), (6, 3))
    settings = Settings(horizon=horizon, gamma=0.5, past_truncation=past)
    value = lambda observations: 0.25 * observations
    wanted = np.array([True, True, False, True, True, True])
    returns, n_steps = group_returns(
        numbers := Numbers(kept), ahead, [0, 1, 2], actions, settings, pool=pool, value=value, wanted=wanted
    )
    for state in range(6):
        expected = [by_hand(state, action, horizon, 0.5, 0.25, past) for action in (1, 2, 3)]
        np.testing.assert_allclose(returns[state], expected if wanted[state] else 0.0, rtol=1e-6)
    assert n_steps == sum(numbers.asked) and max(numbers.asked) <= pool and returns.dtype == np.float32


class Doors(Numbers):
    """The same; from an odd number no step of 1 may be made, from any other none of 2."""

    def masks(self, now: np.ndarray) -> np.ndarray:
        is_odd = now % 2 == 1
        return np.stack([is_odd | True, ~is_odd, is_odd, is_odd | True], axis=1)

    def _step(self, index: int, call: Call) -> Reached:
        for slot, handle in call.begins:
            self.states[index][slot] = self.kept[handle, index]
        before = np.array([self.states[index][slot] for slot in call.slots])
        assert self.allows(self.masks(before), call.actions).all()
        reached = super()._step(index, call._replace(begins=[]))
        return reached._replace(masks=self.masks(reached.observations[:, 0]))

    def allows(self, masks: np.ndarray, actions: np.ndarray) -> np.ndarray:
        return masks[np.arange(len(actions)), actions]


def smallest(observations: Any, uniforms: np.ndarray, masks: np.ndarray) -> np.ndarray:
    np.testing.assert_array_equal(masks[:, 1], observations[:, 0] / 2 % 2 == 0)
    return 1 + np.argmax(masks[:, 1:], axis=1)


@pytest.mark.parametrize("persistence", [None, 1.0])
def test_masks_are_told_to_the_policy_and_forbid_what_persists(persistence):
    kept = np.array([[0.0, 1.0]])
    wanted = np.array([[True, False, True], [False, True, True]])  # steps of 1, 2 and 3
    settings = Settings(horizon=3, gamma=1.0, persistence=persistence)
    actions = np.broadcast_to(np.arange(1, 4), (2, 3))
    returns, n_steps = group_returns(Doors(kept), smallest, [0], actions, settings, pool=4, wanted=wanted)
    # By hand: a step of 1 cannot be held at 1, those of 2 stay among odd numbers, 3 is allowed everywhere; 7 is the end.
    free = [[1 + 3 + 5, 0, 3 + 5 + 7], [0, 3 + 5 + 7, 4 + 5 + 7]]
    held = [[1 + 3 + 5, 0, 3 + 6 + 9], [0, 3 + 5 + 7, 4 + 7]]
    np.testing.assert_array_equal(returns, free if persistence is None else held)
    assert n_steps == (12 if persistence is None else 11)


class Earned:
    """A user's reward: the size of the step. Counts its calls."""

    framework = "numpy"

    def __init__(self) -> None:
        self.sizes: list[int] = []

    def batch(self, states: Any, actions: Any, next_states: Any) -> np.ndarray:
        self.sizes.append(len(states))
        np.testing.assert_array_equal(next_states[:, 0] - states[:, 0], actions)
        return actions.astype(np.float32)


def test_a_reward_function_is_asked_once_for_many_steps():
    kept = np.zeros((1, 2))
    reward = Earned()
    settings = Settings(horizon=3, gamma=1.0)
    actions = np.array([[1, 2], [1, 2]])
    observations = np.zeros((2, 1))
    returns, _ = group_returns(
        Numbers(kept), ahead, [0], actions, settings, pool=2, reward=reward, observations=observations
    )
    assert returns.tolist() == [[3.0, 4.0]] * 2 and reward.sizes == [12]


def test_what_does_not_fit_is_refused():
    with pytest.raises(ValueError, match="horizon=0"):
        Settings(horizon=0, gamma=1.0)
    numbers, settings, actions = (
        Numbers(np.zeros((2, 1))),
        Settings(horizon=1, gamma=1.0),
        np.zeros((3, 2), int),
    )
    with pytest.raises(ValueError, match="3 states"):
        group_returns(numbers, ahead, [0, 1], actions, settings, pool=1)
    with pytest.raises(ValueError, match="observations"):
        group_returns(numbers, ahead, [0, 1, 1], actions, settings, pool=1, reward=Earned())
