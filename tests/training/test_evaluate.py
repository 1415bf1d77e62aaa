import jax
import jax.numpy as jnp
import numpy as np
import pytest
from toys import Line, MaskedLine

import grpo_jax
from grpo_jax.spaces import Discrete

TINY = grpo_jax.GRPOConfig(n_envs=4, n_steps=8, batch_size=16, horizon=3)


@jax.jit
def state_of(env):
    return grpo_jax.init(TINY, env, jax.random.key(0))


def test_returns_and_lengths_of_known_episodes():
    env = MaskedLine(Discrete(2))
    episodes = grpo_jax.evaluate_episodes(state_of(env), env, jax.random.key(0), 5)
    np.testing.assert_array_equal(episodes.returns, 1.0 + 2 + 3 + 4)
    np.testing.assert_array_equal(episodes.lengths, 4)
    assert episodes.finished.all()
    np.testing.assert_array_equal(
        grpo_jax.evaluate(state_of(env), env, jax.random.key(0), 5), episodes.returns
    )


def test_steps_behind_the_end_do_not_count():
    env = Line(Discrete(2), goal=4, limit=10)
    episodes = grpo_jax.evaluate_episodes(state_of(env), env, jax.random.key(0), 64)
    lengths = np.asarray(episodes.lengths)
    assert lengths.min() >= 4 and lengths.max() <= 10 and len(set(lengths.tolist())) > 2


def test_episodes_that_never_end_stop_at_max_steps():
    env = Line(Discrete(2), goal=10**6, limit=10**6)
    episodes = grpo_jax.evaluate_episodes(state_of(env), env, jax.random.key(0), 3, max_steps=7)
    np.testing.assert_array_equal(episodes.lengths, 7)
    assert not episodes.finished.any()


def test_the_greedy_policy_is_deterministic_and_the_sampled_one_is_not():
    env = Line(Discrete(2))
    greedy = grpo_jax.evaluate(state_of(env), env, jax.random.key(0), 16, deterministic=True)
    sampled = grpo_jax.evaluate(state_of(env), env, jax.random.key(0), 16)
    assert len(set(np.asarray(greedy).tolist())) == 1
    assert len(set(np.asarray(sampled).tolist())) > 1


def test_the_tasks_own_reward_is_counted():
    env = grpo_jax.make(MaskedLine(Discrete(2)), reward_function=lambda s, a, n: -7.0 * jnp.ones(()))
    np.testing.assert_array_equal(grpo_jax.evaluate(state_of(env), env, jax.random.key(0), 2), 10.0)


def test_it_vmaps_over_seeds():
    env = grpo_jax.make("CartPole-v1")
    keys = jax.random.split(jax.random.key(0), 2)
    states = jax.jit(jax.vmap(lambda key: grpo_jax.init(TINY, env, key)))(keys)
    together = jax.jit(jax.vmap(lambda state, key: grpo_jax.evaluate(state, env, key, 8)))(states, keys)
    assert together.shape == (2, 8)
    alone = grpo_jax.evaluate(jax.tree.map(lambda leaf: leaf[1], states), env, keys[1], 8)
    np.testing.assert_array_equal(together[1], alone)


@pytest.mark.parametrize("bad", [{"n_episodes": 0}, {"max_steps": 0}])
def test_bad_arguments(bad):
    env = Line(Discrete(2))
    with pytest.raises(ValueError, match="at least 1"):
        grpo_jax.evaluate(state_of(env), env, jax.random.key(0), **bad)
