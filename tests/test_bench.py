"""The benchmark's runner, on scripts that do next to nothing, and the row of a short run of ours."""

import importlib.util
import json
import math
import os
import pathlib
import sys
import tomllib

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
    assert ran["grpo_jax"] == ran["rejax"] == set(bench.environments()) and len(ran["rejax"]) == 25
    assert ran["sb3"] == ran["sbx"] and len(ran["sb3"]) == 5
    ours = [(job.cache, job.seed) for job in jobs if (job.library, job.env) == ("grpo_jax", "CartPole-v1")]
    assert sorted(ours) == [("cold", 0), ("cold", 1), ("warm", 0), ("warm", 1)]


@pytest.mark.parametrize("library", ["sb3", "sbx", "rejax"])
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


def test_settings_of_peers_name_known_environments():
    for name in ("zoo", "rejax"):
        table = tomllib.loads((bench.PEERS / f"{name}.toml").read_text())
        if name == "rejax":  # test_gymnasium_table.py looks at the Zoo's
            assert set(table) - {"MinAtar", "defaults"} <= set(bench.environments())
        assert all(known["total_timesteps"] > 0 for known in table.values())


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
