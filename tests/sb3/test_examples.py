"""What SB3's documentation shows for PPO, with the name changed; where PPO's side is not known it runs beside."""

import csv

import gymnasium as gym
import matplotlib.pyplot as plt
import numpy as np
import pytest
import torch
from flax import linen
from gymnasium import spaces
from stable_baselines3 import PPO
from stable_baselines3.common import results_plotter
from stable_baselines3.common.callbacks import (
    BaseCallback,
    CheckpointCallback,
    LogEveryNTimesteps,
)
from stable_baselines3.common.env_checker import check_env
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.envs import SimpleMultiObsEnv
from stable_baselines3.common.evaluation import evaluate_policy
from stable_baselines3.common.logger import configure
from stable_baselines3.common.monitor import Monitor
from stable_baselines3.common.utils import set_random_seed
from stable_baselines3.common.vec_env import DummyVecEnv, SubprocVecEnv, VecEnvWrapper, VecNormalize

from sb3_bridge import GRPO

torch.set_num_threads(1)
both = pytest.mark.parametrize("algorithm", [PPO, GRPO])
SMALL = {"n_steps": 32, "batch_size": 32, "n_epochs": 2, "seed": 0, "device": "cpu"}
ENV = "CartPole-v1"


def flat(parameters):
    """One vector of all parameters of a policy's ``state_dict``."""
    return np.concatenate([np.ravel(np.asarray(leaf)) for leaf in parameters.values()])


def progress(folder):
    """The rows of ``progress.csv``."""
    with open(folder / "progress.csv", newline="") as file:
        return list(csv.DictReader(file))


@pytest.fixture
def log_to():
    """``configure`` of SB3's logger, whose files are closed after the test."""
    loggers = []

    def log_to(folder, formats):
        loggers.append(configure(str(folder), formats))
        return loggers[-1]

    yield log_to
    for logger in loggers:
        logger.close()


@both
def test_train_save_load_and_run(algorithm, tmp_path):
    env = make_vec_env(ENV, n_envs=2, seed=0)
    model = algorithm("MlpPolicy", env, **SMALL)
    assert model.learn(total_timesteps=100) is model
    assert model.num_timesteps == 128  # whole rollouts
    model.save(tmp_path / "cartpole")
    observations = np.random.default_rng(0).uniform(-0.2, 0.2, (64, 4)).astype(np.float32)
    expected = model.predict(observations, deterministic=True)[0]
    del model

    model = algorithm.load(tmp_path / "cartpole")
    np.testing.assert_array_equal(model.predict(observations, deterministic=True)[0], expected)
    observation = env.reset()
    for _ in range(50):
        action, state = model.predict(observation)
        assert action.shape == (2,) and action.dtype == np.int64 and state is None
        observation, reward, done, info = env.step(action)
    assert reward.dtype == np.float32 and done.shape == (2,) and len(info) == 2
    assert (tmp_path / "cartpole.zip").is_file()


def test_one_line_and_the_env_of_the_model():
    model = GRPO("MlpPolicy", ENV, **SMALL).learn(64)
    env = model.get_env()
    assert isinstance(env, DummyVecEnv) and env.num_envs == 1 and env.env_is_wrapped(Monitor) == [True]
    observation = env.reset()
    ended = []
    for _ in range(600):
        action, _ = model.predict(observation, deterministic=True)
        observation, _, done, info = env.step(action)
        ended += [info[0]["episode"]["l"]] if done[0] else []
    assert ended and sum(ended) <= 600


def test_multiprocessing():
    def make_env(rank, seed=0):
        def build():
            env = gym.make(ENV)
            env.reset(seed=seed + rank)
            return env

        set_random_seed(seed)
        return build

    env = SubprocVecEnv([make_env(i) for i in range(2)], start_method="spawn")
    try:
        model = GRPO("MlpPolicy", env, **SMALL).learn(128)
        assert model.num_timesteps == 128 and model.n_envs == 2
        action, _ = model.predict(env.reset())
        assert env.step(action)[1].tolist() == [1.0, 1.0]
    finally:
        env.close()


def test_checkpoints(tmp_path):
    env = VecNormalize(make_vec_env(ENV, 2))
    checkpoint = CheckpointCallback(
        save_freq=20, save_path=str(tmp_path), name_prefix="cart", save_vecnormalize=True
    )
    GRPO("MlpPolicy", env, **SMALL).learn(128, callback=checkpoint)
    models = {f"cart_{n}_steps.zip" for n in (40, 80, 120)}
    statistics = {f"cart_vecnormalize_{n}_steps.pkl" for n in (40, 80, 120)}
    assert {path.name for path in tmp_path.iterdir()} == models | statistics
    assert GRPO.load(tmp_path / "cart_80_steps").num_timesteps == 80
    assert VecNormalize.load(str(tmp_path / "cart_vecnormalize_80_steps.pkl"), make_vec_env(ENV)).training


