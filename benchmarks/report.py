"""Report of the benchmark: Markdown tables and plots from the rows that ``bench.py`` left.

    python benchmarks/report.py runs/bench [--out docs/results] [--pages README.md README.ja.md docs/benchmark*.md]

Writes ``<out>/benchmark_table.md`` and ``<out>/images/bench_*.png``. A seed's score is the mean of its final
returns; tables show the median over seeds, and the lowest and highest seed. Seconds are CPU seconds of the
process unless a heading says otherwise. What the environments allow is in ``references.toml``.
"""

from __future__ import annotations

import argparse
import json
import math
import pathlib
import statistics
import tomllib
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import EngFormatter, MaxNLocator, NullFormatter

Row = dict[str, Any]
References = dict[str, dict[str, Any]]
Floats = npt.NDArray[np.float64]

OURS = "grpo_jax"
LIBRARIES = {"grpo_jax": "grpo_jax", "sb3": "SB3 PPO", "sbx": "SBX PPO", "rejax": "rejax PPO"}
COLOURS = {"grpo_jax": "#0072B2", "sb3": "#D55E00", "sbx": "#009E73", "rejax": "#CC79A7"}
CACHES = ("cold", "off", "warm")
"""Where a seed ran with several caches, the first of these stands for it: its compile time is what a user waits."""

LEVEL = 0.01
"""Medians nearer than this, as a share of the way from a random policy to the reference, are level."""

PNG_DPI = 110


class Reached(NamedTuple):
    """What a run had spent when it reached a threshold; infinity where it never did.

    Attributes:
      decision_steps: real environment steps.
      simulator_steps: steps in branches.
      train: CPU seconds of training.
      total: CPU seconds of importing, compiling and training.
    """

    decision_steps: float
    simulator_steps: float
    train: float
    total: float


NEVER = Reached(math.inf, math.inf, math.inf, math.inf)


# Reading


def read(out: pathlib.Path) -> list[Row]:
    """All rows of a folder."""
    return [json.loads(path.read_text()) for path in sorted((out / "rows").glob("*.json"))]


def read_references(path: pathlib.Path | None = None) -> References:
    """Facts about each environment, by id."""
    path = path or pathlib.Path(__file__).with_name("references.toml")
    return tomllib.loads(path.read_text())


def at_best_settings(rows: Sequence[Row]) -> list[Row]:
    """Of a library that ran an environment with several settings, only the rows of those with the best median."""
    best: dict[tuple[str, str], tuple[float, str]] = {}
    for row in rows:
        key = row["library"], row["env"]
        group = [other for other in select(rows, *key) if other["settings"] == row["settings"]]
        best[key] = max(
            best.get(key, (-math.inf, row["settings"])), (median(map(score, group)), row["settings"])
        )
    return [row for row in rows if best[row["library"], row["env"]][1] == row["settings"]]


def one_row_a_seed(rows: Sequence[Row]) -> list[Row]:
    """One row for each library, environment and seed: that of the first cache in ``CACHES``."""
    chosen: dict[tuple[str, str, int], Row] = {}
    for row in sorted(rows, key=lambda row: CACHES.index(row["cache"])):
        chosen.setdefault((row["library"], row["env"], row["seed"]), row)
    return sorted(chosen.values(), key=lambda row: row["seed"])


def select(rows: Sequence[Row], library: str, env: str) -> list[Row]:
    return [row for row in rows if row["library"] == library and row["env"] == env]


def libraries_of(rows: Sequence[Row]) -> list[str]:
    """The libraries that have rows, ours first."""
    return [library for library in LIBRARIES if any(row["library"] == library for row in rows)]


def environments_of(rows: Sequence[Row], references: References) -> list[str]:
    """The environments that have rows, in the order of the references."""
    ids = {row["env"] for row in rows}
    return [env for env in references if env in ids] + sorted(ids - references.keys())


# Numbers


def score(row: Row) -> float:
    """Mean final return of a seed; minus infinity where it is not a number, so that it counts as the worst."""
    returns = [float("nan") if value is None else float(value) for value in row["final_returns"]]
    mean = math.fsum(returns) / len(returns) if returns and all(map(math.isfinite, returns)) else -math.inf
    return mean if math.isfinite(mean) else -math.inf


