"""Reward functions in every form; a Python loop over the transitions is the oracle."""

import math
import subprocess
import sys
import textwrap

import gymnasium
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from gymnasium import spaces

import grpo_jax
from grpo_jax.worlds.base import RewardOverride
from sb3_bridge.functions.reward import Reward, original_errors, resolve_reward

CARTPOLE = gymnasium.make("CartPole-v1")
BOX = CARTPOLE.observation_space
TWO = CARTPOLE.action_space


def expected(states, actions, next_states):
    """1 - |angle| - 0.1 |position| + 0.01 action * old velocity, in float64."""
    return np.array(
        [
            1 - abs(float(n[2])) - 0.1 * abs(float(n[0])) + 0.01 * float(a) * float(s[1])
            for s, a, n in zip(states, actions, next_states, strict=True)
        ]
    )


FORMS = {
    "plain": (
        "jax",
        False,
        lambda s, a, n: 1 - abs(n[2]) - 0.1 * abs(n[0]) + 0.01 * a * s[1],
    ),
    "jax": (
        "jax",
        False,
        lambda s, a, n: 1 - jnp.abs(n[2:3]) - 0.1 * jnp.abs(n[:1]) + 0.01 * a * s[1:2],
    ),
    "jax batched": (
        "jax",
        True,
        lambda s, a, n: 1 - jnp.abs(n[:, 2]) - 0.1 * jnp.abs(n[:, 0]) + 0.01 * a * s[:, 1],
    ),
    "numpy": (
        "numpy",
        False,
        lambda s, a, n: 1 - np.abs(n[2]) - 0.1 * np.abs(n[0]) + 0.01 * a * s[1],
    ),
    "math": (
        "numpy",
        False,
        lambda s, a, n: 1 - math.fabs(n[2]) - 0.1 * math.fabs(n[0]) + 0.01 * a * float(s[1]),
    ),
    "numpy batched": (
        "numpy",
        True,
        lambda s, a, n: 1 - np.abs(n[:, 2]) - 0.1 * np.abs(n[:, 0]) + 0.01 * a * s[:, 1],
    ),
    "torch": (
        "torch",
        False,
        lambda s, a, n: 1 - torch.abs(n[2]) - 0.1 * n[0].abs() + 0.01 * a * s[1],
    ),
    "torch batched": (
        "torch",
        True,
        lambda s, a, n: (
            1.0 - torch.abs(n[:, 2:3]) - 0.1 * torch.abs(n[:, :1]) + 0.01 * a[:, None] * s[:, 1:2]
        ),
    ),
    "torch methods": (
        "torch",
        True,
        lambda s, a, n: (1 - n[:, 2].abs() - 0.1 * n[:, 0].abs() + 0.01 * a * s[:, 1]).double(),
    ),
}
RESOLVED = {name: resolve_reward(function, BOX, TWO) for name, (_, _, function) in FORMS.items()}


@pytest.mark.parametrize("name", FORMS)
def test_forms_are_found_out(name):
    framework, takes_batch, function = FORMS[name]
    reward = RESOLVED[name]
    assert reward == Reward(function, framework, takes_batch)
    assert hash(reward) == hash(Reward(function, framework, takes_batch))


def test_descriptions():
    assert RESOLVED["numpy"].description == "reward_function: NumPy, one transition at a time"
    assert RESOLVED["torch batched"].description == "reward_function: torch, batches of transitions"
    assert RESOLVED["plain"].description == "reward_function: JAX, one transition at a time"


@pytest.mark.parametrize("n", [1, 6])
@pytest.mark.parametrize("name", FORMS)
def test_every_form_agrees_with_a_loop(n, name):
    rng = np.random.default_rng(n)
    states, next_states = rng.standard_normal((2, n, 4)).astype(np.float32)
    actions = rng.integers(2, size=n)
    reward = RESOLVED[name]
    wanted = expected(states, actions, next_states)
    rewards = reward.batch(states, actions, next_states)
    assert rewards.dtype == np.float32 and rewards.shape == (n,)
    np.testing.assert_allclose(rewards, wanted, rtol=1e-5, atol=1e-5)
    mapped = jax.vmap(reward)(states, actions.astype(np.int32), next_states)
    np.testing.assert_allclose(mapped, wanted, rtol=1e-5, atol=1e-5)
    one = reward(states[0], actions[0], next_states[0])
    assert one.shape == () and one.dtype == jnp.float32
    np.testing.assert_allclose(one, wanted[0], rtol=1e-5, atol=1e-5)


