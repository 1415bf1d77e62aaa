from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from grpo_jax import from_function, make, spaces

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
