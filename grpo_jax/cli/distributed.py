"""Several processes: how they find each other, which of them writes, and what is said where one is lost.

The first process alone owns the run's directory. What it finds or decides there (a run that lies there already, that a
checkpoint is due) is told to the others, so that no process waits for one that went another way.
"""

from __future__ import annotations

import contextlib
import os
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

import grpo_jax
from grpo_jax import shards
from grpo_jax.cli import parts, progress
from grpo_jax.cli.flags import Hosts
from grpo_jax.cli.recorder import Recorder
from grpo_jax.cli.runs import Run, RunDirectory
from grpo_jax.training.checkpoint import check_size, shapes
from grpo_jax.training.loop import TrainState
from grpo_jax.training.run import Chunk
from grpo_jax.worlds.base import World

HEARTBEAT_SECONDS = 30
"""A process that was not heard of for so long is lost."""
GOODBYE_SECONDS = 10
"""How long a process that ends waits for the others to end, too."""

# JAX ends a process by abort() where it learns that another one is lost: nothing in it can say a word any more.
_WATCHER = "import sys\nlast = ''\nfor last in sys.stdin: pass\nsys.stderr.write(last.strip() and last)"

# What XLA reports where a process that it communicates with is gone.
_OF_OTHERS = re.compile(
    "UNKNOWN|INTERNAL|UNAVAILABLE|CANCELLED|ABORTED|DEADLINE_EXCEEDED|FAILED_PRECONDITION"
)

T = TypeVar("T")
_PROBLEMS = (ValueError, TypeError, OverflowError, OSError, ImportError)


class Processes:
    """The processes of a command, this one and the others; a command without ``--distributed`` has one."""

    def __init__(self) -> None:
        self._watcher: subprocess.Popen[str] | None = None
        self._name, self._words = "", ""
        self._is_in_step = False

    def begin(self, options: Any) -> None:
        """Joins the others, where the command is ``--distributed``; called before anything touches a device.

        Raises:
          ValueError: flags that do not fit, or no way to find the others.
        """
        hosts: Hosts = getattr(options, "hosts", Hosts())
        _check(hosts)
        if not hosts.distributed:
            return
        self._name = "this process" if hosts.process_id is None else f"process {hosts.process_id}"
        self._watcher = subprocess.Popen(
            [sys.executable, "-I", "-S", "-c", _WATCHER],
            stdin=subprocess.PIPE,
            text=True,
            start_new_session=True,  # Ctrl-C is not for it
        )
        self.say("The processes had not found each other yet")
        with contextlib.suppress(AttributeError):  # not every JAX has it
            jax.config.update("jax_enable_preemption_service", False)  # it would take SIGTERM away from us
        try:
            jax.distributed.initialize(
                hosts.coordinator,
                hosts.num_processes,
                hosts.process_id,
                heartbeat_timeout_seconds=HEARTBEAT_SECONDS,
                shutdown_timeout_seconds=GOODBYE_SECONDS,
            )
        except (ValueError, RuntimeError) as error:
            self._dismiss()
            raise ValueError(
                f"--distributed: the processes did not find each other ({error}). Give --coordinator HOST:PORT (of process 0),"
                " --num-processes and --process-id, to each its own"
            ) from error
        self._name = f"process {jax.process_index()} of {jax.process_count()}"
        self.say("Training had not begun yet")
        if jax.process_index() > 0:
            sys.stdout = open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115 - until the process ends

    def directory(self, path: Path) -> RunDirectory:
        """The directory of a run."""
        return RunDirectory(path) if self._watcher is None else SharedDirectory(path, self.say)

    def say(self, words: str) -> None:
        """What to print about the run, should this process be ended."""
        self._words = words
        if self._watcher is not None and self._watcher.stdin is not None:
            text = f"error: {self._name} was ended: it was killed, or another process of the run was lost. {words}"
            with contextlib.suppress(OSError):  # somebody killed the watcher: the run goes on
                self._watcher.stdin.write(f"{text}\n")
                self._watcher.stdin.flush()

    def warn(self, message: Warning | str, *_: Any, **__: Any) -> None:
        """Prints a warning, once for all processes."""
        if self._watcher is None or jax.process_index() == 0:
            progress.warn(str(message))

    def together(self, command: Callable[[], int]) -> int:
        """Runs a command that all processes run; the exit status is that of the first.

        Raises:
          JaxRuntimeError: another process was lost, and what to do now; or as the command raises it.
        """
        try:
            status = command()
            if self._watcher is not None:
                status = shards.agreed(status)
        except (jax.errors.JaxRuntimeError, ValueError) as error:  # jaxlib raises both
            if self._watcher is None or not _OF_OTHERS.match(str(error)):
                raise
            raise jax.errors.JaxRuntimeError(
                f"{self._name}: another process of the run was lost ({error}). {self._words}"
            ) from error
        self._is_in_step = True
        return status

    def end(self, status: int) -> int:
        """Takes leave of the others; where this process fails alone it ends at once, and they hear of it."""
        if self._watcher is None:
            return status
        self._dismiss()
        sys.stdout.flush()
        sys.stderr.flush()
        if status == 1 and not self._is_in_step:
            os._exit(status)  # threads of JAX may wait for those that are lost
        try:
            jax.distributed.shutdown()
        except RuntimeError:
            os._exit(status or 1)
        return status

    def _dismiss(self) -> None:
        if self._watcher is not None:
            self._watcher.communicate("\n")  # there is nothing to say
            self._watcher = None


