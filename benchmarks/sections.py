"""The sections of the benchmark's report: Markdown of tables and lists."""

from __future__ import annotations

import pathlib
import tomllib
from collections.abc import Sequence

from cells import best_cell, interval, number, peer_name, published_cell, spread, steps, table, target_cell
from scores import (
    CACHES,
    LEVEL,
    LIBRARIES,
    MIN_SEEDS,
    NEVER,
    OURS,
    SEARCHES,
    References,
    Row,
    best_peer,
    cold,
    compare,
    environments_of,
    groups_of,
    libraries_of,
    median,
    middle,
    reached,
    scale,
    score,
    score_of,
    seconds,
    select,
    winners,
    within,
)

SHORT = ("CartPole-v1", "Pendulum-v1", "Asterix-MinAtar", "Breakout-MinAtar", "SpaceInvaders-MinAtar")
"""The environments of the table that fits a README."""

AHEAD = "◄"
"""Marks what a peer wins."""

HEAD = [
    "environment",
    "ours",
    "decision steps",
    "simulator steps",
    "train s",
    "cold s",
    "best possible",
    "published",
    "best peer and its settings",
]


# Who is ahead


def verdict(env: str, rows: Sequence[Row], references: References) -> str:
    """Who is ahead, and whether who is behind reaches into their interval."""
    best, groups = winners(env, rows, references), groups_of(env, rows)
    if len(groups) == 1:
        return "one library"
    if not references.get(env, {}).get("aggregate", True):
        return "nothing to learn"
    if not best:
        return "none"
    if OURS in best and len(best) > 1:
        return "level"
    found = {library: score_of(group) for library, group in groups.items()}
    behind = [known.high for library, known in found.items() if library not in best]
    overlap = " (they overlap)" if behind and max(behind) >= min(found[name].low for name in best) else ""
    return ("ours" if OURS in best else f"{AHEAD} {', '.join(LIBRARIES[name] for name in best)}") + overlap


def met(env: str, rows: Sequence[Row], references: References) -> str:
    """Whether our score is at the target; a target inside the seeds' range is called so."""
    target, group = references.get(env, {}).get("target"), select(rows, OURS, env)
    if not group or not scale(env, rows, references) or not isinstance(target, int | float):
        return "-"
    if float(number(score_of(group).value).replace(",", "")) >= target:  # as it is shown
        return "yes"
    return "within the seeds' range" if max(map(score, group)) >= target else "no"


# The tables


def summary(env: str, rows: Sequence[Row], references: References) -> str:
    """The line of an environment under ``HEAD``."""
    ours, known = select(rows, OURS, env), references.get(env, {})
    cells = [env, interval(score_of(ours)), *_costs(ours), best_cell(known), published_cell(known)]
    return f"| {' | '.join([*cells, _peer_cell(env, rows, references)])} |"


def _costs(group: Sequence[Row]) -> list[str]:
    """Medians of decision steps, simulator steps, seconds of training and cold seconds."""
    counts = [steps(median(row[name] for row in group)) for name in ("decision_steps", "simulator_steps")]
    return [*counts, number(median(seconds(row, "train") for row in group)), number(median(map(cold, group)))]


def _peer_cell(env: str, rows: Sequence[Row], references: References) -> str:
    """The best peer; where that plays with a search, the best that plays without one as well. Marked if ahead of ours."""
    best = best_peer(env, rows)
    if not best:
        return "-"
    bare = [row for row in rows if row["library"] != SEARCHES]
    told = [best] if best[0]["library"] != SEARCHES else [best, best_peer(env, bare)]
    cells = []
    for group in told:
        decisions, simulated, train, all_seconds = _costs(group)
        count = f"{decisions} steps" + (f" and {simulated} simulated" if simulated != "0" else "")
        won = winners(env, [*select(rows, OURS, env), *group], references)
        ahead = f"{AHEAD} " if won and OURS not in won else ""
        name = f"{peer_name(group[0])}, {count}, {train} s (cold {all_seconds})"
        cells.append(f"{ahead}{interval(score_of(group))} {name}")
    return "; ".join(cells)


