"""Branches against episodes in the environments of other suites: what the presets were chosen by.

    python benchmarks/suite_presets.py [ID ...] [--seeds 10 11 12] [--out rows.jsonl]

For each id: branches for so many decision steps, episodes for as many, and episodes for as many CPU seconds (at most eight
times the steps). One row for each seed: decision and simulator steps, CPU seconds of training (compiling apart), return
of the sampled policy at the end, and of the last tenth of the training's iterations. A suite that is not installed is
left out.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

import grpo_jax

GRID: dict[str, Any] = {
    "n_envs": 64,
    "n_steps": 32,
    "batch_size": 256,
    "bootstrap": True,
    "network": "mlp",
    "activation": "relu",
    "learning_rate": 2.5e-3,
    "learning_rate_decay": "linear",
    "ent_coef": 0.01,
}
ROBOT = GRID | {"activation": "tanh", "learning_rate": 1e-3, "ent_coef": 0.0, "log_std_init": -0.5}
CRAFT = GRID | {"learning_rate": 1e-3}


class Case(NamedTuple):
    """What is compared: settings of both, those of the branches alone, their decision steps, episodes to judge by."""

    settings: dict[str, Any]
    branches: dict[str, Any]
    timesteps: int
    n_episodes: int = 128


CASES = {
    "brax/inverted_pendulum": Case(ROBOT, {"horizon": 4, "branch_every": 4}, 40_000, 32),
    "brax/reacher": Case(ROBOT | {"gamma": 0.95}, {"horizon": 4, "branch_every": 4}, 60_000, 32),
    "craftax/Craftax-Classic-Symbolic-v1": Case(
        CRAFT, {"horizon": 1, "branch_every": 8, "advantage_scale": "none"}, 50_000, 16
    ),
    "jumanji/Game2048-v1": Case(GRID, {"horizon": 2}, 400_000),
    "jumanji/Snake-v1": Case(GRID, {"horizon": 1, "advantage_scale": "none"}, 200_000),
    "navix/Navix-DoorKey-5x5-v0": Case(GRID, {"horizon": 2}, 100_000),
    "navix/Navix-Empty-8x8-v0": Case(GRID, {"horizon": 2}, 40_000),
    "pgx/connect_four": Case(GRID, {"horizon": 4}, 100_000),
    "pgx/tic_tac_toe": Case(GRID, {"horizon": 4}, 60_000),
    "playground/CartpoleBalance": Case(ROBOT, {"horizon": 4, "branch_every": 4}, 100_000, 32),
    "playground/CartpoleSwingup": Case(ROBOT, {"horizon": 4, "branch_every": 4}, 150_000, 32),
    "xminigrid/MiniGrid-DoorKey-5x5": Case(GRID, {"horizon": 2}, 100_000),
    "xminigrid/MiniGrid-Empty-8x8": Case(GRID, {"horizon": 2}, 60_000),
}


def measure(
    world: grpo_jax.World, settings: dict[str, Any], total_timesteps: int, seed: int, n_episodes: int
) -> dict[str, float]:
    """One run: what it cost and what it came to."""
    marks: list[tuple[float, int]] = []
    state, metrics = grpo_jax.run(
        grpo_jax.GRPOConfig(**settings),
        world,
        jax.random.key(seed),
        total_timesteps,
        callback=lambda chunk: marks.append((time.process_time(), chunk.iteration)),
    )
    (start, first), (end, n_iterations) = marks[0], marks[-1]
    seconds = (end - start) * n_iterations / max(n_iterations - first, 1)  # the first chunk has no start
    returns = grpo_jax.evaluate(state, world, jax.random.key(1000 + seed), n_episodes)
    curve = np.asarray(metrics["episode_return"])
    return {
        "decision_steps": grpo_jax.count(state.decision_steps),
        "simulator_steps": grpo_jax.count(state.simulator_steps),
        "cpu_seconds": round(seconds, 2),
        "return": round(float(np.mean(returns)), 3),
        "last_tenth": round(float(np.nanmean(curve[-max(1, len(curve) // 10) :])), 3),
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("ids", nargs="*", default=list(CASES))
    parser.add_argument("--seeds", nargs="*", type=int, default=[10, 11, 12])
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    for env_id in options.ids:
        case = CASES[env_id]
        try:
            world = grpo_jax.make(env_id)
        except ImportError as error:
            print(f"{env_id}: {error}")
            continue

        def rows(
            name: str, settings: dict[str, Any], total: int, *, case: Case = case, world: Any = world
        ) -> float:
            """Runs every seed; the median of their CPU seconds."""
            found = []
            for seed in options.seeds:
                row = measure(world, case.settings | settings, total, seed, case.n_episodes)
                line = json.dumps({"env": env_id, "what": name, "seed": seed, **row})  # noqa: B023 (called at once)
                print(line, flush=True)
                if options.out is not None:
                    with options.out.open("a") as file:
                        file.write(line + "\n")
                found.append(row["cpu_seconds"])
            return float(np.median(found))

        spent = rows("branches", case.branches, case.timesteps)
        episodes = {"candidates": "episodes"}
        factor = min(8.0, spent / rows("episodes, equal steps", episodes, case.timesteps))
        rows("episodes, equal seconds", episodes, int(case.timesteps * factor))


if __name__ == "__main__":
    main()
