"""One contract for the worlds of all suites; what is not installed is skipped, and the reason says what to install."""

from __future__ import annotations

import functools
import importlib.util
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import grpo_jax
from grpo_jax import spaces
from grpo_jax.noise import as_key
from grpo_jax.worlds.base import check_world

pytestmark = pytest.mark.filterwarnings("ignore")  # suites warn of much that is not ours

N_STEPS = 200


class Native(NamedTuple):
    """A suite's own functions, without anything of ours around them.

    ``reset(key)`` gives a native state, ``step(key, native, action)`` the next one, ``see(native)`` what is there:
    observation, reward, whether the episode is over, whether it is by more than the time limit (None where the suite does
    not tell), action mask or None.
    """

    reset: Callable[[jax.Array], Any]
    step: Callable[[jax.Array, Any, jax.Array], Any]
    see: Callable[[Any], tuple[Any, Any, Any, Any, Any]]


def native_gymnax(world, name, limit):
    import gymnax

    env, params = gymnax.make(name)
    params = params.replace(max_steps_in_episode=limit)

    def step(key, native, action):
        observation, state, reward, terminated, _ = env.step_env(key, native[1], action, params)
        return observation, state, reward, terminated, env.is_truncated(state, params)

    def see(native):
        return native[0], native[2], native[3] | native[4], native[3], None

    return Native(lambda key: (*env.reset_env(key, params), 0.0, False, False), jax.jit(step), see)


def native_pgx(world, name, limit):
    import pgx

    env = pgx.make(name)

    def others(state):
        earned = state.rewards
        while int(state.current_player) != 0 and not bool(state.terminated):
            state = step(state, jnp.argmax(state.legal_action_mask))
            earned = earned + state.rewards
        return state.replace(rewards=earned)

    step, init = jax.jit(env.step), jax.jit(env.init)

    def see(state):
        ended = state.terminated
        return state.observation, state.rewards[0], ended, ended, state.legal_action_mask

    return Native(
        lambda key: others(init(jax.random.split(key)[0])),
        lambda key, state, action: others(step(state, action)),
        see,
    )


def with_key(state, key):
    return state.replace(key=key)


def native_navix(world, name, limit):
    import navix

    env = navix.make(name, max_steps=limit)

    def step(key, timestep, action):
        return env.step(timestep.replace(state=with_key(timestep.state, key)), action)

    def see(timestep):
        done, terminated = timestep.is_done(), timestep.is_termination()
        return symbols(timestep.observation, (11, 7, 5)), timestep.reward, done, terminated, None

    return Native(jax.jit(env.reset), jax.jit(step), see)


def native_xminigrid(world, name, limit):
    import xminigrid

    env, params = xminigrid.make(name, max_steps=limit)

    def see(timestep):
        done, terminated = timestep.last(), timestep.last() & (timestep.discount == 0)
        return symbols(timestep.observation, (13, 12)), timestep.reward, done, terminated, None

    return Native(
        jax.jit(lambda key: env.reset(params, key)),
        jax.jit(lambda key, timestep, action: env.step(params, timestep, action)),
        see,
    )


def symbols(grid, sizes):
    """Categories as one-hot maps, in NumPy; a category that there is not is an IndexError."""
    return np.concatenate(
        [np.eye(n, dtype=np.float32)[np.asarray(grid)[..., i]] for i, n in enumerate(sizes)], -1
    )


def native_jumanji(world, name, limit):
    import jumanji

    env = jumanji.make(name, **({} if limit is None else {"time_limit": limit}))
    parts = np.atleast_1d(env.action_spec.num_values)

    def step(key, native, action):
        if parts.size > 1 and isinstance(world.action_space, spaces.Discrete):
            action = jnp.array(np.unravel_index(int(action), parts), jnp.int32)
        return jitted(native[0].replace(key=key), action)

    def see(native):
        seen = native[1].observation._asdict()
        mask = seen.pop("action_mask", None)
        seen.pop("step_count", None)
        observation = seen if len(seen) > 1 else next(iter(seen.values()))
        mask = None if mask is None else np.asarray(mask).reshape(-1)
        return observation, np.sum(native[1].reward), native[1].last(), None, mask

    jitted = jax.jit(env.step)
    return Native(jax.jit(env.reset), step, see)


def native_craftax(world, name, limit):
    from craftax.craftax_env import make_craftax_env_from_name

    env = make_craftax_env_from_name(name, auto_reset=False)
    params = env.default_params.replace(max_timesteps=limit)

    def reset(key):
        return (*env.reset(key, params), 0.0, False)

    def step(key, native, action):
        return env.step(key, native[1], action, params)[:4]

    return Native(reset, step, lambda native: (native[0], native[2], native[3], None, None))


def native_brax(world, name, limit):
    from brax import envs

    env = envs.create(name, episode_length=limit, auto_reset=False, backend="spring")

    def see(state):
        cut = bool(state.info.get("truncation", False))
        return state.obs, state.reward, state.done, state.done and not cut, None

    return Native(jax.jit(env.reset), jax.jit(lambda key, state, action: env.step(state, action)), see)


