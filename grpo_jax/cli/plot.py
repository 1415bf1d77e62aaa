"""The command ``grpo-jax plot``: learning curves of several runs, and what the policy of one run compares."""

from __future__ import annotations

import jax
import numpy as np

from grpo_jax import spaces
from grpo_jax.cli import curves, decision, group_plots, plots
from grpo_jax.cli.evaluation import first_agent, trained
from grpo_jax.cli.flags import Plot
from grpo_jax.cli.plots import Curve
from grpo_jax.cli.runs import Run, RunDirectory
from grpo_jax.config import GRPOConfig
from grpo_jax.training.loop import TrainState
from grpo_jax.worlds.base import World

_EPISODES, _STEPS, _STATES = 64, 200, 1000
"""Of a map: episodes, steps of each, and the visited states among these that are compared."""


def plot(options: Plot) -> int:
    """Draws one picture.

    Raises:
      FileNotFoundError, ValueError: what cannot be drawn, and why.
    """
    plots.check_path(options.out)
    for name, least in (("branches", 2), ("step", 0), ("dimension", 0), ("horizon", 1)):
        value = getattr(options, name)
        if value is not None and value < least:
            raise ValueError(f"{name}={value} must be at least {least}")
    if options.group and options.map is not None:
        raise ValueError("--group and --map are two pictures: draw one after the other")
    if not options.group and options.map is None:
        _curves(options)
    elif len(options.run) != 1:
        raise ValueError(f"{len(options.run)} runs were named: --group and --map draw one")
    else:
        run, world, state = trained(RunDirectory(options.run[0]), options.checkpoint)
        config = run.config.replace(horizon=options.horizon or run.config.horizon)
        draw = _group if options.group else _map
        draw(options, run, world, first_agent(run, state), config)
    print(f"written: {options.out}")
    return 0


def _curves(options: Plot) -> None:
    lines = curves.read(options.run, (options.x, options.key))
    panels: dict[str, list[Curve]] = {}
    for line, label in zip(lines, curves.labels(lines), strict=True):
        x, y = line.metrics[options.x], line.metrics[options.key]
        if np.isnan(x).all():
            raise ValueError(
                f"x={options.x}: no file in {line.paths[0] / 'tensorboard'} tells when steps were done"
            )
        seeds = f"{label} ({line.n_seeds} seeds)" if line.n_seeds > 1 else label
        panels.setdefault(line.env, []).append(Curve(seeds, np.nanmean(x, axis=0), y))
        paths = ", ".join(map(str, line.paths))
        print(f"{line.env}: {seeds}{'' if paths == label else f': {paths}'}")
    what = {
        "decision_steps": "decision steps of each seed",
        "simulator_steps": "simulator steps of each seed",
        "seconds": "seconds of training, all seeds of a run together",
    }[options.x]
    has_bands = any(line.n_seeds > 1 for line in lines)
    plots.curves(
        options.out,
        panels,
        x_label=what,
        y_label=options.key.replace("_", " ") + ("\n(median, middle half of seeds)" if has_bands else ""),
        log_x=options.log_x,
    )


def _group(options: Plot, run: Run, world: World, state: TrainState, config: GRPOConfig) -> None:
    key = jax.random.key(options.seed)
    visited = decision.visit(state, world, key, n_episodes=1, n_steps=options.step + 1)
    if not visited.alive[-1, 0]:
        raise ValueError(
            f"step={options.step}: the episode of seed {options.seed} ended after {int(visited.alive.sum())} steps;"
            " choose a smaller --step or another --seed"
        )
    observation, world_state = jax.tree.map(lambda leaf: leaf[-1, 0], (visited.observation, visited.state))
    group = jax.device_get(
        decision.fan(
            state,
            world,
            config,
            world_state,
            observation,
            jax.random.fold_in(key, 1),
            n_branches=options.branches,
        )
    )
    if options.dimension is None:
        values, y_label = group.earned, "reward earned so far"
    else:
        _check_dimensions(world, (options.dimension,))
        values, y_label = group.observation[..., options.dimension], f"observation[{options.dimension}]"
    title = (
        f"{run.env}, iteration {int(state.iteration)}, step {options.step} of an episode: each candidate,"
        f" then the policy, {config.horizon} steps"
    )
    names = [_name(action) for action in group.action]
    figure, _, _ = group_plots.draw_fan(values, group, title=title, y_label=y_label, names=names)
    plots.write(figure, options.out)
    for i in np.flatnonzero(group.valid):
        returns = group.returns[i]
        print(
            f"{names[i]}: return {returns.mean():.4g} ± {returns.std():.2g}, advantage {group.advantage[i]:+.4g}"
        )


def _map(options: Plot, run: Run, world: World, state: TrainState, config: GRPOConfig) -> None:
    assert options.map is not None
    _check_dimensions(world, options.map)
    n_actions = getattr(state.policy.distribution, "n_actions", None)
    if n_actions is None or n_actions > min(len(plots.COLORS), config.max_enumerated):
        raise ValueError(
            f"map={options.map}: {run.env} has {'no' if n_actions is None else n_actions} discrete actions; a map shows up to"
            f" {len(plots.COLORS)} (draw --group instead)"
        )
    key = jax.random.key(options.seed)
    visited = decision.visit(state, world, key, n_episodes=_EPISODES, n_steps=_STEPS)
    rows = np.flatnonzero(np.asarray(visited.alive).reshape(-1))
    rows = np.random.default_rng(options.seed).permutation(rows)[:_STATES]
    rows = np.resize(rows, _STATES)  # one program for any number: those that come twice are drawn twice
    observation, states = jax.tree.map(
        lambda leaf: leaf.reshape(-1, *leaf.shape[2:])[rows], (visited.observation, visited.state)
    )
    returns = np.asarray(
        decision.compare(
            state, world, config, states, observation, jax.random.fold_in(key, 1), n_branches=options.branches
        )
    )
    n_states = len(np.unique(rows))
    returns, points = returns[:n_states], np.asarray(observation)[:n_states][:, options.map]
    title = f"{run.env}, iteration {int(state.iteration)}: the better action, {config.horizon} steps ahead"
    labels = (f"observation[{options.map[0]}]", f"observation[{options.map[1]}]")
    n_sure = group_plots.draw_map(options.out, points, returns, title=title, labels=labels)
    print(
        f"{n_sure} of {n_states} visited states have an action that is better than the next best by more than two standard"
        " errors"
    )


def _check_dimensions(world: World, dimensions: tuple[int, ...]) -> None:
    space = world.observation_space
    if not isinstance(space, spaces.Box) or len(space.shape) != 1:
        raise ValueError(f"--dimension and --map need an observation that is a vector, not {space}")
    for dimension in dimensions:
        if not 0 <= dimension < space.shape[0]:
            raise ValueError(f"an observation has the numbers 0 to {space.shape[0] - 1}, and no {dimension}")


def _name(action: np.ndarray) -> str:
    numbers = [f"{number:.3g}" for number in np.atleast_1d(action).tolist()]
    return f"action {numbers[0] if len(numbers) == 1 else '(' + ', '.join(numbers) + ')'}"
