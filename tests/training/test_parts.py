"""Checkpoints in parts: what several processes wrote any number of devices reads, and damage is noticed."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from processes import environment, free_port

import grpo_jax
from grpo_jax.training import parts

SMALL = grpo_jax.GRPOConfig(n_envs=8, n_steps=4, batch_size=16, n_epochs=2, horizon=4, net_arch=(8,))

SCRIPT = """
import json, sys
import jax, numpy as np
from pathlib import Path
index, n, port, do = int(sys.argv[1]), int(sys.argv[2]), sys.argv[3], sys.argv[4]
if n > 1:
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    jax.distributed.initialize(f"localhost:{port}", n, index)
import grpo_jax

config, env = grpo_jax.GRPOConfig.from_json(Path("config.json").read_text()), grpo_jax.make("CartPole-v1")
mesh, key = grpo_jax.make_mesh(), jax.random.key(0)
assert len(mesh.devices) == 4
if do == "save":
    state, _ = grpo_jax.run(
        config, env, key, 4 * config.n_states, mesh=mesh, callback=lambda chunk: chunk.iteration < 2, callback_every=2
    )
    grpo_jax.save_parts("two", state)
    for path, bad, words in (
        ("two", state, "exists already"),
        (f"own_{index}/three", state, "the processes do not share it"),
        ("three", grpo_jax.init(config, env, key), "the state lies in each process by itself"),
    ):
        Path(f"own_{index}").mkdir(exist_ok=True)
        try:
            grpo_jax.save_parts(path, bad)
        except (OSError, ValueError) as error:
            assert words in str(error), error
        else:
            raise AssertionError(words)
else:
    state = grpo_jax.restore_parts("two", config, env, mesh=mesh)
    assert len(state.environments.observation.sharding.device_set) == 4
    assert int(state.iteration) == 2
    state, _ = grpo_jax.run(config, env, key, 4 * config.n_states, mesh=mesh, state=state)
    state = grpo_jax.gather(state)
    if index == 0:
        grpo_jax.save(do, state)
