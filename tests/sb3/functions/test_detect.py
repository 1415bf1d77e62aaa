"""In which form a function is called: what is found out by trying, and what is refused."""

import collections
import functools
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from gymnasium import spaces

from sb3_bridge.functions.reward import resolve_reward
from sb3_bridge.functions.transition import resolve_transition

BOX = spaces.Box(
    np.array([-4.8, -np.inf, -0.42, -np.inf], np.float32), np.array([4.8, np.inf, 0.42, np.inf], np.float32)
)
TWO = spaces.Discrete(2)


def box(*shape, dtype=np.float32):
    low, high = (0, 255) if dtype is np.uint8 else (-1, 1)
    return spaces.Box(low, high, shape, dtype)


@pytest.mark.parametrize(
    ("space", "function", "form"),
    [
        (spaces.Discrete(16), lambda s, a, n: n == 15, ("jax", False)),
        (spaces.Discrete(16), lambda s, a, n: np.float64(n == 15), ("numpy", True)),
        (spaces.Discrete(16), lambda s, a, n: (n == 15).float(), ("torch", True)),
        (spaces.Discrete(16), lambda s, a, n: (n == 15).float().unsqueeze(1), ("torch", True)),
        (spaces.Discrete(16), lambda s, a, n: jnp.zeros(len(n)), ("jax", True)),
        (box(1), lambda s, a, n: -np.abs(n), ("numpy", True)),
        (box(1), lambda s, a, n: -np.abs(n[:, 0]), ("numpy", True)),
        (box(4), lambda s, a, n: -np.abs(n[..., 2]), ("numpy", True)),
        (box(4), lambda s, a, n: n.mean(), ("jax", False)),
        (box(4), lambda s, a, n: np.mean(n), ("jax", False)),  # NumPy asks its argument for its own mean
        (box(4), lambda s, a, n: n[:, 2].squeeze(), ("jax", True)),
        (box(3, 4), lambda s, a, n: n[:, 2].sum(), ("jax", False)),
        (box(3, 4), lambda s, a, n: n[:, 2].sum(axis=1), ("jax", True)),
        (box(3, 4), lambda s, a, n: n[:, 2, 1].abs(), ("torch", True)),
        (box(7), lambda s, a, n: np.abs(n).sum(axis=0), ("numpy", False)),
        (box(8, 8, 3, dtype=np.uint8), lambda s, a, n: n.astype(np.float32).mean() / 255, ("jax", False)),
        (box(8, 8, 3, dtype=np.uint8), lambda s, a, n: n.float().mean(dim=(1, 2, 3)), ("torch", True)),
        (spaces.MultiBinary(3), lambda s, a, n: np.float32(np.count_nonzero(n)), ("numpy", False)),
        (spaces.MultiDiscrete([3, 4]), lambda s, a, n: -torch.abs(n - s).sum(1, True), ("torch", True)),
        (
            spaces.Dict({"b": box(2), "a": spaces.Discrete(3)}),
            lambda s, a, n: -np.abs(n["b"][0] - s["b"][1]) + n["a"],
            ("numpy", False),
        ),
        (
            spaces.Dict({"b": box(2), "a": spaces.Discrete(3)}),
            lambda s, a, n: -torch.abs(n["b"][:, 0]) + n["a"],
            ("torch", True),
        ),
        (
            spaces.Dict({"b": box(2), "a": spaces.Discrete(3)}),
            lambda s, a, n: -(n["b"][0] ** 2) + n["a"],
            ("jax", False),
        ),
    ],
)
def test_spaces(space, function, form):
    reward = resolve_reward(function, space, TWO)
    assert (reward.framework, reward.takes_batch) == form
    space.seed(0)
    seen = [space.sample() for _ in range(5)]
    stacked = jax.tree.map(lambda *leaves: np.stack(leaves), *seen)
    actions = np.arange(5) % 2
    rewards = reward.batch(stacked, actions, stacked)
    alone = [
        reward.batch(
            jax.tree.map(lambda leaf: np.asarray(leaf)[None], one),
            action[None],
            jax.tree.map(lambda leaf: np.asarray(leaf)[None], one),
        )[0]
        for one, action in zip(seen, actions, strict=True)
    ]
    np.testing.assert_allclose(rewards, alone, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(jax.vmap(reward)(stacked, actions, stacked), rewards, rtol=1e-5, atol=1e-6)


# One transition and a batch.


class Weight:
    def __init__(self, weight):
        self.weight = weight

    def score(self, state, action, next_state):
        return self.weight * np.abs(next_state[..., 0])


BOTH = {
    "ellipsis": lambda s, a, n: 1 - np.abs(n[..., 2]) + 0.1 * a,
    "transposed": lambda s, a, n: np.abs(np.asarray(n).T[2]),
    "sum": lambda s, a, n: np.asarray(n).sum(axis=-1),
    "matrix": lambda s, a, n: np.asarray(n) @ np.ones(4, np.float32),
    "torch": lambda s, a, n: torch.abs(n[..., 1]) - s[..., 0],
    "torch, [1] or [N, 1]": lambda s, a, n: torch.abs(n[..., 2:3]),
    "method": Weight(2.0).score,
    "partial": functools.partial(lambda w, s, a, n: w * np.abs(n[..., 0]), 3.0),
}


@pytest.mark.parametrize("name", BOTH)
def test_what_fits_both_forms_is_called_for_batches(name):
    calls = []

    def counted(*arguments):
        calls.append(len(arguments[0]))
        return BOTH[name](*arguments)

    reward = resolve_reward(counted, box(4), TWO)
    assert (
        reward.takes_batch
        and reward.fits_one
        and reward.framework == ("torch" if "torch" in name else "numpy")
    )
    calls.clear()
    states = np.random.default_rng(0).standard_normal((50, 4)).astype(np.float32)
    rewards = reward.batch(states, np.arange(50) % 2, states)
    assert calls[0] == 50 and len(calls) <= 2  # the second one is the comparison of a row
    wanted = [
        np.asarray(BOTH[name](*map(torch.tensor if "torch" in name else np.array, row))).item()
        for row in zip(states, np.arange(50) % 2, states, strict=True)
    ]
    np.testing.assert_allclose(rewards, wanted, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    "function",
    [
        # Within its usual values a batch makes no difference; at others, in other orders or sizes it does.
        lambda s, a, n: np.where(np.any(np.abs(n[..., 1]) > 9.0), 0.0, np.abs(n[..., 2])),
        lambda s, a, n: np.abs(n[..., 2]) * (np.max(np.abs(n)) < 9.0),
        lambda s, a, n: np.abs(np.asarray(n)[..., 2]) if np.shape(n) != (4, 4) else np.abs(np.asarray(n)[2]),
        lambda s, a, n: np.abs(n[..., 2]) * (1.0 if np.ndim(n) == 1 or len(n) != 3 else 2.0),
        lambda s, a, n: np.abs(n[..., 2]) + (np.ndim(n) > 1 and len(n) > 1 and np.all(n[0] == n[1])),
        lambda s, a, n: torch.abs(n[..., 2]) * (1 + 1e-4 * (n.ndim - 1)),
    ],
)
def test_what_agrees_only_now_and_then_is_called_for_one_transition(function):
    reward = resolve_reward(function, BOX, TWO)
    assert not reward.takes_batch and not reward.fits_one


def test_a_function_of_jax_that_fits_both_is_traced_for_one_transition():
    reward = resolve_reward(lambda s, a, n: 1 - jnp.abs(n[..., 2]), BOX, TWO)
    assert (reward.framework, reward.takes_batch, reward.fits_one) == ("jax", False, False)


def test_transitions_that_fit_both_forms():
    matrix = np.random.default_rng(0).standard_normal((4, 4)).astype(np.float32)
    transition = resolve_transition(lambda s, a: (np.asarray(s) @ matrix, np.abs(s[..., 0]) > 1), box(4), TWO)
    assert transition.takes_batch and transition.fits_one and transition.tells_end
    around = lambda s, a: np.asarray(s)[..., ::-1] if np.ndim(s) == 1 or len(s) < 30 else np.asarray(s)
    assert not resolve_transition(around, box(4), TWO).takes_batch


@pytest.mark.parametrize("compiled", [False, True])
def test_a_row_is_compared_while_it_runs(compiled):
    """What no try can find: the two forms part ways later."""
    late = []

    def function(state, action, next_state):
        return np.abs(next_state[..., 0]) + (np.ndim(next_state) > 1) * len(late)

    reward = resolve_reward(function, box(4), TWO)
    run = jax.jit(jax.vmap(reward)) if compiled else reward.batch
    arguments = np.full((8, 4), 0.5, np.float32), np.zeros(8, int), np.full((8, 4), 0.5, np.float32)
    for _ in range(3):
        np.testing.assert_array_equal(run(*arguments), np.full(8, 0.5))
    late.append(1)
    said = r"reward_function \(NumPy\) gives 1.5 for a transition in a batch and 0.5 for the same transition alone"
    with pytest.raises((ValueError, jax.errors.JaxRuntimeError), match=said):
        collections.deque((jax.block_until_ready(run(*arguments)) for _ in range(64)), 0)


@pytest.mark.parametrize(
    "function",
    [
        lambda s, a, n: n[:, 2] - n[:, 2].mean(),
        lambda s, a, n: np.abs(n[:, 2]) / np.abs(n[:, 2]).max(),
        lambda s, a, n: torch.abs(n[:, 2]) + torch.randn(len(n)),
    ],
)
def test_rewards_that_depend_on_the_batch_are_refused(function):
    with pytest.raises(ValueError, match="must depend on nothing else than state="):
        resolve_reward(function, BOX, TWO)


def test_ambiguous_forms_are_refused():
    # Fits both shapes, and means two things.
    with pytest.raises(ValueError, match="a transition in a batch and"):
        resolve_reward(lambda s, a, n: np.abs(n) / np.abs(n).sum(), box(1), TWO)


def test_results_are_copies():
    kept = np.zeros(2, np.float32)

    def function(state, action, next_state):
        if np.shape(next_state) != (2, 4):
            return np.abs(next_state[:, 0])
        kept[:] = next_state[:, 0]
        return kept

    reward = resolve_reward(function, BOX, TWO)
    states = np.ones((2, 4), np.float32)
    first = reward.batch(states, np.zeros(2, int), states)
    reward.batch(states, np.zeros(2, int), 2 * states)
    np.testing.assert_array_equal(first, [1.0, 1.0])


# Callables, and what is refused.


def test_modules_and_unhashable_callables():
    network = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.Tanh(), torch.nn.Linear(8, 1))
    reward = resolve_reward(lambda s, a, n: network(n), BOX, TWO)
    assert reward.framework == "torch"

    @dataclass
    class Weighted:
        weight: float

        def __call__(self, state, action, next_state):
            return self.weight * jnp.abs(next_state[0])

    weighted = Weighted(2.0)
    with pytest.raises(TypeError):
        hash(weighted)
    first, second = (resolve_reward(weighted, BOX, TWO) for _ in range(2))
    assert first == second and hash(first) == hash(second)
    assert first(np.full(4, 0.25), 0, np.full(4, 0.25)) == 0.5


