"""Ablation: from each environment's preset, one thing is changed at a time.

    taskset -c 0 python benchmarks/ablation.py --out runs/ablation --dry-run    # what would run, and about how long
    taskset -c 0 python benchmarks/ablation.py --out runs/ablation              # runs what is missing, then reports
    python benchmarks/ablation.py --out runs/ablation --report                  # reports alone

A variant is a process with all its seeds side by side, and leaves one JSON row; what has a row is not run again. Runs are
shorter than the presets' (``FRACTIONS``): what learns more slowly shows. The report goes to ``docs/results/ablation_table.md`` and
``docs/results/images/ablation_*.png``.
"""

from __future__ import annotations

import argparse
import math
import os
import pathlib
import statistics
import time
import tomllib
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
import rows
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

import grpo_jax
from grpo_jax.groups import candidates

FRACTIONS = {
    "CartPole-v1": 0.4,
    "Acrobot-v1": 0.3,
    "Pendulum-v1": 0.15,
    "Catch-bsuite": 0.3,
    "MountainCar-v0": 0.5,
    "Breakout-MinAtar": 0.1,
}
"""The environments, and how much of the preset's run a variant gets."""

N_EPISODES = 64
"""Sampled episodes of each seed at the end."""

GROUP_SIZES = (2, 4, 8, 16)

QUICK_SECONDS = 4.0
"""Runs that are shorter than this are compiled without most optimisations: that takes half the time, and is most of it."""

FACTORS = {
    "horizon": "horizon H",
    "bootstrap": "critic at the end of a branch",
    "group_size": "candidates (all, or G sampled)",
    "baseline": "baseline",
    "advantage_scale": "advantage scale",
    "surrogate": "surrogate",
    "common_random_numbers": "common random numbers",
    "backup": "branches of a candidate, and their backup",
}
"""What is varied, and its name in the report."""

COLOUR, PRESET_COLOUR = "#0072B2", "#D55E00"

Config = grpo_jax.GRPOConfig
References = dict[str, dict[str, Any]]


class Variant(NamedTuple):
    """One program to run.

    Attributes:
      env: environment id.
      labels: what it stands for: (factor, level) pairs; the preset itself is a level of every factor.
      config: settings.
      is_preset: whether nothing is changed.
    """

    env: str
    labels: tuple[tuple[str, str], ...]
    config: Config
    is_preset: bool

    @property
    def name(self) -> str:
        """Of the row."""
        factor, level = ("preset", "as it is") if self.is_preset else self.labels[0]
        return f"{self.env}-{factor}-{level}".replace(" ", "_").replace(",", "")


# What to run


