"""Bodies that LunarLander makes to be drawn are removed where nobody draws them, and nothing else changes."""

import gymnasium as gym
import numpy as np
import pytest
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.vec_env import DummyVecEnv

from sb3_bridge import GRPO
from sb3_bridge.clones.decoration import MOST, decorated, tidy

pytest.importorskip("Box2D")
IDS = ("LunarLander-v3", "LunarLanderContinuous-v3")


def play(env_id, touch, n_steps=300):
    """All that a lander with a render mode shows in random steps, ``touch`` being called between them."""
    env = gym.make(env_id, render_mode="rgb_array")
    shown = [env.reset(seed=3)[0]]
    env.action_space.seed(0)
    for _ in range(n_steps):
        observation, reward, terminated, truncated, _ = env.step(env.action_space.sample())
        touch(env)
        shown += [observation, reward, terminated, truncated]
        if terminated or truncated:
            shown.append(env.reset()[0])
    env.close()
    return shown


@pytest.mark.parametrize("env_id", IDS)
def test_nothing_that_is_seen_depends_on_the_bodies(env_id):
    most = []

    def clean(env):
        most.append(len(env.unwrapped.particles))
        tidy(env.unwrapped)
        assert len(env.unwrapped.particles) <= MOST

    for one, two in zip(play(env_id, lambda env: None), play(env_id, clean), strict=True):
        np.testing.assert_array_equal(one, two)
    assert max(most) > MOST  # some were removed


def test_what_is_drawn_stays():
    def draw(env):
        env.render()
        before = list(env.unwrapped.particles)
        tidy(env.unwrapped)
        assert env.unwrapped.particles == before

    play("LunarLanderContinuous-v3", draw, n_steps=60)


@pytest.mark.parametrize(
    "settings", [{"candidates": "episodes"}, {"dynamics": "clone", "horizon": 2, "branch_every": 32}]
)
def test_training_removes_them(settings):
    vec_env = make_vec_env("LunarLander-v3", n_envs=2, seed=0)  # SB3 gives it a render mode
    GRPO("MlpPolicy", vec_env, n_steps=64, batch_size=32, n_epochs=1, **settings).learn(256)
    assert [len(one.unwrapped.particles) <= MOST for one in vec_env.envs] == [True, True]
    assert decorated(vec_env) == [one.unwrapped for one in vec_env.envs]


def test_no_other_environment_is_decorated():
    assert decorated(DummyVecEnv([lambda: gym.make("CartPole-v1")])) == []
    assert decorated(object()) == []
