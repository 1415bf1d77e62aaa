"""Files that were made to do harm: nothing in them runs, nothing is written, memory stays below 1 GiB, each is a clear error.

    python benchmarks/reliability/sb3_hostile_files.py --files 200

Attributes that replace methods or choose where training writes are left out with a warning: those count as left out.
"""

from __future__ import annotations

import argparse
import base64
import hashlib
import io
import json
import os
import pickle
import random
import resource
import struct
import tempfile
import time
import warnings
import zipfile
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from flax import serialization

from sb3_bridge import GRPO, MlpPolicy, WorldVecEnv
from sb3_bridge.files.plain import encode

MARK: list[Path] = []
HARMLESS = ("n_envs=1000000000000", "batch_size=1000000000000000000")
"""The env that is passed wins; a minibatch is no larger than a rollout."""
Make = Callable[[dict[str, bytes], random.Random], dict[str, Any]]
"""From the entries of a sound file to those of a hostile one; None takes one out."""


class Evil:
    """Makes a folder when it is unpickled."""

    def __reduce__(self) -> Any:
        return os.mkdir, (str(MARK[0]),)


def attribute(name: str, value: Any) -> Make:
    """The file with another attribute."""
    return lambda entries, draw: {"data": json.dumps(json.loads(entries["data"]) | {name: value}).encode()}


def plain(value: Any) -> Any:
    """As a file of ours has it."""
    return {":type:": "x", ":plain:": encode(value)}


def reference(module: str, name: str) -> Any:
    """A function or class by its name."""
    return {":type:": "x", ":plain:": {":kind:": "reference", "module": module, "name": name}}


def leaf(entry: str, change: Callable[[np.ndarray], Any]) -> Make:
    """The file with another array."""

    def make(entries: dict[str, bytes], draw: random.Random) -> dict[str, Any]:
        tree = serialization.msgpack_restore(entries[entry])
        name = draw.choice([name for name in tree if tree[name].dtype == np.float32])
        tree[name] = change(tree[name])
        return {entry: serialization.msgpack_serialize(tree)}

    return make


def bytes_of(entry: str, change: Callable[[bytes, random.Random], bytes]) -> Make:
    """The file with an entry of other bytes."""
    return lambda entries, draw: {entry: change(entries.get(entry, b""), draw)}


def makers() -> dict[str, Make]:
    """All kinds of hostile files."""
    pickled = base64.b64encode(pickle.dumps(Evil())).decode()
    trap = {":type:": "x", ":serialized:": pickled}
    deep: Any = b"\x81\xa1x" * 100_000 + b"\xc0"
    found: dict[str, Make] = {}
    for name in (
        "reward_function",
        "policy_class",
        "learning_rate",
        "observation_space",
        "x",
        "_environments",
        "env",
    ):
        found[f"a pickle as {name}"] = attribute(name, trap)
    for name in (
        "predict",
        "learn",
        "save",
        "_setup_model",
        "collect_rollouts",
        "get_env",
        "logger",
        "__class__",
    ):
        found[f"{name} replaced"] = attribute(name, plain((1,)))
    for name in ("tensorboard_log", "_logger", "rollout_buffer", "policy", "env", "_reward", "_keeper"):
        found[f"{name} set"] = attribute(name, "/tmp/elsewhere")
    for module, name in (
        ("os", "system"),
        ("builtins", "eval"),
        ("numpy", "load"),
        ("jax.numpy", "load"),
        ("torch", "load"),
    ):
        found[f"{module}.{name} by name"] = attribute("reward_function", reference(module, name))
    for name, values in {
        "n_steps": (0, -1, 10**12, "8"), "n_envs": (0, 10**12), "num_timesteps": (-1,), "_n_iterations": (-1,),
        "gamma": ("x", None), "_last_obs": ("x", [1]), "key_words": ([0, 1],), "policy_kwargs": ([],),
        "ep_info_buffer": ("x",), "_stats_window_size": (0,), "batch_size": (10**18,),
    }.items():  # fmt: skip
        for value in values:
            found[f"{name}={value!r}"] = attribute(name, value)
    for arch in ([10**9], [10**14], [10**5] * 2, [1] * 10**6, {"pi": [10**7], "vf": []}):
        found[f"net_arch of {str(arch)[:20]}"] = attribute("policy_kwargs", {"net_arch": arch})
    for entry in ("policy.msgpack", "policy.optimizer.msgpack"):
        found |= {
            f"NaN in {entry}": leaf(entry, lambda x: x * np.float32("nan")),
            f"integers in {entry}": leaf(entry, lambda x: x.astype(np.int32)),
            f"another shape in {entry}": leaf(entry, lambda x: np.zeros((7, 7, 7), np.float32)),
            f"no arrays in {entry}": leaf(entry, lambda x: 3),
            f"{entry} cut": bytes_of(entry, lambda content, draw: content[: draw.randrange(len(content))]),
            f"{entry} of noise": bytes_of(entry, lambda content, draw: draw.randbytes(1000)),
            f"{entry} of depth": bytes_of(entry, lambda content, draw: deep),
            f"{entry} that is long": bytes_of(
                entry, lambda content, draw: b"\xdd" + struct.pack(">I", 2**25) + b"\x80" * 2**25
            ),
            f"{entry} out": lambda entries, draw, entry=entry: {entry: None},
        }
    found |= {
        "data that is long": bytes_of("data", lambda content, draw: b'{"x": [' + b"[]," * 2**23 + b"[]]}"),
        "data of depth": bytes_of("data", lambda content, draw: b'{"x": ' + b"[" * 10**6),
        "data of noise": bytes_of("data", lambda content, draw: draw.randbytes(1000)),
        "a bomb": bytes_of("policy.msgpack", lambda content, draw: bytes(2**31)),
        "many bombs": lambda entries, draw: {f"{i}.msgpack": bytes(2**27) for i in range(8)},
        "paths": lambda entries, draw: {
            "../../escaped.msgpack": entries["policy.msgpack"],
            "/tmp/escaped": b"x",
        },
    }
    for name in ("env", "logger", "policy.state", "rollout_buffer"):
        found[f"parameters for {name}"] = lambda entries, draw, name=name: {
            f"{name}.msgpack": entries["policy.msgpack"]
        }
    return found


