"""GRPO's gradient is the policy gradient: exactly where everything is enumerated, in the mean where it is sampled."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tabular

from grpo_jax.config import GRPOConfig
from grpo_jax.groups import candidates
from grpo_jax.groups.advantage import group_advantages
from grpo_jax.groups.branch import group_returns
from grpo_jax.groups.compare import branched, compare_branches, follow, propose
from grpo_jax.learning.update import loss
from grpo_jax.policies.policy import PolicyState, make_policy
from grpo_jax.spaces import Discrete
from grpo_jax.types import Batch, Environments, Trajectory

HUGE = 1e6  # a clip range that never clips
Z = 4.5  # standard errors; some 100 numbers are compared


def tabular_policy(mdp, net_arch=(), seed=0):
    """A policy over one-hot states with random float64 parameters, and its probabilities ``[S, A]``."""
    config = GRPOConfig(
        n_envs=1,
        n_steps=1,
        batch_size=1,
        net_arch=net_arch,
        baseline="policy",
        advantage_scale="none",
        ent_coef=0.0,
    )
    policy = make_policy(config, Discrete(mdp.n_states), Discrete(mdp.n_actions))
    state = policy.init(jax.random.key(0))
    rng = np.random.default_rng(seed)
    params = jax.tree.map(lambda leaf: jnp.asarray(rng.normal(size=leaf.shape)), state.params)
    state = PolicyState(params, None)
    pi = tabular.softmax(np.asarray(policy.parameters(state, jnp.arange(mdp.n_states))))
    return config, policy, state, pi


def exact_returns(mdp, pi, gamma, horizon):
    """Q ``[S, A]`` through the library's branches."""
    return tabular.belief_returns(mdp.transition, mdp.reward, pi, gamma, horizon)


def make_batch(policy, state, observation, group, advantages):
    return Batch(
        observation=observation,
        action_mask=None,
        group=group,
        advantage=advantages.advantage,
        active=advantages.active,
        alive=jnp.ones(observation.shape[0], bool),
        compared=jnp.ones(observation.shape[0], bool),
        distribution=policy.parameters(state, observation),
    )


@functools.partial(jax.jit, static_argnames=("policy", "baseline"))
def enumerated_batch(policy, state, observation, returns, baseline="policy"):
    """All actions of states ``[B]`` with their returns ``[B, A]``."""
    parameters = policy.parameters(state, observation)
    group = candidates.enumerate_actions(policy.distribution, parameters, jnp.zeros_like(observation))
    advantages = group_advantages(
        returns,
        jnp.exp(group.log_weight),
        group.valid,
        group.executed,
        baseline=baseline,
        scale="none",
        spread_floor=0.0,
    )
    return make_batch(policy, state, observation, group, advantages)


@functools.partial(jax.jit, static_argnums=1)
def ascent(config, policy, state, batch):
    """Minus the gradient of the library's unclipped loss."""
    gradient = jax.grad(lambda params: loss(params, config, policy, state, batch, HUGE, HUGE)[0])(
        state.params
    )
    return jax.tree.map(jnp.negative, gradient)


def each_state(batch):
    """A batch ``[B, ...]`` as B batches of one."""
    return jax.tree.map(lambda leaf: leaf[:, None], batch)


def policy_gradient_theorem(mdp, pi, gamma, weights):
    """sum_s weights(s) sum_a (d pi(a|s) / d logits) Q(s, a) for softmax logits, ``[S, A]``, in NumPy."""
    q = tabular.action_values(mdp, pi, gamma)
    return weights[:, None] * pi * (q - np.sum(pi * q, axis=1, keepdims=True))


CASES = [(seed, gamma) for seed in (0, 1, 2) for gamma in (1.0, 0.9, 0.5)]


