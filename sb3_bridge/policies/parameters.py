"""Parameters by name, as torch tensors, NumPy arrays and JAX arrays."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import torch
from torch.nn.modules.module import _IncompatibleKeys


class NoGradient(torch.autograd.Function):
    """Its first argument, with a ``backward`` that says why there is no gradient for the others."""

    @staticmethod
    def forward(ctx: Any, output: torch.Tensor, *parameters: torch.Tensor) -> torch.Tensor:
        return output.clone()

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:
        raise RuntimeError(
            "no torch gradient flows through a GRPO policy, whose networks are JAX's: train model.to_torch() with torch,"
            " and take it back by GRPO.from_torch()"
        )


def to_tensor(array: Any) -> torch.Tensor:
    """A CPU tensor of its own with the numbers of an array; of a typed key, its data."""
    array = np.array(_plain(array))
    if array.dtype == jnp.bfloat16:  # which torch does not take from NumPy
        return torch.from_numpy(array.view(np.int16)).view(torch.bfloat16)
    return torch.from_numpy(array)


def to_arrays(tree: Any) -> Any:
    """A tensor, or a dict of them, as NumPy arrays; other arrays as they are."""
    if isinstance(tree, dict):
        return {name: to_arrays(leaf) for name, leaf in tree.items()}
    if not isinstance(tree, torch.Tensor):
        return tree
    tensor = tree.detach().cpu()
    if tensor.dtype == torch.bfloat16:
        return tensor.view(torch.int16).numpy().view(jnp.bfloat16)
    return tensor.numpy()


def replaced(
    present: dict[str, Any], given: Mapping[str, Any], strict: bool, owner: str
) -> tuple[dict[str, Any], _IncompatibleKeys]:
    """The leaves of ``present`` with those of ``given`` in their places, in their dtypes and on their devices."""
    missing = [name for name in present if name not in given]
    unexpected = [name for name in given if name not in present]
    named = {"missing": missing, "unexpected": unexpected} if strict else {}
    errors = [f"{what}: {', '.join(names)}" for what, names in named.items() if names]
    leaves = dict(present)
    for name in (name for name in present if name in given):
        # A copy: JAX may go on in the memory it is given, which the caller may change.
        array, leaf, plain = np.array(to_arrays(given[name])), present[name], _plain(present[name])
        if array.shape != np.shape(plain):
            errors.append(f"{name} has shape {list(array.shape)}, expected {list(np.shape(plain))}")
        elif isinstance(leaf, jax.Array):
            array = jax.device_put(jnp.asarray(array, plain.dtype), plain.sharding)
            is_key = plain is not leaf
            leaves[name] = (
                jax.random.wrap_key_data(array, impl=jax.random.key_impl(leaf)) if is_key else array
            )
        else:
            leaves[name] = array
    if errors:
        raise RuntimeError(f"cannot load the parameters of {owner}: {'; '.join(errors)}")
    return leaves, _IncompatibleKeys(missing, unexpected)


def _plain(leaf: Any) -> Any:
    is_key = isinstance(leaf, jax.Array) and jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)
    return jax.random.key_data(leaf) if is_key else leaf
