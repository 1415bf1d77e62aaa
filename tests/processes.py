"""What tests of several devices and processes start theirs with."""

from __future__ import annotations

import os
import socket
from pathlib import Path

import grpo_jax


def free_port() -> int:
    """A port of this machine that nobody listens at."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port: int = free.getsockname()[1]
    return port


def environment(n_devices: int = 1) -> dict[str, str]:
    """Of a process with so many virtual devices of a CPU, whatever the machine has."""
    flags = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count={n_devices}"
    source = str(Path(grpo_jax.__file__).parents[1])
    return os.environ | {"XLA_FLAGS": flags, "PYTHONPATH": source, "JAX_PLATFORMS": "cpu"}