@pytest.mark.parametrize(("seed", "gamma"), CASES)
def test_long_branches_are_the_action_values(seed, gamma):
    mdp = tabular.random_mdp(seed)
    pi = tabular.softmax(np.random.default_rng(seed).normal(size=(mdp.n_states, mdp.n_actions)))
    expected = tabular.action_values(mdp, pi, gamma)
    with jax.enable_x64(True):
        for horizon in (mdp.n_layers, mdp.n_layers + 5):
            np.testing.assert_allclose(
                exact_returns(mdp, pi, gamma, horizon), expected, rtol=1e-10, atol=1e-12
            )
        too_short = np.asarray(exact_returns(mdp, pi, gamma, mdp.n_layers - 1))
    assert np.max(np.abs(too_short - expected)) > 1e-3  # the horizon matters


@pytest.mark.parametrize(("seed", "net_arch"), [(0, ()), (1, (5,)), (2, (5,))])
def test_gradient_is_that_of_the_objective(seed, net_arch):
    """With states weighted by their discounted occupancy: the gradient of J(theta), differentiated end to end."""
    mdp = tabular.random_mdp(seed)
    with jax.enable_x64(True):
        config, policy, state, pi = tabular_policy(mdp, net_arch, seed)
        observation = jnp.arange(mdp.n_states)

        def exact(params, gamma):
            logits = policy.parameters(state.replace(params=params), observation)
            return tabular.objective(mdp, jax.nn.softmax(logits), gamma)

        exact_gradient = jax.jit(jax.grad(exact))

        @jax.jit
        def library_gradient(gamma, weights):
            batch = enumerated_batch(policy, state, observation, exact_returns(mdp, pi, gamma, mdp.n_layers))
            per_state = jax.vmap(lambda row: ascent(config, policy, state, row))(each_state(batch))
            return jax.tree.map(lambda leaf: jnp.tensordot(weights, leaf, 1), per_state)

        for gamma in (1.0, 0.9, 0.5):
            actual = library_gradient(gamma, tabular.occupancy(mdp, pi, gamma))
            expected = exact_gradient(state.params, gamma)
            assert jax.tree.leaves(expected)[0].dtype == jnp.float64
            jax.tree.map(
                lambda a, e: np.testing.assert_allclose(a, e, rtol=1e-5, atol=1e-9), actual, expected
            )


@pytest.mark.parametrize(("seed", "gamma"), CASES)
def test_gradient_weighs_states_as_they_come(seed, gamma):
    """A batch in which states repeat: the theorem's sum, with their frequencies in place of the occupancy."""
    mdp = tabular.random_mdp(seed, n_layers=2, width=3, n_actions=2)
    with jax.enable_x64(True):
        config, policy, state, pi = tabular_policy(mdp, (), seed)
        observation = np.random.default_rng(seed).integers(mdp.n_states, size=10)
        returns = exact_returns(mdp, pi, gamma, mdp.n_layers)
        batch = enumerated_batch(policy, state, jnp.asarray(observation), returns[observation])
        actual = ascent(config, policy, state, batch)["actor"]["output"]
        actual = jax.tree.map(np.asarray, actual)
    frequencies = np.bincount(observation, minlength=mdp.n_states) / len(observation)
    expected = policy_gradient_theorem(mdp, pi, gamma, frequencies)
    np.testing.assert_allclose(actual["kernel"], expected, rtol=1e-5, atol=1e-12)
    np.testing.assert_allclose(actual["bias"], expected.sum(0), rtol=1e-5, atol=1e-12)


