"""What an accelerator makes of the library: simulator steps per second, ceilings, chunks, noise, agents, a profile.

    python benchmarks/gpu.py                                       # all parts, on the default device
    python benchmarks/gpu.py --parts stage --envs CartPole-v1 --n-envs 4096 65536
    XLA_FLAGS=... python benchmarks/gpu.py --parts stage           # another setting of XLA, in a process of its own

ceilings
    Bandwidth of a copy (bytes read and written), matrix products in the default precision and in float32.
stage
    The stage that follows branches, alone: the ``n_envs`` x 32 decision states of an iteration, all candidates, MLP 2x64 or the
    network of MinAtar. Only steps that count are counted; CartPole's policy is trained before, so that nearly all do.
bfloat16
    The same with a policy that computes in bfloat16 in branches, at the largest ``n_envs``: what half the bytes would bring.
chunks
    The same at the largest ``n_envs``, by ``max_branches``.
iteration
    Whole iterations, and their three parts alone, with minibatches of an eighth of the states.
agents
    Many agents of CartPole's preset side by side.
noise
    Random words per second, threefry (as the library draws them, and JAX's own) and ``rbg``.
profile
    The kernels that take the longest in one iteration.

Seconds are wall-clock seconds, medians of some calls after a first one that compiles. One line of JSON a row.
"""

from __future__ import annotations

import argparse
import collections
import functools
import gzip
import json
import pathlib
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

import grpo_jax
from grpo_jax import counter
from grpo_jax.noise import as_key, bits_to_uniform, draw_bits, split
from grpo_jax.training import loop, run

PARTS = ("ceilings", "stage", "bfloat16", "chunks", "iteration", "agents", "noise", "profile")
ENVS = ("CartPole-v1", "Breakout-MinAtar", "Pendulum-v1")
N_STEPS = 32
ROUNDS = 5
Row = dict[str, Any]


def seconds_of(function: Callable[[], Any], rounds: int = ROUNDS) -> tuple[float, float]:
    """Median seconds of a call, and those of the first one beyond that: compiling."""
    start = time.perf_counter()
    jax.block_until_ready(function())
    first = time.perf_counter() - start
    times = []
    for _ in range(rounds):
        start = time.perf_counter()
        jax.block_until_ready(function())
        times.append(time.perf_counter() - start)
    return statistics.median(times), first - statistics.median(times)


@functools.cache
def learned(env_id: str) -> Any:
    """Parameters of CartPole's trained policy; None for other ids, whose policies start."""
    if env_id != "CartPole-v1":
        return None
    result = grpo_jax.train(
        grpo_jax.preset(env_id), grpo_jax.make(env_id), jax.random.key(0), grpo_jax.preset_timesteps(env_id)
    )
    return result.state.learner.policy


def memory() -> float:
    """Most bytes that the device has held so far, in GiB; NaN where it does not say."""
    stats = jax.devices()[0].memory_stats() or {}
    return round(stats.get("peak_bytes_in_use", float("nan")) / 2**30, 2)


