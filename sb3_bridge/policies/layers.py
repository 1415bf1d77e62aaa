"""What ``net_arch`` and ``activation_fn`` say about the dense layers."""

from __future__ import annotations

import functools
import warnings
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
import torch

from grpo_jax.policies.networks import ACTIVATIONS, Activation, check_activation

NetArch = list[int] | dict[str, list[int]]


def to_net_arch(net_arch: Any, convolutional: bool) -> NetArch:
    """``net_arch`` in one of SB3's two forms: a list for actor and critic, or a dict with ``pi`` and/or ``vf``.

    Args:
      net_arch: as a user passed it; None: no layers behind convolutions, else 64, 64.
      convolutional: whether the features are those of one :class:`CNN`.

    Raises:
      ValueError: layers that are no positive integers, or a dict with other keys; says what to pass.
    """
    if isinstance(net_arch, list) and net_arch and isinstance(net_arch[0], dict):
        warnings.warn(
            "net_arch=[dict(pi=..., vf=...)] is the form of old SB3 versions, which had shared layers: pass the dict"
            " alone, net_arch=dict(pi=..., vf=...)",
            UserWarning,
            stacklevel=4,
        )
        net_arch = net_arch[0]
    if net_arch is None:
        return [] if convolutional else {"pi": [64, 64], "vf": [64, 64]}
    layers = net_arch if isinstance(net_arch, Mapping) else {"pi": net_arch}
    for name, widths in layers.items():
        if name not in ("pi", "vf") or not _are_widths(widths):
            raise ValueError(
                f"net_arch={net_arch!r} must be a list of layer sizes such as [64, 64], or a dict of such lists with the"
                " keys 'pi' (actor) and 'vf' (critic)"
            )
    return dict(net_arch) if isinstance(net_arch, Mapping) else list(net_arch)


def widths_of(net_arch: NetArch) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Dense layers of actor and critic; a key that a dict leaves out means none, as in SB3."""
    lists = (
        (net_arch.get("pi", ()), net_arch.get("vf", ())) if isinstance(net_arch, dict) else (net_arch,) * 2
    )
    actor, critic = (tuple(int(width) for width in widths) for widths in lists)
    return actor, critic


def _are_widths(widths: Any) -> bool:
    return isinstance(widths, (list, tuple)) and all(
        isinstance(width, (int, np.integer)) and not isinstance(width, bool) and width > 0 for width in widths
    )


def _exact_gelu(x: jax.Array) -> jax.Array:
    return jax.nn.gelu(x, approximate=False)


TORCH_ACTIVATIONS: dict[type[torch.nn.Module], Activation] = {
    torch.nn.Tanh: "tanh",
    torch.nn.ReLU: "relu",
    torch.nn.ELU: "elu",
    torch.nn.GELU: _exact_gelu,
    torch.nn.SiLU: "silu",
    torch.nn.LeakyReLU: "leaky_relu",
    torch.nn.Sigmoid: jax.nn.sigmoid,
    torch.nn.Softplus: jax.nn.softplus,
    torch.nn.SELU: jax.nn.selu,
    torch.nn.Mish: jax.nn.mish,
    torch.nn.Identity: jax.nn.identity,
}
"""Classes of torch and the same functions in JAX."""
TORCH_CLASSES = {ours: theirs for theirs, ours in TORCH_ACTIVATIONS.items()}


def to_activation(activation: Any) -> Activation:
    """``activation_fn`` as a name or a function of JAX arrays; the same function always in the same form.

    Raises:
      TypeError: a torch class without a counterpart, or no function; says what to pass.
      ValueError: an unknown name.
    """
    if isinstance(activation, type) and activation in TORCH_ACTIVATIONS:
        activation = TORCH_ACTIVATIONS[activation]
    inner = activation.func if isinstance(activation, functools.partial) else activation
    owner = inner if isinstance(inner, type) else type(inner)
    if issubclass(owner, torch.nn.Module) or str(getattr(inner, "__module__", "")).startswith("torch."):
        known = ", ".join(sorted(kind.__name__ for kind in TORCH_ACTIVATIONS))
        raise TypeError(
            f"activation_fn={activation!r} has no counterpart in JAX here: pass a function of JAX arrays such as"
            f" jax.nn.relu, or one of these classes (not an instance) of torch.nn: {known}"
        )
    try:
        check_activation(activation)
    except (TypeError, ValueError) as error:
        raise type(error)(f"activation_fn: {error}") from error
    names = {function: name for name, function in ACTIVATIONS.items()}
    return activation if isinstance(activation, str) else names.get(activation, activation)
