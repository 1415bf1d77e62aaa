"""NaN, inf and 1e30 at each stage of each regime: training stops, says where, and hands out the last good state."""

from __future__ import annotations

import dataclasses
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import struct
from toys import Line

import grpo_jax
from grpo_jax.spaces import Discrete
from grpo_jax.training import train
from grpo_jax.training.checkpoint import nonfinite_leaves

SHORT = grpo_jax.GRPOConfig(n_envs=4, n_steps=5, batch_size=20, n_epochs=1, horizon=2, net_arch=(8,))
REGIMES = {
    "branches": SHORT,
    "bootstrapped": SHORT.replace(horizon=1, bootstrap=True),
    "episodes": SHORT.replace(candidates="episodes", baseline="mean", bootstrap=True),
    "trajectories": SHORT.replace(candidates="trajectory", group_size=2, baseline="mean"),
}


@struct.dataclass
class Spoiled(Line):
    """A line that adds something to what it says at one time of an episode, counted from 1."""

    observation_plus: float = 0.0
    reward_plus: float = 0.0
    hidden: float = 0.0
    time: int = 7

    def reset(self, key: jax.Array) -> tuple[jax.Array, Any]:
        observation, state = super().reset(key)
        return observation, (state, jnp.float32(0.0))

    def step(self, key: jax.Array, state: Any, action: jax.Array) -> grpo_jax.Step:
        step = super().step(key, state[0], action)
        now = step.state[1] == self.time

        def plus(number: jax.Array, value: float) -> jax.Array:
            return jnp.where(now, number + value * (1.0 + number), number)  # candidates differ by it

        return step.replace(
            observation=plus(step.observation, self.observation_plus),
            reward=plus(step.reward, self.reward_plus),
            state=(step.state, plus(state[1], self.hidden)),
        )


LINE = Spoiled(Discrete(2), goal=9)


def fails(config: grpo_jax.GRPOConfig, env: grpo_jax.World, how: str = "train") -> grpo_jax.NonFiniteError:
    options = {
        "train": {},
        "run": {"callback": lambda chunk: None},
        "run in place": {},
        "run of 2 seeds": {"n_seeds": 2},
    }[how]
    trains = grpo_jax.train if how == "train" else grpo_jax.run
    with pytest.raises(grpo_jax.NonFiniteError) as raised:
        trains(config, env, jax.random.key(0), 5 * config.n_states, **options)
    error = raised.value
    seed = " of seed 0" if how == "run of 2 seeds" else ""
    assert f"at iteration {error.iteration}{seed}, in the {error.stage}: " in str(error)
    assert int(np.ravel(error.state.iteration)[0]) == error.iteration - 1
    assert nonfinite_leaves(error.state) == []
    return error


@pytest.mark.parametrize("regime", REGIMES)
@pytest.mark.parametrize("value", [jnp.nan, -jnp.inf, 1e30])
def test_a_world_that_spoils_a_number(regime: str, value: float) -> None:
    config = REGIMES[regime]
    time = 3 if regime == "trajectories" else 7  # their episodes begin anew with each iteration
    error = fails(config, dataclasses.replace(LINE, reward_plus=value, time=time))
    assert error.iteration == (1 if regime == "trajectories" else 2)
    if np.isfinite(value):
        assert error.stage in ("world", "critic") and "environment 0 at step" in str(error)
    else:
        assert error.stage == "world"
        assert f"the reward of environment 0 at step {time - 5 * error.iteration + 4} of" in str(error)
        assert f" is {value:g}. " in str(error)
    spoiled = dataclasses.replace(LINE, observation_plus=value, time=time)
    if np.isfinite(value):  # a network may read it: what it learns is finite, or it stops
        try:
            state = grpo_jax.train(config, spoiled, jax.random.key(0), 5 * config.n_states).state
        except grpo_jax.NonFiniteError as stopped:
            state = stopped.state
        assert nonfinite_leaves(state) == []
    else:
        error = fails(config, spoiled)
        assert error.stage == "world" and f"the observation of environment 0 at step {time % 5}" in str(error)