def test_the_host_is_called_once_for_nested_batches_and_unbatched_arguments():
    calls = []

    def function(state, action, next_state):
        calls.append(next_state.shape)
        return np.abs(state[:, 0]) + 10 * action + 100 * next_state[:, 1]

    reward = resolve_reward(function, BOX, TWO)
    assert reward.takes_batch and reward.framework == "numpy"
    calls.clear()
    states = np.arange(8, dtype=np.float32).reshape(2, 4)
    actions = np.array([0, 1, 1])
    next_states = np.arange(5 * 4, dtype=np.float32).reshape(4, 5)  # mapped over its last axis
    mapped = jax.vmap(jax.vmap(jax.vmap(reward, (None, None, 1)), (None, 0, None)), (0, None, None))
    rewards = jax.jit(mapped)(states, actions, next_states)
    assert calls == [(2 * 3 * 5, 4)]
    wanted = states[:, 0][:, None, None] + 10 * actions[None, :, None] + 100 * next_states[1][None, None, :]
    np.testing.assert_array_equal(rewards, wanted)


@pytest.mark.parametrize("name", FORMS)
def test_inside_of_loops(name):
    reward = RESOLVED[name]

    def run(state):
        def body(carry, _):
            state, total = carry
            next_state = state * 0.9
            return (next_state, total + reward(state, jnp.int32(1), next_state)), None

        return jax.lax.scan(body, (state, 0.0), None, length=3)[0][1]

    states = np.random.default_rng(0).standard_normal((6, 4)).astype(np.float32)
    wanted = sum(expected(states * 0.9**k, np.ones(6), states * 0.9 ** (k + 1)) for k in range(3))
    np.testing.assert_allclose(jax.jit(jax.vmap(run))(states), wanted, rtol=1e-4)


def test_empty_batches():
    for reward in RESOLVED.values():
        nothing = np.zeros((0, 4), np.float32), np.zeros(0, np.int64), np.zeros((0, 4), np.float32)
        assert reward.batch(*nothing).shape == (0,)
        assert jax.vmap(reward)(*nothing).shape == (0,)


def test_what_host_functions_get():
    seen = []

    def spy(state, action, next_state):
        seen.append((state, action))
        return np.float32(0.0) + 0 * float(next_state[0])

    numpy = resolve_reward(spy, spaces.Box(-1, 1, (2,), np.float64), spaces.Discrete(3))
    assert numpy.framework == "numpy"
    seen.clear()
    numpy.batch(np.ones((1, 2)), np.array([2]), np.ones((1, 2)))
    jax.jit(numpy)(np.ones(2), np.int32(2), np.ones(2))
    for (state, action), dtype in zip(seen, (np.float64, np.float32), strict=True):
        assert type(state) is np.ndarray and state.dtype == dtype and state.shape == (2,)
        assert type(action) is np.int64 and action == 2

    def torch_spy(state, action, next_state):
        seen.append((state, action))
        return torch.zeros(len(state), dtype=torch.bfloat16, requires_grad=True) * next_state[:, 0].abs()

    reward = resolve_reward(torch_spy, spaces.Box(-1, 1, (2,), np.float64), spaces.MultiBinary(3))
    assert (reward.framework, reward.takes_batch) == ("torch", True)
    seen.clear()
    reward.batch(np.ones((4, 2)), np.ones((4, 3), np.int8), np.ones((4, 2)))
    (state, action) = seen[0]
    assert state.dtype == torch.float32 and state.device.type == "cpu" and tuple(state.shape) == (4, 2)
    assert action.dtype == torch.int64 and tuple(action.shape) == (4, 3)


@pytest.mark.parametrize("gradient", [False, True])
def test_results_may_require_grad(gradient):
    weight = torch.nn.Parameter(torch.tensor(2.0), requires_grad=gradient)
    reward = resolve_reward(lambda s, a, n: weight * torch.abs(n[:, 0]), BOX, TWO)
    states = np.full((3, 4), 0.5, np.float32)
    np.testing.assert_array_equal(reward.batch(states, np.zeros(3, int), states), [1.0, 1.0, 1.0])


def spoil(array, index):
    array[index] = 7.0
    return 7.0


