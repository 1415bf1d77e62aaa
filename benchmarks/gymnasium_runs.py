"""One run of ``gymnasium_table.py``: an algorithm, an environment, a seed, and what it spent until when.

Needs Stable-Baselines3 and JAX alone, for SBX runs in a virtual environment of its own:
``python gymnasium_runs.py JOB ROW``, a job in JSON and the path of its row.
"""

from __future__ import annotations

import contextlib
import io
import json
import multiprocessing
import os
import pathlib
import resource
import statistics
import sys
import time
import tomllib
import warnings
from typing import Any

import jax
import torch
import trading
from stable_baselines3 import PPO
from stable_baselines3.common.callbacks import BaseCallback

PEERS = pathlib.Path(__file__).resolve().parent / "peers"
sys.path.append(str(PEERS))

import record  # noqa: E402
import run_sb3  # noqa: E402

STEPS = {
    "CartPole-v1": 40_000,
    "Acrobot-v1": 60_000,
    "Pendulum-v1": 100_000,
    "MountainCar-v0": 100_000,
    "MountainCarContinuous-v0": 50_000,
    "LunarLander-v3": 150_000,
    "LunarLanderContinuous-v3": 150_000,
    "BipedalWalker-v3": 200_000,
    "InvertedPendulum-v5": 50_000,
    "Hopper-v5": 100_000,
    "HalfCheetah-v5": 100_000,
    "Walker2d-v5": 100_000,
    "FrozenLake-v1": 50_000,
    "Taxi-v4": 100_000,
    "ALE/Pong-v5": 50_000,
    trading.ID: 60_000,
}
"""Decision steps of PPO with its defaults; with the Zoo's settings they are in ``peers/zoo.toml``."""

SEEDS = {"BipedalWalker-v3": 3, "ALE/Pong-v5": 1}
"""Where it is not the five of the others: runs of more than some minutes."""

N_EPISODES = 20
"""Episodes of an evaluation, and of the mean over training episodes."""

FEWEST = 5
"""Episodes that a point of a curve needs: a single lucky one is no result."""

N_POINTS = 100
CAP = 1.25
"""A run ends at so many times PPO's CPU seconds, compiling apart, however few decision steps that were."""

ALGORITHMS: dict[str, dict[str, Any]] = {
    "ppo": {},
    "sbx": {},
    "grpo": {},
    "grpo-clone": {"dynamics": "clone"},
    "grpo-episodes": {"candidates": "episodes"},
}
"""Arguments of each, beside the settings. The first sets the seconds of all others."""

ZOO = tomllib.loads((PEERS / "zoo.toml").read_text())

_compiling = {"since": 0.0, "seconds": 0.0}
_COMPILE = "/jax/core/compile/backend_compile_duration"


def _compile_begins(event: str, value: float, **_: Any) -> None:
    if event == _COMPILE:
        _compiling["since"] = time.process_time()


def _compile_ends(event: str, duration: float, **_: Any) -> None:
    if event == _COMPILE:  # whose duration is wall time
        _compiling["seconds"] += time.process_time() - _compiling["since"]


jax.monitoring.register_scalar_listener(_compile_begins)
jax.monitoring.register_event_duration_secs_listener(_compile_ends)

with contextlib.suppress(ImportError):
    import ale_py  # noqa: F401, registers its ids


def cpu_seconds() -> float:
    """Of this process, all threads, and of its children: those that have ended, and on Linux those that live."""
    ended = resource.getrusage(resource.RUSAGE_CHILDREN)
    total = time.process_time() + ended.ru_utime + ended.ru_stime
    for child in multiprocessing.active_children():
        with contextlib.suppress(OSError):
            fields = pathlib.Path(f"/proc/{child.pid}/stat").read_text().rpartition(")")[2].split()
            total += sum(map(int, fields[11:13])) / os.sysconf("SC_CLK_TCK")
    return total


