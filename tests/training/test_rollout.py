import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import struct
from toys import MaskedLine

import grpo_jax
from grpo_jax.noise import as_key, split
from grpo_jax.spaces import Box, Discrete
from grpo_jax.training import rollout as rollouts
from grpo_jax.training.rollout import rollout, start, step_environments
from grpo_jax.types import Step
from grpo_jax.worlds.base import World


@functools.partial(jax.jit, static_argnames=("n_steps", "n_envs", "keep"))
def roll(env, n_steps, n_envs=2, keep=True, persistence=None):
    config = grpo_jax.GRPOConfig(n_envs=n_envs, batch_size=n_envs)
    policy = grpo_jax.make_policy(config, env.observation_space, env.action_space)
    key = as_key(jax.random.key(0))
    environments = start(env, split(key, n_envs))
    return rollout(env, policy, policy.init(key), environments, key, n_steps, keep, persistence)


def test_episodes_start_over_and_are_counted():
    environments, trajectory = roll(MaskedLine(Discrete(2), goal=3), 7)
    # Positions of the decision states: three steps to the goal, then from the start again.
    np.testing.assert_array_equal(trajectory.observation[:, 0, 0], [0, 1, 2, 0, 1, 2, 0])
    np.testing.assert_array_equal(trajectory.next_observation[:, 0, 0], [1, 2, 3, 1, 2, 3, 1])
    np.testing.assert_array_equal(trajectory.terminated[:, 0], [0, 0, 1, 0, 0, 1, 0])
    np.testing.assert_array_equal(trajectory.truncated, False)
    np.testing.assert_array_equal(environments.last_return, 1 + 2 + 3)
    np.testing.assert_array_equal(environments.last_length, 3)
    np.testing.assert_array_equal(environments.episode_return, 1)
    np.testing.assert_array_equal(environments.episode_length, 1)


def test_a_time_limit_truncates_and_does_not_terminate():
    _, trajectory = roll(MaskedLine(Discrete(2), goal=100, limit=2), 4)
    np.testing.assert_array_equal(trajectory.truncated[:, 0], [0, 1, 0, 1])
    np.testing.assert_array_equal(trajectory.terminated, False)


def test_statistics_are_unknown_before_the_first_end():
    environments, trajectory = roll(MaskedLine(Discrete(2), goal=9), 4, keep=False)
    np.testing.assert_array_equal(environments.last_return, 0.0)
    np.testing.assert_array_equal(environments.last_length, 0.0)  # 0 says that none has finished
    assert trajectory.next_observation is None


def test_states_are_the_decision_states_of_the_environment():
    env = grpo_jax.make("CartPole-v1")
    _, trajectory = roll(env, 20)
    state = np.stack([trajectory.state.x, trajectory.state.x_dot, trajectory.state.theta], axis=-1)
    np.testing.assert_array_equal(state, trajectory.observation[..., :3])
    ended = np.asarray(trajectory.terminated | trajectory.truncated)
    goes_on = ~ended[:-1]
    np.testing.assert_array_equal(
        np.asarray(trajectory.next_observation)[:-1][goes_on], np.asarray(trajectory.observation)[1:][goes_on]
    )


@pytest.mark.parametrize("env_id", ["CartPole-v1", "Pendulum-v1"])
def test_actions_persist_until_the_episode_ends(env_id):
    _, trajectory = roll(grpo_jax.make(env_id), 400, n_envs=4, persistence=1.0)
    action = np.asarray(trajectory.action).reshape(400, 4)
    same = action[1:] == action[:-1]
    ended = np.asarray(trajectory.ended)[:-1]
    assert same[~ended].all()
    assert ended.any() and not same[ended].all()  # the policy is asked again


def test_persistence_is_a_probability():
    _, trajectory = roll(grpo_jax.make("Pendulum-v1"), 150, n_envs=64, persistence=0.7)
    action = np.asarray(trajectory.action).reshape(150, 64)
    share = (action[1:] == action[:-1]).mean()  # a Gaussian never repeats itself by chance
    assert abs(share - 0.7) < 4 * np.sqrt(0.7 * 0.3 / (149 * 64))
    _, trajectory = roll(grpo_jax.make("Pendulum-v1"), 50, persistence=0.0)
    action = np.asarray(trajectory.action)
    assert (action[1:] != action[:-1]).all()


