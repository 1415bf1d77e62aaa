from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import struct

from grpo_jax import World, make, override_reward, spaces
from grpo_jax.types import Step
from grpo_jax.worlds.base import PerSample, example_action, strong

CLOSED_OVER_KEY = jax.random.key(3)
CLOSED_OVER_NAN = np.array([np.nan, 1.0], np.float32)


@struct.dataclass
class Line(World):
    """A point that is pushed along a line; what a test wants to break is a field."""

    move: object = struct.field(pytree_node=False, default=lambda key, state, action: state + action)
    reward: object = struct.field(pytree_node=False, default=lambda state: jnp.sum(state))
    terminated: object = struct.field(pytree_node=False, default=lambda state: state[0] > 3)
    start: object = struct.field(pytree_node=False, default=lambda key: jnp.array([0.0, 1.0]))

    observation_space = spaces.Box(-10, 10, (2,))
    action_space = spaces.Box(-1, 3, (2,))

    def reset(self, key):
        state = self.start(key)
        return state, state

    def step(self, key, state, action):
        state = self.move(key, state, action)
        return Step(state, state, self.reward(state), self.terminated(state), jnp.array(False))


def pushed(world, actions):
    """Rewards, and the world's own, of one step from the start with each action ``[N, 2]``."""
    key = jax.random.key(0)
    _, state = world.reset(key)
    step = jax.jit(jax.vmap(lambda action: world.step(key, state, action)))(jnp.asarray(actions))
    return step.reward, step.task_reward


ACTIONS = np.array([[0.0, 0.0], [1.0, -1.0], [2.0, 0.5]], np.float32)
# reward = next_state[0] - 10 * state[1] + 100 * action[1], from the state (0, 1).
EXPECTED = [-10.0, -109.0, 42.0]


@pytest.mark.parametrize(
    "function",
    [
        pytest.param(lambda s, a, n: n[0] - 10 * s[1] + 100 * a[1], id="[]"),
        pytest.param(lambda s, a, n: n[0:1] - 10 * s[1:2] + 100 * a[1:2], id="[1]"),
        pytest.param(lambda s, a, n: n[:, 0] - 10 * s[:, 1] + 100 * a[:, 1], id="[N]"),
        pytest.param(lambda s, a, n: n[:, 0:1] - 10 * s[:, 1:2] + 100 * a[:, 1:2], id="[N, 1]"),
        pytest.param(lambda s, a, n: n[..., 0] - 10 * s[..., 1] + 100 * a[..., 1], id="either"),
    ],
)
def test_a_reward_function_of_one_transition_or_of_a_batch(function):
    reward, task_reward = pushed(override_reward(Line(), function), ACTIONS)
    assert reward.shape == (3,)
    assert reward.dtype == jnp.float32
    np.testing.assert_allclose(reward, EXPECTED)
    np.testing.assert_allclose(task_reward, [1.0, 1.0, 3.5])


@pytest.mark.parametrize("value", [1, True, 2.5])
def test_a_constant_reward_becomes_a_float(value):
    reward, _ = pushed(override_reward(Line(), lambda s, a, n: value), ACTIONS)
    assert reward.dtype == jnp.float32
    np.testing.assert_array_equal(reward, [value] * 3)


def test_the_task_reward_is_the_worlds_own_however_often_it_is_overridden():
    once = override_reward(Line(), lambda s, a, n: 5.0)
    twice = override_reward(once, lambda s, a, n: 7.0)
    reward, task_reward = pushed(twice, ACTIONS)
    np.testing.assert_array_equal(reward, [7, 7, 7])
    np.testing.assert_allclose(task_reward, [1.0, 1.0, 3.5])
    assert pushed(Line(), ACTIONS)[1] is None


def test_the_rest_of_the_world_stays():
    world = override_reward(Line(), lambda s, a, n: 0.0)
    assert world.observation_space == Line.observation_space
    assert world.action_space == Line.action_space
    key = jax.random.key(0)
    observation, state = world.reset(key)
    np.testing.assert_array_equal(observation, [0, 1])
    for expected, terminated in (([2, 2], False), ([4, 3], True)):
        step = world.step(key, state, jnp.array([2.0, 1.0]))
        state = step.state
        np.testing.assert_array_equal(step.observation, expected)
        np.testing.assert_array_equal(state.inner, expected)
        assert bool(step.terminated) is terminated


