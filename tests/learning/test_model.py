from __future__ import annotations

import dataclasses
import functools
import math

import gymnasium
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from grpo_jax import GRPOConfig, group_returns, init, make, spaces
from grpo_jax.learning import model as learned
from grpo_jax.learning.model import Transitions
from grpo_jax.noise import as_key, split
from grpo_jax.training import loop
from grpo_jax.worlds.learned import MAX_UNCERTAINTY

KEY = as_key(jax.random.key(0))
VECTOR = spaces.Box(-np.inf, np.inf, (2,))
PUSH = spaces.Box(-2, 2, (1,))


reset = jax.jit(lambda world: world.reset(KEY))
push = jax.jit(lambda world, state: world.step(KEY, state, jnp.ones(1)))


def upright(state, action, next_state):
    return 1.0 - jnp.abs(next_state[2]) - 0.1 * jnp.abs(next_state[0])


def numbered(first, n):
    """Transitions whose numbers tell them apart."""
    numbers = np.arange(first, first + n, dtype=np.float32)
    observation = np.stack([numbers, -numbers], axis=1)
    return Transitions(
        observation, numbers[:, None], 10 * numbers, observation + 1, numbers % 2 == 0, numbers < 0
    )


def oscillator(n, seed, n_envs=1):
    """Random actions on a linear oscillator ``[T, N]``; it ends beyond 0.6 and pays minus the square."""
    rng = np.random.default_rng(seed)
    x = rng.uniform(-1, 1, (n_envs, 2))
    rows = []
    for _ in range(n):
        action = rng.uniform(-2, 2, (n_envs, 1))
        velocity = 0.95 * x[:, 1] - 0.2 * x[:, 0] + 0.1 * action[:, 0]
        reached = np.stack([x[:, 0] + 0.2 * velocity, velocity], axis=1)
        ended = np.abs(reached[:, 0]) > 0.6
        rows.append((x, action, -np.square(reached[:, 0]), reached, ended, np.zeros(n_envs, bool)))
        x = np.where(ended[:, None], rng.uniform(-0.5, 0.5, (n_envs, 2)), reached)
    columns = [np.stack(column) for column in zip(*rows, strict=True)]
    return Transitions(*(c.astype(np.float32) if c.dtype == np.float64 else c for c in columns))


def test_the_replay_keeps_the_newest_and_counts():
    replay = learned.init_model(VECTOR, PUSH, KEY, capacity=5).replay
    for first, n, expected in ((0, 3, [0, 1, 2]), (3, 4, [2, 3, 4, 5, 6]), (7, 1, [3, 4, 5, 6, 7])):
        replay = learned.remember(replay, numbered(first, n))
        assert int(replay.count) == len(expected)
        held = replay.data.reward[: len(expected)]
        np.testing.assert_array_equal(np.sort(held), 10 * np.array(expected))
    assert int(replay.n_seen) == 8
    data = replay.data
    np.testing.assert_array_equal(data.observation[:, 0] * 10, data.reward)
    np.testing.assert_array_equal(data.next_observation, data.observation + 1)
    np.testing.assert_array_equal(data.action[:, 0] * 10, data.reward)
    np.testing.assert_array_equal(data.terminated, (data.reward / 10) % 2 == 0)


def test_the_replay_flattens_rollouts_and_leaves_out_what_is_not_finite():
    replay = learned.init_model(VECTOR, PUSH, KEY, capacity=20).replay
    rollout = jax.tree.map(lambda leaf: leaf.reshape(4, 3, *leaf.shape[1:]), numbered(0, 12))
    rollout.reward[1, 2] = np.nan  # 5
    rollout.observation[2, 0, 1] = np.inf  # 6
    rollout.next_observation[3, 2, 0] = 1e30  # 11
    replay = learned.remember(replay, rollout)
    assert int(replay.count) == 9
    expected = 10 * np.array([0, 1, 2, 3, 4, 7, 8, 9, 10])
    np.testing.assert_array_equal(replay.data.reward[:9], expected)
    assert np.all(np.isfinite(replay.data.observation))


