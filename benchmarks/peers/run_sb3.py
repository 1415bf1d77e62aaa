"""One run of PPO with RL Zoo's settings, stable-baselines3's or SBX's, on Gymnasium's environment of that id.

Started by ``benchmarks/bench.py`` in the peer's virtual environment.
"""

import record

if __name__ == "__main__":
    JOB, PATH = record.read_job()  # before torch and JAX make their threads

import importlib
import pathlib
import tomllib
import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.env_util import make_atari_env, make_vec_env
from stable_baselines3.common.vec_env import VecEnv, VecFrameStack, VecNormalize

SBX = __name__ == "__main__" and JOB["library"] == "sbx"
if SBX:
    import jax
    from sbx import PPO
else:
    from stable_baselines3 import PPO

PACKAGES = ("stable-baselines3", "torch", "gymnasium")


def settings_of(job: record.Job) -> tuple[dict[str, Any], int, str]:
    """Settings, decision steps and where they are from."""
    table = tomllib.loads(pathlib.Path(__file__).with_name("zoo.toml").read_text())
    config = dict(table[job["env"]])
    total, zoo_total = config.pop("total_timesteps"), config.pop("zoo_timesteps", None)
    notes = ["RL Zoo's"]
    if zoo_total is not None:
        notes.append(f"{total:,} of its {zoo_total:,} steps")
    if SBX and config.get("use_sde"):
        notes.append("gSDE as SBX has it: noise that is kept, not of the state")
    return config, job.get("total_timesteps") or total, ", ".join(notes)


def schedule(value: Any) -> Any:
    """RL Zoo's ``"lin_x"`` as a function of the share of training that is left; numbers as they are."""
    if not isinstance(value, str):
        return value
    initial = float(value.removeprefix("lin_"))
    return lambda left: left * initial


def make_env(env_id: str, n_envs: int, seed: int) -> VecEnv:
    """Monitored environments; Atari games in SB3's wrappers, with a stack of 4 frames."""
    if not env_id.startswith("ALE/"):
        return make_vec_env(env_id, n_envs=n_envs, seed=seed)
    return VecFrameStack(make_atari_env(env_id, n_envs=n_envs, seed=seed), n_stack=4)


def make_model(config: dict[str, Any], env_id: str, seed: int, algorithm: Any = PPO, **more: Any) -> Any:
    """A model in as many environments as the settings say, their observations and rewards normalised where they say so."""
    arguments = {name: schedule(value) for name, value in config.items()}
    env = make_env(env_id, arguments.pop("n_envs", 1), seed)
    if arguments.pop("normalize", False):
        env = VecNormalize(env, gamma=arguments["gamma"])
    if arguments.get("policy_kwargs", {}).get("activation_fn") == "relu":
        relu = importlib.import_module("jax").nn.relu if "sbx" in algorithm.__module__ else torch.nn.ReLU
        arguments["policy_kwargs"] = arguments["policy_kwargs"] | {"activation_fn": relu}
    policy = "CnnPolicy" if env_id.startswith("ALE/") else "MlpPolicy"
    return algorithm(policy, env, seed=seed, device="cpu", **arguments, **more)


def returns_of(
    model: Any, env_id: str, seed: int, n_episodes: int, deterministic: bool = False
) -> list[float]:
    """Undiscounted returns of a policy, ``[n_episodes]``: side by side, each until its first end.

    The exploration matrices of gSDE are drawn anew as often as in training.
    """
    env = make_env(env_id, n_episodes, seed)
    normalize = model.get_vec_normalize_env()
    observation, returns, plays = env.reset(), np.zeros(n_episodes), np.ones(n_episodes, bool)
    step, every = 0, model.sde_sample_freq
    while plays.any():
        if model.use_sde and (step == 0 or (every > 0 and step % every == 0)):
            model.policy.reset_noise(n_episodes)
        if normalize is not None:
            observation = normalize.normalize_obs(observation)
        action, _ = model.predict(observation, deterministic=deterministic)
        observation, reward, done, _ = env.step(action)
        returns += reward * plays
        plays &= ~done
        step += 1
    env.close()
    if model.use_sde:
        model.policy.reset_noise(model.n_envs)  # of training's batch, for the rollout that follows
    return returns.tolist()


class Look(BaseCallback):
    """Calls a function between iterations, once so many decision steps have passed since its last call."""

    def __init__(self, every: int, function: Callable[[], None]) -> None:
        super().__init__()
        self.every, self.function, self.at = every, function, every

    def _on_rollout_start(self) -> None:
        if self.num_timesteps >= self.at:
            self.function()
            self.at = (self.num_timesteps // self.every + 1) * self.every

    def _on_step(self) -> bool:
        return True


def run(job: record.Job, clock: record.Clock) -> record.Row:
    """Trains, and evaluates the sampled policy between iterations."""
    torch.set_num_threads(1)
    warnings.filterwarnings(
        "ignore", message=".*mini-batch size.*"
    )  # the Zoo's batch is larger than the rollout
    config, total, settings = settings_of(job)
    model = make_model(config, job["env"], job["seed"])
    # Setting up stands for compiling, which torch has not; SBX compiles as it goes, all of it is training.
    clock.lap("train" if SBX else "compile")
    curve: list[record.Row] = []

    def look() -> None:
        clock.lap("train")
        seed = 1_000_000 * (job["seed"] + 1) + 1000 * len(curve)
        returns = returns_of(model, job["env"], seed, record.CURVE_EPISODES)
        clock.lap("evaluate")
        curve.append(record.point(clock, model.num_timesteps, 0, returns))

    steps = config["n_envs"] * config["n_steps"]
    every = steps * record.every(-(-total // steps))
    model.learn(total, callback=Look(every, look))
    look()
    final = returns_of(model, job["env"], 500_000_000 + 1000 * job["seed"], record.FINAL_EPISODES)
    clock.lap("evaluate")
    return record.row(
        job,
        clock,
        settings=settings,
        config=config,
        total_timesteps=total,
        curve=curve,
        final_returns=final,
        packages=(*PACKAGES, "sbx-rl", "jax", "jaxlib") if SBX else PACKAGES,
        nonfinite=not all(np.isfinite(leaf).all() for leaf in weights(model)),
        compile_apart=not SBX,
        device=(jax.default_backend(), jax.devices()[0].device_kind) if SBX else (None, "cpu"),
    )


def weights(model: Any) -> list[np.ndarray]:
    """All parameters of a model."""
    if SBX:
        leaves = jax.tree.leaves((model.policy.actor_state.params, model.policy.vf_state.params))
        return [np.asarray(leaf) for leaf in leaves]
    return [parameter.detach().numpy() for parameter in model.policy.parameters()]


if __name__ == "__main__":
    record.measure(JOB, PATH, run)
