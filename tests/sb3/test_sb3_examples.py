"""What SB3's documentation shows for PPO, with the name changed: PPO runs beside GRPO and is the oracle."""

import csv
import json

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
    CallbackList,
    CheckpointCallback,
    EvalCallback,
    EveryNTimesteps,
    LogEveryNTimesteps,
    ProgressBarCallback,
    StopTrainingOnMaxEpisodes,
    StopTrainingOnRewardThreshold,
)
from stable_baselines3.common.env_checker import check_env
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.envs import SimpleMultiObsEnv
from stable_baselines3.common.evaluation import evaluate_policy
from stable_baselines3.common.logger import configure
from stable_baselines3.common.monitor import Monitor
from stable_baselines3.common.torch_layers import BaseFeaturesExtractor
from stable_baselines3.common.utils import set_random_seed
from stable_baselines3.common.vec_env import DummyVecEnv, SubprocVecEnv, VecEnvWrapper, VecNormalize

from sb3_bridge import GRPO

torch.set_num_threads(1)
pytestmark = [
    pytest.mark.parametrize("algorithm", [PPO, GRPO]),
    pytest.mark.usefixtures("quick_compiles"),
]
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


# ---- basic usage


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


def test_one_line_and_the_env_of_the_model(algorithm):
    model = algorithm("MlpPolicy", ENV, **SMALL).learn(64)
    env = model.get_env()
    assert isinstance(env, DummyVecEnv) and env.num_envs == 1 and env.env_is_wrapped(Monitor) == [True]
    observation = env.reset()
    ended = []
    for _ in range(100):
        action, _ = model.predict(observation, deterministic=True)
        observation, _, done, info = env.step(action)
        ended += [info[0]["episode"]["l"]] if done[0] else []
    assert ended and sum(ended) <= 100


@pytest.mark.parametrize("start_method", ["forkserver", "spawn"])
def test_multiprocessing(algorithm, start_method):
    def make_env(rank, seed=0):
        def build():
            env = gym.make(ENV)
            env.reset(seed=seed + rank)
            return env

        set_random_seed(seed)
        return build

    env = SubprocVecEnv([make_env(i) for i in range(2)], start_method=start_method)
    try:
        model = algorithm("MlpPolicy", env, **SMALL).learn(128)
        assert model.num_timesteps == 128 and model.n_envs == 2
        action, _ = model.predict(env.reset())
        assert env.step(action)[1].tolist() == [1.0, 1.0]
    finally:
        env.close()


# ---- callbacks


class Recorder(BaseCallback):
    """Counts its events and notes what it can see."""

    def __init__(self, stop_at=None):
        super().__init__()
        self.stop_at, self.events, self.steps = stop_at, [], []

    def _on_training_start(self):
        self.events.append("training start")
        assert self.training_env is self.model.get_env() and self.logger is self.model.logger

    def _on_rollout_start(self):
        self.events.append("rollout start")

    def _on_rollout_end(self):
        self.events.append("rollout end")

    def _on_training_end(self):
        self.events.append("training end")

    def _on_step(self):
        self.steps.append((self.n_calls, self.num_timesteps))
        assert self.locals["rewards"].tolist() == [1.0, 1.0] and self.locals["dones"].dtype == bool
        assert len(self.locals["infos"]) == 2 and self.locals["new_obs"].shape == (2, 4)
        assert self.locals["actions"].shape == (2,) and "self" in self.locals
        assert isinstance(self.globals, dict)
        self.logger.record("custom/calls", self.n_calls)
        return self.stop_at is None or self.n_calls < self.stop_at


def test_custom_callback(algorithm, tmp_path, log_to):
    model = algorithm("MlpPolicy", make_vec_env(ENV, 2), **SMALL)
    model.set_logger(log_to(tmp_path, ["csv"]))
    recorder = Recorder()
    model.learn(128, callback=recorder)
    rollouts = ["rollout start", "rollout end"] * 2
    assert recorder.events == ["training start", *rollouts, "training end"]
    assert recorder.steps == [(i, 2 * i) for i in range(1, 65)]
    assert [row["custom/calls"] for row in progress(tmp_path)] == ["32", "64"]


def test_a_callback_stops_training_at_its_step(algorithm):
    model = algorithm("MlpPolicy", make_vec_env(ENV, 2), **SMALL)
    before = flat(model.policy.state_dict())
    recorder = Recorder(stop_at=7)
    model.learn(10_000, callback=recorder)
    assert model.num_timesteps == 14
    assert recorder.events == ["training start", "rollout start", "training end"]
    np.testing.assert_array_equal(flat(model.policy.state_dict()), before)


