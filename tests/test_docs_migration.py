"""The page for PPO's users lists every argument of both constructors, with its true default."""

import inspect
import re
from pathlib import Path

import pytest
from stable_baselines3 import PPO

from sb3_bridge import GRPO

DOCS = Path(__file__).parents[1] / "docs"


@pytest.mark.parametrize("page", ["migration_sb3.md", "migration_sb3.ja.md"])
def test_arguments_and_defaults_are_true(page):
    text = (DOCS / page).read_text("utf-8")
    listed = re.findall(r"^\| `(\w+)` \| ([^|]*)\| ([^|]*)\| [^|]+ \|$", text, re.MULTILINE)
    names = [name for name, *_ in listed]
    ours, theirs = (list(inspect.signature(kind).parameters.values()) for kind in (GRPO, PPO))
    assert names == [one.name for one in ours] and {one.name for one in theirs} <= set(names)
    for column, parameters in ((1, theirs), (2, ours)):
        told = {row[0]: row[column].strip() for row in listed}
        for one in parameters:
            if one.default is not one.empty:
                assert told.pop(one.name) == f"`{one.default!r}`"
        rest = {name: cell for name, cell in told.items() if name not in ("policy", "env")}
        assert not any(rest.values())  # arguments that this class has not