@struct.dataclass
class Ender(World):
    """Ends where the action says so; a first state is drawn from its key, which it keeps. Counts its resets."""

    resets: list = struct.field(pytree_node=False, default_factory=list)
    observation_space = Box(np.zeros(2), np.ones(2), (2,))
    action_space = Discrete(3)

    def reset(self, key):
        jax.debug.callback(lambda _: self.resets.append(1), key_words := jax.random.key_data(key))
        drawn = jax.random.uniform(key, (2,))
        return drawn, {"drawn": drawn, "key": key, "nothing": jnp.zeros((0, 3)), "words": key_words}

    def step(self, key, state, action):
        drawn = jax.random.uniform(key, (2,))
        return Step(drawn, state | {"drawn": drawn}, drawn[0], action == 1, action == 2)

    def __hash__(self):
        return id(self)


def numbers(tree):
    return jax.tree.map(
        lambda leaf: jax.random.key_data(leaf) if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key) else leaf,
        tree,
    )


ENDS = {
    "none": lambda n: np.zeros(n, int),
    "all at once": lambda n: np.full(n, 2),
    "the last": lambda n: np.eye(n, dtype=int)[-1],
    "some": lambda n: np.arange(n) * 7 % 5 % 3,
}


@pytest.mark.usefixtures("as_on_a_cpu")
@pytest.mark.parametrize("ends", ENDS)
@pytest.mark.parametrize(("n_envs", "n_at_once"), [(1, 1), (6, 4), (9, 2), (8, 8)])
def test_where_an_episode_ends_the_first_state_of_its_own_key_follows(
    ends, n_envs, n_at_once, compiled, monkeypatch
):
    world, actions = Ender(), ENDS[ends](n_envs)
    _, first = jax.eval_shape(world.reset, as_key(jax.random.key(0)))
    n_bytes = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(first)) + 8
    monkeypatch.setattr(rollouts, "CPU_RESETS", rollouts.ResetLimits(n_at_once * n_bytes, 0, 1 / 64))
    keys = split(as_key(jax.random.key(0)), 3 * n_envs).reshape(3, n_envs)
    before = start(world, keys[0])
    chex.assert_trees_all_equal(numbers(before.state), numbers(jax.vmap(world.reset)(keys[0])[1]))
    jax.effects_barrier()
    world.resets.clear()
    after, step = compiled(functools.partial(step_environments, world))(before, actions, *keys[1:])
    jax.effects_barrier()
    n_ended = np.count_nonzero(actions)
    assert len(world.resets) == -(-n_ended // min(n_at_once, 4)) * min(n_at_once, 4)
    for i, ended in enumerate(actions > 0):
        reached = (step.observation[i], jax.tree.map(lambda leaf, i=i: leaf[i], step.state))
        expected = world.reset(keys[2, i]) if ended else reached
        got = jax.tree.map(lambda leaf, i=i: leaf[i], (after.observation, after.state))
        chex.assert_trees_all_equal(numbers(got), numbers(expected))
    np.testing.assert_array_equal(after.episode_length, actions == 0)


@pytest.mark.usefixtures("as_on_a_cpu")
def test_cheap_resets_seeds_side_by_side_and_one_by_one_come_to_the_same(monkeypatch):
    world, n_envs = Ender(), 6
    actions = np.stack([ENDS[ends](n_envs) for ends in ENDS])
    keys = split(as_key(jax.random.key(1)), 3 * actions.size).reshape(3, *actions.shape)

    def all_steps():
        before = jax.vmap(functools.partial(start, world))(keys[0])
        after, _ = jax.vmap(functools.partial(step_environments, world))(before, actions, *keys[1:])
        return numbers(after)

    cheap = jax.jit(all_steps)()
    monkeypatch.setattr(rollouts, "CPU_RESETS", rollouts.CPU_RESETS._replace(cheap=0))
    chex.assert_trees_all_equal(jax.jit(lambda: all_steps())(), cheap)


@pytest.mark.usefixtures("as_on_a_cpu")
def test_a_device_that_is_no_cpu_resets_more_at_once(monkeypatch):
    keys = split(as_key(jax.random.key(0)), 4)
    most, _ = rollouts._size_up(Ender(), keys)
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    assert rollouts.reset_limits() == rollouts.DEVICE_RESETS
    assert rollouts._size_up(Ender(), keys)[0] >= 2000 * most


def test_what_a_program_computes_is_counted():
    def program(x):
        x = jax.lax.scan(lambda x, _: (x + 1.0, None), x, None, length=5)[0]  # 5 * 4
        return jax.jit(jnp.sin)(x) * 2.0  # 4 + 4

    assert rollouts._count_numbers(jax.make_jaxpr(program)(jnp.zeros(4)).jaxpr) == 28