def test_what_cannot_be_is_refused():
    with pytest.raises(ValueError, match="capacity=0"):
        learned.init_model(VECTOR, PUSH, KEY, capacity=0)
    with pytest.raises(ValueError, match="6 transitions at once are more than capacity=5"):
        learned.remember(learned.init_model(VECTOR, PUSH, KEY, capacity=5).replay, numbered(0, 6))
    config, world = GRPOConfig(n_envs=1, n_steps=2), make("CartPole-v1")
    state = jax.jit(init)(config, world, KEY)
    collect = jax.jit(functools.partial(loop.collect, keep_next_observation=False))
    _, trajectory = collect(config, world, state)
    with pytest.raises(ValueError, match="keep_next_observation=True"):
        learned.transitions_of(state.policy, trajectory)


def test_fits_learn_a_known_system_with_one_program():
    model = learned.init_model(VECTOR, PUSH, KEY, capacity=3000)
    test = oscillator(128, seed=99, n_envs=8)
    before = learned.measure(model.world, test, 10)
    assert not learned.usable(before) and float(before["error"]) > 0.8
    compiled = learned.fit._cache_size()
    losses = []
    for i in range(6):
        model = model.replace(replay=learned.remember(model.replay, oscillator(200, seed=i)))
        model, metrics = learned.fit(model, jax.random.fold_in(KEY, i))
        losses.append(float(metrics["loss"]))
        assert float(metrics["steps"]) <= learned.MAX_STEPS
    assert learned.fit._cache_size() == compiled + 1
    assert losses[-1] < losses[0]
    after = learned.measure(model.world, test, 10)
    assert learned.usable(after)
    assert float(after["one_step_error"]) < 0.05
    assert float(after["h_step_error"]) < 0.1
    assert float(after["reward_error"]) < 0.15
    assert float(after["end_error"]) < 0.75 and float(after["end_recall"]) > 0.3
    assert float(after["end_false_alarms"]) < 0.02
    assert float(after["disagreement"]) < 0.1 and float(after["cut"]) == 0.0
    # reset draws from what was seen, and predictions stay near it.
    seen = model.replay.data.observation[: int(model.replay.count)]
    assert np.all(np.isin(model.world.starts, seen))
    spread = np.ptp(seen[:, 1])
    assert 0.0 < float(model.world.normaliser.high[1]) - seen[:, 1].max() < 0.2 * spread


def test_a_fit_ends_where_nothing_is_gained_and_never_leaves_the_best():
    model = learned.init_model(VECTOR, PUSH, KEY, capacity=3000)
    model = model.replace(replay=learned.remember(model.replay, oscillator(100, seed=1)))
    losses, steps = [], []
    for i in range(3):
        model, metrics = learned.fit(model, jax.random.fold_in(KEY, i), 3000)
        losses.append(float(metrics["loss"]))
        steps.append(float(metrics["steps"]))
    # The same data again: what was held out is the same, so its loss can only fall.
    assert losses[0] >= losses[1] >= losses[2]
    assert 0 < steps[2] < 3000
    idle, metrics = learned.fit(model, KEY, 0)
    assert float(metrics["steps"]) == 0.0
    np.testing.assert_allclose(float(metrics["loss"]), losses[2], rtol=1e-4)
    jax.tree.map(np.testing.assert_array_equal, idle.world.params, model.world.params)


def test_what_is_held_out_is_never_trained_on():
    # The rewards of the held-out slots are nonsense: the loss sees them, the world does not learn them.
    model = learned.init_model(VECTOR, PUSH, KEY, capacity=1000)
    data = oscillator(1000, seed=0)
    held = np.arange(1000, dtype=np.uint32) * np.uint32(2654435761) < np.uint32(learned.HELD_OUT * 2**32)
    assert 0.1 < held.mean() < 0.2
    true = np.where(held[:, None], 0.0, 1.0).astype(np.float32)
    data = data.replace(reward=true)
    model = model.replace(replay=learned.remember(model.replay, data))
    for i in range(2):
        model, metrics = learned.fit(model, jax.random.fold_in(KEY, i))
    assert float(metrics["loss"]) > 1.0
    prediction = model.world.predict(data.observation[held, 0], data.action[held, 0])
    reward = jnp.mean(prediction.mean, axis=0)[:, 2] * model.world.normaliser.target_std[2]
    # It keeps the parameters that are best on the nonsense, yet they say 1 rather than 0 there.
    assert float(jnp.mean(reward + model.world.normaliser.target_mean[2])) > 0.7


