from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

import grpo_jax

ROOT = Path(__file__).parents[1]
FOREIGN = ("torch", "stable_baselines3", "sb3_bridge", "gymnasium", "gymnax", "matplotlib", "pygame", "tyro")


@pytest.fixture(scope="module")
def loaded_modules() -> set[str]:
    """Modules that a fresh interpreter holds after ``import grpo_jax``."""
    program = "import sys, grpo_jax; print(' '.join(sys.modules))"
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", program], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert done.stderr == ""
    return {name.split(".")[0] for name in done.stdout.split()}


@pytest.mark.parametrize("module", FOREIGN)
def test_importing_the_library_does_not_load(module, loaded_modules):
    assert "jax" in loaded_modules
    assert module not in loaded_modules


def test_public_names_exist_and_are_sorted():
    assert grpo_jax.__all__ == sorted(grpo_jax.__all__)
    for name in grpo_jax.__all__:
        assert getattr(grpo_jax, name) is not None


def test_no_module_of_the_library_names_torch_or_the_bridge():
    for path in (ROOT / "grpo_jax").rglob("*.py"):
        for line in path.read_text(encoding="utf-8").splitlines():
            if line.strip().startswith(("import ", "from ")):
                assert not line.split()[1].startswith(("torch", "stable_baselines3", "sb3_bridge")), (
                    path,
                    line,
                )
