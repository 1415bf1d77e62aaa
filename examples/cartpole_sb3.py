"""GRPO learns CartPole-v1 behind Stable-Baselines3's API: what ``make demo`` and ``python -m sb3_bridge.demo`` run.

================== ======================================================================
``model.zip``      the model, for ``GRPO.load``
``0.monitor.csv``  one row for each episode of the training, for SB3's ``results_plotter``
``curve.png``      return against decision steps
``cartpole.gif``   one episode of the greedy policy
================== ======================================================================
"""

from __future__ import annotations

import argparse
import os
import time
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path

import gymnasium
import numpy as np
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.evaluation import evaluate_policy
from stable_baselines3.common.results_plotter import load_results
from stable_baselines3.common.utils import LinearSchedule

from grpo_jax.cli.plots import learning_curve
from grpo_jax.worlds.pictures import write_gif
from sb3_bridge import GRPO, WorldVecEnv

ENV = "CartPole-v1"
SOLVED = 475.0
"""Mean return at which Gymnasium calls the task solved; 500 is the top."""

_WINDOW = 10
"""Episodes that the curve averages over."""


def main(argv: Sequence[str] | None = None) -> int:
    """Trains, evaluates and draws.

    Args:
      argv: the arguments, without the program's name; None: those of the process.

    Returns:
      0: the task is solved; 1: it is not.
    """
    parser = argparse.ArgumentParser(description="GRPO on CartPole-v1")
    parser.add_argument("--out", type=Path, default=Path("runs/demo"), help="directory; files are replaced")
    parser.add_argument("--total-timesteps", type=int, default=20_000, help="decision steps")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args(argv)
    for name in ("SDL_VIDEODRIVER", "SDL_AUDIODRIVER"):  # pygame shall look for no screen and no sound card
        os.environ.setdefault(name, "dummy")

    out: Path = options.out
    out.mkdir(parents=True, exist_ok=True)
    model = train(out, options.total_timesteps, options.seed)
    means = evaluate(model, options.seed + 1_000)
    n_frames = write_gif(out / "cartpole.gif", play(model, options.seed + 1_000), fps=25)
    print(f"cartpole.gif: one episode of the greedy policy, {n_frames} frames")
    print(
        "written:",
        *(out / name for name in ("model.zip", "0.monitor.csv", "curve.png", "cartpole.gif")),
        sep="\n  ",
    )
    if min(means) < SOLVED:
        print(f"NOT SOLVED: a mean return of {min(means):.1f} is below {SOLVED:.0f}")
        return 1
    return 0


def train(out: Path, total_timesteps: int, seed: int) -> GRPO:
    """Trains; writes ``model.zip``, ``0.monitor.csv`` and ``curve.png``.

    Args:
      out: a directory that exists.
      total_timesteps: decision steps.
      seed: of everything.
    """
    env = WorldVecEnv(ENV, n_envs=16, seed=seed, monitor_dir=out)
    model = GRPO(
        "MlpPolicy",
        env,
        learning_rate=LinearSchedule(2.5e-3, 0.0, 1.0),
        n_steps=32,
        batch_size=128,
        n_epochs=4,
        seed=seed,
    )
    print(f"GRPO on {ENV}: {env.num_envs} environments, every action followed for {model.horizon} steps")
    start = time.perf_counter()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "rich is experimental")  # tqdm's, of the bar that SB3 takes
        model.learn(total_timesteps, progress_bar=True)
    seconds = time.perf_counter() - start
    print(
        f"trained in {seconds:.1f} s, compiling included:"
        f" {model.num_timesteps:,} decision steps, {model.simulator_steps:,} simulator steps"
    )
    env.close()
    model.save(out / "model.zip")
    episodes = load_results(str(out))
    window = min(_WINDOW, len(episodes))
    returns = np.convolve(episodes["r"], np.full(window, 1 / window), "valid")
    steps = np.cumsum(episodes["l"])[window - 1 :]
    title = f"GRPO on {ENV}, mean of {window} episodes"
    learning_curve(out / "curve.png", np.array([steps]), returns[None], title=title)
    return model


def evaluate(model: GRPO, seed: int) -> list[float]:
    """Plays 20 episodes of each kind by SB3's ``evaluate_policy`` and prints what they earned.

    Args:
      model: the trained one.
      seed: of the environments.

    Returns:
      Mean returns: greedy and sampled in gymnax's CartPole-v1, greedy in Gymnasium's.
    """
    gymnax_env, gymnasium_env = WorldVecEnv(ENV, n_envs=20, seed=seed), make_vec_env(ENV, 20, seed=seed)
    means = []
    for name, env, deterministic in (
        ("gymnax, greedy", gymnax_env, True),
        ("gymnax, sampled", gymnax_env, False),
        ("Gymnasium, greedy", gymnasium_env, True),
    ):
        mean, std = evaluate_policy(model, env, n_eval_episodes=20, deterministic=deterministic)
        print(f"{name:<18} {mean:.1f} +- {std:.1f} of 500 (20 episodes)")
        means.append(float(np.mean(mean)))
    gymnasium_env.close()
    return means


def play(model: GRPO, seed: int) -> Iterator[np.ndarray]:
    """Every second picture of one greedy episode in Gymnasium's CartPole-v1, uint8 ``[400, 600, 3]``."""
    env = gymnasium.make(ENV, render_mode="rgb_array")
    observation, _ = env.reset(seed=seed)
    ended, step = False, 0
    while not ended:
        if step % 2 == 0:
            yield np.asarray(env.render())
        action, _ = model.predict(observation, deterministic=True)
        observation, _, terminated, truncated, _ = env.step(action)
        ended, step = terminated or truncated, step + 1
    env.close()


if __name__ == "__main__":
    raise SystemExit(main())
