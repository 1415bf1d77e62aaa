import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from toys import Line, MaskedLine

import grpo_jax
from grpo_jax import counter
from grpo_jax.groups.branch import Branches
from grpo_jax.groups.compare import branched, propose
from grpo_jax.noise import split
from grpo_jax.spaces import Box, Discrete, MultiBinary, MultiDiscrete
from grpo_jax.training import loop, train

TINY = grpo_jax.GRPOConfig(n_envs=4, n_steps=8, batch_size=16, n_epochs=2, horizon=24, learning_rate=1e-2)


def learn(config, world, state, trajectory, evaluated=None):
    """What an iteration does behind ``collect``."""
    return loop.improve(config, state, loop.compare(config, world, state, trajectory, 0.0, evaluated), 0.0)


jitted_learn = jax.jit(learn)
jitted_init, jitted_iteration = jax.jit(loop.init), jax.jit(grpo_jax.iteration)
jitted_collect = jax.jit(loop.collect, static_argnames="keep_next_observation")


@pytest.fixture(scope="module")
def cartpole():
    return grpo_jax.make("CartPole-v1")


def test_same_key_gives_the_same_numbers_bit_for_bit_and_another_key_others(cartpole):
    first = grpo_jax.train(TINY, cartpole, jax.random.key(3), 64)
    second = grpo_jax.train(TINY, cartpole, jax.random.key(3), 64)
    other = grpo_jax.train(TINY, cartpole, jax.random.key(4), 64)
    chex.assert_trees_all_equal(first.state.params, second.state.params)
    chex.assert_trees_all_equal(first.metrics, second.metrics)
    different = jax.tree.map(lambda a, b: bool(jnp.any(a != b)), first.state.params, other.state.params)
    assert different["actor"]["output"]["kernel"]


def test_legacy_keys_mean_the_same_run(cartpole):
    typed = grpo_jax.train(TINY, cartpole, jax.random.key(3), 64)
    legacy = grpo_jax.train(TINY, cartpole, jax.random.PRNGKey(3), 64)
    chex.assert_trees_all_equal(typed.state.params, legacy.state.params)


def test_one_trace_serves_all_keys_all_traced_settings_and_all_worlds_of_one_id(cartpole):
    grpo_jax.train(TINY, cartpole, jax.random.key(0), 64)
    before = train._train_jitted.alone._cache_size()
    for seed, rate in enumerate((1e-3, 2e-3, 3e-3)):
        config, world = TINY.replace(learning_rate=rate, gamma=0.9 + rate), grpo_jax.make("CartPole-v1")
        grpo_jax.train(config, world, jax.random.key(seed), 64)
    assert train._train_jitted.alone._cache_size() == before
    grpo_jax.train(TINY.replace(n_epochs=1), cartpole, jax.random.key(0), 32)
    assert train._train_jitted.alone._cache_size() == before + 1


def test_vmap_over_keys_is_a_loop_over_keys(cartpole):
    keys = jax.random.split(jax.random.key(0), 3)
    together = jax.jit(jax.vmap(lambda key: grpo_jax.train(TINY, cartpole, key, 64)))(keys)
    for i, key in enumerate(keys):
        alone = grpo_jax.train(TINY, cartpole, key, 64)
        for name in ("episode_return", "simulator_steps", "entropy"):
            np.testing.assert_allclose(together.metrics[name][i], alone.metrics[name], rtol=2e-4)


def test_vmap_over_traced_settings_is_a_loop_over_them(cartpole):
    rates = jnp.array([1e-3, 3e-2])

    @jax.jit
    @jax.vmap
    def train(rate):
        return grpo_jax.train(TINY.replace(learning_rate=rate), cartpole, jax.random.key(0), 64)

    together = train(rates)
    for i, rate in enumerate(rates):
        alone = grpo_jax.train(TINY.replace(learning_rate=float(rate)), cartpole, jax.random.key(0), 64)
        np.testing.assert_allclose(together.metrics["entropy"][i], alone.metrics["entropy"], rtol=2e-4)
    assert together.metrics["entropy"][0, -1] != together.metrics["entropy"][1, -1]


