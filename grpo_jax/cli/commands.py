"""The commands: ``grpo-jax train | resume | evaluate | plot | report | envs``, and training."""

from __future__ import annotations

import dataclasses
import signal
import sys
import time
import warnings
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np

import grpo_jax
from grpo_jax import shards
from grpo_jax.cache import enable_cache
from grpo_jax.cli import devices, distributed, evaluation, plots, progress, sweeps
from grpo_jax.cli.envs import envs
from grpo_jax.cli.flags import FINAL_EPISODES, Envs, Evaluate, Plot, Resume, Train, parse, swept
from grpo_jax.cli.plot import plot
from grpo_jax.cli.recorder import Recorder
from grpo_jax.cli.report import report
from grpo_jax.cli.runs import Run, RunDirectory
from grpo_jax.config import GRPOConfig
from grpo_jax.files import UnsealedWarning
from grpo_jax.training.loop import TrainState, in_parts, iterations_for
from grpo_jax.training.run import first_state
from grpo_jax.training.self_play import check_opponent
from grpo_jax.training.sweep import check_program, expand, first_settings, run_settings
from grpo_jax.worlds.base import World


class NotSaved(Exception):
    """What a run came to cannot be written."""


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command.

    Args:
      argv: the arguments, without the program's name; None: those of the process.

    Returns:
      0: all is well; 1: training itself failed, or something could not be written; 2: bad input; 130: stopped by
      Ctrl-C; 141: whoever read the output stopped reading; 143: stopped by SIGTERM.
    """
    processes = distributed.Processes()
    return processes.end(_main(sys.argv[1:] if argv is None else list(argv), processes))


def _main(argv: list[str], processes: distributed.Processes) -> int:
    options = None
    try:
        try:
            options = parse(argv)
            status = _do(options, processes)
        except SystemExit as stop:  # help, and complaints of the parser; or rich found a closed pipe
            if isinstance(stop.__context__, BrokenPipeError):
                raise stop.__context__ from None
            status = int(stop.code or 0)
        sys.stdout.flush()  # else it is done as Python ends, which complains about a closed pipe
        return status
    except BrokenPipeError:
        return _without_reader(options)
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


def _do(options: Any, processes: distributed.Processes) -> int:
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
                return evaluation.evaluate(options)
            case Plot():
                return plot(options)
            case Envs():
                return envs(options.suite)
            case _:
                return report(options)


def _without_reader(options: Any) -> int:
    """Ends quietly where the output's reader is gone, as ``head`` is; a run that was cut off says how to go on with it."""
    progress.drop_output()
    if isinstance(options, Train | Resume):
        path = options.out if isinstance(options, Train) else options.directory
        progress.error(f"nobody reads the output any more; {_how_to_go_on(RunDirectory(path))}")
    return 141  # 128 + SIGPIPE, as a shell says; Windows has no such signal


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
        world, state = _restore(directory, run, place)
        return _go_on(directory, run, world, state, interrupt, place, new_metrics=options.new_metrics)


def _restore(directory: RunDirectory, run: Run, place: devices.Place) -> tuple[World, TrainState | None]:
    """The world and the state to go on from."""
    world, state = directory.restore(run, mesh=place.mesh)
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
        child.make_program()
        with child.locked():
            sweeps.prepare(child, program)
            world, state = _restore(child, program, place)
            one = _go_on(child, program, world, state, interrupt, place, new_metrics=new_metrics)
        if one > 1:
            print(f"all programs of this sweep {_how_to_go_on(directory)}")
            return one
        status = max(status, one)
    if jax.process_index() > 0:
        return status
    return status if sweeps.sum_up(directory.own(), run) else 1


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
        # Nobody needs the environments any more, which may be large.
        is_good = _sum_up(directory, run, world, shards.gather(state.replace(environments=None)))
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
        if place.mesh is not None:
            has_agents = run.vmapped is not None
            state = shards.place(
                state, place.mesh, in_parts(state, run.configs[0].n_shards, has_agents=has_agents)
            )
        record.checkpoint(state)  # whenever the run dies from here on, there is something to go on from
    elif _iterations(state) == iterations_for(run.configs[0], run.total_timesteps):
        return True, state
    else:
        steps = shards.gather((state.decision_steps, state.simulator_steps))
        before = (grpo_jax.count(steps[0]), grpo_jax.count(steps[1]))
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
        is_good = sweeps.sum_up(directory.own(), run)
        _print_files(directory)
        return is_good
    try:
        curve = directory.read_metrics(("decision_steps", "episode_return"))
        plots.learning_curve(directory.learning_curve, *curve.values(), title=f"GRPO on {run.env}")
    except (OSError, ValueError) as error:
        progress.warn(f"no picture of the run was drawn ({error})")
    key = evaluation.evaluation_key(run.seed)
    evaluation.play(run, lambda _: world, state, key, FINAL_EPISODES, deterministic=False)
    _print_files(directory)
    return True


def _print_files(directory: RunDirectory) -> None:
    files = (*directory.files, *directory.sweep_files)
    print("written:", *(file for file in files if file.exists()), sep="\n  ")


def _how_to_go_on(directory: RunDirectory) -> str:
    return f"go on with: grpo-jax resume {directory.path}"


def _iterations(state: TrainState | None) -> int:
    return 0 if state is None else int(state.iteration.max())
