"""Self-play: whom the learner plays against, since when, and what it comes to."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import struct

import grpo_jax
from grpo_jax.noise import as_key, split
from grpo_jax.spaces import Box, Discrete
from grpo_jax.training.self_play import PolicyOpponent

N = 3
ALLOWED = jnp.array([True, True, True, False])
traced: list[None] = []


def uniform(params: Any, key: jax.Array, observation: Any, action_mask: Any) -> jax.Array:
    return jax.random.randint(key, (), 0, N)


@struct.dataclass
class Highest(grpo_jax.World):
    """Both name a number at once; the higher one wins. Whoever names a forbidden one spoils the game (-100)."""

    opponent_params: Any = None
    opponent: Any = struct.field(pytree_node=False, default=uniform)
    observation_space = Box(0.0, 1.0, (1,))
    action_space = Discrete(N + 1)

    def reset(self, key):
        return jnp.ones(1), jnp.int32(0)

    def action_mask(self, state):
        return ALLOWED

    def step(self, key, state, action):
        traced.append(None)
        other = self.opponent(self.opponent_params, key, jnp.ones(1), ALLOWED)
        reward = jnp.sign(action - other).astype(jnp.float32)
        reward = jnp.where((action == N) | (other == N), -100.0, reward)
        return grpo_jax.Step(
            state=state + 1,
            observation=jnp.ones(1),
            reward=reward,
            terminated=jnp.bool_(True),
            truncated=jnp.bool_(False),
        )


CONFIG = grpo_jax.GRPOConfig(
    n_envs=4, n_steps=4, batch_size=16, n_epochs=2, horizon=1, net_arch=(8,), learning_rate=0.05
)
KEY = jax.random.key(0)


def leaves(state):
    return [np.asarray(leaf) for leaf in jax.tree.leaves(state.learner.policy)]


def test_the_opponent_moves_as_the_policy_does_within_the_mask():
    state = grpo_jax.init(CONFIG, Highest(), KEY)
    kernel = state.params["actor"]["output"]["kernel"]
    bias = jnp.array([0.0, 1.0, 2.0, 9.0])
    actor = {**state.params["actor"], "output": {"kernel": 0 * kernel, "bias": bias}}
    policy = state.learner.policy.replace(params={**state.params, "actor": actor})
    state = state.replace(learner=state.learner.replace(policy=policy))
    game = grpo_jax.against(Highest(), state)
    keys = split(as_key(KEY), 4000)
    moves = jax.vmap(lambda key: game.opponent(game.opponent_params, key, jnp.ones(1), ALLOWED))(keys)
    expected = np.exp([0, 1, 2]) / np.exp([0, 1, 2]).sum()
    np.testing.assert_allclose(np.bincount(moves, minlength=4) / 4000, [*expected, 0], atol=0.03)
    best = grpo_jax.against(Highest(), state, deterministic=True)
    assert best.opponent(best.opponent_params, keys[0], jnp.ones(1), ALLOWED) == 2
    assert game.opponent == PolicyOpponent(state.policy) != best.opponent


def test_a_run_meets_the_policy_of_some_iterations_ago():
    world, every, total = Highest(), 3, 8
    state, _ = grpo_jax.run(CONFIG, world, KEY, total * CONFIG.n_states, opponent_every=every)

    step = jax.jit(lambda game, state: grpo_jax.iteration(CONFIG, game, state, total)[0])
    expected = grpo_jax.init(CONFIG, world, KEY)
    for done in range(total):
        if done % every == 0:
            game = grpo_jax.against(world, expected)
        expected = step(game, expected)
    for mine, other in zip(leaves(state), leaves(expected), strict=True):
        np.testing.assert_allclose(mine, other, rtol=1e-5, atol=1e-6)
    alone, _ = grpo_jax.run(CONFIG, world, KEY, total * CONFIG.n_states)
    assert not all(np.allclose(a, b) for a, b in zip(leaves(state), leaves(alone), strict=True))


def test_newer_opponents_compile_nothing_anew_and_chunks_change_nothing():
    del traced[:]
    config = CONFIG.replace(n_epochs=3)  # of no other test: its program is traced here
    whole, _ = grpo_jax.run(config, Highest(), KEY, 20 * CONFIG.n_states, opponent_every=20)
    n_traces = len(traced)
    assert n_traces > 0
    seen = []
    parts, metrics = grpo_jax.run(
        config,
        Highest(),
        KEY,
        20 * CONFIG.n_states,
        opponent_every=2,
        callback=lambda chunk: seen.append(chunk.iteration),
        callback_every=3,
    )
    assert len(traced) == n_traces
    assert seen == sorted({*range(2, 21, 2), *[i for i in seen if i % 2]}) and seen[-1] == 20
    assert len(metrics["episode_return"]) == 20
    assert not all(np.allclose(a, b) for a, b in zip(leaves(whole), leaves(parts), strict=True))


def test_it_learns_what_beats_everybody_and_is_evaluated_against_each():
    first = grpo_jax.init(CONFIG, Highest(), KEY)
    state, metrics = grpo_jax.run(CONFIG, Highest(), KEY, 60 * CONFIG.n_states, opponent_every=5)
    assert np.isfinite(metrics["episode_return"]).all() and metrics["episode_return"].min() >= -1

    def mean(world, **how):
        return float(grpo_jax.evaluate(state, world, jax.random.key(1), 512, **how).mean())

    assert mean(Highest()) == pytest.approx(
        2 / 3, abs=0.1
    )  # against any number: 2 wins, draws or loses never
    assert mean(grpo_jax.against(Highest(), first)) > 0.4
    assert abs(mean(grpo_jax.against(Highest(), state))) < 0.15
    assert mean(grpo_jax.against(Highest(), state, deterministic=True), deterministic=True) == 0


def test_what_cannot_be_is_refused():
    state = grpo_jax.init(CONFIG, Highest(), KEY)
    cartpole = grpo_jax.make("CartPole-v1")
    with pytest.raises(ValueError, match=r"env=\w+ has no opponent.*connect_four"):
        grpo_jax.run(CONFIG, cartpole, KEY, 64, opponent_every=2)
    with pytest.raises(ValueError, match="has no opponent"):
        grpo_jax.against(cartpole, state)
    with pytest.raises(TypeError, match="state=PolicyState must be a TrainState"):
        grpo_jax.against(Highest(), state.learner.policy)
    both = jax.vmap(lambda key: grpo_jax.init(CONFIG, Highest(), key))(jax.random.split(KEY, 2))
    with pytest.raises(TypeError, match="several seeds"):
        grpo_jax.against(Highest(), both)
    for arguments in ({"opponent_every": 0}, {"opponent_every": 2, "n_seeds": 2}):
        with pytest.raises(ValueError, match=f"opponent_every={arguments['opponent_every']}"):
            grpo_jax.run(CONFIG, Highest(), KEY, 64, **arguments)