def test_total_timesteps_are_rounded_up_and_counted(cartpole):
    result = grpo_jax.train(TINY, cartpole, jax.random.key(0), 33)
    assert result.metrics["episode_return"].shape == (2,)
    assert grpo_jax.count(result.state.decision_steps) == 64
    assert grpo_jax.count(result.state.simulator_steps) == int(result.metrics["simulator_steps"][-1])
    assert 2 * 64 <= grpo_jax.count(result.state.simulator_steps) <= 2 * 64 * TINY.horizon


@pytest.mark.parametrize(
    "total", [0, -5, 1.5, True, np.bool_(True), np.nan, np.inf, "64", None], ids=lambda total: repr(total)
)
def test_total_timesteps_must_be_a_positive_integer(cartpole, total):
    with pytest.raises(ValueError, match="total_timesteps"):
        grpo_jax.train(TINY, cartpole, jax.random.key(0), total)


def test_training_goes_on_from_a_state(cartpole):
    state = grpo_jax.train(TINY, cartpole, jax.random.key(0), 64).state
    more = grpo_jax.train(TINY, cartpole, jax.random.key(9), 32, state=state)
    assert int(more.state.iteration) == 3
    assert grpo_jax.count(more.state.decision_steps) == 96


SPACES = [Discrete(2), MultiDiscrete((2, 3)), MultiBinary(3), Box(-np.ones(2), np.ones(2), (2,))]


@pytest.mark.parametrize(
    ("space", "bootstrap"),
    list(zip(SPACES, [True, False, True, False], strict=True)),
    ids=lambda value: str(value) if isinstance(value, bool) else type(value).__name__,
)
def test_every_action_space_learns_to_walk(space, bootstrap):
    env = Line(space)
    config = TINY.replace(
        n_steps=16, batch_size=32, bootstrap=bootstrap, horizon=2 if bootstrap else 6, group_size=4
    )
    result = grpo_jax.train(config, env, jax.random.key(0), 64 * 25)
    assert set(result.state.params) == ({"actor", "critic"} if bootstrap else {"actor"})
    # The best return is 1 + 2 + 3 + 4 for walking all the time, or more for waiting at 3: 3 + 3 + ...; standing
    # still earns nothing.
    first, last = result.metrics["episode_return"][jnp.array([2, -1])]
    assert last > 10 and last > first


def test_masked_actions_are_neither_drawn_nor_branched(cartpole):
    config = TINY.replace(baseline="mean")
    with pytest.warns(grpo_jax.NoSpreadWarning):
        result = grpo_jax.train(config, MaskedLine(Discrete(2)), jax.random.key(0), 64)
    np.testing.assert_array_equal(result.metrics["episode_length"], 4.0)
    # One valid candidate has nothing to be compared with.
    np.testing.assert_array_equal(result.metrics["frac_zero_std"], 1.0)
    np.testing.assert_allclose(result.metrics["entropy"], 0.0, atol=1e-6)


@pytest.mark.parametrize("form", ["outcome", "process"])
def test_trajectory_groups_learn_without_a_world_to_branch_in(form):
    config = TINY.replace(
        candidates="trajectory", trajectory_form=form, n_steps=10, batch_size=40, group_size=4, n_envs=16
    ).replace(batch_size=40)
    result = grpo_jax.train(config, Line(Discrete(2)), jax.random.key(0), 160 * 30)
    assert grpo_jax.count(result.state.simulator_steps) == 0
    assert grpo_jax.count(result.state.decision_steps) <= 160 * 30
    assert result.metrics["episode_return"][-1] > result.metrics["episode_return"][0]


def test_environments_of_a_trajectory_group_start_in_the_same_state(cartpole):
    config = TINY.replace(candidates="trajectory", group_size=2, baseline="mean")
    state = jitted_init(config, cartpole, jax.random.key(0))
    restarted = jax.jit(loop._restart_groups)(config, cartpole, state.environments, state.key)
    x = np.asarray(restarted.observation)
    np.testing.assert_array_equal(x[0::2], x[1::2])
    assert not np.array_equal(x[0], x[2])


