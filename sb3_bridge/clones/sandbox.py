"""A forked child in which an environment may be played, and this process notices nothing of it."""

from __future__ import annotations

import contextlib
import ctypes
import gc
import io
import os
import pickle
import random
import select
import signal
import stat
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

from sb3_bridge.clones.copying import Unclonable

CAN_FORK = sys.platform.startswith("linux") and os.path.isdir("/proc/self/fd")
if CAN_FORK:
    import fcntl
# Until a child that does not go on, or does not end, is given up.
_SILENCE_SECONDS, _ALL_SECONDS = 20.0, 120.0
_COPIED_BYTES = 1 << 26  # of an open file, so that the child can go on reading it
_ALWAYS = (os.devnull, "/dev/urandom", "/dev/random")
_WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND
_EVENTS = {
    "changes files": "os.mkdir os.rename os.remove os.rmdir os.link os.symlink os.truncate os.chmod os.chown os.utime"
    " shutil.copyfile shutil.move shutil.rmtree sqlite3.connect",
    "uses a connection": "socket.connect socket.bind socket.sendto socket.sendmsg",
    "starts a program": "subprocess.Popen os.system os.exec os.spawn os.posix_spawn",
    "starts or ends processes": "os.fork os.forkpty os.kill",
}
_REFUSED = {event: what for what, events in _EVENTS.items() for event in events.split()}
_SCRATCH = np.random.MT19937(0)  # what draws from NumPy's global generator meanwhile gets

_STATE: dict[str, Any] = {"pipe": -1, "refused": []}  # of the child


def kept_normal() -> tuple[int, float]:
    """The second of two normal numbers, which NumPy's global generator keeps for the next call; 0 where there is none."""
    state: Any = np.random.mtrand._rand.get_state()
    return state[3:]


def keep_normal(kept: tuple[int, float]) -> None:
    """Gives it back to NumPy's global generator."""
    if kept[0]:
        state: Any = np.random.mtrand._rand.get_state()
        np.random.mtrand._rand.set_state((*state[:3], *kept))


@contextlib.contextmanager
def global_generators_kept(*, with_normal: bool = True) -> Iterator[None]:
    """The generators of ``random``, NumPy and torch come out as they went in; of ``with_normal`` see ``kept_normal``."""
    torch: Any = sys.modules.get("torch")
    ours, bits = random.getstate(), np.random.get_bit_generator()  # type: ignore[attr-defined]
    normal = kept_normal() if with_normal else (0, 0.0)
    theirs = None if torch is None else torch.get_rng_state()
    np.random.set_bit_generator(_SCRATCH)  # type: ignore[attr-defined]
    try:
        yield
    finally:
        np.random.set_bit_generator(bits)  # type: ignore[attr-defined]
        keep_normal(normal)
        random.setstate(ours)
        if torch is not None:
            torch.set_rng_state(theirs)


def global_generators() -> dict[str, bytes]:
    """What tells whether ``random``, NumPy's or torch's global generator was drawn from."""
    states: dict[str, Any] = {"random": random.getstate(), "np.random": np.random.mtrand._rand.get_state()}
    if "torch" in sys.modules:
        states["torch"] = sys.modules["torch"].get_rng_state().numpy()
    return {name: pickle.dumps(state) for name, state in states.items()}


def here(work: Callable[[], Any]) -> Any:
    """What ``work`` returns; whatever it raises is :class:`Unclonable`, as an environment's own code may raise anything."""
    with global_generators_kept():
        try:
            return work()
        except Unclonable:
            raise
        except Exception as error:
            raise Unclonable(f"{type(error).__name__} {error}".strip()) from error


def in_child(work: Callable[[], Any]) -> Any:
    """What ``work`` returns in a forked child, which sees all of this process and can change nothing outside of itself.

    Files that are open for writing are replaced by copies, pipes and sockets by nothing. Opening a file for writing,
    connections and programs are refused, and so is a ``work`` that wrote into a file that was open.

    Raises:
      Unclonable: what ``work`` raised, or did outside of itself.
    """
    files = _written_files()
    # File objects hold back what they write. A child would touch all memory if it looked for them.
    buffers = [one for one in gc.get_objects() if io.IOBase in type(one).__mro__] if files else []
    reader, writer = os.pipe()
    drawn = random.getstate()  # a fork seeds it anew
    # JAX and Python >= 3.12 warn of forks beside threads: the child needs none.
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        pid = os.fork()
    if pid == 0:
        _child(work, reader, writer, drawn, files, buffers)
    os.close(writer)
    try:
        is_fine, result = _wait(reader)
    finally:
        os.close(reader)
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)  # it has nothing more to say
        with contextlib.suppress(ChildProcessError):  # where SIGCHLD is ignored
            os.waitpid(pid, 0)
    if not is_fine:
        raise Unclonable(result)
    return result


