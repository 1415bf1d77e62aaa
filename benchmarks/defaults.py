"""The shipped defaults: ``GRPO("MlpPolicy", id)`` against SB3's ``PPO("MlpPolicy", id)`` at equal decision steps.

    python benchmarks/defaults.py --out runs/defaults
    python benchmarks/defaults.py --out runs/defaults --report

Nothing but ``seed`` is given (and PPO its CPU, where it is at its fastest), no reward function. A run leaves one JSON
row; runs that have a row are skipped, ``--report`` only makes OUT/table.md and OUT/curves.png of the rows there are.
Decision steps are equal up to the last rollout, which both finish. Simulator steps, those that GRPO takes in branches,
stand beside them. Seconds are those of ``learn()``, compiling included. Needs ``gymnasium[box2d,mujoco]``.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import pathlib
import statistics
import time
import warnings
from typing import Any

import numpy as np
import rows
from stable_baselines3 import PPO
from stable_baselines3.common.callbacks import BaseCallback

from sb3_bridge import GRPO

STEPS = {
    "CartPole-v1": 40_000,
    "Acrobot-v1": 40_000,
    "Pendulum-v1": 60_000,
    "LunarLander-v3": 100_000,
    "InvertedPendulum-v5": 30_000,
    "Hopper-v5": 60_000,
}
ALGORITHMS = ("grpo", "ppo")
N_POINTS = 100


class Curve(BaseCallback):
    """``[decision step, mean return of the last training episodes]``, about every 1% of a run."""

    def __init__(self, every: int) -> None:
        super().__init__()
        self.every, self.due = every, every
        self.points: list[tuple[int, float]] = []

    def _on_step(self) -> bool:
        if self.num_timesteps >= self.due:
            self.due = self.num_timesteps + self.every
            self.note()
        return True

    def _on_training_end(self) -> None:
        self.note()

    def note(self) -> None:
        """Adds a point, unless no episode has ended yet."""
        returns = [float(episode["r"]) for episode in self.model.ep_info_buffer or ()][-rows.N_EPISODES :]
        if returns:
            self.points.append((self.num_timesteps, statistics.fmean(returns)))


def make(algo: str, env_id: str, seed: int, **more: Any) -> Any:
    """A model as a user gets it who sets nothing."""
    if algo == "grpo":
        return GRPO("MlpPolicy", env_id, seed=seed, **more)
    return PPO("MlpPolicy", env_id, seed=seed, device="cpu", **more)


def said(algo: str, env_id: str, seed: int) -> list[str]:
    """What GRPO says of the run it will be."""
    text = io.StringIO()
    with contextlib.redirect_stdout(text), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the measured model has warned of the same
        make(algo, env_id, seed, verbose=1)
    return [line for line in text.getvalue().splitlines() if line.startswith("GRPO")]


def train(algo: str, env_id: str, seed: int, total_timesteps: int) -> rows.Row:
    """One run."""
    model, curve = make(algo, env_id, seed), Curve(max(1, total_timesteps // N_POINTS))
    began = time.perf_counter()
    model.learn(total_timesteps, callback=curve)
    seconds = time.perf_counter() - began
    return {
        "algo": algo,
        "id": env_id,
        "seed": seed,
        "total_timesteps": total_timesteps,
        "decision_steps": model.num_timesteps,
        "simulator_steps": int(getattr(model, "simulator_steps", 0)),
        "seconds": round(seconds, 2),
        "sampled_return": curve.points[-1][1] if curve.points else None,
        "greedy_return": rows.greedy_return(model, env_id, 10_000 + seed),
        "dynamics": getattr(model, "dynamics", None),
        "said": said(algo, env_id, seed),
        "curve": curve.points,
    }


def pairs(results: list[rows.Row]) -> dict[str, dict[str, list[rows.Row]]]:
    """Rows by id and algorithm, ids in the order of the benchmark."""
    return {
        env_id: {
            algo: found
            for algo in ALGORITHMS
            if (found := [row for row in results if (row["id"], row["algo"]) == (env_id, algo)])
        }
        for env_id in STEPS
        if any(row["id"] == env_id for row in results)
    }


def ahead(algos: dict[str, list[rows.Row]], name: str) -> str:
    """Whose median is higher; nothing where one is missing."""
    medians = {
        algo: statistics.median(values)
        for algo, found in algos.items()
        if (values := [row[name] for row in found if row[name] is not None])
    }
    if len(medians) < 2:
        return ""
    difference = round(medians["grpo"] - medians["ppo"], 1)
    if difference == 0:
        return "level"
    return f"{'GRPO' if difference > 0 else 'PPO'}, by {abs(difference):,.1f}"


def table(results: list[rows.Row]) -> str:
    """The Markdown report."""
    lines = [
        f"Return: median (min to max) over seeds. Sampled: the last {rows.N_EPISODES} training episodes of a run;"
        f" greedy: {rows.N_EPISODES} episodes afterwards.",
        "",
        "| environment | decision steps | algorithm | seeds | sampled return | greedy return | simulator steps | learn() |",
        "|---|--:|---|--:|---|---|--:|--:|",
    ]
    ranking = ["| environment | ahead, sampled | ahead, greedy |", "|---|---|---|"]
    notes = [""]
    for env_id, algos in pairs(results).items():
        for algo, found in algos.items():
            decisions = f"{statistics.median_high(row['decision_steps'] for row in found):,}"
            simulated = f"{statistics.median_high(row['simulator_steps'] for row in found):,}"
            cells = [env_id, decisions, algo.upper(), str(len(found))]
            cells += [rows.spread(row[name] for row in found) for name in ("sampled_return", "greedy_return")]
            cells += [simulated, f"{statistics.median(row['seconds'] for row in found):,.0f} s"]
            lines.append(f"| {' | '.join(cells)} |")
            remarks = {text for row in found for text in row["said"] + row["warnings"]}
            notes += [f"- {env_id}, {algo.upper()}: {' '.join(text.split())}" for text in sorted(remarks)]
        ranking.append(f"| {env_id} | {ahead(algos, 'sampled_return')} | {ahead(algos, 'greedy_return')} |")
    return "\n".join([*lines, "", *ranking, *notes, rows.provenance(results)]) + "\n"


def draw(results: list[rows.Row], path: pathlib.Path) -> None:
    """The curves, one panel for each environment."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    by_id = pairs(results)
    n_columns = min(3, len(by_id))
    n_lines = -(-len(by_id) // n_columns)
    figure, panels = plt.subplots(
        n_lines, n_columns, figsize=(5 * n_columns, 4 * n_lines), squeeze=False, layout="constrained"
    )
    for panel in panels.flat[len(by_id) :]:
        panel.axis("off")
    for panel, (env_id, algos) in zip(panels.flat, by_id.items(), strict=False):
        for algo, found in algos.items():
            curves = [np.array(row["curve"]).T for row in found if row["curve"]]
            if not curves:
                continue
            grid = np.linspace(0, max(row["total_timesteps"] for row in found), N_POINTS + 1)
            grid = grid[grid >= max(curve[0, 0] for curve in curves)]  # all seeds have finished an episode
            values = np.array([np.interp(grid, *curve) for curve in curves])
            color = f"C{ALGORITHMS.index(algo)}"
            seeds = f"median and range of {len(curves)} seeds" if len(curves) > 1 else "1 seed"
            panel.plot(grid, np.median(values, axis=0), color=color, label=f"{algo.upper()}, {seeds}")
            panel.fill_between(
                grid, values.min(axis=0), values.max(axis=0), color=color, alpha=0.2, linewidth=0
            )
        panel.set(title=env_id, xlabel="decision steps", ylabel=f"return, last {rows.N_EPISODES} episodes")
        panel.set_xlim(left=0)
        panel.xaxis.set_major_locator(plt.MaxNLocator(5))
        panel.xaxis.set_major_formatter("{x:,.0f}")
        panel.grid(alpha=0.3)
        panel.legend()
    figure.savefig(path, dpi=100)
    plt.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=pathlib.Path, default=pathlib.Path("runs/defaults"), help="folder")
    parser.add_argument("--ids", nargs="+", choices=STEPS, default=list(STEPS), metavar="ID")
    parser.add_argument("--seeds", type=int, default=5, help="0 to SEEDS - 1")
    parser.add_argument("--algos", nargs="+", choices=ALGORITHMS, default=list(ALGORITHMS))
    parser.add_argument("--scale", type=float, default=1.0, help="factor of the decision steps")
    parser.add_argument("--report", action="store_true", help="run nothing")
    args = parser.parse_args()
    jobs = {
        f"{algo}-{env_id}-{seed}": (algo, env_id, seed, round(args.scale * STEPS[env_id]))
        for env_id in args.ids
        for seed in range(args.seeds)
        for algo in args.algos
    }
    rows.run_and_report(train, {} if args.report else jobs, args.out, table, draw)


if __name__ == "__main__":
    main()