def test_enumerating_a_box_is_refused():
    with pytest.raises(ValueError, match="candidates='enumerate'"):
        grpo_jax.init(TINY.replace(candidates="enumerate"), grpo_jax.make("Pendulum-v1"), jax.random.key(0))


def test_enumerating_too_many_actions_is_refused():
    with pytest.raises(ValueError, match="max_enumerated=64"):
        grpo_jax.init(TINY.replace(candidates="enumerate"), Line(MultiBinary(10)), jax.random.key(0))


def test_a_reward_that_becomes_nan_raises_and_leaves_the_parameters_finite(cartpole):
    def sometimes_nan(state, action, next_state):
        del state, action
        return jnp.where(jnp.abs(next_state[2]) < 0.1, 1.0, jnp.nan)

    env = grpo_jax.make("CartPole-v1", reward_function=sometimes_nan)
    with pytest.raises(FloatingPointError, match="reward_function"):
        grpo_jax.train(TINY.replace(horizon=30), env, jax.random.key(0), 64)
    pure = train._train_jitted(
        TINY.replace(horizon=30), env, grpo_jax.noise.as_key(jax.random.key(0)), None, 2, False, False
    )
    assert float(pure.metrics["nonfinite_groups"].sum()) > 0
    assert all(bool(jnp.all(jnp.isfinite(leaf))) for leaf in jax.tree.leaves(pure.state.params))


def test_a_reward_function_replaces_what_is_learned_but_not_the_statistics():
    def left(state, action, next_state):
        del state, action
        return -next_state[0]

    env = grpo_jax.make(Line(Discrete(2)), reward_function=left)
    result = grpo_jax.train(TINY, env, jax.random.key(0), 32 * 40)
    # The policy learned to stand still; the statistics show the line's own reward going to 0.
    assert result.metrics["episode_return"][-1] < 3.0
    assert result.metrics["episode_length"][-1] == 10.0


def test_a_group_whose_candidates_differ_only_later_needs_a_horizon(cartpole):
    with pytest.warns(grpo_jax.NoSpreadWarning, match=r"100.0% of the groups.*horizon=1 .*Raise horizon"):
        short = grpo_jax.train(TINY.replace(horizon=1), cartpole, jax.random.key(0), 64)
    np.testing.assert_array_equal(short.metrics["frac_zero_std"], 1.0)
    np.testing.assert_array_equal(short.metrics["policy_loss"], 0.0)


@pytest.mark.parametrize(
    "changes",
    [
        {"surrogate": "cispo", "baseline": "leave_one_out", "candidates": "sample"},
        {"surrogate": "sapo", "n_rollouts": 2, "backup": "max", "common_random_numbers": False},
        {"surrogate": "tpo", "normalize_observations": True, "target_kl": 0.01, "ent_coef": 0.01},
        {"dual_clip": 3.0, "clip_range_high": 0.28, "baseline": "shrinkage", "advantage_scale": "group"},
        {"kl_coef": 0.1, "reference": "periodic", "reference_interval": 1, "kl_estimator": "k3"},
        {"kl_coef": 0.1, "reference": "ema", "baseline": "executed"},
    ],
    ids=lambda changes: "-".join(f"{name}={value}" for name, value in changes.items()),
)
def test_every_choice_runs_and_stays_finite(changes):
    result = grpo_jax.train(TINY.replace(**changes), Line(Discrete(2)), jax.random.key(0), 32 * 30)
    assert result.metrics["episode_return"][-1] > 10
    assert all(np.isfinite(value).all() for name, value in result.metrics.items() if "episode" not in name)


def test_cartpole_is_solved_within_20_000_decision_steps_by_nine_seeds_of_ten(cartpole):
    config, n = grpo_jax.preset("CartPole-v1"), grpo_jax.preset_timesteps("CartPole-v1")
    keys = jax.random.split(jax.random.key(0), 10)

    @jax.jit
    @jax.vmap
    def score(key):
        result = grpo_jax.train(config, cartpole, key, n)
        returns = grpo_jax.evaluate(result.state, cartpole, jax.random.fold_in(key, 1), 128)
        return jnp.mean(returns), result.metrics["decision_steps"][-1]

    returns, decision_steps = score(keys)
    assert np.max(decision_steps) <= 20_000
    assert np.sum(np.asarray(returns) >= 475) >= 9, f"sampled policy, 128 episodes: {returns}"


