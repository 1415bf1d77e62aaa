"""The benchmark's plots: curves against steps and seconds, and interquartile means."""

from __future__ import annotations

import math
import pathlib
from collections.abc import Callable, Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import EngFormatter, MaxNLocator, NullFormatter
from scores import (
    LIBRARIES,
    OURS,
    SEARCHES,
    Comparison,
    Floats,
    References,
    Row,
    before_training,
    environments_of,
    libraries_of,
    median,
    middle,
    select,
)

COLOURS = {
    OURS: "#0072B2",
    "sb3": "#D55E00",
    "sbx": "#009E73",
    "rejax": "#CC79A7",
    "purejaxrl": "#7B3F98",
    "mctx": "#E69F00",
    SEARCHES: "#8C510A",
}

PNG_DPI = 110

PANELS = 6
"""On a page, at most: more cannot be read where a page shows them."""

N_SAMPLES = 200
"""Bootstrap samples of a point of a curve."""

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
    """Median x of the k-th evaluation over seeds, and what stands for its returns (``Middle``): ``[4, n_evaluations]``.

    An evaluation counts if every seed has it; one that is not finite in every seed is left out.
    """
    columns = []
    for k in range(min((len(row["curve"]) for row in rows), default=0)):
        points = [(row, row["curve"][k]) for row in rows]
        returns = [float(p["return_mean"]) for _, p in points if p["return_mean"] is not None]
        returns = [value for value in returns if math.isfinite(value)]
        if returns:
            x = median(x_of(row, point) for row, point in points)
            columns.append((x, *middle(returns, N_SAMPLES)[:3]))
    return np.array(columns, dtype=np.float64).reshape(-1, 4).T


def draw_curves(
    name: str, rows: Sequence[Row], references: References, folder: pathlib.Path
) -> list[pathlib.Path]:
    """Pages of small multiples, a panel an environment: what stands for the seeds, and the band of its interval.

    Writes ``bench_<name>_<page>.png`` and removes the pages that were there; returns the new ones.
    """
    for old in (*folder.glob(f"bench_{name}_[0-9]*.png"), folder / f"bench_{name}.png"):
        old.unlink(missing_ok=True)
    envs, libraries = environments_of(rows, references), libraries_of(rows)
    pages = []
    for i, some in enumerate(batched(envs, PANELS), start=1):
        pages.append(folder / f"bench_{name}_{i}.png")
        draw_page(name, rows, references, some, libraries, pages[-1])
    return pages


def batched(names: Sequence[str], size: int) -> list[Sequence[str]]:
    """Parts of about the same length, at most ``size`` each."""
    n_parts = max(1, math.ceil(len(names) / size))
    return [names[i * len(names) // n_parts : (i + 1) * len(names) // n_parts] for i in range(n_parts)]


def draw_page(
    name: str,
    rows: Sequence[Row],
    references: References,
    envs: Sequence[str],
    libraries: Sequence[str],
    path: pathlib.Path,
) -> None:
    """One page of curves."""
    label, x_of = AXES[name]
    n_columns = min(3, len(envs))
    n_rows = math.ceil(len(envs) / n_columns)
    figure = Figure(figsize=(max(3.6 * n_columns, 6.4), 3.0 * n_rows + 0.9), layout="constrained")
    axes = np.atleast_1d(figure.subplots(n_rows, n_columns, squeeze=False)).ravel()
    for axis, env in zip(axes, envs, strict=False):
        lines = {library: curve(select(rows, library, env), x_of) for library in libraries}
        draw_panel(axis, {library: line for library, line in lines.items() if line.size})
        axis.set_title(env, fontsize=10)
        axis.set_xlabel(f"{axis.get_xscale()} axis", fontsize=8)
        if (threshold := references.get(env, {}).get("threshold")) is not None:
            axis.axhline(threshold, color="black", linestyle="--", linewidth=0.9, zorder=1)
    for axis in axes[len(envs) :]:
        axis.set_axis_off()
    handles = [Line2D([], [], color=COLOURS[library], label=LIBRARIES[library]) for library in libraries]
    handles.append(Line2D([], [], color="black", linestyle="--", linewidth=0.9, label="threshold"))
    figure.legend(handles=handles, loc="outside upper center", ncols=4, frameon=False)
    figure.supxlabel(label, fontsize=11)
    figure.supylabel("return", fontsize=11)
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
