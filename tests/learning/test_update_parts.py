"""What the update takes beside the surrogate: schedules, the reference policy, the critic."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from learners import (
    BASE,
    KEY,
    OBSERVATION,
    A,
    N,
    assert_close,
    assert_same,
    by_hand_gradient,
    logits,
    loss_gradient,
    run_update,
    setup,
    values,
)

from grpo_jax.learning.update import clip_by_part, init_learner, update_reference

# Schedules.


def first_step_size(config, progress, n_updates=0):
    """Adam's first step is the learning rate in every coordinate with a gradient far above eps."""
    policy, learner, batch = setup(config)
    learner = learner.replace(n_updates=jnp.int32(n_updates))
    batch = batch.replace(advantage=1e4 * batch.advantage)
    new, metrics = run_update(config, policy, learner, batch, KEY, progress)
    change = jax.tree.map(
        lambda a, b: np.max(np.abs(np.asarray(a) - np.asarray(b))), new.policy.params, learner.policy.params
    )
    return max(jax.tree.leaves(change)), metrics


@pytest.mark.parametrize(
    ("decay", "progress", "factor"),
    [
        ("none", 0.75, 1.0),
        ("linear", 0.0, 1.0),
        ("linear", 0.75, 0.25),
        ("cosine", 0.5, 0.5),
        ("cosine", 0.25, 0.853553),
    ],
)
def test_decays(decay, progress, factor):
    config = BASE.replace(
        learning_rate_decay=decay, clip_range_decay=decay, ent_coef=0.1, ent_coef_decay=decay
    )
    step, metrics = first_step_size(config, progress)
    np.testing.assert_allclose(step, 0.01 * factor, rtol=1e-3)
    np.testing.assert_allclose(metrics["learning_rate"], 0.01 * factor, rtol=1e-5)
    np.testing.assert_allclose(metrics["clip_range"], 0.2 * factor, rtol=1e-5)
    np.testing.assert_allclose(metrics["ent_coef"], 0.1 * factor, rtol=1e-5)
    expected = metrics["policy_loss"] - 0.1 * factor * metrics["entropy"]
    np.testing.assert_allclose(metrics["loss"], expected, rtol=1e-5)


def test_optax_schedules_count_optimizer_steps():
    schedule = optax.linear_schedule(0.02, 0.0, 100)
    config = BASE.replace(
        learning_rate=schedule, clip_range=optax.piecewise_constant_schedule(0.3, {50: 0.5})
    )
    for n_updates, rate, clip in ((0, 0.02, 0.3), (25, 0.015, 0.3), (75, 0.005, 0.15)):
        step, metrics = first_step_size(config, 0.0, n_updates)
        np.testing.assert_allclose(step, rate, rtol=1e-3)
        np.testing.assert_allclose(metrics["clip_range"], clip, rtol=1e-5)


def test_a_schedule_moves_on_within_an_iteration():
    """Rates 0.1 then 0: the second of two steps moves nothing."""
    config = BASE.replace(n_epochs=2, learning_rate=lambda count: jnp.where(count < 1, 0.1, 0.0))
    policy, learner, batch = setup(config)
    two, _ = run_update(config, policy, learner, batch, KEY, 0.0)
    one, _ = run_update(BASE.replace(learning_rate=0.1), policy, learner, batch, KEY, 0.0)
    assert int(two.n_updates) == 2
    assert_close(two.policy.params, one.policy.params, rtol=1e-5, atol=1e-7)


def test_separate_clip_ranges():
    config = BASE.replace(n_epochs=4, learning_rate=0.1, clip_range=0.05, clip_range_high=0.3)
    policy, learner, batch = setup(config)
    new, _ = run_update(config, policy, learner, batch, KEY, 0.0)
    params, optimizer = learner.policy.params, optax.adam(0.1, eps=1e-5)
    state = optimizer.init(params)
    for _ in range(4):
        gradient = by_hand_gradient(params, policy, learner.policy, batch, 0.05, 0.3)[1]
        changes, state = optimizer.update(gradient, state, params)
        params = optax.apply_updates(params, changes)
    assert_close(new.policy.params, params, rtol=1e-3, atol=1e-5)


# The reference policy.


def references(config, n_iterations):
    """Reference parameters after each iteration, the policy's being filled with 1, 2, 3, ...; first 0."""
    _, learner, _ = setup(config)
    learner = learner.replace(reference=jax.tree.map(jnp.zeros_like, learner.policy))
    seen = []
    for i in range(n_iterations):
        policy_state = jax.tree.map(lambda leaf, i=i: jnp.full_like(leaf, i + 1.0), learner.policy)
        learner = update_reference(config, learner.replace(policy=policy_state), jnp.int32(i))
        leaves = np.unique(np.concatenate([np.ravel(leaf) for leaf in jax.tree.leaves(learner.reference)]))
        assert len(leaves) == 1
        seen.append(float(leaves[0]))
    return seen


def test_reference():
    config = BASE.replace(kl_coef=0.1, reference_interval=3, reference_decay=0.75)
    assert references(config.replace(reference="fixed"), 4) == [0.0] * 4
    assert references(config.replace(reference="periodic"), 7) == [0.0, 0.0, 3.0, 3.0, 3.0, 6.0, 6.0]
    expected, now = [], 0.0
    for i in range(4):
        now = 0.75 * now + 0.25 * (i + 1)
        expected.append(now)
    np.testing.assert_allclose(references(config.replace(reference="ema"), 4), expected, rtol=1e-6)
    _, learner, _ = setup(BASE)
    assert learner.reference is None  # nothing is kept without a KL term
    assert update_reference(BASE, learner, jnp.int32(0)) is learner