def test_what_is_no_world_or_no_config_is_refused(cartpole):
    with pytest.raises(TypeError, match=r"env='CartPole-v1' must be a World; grpo_jax.make"):
        grpo_jax.init(TINY, "CartPole-v1", jax.random.key(0))
    with pytest.raises(TypeError, match="must be a GRPOConfig"):
        grpo_jax.init({"n_envs": 4}, cartpole, jax.random.key(0))


def test_swapped_arguments_are_named(cartpole):
    for function in (grpo_jax.train, grpo_jax.run):
        with pytest.raises(TypeError, match="config and env are swapped"):
            function(cartpole, TINY, jax.random.key(0), 64)
        with pytest.raises(TypeError, match="env='CartPole-v1' must be a World"):
            function(TINY, "CartPole-v1", jax.random.key(0), 64)
    with pytest.raises(TypeError, match="config and env are swapped"):
        grpo_jax.init(cartpole, TINY, jax.random.key(0))
    with pytest.raises(TypeError, match="state=.*World and env=TrainState must be a TrainState and a World"):
        grpo_jax.evaluate(cartpole, grpo_jax.init(TINY, cartpole, jax.random.key(0)), jax.random.key(0))


def test_branching_needs_a_world(cartpole):
    state = jitted_init(TINY, cartpole, jax.random.key(0))
    _, trajectory = jitted_collect(TINY, cartpole, state, keep_next_observation=False)
    with pytest.raises(ValueError, match="candidates='auto' needs a world to branch in"):
        loop.compare(TINY, None, state, trajectory)


def test_an_iteration_collects_compares_and_improves(cartpole):
    state = jitted_init(TINY, cartpole, jax.random.key(0))
    whole, metrics = jitted_iteration(TINY, cartpole, state, 10)

    @jax.jit
    def in_two(state):
        collected, trajectory = jitted_collect(TINY, cartpole, state, keep_next_observation=True)
        bare = trajectory.replace(distribution=None)  # computed anew, from the same parameters
        return learn(TINY, cartpole, collected, bare)

    halves, learned = in_two(state)
    chex.assert_trees_all_close(whole.params, halves.params, rtol=1e-5, atol=1e-6)
    chex.assert_trees_all_equal(jax.random.key_data(whole.key), jax.random.key_data(halves.key))
    np.testing.assert_allclose(metrics["policy_loss"], learned["policy_loss"], rtol=1e-4, atol=1e-6)


def test_branched_states_take_turns():
    config = TINY.replace(branch_every=4)
    masks = np.array([branched(config, k) for k in range(8)]).reshape(8, 8, 4)
    np.testing.assert_array_equal(masks[:4].sum(axis=0), 1)  # every state once in four iterations
    np.testing.assert_array_equal(masks[4:], masks[:4])
    np.testing.assert_array_equal(masks.sum(axis=1), 2)  # in each iteration, as many of each environment
    assert np.all(branched(TINY, 3))


def test_a_quarter_of_the_states_costs_a_quarter_of_the_simulator_steps():
    """Pendulum never terminates; the critic learns from every state, the actor from those that were branched."""
    world = grpo_jax.make("Pendulum-v1")
    config = TINY.replace(branch_every=4, horizon=6, group_size=3, bootstrap=True, n_epochs=1, batch_size=32)
    state = jitted_init(config, world, jax.random.key(0))
    state, trajectory = jitted_collect(config, world, state, keep_next_observation=True)
    after, metrics = jitted_learn(config, world, state, trajectory)
    assert grpo_jax.count(after.simulator_steps) == config.n_states // 4 * 3 * 6
    assert grpo_jax.count(after.decision_steps) == config.n_states
    assert metrics["frac_zero_std"] == 0.0 and metrics["group_spread"] > 0.0

    # What is said of the other states' candidates changes nothing.
    wanted = branched(config, 0)
    key, _ = split(loop.iteration_keys(state.key).groups, 2)
    group = propose(config, state.policy, trajectory, key)
    branches = Branches(jnp.where(wanted[:, None], 1.0, 1e6) * jnp.arange(3.0), counter.zero())
    told, _ = jitted_learn(config, None, state, trajectory, (group, branches))
    garbage = branches.replace(returns=jnp.where(wanted[:, None], branches.returns, -7.0))
    other, _ = jitted_learn(config, None, state, trajectory, (group, garbage))
    chex.assert_trees_all_equal(told.params, other.params)
    assert metrics["value_loss"] > 0.0


