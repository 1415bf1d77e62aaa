"""The pictures of what a policy compares: the fan of one group, and which action is better where."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from grpo_jax.cli.decision import Fan
from grpo_jax.cli.plots import COLORS, write

MOST_NAMES = 12
"""Bars of more candidates have no names."""


def draw_fan(
    values: np.ndarray, group: Fan, *, title: str, y_label: str, names: Sequence[str]
) -> tuple[Any, Any, Any]:
    """Draws a group: its branches, coloured by the advantage of their candidate, and a bar for each advantage.

    Args:
      values: ``[G, M, H + 1]`` what is drawn of each branch, NaN behind its end.
      group: the group.
      title: above the branches.
      y_label: of the values.
      names: of the candidates, G of them.

    Returns:
      The figure, and the axes of the branches and of the bars: to be added to, and written by ``plots.write``.
    """
    from matplotlib import colormaps
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import Normalize
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9.5, 3.8), layout="constrained")
    branches, bars = figure.subplots(1, 2, width_ratios=(3, 1))
    shown = np.flatnonzero(group.valid).tolist()
    largest = float(np.max(np.abs(group.advantage[shown]), initial=0.0)) or 1.0
    scale = ScalarMappable(Normalize(-largest, largest), colormaps["RdBu"])
    # Neither the middle of the colours nor their ends: candidates near 0 must be seen too, and black is no colour.
    ends = 0.45 * group.advantage + 0.4 * largest * np.sign(group.advantage)
    colors: list[Any] = [scale.to_rgba(end) if end else "#888888" for end in ends.tolist()]
    steps = np.arange(values.shape[-1])
    for i in sorted(shown, key=lambda i: group.advantage[i]):
        branches.plot(steps, values[i].T, color=colors[i], alpha=0.45, linewidth=1)
    branches.set(xlim=(0, steps[-1]), xlabel="steps from the decision state (linear axis)", ylabel=y_label)
    branches.set_title(title, fontsize=10)
    branches.grid(alpha=0.3)
    places = range(len(shown))
    bars.barh(places, group.advantage[shown], color=[colors[i] for i in shown])
    bars.axvline(0, color="black", linewidth=0.8)
    if len(shown) <= MOST_NAMES:
        bars.set_yticks(
            places, [f"{names[i]}\nreturn {group.returns[i].mean():.4g}" for i in shown], fontsize=8
        )
    else:
        bars.set_yticks([])
        bars.set_ylabel(f"{len(shown)} candidates")
    bars.invert_yaxis()
    bars.set_title("advantage", fontsize=10)
    bars.set_xlabel("in units of return")
    for axes in (branches, bars):
        axes.spines[["top", "right"]].set_visible(False)
    return figure, branches, bars


def draw_map(
    path: Path, points: np.ndarray, returns: np.ndarray, *, title: str, labels: tuple[str, str]
) -> int:
    """Draws which action is better in visited states, and by how much.

    Args:
      path: a ``.png`` file, replaced all or not at all.
      points: ``[N, 2]`` two numbers of the states' observations.
      returns: ``[N, M, G]`` of M branches of every action, NaN where it is forbidden.
      title: above the picture.
      labels: of the two numbers.

    Returns:
      In how many states an action is better than the next best one beyond twice the standard error of the difference.
    """
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D

    best, gain, is_sure = best_actions(returns)
    n_actions = returns.shape[2]
    figure = Figure(figsize=(7.5, 5.2), layout="constrained")
    axes = figure.add_subplot()
    x, y = points.T
    axes.scatter(x[~is_sure], y[~is_sure], s=9, color="#bbbbbb", linewidths=0)
    largest = float(np.quantile(gain[is_sure], 0.95)) if is_sure.any() else 1.0
    if n_actions == 2:
        signed = np.where(best == 1, gain, -gain)
        drawn = axes.scatter(
            x[is_sure],
            y[is_sure],
            c=signed[is_sure],
            cmap="RdBu",
            vmin=-largest,
            vmax=largest,
            s=14,
            linewidths=0,
        )
        figure.colorbar(drawn, label="return of action 1 minus return of action 0", extend="both")
        handles = []
    else:
        sizes = 6 + 34 * np.minimum(gain / largest, 1)
        for action in range(n_actions):
            rows = is_sure & (best == action)
            axes.scatter(x[rows], y[rows], s=sizes[rows], color=COLORS[action], alpha=0.75, linewidths=0)
        handles = [
            Line2D([], [], color=COLORS[a], marker="o", linestyle="", label=f"action {a}")
            for a in range(n_actions)
        ]
        axes.set_title(f"area: how much better than the next best, up to {largest:.3g}", fontsize=9)
    handles.append(Line2D([], [], color="#bbbbbb", marker="o", linestyle="", label="no sure difference"))
    figure.legend(handles=handles, loc="outside lower center", ncols=6, frameon=False)
    figure.suptitle(title, fontsize=11)
    axes.set(xlabel=f"{labels[0]} (linear axis)", ylabel=f"{labels[1]} (linear axis)")
    axes.grid(alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)
    write(figure, path)
    return int(is_sure.sum())


def best_actions(returns: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The best action of each state, by how much it is better than the next best, and whether that is more than noise.

    Args:
      returns: ``[N, M, G]`` of M >= 2 branches that share their random numbers; NaN where an action is forbidden.

    Returns:
      int ``[N]``; float ``[N]``; bool ``[N]``: more than twice the standard error of the difference, and than rounding.
    """
    means = np.where(np.isnan(returns).all(axis=1), -np.inf, np.nanmean(np.nan_to_num(returns), axis=1))
    order = np.argsort(-means, axis=1, kind="stable")
    best, second = order[:, 0], order[:, 1]
    rows = np.arange(len(returns))
    alone = ~np.isfinite(means[rows, second])  # nothing else is allowed
    difference = returns[rows, :, best] - np.where(alone[:, None], np.nan, returns[rows, :, second])
    difference = np.where(alone[:, None], 0.0, difference)
    gain = difference.mean(axis=1)
    error = difference.std(axis=1, ddof=1) / np.sqrt(returns.shape[1])
    rounding = 1e-6 * np.nanmax(np.abs(returns), axis=(1, 2))
    return best, gain, (gain > 2 * error) & (gain > rounding)
