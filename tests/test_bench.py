"""The benchmark's runner, on scripts that do next to nothing, and the row of a short run of ours."""

import importlib.util
import json
import math
import os
import pathlib
import sys
import tomllib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import grpo_jax

BENCHMARKS = pathlib.Path(__file__).parents[1] / "benchmarks"


def load(name, path):
    spec = importlib.util.spec_from_file_location(name, path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


bench = load("benchmark_bench", BENCHMARKS / "bench.py")
record = load("record", BENCHMARKS / "peers" / "record.py")

WRITES = "import json, sys; open(sys.argv[2], 'w').write(sys.argv[1])"
FAILS = "import sys; print('as it were'); sys.exit('no such luck')"


def runner(out, script, n_jobs=1):
    return bench.Runner(out, lambda job: [sys.executable, "-c", script], n_jobs)


def test_different_runs_have_different_names():
    jobs = [
        *bench.jobs_of(bench.LIBRARIES, bench.environments(), 5),
        *bench.jobs_of(["grpo_jax"], ["CartPole-v1"], 5, "gpu", 65_536),
        *bench.jobs_of(["grpo_jax"], ["CartPole-v1"], 5, total_timesteps=1000),
    ]
    assert len({job.name for job in jobs}) == len(jobs)
    assert bench.Job("sb3", "CartPole-v1", 3).name == "sb3-CartPole-v1-off-seed3"


def test_everything_that_can_run_is_run():
    jobs = bench.jobs_of(bench.LIBRARIES, bench.environments(), 2)
    ran = {library: {job.env for job in jobs if job.library == library} for library in bench.LIBRARIES}
    everything = set(bench.environments())
    assert ran["grpo_jax"] == ran["rejax"] == ran["purejaxrl"] == everything and len(everything) == 25
    assert ran["sb3"] == ran["sbx"] and len(ran["sb3"]) == 5
    games = {env for env in everything if env.endswith("MinAtar")}
    assert ran["mctx"] == {"CartPole-v1", "Acrobot-v1", "Catch-bsuite", *games} and len(games) == 5
    ours = [(job.cache, job.seed) for job in jobs if (job.library, job.env) == ("grpo_jax", "CartPole-v1")]
    assert sorted(ours) == [("cold", 0), ("cold", 1), ("warm", 0), ("warm", 1)]


def test_peers_may_have_fewer_seeds():
    parsed = bench.parse(["--seeds", "10", "--peer-seeds", "5", "--envs", "Catch-bsuite"])
    counts = [(job.library, job.seed) for job in bench.selected(parsed)]
    assert max(seed for library, seed in counts if library == "grpo_jax") == 9
    assert {seed for library, seed in counts if library == "mctx"} == set(range(5))


@pytest.mark.parametrize("library", sorted({*bench.LIBRARIES} - {"grpo_jax"}))
def test_peers_have_what_they_need(library):
    for env in bench.environments():
        if bench.can_run(library, env):
            job = bench.Job(library, env, 0)
            assert (bench.PEERS / f"requirements-{job.venv}.txt").exists()
            assert (bench.PEERS / bench.SCRIPTS[library]).exists()


def test_rows_that_are_there_are_not_run_again(tmp_path):
    jobs = bench.jobs_of(["sb3"], ["CartPole-v1"], 2)
    run = runner(tmp_path, WRITES)
    run.path(jobs[0]).write_text("{}")
    run.run(jobs)
    assert run.failed == [] and run.path(jobs[0]).read_text() == "{}"
    written = json.loads(run.path(jobs[1]).read_text())
    assert (written["library"], written["env"], written["seed"]) == ("sb3", "CartPole-v1", 1)


def test_a_run_that_fails_leaves_no_row_and_the_others_go_on(tmp_path, capsys):
    jobs = bench.jobs_of(["sb3"], ["CartPole-v1"], 2)
    run = runner(tmp_path, f"import sys\nif '\"seed\": 0' in sys.argv[1]:\n    {FAILS}\n{WRITES}")
    run.run(jobs)
    assert run.failed == [jobs[0].name]
    assert not run.path(jobs[0]).exists() and run.path(jobs[1]).exists()
    said = capsys.readouterr().out
    assert "as it were" in said and "no such luck" in said and "exit status 1" in said


def test_a_warm_run_is_the_second_in_its_folder(tmp_path):
    script = (
        "import json, os, sys, pathlib\n"
        "seen = pathlib.Path(os.environ['JAX_COMPILATION_CACHE_DIR']) / 'seen'\n"
        "open(sys.argv[2], 'w').write(json.dumps(seen.exists()))\n"
        "seen.touch()"
    )
    run = runner(tmp_path, script)
    jobs = bench.jobs_of(["grpo_jax"], ["CartPole-v1"], 1)
    run.run(jobs)
    assert {job.cache: json.loads(run.path(job).read_text()) for job in jobs} == {"cold": False, "warm": True}


@pytest.mark.skipif(not hasattr(os, "sched_getaffinity"), reason="cores cannot be chosen here")
def test_more_jobs_than_cores_are_refused():
    n = len(os.sched_getaffinity(0))
    assert len(set(bench.cores(n))) == n
    with pytest.raises(SystemExit, match="cores"):
        bench.cores(n + 1)


def test_peers_see_nothing_of_ours(monkeypatch):
    monkeypatch.setenv("PYTHONPATH", "here")
    monkeypatch.setenv("JAX_ENABLE_X64", "1")
    found = bench.environment(bench.Job("sb3", "CartPole-v1", 0), None)
    assert "PYTHONPATH" not in found and "JAX_ENABLE_X64" not in found
    assert found["JAX_PLATFORMS"] == "cpu" and found["OMP_NUM_THREADS"] == "1"


def test_the_gpu_is_for_ours(capsys):
    with pytest.raises(SystemExit):
        bench.parse(["--device", "gpu"])
    (job,) = bench.selected(
        bench.parse(
            [
                "--device",
                "gpu",
                "--libraries",
                "grpo_jax",
                "--n-envs",
                "65536",
                "--seeds",
                "1",
                "--envs",
                "Pendulum-v1",
            ],
        )
    )
    assert job.name == "grpo_jax-Pendulum-v1-off-gpu-n65536-seed0"
    assert bench.environment(job, None)["JAX_PLATFORMS"] == "cuda"


def test_times_go_to_the_phase_that_is_named():
    clock = record.Clock()
    clock.lap("train")
    train = clock.cpu["train"]
    clock.move("train", "compile", 0.25)
    assert clock.cpu["compile"] == pytest.approx(0.25 * train)
    assert clock.cpu["train"] == pytest.approx(0.75 * train)
    assert clock.cpu["import"] > 0 and clock.cpu["evaluate"] == 0


def test_numbers_that_json_has_not_are_none():
    clock = record.Clock()
    assert record.point(clock, 10, 0, [1.0, math.nan])["return_mean"] is None
    job = {"library": "sb3", "env": "CartPole-v1", "seed": 0, "cache": "off"}
    made = record.row(
        job,
        clock,
        settings="",
        config={},
        total_timesteps=1,
        curve=[],
        final_returns=[math.inf],
        packages=["numpy"],
    )
    assert made["final_returns"] == [None] and made["nonfinite"]


PPO = {"agent_kwargs": dict, "num_envs": int, "num_steps": int, "num_epochs": int, "num_minibatches": int}
PPO |= {"learning_rate": float, "max_grad_norm": (int, float), "gamma": float, "gae_lambda": float}
PPO |= {"clip_eps": float, "ent_coef": float, "vf_coef": float}
NORMALISE = {"normalize_observations": bool, "normalize_rewards": bool}
ALPHA_ZERO = {"n_envs": int, "n_steps": int, "n_simulations": int, "n_epochs": int, "n_minibatches": int}
ALPHA_ZERO |= {"learning_rate": float, "max_grad_norm": float, "gamma": float, "lambda": float}
ALPHA_ZERO |= {
    "vf_coef": float,
    "ent_coef": float,
    "value_scale": float,
    "rescale_values": bool,
    "layers": list,
}
SCHEMAS = {"rejax": PPO, "purejaxrl": PPO | {"anneal": bool}, "mctx": ALPHA_ZERO}


@pytest.mark.parametrize("library", SCHEMAS)
def test_settings_of_each_game_are_complete(library):
    schema = SCHEMAS[library]
    for env in filter(lambda env: bench.can_run(library, env), bench.environments()):
        config, total, settings = record.settings_of({"library": library, "env": env})
        assert isinstance(total, int) and total > 0 and settings
        if settings == "rejax's defaults":
            assert not config
            continue
        assert schema.keys() <= config.keys() <= schema.keys() | NORMALISE.keys(), env
        for name, value in config.items():
            assert isinstance(value, (schema | NORMALISE)[name]), (env, name)
        n = "n_" if library == "mctx" else "num_"
        assert config[f"{n}envs"] * config[f"{n}steps"] % config[f"{n}minibatches"] == 0, env
    tables = tomllib.loads((bench.PEERS / f"{library}.toml").read_text())
    named = {*tables} | {env for known in tables.values() for env in known.get("envs", ())}
    assert named - {"MinAtar", "continuous", "defaults"} <= {*bench.environments()}  # no misspelt id


class Fork:
    """Action 0 ends the episode and pays nothing; action 1 pays 1 with the step after it, which ends it too.

    Like gymnax's environments it goes on paying behind an end. Its state is what it is observed as.
    """

    n_actions = 2

    def reset(self, key, n):
        state = jnp.zeros((n, 1))
        return state, state

    def step(self, key, states, actions):
        at = states[:, 0]
        behind_the_end = jnp.where(at == 2, 100.0, 0.0)
        rewards = jnp.where(at == 1, 1.0, behind_the_end)
        terminated = (at > 0) | (actions == 0)
        states = jnp.where(terminated, 2.0, 1.0)[:, None]
        return states, states, rewards, terminated, jnp.zeros_like(terminated)


@pytest.fixture(scope="module")
def alpha_zero():
    """mctx's module, and a learner in a ``Fork``."""
    pytest.importorskip("mctx", reason="the peer: pip install mctx")
    module = load("run_mctx", BENCHMARKS / "peers" / "run_mctx.py")
    config, _, _ = record.settings_of({"library": "mctx", "env": "CartPole-v1"})
    config |= {"n_envs": 8, "n_steps": 4, "n_minibatches": 2, "layers": [8], "learning_rate": 0.03}
    return module, module.AlphaZero(Fork(), config, 40)


def test_a_search_finds_what_pays_two_steps_on_and_nothing_behind_an_end(alpha_zero):
    learner = alpha_zero[1]
    state = learner.init(jax.random.key(0))
    found = jax.jit(learner.search)(state.params, state.key, state.observations, state.states, 0.0)
    np.testing.assert_array_equal(found.action, 1)
    assert np.all(found.action_weights[:, 1] > 0.9)
    roots = found.search_tree.node_values[:, 0]
    assert np.all(np.abs(roots) < 1)  # nothing of the 100 behind the ends


def test_the_bare_policy_learns_what_the_search_plays(alpha_zero):
    learner = alpha_zero[1]
    state = learner.init(jax.random.key(1))
    advance = jax.jit(lambda state: jax.lax.fori_loop(0, 40, lambda _, state: learner.iterate(state), state))
    returns = jax.jit(learner.returns, static_argnums=(2, 3))
    before = returns(state.params, jax.random.key(2), 64, False)
    after = advance(state).params
    assert 0.2 < before.mean() < 0.8 < 0.95 < returns(after, jax.random.key(2), 64, False).mean()
    np.testing.assert_array_equal(returns(state.params, jax.random.key(2), 64, True), 1.0)


def test_lambda_returns_by_hand(alpha_zero):
    module = alpha_zero[0]
    # One environment, four steps: a time limit behind the second, a termination behind the third.
    columns = {
        "root_values": [1.0, 2.0, 3.0, 4.0],
        "rewards": [10.0, 20.0, 30.0, 40.0],
        "terminated": [0.0, 0.0, 1.0, 0.0],
        "truncated": [0.0, 1.0, 0.0, 0.0],
        "last_values": [5.0, 6.0, 7.0, 8.0],
    }
    arrays = {name: jnp.array(values)[:, None] for name, values in columns.items()}
    arrays["truncated"] = arrays["truncated"].astype(bool)
    steps = module.Step(observations=None, weights=None, **arrays)
    fourth, third, second = 40 + 0.5 * 8, 30.0, 20 + 0.5 * 6
    first = 10 + 0.5 * (0.75 * 2 + 0.25 * second)
    found = module.lambda_returns(steps, gamma=0.5, mix=0.25)
    np.testing.assert_allclose(found[:, 0], [first, second, third, fourth])


def ours():
    return load("run_grpo_jax", BENCHMARKS / "peers" / "run_grpo_jax.py")


def test_more_environments_keep_the_number_of_minibatches():
    job = {"env": "CartPole-v1", "n_envs": 64, "total_timesteps": 100}
    preset = grpo_jax.preset("CartPole-v1")
    config, total, settings = ours().config_of(job)
    assert (config.n_envs, total, settings) == (64, 100, "preset, n_envs 64")
    assert config.batch_size / 64 == preset.batch_size / preset.n_envs
    assert ours().config_of({"env": "CartPole-v1"})[:2] == (preset, grpo_jax.preset_timesteps("CartPole-v1"))


def test_our_row_is_what_the_report_reads(tmp_path, monkeypatch):
    module, schema = ours(), load("report_rows", pathlib.Path(__file__).with_name("test_report.py"))
    small = grpo_jax.GRPOConfig(n_envs=2, n_steps=4, n_epochs=1, batch_size=8, horizon=2, net_arch=(4,))
    monkeypatch.setattr(module, "config_of", lambda job: (small, 24, "small"))
    monkeypatch.setattr(record, "FINAL_EPISODES", record.CURVE_EPISODES)  # one program to compile
    job = {"library": "grpo_jax", "env": "Catch-bsuite", "seed": 0, "cache": "off"}
    record.measure(job, tmp_path / "row.json", module.run)
    row, expected = json.loads((tmp_path / "row.json").read_text()), schema.make_row()
    assert row.keys() == expected.keys() and row["cpu"].keys() == expected["cpu"].keys()
    assert row["machine"].keys() == expected["machine"].keys()
    assert {*row["curve"][0]} == {*expected["curve"][0]}
    for name, value in expected.items():
        assert type(row[name]) is type(value), name
    assert [point["decision_steps"] for point in row["curve"]] == [8, 16, 24] and row["decision_steps"] == 24
    assert len(row["final_returns"]) == record.FINAL_EPISODES and not row["nonfinite"]
    assert row["simulator_steps"] > 0 and row["config"]["n_envs"] == 2 and row["settings"] == "small"
    assert 0 < row["cpu"]["train_seconds"] < row["cpu"]["compile_seconds"]
