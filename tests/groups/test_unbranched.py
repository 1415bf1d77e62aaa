"""Decision states that are not branched: with a critic, the policy learns from their executed actions as PPO does."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import grpo_jax
from grpo_jax import counter
from grpo_jax.groups import compare
from grpo_jax.groups.branch import Branches
from grpo_jax.learning.update import loss
from grpo_jax.training import loop

SETTINGS = grpo_jax.GRPOConfig(
    n_envs=4,
    n_steps=16,
    batch_size=64,
    branch_every=4,
    bootstrap=True,
    horizon=3,
    group_size=3,
    net_arch=(8,),
)
IDS = ("CartPole-v1", "Pendulum-v1")  # all actions, and sampled ones
collect = jax.jit(loop.collect, static_argnames="keep_next_observation")


@functools.cache
def collected(env_id):
    """A rollout in an env, its candidates, and returns of theirs that say something."""
    world = grpo_jax.make(env_id)
    state = jax.jit(loop.init)(SETTINGS, world, jax.random.key(0))
    state, trajectory = collect(SETTINGS, world, state, keep_next_observation=True)
    trajectory = loop._with_distribution(state.policy, state.learner.policy, trajectory)
    group = jax.jit(compare.propose, static_argnums=1)(SETTINGS, state.policy, trajectory, jax.random.key(1))
    returns = jax.random.normal(jax.random.key(2), group.valid.shape)
    return state, trajectory, group, Branches(returns, counter.zero())


def batch_of(env_id, config=SETTINGS, every=True):
    """What is learned from the rollout; without ``every`` no state counts as branched."""
    state, trajectory, group, branches = collected(env_id)
    wanted = compare.branched(config, 0) & every
    arguments = config, state.policy, state.learner.policy, trajectory, group, branches, wanted
    return jax.jit(compare.compare_branches, static_argnums=1)(*arguments)


def gradient_of(env_id, config, batch):
    state = collected(env_id)[0]
    of_loss = jax.jit(jax.grad(loss, has_aux=True), static_argnums=2)
    policy = state.learner.policy
    return of_loss(policy.params, config, state.policy, policy, batch, 0.2, 0.2)[0]


@pytest.mark.parametrize("scale", ["batch", "none"])
@pytest.mark.parametrize("env_id", IDS)
def test_the_executed_action_has_its_lambda_advantage(env_id, scale):
    batch, advantages = batch_of(env_id, SETTINGS.replace(advantage_scale=scale))
    wanted = np.asarray(batch.compared)
    assert wanted.sum() == 16
    np.testing.assert_array_equal(batch.advantage[wanted], advantages.advantage[wanted])

    beyond = np.asarray(batch.value_target - batch.value)[~wanted]
    beyond -= beyond.mean()
    expected = beyond / beyond.std() if scale == "batch" else beyond
    executed = np.arange(batch.group.valid.shape[1]) == np.asarray(batch.group.executed)[:, None]
    np.testing.assert_array_equal(batch.group.valid[~wanted], executed[~wanted])
    np.testing.assert_allclose(batch.advantage[~wanted].sum(axis=1), expected, rtol=1e-4, atol=1e-5)
    assert np.all(np.asarray(batch.group.log_weight)[~wanted] == 0.0)
    assert np.all(batch.active[~wanted])


@pytest.mark.parametrize("env_id", IDS)
def test_without_branches_the_gradient_is_that_of_episodes(env_id):
    batch, _ = batch_of(env_id, every=False)
    episodes = SETTINGS.replace(candidates="episodes", branch_every=1, baseline="mean")
    state, trajectory, *_ = collected(env_id)
    expected, _ = jax.jit(compare.compare_episodes, static_argnums=1)(
        episodes, state.policy, state.learner.policy, trajectory
    )
    mine, theirs = (gradient_of(env_id, SETTINGS, one) for one in (batch, expected))
    for one, two in zip(jax.tree.leaves(mine), jax.tree.leaves(theirs), strict=True):
        np.testing.assert_allclose(one, two, rtol=1e-3, atol=1e-5)
    assert any(np.abs(leaf).max() > 1e-3 for leaf in jax.tree.leaves(mine["actor"]))


@pytest.mark.parametrize("env_id", IDS)
def test_both_kinds_of_states_have_an_average_of_their_own(env_id):
    """However few are branched, their groups weigh as much: the loss is the sum of what either alone would give."""
    batch, _ = batch_of(env_id)
    rows = [batch.compared, ~batch.compared]
    alone = [
        gradient_of(env_id, SETTINGS.replace(vf_coef=0.0), batch.replace(alive=batch.alive & one))
        for one in rows
    ]
    both = gradient_of(env_id, SETTINGS.replace(vf_coef=0.0), batch)["actor"]
    for whole, *parts in zip(
        *map(jax.tree.leaves, (both, alone[0]["actor"], alone[1]["actor"])), strict=True
    ):
        np.testing.assert_allclose(whole, sum(parts), rtol=1e-3, atol=1e-6)
    assert all(np.abs(part["actor"]["output"]["kernel"]).max() > 1e-4 for part in alone)


@pytest.mark.parametrize(
    "changes", [{"bootstrap": False}, {"persistence": 0.5}], ids=["without a critic", "persistent"]
)
def test_nothing_is_learned_from_them_otherwise(changes):
    batch, advantages = batch_of("CartPole-v1", SETTINGS.replace(**changes))
    np.testing.assert_array_equal(batch.advantage, advantages.advantage)
    assert not np.any(np.asarray(batch.active)[~np.asarray(batch.compared)])


def test_numbers_that_are_not_finite_are_not_learned_from():
    state, trajectory, group, branches = collected("CartPole-v1")
    spoiled = trajectory.replace(reward=trajectory.reward.at[3, 1].set(jnp.nan))
    wanted = compare.branched(SETTINGS, 0)
    batch, _ = jax.jit(compare.compare_branches, static_argnums=1)(
        SETTINGS, state.policy, state.learner.policy, spoiled, group, branches, wanted
    )
    assert np.all(np.isfinite(batch.advantage))
    assert not np.any(np.asarray(batch.active)[~np.asarray(batch.compared)])
