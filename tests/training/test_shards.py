"""Shards of the environments, on one device and on several: the numbers are the same."""

from __future__ import annotations

import json
import subprocess
import sys
import textwrap

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from processes import environment, free_port
from toys import Line

import grpo_jax
from grpo_jax import counter, shards
from grpo_jax.groups import branch
from grpo_jax.policies import normalize
from grpo_jax.spaces import Discrete
from grpo_jax.training.iterate import shard_config
from grpo_jax.types import Counter

SMALL = grpo_jax.GRPOConfig(n_envs=8, n_steps=4, batch_size=16, n_epochs=2, horizon=4, net_arch=(8,))

ON_EIGHT_DEVICES = """
import json, re, sys
import jax, numpy as np
import grpo_jax
from grpo_jax.training.run import _chunk

BASE = dict(n_envs=16, n_steps=4, batch_size=32, n_epochs=2, horizon=4, n_shards=8, net_arch=(8,))
CASES = {
    "enumerate": ("CartPole-v1", dict(bootstrap=True, normalize_observations=True, branch_every=2, kl_coef=0.1)),
    "sample": ("Pendulum-v1", dict(group_size=3, baseline="shrinkage", target_kl=0.02, persistence=0.3)),
    "episodes": ("CartPole-v1", dict(candidates="episodes", bootstrap=True)),
    "trajectory": ("CartPole-v1", dict(candidates="trajectory", group_size=2, n_steps=48)),
}
found = {}
for name in sys.argv[1:]:
    env_id, settings = CASES[name]
    env, config = grpo_jax.make(env_id), grpo_jax.GRPOConfig(**BASE | settings)
    ends = {}
    for n_devices in (1, 8):
        mesh = None if n_devices == 1 else grpo_jax.make_mesh(n_devices)
        state, metrics = grpo_jax.run(config, env, jax.random.key(0), 20 * config.n_states, mesh=mesh)
        ends[n_devices] = jax.device_get((state.replace(key=jax.random.key_data(state.key)), metrics))
    assert all(len(leaf.sharding.device_set) == 8 for leaf in jax.tree.leaves(state.environments))
    program = _chunk.lower(config, env, state, np.int32(0), np.int32(20), None, False, mesh).compile().as_text()
    reductions = [line for line in program.splitlines() if re.search(r" all-reduce(?:-start)?\\(", line)]
    differences = jax.tree.map(
        lambda a, b: float(np.nanmax(np.abs(np.asarray(a, float) - np.asarray(b, float)), initial=0.0)), *ends.values()
    )
    found[name] = {
        "learner": max(jax.tree.leaves(differences[0].learner)),
        "steps": [int(grpo_jax.count(end[0].simulator_steps)) for end in ends.values()],
        "decisions": [int(grpo_jax.count(end[0].decision_steps)) for end in ends.values()],
        "loss": differences[1]["loss"],
        "minibatch": sum("jit(step)" in line for line in reductions),
        "iteration": len(reductions),
        "others": re.findall(r" (all-gather|all-to-all|collective-permute|reduce-scatter)", program),
    }
    assert np.isfinite(ends[8][1]["loss"]).all() and np.any(ends[8][1]["grad_norm"] > 0)
print(json.dumps(found))
"""


def on_eight_devices(script, *arguments, **options):
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(script), *arguments],
        env=environment(8),
        capture_output=True,
        text=True,
        check=False,
        timeout=280,
        **options,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


@pytest.mark.parametrize("name", ["enumerate", "sample", "episodes", "trajectory"])
def test_eight_devices_come_to_what_one_does_with_one_reduction_a_minibatch(name):
    found = json.loads(on_eight_devices(ON_EIGHT_DEVICES, name).splitlines()[-1])[name]
    assert found["learner"] < 2e-5
    assert found["loss"] < 1e-4
    assert found["steps"][0] == found["steps"][1] > 0 or name in ("episodes", "trajectory")
    assert found["decisions"][0] == found["decisions"][1] > 0
    assert not found["others"]
    assert found["minibatch"] == 1
    assert found["iteration"] <= 12


