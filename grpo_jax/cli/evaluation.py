"""The command ``grpo-jax evaluate``, and the episodes that a run is judged by at its end."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path

import jax

import grpo_jax
from grpo_jax.cli import progress, render, sweeps
from grpo_jax.cli.flags import Evaluate
from grpo_jax.cli.runs import Run, RunDirectory
from grpo_jax.training.agents import default_block, over_agents
from grpo_jax.training.loop import TrainState
from grpo_jax.training.self_play import check_opponent
from grpo_jax.worlds.base import World

_EVALUATION = 0xE7A1
"""Folded into the seed, so that no evaluation plays the episodes of the training."""


def evaluate(options: Evaluate) -> int:
    """Plays episodes with a checkpoint of a run, prints what they earned, and draws one of them where that is asked for."""
    directory = RunDirectory(options.directory)
    if options.render is not None:
        render.without_window()
    run, world, state = trained(directory, options.checkpoint)
    if options.opponent == "self":
        check_opponent(world)
    if options.render is not None:
        render.check(world, options.render)
    seed = run.seed if options.seed is None else options.seed
    key = evaluation_key(seed)
    deterministic, plan = options.deterministic, _plan_of(run, options)
    which = "last checkpoint" if options.checkpoint is None else f"checkpoint {options.checkpoint.name}"
    how = "most probable actions" if deterministic else "sampled actions"
    how += ", chosen by comparison (--plan)" if plan is not None else ""
    against = ", against itself" if options.opponent == "self" else ""
    print(
        f"{run.env}, {directory.path}: {which}, at iteration {int(state.iteration.max())}; {how}; episodes of seed"
        f" {seed}{against}"
    )

    def game(state: TrainState) -> World:
        is_self = options.opponent == "self"
        return grpo_jax.against(world, state, deterministic=deterministic) if is_self else world

    play(run, game, state, key, options.n_episodes, deterministic=deterministic, plan=plan)
    if options.render is not None:
        one = first_agent(run, state)
        n_frames, earned = render.render(
            one, game(one), key, options.render, deterministic=deterministic, plan=plan
        )
        print(f"{options.render}: {n_frames} frames, return {earned:.2f}")
    return 0


def trained(directory: RunDirectory, checkpoint: Path | None = None) -> tuple[Run, World, TrainState]:
    """A run, its world and the state of its last checkpoint, or of another; of a sweep those of the best setting.

    Raises:
      FileNotFoundError, ValueError: there is none, or it is damaged.
    """
    run = directory.read()
    if run.settings:
        return sweeps.best(directory, run, checkpoint)
    world, state = directory.restore(run, checkpoint)
    if state is None:
        raise FileNotFoundError(
            f"directory={directory.path} has no checkpoint yet: start it anew by `grpo-jax resume {directory.path}`"
        )
    return run, world, state


def first_agent(run: Run, state: TrainState) -> TrainState:
    """The state of the first seed alone."""
    return state if run.vmapped is None else jax.tree.map(lambda leaf: leaf[0], state)


def _plan_of(run: Run, options: Evaluate) -> grpo_jax.Plan | None:
    if not options.plan:
        if options.plan_horizon is not None or options.plan_rollouts != grpo_jax.Plan.n_rollouts:
            raise ValueError("--plan-horizon and --plan-rollouts change a plan: give --plan too")
        return None
    changes = {} if options.plan_horizon is None else {"horizon": options.plan_horizon}
    return grpo_jax.Plan.of(run.config, n_rollouts=options.plan_rollouts, **changes)


def play(
    run: Run,
    game: Callable[[TrainState], World],
    state: TrainState,
    key: jax.Array,
    n_episodes: int,
    *,
    deterministic: bool,
    plan: grpo_jax.Plan | None = None,
) -> None:
    """Plays episodes of every seed, in the game that belongs to its state, and prints what they earned."""

    def of_one(state: TrainState, key: jax.Array) -> grpo_jax.Episodes:
        return grpo_jax.evaluate_episodes(
            state, game(state), key, n_episodes, deterministic=deterministic, plan=plan
        )

    start = time.perf_counter()
    with progress.waiting("playing"):
        if run.vmapped is None:
            episodes = jax.tree.map(lambda leaf: leaf[None], of_one(state, key))
        else:
            agents = (state, jax.random.split(key, run.n_seeds))
            block = default_block(run.config, game(first_agent(run, state)), run.n_seeds)
            episodes = over_agents(lambda agent: of_one(*agent), agents, block)
        jax.block_until_ready(episodes)
    progress.print_results(episodes, time.perf_counter() - start, deterministic=deterministic)
    if plan is not None:
        steps, decisions = grpo_jax.count(episodes.simulator_steps), int(episodes.lengths.sum())
        print(f"planned: {steps:,} simulator steps, {steps / decisions:,.0f} for a decision")


def evaluation_key(seed: int) -> jax.Array:
    """Of the episodes that a policy is judged by."""
    return jax.random.fold_in(jax.random.key(seed), _EVALUATION)
