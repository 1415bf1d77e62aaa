"""CPU seconds of training a seed, by how many seeds are computed side by side; docs/sweeps.md has the numbers.

taskset -c 0 python benchmarks/blocks.py --env CartPole-v1 --seeds 64 --blocks 1 2 4 8 16 64
"""

from __future__ import annotations

import argparse
import resource
import time
from collections.abc import Iterator

import jax
import numpy as np

import grpo_jax
from grpo_jax.training.agents import default_block


def measure(
    env_id: str, n_seeds: int, block: int | None, total_timesteps: int, solved: float, n_points: int
) -> Iterator[str]:
    """One run, in words, at so many points of it; the first iterations are not timed, as that is when caches fill."""
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
    a_step = (end - start) / (last - first) / config.n_states / n_seeds
    automatic = default_block(config, env, n_seeds)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    for end_at in np.linspace(0, last, n_points + 1)[1:].astype(int):
        returns, steps = metrics["episode_return"][:, end_at - 1], end_at * config.n_states
        yield (
            f"{env_id}: {n_seeds} seeds in blocks of {block or automatic} (automatic: {automatic}), {steps} steps:"
            f" {a_step * steps:.3f} CPU s a seed, {1 / a_step:.0f} steps/s; return {np.median(returns):.1f}"
            f" ({np.min(returns):.1f} to {np.max(returns):.1f}), mean {np.mean(returns):.1f},"
            f" {np.sum(returns >= solved)} of {solved:g} and more; peak memory so far {peak:.0f} MB"
        )


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--env", default="CartPole-v1")
    parser.add_argument("--seeds", type=int, default=64)
    parser.add_argument("--blocks", type=int, nargs="*", default=[], help="none: the automatic one")
    parser.add_argument("--total-timesteps", type=int)
    parser.add_argument("--solved", type=float, default=475.0, help="the return of a seed that is solved")
    parser.add_argument("--points", type=int, default=1, help="of the run at which to say so")
    options = parser.parse_args()
    total = options.total_timesteps or grpo_jax.preset_timesteps(options.env)
    for size in options.blocks or [None]:
        for line in measure(options.env, options.seeds, size, total, options.solved, options.points):
            print(line, flush=True)
