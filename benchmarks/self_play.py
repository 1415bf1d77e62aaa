"""Self-play in a game of Pgx against training with a random opponent: returns against each other.

    pip install "grpo-jax[pgx]"
    python benchmarks/self_play.py [--game connect_four] [--seeds 3] [--timesteps 200000]

A return is 1 for a game that is won, -1 for one that is lost. CPU seconds include compiling.
"""

from __future__ import annotations

import argparse
import time

import jax
import numpy as np

import grpo_jax

CONFIG = grpo_jax.GRPOConfig(
    n_envs=64,
    n_steps=16,
    batch_size=256,
    horizon=8,
    bootstrap=True,
    network="mlp",
    learning_rate=1e-3,
    ent_coef=0.01,
)
EVERY = 10
"""Iterations until the opponent is the policy of the moment."""


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--game", default="connect_four")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--timesteps", type=int, default=200_000)
    options = parser.parse_args()
    game = grpo_jax.make(f"pgx/{options.game}")
    players, seconds = {}, {}
    for seed in range(options.seeds):
        for name, every in (("random opponent", None), ("self-play", EVERY)):
            start = time.process_time()
            state, _ = grpo_jax.run(
                CONFIG, game, jax.random.key(seed), options.timesteps, opponent_every=every
            )
            players[name, seed], seconds[name, seed] = state, time.process_time() - start
    print(f"{options.game}, {options.timesteps:,} decision steps, {options.seeds} seeds; 1,000 games each")
    print("| learned by | CPU s | random | untrained | random opponent | self-play |")
    print("|---|---:|---:|---:|---:|---:|")
    for name in ("random opponent", "self-play"):
        columns: dict[str, list[float]] = {}
        for seed in range(options.seeds):
            opponents = {
                "random": game,
                "untrained": grpo_jax.against(game, grpo_jax.init(CONFIG, game, jax.random.key(9))),
            }
            for other in ("random opponent", "self-play"):  # of another seed, where there is one
                opponents[other] = grpo_jax.against(game, players[other, (seed + 1) % options.seeds])
            for other, world in opponents.items():
                returns = grpo_jax.evaluate(players[name, seed], world, jax.random.key(100 + seed), 1000)
                columns.setdefault(other, []).append(float(np.mean(returns)))
        cells = [f"{np.median(row):.2f} ({min(row):.2f} to {max(row):.2f})" for row in columns.values()]
        spent = np.median([seconds[name, seed] for seed in range(options.seeds)])
        print(f"| {name} | {spent:.1f} | " + " | ".join(cells) + " |")


if __name__ == "__main__":
    main()
