import chex
import jax
import jax.numpy as jnp
import pytest

import grpo_jax
from grpo_jax.training import checkpoint

TINY = grpo_jax.GRPOConfig(n_envs=4, n_steps=8, batch_size=16, horizon=24)


@pytest.fixture(scope="module")
def cartpole():
    return grpo_jax.make("CartPole-v1")


@pytest.fixture(scope="module")
def state(cartpole):
    return grpo_jax.train(TINY, cartpole, jax.random.key(0), 32).state


def as_arrays(tree):
    is_key = lambda leaf: jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)
    return jax.tree.map(lambda leaf: jax.random.key_data(leaf) if is_key(leaf) else leaf, tree)


def test_round_trip_is_exact(tmp_path, cartpole, state):
    grpo_jax.save(tmp_path / "state.msgpack", state)
    restored = grpo_jax.restore(tmp_path / "state.msgpack", TINY, cartpole)
    chex.assert_trees_all_equal(as_arrays(restored), as_arrays(state))
    chex.assert_trees_all_equal_dtypes(as_arrays(restored), as_arrays(state))
    assert restored.policy == state.policy


def test_vmapped_states_round_trip(tmp_path, cartpole):
    states, _ = grpo_jax.run(TINY, cartpole, jax.random.key(0), 32, n_seeds=2)
    grpo_jax.save(tmp_path / "states.msgpack", states)
    restored = grpo_jax.restore(tmp_path / "states.msgpack", TINY, cartpole, n_seeds=2)
    chex.assert_trees_all_equal(as_arrays(restored), as_arrays(states))


def test_another_config_is_refused_with_the_difference(tmp_path, cartpole, state):
    grpo_jax.save(tmp_path / "state.msgpack", state)
    with pytest.raises(
        ValueError, match=r"does not fit this config and env: .*\[4, 64\], expected .*\[4, 32\]"
    ):
        grpo_jax.restore(tmp_path / "state.msgpack", TINY.replace(net_arch=(32,)), cartpole)
    with pytest.raises(ValueError, match="is missing"):
        grpo_jax.restore(tmp_path / "state.msgpack", TINY.replace(bootstrap=True), cartpole)


@pytest.mark.parametrize("content", [b"", b"not msgpack at all", b"\x81\xa1a\x01"])
def test_what_is_no_checkpoint_is_refused(tmp_path, cartpole, content):
    (tmp_path / "x").write_bytes(content)
    with pytest.raises(ValueError, match="is not a grpo-jax checkpoint"):
        grpo_jax.restore(tmp_path / "x", TINY, cartpole)


def test_a_missing_file_is_a_missing_file(tmp_path, cartpole):
    with pytest.raises(FileNotFoundError):
        grpo_jax.restore(tmp_path / "nothing", TINY, cartpole)


def test_a_failed_save_leaves_the_old_file(tmp_path, state, monkeypatch):
    path = tmp_path / "state.msgpack"
    path.write_bytes(b"old")

    def fail(*args):
        raise OSError("disk full")

    monkeypatch.setattr(checkpoint.os, "replace", fail)
    with pytest.raises(OSError, match="disk full"):
        grpo_jax.save(path, state)
    assert path.read_bytes() == b"old"
    assert [entry.name for entry in tmp_path.iterdir()] == ["state.msgpack"]
