"""Branches in worlds of chance: random numbers, chunks, several rollouts, actions that persist, one trace."""

import functools
import types

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tabular
from flax import struct

import grpo_jax
from grpo_jax import counter
from grpo_jax.groups.branch import chunk_size, default_branches, group_returns
from grpo_jax.spaces import Discrete
from grpo_jax.types import Step
from grpo_jax.worlds.base import World

RANDOM = tabular.random_mdp(3, n_layers=4, width=2, n_actions=3)
GAMMA = 0.9


def stochastic_world():
    return tabular.sampled_world(RANDOM.transition, RANDOM.reward)


def random_policy(observation, mask, uniforms):
    return jnp.minimum((uniforms[..., 0] * 3).astype(jnp.int32), 2)


@functools.partial(
    jax.jit,
    static_argnames=("horizon", "n_rollouts", "backup", "common_random_numbers", "max_branches", "bootstrap"),
)
def sampled(key, positions, actions, alive=None, bootstrap=False, **settings):
    return group_returns(
        stochastic_world(),
        random_policy,
        key,
        tabular.states_at(positions),
        actions,
        gamma=GAMMA,
        alive=alive,
        value=(lambda observation: jnp.sin(observation.astype(jnp.result_type(float))))
        if bootstrap
        else None,
        **settings,
    )


POSITIONS = np.array([0, 1, 2, 3, 1, 0, 2])
ACTIONS = np.broadcast_to(np.arange(3), (7, 3))


@pytest.mark.parametrize("horizon", [1, 5])
def test_chunking_changes_no_bit(horizon):
    run = functools.partial(
        sampled, jax.random.key(1), POSITIONS, ACTIONS, horizon=horizon, n_rollouts=2, bootstrap=True
    )
    whole = run(max_branches=7 * 6)
    for max_branches in (1, 18):  # 7 chunks of 1; 3 chunks of 3, which does not divide 7
        assert chunk_size(7, 6, max_branches) < 7
        chunked = run(max_branches=max_branches)
        np.testing.assert_array_equal(chunked.returns, whole.returns)
        assert counter.to_int(chunked.simulator_steps) == counter.to_int(whole.simulator_steps)


def test_chunks_are_even():
    assert chunk_size(7, 6, 24) == 4  # 4 + 3, one row of padding
    assert chunk_size(9, 1, 8) == 5  # not 8 + 1
    assert chunk_size(512, 2, 1024) == 512
    assert chunk_size(4, 100, 10) == 1  # a state is never split


@struct.dataclass
class _Still(World):
    observation_space = Discrete(1)

    def reset(self, key):
        return jnp.int32(0), jnp.int32(0)

    def step(self, key, state, action):
        return Step(state, state, jnp.float32(0), jnp.bool_(False), jnp.bool_(False))


@pytest.mark.usefixtures("as_on_a_cpu")
def test_large_states_run_in_smaller_chunks():
    """2 MiB of states and observations on a CPU, at most 4096."""
    world = _Still()  # whose observation is one number
    for state_bytes, branches in ((32, 4096), (4092, 512), (11_996, 174), (1 << 30, 1)):
        assert (
            default_branches(world, {"a": np.zeros(state_bytes - 4, np.uint8), "b": np.float32(0)})
            == branches
        )


@pytest.mark.parametrize(
    ("stats", "limit"),
    [
        (None, 4 << 30),
        ({}, 4 << 30),
        ({"bytes_limit": 80 << 30}, 4 << 30),
        ({"bytes_limit": 8 << 30}, 1 << 29),
    ],
)
def test_chunks_of_a_device_take_a_sixteenth_of_its_memory(stats, limit, monkeypatch):
    device = types.SimpleNamespace(memory_stats=lambda: stats)
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    monkeypatch.setattr(jax, "local_devices", lambda: [device])
    small, large = (np.zeros(n - 4, np.uint8) for n in (32, 1 << 20))  # the observation is one number
    assert default_branches(_Still(), small) == 1 << 20
    assert default_branches(_Still(), large) == limit >> 20


def states_and_networks(world, config, n_states):
    """First states, and a fresh actor and critic as ``group_returns`` takes them."""
    policy = grpo_jax.make_policy(config, world.observation_space, world.action_space)
    state = jax.jit(policy.init)(jax.random.key(0))
    _, states = jax.jit(jax.vmap(world.reset))(jax.random.split(jax.random.key(1), n_states))

    def act(observation, mask, uniforms):
        return policy.distribution.sample(policy.parameters(state, observation, mask), uniforms)

    return states, act, lambda observation: policy.value(state, observation)


