"""The numbers of ``gymnasium_table.py``: what a run had reached by when, and which goals that meets."""

from __future__ import annotations

import functools
import math
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import cells
import numpy as np
import scores
from gymnasium_runs import ALGORITHMS, STEPS

Row = scores.Row

LEVEL = 0.01
"""Medians that differ by no more than this share of the larger one are level."""

STEP, ALL, CPU, NO_COMPILE, RETURN = range(5)
"""What stands where in a point of a curve."""

TO_TARGET = ("seconds_to_target", "no_compile_to_target", "steps_to_target")
MEASURES = ("equal_steps", "equal_seconds", "equal_no_compile", "steps_then", "all_steps_then", *TO_TARGET)


class Bar(NamedTuple):
    """What PPO's seeds came to, medians: the return at the end, and the CPU seconds; and its decision steps."""

    target: float
    seconds: float
    total_timesteps: int


def select(results: Iterable[Row], settings: str, env_id: str, algo: str) -> list[Row]:
    return [row for row in results if (row["settings"], row["id"], row["algo"]) == (settings, env_id, algo)]


def bar_of(ppo: Sequence[Row]) -> Bar:
    """What the others are measured by; minus infinity stands for a run too short for a return."""
    target = scores.median(row["curve"][-1][RETURN] if row["curve"] else -math.inf for row in ppo)
    return Bar(target, scores.median(row["cpu_seconds"] for row in ppo), ppo[0]["total_timesteps"])


def measures(row: Row, bar: Bar) -> dict[str, float | None]:
    """What a run had reached by when, and when it first was at PPO's final return (infinity: never).

    None where it ended with fewer steps, or has no curve. Between the points of a curve it is interpolated; before
    the first it is as good as there, and a run that ended before PPO's seconds had passed is as good as at its end. PPO
    itself is always taken at its end.
    """
    if not row["curve"]:
        return dict.fromkeys(MEASURES) | dict.fromkeys(TO_TARGET, math.inf)
    points = np.array(row["curve"], dtype=np.float64)

    def at(column: int, x: float, wanted: int = RETURN) -> float:
        return float(np.interp(x, points[:, column], points[:, wanted]))

    last = float(points[-1, RETURN])
    is_ppo = row["algo"] == "ppo"
    reached = np.flatnonzero(points[:, RETURN] >= bar.target)
    first = points[reached[0]] if len(reached) else np.full(5, math.inf)
    return {
        "equal_steps": at(STEP, bar.total_timesteps) if points[-1, STEP] >= bar.total_timesteps else None,
        "equal_seconds": last if is_ppo else at(CPU, bar.seconds),
        "equal_no_compile": last if is_ppo else at(NO_COMPILE, bar.seconds),
        "steps_then": points[-1, STEP] if is_ppo else at(CPU, bar.seconds, STEP),
        "all_steps_then": points[-1, ALL] if is_ppo else at(CPU, bar.seconds, ALL),
        "seconds_to_target": float(first[CPU]),
        "no_compile_to_target": float(first[NO_COMPILE]),
        "steps_to_target": float(first[STEP]),
    }


def middle(found: Sequence[Row], bar: Bar, name: str) -> float:
    """Median of a measure over seeds; minus infinity stands for a return that a seed does not have."""
    values = (measures(row, bar)[name] for row in found)
    return scores.median(-math.inf if value is None else value for value in values)


def compare(ours: float, theirs: float) -> str:
    """``"ahead"``, ``"level"`` or ``"behind"``."""
    if ours == theirs or abs(ours - theirs) <= LEVEL * max(abs(ours), abs(theirs)) < math.inf:
        return "level"
    return "ahead" if ours > theirs else "behind"


def alike(by_algo: dict[str, list[Row]], kind: str) -> list[Row]:
    """Rows of GRPO with clones, or with episodes: what was asked for it, and what chose it by itself."""
    asked = [row for row in by_algo[f"grpo-{kind}"] if not row["refused"]]
    seeds = {row["seed"] for row in asked}
    return asked + [row for row in by_algo["grpo"] if row["dynamics"] == kind and row["seed"] not in seeds]


def at_most(value: float | None, limit: float) -> bool:
    """Whether it is reached at all, and within the limit."""
    return value is not None and math.isfinite(value) and value <= limit


