"""Random settings: valid ones train two iterations with finite numbers, every invalid one is an error that names it.

    python benchmarks/reliability/configs.py --valid 2000 --invalid 2000

Settings that do not go together count as invalid: they must raise ValueError or TypeError, before anything is trained.
``JAX_DISABLE_MOST_OPTIMIZATIONS=1`` compiles faster. What compiles a program is drawn anew every ``--draws`` settings; the numbers that a program takes are drawn for each.
"""

from __future__ import annotations

import argparse
import dataclasses
import random
import typing
import warnings
from collections import Counter
from typing import Any

import jax
import numpy as np

import grpo_jax
from grpo_jax import config as definitions
from grpo_jax.config import GRPOConfig

ENVS = ("CartPole-v1", "Pendulum-v1")
NAMES = {
    "candidates": "Candidates", "trajectory_form": "TrajectoryForm", "backup": "Backup", "baseline": "Baseline",
    "advantage_scale": "Scale", "surrogate": "Surrogate", "kl_estimator": "KLEstimator", "reference": "Reference",
    "activation": "Activation", "learning_rate_decay": "Decay", "clip_range_decay": "Decay", "ent_coef_decay": "Decay",
}  # fmt: skip
CHOICES: dict[str, tuple[Any, ...]] = {
    name: typing.get_args(getattr(definitions, of)) for name, of in NAMES.items()
}
CHOICES |= dict.fromkeys(
    (
        "bootstrap", "branch_past_truncation", "common_random_numbers", "share_features_extractor",
        "normalize_observations",
    ),
    (False, True),
)  # fmt: skip
NUMBERS: dict[str, tuple[Any, ...]] = {
    "n_epochs": (1, 2), "batch_size": (4, 8, 16), "group_size": (2, 4), "horizon": (1, 3), "branch_every": (1, 2),
    "n_rollouts": (1, 2), "reference_interval": (1, 3), "learning_rate": (1e-5, 3e-4, 1e-2), "gamma": (0.0, 0.9, 1.0),
    "gae_lambda": (0.0, 0.9, 1.0), "clip_range": (0.01, 0.2), "clip_range_high": (None, 0.3), "dual_clip": (None, 3.0),
    "ent_coef": (0.0, 0.01), "vf_coef": (0.0, 0.5), "clip_range_vf": (None, 0.2), "persistence": (None, 0.5),
    "kl_coef": (None, 0.1), "reference_decay": (0.5, 0.99), "target_kl": (None, 0.01), "max_grad_norm": (0.1, 10.0),
    "spread_floor": (0.0, 1e-6), "net_arch": ((), (4,), (4, 4)), "log_std_init": (-1.0, 0.5),
}  # fmt: skip
TRACED = {one.name for one in dataclasses.fields(GRPOConfig) if "traced" in one.metadata} & NUMBERS.keys()
TRACED = {name for name in TRACED if None not in NUMBERS[name]}  # None is another program
BAD: dict[str, tuple[Any, ...]] = {name: ("nonsense", 3, None, ["ppo"]) for name in NAMES}
BAD |= dict.fromkeys(
    ("n_envs", "n_steps", "n_epochs", "batch_size", "group_size", "horizon", "n_rollouts", "branch_every"),
    (0, -1, 1.5, "8", None, float("nan"), True),
)
BAD |= dict.fromkeys(
    (
        "learning_rate",
        "gamma",
        "gae_lambda",
        "clip_range",
        "vf_coef",
        "max_grad_norm",
        "spread_floor",
        "reference_decay",
    ),
    (-1.0, float("nan"), float("inf"), "0.1", None, True),
)
BAD |= dict.fromkeys(("bootstrap", "common_random_numbers", "normalize_observations"), ("no", 2, None, 0.5))
BAD |= {"net_arch": ((0,), (-4,), "64", (1.5,), 64), "target_kl": (-0.1, float("nan"), "x")}


def train(settings: dict[str, Any], env: Any, seed: int) -> str:
    """Two iterations: ``"trained"``, ``"refused"``, or what is wrong."""
    try:
        config = GRPOConfig(n_envs=4, n_steps=8, **settings)
        result = grpo_jax.train(config, env, jax.random.key(seed), total_timesteps=64)
    except (ValueError, TypeError) as error:
        named = any(name in str(error) for name in (*settings, "n_envs", "n_steps", "config"))
        return "refused" if named else f"an error that names nothing: {error}"
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    learned = (result.state.learner.policy, result.state.learner.optimizer)
    good = all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(jax.device_get(learned)))
    return "trained" if good else "numbers that are not finite"


def main() -> None:
    """Prints counts, and each failure with its settings."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--valid", type=int, default=2000)
    parser.add_argument("--invalid", type=int, default=2000)
    parser.add_argument("--draws", type=int, default=10, help="of numbers for each program")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    warnings.simplefilter("ignore")
    draw = random.Random(arguments.seed)
    envs = [grpo_jax.make(one) for one in ENVS]
    counts: Counter[str] = Counter()
    while counts["trained"] < arguments.valid and counts["wrong"] < 20:
        names = draw.sample(sorted((CHOICES | NUMBERS).keys() - TRACED), draw.randint(2, 8))
        program = {name: draw.choice((CHOICES | NUMBERS)[name]) for name in names}
        index = draw.randrange(len(envs))
        for _ in range(arguments.draws):
            names = draw.sample(sorted(TRACED), draw.randint(1, len(TRACED)))
            settings = program | {name: draw.choice(NUMBERS[name]) for name in names}
            came_to = train(settings, envs[index], draw.randrange(2**31))
            if came_to not in ("trained", "refused"):
                print(f"{ENVS[index]} {settings}: {came_to}", flush=True)
                came_to = "wrong"
            counts[came_to] += 1
        print(f"{counts['trained']} of {arguments.valid} trained", flush=True)
        jax.clear_caches()
    silent = 0
    for _ in range(arguments.invalid):
        name = draw.choice(sorted(BAD))
        value = draw.choice(BAD[name])
        try:
            GRPOConfig(**{name: value})
        except (ValueError, TypeError) as error:
            if name in str(error):
                continue
        silent += 1
        print(f"{name}={value!r} was not refused by its name", flush=True)
    print(f"{counts['trained']} trained, {counts['refused']} combinations refused, {counts['wrong']} wrong")
    print(f"{arguments.invalid} invalid values: {arguments.invalid - silent} refused by name, {silent} not")


if __name__ == "__main__":
    main()
