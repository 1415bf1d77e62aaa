from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from grpo_jax import GRPOConfig, group_returns, make_policy, spaces
from grpo_jax.noise import as_key, bits_to_uniform, draw_bits, split
from grpo_jax.worlds.base import check_world, example_action
from grpo_jax.worlds.learned import N_MEMBERS, Normaliser, disagreement, untrained

KEY = as_key(jax.random.key(0))
VECTOR = spaces.Box(-np.inf, np.inf, (2,))
ACTIONS = [
    spaces.Discrete(3),
    spaces.MultiDiscrete((2, 3)),
    spaces.MultiBinary(2),
    spaces.Box(-2, 2, (1,)),
    spaces.Box(-np.inf, np.inf, (2, 1)),
]


def scripted(means=(0.0, 0.0, 0.0), spread=0.0, log_variance=-60.0, end_logit=-60.0, **changes):
    """A world whose members all say the same, but for ``spread`` times -2, -1, 0, 1, 2 on every target.

    Targets are the changes of two features (means 1 and 2, deviations 0.5 and 0.25) and, without a reward function, the
    reward (mean 10, deviation 4). Training saw observations from -5 to 5.
    """
    reward_function = changes.pop("reward_function", None)
    world = untrained(VECTOR, spaces.Discrete(3), KEY, reward_function=reward_function, **changes)
    n = world.ensemble.n_targets
    params = jax.tree.map(jnp.zeros_like, world.params)
    bias = np.concatenate([means[:n], np.full(n, log_variance), [end_logit]])
    bias = np.tile(bias, (N_MEMBERS, 1))
    bias[:, :n] += spread * np.arange(-2.0, 3.0)[:, None]
    params["output"]["bias"] = jnp.asarray(bias, jnp.float32)
    params["bounds"] = {
        "low": jnp.full((N_MEMBERS, n), -80.0, jnp.float32),
        "high": jnp.full((N_MEMBERS, n), 80.0, jnp.float32),
    }
    normaliser = Normaliser(
        mean=jnp.zeros(2),
        std=jnp.ones(2),
        target_mean=jnp.array([1.0, 2.0, 10.0])[:n],
        target_std=jnp.array([0.5, 0.25, 4.0])[:n],
        low=jnp.full(2, -5.0, jnp.float32),
        high=jnp.full(2, 5.0, jnp.float32),
    )
    starts = jnp.stack([jnp.arange(256.0), -jnp.arange(256.0)], axis=1)
    return dataclasses.replace(world, params=params, normaliser=normaliser, starts=starts)


@pytest.mark.parametrize(
    "space",
    [
        spaces.Discrete(4),
        spaces.MultiDiscrete((2, 2)),
        spaces.MultiBinary(3),
        spaces.Box(0, 255, (8, 8, 3), "uint8"),
        spaces.Box(0, 1, (4, 4, 1)),
        spaces.Box(0, 255, (128,), "uint8"),
        spaces.Dict((("a", VECTOR),)),
    ],
)
def test_what_is_no_vector_is_refused_and_the_message_names_a_way_out(space):
    with pytest.raises(NotImplementedError, match="observation_space=.*dynamics='clone'"):
        untrained(space, spaces.Discrete(2), KEY)


@pytest.mark.parametrize("action_space", ACTIONS)
@pytest.mark.parametrize("reward_function", [None, lambda s, a, n: jnp.sum(n) - jnp.sum(a)])
def test_it_is_a_world_for_every_action_space(action_space, reward_function):
    check_world(untrained(VECTOR, action_space, KEY, reward_function=reward_function))


def test_a_step_adds_the_mean_of_the_members_in_the_units_of_the_data(compiled):
    world = scripted(means=(1.0, -2.0, 0.5), spread=0.1)
    step = compiled(world.step)(KEY, world.at(jnp.array([-1.0, 0.0])), jnp.int32(1))
    # -1 + 1 + 0.5 * 1; 0 + 2 - 0.25 * 2; 10 + 4 * 0.5
    np.testing.assert_allclose(step.observation, [0.5, 1.5], rtol=1e-5)
    np.testing.assert_allclose(step.reward, 12.0, rtol=1e-5)
    np.testing.assert_array_equal(step.observation, step.state.observation)
    assert not step.terminated and not step.truncated


