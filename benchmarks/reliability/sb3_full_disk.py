"""A disk that is full under SB3's checkpoints: the old file stays, the error names the new one, nothing else is left behind.

    python benchmarks/reliability/sb3_full_disk.py

Mounts a tmpfs of so many KiB, which needs the right to; ``--limit-files`` bounds each file instead (RLIMIT_FSIZE).
"""

from __future__ import annotations

import argparse
import contextlib
import resource
import signal
import subprocess
import tempfile
import warnings
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from stable_baselines3.common.callbacks import CheckpointCallback

from sb3_bridge import GRPO, MlpPolicy, WorldVecEnv

SIZES = (4, 8, 12, 16, 20, 24, 28, 32, 40, 48, 64, 96)
SETTINGS = {"n_steps": 16, "batch_size": 32, "horizon": 4, "seed": 0, "policy_kwargs": {"net_arch": [16]}}


@contextlib.contextmanager
def small(folder: Path, kib: int, *, limit_files: bool) -> Iterator[None]:
    """``folder`` has room for some KiB only."""
    if limit_files:
        before = resource.getrlimit(resource.RLIMIT_FSIZE)
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (kib << 10, before[1]))
        try:
            yield
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, before)
        return
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={kib}k", "tmpfs", folder], check=True)
    try:
        yield
    finally:
        subprocess.run(["umount", folder], check=True)


def outcome(kib: int, folder: Path) -> str:
    """How a run with checkpoints ends, after which all that is there must be whole."""
    model = GRPO("MlpPolicy", WorldVecEnv("CartPole-v1", n_envs=2), **SETTINGS)
    try:
        model.learn(96, callback=CheckpointCallback(8, str(folder)))
        how = "had room"
    except OSError as error:
        how = "named the file" if str(folder) in str(error) else f"named nothing: {error}"
    with contextlib.suppress(OSError):
        model.policy.save(folder / "policy")
    for path in folder.iterdir():
        assert path.suffix == ".zip", f"{path.name} was left behind"
        (MlpPolicy if path.stem == "policy" else GRPO).load(path)
    assert np.isfinite(model.policy.parameters_to_vector()).all()
    model.learn(32, reset_num_timesteps=False)  # the model may go on elsewhere
    return how


def main() -> None:
    """Prints a line of counts."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--limit-files", action="store_true")
    arguments = parser.parse_args()
    warnings.simplefilter("ignore")
    outcomes = []
    for kib in SIZES:
        with (
            tempfile.TemporaryDirectory() as folder,
            small(Path(folder), kib, limit_files=arguments.limit_files),
        ):
            outcomes.append(outcome(kib, Path(folder)))
    counts = {how: outcomes.count(how) for how in sorted(set(outcomes))}
    print(f"{len(SIZES)} sizes from {SIZES[0]} to {SIZES[-1]} KiB: {counts}; every file that was there loads")


if __name__ == "__main__":
    main()
