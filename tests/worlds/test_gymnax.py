from __future__ import annotations

import functools
import subprocess
import sys

import gymnax
import gymnax.wrappers
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from grpo_jax import GymnaxWorld, env_ids, group_returns, make, spaces
from grpo_jax.noise import as_key, bits_to_keys, split
from grpo_jax.worlds.base import RewardOverrideState

N_STATES, HORIZON, GAMMA, TIME_LIMIT = 3, 24, 0.9, 15


@functools.cache
def limited(env_id: str) -> GymnaxWorld:
    """A world whose episodes all end within the horizon of these tests, by a time limit if not by themselves."""
    world = make(env_id)
    limit = jnp.asarray(TIME_LIMIT, jnp.result_type(world.params.max_steps_in_episode))
    return world.replace(params=world.params.replace(max_steps_in_episode=limit))


@functools.cache
def compiled_reset(env_id: str):
    return jax.jit(jax.vmap(limited(env_id).reset))


@functools.cache
def compiled_step(env_id: str):
    """gymnax's own ``step_env`` and ``is_truncated``, without anything of ours around them."""
    world = limited(env_id)

    def step(key, state, action):
        observation, state, reward, terminated, _ = world.env.step_env(key, state, action, world.params)
        return observation, state, reward, terminated, world.env.is_truncated(state, world.params)

    return jax.jit(step)


@functools.cache
def start_states(env_id: str):
    """Observations and states ``[N_STATES]`` after a reset."""
    return compiled_reset(env_id)(split(as_key(jax.random.key(5)), N_STATES))


def random_action(space, uniforms):
    """An action out of uniform numbers; ``[..., n] -> [..., *A]``, for JAX and for NumPy."""
    if isinstance(space, spaces.Discrete):
        return (uniforms[..., 0] * space.n).astype(np.int32)
    return (space.low + uniforms * (space.high - space.low)).astype(np.float32)


def candidates_of(space):
    """Up to three different candidates; ``[G, *A]``."""
    if isinstance(space, spaces.Discrete):
        return np.arange(min(space.n, 3), dtype=np.int32)
    return np.stack([space.low, space.high, 0.25 * space.high])


def at(tree, index):
    return jax.tree.map(lambda leaf: leaf[index], tree)


def random_numbers(key, horizon, n_uniforms):
    """The keys ``[H]`` and uniforms ``[H, n]`` of each state's branches, drawn by ``jax.random`` alone."""

    def draw(words, width):
        plain = jax.random.wrap_key_data(words)
        return np.asarray(jax.random.bits(plain, (1, 1, horizon, width), jnp.uint32))[0, 0]

    plain = jax.random.wrap_key_data(jax.random.key_data(key))
    for words in jax.random.bits(plain, (N_STATES * 2, 2), jnp.uint32).reshape(N_STATES, 2, 2):
        uniforms = (draw(words[1], n_uniforms) >> 9) * np.float32(2.0**-23) + np.float32(2.0**-24)
        yield bits_to_keys(jnp.asarray(draw(words[0], 2))), uniforms.astype(np.float32)


@functools.cache
def decision_states(env_id: str):
    """States of different age, so that their branches end at different times: after 0, 4, ... steps, or less."""
    step, space = compiled_step(env_id), limited(env_id).action_space
    rng, states = np.random.default_rng(0), []
    for i in range(N_STATES):
        state = at(start_states(env_id)[1], i)
        for k in range(4 * i):
            action = random_action(space, rng.random(space.shape or (1,), np.float32))
            _, reached, _, terminated, truncated = step(
                bits_to_keys(jnp.array([i, k], jnp.uint32)), state, action
            )
            if terminated or truncated:
                break
            state = reached
        states.append(state)
    return jax.tree.map(lambda *leaves: jnp.stack(leaves), *states)


def replay(env_id, state, action, keys, uniforms):
    """One branch in plain Python: what every step pays (behind the end, too), its length, and how it ended."""
    step, space = compiled_step(env_id), limited(env_id).action_space
    rewards, length, terminated_there = [], None, False
    for k in range(HORIZON):
        _, state, reward, terminated, truncated = step(keys[k], state, action)
        rewards.append(float(reward))
        if length is None and (terminated or truncated):
            length, terminated_there = k + 1, bool(terminated)
        action = random_action(space, uniforms[k])
    assert length is not None, "the horizon must reach behind the end, or this test shows nothing"
    return rewards, length, terminated_there


# In these worlds something is paid behind the end while other branches still run: forgetting the mask would show.
PAY_BEHIND_THE_END = {
    "Pendulum-v1",
    "Acrobot-v1",
    "MountainCar-v0",
    "MountainCarContinuous-v0",
    "Breakout-MinAtar",
    "SpaceInvaders-MinAtar",
    "DeepSea-bsuite",
    "MemoryChain-bsuite",
    "UmbrellaChain-bsuite",
    "BernoulliBandit-misc",
    "GaussianBandit-misc",
    "Reacher-misc",
    "Swimmer-misc",
    "Pong-misc",
    "FrozenLake-misc",
}
# In these some branch ends by itself before the time limit.
TERMINATE = {
    "CartPole-v1",
    "Breakout-MinAtar",
    "Seaquest-MinAtar",
    "Catch-bsuite",
    "DeepSea-bsuite",
    "MemoryChain-bsuite",
    "UmbrellaChain-bsuite",
    "SimpleBandit-bsuite",
    "FrozenLake-misc",
}


