"""Frames per second on CartPole-v1 stepped on the host: SB3's PPO, GRPO without groups in a world, SBX's PPO.

    taskset -c 0 python benchmarks/frames_per_second.py [N_ROUNDS]

Every algorithm has PPO's default settings and rollouts of 2 048 steps; the rounds go through all of them in turn, in
one process. A row shows the median round (slowest to fastest) and the median of the rounds' ratios. Collection lasts
from on_rollout_start to on_rollout_end, a whole iteration has the update too; the first one, which compiles, is apart.
The learning rate is 0: a policy that learns plays longer episodes, and resets less often. The ceiling is the
environments alone, with Monitor and random actions. SBX is measured where the package sbx-rl is installed. The last
line is the table as JSON.
"""

from __future__ import annotations

import json
import os
import statistics
import sys
import time
from typing import Any

import jax
import numpy as np
import stable_baselines3
import torch
from stable_baselines3 import PPO
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.env_util import make_vec_env

from sb3_bridge import GRPO

try:
    import sbx
except ImportError:
    sbx = None

ENV, FRAMES = "CartPole-v1", 2048


class Clock(BaseCallback):
    """Seconds spent between the start and the end of each rollout."""

    def __init__(self) -> None:
        super().__init__()
        self.seconds, self.started = 0.0, 0.0

    def _on_rollout_start(self) -> None:
        self.started = time.perf_counter()

    def _on_rollout_end(self) -> None:
        self.seconds += time.perf_counter() - self.started

    def _on_step(self) -> bool:
        return True


def algorithms(n_envs: int) -> dict[str, Any]:
    """Fresh models by name, each with environments of its own."""
    settings = {"learning_rate": 0.0, "n_steps": FRAMES // n_envs, "seed": 0, "device": "cpu"}
    models: dict[str, Any] = {
        "PPO (SB3)": PPO("MlpPolicy", make_vec_env(ENV, n_envs, seed=0), **settings),
        "GRPO": GRPO("MlpPolicy", make_vec_env(ENV, n_envs, seed=0), candidates="episodes", **settings),
    }
    if sbx is not None:
        models["PPO (SBX)"] = sbx.PPO("MlpPolicy", make_vec_env(ENV, n_envs, seed=0), **settings)
    return models


def iteration(model: Any) -> tuple[float, float]:
    """Seconds of one iteration, and of its collection."""
    clock, start = Clock(), time.perf_counter()
    model.learn(FRAMES, callback=clock)
    jax.block_until_ready(jax.live_arrays())  # an update may still be computed
    return time.perf_counter() - start, clock.seconds


def ceiling(env: Any, actions: np.ndarray) -> float:
    """Seconds of the environments alone; ``actions`` is ``[n_steps, n_envs]``."""
    start = time.perf_counter()
    env.reset()
    for action in actions:
        env.step(action)
    return time.perf_counter() - start


def rates(seconds: list[float]) -> dict[str, int]:
    """Frames per second of the median, the slowest and the fastest round."""
    return {
        "median": round(FRAMES / statistics.median(seconds)),
        "slowest": round(FRAMES / max(seconds)),
        "fastest": round(FRAMES / min(seconds)),
    }


def ratio(oracle: list[float], seconds: list[float]) -> float:
    """How many times faster than the oracle: the median over rounds, so that a slow moment counts for both."""
    return round(statistics.median(a / b for a, b in zip(oracle, seconds, strict=True)), 2)


def measure(n_envs: int, n_rounds: int) -> list[dict[str, Any]]:
    """Rows of all algorithms for ``n_envs`` environments; prints them."""
    models = algorithms(n_envs)
    first = {name: iteration(model)[0] for name, model in models.items()}
    for model in models.values():
        iteration(model)  # what is compiled only on the second visit
    env = make_vec_env(ENV, n_envs, seed=0)
    actions = np.random.default_rng(0).integers(2, size=(FRAMES // n_envs, n_envs))
    alone: list[float] = []
    whole: dict[str, list[float]] = {name: [] for name in models}
    collection: dict[str, list[float]] = {name: [] for name in models}
    for _ in range(n_rounds):
        for name, model in models.items():
            seconds = iteration(model)
            whole[name].append(seconds[0])
            collection[name].append(seconds[1])
        alone.append(ceiling(env, actions))
    rows: list[dict[str, Any]] = [
        {
            "n_envs": n_envs,
            "algorithm": name,
            "learn": rates(whole[name]),
            "collection": rates(collection[name]),
            "first_iteration_seconds": round(first[name], 2),
        }
        for name in models
    ]
    for row in rows:
        for part in ("learn", "collection"):
            row[f"{part}_ratio"] = round(row[part]["median"] / rows[0][part]["median"], 2)
        print(line(row), flush=True)
    rows.append({"n_envs": n_envs, "algorithm": "environments alone", "collection": rates(alone)})
    share = rows[-1]["collection"]["median"] / rows[0]["collection"]["median"]
    print(
        f"| {n_envs} | environments alone | | | {cell(rows[-1]['collection'])} | {share:.2f} | |", flush=True
    )
    return rows


def cell(rate: dict[str, int]) -> str:
    """A rate as it stands in the table."""
    return f"{rate['median']:,} ({rate['slowest']:,} to {rate['fastest']:,})"


def line(row: dict[str, Any]) -> str:
    """A row of the table."""
    return (
        f"| {row['n_envs']} | {row['algorithm']} | {cell(row['learn'])} | {row['learn_ratio']:.2f} |"
        f" {cell(row['collection'])} | {row['collection_ratio']:.2f} | {row['first_iteration_seconds']:.2f} s |"
    )


def main() -> None:
    n_rounds = int(sys.argv[1]) if len(sys.argv) > 1 else 7
    torch.set_num_threads(1)
    about = {
        "environment": ENV,
        "rounds": n_rounds,
        "cores": len(os.sched_getaffinity(0)),
        "jax": jax.__version__,
        "torch": torch.__version__,
        "stable_baselines3": stable_baselines3.__version__,
        "sbx": getattr(sbx, "__version__", None),
    }
    print(", ".join(f"{name} {value}" for name, value in about.items()))
    print("| envs | algorithm | learn, frames/s | x PPO | collection, frames/s | x PPO | first iteration |")
    print("|---|---|---|---|---|---|---|")
    rows = [row for n_envs in (1, 8) for row in measure(n_envs, n_rounds)]
    print(json.dumps({**about, "rows": rows}))


if __name__ == "__main__":
    main()
