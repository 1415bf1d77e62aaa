"""Branches in clones, and in a function of the user's that knows the same world."""

from __future__ import annotations

import copy
import itertools
from collections import Counter
from types import SimpleNamespace
from typing import Any

import gymnasium as gym
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from sb3.sleds import (
    Remote,
    Sled,
    dummy,
    fares,
    glide,
    glide_jax,
    glide_torch,
    make,
    parameters,
    steady,
    updates_of,
)
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.monitor import Monitor, load_results
from stable_baselines3.common.vec_env import DummyVecEnv, SubprocVecEnv, VecNormalize

from sb3_bridge import GRPO
from sb3_bridge.clones.copying import Unclonable


class Film(BaseCallback):
    """Deep copies of the environments in every decision state, ``[T][N]``."""

    def __init__(self):
        super().__init__()
        self.states: list[Any] = []

    def _now(self) -> None:
        self.states.append([copy.deepcopy(env) for env in self.training_env.unwrapped.envs])

    def _on_rollout_start(self) -> None:
        self.states = []
        self._now()

    def _on_step(self) -> bool:
        self._now()
        return True


def by_hand(
    model: GRPO, states: Any, iteration: int, reward: Any, horizon: int, every: int
) -> tuple[np.ndarray, int]:
    """Group returns ``[T, N, 3]`` of copies that are stepped one after the other, and the number of steps."""
    returns, n_steps = np.zeros((model.n_steps, model.n_envs, 3)), 0
    for moment, index in itertools.product(range(model.n_steps), range(model.n_envs)):
        if (moment + index + iteration) % every:
            continue
        for candidate in range(3):
            env, action = copy.deepcopy(states[moment][index]), candidate
            for k in range(horizon):
                before = env.unwrapped.where.copy()
                observation, paid, terminated, truncated, _ = env.step(action)
                paid = paid if reward is None else reward(before, action, observation)
                returns[moment, index, candidate] += model.gamma**k * paid
                n_steps += 1
                if terminated or truncated:
                    break
                action = model.predict(observation, deterministic=True)[0]
            if model.bootstrap and not terminated:
                value = model.policy.predict_values(torch.as_tensor(observation[None])).item()
                returns[moment, index, candidate] += model.gamma ** (k + 1) * value
    return returns, n_steps


def squares(state: Any, action: Any, next_state: Any) -> Any:
    return 1.0 + next_state[0] ** 2 + 0.5 * state[1] ** 2 + 0.25 * action


@pytest.mark.parametrize("reward", [None, squares])
def test_group_returns_are_those_of_copies_stepped_by_hand(reward):
    """Their spread, of all wanted states and nothing of the others, in three iterations; and all steps are counted."""
    settings = {"horizon": 5, "branch_every": 2, "n_steps": 8, "gamma": 0.9, "learning_rate": 0.0}
    env = DummyVecEnv([lambda: Sled(6), lambda: Monitor(Sled(9))])
    model = steady(make(env, reward_function=reward, **settings))
    assert model.chosen_dynamics == "clone" and model.bootstrap == (reward is None)
    film, expected_steps, spreads = Film(), 0, []
    for iteration in range(3):
        (row,) = updates_of(model, 16, film, reset_num_timesteps=False)
        returns, n_steps = by_hand(model, film.states, iteration, reward, 5, 2)
        expected_steps += n_steps
        assert model.simulator_steps == expected_steps
        is_branched = (returns != 0).any(axis=2)
        assert is_branched.sum() == 8
        spreads.append(returns.std(axis=2)[is_branched])
        assert row["grpo/group_spread"] == pytest.approx(spreads[-1].mean(), rel=1e-4)
        assert row["grpo/frac_zero_std"] == np.mean(spreads[-1] < 1e-3)  # an end at the next step leaves none
    assert len({spread.mean() for spread in spreads}) == 3
    # Branches ended early, and some did not.
    assert 3 * 8 * 3 < expected_steps < 3 * 8 * 3 * 5


def frozen_lake(folder: Any) -> Any:
    return DummyVecEnv(
        [lambda i=i: Monitor(gym.make("FrozenLake-v1"), str(folder / str(i))) for i in range(2)]
    )