@pytest.mark.parametrize("env_id", env_ids())
def test_no_reward_after_the_end(env_id):
    world = limited(env_id)
    space = world.action_space
    n_uniforms = 1 if isinstance(space, spaces.Discrete) else space.shape[0]
    states = decision_states(env_id)
    candidates = candidates_of(space)
    actions = jnp.broadcast_to(candidates, (N_STATES, *candidates.shape))
    key = as_key(jax.random.key(11))

    @jax.jit
    def branch(key, states, actions):
        return group_returns(
            world,
            lambda observation, mask, uniforms: random_action(space, uniforms),
            key,
            states,
            actions,
            horizon=HORIZON,
            gamma=GAMMA,
            n_uniforms=n_uniforms,
        )

    branches = branch(key, states, actions)
    replays = [
        replay(env_id, at(states, i), candidate, keys, uniforms)
        for i, (keys, uniforms) in enumerate(random_numbers(key, HORIZON, n_uniforms))
        for candidate in candidates
    ]
    rewards, lengths, terminated = map(np.array, zip(*replays, strict=True))
    discounted = rewards * GAMMA ** np.arange(HORIZON)
    expected = [row[:length].sum() for row, length in zip(discounted, lengths, strict=True)]
    np.testing.assert_allclose(branches.returns.ravel(), expected, rtol=1e-4, atol=1e-4)
    assert int(branches.simulator_steps.low) == lengths.sum()

    # The branches run side by side until the last one ends: what would the others earn in the meantime?
    overrun = discounted[:, : lengths.max()].sum(1) - expected
    if env_id in PAY_BEHIND_THE_END:
        assert np.abs(overrun).max() > 0.001
    assert terminated.any() == (env_id in TERMINATE)


@pytest.mark.parametrize(
    "env_id", ["CartPole-v1", "Pendulum-v1", "MountainCarContinuous-v0", "Breakout-MinAtar", "FourRooms-misc"]
)
def test_each_candidate_reaches_a_next_state_of_its_own(env_id):
    """The first GRPO for SB3 judged all candidates by one and the same next state."""
    base = limited(env_id)
    shape = base.observation_space.shape
    weights = np.random.default_rng(0).normal(size=shape).astype(np.float32)
    world = make(base, reward_function=lambda state, action, next_state: jnp.sum(weights * next_state))
    observations, states = start_states(env_id)
    candidates = candidates_of(base.action_space)
    actions = jnp.broadcast_to(candidates, (N_STATES, *candidates.shape))
    key = as_key(jax.random.key(3))
    returns = jax.jit(
        lambda key, states, actions: (
            group_returns(world, lambda *_: actions, key, states, actions, horizon=1, gamma=GAMMA).returns
        )
    )(key, RewardOverrideState(states, observations), actions)
    expected = [
        [np.sum(weights * compiled_step(env_id)(keys[0], at(states, i), action)[0]) for action in candidates]
        for i, (keys, _) in enumerate(random_numbers(key, 1, 1))
    ]
    np.testing.assert_allclose(returns, expected, rtol=1e-4, atol=1e-5)
    assert np.all(np.ptp(returns, axis=1) > 0)


@pytest.mark.parametrize("env_id", env_ids())
def test_the_protocol(env_id):
    world = limited(env_id)
    observation, state = start_states(env_id)
    assert observation.shape == (N_STATES, *world.observation_space.shape)
    encoded = jax.eval_shape(lambda x: spaces.encode(world.observation_space, x), observation)
    assert jnp.issubdtype(encoded.dtype, jnp.floating)
    assert world.action_mask(at(state, 0)) is None
    assert isinstance(hash((world.observation_space, world.action_space)), int)

    key = jax.eval_shape(lambda: as_key(jax.random.key(0)))
    first_observation, first_state = jax.eval_shape(world.reset, key)
    action = jax.eval_shape(lambda: jnp.asarray(candidates_of(world.action_space)[0]))
    step = jax.eval_shape(world.step, key, first_state, action)
    for reset_tree, step_tree in ((first_state, step.state), (first_observation, step.observation)):
        assert jax.tree.structure(reset_tree) == jax.tree.structure(step_tree)
        for before, after in zip(jax.tree.leaves(reset_tree), jax.tree.leaves(step_tree), strict=True):
            assert not before.weak_type
            assert not after.weak_type
            assert (before.shape, before.dtype) == (after.shape, after.dtype)
    for value, dtype in ((step.reward, jnp.float32), (step.terminated, bool), (step.truncated, bool)):
        assert (value.shape, value.dtype) == ((), dtype)
    assert not any(leaf.weak_type for leaf in jax.tree.leaves(jax.eval_shape(lambda: world.params)))


