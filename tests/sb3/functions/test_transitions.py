"""Transition functions in every form; a linear system that is written out by hand is the oracle."""

import itertools
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from gymnasium import spaces

from grpo_jax.groups.branch import group_returns
from grpo_jax.spaces import from_gymnasium
from grpo_jax.worlds.base import RewardOverride, RewardOverrideState, check_world
from grpo_jax.worlds.function import FunctionWorld
from sb3_bridge.functions.host_call import original_errors
from sb3_bridge.functions.reward import resolve_reward
from sb3_bridge.functions.transition import Transition, resolve_transition

BOX = spaces.Box(-2, 2, (2,))
THREE = spaces.Discrete(3)
MATRIX = np.array([[1.0, 0.5], [-0.25, 0.9]], np.float32)
PUSH = np.array([0.0, 0.2], np.float32)
LIMIT = 1.5
TENSORS = torch.from_numpy(MATRIX), torch.from_numpy(PUSH)


def linear(states, actions):
    """Position ``x + v / 2`` and velocity ``0.9 v - x / 4 + (a - 1) / 5``; ends beyond 1.5. A loop, in float64."""
    reached, ends = [], []
    for (x, v), action in zip(np.asarray(states, float), actions, strict=True):
        reached.append([x + 0.5 * v, 0.9 * v - 0.25 * x + 0.2 * (float(action) - 1)])
        ends.append(abs(reached[-1][0]) > LIMIT)
    return np.array(reached), np.array(ends)


STATES = {
    ("jax", False): lambda s, a: jnp.asarray(MATRIX) @ s + jnp.asarray(PUSH) * (a - 1),
    ("jax", True): lambda s, a: jnp.einsum("nj,ij->ni", s, MATRIX) + jnp.asarray(PUSH) * (a - 1)[:, None],
    ("numpy", False): lambda s, a: np.array([s[0] + 0.5 * s[1], MATRIX[1] @ s + 0.2 * (int(a) - 1)]),
    ("numpy", True): lambda s, a: np.matmul(np.array(s), MATRIX.T) + PUSH * (np.array(a) - 1)[:, None],
    ("torch", False): lambda s, a: torch.mv(TENSORS[0], s) + TENSORS[1] * (a - 1),
    ("torch", True): lambda s, a: torch.mm(s, TENSORS[0].T) + TENSORS[1] * (a - 1).unsqueeze(1),
}
ENDS = {
    ("jax", False): lambda n: jnp.abs(n[:1]) > LIMIT,
    ("jax", True): lambda n: jnp.abs(n[:, 0]) > LIMIT,
    ("numpy", False): lambda n: bool(abs(n[0]) > LIMIT),
    ("numpy", True): lambda n: np.abs(n[:, :1]) > LIMIT,
    ("torch", False): lambda n: n[0].abs() > LIMIT,
    ("torch", True): lambda n: n[:, 0].abs() > LIMIT,
}


def with_end(form):
    def function(state, action):
        next_state = STATES[form](state, action)
        return next_state, ENDS[form](next_state)

    return function


FUNCTIONS = {(*form, False): function for form, function in STATES.items()}
FUNCTIONS |= {(*form, True): with_end(form) for form in STATES}


@pytest.fixture(scope="module")
def resolved():
    return {form: resolve_transition(function, BOX, THREE) for form, function in FUNCTIONS.items()}


@pytest.mark.parametrize("form", FUNCTIONS)
def test_every_form_is_found_out_and_agrees_with_the_system(resolved, form):
    transition = resolved[form]
    assert (transition.framework, transition.takes_batch, transition.tells_end) == form
    same = Transition(FUNCTIONS[form], *form, from_gymnasium(BOX))
    assert transition == same and hash(transition) == hash(same)

    rng = np.random.default_rng(0)
    states = rng.uniform(-2, 2, (3, 5, 2)).astype(np.float32)
    actions = rng.integers(3, size=(3, 5))
    reached, ends = linear(states.reshape(15, 2), actions.reshape(15))
    assert 0 < ends.sum() < 15

    def check(result, shape, rows):
        next_state, terminated = result if form[2] else (result, None)
        assert next_state.shape == (*shape, 2) and next_state.dtype == jnp.float32
        np.testing.assert_allclose(next_state.reshape(-1, 2), reached[rows], rtol=1e-5, atol=1e-6)
        if form[2]:
            assert terminated.shape == shape and terminated.dtype == bool
            np.testing.assert_array_equal(terminated.reshape(-1), ends[rows])

    check(transition(states[0, 0], actions[0, 0]), (), slice(1))
    check(jax.jit(transition)(states[0, 0], actions[0, 0]), (), slice(1))
    check(jax.vmap(jax.vmap(transition))(states, actions), (3, 5), slice(None))
    check(jax.jit(jax.vmap(jax.vmap(transition)))(states, actions), (3, 5), slice(None))