def test_a_reward_function_is_given_the_predicted_observation():
    world = scripted(reward_function=lambda s, a, n: 100 * s[0] + 10 * a + n[1])
    step = world.step(KEY, world.at(jnp.array([3.0, 0.0])), jnp.int32(2))
    np.testing.assert_allclose(step.reward, 300 + 20 + 2, rtol=1e-5)


def test_the_noise_has_the_predicted_variance_and_comes_from_the_key():
    world = scripted(log_variance=np.log(0.09), means=(0.0, 0.0, 0.0))
    state = world.at(jnp.zeros(2))
    steps = jax.jit(jax.vmap(lambda key: world.step(key, state, jnp.int32(0))))(split(KEY, 10_000))
    np.testing.assert_allclose(jnp.mean(steps.observation, axis=0), [1.0, 2.0], atol=0.007)
    np.testing.assert_allclose(jnp.std(steps.observation, axis=0), [0.15, 0.075], rtol=0.04)
    np.testing.assert_allclose(jnp.std(steps.reward), 1.2, rtol=0.04)
    correlation = np.corrcoef(np.column_stack([steps.observation, steps.reward]).T)
    np.testing.assert_allclose(correlation, np.eye(3), atol=0.04)
    again = world.step(split(KEY, 10_000)[7], state, jnp.int32(0))
    np.testing.assert_allclose(again.observation, steps.observation[7], rtol=1e-5)


def test_ends_are_drawn_with_the_predicted_probability():
    world = scripted(end_logit=np.log(0.2 / 0.8))
    state = world.at(jnp.zeros(2))
    steps = jax.jit(jax.vmap(lambda key: world.step(key, state, jnp.int32(0))))(split(KEY, 10_000))
    np.testing.assert_allclose(jnp.mean(steps.terminated), 0.2, atol=0.015)


def test_disagreement_is_the_spread_of_the_members_and_cuts_where_its_sum_is_too_large():
    # The standard deviation of -2, -1, 0, 1, 2 is sqrt(2).
    world = scripted(spread=0.5, max_uncertainty=2.0)
    apart = disagreement(world.predict(jnp.zeros(2), jnp.int32(0)))
    np.testing.assert_allclose(apart, 0.5 * np.sqrt(2.0), rtol=1e-5)
    state, cut = world.at(jnp.zeros(2)), []
    for _ in range(4):
        step = world.step(KEY, state, jnp.int32(0))
        state = step.state
        cut.append(bool(step.truncated))
    assert cut == [False, False, True, True]  # 0.71, 1.41, 2.12
    np.testing.assert_allclose(state.uncertainty, 4 * 0.5 * np.sqrt(2.0), rtol=1e-5)


@pytest.mark.parametrize("mean", [1e30, -1e30])
def test_predictions_stay_within_the_data_and_are_finite(mean):
    world = scripted(means=(mean, mean, 0.0), log_variance=70.0)
    step = world.step(KEY, world.at(jnp.zeros(2)), jnp.int32(0))
    np.testing.assert_array_equal(step.observation, np.full(2, 5.0 * np.sign(mean)))
    # What is real may lie outside already: it is not pulled back, and goes no further.
    step = world.step(KEY, world.at(jnp.array([9.0, -9.0])), jnp.int32(0))
    expected = [9.0, 5.0] if mean > 0 else [-5.0, -9.0]
    np.testing.assert_array_equal(step.observation, expected)


def test_what_the_members_see():
    observation = jnp.array([4.0, 5.0])
    normaliser = {"mean": jnp.array([2.0, 1.0]), "std": jnp.array([2.0, 8.0])}
    cases = [
        (spaces.Discrete(3), jnp.int32(1), [0, 1, 0]),
        (spaces.MultiDiscrete((2, 3)), jnp.array([1, 2]), [0, 1, 0, 0, 1]),
        (spaces.MultiBinary(2), jnp.array([1, 0]), [1, 0]),
        (spaces.Box(np.array([0, -2]), np.array([4, 2]), (2,)), jnp.array([1.0, 2.0]), [-0.5, 1.0]),
        (spaces.Box(1.0, 1.0, (1,)), jnp.array([1.0]), [-1.0]),
        (spaces.Box(-np.inf, np.inf, (1, 2)), jnp.array([[7.0, 8.0]]), [7.0, 8.0]),
    ]
    for space, action, expected in cases:
        world = untrained(VECTOR, space, KEY)
        world = dataclasses.replace(world, normaliser=world.normaliser.replace(**normaliser))
        np.testing.assert_allclose(world.inputs(observation, action), [1.0, 0.5, *expected])
        many = world.inputs(jnp.tile(observation, (4, 3, 1)), jnp.tile(action, (4, 3, *(1,) * action.ndim)))
        np.testing.assert_allclose(many, np.tile([1.0, 0.5, *expected], (4, 3, 1)))