def median(values: Iterable[float]) -> float:
    """Median that takes infinities: half of the seeds that never reach a score make it infinite."""
    known = sorted(values)
    middle = known[(len(known) - 1) // 2], known[len(known) // 2]
    return middle[0] if middle[0] == middle[1] else statistics.fmean(middle)


def seconds(row: Row, name: str) -> float:
    """CPU seconds ``name``; 0 where they cannot be told apart from training, which then holds them."""
    return float(row["cpu"][f"{name}_seconds"] or 0.0)


def before_training(row: Row) -> float:
    """CPU seconds of importing and compiling."""
    return seconds(row, "import") + seconds(row, "compile")


def reached(row: Row, threshold: float, evaluations: int = 1) -> Reached:
    """When a run's sampled return first is at the threshold, for so many evaluations in a row.

    Args:
      row: a run.
      threshold: return.
      evaluations: 1, or 2 for the stricter "stays"; the time is that of the first of them.
    """
    at = [point["return_mean"] is not None and point["return_mean"] >= threshold for point in row["curve"]]
    for i in range(len(at) - evaluations + 1):
        if all(at[i : i + evaluations]):
            point = row["curve"][i]
            train = float(point["train_cpu_seconds"])
            return Reached(
                point["decision_steps"], point["simulator_steps"], train, before_training(row) + train
            )
    return NEVER


def scale(env: str, rows: Sequence[Row], references: References) -> tuple[float, float] | None:
    """A random policy's return and the reference's: the best possible, or else the best median in the rows.

    None where they are not known, or where nothing can be learned.
    """
    known = references.get(env, {})
    if "random" not in known or not known.get("aggregate", True):
        return None
    medians = [median(map(score, group)) for library in LIBRARIES if (group := select(rows, library, env))]
    reference = known.get("best", max(medians, default=-math.inf))
    return (known["random"], reference) if math.isfinite(reference) and reference > known["random"] else None


def interquartile_mean(scores: Floats) -> float:
    """Mean of what is left without the lowest and the highest quarter, each rounded down to whole scores."""
    flat = np.sort(scores, axis=None)
    cut = flat.size // 4
    return float(flat[cut : flat.size - cut].mean())


def bootstrap_interval(
    scores: Sequence[Floats], n_samples: int = 2000, seed: int = 0
) -> tuple[float, float, float]:
    """Interquartile mean over environments and seeds, with its stratified bootstrap 95% interval.

    Seeds are drawn again with replacement within each environment, as in rliable: https://arxiv.org/abs/2108.13264

    Args:
      scores: ``[n_seeds]`` for each environment.
      n_samples: bootstrap samples.
      seed: of the bootstrap.

    Returns:
      The interquartile mean, and the 2.5% and 97.5% percentiles.
    """
    rng = np.random.default_rng(seed)
    samples = [
        interquartile_mean(np.concatenate([rng.choice(env, env.size) for env in scores]))
        for _ in range(n_samples)
    ]
    low, high = np.percentile(samples, (2.5, 97.5))
    return interquartile_mean(np.concatenate(scores)), float(low), float(high)


def normalised(
    library: str, envs: Sequence[str], rows: Sequence[Row], references: References
) -> list[Floats]:
    """Scores of a library, ``[n_seeds]`` for each environment: 0 a random policy or a NaN, 1 the reference."""
    result = []
    for env in envs:
        limits = scale(env, rows, references)
        assert limits is not None
        values = np.array([score(row) for row in select(rows, library, env)])
        result.append(np.where(np.isfinite(values), (values - limits[0]) / (limits[1] - limits[0]), 0.0))
    return result


class Comparison(NamedTuple):
    """Ours and a peer over the environments that both ran.

    Attributes:
      peer: library.
      envs: ids.
      ours: interquartile mean and its interval.
      theirs: the same of the peer.
    """

    peer: str
    envs: list[str]
    ours: tuple[float, float, float]
    theirs: tuple[float, float, float]


def compare(rows: Sequence[Row], references: References) -> list[Comparison]:
    """One comparison for each peer that shares an environment with us."""
    comparisons = []
    for peer in libraries_of(rows):
        envs = [
            env
            for env in environments_of(rows, references)
            if select(rows, OURS, env) and select(rows, peer, env) and scale(env, rows, references)
        ]
        if peer != OURS and envs:
            intervals = [
                bootstrap_interval(normalised(library, envs, rows, references)) for library in (OURS, peer)
            ]
            comparisons.append(Comparison(peer, envs, *intervals))
    return comparisons


def winners(env: str, rows: Sequence[Row], references: References) -> list[str]:
    """The libraries with the best median, or level with it."""
    medians = {lib: median(map(score, group)) for lib in LIBRARIES if (group := select(rows, lib, env))}
    best = max(medians.values(), default=-math.inf)
    if not references.get(env, {}).get("aggregate", True):
        return []
    limits = scale(env, rows, references)
    slack = LEVEL * (limits[1] - limits[0]) if limits else 0.0
    return [library for library, value in medians.items() if math.isfinite(best) and value >= best - slack]


# Cells


def number(value: float) -> str:
    """About three digits; infinities are seeds that never got there (or ended in NaN)."""
    if value == math.inf:
        return "never"
    if not math.isfinite(value):
        return "NaN"
    digits = 0 if abs(value) >= 100 else 1 if abs(value) >= 10 else 2
    return f"{round(value, digits) + 0.0:,.{digits}f}"  # + 0.0: no "-0.00"


def spread(values: Iterable[float], form: Callable[[float], str] = number) -> str:
    """``median (min to max)``."""
    known = list(values)
    middle, low, high = form(median(known)), form(min(known)), form(max(known))
    return middle if middle == low == high else f"{middle} ({low} to {high})"


def steps(value: float) -> str:
    return "never" if value == math.inf else f"{value:,.0f}"


def table(head: Sequence[str], body: Iterable[Sequence[str]]) -> str:
    """Markdown of a table; columns behind the first are right-aligned."""
    lines = [head, ["---", *["---:"] * (len(head) - 1)], *body]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines) + "\n"


