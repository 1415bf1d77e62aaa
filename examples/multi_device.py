"""One run over several devices: eight virtual ones of a CPU here, GPUs or TPUs without a change.

    python examples/multi_device.py [--timesteps 9728] [--devices 8]

Trains CartPole-v1 on all devices and on one, and compares: the numbers belong to ``n_shards``, not to the number of devices, and
differ by rounding alone. (In larger runs rounding turns an action round sooner or later; from there on they part.) Virtual
devices share the CPU's cores, so this shows that it works, not that it is faster. Takes 27 CPU seconds.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence

import jax
import numpy as np

import grpo_jax


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--timesteps", type=int, default=9_728, help="decision steps")
    parser.add_argument("--devices", type=int, default=8, help="virtual devices of the CPU")
    options = parser.parse_args(argv)
    jax.config.update("jax_num_cpu_devices", options.devices)  # before anything is computed

    env = grpo_jax.make("CartPole-v1")
    config = grpo_jax.preset("CartPole-v1").replace(n_shards=options.devices)
    parameters = {}
    for mesh in (grpo_jax.make_mesh(), grpo_jax.make_mesh(1)):
        start = time.process_time()
        state, _ = grpo_jax.run(config, env, jax.random.key(0), options.timesteps, mesh=mesh)
        seconds = time.process_time() - start
        returns = grpo_jax.evaluate(grpo_jax.gather(state), env, jax.random.key(1), 64)
        print(
            f"{mesh.devices.size} devices: return {returns.mean():.0f} of 500, {seconds:.1f} CPU s with compiling"
        )
        leaves = jax.tree.leaves(grpo_jax.gather(state.learner.policy.params))
        parameters[mesh.devices.size] = np.concatenate([np.ravel(leaf) for leaf in leaves])
    many, one = parameters.values()
    print(f"largest difference of a parameter: {np.abs(many - one).max():.1e}")


if __name__ == "__main__":
    main()