def test_a_state_that_is_more_than_its_observation_cannot_be_made_of_it():
    for world, name in ((Line(), "Line"), (override_reward(Line(), lambda s, a, n: 0.0), "Line")):
        with pytest.raises(
            NotImplementedError, match=f"{name}.at: a state of this world is more than its obs"
        ):
            world.at(jnp.zeros((3, 2)))


def test_equal_reward_functions_share_their_traces():
    def function(s, a, n):
        return n[0]

    assert PerSample(function, takes_batch=False) == PerSample(function, takes_batch=False)
    first, second = (override_reward(Line(), function) for _ in range(2))
    assert jax.tree.structure(first) == jax.tree.structure(second)


@pytest.mark.parametrize(
    ("function", "message"),
    [
        (lambda s, a, n: n, r"one transition: shape \[2\], expected \[\] or \[1\]"),
        (lambda s, a, n: n, r"a batch: shape \[N, 2\], expected \[N\] or \[N, 1\]"),
        (lambda s, a, n: jnp.zeros((3, 3)), r"shape \[3, 3\]"),
        (lambda s, a, n: (n[0], 1.0), "no single array"),
        (lambda s, a, n: None, "no single array"),
    ],
)
def test_a_wrong_shape_is_told(function, message):
    with pytest.raises(ValueError, match=message):
        override_reward(Line(), function)


def test_a_function_that_fails_is_told_with_its_own_words():
    def function(state, action, next_state):
        raise RuntimeError("no such sensor")

    with pytest.raises(
        TypeError, match=r"one transition: RuntimeError: no such sensor; with a batch"
    ) as error:
        override_reward(Line(), function)
    assert isinstance(error.value.__cause__, RuntimeError)


@pytest.mark.parametrize(
    "function",
    [lambda s, a, n: float(np.sum(n)), lambda s, a, n: 1.0 if n[0] > 0 else 0.0, lambda s, a: 0.0],
    ids=["numpy", "branch", "arguments"],
)
def test_a_function_that_jax_cannot_trace_is_a_type_error(function):
    with pytest.raises(TypeError, match=r"using jax\.numpy"):
        override_reward(Line(), function)


def test_what_is_not_callable_is_a_type_error():
    with pytest.raises(TypeError, match=r"must be callable, got 3"):
        override_reward(Line(), 3)


@pytest.mark.parametrize("value", ["nan", "inf"])
def test_a_reward_that_is_not_finite_is_told_with_its_transition(value):
    function = lambda s, a, n: jnp.where(n[0] > 0.5, float(value), 0.0)
    message = rf"returned {value} for state=\[0\. 1\.\], action=\[1\. 1\.\], next_state=\[1\. 2\.\]"
    with pytest.raises(ValueError, match=message):
        override_reward(Line(), function)


def test_make_overrides_the_reward():
    assert float(pushed(make(Line(), reward_function=lambda s, a, n: 9.0), ACTIONS)[0][0]) == 9.0


class Count:
    """A Python object that changes with every call."""

    def __init__(self):
        self.n = 0

    def __call__(self, key, state, action):
        self.n += 1
        return state + self.n


class Leak(Count):
    """Keeps what it was called with."""

    def __call__(self, key, state, action):
        last, self.n = self.n, state
        return state + last


@pytest.mark.parametrize(
    "move",
    [
        pytest.param(Count, id="counter"),
        pytest.param(Leak, id="leak"),
        pytest.param(lambda: lambda key, s, a: s + np.random.normal(), id="numpy-number"),
        pytest.param(
            lambda: lambda key, s, a: s + jnp.asarray(np.random.normal(size=2), jnp.float32),
            id="numpy-array",
        ),
        pytest.param(
            lambda: lambda key, s, a: s + jax.random.normal(jax.random.key(np.random.randint(2**30))),
            id="numpy-seed",
        ),
    ],
)
def test_impure_worlds_are_refused(move):
    with pytest.raises(ValueError, match=r"Line is not pure.*draw randomness from the key"):
        make(Line(move=move()))