def test_seeds_lie_on_devices_and_the_command_line_goes_on_with_another_number_of_them(tmp_path):
    script = """
        import sys, jax, numpy as np, grpo_jax
        from pathlib import Path
        from grpo_jax.cli import main
        from grpo_jax.cli.runs import RunDirectory
        config = grpo_jax.GRPOConfig(n_envs=4, n_steps=4, batch_size=8, n_epochs=1, horizon=4, net_arch=(8,))
        env, key = grpo_jax.make("CartPole-v1"), jax.random.key(0)
        ends = [grpo_jax.run(config, env, key, 48, n_seeds=4, mesh=mesh)[0] for mesh in (None, grpo_jax.make_mesh(4))]
        assert len(jax.tree.leaves(ends[1].params)[0].sharding.device_set) == 4
        for a, b in zip(*(jax.tree.leaves(end.params) for end in ends), strict=True):
            np.testing.assert_allclose(a, b, atol=1e-6)
        swept = [
            grpo_jax.sweep(config, env, key, 48, n_seeds=2, learning_rate=[1e-3, 1e-2], mesh=mesh).metrics["loss"]
            for mesh in (None, grpo_jax.make_mesh(4))
        ]
        np.testing.assert_allclose(*swept, atol=1e-6)

        small = "--n-envs 8 --n-steps 4 --batch-size 16 --n-epochs 1 --horizon 4 --net-arch 8 --no-cache"
        small = [*small.split(), "--learning-rate-decay", "none"]
        def train(directory, *arguments):
            assert main(["train", "CartPole-v1", "--out", directory, *small, *arguments]) == 0
        train("a", "--devices", "4", "--total-timesteps", "128")
        train("b", "--devices", "4", "--total-timesteps", "64")
        assert main("resume b --devices 2 --total-timesteps 128 --no-cache".split()) == 0
        directories = [RunDirectory(Path(name)) for name in "ab"]
        ends = [directory.restore(directory.read())[1] for directory in directories]
        for a, b in zip(*(jax.tree.leaves(end.params) for end in ends), strict=True):
            np.testing.assert_allclose(a, b, atol=1e-6)
        assert main("resume b --devices 3 --total-timesteps 192 --no-cache".split()) == 2
    """
    on_eight_devices(script, cwd=tmp_path)


TWO_PROCESSES = """
import json, sys
import jax, numpy as np
index, port, path = int(sys.argv[1]), sys.argv[2], sys.argv[3]
jax.config.update("jax_cpu_collectives_implementation", "gloo")
jax.distributed.initialize(f"localhost:{port}", 2, index)
import grpo_jax

config, env = grpo_jax.GRPOConfig.from_json(open(path + "/config.json").read()), grpo_jax.make("CartPole-v1")
seen = []
def stop_late(chunk):
    seen.append(chunk.iteration)
    return index == 0 or chunk.iteration < 6  # the second process stops; so does the first
mesh = grpo_jax.make_mesh()
assert len(mesh.devices) == 4 and len(jax.local_devices()) == 2
state, metrics = grpo_jax.run(
    config, env, jax.random.key(0), 9 * config.n_states, mesh=mesh, callback=stop_late, callback_every=2
)
assert seen == [2, 4, 6], seen
whole = grpo_jax.gather(state)
if index == 0:
    grpo_jax.save(path + "/state.msgpack", whole)

one, key = config.replace(n_shards=1), jax.random.key(0)
ends = [grpo_jax.run(one, env, key, 64, n_seeds=4, mesh=where) for where in (None, mesh)]
assert all(len(leaf.sharding.device_set) == 4 for leaf in jax.tree.leaves(ends[1][0]))
for a, b in zip(*(jax.tree.leaves((grpo_jax.gather(state).params, metrics)) for state, metrics in ends), strict=True):
    np.testing.assert_allclose(a, b, atol=1e-5)
rates = [1e-3, 1e30]  # the second one fails
swept = [grpo_jax.sweep(one, env, key, 96, n_seeds=2, learning_rate=rates, mesh=where) for where in (None, mesh)]
for name in ("failed_at", "scores", "final_returns"):
    np.testing.assert_allclose(*(np.nan_to_num(getattr(done, name), neginf=-1) for done in swept), atol=1e-5)
assert swept[1].best == 0 and np.all(swept[1].failed_at[1] > 0)
told = []
for where in (None, mesh):
    try:
        grpo_jax.run(one.replace(learning_rate=1e30), env, key, 96, n_seeds=4, mesh=where)
    except grpo_jax.NonFiniteError as error:
        told.append(str(error))
assert len(told) == 2 and told[0] == told[1], told
try:
    grpo_jax.run(one, env, key, 64, n_seeds=6, mesh=mesh)
except ValueError as error:
    assert "n_seeds=6 (times the settings of a sweep) must be a multiple of the 4 devices" in str(error)
else:
    raise AssertionError
"""


def test_two_processes_come_to_what_one_does(tmp_path):
    config = SMALL.replace(n_shards=4, bootstrap=True, candidates="episodes")
    (tmp_path / "config.json").write_text(config.to_json(), encoding="utf-8")
    port = str(free_port())
    both = [
        subprocess.Popen(
            [sys.executable, "-c", TWO_PROCESSES, str(index), port, str(tmp_path)],
            env=environment(2),
            stderr=subprocess.PIPE,
            text=True,
        )
        for index in range(2)
    ]
    told = [process.communicate(timeout=250)[1] for process in both]
    assert [process.returncode for process in both] == [0, 0], told[0][-2000:] + told[1][-2000:]
    env = grpo_jax.make("CartPole-v1")
    found = grpo_jax.restore(tmp_path / "state.msgpack", config, env)
    expected, _ = grpo_jax.run(
        config,
        env,
        jax.random.key(0),
        9 * config.n_states,
        callback=lambda chunk: chunk.iteration < 6,
        callback_every=2,
    )
    assert int(found.iteration) == int(expected.iteration) == 6
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5),
        found.learner.policy,
        expected.learner.policy,
    )
    np.testing.assert_allclose(found.environments.observation, expected.environments.observation, atol=1e-5)


