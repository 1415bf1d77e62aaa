"""Learning goes on from a file, in the same and in other environments; PPO is the oracle."""

from __future__ import annotations

import chex
import numpy as np
import pytest
from sb3.files.models import (
    KINDS,
    ROLLOUT,
    assert_equal_parameters,
    assert_equal_state,
    differ,
    make,
    make_env,
    make_lane,
    reference_of,
    saved,
)
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.utils import LinearSchedule

from sb3_bridge import GRPO


@pytest.mark.parametrize("kind", KINDS)
def test_learning_goes_on_in_the_same_environments(kind, tmp_path):
    """The environments' state is not in the file: with ``force_reset=False`` they stand where they stood."""
    whole = make(kind).learn(2 * ROLLOUT).learn(2 * ROLLOUT, reset_num_timesteps=False)
    at_once = make(kind).learn(4 * ROLLOUT)
    half = make(kind).learn(2 * ROLLOUT)
    half.save(tmp_path / "half")
    loaded = GRPO.load(tmp_path / "half", env=half.get_env(), force_reset=False)
    assert_equal_state(loaded, half)
    loaded.learn(2 * ROLLOUT, reset_num_timesteps=False)
    assert_equal_state(loaded, whole)
    assert_equal_state(loaded, at_once)
    assert differ(loaded, half)
    assert len(loaded.ep_info_buffer) > 0
    assert loaded.simulator_steps == whole.simulator_steps > half.simulator_steps > 0


class SaveAt(BaseCallback):
    """Saves before the given rollout."""

    def __init__(self, path, iteration):
        super().__init__()
        self.path, self.iteration = path, iteration

    def _on_rollout_start(self):
        if self.num_timesteps == self.iteration * ROLLOUT:
            self.model.save(self.path)

    def _on_step(self):
        return True


@pytest.mark.parametrize("kind", KINDS)
def test_learning_goes_on_in_the_middle_of_a_schedule(kind, tmp_path, no_pickle):
    """In new environments, which stand at their (only) first state as the old ones did when the file was written."""
    model = make(
        kind,
        make_lane(kind),
        learning_rate=LinearSchedule(1e-2, 1e-4, 1.0),
        clip_range=LinearSchedule(0.3, 0.1, 1.0),
        kl_coef=0.1,
        reference="ema",
        reference_decay=0.5,
    )
    model.learn(4 * ROLLOUT, callback=SaveAt(tmp_path / "half", 2))
    loaded = GRPO.load(tmp_path / "half", env=make_lane(kind))
    assert (loaded.num_timesteps, loaded._n_updates) == (2 * ROLLOUT, 4)
    assert differ(loaded, model)
    reference, parameters = reference_of(loaded), loaded.policy.state_dict()
    assert any(np.any(leaf != np.asarray(parameters[name])) for name, leaf in reference.items())
    loaded.learn(2 * ROLLOUT, reset_num_timesteps=False)
    assert_equal_state(loaded, model)
    assert loaded.policy.optimizer.param_groups[0]["lr"] == model.policy.optimizer.param_groups[0]["lr"]
    assert loaded.policy.optimizer.param_groups[0]["lr"] == pytest.approx(1e-4)


@pytest.mark.parametrize("kind", KINDS)
def test_counters_are_ppos(kind, trained, ppo):
    models = (trained[kind], ppo)
    for again, model in zip((False, True), models, strict=True):
        loaded = type(model).load(saved(model), env=make_env("host" if again else kind))
        loaded.learn(ROLLOUT, reset_num_timesteps=False)
        assert (loaded.num_timesteps, loaded._n_updates) == (3 * ROLLOUT, 6)
        loaded.learn(ROLLOUT)
        assert (loaded.num_timesteps, loaded._n_updates) == (ROLLOUT, 8)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("force_reset", [True, False])