def test_chunking_a_network_changes_no_bit():
    """The same with a real environment and a network, whose matrix products see other batch sizes."""
    world = grpo_jax.make("CartPole-v1")
    states, act, _ = states_and_networks(world, grpo_jax.GRPOConfig(), 13)

    def run(max_branches):
        actions = jnp.broadcast_to(jnp.arange(2), (13, 2))
        return jax.jit(
            lambda: (
                group_returns(
                    world,
                    act,
                    jax.random.key(2),
                    states,
                    actions,
                    horizon=40,
                    gamma=0.99,
                    max_branches=max_branches,
                ).returns
            )
        )()

    np.testing.assert_array_equal(run(10), run(26))


@pytest.mark.parametrize(
    ("env_id", "constrained", "horizon"),
    [("Breakout-MinAtar", True, 1), ("Breakout-MinAtar", True, 3), ("CartPole-v1", False, 3)],
)
def test_maps_lie_in_rows_where_a_network_reads_them(env_id, constrained, horizon):
    world = grpo_jax.make(env_id)
    states, act, value = states_and_networks(world, grpo_jax.GRPOConfig(bootstrap=True, network="mlp"), 5)

    def run(key):
        return group_returns(
            world,
            act,
            key,
            states,
            jnp.broadcast_to(jnp.arange(2), (5, 2)),
            horizon=horizon,
            gamma=0.9,
            value=value,
        ).returns

    keys = jax.random.split(jax.random.key(2), 2)
    returns = jax.jit(run)(keys[0])
    assert np.ptp(returns) > 0
    np.testing.assert_allclose(returns, jax.jit(jax.vmap(run))(keys)[0], rtol=1e-5)
    program = jax.jit(run).lower(keys[0]).as_text()
    assert ("LayoutConstraint" in program) == (constrained and jax.default_backend() == "cpu")


def test_dead_states_cost_and_count_nothing():
    alive = np.array([True, False, True, True, False, False, True])
    run = functools.partial(sampled, jax.random.key(1), POSITIONS, ACTIONS, horizon=4, bootstrap=True)
    everyone = run(alive=np.ones(7, bool))
    for max_branches in (0, 9):
        some = run(alive=alive, max_branches=max_branches)
        np.testing.assert_array_equal(some.returns[alive], everyone.returns[alive])
        np.testing.assert_array_equal(some.returns[~alive], 0.0)
    one_by_one = [counter.to_int(run(alive=np.arange(7) == i).simulator_steps) for i in range(7)]
    assert counter.to_int(some.simulator_steps) == sum(np.array(one_by_one)[alive])
    assert counter.to_int(everyone.simulator_steps) == sum(one_by_one)
    assert min(one_by_one) >= 3


def test_rollouts_are_backed_up():
    """The mean and the maximum are of the same M branches, and M branches are different ones."""
    run = functools.partial(sampled, jax.random.key(4), POSITIONS[:2], ACTIONS[:2], horizon=5)
    mean, most = run(n_rollouts=2).returns, run(n_rollouts=2, backup="max").returns
    least = 2 * mean - most
    assert np.all(most >= least - 1e-6) and np.any(most > least + 0.1)
    many = run(n_rollouts=20_000).returns
    pi = np.full((RANDOM.n_states, 3), 1 / 3)
    np.testing.assert_allclose(many, tabular.action_values(RANDOM, pi, GAMMA)[:2], atol=0.05)
    highest = sampled(
        jax.random.key(4), np.array([4, 5]), ACTIONS[:2], horizon=5, n_rollouts=20_000, backup="max"
    ).returns
    np.testing.assert_allclose(highest, _best_path(RANDOM, GAMMA)[4:6], rtol=1e-5)  # every path was drawn


def _best_path(mdp, gamma):
    """The best return that any luck can bring, ``[S, A]``."""
    best = mdp.reward.copy()
    for _ in range(mdp.n_layers):
        # Terminating (worth 0) is possible everywhere.
        ahead = np.maximum(0.0, np.max(np.where(mdp.transition > 0, best.max(1), -np.inf), axis=-1))
        best = mdp.reward + gamma * ahead
    return best


@pytest.mark.parametrize("persistence", [0.0, 0.7, 1.0])
def test_actions_persist(persistence):
    """Q(s, a) = r + gamma E[p Q(s', a) + (1 - p) mean_b Q(s', b)], by dynamic programming."""
    q = RANDOM.reward.copy()
    for _ in range(RANDOM.n_layers):
        ahead = persistence * q + (1.0 - persistence) * q.mean(1, keepdims=True)  # [S, last action]
        q = RANDOM.reward + GAMMA * np.einsum("sat,ta->sa", RANDOM.transition, ahead)
    returns = sampled(
        jax.random.key(4),
        POSITIONS[:2],
        ACTIONS[:2],
        horizon=5,
        n_rollouts=20_000,
        persistence=jnp.float32(persistence),
    ).returns
    np.testing.assert_allclose(returns, q[:2], atol=0.05)


