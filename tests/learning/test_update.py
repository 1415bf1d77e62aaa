"""The update on tiny batches: against optax by hand, and what its switches do."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from learners import (
    BASE,
    KEY,
    OBSERVATION,
    RNG,
    A,
    N,
    assert_close,
    assert_same,
    by_hand_gradient,
    logits,
    loss_gradient,
    make_batch,
    run_update,
    setup,
)

from grpo_jax.groups import candidates
from grpo_jax.learning.update import NARROW, loss, make_optimizer, row_taker
from grpo_jax.noise import as_key, draw_bits


@pytest.mark.parametrize("max_grad_norm", [1e6, 0.01])
def test_one_step_is_one_step_of_optax(max_grad_norm):
    config = BASE.replace(max_grad_norm=max_grad_norm)
    policy, learner, batch = setup(config)
    new, metrics = run_update(config, policy, learner, batch, KEY, 0.0)

    params = learner.policy.params
    optimizer = optax.chain(optax.clip_by_global_norm(max_grad_norm), optax.adam(0.01, eps=1e-5))
    total, gradient = by_hand_gradient(params, policy, learner.policy, batch)
    changes, _ = optimizer.update(gradient, optimizer.init(params), params)
    assert_close(new.policy.params, optax.apply_updates(params, changes), rtol=1e-4, atol=1e-6)
    norm = np.sqrt(sum(np.sum(np.square(leaf)) for leaf in jax.tree.leaves(gradient)))
    np.testing.assert_allclose(metrics["grad_norm"], norm, rtol=1e-4)
    assert norm > 0.01  # the bound bites where it is asked to
    np.testing.assert_allclose(metrics["loss"], total, rtol=1e-4, atol=1e-7)
    assert int(new.n_updates) == 1 and float(metrics["n_updates"]) == 1.0


def test_epochs_are_steps_of_optax_in_a_row():
    config = BASE.replace(n_epochs=6, learning_rate=0.1, clip_range=0.05)  # far enough to be clipped
    policy, learner, batch = setup(config)
    new, metrics = run_update(config, policy, learner, batch, KEY, 0.0)
    params, optimizer = learner.policy.params, optax.adam(0.1, eps=1e-5)
    state = optimizer.init(params)
    for _ in range(6):
        gradient = by_hand_gradient(params, policy, learner.policy, batch, 0.05, 0.05)[1]
        changes, state = optimizer.update(gradient, state, params)
        params = optax.apply_updates(params, changes)
    assert_close(new.policy.params, params, rtol=1e-3, atol=1e-5)
    assert float(metrics["clip_fraction_high"]) > 0.0 and float(metrics["clip_fraction_low"]) > 0.0


@pytest.mark.parametrize("surrogate", ["cispo", "sapo", "tpo"])
def test_only_ppo_cuts_gradients(surrogate):
    config = BASE.replace(n_epochs=6, learning_rate=0.1, clip_range=0.05, surrogate=surrogate)
    policy, learner, batch = setup(config)
    _, metrics = run_update(config, policy, learner, batch, KEY, 0.0)
    assert float(metrics["clip_fraction"]) > 0.0
    assert float(metrics["clip_fraction_high"]) == float(metrics["clip_fraction_low"]) == 0.0


def test_an_update_decreases_the_loss():
    config = BASE.replace(n_epochs=5, batch_size=4)
    policy, learner, batch = setup(config)
    new, _ = run_update(config, policy, learner, batch, KEY, 0.0)
    evaluate = jax.jit(lambda params: loss(params, config, policy, learner.policy, batch, 0.2, 0.2)[0])
    assert evaluate(new.policy.params) < evaluate(learner.policy.params) - 1e-3


@pytest.mark.parametrize(("n_epochs", "batch_size"), [(1, 2), (3, 2), (2, 8), (1, 1)])
def test_every_row_is_visited_once_an_epoch(n_epochs, batch_size):
    """With learning rate 0 the mean loss is that of the rows visited: 5^i of row i spells how often, in base 5."""
    config = BASE.replace(n_epochs=n_epochs, batch_size=batch_size, learning_rate=0.0)
    policy, learner, batch = setup(config)
    pi = jax.nn.softmax(batch.distribution)
    # An advantage that only the first action has: the row's objective is pi(0) A = 5^i.
    advantage = jnp.zeros((N, A)).at[:, 0].set(5.0 ** jnp.arange(N) / pi[:, 0])
    _, metrics = run_update(config, policy, learner, batch.replace(advantage=advantage), KEY, 0.0)
    total = -float(metrics["policy_loss"]) * n_epochs * N
    np.testing.assert_allclose(
        total, n_epochs * (5**N - 1) / 4, rtol=2e-6
    )  # one row more or less: at least 5^0
    assert abs(total - n_epochs * (5**N - 1) / 4) < 0.5


def test_order_depends_on_the_key_alone():
    config = BASE.replace(n_epochs=2, batch_size=2)
    policy, learner, batch = setup(config)
    first, metrics = run_update(config, policy, learner, batch, KEY, 0.0)
    second, same = run_update(config, policy, learner, batch, KEY, 0.0)
    assert_same((first, metrics), (second, same))
    other, _ = run_update(config, policy, learner, batch, jax.random.key(4), 0.0)
    differs = jax.tree.map(lambda a, b: bool(np.any(a != b)), first.policy.params, other.policy.params)
    assert any(jax.tree.leaves(differs))


def test_target_kl_stops_early(real_compiles):
    config = BASE.replace(n_epochs=10, batch_size=4, learning_rate=0.1)
    policy, learner, batch = setup(config)
    free, metrics = run_update(config, policy, learner, batch, KEY, 0.0)
    assert int(free.n_updates) == 20 and float(metrics["n_updates"]) == 20.0
    bounded = config.replace(target_kl=0.01)
    new, metrics = run_update(bounded, policy, learner, batch, KEY, 0.0)
    assert 1 <= int(new.n_updates) < 20 and float(metrics["n_updates"]) < 20.0

    def kl(learner):
        parameters = logits(policy, learner.policy, batch.observation)
        return float(jnp.mean(policy.distribution.kl(batch.distribution, parameters)))

    # The step that would have gone too far was looked at and not taken.
    assert float(metrics["n_updates"]) == int(new.n_updates)
    assert kl(new) < kl(free)
    assert kl(new) > 0.01  # it stopped because it went too far, not before
    loose, _ = run_update(config.replace(target_kl=1e6), policy, learner, batch, KEY, 0.0)
    assert_close(loose.policy.params, free.policy.params, rtol=1e-6)


def test_the_last_parameters_are_those_within_reach():
    """Full batches, so that the order does not matter: the stopped run is a shorter one."""
    config = BASE.replace(n_epochs=10, learning_rate=0.05, target_kl=0.01)
    policy, learner, batch = setup(config)
    stopped, _ = run_update(config, policy, learner, batch, KEY, 0.0)
    shorter = config.replace(n_epochs=int(stopped.n_updates), target_kl=None)
    expected, _ = run_update(shorter, policy, learner, batch, KEY, 0.0)
    assert_close(stopped.policy.params, expected.policy.params, rtol=1e-4, atol=1e-6)
    assert_close(stopped.optimizer, expected.optimizer, rtol=1e-4, atol=1e-6)


def test_forbidden_actions_are_not_learned_from():
    config = BASE.replace(net_arch=(), kl_coef=0.5, kl_estimator="k2", ent_coef=0.1)
    policy, learner, _ = setup(config)
    mask = jnp.array([[True, False, True]] * N)
    parameters = policy.parameters(learner.policy, OBSERVATION, mask)
    group = candidates.enumerate_actions(policy.distribution, parameters, jnp.zeros(N, jnp.int32), mask)
    reference = policy.distribution.apply_mask(jnp.zeros((N, A)), mask)
    batch = make_batch(
        policy, learner.policy, action_mask=mask, group=group, distribution=parameters, reference=reference
    )
    batch = batch.replace(advantage=jnp.where(mask, batch.advantage, 1e6))
    new, metrics = run_update(config, policy, learner, batch, KEY, 0.0)
    before, after = (state.policy.params["actor"]["output"] for state in (learner, new))
    np.testing.assert_array_equal(after["kernel"][:, 1], before["kernel"][:, 1])
    assert np.all(after["kernel"][:, [0, 2]] != before["kernel"][:, [0, 2]])
    assert abs(float(metrics["loss"])) < 10.0  # the forbidden advantage is not in it


@pytest.mark.parametrize("what", ["advantage", "observation", "inf"])
def test_what_is_not_finite_changes_nothing(what):
    policy, learner, batch = setup()
    if what == "observation":
        broken = batch.replace(observation=batch.observation.at[2, 1].set(jnp.nan))
    else:
        broken = batch.replace(
            advantage=batch.advantage.at[2, 1].set(jnp.nan if what == "advantage" else jnp.inf)
        )
    new, metrics = run_update(BASE, policy, learner, broken, KEY, 0.0)
    assert_same(new, learner)
    assert float(metrics["nonfinite_updates"]) == 1.0
    assert all(np.isfinite(value) for value in metrics.values()), metrics


def test_only_the_broken_minibatch_is_left_out():
    config = BASE.replace(n_epochs=2, batch_size=2)
    policy, learner, batch = setup(config)
    broken = batch.replace(advantage=batch.advantage.at[5].set(jnp.nan))
    new, metrics = run_update(config, policy, learner, broken, KEY, 0.0)
    assert float(metrics["nonfinite_updates"]) == 2.0  # once in each of two epochs
    assert int(new.n_updates) == 8 - 2
    assert all(np.all(np.isfinite(leaf)) for leaf in jax.tree.leaves(new.policy.params))
    assert any(
        np.any(a != b) for a, b in zip(*map(jax.tree.leaves, (new.policy, learner.policy)), strict=True)
    )
    assert all(np.isfinite(value) for value in metrics.values())


def test_dead_and_inactive_rows_teach_nothing():
    policy, learner, batch = setup()
    half = jnp.arange(N) < 4
    garbage = batch.replace(advantage=jnp.where(half[:, None], batch.advantage, 1e6))
    dead, _ = run_update(BASE, policy, learner, garbage.replace(alive=half), KEY, 0.0)
    inactive, _ = run_update(BASE, policy, learner, garbage.replace(active=half), KEY, 0.0)
    apart, _ = run_update(BASE, policy, learner, garbage.replace(compared=half), KEY, 0.0)
    weight = jnp.where(half, 2.0, 0.0)[:, None]  # the mean over half of the rows
    weighed = batch.replace(advantage=batch.advantage * weight)
    gradient = by_hand_gradient(learner.policy.params, policy, learner.policy, weighed)[1]
    optimizer = optax.adam(0.01, eps=1e-5)
    for new, scale in ((dead, 1.0), (apart, 1.0), (inactive, 0.5)):  # inactive states stay in the mean
        scaled = jax.tree.map(lambda leaf, scale=scale: scale * leaf, gradient)
        changes, _ = optimizer.update(scaled, optimizer.init(gradient))
        assert_close(
            new.policy.params, optax.apply_updates(learner.policy.params, changes), rtol=1e-4, atol=1e-6
        )


def test_entropy_bonus():
    config = BASE.replace(ent_coef=0.5, n_epochs=5)
    policy, learner, batch = setup(config)
    nothing = batch.replace(advantage=jnp.zeros((N, A)), active=jnp.zeros(N, bool))
    new, _ = run_update(config, policy, learner, nothing, KEY, 0.0)
    entropy = [
        float(jnp.mean(policy.distribution.entropy(logits(policy, state.policy, batch.observation))))
        for state in (learner, new)
    ]
    assert entropy[1] > entropy[0] + 1e-3


def test_the_last_minibatch_of_an_epoch_holds_what_is_left():
    """8 states in minibatches of 5: steps on 5 and on 3 of them, each weighted by its own size."""
    config = BASE.replace(batch_size=5, learning_rate=0.05, ent_coef=0.01)
    policy, learner, batch = setup(config)
    after, metrics = run_update(config, policy, learner, batch, KEY, 0.0)
    order = np.argsort(np.asarray(draw_bits(as_key(KEY), (1, N))), axis=1)[0]
    optimizer = make_optimizer(config, 0.05)
    params, state = learner.policy.params, learner.optimizer
    for rows in (order[:5], order[5:]):
        part = jax.tree.map(lambda leaf, rows=rows: leaf[rows], batch)
        gradients, _ = loss_gradient(params, config, policy, learner.policy, part, 0.2, 0.2)
        changes, state = optimizer.update(gradients, state, params)
        params = optax.apply_updates(params, changes)
    assert_close(after.policy.params, params, rtol=1e-5, atol=1e-6)
    assert metrics["n_updates"] == 2


def test_a_minibatch_larger_than_the_rollout_is_the_rollout():
    policy, learner, batch = setup()
    whole, _ = run_update(BASE, policy, learner, batch, KEY, 0.0)
    larger, _ = run_update(BASE.replace(batch_size=100), policy, learner, batch, KEY, 0.0)
    assert_close(whole.policy.params, larger.policy.params, rtol=1e-6, atol=1e-7)


def test_another_optimizer():
    """Plain gradient descent: parameters minus rate times gradient."""
    config = BASE.replace(optimizer=optax.sgd, learning_rate=0.1)
    policy, learner, batch = setup(config)
    after, _ = run_update(config, policy, learner, batch, KEY, 0.0)
    gradients = by_hand_gradient(learner.policy.params, policy, learner.policy, batch)[1]
    expected = jax.tree.map(lambda p, g: p - 0.1 * g, learner.policy.params, gradients)
    assert_close(after.policy.params, expected, rtol=1e-4, atol=1e-6)
    with pytest.raises(TypeError, match="optimizer='adam' must be a function"):
        BASE.replace(optimizer="adam")


@pytest.mark.parametrize("wide", [3, NARROW + 1])
def test_rows_of_a_batch_are_the_same_out_of_a_table(wide):
    _, _, batch = setup(BASE.replace(bootstrap=True))
    batch = batch.replace(observation={"a": jnp.ones((N, 2, 3), jnp.uint8), "b": RNG.normal(size=(N, wide))})
    batch = jax.tree.map(jnp.asarray, batch)
    rows = jnp.asarray([5, 0, N])  # out of range: the last row, as in indexing

    @jax.jit
    def both(batch, rows):
        return row_taker(batch)(rows), jax.tree.map(lambda leaf: leaf[rows], batch)

    chex.assert_trees_all_equal(*both(batch, rows), strict=True)