@pytest.mark.parametrize(
    ("baseline", "factor"), [("policy", 1.0), ("mean", 1.0), ("leave_one_out", 3 / 2), ("shrinkage", None)]
)
def test_baselines_of_enumerated_groups(baseline, factor):
    """A baseline changes no gradient; leaving one out of n scales it by n / (n - 1)."""
    mdp = tabular.random_mdp(4)
    with jax.enable_x64(True):
        config, policy, state, pi = tabular_policy(mdp)
        observation = jnp.arange(mdp.n_states)
        returns = exact_returns(mdp, pi, 0.9, mdp.n_layers)
        batch = enumerated_batch(policy, state, observation, returns, baseline)
        actual = np.asarray(ascent(config, policy, state, batch)["actor"]["output"]["kernel"])
    expected = policy_gradient_theorem(mdp, pi, 0.9, np.full(mdp.n_states, 1 / mdp.n_states))
    if factor is None:
        # Shrinkage leaves a share of one out: between 1 and n / (n - 1) times the gradient, in each state.
        ratio = actual / expected
        np.testing.assert_allclose(ratio, np.broadcast_to(ratio[:, :1], ratio.shape), rtol=1e-8)
        assert np.all(ratio >= 1.0 - 1e-8) and np.any(ratio > 1.01) and np.all(ratio < 1.5)
    else:
        np.testing.assert_allclose(actual, factor * expected, rtol=1e-5, atol=1e-12)


def interval(samples):
    """Mean and standard error over the first axis."""
    samples = np.asarray(samples, np.float64)
    return samples.mean(0), samples.std(0, ddof=1) / np.sqrt(len(samples))


def assert_mean(samples, expected):
    mean, error = interval(samples)
    assert np.all(error < 0.05 * np.max(np.abs(expected))), "too few samples to tell anything"
    assert np.all(np.abs(mean - expected) < Z * error), (mean, expected, error)


def sampled_gradients(baseline, n_draws, group_size):
    """Gradients ``[n_draws, S, A]`` of sampled groups with exact returns, and the policy gradient ``[S, A]``."""
    mdp = tabular.random_mdp(5)
    config, policy, state, pi = tabular_policy(mdp)
    observation = jnp.arange(mdp.n_states)
    q = jnp.asarray(exact_returns(mdp, pi, 0.9, mdp.n_layers))
    parameters = policy.parameters(state, observation)

    def draw(key):
        uniforms = jax.random.uniform(key, (mdp.n_states, group_size, 1))
        executed = policy.distribution.sample(parameters, uniforms[:, 0])
        group = candidates.sample_actions(policy.distribution, parameters, executed, uniforms[:, 1:])
        advantages = group_advantages(
            jnp.take_along_axis(q, group.action, axis=1),
            jnp.exp(group.log_weight),
            group.valid,
            group.executed,
            baseline=baseline,
            scale="none",
            spread_floor=0.0,
        )
        batch = make_batch(policy, state, observation, group, advantages)
        return ascent(config, policy, state, batch)["actor"]["output"]["kernel"]

    keys = jax.random.split(jax.random.key(2), n_draws)
    weights = np.full(mdp.n_states, 1 / mdp.n_states)
    return jax.jit(jax.vmap(draw))(keys), policy_gradient_theorem(mdp, pi, 0.9, weights)


@pytest.mark.parametrize(
    ("baseline", "group_size", "factor"),
    [
        ("leave_one_out", 4, 1.0),
        ("mean", 2, 1 / 2),
        ("policy", 4, 3 / 4),  # equal weights: the mean
        ("executed", 3, 1 / 3),  # unbiased for the executed action, whose weight is 1/K here
    ],
)
def test_sampled_candidates(baseline, group_size, factor):
    gradients, expected = sampled_gradients(baseline, 20_000, group_size)
    assert_mean(gradients, factor * expected)
    if factor != 1.0:
        with pytest.raises(AssertionError):  # there are enough samples to tell the factor from 1
            assert_mean(gradients, expected)


