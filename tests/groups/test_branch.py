"""Branches against rollouts in plain Python, on tabular worlds that pay NaN and come back to life behind an end."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tabular
from flax import struct

import grpo_jax
from grpo_jax import counter
from grpo_jax.groups.branch import group_returns
from grpo_jax.spaces import Discrete
from grpo_jax.types import Step
from grpo_jax.worlds.base import World, override_reward

S, A, END = 5, 3, -1
NEXT = np.array([[1, 2, 3], [2, 0, 4], [END, 3, 1], [4, END, 0], [0, 1, END]])
REWARD = np.array(
    [[1.0, -2.0, 0.5], [3.0, 0.25, -1.0], [7.0, -0.5, 2.0], [-4.0, 5.0, 1.5], [0.75, -3.0, 6.0]]
)
POLICY = np.array([1, 0, 2, 0, 1])  # 0 -> 2 -> 1 -> 2: never ends; 3 -> 4 -> 1: joins the circle
VALUE = np.array([10.0, -20.0, 30.0, 40.0, -50.0])
ONE_HOT = np.stack([[np.eye(S)[n] if n != END else np.zeros(S) for n in row] for row in NEXT])


def deterministic_world(time_limit=10**6):
    return tabular.sampled_world(ONE_HOT, REWARD, time_limit=time_limit)


def follow(observation, mask, uniforms):
    assert mask is None
    return jnp.broadcast_to(jnp.asarray(POLICY, jnp.int32)[observation], uniforms.shape[:-1])


def value(observation):
    return jnp.asarray(VALUE)[observation]


def rollout(position, time, action, horizon, gamma, time_limit, bootstrap):
    """Return and number of steps of one branch, in plain Python."""
    total = 0.0
    for k in range(horizon):
        total += gamma**k * REWARD[position, action]
        position, time = NEXT[position, action], time + 1
        if position == END:
            return total, k + 1
        if time >= time_limit:
            break
        action = POLICY[position]
    return total + (gamma ** (k + 1) * VALUE[position] if bootstrap else 0.0), k + 1


@functools.partial(jax.jit, static_argnames=("horizon", "bootstrap"))
def library(world, time, gamma, horizon, bootstrap):
    """All actions of all states at a time."""
    return group_returns(
        world,
        follow,
        jax.random.key(0),
        tabular.states_at(jnp.arange(S)).replace(time=jnp.full(S, time)),
        jnp.broadcast_to(jnp.arange(A), (S, A)),
        horizon=horizon,
        gamma=gamma,
        value=value if bootstrap else None,
    )


@pytest.mark.parametrize("bootstrap", [False, True])
@pytest.mark.parametrize("horizon", [1, 2, 3, 12])
def test_returns_are_those_of_plain_rollouts(horizon, bootstrap):
    n_ended = 0
    for gamma in (1.0, 0.9, 0.0):
        for time, time_limit in ((0, 10**6), (0, 2), (3, 7), (0, 1)):
            branches = library(deterministic_world(time_limit), time, gamma, horizon, bootstrap)
            expected = [
                [rollout(s, time, a, horizon, gamma, time_limit, bootstrap) for a in range(A)]
                for s in range(S)
            ]
            returns, n_steps = np.moveaxis(np.array(expected), -1, 0)
            np.testing.assert_allclose(branches.returns, returns, rtol=1e-5, atol=1e-5)
            assert counter.to_int(branches.simulator_steps) == n_steps.sum()
            n_ended += np.sum(n_steps < horizon)
    assert (n_ended > 0) == (horizon > 1)  # the cases do contain branches that end early


def test_hand_computed():
    """From 0: action 0 pays 1, then state 1 pays 3; action 1 leads to 2, which pays 2; action 2 to 3, which pays -4."""
    branches = library(deterministic_world(), 0, 0.5, 2, False)
    np.testing.assert_allclose(branches.returns[0], [1 + 0.5 * 3, -2 + 0.5 * 2, 0.5 + 0.5 * -4])
    np.testing.assert_allclose(
        branches.returns[2], [7.0, -0.5 + 0.5 * -4, 2 + 0.5 * 3]
    )  # action 0 terminates
    bootstrapped = library(deterministic_world(), 0, 0.5, 2, True)
    np.testing.assert_allclose(bootstrapped.returns[2], [7.0, -2.5 + 0.25 * -50, 3.5 + 0.25 * 30])
    truncated = library(deterministic_world(time_limit=1), 0, 0.5, 2, True)
    np.testing.assert_allclose(truncated.returns[2], [7.0, -0.5 + 0.5 * 40, 2 + 0.5 * -20])


@struct.dataclass
class _EndsTwice(World):
    """Every step terminates and truncates at once."""

    @property
    def observation_space(self):
        return Discrete(2)

    @property
    def action_space(self):
        return Discrete(2)

    def reset(self, key):
        return jnp.int32(0), jnp.int32(0)

    def step(self, key, state, action):
        reward = action.astype(jnp.result_type(float))
        return Step(jnp.int32(1), jnp.int32(1), reward, jnp.bool_(True), jnp.bool_(True))


@pytest.mark.parametrize("horizon", [1, 4])
def test_termination_beats_truncation(horizon):
    returns = jax.jit(
        lambda: (
            group_returns(
                _EndsTwice(),
                lambda observation, mask, uniforms: jnp.zeros(uniforms.shape[:-1], jnp.int32),
                jax.random.key(0),
                jnp.zeros(1, jnp.int32),
                jnp.array([[0, 1]]),
                horizon=horizon,
                gamma=1.0,
                value=lambda observation: jnp.full(observation.shape, 1000.0),
            ).returns
        )
    )()
    np.testing.assert_array_equal(returns, [[0.0, 1.0]])


@pytest.mark.parametrize("bootstrap", [False, True])
def test_branches_can_go_on_behind_a_time_limit(bootstrap):
    """As if there were no limit: the same returns as in a world whose limit is far away."""
    world = grpo_jax.make("CartPole-v1")
    far = world.replace(params=world.params.replace(max_steps_in_episode=10_000))
    _, states = jax.vmap(world.reset)(jax.random.split(jax.random.key(0), 5))
    late = states.replace(time=jnp.full(5, 497))

    @functools.partial(jax.jit, static_argnames="past")
    def run(world, past=False):
        return group_returns(
            world,
            lambda observation, mask, uniforms: (uniforms[..., 0] < 0.5).astype(jnp.int32),
            jax.random.key(0),
            late,
            jnp.broadcast_to(jnp.arange(2), (5, 2)),
            horizon=30,
            gamma=0.9,
            value=(lambda observation: observation[..., 0]) if bootstrap else None,
            past_truncation=past,
        )

    past, free, cut = run(world, past=True), run(far), run(world)
    np.testing.assert_array_equal(past.returns, free.returns)
    assert counter.to_int(past.simulator_steps) == counter.to_int(free.simulator_steps)
    assert counter.to_int(cut.simulator_steps) == 5 * 2 * 3


@struct.dataclass
class _Line(World):
    """A walker; its own reward is 1 whatever it does."""

    @property
    def observation_space(self):
        return Discrete(100)

    @property
    def action_space(self):
        return Discrete(3)

    def reset(self, key):
        return jnp.int32(10), jnp.int32(10)

    def step(self, key, state, action):
        after = state + action - 1
        return Step(after, after, jnp.float32(1.0), jnp.bool_(False), jnp.bool_(False))


@pytest.mark.parametrize(("horizon", "expected"), [(1, [9, 10, 11]), (3, [9 + 10 + 11, 33, 36])])
def test_each_candidate_has_its_own_next_state(horizon, expected):
    """A reward of the next state alone tells candidates apart: the flaw of the project that ours replaces."""
    world = override_reward(_Line(), lambda state, action, next_state: 1.0 * next_state)
    _, state = world.reset(jax.random.key(0))
    returns = jax.jit(
        lambda: (
            group_returns(
                world,
                lambda observation, mask, uniforms: jnp.full(uniforms.shape[:-1], 2),
                jax.random.key(0),
                jax.tree.map(lambda leaf: leaf[None], state),
                jnp.array([[0, 1, 2]]),
                horizon=horizon,
                gamma=1.0,
            ).returns
        )
    )()
    np.testing.assert_allclose(returns, [expected])


def test_float64():
    with jax.enable_x64(True):
        branches = library(deterministic_world(), 0, 0.9, 12, True)
        assert branches.returns.dtype == jnp.float64
        expected = [[rollout(s, 0, a, 12, 0.9, 10**6, True)[0] for a in range(A)] for s in range(S)]
        np.testing.assert_allclose(branches.returns, expected, rtol=1e-12)