def going_on() -> None:
    """Called by ``work`` now and then, so that a child that hangs can be told from one that takes its time."""
    if _STATE["pipe"] >= 0:
        os.write(_STATE["pipe"], b".")


def _wait(reader: int) -> tuple[bool, Any]:
    received, started = bytearray(), time.monotonic()
    while True:
        ready, _, _ = select.select([reader], [], [], _SILENCE_SECONDS)
        if not ready or time.monotonic() - started > _ALL_SECONDS:
            return False, f"the replay check did not end within {time.monotonic() - started:.0f} s"
        chunk = os.read(reader, 1 << 16)
        if not chunk:
            break
        received += chunk
    message = bytes(received).lstrip(b".")
    if not message:
        return False, "the process of the replay check died, as by a crash in a library's code"
    return pickle.loads(message)


def _child(
    work: Callable[[], Any], reader: int, writer: int, drawn: Any, files: dict[int, str], buffers: list[Any]
) -> None:
    answer: tuple[bool, Any]
    try:
        try:
            gc.disable()
            os.close(reader)
            ctypes.CDLL(None).prctl(
                1, signal.SIGKILL
            )  # PR_SET_PDEATHSIG: it dies with the process that waits for it
            _seal(writer, files, buffers)
            _STATE.update(pipe=writer, refused=[])
            if "torch" in sys.modules:
                sys.modules["torch"].set_num_threads(1)  # its threads were not forked
            random.setstate(drawn)
            sys.addaudithook(_audit)
            answer = True, here(work)
        except BaseException as error:
            answer = False, str(error) or type(error).__name__
        _flush(buffers)
        _STATE["refused"] += [f"writes to {name}" for fd, name in files.items() if os.fstat(fd).st_mtime_ns]
        if _STATE["refused"]:
            answer = False, f"reset or step {_STATE['refused'][0]}: branches would do so too"
        message = pickle.dumps(answer)
        while message:
            message = message[os.write(writer, message) :]
    finally:
        os._exit(0)


def _printed() -> set[int]:
    """Where ``print`` goes; that need not be kept apart, and is lost in a child."""
    found = {1, 2}
    for stream in (sys.stdout, sys.stderr, sys.__stdout__, sys.__stderr__):
        with contextlib.suppress(Exception):
            found.add(stream.fileno())  # type: ignore[union-attr]
    return found


def _written_files() -> dict[int, str]:
    """Names of the files that are open for writing."""
    found, printed = {}, _printed()
    for fd in map(int, os.listdir("/proc/self/fd")):
        with contextlib.suppress(OSError):  # it was the listing's own
            access = fcntl.fcntl(fd, fcntl.F_GETFL) & os.O_ACCMODE
            if stat.S_ISREG(os.fstat(fd).st_mode) and access != os.O_RDONLY and fd not in printed:
                found[fd] = os.readlink(f"/proc/self/fd/{fd}")
    return found


def _seal(pipe: int, files: dict[int, str], buffers: list[Any]) -> None:
    """Cuts off all that is open for writing; files get stand-ins, by which writing is noticed."""
    sys.dont_write_bytecode = True
    nowhere, printed = os.open(os.devnull, os.O_RDWR), _printed()
    for fd in map(int, os.listdir("/proc/self/fd")):
        with contextlib.suppress(OSError):
            mode = os.fstat(fd).st_mode
            if fd not in (pipe, nowhere) and (fd in printed or stat.S_ISSOCK(mode) or stat.S_ISFIFO(mode)):
                os.dup2(nowhere, fd)
    for fd in files:
        access, size = fcntl.fcntl(fd, fcntl.F_GETFL) & os.O_ACCMODE, os.fstat(fd).st_size
        twin = os.memfd_create("copy")
        if access == os.O_RDWR and size <= _COPIED_BYTES:
            os.write(twin, os.pread(fd, size, 0))
        os.ftruncate(twin, size)
        os.lseek(twin, os.lseek(fd, 0, os.SEEK_CUR), os.SEEK_SET)
        os.dup2(twin, fd)
        os.close(twin)
    sys.stdout = sys.stderr = open(nowhere, "w")  # noqa: SIM115
    _flush(buffers)  # what this process has not written yet is no doing of the child
    for fd in files:
        os.utime(fd, ns=(0, 0))


def _flush(buffers: list[Any]) -> None:
    for one in buffers:
        with contextlib.suppress(Exception):
            one.flush()


def _audit(event: str, arguments: tuple[Any, ...]) -> None:
    if event == "open":
        path, _, flags = arguments
        if isinstance(path, int) or not flags & _WRITING or path in _ALWAYS:
            return
        what = f"opens {path} for writing"
    elif event in _REFUSED:
        what = f"{_REFUSED[event]} ({event} {', '.join(map(repr, arguments[:1]))})"
    else:
        return
    _STATE["refused"].append(what)
    raise PermissionError(f"refused in the replay check: {what}")
