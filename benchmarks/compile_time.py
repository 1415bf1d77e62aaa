"""CPU seconds that XLA takes to compile each stage of one iteration, and the same with JAX's own threefry.

    python benchmarks/compile_time.py [ENV]

Best of a few compilations in one process; the ratio is what counts, machines differ.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from typing import Any

import jax

import grpo_jax
from grpo_jax import noise
from grpo_jax.training.iterate import iteration
from grpo_jax.training.loop import TrainState


def compile_seconds(function: Callable[..., Any], *args: Any, repeats: int = 3) -> float:
    """CPU seconds of the fastest of a few compilations, tracing not counted."""
    seconds = []
    for _ in range(repeats):
        jax.clear_caches()
        lowered = jax.jit(function).lower(*args)
        start = time.process_time()
        lowered.compile()
        seconds.append(time.process_time() - start)
    return min(seconds)


def main() -> None:
    env_id = sys.argv[1] if len(sys.argv) > 1 else "CartPole-v1"
    env, config = grpo_jax.make(env_id), grpo_jax.preset(env_id)
    ours = noise.PRNG
    print(f"{env_id}, jax {jax.__version__}, {jax.default_backend()}")
    print("| program | this package's threefry | JAX's threefry |")
    print("|---|---|---|")
    results: dict[str, list[float]] = {"one iteration": [], "a whole run": []}
    for implementation in (ours, "threefry2x32"):
        noise.PRNG = implementation  # type: ignore[assignment]
        jax.clear_caches()

        def one_iteration(state: TrainState) -> Any:
            return iteration(config, env, state, 100)

        def whole_run(key: jax.Array) -> Any:
            return grpo_jax.train(config, env, key, 100 * config.n_states)

        key = jax.random.key(0)
        state = jax.eval_shape(lambda key: grpo_jax.init(config, env, key), key)
        results["one iteration"].append(compile_seconds(one_iteration, state))
        results["a whole run"].append(compile_seconds(whole_run, key))
    noise.PRNG = ours
    for name, (mine, theirs) in results.items():
        print(f"| {name} | {mine:.2f} s | {theirs:.2f} s |")


if __name__ == "__main__":
    main()