def _check(hosts: Hosts) -> None:
    given = {
        "--coordinator": hosts.coordinator,
        "--num-processes": hosts.num_processes,
        "--process-id": hosts.process_id,
    }
    missing = [name for name, value in given.items() if value is None]
    if not hosts.distributed:
        if len(missing) < len(given):
            raise ValueError(f"{', '.join(set(given) - set(missing))}: add --distributed")
    elif 0 < len(missing) < len(given):
        raise ValueError(
            f"{' and '.join(missing)} missing: give all of {', '.join(given)}, or none where JAX finds them"
        )
    elif not missing and not 0 <= (hosts.process_id or 0) < (hosts.num_processes or 0):
        raise ValueError(
            f"--process-id={hosts.process_id} must be from 0 to --num-processes={hosts.num_processes} less 1"
        )


class SharedDirectory(RunDirectory):
    """The run directory of several processes: the first one does what is asked, the others hear what came of it."""

    def __init__(self, path: Path, say: Callable[[str], None]) -> None:
        """Names the files; ``say`` is that of ``Processes``."""
        super().__init__(path)
        self._own, self.say = RunDirectory(path), say

    def first(self, action: Callable[[], T]) -> T | None:
        """What the first process' action returns; None in the others. Where it fails, all end.

        Raises:
          ValueError, TypeError, OverflowError, OSError, ImportError: as the action does, in the first process.
          SystemExit: in the others.
        """
        done, problem = None, None
        if jax.process_index() == 0:
            try:
                done = action()
            except _PROBLEMS as error:
                problem = error
        if shards.agreed(problem is not None):
            raise problem or SystemExit(2)
        return done

    @contextlib.contextmanager
    def locked(self) -> Iterator[None]:
        """As in one process."""
        with contextlib.ExitStack() as stack:
            self.first(lambda: stack.enter_context(self._own.locked()))
            yield

    def check_free(self, *, overwrite: bool = False) -> None:
        """As in one process."""
        self.first(lambda: self._own.check_free(overwrite=overwrite))

    def check_run(self) -> None:
        """As in one process."""
        self.first(self._own.check_run)

    def own(self) -> RunDirectory:
        """As in one process: for the first one."""
        return self._own

    def is_new(self) -> bool:
        """As in one process."""
        return bool(shards.agreed(self._own.is_new()))

    def make(self) -> None:
        """As in one process."""
        self.first(self._own.make)

    def make_program(self) -> None:
        """As in one process."""
        self.first(self._own.make_program)

    def program(self, index: int) -> RunDirectory:
        """As in one process."""
        return SharedDirectory(self._own.program(index).path, self.say)

    def create(self, run: Run, *, overwrite: bool = False) -> None:
        """As in one process."""
        self.first(lambda: self._own.create(run, overwrite=overwrite))

    def write(self, run: Run) -> None:
        """As in one process."""
        self.first(lambda: self._own.write(run))

    def read(self) -> Run:
        """As in one process."""
        return Run.from_json(self._told(lambda: self._own.read().to_json()))[0]

    def _told(self, action: Callable[[], str]) -> str:
        """The words that the first process' action returns, in all of them."""
        text = (self.first(action) or "").encode()
        content = np.zeros(shards.agreed(len(text)), np.uint8)
        content[: len(text)] = np.frombuffer(text, np.uint8)
        return bytes(np.asarray(shards.from_first(content))).decode()

    def restore(
        self, run: Run, checkpoint: Path | None = None, *, mesh: Mesh | None = None
    ) -> tuple[World, TrainState | None]:
        """As in one process: nobody but the first one needs to see the file; parts are read by all."""
        path = checkpoint or self.checkpoint
        if name := self._told(lambda: (path.exists() and parts.name_in(path)) or ""):
            world = grpo_jax.make(run.env)
            return world, self.restore_parts(run, world, name, mesh)
        found = self.first(lambda: self._own.restore(run, checkpoint))
        world, state = found or (grpo_jax.make(run.env), None)
        if not shards.agreed(state is not None):
            return world, None
        if state is None:
            template = shapes(run.configs[0], world, run.vmapped)
            state = jax.tree.map(lambda leaf: jnp.empty(leaf.shape, leaf.dtype), template)
        restored: TrainState = shards.from_first(state)
        return world, restored


