"""Fixtures that all tests share."""

from __future__ import annotations

import contextlib
import ctypes
import gc
import importlib.metadata
import os
import signal
from pathlib import Path

os.environ.setdefault("MPLBACKEND", "Agg")
# The CPU, whatever else is there: the tests must say the same everywhere. JAX_PLATFORMS=cuda,cpu runs them on a GPU.
os.environ.setdefault("JAX_PLATFORMS", "cpu")
if not os.environ["JAX_PLATFORMS"].startswith("cpu"):
    os.environ.setdefault("JAX_DEFAULT_MATMUL_PRECISION", "float32")  # TF32 keeps three digits
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # several processes share the device
if "JAX_COMPILATION_CACHE_DIR" not in os.environ:  # the cache of whoever runs the tests stays as it is
    os.environ["JAX_ENABLE_COMPILATION_CACHE"] = "0"
# Compiling is most of what tests take: their programs, and those of the processes that they start, run for
# milliseconds. `real_compiles` is for what optimisations could break.
os.environ["JAX_DISABLE_MOST_OPTIMIZATIONS"] = "1"
if importlib.metadata.version("jaxlib").startswith("0.10."):  # an XLA that does not know a flag aborts
    os.environ["XLA_FLAGS"] = (
        f"{os.environ.get('XLA_FLAGS', '')} --xla_cpu_use_fusion_emitters=false"
        " --xla_cpu_parallel_codegen_split_count=1"
    )

import hypothesis
import jax
import pytest

from grpo_jax.noise import as_key

# Compiling makes first examples slow, and a test-suite must say the same thing every time.
hypothesis.settings.register_profile("grpo", deadline=None, derandomize=True, max_examples=50, database=None)
hypothesis.settings.load_profile("grpo")
gc.set_threshold(100_000, 50, 50)  # tracing makes objects by the thousand, few of them in cycles


@pytest.fixture
def key() -> jax.Array:
    """A PRNG key of the library's own kind."""
    return as_key(jax.random.key(0))


@pytest.fixture(params=["eager", "jit"])
def compiled(request):
    """``jax.jit``, or nothing at all: what is tested must hold with both."""
    return jax.jit if request.param == "jit" else lambda function: function


def forget_programs(most: int) -> None:
    """Drops compiled programs, where the process has more memory mappings: a program has some six, and a megabyte."""
    mappings = Path("/proc/self/maps")
    if mappings.exists() and mappings.read_text().count("\n") > most:
        jax.clear_caches()
        gc.collect()
        with contextlib.suppress(AttributeError):  # not every C library has it
            ctypes.CDLL(None).malloc_trim(0)


@pytest.fixture(autouse=True, scope="module")
def few_mappings():
    """XLA dies at 65530 mappings, and forks grow slow long before."""
    yield
    forget_programs(4_000)


@pytest.fixture(scope="module")
def quick_forks():
    """For modules that fork again and again: a quarter of a second each where the process is large."""
    forget_programs(1_000)


@pytest.fixture
def real_compiles():
    """For what optimisations could break."""
    jax.config.update("jax_disable_most_optimizations", False)
    yield
    jax.config.update("jax_disable_most_optimizations", True)


@pytest.fixture
def as_on_a_cpu(monkeypatch):
    """For what the library chooses on a CPU, whatever the tests run on."""
    monkeypatch.setattr(jax, "default_backend", lambda: "cpu")


@pytest.fixture
def only_on_a_cpu():
    """For what a CPU's compiler does."""
    if jax.default_backend() != "cpu":
        pytest.skip("about programs of a CPU")


@pytest.fixture
def ctrl_c():
    """Python's own handling of SIGINT, which jobs in the background, and processes of pytest-xdist, ignore."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)