def test_sampled_branches():
    """Enumerated groups whose returns are single sampled branches of a stochastic MDP."""
    mdp = tabular.random_mdp(6)
    config, policy, state, pi = tabular_policy(mdp)
    world = tabular.sampled_world(mdp.transition, mdp.reward)
    observation = jnp.arange(mdp.n_states)
    actions = jnp.broadcast_to(jnp.arange(mdp.n_actions), (mdp.n_states, mdp.n_actions))

    def act(observation, mask, uniforms):
        return policy.distribution.sample(policy.parameters(state, observation), uniforms)

    def draw(key, common_random_numbers):
        branches = group_returns(
            world,
            act,
            key,
            tabular.states_at(observation),
            actions,
            horizon=mdp.n_layers + 2,
            gamma=0.9,
            common_random_numbers=common_random_numbers,
        )
        batch = enumerated_batch(policy, state, observation, branches.returns)
        return branches.returns, ascent(config, policy, state, batch)["actor"]["output"]["kernel"]

    expected = policy_gradient_theorem(mdp, pi, 0.9, np.full(mdp.n_states, 1 / mdp.n_states))
    keys = jax.random.split(jax.random.key(3), 10_000)
    for common_random_numbers in (True, False):
        sampled = jax.jit(jax.vmap(functools.partial(draw, common_random_numbers=common_random_numbers)))
        returns, gradients = sampled(keys)
        assert_mean(
            returns[:, : 2 * 2], tabular.action_values(mdp, pi, 0.9)[: 2 * 2]
        )  # two layers that go on
        mean, error = interval(gradients)
        np.testing.assert_array_less(np.abs(mean - expected), Z * error + 1e-7)
        assert np.max(error) < 0.05 * np.max(np.abs(expected))


@pytest.mark.parametrize(("kind", "factor"), [("enumerate", 3 / 2), ("sample", 1.0)])
def test_executed_baseline_in_the_loop(kind, factor):
    """Learning from the executed action alone, as the loop assembles it: unbiased, up to G/(G-1) if enumerated."""
    mdp = tabular.random_mdp(7)
    _, policy, state, pi = tabular_policy(mdp)
    n_copies = 100
    config = GRPOConfig(
        n_envs=mdp.n_states,
        n_steps=n_copies,
        batch_size=mdp.n_states,
        net_arch=(),
        candidates=kind,
        group_size=4,
        horizon=mdp.n_layers,
        gamma=0.9,
        baseline="executed",
        advantage_scale="none",
        spread_floor=0.0,
    )
    world = tabular.sampled_world(mdp.transition, mdp.reward)
    shape = (n_copies, mdp.n_states)
    observation = jnp.broadcast_to(jnp.arange(mdp.n_states), shape)
    parameters = policy.parameters(state, observation)

    def draw(key):
        executed_key, group_key = jax.random.split(key)
        executed = policy.distribution.sample(parameters, jax.random.uniform(executed_key, (*shape, 1)))
        trajectory = Trajectory(
            environments=Environments(
                state=tabular.states_at(observation),
                observation=observation,
                episode_return=jnp.zeros(shape),
                episode_length=jnp.zeros(shape, jnp.int32),
                last_return=jnp.zeros(shape),
                last_length=jnp.zeros(shape),
            ),
            action_mask=None,
            distribution=parameters,
            action=executed,
            reward=jnp.zeros(shape),
            task_reward=None,
            terminated=jnp.zeros(shape, bool),
            truncated=jnp.zeros(shape, bool),
            next_observation=None,
        )
        candidate_key, branch_key = jax.random.split(group_key)
        group = propose(config, policy, trajectory, candidate_key)
        wanted = branched(config, 0)
        branches = follow(config, world, policy, state, trajectory, group, wanted, branch_key)
        batch, _ = compare_branches(config, policy, state, trajectory, group, branches, wanted)
        return ascent(config, policy, state, batch)["actor"]["output"]["kernel"]

    gradients = jax.jit(lambda keys: jax.lax.map(draw, keys))(jax.random.split(jax.random.key(4), 200))
    expected = policy_gradient_theorem(mdp, pi, 0.9, np.full(mdp.n_states, 1 / mdp.n_states))
    mean, error = interval(gradients)
    assert np.max(error) < 0.05 * np.max(np.abs(expected))
    np.testing.assert_array_less(np.abs(mean - factor * expected), Z * error + 1e-7)
