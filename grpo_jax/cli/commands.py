"""The commands: ``grpo-jax train | resume | evaluate | envs``."""

from __future__ import annotations

import dataclasses
import signal
import sys
import time
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np

import grpo_jax
from grpo_jax import shards
from grpo_jax.cache import enable_cache
from grpo_jax.cli import devices, distributed, plots, progress, render, sweeps
from grpo_jax.cli.envs import envs
from grpo_jax.cli.flags import FINAL_EPISODES, Evaluate, Resume, Train, parse, swept
from grpo_jax.cli.recorder import Recorder
from grpo_jax.cli.runs import Run, RunDirectory
from grpo_jax.config import GRPOConfig
from grpo_jax.files import UnsealedWarning
from grpo_jax.training.agents import default_block, over_agents
from grpo_jax.training.loop import TrainState, iterations_for
from grpo_jax.training.run import first_state
from grpo_jax.training.self_play import check_opponent
from grpo_jax.training.sweep import check_program, expand, first_settings, run_settings
from grpo_jax.worlds.base import World

_EVALUATION = 0xE7A1
"""Folded into the seed, so that no evaluation plays the episodes of the training."""


class NotSaved(Exception):
    """What a run came to cannot be written."""


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command.

    Args:
      argv: the arguments, without the program's name; None: those of the process.

    Returns:
      0: all is well; 1: training itself failed, or something could not be written; 2: bad input; 130: stopped by
      Ctrl-C; 143: stopped by SIGTERM.
    """
    processes = distributed.Processes()
    return processes.end(_main(sys.argv[1:] if argv is None else list(argv), processes))


def _main(argv: list[str], processes: distributed.Processes) -> int:
    try:
        options = parse(argv)
        processes.begin(options)
        if getattr(options, "cache", False):
            enable_cache()
        with warnings.catch_warnings(), progress.Interrupt() as interrupt:
            for kind in (grpo_jax.NoSpreadWarning, UnsealedWarning):
                warnings.simplefilter("always", kind)
            warnings.showwarning = processes.warn
            match options:
                case Train():
                    return processes.together(lambda: _train(options, interrupt, processes))
                case Resume():
                    return processes.together(lambda: _resume(options, interrupt, processes))
                case Evaluate():
                    return _evaluate(options)
                case _:
                    return envs(options.suite)
    except SystemExit as stop:  # the parser's help and complaints
        return int(stop.code or 0)
    except KeyboardInterrupt as stop:
        signum = getattr(stop, "signum", signal.SIGINT)
        progress.error(f"stopped by {progress.signal_name(signum)}")
        return 128 + signum
    except (ValueError, TypeError, OverflowError, OSError, ImportError) as problem:
        progress.error(problem)
        return 2
    except (FloatingPointError, NotSaved, jax.errors.JaxRuntimeError) as problem:
        full = "RESOURCE_EXHAUSTED" in str(problem)
        progress.error(f"{problem}{'; lower --max-branches, --n-envs or --n-seeds' if full else ''}")
        return 1


def _train(options: Any, interrupt: progress.Interrupt, processes: distributed.Processes) -> int:
    world = grpo_jax.make(options.env)
    config = GRPOConfig(**vars(options.config))
    place = devices.place_of(options)
    if place.mesh is not None and options.n_seeds == 1 and not options.sweep and config.n_shards == 1:
        config = config.replace(n_shards=place.mesh.devices.size)
    settings = expand(config, swept(options.sweep), zipped=options.zipped) if options.sweep else ()
    # All that can be wrong with the input is found before anything is written.
    run = Run(
        options.env,
        config,
        options.seed,
        options.n_seeds,
        options.total_timesteps,
        options.checkpoint_every,
        options.keep,
        options.opponent_every,
        tuple(settings),
    )
    if run.opponent_every is not None:
        check_opponent(world)
    for _, program in run.programs():
        check_program(program.configs[0], world, run.total_timesteps)
    devices.check(place, run, world)
    directory = processes.directory(options.out)
    directory.check_free(overwrite=options.overwrite)
    directory.make()
    with directory.locked():
        directory.create(run, overwrite=options.overwrite)
        if run.env not in grpo_jax.preset_ids():
            print(f"{run.env} has no preset: settings that no flag names are the defaults")
        if len(run.programs()) > 1:
            return _go_on_programs(directory, run, interrupt, place)
        return _go_on(directory, run, world, None, interrupt, place)


def _resume(options: Resume, interrupt: progress.Interrupt, processes: distributed.Processes) -> int:
    directory = processes.directory(options.directory)
    directory.check_run()
    with directory.locked():
        run = directory.read()
        names = ("total_timesteps", "checkpoint_every", "keep")
        changes = {name: getattr(options, name) for name in names if getattr(options, name) is not None}
        run = dataclasses.replace(run, **changes)
        devices.check(place := devices.place_of(options), run, grpo_jax.make(run.env))
        if len(run.programs()) > 1:
            return _go_on_programs(directory, run, interrupt, place, new_metrics=options.new_metrics)
        world, state = _restore(directory, run)
        return _go_on(directory, run, world, state, interrupt, place, new_metrics=options.new_metrics)


def _restore(directory: RunDirectory, run: Run) -> tuple[World, TrainState | None]:
    """The world and the state to go on from."""
    world, state = directory.restore(run)
    config = run.configs[0]
    done, total = _iterations(state), iterations_for(config, run.total_timesteps)
    if done > total:
        steps = done * config.n_states
        raise ValueError(
            f"total_timesteps={run.total_timesteps} is less than the {steps} steps that are done"
        )
    if done == total:
        print(f"{directory.path}: all iterations are done; --total-timesteps makes the run longer")
    return world, state


def _go_on_programs(
    directory: RunDirectory,
    run: Run,
    interrupt: progress.Interrupt,
    place: devices.Place,
    *,
    new_metrics: bool = False,
) -> int:
    """Trains the programs of a sweep, one after the other, each in a directory of its own; sums the sweep up."""
    directory.write(run)
    status = 0
    for _, program, child in sweeps.directories(directory, run):
        sweeps.make_directory(child)
        with child.locked():
            sweeps.prepare(child, program)
            world, state = _restore(child, program)
            one = _go_on(child, program, world, state, interrupt, place, new_metrics=new_metrics)
        if one > 1:
            print(f"all programs of this sweep {_how_to_go_on(directory)}")
            return one
        status = max(status, one)
    return status if sweeps.sum_up(directory, run) else 1


def _go_on(
    directory: RunDirectory,
    run: Run,
    world: World,
    state: TrainState | None,
    interrupt: progress.Interrupt,
    place: devices.Place,
    *,
    new_metrics: bool = False,
) -> int:
    """Trains from a state to the end of the run, and sums the run up."""
    try:
        with distributed.recorder(directory, run, state, new_metrics=new_metrics) as record:
            directory.write(run)
            progress.print_start(run, directory.path, _iterations(state))
            is_done, state = _advance(directory, run, world, state, record, interrupt, place)
            record.finish()
        if record.gap is not None:
            first, last = record.gap
            progress.error(
                f"{directory.metrics} lacks iterations {first} to {last}, which could not be written"
            )
        if not is_done:
            assert interrupt.requested is not None  # nothing else stops a run early
            print(f"stopped at iteration {_iterations(state)}; {_how_to_go_on(directory)}")
            return 128 + interrupt.requested
        is_good = _sum_up(directory, run, world, state)
    except KeyboardInterrupt:  # at once: what the last checkpoint has is kept
        print(_how_to_go_on(directory))
        raise
    return 0 if record.gap is None and is_good else 1


def _advance(
    directory: RunDirectory,
    run: Run,
    world: World,
    state: TrainState | None,
    record: Recorder,
    interrupt: progress.Interrupt,
    place: devices.Place,
) -> tuple[bool, TrainState]:
    """Trains to the end of the run, or until a signal; whether the end was reached, and the last state, saved."""
    before, start, timing = (0, 0), time.perf_counter(), ""
    if state is None:
        if run.settings:
            state = first_settings(run.configs, world, jax.random.key(run.seed), run.seeds)
        else:
            state = first_state(run.config, world, jax.random.key(run.seed), n_seeds=run.seeds)
        record.checkpoint(state)  # whenever the run dies from here on, there is something to go on from
    elif _iterations(state) == iterations_for(run.configs[0], run.total_timesteps):
        return True, state
    else:
        before = (grpo_jax.count(state.decision_steps), grpo_jax.count(state.simulator_steps))
    preparation = time.perf_counter() - start
    episode_return = float("nan")
    with progress.Progress(*before) as show:

        def callback(chunk: grpo_jax.Chunk) -> bool:
            nonlocal timing, episode_return
            interrupt.can_wait = True
            rates = show(chunk)
            record(chunk, rates)
            timing = (
                f"compiled in {preparation + chunk.compile_seconds:.1f} s, trained in {chunk.seconds:.1f} s"
            )
            timing += f" ({progress.rates_text(*rates.values())})"
            episode_return = float(np.mean(chunk.metrics["episode_return"][..., -1]))
            interrupt.agree()
            return interrupt.requested is None or not run.can_stop(chunk.iteration)

        try:
            train: Any = run_settings if run.settings else grpo_jax.run
            state, _ = train(
                run.configs if run.settings else run.config,
                world,
                jax.random.key(run.seed),
                run.total_timesteps,
                callback=callback,
                callback_at=run.cadence[1],
                state=state,
                n_seeds=run.seeds,
                opponent_every=run.opponent_every,
                **place._asdict(),
            )
        except FloatingPointError as error:
            raise FloatingPointError(f"{error}. {record.last_good()}") from error
        interrupt.agree()  # one that came since
        state = shards.gather(state)
        try:
            record.checkpoint(state, episode_return)
        except OSError as error:
            raise NotSaved(f"{error}. {record.last_good()}; {_how_to_go_on(directory)}") from error
    interrupt.can_wait = False
    print(timing)
    is_over = bool(run.settings) and interrupt.requested is None  # where no agent of a sweep is left
    return is_over or _iterations(state) == iterations_for(run.configs[0], run.total_timesteps), state


def _sum_up(directory: RunDirectory, run: Run, world: World, state: TrainState) -> bool:
    """Writes what a finished run leaves, and plays it, or compares a sweep's settings; whether these have a score."""
    if jax.process_index() > 0:
        return True
    try:
        grpo_jax.save(directory.policy, state.learner.policy)
    except OSError as error:
        raise NotSaved(
            f"{error}. All of the run is in {directory.checkpoint}; {_how_to_go_on(directory)}"
        ) from error
    if run.settings:
        is_good = sweeps.sum_up(directory, run)
        _print_files(directory)
        return is_good
    try:
        curve = directory.read_metrics(("decision_steps", "episode_return"))
        plots.learning_curve(directory.learning_curve, *curve.values(), title=f"GRPO on {run.env}")
    except (OSError, ValueError) as error:
        progress.warn(f"no picture of the run was drawn ({error})")
    _play(run, lambda _: world, state, _evaluation_key(run.seed), FINAL_EPISODES, deterministic=False)
    _print_files(directory)
    return True


