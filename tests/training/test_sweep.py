"""Sweeps: settings and seeds in one program are what each of them is alone, and what diverges stops alone."""

import dataclasses

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import grpo_jax
from grpo_jax.config import field_names
from grpo_jax.spaces import Discrete
from grpo_jax.training import agents
from grpo_jax.training.run import _chunk
from grpo_jax.training.sweep import expand, interquartile_mean, programs_of
from tests.test_cli import compile_once  # noqa: F401  (a fixture)
from tests.toys import Line

TINY = grpo_jax.GRPOConfig(
    n_envs=2, n_steps=8, batch_size=8, n_epochs=2, horizon=4, net_arch=(8,), learning_rate_decay="linear"
)
TOTAL = 4 * 16
LINE = Line(Discrete(2))
KEY = jax.random.key(0)
RATES = [1e-3, 1e-2]


def sweep(config=TINY, total=TOTAL, **options):
    return grpo_jax.sweep(config, LINE, KEY, total, **options)


@pytest.fixture(scope="module")
def swept():
    """Four settings, three seeds: twelve agents."""
    return sweep(n_seeds=3, learning_rate=RATES, gamma=[0.9, 0.99])


@pytest.mark.parametrize("block", [1, 2, 3, 5])
@pytest.mark.parametrize("n_agents", [1, 3, 6])
def test_a_map_in_blocks_is_a_map(block, n_agents):
    tree = {"x": jnp.arange(2.0 * n_agents).reshape(n_agents, 2), "key": jax.random.split(KEY, n_agents)}

    def one(tree):
        return tree["x"].sum() + jax.random.uniform(tree["key"]), tree["key"]

    done = jax.jit(lambda tree: agents.over_agents(one, tree, block))(tree)
    chex.assert_trees_all_equal(*(jax.tree.map(_plain, each) for each in (done, jax.vmap(one)(tree))))


def _plain(leaf):
    return jax.random.key_data(leaf) if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key) else leaf


