"""The door: the command line ``grpo-jax``. Nothing else in the package imports it."""

from grpo_jax.cli.commands import main

__all__ = ["main"]
