"""Numbers and names as they stand in the benchmark's tables."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from scores import LIBRARIES, MIN_SEEDS, Middle, Row, median


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


def interval(found: Middle) -> str:
    """``interquartile mean [low, high]``, or ``median (min to max)`` of few seeds."""
    value, low, high = map(number, found[:3])
    if value == low == high:
        return value
    return f"{value} [{low}, {high}]" if found.n >= MIN_SEEDS else f"{value} ({low} to {high})"


def steps(value: float) -> str:
    return "never" if value == math.inf else f"{value:,.0f}"


def table(head: Sequence[str], body: Iterable[Sequence[str]]) -> str:
    """Markdown of a table; columns behind the first are right-aligned."""
    lines = [head, ["---", *["---:"] * (len(head) - 1)], *body]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines) + "\n"


def best_cell(known: dict[str, Any]) -> str:
    """The best possible score, or what is known instead."""
    if "best" in known:
        return ("≈ " if known.get("approximate") else "") + number(known["best"])
    return f"≤ {number(known['bound'])}" if "bound" in known else "unknown"


def published_cell(known: dict[str, Any]) -> str:
    return number(known["published"]) if "published" in known else "-"


def target_cell(known: dict[str, Any]) -> str:
    target = known.get("target", "-")
    return target if isinstance(target, str) else number(target)


def peer_name(row: Row) -> str:
    """A peer and where its settings are from: ``rejax PPO, rejax's own for the game``."""
    name = LIBRARIES[row["library"]]
    return f"{name}, {row['settings'].split(',')[0]}" if row["library"] in ("sb3", "sbx", "rejax") else name
