"""Adds NaN, inf, -inf and 1e30 to one number at each stage of each regime, at random times, and counts how training ends.

told: it stops with an error that names the iteration, the stage, and environment and step where the stage has them, and
hands out a last good state all of whose numbers are finite. finite: it goes on, and so is all that it leaves. Anything
else is a fault.

    python benchmarks/reliability/spoiled_numbers.py
"""

from __future__ import annotations

import argparse
import dataclasses
import pathlib
import time
import warnings
from collections import Counter
from collections.abc import Iterator
from typing import Any

import cli_runs
import jax
import jax.numpy as jnp
import numpy as np
from flax import struct

import grpo_jax
from grpo_jax.spaces import Box, Discrete
from grpo_jax.training.checkpoint import nonfinite_leaves
from grpo_jax.worlds.base import RewardOverride, World

SMALL = grpo_jax.GRPOConfig(n_envs=4, n_steps=5, batch_size=20, n_epochs=2, horizon=2, net_arch=(8,))
BASELINE = {"baseline": "mean"}
REGIMES = {
    "all actions": SMALL,
    "sampled actions": SMALL.replace(group_size=3),
    "bootstrapped": SMALL.replace(horizon=1, bootstrap=True, kl_coef=0.1, reference="ema"),
    "episodes": SMALL.replace(candidates="episodes", **BASELINE),
    "episodes with a critic": SMALL.replace(candidates="episodes", bootstrap=True, **BASELINE),
    "trajectories": SMALL.replace(candidates="trajectory", group_size=2, n_steps=10, **BASELINE),
}
STAGES = ("observation", "reward", "hidden state", "reward function", "learning rate", "value coefficient")
VALUES = (jnp.nan, jnp.inf, -jnp.inf, 1e30)


@struct.dataclass
class Walk(World):
    """A noisy walk of 10 steps, in which one time of an episode is spoiled."""

    action_space: Any = struct.field(pytree_node=False)
    time: int = 99
    observation_plus: float = 0.0
    reward_plus: float = 0.0
    hidden_plus: float = 0.0
    observation_space: Any = struct.field(
        pytree_node=False, default=Box(np.full(2, -99.0), np.full(2, 99.0), (2,))
    )

    def reset(self, key: jax.Array) -> tuple[jax.Array, Any]:
        place = jax.random.normal(key)
        return jnp.stack([place, 0.0]), (place, jnp.int32(0), jnp.float32(0.0))

    def step(self, key: jax.Array, state: Any, action: jax.Array) -> grpo_jax.Step:
        place, time, hidden = state
        move = jnp.clip(jnp.sum(jnp.asarray(action, jnp.float32)), -1.0, 1.0)
        place, time = place + move + 0.1 * jax.random.normal(key), time + 1
        now = time == self.time

        def plus(number: jax.Array, value: float) -> jax.Array:
            return jnp.where(now, number + value * (1.0 + number), number)

        return grpo_jax.Step(
            observation=plus(jnp.stack([place, time.astype(jnp.float32)]), self.observation_plus),
            state=(place, time, plus(hidden, self.hidden_plus)),
            reward=plus(-jnp.abs(place), self.reward_plus),
            terminated=jnp.bool_(False),
            truncated=time >= 10,
        )


def spoil(
    regime: str, stage: str, value: float, at: int, normalize: bool
) -> tuple[grpo_jax.GRPOConfig, World]:
    """A config and a world of which one number is spoiled."""
    config = REGIMES[regime].replace(normalize_observations=normalize)
    actions: Any = Box(-np.ones(1), np.ones(1), (1,)) if regime == "sampled actions" else Discrete(2)
    world: World = Walk(actions, time=at)
    large = 3e38 if not np.isfinite(value) else 1e30  # a config refuses what is not finite itself
    match stage:
        case "observation" | "reward":
            world = dataclasses.replace(world, **{f"{stage}_plus": value})  # type: ignore[type-var]
        case "hidden state":
            world = dataclasses.replace(world, hidden_plus=value)  # type: ignore[type-var]
        case "reward function":
            world = RewardOverride(world, _Reward(value, at))  # unchecked: make() would try it first
        case "learning rate":
            config = config.replace(learning_rate=large)
        case _:
            config = config.replace(vf_coef=large)
    return config, world


@dataclasses.dataclass(frozen=True)
class _Reward:
    value: float
    time: int

    def __call__(self, state: jax.Array, action: jax.Array, next_state: jax.Array) -> jax.Array:
        del state, action
        reward = -jnp.abs(next_state[0])
        return jnp.where(next_state[1] == self.time, reward + self.value * (1.0 + reward), reward)


def outcome(config: grpo_jax.GRPOConfig, world: World, seed: int) -> str:
    """How training ends."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", grpo_jax.NoSpreadWarning)
            result = grpo_jax.train(config, world, jax.random.key(seed), 4 * config.n_states)
    except grpo_jax.NonFiniteError as error:
        is_told = f"at iteration {error.iteration}, in the {error.stage}: " in str(error)
        is_told &= error.stage == "optimizer" or "environment" in str(error)
        good = int(error.state.iteration) == error.iteration - 1 and not nonfinite_leaves(error.state)
        return f"told ({error.stage})" if is_told and good else f"WRONG: {error}"
    bad = nonfinite_leaves(result.state)
    return "finite" if not bad else f"WRONG: {bad}"


def cases() -> Iterator[tuple[str, str, bool, float]]:
    """Regime, stage, whether observations are normalised, value; what compiles anew is told least often."""
    for regime, config in REGIMES.items():
        yield from ((regime, stage, False, value) for stage in STAGES[:3] for value in VALUES)
        yield from ((regime, "learning rate", False, value) for value in VALUES[2:])
        if config.bootstrap:
            yield from ((regime, "value coefficient", False, value) for value in VALUES[2:])
        yield from ((regime, "observation", True, value) for value in VALUES)
        yield regime, "reward function", False, VALUES[len(regime) % 4]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--minutes", type=float, default=600.0, help="stop after so long, and report")
    parser.add_argument("--out", type=pathlib.Path)
    options = parser.parse_args()
    rng, deadline = np.random.default_rng(0), time.monotonic() + 60.0 * options.minutes
    counts: dict[str, Counter[str]] = {stage: Counter() for stage in STAGES}
    for i, (regime, stage, normalize, value) in enumerate(cases()):
        if time.monotonic() > deadline:
            print(f"stopped before {regime}, {stage}")
            break
        config, world = spoil(regime, stage, value, int(rng.integers(1, 11)), normalize)
        ended = outcome(config, world, i)
        counts[stage][ended[:5] if ended.startswith("WRONG") else ended] += 1
        if ended.startswith("WRONG"):
            print(regime, stage, value, normalize, ended, flush=True)
    cli_runs.report("spoiled_numbers", {stage: dict(ends) for stage, ends in counts.items()}, options.out)


if __name__ == "__main__":
    main()