def test_blocks_cover_all_agents_and_waste_little():
    for n_agents in range(1, 130):
        for most in (0, 1, 2, 3, 5, 8, 64, 1000):
            size = agents.block_size(n_agents, most)
            assert 1 <= size <= max(1, min(most, n_agents))
            wasted = -(-n_agents // size) * size - n_agents
            assert wasted < -(-n_agents // size) and (n_agents > most or size == n_agents)
    assert agents.block_size(64, 5) == 4


@pytest.mark.usefixtures("as_on_a_cpu")
def test_a_small_cache_or_a_large_run_makes_small_blocks(monkeypatch):
    large = TINY.replace(n_envs=64, n_steps=64, horizon=1)
    assert agents.agent_bytes(large, LINE) > 10 * agents.agent_bytes(TINY, LINE)
    assert agents.default_block(TINY, LINE, 64) == 64
    monkeypatch.setattr(agents, "CPU_BYTES", 8 * agents.agent_bytes(TINY, LINE))
    assert agents.default_block(TINY, LINE, 64) == 8
    assert agents.default_block(large, LINE, 64) == 1


@pytest.mark.parametrize("block", [1, 5])
def test_results_do_not_depend_on_the_block(swept, block):
    other = sweep(n_seeds=3, block=block, learning_rate=RATES, gamma=[0.9, 0.99])
    for name, values in swept.metrics.items():
        np.testing.assert_allclose(other.metrics[name], values, rtol=1e-4, atol=1e-6, err_msg=name)
    for one, state in zip(other.states, swept.states, strict=True):
        chex.assert_trees_all_close(one.params, state.params, rtol=1e-3, atol=1e-5)


def test_an_agent_is_the_run_of_its_setting_and_seed(swept):
    assert swept.settings[1] == {"learning_rate": 1e-3, "gamma": 0.99}
    assert swept.metrics["episode_return"].shape == (4, 3, 4)
    for p, config in enumerate(swept.configs):
        assert config == TINY.replace(**swept.settings[p])
        state, metrics = grpo_jax.run(config, LINE, KEY, TOTAL, n_seeds=3)
        for name, values in metrics.items():
            np.testing.assert_allclose(swept.metrics[name][p], values, rtol=1e-4, atol=1e-6)
        chex.assert_trees_all_close(swept.states[p].params, state.params, rtol=1e-3, atol=1e-5)


def test_agents_of_equal_blocks_are_equal_bit_for_bit():
    """In blocks of one size every agent's arithmetic is the same."""
    result = sweep(n_seeds=4, block=2, learning_rate=RATES)
    for p, config in enumerate(result.configs):
        state, metrics = grpo_jax.run(config, LINE, KEY, TOTAL, n_seeds=4, block=2)
        chex.assert_trees_all_equal(result.states[p].params, state.params)
        chex.assert_trees_all_equal({name: result.metrics[name][p] for name in metrics}, metrics)


def test_seeds_are_common_to_all_settings(swept):
    """The first rollout knows nothing of the settings yet."""
    first = swept.metrics["n_episodes"][..., 0], swept.metrics["entropy"][..., 0]
    assert (first[0] == first[0][:1]).all()
    alone = sweep(learning_rate=RATES)
    state, _ = grpo_jax.run(alone.configs[1], LINE, KEY, TOTAL)
    chex.assert_trees_all_close(
        jax.tree.map(lambda leaf: leaf[0], alone.states[1].params), state.params, rtol=1e-4
    )


def test_zipped_values_belong_together():
    settings = expand(TINY, {"learning_rate": RATES, "gamma": np.array([0.5, 1])}, zipped=True)
    assert settings == [{"learning_rate": 1e-3, "gamma": 0.5}, {"learning_rate": 1e-2, "gamma": 1.0}]


@pytest.mark.parametrize("name", field_names(traced=True))
def test_every_traced_field_is_one_program(name):
    values = [1.5, 2.0] if name == "dual_clip" else [0.5, 0.25]
    configs = [TINY.replace(**setting) for setting in expand(TINY, {name: values}, zipped=False)]
    assert programs_of(configs) == [[0, 1]]
    stacked = getattr(agents.stack_configs(configs), name)
    np.testing.assert_allclose(stacked, values)
    assert stacked.weak_type  # as numbers are: under x64, strong float64 would promote float32 parameters


def test_fields_that_shape_a_program_are_programs_of_their_own(monkeypatch):
    n_programs = 0
    lower = _chunk.lower

    class Spy:
        @staticmethod
        def lower(*args):
            nonlocal n_programs
            n_programs += 1
            return lower(*args)

    monkeypatch.setattr("grpo_jax.training.run._chunk_in_place", Spy)
    result = sweep(n_seeds=2, n_steps=[8, 4], learning_rate=RATES)
    assert n_programs == 2
    assert [setting["n_steps"] for setting in result.settings] == [8, 8, 4, 4]
    assert result.metrics["entropy"].shape == (4, 2, 8)  # half the steps, twice the iterations
    assert np.isnan(result.metrics["entropy"][:2, :, 4:]).all()
    assert np.isfinite(result.metrics["entropy"][2:]).all() and not result.failed_at.any()
    _, metrics = grpo_jax.run(TINY.replace(n_steps=4, learning_rate=1e-2), LINE, KEY, TOTAL, n_seeds=2)
    np.testing.assert_allclose(result.metrics["entropy"][3], metrics["entropy"], rtol=1e-4)
    assert result.states[3].iteration.tolist() == [8, 8]


def test_no_kl_is_another_program_than_some():
    configs = [TINY.replace(kl_coef=value) for value in (None, 0.1, 0.2)]
    assert programs_of(configs) == [[0], [1, 2]]


# A learning rate at which float32 is left behind at once.
TOO_LARGE = 1e38


@pytest.mark.parametrize("block", [1, 4])
def test_an_agent_that_diverges_stops_alone(block):
    result = sweep(n_seeds=2, block=block, learning_rate=[1e-2, TOO_LARGE], max_grad_norm=[1.0])
    assert (result.failed_at[0] == 0).all() and (result.failed_at[1] > 0).all()
    reached = result.states[1].iteration
    np.testing.assert_array_equal(reached, result.failed_at[1] - 1)
    chex.assert_tree_all_finite(result.states[1].params)
    for seed, failed in enumerate(result.failed_at[1]):
        assert np.isnan(result.metrics["entropy"][1, seed, failed:]).all()
        faults = sum(
            result.metrics[f"nonfinite_{kind}"][1, seed, failed - 1] for kind in ("state", "updates")
        )
        assert faults > 0
    alone, _ = grpo_jax.run(result.configs[0], LINE, KEY, TOTAL, n_seeds=2)
    chex.assert_trees_all_close(result.states[0].params, alone.params, rtol=1e-4)
    assert result.best == 0 and np.isnan(result.final_returns[1]).all() and result.scores[1] == -np.inf
    assert [row["failed"] for row in result.rows()] == [0, 2]


def test_a_sweep_whose_agents_all_diverge_ends_and_says_so():
    seen = []
    result = sweep(total=16 * 100, n_seeds=2, learning_rate=[TOO_LARGE], callback=seen.append)
    assert (result.failed_at > 0).all() and result.best is None
    assert len(seen) < 10
    # The programs that follow are run all the same.
    result = sweep(n_seeds=1, horizon=[4, 3], learning_rate=[TOO_LARGE, 1e-3], zipped=True)
    assert result.best == 1


def test_callbacks_see_settings_and_seeds_and_a_state_that_goes_on(swept, tmp_path):
    seen = []

    def callback(chunk):
        seen.append(chunk.metrics["entropy"])
        grpo_jax.save(tmp_path / "half.msgpack", chunk.state)
        return chunk.iteration < 2

    fields = {"learning_rate": RATES, "gamma": [0.9, 0.99]}
    half = sweep(n_seeds=3, callback=callback, callback_every=1, **fields)
    assert [values.shape for values in seen] == [(4, 3, 1)] * 2
    assert not half.failed_at.any()  # stopped, not spoiled
    state = grpo_jax.restore(tmp_path / "half.msgpack", TINY, LINE, n_seeds=12)
    rest = sweep(n_seeds=3, state=state, **fields)
    for one, other in zip(rest.states, swept.states, strict=True):
        chex.assert_trees_all_equal(one.params, other.params)
    np.testing.assert_array_equal(rest.metrics["entropy"], swept.metrics["entropy"][..., 2:])


def test_a_stop_leaves_later_programs_unrun():
    result = sweep(horizon=[4, 3], callback=lambda chunk: False)
    assert result.states[0] is not None and result.states[1] is None
    assert result.scores[1] == -np.inf and not result.failed_at.any()


def test_interquartile_mean():
    returns = np.array(
        [[0.0, 1, 2, 3, 4, 5, 6, 100], [np.nan, np.nan, 2, 2, 2, 2, 2, 2], [np.nan] * 3 + [9.0] * 5]
    )
    np.testing.assert_allclose(interquartile_mean(returns), [3.5, 2.0, -np.inf])


def test_the_score_is_the_middle_of_the_last_returns(swept):
    np.testing.assert_allclose(swept.final_returns, swept.metrics["episode_return"][..., -1], rtol=1e-6)
    assert swept.best == int(np.argmax(np.sort(swept.final_returns, axis=1).mean(axis=1)))
    row = swept.rows()[swept.best]
    assert row["score"] == pytest.approx(swept.scores.max()) and row["min"] <= row["median"] <= row["max"]


@pytest.mark.parametrize(
    ("fields", "error", "message"),
    [
        ({}, ValueError, "a sweep needs fields"),
        ({"learning_rates": RATES}, TypeError, "'learning_rates' is no field .* did you mean learning_rate"),
        ({"gamma": [0.9, 1.5]}, ValueError, "gamma=1.5 must be finite and between 0 and 1"),
        ({"horizon": [4, 0]}, ValueError, "horizon=0 must be an integer of at least 1"),
        ({"n_steps": [8, 6], "branch_every": [4]}, ValueError, "branch_every=4 must divide n_steps=6"),
        ({"learning_rate": 1e-3}, TypeError, r"learning_rate=0.001 must be a list of values"),
        ({"baseline": "mean"}, TypeError, "baseline='mean' must be a list of values"),
        ({"gamma": []}, ValueError, r"gamma=\[\] has no value"),
        ({"learning_rate": [1e-3, lambda count: 1e-3]}, TypeError, "is a schedule, which cannot be swept"),
        (
            {"gamma": [0.9], "learning_rate": RATES, "zipped": True},
            ValueError,
            "1 of gamma, 2 of learning_rate",
        ),
        ({"gamma": [0.9], "n_seeds": 0}, ValueError, "n_seeds=0 must be at least 1"),
        ({"gamma": [0.9], "block": 0}, ValueError, "block=0 must be None or an integer of at least 1"),
        ({"gamma": [0.9], "callback_at": 0}, ValueError, "callback_at=0"),
        ({"network": ["mlp", "cnn"]}, ValueError, "network='cnn'"),
        ({"horizon": [4, 3], "state": "any"}, ValueError, "these settings are 2 programs"),
    ],
)
def test_bad_input_is_refused_before_anything_is_compiled(fields, error, message, monkeypatch):
    monkeypatch.setattr("grpo_jax.training.sweep.run_settings", lambda *_, **__: pytest.fail("was run"))
    with pytest.raises(error, match=message):
        sweep(**fields)


def test_a_block_needs_seeds():
    with pytest.raises(ValueError, match="block=2 is a number of seeds side by side"):
        grpo_jax.run(TINY, LINE, KEY, TOTAL, block=2)


def test_swapped_arguments_are_named():
    with pytest.raises(TypeError, match="config and env are swapped"):
        grpo_jax.sweep(LINE, TINY, KEY, TOTAL, gamma=[0.9])
    assert not {f.name for f in dataclasses.fields(grpo_jax.GRPOConfig)} & {
        "zipped",
        "block",
        "state",
        "callback",
    }