@jax.custom_jvp
def twice(x):
    return 2 * x


twice.defjvp(lambda primals, tangents: (2 * primals[0], 2 * tangents[0]))


@pytest.mark.parametrize(
    "move",
    [
        lambda key, s, a: s + jax.random.normal(key, (2,)),
        lambda key, s, a: s + jax.random.normal(CLOSED_OVER_KEY, (2,)),
        lambda key, s, a: s + jnp.nan_to_num(CLOSED_OVER_NAN),
        lambda key, s, a: s + jnp.nan_to_num(jnp.asarray(CLOSED_OVER_NAN)),
        lambda key, s, a: twice(s),
        lambda key, s, a: jax.lax.cond(a[0] > 0, lambda: s, lambda: -s),
        lambda key, s, a: jax.lax.fori_loop(0, 3, lambda i, s: s + i, s),
    ],
    ids=["random", "key", "nan", "jax-nan", "custom_jvp", "cond", "loop"],
)
def test_pure_worlds_are_taken(move):
    world = Line(move=move)
    assert make(world) is world


@pytest.mark.parametrize(
    ("broken", "error", "message"),
    [
        (
            {"move": lambda key, s, a: (s + a).astype(jnp.float16)},
            TypeError,
            r"float16\[2\].*float32\[2\]: cast",
        ),
        (
            {"move": lambda key, s, a: (s + a)[None]},
            TypeError,
            r"float32\[1, 2\], but reset gives float32\[2\]",
        ),
        ({"move": lambda key, s, a: {"x": s}}, TypeError, "another structure than reset's"),
        ({"reward": lambda s: s[:1]}, ValueError, r"return reward of shape \[\], got \[1\]"),
        ({"terminated": lambda s: s > 3}, ValueError, r"return terminated of shape \[\], got \[2\]"),
        (
            {"start": lambda key: jnp.zeros(3), "move": lambda key, s, a: s},
            ValueError,
            r"shape \(3,\).*says \(2,\)",
        ),
        (
            {"move": lambda key, s, a: s if s[0] > 0 else -s},
            TypeError,
            "cannot be traced.*without Python branches",
        ),
        ({"move": lambda key, s, a: np.sin(s)}, TypeError, "cannot be traced"),
    ],
    ids=["dtype", "shape", "structure", "reward", "terminated", "observation", "branch", "numpy"],
)
def test_worlds_that_would_break_a_compiled_loop_are_refused(broken, error, message):
    defaults = {"reward": lambda s: jnp.float32(0), "terminated": lambda s: jnp.array(False)}
    with pytest.raises(error, match=message):
        make(Line(**(defaults | broken)))


@pytest.mark.parametrize(
    ("space", "expected"),
    [
        (spaces.Discrete(3), 0),
        (spaces.MultiDiscrete((2, 3)), [0, 0]),
        (spaces.MultiBinary(2), [0, 0]),
        (spaces.Box(-1, 3, (2,)), [1.0, 1.0]),
        (spaces.Box(-np.inf, 3, (2,)), [0.0, 0.0]),
    ],
)
def test_example_action(space, expected):
    action = example_action(space)
    assert action.dtype == (jnp.float32 if isinstance(space, spaces.Box) else jnp.int32)
    np.testing.assert_array_equal(action, expected)


def test_strong_strips_weak_types_and_casts():
    tree = {"a": 1.0, "b": jnp.asarray(2), "c": jnp.zeros(2, jnp.int8)}
    stripped = strong(tree)
    assert not any(leaf.weak_type for leaf in jax.tree.leaves(stripped))
    assert [leaf.dtype for leaf in jax.tree.leaves(stripped)] == [jnp.float32, jnp.int32, jnp.int8]
    like = jax.tree.map(lambda leaf: jnp.zeros((), jnp.float32), tree)
    assert all(leaf.dtype == jnp.float32 for leaf in jax.tree.leaves(strong(tree, like)))
