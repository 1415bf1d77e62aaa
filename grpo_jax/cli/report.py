"""The command ``grpo-jax report``: several runs in one table."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from grpo_jax.cli import curves, progress
from grpo_jax.cli.curves import SECONDS, Line
from grpo_jax.cli.flags import Report
from grpo_jax.files import write_atomically
from grpo_jax.training.sweep import LAST_SHARE, final_return

_COLUMNS = ("run", "seeds", "return", "lowest", "highest", "best", "steps", "simulated", "seconds")
_LEGEND = (
    f"return, lowest, highest: of a seed, the mean return of training episodes in the last {LAST_SHARE:.0%} of its iterations;"
    " its median, least and largest over seeds",
    "best: largest median over seeds of any iteration",
    "steps, simulated: decision steps and simulator steps of a seed (the median one)",
    "seconds: of training, without compiling, all seeds of a run together, and all its runs",
)


def report(options: Report) -> int:
    """Prints the table, and writes it as Markdown where that is asked for.

    Raises:
      FileNotFoundError, ValueError: what cannot be read, and why.
    """
    if options.out is not None and options.out.suffix != ".md":
        raise ValueError(f"out={str(options.out)!r} must end in .md")
    lines = curves.read(options.run, ("episode_return", "decision_steps", "simulator_steps", SECONDS))
    envs = list(dict.fromkeys(line.env for line in lines))
    markdown = []
    for env in envs:
        some = [line for line in lines if line.env == env]
        some.sort(key=lambda line: -np.nan_to_num(_finals(line)[0], nan=-np.inf))
        rows = [[str(i), *_numbers(line)] for i, line in enumerate(some, start=1)]
        print(env)
        progress.print_table(_COLUMNS, rows)
        names = [", ".join(map(str, line.paths)) for line in some]
        settings = [", ".join(curves.differences(line, some)) for line in some]
        for i, (name, setting) in enumerate(zip(names, settings, strict=True), start=1):
            print(f"{i}: {name}{' | ' if setting else ''}{setting}")
        print()
        cells = [
            [f"`{name}`", *row[1:], f"`{setting}`" if setting else ""]
            for row, name, setting in zip(rows, names, settings, strict=True)
        ]
        markdown.append(f"## {env}\n\n" + _table([*_COLUMNS, "settings that differ"], cells))
    print("\n".join(_LEGEND))
    if options.out is not None:
        legend = "\n".join(f"- {line}" for line in _LEGEND)
        write_atomically(options.out, ("\n".join(markdown) + f"\n{legend}\n").encode())
        print(f"written: {options.out}")
    return 0


def _finals(line: Line) -> tuple[float, float, float]:
    """Median, least and largest final return over the seeds; NaN where there is none."""
    finals = final_return(line.metrics["episode_return"])
    known = finals[~np.isnan(finals)]
    if not known.size:
        return (np.nan,) * 3
    return float(np.median(known)), float(known.min()), float(known.max())


def _numbers(line: Line) -> list[str]:
    returns = line.metrics["episode_return"]
    known = returns[:, ~np.isnan(returns).all(axis=0)]
    best = float(np.max(np.nanmedian(known, axis=0))) if known.size else np.nan
    steps, simulated = (
        float(np.median(np.nanmax(line.metrics[name], axis=1)))
        for name in ("decision_steps", "simulator_steps")
    )
    seconds = line.seconds
    return [
        str(line.n_seeds),
        *(_cell(value) for value in (*_finals(line), best)),
        f"{steps:,.0f}",
        f"{simulated:,.0f}",
        "-" if np.isnan(seconds) else f"{seconds:.1f}",
    ]


def _cell(value: float) -> str:
    return "-" if np.isnan(value) else f"{value:.2f}"


def _table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [columns, ["---", *["---:"] * (len(columns) - 2), "---"], *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines) + "\n"
