from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from grpo_jax import from_function, make, spaces
from grpo_jax.worlds.function import FunctionWorld

BOX = spaces.Box(-10, 10, (2,))
KEY = jax.random.key(0)


def oscillator(**changes):
    """Position and velocity, pushed by -1, 0 or 1; the reward is minus the distance, minus the action."""

    def transition(state, action):
        velocity = state[1] + 0.5 * (action - 1)
        return jnp.stack([state[0] + velocity, velocity])

    arguments = {
        "transition": transition,
        "initial_state": lambda key: jax.random.uniform(key, (2,), minval=1.0, maxval=2.0),
        "reward_function": lambda state, action, next_state: -jnp.abs(next_state[0]) - action,
        "observation_space": BOX,
        "action_space": spaces.Discrete(3),
    }
    return from_function(**(arguments | changes))


def test_transitions_and_rewards(compiled):
    world = make(oscillator())
    step = compiled(world.step)
    observation, state = world.reset(KEY)
    np.testing.assert_array_equal(observation, state.inner.observation)
    x, v = np.asarray(observation)
    for action in (0, 2, 1):
        reached = step(KEY, state, jnp.int32(action))
        v = v + 0.5 * (action - 1)
        x = x + v
        np.testing.assert_allclose(reached.observation, [x, v], rtol=1e-6)
        np.testing.assert_allclose(reached.reward, -abs(x) - action, rtol=1e-6)
        assert float(reached.task_reward) == 0.0
        state = reached.state


def test_the_initial_state_depends_on_the_key():
    world = oscillator()
    observations = jax.vmap(world.reset)(jax.random.split(KEY, 5))[0]
    assert len(np.unique(observations[:, 0])) == 5


@pytest.mark.parametrize("max_steps", [1, 3])
def test_the_time_limit_is_a_truncation(max_steps):
    world = oscillator(max_steps=max_steps)
    _, state = world.reset(KEY)
    seen = []
    for _ in range(max_steps + 1):
        reached = world.step(KEY, state, jnp.int32(1))
        seen.append((bool(reached.truncated), bool(reached.terminated)))
        state = reached.state
    assert seen == [(False, False)] * (max_steps - 1) + [(True, False)] * 2


@pytest.mark.parametrize(
    "terminated", [lambda state: state[0] > 3.5, lambda state: state[:1] > 3.5], ids=["[]", "[1]"]
)
def test_termination_is_judged_on_the_state_that_is_reached(terminated):
    world = make(oscillator(terminated=terminated, initial_state=lambda key: jnp.array([1.0, 1.0])))
    _, state = world.reset(KEY)
    ends = []
    for _ in range(3):
        reached = world.step(KEY, state, jnp.int32(1))
        ends.append((bool(reached.terminated), bool(reached.truncated)))
        state = reached.state
    assert ends == [(False, False), (False, False), (True, False)]


@pytest.mark.parametrize("flag", [lambda x: x > 3.5, lambda x: x[None] > 3.5], ids=["[]", "[1]"])
@pytest.mark.parametrize("terminated", [None, lambda state: state[0] < 1.5], ids=["alone", "or-ed"])
def test_the_transition_may_tell_the_end(flag, terminated, compiled):
    world = oscillator(
        transition=lambda state, action: (state + action - 1.0, flag(state[0] + action - 1.0)),
        initial_state=lambda key: jnp.array([2.0, 0.0]),
        terminated=terminated,
    )
    step = compiled(make(world).step)
    ends = []
    for action in (2, 0):
        _, state = world.reset(KEY)
        for _ in range(2):
            reached = step(KEY, state, jnp.int32(action))
            ends.append((reached.observation[0].item(), reached.terminated.item()))
            state = reached.state
    below = terminated is not None
    assert ends == [(3.0, False), (4.0, True), (1.0, below), (0.0, below)]


def test_other_tuples_are_refused():
    with pytest.raises(ValueError, match=r"returned a tuple of 3, expected next_state or \(next_state, term"):
        oscillator(transition=lambda state, action: (state, False, False))


@pytest.mark.parametrize("max_steps", [2**31 - 1, 2**40])
def test_a_large_time_limit_means_none(max_steps, compiled):
    world = oscillator(max_steps=max_steps).world
    step = compiled(world.step)
    state = world.at(jnp.ones(2), jnp.int32(2**31 - 2))
    for _ in range(3):
        reached = step(KEY, state, jnp.int32(1))
        state = reached.state
        assert not reached.truncated and state.time == 2**31 - 1