def config_of(env_id: str, n_envs: int) -> grpo_jax.GRPOConfig:
    """The preset with many environments and few, large minibatches."""
    try:
        config = grpo_jax.preset(env_id)
    except ValueError:
        config = grpo_jax.GRPOConfig(horizon=16, group_size=8, bootstrap=True)
    return config.replace(n_envs=n_envs, n_steps=N_STEPS, batch_size=max(1, n_envs * N_STEPS // 8))


def ceilings() -> list[Row]:
    """What the device can do."""
    key, rows = jax.random.key(0), []
    data = jax.random.normal(key, (1 << 28,))
    copy = jax.jit(lambda x: x + 1.0)
    copied, _ = seconds_of(lambda: copy(data))
    rows.append({"ceiling": "copy", "GB/s": 2 * data.nbytes / copied / 1e9})
    a = jax.random.normal(key, (8192, 8192))
    narrow, weight = jax.random.normal(key, (1 << 22, 64)), jax.random.normal(key, (64, 64))
    for precision in ("default", "float32"):
        with jax.default_matmul_precision(precision):
            product = jax.jit(lambda a, b: a @ b)
            taken, _ = seconds_of(lambda product=product: product(a, a))
            rows.append({"ceiling": f"8192^3, {precision}", "TFLOP/s": 2 * 8192**3 / taken / 1e12})
            taken, _ = seconds_of(lambda product=product: product(narrow, weight))
            rows.append(
                {
                    "ceiling": f"4194304x64x64, {precision}",
                    "TFLOP/s": 2 * narrow.size * 64 / taken / 1e12,
                    "GB/s": 2 * narrow.nbytes / taken / 1e9,
                }
            )
    return rows


class Prepared:
    """An environment's state after one iteration, and the jitted parts of the next."""

    def __init__(self, env_id: str, config: grpo_jax.GRPOConfig) -> None:
        self.env, self.config = grpo_jax.make(env_id), config
        state = jax.jit(lambda key: loop.init(config, self.env, key))(as_key(jax.random.key(0)))
        if (policy := learned(env_id)) is not None:
            state = state.replace(learner=state.learner.replace(policy=policy))
        self.state = state
        self.collect = jax.jit(
            lambda config, state: loop.collect(
                config, self.env, state, keep_next_observation=config.bootstrap, keep_states=False
            )
        )
        self.compare = jax.jit(
            lambda config, state, trajectory: loop.compare(config, self.env, state, trajectory)
        )
        self.improve = jax.jit(loop.improve)
        self.whole = jax.jit(lambda config, state: loop.iteration(config, self.env, state, 1000))

    def parts(self) -> Row:
        """Seconds of each part, and of the iteration."""
        collected, trajectory = self.collect(self.config, self.state)
        compared = self.compare(self.config, collected, trajectory)
        names: dict[str, Callable[[], Any]] = {
            "collect": lambda: self.collect(self.config, self.state),
            "compare": lambda: self.compare(self.config, collected, trajectory),
            "improve": lambda: self.improve(self.config, collected, compared),
            "iteration": lambda: self.whole(self.config, self.state),
        }
        row: Row = {}
        for name, call in names.items():
            row[name], compiling = seconds_of(call, 3)
            if name == "iteration":
                row["compile"] = compiling
        n_simulator = counter.to_int(compared.simulator_steps)
        return row | {
            "simulator_steps": n_simulator,
            "simulator_steps/s": n_simulator / row["iteration"],
            "decision_steps/s": self.config.n_states / row["iteration"],
            "GiB": memory(),
        }


def stage(env_id: str, n_envs: int, max_branches: int = 0, dtype: Any = jnp.float32) -> Row:
    """The stage that follows branches, alone; the policy computes in ``dtype``."""
    env, config = grpo_jax.make(env_id), config_of(env_id, n_envs)
    policy = grpo_jax.make_policy(config, env.observation_space, env.action_space)
    key, n_states = as_key(jax.random.key(0)), n_envs * N_STEPS
    parameters = learned(env_id) or policy.init(key)
    group = min(getattr(policy.distribution, "n_actions", 8), 8)

    @jax.jit
    def prepare(key: jax.Array) -> Any:
        observation, states = jax.vmap(env.reset)(split(key, n_states))
        uniforms = bits_to_uniform(draw_bits(key, (n_states, group, policy.distribution.n_uniforms)))
        wide = jax.tree.map(lambda leaf: jnp.repeat(leaf[:, None], group, axis=1), observation)
        return states, policy.act(parameters, wide, None, uniforms)

    states, actions = prepare(key)

    narrow = jax.tree.map(lambda leaf: leaf.astype(dtype), parameters)

    def act(observation: Any, mask: jax.Array | None, uniforms: jax.Array) -> jax.Array:
        seen = jax.tree.map(lambda leaf: leaf.astype(dtype), observation)
        found = policy.parameters(narrow, seen, mask).astype(jnp.float32)
        return policy.to_world(policy.distribution.sample(found, uniforms))

    @jax.jit
    def follow(states: Any, actions: jax.Array) -> Any:
        return grpo_jax.group_returns(
            env,
            act,
            key,
            states,
            actions,
            horizon=config.horizon,
            gamma=0.99,
            n_uniforms=policy.distribution.n_uniforms,
            max_branches=max_branches,
        )

    taken, compiling = seconds_of(lambda: follow(states, actions))
    counted = counter.to_int(follow(states, actions).simulator_steps)
    return {
        "env": env_id,
        "n_envs": n_envs,
        "branches": n_states * group,
        "horizon": config.horizon,
        "max_branches": max_branches,
        "dtype": jnp.dtype(dtype).name,
        "counted": counted / (n_states * group * config.horizon),
        "seconds": taken,
        "simulator_steps/s": counted / taken,
        "compile": compiling,
        "GiB": memory(),
    }


def agents(n_agents: int) -> Row:
    """Agents of CartPole's preset side by side, 8 iterations."""
    env, config = grpo_jax.make("CartPole-v1"), grpo_jax.preset("CartPole-v1")
    state = run.first_state(config, env, jax.random.key(0), n_seeds=n_agents)
    advance = jax.jit(
        lambda state: jax.lax.fori_loop(
            0, 8, lambda _, state: jax.vmap(lambda one: loop.iteration(config, env, one, 38)[0])(state), state
        )
    )
    taken, compiling = seconds_of(lambda: advance(state), 3)
    after = advance(state)
    return {
        "agents": n_agents,
        "decision_steps/s": 8 * n_agents * config.n_states / taken,
        "simulator_steps/s": counter.to_int(after.simulator_steps) / taken,
        "seconds of 38 iterations": taken / 8 * 38,
        "compile": compiling,
        "GiB": memory(),
    }


def noise(n_words: int = 1 << 28) -> list[Row]:
    """Random words per second."""
    rows = []
    draws = {
        "threefry, ours": (as_key(jax.random.key(0)), lambda key: draw_bits(key, (n_words,))),
        "threefry, JAX's": (jax.random.key(0), lambda key: jax.random.bits(key, (n_words,))),
        "rbg": (jax.random.key(0, impl="rbg"), lambda key: jax.random.bits(key, (n_words,))),
        "threefry, ours, 2^22 keys": (split(jax.random.key(0), 1 << 22), lambda keys: draw_bits(keys, (64,))),
    }
    for name, (key, draw) in draws.items():
        drawn = jax.jit(lambda key, draw=draw: jnp.sum(draw(key)))
        taken, _ = seconds_of(lambda drawn=drawn, key=key: drawn(key))
        rows.append({"noise": name, "words/s": n_words / taken})
    return rows


def profile(env_id: str, n_envs: int, n_kernels: int) -> list[Row]:
    """The kernels of one iteration, by their time."""
    prepared = Prepared(env_id, config_of(env_id, n_envs))
    jax.block_until_ready(prepared.whole(prepared.config, prepared.state))
    with tempfile.TemporaryDirectory() as folder:
        with jax.profiler.trace(folder):
            jax.block_until_ready(prepared.whole(prepared.config, prepared.state))
        found = next(pathlib.Path(folder).rglob("*.trace.json.gz"))
        events = json.loads(gzip.decompress(found.read_bytes()))["traceEvents"]
    threads = {
        (event["pid"], event["tid"]): event["args"]["name"]
        for event in events
        if event.get("ph") == "M" and event.get("name") == "thread_name"
    }
    total: dict[str, list[float]] = collections.defaultdict(lambda: [0.0, 0.0])
    for event in events:
        if event.get("ph") == "X" and "Stream" in threads.get((event["pid"], event["tid"]), ""):
            entry = total[event["name"]]
            entry[0] += event["dur"] * 1e-6
            entry[1] += 1
    whole = sum(seconds for seconds, _ in total.values())
    ranked = sorted(total.items(), key=lambda item: -item[1][0])[:n_kernels]
    return [
        {"env": env_id, "n_envs": n_envs, "kernels": sum(n for _, n in total.values()), "seconds": whole}
    ] + [
        {"kernel": name[:90], "share": seconds / whole, "calls": n, "us": seconds / n * 1e6}
        for name, (seconds, n) in ranked
    ]


def rows_of(part: str, options: argparse.Namespace) -> Any:
    """The rows of a part, as they come."""
    if part == "ceilings":
        yield from ceilings()
    elif part == "noise":
        yield from noise()
    elif part == "agents":
        for n_agents in options.agents:
            yield agents(n_agents)
    elif part == "bfloat16":
        for env_id in options.envs:
            yield stage(env_id, max(options.n_envs), dtype=jnp.bfloat16)
    elif part == "chunks":
        for env_id in options.envs:
            for power in options.chunks:
                yield stage(env_id, max(options.n_envs), 1 << power)
    else:
        for env_id in options.envs:
            for n_envs in options.n_envs if part != "profile" else [max(options.n_envs)]:
                if part == "stage":
                    yield stage(env_id, n_envs)
                elif part == "profile":
                    yield from profile(env_id, n_envs, options.kernels)
                else:
                    prepared = Prepared(env_id, config_of(env_id, n_envs))
                    yield {"env": env_id, "n_envs": n_envs} | prepared.parts()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--envs", nargs="+", default=list(ENVS))
    parser.add_argument("--n-envs", nargs="+", type=int, default=[1024, 4096, 16_384, 65_536])
    parser.add_argument("--chunks", nargs="+", type=int, default=[14, 16, 18, 20, 22], help="powers of two")
    parser.add_argument("--agents", nargs="+", type=int, default=[1, 64, 2048])
    parser.add_argument("--kernels", type=int, default=12)
    parser.add_argument("--out", type=pathlib.Path, help="also append the rows to this file")
    options = parser.parse_args()
    about = {"device": jax.devices()[0].device_kind, "backend": jax.default_backend(), "jax": jax.__version__}
    emit(about, options.out)
    for part in options.parts:
        try:
            for row in rows_of(part, options):
                emit({"part": part} | row, options.out)
        except Exception as error:  # the other parts are still worth their time
            print(f"{part}: {type(error).__name__}: {str(error)[:1500]}", file=sys.stderr, flush=True)


def emit(row: Row, out: pathlib.Path | None) -> None:
    """Prints a row, rounded, and keeps it."""
    line = json.dumps({name: float(f"{v:.4g}") if isinstance(v, float) else v for name, v in row.items()})
    print(line, flush=True)
    if out is not None:
        with out.open("a", encoding="utf-8") as file:
            file.write(line + "\n")


if __name__ == "__main__":
    main()