def test_shards_on_one_device_learn_and_a_fault_is_found_in_its_shard():
    env, config = Line(Discrete(2)), SMALL.replace(n_shards=2, learning_rate=0.02)
    state, metrics = grpo_jax.run(config, env, jax.random.key(0), 40 * config.n_states)
    assert grpo_jax.count(state.decision_steps) == metrics["decision_steps"][-1] == 40 * config.n_states
    assert metrics["episode_return"][-1] > metrics["episode_return"][2]
    assert shard_config(config) == SMALL.replace(n_envs=4, batch_size=8, learning_rate=0.02)

    bad = state.environments.replace(episode_return=state.environments.episode_return.at[5].set(jnp.nan))
    with pytest.raises(grpo_jax.NonFiniteError, match=r"environment 1 .*counted within shard 1 of 2"):
        grpo_jax.run(
            config, env, jax.random.key(0), 41 * config.n_states, state=state.replace(environments=bad)
        )


def test_what_cannot_be_divided_is_refused():
    for changes, words in (
        ({"n_envs": 6, "n_shards": 4}, "n_envs=6 must be a multiple of n_shards=4"),
        ({"batch_size": 6, "n_shards": 4}, "batch_size=6 must be a multiple of n_shards=4"),
        (
            {"candidates": "trajectory", "group_size": 4, "n_shards": 4},
            "must be a multiple of n_shards=4 times group_size=4",
        ),
        ({"n_shards": 0}, "n_shards=0 must be an integer of at least 1"),
    ):
        with pytest.raises(ValueError, match=words):
            SMALL.replace(**changes)


def test_meshes_that_do_not_fit_are_refused():
    mesh = grpo_jax.make_mesh(1)
    assert mesh.devices.size == 1
    for n_devices in (0, len(jax.devices()) + 1, True, 1.5):
        with pytest.raises(ValueError, match=r"n_devices=.* must be an integer from 1 to"):
            grpo_jax.make_mesh(n_devices)
    with pytest.raises(TypeError, match="make_mesh"):
        shards.check_mesh("all", 1, None)
    two = jax.sharding.Mesh(np.array([*mesh.devices, *mesh.devices]), ("devices",))
    with pytest.raises(ValueError, match=r"n_shards=3 must be a multiple of the 2 devices"):
        shards.check_mesh(two, 3, None)
    with pytest.raises(ValueError, match="n_seeds=3 .* multiple of the 2 devices"):
        shards.check_mesh(two, 1, 3)
    shards.check_mesh(two, 4, 3)


def test_counts_beyond_32_bits_are_summed_exactly():
    counts = [2**32 - 1, 5, 2**40 + 2**31, 2**33 - 7]
    parts = Counter(
        high=jnp.asarray([n >> 32 for n in counts], jnp.uint32),
        low=jnp.asarray([n & 0xFFFFFFFF for n in counts], jnp.uint32),
    )
    summed = jax.vmap(counter.over_shards, axis_name=shards.SHARDS, out_axes=None)(parts)
    assert grpo_jax.count(summed) == sum(counts)


def test_statistics_are_those_of_all_shards(key):
    batch = jax.random.normal(key, (12, 3)) * 5.0 + 100.0
    start = normalize.update(normalize.initial(batch[0]), batch[:4])
    together = normalize.update(start, batch[4:])
    parts = jax.vmap(normalize.update, (None, 0), None, axis_name=shards.SHARDS)(
        start, batch[4:].reshape(4, 2, 3)
    )
    assert grpo_jax.count(parts.count) == 12
    np.testing.assert_allclose(parts.mean, together.mean, rtol=1e-6)
    np.testing.assert_allclose(parts.variance, together.variance, rtol=1e-5)


def test_shards_of_a_device_share_its_chunk_of_branches(monkeypatch):
    sizes, env, chunk_size = [], Line(Discrete(2)), branch.chunk_size
    monkeypatch.setattr(branch, "default_branches", lambda *_: 64)
    monkeypatch.setattr(branch, "chunk_size", lambda *args: sizes.append(args[-1]) or chunk_size(*args))
    for n_shards in (1, 4):
        config = SMALL.replace(n_shards=n_shards)
        state = jax.eval_shape(lambda config=config: grpo_jax.init(config, env, jax.random.key(0)))
        jax.eval_shape(lambda state, config=config: grpo_jax.iteration(config, env, state, 1), state)
    assert sizes == [64, 16]


def test_outside_of_shards_nothing_is_summed():
    assert not shards.within()
    assert shards.count() == shards.side_by_side() == 1
    values = jnp.arange(3.0)
    for same in (shards.total, shards.greatest, shards.mean):
        assert same(values) is values
