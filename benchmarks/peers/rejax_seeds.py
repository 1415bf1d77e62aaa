"""rejax's PPO on CartPole-v1, 64 seeds by ``vmap``: CPU seconds and seeds solved; docs/sweeps.md has the numbers.

Runs in rejax's virtual environment: ``cd benchmarks/peers && taskset -c 0 python rejax_seeds.py``
"""

import functools
import resource
import time
import tomllib
from pathlib import Path

import jax
import numpy as np
import run_rejax
from rejax.algos import PPO

N_SEEDS = 64


def main() -> None:
    """Trains all seeds side by side and says now and then how many play 475 or more (8 sampled episodes each)."""
    config = tomllib.loads(Path("rejax.toml").read_text(encoding="utf-8"))["CartPole-v1"]
    total = config.pop("total_timesteps")
    del config["settings"]
    env, params = run_rejax.make("CartPole-v1")
    algorithm = PPO.create(env=env, env_params=params, **config)
    keys = jax.random.split(jax.random.PRNGKey(0), N_SEEDS)
    state = jax.jit(jax.vmap(lambda key: run_rejax.strong(algorithm.init_state(key))))(keys)

    @functools.partial(jax.jit, donate_argnums=0)
    def advance(states, n):
        def one(state):
            return run_rejax.strong(jax.lax.fori_loop(0, n, lambda _, s: algorithm.train_iteration(s), state))

        return jax.vmap(one)(states)

    evaluate = jax.jit(jax.vmap(run_rejax.evaluator(algorithm, 8)))
    steps = algorithm.num_envs * algorithm.num_steps
    state = jax.block_until_ready(advance(state, np.int32(1)))  # compiles
    done, spent = steps, 0.0
    for target in np.linspace(0, total, 5)[1:]:
        n, start = int(target - done) // steps, time.process_time()
        state = jax.block_until_ready(advance(state, np.int32(n)))
        spent, done = spent + time.process_time() - start, done + n * steps
        returns = np.asarray(evaluate(state, keys)).mean(axis=1)
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
        print(
            f"{done} steps of each seed: {spent:.1f} CPU s, {np.sum(returns >= 475)} of {N_SEEDS} at 475 or more,"
            f" mean {returns.mean():.1f}, least {returns.min():.1f}; peak memory {peak:.0f} MB",
            flush=True,
        )


if __name__ == "__main__":
    main()