def test_identical_candidates_share_their_fate():
    same = np.ones((7, 3), np.int32)
    run = functools.partial(sampled, jax.random.key(5), np.zeros(7, np.int32), same, horizon=5)
    common = np.asarray(run().returns)
    np.testing.assert_array_equal(common, np.broadcast_to(common[:, :1], common.shape))
    assert len(np.unique(common[:, 0])) > 1  # states have their own randomness, though
    own = np.asarray(run(common_random_numbers=False).returns)
    assert np.all(own.std(axis=1) > 0.0)


def test_common_random_numbers_cut_the_variance():
    """Differences between two actions of Asterix: in 16 states, over 32 draws of the future."""
    world = grpo_jax.make("Asterix-MinAtar")
    n_actions, n_states, n_draws = world.action_space.n, 16, 32
    keys = jax.random.split(jax.random.key(0), n_states)
    _, states = jax.jit(jax.vmap(world.reset))(keys)
    step = jax.jit(jax.vmap(world.step))
    for i in range(12):  # enemies and gold have entered by then
        keys = jax.random.split(jax.random.key(i), n_states)
        states = step(keys, states, jnp.full(n_states, i % n_actions)).state
    states = jax.tree.map(lambda leaf: jnp.repeat(leaf, n_draws, axis=0), states)

    def act(observation, mask, uniforms):
        return (uniforms[..., 0] * n_actions).astype(jnp.int32)

    def variance(common_random_numbers):
        actions = jnp.broadcast_to(jnp.arange(n_actions), (n_states * n_draws, n_actions))
        returns = jax.jit(
            lambda: (
                group_returns(
                    world,
                    act,
                    jax.random.key(7),
                    states,
                    actions,
                    horizon=32,
                    gamma=0.99,
                    common_random_numbers=common_random_numbers,
                ).returns
            )
        )()
        first, second = np.triu_indices(n_actions, 1)
        differences = np.asarray(returns)[:, first] - np.asarray(returns)[:, second]
        return differences.reshape(n_states, n_draws, -1).var(axis=1).mean()

    with_common, without = variance(True), variance(False)
    print(
        f"Asterix-MinAtar, var(R_i - R_j): {with_common:.4f} with common random numbers, {without:.4f} without"
    )
    assert with_common < 0.8 * without


def test_vmap_over_keys_is_a_loop_over_keys():
    run = functools.partial(
        sampled, positions=POSITIONS, actions=ACTIONS, horizon=5, max_branches=9, bootstrap=True
    )
    keys = jax.random.split(jax.random.key(6), 4)
    mapped = jax.vmap(run)(keys)
    for i in range(4):
        alone = run(keys[i])
        np.testing.assert_array_equal(mapped.returns[i], alone.returns)
        one = jax.tree.map(lambda leaf, i=i: leaf[i], mapped.simulator_steps)
        assert counter.to_int(one) == counter.to_int(alone.simulator_steps)
    assert len(np.unique(mapped.returns[:, 0, 0])) > 1


def test_same_key_same_bits_other_key_other_bits():
    run = functools.partial(sampled, positions=POSITIONS, actions=ACTIONS, horizon=5)
    first, second = run(jax.random.key(7)), run(jax.random.key(7))
    np.testing.assert_array_equal(first.returns, second.returns)
    assert np.any(np.asarray(run(jax.random.key(8)).returns) != first.returns)


def test_one_trace_for_a_shape():
    chex.clear_trace_counter()

    @jax.jit
    @chex.assert_max_traces(n=1)
    def run(key, states, actions, gamma):
        return group_returns(stochastic_world(), random_policy, key, states, actions, horizon=3, gamma=gamma)

    for i in range(3):
        states, actions = tabular.states_at(POSITIONS + i, time=i), jnp.asarray(ACTIONS)
        run(jax.random.key(i), states, actions, 0.9 + 0.01 * i)
    with pytest.raises(AssertionError, match="traced > 1 times"):
        run(jax.random.key(0), tabular.states_at(POSITIONS[:3]), jnp.asarray(ACTIONS[:3]), 0.9)


@pytest.mark.parametrize("settings", [{"horizon": 0}, {"horizon": -3}, {"horizon": 2, "n_rollouts": 0}])
def test_refuses_what_cannot_be(settings):
    with pytest.raises(ValueError, match="must be at least 1"):
        sampled(jax.random.key(0), POSITIONS, ACTIONS, **settings)
