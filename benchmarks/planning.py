"""Acting by comparison: what a preset's policy earns alone, and with a plan, in the same episodes.

    taskset -c 0 python benchmarks/planning.py --out runs/planning --seeds 3 --ids Breakout-MinAtar Acrobot-v1

Each row is a training run of the preset, then two evaluations of its sampled policy. ``--horizon``, ``--rollouts`` and
``--confidence`` change the plan; take another ``--out`` for each.
"""

from __future__ import annotations

import argparse
import pathlib
import time
from collections.abc import Sequence
from typing import Any

import cells
import jax
import numpy as np
import rows

import grpo_jax

IDS = (
    *("CartPole-v1", "Acrobot-v1", "Pendulum-v1", "MountainCar-v0", "Catch-bsuite", "FrozenLake-misc"),
    *("Asterix-MinAtar", "Breakout-MinAtar", "Freeway-MinAtar", "SpaceInvaders-MinAtar"),
)


def run(env_id: str, seed: int, n_episodes: int, changes: dict[str, Any]) -> rows.Row:
    """One run of the preset, played alone and with a plan; seconds are CPU's, compiling included."""
    config, env = grpo_jax.preset(env_id), grpo_jax.make(env_id)
    result = grpo_jax.train(config, env, jax.random.key(seed), grpo_jax.preset_timesteps(env_id))
    row: rows.Row = {"id": env_id, "seed": seed}
    for name, plan in (("alone", None), ("planned", grpo_jax.Plan.of(config, **changes))):
        start = time.process_time()
        key = jax.random.key(10_000 + seed)
        episodes = grpo_jax.evaluate_episodes(result.state, env, key, n_episodes, plan=plan)
        returns = np.asarray(episodes.returns, np.float64)
        row[name] = float(returns.mean())
        row[f"{name}_error"] = float(returns.std(ddof=1) / np.sqrt(n_episodes))
        row[f"{name}_seconds"] = round(time.process_time() - start, 2)
    steps, decisions = grpo_jax.count(episodes.simulator_steps), int(episodes.lengths.sum())
    return row | {"steps_per_decision": steps / decisions}


def table(results: Sequence[rows.Row]) -> str:
    """The Markdown report."""
    lines = []
    for env_id in IDS:
        found = [row for row in results if row["id"] == env_id]
        if not found:
            continue
        better = [
            (row["planned"] - row["alone"]) / max(np.hypot(row["planned_error"], row["alone_error"]), 1e-9)
            for row in found
        ]
        lines.append(
            [
                env_id,
                str(len(found)),
                *(cells.spread([row[name] for row in found], cells.number) for name in ("alone", "planned")),
                f"{sum(z > 2 for z in better)} / {sum(z < -2 for z in better)}",
                cells.number(float(np.median([row["steps_per_decision"] for row in found]))),
            ]
        )
    head = ["Environment", "Seeds", "Policy alone", "With a plan", "Better / worse by two standard errors"]
    return (
        cells.table([*head, "Simulator steps a decision"], lines)
        + "\n"
        + rows.provenance(list(results))
        + "\n"
    )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=pathlib.Path, default=pathlib.Path("runs/planning"), help="folder")
    parser.add_argument("--ids", nargs="+", choices=IDS, default=IDS, metavar="ID")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--first-seed", type=int, default=10)
    parser.add_argument("--episodes", type=int, default=32)
    parser.add_argument("--horizon", type=int, help="None: Plan.of's")
    parser.add_argument("--rollouts", type=int, default=grpo_jax.Plan.n_rollouts)
    parser.add_argument("--confidence", type=float, default=grpo_jax.Plan.confidence)
    args = parser.parse_args()
    changes = {"n_rollouts": args.rollouts, "confidence": args.confidence}
    changes |= {} if args.horizon is None else {"horizon": args.horizon}
    jobs = {
        f"{env_id}-{seed}": (env_id, seed, args.episodes, changes)
        for env_id in args.ids
        for seed in range(args.first_seed, args.first_seed + args.seeds)
    }
    rows.run_and_report(run, jobs, args.out, table)


if __name__ == "__main__":
    main()