def test_logging_every_n_timesteps(tmp_path, log_to):
    model = GRPO("MlpPolicy", make_vec_env(ENV, 2), **SMALL)
    model.set_logger(log_to(tmp_path, ["csv"]))
    model.learn(192, callback=LogEveryNTimesteps(n_steps=40), log_interval=None)
    assert [row["time/total_timesteps"] for row in progress(tmp_path)] == ["40", "80", "120", "160"]


def test_the_best_model_by_training_reward(tmp_path):
    class SaveOnBest(BaseCallback):
        best, n_saved = -np.inf, 0

        def _on_step(self):
            if self.n_calls % 50 == 0:
                _, rewards = results_plotter.ts2xy(results_plotter.load_results(str(tmp_path)), "timesteps")
                if len(rewards) and np.mean(rewards[-100:]) > self.best:
                    self.best, self.n_saved = float(np.mean(rewards[-100:])), self.n_saved + 1
                    self.model.save(tmp_path / "best_model")
            return True

    callback = SaveOnBest()
    model = GRPO("MlpPolicy", Monitor(gym.make(ENV), str(tmp_path)), **SMALL)
    model.learn(320, callback=callback)
    model.get_env().close()
    assert callback.n_saved >= 1 and GRPO.load(tmp_path / "best_model").num_timesteps % 50 == 0

    results = results_plotter.load_results(str(tmp_path))
    assert results.l.tolist() == results.r.tolist()
    assert [info["l"] for info in model.ep_info_buffer] == results.l.tolist()
    results_plotter.plot_results([str(tmp_path)], 320, results_plotter.X_TIMESTEPS, "CartPole")
    assert len(plt.gcf().axes[0].collections[0].get_offsets()) == len(results)
    plt.close("all")


@both
def test_normalised_environment_and_its_statistics(algorithm, tmp_path):
    env = VecNormalize(make_vec_env(ENV, 2, seed=0), norm_obs=True, norm_reward=True, clip_obs=10.0)
    model = algorithm("MlpPolicy", env, **SMALL).learn(256)
    assert model.get_vec_normalize_env() is env and env.obs_rms.count > 256
    model.save(tmp_path / "model")
    env.save(str(tmp_path / "statistics.pkl"))
    mean = env.obs_rms.mean.copy()
    del model, env

    env = VecNormalize.load(str(tmp_path / "statistics.pkl"), make_vec_env(ENV, 1, seed=1))
    env.training = env.norm_reward = False
    model = algorithm.load(tmp_path / "model", env=env)
    rewards, lengths = evaluate_policy(model, env, n_eval_episodes=5, return_episode_rewards=True)
    assert rewards == lengths and min(lengths) >= 8  # neither reward nor length is normalised
    np.testing.assert_array_equal(env.obs_rms.mean, mean)
    np.testing.assert_array_equal(model.get_vec_normalize_env().obs_rms.mean, mean)
    env.training = True
    model.learn(64)
    assert not np.array_equal(env.obs_rms.mean, mean)


def test_dict_observations(tmp_path):
    env = SimpleMultiObsEnv(random_start=False)
    small = {"net_arch": [8], "features_extractor_kwargs": {"cnn_output_dim": 8}}
    model = GRPO("MultiInputPolicy", env, candidates="episodes", policy_kwargs=small, **SMALL).learn(32)
    observation = model.get_env().reset()
    assert set(observation) == {"vec", "img"}
    action, _ = model.predict(observation, deterministic=True)
    assert action.shape == (1,)
    alone, _ = model.predict(env.reset()[0], deterministic=True)
    assert alone.shape == () and alone == action[0]  # it always starts in the same corner
    model.save(tmp_path / "model")
    loaded = GRPO.load(tmp_path / "model", env=SimpleMultiObsEnv(random_start=False))
    np.testing.assert_array_equal(flat(loaded.policy.state_dict()), flat(model.policy.state_dict()))


def test_a_vector_wrapper_of_ones_own():
    class Only(VecEnvWrapper):
        def __init__(self, venv, key):
            super().__init__(venv, observation_space=venv.observation_space.spaces[key])
            self.key = key

        def reset(self):
            return self.venv.reset()[self.key]

        def step_wait(self):
            observation, reward, done, info = self.venv.step_wait()
            for one in info:
                if "terminal_observation" in one:
                    one["terminal_observation"] = one["terminal_observation"][self.key]
            return observation[self.key], reward, done, info

    env = Only(DummyVecEnv([lambda: SimpleMultiObsEnv()] * 2), "vec")
    model = GRPO("MlpPolicy", env, **SMALL).learn(256)
    assert model.observation_space.shape == (5,) and model.num_timesteps == 256


