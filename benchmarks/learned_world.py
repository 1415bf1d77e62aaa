"""GRPO with groups in a learned world: greedy return, and how good the world is, over decision steps.

    taskset -c 0 python benchmarks/learned_world.py [N_SEEDS [PNG [ENV ...]]]

The policy acts in the real gymnax environment, one of them, 256 steps an iteration, and is compared in the world that
was learned from all steps so far. Until that world is usable, groups are the episodes at hand. CartPole-v1 has the
reward 1 - |angle| - 0.1 |position|, which is given; Pendulum-v1's own reward is learned. The world is measured on every
rollout before it learns from it.
"""

from __future__ import annotations

import functools
import sys
import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import grpo_jax
from grpo_jax.learning import model as learned
from grpo_jax.training import loop
from grpo_jax.types import Trajectory

COMMON = {"n_envs": 1, "n_steps": 256, "batch_size": 64, "n_epochs": 10}
TOTAL, MEASURED, N_EPISODES = 20_000, 16, 20
MARKS = (5_000, 10_000, 20_000)


def upright(state: Any, action: Any, next_state: Any) -> Any:
    """CartPole's reward: the pole upright, the cart in the middle."""
    del state, action
    return 1.0 - jnp.abs(next_state[2]) - 0.1 * jnp.abs(next_state[0])


CASES: dict[str, tuple[Any, grpo_jax.GRPOConfig]] = {
    "CartPole-v1": (upright, grpo_jax.GRPOConfig(horizon=16, learning_rate=3e-4, **COMMON)),
    "Pendulum-v1": (
        None,
        grpo_jax.GRPOConfig(horizon=32, group_size=8, learning_rate=1e-3, activation="relu", **COMMON),
    ),
}


@functools.partial(jax.jit, static_argnames="horizon")
def observe(
    model: learned.Model, policy_actions: Any, horizon: int
) -> tuple[learned.Model, grpo_jax.types.Metrics]:
    """Measures the world on what is new, then remembers it."""
    metrics = learned.measure(model.world, policy_actions, horizon)
    return model.replace(replay=learned.remember(model.replay, policy_actions)), metrics


collect = jax.jit(functools.partial(loop.collect, keep_next_observation=True))


def _learn(config: Any, world: Any, state: Any, trajectory: Trajectory, progress: float) -> Any:
    return loop.improve(config, state, loop.compare(config, world, state, trajectory, progress), progress)


@jax.jit
def learn(config: Any, world: Any, state: Any, trajectory: Trajectory, progress: float) -> Any:
    """One update of the policy by groups in the learned world."""
    environments = trajectory.environments.replace(state=world.at(trajectory.observation))
    return _learn(config, world, state, trajectory.replace(environments=environments), progress)


@jax.jit
def learn_without(config: Any, state: Any, trajectory: Trajectory, progress: float) -> Any:
    """One update of the policy by the episodes at hand."""
    return _learn(config, None, state, trajectory, progress)


