"""The benchmark's rows as numbers: scores, what they took, when a score was reached, and who is ahead.

A seed's score is the mean of its final returns. Of five seeds and more the interquartile mean stands for all, with a
bootstrap interval; of fewer the median, with the lowest and the highest.
"""

from __future__ import annotations

import json
import math
import pathlib
import statistics
import tomllib
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

Row = dict[str, Any]
References = dict[str, dict[str, Any]]
Floats = npt.NDArray[np.float64]

OURS = "grpo_jax"
SEARCHES = "mctx_search"
LIBRARIES = {
    OURS: "grpo_jax",
    "sb3": "SB3 PPO",
    "sbx": "SBX PPO",
    "rejax": "rejax PPO",
    "purejaxrl": "PPO, PureJaxRL's",
    "mctx": "mctx, bare",
    SEARCHES: "mctx with search",
}
"""Who plays. A run of mctx plays twice, the bare policy and with a search for every move."""

CACHES = ("cold", "off", "warm")
"""Where a seed ran with several caches, the first of these stands for it: its compile time is what a user waits."""

LEVEL = 0.01
"""Scores nearer than this, as a share of the way from a random policy to the reference, are level."""

MIN_SEEDS = 5
"""Seeds from which on the interquartile mean stands for them."""


class Middle(NamedTuple):
    """What stands for several seeds.

    Attributes:
      value: the interquartile mean, or the median.
      low: of the bootstrap 95% interval, or of the seeds.
      high: the same.
      n: how many seeds.
    """

    value: float
    low: float
    high: float
    n: int


class Reached(NamedTuple):
    """What a run had spent when it reached a threshold; infinity where it never did.

    Attributes:
      decision_steps: real environment steps.
      simulator_steps: steps in branches or searches.
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


def players(rows: Iterable[Row]) -> list[Row]:
    """The rows, and behind each that also played with a search one of that play, of library ``SEARCHES``."""
    found = []
    for row in rows:
        found.append(row)
        if "search_final_returns" in row:
            curve = [
                point | {name: point[f"search_{name}"] for name in ("return_mean", "return_std")}
                for point in row["curve"]
            ]
            played = {"library": SEARCHES, "final_returns": row["search_final_returns"], "curve": curve}
            found.append(row | played)
    return found


def at_best_settings(rows: Sequence[Row]) -> list[Row]:
    """Of a library that ran an environment with several settings, only the rows of those with the best score."""
    best: dict[tuple[str, str], tuple[float, str]] = {}
    for row in rows:
        key = row["library"], row["env"]
        group = [other for other in select(rows, *key) if other["settings"] == row["settings"]]
        best[key] = max(best.get(key, (-math.inf, row["settings"])), (score_of(group).value, row["settings"]))
    return [row for row in rows if best[row["library"], row["env"]][1] == row["settings"]]


def one_row_a_seed(rows: Sequence[Row]) -> list[Row]:
    """One row for each library, environment and seed: that of the first cache in ``CACHES``."""
    chosen: dict[tuple[str, str, int], Row] = {}
    for row in sorted(rows, key=lambda row: CACHES.index(row["cache"])):
        chosen.setdefault((row["library"], row["env"], row["seed"]), row)
    return sorted(chosen.values(), key=lambda row: row["seed"])


def select(rows: Sequence[Row], library: str, env: str) -> list[Row]:
    return [row for row in rows if row["library"] == library and row["env"] == env]


def groups_of(env: str, rows: Sequence[Row]) -> dict[str, list[Row]]:
    """The rows of an environment by library, ours first."""
    return {library: group for library in LIBRARIES if (group := select(rows, library, env))}


def libraries_of(rows: Sequence[Row]) -> list[str]:
    """The libraries that have rows, ours first."""
    return [library for library in LIBRARIES if any(row["library"] == library for row in rows)]


def environments_of(rows: Sequence[Row], references: References) -> list[str]:
    """The environments that have rows, in the order of the references."""
    ids = {row["env"] for row in rows}
    return [env for env in references if env in ids] + sorted(ids - references.keys())


# Of a run


def score(row: Row) -> float:
    """Mean final return of a seed; minus infinity where it is not a number, so that it counts as the worst."""
    returns = [float("nan") if value is None else float(value) for value in row["final_returns"]]
    mean = math.fsum(returns) / len(returns) if returns and all(map(math.isfinite, returns)) else -math.inf
    return mean if math.isfinite(mean) else -math.inf


def seconds(row: Row, name: str) -> float:
    """CPU seconds ``name``; 0 where they cannot be told apart from training, which then holds them."""
    return float(row["cpu"][f"{name}_seconds"] or 0.0)


def before_training(row: Row) -> float:
    """CPU seconds of importing and compiling."""
    return seconds(row, "import") + seconds(row, "compile")


def cold(row: Row) -> float:
    """CPU seconds of importing, compiling and training."""
    return before_training(row) + seconds(row, "train")


def reached(row: Row, threshold: float, evaluations: int = 1) -> Reached:
    """When a run's return first is at the threshold, for so many evaluations in a row.

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


