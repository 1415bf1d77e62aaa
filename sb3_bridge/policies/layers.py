"""What ``net_arch`` and ``activation_fn`` say about the dense layers."""

from __future__ import annotations

import functools
import reprlib
import warnings
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
import torch

from grpo_jax.policies.networks import ACTIVATIONS, Activation, check_activation

NetArch = list[int] | dict[str, list[int]]
_MOST_LAYERS = 256  # a file may name any number, and each takes a while to compile


def to_net_arch(net_arch: Any, convolutional: bool) -> NetArch:
    """``net_arch`` in one of SB3's two forms: a list for actor and critic, or a dict with ``pi`` and/or ``vf``."""
    if isinstance(net_arch, list) and net_arch and isinstance(net_arch[0], dict):
        message = "net_arch=[dict(...)] is the form of old SB3 versions: pass net_arch=dict(pi=..., vf=...)"
        warnings.warn(message, UserWarning, stacklevel=4)
        net_arch = net_arch[0]
    if net_arch is None:
        return [] if convolutional else {"pi": [64, 64], "vf": [64, 64]}
    layers = net_arch if isinstance(net_arch, Mapping) else {"pi": net_arch}
    if not layers.keys() <= {"pi", "vf"} or not all(map(_are_widths, layers.values())):
        raise ValueError(
            f"net_arch={reprlib.repr(net_arch)} must be a list of at most {_MOST_LAYERS} layer sizes such as [64, 64], or a"
            " dict of such lists with the keys 'pi' (actor) and 'vf' (critic)"
        )
    return dict(net_arch) if isinstance(net_arch, Mapping) else list(net_arch)


def widths_of(net_arch: NetArch) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Dense layers of actor and critic; a key that a dict leaves out means none, as in SB3."""
    named = net_arch if isinstance(net_arch, dict) else {"pi": net_arch, "vf": net_arch}
    return tuple(map(int, named.get("pi", ()))), tuple(map(int, named.get("vf", ())))


def _are_widths(widths: Any) -> bool:
    return (
        isinstance(widths, (list, tuple))
        and len(widths) <= _MOST_LAYERS
        and all(
            isinstance(width, (int, np.integer)) and not isinstance(width, bool) and width > 0
            for width in widths
        )
    )


TORCH_ACTIVATIONS: dict[type[torch.nn.Module], Activation] = {
    torch.nn.Tanh: "tanh",
    torch.nn.ReLU: "relu",
    torch.nn.ELU: "elu",
    torch.nn.GELU: functools.partial(jax.nn.gelu, approximate=False),
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
TORCH_NAMES = ", ".join(sorted(theirs.__name__ for theirs in TORCH_ACTIVATIONS))


def to_activation(activation: Any) -> Activation:
    """``activation_fn`` as a name or a function of JAX arrays; the same function always in the same form."""
    if isinstance(activation, type) and activation in TORCH_ACTIVATIONS:
        activation = TORCH_ACTIVATIONS[activation]
    inner = activation.func if isinstance(activation, functools.partial) else activation
    owner = inner if isinstance(inner, type) else type(inner)
    if issubclass(owner, torch.nn.Module) or str(getattr(inner, "__module__", "")).startswith("torch."):
        raise TypeError(
            f"activation_fn={activation!r} has no counterpart in JAX here: pass a function of JAX arrays such as"
            f" jax.nn.relu, or one of these classes (not an instance) of torch.nn: {TORCH_NAMES}"
        )
    try:
        check_activation(activation)
    except (TypeError, ValueError) as error:
        raise type(error)(f"activation_fn: {error}") from error
    names = {function: name for name, function in ACTIVATIONS.items()}
    return activation if isinstance(activation, str) else names.get(activation, activation)
