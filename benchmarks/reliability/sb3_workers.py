"""Workers of a SubprocVecEnv that are killed, stopped or raise, in branches and in steps, under each way of starting them.

    python benchmarks/reliability/sb3_workers.py --rounds 3

Each must end in an error that names the environment, within the time limit, with no process left, and ``close()`` works.
"""

from __future__ import annotations

import argparse
import functools
import os
import random
import signal
import time
import warnings
from collections import Counter

import gymnasium as gym
import numpy as np
from gymnasium import spaces
from stable_baselines3.common.vec_env import SubprocVecEnv

from sb3_bridge import GRPO
from sb3_bridge.clones.processes import WorkerError

LIMIT = 10
STARTS = ("fork", "forkserver", "spawn")


class Walk(gym.Env):
    """Goes left or right. After so many steps, those of copies included, something happens to its process."""

    observation_space, action_space = spaces.Box(-10, 10, (1,), np.float32), spaces.Discrete(2)

    def __init__(self, what: str, left: int):
        self.what, self.left = what, left

    def reset(self, *, seed=None, options=None):
        """Back to 0."""
        super().reset(seed=seed)
        self.place = np.zeros(1, np.float32)
        return self.place.copy(), {}

    def step(self, action):
        """One to the left or to the right."""
        self.left -= 1
        if self.left < 0 and self.what == "raise":
            raise OSError("no simulator")
        if self.left < 0:
            os.kill(os.getpid(), getattr(signal, self.what))
            time.sleep(0.1)
        self.place += 2 * action - 1
        return self.place.copy(), float(self.place[0]), bool(abs(self.place[0]) >= 5), False, {}


def outcome(what: str, start: str, where: str, index: int) -> str:
    """What came of it: empty where all is as it must be."""
    env = SubprocVecEnv([functools.partial(Walk, what, 10**9) for _ in range(3)], start_method=start)
    os.environ.pop("GRPO_JAX_WORKER_TIMEOUT", None)
    dynamics = {"dynamics": "clone"} if where == "branch" else {"candidates": "episodes", "bootstrap": True}
    model = GRPO(
        "MlpPolicy", env, n_steps=16, batch_size=48, horizon=4, policy_kwargs={"net_arch": [8]}, **dynamics
    )
    model.learn(48)
    env.env_method("__setattr__", "left", 5, indices=[index])
    started = time.monotonic()
    os.environ["GRPO_JAX_WORKER_TIMEOUT"] = str(LIMIT)  # starting takes longer
    try:
        model.learn(480, reset_num_timesteps=False)
        return "nothing happened"
    except RuntimeError as error:
        if f"environment {index}" not in str(error):
            return f"another environment: {error}"
        if what != "raise" and not isinstance(error, WorkerError):
            return f"another error: {error}"
    if time.monotonic() - started > LIMIT + 30:
        return "it took too long"
    env.close()
    alive = [process.pid for process in env.processes if os.path.exists(f"/proc/{process.pid}")]
    return f"{len(alive)} processes are left" if alive else ""


def main() -> None:
    """Prints a line for each way of starting workers."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--starts", nargs="+", choices=STARTS, default=STARTS)
    arguments = parser.parse_args()
    warnings.simplefilter("ignore")
    draw = random.Random(0)
    for start in arguments.starts:
        counts: Counter[str] = Counter()
        for what in ("SIGKILL", "SIGSEGV", "SIGSTOP", "raise"):
            for where in ("branch", "step"):
                for _ in range(arguments.rounds):
                    came_to = outcome(what, start, where, draw.randrange(3))
                    if came_to:
                        print(f"{start}, {what} in a {where}: {came_to}", flush=True)
                    counts["wrong" if came_to else "named, ended, closed"] += 1
        print(f"{start}: {dict(counts)}", flush=True)


if __name__ == "__main__":
    main()
