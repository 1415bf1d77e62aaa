"""What is compiled, kept on disk, and told: the first update of a process may take longer than all that follow."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator

import jax

TOLD_SECONDS = 1.0
_EVENT = "/jax/core/compile/backend_compile_duration"
_seconds = 0.0  # that XLA took in this process, programs that were loaded from disk included


def _count(event: str, duration_secs: float, **_: str | int) -> None:
    global _seconds
    if event == _EVENT:
        _seconds += duration_secs


jax.monitoring.register_event_duration_secs_listener(_count)


@contextlib.contextmanager
def telling(say: Callable[[str], None], what: str) -> Iterator[None]:
    """Says how long compiling ``what`` took, where that was long."""
    before = _seconds
    yield
    if (seconds := _seconds - before) >= TOLD_SECONDS:
        say(f"GRPO: compiling {what} took {seconds:.1f} s; later ones do not wait for it")
