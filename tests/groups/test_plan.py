"""Acting by comparison: the choice by hand, worlds whose best play is known, and what a plan must not know."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import struct
from toys import Line, MaskedLine

import grpo_jax
from grpo_jax import GRPOConfig, Plan
from grpo_jax.groups.plan import HORIZON, choose
from grpo_jax.spaces import Box, Discrete
from grpo_jax.types import Step

TINY = GRPOConfig(n_envs=4, n_steps=8, batch_size=16, horizon=3, net_arch=(4,))
SHORT = Plan(horizon=10, n_rollouts=2, group_size=4, gamma=1.0)
FAR = 10**6


@struct.dataclass
class Dice(Line):
    """Every action pays 1 or -1, as a coin of its own says."""

    def step(self, key: jax.Array, state: jax.Array, action: jax.Array) -> Step:
        step = super().step(key, state, action)
        coin = jax.random.bernoulli(jax.random.fold_in(key, jnp.asarray(action, jnp.uint32)))
        return step.replace(reward=jnp.where(coin, 1.0, -1.0))


@jax.jit
def state_of(env):
    return grpo_jax.init(TINY, env, jax.random.key(0))


def play(env, plan, n_episodes=8, **settings):
    return grpo_jax.evaluate_episodes(
        state_of(env), env, jax.random.key(1), n_episodes, plan=plan, **settings
    )


# The choice


@pytest.mark.parametrize(
    ("returns", "valid", "own", "confidence", "chosen"),
    [
        ([[1, 2, 3], [1, 2, 3]], [1, 1, 1], 0, 1.0, 2),  # better for sure
        ([[1, 2, 3], [1, 2, 3]], [1, 1, 0], 0, 1.0, 1),  # the best is forbidden
        ([[1, 1, 1], [5, 5, 5]], [1, 1, 1], 1, 0.0, 1),  # no difference: the policy's own
        ([[1, 1 + 1e-7, 0]] * 2, [1, 1, 1], 0, 0.0, 0),  # nor is rounding one
        # Differences 3 and 1, mean 2, standard error 1: better by two standard errors, not by more.
        ([[0, 3], [0, 1]], [1, 1], 0, 1.9, 1),
        ([[0, 3], [0, 1]], [1, 1], 0, 2.1, 0),
        # The third is better on average, the second more surely so.
        ([[0, 2, 9], [0, 2, -3]], [1, 1, 1], 0, 1.0, 1),
        ([[0, 2, 9], [0, 2, -3]], [1, 1, 1], 0, 0.0, 2),
        # The noise that all share is none.
        ([[100, 101], [-100, -99]], [1, 1], 0, 1.0, 1),
    ],
)
def test_the_choice_by_hand(returns, valid, own, confidence, chosen, compiled):
    arrays = (
        jnp.asarray([returns], jnp.float32), jnp.asarray([valid], bool), jnp.asarray([own], jnp.int32), confidence
    )  # fmt: skip
    assert int(compiled(choose)(*arrays)[0]) == chosen


# Play


@pytest.mark.parametrize("deterministic", [False, True])
@pytest.mark.parametrize("space", [Discrete(2), Box(np.full(1, -1.0), np.full(1, 1.0), (1,))])
def test_it_plays_a_known_world_as_well_as_can_be(space, deterministic):
    env = Line(space, goal=FAR, limit=10)  # always to the right: 1 + 2 + ... + 10
    plan = SHORT.replace(group_size=16)
    planned = play(env, plan, deterministic=deterministic)
    if isinstance(space, Discrete):
        np.testing.assert_array_equal(planned.returns, 55.0)
    else:  # where none of 16 draws of a standard normal goes right, it stands still
        assert planned.returns.mean() > 54
    assert play(env, None).returns.mean() < 40


def test_the_horizon_is_what_it_can_see():
    # Standing still at 3 pays 3 a step for good; one step further pays 4 once and ends it.
    env = Line(Discrete(2), goal=4, limit=10)
    assert play(env, SHORT.replace(horizon=1)).returns.max() <= 10.0
    assert play(env, SHORT.replace(n_rollouts=8, confidence=0.0)).returns.mean() > 15.0


def test_it_does_not_know_the_noise_that_is_to_come():
    env = Dice(Discrete(2), goal=FAR, limit=16)
    earned = play(env, SHORT.replace(horizon=1, confidence=0.0), n_episodes=256).returns / 16
    assert abs(float(earned.mean())) < 4 / np.sqrt(256 * 16)  # a plan that knew the coins would have 0.5


def test_forbidden_actions_are_not_taken():
    env = MaskedLine(Discrete(2), goal=4)
    np.testing.assert_array_equal(play(env, SHORT).lengths, 4)


def test_simulator_steps_are_counted():
    env = Line(Discrete(2), goal=FAR, limit=5)
    episodes = play(env, Plan(horizon=2, n_rollouts=3), n_episodes=4)
    # Two candidates, three branches each, two steps; one step where the limit is one step away.
    assert grpo_jax.count(episodes.simulator_steps) == 4 * 2 * 3 * (4 * 2 + 1)
    assert grpo_jax.count(play(env, None).simulator_steps) == 0


def test_it_vmaps_over_policies():
    env = Line(Discrete(2), goal=FAR, limit=6)
    states = jax.vmap(lambda key: grpo_jax.init(TINY, env, key))(jax.random.split(jax.random.key(0), 2))
    returns = jax.vmap(
        lambda state: grpo_jax.evaluate(state, env, jax.random.key(0), 2, plan=Plan(horizon=6))
    )(states)
    np.testing.assert_array_equal(returns, np.full((2, 2), 21.0))


# The doors


def test_a_plan_of_a_config():
    config = GRPOConfig(gamma=0.9, horizon=100, group_size=5, branch_past_truncation=True)
    plan = Plan.of(config, n_rollouts=6)
    assert (plan.horizon, plan.gamma, plan.group_size, plan.n_rollouts) == (100, 0.9, 5, 6)
    assert plan.past_truncation and Plan.of(GRPOConfig(horizon=4)).horizon == HORIZON


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("horizon", 0), ("horizon", 2.5), ("n_rollouts", 1), ("n_rollouts", True), ("group_size", 1), ("gamma", 1.5),
        ("gamma", float("nan")), ("confidence", -1.0), ("confidence", float("inf")), ("confidence", float("nan")),
    ],
)  # fmt: skip
def test_numbers_that_are_no_plan(name, value):
    with pytest.raises(ValueError, match=f"plan: {name}="):
        Plan(**{name: value})


def test_something_else_in_place_of_a_plan():
    env = Line(Discrete(2))
    with pytest.raises(TypeError, match="Plan.of"):
        play(env, TINY)