@pytest.mark.parametrize(
    "function",
    [
        lambda s, a, n: spoil(n, np.s_[:, 0]) + 0 * np.abs(n[:, 0]),
        lambda s, a, n: spoil(n, 0) + 0 * np.abs(n[0]),
        lambda s, a, n: spoil(n, (..., 0)) + 0 * np.abs(n[..., 0]),
        lambda s, a, n: spoil(n, np.s_[:, 0]) + 0 * torch.abs(n[:, 0]),
        lambda s, a, n: spoil(n, 0) + 0 * torch.abs(n[0]),
    ],
)
def test_arguments_are_copies(function):
    """What a function writes into its arguments nobody else sees."""
    reward = resolve_reward(function, BOX, TWO)
    assert reward.framework in ("numpy", "torch")
    states = np.zeros((2, 4), np.float32)
    np.testing.assert_array_equal(reward.batch(states, np.zeros(2, int), states), [7.0, 7.0])
    np.testing.assert_array_equal(jax.vmap(reward)(states, np.zeros(2, int), states), [7.0, 7.0])
    np.testing.assert_array_equal(jax.jit(jax.vmap(reward))(states, np.zeros(2, int), states), [7.0, 7.0])
    assert not states.any()


def test_x64():
    with jax.enable_x64(True):
        for name in ("plain", "numpy batched", "torch"):
            reward = resolve_reward(FORMS[name][2], BOX, TWO)
            states = np.random.default_rng(0).standard_normal((3, 4))
            wanted = expected(states, np.ones(3), states)
            rewards = jax.jit(jax.vmap(reward))(states, np.ones(3, int), states)
            assert (
                rewards.dtype == jnp.float64
                and reward.batch(states, np.ones(3, int), states).dtype == np.float32
            )
            np.testing.assert_allclose(rewards, wanted, rtol=1e-6 if name == "torch" else 1e-12)


# Errors.

NAN = {
    "jax": lambda s, a, n: jnp.where(n[0] > 50, jnp.nan, 0.0),
    "numpy": lambda s, a, n: np.where(n[0] > 50, np.nan, 0.0),
    "numpy batched": lambda s, a, n: np.where(n[:, 0] > 50, np.inf, 0.0),
    "torch": lambda s, a, n: torch.where(n[0] > 50, torch.nan, 0.0),
    "torch batched": lambda s, a, n: torch.where(n[:, 0] > 50, torch.nan, 0.0),
}
STATES = np.zeros((3, 4), np.float32)
NEXT_STATES = STATES + np.array([[0.0], [99.0], [0.0]], np.float32)
SHOWN = r"state=\[0., 0., 0., 0.\], action=1, next_state=\[99., 99., 99., 99.\]"


@pytest.mark.parametrize("name", NAN)
def test_non_finite_rewards_in_batches(name):
    reward = resolve_reward(NAN[name], BOX, TWO)
    with pytest.raises(
        ValueError, match=rf"reward_function returned (nan|inf) for {SHOWN}; it must be finite"
    ):
        reward.batch(STATES, np.array([0, 1, 0]), NEXT_STATES)


@pytest.mark.parametrize("name", [name for name in NAN if name != "jax"])
def test_non_finite_rewards_inside_jit(name):
    reward = resolve_reward(NAN[name], BOX, TWO)
    run = jax.jit(
        lambda *args: jax.lax.fori_loop(0, 2, lambda i, x: x + jax.vmap(reward)(*args), jnp.zeros(3))
    )
    arguments = STATES, np.array([0, 1, 0]), NEXT_STATES
    with pytest.raises(
        jax.errors.JaxRuntimeError, match=rf"returned (nan|inf) for {SHOWN}; it must be finite"
    ):
        run(*arguments).block_until_ready()
    with (
        pytest.raises(ValueError, match=rf"^reward_function returned (nan|inf) for {SHOWN}"),
        original_errors(),
    ):
        run(*arguments).block_until_ready()
    # What follows an error is unharmed, and other errors are left alone.
    np.testing.assert_array_equal(run(STATES, np.zeros(3, int), STATES), np.zeros(3))
    with pytest.raises(jax.errors.JaxRuntimeError, match="another"), original_errors():
        raise jax.errors.JaxRuntimeError("another")
    # Behind an end a world may give anything.
    behind = np.where(NEXT_STATES > 50, np.inf, 0.0).astype(np.float32)
    assert not np.isfinite(jax.vmap(reward)(STATES, np.zeros(3, int), behind)[1])


@pytest.mark.parametrize("batched", [False, True])
def test_later_errors_show_their_transition(batched):
    def function(state, action, next_state):
        if (np.max(next_state, axis=None) if batched else next_state[0]) > 50:
            raise KeyError("too far")
        return np.zeros(len(state)) if batched else 0.0

    reward = resolve_reward(function, BOX, TWO)
    assert (reward.framework, reward.takes_batch) == ("numpy", batched)
    arguments = STATES, np.array([0, 1, 0]), NEXT_STATES
    with pytest.raises(RuntimeError, match=rf"reward_function raised KeyError: 'too far' for {SHOWN}"):
        reward.batch(*arguments)
    with (
        pytest.raises(RuntimeError, match=rf"^reward_function raised KeyError: 'too far' for {SHOWN}"),
        original_errors(),
    ):
        jax.jit(jax.vmap(reward))(*arguments).block_until_ready()


