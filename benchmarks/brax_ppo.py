"""Brax' own PPO, and this library with the same settings, on one device: steps per second, seconds to a score.

    python benchmarks/brax_ppo.py brax/ant --algos ppo episodes branches --steps 20_000_000
    python benchmarks/brax_ppo.py playground/CheetahRun --steps 20_000_000

PPO runs with its suite's published settings: of Brax' training notebook for ``ant``, of Playground's ``brax_ppo_config`` for its
ids, but for its resets between evaluations. *episodes* has them too, translated; *branches* has the same networks, and groups in place of lambda-returns. Returns are
means of 128 episodes of the sampled policy, without the rewards that are only shaped for training. Seconds are wall-clock
seconds of training, compiling and evaluations apart. One line of JSON a row.
"""

from __future__ import annotations

import argparse
import itertools
import json
import time
from typing import Any

import jax
import jax.numpy as jnp

import grpo_jax

ANT: dict[str, Any] = {
    "num_envs": 4096,
    "batch_size": 2048,
    "num_minibatches": 32,
    "num_updates_per_batch": 4,
    "unroll_length": 5,
    "discounting": 0.97,
    "learning_rate": 3e-4,
    "entropy_cost": 1e-2,
    "normalize_observations": True,
    "reward_scaling": 10,
    "episode_length": 1000,
    "action_repeat": 1,
}
NETWORKS: dict[str, Any] = {"net_arch": (32,) * 4, "critic_net_arch": (256,) * 5, "activation": "silu"}
N_EVALUATIONS = 4
Curve = list[tuple[float, int, float]]
"""Seconds, decision steps, return."""


def settings_of(env_id: str) -> dict[str, Any]:
    """The published settings of PPO for an id."""
    prefix, _, name = env_id.partition("/")
    if prefix == "brax":
        return dict(ANT)
    from mujoco_playground.config import dm_control_suite_params

    settings = dict(dm_control_suite_params.brax_ppo_config(name))
    return {name: settings[name] for name in ANT if name in settings}


def mend_jax() -> None:
    """Puts back what Brax 0.14.2 calls and jax no longer has."""
    if not hasattr(jax, "device_put_replicated"):
        jax.device_put_replicated = lambda tree, devices: jax.tree.map(lambda x: jnp.asarray(x)[None], tree)


def train_ppo(env_id: str, options: dict[str, Any], n_steps: int, seed: int) -> tuple[Curve, float]:
    """Brax' PPO; the curve, and seconds to compile."""
    from brax.training.agents.ppo.train import train

    prefix, _, name = env_id.partition("/")
    settings: dict[str, Any] = settings_of(env_id)
    if prefix == "brax":
        from brax import envs

        env = envs.get_environment(name, **options)
    else:
        from mujoco_playground import registry, wrapper

        env = registry.load(name, config_overrides={"impl": "jax"})
        settings["wrap_env_fn"] = wrapper.wrap_for_brax_training
    mend_jax()
    curve: Curve = []

    def progress(steps: int, metrics: Any) -> None:
        seconds = float(metrics.get("training/walltime", 0.0))
        curve.append((seconds, int(steps), float(metrics["eval/episode_reward"])))

    train(
        env, num_timesteps=n_steps, num_evals=N_EVALUATIONS + 1, seed=seed, progress_fn=progress, **settings
    )
    # The first part of training compiles; the others do not.
    rates = [(b[1] - a[1]) / max(b[0] - a[0], 1e-9) for a, b in itertools.pairwise(curve[1:])]
    rate = sorted(rates)[len(rates) // 2] if rates else float("nan")
    compiling = curve[1][0] - curve[1][1] / rate
    return [(max(0.0, seconds - compiling), steps, value) for seconds, steps, value in curve], compiling


def config_of(env_id: str, algo: str) -> grpo_jax.GRPOConfig:
    """The same settings for this library."""
    s = settings_of(env_id)
    n_states = s["batch_size"] * s["num_minibatches"] * s["unroll_length"]
    config = grpo_jax.GRPOConfig(
        candidates="episodes",
        n_envs=s["num_envs"],
        n_steps=n_states // s["num_envs"],
        batch_size=s["batch_size"] * s["unroll_length"],
        n_epochs=s["num_updates_per_batch"],
        learning_rate=s["learning_rate"],
        gamma=s["discounting"],
        ent_coef=s["entropy_cost"],
        normalize_observations=s["normalize_observations"],
        clip_range=0.3,
        log_std_init=-0.37,  # Brax' standard deviations start at softplus(0)
        max_grad_norm=1e9,
        bootstrap=True,
        **NETWORKS,
    )
    if algo == "episodes":
        return config
    # Groups cost simulator steps: fewer environments, and one state in eight is branched.
    return config.replace(
        candidates="sample",
        group_size=4,
        horizon=8,
        branch_every=8,
        n_envs=config.n_envs // 4,
        batch_size=max(1, config.batch_size // 4),
        max_grad_norm=0.5,
    )


def train_ours(
    env_id: str, options: dict[str, Any], algo: str, n_steps: int, seed: int
) -> tuple[Curve, float, float]:
    """This library; the curve, seconds to compile, and simulator steps."""
    env, config = grpo_jax.make(env_id, **options), config_of(env_id, algo)
    curve: Curve = []
    paused, simulator_steps = 0.0, 0
    every = max(1, n_steps // config.n_states // N_EVALUATIONS)
    compiling = 0.0

    def callback(chunk: grpo_jax.Chunk) -> None:
        nonlocal paused, simulator_steps, compiling
        before = time.perf_counter()
        value = float(jnp.mean(grpo_jax.evaluate(chunk.state, env, jax.random.key(1), 128)))
        curve.append((chunk.seconds - paused, chunk.decision_steps, value))
        simulator_steps, compiling = chunk.simulator_steps, chunk.compile_seconds
        paused += time.perf_counter() - before

    grpo_jax.run(
        config, env, jax.random.key(seed), n_steps, callback=callback, callback_every=min(every, 256)
    )
    return curve, compiling, simulator_steps


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("env", metavar="ID")
    parser.add_argument(
        "--algos", nargs="+", choices=("ppo", "episodes", "branches"), default=["ppo", "episodes"]
    )
    parser.add_argument("--steps", type=int, default=20_000_000)
    parser.add_argument("--seeds", nargs="+", type=int, default=[0])
    parser.add_argument("--backend", default="spring", help="of Brax")
    options = parser.parse_args()
    making = {"backend": options.backend} if options.env.startswith("brax/") else {}
    for seed in options.seeds:
        for algo in options.algos:
            row: dict[str, Any] = {"env": options.env, "algo": algo, "seed": seed}
            if algo == "ppo":
                curve, row["compile"] = train_ppo(options.env, making, options.steps, seed)
            else:
                curve, row["compile"], row["simulator_steps"] = train_ours(
                    options.env, making, algo, options.steps, seed
                )
            seconds, steps, value = curve[-1]
            row |= {
                "seconds": seconds,
                "decision_steps": steps,
                "decision_steps/s": steps / max(seconds, 1e-9),
            }
            row |= {"return": value, "curve": [[float(f"{x:.4g}") for x in point] for point in curve]}
            row["device"] = jax.devices()[0].device_kind
            print(
                json.dumps({k: float(f"{v:.4g}") if isinstance(v, float) else v for k, v in row.items()}),
                flush=True,
            )


if __name__ == "__main__":
    main()