def within(row: Row, field: str, budget: float) -> float:
    """Return at the last evaluation that had spent no more; NaN where there is none.

    Args:
      row: a run.
      field: of a point of its curve, ``simulator_steps`` or ``train_cpu_seconds``.
      budget: of that field.
    """
    returns = [point["return_mean"] for point in row["curve"] if point[field] <= budget]
    return float("nan") if not returns or returns[-1] is None else float(returns[-1])


# Of seeds


def median(values: Iterable[float]) -> float:
    """Median that takes infinities: half of the seeds that never reach a score make it infinite."""
    known = sorted(values)
    middle = known[(len(known) - 1) // 2], known[len(known) // 2]
    return middle[0] if middle[0] == middle[1] else statistics.fmean(middle)


def interquartile_mean(scores: Floats) -> Any:
    """Mean along the last axis of what is left without the lowest and highest quarter, each rounded down."""
    ordered = np.sort(scores, axis=-1)
    n = ordered.shape[-1]
    return ordered[..., n // 4 : n - n // 4].mean(axis=-1)


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
      The interquartile mean, and the 2.5% and 97.5% percentiles; minus infinities are taken as they are.
    """
    rng = np.random.default_rng(seed)
    drawn = np.concatenate([rng.choice(env, (n_samples, env.size)) for env in scores], axis=1)
    low, high = np.percentile(interquartile_mean(drawn), (2.5, 97.5), method="inverted_cdf")
    return float(interquartile_mean(np.concatenate(scores))), float(low), float(high)


def middle(values: Iterable[float], n_samples: int = 2000) -> Middle:
    """What stands for the values of several seeds, at least one; minus infinity is a value like any other."""
    known = np.array(list(values), dtype=np.float64)
    if known.size < MIN_SEEDS:
        return Middle(median(known.tolist()), float(known.min()), float(known.max()), known.size)
    return Middle(*bootstrap_interval([known], n_samples), known.size)


def score_of(rows: Iterable[Row]) -> Middle:
    """Of one library on one environment."""
    return middle(map(score, rows))


# Of libraries


def scale(env: str, rows: Sequence[Row], references: References) -> tuple[float, float] | None:
    """A random policy's return and the reference's: the best possible, or else the best score in the rows.

    None where they are not known, or where nothing can be learned.
    """
    known = references.get(env, {})
    if "random" not in known or not known.get("aggregate", True):
        return None
    found = [score_of(group).value for group in groups_of(env, rows).values()]
    reference = known.get("best", max(found, default=-math.inf))
    return (known["random"], reference) if math.isfinite(reference) and reference > known["random"] else None


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
    """The libraries with the best score, or level with it."""
    found = {library: score_of(group).value for library, group in groups_of(env, rows).items()}
    best = max(found.values(), default=-math.inf)
    if not references.get(env, {}).get("aggregate", True):
        return []
    limits = scale(env, rows, references)
    slack = LEVEL * (limits[1] - limits[0]) if limits else 0.0
    return [library for library, value in found.items() if math.isfinite(best) and value >= best - slack]


def best_peer(env: str, rows: Sequence[Row]) -> list[Row]:
    """The rows of the peer with the best score, of equal ones the quicker; none where no peer ran it."""
    peers = [group for library, group in groups_of(env, rows).items() if library != OURS]
    return max(
        peers,
        key=lambda group: (score_of(group).value, -median(seconds(row, "train") for row in group)),
        default=[],
    )
