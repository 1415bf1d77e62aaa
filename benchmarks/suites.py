"""What a world costs over its suite's own loop: steps per CPU second, both vmapped and compiled, random actions.

    python benchmarks/suites.py [ID ...] [--n-envs 1024] [--n-steps 60] [--policy]

The suite's loop steps native states with the suite's own functions and never resets; the world's does the same through
``world.step``, from the same keys. Loops begin at fresh states again and again, so that games of Pgx are
not over. "With resets" goes on for 100 steps before it is measured, with what a rollout does to environments: those whose
episode ends start over, and are counted. The best of three runs counts. A suite that is not installed is left out.

``--policy`` measures the library's rollout (policy of two layers of 64, resets, trajectory) beside a loop of the same policy and
``world.step`` that keeps observations, actions and rewards and resets nothing, one after the other.
"""

from __future__ import annotations

import argparse
import functools
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import grpo_jax
from grpo_jax import spaces
from grpo_jax.cache import loop_jit
from grpo_jax.noise import as_key, bits_to_keys, bits_to_uniform, draw_bits, split
from grpo_jax.training.rollout import rollout, start, step_environments

IDS = (
    "CartPole-v1",
    "pgx/connect_four",
    "navix/Navix-DoorKey-5x5-v0",
    "xminigrid/MiniGrid-DoorKey-5x5",
    "jumanji/Snake-v1",
    "jumanji/Game2048-v1",
    "craftax/Craftax-Classic-Symbolic-v1",
    "brax/inverted_pendulum",
    "brax/ant",
    "playground/CartpoleBalance",
)
N_STEPS = 5
"""Steps of a loop."""
N_TURNS = 9
"""How often a rollout and the bare loop are measured, one after the other."""
OPTIONS: dict[str, dict[str, Any]] = {"brax": {"backend": "spring"}}

Functions = tuple[Callable[[jax.Array], Any], Callable[[jax.Array, Any, jax.Array], Any]]
"""``key -> state`` and ``(key, state, action) -> state`` for one state."""


def native(env_id: str) -> Functions:
    """The suite's own functions; they draw from the keys in their states, where they have some."""
    prefix, slash, name = env_id.partition("/")
    if not slash:
        import gymnax

        env, params = gymnax.make(env_id)
        return (
            lambda key: env.reset_env(key, params)[1],
            lambda key, state, action: env.step_env(key, state, action, params)[:3],
        )
    if prefix == "pgx":
        import pgx

        env = pgx.make(name)

        def turn(key: jax.Array, state: Any, action: jax.Array) -> Any:
            """A move and a random answer to it."""
            state = env.step(state, action, key)
            logits = jnp.where(state.legal_action_mask, 0.0, -jnp.inf)
            return env.step(state, jax.random.categorical(key, logits), key)

        return env.init, turn
    if prefix == "navix":
        import navix

        env = navix.make(name)
        return env.reset, lambda key, state, action: env._step(state, action)
    if prefix == "xminigrid":
        import xminigrid

        env, params = xminigrid.make(name)
        return (
            lambda key: env.reset(params, key),
            lambda key, state, action: env.step(params, state, action),
        )
    if prefix == "jumanji":
        import jumanji

        env = jumanji.make(name)
        return lambda key: env.reset(key)[0], lambda key, state, action: env.step(state, action)
    if prefix == "craftax":
        from craftax.craftax_env import make_craftax_env_from_name

        env = make_craftax_env_from_name(name, auto_reset=False)
        params = env.default_params
        return (
            lambda key: env.reset_env(key, params)[1],
            lambda key, state, action: env.step_env(key, state, action, params)[:3],
        )
    if prefix == "brax":
        from brax import envs

        env = envs.get_environment(name, **OPTIONS["brax"])
    else:
        import mujoco_playground

        env = mujoco_playground.registry.load(name, config_overrides={"impl": "jax"})
    return env.reset, lambda key, state, action: env.step(jax.tree.map(lambda leaf: leaf, state), action)