def test_nothing_is_wrong_with_the_line_itself() -> None:
    for config in REGIMES.values():
        metrics = grpo_jax.train(config, LINE, jax.random.key(0), 5 * config.n_states).metrics
        assert float(jnp.sum(metrics["nonfinite_state"])) == 0.0


@pytest.mark.parametrize("how", ["run", "run in place", "run of 2 seeds"])
def test_chunks_stop_where_one_program_does(how: str) -> None:
    spoiled = dataclasses.replace(LINE, reward_plus=jnp.nan)
    error, expected = fails(SHORT, spoiled, how), fails(SHORT, spoiled)
    assert (error.iteration, error.stage) == (2, "world")
    if how != "run of 2 seeds":
        assert str(error) == str(expected)
        chex.assert_trees_all_close(error.state.params, expected.state.params, atol=1e-6)


def test_the_last_good_state_goes_on_where_the_world_is_whole() -> None:
    good = fails(SHORT, dataclasses.replace(LINE, reward_plus=jnp.nan)).state
    state, _ = grpo_jax.run(SHORT, LINE, jax.random.key(9), 5 * SHORT.n_states, state=good)
    whole, _ = grpo_jax.run(SHORT, LINE, jax.random.key(0), 5 * SHORT.n_states)
    assert int(state.iteration) == 5
    chex.assert_trees_all_close(state.params, whole.params, atol=1e-6)


def test_a_reward_function() -> None:
    def reward(state: jax.Array, action: jax.Array, next_state: jax.Array) -> jax.Array:
        del state, action
        return jnp.log(5.5 - next_state[1])  # NaN from time 6 on

    error = fails(SHORT, grpo_jax.make(LINE, reward_function=reward))
    assert error.stage == "reward function" and error.iteration == 1  # a branch is the first to get there
    assert "returns of the candidates of environment 0 at step 4 of the rollout" in str(error)
    assert "reward_function" in str(error)


def test_statistics_of_observations() -> None:
    config = SHORT.replace(normalize_observations=True)
    error = fails(config, dataclasses.replace(LINE, observation_plus=1e30))
    assert (error.iteration, error.stage) == (2, "statistics")
    assert "the largest of them is " in str(error) and "e+30, of environment 0 at step 2" in str(error)
    assert fails(config, dataclasses.replace(LINE, observation_plus=jnp.nan)).stage == "world"


def test_the_critic() -> None:
    error = fails(REGIMES["bootstrapped"].replace(vf_coef=1e30), dataclasses.replace(LINE, reward_plus=1e15))
    assert error.stage in ("critic", "optimizer") and "minibatches" in str(error)


def test_the_optimizer() -> None:
    error = fails(SHORT.replace(learning_rate=3e38), LINE)
    assert error.stage == "optimizer" and "learning_rate" in str(error)


def test_a_hidden_part_of_a_world() -> None:
    error = fails(SHORT, dataclasses.replace(LINE, hidden=jnp.nan, time=4))
    assert (error.iteration, error.stage) == (1, "world")
    assert "of environment 0's state is nan" in str(error)


def test_inside_of_a_transformation_the_state_stays_good() -> None:
    def run(value: jax.Array) -> train.Result:
        env = dataclasses.replace(LINE, observation_plus=value)
        return grpo_jax.train(SHORT, env, jax.random.key(0), 5 * SHORT.n_states)

    result = jax.jit(jax.vmap(run))(jnp.array([0.0, jnp.nan]))
    assert result.state.iteration.tolist() == [5, 1]
    assert result.metrics["nonfinite_state"][0].tolist() == [0.0] * 5
    assert np.all(np.asarray(result.metrics["nonfinite_state"][1, 1:]) > 0)
    assert nonfinite_leaves(result.state) == []
