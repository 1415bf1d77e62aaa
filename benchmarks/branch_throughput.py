"""Branches against their ceiling: simulator steps per second of group_returns, and of a bare step + policy loop.

    taskset -c 0 python benchmarks/branch_throughput.py [ENV ...]

The ceiling runs the same network, the same number of worlds side by side and the same number of steps, without
candidates, alive masks, discounts or counts, in the same process. Decision steps do not occur here.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

import grpo_jax
from grpo_jax.noise import as_key, bits_to_keys, bits_to_uniform, draw_bits, split

BRANCHES, HORIZON, REPEATS = 4096, 64, 7


def seconds(function: Callable[..., Any], *args: Any) -> float:
    """The fastest of a few runs, compiling apart."""
    jax.block_until_ready(function(*args))
    best = float("inf")
    for _ in range(REPEATS):
        start = time.perf_counter()
        jax.block_until_ready(function(*args))
        best = min(best, time.perf_counter() - start)
    return best


def measure(env_id: str) -> None:
    """Prints the row of one environment."""
    env = grpo_jax.make(env_id)
    config = grpo_jax.GRPOConfig(network="mlp")
    policy = grpo_jax.make_policy(config, env.observation_space, env.action_space)
    distribution = policy.distribution
    group_size = getattr(distribution, "n_actions", 8)
    n_states = BRANCHES // group_size
    key = as_key(jax.random.key(0))
    parameters = policy.init(key)

    def act(observation: Any, mask: Any, uniforms: jax.Array) -> jax.Array:
        return policy.to_world(
            distribution.sample(policy.parameters(parameters, observation, mask), uniforms)
        )

    observation, states = jax.jit(jax.vmap(env.reset))(split(key, n_states * group_size))
    first = jax.tree.map(lambda leaf: leaf[:n_states], states)
    uniforms = bits_to_uniform(draw_bits(key, (n_states, group_size, distribution.n_uniforms)))
    actions = act(jax.tree.map(lambda leaf: leaf[:n_states, None], observation), None, uniforms)

    @jax.jit
    def branches(key: jax.Array, first: Any, actions: jax.Array) -> Any:
        return grpo_jax.group_returns(
            env, act, key, first, actions, horizon=HORIZON, gamma=0.99, n_uniforms=distribution.n_uniforms
        )

    @jax.jit
    def bare(key: jax.Array, observation: Any, states: Any) -> Any:
        def body(carry: Any, key: jax.Array) -> tuple[Any, None]:
            observation, states, total = carry
            words = draw_bits(key, (n_states * group_size, 2 + distribution.n_uniforms))
            action = act(observation, None, bits_to_uniform(words[:, 2:]))
            step = jax.vmap(env.step)(bits_to_keys(words[:, :2]), states, action)
            return (step.observation, step.state, total + step.reward), None

        start = (observation, states, jnp.zeros(n_states * group_size))
        return jax.lax.scan(body, start, split(key, HORIZON))[0][2]

    n_steps = n_states * group_size * HORIZON
    ceiling = n_steps / seconds(bare, key, observation, states)
    counted = grpo_jax.count(branches(key, first, actions).simulator_steps)
    ours = n_steps / seconds(branches, key, first, actions)
    print(
        f"| {env_id} | {ours / 1e6:.2f} M/s ({counted / n_steps:.0%} before an end) |"
        f" {ceiling / 1e6:.2f} M/s | {ours / ceiling:.0%} |"
    )


def main() -> None:
    print(f"jax {jax.__version__}, {jax.default_backend()}, {BRANCHES} branches, horizon {HORIZON}")
    print("| environment | branches (all steps) | ceiling | share |")
    print("|---|---|---|---|")
    for env_id in sys.argv[1:] or ["CartPole-v1", "Pendulum-v1", "Breakout-MinAtar"]:
        measure(env_id)


if __name__ == "__main__":
    main()
