"""The compilation cache on disk."""

import subprocess
import sys

import pytest

PROGRAM = """
import grpo_jax, jax
{before}
print(grpo_jax.enable_cache({argument}))
assert str(jax.config.jax_compilation_cache_dir) == {expected!r}, jax.config.jax_compilation_cache_dir
"""


@pytest.mark.parametrize("case", ["default", "given", "configured"])
def test_cache_is_where_it_was_asked_for(tmp_path, case):
    """In a process of its own: the setting is the whole process'."""
    mine, own = tmp_path / "mine", tmp_path / "own"
    expected = {"default": tmp_path / "grpo-jax" / "xla", "given": mine, "configured": own}[case]
    program = PROGRAM.format(
        before=f"jax.config.update('jax_compilation_cache_dir', {str(own)!r})"
        if case == "configured"
        else "",
        argument="" if case == "default" else repr(str(mine)),
        expected=str(expected),
    )
    done = subprocess.run(
        [sys.executable, "-c", program],
        env={"XDG_CACHE_HOME": str(tmp_path), "PATH": "", "JAX_PLATFORMS": "cpu"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == str(expected)
