"""What README and docs promise: their Python runs, and flags and linked pages exist."""

import re
from pathlib import Path

import jax
import pytest

from grpo_jax import cli

ROOT = Path(__file__).parents[1]


def pages(english: str) -> tuple[str, str]:
    """A page in English and in Japanese."""
    japanese = english.removesuffix(".md") + ".ja.md"
    return tuple((ROOT / name).read_text(encoding="utf-8") for name in (english, japanese))


ENGLISH, JAPANESE = pages("README.md")
DOCS = [f"docs/{path.name}" for path in sorted((ROOT / "docs").glob("*.md")) if ".ja." not in path.name]
every_page = pytest.mark.parametrize("page", ["README.md", *DOCS])


def blocks(text: str, language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", text, flags=re.DOTALL)


def test_python_of_the_readme_runs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    code = "\n".join(blocks(ENGLISH, "python"))
    names: dict = {}
    exec(compile(code, "README.md", "exec"), names)
    assert names["mean"] >= 475  # through SB3's API, with a reward function
    assert (tmp_path / "cartpole.zip").exists()
    assert float(names["returns"].mean()) > 400
    assert names["seeds"].metrics["entropy"].shape == (4, 8)
    assert names["sweep"].metrics["entropy"].shape == (3, 8)
    assert (tmp_path / "cartpole.msgpack").exists()
    assert isinstance(names["result"].state.params, dict) and jax.tree.leaves(names["state"])


@pytest.mark.parametrize("page", DOCS)
def test_python_of_the_docs_runs(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    exec(compile("\n".join(blocks(pages(page)[0], "python")), page, "exec"), {})


def test_commands_of_the_readme_are_understood(capsys):
    commands = re.findall(r"^grpo-jax (\w+)", "\n".join(blocks(ENGLISH, "console")), flags=re.MULTILINE)
    assert set(commands) == {"train", "evaluate", "resume", "envs", "plot", "report"}
    for command in commands:
        assert cli.main([command, "--help"]) == 0
        assert "usage: grpo-jax" in capsys.readouterr().out