def _print_files(directory: RunDirectory) -> None:
    files = (*directory.files, *directory.sweep_files)
    print("written:", *(file for file in files if file.exists()), sep="\n  ")


def _how_to_go_on(directory: RunDirectory) -> str:
    return f"go on with: grpo-jax resume {directory.path}"


def _evaluate(options: Evaluate) -> int:
    directory = RunDirectory(options.directory)
    run, state = directory.read(), None
    if options.render is not None:
        render.without_window()
    if run.settings:
        run, world, state = sweeps.best(directory, run, options.checkpoint)
    else:
        world, state = directory.restore(run, options.checkpoint)
    if options.opponent == "self":
        check_opponent(world)
    if options.render is not None:
        render.check(world, options.render)
    if state is None:
        raise FileNotFoundError(
            f"directory={directory.path} has no checkpoint yet: start it anew by `grpo-jax resume {directory.path}`"
        )
    key = _evaluation_key(run.seed if options.seed is None else options.seed)
    against = ", against itself" if options.opponent == "self" else ""
    print(f"{run.env}, {directory.path} at iteration {_iterations(state)}{against}")
    deterministic, plan = options.deterministic, _plan_of(run, options)

    def game(state: TrainState) -> World:
        is_self = options.opponent == "self"
        return grpo_jax.against(world, state, deterministic=deterministic) if is_self else world

    _play(run, game, state, key, options.n_episodes, deterministic=deterministic, plan=plan)
    if options.render is not None:
        one = state if run.vmapped is None else jax.tree.map(lambda leaf: leaf[0], state)
        n_frames, earned = render.render(
            one, game(one), key, options.render, deterministic=deterministic, plan=plan
        )
        print(f"{options.render}: {n_frames} frames, return {earned:.2f}")
    return 0


