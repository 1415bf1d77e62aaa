"""What limits the library: simulator steps against a ceiling, compile time, memory, and how cost grows.

    taskset -c 1 python benchmarks/limits.py                   # everything; rows are kept, so a second call goes on
    python benchmarks/limits.py --envs CartPole-v1 Pendulum-v1 --fresh
    python benchmarks/limits.py --branches 131072              # a GPU: the default there

*Ceiling*: a bare loop of policy and ``step`` with the same network, the same number of worlds side by side (as many as a chunk
of the library's holds), without candidates, alive masks, discounts or counts. Both are timed in turns in one process; the
share is the median over rounds.

*Scaling*: the stage that follows branches, alone, as one of four sizes grows. Flat cost per simulator step is the claim.

Seconds are CPU seconds on a CPU, wall-clock seconds elsewhere. Writes ``docs/results/limits_table.md`` and
``docs/results/images/limits_scaling.png``.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct

import grpo_jax
from grpo_jax import cache
from grpo_jax.groups.branch import default_branches
from grpo_jax.noise import as_key, bits_to_keys, bits_to_uniform, draw_bits, split
from grpo_jax.training import evaluate, run

DOCS = Path(__file__).parents[1] / "docs" / "results"
FACTORS = (1, 2, 4, 8, 16, 32, 64)
SCALING_ENV = "Pendulum-v1"  # ends by a time limit alone, and a group of any size can be sampled
LONGEST_EVALUATION = 1000


def clock() -> float:
    """CPU seconds on a CPU, which neighbours disturb less; wall-clock seconds where another device works."""
    return time.process_time() if jax.default_backend() == "cpu" else time.perf_counter()


def timed(function: Callable[..., Any], *args: Any) -> float:
    """Seconds of one call."""
    start = clock()
    jax.block_until_ready(function(*args))
    return clock() - start


@struct.dataclass
class Counting(grpo_jax.World):
    """A world that pays 1 for every step: undiscounted returns are then lengths of branches."""

    world: grpo_jax.World

    observation_space = property(lambda self: self.world.observation_space)
    action_space = property(lambda self: self.world.action_space)

    def reset(self, key: jax.Array) -> Any:
        return self.world.reset(key)

    def step(self, key: jax.Array, state: Any, action: jax.Array) -> grpo_jax.Step:
        step = self.world.step(key, state, action)
        return step.replace(reward=jnp.ones_like(step.reward))


class Stage:
    """The stage that follows branches, and its ceiling, for one environment and one set of sizes."""

    def __init__(self, env: grpo_jax.World, n_states: int, group: int | None, horizon: int, m: int) -> None:
        """Draws states and actions.

        Args:
          env: the world.
          n_states: branches in all where ``group`` is None, else decision states.
          group: candidates of a state; None: all actions, 8 where they are continuous.
          horizon: steps of a branch.
          m: branches of a candidate.
        """
        self.env, self.horizon, self.m = env, horizon, m
        policy = grpo_jax.make_policy(
            grpo_jax.GRPOConfig(network="mlp"), env.observation_space, env.action_space
        )
        self.distribution = distribution = policy.distribution
        if group is None:
            group = min(getattr(distribution, "n_actions", 8), 64)
            n_states = max(1, n_states // group)
        self.key = key = as_key(jax.random.key(0))
        parameters = policy.init(key)

        def act(observation: Any, mask: Any, uniforms: jax.Array) -> jax.Array:
            drawn = distribution.sample(policy.parameters(parameters, observation, mask), uniforms)
            return policy.to_world(drawn)

        self.act, self.n_branches = act, n_states * group * m
        self.start = jax.jit(jax.vmap(env.reset))(split(key, self.n_branches))
        observation, states = jax.tree.map(lambda leaf: leaf[:n_states], self.start)
        uniforms = bits_to_uniform(draw_bits(key, (n_states, group, distribution.n_uniforms)))
        wide = jax.tree.map(lambda leaf: jnp.repeat(leaf[:, None], group, axis=1), observation)
        self.states, self.actions = states, jax.jit(act)(wide, None, uniforms)

    def branches(
        self, world: grpo_jax.World | None = None, gamma: float = 0.99, past_truncation: bool = False
    ) -> Callable[[], Any]:
        """The library's own stage; compiled at the first call."""

        @jax.jit
        def follow(key: jax.Array, states: Any, actions: jax.Array) -> Any:
            return grpo_jax.group_returns(
                self.env if world is None else world,
                self.act,
                key,
                states,
                actions,
                horizon=self.horizon,
                gamma=gamma,
                n_uniforms=self.distribution.n_uniforms,
                n_rollouts=self.m,
                past_truncation=past_truncation,
            )

        return lambda: follow(self.key, self.states, self.actions)

    def ceiling(self) -> Callable[[], Any]:
        """The bare loop."""
        n_worlds, n_uniforms = self.n_branches, self.distribution.n_uniforms

        @jax.jit
        def bare(key: jax.Array, observation: Any, states: Any) -> Any:
            def body(carry: Any, key: jax.Array) -> tuple[Any, None]:
                observation, states, total = carry
                words = draw_bits(key, (n_worlds, 2 + n_uniforms))
                action = self.act(observation, None, bits_to_uniform(words[:, 2:]))
                step = jax.vmap(self.env.step)(bits_to_keys(words[:, :2]), states, action)
                return (step.observation, step.state, total + step.reward), None

            start = (observation, states, jnp.zeros(n_worlds))
            # All of it, or XLA would step nothing where the reward is one constant.
            return jax.lax.scan(body, start, split(key, self.horizon))[0]

        return lambda: bare(self.key, *self.start)

    def passes(self, returned: Any) -> int:
        """World steps that the loop really made for each branch: it stops where the last branch has ended."""
        if grpo_jax.count(returned.simulator_steps) == self.n_branches * self.horizon:
            return self.horizon
        if self.m > 1:
            raise ValueError("lengths of branches can only be told apart with one branch a candidate")
        lengths = self.branches(Counting(self.env), gamma=1.0)().returns
        return round(float(jnp.max(lengths)))