def test_the_env_ids_are_those_of_gymnax_without_the_download():
    assert set(env_ids()) == set(gymnax.registered_envs) - {"MNISTBandit-bsuite"}
    assert len(env_ids()) == 25


@pytest.mark.parametrize(
    ("env_id", "hint"),
    [
        ("CartPole-v0", "did you mean CartPole-v1"),
        ("cartpole", "CartPole-v1"),
        ("Breakout", "did you mean Breakout-MinAtar"),
        ("Zzz", "known ids: CartPole-v1, Pendulum-v1"),
        ("MNISTBandit-bsuite", "downloads a data set"),
    ],
)
def test_an_id_that_cannot_be_used_is_answered_with_one_that_can(env_id, hint):
    with pytest.raises(ValueError, match=hint) as error:
        make(env_id)
    assert repr(env_id) in str(error.value)


@pytest.mark.parametrize("name", gymnax.wrappers.__all__)
def test_wrappers_are_refused(name):
    env, params = gymnax.make("CartPole-v1")
    arguments = {"GymnaxToGymWrapper": (params,), "GymnaxToVectorGymWrapper": (2, params)}.get(name, ())
    wrapped = getattr(gymnax.wrappers, name)(env, *arguments)
    with pytest.raises(TypeError, match="bare Environment"):
        make(wrapped)


@pytest.mark.parametrize("wrong", [3, None, object()], ids=["number", "None", "object"])
def test_other_things_are_refused(wrong):
    with pytest.raises(TypeError, match="is not a gymnax Environment"):
        make(wrong)


def test_a_bare_environment_and_a_world_are_taken():
    env, params = gymnax.make("Pendulum-v1")
    world = make(env, params.replace(g=3.0))
    assert world.env is env
    assert float(world.params.g) == 3.0
    assert make(world) is world
    with pytest.raises(ValueError, match="params= is for gymnax"):
        make(world, params)


def test_worlds_of_one_id_share_their_traces():
    traces = []

    @jax.jit
    def reset(world, key):
        traces.append(1)
        return world.reset(key)

    for gravity in (9.8, 3.0):
        params = gymnax.make("CartPole-v1")[1].replace(gravity=gravity)
        reset(make("CartPole-v1", params), as_key(jax.random.key(0)))
    assert len(traces) == 1


def test_physics_can_be_vmapped_over(key):
    world = make("CartPole-v1")
    _, state = world.reset(key)

    def angular_velocity(length, gravity):
        params = world.params.replace(length=length, gravity=gravity)
        # Twice: the first velocity changes by the force alone if the pole stands upright.
        return world.replace(params=params).step(key, state, jnp.int32(1)).observation[3]

    lengths, gravities = jnp.array([0.5, 1.0, 0.5]), jnp.array([9.8, 9.8, 1.6])
    together = jax.jit(jax.vmap(angular_velocity))(lengths, gravities)
    apart = [angular_velocity(*pair) for pair in zip(lengths, gravities, strict=True)]
    np.testing.assert_allclose(together, apart, rtol=1e-5)
    assert len(np.unique(together)) == 3


@pytest.mark.parametrize("env_id", ["Pendulum-v1", "MountainCar-v0", "GaussianBandit-misc"])
def test_the_time_limit_is_a_truncation(env_id, key):
    world = make(env_id)
    limit = world.params.max_steps_in_episode
    _, state = world.reset(key)
    action = jnp.asarray(candidates_of(world.action_space)[0])
    step = jax.jit(world.step)
    for time, truncated in ((limit - 2, False), (limit - 1, True)):
        late = state.replace(time=jnp.asarray(time, state.time.dtype))
        reached = step(key, late, action)
        assert bool(reached.truncated) is truncated
        assert not bool(reached.terminated)


def test_a_fall_is_a_termination(key):
    world = limited("CartPole-v1")
    _, state = world.reset(key)
    reached = world.step(key, state.replace(theta=jnp.float32(0.3)), jnp.int32(0))
    assert bool(reached.terminated)
    assert not bool(reached.truncated)


def test_a_step_never_resets(key):
    world = make("CartPole-v1")
    _, state = world.reset(key)
    reached = world.step(key, state.replace(x=jnp.float32(3.0)), jnp.int32(0))
    assert bool(reached.terminated)
    assert abs(float(reached.observation[0])) > 2.4
    assert float(reached.state.x) == float(reached.observation[0])


def test_gymnax_is_imported_without_what_only_pictures_need(tmp_path):
    program = (
        "import sys, grpo_jax; grpo_jax.make('Pong-misc');"
        "drawn = {'matplotlib.pyplot', 'seaborn', 'pandas', 'scipy.stats', 'torch', 'stable_baselines3'};"
        "assert not drawn & set(sys.modules);"
        "from gymnax.environments.misc import pong; assert callable(pong.sns.heatmap); assert callable(pong.plt.figure);"
        "import seaborn; assert callable(seaborn.heatmap); assert 'pandas' in sys.modules;"
        "import matplotlib.pyplot; assert matplotlib.pyplot.figure is pong.plt.figure"
    )
    done = subprocess.run([sys.executable, "-c", program], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