class Curve(BaseCallback):
    """What a run had reached when, and when it ends.

    Attributes:
      points: ``[decision step, all environment steps, CPU seconds, CPU seconds without compiling, mean return of the last
        training episodes]``, one for every 1% of the decision steps or of the CPU seconds.
    """

    def __init__(self, total_timesteps: int, budget: float | None, parent: int | None = None) -> None:
        """Starts the clock.

        Args:
          total_timesteps: decision steps that are wanted.
          budget: CPU seconds that are wanted, compiling apart; None: the run ends by its steps alone.
          parent: the process without which there is no use for the run.
        """
        super().__init__()
        self.total_timesteps, self.budget, self.parent = total_timesteps, budget, parent
        self.points: list[list[float]] = []
        self.due_step, self.due_second, self.enough = 0.0, 0.0, False
        self.cpu_before, self.compile_before = cpu_seconds(), _compiling["seconds"]

    def spent(self) -> tuple[float, float]:
        """CPU seconds so far, and how many of them XLA's compiler took."""
        return cpu_seconds() - self.cpu_before, _compiling["seconds"] - self.compile_before

    def _on_rollout_start(self) -> None:
        if self.parent is not None and os.getppid() != self.parent:
            raise SystemExit("what started this run has ended")
        if self.budget is not None:  # here and not at a step: what the last rollout showed has been learned
            seconds, compiling = self.spent()
            self.enough = self.num_timesteps >= self.total_timesteps and seconds - compiling >= self.budget

    def _on_step(self) -> bool:
        seconds, compiling = self.spent()
        if self.num_timesteps >= self.due_step or seconds >= self.due_second:
            self.note()
        return not self.enough and (self.budget is None or seconds - compiling < CAP * self.budget)

    def _on_training_end(self) -> None:
        self.note()

    def note(self) -> None:
        """Adds a point, unless too few episodes have ended yet."""
        seconds, compiling = self.spent()
        self.due_step = self.num_timesteps + self.total_timesteps / N_POINTS
        self.due_second = seconds + self.budget / N_POINTS if self.budget else float("inf")
        returns = [float(episode["r"]) for episode in self.model.ep_info_buffer or ()][-N_EPISODES:]
        if len(returns) >= FEWEST:
            steps = self.num_timesteps, self.num_timesteps + int(getattr(self.model, "simulator_steps", 0))
            times = round(seconds, 3), round(seconds - compiling, 3)
            self.points.append([*steps, *times, statistics.fmean(returns)])


def class_of(algo: str) -> Any:
    """The algorithm's class."""
    if algo == "ppo":
        return PPO
    if algo == "sbx":
        from sbx import PPO as SBX

        return SBX
    from sb3_bridge import GRPO

    return GRPO


def make(algo: str, config: dict[str, Any], env_id: str, seed: int) -> tuple[Any, list[str]]:
    """A model, and what GRPO says of the run it will be."""
    if not algo.startswith("grpo"):
        return run_sb3.make_model(config, env_id, seed, class_of(algo)), []
    with contextlib.redirect_stdout(io.StringIO()) as text:
        more = ALGORITHMS[algo] | {"verbose": 1}
        model = run_sb3.make_model(config, env_id, seed, class_of(algo), **more)
    model.verbose = 0
    return model, [line for line in text.getvalue().splitlines() if line.startswith("GRPO")]


def run(
    settings: str,
    algo: str,
    env_id: str,
    seed: int,
    total_timesteps: int,
    budget: float | None = None,
    parent: int | None = None,
) -> dict[str, Any]:
    """Trains, then evaluates; the row. Imports before it, and evaluations after it, are not counted.

    Args:
      settings: ``"defaults"`` or ``"zoo"``.
      algo: one of ``ALGORITHMS``.
      env_id: of Gymnasium.
      seed: of everything random.
      total_timesteps: decision steps that are wanted.
      budget: CPU seconds that are wanted, compiling apart; None: as many as the steps take.
      parent: see ``Curve``.
    """
    found = ZOO[env_id] if settings == "zoo" else {}
    config = {name: value for name, value in found.items() if not name.endswith("timesteps")}
    row = {
        "settings": settings,
        "algo": algo,
        "id": env_id,
        "seed": seed,
        "total_timesteps": total_timesteps,
        "budget_seconds": budget,
    }
    curve = Curve(total_timesteps, budget, parent)
    try:
        model, said = make(algo, config, env_id, seed)
    except ValueError as error:
        if algo != "grpo-clone":  # of the others nothing may be refused
            raise
        return row | {"refused": str(error), "curve": []}
    # Rates that decay do so over PPO's decision steps; such a run ends there, with seconds left or without.
    decays = any(callable(run_sb3.schedule(value)) for value in config.values())
    model.learn(total_timesteps if budget is None or decays else 100 * total_timesteps, callback=curve)
    seconds, compiling = curve.spent()
    greedy, sampled = (
        statistics.fmean(run_sb3.returns_of(model, env_id, 10_000 * (seed + 1), N_EPISODES, deterministic))
        for deterministic in (True, False)
    )
    return row | {
        "refused": None,
        "decision_steps": model.num_timesteps,
        "simulator_steps": int(getattr(model, "simulator_steps", 0)),
        "cpu_seconds": round(seconds, 2),
        "compile_seconds": round(compiling, 2),
        "greedy_return": greedy,
        "sampled_return": sampled,
        "dynamics": getattr(model, "chosen_dynamics", None),
        "said": said,
        "curve": curve.points,
    }


def main() -> None:
    job, path = record.read_job()
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    row = run(**job, parent=os.getppid())
    packages = ("sbx-rl", "jax", "stable-baselines3", "gymnasium")
    path.write_text(json.dumps(row | {"versions": record.versions(packages)}))


if __name__ == "__main__":
    main()