def native_playground(world, name, limit):
    import mujoco_playground
    from brax.envs.wrappers.training import EpisodeWrapper

    bare = mujoco_playground.registry.load(name, config_overrides={"impl": "jax"})
    env = EpisodeWrapper(bare, limit, 1)

    def step(key, state, action):
        return env.step(state.replace(info={**state.info, "rng": jax.random.key_data(key)}), action)

    def see(state):
        cut = bool(state.info.get("truncation", False))
        return state.obs, state.reward, state.done, state.done and not cut, None

    return Native(jax.jit(env.reset), jax.jit(step), see)


def first_allowed(params, key, observation, action_mask):
    return jnp.argmax(action_mask)


class Case(NamedTuple):
    env_id: str
    limit: int | None  # steps of an episode, or None: no time limit
    options: dict[str, Any]
    is_random: bool | None  # whether steps draw random numbers; None: too seldom to be seen here
    terminates: bool  # whether some of the random episodes end by themselves
    tolerance: float = 1e-6


CASES = [
    Case("gymnax/CartPole-v1", 12, {}, False, True),
    Case("gymnax/Asterix-MinAtar", 40, {}, True, True),
    Case("pgx/connect_four", None, {"opponent": first_allowed}, False, True),
    Case("pgx/kuhn_poker", None, {"opponent": first_allowed}, False, True),
    Case("pgx/leduc_holdem", None, {"opponent": first_allowed}, False, True),
    Case("navix/Navix-Empty-5x5-v0", 20, {"max_steps": 20}, False, True),
    Case("navix/Navix-Dynamic-Obstacles-5x5-v0", 5, {"max_steps": 5}, True, True),
    Case("xminigrid/MiniGrid-EmptyRandom-5x5", 20, {"max_steps": 20}, False, True),
    Case("jumanji/Snake-v1", 9, {"time_limit": 9}, None, False),
    Case("jumanji/Game2048-v1", None, {}, True, True),
    Case("jumanji/Tetris-v0", 12, {"time_limit": 12}, True, True),
    Case("jumanji/Connector-v3", 10, {"time_limit": 10}, False, False),
    Case("jumanji/RubiksCube-v0", 15, {"time_limit": 15}, False, False),
    Case("craftax/Craftax-Classic-Symbolic-v1", 70, {"max_timesteps": 70}, True, False),
    Case("brax/inverted_pendulum", 12, {"episode_length": 12, "backend": "spring"}, False, True, 1e-4),
    Case("playground/CartpoleBalance", 40, {"episode_length": 40}, False, False, 1e-3),
]
MODULES = {"playground": "mujoco_playground"}


def suite_of(case):
    return case.env_id.partition("/")[0]


def installed(case):
    suite = suite_of(case)
    is_missing = importlib.util.find_spec(MODULES.get(suite, suite)) is None
    reason = f"{suite} is not installed: pip install '.[{suite}]'"
    return pytest.param(case, id=case.env_id, marks=pytest.mark.skipif(is_missing, reason=reason))


every_case = pytest.mark.parametrize("case", [installed(case) for case in CASES])


@functools.cache
def world_of(env_id):
    case = next(case for case in CASES if case.env_id == env_id)
    world = grpo_jax.make(env_id, **case.options)
    if suite_of(case) == "gymnax":
        limit = jnp.asarray(case.limit, jnp.result_type(world.params.max_steps_in_episode))
        world = world.replace(params=world.params.replace(max_steps_in_episode=limit))
    return world


@functools.cache
def programs(env_id):
    world = world_of(env_id)
    return jax.jit(world.reset), jax.jit(world.step), jax.jit(world.action_mask)


def draw_action(rng, world, mask):
    """A random action, among those that are allowed."""
    space = world.action_space
    if isinstance(space, spaces.Box):
        return jnp.asarray(rng.uniform(space.low, space.high), jnp.float32)
    masks = np.split(
        np.ones(sum(space.nvec)) if mask is None else np.asarray(mask, float), np.cumsum(space.nvec)[:-1]
    )
    drawn = [rng.choice(len(part), p=part / part.sum()) for part in masks]
    return jnp.asarray(drawn[0] if isinstance(space, spaces.Discrete) else drawn, jnp.int32)


def assert_equal(ours, native, tolerance, what):
    ours, native = jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), (ours, native))
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=tolerance, atol=tolerance, err_msg=what),
        ours,
        native,
    )


