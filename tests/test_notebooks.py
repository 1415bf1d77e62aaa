"""Every notebook is there in English and in Japanese, with the same code and outputs, and runs in a short form."""

import importlib.util
import re
import sys
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

ROOT = Path(__file__).parents[1]
FOLDER = ROOT / "notebooks"
NAMES = sorted(path.stem for path in FOLDER.glob("*.ipynb") if not path.stem.endswith(".ja"))
JAPANESE = re.compile(r"[\u3040-\u30ff\u4e00-\u9fff]")
KANA = re.compile(r"[\u3040-\u30ff]")  # Chinese has none
SUITES = {
    "05_continuous_control": {"Brax": "brax"},
    "06_masks_and_two_players": {"Pgx": "pgx"},
}
"""Extras that a part of a notebook needs, and their modules."""
EACH = pytest.mark.parametrize("name", NAMES)


def read(name, language=""):
    notebook = nbformat.read(FOLDER / f"{name}{language}.ipynb", as_version=4)
    nbformat.validate(notebook)
    return notebook


def cells_of(notebook, kind):
    return [cell for cell in notebook.cells if cell.cell_type == kind]


def outputs_of(notebook):
    return [output for cell in cells_of(notebook, "code") for output in cell.outputs]


def pictures(notebook):
    """How many PNGs and GIFs a notebook shows."""
    shown = [kind for output in outputs_of(notebook) for kind in output.get("data", {})]
    return shown.count("image/png"), shown.count("image/gif")


def test_the_notebooks_are_there():
    known = {"01_quickstart_sb3", "02_batched_rollouts", "03_theory", "04_your_own_environment"}
    assert known | {"05_continuous_control", "06_masks_and_two_players"} <= set(NAMES)
    assert {path.name for path in FOLDER.glob("*.ja.ipynb")} == {f"{name}.ja.ipynb" for name in NAMES}


@EACH
def test_both_languages_have_the_same_code_and_outputs(name):
    english, japanese = read(name), read(name, ".ja")
    assert [cell.cell_type for cell in english.cells] == [cell.cell_type for cell in japanese.cells]
    for one, other in zip(cells_of(english, "code"), cells_of(japanese, "code"), strict=True):
        assert one.source == other.source and one.outputs == other.outputs
        assert not JAPANESE.search(one.source)


@EACH
def test_one_language_a_file(name):
    texts = [cells_of(read(name, language), "markdown") for language in ("", ".ja")]
    assert sum(len(KANA.findall(cell.source)) for cell in texts[1]) > 20 * len(texts[1])
    for english, japanese in zip(*texts, strict=True):
        assert JAPANESE.search(japanese.source) and not JAPANESE.search(english.source)
        for mark in (r"^#+ ", r"^\|", r"^\s*[-*] ", r"^```"):  # headings, rows of tables, items, blocks
            counts = [len(re.findall(mark, cell.source, re.MULTILINE)) for cell in (english, japanese)]
            assert counts[0] == counts[1], (mark, english.source)
        blocks = [re.findall(r"```.*?```", cell.source, re.DOTALL) for cell in (english, japanese)]
        assert blocks[0] == blocks[1]


@EACH
def test_what_is_shipped_is_small_and_clean(name):
    for language in ("", ".ja"):
        assert (FOLDER / f"{name}{language}.ipynb").stat().st_size < 400_000
    notebook = read(name)
    assert all(cell.execution_count for cell in cells_of(notebook, "code"))
    assert sum(pictures(notebook)) >= 1
    outputs = outputs_of(notebook)
    assert all(output.output_type != "error" and output.get("name") != "stderr" for output in outputs)
    told = "".join(output.get("text", "") for output in outputs)
    assert "SKIPPED" not in told and not re.search(r"/(home|root|tmp|work|Users)/", told)


@EACH
def test_links_lead_somewhere(name):
    for language in ("", ".ja"):
        for cell in cells_of(read(name, language), "markdown"):
            for target in re.findall(r"\]\(([^)#]+)", cell.source):
                assert target.startswith("https://") or (FOLDER / target).is_file(), target


@EACH
def test_runs(name, tmp_path, monkeypatch):
    """No cell fails or complains, all pictures are drawn; what the quick start trains has learnt."""
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    monkeypatch.setenv("NOTEBOOK_SHORT", "1")
    monkeypatch.delenv("MPLBACKEND", raising=False)  # the kernel has its own
    notebook = read(name)
    expected = pictures(notebook)
    quickstart = name == "01_quickstart_sb3"
    if quickstart:
        scores = "print(*(scores[name] for name in ('GRPO', 'own reward')))"
        notebook.cells.append(nbformat.v4.new_code_cell(scores))
        monkeypatch.delenv("JAX_DISABLE_MOST_OPTIMIZATIONS", raising=False)  # it trains long enough
    client = NotebookClient(notebook, timeout=280, resources={"metadata": {"path": tmp_path}})
    # This interpreter's kernel, whichever one the user has registered under the notebook's name.
    client.create_kernel_manager()
    client.km.kernel_spec.argv = [sys.executable, "-m", "ipykernel_launcher", "-f", "{connection_file}"]
    client.execute()
    outputs = outputs_of(notebook)
    assert [output for output in outputs if output.get("name") == "stderr"] == []
    assert pictures(notebook) == expected
    told = "".join(output.get("text", "") for output in outputs)
    for suite, module in SUITES.get(name, {}).items():  # left out where it is not there, and visibly
        is_missing = importlib.util.find_spec(module) is None
        assert (f"SKIPPED: {suite} is not installed: pip install" in told) == is_missing
    if quickstart:
        assert all(400 <= float(score) <= 500 for score in outputs[-1].text.split()), outputs[-1].text
