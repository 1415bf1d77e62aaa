"""Compiling: the cache on disk, from which later processes load programs, and programs that are soon compiled."""

from __future__ import annotations

import functools
import os
from pathlib import Path

import jax

MIN_SECONDS = 0.1
"""Programs that compile faster are not worth a file."""

QUICK: dict[str, str | bool] = {
    "xla_cpu_use_fusion_emitters": False,
    "xla_cpu_parallel_codegen_split_count": "1",
}
"""Options for programs that run once, or for seconds, or are small, on a CPU: they compile in 0.5 to 0.65 of the time. What they
then take is level where twins are stepped (0.9 to 1.05), a quarter more in loops of branches with feature maps, and 1.6 times
as much in an update, measured with jax 0.10.2. Not every XLA knows them all.
"""

quick_jit = functools.partial(
    jax.jit, compiler_options=QUICK if jax.__version_info__[:2] == (0, 10) else None
)
"""``jax.jit`` with ``QUICK``, where XLA knows them; within another ``jit`` it is refused."""


def compile_quickly(lowered: jax.stages.Lowered) -> jax.stages.Compiled:
    """Compiles a program whose own speed matters less than the wait for it."""
    if jax.default_backend() == "cpu":
        try:
            return lowered.compile(compiler_options=QUICK)
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