def packed(entries: dict[str, bytes], is_sealed: bool) -> bytes:
    """A zip, with a seal as ours have it, or as earlier versions wrote them."""
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in entries.items():
            if is_sealed or name != "_format":
                archive.writestr(name, content)
        archive.comment = b"grpo-jax model 2 " + b"0" * 64 if is_sealed else b""
    content = bytearray(file.getvalue())
    if is_sealed:
        content[-64:] = hashlib.sha256(content[:-64]).hexdigest().encode()
    return bytes(content)


def main() -> None:
    """Prints counts, and each file that was taken as if it were sound."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--files", type=int, default=200)
    arguments = parser.parse_args()
    draw, counts = random.Random(0), Counter[str]()
    with tempfile.TemporaryDirectory() as root:
        MARK.append(Path(root) / "mark")
        folder = Path(root) / "work"
        folder.mkdir()
        os.chdir(folder)
        env = WorldVecEnv("CartPole-v1", n_envs=1)
        model = GRPO(
            "MlpPolicy", env, n_steps=16, batch_size=16, horizon=4, policy_kwargs={"net_arch": [8]}
        ).learn(32)
        model.save(folder / "sound")
        with zipfile.ZipFile(folder / "sound.zip") as archive:
            sound = {name: archive.read(name) for name in archive.namelist()}
        before, slowest = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, 0.0
        kinds = makers()
        for number in range(arguments.files):
            kind = list(kinds)[number % len(kinds)]
            entries = {
                name: content
                for name, content in (sound | kinds[kind](sound, draw)).items()
                if content is not None
            }
            path = folder / "hostile.zip"
            path.write_bytes(packed(entries, is_sealed=number // len(kinds) % 2 == 0))
            del entries
            peak, started = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.process_time()
            with warnings.catch_warnings(record=True) as caught:
                warnings.simplefilter("always")
                try:
                    loaded = GRPO.load(path, env=env, force_reset=bool(number % 2))
                    loaded.learn(16)
                    loaded.set_parameters(path)
                    came_to = (
                        "left out"
                        if any("left out" in str(one.message) for one in caught)
                        else f"taken: {kind}"
                    )
                except (ValueError, TypeError, KeyError, RuntimeError) as error:
                    came_to = (
                        "refused"
                        if not isinstance(error, RuntimeError) or "parameters" in str(error)
                        else f"taken: {kind}"
                    )
                except Exception as error:
                    came_to = f"{type(error).__name__}: {kind}"
            slowest = max(slowest, time.process_time() - started)
            grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - peak
            counts[came_to if grown < 2**20 else f"{grown >> 10} MiB: {kind}"] += 1
            if MARK[0].exists():
                counts[f"RUN: {kind}"] += 1
                MARK[0].rmdir()
        names = {"sound.zip", "hostile.zip", "pipe", "sparse.zip"}
        os.mkfifo(folder / "pipe")
        with open(folder / "sparse.zip", "wb") as file:
            file.truncate(2**32)
        for path in (folder / "pipe", folder / "sparse.zip", folder, "/dev/zero"):
            for owner in (GRPO, MlpPolicy):
                try:
                    owner.load(path)
                    counts[f"taken: {path}"] += 1
                except ValueError:
                    counts["refused"] += 1
        written = {path.name for path in folder.iterdir()} - names
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        print("; ".join(f"{came_to}: {count}" for came_to, count in counts.most_common()))
        print(
            f"written: {sorted(written) or 'nothing'}; peak {peak >> 10} MiB ({before >> 10} before); slowest {slowest:.1f} s"
        )


if __name__ == "__main__":
    main()