def recorder(
    directory: RunDirectory, run: Run, state: TrainState | None, *, new_metrics: bool = False
) -> Recorder:
    """What writes a run: a ``Recorder``, of several processes the first one's; arguments as there."""
    if not isinstance(directory, SharedDirectory):
        return Recorder(directory, run, state, new_metrics=new_metrics)
    if state is not None:  # what they ask of it, whole in each of them
        state = shards.gather(state.replace(learner=None, environments=None))
    leader = directory.first(lambda: _Leader(directory, run, state, new_metrics=new_metrics))
    return leader or _Follower(directory, run, state)


class _Leader(Recorder):
    """Writes the parts of all processes, when its clock says so."""

    def is_due(self, chunk: Chunk) -> bool:
        return bool(shards.agreed(super().is_due(chunk)))

    def checkpoint(self, state: TrainState, episode_return: float = float("nan")) -> None:
        super().checkpoint(state, episode_return)
        assert isinstance(self._directory, SharedDirectory)
        self._directory.say(_words(self.last_good(), self._directory))


class _Follower(Recorder):
    """Writes nothing; hands its parts to the first process when that asks for them."""

    def __init__(self, directory: SharedDirectory, run: Run, state: TrainState | None) -> None:
        self._directory, self._run, self.gap = directory, run, None
        self._saved_iteration = self._done = 0 if state is None else int(np.max(np.asarray(state.iteration)))

    def __exit__(self, *_: Any) -> None:
        pass

    def __call__(self, chunk: Chunk, rates: dict[str, float]) -> None:
        self._done = chunk.iteration
        if shards.agreed(False):
            self.checkpoint(chunk.state)

    def checkpoint(self, state: TrainState, episode_return: float = float("nan")) -> None:
        self.content(state, {})
        self._saved_iteration = self._done
        assert isinstance(self._directory, SharedDirectory)
        self._directory.say(_words(self.last_good(), self._directory))

    def content(self, state: TrainState, notes: dict[str, Any]) -> bytes:
        if self._is_in_parts(state):
            parts.write(self._directory.parts, state, self._done)
        else:
            check_size(state)
            for part in jax.tree.leaves(state):  # one after the other: they are not kept here
                shards.gather(part)
        return b""

    def finish(self) -> None:
        pass


def _words(last_good: str, directory: RunDirectory) -> str:
    return f"{last_good}. Go on, with as many processes as there are, by: grpo-jax resume {directory.path} --distributed"