def best_cell(known: dict[str, Any]) -> str:
    """The best possible score, or what is known instead."""
    if "best" in known:
        return ("about " if known.get("approximate") else "") + number(known["best"])
    return f"unknown, ≤ {number(known['bound'])}" if "bound" in known else "unknown"


def target_cell(known: dict[str, Any]) -> str:
    target = known.get("target", "-")
    return target if isinstance(target, str) else number(target)


def verdict(env: str, rows: Sequence[Row], references: References) -> str:
    """Who is ahead by the median, and whether the seeds of who is behind reach into theirs."""
    best = winners(env, rows, references)
    present = {row["library"] for row in rows if row["env"] == env}
    if len(present) == 1:
        return "one library"
    if not references.get(env, {}).get("aggregate", True):
        return "nothing to learn"
    if not best:
        return "none"
    if OURS in best and len(best) > 1:
        return "level"
    behind = [score(row) for library in present.difference(best) for row in select(rows, library, env)]
    worst = min(score(row) for library in best for row in select(rows, library, env))
    overlap = " (ranges overlap)" if max(behind, default=-math.inf) >= worst else ""
    return ("ours" if OURS in best else f"◄ {', '.join(LIBRARIES[library] for library in best)}") + overlap


def met(env: str, rows: Sequence[Row], references: References) -> str:
    """Whether our median is at the target; a target inside the seeds' range is called so."""
    known, group = references.get(env, {}), select(rows, OURS, env)
    target, limits = known.get("target"), scale(env, rows, references)
    if not group or not limits or not isinstance(target, int | float):
        return "-"
    scores = [score(row) for row in group]
    if median(scores) >= known.get("threshold", target - LEVEL * (limits[1] - limits[0])):
        return "yes"
    return "within the seeds' range" if max(scores) >= target else "no"


# Sections


