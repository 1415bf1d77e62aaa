"""What ``dynamics="clone"`` does with every environment of Gymnasium that installs: how states are saved, replay check, microseconds.

    python benchmarks/clone_fidelity.py --out runs/clone_fidelity
    python benchmarks/clone_fidelity.py CartPole-v1 Hopper-v5

Needs ``gymnasium[mujoco]`` and Box2D for those families; ids that cannot be made are listed with the reason.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import pathlib
import warnings

import gymnasium

from sb3_bridge.clones.replay_check import check
from sb3_bridge.clones.snapshot import CloneReport

FAMILIES = ("classic_control", "toy_text", "box2d", "mujoco")


def ids() -> list[tuple[str, str]]:
    """``(family, id)`` of every registered environment of the families."""
    found = []
    for name, spec in gymnasium.registry.items():
        entry = spec.entry_point if isinstance(spec.entry_point, str) else ""
        parts = entry.split(":")[0].split(".")
        if parts[:2] == ["gymnasium", "envs"] and parts[2] in FAMILIES:
            found.append((parts[2], name))
    return sorted(found, key=lambda pair: (FAMILIES.index(pair[0]), pair[1]))


def measure(name: str) -> CloneReport:
    """The report of one id; one that cannot be made is refused."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            env = gymnasium.make(name)
        except Exception as error:
            return CloneReport("", reason=f"not made: {str(error).splitlines()[0]}")
        report = check(env)
        env.close()
    return report


def row(family: str, name: str, report: CloneReport) -> str:
    """One line of the Markdown table."""
    if not report.passed:
        reason = report.reason.splitlines()[0]
        return f"| {family} | {name} | refused | {reason} | | | |"
    times = (report.snapshot_us, report.restore_us, report.step_us)
    return f"| {family} | {name} | {report.way} | passed | " + " | ".join(f"{t:.1f}" for t in times) + " |"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("ids", nargs="*", help="ids; default: all")
    parser.add_argument("--out", type=pathlib.Path, help="folder for clone_fidelity.md and .json")
    args = parser.parse_args()
    chosen = [(family, name) for family, name in ids() if not args.ids or name in args.ids]
    lines = [
        "| family | id | saved by | replay check | snapshot us | restore us | step us |",
        "|---|---|---|---|--:|--:|--:|",
    ]
    print("\n".join(lines))
    results = []
    for family, name in chosen:
        report = measure(name)
        lines.append(row(family, name, report))
        print(lines[-1], flush=True)
        results.append({"family": family, "id": name, "passed": report.passed, **dataclasses.asdict(report)})
    if args.out:
        args.out.mkdir(parents=True, exist_ok=True)
        (args.out / "clone_fidelity.md").write_text("\n".join(lines) + "\n")
        (args.out / "clone_fidelity.json").write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