def test_a_run_with_clones_meets_what_a_run_without_meets(tmp_path):
    """With a policy that stays as it is: not even the environments' random numbers notice the branches."""
    seen = []
    for candidates in ("auto", "episodes"):
        folder = tmp_path / candidates
        folder.mkdir()
        own = {"horizon": 6} if candidates == "auto" else {}
        model = make(
            frozen_lake(folder), candidates=candidates, learning_rate=0.0, n_steps=32, bootstrap=True, **own
        )
        model.learn(3 * 64)
        model.get_env().close()
        assert (model.simulator_steps > 1000) == (candidates == "auto")
        files = [(folder / f"{i}.monitor.csv").read_text().splitlines()[2:] for i in range(2)]
        lines = [[line.rsplit(",", 1)[0] for line in lines] for lines in files]  # without the time
        episodes = [(info["r"], info["l"]) for info in model.ep_info_buffer]
        seen.append(
            (lines, episodes, model._last_obs.tolist(), model.num_timesteps, model.key_words.tolist())
        )
        assert len(load_results(str(folder))) == len(episodes) > 10
    assert seen[0] == seen[1]


def test_processes_train_as_one_does_to_the_last_bit():
    learned = []
    for kind in (DummyVecEnv, SubprocVecEnv):
        env = kind([lambda: Monitor(gym.make("CartPole-v1"))] * 2)
        model = make(env, horizon=4, n_steps=8, dynamics="clone")
        assert model.chosen_dynamics == "clone"
        before = parameters(model)
        model.learn(32)
        env.close()
        learned.append((parameters(model), model.simulator_steps))
        assert (learned[-1][0] != before).any()
    np.testing.assert_array_equal(learned[0][0], learned[1][0])
    assert learned[0][1] == learned[1][1] > 100


def get_remote(env: Any) -> Any:
    CALLS["get"] += 1
    sled = env.sleds[env.number]
    return sled.where.copy(), sled.time, sled.np_random.bit_generator.state


def set_remote(env: Any, state: Any) -> None:
    CALLS["set"] += 1
    sled = env.sleds[env.number]
    sled.where, sled.time, sled.np_random.bit_generator.state = state


CALLS: Counter[str] = Counter()


def test_a_pair_of_functions_saves_and_restores_what_no_copy_does():
    settings = {"horizon": 3, "branch_every": 2, "n_steps": 8, "n_rollouts": 2}
    with pytest.raises(Unclonable):
        make(dummy(Remote), dynamics="clone", **settings)
    model = steady(make(dummy(Remote), dynamics=(get_remote, set_remote), **settings))
    assert model.chosen_dynamics == "clone"
    CALLS.clear()
    model.learn(8)
    # One state in two, three candidates, two rollouts of each; and every second state is checked. The state in which the
    # rollout began is kept for files.
    assert CALLS == {"get": 4 + 1, "set": 4 * 3 * 2 + 2}
    alike = steady(make(dummy(Sled), dynamics="clone", **settings))
    alike.learn(8)
    np.testing.assert_array_equal(parameters(model), parameters(alike))
    assert model.simulator_steps == alike.simulator_steps


def test_a_callback_that_stops_in_the_middle_leaves_nothing_behind():
    """The states that were kept are forgotten, and the next rollout is branched as it should be."""
    model = make(dummy(Sled), horizon=2)
    model.learn(8, callback=lambda variables, names: variables["n_steps"] < 3)
    assert model.num_timesteps == 4 and model.simulator_steps == 0
    model.learn(8, reset_num_timesteps=False)
    assert model.num_timesteps == 12 and 8 * 3 < model.simulator_steps <= 8 * 3 * 2


def test_a_reward_that_is_nan_in_branches_only_shows_what_it_was_given():
    """The policy never goes right, the candidates do."""
    switch = SimpleNamespace(on=False)

    def reward(state: Any, action: Any, next_state: Any) -> Any:
        paid = next_state[:, 0] + 0.0 * action
        return np.where((action == 2) & switch.on, np.nan, paid)

    model = make(dummy(Sled), horizon=2, reward_function=reward)
    state = model.policy.state_dict()
    state["actor.output.bias"] = torch.tensor([1e5, 0.0, 0.0])
    model.policy.load_state_dict(state)
    model.learn(8)
    before, switch.on = parameters(model), True
    with pytest.raises(
        ValueError, match=r"reward_function returned nan for state=\[.*\], action=2, next_state=\["
    ):
        model.learn(8, reset_num_timesteps=False)
    np.testing.assert_array_equal(parameters(model), before)