def scores_section(rows: Sequence[Row], references: References) -> str:
    """One row an environment: what is possible, what was asked for, and every library's score."""
    libraries = libraries_of(rows)
    head = [
        "Environment",
        "Random",
        "Best possible",
        "Published",
        "Target",
        *map(LIBRARIES.__getitem__, libraries),
    ]
    body = []
    for env in environments_of(rows, references):
        known, best = references.get(env, {}), winners(env, rows, references)
        cells = []
        for library in libraries:
            group = select(rows, library, env)
            cell = spread(map(score, group)) if group else "-"
            bad = sum(bool(row["nonfinite"]) for row in group)
            cell = f"**{cell}**" if library in best else cell
            cells.append(cell + (f" ‡ {bad} of {len(group)} non-finite" if bad else ""))
        body.append(
            [
                env,
                number(known["random"]) if "random" in known else "-",
                best_cell(known),
                number(known["published"]) if "published" in known else "-",
                target_cell(known),
                *cells,
                met(env, rows, references),
                verdict(env, rows, references),
            ]
        )
    behind = sum(line[-1].startswith("◄") for line in body)
    return (
        "## Scores\n\n"
        "Return of the sampled policy at the end of training: median over seeds (lowest to highest seed); a seed's"
        " score is the mean of its final episodes. Bold: the best median, and medians within"
        f" {LEVEL:.0%} of the way from a random policy to the reference (the best possible score, or else the best median here);"
        " a target without a threshold counts as met within the same. ◄ marks a row where a peer is ahead"
        f" ({behind} of {len(body)}). Best possible is for a policy that sees one observation and remembers"
        " nothing; published are the returns that gymnax lists for the gymnax-blines checkpoints.\n\n"
        + table([*head, "Target met by ours", "Ahead"], body)
    )


def costs_section(rows: Sequence[Row], references: References) -> str:
    """What each score took."""
    body = []
    for env in environments_of(rows, references):
        for library in libraries_of(rows):
            if not (group := select(rows, library, env)):
                continue
            told_apart = all(row["cpu"]["compile_seconds"] is not None for row in group)
            body.append(
                [
                    env,
                    LIBRARIES[library],
                    ", ".join(sorted({row["settings"] for row in group})),
                    str(len(group)),
                    spread((row["decision_steps"] for row in group), steps),
                    spread((row["simulator_steps"] for row in group), steps),
                    spread(seconds(row, "train") for row in group),
                    spread(row["train_seconds"] for row in group),
                    spread(seconds(row, "compile") for row in group) if told_apart else "within training",
                    spread(seconds(row, "import") for row in group),
                    spread(row["peak_memory_mb"] for row in group),
                ]
            )
    head = ["Environment", "Library", "Settings", "Seeds", "Decision steps", "Simulator steps", "Train s"]
    head += ["Train s, wall", "Compile s", "Import s", "Peak memory MB"]
    return (
        "## What the scores cost\n\nCPU seconds of the process, of the whole run; a peer steps no simulator"
        " beside its environment. Compiling as with an empty cache where that was run.\n\n"
        + table(head, body)
    )


def time_section(rows: Sequence[Row], references: References) -> str:
    """Time to score; caches apart."""
    body = []
    for env in environments_of(rows, references):
        if "threshold" not in references.get(env, {}):
            continue
        threshold = references[env]["threshold"]
        for library in libraries_of(rows):
            for cache in CACHES:
                group = [row for row in select(rows, library, env) if row["cache"] == cache]
                if not group:
                    continue
                cells = []
                for evaluations in (1, 2):
                    times = [reached(row, threshold, evaluations) for row in group]
                    cells += [
                        f"{sum(time != NEVER for time in times)} of {len(times)}",
                        spread((time.decision_steps for time in times), steps),
                        spread(time.train for time in times),
                        spread(time.total for time in times),
                    ]
                body.append([env, LIBRARIES[library], cache, number(threshold), *cells])
    head = ["Environment", "Library", "Cache", "Threshold"]
    for prefix in ("", "Stays: "):
        head += [f"{prefix}seeds", f"{prefix}decision steps", f"{prefix}train s"]
        head += [f"{prefix}import + compile + train s"]
    return (
        "## Time to score\n\n"
        "Spent until the sampled policy's return is first seen at the threshold (mean of 32 episodes), and, under"
        ' "stays", until the first of two such evaluations in a row. CPU seconds; median over all seeds (lowest to'
        " highest), where a seed that never gets there counts as infinite. Evaluations themselves are not counted;"
        " what is measured can be no finer than their distance. Simulator steps are in the table above and in"
        " the plots.\n\n" + (table(head, body) if body else "No environment with a threshold has a row.\n")
    )


