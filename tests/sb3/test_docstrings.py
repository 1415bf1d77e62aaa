"""Code in docstrings runs."""

from __future__ import annotations

import ast
import inspect
import re
import textwrap
from pathlib import Path

import pytest
from stable_baselines3.common.evaluation import evaluate_policy

import grpo_jax
import sb3_bridge

DOCUMENTED = ast.Module | ast.ClassDef | ast.FunctionDef


def blocks() -> list[tuple[str, str]]:
    """File and code of every indented block behind ``::``."""
    found = []
    for package in (grpo_jax, sb3_bridge):
        for path in sorted(Path(package.__file__).parent.rglob("*.py")):
            for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
                text = ast.get_docstring(node) if isinstance(node, DOCUMENTED) else None
                for code in re.findall(r"::\n\n((?:(?: {4}.*)?\n)+)", inspect.cleandoc(text or "") + "\n"):
                    found.append((path.name, textwrap.dedent(code)))
    return found


BLOCKS = blocks()


def test_there_are_some():
    assert "planner.py" in {name for name, _ in BLOCKS}


@pytest.mark.parametrize(("name", "code"), BLOCKS)
def test_it_runs(name, code):
    del name
    model = sb3_bridge.GRPO("MlpPolicy", "gymnax/CartPole-v1", n_steps=16, batch_size=16, horizon=2, seed=0)
    names = {**vars(sb3_bridge), "evaluate_policy": evaluate_policy, "model": model}
    exec(code.replace("n_eval_episodes=20", "n_eval_episodes=1"), names)