def test_descriptions(resolved):
    assert resolved["numpy", True, False].description == "dynamics: NumPy, batches of transitions"
    assert resolved["torch", False, True].description == "dynamics: torch, one transition at a time"
    assert resolved["jax", False, False].description == "dynamics: JAX, one transition at a time"


def test_the_host_is_called_once_for_nested_batches_inside_of_loops():
    calls = []

    def function(state, action):
        calls.append((state.shape, action.dtype))
        return state + np.float32(action)[:, None] * PUSH, np.abs(state[:, 0]) > LIMIT

    transition = resolve_transition(function, BOX, THREE)
    states, actions = np.ones((4, 2), np.float32), np.arange(3)
    over_all = jax.vmap(jax.vmap(transition, (None, 0)), (0, None))
    calls.clear()
    run = jax.jit(lambda s: jax.lax.fori_loop(0, 2, lambda _, s: over_all(s, actions)[0][:, 1], s))
    np.testing.assert_allclose(run(states), states + 2 * PUSH, rtol=1e-6)
    assert calls == [((12, 2), np.int64)] * 2


def test_nothing_at_all(resolved):
    nothing = np.zeros((0, 2), np.float32), np.zeros(0, np.int32)
    for (*_, tells_end), transition in resolved.items():
        result = jax.vmap(transition)(*nothing)
        next_state = result[0] if tells_end else result
        assert next_state.shape == (0, 2)


# Spaces.

IMAGE = spaces.Box(0, 255, (4, 5, 1), np.uint8)
MANY = spaces.Dict({"x": BOX, "cell": spaces.Discrete(6)})
CYCLE = {
    "numpy": lambda s, a: {"cell": np.int64((s["cell"] + a) % 6), "x": np.array(s["x"]) * 0.5},
    "torch": lambda s, a: {"cell": (s["cell"] + a) % 6, "x": torch.mul(s["x"], 0.5)},
    "jax": lambda s, a: {"cell": (s["cell"] + a) % 6, "x": s["x"] * 0.5},
}


@pytest.mark.parametrize("tells_end", [False, True])
@pytest.mark.parametrize("framework", CYCLE)
def test_dicts(framework, tells_end):
    def function(state, action):
        next_state = CYCLE[framework](state, action)
        return (next_state, next_state["cell"] == 0) if tells_end else next_state

    transition = resolve_transition(function, MANY, THREE)
    assert (transition.framework, transition.tells_end) == (framework, tells_end)
    states = {"x": np.ones((3, 2), np.float32), "cell": np.array([1, 3, 5])}
    result = jax.vmap(transition)(states, np.array([0, 2, 1]))
    next_state, ends = result if tells_end else (result, None)
    assert next_state["x"].dtype == jnp.float32 and next_state["cell"].dtype == jnp.int32
    np.testing.assert_array_equal(next_state["x"], np.full((3, 2), 0.5))
    np.testing.assert_array_equal(next_state["cell"], [1, 5, 0])
    if tells_end:
        np.testing.assert_array_equal(ends, [False, False, True])