def aggregate_section(rows: Sequence[Row], references: References) -> str:
    """Interquartile means, ours and each peer's, over the environments that both have."""
    body = []
    for peer, envs, ours, theirs in compare(rows, references):
        cells = [f"{mean:.2f} [{low:.2f}, {high:.2f}]" for mean, low, high in (ours, theirs)]
        body.append([LIBRARIES[peer], str(len(envs)), *cells, ", ".join(envs)])
    text = (
        "## All environments together\n\n"
        "Interquartile mean of the normalised score (0: a random policy, 1: the best possible score, or the best"
        " median seen where that is unknown) over environments and seeds, with stratified bootstrap 95% intervals"
        " as in [rliable](https://arxiv.org/abs/2108.13264). Only environments that both libraries ran count;"
        " those where a random policy is already the best that a memoryless one can be are left out.\n\n"
    )
    head = ["Peer", "Environments", "grpo_jax", "Peer's", "Which"]
    return text + (table(head, body) if body else "No environment was run by us and by a peer.\n")


def provenance_section(rows: Sequence[Row], n_left_out: int = 0) -> str:
    """Versions, machines, how many rows, and whether a GPU has run any.

    Args:
      rows: all rows that are shown.
      n_left_out: rows of settings that scored worse than others of the same library.
    """
    lines = [f"- {len(rows)} rows, of {len({row['seed'] for row in rows})} seeds."]
    if n_left_out:
        lines.append(
            f"- {n_left_out} rows left out: where a library ran with several settings, only the best are shown."
        )
    if len(rows) and (bad := [row for row in rows if row["nonfinite"]]):
        runs = ", ".join(f"{LIBRARIES[row['library']]} on {row['env']}, seed {row['seed']}" for row in bad)
        lines.append(f"- Non-finite: {runs}.")
    for library in libraries_of(rows):
        versions = {
            ", ".join(f"{name} {version}" for name, version in sorted(row["versions"].items()))
            for row in rows
            if row["library"] == library
        }
        lines += [f"- {LIBRARIES[library]}: {line}." for line in sorted(versions)]
    machines = {
        ", ".join(f"{name} {value}" for name, value in sorted(row["machine"].items()) if value is not None)
        for row in rows
    }
    lines += [f"- Machine: {line}." for line in sorted(machines)]
    devices = {
        str(row["machine"].get("device"))
        for row in rows
        if row["machine"].get("jax_backend") not in ("cpu", None)
    }
    gpu = (
        f"Rows from an accelerator: {', '.join(sorted(devices))}." if devices else "It has not run on a GPU."
    )
    return "## Where it ran\n\n" + "\n".join([*lines, f"- {gpu}"]) + "\n"


def missing_section(rows: Sequence[Row], path: pathlib.Path | None = None) -> str:
    """What the peers that have rows did not run, or ran in another way, and why."""
    path = path or pathlib.Path(__file__).parent / "peers" / "missing.toml"
    present = libraries_of(rows)
    lines = [
        f"- {LIBRARIES[known['library']]}, {known['envs']}: {known['why']}."
        for known in tomllib.loads(path.read_text())["missing"]
        if known["library"] in present
    ]
    return "## What peers did not run\n\n" + ("\n".join(lines) or "No peer has a row.") + "\n"


def notes_section(rows: Sequence[Row], references: References) -> str:
    """How each best possible score is known."""
    notes = [
        f"- **{env}**: {references[env]['how']}"
        for env in environments_of(rows, references)
        if "how" in references.get(env, {})
    ]
    return (
        "## How the best possible scores are known\n\n"
        "From the source of gymnax 1.0.1; random: 1,024 episodes of uniform actions.\n\n"
        + "\n".join(notes)
        + "\n"
    )


# Plots


AXES: dict[str, tuple[str, Callable[[Row, Row], float]]] = {
    "decision_steps": ("decision steps", lambda row, point: point["decision_steps"]),
    "all_steps": (
        "decision + simulator steps",
        lambda row, point: point["decision_steps"] + point["simulator_steps"],
    ),
    "train_seconds": (
        "CPU seconds of training, without importing and compiling",
        lambda row, point: point["train_cpu_seconds"],
    ),
    "total_seconds": (
        "CPU seconds of importing, compiling and training",
        lambda row, point: before_training(row) + point["train_cpu_seconds"],
    ),
}
"""Plots: file name -> label of the x axis, and its value from a row and a point of its curve."""


def curve(rows: Sequence[Row], x_of: Callable[[Row, Row], float]) -> Floats:
    """Median x, and median, lowest and highest return of the k-th evaluation over seeds: ``[4, n_evaluations]``.

    An evaluation counts if every seed has it; one that is not finite in every seed is left out.
    """
    columns = []
    for k in range(min((len(row["curve"]) for row in rows), default=0)):
        points = [(row, row["curve"][k]) for row in rows]
        returns = [float(p["return_mean"]) for _, p in points if p["return_mean"] is not None]
        returns = [value for value in returns if math.isfinite(value)]
        if returns:
            x = median(x_of(row, point) for row, point in points)
            columns.append((x, median(returns), min(returns), max(returns)))
    return np.array(columns, dtype=np.float64).reshape(-1, 4).T