def test_measure_is_what_a_loop_over_windows_says():
    model = learned.init_model(VECTOR, PUSH, KEY, capacity=1000)
    model = model.replace(replay=learned.remember(model.replay, oscillator(200, seed=0)))
    model, _ = learned.fit(model, KEY, 40)
    # The second feature is made to look as if training had seen it change far more: that is the unit then.
    normaliser = model.world.normaliser
    normaliser = normaliser.replace(target_std=normaliser.target_std * jnp.array([1.0, 10.0, 1.0]))
    world = dataclasses.replace(model.world, normaliser=normaliser, max_uncertainty=jnp.float32(0.5))
    rollout = oscillator(60, seed=5, n_envs=3)
    rollout.truncated[[10, 30], 1] = True
    assert rollout.terminated.any()

    @jax.jit
    def predict(observation, action):
        prediction = world.predict(observation, action)
        apart = jnp.sqrt(jnp.mean(jnp.square(prediction.mean - prediction.mean.mean(0)).mean(0)))
        return *world.reached(observation, action, prediction), apart

    horizon, errors, changes, cut = 5, [], [], []
    for n in range(3):
        for t in range(60 - horizon + 1):
            x, total = rollout.observation[t, n], 0.0
            for h in range(horizon):
                x, _, _, apart = predict(x, rollout.action[t + h, n])
                total += float(apart)
                if rollout.terminated[t + h, n] or rollout.truncated[t + h, n]:
                    break
            reached = rollout.next_observation[t + h, n]
            errors.append(x - reached)
            changes.append(reached - rollout.observation[t, n])
            cut.append(total > 0.5)
    scale, floor = np.std(changes, axis=0), 0.3 * np.sqrt(5) * np.asarray(normaliser.target_std[:2])
    assert scale[0] > floor[0] and scale[1] < floor[1]
    scale[1] = floor[1]
    expected = np.sqrt(np.mean(np.mean(np.square(errors), axis=0) / np.square(scale)))
    metrics = learned.measure(world, rollout, horizon)
    np.testing.assert_allclose(metrics["h_step_error"], expected, rtol=1e-4)
    np.testing.assert_allclose(metrics["cut"], np.mean(cut), rtol=1e-5)
    assert 0.0 < np.mean(cut) < 1.0
    whole = [jax.vmap(jax.vmap(predict))(rollout.observation, rollout.action)]
    ends, reward = np.asarray(whole[0][2]), np.asarray(whole[0][1])
    rate = rollout.terminated.mean()
    brier = np.mean(np.square(ends - rollout.terminated)) / max(rate * (1 - rate), 0.02)
    np.testing.assert_allclose(metrics["end_error"], np.sqrt(brier), rtol=1e-4)
    recall = np.mean(ends[rollout.terminated] > 0.5)
    np.testing.assert_allclose(metrics["end_recall"], recall)
    mse = np.mean(np.square(reward - rollout.reward))
    np.testing.assert_allclose(metrics["reward_error"], np.sqrt(mse / rollout.reward.var()), rtol=1e-4)
    assert float(metrics["error"]) == max(float(metrics["h_step_error"]), float(metrics["reward_error"]))


def test_a_world_that_knows_only_the_mean_change_has_an_error_of_one():
    world = learned.init_model(VECTOR, PUSH, KEY).world
    rollout = oscillator(50, seed=3)
    change = (rollout.next_observation - rollout.observation).reshape(-1, 2)
    normaliser = world.normaliser.replace(
        target_mean=jnp.append(jnp.mean(change, axis=0), rollout.reward.mean()),
        low=jnp.full(2, -9.0),
        high=jnp.full(2, 9.0),
    )
    params = jax.tree.map(jnp.zeros_like, world.params)
    world = dataclasses.replace(world, params=params, normaliser=normaliser)
    metrics = learned.measure(world, rollout, 1)
    for name in ("one_step_error", "h_step_error", "reward_error", "error"):
        np.testing.assert_allclose(metrics[name], 1.0, rtol=1e-4)
    # Probability 1/2 everywhere: a squared error of 1/4.
    rate = rollout.terminated.mean()
    np.testing.assert_allclose(metrics["end_error"], np.sqrt(0.25 / max(rate * (1 - rate), 0.02)), rtol=1e-4)
    # A rollout shorter than the horizon is one window.
    assert np.isfinite(learned.measure(world, rollout, 1000)["h_step_error"])


