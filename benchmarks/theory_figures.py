"""Notebook 03 and what ``docs/theory.md`` shows of it: its figures, and one measured table.

    python benchmarks/theory_figures.py            # docs/images/theory_*.png, from the pictures in the notebook
    python benchmarks/theory_figures.py --run      # the same, after executing the notebook; both languages get its outputs
    python benchmarks/theory_figures.py --table    # groups without spread, measured: rows of the page's table

A figure is the picture of the cell that carries its name as a tag, so page and notebook cannot differ.
"""

from __future__ import annotations

import argparse
import base64
import copy
import io
import pathlib
import warnings

import jax
import nbformat
from PIL import Image

import grpo_jax

ROOT = pathlib.Path(__file__).parents[1]
NOTEBOOK = ROOT / "notebooks" / "03_theory.ipynb"
IMAGES = ROOT / "docs" / "images"
PREFIX = "theory_"
N_COLOURS = 64

HORIZONS = (1, 2, 4, 16, 64)
IDS = ("CartPole-v1", "Acrobot-v1", "Pendulum-v1", "MountainCar-v0")
N_ENVS, N_STEPS = 16, 32


def figures(notebook: pathlib.Path) -> dict[str, bytes]:
    """PNG files by name: of every cell with a tag that starts with ``theory_``.

    Raises:
      ValueError: such a cell does not show exactly one picture.
    """
    found = {}
    for cell in nbformat.read(notebook, as_version=4).cells:
        pictures = [base64.b64decode(data["image/png"]) for data in _pictures(cell)]
        for name in cell.metadata.get("tags", []):
            if not name.startswith(PREFIX):
                continue
            if len(pictures) != 1:
                raise ValueError(
                    f"{notebook.name}: cell {name!r} shows {len(pictures)} pictures, expected 1; use --run"
                )
            found[name] = pictures[0]
    return found


def execute(notebook: pathlib.Path) -> None:
    """Executes a notebook in place, with small pictures, and gives its Japanese twin the same outputs."""
    from nbclient import NotebookClient

    english, twin = nbformat.read(notebook, as_version=4), notebook.with_suffix(".ja.ipynb")
    japanese = nbformat.read(twin, as_version=4)
    for cell, other in zip(english.cells, japanese.cells, strict=True):
        if cell.cell_type == "code" and cell.source != other.source:
            raise ValueError(f"{twin.name}: the code of cell {other.id!r} differs from the English one")
    NotebookClient(english, timeout=3_600, resources={"metadata": {"path": str(ROOT)}}).execute()
    for cell, other in zip(english.cells, japanese.cells, strict=True):
        cell.metadata.pop("execution", None)  # times of day
        for data in _pictures(cell):
            data["image/png"] = base64.b64encode(_shrunk(base64.b64decode(data["image/png"]))).decode()
        if cell.cell_type == "code":
            other.outputs, other.execution_count = copy.deepcopy(cell.outputs), cell.execution_count
    nbformat.write(english, notebook)
    nbformat.write(japanese, twin)


def share_without_spread(env_id: str, horizon: int) -> float:
    """``frac_zero_std`` of the first iteration of an untrained policy, over ``N_ENVS * N_STEPS`` groups."""
    config = grpo_jax.GRPOConfig(n_envs=N_ENVS, n_steps=N_STEPS, horizon=horizon)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", grpo_jax.NoSpreadWarning)  # what is measured
        result = grpo_jax.train(config, grpo_jax.make(env_id), jax.random.key(0), config.n_states)
    return float(result.metrics["frac_zero_std"][0])


def _pictures(cell: nbformat.NotebookNode) -> list[nbformat.NotebookNode]:
    return [output.data for output in cell.get("outputs", []) if "image/png" in output.get("data", {})]


def _shrunk(png: bytes) -> bytes:
    """The same picture in few colours: a third of the bytes."""
    small = io.BytesIO()
    Image.open(io.BytesIO(png)).convert("RGB").quantize(N_COLOURS).save(small, "PNG", optimize=True)
    return small.getvalue()


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--run", action="store_true", help="execute the notebook first (two minutes)")
    parser.add_argument("--table", action="store_true", help="measure the table instead of drawing")
    arguments = parser.parse_args()
    if arguments.table:
        for env_id in IDS:
            shares = " | ".join(f"{share_without_spread(env_id, horizon):.2f}" for horizon in HORIZONS)
            print(f"| {env_id} | {shares} |", flush=True)
        return
    if arguments.run:
        execute(NOTEBOOK)
    for name, png in figures(NOTEBOOK).items():
        (IMAGES / f"{name}.png").write_bytes(png)


if __name__ == "__main__":
    main()
