"""Kills SB3 runs at random moments (SIGKILL), goes on from SB3's own checkpoints, and compares with the run that was not killed.

    python benchmarks/reliability/sb3_kill_runs.py --kills 20

Each run is a process that learns with ``CheckpointCallback``; the next one loads the newest checkpoint with
``GRPO.load(path, env, force_reset=False)``. Nothing may differ at the end: parameters, optimizer, counters, statistics.
"""

from __future__ import annotations

import argparse
import hashlib
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import warnings
from pathlib import Path

import jax
import numpy as np

TOTAL, EVERY = 40 * 64, 9  # steps of two environments
SETTINGS = {
    "n_steps": 32,
    "batch_size": 32,
    "n_epochs": 2,
    "horizon": 8,
    "seed": 0,
    "policy_kwargs": {"net_arch": [16]},
}
KINDS = ("device", "twin", "normalized clones", "learned")


def make_env(kind: str):
    """The environments of a run."""
    from stable_baselines3.common.env_util import make_vec_env
    from stable_baselines3.common.vec_env import VecNormalize

    from sb3_bridge import WorldVecEnv

    if kind == "device":
        return WorldVecEnv("CartPole-v1", n_envs=2)
    env = make_vec_env("Pendulum-v1" if kind == "learned" else "CartPole-v1", 2)
    return VecNormalize(env) if kind == "normalized clones" else env


def child(kind: str, folder: Path) -> None:
    """Learns to the end, from the newest checkpoint if there is one, and writes a digest of what came of it."""
    from stable_baselines3.common.callbacks import CheckpointCallback

    from sb3_bridge import GRPO
    from sb3_bridge.files.model_zip import load_zip

    warnings.simplefilter("ignore")
    files = sorted(folder.glob("rl_model_*_steps.zip"), key=lambda path: int(path.name.split("_")[2]))
    if files:
        model = GRPO.load(files[-1], env=make_env(kind), force_reset=False)
    else:
        dynamics = "learned" if kind == "learned" else "auto"
        model = GRPO("MlpPolicy", make_env(kind), dynamics=dynamics, **SETTINGS)
    callback = CheckpointCallback(EVERY, str(folder), save_vecnormalize=True)
    model.learn(TOTAL - model.num_timesteps, callback=callback, reset_num_timesteps=False)
    model.save(folder / "last")
    data, params = load_zip(folder / "last")
    digest = hashlib.sha256()
    for leaf in jax.tree.leaves(params):
        digest.update(np.asarray(leaf).tobytes())
    names = ("num_timesteps", "_n_updates", "simulator_steps", "key_words", "episode_time", "_last_obs")
    digest.update(repr([np.asarray(data[name]).tobytes() for name in names]).encode())
    digest.update(repr([(one["r"], one["l"]) for one in data["ep_info_buffer"]]).encode())
    (folder / "digest").write_text(digest.hexdigest())


def main() -> None:
    """Prints a line for each kind of run."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=KINDS)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--child", nargs=2)
    arguments = parser.parse_args()
    if arguments.child:
        child(arguments.child[0], Path(arguments.child[1]))
        return
    draw = random.Random(arguments.seed)
    share = -(-arguments.kills // len(arguments.kinds))
    n_equal = n_kills = 0
    for kind in arguments.kinds:
        command = [sys.executable, __file__, "--child", kind]
        with tempfile.TemporaryDirectory() as root:
            whole, killed = Path(root) / "whole", Path(root) / "killed"
            subprocess.run([*command, str(whole)], check=True)
            kills = 0
            while kills < share:
                run = subprocess.Popen([*command, str(killed)])
                # After some more checkpoints, at any moment: in a rollout, an update, or a save; now and then before any.
                wanted = len(list(killed.glob("*.zip"))) + draw.choice([0, 1, 2, 5, 10, 20])
                while run.poll() is None and len(list(killed.glob("*.zip"))) < wanted:
                    time.sleep(0.001)
                time.sleep(draw.uniform(0, 0.1) if wanted else draw.uniform(0, 10))
                if run.poll() is None:
                    run.send_signal(signal.SIGKILL)
                    kills += 1
                elif (killed / "digest").read_text() == (whole / "digest").read_text():
                    shutil.rmtree(killed)  # it had ended: from its start again
                else:
                    break
                run.wait()
            subprocess.run([*command, str(killed)], check=True)
            equal = (killed / "digest").read_text() == (whole / "digest").read_text()
            left = [path.name for path in killed.iterdir() if path.name.startswith(".")]
            n_equal, n_kills = n_equal + equal, n_kills + kills
            print(f"{kind}: {kills} kills, equal: {equal}, temporary files left: {len(left)}", flush=True)
    print(f"{n_kills} kills, {n_equal} of {len(arguments.kinds)} runs equal to the run that was not killed")


if __name__ == "__main__":
    main()
