"""What the README promises: its Python runs, its flags exist, and both languages show the same."""

import re
from pathlib import Path

import jax
import pytest

from grpo_jax import cli

ROOT = Path(__file__).parents[1]
ENGLISH, JAPANESE = ((ROOT / name).read_text(encoding="utf-8") for name in ("README.md", "README.ja.md"))


def blocks(text: str, language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", text, flags=re.DOTALL)


def without_prose(code: str) -> str:
    """Code without comments and without what it prints."""
    return re.sub(r'\s*#.*|print\(f".*"\)', "", code)


def test_python_of_the_readme_runs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    code = "\n".join(blocks(ENGLISH, "python"))
    names: dict = {}
    exec(compile(code, "README.md", "exec"), names)
    assert names["mean"] >= 475  # through SB3's API, with a reward function
    assert (tmp_path / "cartpole.zip").exists()
    assert float(names["returns"].mean()) > 400
    assert names["seeds"].metrics["entropy"].shape == (4, 4)
    assert names["sweep"].metrics["entropy"].shape == (3, 4)
    assert (tmp_path / "cartpole.msgpack").exists()
    assert isinstance(names["result"].state.params, dict) and jax.tree.leaves(names["state"])


@pytest.mark.parametrize("language", ["python", "console"])
def test_both_languages_show_the_same_code(language):
    english, japanese = (
        [without_prose(code) for code in blocks(text, language)] for text in (ENGLISH, JAPANESE)
    )
    assert english and english == japanese


def test_both_languages_report_the_same_numbers():
    english, japanese = (
        re.findall(r"^\| .*-v\d .*$", text, flags=re.MULTILINE) for text in (ENGLISH, JAPANESE)
    )
    assert english and english == japanese


def test_commands_of_the_readme_are_understood(capsys):
    commands = re.findall(r"^grpo-jax (\w+)", "\n".join(blocks(ENGLISH, "console")), flags=re.MULTILINE)
    assert set(commands) == {"train", "evaluate", "resume", "envs"}
    for command in commands:
        assert cli.main([command, "--help"]) == 0
        assert "usage: grpo-jax" in capsys.readouterr().out
