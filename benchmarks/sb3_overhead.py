"""Decision steps per second of the SB3 object on WorldVecEnv against ``grpo_jax.train``, in one process.

The learning rate is 0: the policy stays as it is, and both do the same work.

Usage: ``taskset -c 0 python benchmarks/sb3_overhead.py [n_repeats]``
"""

from __future__ import annotations

import sys
import time

import jax
import numpy as np

import grpo_jax
from sb3_bridge import GRPO, WorldVecEnv

CASES = {
    "CartPole-v1, preset": ("CartPole-v1", {"n_envs": 16, "n_steps": 32, "horizon": 100, "batch_size": 128, "n_epochs": 4}, 40),
    "CartPole-v1, 64 x 128": ("CartPole-v1", {"n_envs": 64, "n_steps": 128, "horizon": 32, "batch_size": 512, "n_epochs": 4}, 10),
    "Breakout-MinAtar, bootstrapped": (
        "Breakout-MinAtar",
        {"n_envs": 64, "n_steps": 32, "horizon": 1, "batch_size": 256, "n_epochs": 4, "bootstrap": True},
        10,
    ),
}  # fmt: skip


def bridge_seconds(
    env_id: str, settings: dict, n_iterations: int, policy: str = "MlpPolicy", callback=None
) -> float:
    """Seconds that ``learn`` takes, compiled before."""
    settings = dict(settings)
    env = WorldVecEnv(env_id, n_envs=settings.pop("n_envs"), seed=0)
    model = GRPO(policy, env, seed=0, learning_rate=0.0, **settings)
    n_states = env.num_envs * settings["n_steps"]
    model.learn(2 * n_states)
    start = time.perf_counter()
    model.learn(n_iterations * n_states, callback=callback)
    return time.perf_counter() - start


def library_seconds(env_id: str, settings: dict, n_iterations: int) -> float:
    """Seconds that ``grpo_jax.train`` takes, compiled before."""
    env = grpo_jax.make(env_id)
    config = grpo_jax.GRPOConfig(network="mlp", learning_rate=0.0, **settings)
    total = n_iterations * config.n_states
    jax.block_until_ready(grpo_jax.train(config, env, jax.random.key(0), total).metrics)
    start = time.perf_counter()
    jax.block_until_ready(grpo_jax.train(config, env, jax.random.key(0), total).metrics)
    return time.perf_counter() - start


def main(n_repeats: int) -> None:
    """Prints a table of medians."""
    print("| case | grpo_jax.train, steps/s | GRPO.learn, steps/s | share | with a callback at every step |")
    print("|---|---|---|---|---|")
    for name, (env_id, settings, n_iterations) in CASES.items():
        seconds = np.array(
            [
                [
                    library_seconds(env_id, settings, n_iterations),
                    bridge_seconds(env_id, settings, n_iterations),
                    bridge_seconds(env_id, settings, n_iterations, callback=lambda *_: True),
                ]
                for _ in range(n_repeats)
            ]
        )
        n_steps = n_iterations * settings["n_envs"] * settings["n_steps"]
        library, bridge, stepped = np.median(seconds, axis=0)
        print(
            f"| {name} | {n_steps / library:,.0f} | {n_steps / bridge:,.0f} | {library / bridge:.0%} | {library / stepped:.0%} |"
        )


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 3)
