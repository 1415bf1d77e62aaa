"""GRPO, SB3's PPO and SBX's PPO in Gymnasium: at equal decision steps, at equal CPU seconds, and how soon.

    pip install "gymnasium[box2d,mujoco]" ale-py opencv-python-headless
    taskset -c 0 python benchmarks/gymnasium_table.py --out runs/table --algos ppo grpo sbx
    taskset -c 0 python benchmarks/gymnasium_table.py --out runs/table --settings defaults --algos grpo-clone grpo-episodes
    taskset -c 0 python benchmarks/gymnasium_table.py --out runs/table --settings zoo --algos ppo grpo sbx
    python benchmarks/gymnasium_table.py --out runs/table --report

Settings: ``defaults``, nothing but ``seed`` is given; ``zoo``, RL Zoo's of PPO (``peers/zoo.toml``) are given to all
three, and GRPO's own arguments are left alone. Each run is a process and a JSON row, and what has a row is not run again.

PPO runs for a number of decision steps; what CPU seconds its seeds take (the median) is what all others get. They run until
they have had as many decision steps and as many seconds, compiling apart, but no longer than 1.25 times the seconds.
Seconds are of the process and its children, from making the environment on; imports and the evaluations at the end are
not counted, and nothing is loaded from a compilation cache. A curve holds the mean return of the last 20 training
episodes (5 at least), so of the sampled policy as it was then.
"Without compiling" takes off the CPU seconds of XLA's compiler; what JAX does before, tracing, stays in.
"""

from __future__ import annotations

import argparse
import functools
import importlib.util
import json
import os
import pathlib
import subprocess
import tempfile
from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Any

import bench
import cells
import gymnasium_runs
import numpy as np
import plots
import rows
import scores
from gymnasium_columns import CPU, MEASURES, RETURN, STEP, bar_of, goals, measures, select
from gymnasium_runs import ALGORITHMS, SEEDS, STEPS, ZOO
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

EXTRAS = {
    "Lunar": ("Box2D", "'gymnasium[box2d]'"),
    "Bipedal": ("Box2D", "'gymnasium[box2d]'"),
    "InvertedP": ("mujoco", "'gymnasium[mujoco]'"),
    "Hopper": ("mujoco", "'gymnasium[mujoco]'"),
    "HalfCheetah": ("mujoco", "'gymnasium[mujoco]'"),
    "Walker2d": ("mujoco", "'gymnasium[mujoco]'"),
    "ALE/": ("ale_py", "ale-py opencv-python-headless"),
}
"""Module and package that environments need, by the beginning of their ids."""

SBX_VENV = "sbx-gymnasium"
COLOURS = {
    "ppo": plots.COLOURS["sb3"],
    "sbx": plots.COLOURS["sbx"],
    "grpo": plots.COLOURS["grpo_jax"],
}
NAMES = {"ppo": "SB3 PPO", "sbx": "SBX PPO", "grpo": "GRPO", "grpo-clone": "GRPO, dynamics='clone'"}
NAMES["grpo-episodes"] = "GRPO, candidates='episodes'"

N_ENVS_A_PICTURE = 4


# Running


def steps_of(settings: str, env_id: str, scale: float) -> int:
    """PPO's decision steps."""
    return round(scale * (STEPS[env_id] if settings == "defaults" else ZOO[env_id]["total_timesteps"]))


def train(
    settings: str, algo: str, env_id: str, seed: int, total_timesteps: int, out: str, venvs: str
) -> rows.Row:
    """One run; raises SystemExit where PPO has no rows that tell how long it may take."""
    job: dict[str, Any] = {"settings": settings, "algo": algo, "env_id": env_id, "seed": seed}
    job |= {"total_timesteps": total_timesteps, "budget": None}
    if algo != "ppo":
        found = select(scores.read(pathlib.Path(out)), settings, env_id, "ppo")
        if not found:
            raise SystemExit(f"{env_id}, {settings}: {algo} gets PPO's seconds; run --algos ppo first")
        job["budget"] = bar_of(found).seconds
    if algo != "sbx":
        return gymnasium_runs.run(**job)
    with tempfile.TemporaryDirectory() as folder:
        path = pathlib.Path(folder) / "row.json"
        python = bench.python_of(pathlib.Path(venvs), SBX_VENV).absolute()
        command = [python, gymnasium_runs.__file__, json.dumps(job), path]
        subprocess.run(command, check=True, env=bench.environment(bench.Job(algo, env_id, seed), None))
        return json.loads(path.read_text())


