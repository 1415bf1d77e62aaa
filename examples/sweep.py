"""Hyper-parameters: every setting with every seed in one program, and an Optuna study that asks for batches of settings.

    python examples/sweep.py [--timesteps 10000] [--seeds 4] [--trials 8]

Trains CartPole-v1. The second part needs Optuna (``pip install optuna``) and says so where it is missing. Takes 46 CPU seconds.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence

import jax

import grpo_jax


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--timesteps", type=int, default=10_000, help="decision steps of each run")
    parser.add_argument("--seeds", type=int, default=4, help="of each setting")
    parser.add_argument("--trials", type=int, default=8, help="settings that Optuna tries")
    options = parser.parse_args(argv)

    env, config, key = grpo_jax.make("CartPole-v1"), grpo_jax.preset("CartPole-v1"), jax.random.key(0)
    grid = {"learning_rate": [3e-4, 1e-3, 2.5e-3], "gamma": [0.9, 0.99]}
    result = grpo_jax.sweep(config, env, key, options.timesteps, n_seeds=options.seeds, **grid)
    print("learning_rate  gamma  return: middle of the seeds (least to most)")
    for row in result.rows():
        values = f"{row['learning_rate']:13g}  {row['gamma']:5g}"
        print(f"{values}  {row['score']:5.0f} ({row['min']:.0f} to {row['max']:.0f})")
    if result.best is not None:
        print("best:", result.settings[result.best])

    try:
        import optuna
    except ImportError:
        print("Optuna is not installed: pip install optuna")
        return
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    study = optuna.create_study(direction="maximize", sampler=optuna.samplers.TPESampler(seed=0))
    space = {
        "learning_rate": optuna.distributions.FloatDistribution(1e-4, 1e-2, log=True),
        "gamma": optuna.distributions.FloatDistribution(0.9, 0.999),
    }
    for _ in range(0, options.trials, 4):  # four settings at a time are one program
        trials = [study.ask(space) for _ in range(4)]
        fields = {name: [trial.params[name] for trial in trials] for name in space}
        result = grpo_jax.sweep(
            config, env, key, options.timesteps, n_seeds=options.seeds, zipped=True, **fields
        )
        for trial, score in zip(trials, result.scores, strict=True):
            study.tell(trial, float(score))
    best = {name: round(value, 5) for name, value in study.best_params.items()}
    print(f"Optuna, {len(study.trials)} settings: {study.best_value:.0f} with {best}")


if __name__ == "__main__":
    main()