def test_branch_every_must_divide_the_rollout():
    with pytest.raises(ValueError, match="branch_every=3 must divide n_steps=8"):
        TINY.replace(branch_every=3)


EPISODES = TINY.replace(candidates="episodes", n_envs=4, n_steps=64, batch_size=64, baseline="mean")


def test_episode_groups_need_no_world():
    """Episodes of 4 to 10 steps: only those that end within the rollout are learned from, every step is counted."""
    world = Line(Discrete(2))
    state = jitted_init(EPISODES, world, jax.random.key(0))
    state, trajectory = jitted_collect(EPISODES, world, state, keep_next_observation=False)
    after, metrics = jitted_learn(EPISODES, None, state, trajectory)
    assert grpo_jax.count(after.decision_steps) == EPISODES.n_states
    assert grpo_jax.count(after.simulator_steps) == 0
    assert metrics["frac_zero_std"] < 0.5
    different = jax.tree.map(lambda a, b: bool(jnp.any(a != b)), state.params, after.params)
    assert different["actor"]["output"]["kernel"]


def test_no_episode_that_ends_leaves_the_policy_as_it_is():
    config = EPISODES.replace(n_steps=3, batch_size=12)
    _, metrics = jitted_iteration(
        config, Line(Discrete(2)), jitted_init(config, Line(Discrete(2)), jax.random.key(0)), 1
    )
    assert metrics["frac_zero_std"] == 1.0
    assert metrics["grad_norm"] == 0.0
    with pytest.warns(
        grpo_jax.NoSpreadWarning, match="n_envs=4 times n_steps=3 must hold several whole episodes"
    ):
        grpo_jax.train(config, Line(Discrete(2)), jax.random.key(0), 12)


def test_with_a_critic_cut_episodes_teach_too():
    config = EPISODES.replace(n_steps=3, batch_size=12, bootstrap=True)
    _, metrics = jitted_iteration(
        config, Line(Discrete(2)), jitted_init(config, Line(Discrete(2)), jax.random.key(0)), 1
    )
    assert metrics["frac_zero_std"] < 1e-6
    assert metrics["grad_norm"] > 0.0
    assert metrics["explained_variance"] <= 1.0


@pytest.mark.parametrize("n_envs", [8, 6])
def test_only_the_states_that_are_branched_are_kept(n_envs, key):
    config = TINY.replace(n_envs=n_envs, branch_every=4, horizon=3, batch_size=n_envs)
    world = Line(Discrete(2), goal=3, limit=5)
    collect = jax.jit(loop.collect, static_argnames=("keep_next_observation", "keep_states"))
    compare = jax.jit(loop.compare)
    start = loop.init(config, world, key)
    for iteration in range(3):
        state = start.replace(iteration=jnp.int32(iteration))
        _, whole = collect(config, world, state, keep_next_observation=False)
        _, kept = collect(config, world, state, keep_next_observation=False, keep_states=False)
        assert kept.state is None
        assert kept.branched.shape == (config.n_steps, 2, 2)
        chex.assert_trees_all_equal(compare(config, world, state, kept), compare(config, world, state, whole))


def test_no_states_are_kept_where_nothing_is_branched(key):
    config = TINY.replace(candidates="episodes")
    world = Line(Discrete(2))
    state = loop.init(config, world, key)
    _, kept = loop.collect(config, world, state, keep_next_observation=False, keep_states=False)
    assert kept.state is None
    assert not jax.tree.leaves(kept.branched)