def check_packages(ids: Iterable[str]) -> None:
    """Raises SystemExit where an environment's package is missing, and says which to install."""
    for env_id in ids:
        for start, (module, package) in EXTRAS.items():
            if env_id.startswith(start) and importlib.util.find_spec(module) is None:
                raise SystemExit(f"{env_id} needs {module}: pip install {package}, or choose other --ids")


# Reporting


def cell(values: Sequence[float | None], form: Any = cells.number) -> str:
    """``median (min to max)``; how many seeds are without a value, where there are such."""
    missing = sum(value is None for value in values)
    if missing:
        return f"not reached by {missing} of {len(values)}"
    return cells.spread([value for value in values if value is not None], form)


def first(values: Sequence[float | None], form: Any = cells.number) -> str:
    """The median of what it took to get there; ``"1 of 2"`` where not every seed does."""
    known = [value for value in values if value is not None and np.isfinite(value)]
    return form(scores.median(known)) if len(known) == len(values) else f"{len(known)} of {len(values)}"


def kind_of(found: Sequence[rows.Row]) -> str:
    """What GRPO compared, and on how many seeds where they differ."""
    counts = Counter(row["dynamics"] for row in found if row["dynamics"] is not None)
    return ", ".join(kind if len(counts) == 1 else f"{kind} ({n})" for kind, n in counts.items())


def summary(results: Sequence[rows.Row], settings: str) -> str:
    """One row for each environment: returns at equal CPU seconds, and what PPO's last return took."""
    lines = []
    for env_id in STEPS:
        by_algo = {algo: select(results, settings, env_id, algo) for algo in COLOURS}
        if not by_algo["ppo"] or not by_algo["grpo"]:
            continue
        bar = bar_of(by_algo["ppo"])
        reached = {algo: [measures(row, bar) for row in found] for algo, found in by_algo.items()}

        def each(name: str, algo: str, reached: Any = reached) -> list[float | None]:
            return [one[name] for one in reached[algo]]

        counts = [str(len(by_algo[algo])) for algo in COLOURS]
        lines.append(
            [env_id, kind_of(by_algo["grpo"]), "/".join(counts), cells.number(bar.seconds)]
            + [cell(each("equal_seconds", algo)) if by_algo[algo] else "" for algo in COLOURS]
            + [first(each("seconds_to_target", algo)) for algo in ("ppo", "grpo")]
            + [first(each("steps_to_target", algo), cells.steps) for algo in ("ppo", "grpo")]
        )
    head = ["Environment", "Alternatives", "Seeds", "CPU s", *(NAMES[algo] for algo in COLOURS)]
    head += ["To PPO's last return, s: PPO", "GRPO", "Decision steps: PPO", "GRPO"]
    return cells.table(head, lines)