@pytest.mark.parametrize("wrap", [jax.jit, functools.partial, lambda f: f.__call__])
def test_other_callables(wrap):
    reward = resolve_reward(wrap(lambda s, a, n: jnp.abs(n[2])), BOX, TWO)
    assert reward.framework == "jax" and reward == resolve_reward(reward.function, BOX, TWO)
    assert reward(np.full(4, 0.25), 0, np.full(4, 0.25)) == 0.25


def test_the_spaces_own_generators_are_left_alone():
    observations, actions = box(4), spaces.Discrete(5)
    observations.seed(3), actions.seed(3)
    other, others = box(4), spaces.Discrete(5)
    other.seed(3), others.seed(3)
    resolve_reward(BOTH["ellipsis"], observations, actions)
    np.testing.assert_array_equal(observations.sample(), other.sample())
    assert [actions.sample() for _ in range(8)] == [others.sample() for _ in range(8)]


def test_not_callable():
    with pytest.raises(TypeError, match="reward_function=3 must be callable"):
        resolve_reward(3, BOX, TWO)


@pytest.mark.parametrize(
    ("function", "said"),
    [
        (lambda s, a: 0.0, r"3 arguments, but yours is \(s, a\): too many positional arguments"),
        (
            lambda s, a, n, d: 0.0,
            r"3 arguments, but yours is \(s, a, n, d\): missing a required argument: 'd'",
        ),
        (lambda s, a, n, *, goal: 0.0, "missing a required argument: 'goal'"),
        (Weight, "missing a required argument|too many positional"),
    ],
)
def test_a_wrong_number_of_arguments(function, said):
    with pytest.raises(
        TypeError, match=rf"^reward_function\(state, action, next_state\) is called with .*({said})"
    ):
        resolve_reward(function, BOX, TWO)


