"""A reward function of the next state on CartPole-v1, in torch, NumPy and JAX, with clones and with a learned world.

    python benchmarks/reward_functions.py --out runs/reward_functions
    python benchmarks/reward_functions.py --out runs/reward_functions --report

The reward is 1 - |angle| - 0.1 |position|; what is shown is the environment's own return of the greedy policy, where
500 is the top and 475 counts as solved. A run leaves one JSON row; runs that have a row are skipped, ``--report`` only
makes OUT/table.md of the rows there are. Seconds are those of ``learn()``, compiling included.
"""

from __future__ import annotations

import argparse
import pathlib
import statistics
import time
from collections.abc import Callable
from typing import Any

import gymnasium as gym
import jax.numpy as jnp
import numpy as np
import rows
import torch
from stable_baselines3.common.vec_env import DummyVecEnv

from sb3_bridge import GRPO

ENV, SOLVED = "CartPole-v1", 475.0
MARKS = (5_000, 10_000, 15_000, 20_000)
DYNAMICS = ("clone", "learned")


def with_torch(state: torch.Tensor, action: torch.Tensor, next_state: torch.Tensor) -> torch.Tensor:
    """Of a batch; ``[B, 1]``."""
    del state, action
    return 1.0 - torch.abs(next_state[:, 2:3]) - 0.1 * torch.abs(next_state[:, 0:1])


def with_numpy(state: np.ndarray, action: np.ndarray, next_state: np.ndarray) -> np.ndarray:
    """Of a batch; ``[B]``."""
    del state, action
    return 1.0 - np.abs(next_state[:, 2]) - 0.1 * np.abs(next_state[:, 0])


def with_jax(state: Any, action: Any, next_state: Any) -> Any:
    """Of one transition."""
    del state, action
    return 1.0 - jnp.abs(next_state[2]) - 0.1 * jnp.abs(next_state[0])


FRAMEWORKS: dict[str, Callable[..., Any]] = {"torch": with_torch, "numpy": with_numpy, "jax": with_jax}


def train(framework: str, dynamics: str, seed: int, marks: list[int]) -> rows.Row:
    """One run, measured at the end of the rollout in which each of ``marks`` lies."""
    model = GRPO(
        "MlpPolicy",
        DummyVecEnv([lambda: gym.make(ENV)]),
        reward_function=FRAMEWORKS[framework],
        n_steps=256,
        batch_size=64,
        n_epochs=10,
        learning_rate=3e-4,
        seed=seed,
        dynamics=dynamics,  # type: ignore[arg-type]
    )
    greedy: list[float] = []
    steps: list[int] = []
    seconds = 0.0
    for mark in marks:
        # Up to the mark, and not as many steps again: rollouts that went beyond one mark would add up.
        began = time.perf_counter()
        model.learn(mark - model.num_timesteps, reset_num_timesteps=not steps)
        seconds += time.perf_counter() - began
        steps.append(model.num_timesteps)
        greedy.append(rows.greedy_return(model, ENV, 1_000 + seed))
    return {
        "framework": framework,
        "dynamics": dynamics,
        "id": ENV,
        "seed": seed,
        "marks": marks,
        "decision_steps": steps,
        "simulator_steps": int(model.simulator_steps),
        "seconds": round(seconds, 2),
        "greedy_return": greedy,
    }


def table(results: list[rows.Row]) -> str:
    """The Markdown report."""
    marks = results[0]["marks"]
    heads = [f"{mark:,}" for mark in marks]
    lines = [
        f"{ENV}, greedy return, mean of {rows.N_EPISODES} episodes: median over seeds after {heads[0]} to {heads[-1]}"
        " decision steps, and at the end the lowest seed and the seeds that solved the task.",
        "",
        f"| framework | dynamics | seeds | {' | '.join(heads)} | min | >= {SOLVED:.0f} | learn() | simulator steps |",
        "|---|---|--:|" + "--:|" * (len(marks) + 4),
    ]
    for framework in FRAMEWORKS:
        for dynamics in DYNAMICS:
            kind = (framework, dynamics)
            found = [row for row in results if (row["framework"], row["dynamics"]) == kind]
            if not found:
                continue
            scores = np.array([row["greedy_return"] for row in found])
            last = scores[:, -1]
            cells = [framework, dynamics, str(len(found))]
            cells += [f"{median:.1f}" for median in np.median(scores, axis=0)]
            cells += [f"{last.min():.1f}", f"{np.sum(last >= SOLVED)} of {len(last)}"]
            cells += [f"{statistics.median(row['seconds'] for row in found):,.0f} s"]
            cells += [f"{statistics.median_high(row['simulator_steps'] for row in found):,}"]
            lines.append(f"| {' | '.join(cells)} |")
    remarks = {
        f"{row['framework']}, {row['dynamics']}: {text}" for row in results for text in row["warnings"]
    }
    notes = [f"- {' '.join(text.split())}" for text in sorted(remarks)]
    return "\n".join([*lines, "", *notes, rows.provenance(results)]) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--out", type=pathlib.Path, default=pathlib.Path("runs/reward_functions"), help="folder"
    )
    parser.add_argument("--frameworks", nargs="+", choices=FRAMEWORKS, default=list(FRAMEWORKS))
    parser.add_argument("--dynamics", nargs="+", choices=DYNAMICS, default=list(DYNAMICS))
    parser.add_argument("--seeds", type=int, default=10, help="0 to SEEDS - 1")
    parser.add_argument("--scale", type=float, default=1.0, help="factor of the decision steps")
    parser.add_argument("--report", action="store_true", help="run nothing")
    args = parser.parse_args()
    marks = [round(args.scale * mark) for mark in MARKS]
    jobs = {
        f"{framework}-{dynamics}-{seed}": (framework, dynamics, seed, marks)
        for seed in range(args.seeds)
        for dynamics in args.dynamics
        for framework in args.frameworks
    }
    rows.run_and_report(train, {} if args.report else jobs, args.out, table)


if __name__ == "__main__":
    main()
