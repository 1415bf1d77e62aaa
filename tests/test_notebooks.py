"""Every notebook runs from top to bottom, in a short form, and speaks both languages."""

import re
import sys
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

ROOT = Path(__file__).parents[1]
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
JAPANESE = re.compile(r"[\u3040-\u30ff]")  # kana: Chinese has none
READ = pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)


def test_the_notebooks_are_there():
    assert {"01_quickstart_sb3", "02_batched_rollouts"} <= {path.stem for path in NOTEBOOKS}


@READ
def test_every_text_is_in_both_languages(path):
    for cell in nbformat.read(path, as_version=4).cells:
        if cell.cell_type != "markdown":
            continue
        # Without code, which is the same in both. English first, then Japanese: two blocks that begin with a heading.
        text = re.sub(r"```.*?```", "", cell.source, flags=re.DOTALL)
        english, japanese = re.split(r"\n(?=#+ )", text.strip())
        assert re.match(r"#+ \w", english) and not JAPANESE.search(english)
        assert len(JAPANESE.findall(japanese)) > 20
        assert english.count("#") == japanese.count("#")


@READ
def test_what_is_shipped_is_small_and_clean(path):
    text = path.read_text(encoding="utf-8")
    assert len(text) < 400_000
    notebook = nbformat.read(path, as_version=4)
    nbformat.validate(notebook)
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", [])]
    assert all(output.output_type != "error" and output.get("name") != "stderr" for output in outputs)


@READ
def test_runs(path, tmp_path, monkeypatch):
    """No cell fails or complains; what the quick start trains has learnt."""
    monkeypatch.setenv("NOTEBOOK_TIMESTEPS", "10000")
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    monkeypatch.delenv("MPLBACKEND", raising=False)  # the kernel has its own
    notebook = nbformat.read(path, as_version=4)
    quickstart = path.stem == "01_quickstart_sb3"
    if not quickstart:  # runs for moments in its short form: compiling is all there is
        monkeypatch.setenv("NOTEBOOK_SHORT", "1")
        monkeypatch.setenv("JAX_DISABLE_MOST_OPTIMIZATIONS", "1")
    if quickstart:
        notebook.cells.append(
            nbformat.v4.new_code_cell("print(*(scores[name] for name in ('GRPO', 'own reward')))")
        )
    client = NotebookClient(notebook, timeout=280, resources={"metadata": {"path": tmp_path}})
    # This interpreter's kernel, whichever one the user has registered under the notebook's name.
    client.create_kernel_manager()
    client.km.kernel_spec.argv = [sys.executable, "-m", "ipykernel_launcher", "-f", "{connection_file}"]
    client.execute()
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert all(output.get("name") != "stderr" for cell in code for output in cell.outputs)
    if quickstart:
        scores = [float(score) for score in code[-1].outputs[0].text.split()]
        assert all(400 <= score <= 500 for score in scores), scores
    shown = [kind for cell in code for output in cell.outputs for kind in output.get("data", {})]
    pictures = {"01_quickstart_sb3": (1, 2), "02_batched_rollouts": (2, 0)}
    assert (shown.count("image/png"), shown.count("image/gif")) == pictures[path.stem]