@pytest.mark.parametrize(
    ("error", "end_error", "expected"),
    [(0.7, 1.0, True), (0.71, 0.1, False), (0.1, 1.01, False), (np.nan, 0.1, False), (0.1, np.nan, False)],
)
def test_usable(error, end_error, expected):
    metrics = {"error": jnp.float32(error), "end_error": jnp.float32(end_error)}
    assert learned.usable(metrics) is expected


@functools.lru_cache(maxsize=1)
def cartpole():
    """A model of CartPole after 1 024 random steps, a policy, and 512 states it has not seen."""
    config = GRPOConfig(n_envs=1, n_steps=256, batch_size=64, horizon=16)
    world = make("CartPole-v1", reward_function=upright)
    state = jax.jit(init)(config, world, KEY)
    collect = jax.jit(functools.partial(loop.collect, keep_next_observation=True))
    model = learned.init_model(
        world.observation_space, world.action_space, split(KEY, 2)[1], reward_function=upright, capacity=5000
    )
    trajectories = []
    for i in range(6):
        state, trajectory = collect(config, world, state.replace(key=jax.random.fold_in(KEY, i)))
        trajectories.append(trajectory)
        if i < 4:
            transitions = learned.transitions_of(state.policy, trajectory)
            model = model.replace(replay=learned.remember(model.replay, transitions))
            model, _ = learned.fit(model, jax.random.fold_in(KEY, i))
    return config, world, state, model, trajectories[4:]


def test_branches_rank_cartpoles_actions_like_the_simulator():
    _, world, state, model, trajectories = cartpole()
    policy = state.policy
    metrics = learned.measure(model.world, learned.transitions_of(policy, trajectories[0]), 16)
    assert learned.usable(metrics)
    assert float(metrics["one_step_error"]) < 0.3

    def act(observation, mask, uniforms):
        parameters = policy.parameters(state.learner.policy, observation, mask)
        return policy.distribution.sample(parameters, uniforms)

    @jax.jit
    def gaps(world, states):
        actions = jnp.tile(jnp.arange(2), (512, 1))
        branches = group_returns(
            world,
            act,
            KEY,
            states,
            actions,
            horizon=16,
            gamma=0.99,
            n_uniforms=policy.distribution.n_uniforms,
        )
        return branches.returns[:, 0] - branches.returns[:, 1]

    seen = jax.tree.map(lambda *leaves: jnp.concatenate(leaves)[:, 0], *trajectories)
    true = np.asarray(gaps(world, seen.state))
    predicted = np.asarray(gaps(model.world, model.world.at(seen.observation)))
    clear = np.abs(true) > 0.1
    assert clear.mean() > 0.5
    assert np.mean(np.sign(true) == np.sign(predicted), where=clear) > 0.95


def test_a_policy_learns_from_groups_in_the_learned_world():
    config, _, state, model, trajectories = cartpole()
    environments = trajectories[0].environments
    environments = environments.replace(state=model.world.at(environments.observation))
    trajectory = trajectories[0].replace(environments=environments)

    @jax.jit
    def learn(config, world, state, trajectory):
        return loop.improve(config, state, loop.compare(config, world, state, trajectory))

    after, metrics = learn(config, model.world, state, trajectory)
    assert float(metrics["frac_zero_std"]) < 0.1 and float(metrics["group_spread"]) > 0.05
    assert float(metrics["nonfinite_groups"]) == 0.0
    assert 256 * 2 * 4 < float(metrics["simulator_steps"]) <= 256 * 2 * 16
    # A model that was trained further is another argument of the same program.
    further, _ = learned.fit(model, KEY)
    learn(config, further.world, after, trajectory)
    assert learn._cache_size() == 1