def train(env_id: str, seed: int) -> list[dict[str, float]]:
    """One run; a row for each iteration."""
    reward_function, config = CASES[env_id]
    env = grpo_jax.make(env_id, reward_function=reward_function)
    episodes = config.replace(candidates="episodes")
    state = grpo_jax.init(config, env, jax.random.key(seed))
    model = learned.init_model(
        env.observation_space, env.action_space, jax.random.key(1000 + seed), reward_function=reward_function
    )
    rows: list[dict[str, float]] = []
    n_iterations = -(-TOTAL // config.n_states)
    for i in range(n_iterations):
        state, trajectory = collect(config, env, state)
        began = time.perf_counter()
        model, metrics = observe(model, learned.transitions_of(state.policy, trajectory), MEASURED)
        model, fitted = jax.block_until_ready(learned.fit(model, jax.random.fold_in(state.key, 0)))
        seconds = time.perf_counter() - began
        is_usable = learned.usable(metrics)
        if is_usable:
            state, learning = learn(config, model.world, state, trajectory, i / n_iterations)
        else:
            state, learning = learn_without(episodes, state, trajectory, i / n_iterations)
        row = {name: float(value) for name, value in (metrics | fitted).items()}
        row |= {"steps": (i + 1) * config.n_states, "usable": is_usable, "fit_seconds": seconds}
        row["branch_steps"] = float(learning["simulator_steps"])
        if any(row["steps"] - config.n_states < mark <= row["steps"] for mark in MARKS):
            key = jax.random.key(2000 + seed)
            returns = grpo_jax.evaluate(state, env, key, N_EPISODES, deterministic=True)
            row["greedy"] = float(np.mean(returns))
        rows.append(row)
    greedy = [round(row["greedy"]) for row in rows if "greedy" in row]
    refused = sum(not row["usable"] for row in rows)
    print(f"{env_id}, seed {seed}: greedy returns {greedy}, refused iterations {refused}", flush=True)
    return rows


def report(env_id: str, runs: list[list[dict[str, float]]]) -> None:
    """Prints the tables of one environment."""
    scores = np.array([[row["greedy"] for row in run if "greedy" in row] for run in runs])
    print(f"\n{env_id}: greedy return, mean of {N_EPISODES} episodes, {len(runs)} seeds")
    print("| decision steps | median | min | max | all |")
    print("|---|---|---|---|---|")
    for mark, column in zip(MARKS, scores.T, strict=True):
        every = " ".join(f"{score:.0f}" for score in column)
        print(f"| {mark:,} | {np.median(column):.0f} | {column.min():.0f} | {column.max():.0f} | {every} |")
    names = ("one_step_error", "h_step_error", "reward_error", "end_error", "disagreement", "cut", "usable")
    print(f"\n{env_id}: the world, median over seeds, measured on the rollout that ends there")
    print(f"| decision steps | {' | '.join(names)} |")
    print("|---" * (len(names) + 1) + "|")
    for i in (1, 2, 3, 4, 7, 15, 38, 77):
        cells = [f"{np.median([run[i][name] for run in runs]):.3f}" for name in names]
        print(f"| {int(runs[0][i]['steps']):,} | {' | '.join(cells)} |")
    first = [next((row["steps"] for row in run if row["usable"]), float("inf")) for run in runs]
    seconds = [row["fit_seconds"] for run in runs for row in run]
    print(f"first usable after: {sorted(int(n) for n in first)}; refused iterations in all: ", end="")
    print(sum(not row["usable"] for run in runs for row in run), end="")
    print(
        f"; measure and fit: median {np.median(seconds):.2f} s; branch steps {runs[0][-1]['branch_steps']:,.0f}"
    )


def draw(results: dict[str, list[list[dict[str, float]]]], path: str) -> None:
    """The errors over training, one panel for each environment."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, panels = plt.subplots(1, len(results), figsize=(11, 4), sharey=True, layout="constrained")
    names = {
        "h_step_error": f"{MEASURED} steps, open loop",
        "one_step_error": "one step",
        "disagreement": "disagreement",
    }
    for panel, (env_id, runs) in zip(np.atleast_1d(panels), results.items(), strict=True):
        steps = [row["steps"] for row in runs[0][1:]]
        for color, (name, label) in enumerate(names.items()):
            values = np.array([[row[name] for row in run[1:]] for run in runs])
            low, middle, high = np.quantile(values, [0.1, 0.5, 0.9], axis=0)
            panel.plot(steps, middle, color=f"C{color}", label=label)
            panel.fill_between(steps, low, high, color=f"C{color}", alpha=0.2, linewidth=0)
        panel.axhline(learned.MAX_ERROR, color="black", linestyle=":", label="usable below")
        panel.set(title=f"{env_id}, {len(runs)} seeds", xlabel="real environment steps", yscale="log")
        panel.grid(alpha=0.3)
    np.atleast_1d(panels)[0].set_ylabel("relative error on unseen rollouts")
    handles, labels = np.atleast_1d(panels)[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=len(handles))
    figure.savefig(path, dpi=120)


def main() -> None:
    n_seeds = int(sys.argv[1]) if len(sys.argv) > 1 else 10
    path = sys.argv[2] if len(sys.argv) > 2 else "learned_world.png"
    print(f"jax {jax.__version__}, {jax.default_backend()}")
    results = {}
    for env_id in sys.argv[3:] or CASES:
        began = time.perf_counter()
        results[env_id] = [train(env_id, seed) for seed in range(n_seeds)]
        report(env_id, results[env_id])
        print(f"{(time.perf_counter() - began) / n_seeds:.0f} s a seed", flush=True)
    draw(results, path)


if __name__ == "__main__":
    main()
