"""The parameters of a policy: kept by JAX, seen through torch's names."""

from __future__ import annotations

import functools
from collections import OrderedDict
from collections.abc import Iterator, Mapping
from typing import Any, NoReturn, TypeVar

import jax
import numpy as np
import torch
from flax import traverse_util
from stable_baselines3.common.policies import BasePolicy
from torch.nn.modules.module import _IncompatibleKeys

from grpo_jax.policies.policy import PolicyState
from sb3_bridge.policies.optimizer import Optimizer
from sb3_bridge.policies.parameters import NoGradient, replaced, to_arrays, to_tensor

SelfModel = TypeVar("SelfModel", bound="JaxModel")

# fmt: off
TORCH_ONLY = (
    "features_extractor", "pi_features_extractor", "vf_features_extractor", "features_dim", "mlp_extractor",
    "action_net", "value_net", "action_dist", "log_std",
)
"""Attributes of SB3's policies that are parts of a torch network, which ours has not."""
# fmt: on


class JaxModel(BasePolicy):
    """What SB3's ``BaseModel`` is to a policy, with parameters in JAX.

    Attributes:
      state: parameters as JAX arrays. Assign it to change them all; ``load_state_dict`` and the tensors of
        ``parameters()`` change them by name.
      optimizer: see :class:`~sb3_bridge.policies.optimizer.Optimizer`.
    """

    optimizer: Optimizer  # type: ignore[assignment]

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self._device = torch.device("cpu")
        # Torch tensors that somebody holds, and what they were: torch counts no change through ``data`` or NumPy.
        self._tensors: dict[str, torch.nn.Parameter] = {}
        self._seen: dict[str, torch.Tensor] = {}

    @property
    def state(self) -> PolicyState:
        """Parameters, with what was done in place to the tensors that :meth:`parameters` gave."""
        if not self._tensors:
            return self._state
        seen, held = self._seen, {name: leaf.detach().cpu() for name, leaf in self._tensors.items()}
        if changed := {name: held[name] for name in held if not torch.equal(held[name], seen[name])}:
            self.state = self._loaded(changed, self._state, strict=False)[0]
        return self._state

    @state.setter
    def state(self, state: PolicyState) -> None:
        self._state = state
        if self._tensors:
            self._seen = self.state_dict_of(state)
            for name, tensor in self._tensors.items():
                tensor.data.copy_(self._seen[name])

    def __getattr__(self, name: str) -> Any:
        if name in TORCH_ONLY:
            raise AttributeError(self._torch_only(name))
        return super().__getattr__(name)

    def __setattr__(self, name: str, value: Any) -> None:
        if name in TORCH_ONLY:
            if value is None:  # SB3's constructor
                return
            raise AttributeError(self._torch_only(name))
        if name == "optimizer" and not isinstance(value, Optimizer):
            raise TypeError(
                f"optimizer={type(value).__name__} cannot train networks in JAX: pass an optax factory such as optax.adam"
                " in policy_kwargs=dict(optimizer_class=..., optimizer_kwargs=...)"
            )
        super().__setattr__(name, value)

    def _torch_only(self, name: str) -> str:
        return (
            f"{type(self).__name__} has no {name}: its networks are JAX's. model.to_torch() gives SB3's policy with it;"
            " parameters are read and changed by named_parameters(), state_dict() and load_state_dict(), the distribution"
            " comes from get_distribution(), and networks are chosen by policy_kwargs"
        )

    def _refuse(self, *args: Any, **kwargs: Any) -> NoReturn:
        """Not for networks in JAX: always a NotImplementedError."""
        raise NotImplementedError(
            f"{type(self).__name__} has no torch modules or tensors of its own to do that to: use model.to_torch()"
        )

    make_features_extractor = extract_features = apply = _apply = _refuse

    @property
    def device(self) -> torch.device:
        """Where torch tensors go; the parameters are JAX's, and stay where they are."""
        return self._device

    def to(self: SelfModel, device: Any = None, **others: Any) -> SelfModel:  # type: ignore[override]
        """Sets the device of tensors; anything but a device, such as a dtype, is a TypeError."""
        if others or isinstance(device, torch.dtype):
            raise TypeError(f"to({device!r}, ...) takes a device alone: the parameters are JAX arrays")
        if device is not None:
            self._device = torch.device(device)
            for tensor in self._tensors.values():
                tensor.data = tensor.data.to(self._device)
        return self

    cpu = functools.partialmethod(to, "cpu")

    def cuda(self: SelfModel, device: Any = None) -> SelfModel:
        """``to("cuda")``."""
        return self.to(torch.device("cuda", device))

    def _to_tensor(self, array: jax.Array) -> torch.Tensor:
        return self._without_gradient(to_tensor(array).to(self.device))

    def _without_gradient(self, tensor: torch.Tensor) -> torch.Tensor:
        """The same; its ``backward`` says that no gradient reaches the tensors that somebody holds."""
        if not self._tensors or not torch.is_grad_enabled():
            return tensor
        return NoGradient.apply(tensor, *self._tensors.values())

    def state_dict_of(self, state: PolicyState) -> dict[str, torch.Tensor]:
        """Parameters of a state of this policy as CPU tensors, ``{"actor.MLP_0.Dense_0.kernel": ...}``; copies."""
        return {name: to_tensor(leaf) for name, leaf in _flat(state).items()}

    def state_from(self, state_dict: Mapping[str, Any], strict: bool = True) -> PolicyState:
        """A state with the parameters that :meth:`state_dict_of` gave; see :meth:`load_state_dict`."""
        return self._loaded(state_dict, self.state, strict)[0]

    def _loaded(
        self, state_dict: Mapping[str, Any], state: PolicyState, strict: bool
    ) -> tuple[PolicyState, _IncompatibleKeys]:
        leaves, keys = replaced(_flat(state), state_dict, strict, type(self).__name__)
        params = traverse_util.path_aware_map(lambda path, _: leaves[".".join(map(str, path))], state.params)
        return state.replace(params=params), keys

    def state_dict(  # type: ignore[override]
        self, *, destination: Any = None, prefix: str = "", keep_vars: bool = False
    ) -> dict[str, torch.Tensor]:
        """The parameters by name: copies on the CPU, or with ``keep_vars`` what :meth:`named_parameters` gives."""
        tensors = dict(self.named_parameters()) if keep_vars else self.state_dict_of(self.state)
        destination = OrderedDict() if destination is None else destination
        destination.update({prefix + name: leaf for name, leaf in tensors.items()})
        return destination

    def load_state_dict(
        self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False
    ) -> _IncompatibleKeys:
        """Takes over parameters (torch, NumPy or JAX arrays) by name; returns the names that are missing or unexpected.

        Wrong names (where ``strict``) or shapes are a RuntimeError; nothing is changed then.
        """
        self.state, keys = self._loaded(state_dict, self.state, strict)
        return keys

    def named_parameters(
        self, prefix: str = "", recurse: bool = True, remove_duplicate: bool = True
    ) -> Iterator[tuple[str, torch.nn.Parameter]]:
        """Names and tensors, always the same ones, on the policy's device.

        What is done to them in place is done to the policy: it is taken over before the policy acts, trains or is saved.
        ``requires_grad=False`` keeps training from changing a tensor. Training gives them the new values.
        """
        if not self._tensors:
            self._seen = self.state_dict_of(self.state)
            for name, leaf in self._seen.items():
                copied = leaf.to(self.device, copy=True)
                self._tensors[name] = torch.nn.Parameter(copied, requires_grad=leaf.is_floating_point())
        for name, tensor in self._tensors.items():
            yield f"{prefix}.{name}" if prefix else name, tensor

    def set_training_mode(self, mode: bool) -> None:
        """See SB3; with ``mode``, frozen parameters are told to the optimizer."""
        super().set_training_mode(mode)
        if mode:
            real = {name: leaf for name, leaf in self._tensors.items() if leaf.is_floating_point()}
            self.optimizer.frozen = tuple(name for name in real if not real[name].requires_grad)

    def parameters_to_vector(self) -> np.ndarray:
        """All parameters, ``[n]``."""
        return np.concatenate([np.asarray(leaf).reshape(-1) for leaf in _flat(self.state).values()])

    def load_from_vector(self, vector: np.ndarray) -> None:
        """Takes over the parameters that ``parameters_to_vector`` gave, ``[n]``; another length is a ValueError."""
        present = _flat(self.state)
        ends = np.cumsum([leaf.size for leaf in present.values()])
        vector = np.asarray(to_arrays(vector))
        if vector.shape != (ends[-1],):
            raise ValueError(f"vector has shape {list(vector.shape)}, expected [{ends[-1]}]")
        parts = zip(present.items(), np.split(vector, ends[:-1]), strict=True)
        self.load_state_dict({name: part.reshape(leaf.shape) for (name, leaf), part in parts})


def _flat(state: PolicyState) -> dict[str, jax.Array]:
    """Parameters of a policy by name, such as ``actor.MLP_0.Dense_0.kernel``."""
    return traverse_util.flatten_dict(state.params, sep=".")
