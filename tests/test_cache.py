"""The compilation cache on disk, and programs that are soon compiled."""

import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import grpo_jax
from grpo_jax.cache import QUICK, LoopJit, compile_loop, compile_quickly
from sb3_bridge import GRPO, compiling

ALONE = {"PATH": "", "JAX_PLATFORMS": "cpu", "JAX_DISABLE_MOST_OPTIMIZATIONS": "1"}
PROGRAM = """
import grpo_jax, jax
{before}
print(grpo_jax.enable_cache({argument}))
assert str(jax.config.jax_compilation_cache_dir) == {expected!r}, jax.config.jax_compilation_cache_dir
"""


def printed_by(program, cache_home):
    """What a program prints in a process of its own: the setting is the whole process'."""
    done = subprocess.run(
        [sys.executable, "-c", program],
        env={**ALONE, "XDG_CACHE_HOME": str(cache_home)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


@pytest.mark.parametrize("case", ["default", "given", "configured"])
def test_cache_is_where_it_was_asked_for(tmp_path, case):
    mine, own = tmp_path / "mine", tmp_path / "own"
    expected = {"default": tmp_path / "grpo-jax" / "xla", "given": mine, "configured": own}[case]
    program = PROGRAM.format(
        before=f"jax.config.update('jax_compilation_cache_dir', {str(own)!r})"
        if case == "configured"
        else "",
        argument="" if case == "default" else repr(str(mine)),
        expected=str(expected),
    )
    assert printed_by(program, tmp_path) == str(expected)


SB3 = """
import jax
{before}
from sb3_bridge import GRPO
GRPO("MlpPolicy", "CartPole-v1", n_steps=8, batch_size=8{argument})
print(jax.config.jax_compilation_cache_dir)
"""


@pytest.mark.parametrize("case", ["default", "off", "configured"])
def test_the_sb3_object_keeps_programs_by_itself(tmp_path, case):
    own = tmp_path / "own"
    expected = {"default": tmp_path / "grpo-jax" / "xla", "off": None, "configured": own}[case]
    program = SB3.format(
        before=f"jax.config.update('jax_compilation_cache_dir', {str(own)!r})"
        if case == "configured"
        else "",
        argument=", cache=False" if case == "off" else "",
    )
    assert printed_by(program, tmp_path) == str(expected)


def test_what_compiles_for_long_is_told_once(monkeypatch, capsys):
    monkeypatch.setattr(compiling, "TOLD_SECONDS", 1e-3)
    settings = {"n_steps": 10, "batch_size": 10, "n_epochs": 1, "candidates": "episodes", "cache": False}
    model = GRPO("MlpPolicy", "CartPole-v1", verbose=1, **settings)
    model.learn(10)
    told = capsys.readouterr().out
    assert told.count("compiling the update took") == 1
    model.learn(10)
    assert "compiling" not in capsys.readouterr().out
    monkeypatch.setattr(compiling, "TOLD_SECONDS", 1e3)
    GRPO("MlpPolicy", "CartPole-v1", verbose=1, **settings | {"n_steps": 11, "batch_size": 11}).learn(11)
    assert "compiling" not in capsys.readouterr().out


@pytest.mark.usefixtures("only_on_a_cpu")
def test_a_program_that_runs_once_compiles_also_where_xla_lacks_an_option(monkeypatch):
    lowered = jax.jit(lambda x: x + 1).lower(1.0)
    assert compile_quickly(lowered)(1.0) == 2.0
    monkeypatch.setitem(QUICK, "xla_cpu_no_such_option", True)
    assert compile_quickly(lowered)(1.0) == 2.0
    monkeypatch.setitem(QUICK, "xla_cpu_parallel_codegen_split_count", "many")
    monkeypatch.delitem(QUICK, "xla_cpu_no_such_option")
    monkeypatch.delitem(QUICK, "xla_cpu_use_fusion_emitters")  # jax 0.11 lacks it, and would stop there
    with pytest.raises(jax.errors.JaxRuntimeError, match="split_count"):
        compile_quickly(lowered)


def _norms(rows):
    norm = jnp.sum(rows * rows, axis=-1)
    return jnp.where(norm > 1.0, jnp.sqrt(norm), norm)


@pytest.mark.usefixtures("only_on_a_cpu")
def test_loops_leave_no_reduction_to_ynnpack():
    """jax 0.10 would: from some 2,048 rows on, at several times the time where rows are short."""
    rows = jnp.ones((4096, 3))
    for program in (jax.jit(_norms).lower(rows).compile(), compile_loop(jax.jit(_norms).lower(rows))):
        np.testing.assert_allclose(program(rows), np.sqrt(3.0), rtol=1e-6)
    assert "ynn_fusion" not in program.as_text()
    assert "ynn_fusion" not in LoopJit(_norms).alone.lower(rows).compile().as_text()


def test_a_loop_is_also_part_of_other_programs():
    norms, rows = LoopJit(_norms), jnp.ones((4096, 3))
    expected = np.full(4096, np.sqrt(3.0))
    of_constants = jax.jit(lambda: norms(rows))  # no argument is traced, and yet it is a part
    for found in (norms(rows), jax.jit(norms)(rows), of_constants(), jax.vmap(norms)(rows[None])[0]):
        np.testing.assert_allclose(found, expected, rtol=1e-6)
    gradient = jax.grad(lambda rows: norms(rows).sum())(rows)
    np.testing.assert_allclose(gradient, np.full((4096, 3), 3**-0.5), rtol=1e-6)


def test_evaluation_within_a_program_of_the_user_is_that_outside_of_it():
    env = grpo_jax.make("CartPole-v1")
    config = grpo_jax.GRPOConfig(n_envs=2, n_steps=8, horizon=2)
    state = grpo_jax.init(config, env, jax.random.key(0))
    outside = grpo_jax.evaluate(state, env, jax.random.key(1), 8)
    inside = jax.jit(lambda: grpo_jax.evaluate(state, env, jax.random.key(1), 8))()
    np.testing.assert_allclose(inside, outside)
