"""Action masks: what is forbidden is never done, never followed, and leaves no trace in what is learned."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from toys import Maze

import grpo_jax
from grpo_jax.config import GRPOConfig
from grpo_jax.groups import candidates
from grpo_jax.groups.advantage import BASELINES, SCALES, group_advantages
from grpo_jax.groups.branch import group_returns
from grpo_jax.groups.plan import choose
from grpo_jax.learning.losses import KL_ESTIMATORS, SURROGATES
from grpo_jax.learning.update import init_learner, loss
from grpo_jax.noise import as_key, split
from grpo_jax.policies.distributions import for_space
from grpo_jax.policies.policy import make_policy
from grpo_jax.spaces import Box, Discrete, MultiBinary, MultiDiscrete
from grpo_jax.training.rollout import rollout, start
from grpo_jax.types import Batch

SPACES = [Discrete(4), MultiDiscrete((2, 3))]
TINY = GRPOConfig(
    n_envs=4, n_steps=8, batch_size=16, n_epochs=2, horizon=4, group_size=4, net_arch=(8,), max_grad_norm=10.0
)
RNG = np.random.default_rng(0)


# What a mask allows


@pytest.mark.parametrize("space", [*SPACES, MultiBinary(3)], ids=str)
def test_what_is_allowed(space, compiled):
    distribution = for_space(space)
    actions = distribution.actions()
    mask = RNG.random((20, distribution.n_parameters)) < 0.6
    edges = np.cumsum((0, *space.nvec))[:-1]
    rows = actions.reshape(len(actions), -1)
    expected = np.array([[one[edges + row].all() for row in rows] for one in mask])
    found = compiled(distribution.allows)(jnp.asarray(mask)[:, None], jnp.asarray(actions))
    np.testing.assert_array_equal(found, expected)
    on_host = distribution.allows(mask[:, None], actions)
    assert isinstance(on_host, np.ndarray)
    np.testing.assert_array_equal(on_host, expected)


@pytest.mark.parametrize("space", SPACES, ids=str)
def test_where_nothing_is_allowed_all_is_finite_and_nothing_is_learned(space, compiled):
    distribution = for_space(space)
    logits = jnp.asarray(RNG.normal(size=(3, distribution.n_parameters)), jnp.float32)
    nothing = jnp.zeros(logits.shape, bool)
    actions = jnp.asarray(distribution.actions())

    def numbers(logits):
        masked = distribution.apply_mask(logits, nothing)
        uniforms = jnp.full((3, distribution.n_uniforms), 0.5)
        chosen = distribution.log_prob(masked, distribution.sample(masked, uniforms))
        kl = distribution.kl(masked, masked)
        return distribution.entropy(masked), kl, chosen, distribution.log_prob(masked[:, None], actions)

    jacobian = compiled(jax.jacobian(numbers))(logits)
    for leaf in jax.tree.leaves(jacobian):
        np.testing.assert_array_equal(leaf, 0.0)
    np.testing.assert_allclose(numbers(logits)[3], -np.log(distribution.n_actions), rtol=1e-5)
    group = candidates.enumerate_actions(distribution, logits, actions[:3], nothing)
    assert not np.any(group.valid)


def test_a_box_has_no_mask(key):
    policy = make_policy(TINY, Box(-1, 1, (2,)), Box(-1, 1, (2,)))
    with pytest.raises(ValueError, match="no action of a Box can be forbidden"):
        policy.parameters(policy.init(key), jnp.zeros((1, 2)), jnp.ones((1, 2), bool))


# Rollouts and branches


@functools.partial(jax.jit, static_argnames=("env", "n_steps"))
def roll(env, persistence, n_steps=40):
    policy = make_policy(TINY, env.observation_space, env.action_space)
    key = as_key(jax.random.key(0))
    environments = start(env, split(key, 32))
    return rollout(env, policy, policy.init(key), environments, key, n_steps, True, persistence)[1]


@pytest.mark.parametrize("space", SPACES, ids=str)
@pytest.mark.parametrize("persistence", [None, 0.7, 1.0])
def test_a_rollout_takes_no_forbidden_action(space, persistence):
    env = Maze(space)
    trajectory = roll(env, persistence)
    assert np.isfinite(trajectory.reward).all()
    mask, action = np.asarray(trajectory.action_mask), np.asarray(trajectory.action)
    np.testing.assert_array_equal(mask, env.table()[np.asarray(trajectory.state)[..., 0]])
    distribution = for_space(space)
    assert distribution.allows(mask, action).all()
    assert (np.asarray(trajectory.time)[4] == 4).all()  # none ended its episode early
    if persistence == 1.0:  # held wherever that is allowed, and only there
        can = distribution.allows(mask[1:], action[:-1]) & ~np.asarray(trajectory.ended)[:-1]
        same = (action[1:] == action[:-1]).reshape(*can.shape, -1).all(axis=-1)
        assert same[can].all() and can.any()
        assert (~can & ~np.asarray(trajectory.ended)[:-1]).any()


def first_allowed(env):
    """A policy of no network: the first category of each factor that is allowed, and which it is by hand."""
    distribution = for_space(env.action_space)

    def act(observation, mask, uniforms):
        return distribution.mode(distribution.apply_mask(jnp.zeros(mask.shape), mask))

    def by_hand(mask):
        parts = np.split(mask, np.cumsum(env.action_space.nvec)[:-1])
        return np.array([np.argmax(part) for part in parts]).reshape(env.action_space.shape)

    return act, by_hand


@functools.partial(jax.jit, static_argnames=("env", "persistence"))
def follow(env, states, actions, alive, persistence):
    act, _ = first_allowed(env)
    n_uniforms = for_space(env.action_space).n_uniforms
    return group_returns(
        env,
        act,
        jax.random.key(0),
        states,
        actions,
        horizon=4,
        gamma=0.9,
        n_uniforms=n_uniforms,
        persistence=persistence,
        alive=alive,
    )


@pytest.mark.parametrize("space", SPACES, ids=str)
@pytest.mark.parametrize("persistence", [None, 1.0])
def test_branches_follow_what_is_allowed(space, persistence):
    """By hand, in NumPy; a forbidden candidate is not stepped, and a forbidden action is not held."""
    env, distribution = Maze(space), for_space(space)
    _, choice = first_allowed(env)
    table, everything = env.table(), distribution.actions()
    rooms = np.arange(Maze.N_ROOMS)
    states = jnp.stack([jnp.asarray(rooms), rooms % 3], axis=1)
    valid = distribution.allows(table[rooms][:, None], everything)
    expected, n_steps, n_held = np.zeros(valid.shape), 0, 0
    for b, g in zip(*np.nonzero(valid), strict=True):
        room, time, action = rooms[b], rooms[b] % 3, everything[g]
        for k in range(4):
            index = int(distribution.index(jnp.asarray(action)))
            room, time = (3 * room + index + 1) % Maze.N_ROOMS, time + 1
            expected[b, g] += 0.9**k * (index + 1) * (room + 1)
            n_steps += 1
            if time >= env.limit:
                break
            is_held = persistence is not None and bool(distribution.allows(table[room], action))
            n_held += is_held
            action = action if is_held else choice(table[room])
    found = follow(env, states, jnp.broadcast_to(everything, (6, *everything.shape)), valid, persistence)
    np.testing.assert_allclose(found.returns, expected, rtol=1e-5)
    assert grpo_jax.count(found.simulator_steps) == n_steps
    assert persistence is None or 0 < n_held < n_steps - valid.sum()


# What is learned


@pytest.mark.parametrize("baseline", sorted(BASELINES))
@pytest.mark.parametrize("scale", sorted(SCALES))
def test_a_group_is_that_of_its_allowed_candidates(baseline, scale):
    """Whatever stands where a candidate is forbidden: the others' advantages are those of a group without it."""
    n_states, n_group = 12, 5
    keep = np.array([0, 2, 3])  # of every state, so that the group without the others is an array
    valid = np.broadcast_to(np.isin(np.arange(n_group), keep), (n_states, n_group))
    returns = RNG.normal(size=(n_states, n_group)).astype(np.float32)
    returns[:, 1], returns[:, 4] = np.nan, 1e30
    weights = RNG.random((n_states, 3)).astype(np.float32)
    weights /= weights.sum(axis=1, keepdims=True)
    all_weights = np.zeros((n_states, n_group), np.float32)
    all_weights[:, keep] = weights
    executed = np.array([0, 2, 3] * 4)
    run = functools.partial(group_advantages, baseline=baseline, scale=scale)
    found = run(*map(jnp.asarray, (returns, all_weights, valid, executed)))
    alone = run(
        *map(
            jnp.asarray,
            (returns[:, keep], weights, np.ones((n_states, 3), bool), np.searchsorted(keep, executed)),
        )
    )
    np.testing.assert_allclose(found.advantage[:, keep], alone.advantage, rtol=2e-5, atol=1e-6)
    np.testing.assert_array_equal(np.asarray(found.advantage)[~valid], 0.0)
    np.testing.assert_allclose(found.spread, alone.spread, rtol=1e-5)
    assert np.all(found.active) and np.all(alone.active)


