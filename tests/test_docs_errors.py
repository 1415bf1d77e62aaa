"""Messages that the page of errors quotes are in the source, word for word."""

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


def text(node: ast.AST) -> str:
    """A string of the source, with an ellipsis for what is filled in."""
    if isinstance(node, ast.JoinedStr):
        return "".join(map(text, node.values))
    return str(node.value) if isinstance(node, ast.Constant) else "…"


@pytest.fixture(scope="module")
def messages() -> str:
    """All strings of both packages."""
    found = []
    for package in ("grpo_jax", "sb3_bridge"):
        for path in (ROOT / package).rglob("*.py"):
            nodes = ast.walk(ast.parse(path.read_text("utf-8")))
            found += [text(node) for node in nodes if isinstance(node, ast.JoinedStr | ast.Constant)]
    return "\n".join(found)


def quoted(page: str) -> list[str]:
    return re.findall(r"^- `([^`]+)` ", (ROOT / "docs" / page).read_text("utf-8"), re.MULTILINE)


def test_every_message_is_in_the_source(messages):
    assert len(quoted("faq.md")) > 30
    assert [one for one in quoted("faq.md") if one not in messages] == []


def test_both_languages_quote_the_same():
    assert quoted("faq.md") == quoted("faq.ja.md")
