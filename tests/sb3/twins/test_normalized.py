"""Twins behind VecNormalize: the policy's branches see what it sees, and the user's reward what the environment shows."""

from __future__ import annotations

from typing import Any

import gymnasium as gym
import jax
import numpy as np
import pytest
from gymnasium import wrappers
from sb3.sleds import dummy, make
from stable_baselines3.common.vec_env import DummyVecEnv, VecMonitor, VecNormalize

from grpo_jax.noise import as_key
from sb3_bridge import Planner
from sb3_bridge.twins.twin import NoTwin, Twin
from sb3_bridge.update import follow

SETTINGS = {"n_steps": 32, "batch_size": 32, "horizon": 4, "bootstrap": True, "dynamics": "twin"}


def envs(env_id: str = "Acrobot-v1", n: int = 2, max_episode_steps: int | None = 11) -> DummyVecEnv:
    return DummyVecEnv([lambda: gym.make(env_id, max_episode_steps=max_episode_steps)] * n)


@pytest.mark.parametrize("env_id", ["CartPole-v1", "Acrobot-v1", "Pendulum-v1"])
@pytest.mark.parametrize(
    "normed", [{"norm_reward": False}, {"norm_obs": False}, {}, {"clip_obs": 0.7, "clip_reward": 0.2}]
)
def test_the_twin_shows_what_the_wrapper_shows(env_id, normed):
    env = VecNormalize(envs(env_id), **normed)
    env.reset()
    generator = np.random.default_rng(0)
    for _ in range(30):
        env.step(np.array([env.action_space.sample() for _ in range(2)]))
    env.training = False
    twin = Twin(env)
    world = twin.seen(twin.world, True)
    step = jax.jit(jax.vmap(world.step, (None, 0, 0)))
    clipped = n_compared = 0
    for _ in range(40):
        if isinstance(env.action_space, gym.spaces.Discrete):
            actions = generator.integers(env.action_space.n, size=2)
        else:
            actions = generator.uniform(-2, 2, size=(2, 1)).astype(np.float32)
        mine = jax.device_get(step(as_key(jax.random.key(0)), twin.present(), actions))
        seen, rewards, dones, infos = env.step(actions)
        seen = np.array(
            [info.get("terminal_observation", row) for row, info in zip(seen, infos, strict=True)]
        )
        np.testing.assert_array_equal(mine.terminated | mine.truncated, dones)
        np.testing.assert_allclose(mine.observation, seen, rtol=1e-4, atol=1e-4)
        np.testing.assert_allclose(mine.reward, rewards, rtol=1e-4, atol=1e-6)
        clipped += np.sum(np.abs(seen) == np.float32(0.7)) if "clip_obs" in normed else 0
        n_compared += 2
    assert n_compared == 80
    assert clipped > 0 or "clip_obs" not in normed


@pytest.mark.parametrize("normed", [{}, {"norm_obs": False}, {"norm_reward": False}])
@pytest.mark.parametrize("is_outer", [True, False])
def test_auto_takes_a_twin_behind_the_wrapper_and_goes_on_with_it(normed, is_outer):
    env = VecNormalize(envs(), **normed)
    model = make(VecMonitor(env) if is_outer else env, **SETTINGS | {"dynamics": "auto"})
    assert model.chosen_dynamics == "twin"
    model.learn(64)
    programs = follow.of()._cache_size()
    model.learn(128, reset_num_timesteps=False)
    assert model.chosen_dynamics == "twin" and model.simulator_steps > 64 * 3
    assert follow.of()._cache_size() == programs  # statistics that move compile nothing anew


def test_the_users_reward_sees_what_the_environment_shows():
    seen: list[np.ndarray] = []

    def reward(state: Any, action: Any, next_state: Any) -> np.ndarray:
        assert isinstance(state, np.ndarray)
        seen.append(np.abs(np.concatenate([state, next_state])).max(0))
        return next_state[:, 0]

    # Without clipping, and divided by next to nothing, what is normalised is far out of bounds.
    env = VecNormalize(envs(), clip_obs=1e6, training=False)
    env.obs_rms.var = np.full(6, 1e-6)
    model = make(env, reward_function=reward, **SETTINGS)
    seen.clear()
    model.learn(64)
    assert len(seen) > 2
    assert np.max(seen, 0)[0] <= 1.0 + 1e-6  # the cosine of an angle

    planner = Planner(model, env, dynamics="twin", horizon=3, n_rollouts=2, seed=0)
    seen.clear()
    planner.predict(env.reset())
    assert len(seen) > 0
    assert np.max(seen, 0)[0] <= 1.0 + 1e-6


def test_an_observation_that_differs_is_found_behind_the_wrapper_too():
    class Wrong(gym.ObservationWrapper):
        age = 0

        def observation(self, observation: Any) -> Any:
            self.age += 1
            return observation + np.float32(1e-3) * (self.age > 600)

    env = VecNormalize(dummy(lambda: Wrong(gym.make("CartPole-v1"))))
    model = make(env, **SETTINGS)
    with pytest.raises(NoTwin, match="the twin's observation is"):
        model.learn(1024)


def test_a_normalizer_that_is_switched_on_or_doubled_is_seen():
    inner = VecNormalize(envs(), norm_obs=False, norm_reward=False)
    env = VecNormalize(inner, norm_reward=False)
    model = make(env, **SETTINGS)
    model.learn(64)
    inner.norm_reward = True
    with pytest.raises(NoTwin, match="VecNormalize"):
        model.learn(64, reset_num_timesteps=False)


REFUSED = {
    "dict": lambda: VecNormalize(
        dummy(lambda: wrappers.TransformObservation(gym.make("CartPole-v1"), lambda x: {"x": x}, DICT)),
        norm_obs_keys=["x"],
    ),
    "twice": lambda: VecNormalize(VecNormalize(envs(), norm_obs=False), norm_reward=False),
}
DICT = gym.spaces.Dict({"x": gym.make("CartPole-v1").observation_space})


@pytest.mark.parametrize("kind", REFUSED)
def test_other_normalizers_are_refused(kind):
    with pytest.raises(NoTwin, match="VecNormalize"):
        make(REFUSED[kind](), policy="MultiInputPolicy" if kind == "dict" else "MlpPolicy", **SETTINGS)