def test_the_state_of_a_visited_observation_knows_no_time():
    world = untrained(VECTOR, spaces.Discrete(2), KEY)
    observation = np.arange(6.0).reshape(3, 2)
    for state in (world.at(observation), world.at(observation, time=np.arange(3))):
        np.testing.assert_array_equal(state.observation, observation)
        np.testing.assert_array_equal(state.uncertainty, np.zeros(3))


def test_reset_draws_visited_observations():
    world = scripted()
    observations, states = jax.jit(jax.vmap(world.reset))(split(KEY, 500))
    np.testing.assert_array_equal(observations, states.observation)
    np.testing.assert_array_equal(observations[:, 0], -observations[:, 1])
    assert len(np.unique(observations[:, 0])) > 150
    assert np.all(np.isin(observations[:, 0], np.arange(256)))


def test_branches_share_their_noise_and_new_parameters_compile_nothing():
    config = GRPOConfig(n_envs=1)
    policy = make_policy(config, VECTOR, spaces.Discrete(3))
    parameters = jax.jit(policy.init)(KEY)
    n_uniforms = policy.distribution.n_uniforms

    @jax.jit
    def returns(world, observations, actions):
        def act(observation, mask, uniforms):
            return policy.distribution.sample(policy.parameters(parameters, observation, mask), uniforms)

        states = world.at(observations)
        branches = group_returns(
            world, act, KEY, states, actions, horizon=8, gamma=0.9, n_uniforms=n_uniforms
        )
        return branches.returns

    observations = jax.random.normal(KEY, (16, 2))
    same, different = jnp.ones((16, 3), jnp.int32), jnp.tile(jnp.arange(3), (16, 1))
    world = dataclasses.replace(untrained(VECTOR, spaces.Discrete(3), KEY), max_uncertainty=jnp.float32(99.0))
    world = dataclasses.replace(world, normaliser=scripted().normaliser)
    first = returns(world, observations, same)
    np.testing.assert_allclose(first, first[:, :1] + np.zeros(3), rtol=1e-5)
    assert np.ptp(np.asarray(returns(world, observations, different)), axis=1).min() > 0.01
    other = untrained(VECTOR, spaces.Discrete(3), split(KEY, 2)[1])
    assert not np.allclose(returns(other, observations, same), first)
    assert returns._cache_size() == 1


def test_a_branch_ends_where_the_members_disagree():
    # Every step pays 10; the third one passes the threshold and is the last.
    world = scripted(spread=0.5, max_uncertainty=2.0)
    branches = jax.jit(
        lambda states: group_returns(
            world,
            lambda observation, mask, uniforms: jnp.zeros(observation.shape[:-1], jnp.int32),
            KEY,
            states,
            jnp.zeros((2, 3), jnp.int32),
            horizon=8,
            gamma=1.0,
            value=lambda observation: jnp.full(observation.shape[:-1], 1000.0),
        )
    )(world.at(jnp.zeros((2, 2))))
    np.testing.assert_allclose(branches.returns, np.full((2, 3), 1030.0), rtol=1e-5)


def test_actions_of_all_spaces_are_stepped_with_in_the_worlds_units():
    for space in ACTIONS:
        world = untrained(VECTOR, space, KEY)
        step = jax.jit(world.step)(KEY, world.at(jnp.zeros(2)), example_action(space))
        uniform = bits_to_uniform(draw_bits(KEY, (world.ensemble.n_targets + 1,)))[-1]
        logits = world.predict(jnp.zeros(2), example_action(space)).end_logit
        assert bool(step.terminated) == bool(uniform < jnp.mean(jax.nn.sigmoid(logits)))
