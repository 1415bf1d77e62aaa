"""Compiling: the cache on disk, from which later processes load programs, and programs that are soon compiled."""

from __future__ import annotations

import functools
import os
from pathlib import Path

import jax

MIN_SECONDS = 0.1
"""Programs that compile faster are not worth a file."""

_OPTIONS = {"xla_cpu_use_fusion_emitters": False} if jax.__version_info__[:2] == (0, 10) else None
# XLA refuses an option that it does not know.

quick_jit = functools.partial(jax.jit, compiler_options=_OPTIONS)
"""``jax.jit`` with XLA's older generator of code for CPUs: for programs that are waited for and small, and in no other ``jit``.

It compiled the programs of this package in 0.6 of the CPU seconds (jax 0.10.2). What they then take is level where a world is
stepped (0.9 to 1.05), up to 1.2 with feature maps, 1.6 for an update, which is therefore compiled as usual.
"""


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