def test_later_wrong_shapes_show_their_transition():
    function = lambda s, a, n: n if np.all(n[0] > 50) else np.abs(n[0])
    reward = resolve_reward(function, BOX, TWO)
    with pytest.raises(
        ValueError, match=rf"reward_function returned shape \[4\], expected \[\] or \[1\] for {SHOWN}"
    ):
        reward.batch(STATES, np.array([0, 1, 0]), NEXT_STATES)


def test_lengths_must_agree():
    with pytest.raises(ValueError, match=r"states, actions, next_states must be arrays \[N, ...\] of one N"):
        RESOLVED["numpy"].batch(STATES, np.zeros(2, int), NEXT_STATES)


# In training.

SCORES = {
    "jax": lambda s, a, n: 1 - jnp.abs(n[2]) - 0.1 * jnp.abs(n[0]),
    "numpy": lambda s, a, n: 1 - np.abs(n[2]) - 0.1 * np.abs(n[0]),
    "torch batched": lambda s, a, n: 1.0 - torch.abs(n[:, 2:3]) - 0.1 * torch.abs(n[:, 0:1]),
}


def test_training_is_the_same_with_every_form():
    """Of one seed, and of two at once."""
    config = grpo_jax.GRPOConfig(n_envs=4, n_steps=8, horizon=4, n_epochs=1, batch_size=32, net_arch=(8,))
    keys = jax.random.split(jax.random.key(0), 2)
    results = {}
    for name in ("jax", "numpy", "torch batched"):
        reward = resolve_reward(SCORES[name], BOX, TWO)
        assert reward.framework == name.split()[0]
        world = RewardOverride(grpo_jax.make("CartPole-v1"), reward)
        train = lambda key, world=world: grpo_jax.train(config, world, key, total_timesteps=64).metrics
        results[name] = jax.device_get(train(keys[0]) if name == "numpy" else jax.vmap(train)(keys))
    assert np.all(results["jax"]["group_spread"] > 0)
    for metric, values in results["jax"].items():
        found, of_one = results["torch batched"][metric], results["numpy"][metric]
        np.testing.assert_allclose(found, values, rtol=1e-4, atol=1e-5, err_msg=metric)
        np.testing.assert_allclose(of_one, values[0], rtol=1e-4, atol=1e-5, err_msg=metric)


@pytest.mark.skipif(not hasattr(__import__("os"), "sched_setaffinity"), reason="cannot choose the cores")
def test_no_deadlock_on_one_core():
    """With ``jax.pure_callback`` in place of our primitive this hangs on one core (jax 0.10)."""
    program = """
        import os
        os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:1])
        import gymnasium, jax, jax.numpy as jnp, numpy as np, torch
        from sb3_bridge.functions.reward import resolve_reward

        size = 17  # a batch is above the 100 kB from which JAX copies in its thread pool
        space, actions = gymnasium.spaces.Box(-1, 1, (size,)), gymnasium.spaces.Discrete(2)
        # What it depends on is still being computed: then the run itself occupies the pool.
        late = jax.jit(lambda x: x + 0 * jax.lax.fori_loop(
            0, 2000, lambda i, m: jnp.tanh(m @ m), jnp.ones((100, 100)))[0, 0])
        means = []
        for function in (lambda s, a, n: 1 - np.abs(n[:, 2]), lambda s, a, n: 1 - torch.abs(n[:, 2:3])):
            reward = jax.vmap(jax.vmap(jax.vmap(resolve_reward(function, space, actions))))

            @jax.jit
            def run(states):
                def body(carry):
                    i, states, total = carry
                    after = jnp.cos(states * 1.7 + i)
                    action = (states[..., 0] > 0).astype(jnp.int32)
                    total += reward(states, action, after) + reward(jnp.sin(states), 1 - action, after + 1)
                    return i + 1, after, total
                start = 0, states, jnp.zeros(states.shape[:3])
                return jax.lax.while_loop(lambda carry: carry[0] < 50, body, start)[2]

            for k in range(3):
                means.append(float(run(late(jnp.full((2, 1, 2048, size), 0.1 * k))).mean()))
        assert np.allclose(means[:3], means[3:], rtol=1e-5), means
        print("done")
    """
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(program)],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0 and done.stdout == "done\n", done.stderr[-2000:]
