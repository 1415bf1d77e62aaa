"""Fixtures of the bridge's tests."""

from __future__ import annotations

import jax
import pytest


@pytest.fixture(scope="module")
def quick_compiles():
    """Programs here run for milliseconds and take seconds to compile."""
    before = jax.config.read("jax_disable_most_optimizations")
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", before)


@pytest.fixture
def real_compiles(quick_compiles):
    """For what optimisations could break."""
    jax.config.update("jax_disable_most_optimizations", False)
    yield
    jax.config.update("jax_disable_most_optimizations", True)