def section(results: Sequence[rows.Row], settings: str) -> list[str]:
    """The tables of a setting: a summary, what was reached, and what it took."""
    returns, costs, notes = [], [], []
    for env_id in STEPS:
        ppo = select(results, settings, env_id, "ppo")
        for algo in ALGORITHMS if ppo else ():
            found = select(results, settings, env_id, algo)
            notes += sorted(
                {f"- {env_id}, {NAMES[algo]}: {remark}" for row in found for remark in remarks(row)}
            )
            if not (found := [row for row in found if not row["refused"]]):
                continue
            bar = bar_of(ppo)
            of = {name: [measures(row, bar)[name] for row in found] for name in MEASURES}
            head = [env_id, NAMES[algo]]
            returns.append(
                [*head, kind_of(found), str(len(found))]
                + [cell(of[name]) for name in ("equal_steps", "equal_seconds", "equal_no_compile")]
                + [cell([row[name] for row in found]) for name in ("sampled_return", "greedy_return")]
            )
            all_steps = [row["decision_steps"] + row["simulator_steps"] for row in found]
            costs.append(
                [*head, *(cell(of[name], cells.steps) for name in ("steps_then", "all_steps_then"))]
                + [
                    cell([row["decision_steps"] for row in found], cells.steps),
                    cell(all_steps, cells.steps),
                ]
                + [cell([row[name] for row in found]) for name in ("cpu_seconds", "compile_seconds")]
                + [cell(of[name]) for name in ("seconds_to_target", "no_compile_to_target")]
                + [cell(of["steps_to_target"], cells.steps)]
            )
    if not returns:
        return []
    title = "Nothing but defaults" if settings == "defaults" else "RL Zoo's settings of PPO for all"
    head = ["Environment", "Algorithm", "Alternatives", "Seeds", "At equal decision steps", "At equal CPU s"]
    head += ["At equal CPU s, without compiling", "Whole run, sampled", "Whole run, greedy"]
    cost_head = ["Environment", "Algorithm", "Decision steps in PPO's CPU s", "With simulator steps"]
    cost_head += ["Whole run, decision steps", "With simulator steps", "CPU s", "Compiling, s"]
    cost_head += ["CPU s to PPO's final return", "Without compiling", "Decision steps to it"]
    return [
        f"## {title}\n",
        *goals(results, settings),
        "\n### Summary\n",
        summary(results, settings),
        "### Return\n",
        cells.table(head, returns),
        "### Cost\n",
        cells.table(cost_head, costs),
        *notes,
        "",
    ]


def remarks(row: rows.Row) -> list[str]:
    """What a run said of itself."""
    if row["refused"]:
        return [f"refused: {row['refused']}"]
    gymnasium = "\x1b[33mWARN"  # how its own warnings begin
    return [
        " ".join(text.split()) for text in row["said"] + row["warnings"] if not text.startswith(gymnasium)
    ]


def table(results: list[rows.Row]) -> str:
    """The Markdown report."""
    lines = [
        "Median over seeds (lowest to highest). Return: mean of the last"
        f" {gymnasium_runs.N_EPISODES} training episodes; after the whole run: {gymnasium_runs.N_EPISODES} episodes of the sampled"
        " and of the greedy policy. Equal CPU s: those that PPO took to its decision steps, the median. Not reached: the run was"
        f" ended at {gymnasium_runs.CAP} times these seconds, compiling apart, before it had as many decision steps.\n"
    ]
    if not any(row["algo"] == "sbx" for row in results):
        lines.append("SBX has no rows here: it was not installed, or not asked for.\n")
    for settings in ("defaults", "zoo"):
        lines += section(results, settings)
    missing = [env_id for env_id in STEPS if env_id not in ZOO]
    lines.append(f"RL Zoo has no settings for {', '.join(missing)}.\n")
    if any(row["algo"] == "sbx" for row in results):
        lines.append(
            "SBX sees a discrete observation as one number, the others as one of so many. Its gSDE is of the noise alone.\n"
        )
    return "\n".join([*lines, rows.provenance(results)]) + "\n"


def band(found: Sequence[rows.Row], column: int) -> scores.Floats:
    """x, and median, lowest and highest return over seeds, ``[4, n]``, where every seed has a curve."""
    curves = [
        np.array(row["curve"], dtype=np.float64)[:, [column, RETURN]].T for row in found if row["curve"]
    ]
    if not curves:
        return np.empty((4, 0))
    grid = np.unique(np.concatenate([x for x, _ in curves]))
    grid = grid[(grid >= max(x[0] for x, _ in curves)) & (grid <= min(x[-1] for x, _ in curves))]
    values = np.array([np.interp(grid, *curve) for curve in curves])
    return np.array([grid, np.median(values, axis=0), values.min(axis=0), values.max(axis=0)])


def draw(results: list[rows.Row], path: pathlib.Path) -> None:
    """The curves, ``curves-<settings>-<i>.png``: four environments a picture, over CPU seconds and over steps."""
    for settings in ("defaults", "zoo"):
        ids = [env_id for env_id in STEPS if select(results, settings, env_id, "ppo")]
        for i in range(0, len(ids), N_ENVS_A_PICTURE):
            name = f"{path.stem}-{settings}-{i // N_ENVS_A_PICTURE + 1}{path.suffix}"
            draw_some(results, settings, ids[i : i + N_ENVS_A_PICTURE], path.with_name(name))