def masked_batch(config, space, kind):
    """A policy, its learner, and a batch ``[32]`` of rooms, whose candidates are of a kind."""
    env, distribution = Maze(space), for_space(space)
    policy = make_policy(config, env.observation_space, space)
    learner = init_learner(config, policy, jax.random.key(1))
    rooms = np.arange(32) % Maze.N_ROOMS
    mask, observation = jnp.asarray(env.table()[rooms]), jax.nn.one_hot(rooms, Maze.N_ROOMS)
    parameters = policy.parameters(learner.policy, observation, mask)
    uniforms = jnp.asarray(RNG.random((32, 4, distribution.n_uniforms)), jnp.float32)
    executed = distribution.sample(parameters, uniforms[:, 0])
    if kind == "enumerate":
        group = candidates.enumerate_actions(distribution, parameters, executed, mask)
    else:
        group = candidates.sample_actions(distribution, parameters, executed, uniforms[:, 1:])
    returns = jnp.asarray(RNG.normal(size=group.valid.shape), jnp.float32)
    advantages = group_advantages(
        jnp.where(group.valid, returns, jnp.nan), jnp.exp(group.log_weight), group.valid, group.executed
    )
    everywhere = jnp.ones(32, bool)
    batch = Batch(
        observation=observation,
        action_mask=mask,
        group=group,
        advantage=advantages.advantage,
        active=advantages.active,
        alive=everywhere,
        compared=everywhere,
        distribution=parameters,
    )
    reference = jax.tree.map(
        lambda leaf: leaf + 0.1 * jnp.sin(jnp.arange(leaf.size).reshape(leaf.shape)), learner.policy
    )
    return policy, learner, batch.replace(reference=policy.parameters(reference, observation, mask))


