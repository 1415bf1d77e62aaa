"""Branches against episodes, and against peers, in the environments of other suites: what the presets were chosen by.

    python benchmarks/suite_presets.py [ID ...] [--seeds 10 11 12] [--out rows.jsonl]
    python benchmarks/suite_presets.py --table rows.jsonl

For each id: branches for so many decision steps; then episodes, rejax's PPO and the suite's own PPO (``suite_peers.py``) for as many,
for as many CPU seconds, and for as many steps as the branches took in all, the simulated ones with them. One row for each seed: decision
and simulator steps, CPU seconds of training (compiling apart), return of the sampled policy at the end. What has a row in ``--out`` is
not run again. A suite that is not installed is left out, and so is rejax.
"""

from __future__ import annotations

import argparse
import collections
import importlib.util
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import cells
import jax
import numpy as np
import suite_peers
from suite_peers import Job, Row

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


PLAYERS = ("episodes", "rejax", "own")
BUDGETS = ("equal steps", "equal seconds", "equal environment steps")


class Case(NamedTuple):
    """What is compared: settings of both, those of the branches alone, their decision steps, episodes to judge by, Brax' backend."""

    settings: dict[str, Any]
    branches: dict[str, Any]
    timesteps: int
    n_episodes: int = 128
    backend: str | None = None


CASES = {
    "brax/ant": Case(ROBOT, {"horizon": 4, "branch_every": 4}, 40_000, 32, "spring"),
    "brax/halfcheetah": Case(ROBOT, {"horizon": 4, "branch_every": 4}, 60_000, 32, "spring"),
    "brax/hopper": Case(ROBOT, {"horizon": 4, "branch_every": 4}, 60_000, 32, "spring"),
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


def measure(job: Job) -> Row:
    """One run of ours: what it cost and what it came to."""
    marks: list[tuple[float, int]] = []
    state, _ = grpo_jax.run(
        job.config,
        job.world,
        jax.random.key(job.seed),
        job.total_timesteps,
        callback=lambda chunk: marks.append((time.process_time(), chunk.iteration)),
    )
    (start, first), (end, n_iterations) = marks[0], marks[-1]
    seconds = (end - start) * n_iterations / max(n_iterations - first, 1)  # the first chunk has no start
    returns = grpo_jax.evaluate(state, job.world, jax.random.key(1000 + job.seed), job.n_episodes)
    return {
        "decision_steps": grpo_jax.count(state.decision_steps),
        "simulator_steps": grpo_jax.count(state.simulator_steps),
        "cpu_seconds": round(seconds, 2),
        "return": round(float(np.mean(returns)), 3),
    }


def race(
    env_id: str,
    case: Case,
    seeds: list[int],
    known: dict[Any, dict[str, Any]],
    write: Callable[[dict[str, Any]], None],
) -> None:
    """All rows of an id, but those that are ``known``, by id, what and seed."""
    world = grpo_jax.make(env_id, **({"backend": case.backend} if case.backend else {}))

    def rows(what: str, run: Callable[[Job], Row], config: Any, total: int) -> dict[str, float]:
        """Runs every seed; medians of the decision steps, of all steps, and of the CPU seconds of one decision step."""
        found = []
        for seed in seeds:
            row = known.get((env_id, what, seed))
            if row is None:
                row = run(Job(env_id, world, config, total, seed, case.n_episodes))
                write({"env": env_id, "what": what, "seed": seed, **row})
            found.append(row)
        steps, simulated, seconds = (
            np.array([row[name] for row in found])
            for name in ("decision_steps", "simulator_steps", "cpu_seconds")
        )
        return {
            "steps": float(np.median(steps)),
            "all_steps": float(np.median(steps + simulated)),
            "seconds_a_step": float(np.median(seconds / steps)),
        }

    branches = grpo_jax.GRPOConfig(**case.settings | case.branches)
    budget = rows("branches", measure, branches, case.timesteps)
    seconds = budget["seconds_a_step"] * case.timesteps
    episodes = grpo_jax.GRPOConfig(**case.settings, candidates="episodes")
    others: dict[str, Any] = {"episodes": measure}
    if importlib.util.find_spec("rejax") is not None:
        others["rejax"] = suite_peers.rejax
    if suite_peers.has_own(env_id):
        others["own"] = suite_peers.own
    for name, run in others.items():
        spent = rows(f"{name}, equal steps", run, episodes, case.timesteps)
        more = {
            "equal seconds": int(seconds / spent["seconds_a_step"]),
            "equal environment steps": int(budget["all_steps"]),
        }
        for what, total in more.items():
            if spent["steps"] < total:  # else one iteration of it was longer than that
                rows(f"{name}, {what}", run, episodes, total)


def read(path: Path | None) -> list[dict[str, Any]]:
    """The rows of a file, if there is one."""
    return [json.loads(line) for line in path.read_text().splitlines()] if path and path.exists() else []


def table(path: Path) -> str:
    """The rows in Markdown: median returns over seeds (lowest to highest), and decision steps.

    The line of the branches has the budgets of the others: their decision steps, CPU seconds and all their steps.
    """
    found: dict[tuple[str, str], list[dict[str, Any]]] = collections.defaultdict(list)
    for row in read(path):
        found[row["env"], row["what"]].append(row)
    body = []
    for env_id in sorted({env_id for env_id, _ in found}):
        branches = found[env_id, "branches"]
        steps, simulated, seconds = (
            float(np.median([row[name] for row in branches]))
            for name in ("decision_steps", "simulator_steps", "cpu_seconds")
        )
        budgets = f"{cells.number(seconds)} s", f"{cells.steps(steps + simulated)} steps"
        body.append([env_id, "branches", _returns(branches), *budgets])
        for name in PLAYERS:
            line = [_returns(found[env_id, f"{name}, {what}"]) for what in BUDGETS]
            if line != ["-"] * len(BUDGETS):
                body.append(["", name, *line])
    return cells.table(["id", "", *BUDGETS], body)


def _returns(rows: list[dict[str, Any]]) -> str:
    """A cell: returns, decision steps, and how many seeds if fewer than three."""
    if not rows:
        return "-"
    steps = cells.steps(float(np.median([row["decision_steps"] for row in rows])))
    returned = cells.spread(row["return"] for row in rows)
    return f"{returned}, {steps}" + (f" [{len(rows)}]" if len(rows) < 3 else "")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("ids", nargs="*", default=list(CASES))
    parser.add_argument("--seeds", nargs="*", type=int, default=[10, 11, 12])
    parser.add_argument("--out", type=Path)
    parser.add_argument("--table", type=Path, help="of these rows; nothing is run")
    options = parser.parse_args()
    if options.table is not None:
        print(table(options.table))
        return

    def write(row: dict[str, Any]) -> None:
        line = json.dumps(row)
        print(line, flush=True)
        if options.out is not None:
            with options.out.open("a") as file:
                file.write(line + "\n")

    known = {(row["env"], row["what"], row["seed"]): row for row in read(options.out)}
    for env_id in options.ids:
        try:
            race(env_id, CASES[env_id], options.seeds, known, write)
        except ImportError as error:
            print(f"{env_id}: {error}")


if __name__ == "__main__":
    main()
