"""The compilation cache on disk: what was compiled once is loaded by every later process."""

from __future__ import annotations

import os
from pathlib import Path

import jax

MIN_SECONDS = 0.5
"""Programs that compile faster are not worth a file."""


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