def of_world(world: grpo_jax.World) -> Functions:
    """The same of a world."""

    def step(key: jax.Array, state: Any, action: jax.Array) -> Any:
        stepped = world.step(key, state, action)
        return stepped.observation, stepped.state, stepped.reward

    return lambda key: world.reset(key)[1], step


def state_of(stepped: Any) -> Any:
    """The state in what a step returns: the whole, or a part of a tuple."""
    if type(stepped) is tuple:
        return stepped[1] if len(stepped) == 3 else stepped[0]
    return stepped


def draw(space: spaces.ActionSpace, key: jax.Array, state: Any) -> jax.Array:
    """A random action; an allowed one in a game of Pgx, which an illegal one would end."""
    if isinstance(space, spaces.Box):
        return jax.random.uniform(key, space.shape, minval=-1.0, maxval=1.0)
    if hasattr(state, "legal_action_mask"):
        return jax.random.categorical(key, jnp.where(state.legal_action_mask, 0.0, -jnp.inf))
    return jax.random.randint(key, space.shape, 0, jnp.asarray(space.nvec if space.shape else space.nvec[0]))


def rate(functions: Functions, space: spaces.ActionSpace, n_envs: int, n_steps: int) -> float:
    """Steps per CPU second; everything that a step returns is computed."""
    reset, step = functions

    @jax.jit
    def loop(states: Any, key: jax.Array) -> Any:
        def body(states: Any, key: jax.Array) -> tuple[Any, Any]:
            keys = split(key, 2 * n_envs).reshape(2, n_envs)
            actions = jax.vmap(functools.partial(draw, space))(keys[0], states)
            stepped = jax.vmap(step)(keys[1], states, actions)
            new = jax.tree.map(lambda leaf, old: leaf.astype(old.dtype), state_of(stepped), states)
            return new, [jnp.sum(leaf, dtype=float) for leaf in jax.tree.leaves(stepped) if is_number(leaf)]

        return jax.lax.scan(body, states, split(key, N_STEPS))

    states = jax.jit(jax.vmap(reset))(split(as_key(jax.random.key(0)), n_envs))
    states = jax.tree.map(lambda leaf: jnp.asarray(leaf, leaf.dtype), states)
    jax.block_until_ready(loop(states, as_key(jax.random.key(1))))
    return time_of(lambda seed: loop(states, as_key(jax.random.key(seed))), n_envs, n_steps)