def test_functional_callback_and_list(algorithm):
    seen = []

    def function(variables, others):
        seen.append((variables["self"].num_timesteps, isinstance(others, dict)))
        return len(seen) < 40

    first, second = Recorder(), Recorder()
    model = algorithm("MlpPolicy", make_vec_env(ENV, 2), **SMALL)
    model.learn(64, callback=CallbackList([first, second]))
    assert first.steps == second.steps and len(first.steps) == 32
    model.learn(10_000, callback=function)
    assert seen == [(2 * i, True) for i in range(1, 41)]
    model.learn(64, callback=[first, second])
    assert len(second.steps) == 64


def test_evaluation_keeps_the_best_and_stops(algorithm, tmp_path):
    stop = StopTrainingOnRewardThreshold(reward_threshold=5, verbose=0)
    evaluation = EvalCallback(
        Monitor(gym.make(ENV)),
        callback_on_new_best=stop,
        eval_freq=40,
        n_eval_episodes=3,
        best_model_save_path=str(tmp_path),
        log_path=str(tmp_path),
        verbose=0,
    )
    model = algorithm("MlpPolicy", Monitor(gym.make(ENV)), **SMALL).learn(10_000, callback=evaluation)
    assert model.num_timesteps == 40 and evaluation.n_calls == 40
    assert evaluation.best_mean_reward == evaluation.last_mean_reward > 5
    saved = np.load(tmp_path / "evaluations.npz")
    assert saved["timesteps"].tolist() == [40]
    assert saved["results"].shape == saved["ep_lengths"].shape == (1, 3)
    best = algorithm.load(tmp_path / "best_model.zip")
    np.testing.assert_array_equal(flat(best.policy.state_dict()), flat(model.policy.state_dict()))


def test_training_stops_after_episodes(algorithm):
    model = algorithm("MlpPolicy", make_vec_env(ENV, 2), **SMALL)
    stop = StopTrainingOnMaxEpisodes(max_episodes=3, verbose=0)
    model.learn(10_000, callback=stop)
    assert stop.n_episodes in (6, 7)  # 3 for each env; two may end at once
    assert model.num_timesteps == 2 * stop.n_calls and 4 <= len(model.ep_info_buffer) <= 7


def test_checkpoints(algorithm, tmp_path):
    env = VecNormalize(make_vec_env(ENV, 2))
    checkpoint = CheckpointCallback(
        save_freq=20, save_path=str(tmp_path), name_prefix="cart", save_vecnormalize=True
    )
    algorithm("MlpPolicy", env, **SMALL).learn(128, callback=checkpoint)
    models = {f"cart_{n}_steps.zip" for n in (40, 80, 120)}
    statistics = {f"cart_vecnormalize_{n}_steps.pkl" for n in (40, 80, 120)}
    assert {path.name for path in tmp_path.iterdir()} == models | statistics
    assert algorithm.load(tmp_path / "cart_80_steps").num_timesteps == 80
    assert VecNormalize.load(str(tmp_path / "cart_vecnormalize_80_steps.pkl"), make_vec_env(ENV)).training


def test_an_event_every_n_timesteps(algorithm, tmp_path):
    checkpoint = CheckpointCallback(save_freq=1, save_path=str(tmp_path), name_prefix="event")
    event = EveryNTimesteps(n_steps=50, callback=checkpoint)
    algorithm("MlpPolicy", make_vec_env(ENV, 2), **SMALL).learn(192, callback=event)
    assert {path.name for path in tmp_path.iterdir()} == {f"event_{n}_steps.zip" for n in (50, 100, 150)}


def test_logging_every_n_timesteps(algorithm, tmp_path, log_to):
    model = algorithm("MlpPolicy", make_vec_env(ENV, 2), **SMALL)
    model.set_logger(log_to(tmp_path, ["csv"]))
    model.learn(192, callback=LogEveryNTimesteps(n_steps=40), log_interval=None)
    assert [row["time/total_timesteps"] for row in progress(tmp_path)] == ["40", "80", "120", "160"]


@pytest.mark.filterwarnings("ignore::tqdm.TqdmExperimentalWarning")  # of tqdm's bar in rich
@pytest.mark.parametrize("as_argument", [False, True])
def test_progress_bar(algorithm, as_argument, capsys):
    model = algorithm("MlpPolicy", ENV, **SMALL)
    if as_argument:
        model.learn(64, progress_bar=True)
    else:
        model.learn(64, callback=ProgressBarCallback())
    assert "64/64" in "".join(capsys.readouterr())


def test_the_best_model_by_training_reward(algorithm, tmp_path):
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
    model = algorithm("MlpPolicy", Monitor(gym.make(ENV), str(tmp_path)), **SMALL)
    model.learn(320, callback=callback)
    model.get_env().close()
    assert callback.n_saved >= 1 and algorithm.load(tmp_path / "best_model").num_timesteps % 50 == 0

    results = results_plotter.load_results(str(tmp_path))
    assert results.l.tolist() == results.r.tolist()
    assert [info["l"] for info in model.ep_info_buffer] == results.l.tolist()
    results_plotter.plot_results([str(tmp_path)], 320, results_plotter.X_TIMESTEPS, "CartPole")
    assert len(plt.gcf().axes[0].collections[0].get_offsets()) == len(results)
    plt.close("all")


