"""The parameters of a policy: kept by JAX, seen through torch's names."""

from __future__ import annotations

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
from sb3_bridge.policies.parameters import HandedOut, flat, replaced, to_arrays, to_tensor

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
        self._handed_out = HandedOut()

    @property
    def state(self) -> PolicyState:
        """Parameters, with what was done to the tensors that :meth:`parameters` gave."""
        self.sync_parameters()
        return self._state

    @state.setter
    def state(self, state: PolicyState) -> None:
        self._state = state
        if self._handed_out:
            self._handed_out.refresh(self.state_dict_of(state))

    def sync_parameters(self) -> None:
        """Takes over what was done in place to the tensors that :meth:`parameters` gave; ``state`` does so by itself.

        Raises:
          RuntimeError: a tensor has another shape now.
        """
        if self._handed_out and (changed := self._handed_out.changed()):
            self.state = self._loaded(changed, self._state, strict=False)[0]

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
        """Not for networks in JAX.

        Raises:
          NotImplementedError: always; names the torch policy that has it.
        """
        raise NotImplementedError(
            f"{type(self).__name__} has no torch modules or tensors of its own to do that to: use model.to_torch()"
        )

    make_features_extractor = extract_features = apply = _apply = _refuse

    # The device, for tensors ----------------------------------------------------------------------------------------

    @property
    def device(self) -> torch.device:
        """Where torch tensors go; the parameters are JAX's, and stay where they are."""
        return self._device

    def to(  # type: ignore[override]
        self: SelfModel, device: Any = None, *args: Any, **kwargs: Any
    ) -> SelfModel:
        """Sets the device of tensors.

        Raises:
          TypeError: anything but a device, such as a dtype.
        """
        if args or kwargs or isinstance(device, torch.dtype):
            raise TypeError(f"to({device!r}, ...) takes a device alone: the parameters are JAX arrays")
        if device is not None:
            self.sync_parameters()
            self._device = torch.device(device)
            self._handed_out.to(self._device)
        return self

    def cpu(self: SelfModel) -> SelfModel:
        """``to("cpu")``."""
        return self.to("cpu")

    def cuda(self: SelfModel, device: Any = None) -> SelfModel:
        """``to("cuda")``."""
        return self.to(torch.device("cuda", device))

    def _to_tensor(self, array: jax.Array) -> torch.Tensor:
        return self._handed_out.without_gradient(to_tensor(array).to(self.device))

    # Parameters -----------------------------------------------------------------------------------------------------

    def state_dict_of(self, state: PolicyState) -> dict[str, torch.Tensor]:
        """Parameters of a state of this policy as CPU tensors, ``{"actor.MLP_0.Dense_0.kernel": ...}``; copies."""
        return {name: to_tensor(leaf) for name, leaf in flat(state).items()}

    def state_from(self, state_dict: Mapping[str, Any], strict: bool = True) -> PolicyState:
        """A state with the parameters that :meth:`state_dict_of` gave; see :meth:`load_state_dict`."""
        return self._loaded(state_dict, self.state, strict)[0]

    def _loaded(
        self, state_dict: Mapping[str, Any], state: PolicyState, strict: bool
    ) -> tuple[PolicyState, _IncompatibleKeys]:
        leaves, keys = replaced(flat(state), state_dict, strict, type(self).__name__)
        structure = traverse_util.flatten_dict(state.params)
        nested = dict(zip(structure, leaves.values(), strict=True))
        return state.replace(params=traverse_util.unflatten_dict(nested)), keys

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
        """Takes over parameters (torch, NumPy or JAX arrays) by name.

        Args:
          state_dict: as :meth:`state_dict` gives it.
          strict: whether every name must be there, and no other.
          assign: torch's, without a meaning here.

        Returns:
          The names that are missing and those that were not expected.

        Raises:
          RuntimeError: wrong names or shapes, named; nothing is changed then.
        """
        del assign
        self.state, keys = self._loaded(state_dict, self.state, strict)
        return keys

    def named_parameters(
        self, prefix: str = "", recurse: bool = True, remove_duplicate: bool = True
    ) -> Iterator[tuple[str, torch.nn.Parameter]]:
        """Names and tensors, always the same ones, on the policy's device.

        What is done to them in place is done to the policy: it is taken over before the policy acts, trains or is saved.
        ``requires_grad=False`` keeps training from changing a tensor. Training gives them the new values.
        """
        del recurse, remove_duplicate
        named = {} if self._handed_out else self.state_dict_of(self.state)
        tensors = self._handed_out.give({name: leaf.to(self.device) for name, leaf in named.items()})
        for name, tensor in tensors.items():
            yield f"{prefix}.{name}" if prefix else name, tensor

    def set_training_mode(self, mode: bool) -> None:
        """See SB3; with ``mode``, frozen parameters are told to the optimizer."""
        super().set_training_mode(mode)
        if mode:
            self.optimizer.frozen = self._handed_out.frozen()

    def parameters_to_vector(self) -> np.ndarray:
        """All parameters, ``[n]``."""
        return np.concatenate([np.asarray(leaf).reshape(-1) for leaf in flat(self.state).values()])

    def load_from_vector(self, vector: np.ndarray) -> None:
        """Takes over the parameters that ``parameters_to_vector`` gave, ``[n]``.

        Raises:
          ValueError: another length.
        """
        present = flat(self.state)
        sizes = [leaf.size for leaf in present.values()]
        vector = np.asarray(to_arrays(vector))
        if vector.shape != (sum(sizes),):
            raise ValueError(f"vector has shape {list(vector.shape)}, expected [{sum(sizes)}]")
        parts = np.split(vector, np.cumsum(sizes)[:-1])
        shaped = {name: part.reshape(present[name].shape) for name, part in zip(present, parts, strict=True)}
        self.load_state_dict(shaped)