def measure_throughput(env: grpo_jax.World, branches: int, horizon: int, rounds: int) -> dict[str, Any]:
    """Simulator steps per second, ours and the ceiling's, in turns; ``branches`` at most, else one chunk of them."""
    _, state = jax.eval_shape(env.reset, as_key(jax.random.key(0)))
    stage = Stage(env, min(branches, default_branches(env, state)), None, horizon, 1)
    ours, ceiling = stage.branches(), stage.ceiling()
    passes = stage.passes(ours())
    jax.block_until_ready(ceiling())
    pairs = [(timed(ours), timed(ceiling)) for _ in range(rounds)]
    mine = [stage.n_branches * passes / max(a, 1e-9) for a, _ in pairs]
    theirs = [stage.n_branches * horizon / max(b, 1e-9) for _, b in pairs]
    return {
        "branches": stage.n_branches,
        "passes": passes,
        "steps_per_second": statistics.median(mine),
        "ceiling": statistics.median(theirs),
        "share": statistics.median(a / b for a, b in zip(mine, theirs, strict=True)),
    }


def measure_programs(env_id: str, env: grpo_jax.World) -> dict[str, Any]:
    """Seconds to trace and to compile each program of a run with the preset, and the memory that the largest takes."""
    config, key = grpo_jax.preset(env_id), as_key(jax.random.key(0))
    jax.clear_caches()
    state = jax.eval_shape(lambda key: grpo_jax.init(config, env, key), key)
    n_iterations = np.int32(100)
    programs: dict[str, Callable[[], Any]] = {
        "init": lambda: run._init.lower(config, env, key, None),
        "chunk": lambda: run._chunk.lower(config, env, state, np.int32(0), n_iterations, None, False, None),
        "evaluate": lambda: evaluate._play.lower(
            state.policy, state.learner.policy, env, key, 128, False, LONGEST_EVALUATION
        ),
    }
    row: dict[str, Any] = {}
    for name, lower in programs.items():
        jax.clear_caches()
        start = clock()
        lowered = lower()
        traced = clock()
        compiled = cache.compile_quickly(lowered) if name == "init" else lowered.compile()
        row[f"trace_{name}"], row[f"compile_{name}"] = traced - start, clock() - traced
        memory = compiled.memory_analysis()
        if name == "chunk" and memory is not None:
            sizes = memory.temp_size_in_bytes, memory.argument_size_in_bytes, memory.output_size_in_bytes
            row["memory_mb"] = sum(sizes) / 2**20
    return row


