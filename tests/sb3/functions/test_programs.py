"""Compiled programs die with the user's function that they call, and are shared as long as it lives."""

import functools
import gc
import weakref
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import struct
from gymnasium import spaces

import grpo_jax
from sb3_bridge import WorldVecEnv
from sb3_bridge.functions.programs import Borrowed, OwnedJit, borrow
from sb3_bridge.functions.reward import resolve_reward
from sb3_bridge.gymnax import vec_env
from sb3_bridge.gymnax.env import owner_of

BOX, TWO = spaces.Box(-1, 1, (4,)), spaces.Discrete(2)


@struct.dataclass
class World:
    scale: float
    function: object = struct.field(pytree_node=False)


def total(world, x, n_steps):
    body = lambda x, _: (jax.vmap(world.function)(x) * world.scale, None)
    return jax.lax.scan(body, x, None, length=n_steps)[0]


@dataclass
class Weighted:  # unhashable
    weight: float

    def __call__(self, x):
        return self.weight * x

    def method(self, x):
        return self.weight * x


def plain():
    return lambda x: 2.0 * x


KINDS = {
    "lambda": plain,
    "closure": lambda: (lambda data: lambda x: data[0] * x)(np.full(10, 2.0, np.float32)),
    "partial": lambda: functools.partial(lambda weight, x: weight * x, 2.0),
    "jitted": lambda: jax.jit(lambda x: 2.0 * x),
    "callable object": lambda: Weighted(2.0),
}


@pytest.mark.parametrize("kind", KINDS)
def test_programs_die_with_the_function(kind):
    run = OwnedJit(total, static_argnames="n_steps")
    function = KINDS[kind]()
    alive, program = weakref.ref(function), weakref.ref(run.of(function))
    result = run.of(function)(World(3.0, borrow(function)), jnp.ones(2), n_steps=2)
    np.testing.assert_array_equal(result, [36.0, 36.0])
    assert run.of(function) is program() and program()._cache_size() == 1
    run.of(function)(World(4.0, borrow(function)), jnp.ones(2), n_steps=2)  # another handle, the same program
    assert program()._cache_size() == 1 and len(run._programs) == 1
    del function
    gc.collect()
    assert alive() is None and program() is None and not run._programs


def test_programs_of_a_method_live_as_long_as_its_object():
    run, one, other = OwnedJit(total, static_argnames="n_steps"), Weighted(2.0), Weighted(2.0)
    for owner in (one, other, one):
        function = borrow(owner.method)
        run.of(owner.method)(World(1.0, function), jnp.ones(2), n_steps=1)
    assert len(run._programs) == 2 and run.of(one.method)._cache_size() == 1
    del one, owner
    gc.collect()
    assert len(run._programs) == 1
    np.testing.assert_array_equal(
        run.of(other.method)(World(1.0, borrow(other.method)), jnp.ones(2), n_steps=1), 2.0
    )


def test_several_owners():
    """Programs are dropped as soon as one owner dies; without owners they stay and are everybody's."""
    run, one, other = OwnedJit(total, static_argnames="n_steps"), plain(), plain()
    program = weakref.ref(run.of(one, None, other))
    assert run.of(one, other) is program() is not run.of(one) and len(run._programs) == 2
    del other
    gc.collect()
    assert program() is None and len(run._programs) == 1
    assert run.of() is run.of(None, None)


def test_what_python_cannot_watch_is_everybodys():
    class Slots:
        __slots__ = ()

        def __call__(self, x):
            return 2.0 * x

    run, function = OwnedJit(total, static_argnames="n_steps"), Slots()
    assert borrow(function) is function and run.of(function) is run.of()
    np.testing.assert_array_equal(run.of(function)(World(1.0, function), jnp.ones(2), n_steps=1), [2.0, 2.0])


def test_handles():
    function, other, weighted = plain(), plain(), Weighted(2.0)
    assert borrow(function) == borrow(function) != borrow(other) and borrow(borrow(function)) == borrow(
        function
    )
    assert hash(borrow(function)) == hash(borrow(function))
    assert borrow(weighted.method) == borrow(weighted.method) != borrow(weighted.__call__)
    handle = borrow(function)
    del function
    gc.collect()
    assert handle == handle and handle != Borrowed(other)
    with pytest.raises(RuntimeError, match="was deleted before a program that calls it: keep a reference"):
        handle(1.0)


@pytest.mark.parametrize("framework", ["jax", "numpy"])
def test_a_reward_function_leaves_nothing_behind(framework):
    absolute = jnp.abs if framework == "jax" else np.abs
    states = np.random.default_rng(0).standard_normal((3, 4)).astype(np.float32)
    step = OwnedJit(
        lambda reward, states: jax.vmap(reward)(states, jnp.zeros(3, jnp.int32), states),
        static_argnames="reward",
    )
    dead = []
    for scale in (1.0, 2.0):
        function = lambda s, a, n, scale=scale: scale * absolute(n[2])
        reward = resolve_reward(function, BOX, TWO)
        assert reward.framework == framework
        wanted = scale * np.abs(states[:, 2])
        np.testing.assert_allclose(reward.batch(states, np.zeros(3, int), states), wanted, rtol=1e-6)
        np.testing.assert_allclose(step.of(reward)(reward.borrowed, states), wanted, rtol=1e-6)
        assert step.of(reward) is step.of(resolve_reward(function, BOX, TWO)) is step.of(function)
        dead.append(weakref.ref(function))
        del function, reward
    gc.collect()
    assert [function() for function in dead] == [None, None] and not step._programs


def test_worlds_of_ids_share_their_programs_and_others_own_them():
    played = WorldVecEnv("CartPole-v1", 2, seed=0)
    assert played.program_owner is None
    n_owners = len(vec_env._reset._programs)
    for _ in range(3):
        world = grpo_jax.make("CartPole-v1", reward_function=lambda s, a, n: 1.0 - jnp.abs(n[2]))
        assert owner_of(world) is world
        env = WorldVecEnv(world, 2, seed=0)
        env.reset()
        assert len(vec_env._reset._programs) == n_owners + 1
        WorldVecEnv(world, 2, seed=1).reset()
        assert len(vec_env._reset._programs) == n_owners + 1
        del world, env
        gc.collect()
        assert len(vec_env._reset._programs) == n_owners
