"""Pictures of runs and sweeps: learning curves, and the scores of settings."""

from __future__ import annotations

import io
import itertools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from grpo_jax.files import write_atomically
from grpo_jax.training.sweep import Sweep

MAX_LINES = 10
"""Up to so many seeds are also drawn one by one."""


COLORS = (
    "#1f6fb4",
    "#d1495b",
    "#2e8b57",
    "#8e5ea2",
    "#e08e0b",
    "#5f6b73",
    "#17a2b8",
    "#a0522d",
    "#c71585",
    "#6b8e23",
)
MAX_PANELS = 6
"""More than so many on a page cannot be read."""


class Curve(NamedTuple):
    """What is drawn as one line and its band.

    Attributes:
      label: in the legend; None: it has none.
      x: ``[n]``.
      y: ``[n_seeds, n]``, NaN where there is nothing yet.
    """

    label: str | None
    x: np.ndarray
    y: np.ndarray


def learning_curve(path: Path, decision_steps: np.ndarray, returns: np.ndarray, *, title: str) -> None:
    """Draws the return of training episodes; of several seeds the median and the middle half.

    Args:
      path: a ``.png`` file, replaced all or not at all.
      decision_steps: ``[n_seeds, n_iterations]``, of each seed.
      returns: ``[n_seeds, n_iterations]``, NaN before the first episode has ended.
      title: above the picture.
    """
    n_seeds = len(returns)
    label = f"median of {n_seeds} seeds, and their middle half" if n_seeds > 1 else None
    curve = Curve(label, np.mean(decision_steps, axis=0), returns)
    curves(path, {title: [curve]}, x_label="decision steps" + (" of each seed" if n_seeds > 1 else ""))


def curves(
    path: Path,
    panels: Mapping[str, Sequence[Curve]],
    *,
    x_label: str,
    y_label: str = "episode return",
    log_x: bool = False,
) -> None:
    """Draws curves: medians over seeds, bands of their middle half, and the seeds one by one where a panel has one curve.

    Args:
      path: a ``.png`` file, replaced all or not at all.
      panels: title -> curves, at most ``MAX_PANELS``.
      x_label: of all panels; the scale is added.
      y_label: of all panels.
      log_x: whether the x axis is logarithmic; points at 0 are left out.

    Raises:
      ValueError: more panels than a page holds.
    """
    # A Figure of its own instead of pyplot: no display is needed, no global state is touched.
    from matplotlib.figure import Figure

    if len(panels) > MAX_PANELS:
        raise ValueError(f"{len(panels)} environments do not fit into one picture: plot at most {MAX_PANELS}")
    n_columns = min(len(panels), 2 if len(panels) <= 4 else 3)
    n_rows = -(-len(panels) // n_columns)
    size = (7.5, 4.5) if len(panels) == 1 else (5.0 * n_columns, 3.7 * n_rows)
    figure = Figure(figsize=size, layout="constrained")
    places = figure.subplots(n_rows, n_columns, squeeze=False).ravel()
    for axes, (title, some) in zip(places, panels.items(), strict=False):
        _panel(axes, some, log_x=log_x)
        axes.set_title(title)
        axes.set_xlabel(f"{x_label} ({'log' if log_x else 'linear'} axis)")
        axes.set_ylabel(y_label)
    for axes in places[len(panels) :]:
        axes.set_axis_off()
    write(figure, path)


def _panel(axes: Any, some: Sequence[Curve], *, log_x: bool) -> None:
    colors = itertools.cycle(COLORS)
    is_empty = True
    for (label, x, y), color in zip(some, colors, strict=False):
        known = ~np.all(np.isnan(y), axis=0) & np.isfinite(x) & ((x > 0) | (not log_x))
        x, y = x[known], y[:, known]
        if not x.size:
            axes.plot([], [], color=color, label=label)
            continue
        is_empty = False
        if len(y) > 1:
            low, high = np.nanquantile(y, [0.25, 0.75], axis=0)
            axes.fill_between(x, low, high, color=color, alpha=0.2, linewidth=0)
            if len(some) == 1 and len(y) <= MAX_LINES:
                axes.plot(x, y.T, color=color, alpha=0.3, linewidth=0.8)
        marker = "o" if x.size == 1 else None
        axes.plot(x, np.nanmedian(y, axis=0), color=color, linewidth=1.8, label=label, marker=marker)
    if is_empty:
        axes.text(0.5, 0.5, "no episode has ended yet", ha="center", va="center", transform=axes.transAxes)
    if any(curve.label for curve in some):
        axes.legend(frameon=False, loc="best", fontsize="small")
    _style(axes)
    if log_x:
        axes.set_xscale("log")


def sweep(path: Path, done: Sweep, names: Sequence[str], *, title: str) -> None:
    """Draws a sweep: on the left the median return over seeds of the best settings, on the right all settings' scores.

    Args:
      path: a ``.png`` file, replaced all or not at all.
      done: the sweep; its metrics are ``decision_steps`` and ``episode_return``.
      names: of its settings.
      title: above the picture.
    """
    from matplotlib.figure import Figure

    order = [int(p) for p in np.argsort(-done.scores, kind="stable")]
    figure = Figure(figsize=(11.0, max(4.5, min(12.0, 1.5 + 0.28 * len(order)))), layout="constrained")
    figure.suptitle(title)
    left, right = figure.subplots(1, 2)
    colors = {}
    for p in order[:MAX_LINES]:
        steps, returns = (done.metrics[name][p] for name in ("decision_steps", "episode_return"))
        known = ~np.all(np.isnan(returns), axis=0)
        if known.any():
            x, y = np.nanmax(steps[:, known], axis=0), np.nanmedian(returns[:, known], axis=0)
            (line,) = left.plot(
                x,
                y,
                linewidth=2.0 if p == done.best else 1.2,
                label=names[p],
                marker="." if x.size == 1 else None,
            )
            colors[p] = line.get_color()
    if colors:
        left.legend(frameon=False, loc="best", fontsize="small")
    left.set(xlabel="decision steps of each seed (linear axis)", ylabel="episode return")
    _style(left)
    for row, p in enumerate(order):
        known = done.final_returns[p][~np.isnan(done.final_returns[p])]
        color = colors.get(p, "#888888")
        right.plot(known, np.full(known.size, row), "|", color=color, alpha=0.5)
        if np.isfinite(done.scores[p]):
            right.plot(done.scores[p], row, "o", color=color)
    right.set_yticks(range(len(order)), [names[p] for p in order], fontsize="small")
    right.invert_yaxis()
    right.set_xlabel("final return: seeds, and their interquartile mean")
    right.spines[["top", "right"]].set_visible(False)
    right.grid(alpha=0.3, axis="x")
    write(figure, path)


def _style(axes: Any) -> None:
    from matplotlib.ticker import EngFormatter

    axes.xaxis.set_major_formatter(EngFormatter(sep=""))
    axes.grid(alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)
    axes.margins(x=0.01)


def check_path(path: Path) -> None:
    """Finds out before the work whether a picture can be written.

    Raises:
      ValueError: it is of no kind that can be drawn, or in no directory.
    """
    if path.suffix.lower() not in (".png", ".svg", ".pdf"):
        raise ValueError(f"out={str(path)!r} must end in .png, .svg or .pdf")
    if not path.absolute().parent.is_dir():
        raise ValueError(f"out={str(path)!r} is in a directory that does not exist")


def write(figure: Any, path: Path) -> None:
    """Writes a picture, all of it or nothing."""
    content = io.BytesIO()
    figure.savefig(content, format=path.suffix[1:].lower(), dpi=140)
    write_atomically(path, content.getvalue())