def levels(factor: str, config: Config, enumerated: bool) -> Iterator[tuple[str, dict[str, Any]]]:
    """Levels of a factor: label, and what it changes in the config.

    Args:
      factor: one of ``FACTORS``.
      config: the preset.
      enumerated: whether the preset compares all actions.
    """
    if factor == "horizon":
        steps = config.horizon
        lengths = (
            {1, 4, 16, steps}
            if config.bootstrap
            else {max(1, steps // 16), steps // 4 or 1, steps, 2 * steps}
        )
        for length in sorted(lengths):
            yield str(length), {"horizon": length}
    elif factor == "bootstrap":
        yield from (("off", {"bootstrap": False}), ("on", {"bootstrap": True}))
    elif factor == "group_size":
        if enumerated:
            yield "all", {}
        sizes = GROUP_SIZES if enumerated else sorted({*GROUP_SIZES, config.group_size})
        for size in sizes:
            yield str(size), {"group_size": size} | ({"candidates": "sample"} if enumerated else {})
    elif factor == "baseline":
        for name in ("policy", "mean", "leave_one_out", "executed", "shrinkage"):
            yield name.replace("_", " "), {"baseline": name}
    elif factor == "advantage_scale":
        for name in ("none", "group", "batch"):
            yield name, {"advantage_scale": name}
    elif factor == "surrogate":
        for name in ("ppo", "cispo", "sapo", "tpo"):
            yield name, {"surrogate": name}
    elif factor == "common_random_numbers":
        yield from (("off", {"common_random_numbers": False}), ("on", {"common_random_numbers": True}))
    elif factor == "backup":
        yield "1", {"n_rollouts": 1, "backup": "mean"}
        yield "4, mean", {"n_rollouts": 4, "backup": "mean"}
        yield "4, max", {"n_rollouts": 4, "backup": "max"}
        if (config.n_rollouts, config.backup) not in ((1, "mean"), (4, "mean"), (4, "max")):
            yield f"{config.n_rollouts}, {config.backup}", {}
    else:
        raise ValueError(f"factor={factor!r} must be one of {', '.join(FACTORS)}")


def variants(env_id: str, factors: Iterable[str] = tuple(FACTORS)) -> tuple[list[Variant], list[str]]:
    """The variants of an environment, the preset first; and those that the config refuses, in words."""
    preset, world = grpo_jax.preset(env_id), grpo_jax.make(env_id)
    policy = grpo_jax.make_policy(preset, world.observation_space, world.action_space)
    enumerated = candidates.resolve(preset, policy.distribution) == "enumerate"
    labels: dict[Config, list[tuple[str, str]]] = {preset: []}
    refused = []
    for factor in factors:
        for level, changes in levels(factor, preset, enumerated):
            try:
                config = preset.replace(**changes)
            except ValueError as problem:
                refused.append(f"{env_id}, {factor} {level}: {problem}")
            else:
                labels.setdefault(config, []).append((factor, level))
    return [Variant(env_id, tuple(of), config, config == preset) for config, of in labels.items()], refused


def n_timesteps(env_id: str, fraction: float | None) -> int:
    """Decision steps of a seed."""
    share = FRACTIONS.get(env_id, 0.4) if fraction is None else fraction
    return max(1, round(share * grpo_jax.preset_timesteps(env_id)))


def estimate(variant: Variant, total_timesteps: int, n_seeds: int) -> float:
    """CPU seconds of a variant, about: an upper bound where branches end before the horizon."""
    config, world = variant.config, grpo_jax.make(variant.env)
    policy = grpo_jax.make_policy(config, world.observation_space, world.action_space)
    n_branches = (
        candidates.n_candidates(config, policy.distribution) * config.n_rollouts / config.branch_every
    )
    rate = 1.5e6 if variant.env.endswith("MinAtar") else 5e6  # simulator steps a second on one core
    decisions = total_timesteps * n_seeds
    running = decisions * (n_branches * config.horizon / rate + 4e-6 * config.n_epochs)
    return running + (9.0 if running < QUICK_SECONDS else 14.0)  # for importing and compiling


# One run


def measure(
    env_id: str,
    labels: list[list[str]],
    is_preset: bool,
    config: str,
    total_timesteps: int,
    n_seeds: int,
    quick_compile: bool,
) -> rows.Row:
    """Trains and plays all seeds of a variant.

    Args:
      env_id: environment id.
      labels: (factor, level) pairs, kept in the row.
      is_preset: kept in the row.
      config: JSON of the settings.
      total_timesteps: decision steps of a seed.
      n_seeds: how many seeds.
      quick_compile: leaves most of XLA's optimisations out, for this process.
    """
    if quick_compile:
        jax.config.update("jax_disable_most_optimizations", True)
    settings, env = Config.from_json(config), grpo_jax.make(env_id)
    keys = jax.vmap(jax.random.split)(jax.random.split(jax.random.key(0), n_seeds))
    seconds: dict[str, float] = {}

    def timed(name: str, function: Callable[..., Any], *arguments: Any) -> Any:
        start = time.process_time()
        result = jax.block_until_ready(function(*arguments))
        seconds[name] = time.process_time() - start
        return result

    # Under vmap a seed that is not finite stops no other one.
    train = jax.jit(jax.vmap(lambda key: grpo_jax.train(settings, env, key, total_timesteps)))
    train = timed("compile", train.lower(keys[:, 0]).compile)
    state, metrics = jax.device_get(timed("train", train, keys[:, 0]))
    play = jax.jit(jax.vmap(lambda state, key: grpo_jax.evaluate(state, env, key, N_EPISODES)))
    scores = np.asarray(timed("evaluate", play, state, keys[:, 1]), np.float64).mean(axis=1)
    curves = np.asarray(
        metrics["episode_return"], np.float64
    )  # [n_seeds, n_iterations], NaN before the first end
    failures = metrics["nonfinite_updates"] + metrics["nonfinite_groups"]
    return {
        "env": env_id,
        "labels": labels,
        "is_preset": is_preset,
        "config": config,
        "scores": [finite(score) for score in scores],
        "areas": [
            finite(np.mean(curve[~np.isnan(curve)])) if not np.all(np.isnan(curve)) else None
            for curve in curves
        ],
        "nonfinite": [
            bool(np.any(of != 0)) or not math.isfinite(s) for of, s in zip(failures, scores, strict=True)
        ],
        "frac_zero_std": [finite(np.mean(of)) for of in metrics["frac_zero_std"]],
        "decision_steps": int(metrics["decision_steps"][0, -1]),
        "simulator_steps": float(np.mean(metrics["simulator_steps"][:, -1])),
        "cpu_seconds": seconds,
    }


def finite(value: Any) -> float | None:
    """A number that JSON can hold; None for NaN and infinities."""
    return float(value) if math.isfinite(value) else None


# Numbers


def middle(values: Iterable[float | None]) -> float:
    """Median over seeds; a seed that is not finite counts as the worst."""
    return statistics.median(-math.inf if value is None else value for value in values)


def scale(env: str, results: Sequence[rows.Row], references: References) -> tuple[float, float]:
    """Returns that count as 0 and 1: a random policy's, and the best possible or else the best median in the rows."""
    known = references[env]
    best = known.get("best", max(middle(row["scores"]) for row in results if row["env"] == env))
    return float(known["random"]), float(best)


def normalised(values: Iterable[float | None], limits: tuple[float, float]) -> list[float]:
    """Scores on the scale of their environment; 0 for a seed that is not finite."""
    low, high = limits
    span = high - low if high > low else 1.0
    return [0.0 if value is None else (value - low) / span for value in values]


def of_factor(results: Sequence[rows.Row], env: str, factor: str) -> list[tuple[str, rows.Row]]:
    """Levels of a factor in an environment, with their rows, in the order in which :func:`levels` gives them."""
    found = {
        level: row for row in results for of, level in row["labels"] if row["env"] == env and of == factor
    }
    if factor in ("horizon", "group_size"):  # numbers, "all" last
        return sorted(found.items(), key=lambda item: float(item[0]) if item[0].isdigit() else math.inf)
    preset = next((row for row in results if row["env"] == env and row["is_preset"]), None)
    order = list(found)
    if preset is not None:
        order = [level for level, _ in levels(factor, Config.from_json(preset["config"]), True)]
    return [(level, found[level]) for level in order if level in found]


def environments(results: Sequence[rows.Row]) -> list[str]:
    ids = {row["env"] for row in results}
    return [env for env in FRACTIONS if env in ids] + sorted(ids - FRACTIONS.keys())


# The report


def table(results: list[rows.Row], references: References) -> str:
    """Markdown: what each factor does to the median, then every number."""
    envs = environments(results)
    limits = {env: scale(env, results, references) for env in envs}
    preset = {env: row for row in results if row["is_preset"] for env in [row["env"]]}
    steps = ", ".join(f"{env} {preset[env]['decision_steps']:,}" for env in envs if env in preset)
    n_seeds = len(results[0]["scores"])
    lines = [
        "<!-- Written by benchmarks/ablation.py: change that, not this. -->",
        "",
        f"From each preset, one thing changed at a time. {n_seeds} seeds; decision steps: {steps}. Scores are normalised: 0"
        " is a random policy, 1 the best possible return (the best median here, where that is not known).",
        "",
        "## What matters",
        "",
        "Median over seeds of the normalised score, less the preset's.",
        "",
        "| factor | level | " + " | ".join(envs) + " | mean |",
        "|---|---|" + "---:|" * (len(envs) + 1),
    ]
    for factor, title in FACTORS.items():
        found = {env: dict(of_factor(results, env, factor)) for env in envs}
        names = positions_of_horizon(found) if factor == "horizon" else _union(found.values())
        for name in names:
            changes = {}
            for env in envs:
                level = names[name].get(env) if factor == "horizon" else name
                if level in found[env] and env in preset:
                    ours, theirs = (
                        middle(normalised(row["scores"], limits[env]))
                        for row in (found[env][level], preset[env])
                    )
                    changes[env] = None if found[env][level]["is_preset"] else ours - theirs
            cells = ["" if env not in changes else _change(changes[env]) for env in envs]
            known = [change for change in changes.values() if change is not None]
            mean = f"{statistics.fmean(known):+.2f}" if known else ""
            lines.append(f"| {title} | {name} | " + " | ".join(cells) + f" | {mean} |")
    lines += ["", "## Every number", ""]
    lines += [
        "Return of the sampled policy, median (min to max); then the area under the learning curve: the mean return of"
    ]
    lines += ["training episodes. Bold: the preset.", ""]
    lines += [
        "| environment | factor | level | return | area | groups without spread | simulator steps | not finite |"
    ]
    lines += ["|---|---|---|---:|---:|---:|---:|---:|"]
    for env in envs:
        for factor, title in FACTORS.items():
            for level, row in of_factor(results, env, factor):
                shown = f"**{level}**" if row["is_preset"] else level
                zero = middle(row["frac_zero_std"])
                lines.append(
                    f"| {env} | {title} | {shown} | {rows.spread(row['scores'], 2)} | {rows.spread(row['areas'], 2)}"
                    f" | {zero:.0%} | {row['simulator_steps']:,.0f} | {sum(row['nonfinite'])} of {len(row['nonfinite'])} |"
                )
    total = sum(sum(row["cpu_seconds"].values()) for row in results)
    lines += [
        "",
        f"{len(results)} runs, {total / 60:.0f} CPU minutes without importing.",
        "",
        rows.provenance(results),
    ]
    return "\n".join(lines) + "\n"


def positions_of_horizon(found: dict[str, dict[str, rows.Row]]) -> dict[str, dict[str, str]]:
    """Horizons differ between environments: their levels as multiples of the preset's, name -> env -> level."""
    names: dict[int, dict[str, str]] = {}
    for env, of in found.items():
        base = next((level for level, row in of.items() if row["is_preset"]), None)
        if base is not None:
            names.setdefault(0, {})[env] = base
        for level in of if base is not None else ():
            power = round(math.log2(int(level) / int(base)))  # 6 of 100 stands beside 2 of 32
            names.setdefault(power, {}).setdefault(env, level)
    return {
        "H" if power == 0 else f"H / {2**-power}" if power < 0 else f"{2**power} H": names[power]
        for power in sorted(names)
    }


def _union(of: Iterable[dict[str, rows.Row]]) -> dict[str, dict[str, str]]:
    return {level: {} for found in of for level in found}


def _change(change: float | None) -> str:
    return "preset" if change is None else f"{change:+.2f}"


def draw(factor: str, results: Sequence[rows.Row], references: References, path: pathlib.Path) -> None:
    """A panel an environment: median and range over seeds of each level; the preset's in another colour."""
    envs = [env for env in environments(results) if of_factor(results, env, factor)]
    if not envs:
        return
    n_columns = min(3, len(envs))
    n_rows = math.ceil(len(envs) / n_columns)
    height = 0.9 + n_rows * (0.75 + 0.27 * max(len(of_factor(results, env, factor)) for env in envs))
    figure = Figure(figsize=(3.4 * n_columns + 0.4, height), layout="constrained")
    panels = np.atleast_1d(figure.subplots(n_rows, n_columns, squeeze=False, sharex=True)).ravel()
    for panel, env in zip(panels, envs, strict=False):
        draw_panel(panel, of_factor(results, env, factor), scale(env, results, references))
        panel.set_title(env, fontsize=10)
    for panel in panels[len(envs) :]:
        panel.set_axis_off()
    handles = [
        Line2D([], [], color=colour, marker="o", linewidth=2, label=label)
        for colour, label in ((PRESET_COLOUR, "preset"), (COLOUR, "one thing changed"))
    ]
    figure.legend(handles=handles, loc="outside upper center", ncols=2, frameon=False, fontsize=9)
    figure.supylabel(FACTORS[factor], fontsize=10)
    figure.supxlabel(
        "normalised return: 0 a random policy, 1 the best; median and range over seeds", fontsize=10
    )
    figure.savefig(path, dpi=110)


def draw_panel(panel: Axes, found: list[tuple[str, rows.Row]], limits: tuple[float, float]) -> None:
    """Levels from bottom to top."""
    for y, (_, row) in enumerate(found):
        scores = normalised(row["scores"], limits)
        colour = PRESET_COLOUR if row["is_preset"] else COLOUR
        panel.plot((min(scores), max(scores)), (y, y), color=colour, linewidth=2, alpha=0.5)
        panel.plot(statistics.median(scores), y, "o", color=colour, markersize=6)
    for x in (0, 1):
        panel.axvline(x, color="black", linewidth=0.8, linestyle=":", zorder=0)
    panel.set_yticks(range(len(found)), [level for level, _ in found], fontsize=9)
    panel.set_ylim(-0.6, len(found) - 0.4)
    panel.tick_params(axis="x", labelsize=8)
    panel.grid(axis="x", alpha=0.25)
    panel.spines[["top", "right"]].set_visible(False)


def report(results: list[rows.Row], docs: pathlib.Path) -> None:
    """Writes the table and a picture for each factor."""
    if not results:
        raise SystemExit("no rows: run benchmarks/ablation.py without --report first")
    references = tomllib.loads(pathlib.Path(__file__).with_name("references.toml").read_text())
    images = docs / "images"
    images.mkdir(parents=True, exist_ok=True)
    for factor in FACTORS:
        draw(factor, results, references, images / f"ablation_{factor}.png")
    (docs / "ablation_table.md").write_text(table(results, references))
    print(f"{docs / 'ablation_table.md'} and {images}/ablation_*.png")


# The door


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--out", type=pathlib.Path, default=pathlib.Path("runs/ablation"), help="folder of the rows"
    )
    parser.add_argument(
        "--docs", type=pathlib.Path, default=pathlib.Path("docs/results"), help="folder of the report"
    )
    parser.add_argument("--envs", nargs="+", default=list(FRACTIONS), metavar="ID")
    parser.add_argument("--factors", nargs="+", choices=FACTORS, default=list(FACTORS), metavar="FACTOR")
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument(
        "--fraction", type=float, help="of every preset's decision steps, in place of FRACTIONS"
    )
    parser.add_argument("--dry-run", action="store_true", help="say what would run, and about how long")
    parser.add_argument("--report", action="store_true", help="run nothing")
    args = parser.parse_args()
    if unknown := sorted(set(args.envs) - set(grpo_jax.preset_ids())):
        raise SystemExit(
            f"--envs {' '.join(unknown)}: no preset; there are {', '.join(grpo_jax.preset_ids())}"
        )
    if args.seeds < 1 or (args.fraction is not None and not 0 < args.fraction <= 1):
        raise SystemExit(f"--seeds {args.seeds} must be at least 1, and --fraction {args.fraction} in (0, 1]")
    if args.report:
        return report(rows.read(args.out), args.docs)
    jobs, total = {}, 0.0
    for env_id in args.envs:
        found, refused = variants(env_id, args.factors)
        for words in refused:
            print(f"left out: {words}")
        steps = n_timesteps(env_id, args.fraction)
        seconds = sum(estimate(variant, steps, args.seeds) for variant in found)
        quick = estimate(found[0], steps, args.seeds) < 9.0 + QUICK_SECONDS
        print(
            f"{env_id}: {len(found)} variants of {steps:,} decision steps, about {seconds / 60:.1f} CPU minutes"
        )
        total += seconds
        for variant in found:
            labels = [list(label) for label in variant.labels]
            settings = (labels, variant.is_preset, variant.config.to_json())
            jobs[variant.name] = (env_id, *settings, steps, args.seeds, quick)
    print(f"{len(jobs)} variants, about {total / 60:.0f} CPU minutes in all")
    if args.dry_run:
        return None
    # What a seed plays at the end is one program for most variants of an environment: the jobs share it.
    os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str((args.out / "cache").resolve()))
    failed = rows.run(measure, jobs, args.out)
    report(rows.read(args.out), args.docs)
    raise SystemExit(min(failed, 1))


if __name__ == "__main__":
    main()