# ---- environments


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


def test_dict_observations(algorithm, tmp_path):
    env = SimpleMultiObsEnv(random_start=False)
    short = {"horizon": 4} if algorithm is GRPO else {}  # branches of pictures take their time
    model = algorithm("MultiInputPolicy", env, **SMALL, **short).learn(64)
    observation = model.get_env().reset()
    assert set(observation) == {"vec", "img"}
    action, _ = model.predict(observation, deterministic=True)
    assert action.shape == (1,)
    alone, _ = model.predict(env.reset()[0], deterministic=True)
    assert alone.shape == () and alone == action[0]  # it always starts in the same corner
    model.save(tmp_path / "model")
    loaded = algorithm.load(tmp_path / "model", env=SimpleMultiObsEnv(random_start=False))
    np.testing.assert_array_equal(flat(loaded.policy.state_dict()), flat(model.policy.state_dict()))


def test_a_vector_wrapper_of_ones_own(algorithm):
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
    model = algorithm("MlpPolicy", env, **SMALL).learn(256)
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


def test_environment_of_ones_own(algorithm):
    check_env(Walk(), warn=True)
    env = make_vec_env(lambda: gym.wrappers.TimeLimit(Walk(), 40), n_envs=4, seed=0)
    model = algorithm("MlpPolicy", env, **{**SMALL, "n_epochs": 10, "learning_rate": 3e-3}).learn(2_560)
    reward, spread = evaluate_policy(model, gym.wrappers.TimeLimit(Walk(), 40), warn=False)
    assert (reward, spread) == (1.0, 0.0)


# ---- policies


class TorchFeatures(BaseFeaturesExtractor):
    def __init__(self, observation_space, width=16):
        super().__init__(observation_space, width)
        self.net = torch.nn.Sequential(torch.nn.Linear(observation_space.shape[0], width), torch.nn.ReLU())

    def forward(self, observations):
        return self.net(observations)


class FlaxFeatures(linen.Module):
    width: int = 16

    @linen.compact
    def __call__(self, observations):
        return linen.relu(linen.Dense(self.width)(observations))


def test_features_of_ones_own(algorithm, tmp_path):
    policy_kwargs = {
        "features_extractor_class": FlaxFeatures if algorithm is GRPO else TorchFeatures,
        "features_extractor_kwargs": {"width": 24},
        "net_arch": [8],
    }
    model = algorithm("MlpPolicy", ENV, policy_kwargs=policy_kwargs, **SMALL)
    shapes = {tuple(sorted(np.shape(leaf))) for leaf in model.policy.state_dict().values()}
    assert {(4, 24), (8, 24), (2, 8)} <= shapes and (64, 64) not in shapes
    before = flat(model.policy.state_dict())
    model.learn(64)
    assert (flat(model.policy.state_dict()) != before).mean() > 0.5
    model.save(tmp_path / "model")
    loaded = algorithm.load(tmp_path / "model", custom_objects={"policy_kwargs": policy_kwargs})
    np.testing.assert_array_equal(flat(loaded.policy.state_dict()), flat(model.policy.state_dict()))


def test_network_of_ones_own_size(algorithm):
    net_arch = {"pi": [32, 24], "vf": [16]}
    policy_kwargs = {"net_arch": net_arch, "activation_fn": torch.nn.ReLU}
    model = algorithm("MlpPolicy", ENV, policy_kwargs=policy_kwargs, **SMALL).learn(64)
    shapes = {tuple(sorted(np.shape(leaf))) for leaf in model.policy.state_dict().values()}
    assert {(4, 32), (24, 32), (2, 24)} <= shapes
    assert model.policy.net_arch == net_arch


def test_policies_are_saved_alone(algorithm, tmp_path):
    model = algorithm("MlpPolicy", ENV, **SMALL).learn(64)
    model.policy.save(str(tmp_path / "policy.pkl"))
    policy = type(model.policy).load(str(tmp_path / "policy.pkl"))
    observations = np.random.default_rng(0).normal(size=(64, 4)).astype(np.float32)
    np.testing.assert_array_equal(
        policy.predict(observations, deterministic=True)[0],
        model.policy.predict(observations, deterministic=True)[0],
    )
    reward, spread = evaluate_policy(policy, Monitor(gym.make(ENV)), n_eval_episodes=3)
    assert reward >= 8 and spread >= 0


# ---- saving, loading, going on