def summary_section(rows: Sequence[Row], references: References) -> str:
    """The table for a README, and the same of all environments."""
    envs = [env for env in environments_of(rows, references) if select(rows, OURS, env)]
    head = table(HEAD, [])
    short = [summary(env, rows, references) for env in SHORT if env in envs]
    every = [summary(env, rows, references) for env in envs]
    lost = sum(AHEAD in line for line in every)
    return (
        "## In short\n\n"
        f"Of {MIN_SEEDS} seeds and more the interquartile mean [bootstrap 95% interval], of fewer the median (lowest to"
        " highest); steps and CPU seconds are medians. Train: without importing and compiling; cold: with both. Simulator"
        " steps are those beside the decision steps, in branches or searches. Best possible is for a policy that sees one"
        " observation and remembers nothing; published are the returns that gymnax lists for the gymnax-blines"
        " checkpoints. The best peer is the best of rejax's own settings, PureJaxRL's, RL Zoo's and mctx; mctx with"
        f" search needs the simulator to play, so the best that plays without stands behind it. {AHEAD} marks what a peer"
        f" wins.\n\n{head}"
        + "\n".join(short)
        + f"\n\nAll environments; a peer wins {lost} of {len(every)}:\n\n"
        f"{head}" + "\n".join(every) + "\n"
    )


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
            cell = interval(score_of(group)) if group else "-"
            bad = sum(bool(row["nonfinite"]) for row in group)
            cell = f"**{cell}**" if library in best else cell
            cells.append(cell + (f" ‡ {bad} of {len(group)} non-finite" if bad else ""))
        body.append(
            [
                env,
                number(known["random"]) if "random" in known else "-",
                best_cell(known),
                published_cell(known),
                target_cell(known),
                *cells,
                met(env, rows, references),
                verdict(env, rows, references),
            ]
        )
    behind = sum(line[-1].startswith(AHEAD) for line in body)
    return (
        "## Scores\n\n"
        "Return of the sampled policy at the end of training; a seed's score is the mean of its final episodes. Bold: the"
        f" best score, and scores within {LEVEL:.0%} of the way from a random policy to the reference (the best possible"
        " score, or else the best here); a target is met by the score as it is shown."
        f" {AHEAD} marks a row where a peer is ahead ({behind} of {len(body)}).\n\n"
        + table([*head, "Target met by ours", "Ahead"], body)
    )


def equal_section(rows: Sequence[Row], references: References) -> str:
    """What mctx had reached when it had spent what ours spends, in simulator steps and in seconds."""
    body = []
    for env in environments_of(rows, references):
        groups = groups_of(env, rows)
        if not {OURS, "mctx", SEARCHES} <= groups.keys():
            continue
        ours = groups[OURS]
        budgets = {
            "simulator_steps": median(row["simulator_steps"] for row in ours),
            "train_cpu_seconds": median(seconds(row, "train") for row in ours),
        }
        cells = [env, interval(score_of(ours)), steps(budgets["simulator_steps"])]
        cells.append(number(budgets["train_cpu_seconds"]))
        for field, budget in budgets.items():
            short = any(row["curve"][-1][field] < budget for row in groups["mctx"] if row["curve"])
            for library in ("mctx", SEARCHES):
                found = [within(row, field, budget) for row in groups[library]]
                known = [value for value in found if value == value]
                cells.append(interval(middle(known)) + " †" * short if len(known) == len(found) else "-")
        body.append(cells)
    head = ["Environment", "ours", "our simulator steps", "our train s", "bare, as many steps"]
    head += ["with search, as many steps", "bare, as many seconds", "with search, as many seconds"]
    return (
        "## mctx at our simulator steps, and at our seconds\n\n"
        "Its last evaluation (32 episodes) that had spent no more than the median of ours. -: the first evaluation of a"
        " seed had spent more; †: a seed ended before, and counts as at its end. Simulator steps of a search that plays"
        " are not counted, nor its seconds.\n\n" + (table(head, body) if body else "mctx has no row.\n")
    )


def costs_section(rows: Sequence[Row], references: References) -> str:
    """What each score took."""
    body = []
    for env in environments_of(rows, references):
        for library, group in groups_of(env, rows).items():
            if library == SEARCHES:  # the same runs
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
                    spread(map(cold, group)),
                    spread(row["peak_memory_mb"] for row in group),
                ]
            )
    head = ["Environment", "Library", "Settings", "Seeds", "Decision steps", "Simulator steps", "Train s"]
    head += ["Train s, wall", "Compile s", "Import s", "Cold s", "Peak memory MB"]
    return (
        "## What the scores cost\n\nCPU seconds of the process, of the whole run: medians (lowest to highest). PPO steps no"
        " simulator beside its environment. Compiling as with an empty cache where that was run.\n\n"
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
                        spread((time.simulator_steps for time in times), steps),
                        spread(time.train for time in times),
                        spread(time.total for time in times),
                    ]
                body.append([env, LIBRARIES[library], cache, number(threshold), *cells])
    head = ["Environment", "Library", "Cache", "Threshold"]
    for prefix in ("", "Stays: "):
        head += [f"{prefix}seeds", f"{prefix}decision steps", f"{prefix}simulator steps", f"{prefix}train s"]
        head += [f"{prefix}cold s"]
    return (
        "## Time to score\n\n"
        "Spent until the return is first seen at the threshold (mean of 32 episodes), and, under"
        ' "stays", until the first of two such evaluations in a row. CPU seconds; median over all seeds (lowest to'
        " highest), where a seed that never gets there counts as infinite. Cold: import, compile and train. Evaluations"
        " themselves are not counted; what is measured can be no finer than their distance.\n\n"
        + (table(head, body) if body else "No environment with a threshold has a row.\n")
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
        " seen where that is unknown) over environments and seeds, with stratified bootstrap 95% intervals"
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
    rows = [row for row in rows if row["library"] != SEARCHES]  # the same runs
    lines = [f"- {len(rows)} rows, of {len({row['seed'] for row in rows})} seeds."]
    if n_left_out:
        lines.append(
            f"- {n_left_out} rows left out: where a library ran with several settings, only the best are shown."
        )
    if bad := [row for row in rows if row["nonfinite"]]:
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