def test_gymnasiums_pendulum_with_its_own_reward():
    env = gymnasium.make("Pendulum-v1")
    rng, rows = np.random.default_rng(0), []
    observation, _ = env.reset(seed=0)
    for _ in range(2000):
        action = rng.uniform(-2, 2, 1).astype(np.float32)
        reached, reward, terminated, truncated, _ = env.step(action)
        rows.append((observation, action, np.float32(reward), reached, terminated, truncated))
        observation = env.reset()[0] if terminated or truncated else reached
    data = Transitions(*(np.stack(column)[:, None] for column in zip(*rows, strict=True)))
    model = learned.init_model(
        spaces.from_gymnasium(env.observation_space), spaces.from_gymnasium(env.action_space), KEY
    )
    parts = [jax.tree.map(lambda leaf, i=i: leaf[400 * i : 400 * (i + 1)], data) for i in range(5)]
    for i, part in enumerate(parts[:4]):
        model = model.replace(replay=learned.remember(model.replay, part))
        model, _ = learned.fit(model, jax.random.fold_in(KEY, i))
    metrics = learned.measure(model.world, parts[4], 16)
    assert learned.usable(metrics)
    assert float(metrics["one_step_error"]) < 0.15
    assert float(metrics["reward_error"]) < 0.25
    assert float(metrics["end_error"]) < 0.05 and np.isnan(metrics["end_recall"])
    assert float(model.world.max_uncertainty) == MAX_UNCERTAINTY


@pytest.mark.parametrize("shape", [(), (2, 1, 3)])
def test_real_numbers_of_any_shape_are_learned_as_their_vector(shape):
    space, size = spaces.Box(-np.inf, np.inf, shape), math.prod(shape)
    rng = np.random.default_rng(0)
    flat = rng.normal(size=(8, 3, size)).astype(np.float32)
    common = (rng.normal(size=(8, 3, 1)), rng.normal(size=(8, 3)))
    ends = (np.zeros((8, 3), bool), np.zeros((8, 3), bool))
    worlds = []
    for axes in (shape, (size,)):
        x = flat.reshape(8, 3, *axes)
        data = Transitions(x, *common, x + 0.5, *ends)
        model = learned.init_model(spaces.Box(-np.inf, np.inf, axes), PUSH, KEY, capacity=32)
        before = learned.measure(model.world, data, 2)
        model, _ = learned.fit(model.replace(replay=learned.remember(model.replay, data)), KEY, 20)
        worlds.append((model.world, before))
    (world, before), (vectors, expected) = worlds
    jax.tree.map(np.testing.assert_array_equal, before, expected)
    observation, state = reset(world)
    assert observation.shape == shape
    step, same = push(world, state), push(vectors, reset(vectors)[1])
    assert step.observation.shape == shape
    np.testing.assert_array_equal(step.observation.reshape(-1), same.observation)
    assert world.at(jnp.zeros((4, 5, *shape))).observation.shape == (4, 5, size)
    assert world.observation_space == space


def test_the_reward_function_sees_observations_in_their_shape():
    space = spaces.Box(-np.inf, np.inf, (2, 3))
    model = learned.init_model(
        space, PUSH, KEY, reward_function=lambda s, a, n: s[1, 2] + n[0, 0], capacity=8
    )
    assert push(model.world, reset(model.world)[1]).reward.shape == ()


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_double_precision(dtype):
    with jax.enable_x64(True):
        data = jax.tree.map(
            lambda leaf: leaf.astype(dtype) if leaf.dtype == np.float32 else leaf, oscillator(40, 0, 2)
        )
        key = as_key(jax.random.key(0))
        model = learned.init_model(VECTOR, PUSH, key, capacity=128)
        metrics = learned.measure(model.world, data, 4)
        model, fitted = learned.fit(model.replace(replay=learned.remember(model.replay, data)), key, 20)
        after = learned.measure(model.world, data, 4)
        assert {leaf.dtype for leaf in jax.tree.leaves(model.world)} == {np.dtype(np.float64)}
        assert float(after["error"]) < float(metrics["error"])
        assert np.isfinite(fitted["loss"])
