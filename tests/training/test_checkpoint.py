import chex
import jax
import jax.numpy as jnp
import msgpack
import numpy as np
import pytest
from flax import serialization

import grpo_jax
from grpo_jax import files
from grpo_jax.training import checkpoint

TINY = grpo_jax.GRPOConfig(n_envs=4, n_steps=8, batch_size=16, horizon=24, normalize_observations=True)


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


def test_notes_travel_with_the_state(tmp_path, cartpole, state):
    grpo_jax.save(tmp_path / "x", state, notes={"metrics": [1, "a"]})
    assert checkpoint.read_notes(tmp_path / "x") == {"metrics": [1, "a"]}
    grpo_jax.restore(tmp_path / "x", TINY, cartpole)


def test_one_flipped_bit_is_noticed_wherever_it_is(tmp_path, cartpole, state):
    content = checkpoint.to_bytes(state)
    for bit in np.random.default_rng(0).integers(8 * len(content), size=40):
        flipped = bytearray(content)
        flipped[bit // 8] ^= 1 << bit % 8
        (tmp_path / "x").write_bytes(flipped)
        with pytest.raises(ValueError, match="x is (damaged|not a grpo-jax checkpoint)"):
            grpo_jax.restore(tmp_path / "x", TINY, cartpole)


def unsealed(state, **replaced):
    """A file as version 1 wrote it: flax's msgpack, floats that count observations."""
    leaves = {
        jax.tree_util.keystr(path): leaf
        for path, leaf in jax.tree_util.tree_leaves_with_path(as_arrays(state))
    }
    prefix = ".learner.policy.statistics."
    high, low = (np.asarray(leaves.pop(f"{prefix}count.{word}")) for word in ("high", "low"))
    count = high.astype(np.float32) * 2**32 + low
    leaves[f"{prefix}count"] = count.astype(np.float32)
    leaves[f"{prefix}sum_squares"] = leaves.pop(f"{prefix}variance") * count[..., None]
    leaves = {name: np.asarray(leaf) for name, leaf in leaves.items()} | replaced
    return serialization.msgpack_serialize({"format": checkpoint.UNSEALED_FORMAT, "leaves": leaves})


@pytest.mark.parametrize("n_seeds", [None, 2])
def test_files_older_than_checksums_load_with_one_warning(tmp_path, cartpole, state, n_seeds):
    if n_seeds is not None:
        state, _ = grpo_jax.run(TINY, cartpole, jax.random.key(0), 32, n_seeds=n_seeds)
    (tmp_path / "x").write_bytes(unsealed(state))
    with pytest.warns(UserWarning, match="x is older than checksums") as warned:
        restored = grpo_jax.restore(tmp_path / "x", TINY, cartpole, n_seeds=n_seeds)
    assert len(warned) == 1
    chex.assert_trees_all_close(as_arrays(restored), as_arrays(state), rtol=1e-6)
    chex.assert_trees_all_equal_dtypes(as_arrays(restored), as_arrays(state))


def spoiled(state, name, value):
    """The state with a value in the first element of a leaf."""
    flat, structure = jax.tree_util.tree_flatten_with_path(state)
    assert name in [jax.tree_util.keystr(path) for path, _ in flat]
    leaves = [
        jnp.ravel(leaf).at[0].set(value).reshape(leaf.shape) if jax.tree_util.keystr(path) == name else leaf
        for path, leaf in flat
    ]
    return jax.tree.unflatten(structure, leaves)


@pytest.mark.parametrize(
    ("name", "value", "what"),
    [
        (".learner.policy.params['actor']['output']['bias']", jnp.nan, "is not finite"),
        (".learner.policy.statistics.variance", jnp.inf, "is not finite"),
        (".environments.observation", -jnp.inf, "is not finite"),
        (".environments.episode_return", jnp.nan, "is not finite"),
        (".environments.episode_length", -1, "is negative"),
        (".iteration", -3, "is negative"),
        (".learner.n_updates", -1, "is negative"),
    ],
)
def test_numbers_that_no_training_leaves_are_refused(tmp_path, cartpole, state, name, value, what):
    grpo_jax.save(tmp_path / "x", spoiled(state, name, value))
    with pytest.raises(ValueError, match="holds what no training leaves") as refused:
        grpo_jax.restore(tmp_path / "x", TINY, cartpole)
    assert f"holds what no training leaves: {name} {what}" in str(refused.value)


def sealed(leaves, notes="{}"):
    return files.seal("checkpoint", 2, msgpack.packb({"notes": notes, "leaves": leaves}))


def array(shape, dtype, data):
    return msgpack.ExtType(1, msgpack.packb((shape, dtype, data)))


@pytest.mark.parametrize(
    "content",
    [
        pytest.param(lambda: sealed([[]] * 1_000_000), id="a million lists"),
        pytest.param(lambda: sealed({"x": [0] * 1_000_000}), id="a list for an array"),
        pytest.param(
            lambda: sealed({str(i): array((), "f", b"") for i in range(5000)}), id="too many leaves"
        ),
        pytest.param(lambda: sealed({"x": msgpack.ExtType(1, b"\x91" * 100_000)}), id="a nested leaf"),
        pytest.param(lambda: sealed({"x": array((2,), ["f"], b"")}), id="a type that is a list"),
        pytest.param(lambda: sealed({"x": msgpack.ExtType(2, b"")}), id="another extension"),
        pytest.param(lambda: sealed({}, notes="[" * 100_000), id="long notes"),
        pytest.param(lambda: sealed({}, notes="[" * 60_000), id="nested notes"),
        pytest.param(lambda: sealed({}, notes="[]"), id="notes that are a list"),
        pytest.param(lambda: files.seal("checkpoint", 2, msgpack.packb([1])), id="no map"),
        pytest.param(lambda: files.seal("checkpoint", 2, b"\xdf\xff\xff\xff\xff"), id="a huge map"),
    ],
)
def test_hostile_content_under_a_valid_seal_is_refused(tmp_path, cartpole, content):
    (tmp_path / "x").write_bytes(content())
    with pytest.raises(ValueError, match="x is not a grpo-jax checkpoint"):
        grpo_jax.restore(tmp_path / "x", TINY, cartpole)


def test_leaves_of_another_type_or_size_are_named(tmp_path, cartpole):
    def refused(**leaf):
        leaves = {"['n']": array((), "int32", b"\0" * 4), "['flag']": array((), "bool", b"\1")}
        leaves |= {f"['{name}']": array(*parts) for name, parts in leaf.items()}
        (tmp_path / "x").write_bytes(sealed(leaves))
        with pytest.raises(ValueError, match="does not fit this config and env|is damaged") as error:
            checkpoint.restore_like(tmp_path / "x", {"n": jnp.int32(0), "flag": jnp.bool_(True)})
        return str(error.value)

    assert "['n'] is float32[], expected int32[]" in refused(n=((), "float32", b"\0" * 4))
    assert "['n'] is object[], expected int32[]" in refused(n=((), "object", b"\0" * 4))
    assert "['n'] is int32[1000000000], expected" in refused(n=((10**9,), "int32", b"\0" * 4))
    assert "['n'] has 3 bytes, expected 4" in refused(n=((), "int32", b"\0" * 3))
    assert "['flag'] holds bytes that are neither" in refused(flag=((), "bool", b"\7"))


def test_a_state_that_nobody_could_read_again_is_refused(tmp_path):
    huge = np.broadcast_to(np.float32(0), (1 << 30,))  # 4 GiB, of which one number is in memory
    with pytest.raises(ValueError, match="a state of 4,294,967,296 bytes does not fit a checkpoint"):
        grpo_jax.save(tmp_path / "state.msgpack", {"a": huge})
    assert not list(tmp_path.iterdir())
