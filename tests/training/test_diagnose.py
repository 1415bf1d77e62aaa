"""What a run is told about its groups, and that no program holds a NaN that jax_debug_nans would find."""

import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from toys import Line

import grpo_jax
from grpo_jax.spaces import Discrete
from grpo_jax.training.diagnose import warn_without_spread
from grpo_jax.training.metrics import explained_variance

LINE = Line(Discrete(2))
SHORT = grpo_jax.GRPOConfig(n_envs=4, n_steps=3, batch_size=12, n_epochs=1, horizon=6, net_arch=(8,))


@pytest.fixture
def debug_nans():
    """A function that switches jax_debug_nans; it is off afterwards."""
    yield lambda on: jax.config.update("jax_debug_nans", on)
    jax.config.update("jax_debug_nans", False)


@pytest.mark.parametrize(
    "config", [SHORT, SHORT.replace(candidates="episodes", bootstrap=True)], ids=["branches", "episodes"]
)
def test_runs_before_the_first_episode_has_ended(config, debug_nans):
    """Four episodes of at least 4 steps in 3 steps: nothing is known yet. Programs of one setting are not the other's."""
    for on in (False, True, False):
        debug_nans(on)
        result = grpo_jax.train(config, LINE, jax.random.key(0), 12)
        state, metrics = grpo_jax.run(config, LINE, jax.random.key(0), 12)
        for seen in (result.metrics, metrics):
            expected = 0.0 if on else np.nan
            np.testing.assert_array_equal(seen["episode_return"], [expected])
            np.testing.assert_array_equal(seen["episode_length"], [expected])
            assert seen["n_episodes"] == 0.0
        np.testing.assert_array_equal(state.environments.last_return, 0.0)


def test_a_mean_over_the_environments_that_finished_an_episode(debug_nans):
    debug_nans(True)
    _, metrics = grpo_jax.run(SHORT.replace(n_steps=6, batch_size=24), LINE, jax.random.key(0), 48)
    ended = metrics["n_episodes"][0]
    assert ended < 4 and metrics["n_episodes"][1] >= 4 - ended
    assert 4.0 <= metrics["episode_length"][1] <= 10.0 and metrics["episode_return"][1] >= 10.0


def test_explained_variance(debug_nans):
    value, target = jnp.array([1.0, 2.0, 3.0]), jnp.array([1.0, 3.0, 2.0])
    assert explained_variance(value, target) == pytest.approx(1 - 2 / 2)
    assert explained_variance(target, target) == 1.0
    assert np.isnan(explained_variance(value, jnp.ones(3)))
    debug_nans(True)
    assert jax.jit(lambda *args: explained_variance(*args))(value, jnp.ones(3)) == 0.0


def told(config, *shares):
    with pytest.warns(grpo_jax.NoSpreadWarning) as caught:
        warn_without_spread(config, *shares)
    (warning,) = caught
    return str(warning.message)


def test_equal_groups_and_groups_below_the_floor_get_different_advice():
    config = grpo_jax.GRPOConfig(horizon=7, spread_floor=1e-4)
    equal = told(config, np.ones(3), np.zeros(3))
    assert "all earned the same return" in equal and "horizon=7" in equal and "spread_floor" not in equal
    below = told(config, np.ones(3), np.full(3, 0.75))
    assert "75.0% of the groups differed" in below and "(25.0% of the groups were equal)" in below
    assert "spread_floor=0.0001" in below and "lower spread_floor" in below and "horizon" not in below
    traced = told(config.replace(spread_floor=jnp.float32(0.5)), 1.0, 1.0)
    assert "spread_floor=0.5" in traced
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warn_without_spread(config, np.array([1.0, 0.9]), np.array([1.0, 0.9]))


@pytest.mark.parametrize("constant", [0.0, 1e4])
def test_what_is_learned_does_not_depend_on_a_constant_in_the_reward(constant):
    """The warning at a floor that hides the differences, none at the default, where they are learned from."""
    endless = Line(Discrete(2), goal=100)  # else an end would cost the constant
    env = grpo_jax.make(
        endless, reward_function=lambda state, action, reached: constant + 0.1 * (action - 0.5)
    )
    config = SHORT.replace(n_steps=8, batch_size=32, horizon=4, n_epochs=4, learning_rate=1e-2)
    result = grpo_jax.train(config, env, jax.random.key(0), 32 * 15)
    assert result.metrics["frac_below_floor"].max() == 0.0
    assert result.metrics["episode_return"][-1] > 45.0  # 55 for walking all the time
    if constant:
        with pytest.warns(
            grpo_jax.NoSpreadWarning, match="100.0% of the groups differed, but by no more than"
        ):
            result = grpo_jax.train(config.replace(spread_floor=1e-3), env, jax.random.key(0), 64)
        np.testing.assert_array_equal(result.metrics["frac_below_floor"], 1.0)
        np.testing.assert_array_equal(result.metrics["grad_norm"], 0.0)
