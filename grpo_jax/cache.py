"""Compiling: the cache on disk, from which later processes load programs, and programs that are soon compiled."""

from __future__ import annotations

import functools
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from grpo_jax.types import backend, is_traced

MIN_SECONDS = 0.1
"""Programs that compile faster are not worth a file."""

LOOPS: dict[str, str | bool] = {"xla_cpu_experimental_ynn_fusion_type": ""}
"""Options for loops over worlds: sums stay in XLA's own loops. From some 2,048 rows on jax 0.10 gives them to YNNPACK, with which a step of
Brax' inverted pendulum, in 4,096 branches, takes 64 microseconds instead of 7."""

QUICK: dict[str, str | bool] = LOOPS | {
    "xla_cpu_use_fusion_emitters": False,
    "xla_cpu_parallel_codegen_split_count": "1",
}
"""Options for programs that run once, or for seconds, or are small, on a CPU: they compile in 0.5 to 0.65 of the time. What they
then take is level where twins are stepped (0.9 to 1.05), a quarter more in loops of branches with feature maps, and 1.6 times
as much in an update, measured with jax 0.10.2. Not every XLA knows them all.
"""

_KNOWN = jax.__version_info__[:2] == (0, 10)

quick_jit = functools.partial(jax.jit, compiler_options=QUICK if _KNOWN else None)
"""``jax.jit`` with ``QUICK``, where XLA knows them; within another ``jit`` it is refused."""

loop_jit = functools.partial(jax.jit, compiler_options=LOOPS if _KNOWN else None)
"""The same with ``LOOPS``."""


class LoopJit:
    """``loop_jit`` of a function that may also be part of another program, as which it is a ``jax.jit`` like any other."""

    def __init__(self, function: Callable[..., Any], **options: Any) -> None:
        self.nested, self.alone = jax.jit(function, **options), loop_jit(function, **options)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        # Within a jit new arrays are traced, too; in a gradient or a vmap only some of the arguments are. NumPy's 0: nothing
        # is compiled for it.
        is_part = is_traced(args, kwargs, jnp.asarray(np.float32(0.0)))
        return (self.nested if is_part else self.alone)(*args, **kwargs)


def compile_quickly(lowered: jax.stages.Lowered) -> jax.stages.Compiled:
    """Compiles a program whose own speed matters less than the wait for it."""
    return _compiled(lowered, QUICK)


def compile_loop(lowered: jax.stages.Lowered) -> jax.stages.Compiled:
    """Compiles a program that runs for long."""
    return _compiled(lowered, LOOPS)


def _compiled(lowered: jax.stages.Lowered, options: dict[str, str | bool]) -> jax.stages.Compiled:
    """With the options, on a CPU whose XLA knows them."""
    if backend() == "cpu":
        try:
            return lowered.compile(compiler_options=options)
        except jax.errors.JaxRuntimeError as error:
            if "No such compile option" not in str(error):
                raise
    return lowered.compile()


def enable_cache(directory: str | os.PathLike[str] | None = None) -> Path:
    """Turns XLA's persistent cache on, for this process; one that the user has set up already stays.

    ``JAX_ENABLE_COMPILATION_CACHE=0`` in the environment leaves every cache unused. The SB3 object and the CLI call this by
    themselves (``cache=False``, ``--no-cache``: not). Old programs may be deleted at any time.

    Args:
      directory: where compiled programs are kept; None: ``grpo-jax/xla`` in the user's cache folder.

    Returns:
      The folder in use.
    """
    configured = jax.config.jax_compilation_cache_dir  # type: ignore[attr-defined]
    if configured is not None:
        return Path(configured)
    if directory is None:
        home = os.environ.get("XDG_CACHE_HOME")
        directory = (Path(home) if home else Path.home() / ".cache") / "grpo-jax" / "xla"
    jax.config.update("jax_compilation_cache_dir", os.fspath(directory))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", MIN_SECONDS)
    return Path(directory)