def draw_curves(
    name: str, rows: Sequence[Row], references: References, path: pathlib.Path, n_columns: int = 5
) -> None:
    """Small multiples, a panel an environment: median over seeds, and a band from the lowest to the highest."""
    envs, libraries = environments_of(rows, references), libraries_of(rows)
    label, x_of = AXES[name]
    n_columns = min(n_columns, len(envs))
    n_rows = math.ceil(len(envs) / n_columns)
    figure = Figure(figsize=(max(3.2 * n_columns, 6.4), 2.5 * n_rows + 0.9), layout="constrained")
    axes = np.atleast_1d(figure.subplots(n_rows, n_columns, squeeze=False)).ravel()
    for axis, env in zip(axes, envs, strict=False):
        lines = {library: curve(select(rows, library, env), x_of) for library in libraries}
        draw_panel(axis, {library: line for library, line in lines.items() if line.size})
        axis.set_title(env, fontsize=10)
        if (threshold := references.get(env, {}).get("threshold")) is not None:
            axis.axhline(threshold, color="black", linestyle="--", linewidth=0.9, zorder=1)
    for axis in axes[len(envs) :]:
        axis.set_axis_off()
    handles = [Line2D([], [], color=COLOURS[library], label=LIBRARIES[library]) for library in libraries]
    handles.append(Line2D([], [], color="black", linestyle="--", linewidth=0.9, label="threshold"))
    figure.legend(handles=handles, loc="outside upper center", ncols=len(handles), frameon=False)
    figure.supxlabel(label, fontsize=11)
    figure.supylabel("return of the sampled policy", fontsize=11)
    figure.savefig(path, dpi=PNG_DPI)


def draw_panel(axis: Axes, lines: dict[str, Floats], colours: dict[str, str] = COLOURS) -> None:
    """Curves of one environment, ``[4, n_evaluations]`` by library; log x where the libraries' ranges differ."""
    ends = [line[0, -1] for line in lines.values() if line[0, -1] > 0]
    log = bool(ends) and max(ends) > 4 * min(ends)
    for library, line in lines.items():
        x, middle, low, high = line[:, line[0] > 0] if log else line
        marker = "o" if x.size == 1 else None
        axis.plot(x, middle, color=colours[library], linewidth=1.5, marker=marker, zorder=3)
        axis.fill_between(x, low, high, color=colours[library], alpha=0.18, linewidth=0, zorder=2)
    if log:
        axis.set_xscale("log")
        axis.xaxis.set_minor_formatter(NullFormatter())  # else they run into each other within a decade
    else:
        axis.xaxis.set_major_locator(MaxNLocator(4))
        if ends and max(ends) >= 1000:  # steps; 0.1 s is no "100m"
            axis.xaxis.set_major_formatter(EngFormatter(sep=""))
    axis.tick_params(labelsize=8)
    axis.grid(alpha=0.25, linewidth=0.6)
    axis.spines[["top", "right"]].set_visible(False)


def draw_aggregate(comparisons: Sequence[Comparison], path: pathlib.Path) -> None:
    """Interquartile means with their intervals, a pair of lines for each peer."""
    figure = Figure(figsize=(6.4, 0.9 + 0.8 * len(comparisons)), layout="constrained")
    axis = figure.subplots()
    for i, (peer, _, ours, theirs) in enumerate(comparisons):
        for library, (mean, low, high), y in ((OURS, ours, i - 0.15), (peer, theirs, i + 0.15)):
            axis.plot((low, high), (y, y), color=COLOURS[library], linewidth=6, alpha=0.35)
            axis.plot(mean, y, "|", color=COLOURS[library], markersize=13, markeredgewidth=2.5)
            axis.annotate(
                LIBRARIES[library],
                (high, y),
                (6, 0),
                textcoords="offset points",
                color=COLOURS[library],
                va="center",
                fontsize=8,
            )
    axis.set_yticks(
        range(len(comparisons)), [f"{LIBRARIES[c.peer]}\n{len(c.envs)} environments" for c in comparisons]
    )
    axis.set_ylim(len(comparisons) - 0.5, -0.5)
    axis.margins(x=0.2)
    axis.set_xlabel("interquartile mean of the normalised score, 95% interval")
    axis.grid(axis="x", alpha=0.25)
    axis.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=PNG_DPI)


