"""From training to deployment: the policy as a torch module, in TorchScript and in ONNX.

    python examples/export.py [--timesteps 5000] [--out runs/export]

Trains CartPole-v1, exports the greedy policy and checks that all forms choose the same actions. ONNX needs
``pip install onnx onnxruntime``; where they are missing that part is left out, and the script says so. Takes 14 CPU seconds.
"""

from __future__ import annotations

import argparse
import importlib.util
import warnings
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch

from sb3_bridge import GRPO


class Greedy(torch.nn.Module):
    """The most probable action of SB3's policy of torch, int64 ``[N]`` for observations ``[N, *shape]``."""

    def __init__(self, policy: torch.nn.Module):
        super().__init__()
        self.policy = policy

    def forward(self, observation: torch.Tensor) -> torch.Tensor:
        return self.policy(observation, deterministic=True)[0]


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--timesteps", type=int, default=5_000, help="decision steps")
    parser.add_argument("--out", type=Path, default=Path("runs/export"))
    options = parser.parse_args(argv)
    options.out.mkdir(parents=True, exist_ok=True)

    model = GRPO("MlpPolicy", "gymnax/CartPole-v1", n_steps=256, seed=0).learn(options.timesteps)
    observations = np.random.default_rng(0).uniform(-2.0, 2.0, (1_000, 4)).astype(np.float32)
    expected, _ = model.predict(observations, deterministic=True)
    shares = np.bincount(expected, minlength=2) / len(expected)
    print(f"{len(expected):,} observations; actions {shares[0]:.0%} left, {shares[1]:.0%} right")

    greedy, example = Greedy(model.to_torch()).eval(), torch.as_tensor(observations[:8])
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of torch's tracer, about Python values that are constants here
        check("torch", greedy(torch.as_tensor(observations)).numpy(), expected)

        path = options.out / "policy.pt"
        torch.jit.trace(greedy, example).save(path)
        check(f"TorchScript, {path}", torch.jit.load(path)(torch.as_tensor(observations)).numpy(), expected)

        missing = [name for name in ("onnx", "onnxruntime") if importlib.util.find_spec(name) is None]
        if missing:
            print(f"ONNX: left out, {' and '.join(missing)} not installed: pip install onnx onnxruntime")
            return
        import onnxruntime

        path = options.out / "policy.onnx"
        torch.onnx.export(
            greedy,
            (example,),
            path,
            input_names=["observation"],
            output_names=["action"],
            dynamic_axes={"observation": {0: "n"}, "action": {0: "n"}},
            dynamo=False,  # the exporter that needs nothing but onnx
        )
        (actions,) = onnxruntime.InferenceSession(path).run(None, {"observation": observations})
        check(f"ONNX, {path}", actions, expected)


def check(name: str, actions: np.ndarray, expected: np.ndarray) -> None:
    """Says whether two forms of the policy choose the same actions; leaves with an error where they do not."""
    n_different = int((actions != expected).sum())
    if n_different:
        raise SystemExit(f"{name}: {n_different} of {len(expected)} actions differ")
    print(f"{name}: all {len(expected):,} actions are equal")


if __name__ == "__main__":
    main()