FOLLOWED = {"horizon": 4, "branch_every": 2, "n_steps": 16, "batch_size": 16, "learning_rate": 0.01}


def long_sled() -> DummyVecEnv:
    """No clock: a function knows of none."""
    return dummy(lambda: Sled(10_000))


def ending(function: Any) -> Any:
    return lambda state, action: (reached := function(state, action), abs(reached[0]) > 2)


@pytest.fixture(scope="module")
def followed():
    """Parameters and simulator steps after two iterations of a policy that needs no random numbers, by dynamics."""
    kinds = {
        "jax": glide_jax,
        "numpy": glide,
        "torch": glide_torch,
        "ending": ending(glide_jax),
        "clone": "clone",
    }
    results = {}
    for name, kind in kinds.items():
        model = steady(make(long_sled(), dynamics=kind, reward_function=fares, **FOLLOWED))
        assert model.chosen_dynamics == ("clone" if kind == "clone" else "function")
        steps = []
        before = parameters(model)
        for _ in range(3):
            model.learn(16, reset_num_timesteps=False)
            steps.append(model.simulator_steps)
        results[name] = SimpleNamespace(parameters=parameters(model), steps=steps, before=before)
    return results


def test_functions_of_all_frameworks_train_alike(followed):
    first = followed["jax"]
    assert (first.parameters != first.before).any()
    for name in ("numpy", "torch"):
        np.testing.assert_allclose(followed[name].parameters, first.parameters, rtol=1e-5, atol=1e-6)
        assert followed[name].steps == first.steps
    # One state in two, three candidates, four steps each: no branch ends.
    assert first.steps == [8 * 3 * 4, 2 * 8 * 3 * 4, 3 * 8 * 3 * 4]


def test_a_function_that_tells_ends_trains_as_clones_do(followed):
    """The same returns of the same states, though the one is traced and the other stepped."""
    ending, clone = followed["ending"], followed["clone"]
    assert ending.steps == clone.steps
    np.testing.assert_allclose(ending.parameters, clone.parameters, rtol=1e-4, atol=1e-5)
    assert ending.steps[-1] < followed["jax"].steps[-1]  # branches were stopped
    assert not np.allclose(ending.parameters, followed["jax"].parameters, rtol=1e-4, atol=1e-5)


def test_a_function_needs_a_reward_and_true_observations():
    with pytest.raises(ValueError, match="reward_function"):
        make(long_sled(), dynamics=glide_jax)
    with pytest.raises(ValueError, match=r"VecNormalize\(norm_obs=False\)"):
        make(VecNormalize(long_sled()), dynamics=glide_jax, reward_function=fares)
    with pytest.raises(ValueError, match="returned"):
        make(long_sled(), dynamics=lambda state, action: state[:1], reward_function=fares)


def test_a_function_that_gives_nan_shows_what_it_was_given():
    switch = SimpleNamespace(on=False)

    def broken(state: Any, action: Any) -> Any:
        return glide(state, action) * np.float32(np.nan if switch.on else 1.0)

    model = make(long_sled(), dynamics=broken, reward_function=fares, **FOLLOWED)
    switch.on = True
    before = parameters(model)
    with pytest.raises(
        ValueError, match=r"dynamics returned next_state=\[nan, nan\] for state=\[.*\], action=[012]"
    ):
        model.learn(16)
    np.testing.assert_array_equal(parameters(model), before)


def test_a_jax_function_that_gives_nan_teaches_nothing():
    with pytest.raises(
        ValueError, match=r"dynamics returned next_state=\[.*nan.*\] for state=\[.*\], action=[012]"
    ):
        make(
            long_sled(), dynamics=lambda state, action: jnp.sqrt(state), reward_function=fares
        )  # seen at once

    def broken(state: Any, action: Any) -> Any:
        """On the grid of the starts, which no drawn state is on."""
        return jnp.where(state[0] * 64 % 1 == 0, jnp.nan, glide_jax(state, action))

    model = make(long_sled(), dynamics=broken, reward_function=fares, **FOLLOWED)
    before = parameters(model)
    with pytest.raises(FloatingPointError, match=r"[1-8] groups had a return that is NaN"):
        model.learn(16)
    np.testing.assert_array_equal(parameters(model), before)