@pytest.mark.parametrize(
    ("space", "function", "form", "dtype"),
    [
        (spaces.Discrete(6), lambda s, a: (s + a) % 6, ("jax", False), np.int32),
        (spaces.Discrete(6), lambda s, a: np.arange(9)[int(s)], ("numpy", False), np.int32),
        (spaces.Discrete(6), lambda s, a: torch.remainder(s + a, 6).unsqueeze(1), ("torch", True), np.int32),
        (spaces.MultiDiscrete([3, 4]), lambda s, a: torch.flip(s, (1,)), ("torch", True), np.int32),
        (spaces.MultiBinary(3), lambda s, a: np.logical_not(np.array(s)), ("numpy", True), np.int32),
        (IMAGE, lambda s, a: jnp.uint8(255) - s, ("jax", False), np.uint8),
        (IMAGE, lambda s, a: torch.flip(s, (1, 3)), ("torch", True), np.uint8),
        (spaces.Box(-9, 9, (2,), np.int64), lambda s, a: np.array(s) // 2, ("numpy", True), np.int32),
        (spaces.Box(-9, 9, (2,), np.float64), lambda s, a: [s[1], s[0] + a], ("jax", False), np.float32),
    ],
)
def test_spaces(space, function, form, dtype):
    transition = resolve_transition(function, space, THREE)
    assert (transition.framework, transition.takes_batch) == form
    space.seed(0)
    states, actions = np.stack([space.sample() for _ in range(4)]), np.array([0, 1, 2, 0])
    reached = jax.vmap(transition)(states, actions)
    assert reached.shape == states.shape and reached.dtype == dtype
    for state, action, row in zip(states, actions, reached, strict=True):
        np.testing.assert_array_equal(transition(state, action), row)


def test_unhashable_callables_and_constant_ends():
    @dataclass
    class Drift:
        speed: float

        def __call__(self, state, action):
            return state + self.speed, False

    drift = Drift(0.5)
    first, second = (resolve_transition(drift, BOX, THREE) for _ in range(2))
    assert first == second and hash(first) == hash(second) and first.tells_end
    next_state, terminated = first(np.zeros(2), 0)
    np.testing.assert_array_equal(next_state, [0.5, 0.5])
    assert not terminated and terminated.dtype == bool


# Errors.


def test_not_callable_and_no_observations_of_a_world():
    with pytest.raises(TypeError, match=r"dynamics=3 must be callable: dynamics\(state, action\)"):
        resolve_transition(3, BOX, THREE)
    with pytest.raises(NotImplementedError, match="observation_space: Text spaces are not supported"):
        resolve_transition(lambda s, a: s, spaces.Text(3), THREE)


@pytest.mark.parametrize(
    ("space", "function", "said"),
    [
        (
            BOX,
            lambda s, a: s[:1],
            r"one transition at a time: returned next_state of shape \[1\], expected \[2\]",
        ),
        (BOX, lambda s, a: s[:, :1], r"returned next_state of shape \[7, 1\], expected \[N, 2\] with N=7"),
        (BOX, lambda s, a: (s[0], s[1]), r"returned next_state of shape \[\], expected \[2\]"),
        (BOX, lambda s, a: (s, 0.0, False, False, {}), r"returned a tuple of 5, expected \(next_state, term"),
        (BOX, lambda s, a: None, "returned next_state of NoneType, expected one array of real numbers"),
        (BOX, lambda s, a: {"x": s}, "returned next_state of dict, expected one array of real numbers"),
        (BOX, lambda s, a: s * 1j, "returned next_state of complex64 numbers, expected one array of real"),
        (BOX, lambda s, a: (s, s > 1), r"returned terminated of shape \[2\], expected \[\] or \[1\]"),
        (
            BOX,
            lambda s, a: (s, s[0]),
            "returned terminated of float32 numbers, expected one array of booleans",
        ),
        (BOX, lambda s, a: (s, 1), "NumPy, .*: returned terminated of int.*, expected one array of booleans"),
        (BOX, lambda s, a: (s, None), "returned terminated of NoneType, expected one array of booleans"),
        (
            THREE,
            lambda s, a: s * 0.5,
            "JAX, .*: returned next_state of float32 numbers, expected one array of integers",
        ),
        (IMAGE, lambda s, a: s * 0.5, "returned next_state of float.*, expected one array of integers"),
        (MANY, lambda s, a: s["x"], r"expected a dict of \['cell', 'x'\]"),
        (MANY, lambda s, a: {"x": s["x"]}, r"returned next_state of names \['x'\], expected a dict of"),
        (
            MANY,
            lambda s, a: s | {"x": s["cell"]},
            r"returned next_state\['x'\] of shape \[\], expected \[2\]",
        ),
    ],
)
def test_wrong_results(space, function, said):
    with pytest.raises(ValueError, match=r"dynamics\(state, action\) must return next_state or") as caught:
        resolve_transition(function, space, THREE)
    assert caught.match(said)


@pytest.mark.parametrize(
    "function",
    [
        lambda s, a: s - np.mean(np.array(s), axis=0),
        lambda s, a: s[:, ::-1] * np.max(np.array(s)),
        lambda s, a: torch.mul(s[:, :2], torch.rand(len(s), 1)),
        lambda s, a: (s, np.array(s)[:, 0] > np.median(s[:, 0])),
    ],
)
def test_what_depends_on_the_batch_is_refused(function):
    with pytest.raises(
        ValueError, match=r"dynamics \(.*\) gives .* for the same transition alone: it must dep"
    ):
        resolve_transition(function, BOX, THREE)


def test_ambiguous_forms_are_refused():
    # Turns a state around, or the batch.
    with pytest.raises(
        ValueError, match="dynamics .*for a transition in a batch and .* for the same transition"
    ):
        resolve_transition(lambda s, a: np.array(s)[::-1], BOX, THREE)


NAN = {
    "jax": lambda s, a: jnp.where(s > 50, jnp.nan, s),
    "numpy": lambda s, a: np.array([np.nan if s[0] > 50 else s[0], s[1]]),
    "numpy batched": lambda s, a: (np.where(s[:, :2] > 50, np.inf, s), np.array(s)[:, 0] > 1),
    "torch": lambda s, a: torch.where(s > 50, torch.nan, s)[:2],
    "torch batched": lambda s, a: torch.where(s[:, :2] > 50, torch.nan, s),
}
FAR, ACTIONS = np.array([[0.0, 0.0], [99.0, 0.0]], np.float32), np.array([0, 1])
SHOWN = r"state=\[99., 0.\], action=1"


@pytest.mark.parametrize("name", NAN)
def test_non_finite_states_while_training(name):
    transition = resolve_transition(NAN[name], BOX, THREE)
    run = jax.jit(jax.vmap(transition))
    if name == "jax":  # the check of the updates catches it
        assert np.isnan(run(FAR, ACTIONS)[1, 0])
        return
    with (
        pytest.raises(
            ValueError, match=rf"^dynamics returned next_state=\[(nan|inf).* for {SHOWN}; it must be"
        ),
        original_errors(),
    ):
        jax.block_until_ready(run(FAR, ACTIONS))
    # What follows an error is unharmed; what is not finite already may lead anywhere.
    jax.block_until_ready(run(FAR * 0, ACTIONS))
    jax.block_until_ready(run(np.where(FAR > 50, np.inf, 0.0), ACTIONS))


@pytest.mark.parametrize(
    ("late", "said"),
    [
        (lambda s: 1 / 0, "RuntimeError: dynamics raised ZeroDivisionError: division by zero"),
        (lambda s: s[:1], r"ValueError: dynamics returned next_state of shape \[1\], expected \[2\]"),
        (
            lambda s: (s, False),
            r"ValueError: dynamics returned \(next_state, terminated\) instead of next_state alone",
        ),
    ],
)
def test_later_errors_show_state_and_action(late, said):
    transition = resolve_transition(lambda s, a: late(s) if s[0] > 50 else np.array(s), BOX, THREE)
    assert transition.framework == "numpy" and not transition.tells_end
    with pytest.raises((RuntimeError, ValueError)) as caught, original_errors():
        jax.block_until_ready(jax.jit(jax.vmap(transition))(FAR, ACTIONS))
    assert caught.match(f"for {SHOWN}")
    assert said.split(":")[0] == type(caught.value).__name__ and caught.match(said.split(": ", 1)[1])


def test_an_end_that_is_forgotten_later():
    transition = resolve_transition(lambda s, a: s if s[0] > 50 else (np.array(s), False), BOX, THREE)
    assert transition.tells_end
    with (
        pytest.raises(
            ValueError, match=rf"returned next_state alone instead of \(next_state, terminated\) for {SHOWN}"
        ),
        original_errors(),
    ):
        jax.block_until_ready(jax.jit(jax.vmap(transition))(FAR, ACTIONS))


# Branches.

HORIZON, GAMMA, MAX_STEPS = 6, 0.9, 8
SCORE = lambda s, a, n: 1 - n[0] ** 2 - 0.1 * s[1] * a
TIMES = np.array([0, 5, 0, 7, 2])
STARTS = np.random.default_rng(1).uniform(-1.4, 1.4, (5, 2)).astype(np.float32)


def returns_of_a_loop(tells_end):
    totals = np.zeros((5, 3))
    for row, candidate in itertools.product(range(5), range(3)):
        state, action = STARTS[row].astype(float), candidate
        for k in range(HORIZON):
            (next_state,), (end,) = linear(state[None], [action])
            totals[row, candidate] += GAMMA**k * SCORE(state, action, next_state)
            if (end and tells_end) or TIMES[row] + k + 1 >= MAX_STEPS:
                break
            state, action = next_state, 2 * int(next_state[1] < 0)
    return totals


@pytest.mark.parametrize("form", FUNCTIONS)
def test_branches_are_those_of_a_loop(resolved, form):
    world = FunctionWorld(
        transition=resolved[form],
        initial_state=lambda key: jnp.zeros(2),
        terminated=None,
        max_steps=MAX_STEPS,
        observation_space=from_gymnasium(BOX),
        action_space=from_gymnasium(THREE),
    )
    check_world(world)
    states = RewardOverrideState(world.at(STARTS, TIMES), jnp.asarray(STARTS))
    branches = jax.jit(
        lambda states: group_returns(
            RewardOverride(world, resolve_reward(SCORE, BOX, THREE)),
            lambda observation, mask, uniforms: 2 * (observation[..., 1] < 0).astype(jnp.int32),
            jax.random.key(0),
            states,
            jnp.broadcast_to(jnp.arange(3), (5, 3)),
            horizon=HORIZON,
            gamma=GAMMA,
        )
    )(states)
    wanted = returns_of_a_loop(tells_end=form[2])
    assert np.ptp(wanted, axis=1).min() > 0.01
    assert not np.allclose(returns_of_a_loop(True), returns_of_a_loop(False))
    np.testing.assert_allclose(branches.returns, wanted, rtol=1e-4, atol=1e-4)
