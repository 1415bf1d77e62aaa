"""Rollouts on the device: callbacks see every step, and change nothing; without them no Python runs per step."""

import sys
from collections import Counter

import jax
import numpy as np
import pytest
from sb3.contract import LINE, N_ENVS, N_STEPS, ROLLOUT, Bar, Recorder, Walk, flat, make, venv
from stable_baselines3 import PPO
from stable_baselines3.common.callbacks import (
    BaseCallback,
    EvalCallback,
    EveryNTimesteps,
    ProgressBarCallback,
)

from grpo_jax.spaces import Discrete
from sb3_bridge import GRPO, WorldVecEnv


def run_with(callback, world=LINE, **settings):
    env = WorldVecEnv(world, n_envs=N_ENVS)
    model = make(GRPO, "device", env=env, **settings)
    model.learn(3 * ROLLOUT, callback() if callback else None)
    return model, env


CALLBACKS = {
    "recorder": Recorder,
    "function": lambda: lambda variables, names: True,
    "evaluation": lambda: EvalCallback(
        venv("device"), n_eval_episodes=2, eval_freq=5, deterministic=False, verbose=0
    ),
    "every": lambda: EveryNTimesteps(10, Recorder()),
    "list": lambda: [Recorder(), Recorder()],
    "looks": lambda: Looks(),
}


class Looks(BaseCallback):
    """Asks the model and the environments for all that it can, and changes nothing."""

    def _on_step(self):
        self.training_env.environments  # noqa: B018
        self.training_env.get_attr("world")
        self.model.predict(self.locals["new_obs"])
        self.model.get_parameters()
        return True


@pytest.fixture(scope="module")
def plain_run():
    return run_with(None)


@pytest.mark.parametrize("name", CALLBACKS)
def test_a_run_with_callbacks_is_the_same_run(name, plain_run):
    (plain, plain_env), (model, env) = plain_run, run_with(CALLBACKS[name])
    np.testing.assert_array_equal(flat(model), flat(plain))
    np.testing.assert_array_equal(model.key_words, plain.key_words)
    np.testing.assert_array_equal(model._last_obs, plain._last_obs)
    np.testing.assert_array_equal(model._last_episode_starts, plain._last_episode_starts)
    jax.tree.map(np.testing.assert_array_equal, env.environments, plain_env.environments)
    episodes = [[(info["r"], info["l"]) for info in each.ep_info_buffer] for each in (model, plain)]
    assert episodes[0] == episodes[1] and len(episodes[0]) > 10
    assert (model.num_timesteps, model.simulator_steps) == (plain.num_timesteps, plain.simulator_steps)


def test_the_environments_stand_where_the_step_left_them():
    class Stands(BaseCallback):
        def _on_step(self):
            env, step = self.training_env, self.locals
            np.testing.assert_array_equal(env.environments.observation, step["new_obs"])
            states = env.get_attr("environments", 1)[0].state
            np.testing.assert_array_equal(states, step["new_obs"].astype(np.int32))
            lengths = np.asarray(env.environments.episode_length)
            np.testing.assert_array_equal(lengths, step["new_obs"][:, 1])
            return True

        def _on_rollout_end(self):
            np.testing.assert_array_equal(self.training_env.environments.observation, self.locals["new_obs"])

    callback = Stands()
    make(GRPO, "device").learn(2 * ROLLOUT, callback)
    assert callback.n_calls == 2 * N_STEPS


def test_pictures_show_the_step():
    """``render`` in a callback shows what that step reached."""
    env = WorldVecEnv("CartPole-v1", n_envs=1, seed=0, render_mode="rgb_array")
    frames, states = [], []

    class Film(BaseCallback):
        def _on_step(self):
            if self.n_calls in (2, 7):
                frames.append(self.training_env.render("rgb_array"))
                states.append(self.training_env.environments)
                np.testing.assert_array_equal(states[-1].observation, self.locals["new_obs"])
            return True

    make(GRPO, "device", env=env, n_steps=8, batch_size=8, n_epochs=1, horizon=2, bootstrap=True).learn(
        8, Film()
    )
    assert not np.array_equal(frames[0], frames[1])
    for frame, state in zip(frames, states, strict=True):
        env.move_to(lambda state=state: state)
        np.testing.assert_array_equal(env.render("rgb_array"), frame)
    env.close()


@pytest.mark.parametrize("progress_bar", [False, True])
def test_without_callbacks_there_is_no_python_per_step(progress_bar, monkeypatch):
    monkeypatch.setattr(
        ProgressBarCallback, "_on_training_start", lambda self: setattr(self, "pbar", Bar([]))
    )
    endless = Walk(Discrete(2), goal=1000, limit=1000)
    counts = []
    for n_steps in (N_STEPS, 8 * N_STEPS):
        model = make(GRPO, "device", endless, n_steps=n_steps)
        model.learn(2 * n_steps)  # compiled
        calls = Counter()

        def count(frame, event, argument, calls=calls):
            if event == "call":
                calls[frame.f_code.co_filename] += 1

        sys.setprofile(count)
        try:
            model.learn(2 * n_steps, reset_num_timesteps=False, progress_bar=progress_bar)
        finally:
            sys.setprofile(None)
        counts.append(sum(calls.values()))
    assert abs(counts[1] - counts[0]) < 7 * N_STEPS / 2 and counts[0] > 100, (
        counts
    )  # not even every second step


def test_a_callback_may_use_the_training_env():
    """As with PPO: an evaluation in the training env disturbs the rollout, but training goes on."""

    class Uses(BaseCallback):
        def _on_step(self):
            if self.n_calls in (3, N_STEPS):
                self.training_env.step(np.zeros(N_ENVS, int))
            if self.n_calls in (5, 2 * N_STEPS):
                self.training_env.reset()
            return True

        def _on_rollout_end(self):
            self.training_env.step(np.zeros(N_ENVS, int))

    for algorithm in (PPO, GRPO):
        assert make(algorithm, "device").learn(3 * ROLLOUT, Uses()).num_timesteps == 3 * ROLLOUT
