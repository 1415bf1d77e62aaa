"""The pictures of a run and of a sweep: return against decision steps, and the scores of settings."""

from __future__ import annotations

import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from grpo_jax.files import write_atomically
from grpo_jax.training.sweep import Sweep

MAX_LINES = 10
"""Up to so many seeds are also drawn one by one."""


def learning_curve(path: Path, decision_steps: np.ndarray, returns: np.ndarray, *, title: str) -> None:
    """Draws the return of training episodes; of several seeds the median and the middle half.

    Args:
      path: a ``.png`` file, replaced all or not at all.
      decision_steps: ``[n_seeds, n_iterations]``, of each seed.
      returns: ``[n_seeds, n_iterations]``, NaN before the first episode has ended.
      title: above the picture.
    """
    # A Figure of its own instead of pyplot: no display is needed, no global state is touched.
    from matplotlib.figure import Figure

    known = ~np.all(np.isnan(returns), axis=0)
    steps, returns = np.mean(decision_steps, axis=0)[known], returns[:, known]
    n_seeds = len(returns)
    figure = Figure(figsize=(7.5, 4.5), layout="constrained")
    axes = figure.add_subplot()
    color = "#1f6fb4"
    if n_seeds > 1 and steps.size:
        low, high = np.nanquantile(returns, [0.25, 0.75], axis=0)
        axes.fill_between(steps, low, high, color=color, alpha=0.22, linewidth=0, label="middle half")
        if n_seeds <= MAX_LINES:
            axes.plot(steps, returns.T, color=color, alpha=0.3, linewidth=0.8)
    label = f"median of {n_seeds} seeds" if n_seeds > 1 else None
    middle = np.nanmedian(returns, axis=0) if steps.size else steps
    axes.plot(steps, middle, color=color, linewidth=2.0, label=label, marker="o" if steps.size == 1 else None)
    if not steps.size:
        axes.text(0.5, 0.5, "no episode has ended yet", ha="center", va="center", transform=axes.transAxes)
    if label is not None:
        axes.legend(frameon=False, loc="best")
    axes.set_title(title)
    _steps_and_returns(axes, " of each seed" if n_seeds > 1 else "")
    _write(figure, path)


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
    _steps_and_returns(left, " of each seed")
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
    _write(figure, path)


def _steps_and_returns(axes: Any, of_what: str) -> None:
    from matplotlib.ticker import EngFormatter

    axes.set_xlabel("decision steps" + of_what)
    axes.set_ylabel("episode return")
    axes.xaxis.set_major_formatter(EngFormatter(sep=""))
    axes.grid(alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)
    axes.margins(x=0.01)


def _write(figure: Any, path: Path) -> None:
    content = io.BytesIO()
    figure.savefig(content, format="png", dpi=140)
    write_atomically(path, content.getvalue())