def test_one_error_in_every_form_is_told_once():
    def broken(state, action, next_state):
        raise KeyError("angle")

    with pytest.raises(
        TypeError, match="raises in every form that was tried.*\n  every form: KeyError: 'angle'$"
    ) as caught:
        resolve_reward(broken, BOX, TWO)
    assert isinstance(caught.value.__cause__, KeyError)


@pytest.mark.parametrize(
    ("function", "said"),
    [
        (lambda s, a, n: n[:2], r"one transition at a time: returned shape \[2\], expected \[\] or \[1\]"),
        (
            lambda s, a, n: n[:, 2:4],
            r"batches of transitions: returned shape \[7, 2\], expected \[N\] or \[N, 1\] with N=7",
        ),
        (lambda s, a, n: None, "returned NoneType, expected one array"),
        (lambda s, a, n: (1.0, {}), "returned tuple, expected one array"),
        (
            lambda s, a, n: np.abs(n[0]) * 1j,
            "NumPy, .*: returned complex64 numbers, expected one array of real numbers",
        ),
    ],
)
def test_wrong_results(function, said):
    with pytest.raises(ValueError, match=said):
        resolve_reward(function, BOX, TWO)


def test_jax_that_cannot_be_traced_is_not_taken_for_numpy():
    def function(state, action, next_state):
        return 1.0 if jnp.abs(next_state[2]) > 0.2 else 0.0

    with pytest.raises(
        TypeError, match=r"NumPy, one transition at a time: TypeError: it calls JAX on concrete"
    ):
        resolve_reward(function, BOX, TWO)