def rate_with_resets(world: grpo_jax.World, n_envs: int, n_steps: int) -> float:
    """The same of environments as a rollout steps them: what ends starts over."""

    @jax.jit
    def loop(environments: Any, key: jax.Array) -> Any:
        def body(environments: Any, key: jax.Array) -> tuple[Any, Any]:
            keys = split(key, 3 * n_envs).reshape(3, n_envs)
            actions = jax.vmap(functools.partial(draw, world.action_space))(keys[0], environments.state)
            environments, step = step_environments(world, environments, actions, *keys[1:])
            seen = jax.tree.leaves((step.observation, step.state, step.reward))
            return environments, [jnp.sum(leaf, dtype=float) for leaf in seen if is_number(leaf)]

        return jax.lax.scan(body, environments, split(key, N_STEPS))

    environments = jax.jit(functools.partial(start, world))(split(as_key(jax.random.key(0)), n_envs))
    for seed in range(100 // N_STEPS):
        environments, _ = loop(environments, as_key(jax.random.key(seed)))
    jax.block_until_ready(environments)
    return time_of(lambda seed: loop(environments, as_key(jax.random.key(seed))), n_envs, n_steps)


def share_of_rollout(world: grpo_jax.World, n_envs: int, n_steps: int) -> tuple[float, float]:
    """Steps per CPU second of the rollout, and of the bare loop of its policy and ``world.step``; both as ``run`` compiles."""
    config = grpo_jax.GRPOConfig(network="mlp")
    policy = grpo_jax.make_policy(config, world.observation_space, world.action_space)
    parameters = policy.init(as_key(jax.random.key(0)))
    first = jax.jit(functools.partial(start, world))(split(as_key(jax.random.key(0)), n_envs))

    @loop_jit
    def ours(environments: Any, key: jax.Array) -> Any:
        return rollout(
            world, policy, parameters, environments, key, N_STEPS, False, keep=lambda time, state: None
        )

    @loop_jit
    def bare(observation: Any, state: Any, key: jax.Array) -> Any:
        def body(carry: Any, words: jax.Array) -> tuple[Any, Any]:
            mask = jax.vmap(world.action_mask)(carry[1])
            seen = policy.parameters(parameters, carry[0], mask)
            action = policy.to_world(policy.distribution.sample(seen, bits_to_uniform(words[:, 2:])))
            step = jax.vmap(world.step)(bits_to_keys(words[:, :2]), carry[1], action)
            return (step.observation, step.state), (carry[0], action, step.reward)

        words = draw_bits(key, (N_STEPS, n_envs, 2 + policy.distribution.n_uniforms))
        return jax.lax.scan(body, (observation, state), words)

    for seed in range(100 // N_STEPS):  # until episodes end at all times
        first = ours(first, as_key(jax.random.key(seed)))[0]
    loops = (
        lambda seed: ours(first, as_key(jax.random.key(seed))),
        lambda seed: bare(first.observation, first.state, as_key(jax.random.key(seed))),
    )
    # By turns, for a core's speed comes and goes; the first turn compiles.
    rates = np.array([[time_of(loop, n_envs, n_steps, n_times=1) for loop in loops] for _ in range(N_TURNS)])
    ours_best, bare_best = rates[1:].max(axis=0)
    return float(ours_best), float(bare_best)


def time_of(loop: Callable[[int], Any], n_envs: int, n_steps: int, n_times: int = 3) -> float:
    """Steps per CPU second of a loop that takes a seed, the best of some times."""
    best, n_loops = float("inf"), -(-n_steps // N_STEPS)
    for _ in range(n_times):
        begin = time.process_time()
        for seed in range(n_loops):
            jax.block_until_ready(loop(seed))
        best = min(best, time.process_time() - begin)
    return n_loops * N_STEPS * n_envs / best


def is_number(leaf: jax.Array) -> bool:
    return not jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key) and leaf.size > 0


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("ids", nargs="*", default=IDS)
    parser.add_argument("--n-envs", type=int, default=1024)
    parser.add_argument("--n-steps", type=int, default=60)
    parser.add_argument("--policy", action="store_true")
    options = parser.parse_args()
    if options.policy:
        print(
            "| id | environments | rollout, steps/s | bare loop, steps/s | share |\n|---|---:|---:|---:|---:|"
        )
        for env_id in options.ids:
            world = grpo_jax.make(env_id, **OPTIONS.get(env_id.partition("/")[0], {}))
            mine, bare = share_of_rollout(world, options.n_envs, options.n_steps)
            print(
                f"| {env_id} | {options.n_envs} | {mine:,.0f} | {bare:,.0f} | {mine / bare:.2f} |", flush=True
            )
        return
    print(
        "| id | suite's own, steps/s | world.step, steps/s | ratio | with resets, steps/s | share | state, bytes |\n"
        "|---|---:|---:|---:|---:|---:|---:|"
    )
    for env_id in options.ids:
        try:
            world = grpo_jax.make(env_id, **OPTIONS.get(env_id.partition("/")[0], {}))
        except ImportError as error:
            print(f"{env_id}: {error}")
            continue
        rates = [
            rate(functions, world.action_space, options.n_envs, options.n_steps)
            for functions in (native(env_id), of_world(world))
        ]
        with_resets = rate_with_resets(world, options.n_envs, options.n_steps)
        state = jax.eval_shape(world.reset, as_key(jax.random.key(0)))[1]
        n_bytes = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(state))
        print(
            f"| {env_id} | {rates[0]:,.0f} | {rates[1]:,.0f} | {rates[0] / rates[1]:.2f} | {with_resets:,.0f} |"
            f" {with_resets / rates[0]:.2f} | {n_bytes} |",
            flush=True,
        )


if __name__ == "__main__":
    main()