@every_case
def test_steps_are_the_suites_own(case):
    """200 random steps; episodes start over only where the test resets."""
    world = world_of(case.env_id)
    native = globals()[f"native_{suite_of(case)}"](world, case.env_id.partition("/")[2], case.limit)
    reset, step, see_mask = programs(case.env_id)
    rng, keys = np.random.default_rng(0), iter(jax.random.split(jax.random.key(3), 2 * N_STEPS + 2))
    key = as_key(next(keys))
    (observation, state), own = reset(key), native.reset(key)
    assert_equal(observation, native.see(own)[0], case.tolerance, "reset")
    time, counts = 0, {"terminated": 0, "truncated": 0}
    for i in range(N_STEPS):
        mask = see_mask(state)
        own_mask = native.see(own)[4]
        assert (mask is None) == (own_mask is None)
        if mask is not None:
            assert mask.dtype == bool and mask.shape == (sum(world.action_space.nvec),)
            np.testing.assert_array_equal(mask, own_mask)
        action, key = draw_action(rng, world, mask), as_key(next(keys))
        reached, own = step(key, state, action), native.step(key, own, action)
        time, what = time + 1, f"step {i}, {time} after a reset"
        own_observation, own_reward, own_done, own_terminated, _ = native.see(own)
        assert_equal(reached.observation, own_observation, case.tolerance, what)
        assert_equal(reached.reward, own_reward, case.tolerance, what)
        terminated, truncated = bool(reached.terminated), bool(reached.truncated)
        assert (terminated or truncated) == bool(own_done), what
        assert truncated == (time == case.limit) or terminated, what
        if own_terminated is not None:
            assert terminated == bool(own_terminated), what
        elif time != case.limit:
            assert terminated == bool(own_done), what
        counts["terminated"] += terminated
        counts["truncated"] += truncated
        state = reached.state
        if own_done:
            key, time = as_key(next(keys)), 0
            (_, state), own = reset(key), native.reset(key)
    assert (counts["truncated"] > 0) == (case.limit is not None)
    assert (counts["terminated"] > 0) == case.terminates


@every_case
def test_the_protocol(case):
    world = world_of(case.env_id)
    check_world(world)
    key = jax.eval_shape(lambda: as_key(jax.random.key(0)))
    observation, state = jax.eval_shape(world.reset, key)
    action = jax.eval_shape(lambda: draw_action(np.random.default_rng(0), world, None))
    reached = jax.eval_shape(world.step, key, state, action)
    for leaf in jax.tree.leaves((observation, state, reached)):
        assert not leaf.weak_type
    for value, dtype in (
        (reached.reward, jnp.float32),
        (reached.terminated, bool),
        (reached.truncated, bool),
    ):
        assert (value.shape, value.dtype) == ((), dtype)
    encoded = jax.eval_shape(lambda x: spaces.encode(world.observation_space, x), observation)
    assert all(jnp.issubdtype(leaf.dtype, jnp.floating) for leaf in jax.tree.leaves(encoded))
    assert isinstance(hash((world.observation_space, world.action_space)), int)
    assert jax.tree.structure(world_of(case.env_id)) == jax.tree.structure(
        grpo_jax.make(case.env_id, **case.options)
    ), "worlds of one id must share their traces"


@every_case
def test_a_key_is_all_that_a_step_draws_from(case):
    """Equal keys, equal steps; other keys, other steps, where the world draws random numbers at all."""
    world = world_of(case.env_id)
    reset, step, see_mask = programs(case.env_id)
    _, first = reset(as_key(jax.random.key(1)))
    all_keys = [as_key(key) for key in jax.random.split(jax.random.key(2), 60)]

    def future(keys):
        """What is observed and earned in some steps: randomness may show late."""
        state, rng, seen = first, np.random.default_rng(1), []
        for key in keys:
            reached = step(key, state, draw_action(rng, world, see_mask(state)))
            seen += [*map(np.ravel, jax.tree.leaves(reached.observation)), np.ravel(reached.reward)]
            state = reached.state
            if reached.terminated:  # Tetris then allows nothing
                break
        return np.concatenate(seen)

    one, again, other = future(all_keys[:30]), future(all_keys[:30]), future(all_keys[30:])
    np.testing.assert_array_equal(one, again)
    if case.is_random is not None:
        assert np.array_equal(one, other) != case.is_random


@every_case
def test_it_trains(case, tmp_path):
    world = world_of(case.env_id)
    config = grpo_jax.GRPOConfig(
        n_envs=4, n_steps=8, batch_size=16, n_epochs=1, horizon=2, bootstrap=True, group_size=4, network="mlp"
    )
    result = grpo_jax.train(config, world, jax.random.key(0), total_timesteps=2 * config.n_states)
    leaves = jax.tree.leaves(result.state.learner.policy)
    assert leaves and all(np.isfinite(np.asarray(leaf)).all() for leaf in leaves)
    assert not np.asarray(result.metrics["nonfinite_updates"]).any()
    assert np.all(np.asarray(result.metrics["entropy"]) != 0)
    # A run can be gone on from: its states hold keys, and whatever a suite puts into them.
    grpo_jax.save(tmp_path / "state", result.state)
    back = grpo_jax.restore(tmp_path / "state", config, world)
    for left, right in zip(jax.tree.leaves(result.state), jax.tree.leaves(back), strict=True):
        np.testing.assert_array_equal(*map(plain, (left, right)))


def plain(leaf):
    return jax.random.key_data(leaf) if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key) else leaf