def goals(results: Sequence[Row], settings: str) -> list[str]:
    """What was aimed at (with the defaults), and what came out, a line each."""
    at_equal: dict[str, list[str]] = {"equal_seconds": [], "equal_no_compile": []}
    half, half_of_all, third, branched, within, judged, n = [], [], [], [], [], [], 0
    for env_id in STEPS:
        by_algo = {algo: select(results, settings, env_id, algo) for algo in ALGORITHMS}
        ppo, grpo = by_algo["ppo"], by_algo["grpo"]
        if not ppo or not grpo:
            continue
        n += 1
        bar = bar_of(ppo)
        ours = functools.partial(middle, grpo, bar)
        for name, verdicts in at_equal.items():
            verdicts.append(f"{compare(ours(name), middle(ppo, bar, name))} {env_id}")
        seconds = ours("seconds_to_target")
        # Where half of PPO's seeds never were at the median of their last returns, it counts as there at its end.
        theirs = min(middle(ppo, bar, "seconds_to_target"), bar.seconds)
        half += [env_id] * at_most(seconds, theirs / 2)
        half_of_all += [env_id] * at_most(seconds, bar.seconds / 2)
        if any(row["dynamics"] in ("clone", "twin") for row in grpo):
            branched.append(env_id)
            theirs = min(middle(ppo, bar, "steps_to_target"), bar.total_timesteps)
            third += [env_id] * at_most(ours("steps_to_target"), theirs / 3)
        others = [alike(by_algo, kind) for kind in ("clone", "episodes")]
        if others[1] and (others[0] or by_algo["grpo-clone"]):
            judged.append(env_id)
            best = max(middle(found, bar, "equal_seconds") for found in others if found)
            within += [env_id] * (ours("equal_seconds") >= best - 0.1 * abs(best))

    def aim(text: str) -> str:
        return f" (goal: {text})" if settings == "defaults" else ""

    lines = [f"Of {n} environments, GRPO against SB3's PPO by medians; medians within {LEVEL:.0%} are level:"]
    for name, verdicts in at_equal.items():
        what = "compiling included" if name == "equal_seconds" else "without compiling"
        ahead, level, behind = (
            [verdict.split()[1] for verdict in verdicts if verdict.startswith(word)]
            for word in ("ahead", "level", "behind")
        )
        lines.append(
            f"- At equal CPU seconds, {what}: ahead on {len(ahead)}{aim('12 of 16')}, level on {len(level)},"
            f" behind on {names(behind)}{aim('0')}."
        )
    lines += [
        f"- PPO's final return in at most half of the CPU seconds that PPO took to it on {names(half)}{aim('10')};"
        f" of the CPU seconds that PPO ran for, on {len(half_of_all)}.",
        f"- Clones or twins were used on {len(branched)}: PPO's final return in at most a third of the decision steps that PPO"
        f" took to it on {names(third)}{aim('all of them')}.",
    ]
    if judged:
        lines.append(
            f"- `auto` within 10% of the better one of clones and episodes at equal seconds on {names(within)} of {len(judged)}"
            f"{aim('all')}."
        )
    return lines + (lander(results, settings) if settings == "defaults" else [])


def lander(
    results: Sequence[Row], settings: str, target: float = 200.0, most_steps: int = 50_000
) -> list[str]:
    """The goal of LunarLander-v3, where it was run."""
    found, ppo = (select(results, settings, "LunarLander-v3", algo) for algo in ("grpo", "ppo"))
    if not found or not ppo:
        return []
    bar = bar_of(ppo)
    reached = [measures(row, bar._replace(target=target)) for row in found]
    in_steps = [one for one in reached if at_most(one["steps_to_target"], most_steps)]
    in_both = [one for one in in_steps if at_most(one["seconds_to_target"], bar.seconds)]
    return [
        f"- LunarLander-v3 at {target:g} within {most_steps:,} decision steps: {len(in_steps)} of {len(found)} seeds (goal: 4 of 5);"
        f" in no more CPU seconds than PPO's {cells.number(bar.seconds)} for {bar.total_timesteps:,} steps as well: {len(in_both)}."
    ]


def names(ids: Sequence[str]) -> str:
    """How many, and which."""
    return f"{len(ids)} ({', '.join(ids)})" if ids else "0"
