"""CPU seconds of training a seed, by how many seeds are computed side by side; docs/sweeps.md has the numbers.

taskset -c 0 python benchmarks/blocks.py --env CartPole-v1 --seeds 64 --blocks 1 2 4 8 16 64
"""

from __future__ import annotations

import argparse
import resource
import time

import jax
import numpy as np

import grpo_jax
from grpo_jax.training.agents import default_block


def measure(env_id: str, n_seeds: int, block: int | None, total_timesteps: int) -> str:
    """One run, in words; the iterations before the first look are not counted, as that is when caches fill."""
    env, config = grpo_jax.make(env_id), grpo_jax.preset(env_id)
    looks = []
    _, metrics = grpo_jax.run(
        config,
        env,
        jax.random.key(0),
        total_timesteps,
        n_seeds=n_seeds,
        block=block,
        callback=lambda chunk: looks.append((chunk.iteration, time.process_time())),
        callback_every=2,
    )
    (first, start), (last, end) = looks[0], looks[-1]
    seconds = (end - start) / (last - first) * last / n_seeds
    returns = metrics["episode_return"][:, -1]
    automatic = default_block(config, env, n_seeds)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    return (
        f"{env_id}: {n_seeds} seeds in blocks of {block or automatic} (automatic: {automatic}), {total_timesteps} steps:"
        f" {seconds:.3f} CPU s a seed; return {np.median(returns):.1f} ({np.min(returns):.1f} to {np.max(returns):.1f}),"
        f" {np.sum(returns >= 475)} of 475 and more; peak memory so far {peak:.0f} MB"
    )


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--env", default="CartPole-v1")
    parser.add_argument("--seeds", type=int, default=64)
    parser.add_argument("--blocks", type=int, nargs="*", default=[], help="none: the automatic one")
    parser.add_argument("--total-timesteps", type=int)
    options = parser.parse_args()
    total = options.total_timesteps or grpo_jax.preset_timesteps(options.env)
    for size in options.blocks or [None]:
        print(measure(options.env, options.seeds, size, total), flush=True)
