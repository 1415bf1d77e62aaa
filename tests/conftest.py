"""Fixtures that all tests share."""

from __future__ import annotations

import gc
import importlib.metadata
import os
from pathlib import Path

os.environ.setdefault("MPLBACKEND", "Agg")
if "JAX_COMPILATION_CACHE_DIR" not in os.environ:  # the cache of whoever runs the tests stays as it is
    os.environ["JAX_ENABLE_COMPILATION_CACHE"] = "0"
# It halves the time to compile, which is most of what tests take; jax 0.11 does not know the flag, and aborts.
if importlib.metadata.version("jaxlib").startswith("0.10."):
    os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} --xla_cpu_use_fusion_emitters=false".strip()

import hypothesis
import jax
import pytest

from grpo_jax.noise import as_key

# Compiling makes first examples slow, and a test-suite must say the same thing every time.
hypothesis.settings.register_profile("grpo", deadline=None, derandomize=True, max_examples=50, database=None)
hypothesis.settings.load_profile("grpo")


@pytest.fixture
def key() -> jax.Array:
    """A PRNG key of the library's own kind."""
    return as_key(jax.random.key(0))


@pytest.fixture(params=["eager", "jit"])
def compiled(request):
    """``jax.jit``, or nothing at all: what is tested must hold with both."""
    return jax.jit if request.param == "jit" else lambda function: function


@pytest.fixture(autouse=True, scope="module")
def few_mappings():
    """Forgets compiled programs before Linux's limit of 65530 memory mappings, at which XLA dies."""
    yield
    mappings = Path("/proc/self/maps")
    if mappings.exists() and mappings.read_text().count("\n") > 20_000:
        jax.clear_caches()
        gc.collect()


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