def draw_some(results: list[rows.Row], settings: str, ids: Sequence[str], path: pathlib.Path) -> None:
    """One picture: a column for each environment."""
    figure = Figure(figsize=(max(3.4 * len(ids), 6.4), 6.4), layout="constrained")
    panels = figure.subplots(2, len(ids), squeeze=False)
    for env_id, column in zip(ids, panels.T, strict=True):
        found = {algo: select(results, settings, env_id, algo) for algo in COLOURS}
        bar = bar_of(found["ppo"])
        axes = (
            (CPU, "CPU seconds, compiling included", bar.seconds),
            (STEP, "decision steps", bar.total_timesteps),
        )
        for panel, (x, label, end) in zip(column, axes, strict=True):
            lines = {algo: band(of_algo, x) for algo, of_algo in found.items()}
            plots.draw_panel(panel, {algo: line for algo, line in lines.items() if line.size}, COLOURS)
            panel.axvline(end, color="black", linestyle=":", linewidth=1, zorder=1)
            panel.set_xlabel(f"{label} ({panel.get_xscale()})", fontsize=9)
        column[0].set_title(env_id, fontsize=10)
    shown = [algo for algo in COLOURS if any(row["algo"] == algo for row in results)]
    handles = [Line2D([], [], color=COLOURS[algo], label=NAMES[algo]) for algo in shown]
    handles.append(Line2D([], [], color="black", linestyle=":", label="end of PPO's runs"))
    figure.legend(handles=handles, loc="outside upper center", ncols=len(handles), frameon=False)
    figure.supylabel(
        f"return, last {gymnasium_runs.N_EPISODES} training episodes: median and range of seeds", fontsize=10
    )
    figure.savefig(path, dpi=plots.PNG_DPI)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=pathlib.Path, default=pathlib.Path("runs/table"), help="folder")
    parser.add_argument("--settings", nargs="+", choices=("defaults", "zoo"), default=["defaults"])
    parser.add_argument("--ids", nargs="+", choices=STEPS, default=list(STEPS), metavar="ID")
    parser.add_argument("--algos", nargs="+", choices=ALGORITHMS, default=["ppo", "grpo", "sbx"])
    parser.add_argument("--seeds", type=int, default=5, help="at most; fewer where runs take long")
    parser.add_argument("--scale", type=float, default=1.0, help="factor of the decision steps")
    parser.add_argument("--venvs", type=pathlib.Path, default=pathlib.Path("runs/venvs"), help="of SBX")
    parser.add_argument("--report", action="store_true", help="run nothing")
    args = parser.parse_args()
    algos = [algo for algo in ALGORITHMS if algo in args.algos]  # PPO first, whose seconds the others get
    if not args.report:
        check_packages(args.ids)
        if "sbx" in algos:
            try:
                bench.make_venv(args.venvs, SBX_VENV)
            except subprocess.CalledProcessError as error:
                print(f"SBX could not be installed, its rows are left out: {error}")
                algos.remove("sbx")
    jobs = {
        f"{settings}-{algo}-{env_id.replace('/', '_')}-{seed}": (
            *(settings, algo, env_id, seed),
            steps_of(settings, env_id, args.scale),
        )
        for settings in args.settings
        for env_id in args.ids
        if settings == "defaults" or env_id in ZOO
        for algo in algos
        for seed in range(min(args.seeds, SEEDS.get(env_id, args.seeds)))
    }
    # Before the processes of the runs start: nothing compiled is loaded from disk, and one thread is one thread.
    os.environ |= {"JAX_ENABLE_COMPILATION_CACHE": "0", "JAX_PLATFORMS": "cpu", "OMP_NUM_THREADS": "1"}
    one_run = functools.partial(train, out=str(args.out), venvs=str(args.venvs))
    rows.run_and_report(one_run, {} if args.report else jobs, args.out, table, draw)


if __name__ == "__main__":
    main()
