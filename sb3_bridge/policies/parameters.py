"""Parameters by name, as torch tensors, NumPy arrays and JAX arrays."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import torch
from flax import traverse_util
from torch.nn.modules.module import _IncompatibleKeys

from grpo_jax.policies.policy import PolicyState
from grpo_jax.types import PyTree


class HandedOut:
    """Parameters as torch tensors that somebody holds, and may change in place, replace the data of, or freeze.

    They are always the same objects. What was done to them is found by comparing them with what they were: torch counts
    no change that goes through ``tensor.data`` or NumPy.
    """

    def __init__(self) -> None:
        self._tensors: dict[str, torch.nn.Parameter] = {}
        self._seen: dict[str, torch.Tensor] = {}

    def __bool__(self) -> bool:
        return bool(self._tensors)

    def give(self, named: Mapping[str, torch.Tensor]) -> dict[str, torch.nn.Parameter]:
        """The tensors, which are made at the first call."""
        if not self._tensors:
            for name, tensor in named.items():
                is_real = tensor.is_floating_point()
                self._tensors[name] = torch.nn.Parameter(tensor.clone(), requires_grad=is_real)
                self._seen[name] = tensor.clone()
        return self._tensors

    def changed(self) -> dict[str, torch.Tensor]:
        """Those that are no longer what they were."""
        pairs = self._tensors.items()
        return {name: tensor for name, tensor in pairs if not torch.equal(tensor, self._seen[name])}

    def refresh(self, named: Mapping[str, torch.Tensor]) -> None:
        """Gives the tensors new values."""
        for name, tensor in self._tensors.items():
            tensor.data.copy_(named[name])
            self._seen[name] = tensor.detach().clone()

    def to(self, device: torch.device) -> None:
        """Moves the tensors to a device."""
        for name, tensor in self._tensors.items():
            tensor.data = tensor.data.to(device)
            self._seen[name] = tensor.detach().clone()

    def frozen(self) -> tuple[str, ...]:
        """Names of the tensors that are not to be learned."""
        pairs = self._tensors.items()
        return tuple(
            name for name, tensor in pairs if tensor.is_floating_point() and not tensor.requires_grad
        )

    def without_gradient(self, output: torch.Tensor) -> torch.Tensor:
        """An output whose ``backward`` says that no gradient can reach the tensors; unchanged where nobody has them."""
        if not self._tensors or not torch.is_grad_enabled():
            return output
        return _NoGradient.apply(output, *self._tensors.values())


class _NoGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, output: torch.Tensor, *parameters: torch.Tensor) -> torch.Tensor:
        return output.clone()

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:
        raise RuntimeError(
            "no torch gradient flows through a GRPO policy, whose networks are JAX's: train model.to_torch() with torch,"
            " and take it back by GRPO.from_torch()"
        )


def flat(state: PolicyState) -> dict[str, jax.Array]:
    """Parameters of a policy by name, such as ``actor.MLP_0.Dense_0.kernel``."""
    return traverse_util.flatten_dict(state.params, sep=".")


def named(tree: PyTree) -> list[tuple[str, Any]]:
    """The leaves of any tree by their paths."""
    return [(jax.tree_util.keystr(path), leaf) for path, leaf in jax.tree_util.tree_leaves_with_path(tree)]


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
    """The leaves of ``present`` with those of ``given`` in their places, in their dtypes and on their devices.

    Raises:
      RuntimeError: names (where ``strict``) or shapes that are not those of ``owner``.
    """
    missing = [name for name in present if name not in given]
    unexpected = [name for name in given if name not in present]
    errors = []
    if strict:
        errors += [f"missing: {', '.join(missing)}"] if missing else []
        errors += [f"unexpected: {', '.join(unexpected)}"] if unexpected else []
    leaves = dict(present)
    for name, leaf in present.items():
        if name in missing:
            continue
        # A copy: JAX may go on in the memory it is given, which the caller may change.
        array, plain = np.array(to_arrays(given[name])), _plain(leaf)
        if array.shape != np.shape(plain):
            errors.append(f"{name} has shape {list(array.shape)}, expected {list(np.shape(plain))}")
            continue
        leaves[name] = _like(leaf, plain, array)
    if errors:
        raise RuntimeError(f"cannot load the parameters of {owner}: {'; '.join(errors)}")
    return leaves, _IncompatibleKeys(missing, unexpected)


def _plain(leaf: Any) -> Any:
    is_key = isinstance(leaf, jax.Array) and jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)
    return jax.random.key_data(leaf) if is_key else leaf


def _like(leaf: Any, plain: Any, array: np.ndarray) -> Any:
    if not isinstance(leaf, jax.Array):
        return array
    loaded = jax.device_put(jnp.asarray(array, plain.dtype), plain.sharding)
    return loaded if plain is leaf else jax.random.wrap_key_data(loaded, impl=jax.random.key_impl(leaf))
