"""RL Zoo trains, plays and goes on with GRPO, as it does with its own PPO."""

import re
import sys
from pathlib import Path
from types import SimpleNamespace

import gymnasium
import numpy as np
import pytest
import yaml
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.results_plotter import load_results
from stable_baselines3.common.vec_env import VecNormalize

from sb3_bridge import GRPO

CONF = Path(__file__).parents[2] / "benchmarks" / "hyperparams" / "grpo.yml"
POLICY_KWARGS = "dict(net_arch=dict(pi=[64], vf=[64]), activation_fn=nn.ReLU)"


def call(function, *arguments):
    """Calls one of RL Zoo's commands: it reads what it is to do from ``sys.argv``."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["rl_zoo3", *map(str, arguments)])
        function()


def train(zoo, folder, n_timesteps, *more):
    call(
        zoo.train,
        *("--algo", "grpo", "--env", "CartPole-v1", "--log-folder", folder, "--n-timesteps", n_timesteps),
        *("--eval-freq", 256, "--eval-episodes", 2, "--save-freq", 256, "--seed", 1, "--device", "cpu"),
        *(
            "--num-threads",
            1,
            "--conf-file",
            CONF,
            "--hyperparams",
            "normalize:dict(norm_obs=True,norm_reward=False)",
        ),
        *more,
    )


@pytest.fixture(scope="module")
def zoo():
    """RL Zoo's commands. Its import replaces Gymnasium's TimeLimit in the whole process: put back afterwards."""
    with pytest.MonkeyPatch.context() as patch:
        for module in (gymnasium.wrappers, gymnasium.wrappers.common):
            patch.setattr(module, "TimeLimit", module.TimeLimit)
        import rl_zoo3
        from rl_zoo3.enjoy import enjoy
        from rl_zoo3.train import train

        patch.setitem(rl_zoo3.ALGOS, "grpo", GRPO)
        yield SimpleNamespace(train=train, enjoy=enjoy)


@pytest.fixture(scope="module")
def trained(zoo, tmp_path_factory):
    """The log folder and the run's folder after 512 steps on CartPole-v1."""
    logs = tmp_path_factory.mktemp("logs")
    train(zoo, logs, 512, f"policy_kwargs:'{POLICY_KWARGS}'")
    return logs, logs / "grpo" / "CartPole-v1_1"


def test_a_run_leaves_the_files_of_rl_zoo(trained):
    _, folder = trained
    files = {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}
    settings = {
        f"CartPole-v1/{name}" for name in ("args.yml", "command.txt", "config.yml", "vecnormalize.pkl")
    }
    models = {"CartPole-v1.zip", "best_model.zip", "rl_model_256_steps.zip", "rl_model_512_steps.zip"}
    assert files == {*settings, *models, "evaluations.npz", *(f"{i}.monitor.csv" for i in range(8))}
    evaluations = np.load(folder / "evaluations.npz")
    np.testing.assert_array_equal(evaluations["timesteps"], [256, 512])
    assert evaluations["results"].shape == (2, 2)
    assert load_results(str(folder)).l.sum() <= 512


def test_settings_reach_the_model(trained):
    _, folder = trained
    config = yaml.load((folder / "CartPole-v1" / "config.yml").read_text(), Loader=yaml.UnsafeLoader)
    own = yaml.safe_load(CONF.read_text())["CartPole-v1"]
    assert own.items() <= dict(config).items()
    model = GRPO.load(
        folder / "CartPole-v1.zip", custom_objects={"learning_rate": 0.25, "clip_range": 0.5}, device="cpu"
    )
    assert (model.num_timesteps, model.n_envs, model.seed) == (512, 8, 1)
    assert (model.n_steps, model.batch_size, model.n_epochs, model.gamma) == tuple(
        config[name] for name in ("n_steps", "batch_size", "n_epochs", "gamma")
    )
    assert model.learning_rate == 0.25 and model.clip_range(1.0) == 0.5
    assert model.policy.net_arch == {"pi": [64], "vf": [64]}
    shapes = {tuple(sorted(np.shape(leaf))) for leaf in model.policy.state_dict().values()}
    assert {(4, 64), (64,), (2, 64), (2,)} <= shapes and (64, 64) not in shapes


def test_checkpoint_plays_in_normalised_environments(trained):
    _, folder = trained
    env = VecNormalize.load(str(folder / "CartPole-v1" / "vecnormalize.pkl"), make_vec_env("CartPole-v1", 3))
    env.training = False
    assert env.norm_obs and not env.norm_reward and env.obs_rms.count > 512
    objects = {"learning_rate": 0.0, "lr_schedule": lambda _: 0.0, "clip_range": lambda _: 0.0}
    models = [
        GRPO.load(folder / name, custom_objects=objects, device="cpu")
        for name in ("rl_model_512_steps.zip", "CartPole-v1.zip", "rl_model_256_steps.zip")
    ]
    assert [model.num_timesteps for model in models] == [512, 512, 256]
    last, final, first = (model.policy.state_dict() for model in models)
    assert last.keys() == final.keys() == first.keys()
    # Checkpoints are taken while a rollout runs, before its update; the learning rate of the last update is 0.
    assert all(np.array_equal(last[name], final[name]) for name in last)
    assert not all(np.array_equal(last[name], first[name]) for name in last)
    _, rewards, _, _ = env.step(models[0].predict(env.reset())[0])
    np.testing.assert_array_equal(rewards, 1.0)


@pytest.mark.parametrize("which", [(), ("--load-best",), ("--load-last-checkpoint",), ("--stochastic",)])
def test_enjoy_plays_the_result(trained, zoo, capsys, which):
    logs, _ = trained
    call(
        zoo.enjoy,
        *("--algo", "grpo", "--env", "CartPole-v1", "--folder", logs, "--n-timesteps", 600, "--no-render"),
        *("--device", "cpu", *which),
    )
    out = capsys.readouterr().out
    lengths = [int(n) for n in re.findall(r"Episode Length (\d+)", out)]
    rewards = [float(r) for r in re.findall(r"Episode Reward: ([\d.]+)", out)]
    assert lengths == rewards and 100 < sum(lengths) <= 600
    assert f"{len(lengths)} Episodes" in out and f"Mean episode length: {np.mean(lengths):.2f}" in out


def test_training_goes_on(trained, zoo):
    logs, folder = trained
    train(zoo, logs, 256, "--trained-agent", folder / "CartPole-v1.zip")
    second = folder.with_name("CartPole-v1_2")
    before, after = (
        GRPO.load(path / "CartPole-v1.zip", custom_objects={"learning_rate": 0.0, "clip_range": 0.2})
        for path in (folder, second)
    )
    assert (before.num_timesteps, after.num_timesteps) == (512, 256)
    assert after.policy.net_arch == {"pi": [64], "vf": [64]}
    normalised = VecNormalize.load(
        str(second / "CartPole-v1" / "vecnormalize.pkl"), make_vec_env("CartPole-v1")
    )
    assert normalised.obs_rms.count > 512 + 256