def test_the_number_of_environments_may_change(kind, force_reset, trained):
    n_envs = 4
    loaded = GRPO.load(saved(trained[kind]), env=make_env(kind, n_envs), force_reset=force_reset)
    assert (loaded.n_envs, loaded._last_obs) == (n_envs, None)
    loaded.learn(8 * n_envs, reset_num_timesteps=False)
    assert loaded.num_timesteps == 2 * ROLLOUT + 8 * n_envs
    assert loaded._last_obs.shape == (n_envs, 4)
    assert np.all(loaded.episode_time <= 8)


@pytest.mark.parametrize("kind", KINDS)
def test_an_environment_may_come_later(kind, trained, ppo):
    for model in (trained[kind], ppo):
        loaded = type(model).load(saved(model))
        with pytest.raises((ValueError, AssertionError)):
            loaded.learn(ROLLOUT, reset_num_timesteps=False)
        with pytest.raises(AssertionError, match="different from the number of environments"):
            loaded.set_env(make_env(kind if model is not ppo else "host", 3))
        loaded.set_env(make_env(kind if model is not ppo else "host"))
        assert loaded._last_obs is None
        loaded.learn(ROLLOUT, reset_num_timesteps=False)
        assert loaded.num_timesteps == 3 * ROLLOUT
    at_once = GRPO.load(saved(trained[kind]), env=make_env(kind))
    later = GRPO.load(saved(trained[kind]))
    later.set_env(make_env(kind))
    later.env.seed(0)  # as load does
    for loaded in (at_once, later):
        loaded.learn(ROLLOUT, reset_num_timesteps=False)
    assert_equal_state(at_once, later)


def test_a_model_may_change_its_path(trained):
    """What was trained in the simulator learns on from a gym env, and the other way round."""
    model = trained["device"]
    on_host = GRPO.load(saved(model), env=make_env("host"))  # warns of nothing: the constructor does
    assert_equal_parameters(on_host, model)
    assert on_host.bootstrap is False
    assert on_host.chosen_dynamics == "twin"
    on_host.learn(ROLLOUT, reset_num_timesteps=False)
    # Two actions of each state; four steps each, fewer where a branch ends.
    assert 0 < on_host.simulator_steps - model.simulator_steps <= ROLLOUT * 2 * 4
    assert differ(on_host, model)

    for given in ({}, {"candidates": "episodes"}):
        model = trained["host"] if not given else make("host", **given).learn(2 * ROLLOUT)
        on_device = GRPO.load(saved(model), env=make_env("device"), horizon=4, candidates="auto")
        assert_equal_parameters(on_device, model)
        assert on_device.bootstrap is True
        on_device.learn(ROLLOUT, reset_num_timesteps=False)
        assert 0 < on_device.simulator_steps - model.simulator_steps <= ROLLOUT * 2 * 4
        assert differ(on_device, model)


def assert_reference_is(model, other):
    """Whether the reference of the one is the other, which did not learn on."""
    parameters = {name: np.asarray(leaf) for name, leaf in model.policy.state_dict().items()}
    chex.assert_trees_all_equal(reference_of(other), parameters)


def test_the_reference_is_the_policy_that_was_loaded(trained):
    """Who loads a model and adds ``kl_coef`` stays near that model, not near a random policy."""
    model = trained["host"]
    added = GRPO.load(saved(model), env=make_env("host"), kl_coef=0.1)
    added.learn(ROLLOUT, reset_num_timesteps=False)
    assert_reference_is(model, added)
    fresh = make("host", kl_coef=0.1, seed=5)
    fresh.set_parameters(model.get_parameters())
    fresh.learn(ROLLOUT)
    assert_reference_is(model, fresh)
    # A fixed one stays, in files too.
    again = GRPO.load(saved(added), env=make_env("host"))
    again.learn(ROLLOUT, reset_num_timesteps=False)
    assert_reference_is(model, again)
    without = GRPO.load(saved(added), env=make_env("host"), kl_coef=None)
    assert reference_of(without.learn(ROLLOUT, reset_num_timesteps=False)) is None