# Pages


def summary(env: str, rows: Sequence[Row], references: References) -> str:
    """The line of an environment in the pages: ours, its decision steps and CPU seconds, the best possible, the best peer."""
    ours, known = select(rows, OURS, env), references.get(env, {})
    peers = {peer: group for peer in LIBRARIES if peer != OURS and (group := select(rows, peer, env))}
    best_peer = "-"
    if peers:
        peer = max(peers, key=lambda peer: (median(map(score, peers[peer])), -_train(peers[peer])))
        group = peers[peer]
        best_peer = f"{spread(map(score, group))} {LIBRARIES[peer]}, {_decision_steps(group)} steps, {number(_train(group))} s"
    best = best_cell(known).replace("about ", "≈ ").replace("unknown, ", "")
    cells = [env, spread(map(score, ours)), _decision_steps(ours), number(_train(ours)), best, best_peer]
    return f"| {' | '.join(cells)} |"


def refresh(page: str, rows: Sequence[Row], references: References) -> str:
    """A page with its lines of ``summary`` written anew, where ours has rows."""
    found = {env for env in environments_of(rows, references) if select(rows, OURS, env)}

    def line(old: str) -> str:
        cells = old.strip("| ").split(" | ")
        return summary(cells[0], rows, references) if len(cells) == 6 and cells[0] in found else old

    return "\n".join(map(line, page.split("\n")))


def _train(rows: Sequence[Row]) -> float:
    return median(seconds(row, "train") for row in rows)


def _decision_steps(rows: Sequence[Row]) -> str:
    return steps(median(row["decision_steps"] for row in rows))


# The door


def write(rows: Sequence[Row], references: References, out: pathlib.Path) -> str:
    """Writes the Markdown and the pictures; returns the Markdown.

    Raises:
      SystemExit: no rows.
    """
    if not rows:
        raise SystemExit("no rows: run benchmarks/bench.py first")
    images = out / "images"
    images.mkdir(parents=True, exist_ok=True)
    shown = at_best_settings(rows)
    seeds = one_row_a_seed(shown)
    for name in AXES:
        draw_curves(name, seeds, references, images / f"bench_{name}.png")
    pictures = [f"![Return against {label}](images/bench_{name}.png)" for name, (label, _) in AXES.items()]
    comparisons = compare(seeds, references)
    aggregate = aggregate_section(seeds, references)
    if comparisons:
        draw_aggregate(comparisons, images / "bench_aggregate.png")
        aggregate += "\n![Interquartile means](images/bench_aggregate.png)\n"
    report = "\n".join(
        [
            "<!-- Written by benchmarks/report.py: change that, not this. -->\n",
            scores_section(seeds, references),
            time_section(shown, references),
            "## Curves\n\nMedian over seeds; the band reaches from the lowest to the highest seed. A logarithmic x"
            " axis where the libraries' ranges differ by more than four times. Compiling that cannot be told apart from"
            " training (see the costs) is in both plots over time.\n\n" + "\n\n".join(pictures) + "\n",
            aggregate,
            costs_section(seeds, references),
            missing_section(seeds),
            notes_section(seeds, references),
            provenance_section(shown, len(rows) - len(shown)),
        ]
    )
    (out / "benchmark_table.md").write_text(report)
    return report


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("runs", type=pathlib.Path, help="folder that holds rows/*.json")
    parser.add_argument("--out", type=pathlib.Path, default=pathlib.Path("docs/results"))
    parser.add_argument(
        "--pages", type=pathlib.Path, nargs="*", default=[], help="Markdown to refresh with it"
    )
    arguments = parser.parse_args()
    rows, references = read(arguments.runs), read_references()
    write(rows, references, arguments.out)
    seeds = one_row_a_seed(at_best_settings(rows))
    for page in arguments.pages:
        page.write_text(refresh(page.read_text(), seeds, references))
    print(f"{arguments.out / 'benchmark_table.md'} and {arguments.out / 'images'}/bench_*.png")


if __name__ == "__main__":
    main()