TABLE = jnp.arange(5.0)


@pytest.mark.parametrize(
    ("space", "function", "said"),
    [
        (box(4), lambda s, a, n: n[4], r"index 4 of axis 0 of an array of shape \[4\]"),
        (box(4), lambda s, a, n: jnp.abs(n[-5]), r"index -5 of axis 0 of an array of shape \[4\]"),
        (box(4), lambda s, a, n: jnp.tanh(s)[..., 9].astype(float), r"index 9 of axis 0"),
        (
            box(4),
            lambda s, a, n: jnp.abs(n[:, 4]),
            r"index 4 of axis 1 of an array of shape \[7, 4\]",
        ),
        (box(4), lambda s, a, n: n[jnp.array([1, 7])].sum(), "index 7 of axis 0"),
        (box(2, 3), lambda s, a, n: n[0, 3], r"index 3 of axis 1 of an array of shape \[2, 3\]"),
        (spaces.Discrete(9), lambda s, a, n: TABLE[n], r"index [5-8] of axis 0 of an array of shape \[5\]"),
        (box(4), jax.jit(lambda s, a, n: n[6]), "index 6"),
    ],
)
def test_indices_out_of_range_are_refused(space, function, said):
    with pytest.raises(ValueError, match=rf"reward_function \(JAX, .* reads .*{said}.* out of range"):
        resolve_reward(function, space, TWO)
    with pytest.raises(ValueError, match="dynamics .*reads index 4"):
        resolve_transition(lambda s, a: s.at[0].set(s[4]), box(4), TWO)


@pytest.mark.parametrize(
    ("space", "function"),
    [
        (box(4), lambda s, a, n: n[-4] + n[2:9].sum()),
        (box(4), lambda s, a, n: jnp.take(n, 7, mode="clip")),
        (box(4), lambda s, a, n: n.at[7].get(mode="clip") + n.at[a + jnp.array([7])].get(mode="clip")[0]),
        (box(4), lambda s, a, n: jnp.where(jnp.arange(6) < 4, n[jnp.arange(6)], 0.0).sum()),
        (box(4), lambda s, a, n: ((jnp.arange(6) < 4) * n[jnp.arange(6)]).sum()),
        (box(4), lambda s, a, n: n.at[9].set(1.0, mode="drop").sum() + n[a + 2]),
        (spaces.Discrete(5), lambda s, a, n: TABLE[n] + TABLE[n - 5]),
        (spaces.Discrete(9), lambda s, a, n: jnp.where(n < 5, TABLE[n], -1.0)),
        (
            box(4),
            lambda s, a, n: jax.lax.scan(lambda total, x: (total + x, None), 0.0, n)[0] + jax.nn.relu(n)[0],
        ),
    ],
)
def test_other_indices_are_allowed(space, function):
    assert resolve_reward(function, space, TWO).framework == "jax"


@pytest.mark.parametrize("function", [lambda s, a, n: float(n[7]), lambda s, a, n: torch.abs(n)[7]])
def test_numpy_and_torch_say_so_themselves(function):
    with pytest.raises(TypeError, match="IndexError: "):
        resolve_reward(function, box(4), TWO)
