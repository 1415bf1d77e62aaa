"""One process makes models, lambdas, learns, saves and loads again and again: resident memory and descriptors must stay flat.

    python benchmarks/reliability/sb3_soak.py --minutes 60

Prints a row for each part of the time: seconds, rounds, resident MiB, open descriptors, threads, memory mappings, children.
"""

from __future__ import annotations

import argparse
import gc
import os
import tempfile
import time
import warnings
from pathlib import Path

from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.vec_env import SubprocVecEnv, VecNormalize

from sb3_bridge import GRPO, WorldVecEnv

SETTINGS = {"n_steps": 32, "batch_size": 32, "n_epochs": 1, "horizon": 4, "policy_kwargs": {"net_arch": [8]}}


def envs(number: int):
    """One of the kinds of environments, in turn."""
    kind = number % 4
    if kind == 0:
        return WorldVecEnv("CartPole-v1", n_envs=4)
    if kind == 1:
        return make_vec_env("CartPole-v1", 2)
    if kind == 2:
        return VecNormalize(make_vec_env("CartPole-v1", 2))
    return make_vec_env(
        "FrozenLake-v1", 2, vec_env_cls=SubprocVecEnv, vec_env_kwargs={"start_method": "fork"}
    )


def one_round(number: int, folder: Path) -> None:
    """Makes a model, with a new lambda where the state is a vector, trains, saves, loads and goes on."""
    settings = dict(SETTINGS)
    if number % 4 in (0, 1):
        settings["reward_function"] = lambda state, action, next_state: (
            1.0 - abs(next_state[2]) * (1 + number % 3)
        )
    env = envs(number)
    model = GRPO("MlpPolicy", env, seed=number, **settings)
    model.learn(64)
    model.save(folder / "model")
    function = {"reward_function": settings.get("reward_function")}
    again = GRPO.load(folder / "model", env=envs(number), force_reset=False, custom_objects=function)
    again.learn(64, reset_num_timesteps=False)
    again.predict(again._last_obs)
    for one in (env, again.get_env()):
        one.close()


def state() -> dict[str, float]:
    """Of this process, now."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    children = Path(f"/proc/self/task/{os.getpid()}/children").read_text().split()
    return {
        "rss_mib": pages * os.sysconf("SC_PAGE_SIZE") / 2**20,
        "fds": len(os.listdir("/proc/self/fd")),
        "threads": len(os.listdir("/proc/self/task")),
        "maps": Path("/proc/self/maps").read_text().count("\n"),
        "children": len(children),
    }


def main() -> None:
    """Prints the rows, and how much the second half of the time added."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--minutes", type=float, default=60)
    parser.add_argument("--rows", type=int, default=20)
    arguments = parser.parse_args()
    warnings.simplefilter("ignore")
    started, number, rows = time.monotonic(), 0, []
    with tempfile.TemporaryDirectory() as folder:
        while (seconds := time.monotonic() - started) < 60 * arguments.minutes:
            one_round(number, Path(folder))
            number += 1
            if seconds >= 60 * arguments.minutes * len(rows) / arguments.rows and number % 4 == 0:
                gc.collect()
                rows.append({"s": seconds, "rounds": number, **state()})
                print("  ".join(f"{name} {value:.0f}" for name, value in rows[-1].items()), flush=True)
    half = rows[len(rows) // 2]
    grown = (rows[-1]["rss_mib"] - half["rss_mib"]) / max(1, rows[-1]["rounds"] - half["rounds"])
    print(f"second half: {grown:+.3f} MiB a round, {rows[-1]['fds'] - half['fds']:+.0f} descriptors")


if __name__ == "__main__":
    main()