def test_states_of_visited_observations(compiled):
    world = oscillator(max_steps=4).world
    assert isinstance(world, FunctionWorld)
    observation, first = world.reset(KEY)
    np.testing.assert_array_equal(first.observation, world.at(observation).observation)
    assert first.time.dtype == world.at(observation).time.dtype == jnp.int32
    observations = np.arange(12.0).reshape(2, 3, 2)
    state = world.at(observations)
    assert state.observation.dtype == jnp.float32 and state.time.shape == (2, 3)
    np.testing.assert_array_equal(state.time, np.zeros((2, 3)))
    late = world.at(observations, np.array([0, 1, 3]))
    np.testing.assert_array_equal(late.time, [[0, 1, 3]] * 2)
    step = compiled(jax.vmap(jax.vmap(world.step, (None, 0, None)), (None, 0, None)))
    reached = step(KEY, late, jnp.int32(2))
    np.testing.assert_array_equal(reached.truncated, [[False, False, True]] * 2)
    np.testing.assert_allclose(reached.observation[..., 1], observations[..., 1] + 0.5)


def test_a_reward_on_top_keeps_the_states_of_visited_observations():
    world = oscillator(max_steps=4)
    observations = np.arange(6.0).reshape(3, 2)
    state = world.at(observations, np.array([0, 1, 3]))
    inner = world.world.at(observations, np.array([0, 1, 3]))
    jax.tree.map(np.testing.assert_array_equal, state.inner, inner)
    np.testing.assert_array_equal(state.observation, observations)
    observation, first = world.reset(KEY)
    jax.tree.map(np.testing.assert_array_equal, world.at(observation), first)


def test_states_of_visited_dicts():
    world = FunctionWorld(
        transition=lambda state, action: state,
        initial_state=lambda key: {"x": [0.0, 0.0], "cell": 0},
        terminated=None,
        max_steps=5,
        observation_space=spaces.Dict((("x", BOX), ("cell", spaces.Discrete(5)))),
        action_space=spaces.Discrete(2),
    )
    state = world.at({"x": np.zeros((3, 2)), "cell": np.arange(3)})
    assert (state.observation["x"].shape, state.observation["cell"].dtype) == ((3, 2), jnp.int32)
    assert state.time.shape == (3,)


@pytest.mark.parametrize(
    "start",
    [lambda key: [0, 0], lambda key: jnp.zeros(2, jnp.int32), lambda key: np.zeros(2)],
    ids=["list", "int", "np"],
)
def test_a_real_state_is_never_rounded_to_integers(start):
    world = make(oscillator(initial_state=start, transition=lambda state, action: state + 0.75))
    observation, state = world.reset(KEY)
    assert observation.dtype == jnp.float32
    np.testing.assert_array_equal(world.step(KEY, state, jnp.int32(0)).observation, [0.75, 0.75])


def test_integer_and_dict_observations():
    world = make(
        oscillator(
            observation_space=spaces.Dict((("cell", spaces.Discrete(5)), ("x", spaces.Box(0, 9, (1,))))),
            initial_state=lambda key: {"cell": 0, "x": [0]},
            transition=lambda state, action: {"cell": (state["cell"] + action) % 5, "x": state["x"] + 0.5},
            reward_function=lambda state, action, next_state: next_state["cell"] * 10 + next_state["x"][0],
        )
    )
    observation, state = world.reset(KEY)
    assert (observation["cell"].dtype, observation["x"].dtype) == (jnp.int32, jnp.float32)
    rewards = []
    for action in (2, 2, 2):
        reached = world.step(KEY, state, jnp.int32(action))
        rewards.append(float(reached.reward))
        state = reached.state
    assert rewards == [20.5, 41.0, 11.5]


def test_a_wrong_shape_is_refused():
    with pytest.raises(TypeError, match=r"float32\[1, 2\], but reset gives float32\[2\]"):
        make(
            oscillator(
                transition=lambda state, action: state[None], reward_function=lambda s, a, n: jnp.sum(n)
            )
        )
    with pytest.raises(ValueError, match=r"shape \(3,\), but observation_space says \(2,\)"):
        make(oscillator(initial_state=lambda key: jnp.zeros(3), transition=lambda state, action: state))


@pytest.mark.parametrize("max_steps", [0, -5])
def test_a_time_limit_below_one_is_refused(max_steps):
    with pytest.raises(ValueError, match=f"max_steps={max_steps} must be at least 1"):
        oscillator(max_steps=max_steps)


def test_the_reward_function_is_checked():
    with pytest.raises(ValueError, match="returned nan"):
        oscillator(reward_function=lambda state, action, next_state: jnp.log(-jnp.abs(next_state[0]) - 1))