def measure_scaling(base_states: int, rounds: int) -> list[dict[str, Any]]:
    """Seconds per simulator step as each of four sizes grows alone."""
    env, base = grpo_jax.make(SCALING_ENV), {"n_envs": base_states, "G": 4, "H": 8, "M": 1}
    rows = []
    for name in base:
        for factor in FACTORS:
            sizes = base | {name: base[name] * factor}
            stage = Stage(env, sizes["n_envs"], sizes["G"], sizes["H"], sizes["M"])
            follow = stage.branches(past_truncation=True)
            n_steps = grpo_jax.count(follow().simulator_steps)
            assert n_steps == stage.n_branches * sizes["H"], (
                "a branch ended early: its steps cost more or less"
            )
            repeats = max(1, (1 << 17) // n_steps)  # the clock of CPU seconds is coarse

            def several(follow: Callable[[], Any] = follow, repeats: int = repeats) -> Any:
                return [follow() for _ in range(repeats)]

            seconds = statistics.median(timed(several) for _ in range(rounds)) / repeats
            rows.append({"size": name, "factor": factor, "ns_per_step": seconds / n_steps * 1e9} | sizes)
            print(f"{name} x{factor}: {rows[-1]['ns_per_step']:.0f} ns per simulator step", flush=True)
    return rows


def device_name() -> str:
    """The device, in words."""
    if jax.default_backend() != "cpu":
        return jax.devices()[0].device_kind
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        return "one core of " + next(line.split(":")[1].strip() for line in lines if "model name" in line)
    except (OSError, StopIteration):
        return platform.processor() or "a CPU"


def table(rows: list[dict[str, Any]], scaling: list[dict[str, Any]], setting: dict[str, Any]) -> str:
    """The Markdown page."""
    unit = "CPU s" if setting["backend"] == "cpu" else "s"
    lines = [
        "# Limits",
        "",
        f"Written by `python benchmarks/limits.py --rounds {setting['rounds']} --horizon {setting['horizon']}`; edit"
        f" that script, not this file. {setting['device']},"
        f" jax {setting['jax']}; others may have used the machine at the same time.",
        "",
        f"Steps: `group_returns` with at most {setting['branches']} branches (one chunk) of {setting['horizon']} steps,"
        " MLP 2x64, against a bare loop of policy and `step` with as many worlds; in turns in one process, medians over"
        f" {setting['rounds']} rounds. Compiling ({unit}, tracing and XLA): the programs of a run with the preset,"
        " without a cache. Memory: arguments, results and temporaries of the largest program, the loop of iterations.",
        "",
        f"| environment | branches | million simulator steps/{unit} | ceiling | share | init {unit} | iterations {unit} |"
        f" evaluate {unit} | memory MB |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        compiling = [row[f"trace_{name}"] + row[f"compile_{name}"] for name in ("init", "chunk", "evaluate")]
        seconds = " | ".join(f"{value:.1f}" for value in compiling)
        lines.append(
            f"| {row['env']} | {row['branches']:,} | {row['steps_per_second'] / 1e6:.3g} | {row['ceiling'] / 1e6:.3g} |"
            f" {row['share']:.0%} | {seconds} | {row.get('memory_mb', float('nan')):.1f} |"
        )
    if scaling:
        lines += [
            "",
            f"Nanoseconds per simulator step in {SCALING_ENV} as one size grows, the others kept:"
            f" {', '.join(f'{name}={scaling[0][name]}' for name in ('G', 'H', 'M'))}, {scaling[0]['n_envs']} decision"
            " states (`n_envs` times `n_steps`). ![Scaling](images/limits_scaling.png)",
            "",
            f"| | {' | '.join(f'{factor}x' for factor in FACTORS)} |",
            "|---" * (len(FACTORS) + 1) + "|",
        ]
        for name in ("n_envs", "G", "H", "M"):
            values = [f"{row['ns_per_step']:.0f}" for row in scaling if row["size"] == name]
            lines.append(f"| {name} | {' | '.join(values)} |")
    return "\n".join(lines) + "\n"


def plot(scaling: list[dict[str, Any]], setting: dict[str, Any], path: Path) -> None:
    """Cost per simulator step over the factor by which a size grew."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4.2), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    labels = {
        "n_envs": "decision states (n_envs)",
        "G": "group size G",
        "H": "horizon H",
        "M": "rollouts per candidate M",
    }
    for (name, label), marker in zip(labels.items(), "os^D", strict=True):
        rows = [row for row in scaling if row["size"] == name]
        axes.plot(
            [r["factor"] for r in rows],
            [r["ns_per_step"] for r in rows],
            marker=marker,
            label=label,
            alpha=0.8,
        )
    axes.set_xscale("log", base=2)
    axes.set_xticks(FACTORS, [f"{factor}x" for factor in FACTORS])
    axes.set_ylim(bottom=0)
    axes.set_xlabel("growth of one size, the others kept")
    axes.set_ylabel("ns per simulator step")
    axes.set_title(f"{SCALING_ENV}, {setting['device']}", fontsize=10)
    axes.grid(alpha=0.3)
    axes.legend()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=130)


def main() -> None:
    on_cpu = jax.default_backend() == "cpu"
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--envs", nargs="*", default=grpo_jax.env_ids(), metavar="ENV")
    parser.add_argument("--branches", type=int, default=4096 if on_cpu else 1 << 17)
    parser.add_argument("--horizon", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--scaling-states", type=int, default=64 if on_cpu else 4096)
    parser.add_argument("--rows", type=Path, default=Path("runs/limits"), help="where measured rows are kept")
    parser.add_argument("--fresh", action="store_true", help="measure again what the rows hold already")
    parser.add_argument("--docs", type=Path, default=DOCS)
    options = parser.parse_args()
    setting = {
        "device": device_name(),
        "backend": jax.default_backend(),
        "jax": jax.__version__,
        **{name: getattr(options, name) for name in ("branches", "horizon", "rounds")},
    }
    options.rows.mkdir(parents=True, exist_ok=True)
    rows = []
    for env_id in options.envs:
        file = options.rows / f"{setting['backend']}-{options.branches}-{env_id}.json"
        if options.fresh or not file.exists():
            jax.clear_caches()
            env = grpo_jax.make(env_id)
            row = {"env": env_id} | measure_throughput(env, options.branches, options.horizon, options.rounds)
            file.write_text(json.dumps(row | measure_programs(env_id, env)), encoding="utf-8")
        rows.append(json.loads(file.read_text(encoding="utf-8")))
        last = rows[-1]
        print(f"{env_id}: {last['steps_per_second'] / 1e6:.2f} M/s, {last['share']:.0%}", flush=True)
    file = options.rows / f"{setting['backend']}-{options.scaling_states}-scaling.json"
    if options.fresh or not file.exists():
        file.write_text(json.dumps(measure_scaling(options.scaling_states, options.rounds)), encoding="utf-8")
    scaling = json.loads(file.read_text(encoding="utf-8"))
    (options.docs / "limits_table.md").write_text(table(rows, scaling, setting), encoding="utf-8")
    plot(scaling, setting, options.docs / "images" / "limits_scaling.png")


if __name__ == "__main__":
    main()