@functools.partial(jax.jit, static_argnums=(0, 1))
def gradient_of_logits(config, policy, state, batch):
    """d loss / d logits of the batch: what the loss reads of them is put in the place of the network's output."""

    class Given:
        distribution = policy.distribution

        def parameters(self, logits, observation, mask):
            return policy.distribution.apply_mask(logits.params, mask)

    logits = policy.parameters(state, batch.observation)
    carrier = state.replace(params=logits)
    return jax.value_and_grad(lambda one: loss(one, config, Given(), carrier, batch, 0.2, 0.2)[0])(logits)


CASES = [
    *itertools.product(["enumerate", "sample"], sorted(SURROGATES), ["exact"]),
    *itertools.product(["enumerate"], ["ppo"], sorted(set(KL_ESTIMATORS) - {"exact"})),
]


@pytest.mark.parametrize("space", SPACES, ids=str)
@pytest.mark.parametrize(("kind", "surrogate", "estimator"), CASES)
def test_a_forbidden_action_has_no_gradient(space, kind, surrogate, estimator):
    config = TINY.replace(
        surrogate=surrogate, kl_coef=0.3, kl_estimator=estimator, ent_coef=0.1, bootstrap=False
    )
    policy, learner, batch = masked_batch(config, space, kind)
    assert (
        policy.distribution.allows(batch.action_mask, batch.group.action[:, 0]).all() or kind == "enumerate"
    )
    value, gradient = gradient_of_logits(config, policy, learner.policy, batch)
    mask, gradient = np.asarray(batch.action_mask), np.asarray(gradient)
    assert np.isfinite(value) and np.isfinite(gradient).all()
    np.testing.assert_array_equal(gradient[~mask], 0.0)
    assert np.abs(gradient[mask]).max() > 1e-4
    only_one = np.asarray(Maze(space).table()[np.arange(32) % Maze.N_ROOMS].sum(axis=1) == len(space.nvec))
    np.testing.assert_allclose(gradient[only_one], 0.0, atol=1e-6)


REGIMES = [
    {"candidates": "enumerate"},
    {"candidates": "enumerate", "persistence": 0.5, "baseline": "mean", "kl_coef": 0.1},
    {"candidates": "sample", "persistence": 0.5, "n_rollouts": 2},
    {"candidates": "enumerate", "bootstrap": True, "branch_every": 2},
    {"candidates": "episodes", "bootstrap": True, "kl_coef": 0.1},
    {"candidates": "trajectory", "baseline": "mean"},
]


@pytest.mark.parametrize(
    ("space", "changes"), list(zip(SPACES * 3, REGIMES, strict=True)), ids=lambda value: str(value)[:40]
)
def test_whole_runs_stay_within_what_is_allowed(space, changes):
    config, env = TINY.replace(**changes), Maze(space)
    result = grpo_jax.train(config, env, jax.random.key(0), 32 * 6)
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves((result.state.params, result.metrics)))
    np.testing.assert_array_equal(result.metrics["nonfinite_updates"], 0)
    np.testing.assert_array_equal(result.metrics["episode_length"][1:], env.limit)
    for deterministic, plan in [(True, None), (False, None), (False, grpo_jax.Plan(horizon=2, n_rollouts=2))]:
        returns = grpo_jax.evaluate(
            result.state, env, jax.random.key(1), 16, deterministic=deterministic, plan=plan
        )
        assert np.isfinite(returns).all()


# Acting by comparison


def test_a_plan_never_chooses_what_is_forbidden(compiled):
    returns = jnp.asarray(RNG.normal(size=(50, 4, 5)), jnp.float32)
    valid = RNG.random((50, 5)) < 0.5
    own = RNG.integers(0, 5, 50)
    valid[np.arange(50), own] = True
    valid[0] = False  # nothing is allowed: what the policy has chosen is kept
    poisoned = jnp.where(valid[:, None], returns, jnp.nan)
    chosen = np.asarray(compiled(choose)(poisoned, jnp.asarray(valid), jnp.asarray(own), 0.1))
    assert valid[np.arange(1, 50), chosen[1:]].all() and chosen[0] == own[0]
    clean = compiled(choose)(
        jnp.where(valid[:, None], returns, 0.0), jnp.asarray(valid), jnp.asarray(own), 0.1
    )
    np.testing.assert_array_equal(chosen, clean)
    assert (chosen != own).any()
