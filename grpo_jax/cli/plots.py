"""The picture of a run: return against decision steps."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np

from grpo_jax.files import write_atomically

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
    from matplotlib.ticker import EngFormatter

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
    axes.set_xlabel("decision steps" + (" of each seed" if n_seeds > 1 else ""))
    axes.set_ylabel("episode return")
    axes.xaxis.set_major_formatter(EngFormatter(sep=""))
    axes.grid(alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)
    axes.margins(x=0.01)
    content = io.BytesIO()
    figure.savefig(content, format="png", dpi=140)
    write_atomically(path, content.getvalue())
