"""Scores of the presets: return of the sampled policy, time, decision and simulator steps, over several seeds.

    taskset -c 0 python benchmarks/presets.py [N_SEEDS] [ENV ...]

Each seed is a run of its own, as a user would start it; compiling is shown apart and done once.
"""

from __future__ import annotations

import sys
import time

import jax
import numpy as np

import grpo_jax


def measure(env_id: str, n_seeds: int) -> None:
    """Prints the row of one environment."""
    env, config, n = grpo_jax.make(env_id), grpo_jax.preset(env_id), grpo_jax.preset_timesteps(env_id)
    start = time.perf_counter()
    train = jax.jit(lambda key: grpo_jax.train(config, env, key, n)).lower(jax.random.key(0)).compile()
    compiled = time.perf_counter() - start
    scores, seconds = [], []
    for seed in range(n_seeds):
        start = time.perf_counter()
        result = jax.block_until_ready(train(jax.random.key(seed)))
        seconds.append(time.perf_counter() - start)
        returns = grpo_jax.evaluate(result.state, env, jax.random.key(1000 + seed), 128)
        scores.append(float(np.mean(returns)))
    decisions = grpo_jax.count(result.state.decision_steps)
    simulated = grpo_jax.count(result.state.simulator_steps)
    print(
        f"| {env_id} | {np.median(scores):.1f} ({min(scores):.1f} to {max(scores):.1f}) | {decisions:,} |"
        f" {simulated:,} | {compiled:.1f} s | {np.median(seconds):.2f} s |",
        flush=True,
    )


def main() -> None:
    n_seeds = int(sys.argv[1]) if len(sys.argv) > 1 else 5
    print(
        f"jax {jax.__version__}, {jax.default_backend()}, {n_seeds} seeds, sampled policy, 128 episodes a seed"
    )
    print(
        "| environment | return: median (min to max) | decision steps | simulator steps | compile | train |"
    )
    print("|---|---|---|---|---|---|")
    for env_id in sys.argv[2:] or grpo_jax.preset_ids():
        measure(env_id, n_seeds)


if __name__ == "__main__":
    main()