"""


def processes(n: int, n_devices: int, do: str, path: Path) -> None:
    port = str(free_port())
    all_of_them = [
        subprocess.Popen(
            [sys.executable, "-c", SCRIPT, str(index), str(n), port, do],
            env=environment(n_devices),
            cwd=path,
            stderr=subprocess.PIPE,
            text=True,
        )
        for index in range(n)
    ]
    told = [process.communicate(timeout=250)[1][-2000:] for process in all_of_them]
    assert [process.returncode for process in all_of_them] == [0] * n, told


def words(tree):
    return [
        np.asarray(jax.random.key_data(leaf) if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key) else leaf)
        for leaf in jax.tree.leaves(tree)
    ]


def test_any_number_of_processes_goes_on_from_what_two_wrote(tmp_path):
    config, env = SMALL.replace(n_shards=4), grpo_jax.make("CartPole-v1")
    (tmp_path / "config.json").write_text(config.to_json(), encoding="utf-8")
    processes(2, 2, "save", tmp_path)
    assert not list(tmp_path.glob(".shared*")) and not (tmp_path / "three").exists()
    for n, do in ((4, "four.msgpack"), (1, "one.msgpack")):
        processes(n, 4 // n, do, tmp_path)
    expected, _ = grpo_jax.run(config, env, jax.random.key(0), 4 * config.n_states)
    state = grpo_jax.restore_parts(tmp_path / "two", config, env)
    here, _ = grpo_jax.run(config, env, jax.random.key(0), 4 * config.n_states, state=state)
    ends = [grpo_jax.restore(tmp_path / f"{name}.msgpack", config, env) for name in ("four", "one")]
    for end in (here, *ends):
        assert int(end.iteration) == 4
        for a, b in zip(words(end.learner.policy), words(expected.learner.policy), strict=True):
            np.testing.assert_allclose(a, b, atol=2e-5)
        np.testing.assert_allclose(end.environments.observation, expected.environments.observation, atol=2e-5)
        np.testing.assert_array_equal(*(jax.random.key_data(s.key) for s in (end, expected)))


@pytest.mark.parametrize("n_seeds", [None, 3])
def test_a_state_comes_back_bit_for_bit(tmp_path, n_seeds):
    env = grpo_jax.make("Breakout-MinAtar")  # observations of bools, states with keys
    config = SMALL.replace(normalize_observations=True, bootstrap=True, network="cnn")
    state, _ = grpo_jax.run(config, env, jax.random.key(0), config.n_states, n_seeds=n_seeds)
    grpo_jax.save_parts(tmp_path / "state", state)
    back = grpo_jax.restore_parts(tmp_path / "state", config, env, n_seeds=n_seeds)
    assert jax.tree.structure(back) == jax.tree.structure(state)
    for a, b in zip(words(back), words(state), strict=True):
        assert a.dtype == b.dtype
        np.testing.assert_array_equal(a, b)


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    path = tmp_path_factory.mktemp("parts") / "state"
    env = grpo_jax.make("CartPole-v1")
    state = grpo_jax.init(SMALL, env, jax.random.key(0))
    grpo_jax.save_parts(path, state)
    return path, env, state


# In a process of its own: Orbax leaves callbacks behind that fail later, wherever the process then is.
DAMAGE = """
import shutil, sys
import jax, numpy as np
from pathlib import Path
import grpo_jax
path, place = Path(sys.argv[1]), Path(sys.argv[2])
config, env = grpo_jax.GRPOConfig.from_json(sys.argv[3]), grpo_jax.make("CartPole-v1")
before = grpo_jax.restore_parts(path, config, env)
refused = []
for i, file in enumerate(sorted(file for file in path.rglob("*") if file.is_file())):
    copy = place / str(i)
    shutil.copytree(path, copy)
    content = bytearray(file.read_bytes())
    if not content:
        continue
    content[len(content) // 2] ^= 4
    (copy / file.relative_to(path)).write_bytes(content)
    try:
        after = grpo_jax.restore_parts(copy, config, env)
    except ValueError as error:
        assert "damaged" in str(error), error
        refused.append(file.name)
    else:
        for a, b in zip(*(jax.tree.leaves(s.replace(key=jax.random.key_data(s.key))) for s in (before, after)), strict=True):
            np.testing.assert_array_equal(a, b)
assert len(refused) >= 2, refused
"""


def test_damage_in_any_file_is_refused_or_harmless(written, tmp_path):
    path, _, _ = written
    arguments = [sys.executable, "-c", DAMAGE, str(path), str(tmp_path), SMALL.to_json()]
    done = subprocess.run(
        arguments, env=environment(), capture_output=True, text=True, check=False, timeout=250
    )
    assert done.returncode == 0, done.stderr[-3000:]


def test_arrays_that_are_not_what_was_written_are_named(written, tmp_path, monkeypatch):
    _, env, state = written
    changed = state.environments.replace(last_return=state.environments.last_return.at[3].set(1.0))
    digests = parts._digests
    true = [parts.plain(leaf) for _, leaf in parts.named(state)]
    monkeypatch.setattr(parts, "_digests", lambda leaves: digests(true))
    grpo_jax.save_parts(tmp_path / "changed", state.replace(environments=changed))
    monkeypatch.undo()
    with pytest.raises(ValueError, match=r"damaged: \.environments\.last_return is not what was written"):
        grpo_jax.restore_parts(tmp_path / "changed", SMALL, env)


def test_what_does_not_fit_is_refused(written, tmp_path):
    path, env, state = written
    with pytest.raises(FileExistsError, match="exists already: give each checkpoint a directory of its own"):
        grpo_jax.save_parts(path, state)
    with pytest.raises(
        FileNotFoundError, match="does not exist, or the processes do not share it: make it first"
    ):
        grpo_jax.save_parts(tmp_path / "nowhere" / "state", state)
    with pytest.raises(FileNotFoundError, match="is no directory"):
        grpo_jax.restore_parts(tmp_path / "nowhere", SMALL, env)
    with pytest.raises(ValueError, match="is not a checkpoint in parts, or damaged"):
        grpo_jax.restore_parts(tmp_path, SMALL, env)
    with pytest.raises(
        ValueError, match=r"does not fit this config and env: .*float32\[4, 8\], expected float32\[4, 16\]"
    ):
        grpo_jax.restore_parts(path, SMALL.replace(net_arch=(16,)), env)
    with pytest.raises(ValueError, match="does not fit this config and env"):
        grpo_jax.restore_parts(path, SMALL, env, n_seeds=2)
    with pytest.raises(TypeError, match="must be a mesh with the one axis"):
        grpo_jax.restore_parts(path, SMALL, env, mesh="all")


def test_what_cannot_be_written_names_the_directory(written, tmp_path, monkeypatch):
    _, _, state = written

    def full(*_, **__):
        raise ValueError("RESOURCE_EXHAUSTED: no space left")

    monkeypatch.setattr("orbax.checkpoint.StandardCheckpointer.save", full)
    with pytest.raises(OSError, match=r"cannot write it \(ValueError: RESOURCE_EXHAUSTED.*state"):
        grpo_jax.save_parts(tmp_path / "state", state)


def test_a_digest_knows_each_bit_and_each_place(key):
    values = {
        "float": jax.random.normal(key, (5, 7)),
        "bool": jax.random.bernoulli(key, shape=(9,)),
        "bytes": jax.random.bits(key, (4, 3), jnp.uint8),
        "half": jax.random.normal(key, (6,), jnp.bfloat16),
        "one": jnp.int32(3),
        "none": jnp.zeros((0, 3)),
    }
    before = np.asarray(parts._digests(list(values.values())))
    swapped = values | {"float": values["float"][::-1], "bytes": values["bytes"][:, ::-1]}
    other = values | {"bool": ~values["bool"], "half": -values["half"], "one": jnp.int32(-3)}
    names = list(values)
    for changed in (swapped, other):
        differ = {
            name
            for name, a, b in zip(
                names, before, np.asarray(parts._digests(list(changed.values()))), strict=True
            )
            if a != b
        }
        assert differ == {name for name in names if changed[name] is not values[name]}