def _plan_of(run: Run, options: Evaluate) -> grpo_jax.Plan | None:
    if not options.plan:
        if options.plan_horizon is not None or options.plan_rollouts != grpo_jax.Plan.n_rollouts:
            raise ValueError("--plan-horizon and --plan-rollouts change a plan: give --plan too")
        return None
    changes = {} if options.plan_horizon is None else {"horizon": options.plan_horizon}
    return grpo_jax.Plan.of(run.config, n_rollouts=options.plan_rollouts, **changes)


def _play(
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

    def play(state: TrainState, key: jax.Array) -> grpo_jax.Episodes:
        return grpo_jax.evaluate_episodes(
            state, game(state), key, n_episodes, deterministic=deterministic, plan=plan
        )

    start = time.perf_counter()
    if run.vmapped is None:
        episodes = jax.tree.map(lambda leaf: leaf[None], play(state, key))
    else:
        agents = (state, jax.random.split(key, run.n_seeds))
        world = game(jax.tree.map(lambda leaf: leaf[0], state))
        block = default_block(run.config, world, run.n_seeds)
        episodes = over_agents(lambda agent: play(*agent), agents, block)
    jax.block_until_ready(episodes)
    progress.print_results(episodes, time.perf_counter() - start, deterministic=deterministic)
    if plan is not None:
        steps, decisions = grpo_jax.count(episodes.simulator_steps), int(episodes.lengths.sum())
        print(f"planned: {steps:,} simulator steps, {steps / decisions:,.0f} for a decision")


def _iterations(state: TrainState | None) -> int:
    return 0 if state is None else int(state.iteration.max())


def _evaluation_key(seed: int) -> jax.Array:
    return jax.random.fold_in(jax.random.key(seed), _EVALUATION)
