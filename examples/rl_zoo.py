"""RL Zoo's own training, with GRPO among its algorithms.

    pip install rl_zoo3
    python examples/rl_zoo.py [arguments of rl_zoo3.train]
    python examples/rl_zoo.py --env Acrobot-v1 --n-timesteps 50000 --seed 1

Trains CartPole-v1 for 10,000 steps with the settings of benchmarks/hyperparams/grpo.yml; what you pass replaces the defaults.
Takes 16 CPU seconds.

``python -m rl_zoo3.train --algo grpo`` cannot know of GRPO: it must be registered in the same process.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

from sb3_bridge import GRPO

SETTINGS = Path(__file__).parents[1] / "benchmarks" / "hyperparams" / "grpo.yml"
DEFAULTS = {
    "--env": "CartPole-v1",
    "--conf-file": str(SETTINGS),
    "--n-timesteps": "10000",
    "--log-folder": "runs/rl_zoo",
    "--eval-freq": "2000",
    "--seed": "0",
    "--device": "cpu",
    "--num-threads": "1",
}


def main(argv: Sequence[str] | None = None) -> None:
    try:
        import rl_zoo3
        from rl_zoo3.train import train
    except ImportError:
        raise SystemExit("RL Zoo is not installed: pip install rl_zoo3") from None
    rl_zoo3.ALGOS["grpo"] = GRPO  # one dict, which training, enjoy and the plots share

    defaults = [word for pair in DEFAULTS.items() for word in pair]
    given = sys.argv[1:] if argv is None else argv
    sys.argv = ["rl_zoo3", "--algo", "grpo", *defaults, *given]  # of two equal flags the last one counts
    train()


if __name__ == "__main__":
    main()