def test_the_reference_starts_as_a_copy():
    config = BASE.replace(kl_coef=0.1)
    policy, _, _ = setup(config)
    learner = init_learner(config, policy, KEY)
    assert_same(learner.reference, learner.policy)


@pytest.mark.parametrize("estimator", ["exact", "k1", "k2", "k3"])
def test_kl_coef_pulls_towards_the_reference(estimator):
    config = BASE.replace(kl_coef=1.0, kl_estimator=estimator, n_epochs=20, learning_rate=0.02)
    policy, learner, batch = setup(config)
    reference = jnp.asarray(np.random.default_rng(1).normal(size=(N, A)), jnp.float32)
    nothing = batch.replace(advantage=jnp.zeros((N, A)), active=jnp.zeros(N, bool), reference=reference)
    new, metrics = run_update(config, policy, learner, nothing, KEY, 0.0)

    def kl(learner):
        parameters = logits(policy, learner.policy, batch.observation)
        return float(jnp.mean(policy.distribution.kl(parameters, reference)))

    assert kl(new) < 0.7 * kl(learner)
    assert "kl" in metrics


# The critic.


def test_value_loss_trains_the_critic():
    config = BASE.replace(bootstrap=True, n_epochs=200, learning_rate=0.02)
    policy, learner, batch = setup(config)
    target = jnp.asarray(OBSERVATION @ np.array([1.0, -2.0, 0.5, 0.0], np.float32))
    batch = batch.replace(
        value=values(policy, learner.policy, batch.observation),
        value_target=target,
        advantage=jnp.zeros((N, A)),
        active=jnp.zeros(N, bool),
    )

    def error(learner):
        return float(jnp.mean((values(policy, learner.policy, batch.observation) - target) ** 2))

    new, metrics = run_update(config, policy, learner, batch, KEY, 0.0)
    assert error(new) < 0.1 * error(learner)
    assert_same(new.policy.params["actor"], learner.policy.params["actor"])  # the two share nothing
    assert float(metrics["value_loss"]) > 0.0


def test_large_returns_do_not_slow_the_actor():
    """With one bound for both, PPO's, the actor's gradient would be a thousandth of what it is."""
    config = BASE.replace(bootstrap=True, max_grad_norm=0.05, n_epochs=3)
    policy, learner, batch = setup(config)
    value = values(policy, learner.policy, batch.observation)
    near, far = (batch.replace(value=value, value_target=value - gap) for gap in (0.0, 1e4))
    alone, _ = run_update(config, policy, learner, near, KEY, 0.0)
    beside, metrics = run_update(config, policy, learner, far, KEY, 0.0)
    assert metrics["grad_norm"] > 1e3  # of both, before it is bounded
    assert_close(beside.policy.params["actor"], alone.policy.params["actor"], rtol=1e-6)


def test_where_a_critic_judges_episodes_one_bound_holds_the_actor_back():
    config = BASE.replace(bootstrap=True, max_grad_norm=0.05, candidates="episodes")
    policy, learner, batch = setup(config)
    value = values(policy, learner.policy, batch.observation)
    far = batch.replace(value=value, value_target=value - 1e4)
    params = learner.policy.params
    gradients, _ = loss_gradient(params, config, policy, learner.policy, far, 0.2, 0.2)
    optimizer = optax.chain(optax.clip_by_global_norm(0.05), optax.adam(0.01, eps=1e-5))
    changes, _ = optimizer.update(gradients, optimizer.init(gradients))
    new, _ = run_update(config, policy, learner, far, KEY, 0.0)
    assert_close(new.policy.params, optax.apply_updates(learner.policy.params, changes), rtol=1e-4, atol=1e-6)
    actor = np.concatenate([np.ravel(leaf) for leaf in jax.tree.leaves(changes["actor"])])
    assert np.max(np.abs(actor)) < 0.5 * 0.01  # Adam's first step would be the learning rate


def test_each_gradient_is_bounded_by_itself():
    gradients = {"actor": {"a": jnp.array([3.0, 4.0])}, "critic": {"b": jnp.array([0.3, 0.4])}}
    clipped, _ = clip_by_part(1.0).update(gradients, optax.EmptyState())
    np.testing.assert_allclose(clipped["actor"]["a"], [0.6, 0.8], rtol=1e-6)
    np.testing.assert_allclose(clipped["critic"]["b"], [0.3, 0.4], rtol=1e-6)
    nothing, _ = clip_by_part(1.0).update(jax.tree.map(jnp.zeros_like, gradients), optax.EmptyState())
    assert all(np.all(np.isfinite(leaf)) for leaf in jax.tree.leaves(nothing))


def test_vf_coef_scales_the_value_loss():
    config = BASE.replace(bootstrap=True, vf_coef=0.25)
    policy, learner, batch = setup(config)
    value = values(policy, learner.policy, batch.observation)
    batch = batch.replace(value=value, value_target=value + 2.0)
    _, metrics = run_update(config, policy, learner, batch, KEY, 0.0)
    np.testing.assert_allclose(metrics["value_loss"], 4.0, rtol=1e-5)
    np.testing.assert_allclose(metrics["loss"], metrics["policy_loss"] + 1.0, rtol=1e-5)
