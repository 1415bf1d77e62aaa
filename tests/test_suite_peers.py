"""benchmarks/suite_peers.py and suite_presets.py: a world as rejax sees it, our settings in its words, the table."""

import json
import pathlib
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import grpo_jax

BENCHMARKS = pathlib.Path(__file__).parents[1] / "benchmarks"


@pytest.fixture(scope="module")
def modules():
    sys.path.insert(0, str(BENCHMARKS))
    try:
        import suite_peers
        import suite_presets

        yield suite_peers, suite_presets
    finally:
        sys.path.remove(str(BENCHMARKS))
        sys.path.remove(str(BENCHMARKS / "peers"))


@pytest.mark.parametrize("env_id", ["CartPole-v1", "Pendulum-v1", "Catch-bsuite"])
def test_environment_of_a_world_starts_over_behind_an_end_and_says_what_the_world_says(modules, env_id):
    world = grpo_jax.make(env_id)
    env = modules[0].OfWorld(world)
    params = env.default_params
    step = jax.jit(lambda key, state, action: env.step(key, state, action, params))
    observation, state = env.reset(jax.random.key(0), params)
    assert observation.shape == env.observation_space(params).shape
    ends = 0
    for i in range(250):
        key, action_key = jax.random.split(jax.random.key(i))
        action = env.action_space(params).sample(action_key)
        expected = world.step(jax.random.split(key)[0], state, jnp.reshape(action, world.action_space.shape))
        observation, state, reward, done, _ = step(key, state, action)
        np.testing.assert_allclose(reward, expected.reward, rtol=1e-5, atol=1e-6)
        assert bool(done) == bool(expected.terminated | expected.truncated)
        if done:
            ends += 1
            first = world.reset(jax.random.split(key)[1])[0]
            np.testing.assert_allclose(observation, first, rtol=1e-5, atol=1e-6)
        else:
            np.testing.assert_allclose(observation, expected.observation, rtol=1e-5, atol=1e-6)
    assert ends >= 1


def test_translated_settings_make_as_many_updates_as_ours(modules):
    peers, presets = modules
    for case in presets.CASES.values():
        config = grpo_jax.GRPOConfig(**case.settings, candidates="episodes")
        settings = peers.translated(config)
        assert settings["num_envs"] * settings["num_steps"] == config.n_states
        assert settings["num_minibatches"] * config.batch_size == config.n_states
        assert settings["gamma"] == config.gamma


def test_table_has_medians_with_their_range_and_a_dash_where_nothing_ran(modules, tmp_path):
    path = tmp_path / "rows.jsonl"
    rows = [
        {"what": "branches", "decision_steps": 100, "simulator_steps": 800, "cpu_seconds": s, "return": r}
        for s, r in [(1.0, 5.0), (3.0, 7.0), (2.0, 6.5)]
    ]
    rows.append(rows[0] | {"what": "rejax, equal seconds", "decision_steps": 3_000, "simulator_steps": 0})
    path.write_text("".join(json.dumps({"env": "a/b", "seed": i} | row) + "\n" for i, row in enumerate(rows)))
    lines = modules[1].table(path).splitlines()[2:]
    assert lines == [
        "| a/b | branches | 6.50 (5.00 to 7.00), 100 | 2.00 s | 900 steps |",
        "|  | rejax | - | 5.00, 3,000 [1] | - |",
    ]


def test_race_gives_everybody_the_steps_the_seconds_and_all_the_steps_of_the_branches(modules, monkeypatch):
    presets, asked = modules[1], []

    def row(steps, simulated, seconds):
        costs = {"simulator_steps": simulated * steps, "cpu_seconds": seconds * steps}
        return costs | {"decision_steps": steps, "return": 0.0}

    def measure(job):
        is_episodes = job.config.candidates == "episodes"
        asked.append(("episodes" if is_episodes else "branches", job.seed, job.total_timesteps))
        return row(job.total_timesteps, *((0, 0.01) if is_episodes else (7, 0.05)))

    monkeypatch.setattr(presets, "measure", measure)
    monkeypatch.setattr(presets.importlib.util, "find_spec", lambda name: None)
    case = presets.Case({"n_envs": 10, "n_steps": 10}, {"horizon": 2}, 1_000)
    written = []
    known = {("CartPole-v1", "episodes, equal steps", 1): row(1_000, 0, 0.01)}
    presets.race("CartPole-v1", case, [0, 1], known, written.append)
    assert asked == [
        ("branches", 0, 1_000),
        ("branches", 1, 1_000),
        ("episodes", 0, 1_000),
        ("episodes", 0, 5_000),
        ("episodes", 1, 5_000),
        ("episodes", 0, 8_000),
        ("episodes", 1, 8_000),
    ]
    assert [row["what"] for row in written[-2:]] == ["episodes, equal environment steps"] * 2
