"""Flips single bits of a model's and a policy's file: each must be noticed when it is loaded, or change nothing.

python benchmarks/reliability/sb3_flip_bits.py --flips 1000
"""

from __future__ import annotations

import argparse
import io
import random
import warnings

import jax
import numpy as np

from sb3_bridge import GRPO, MlpPolicy
from sb3_bridge.files.model_zip import load_zip


def written(save) -> bytes:
    """What ``save(file)`` writes."""
    file = io.BytesIO()
    save(file)
    return file.getvalue()


def main() -> None:
    """Prints a line for each kind of file."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--flips", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    warnings.simplefilter("ignore")
    model = GRPO("MlpPolicy", "CartPole-v1", n_steps=32, batch_size=32, horizon=4, seed=0).learn(64)
    files = {"model.zip": (written(model.save), GRPO), "policy.zip": (written(model.policy.save), MlpPolicy)}
    draw = random.Random(arguments.seed)
    for name, (content, owner) in files.items():
        noticed = harmless = 0
        silent = []
        expected = load_zip(io.BytesIO(content))[1]
        for _ in range(arguments.flips // len(files)):
            bit = draw.randrange(8 * len(content))
            flipped = bytearray(content)
            flipped[bit // 8] ^= 1 << bit % 8
            try:
                owner.load(io.BytesIO(flipped))
            except ValueError:
                noticed += 1
                continue
            same = jax.tree.map(np.array_equal, load_zip(io.BytesIO(flipped))[1], expected)
            harmless += all(jax.tree.leaves(same))
            silent += [] if all(jax.tree.leaves(same)) else [bit]
        print(
            f"{name} ({len(content):,} bytes): {noticed} noticed, {harmless} harmless, {len(silent)} silent {silent[:5]}"
        )


if __name__ == "__main__":
    main()
