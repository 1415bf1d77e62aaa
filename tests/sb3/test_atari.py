"""Atari through SB3's wrappers: frames that VecFrameStack keeps are followed by no branch, those of an environment are."""

import gymnasium as gym
import pytest
from sb3.sleds import told
from stable_baselines3.common.atari_wrappers import AtariWrapper
from stable_baselines3.common.env_util import make_atari_env
from stable_baselines3.common.vec_env import DummyVecEnv, VecFrameStack

from sb3_bridge import GRPO
from sb3_bridge.clones.replay_check import check

pytest.importorskip("ale_py", reason="ale-py is not installed")
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore:.*os.fork")

SMALL = {"n_steps": 8, "batch_size": 16, "n_epochs": 1, "seed": 0, "device": "cpu", "verbose": 1}
SMALL |= {"policy_kwargs": {"net_arch": [8], "features_extractor_kwargs": {"features_dim": 8}}}
ID = "ALE/Pong-v5"


def test_stacked_frames_are_compared_by_episodes_and_the_reason_is_told(capsys):
    env = VecFrameStack(make_atari_env(ID, n_envs=2, seed=0), 4)
    model = GRPO("CnnPolicy", env, **SMALL)
    assert model.chosen_dynamics == "episodes"
    assert "VecFrameStack keeps frames outside of the environments" in told(capsys)
    model.learn(16)
    observation = model.get_env().reset()
    assert model.predict(observation)[0].shape == (2,) and model.num_timesteps == 16


def test_the_emulator_and_sb3s_wrappers_are_cloned():
    env = AtariWrapper(gym.make(ID, frameskip=1, repeat_action_probability=0.0), frame_skip=4)
    report = check(env)
    assert report.passed, report.reason
    assert report.way == "clone_state/restore_state"


def test_sticky_actions_are_refused():
    """The emulator keeps the action before, which it may repeat, outside of the state that it gives."""
    report = check(gym.make(ID, obs_type="ram", repeat_action_probability=0.25))
    assert not report.passed and "repeat_action_probability=0.0" in report.reason


def test_branches_of_the_emulator_are_followed(capsys):
    stacked = lambda: gym.wrappers.FrameStackObservation(
        gym.make(ID, obs_type="ram", repeat_action_probability=0.0), 2
    )
    settings = SMALL | {"batch_size": 8, "policy_kwargs": {"net_arch": [8]}, "horizon": 2, "branch_every": 8}
    model = GRPO("MlpPolicy", DummyVecEnv([stacked]), dynamics="clone", **settings)
    assert "in exact clones by clone_state/restore_state" in told(capsys)
    model.learn(8)
    assert 0 < model.simulator_steps <= 2 * 6
