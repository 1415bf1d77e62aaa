"""States too large for one file: ``checkpoint.parts/`` holds them, and the checkpoint, a small file, names which one it is."""

from __future__ import annotations

import re
import shutil
from collections.abc import Iterable
from pathlib import Path

import jax

from grpo_jax import shards
from grpo_jax.cli.own_files import check_own
from grpo_jax.training.checkpoint import PARTS_NOTE, read_notes
from grpo_jax.training.loop import TrainState
from grpo_jax.training.parts import is_shared, save_parts
from grpo_jax.types import tree_bytes

BYTES = 1 << 30
"""From this size on a state lies in parts, where all processes share the directory: one file would be slower."""

_NAME = re.compile(r"iteration_[0-9]{9}_[0-9]{1,6}")
_MAX_FILE_BYTES = 1 << 16  # of a checkpoint that only names its parts


def suit(state: TrainState, directory: Path) -> bool:
    """Whether a state is to be written in parts; all processes ask."""
    return tree_bytes(state) >= BYTES and is_shared(directory)


def write(root: Path, state: TrainState, iteration: int) -> str:
    """Writes the parts of a state beside older ones, and returns their name; all processes call it."""
    check_own(root)
    if jax.process_index() == 0:
        root.mkdir(exist_ok=True)
    name = f"iteration_{iteration:09d}_"
    used = [int(path.name.removeprefix(name)) for path in _directories(root) if path.name.startswith(name)]
    name += str(shards.agreed(max(used, default=-1) + 1))
    save_parts(root / name, state)
    return name


def name_in(checkpoint: Path) -> str | None:
    """The name of the parts that a checkpoint has; None where it holds its state itself.

    Raises:
      FileNotFoundError, ValueError: as ``read_notes``; or what it names can be no parts.
    """
    if checkpoint.stat().st_size > _MAX_FILE_BYTES:
        return None
    name = read_notes(checkpoint, _MAX_FILE_BYTES).get(PARTS_NOTE)
    if name is not None and not (isinstance(name, str) and _NAME.fullmatch(name)):
        raise ValueError(f"{checkpoint} names parts that cannot be: {name!r:.60}")
    return name


def remove_unused(root: Path, checkpoints: Iterable[Path]) -> None:
    """Removes the parts that none of these checkpoints names, and what killed processes left of others; nothing in doubt."""
    if not root.is_dir() or root.is_symlink():
        return
    try:
        used = {name_in(path) for path in checkpoints if path.exists()}
    except (OSError, ValueError):  # what a damaged one names is not known
        return
    for path in root.iterdir():
        is_ours = _NAME.fullmatch(path.name.split(".orbax-checkpoint-tmp")[0])
        if is_ours and path.name not in used and not path.is_symlink():
            shutil.rmtree(path, ignore_errors=True)


def _directories(root: Path) -> list[Path]:
    return [path for path in root.iterdir() if _NAME.fullmatch(path.name)] if root.is_dir() else []