def test_training_goes_on_in_another_env(algorithm, tmp_path):
    model = algorithm("MlpPolicy", make_vec_env(ENV, 2, seed=0), tensorboard_log=None, **SMALL)
    model.learn(128)
    model.learn(64, reset_num_timesteps=False)
    assert model.num_timesteps == 192
    model.save(tmp_path / "model")

    other = make_vec_env(ENV, 2, seed=7)
    loaded = algorithm.load(tmp_path / "model", env=other)
    assert loaded.get_env() is other and loaded.num_timesteps == 192
    loaded.learn(64, reset_num_timesteps=False)
    assert loaded.num_timesteps == 256
    loaded.learn(64)
    assert loaded.num_timesteps == 64

    without = algorithm.load(tmp_path / "model")
    assert without.get_env() is None
    without.set_env(other)
    assert without.learn(64).num_timesteps == 64


def test_loading_for_more_or_fewer_envs(algorithm, tmp_path):
    for saved, n_envs in ((1, 2), (2, 1)):
        algorithm("MlpPolicy", make_vec_env(ENV, saved), **SMALL).learn(64).save(tmp_path / "model")
        env = make_vec_env(ENV, n_envs)
        loaded = algorithm.load(tmp_path / "model", env=env, print_system_info=True)
        assert loaded.n_envs == n_envs and loaded.learn(64).num_timesteps == 64
    with pytest.raises(ValueError, match="Observation spaces do not match"):
        algorithm.load(tmp_path / "model", env=SimpleMultiObsEnv())


def test_parameters_are_read_and_set(algorithm):
    model = algorithm("MlpPolicy", ENV, **SMALL).learn(64)
    other = algorithm("MlpPolicy", ENV, **{**SMALL, "seed": 1})
    parameters = model.get_parameters()
    assert {"policy", "policy.optimizer"} <= parameters.keys()
    other.set_parameters(parameters, exact_match=True)
    np.testing.assert_array_equal(flat(other.policy.state_dict()), flat(model.policy.state_dict()))
    with pytest.raises(ValueError, match="policy"):
        other.set_parameters({"policy": parameters["policy"]}, exact_match=True)
    other.set_parameters({"policy": parameters["policy"]}, exact_match=False)
    with pytest.raises(ValueError, match="nonsense"):
        other.set_parameters({"nonsense": parameters["policy"]}, exact_match=False)


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


# ---- schedules, logs, scores


def test_learning_rate_schedule(algorithm, tmp_path, log_to):
    def linear(initial):
        return lambda progress_remaining: progress_remaining * initial

    model = algorithm("MlpPolicy", ENV, learning_rate=linear(1e-3), **SMALL)
    model.set_logger(log_to(tmp_path, ["csv"]))
    model.learn(128)
    rates = [row["train/learning_rate"] for row in progress(tmp_path)]
    # A row is written before its iteration's update, which knows that its rollout's share of the steps is gone.
    assert rates[0] == "" and [float(rate) for rate in rates[1:]] == pytest.approx([7.5e-4, 5e-4, 2.5e-4])
    assert model.logger.name_to_value["train/learning_rate"] == pytest.approx(0.0, abs=1e-12)


def test_logger_of_ones_own(algorithm, tmp_path, log_to):
    model = algorithm("MlpPolicy", ENV, **SMALL)
    logger = log_to(tmp_path, ["stdout", "csv", "json", "tensorboard"])
    model.set_logger(logger)
    model.learn(192)
    assert model.logger is logger
    with open(tmp_path / "progress.json") as file:
        lines = [json.loads(line) for line in file]
    assert [line["time/total_timesteps"] for line in lines] == [32, 64, 96, 128, 160, 192]
    assert set(progress(tmp_path)[-1]) >= set(lines[-1])
    shared = {
        "train/approx_kl",
        "train/clip_fraction",
        "train/clip_range",
        "train/entropy_loss",
        "train/loss",
    }
    assert {*shared, "train/learning_rate", "train/n_updates", "time/fps"} <= lines[-1].keys()
    assert {"rollout/ep_len_mean", "rollout/ep_rew_mean", "time/iterations"} <= lines[-1].keys()
    assert [line.get("train/n_updates") for line in lines] == [None, 2, 4, 6, 8, 10]

    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(tmp_path)).Reload()
    assert [event.step for event in events.Scalars("train/approx_kl")] == [64, 96, 128, 160, 192]


def test_tensorboard_runs_are_counted(algorithm, tmp_path):
    model = algorithm("MlpPolicy", ENV, tensorboard_log=str(tmp_path), **SMALL)
    model.learn(32, tb_log_name="first")
    model.learn(32, tb_log_name="second", reset_num_timesteps=False)
    model.learn(32, tb_log_name="first")
    assert {path.name for path in tmp_path.iterdir()} == {"first_1", "first_2", "second_0"}


def test_scores_of_a_policy(algorithm):
    model = algorithm("MlpPolicy", ENV, **SMALL)
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