class Walk(gym.Env):
    """A line of 6 cells; the reward is at its left end."""

    def __init__(self):
        self.observation_space = spaces.Box(0.0, 5.0, (1,), np.float32)
        self.action_space = spaces.Discrete(2)

    def reset(self, seed=None, options=None):
        super().reset(seed=seed)
        self.position = 5
        return np.array([self.position], np.float32), {}

    def step(self, action):
        self.position = int(np.clip(self.position + (1 if action else -1), 0, 5))
        won = self.position == 0
        return np.array([self.position], np.float32), float(won), won, False, {}


def test_environment_of_ones_own():
    check_env(Walk(), warn=True)
    env = make_vec_env(lambda: gym.wrappers.TimeLimit(Walk(), 40), n_envs=4, seed=0)
    model = GRPO("MlpPolicy", env, **{**SMALL, "n_epochs": 10, "learning_rate": 3e-3}).learn(2_560)
    reward, spread = evaluate_policy(model, gym.wrappers.TimeLimit(Walk(), 40), warn=False)
    assert (reward, spread) == (1.0, 0.0)


class FlaxFeatures(linen.Module):
    width: int = 16

    @linen.compact
    def __call__(self, observations):
        return linen.relu(linen.Dense(self.width)(observations))


def test_features_of_ones_own(tmp_path):
    policy_kwargs = {
        "features_extractor_class": FlaxFeatures,
        "features_extractor_kwargs": {"width": 24},
        "net_arch": [8],
    }
    model = GRPO("MlpPolicy", ENV, policy_kwargs=policy_kwargs, **SMALL)
    shapes = {tuple(sorted(np.shape(leaf))) for leaf in model.policy.state_dict().values()}
    assert {(4, 24), (8, 24), (2, 8)} <= shapes and (64, 64) not in shapes
    before = flat(model.policy.state_dict())
    model.learn(64)
    assert (flat(model.policy.state_dict()) != before).mean() > 0.5
    model.save(tmp_path / "model")
    loaded = GRPO.load(tmp_path / "model", custom_objects={"policy_kwargs": policy_kwargs})
    np.testing.assert_array_equal(flat(loaded.policy.state_dict()), flat(model.policy.state_dict()))


def test_network_of_ones_own_size():
    net_arch = {"pi": [32, 24], "vf": [16]}
    policy_kwargs = {"net_arch": net_arch, "activation_fn": torch.nn.ReLU}
    model = GRPO("MlpPolicy", ENV, policy_kwargs=policy_kwargs, **SMALL).learn(64)
    shapes = {tuple(sorted(np.shape(leaf))) for leaf in model.policy.state_dict().values()}
    assert {(4, 32), (24, 32), (2, 24)} <= shapes
    assert model.policy.net_arch == net_arch


@both
def test_evolution_strategy_on_the_parameters(algorithm):
    """Random search around the policy's parameters, the better half of the candidates averaged."""
    torch.manual_seed(0)
    model = algorithm("MlpPolicy", make_vec_env(ENV, 1, seed=0), **SMALL)
    env = Monitor(gym.make(ENV))
    mean = {name: leaf.clone() for name, leaf in model.policy.state_dict().items()}
    assert all(isinstance(leaf, torch.Tensor) for leaf in mean.values())
    scores = []
    for _ in range(4):
        population = []
        for _ in range(6):
            candidate = {name: leaf + 0.3 * torch.randn_like(leaf) for name, leaf in mean.items()}
            model.policy.load_state_dict(candidate)
            np.testing.assert_array_equal(flat(model.policy.state_dict()), flat(candidate))
            env.reset(seed=0)
            score, _ = evaluate_policy(model, env, n_eval_episodes=3)
            population.append((score, candidate))
        population.sort(key=lambda pair: -pair[0])
        best = [candidate for _, candidate in population[:3]]
        mean = {name: sum(candidate[name] for candidate in best) / 3 for name in mean}
        scores.append(population[0][0])
    assert (
        len(set(scores)) > 1 and max(scores) > 11
    )  # the mutations reach what acts; a constant action earns 9
    model.policy.load_state_dict({name: leaf for name, leaf in mean.items() if leaf.ndim > 1}, strict=False)
    assert model.learn(64).num_timesteps == 64


def test_scores_of_a_policy():
    model = GRPO("MlpPolicy", ENV, **SMALL)
    env, calls = Monitor(gym.make(ENV)), []
    mean, spread = evaluate_policy(model, env, n_eval_episodes=4, deterministic=True)
    assert isinstance(mean, float) and isinstance(spread, float)
    rewards, lengths = evaluate_policy(
        model,
        env,
        4,
        deterministic=False,
        return_episode_rewards=True,
        callback=lambda _, __: calls.append(1),
    )
    assert len(rewards) == 4 and rewards == lengths and len(calls) == sum(lengths)
    vector = evaluate_policy(model.policy, make_vec_env(ENV, 3), 5, return_episode_rewards=True)
    assert len(vector[0]) == 5
