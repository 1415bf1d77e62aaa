"""rejax's PPO, many seeds by ``vmap``: CPU seconds, returns and seeds solved; docs/sweeps.md has the numbers.

Runs in rejax's virtual environment: ``taskset -c 0 python benchmarks/peers/rejax_seeds.py CartPole-v1 --solved 475``, and
``Breakout-MinAtar --library purejaxrl --solved 20`` with PureJaxRL's settings.
"""

import argparse
import functools
import resource
import time

import jax
import numpy as np
import run_rejax

N_POINTS = 4


def main() -> None:
    """Trains all seeds side by side and says now and then how many are solved (8 sampled episodes each)."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("env")
    parser.add_argument("--library", choices=("rejax", "purejaxrl"), default="rejax")
    parser.add_argument("--seeds", type=int, default=64)
    parser.add_argument(
        "--solved", type=float, required=True, help="the mean return of a seed that is solved"
    )
    options = parser.parse_args()
    job = {"env": options.env, "library": options.library}
    config, total, settings = run_rejax.settings_of(job)
    algorithm = run_rejax.algorithm_of(job, config, total)
    keys = jax.random.split(jax.random.PRNGKey(0), options.seeds)
    state = jax.jit(jax.vmap(lambda key: run_rejax.strong(algorithm.init_state(key))))(keys)

    @functools.partial(jax.jit, donate_argnums=0)
    def advance(states, n):
        def one(state):
            return run_rejax.strong(jax.lax.fori_loop(0, n, lambda _, s: algorithm.train_iteration(s), state))

        return jax.vmap(one)(states)

    evaluate = jax.jit(jax.vmap(run_rejax.evaluator(algorithm, 8)))
    steps = algorithm.num_envs * algorithm.num_steps
    start = time.process_time()
    state = jax.block_until_ready(advance(state, np.int32(1)))  # compiles
    print(
        f"{settings}; {time.process_time() - start:.1f} CPU s to compile and for the first iteration",
        flush=True,
    )
    done, spent = steps, 0.0
    for target in np.linspace(0, total, N_POINTS + 1)[1:]:
        n, start = max(1, int(target - done) // steps), time.process_time()
        state = jax.block_until_ready(advance(state, np.int32(n)))
        spent, done = spent + time.process_time() - start, done + n * steps
        returns = np.asarray(evaluate(state, keys)).mean(axis=1)
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
        print(
            f"{done} steps of each seed: {spent:.1f} CPU s, {(done - steps) * options.seeds / spent:.0f} steps/s,"
            f" {np.sum(returns >= options.solved)} of {options.seeds} at {options.solved:g} or more, median"
            f" {np.median(returns):.1f}, mean {returns.mean():.1f}, least {returns.min():.1f}; peak {peak:.0f} MB",
            flush=True,
        )


if __name__ == "__main__":
    main()
