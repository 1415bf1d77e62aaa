import chex
import jax
import numpy as np
import pytest

import grpo_jax
from grpo_jax.training import run as run_module

TINY = grpo_jax.GRPOConfig(
    n_envs=4,
    n_steps=8,
    batch_size=16,
    n_epochs=2,
    horizon=24,
    learning_rate=1e-2,
    learning_rate_decay="linear",
)


@pytest.fixture(scope="module")
def cartpole():
    return grpo_jax.make("CartPole-v1")


@pytest.mark.parametrize("quick_compile", [False, True])
def test_run_is_train_number_for_number(cartpole, quick_compile):
    state, metrics = grpo_jax.run(TINY, cartpole, jax.random.key(0), 7 * 32, quick_compile=quick_compile)
    result = grpo_jax.train(TINY, cartpole, jax.random.key(0), 7 * 32)
    assert set(metrics) == set(result.metrics)
    for name, values in metrics.items():
        np.testing.assert_allclose(values, result.metrics[name], rtol=1e-4, atol=1e-6, err_msg=name)
    chex.assert_trees_all_close(state.params, result.state.params, rtol=1e-3, atol=1e-5)


def test_seeds_side_by_side_have_a_leading_axis(cartpole):
    seen = []
    _, metrics = grpo_jax.run(TINY, cartpole, jax.random.key(0), 64, n_seeds=3, callback=seen.append)
    assert metrics["episode_return"].shape == (3, 2)
    assert seen[-1].decision_steps == 3 * 64
    assert seen[-1].metrics["entropy"].shape[0] == 3


def test_callback_sees_every_iteration_once_and_can_stop(cartpole):
    seen = []

    def callback(chunk):
        seen.append((chunk.iteration, chunk.metrics["entropy"].shape[-1]))
        assert chunk.n_iterations == 50
        assert chunk.decision_steps == chunk.iteration * 32
        assert chunk.seconds >= 0 and chunk.compile_seconds > 0
        return np.bool_(chunk.iteration < 3)

    state, metrics = grpo_jax.run(TINY, cartpole, jax.random.key(0), 50 * 32, callback=callback)
    done = int(state.iteration)
    assert 3 <= done < 50
    assert seen[-1][0] == done == sum(length for _, length in seen) == metrics["entropy"].shape[0]


def test_callback_every_so_many_iterations(cartpole):
    seen = []
    grpo_jax.run(
        TINY,
        cartpole,
        jax.random.key(0),
        7 * 32,
        callback=lambda chunk: seen.append(chunk.iteration),
        callback_every=3,
    )
    assert seen == [3, 6, 7]
    with pytest.raises(ValueError, match="callback_every=0 must be None or from 1 to"):
        grpo_jax.run(TINY, cartpole, jax.random.key(0), 32, callback_every=0)


def test_a_callback_that_returns_nothing_does_not_stop(cartpole):
    state, _ = grpo_jax.run(TINY, cartpole, jax.random.key(0), 4 * 32, callback=lambda chunk: None)
    assert int(state.iteration) == 4


def test_a_stopped_run_goes_on_bit_for_bit(cartpole, tmp_path):
    whole, _ = grpo_jax.run(TINY, cartpole, jax.random.key(0), 6 * 32)
    half, first = grpo_jax.run(
        TINY, cartpole, jax.random.key(0), 6 * 32, callback=lambda chunk: chunk.iteration < 2
    )
    grpo_jax.save(tmp_path / "half.msgpack", half)
    restored = grpo_jax.restore(tmp_path / "half.msgpack", TINY, cartpole)
    rest, second = grpo_jax.run(TINY, cartpole, jax.random.key(99), 6 * 32, state=restored)
    assert first["entropy"].shape[0] + second["entropy"].shape[0] == 6
    chex.assert_trees_all_equal(whole.params, rest.params)


def test_states_that_others_hold_stay_theirs(cartpole):
    kept = []
    grpo_jax.run(TINY, cartpole, jax.random.key(0), 4 * 32, callback=kept.append, callback_every=1)
    assert [int(chunk.state.iteration) for chunk in kept] == [1, 2, 3, 4]
    given = kept[1].state
    grpo_jax.run(TINY, cartpole, jax.random.key(0), 4 * 32, state=given)
    assert int(given.iteration) == 2


@pytest.mark.parametrize(("extra", "n_seeds"), [({}, None), ({"kl_coef": 0.1, "bootstrap": True}, 2)])
def test_chunks_write_over_a_state_that_nobody_holds(cartpole, monkeypatch, extra, n_seeds):
    lowered = []
    lower = run_module._chunk_in_place.lower

    class Spy:
        @staticmethod
        def lower(*args):
            lowered.append(lower(*args))
            return lowered[-1]

    monkeypatch.setattr(run_module, "_chunk_in_place", Spy)
    state, _ = grpo_jax.run(TINY.replace(**extra), cartpole, jax.random.key(0), 8 * 32, n_seeds=n_seeds)
    assert np.all(np.asarray(state.iteration) == 8)
    (program,) = lowered
    given = jax.tree.leaves(program.args_info, is_leaf=lambda leaf: hasattr(leaf, "donated"))
    assert sum(leaf.donated for leaf in given) == len(jax.tree.leaves(state))
    assert program.compile().memory_analysis().alias_size_in_bytes > 0


def test_a_finished_state_has_nothing_left_to_do(cartpole):
    state, _ = grpo_jax.run(TINY, cartpole, jax.random.key(0), 64)
    same, metrics = grpo_jax.run(TINY, cartpole, jax.random.key(0), 64, state=state)
    assert metrics == {} and int(same.iteration) == 2


def test_bad_number_of_seeds(cartpole):
    with pytest.raises(ValueError, match="n_seeds=0"):
        grpo_jax.run(TINY, cartpole, jax.random.key(0), 64, n_seeds=0)
