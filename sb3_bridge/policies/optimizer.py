"""``policy.optimizer``: an optax optimizer behind SB3's name."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import optax
import torch
from flax import traverse_util

from grpo_jax.types import PyTree
from sb3_bridge.policies import parameters

_OPTAX_NAMES = ("adam", "adamw", "sgd", "rmsprop", "adagrad", "adadelta", "adamax", "nadam", "radam", "rprop")


@dataclass(frozen=True)
class OptimizerFactory:
    """From a learning rate to an optimizer; equal arguments give equal factories.

    Attributes:
      function: an optax factory, such as ``optax.adam``.
      arguments: its keyword arguments, sorted by name.
    """

    function: Callable[..., optax.GradientTransformation]
    arguments: tuple[tuple[str, Any], ...]

    def __call__(self, learning_rate: Any) -> optax.GradientTransformation:
        return self.function(learning_rate, **dict(self.arguments))


def to_optimizer(optimizer_class: Any, optimizer_kwargs: Mapping[str, Any] | None) -> OptimizerFactory | None:
    """``optimizer_class`` and ``optimizer_kwargs`` as one function of the learning rate; None: the library's own Adam.

    Raises:
      TypeError: not an optax factory (names the counterpart of a torch class), or arguments that it does not take.
    """
    if optimizer_class is None and not optimizer_kwargs:
        return None
    arguments = dict(optimizer_kwargs or {})
    if optimizer_class is None:
        optimizer_class, arguments = optax.adam, {"eps": 1e-5, **arguments}
    if isinstance(optimizer_class, type) and issubclass(optimizer_class, torch.optim.Optimizer):
        name = optimizer_class.__name__.lower()
        # sb3_contrib's and SB3's own RMSpropTFLike.
        found = "rmsprop" if name.startswith("rmsprop") else name
        hint = (
            f"optax.{found}"
            if found in _OPTAX_NAMES
            else "an optimizer of optax, such as optax.adam or optax.sgd"
        )
        raise TypeError(f"optimizer_class={optimizer_class.__name__} is torch's: pass {hint}")
    is_optimizer = isinstance(optimizer_class, (optax.GradientTransformation, type))
    if is_optimizer or not callable(optimizer_class):
        raise TypeError(
            f"optimizer_class={optimizer_class!r} must be a function from a learning rate to an optax optimizer, such"
            " as optax.adam (not called); its arguments go into optimizer_kwargs"
        )
    label = getattr(optimizer_class, "__name__", repr(optimizer_class))
    taken = inspect.signature(optimizer_class).parameters
    takes_any = any(parameter.kind is parameter.VAR_KEYWORD for parameter in taken.values())
    for name, value in arguments.items():
        if name in ("learning_rate", "lr"):
            raise TypeError(
                f"optimizer_kwargs={arguments!r}: the learning rate is an argument of the algorithm"
            )
        if name not in taken and not takes_any:
            raise TypeError(
                f"optimizer_kwargs={arguments!r}: {label} takes no {name}, but {', '.join(list(taken)[1:])}"
            )
        try:
            hash(value)
        except TypeError as error:
            raise TypeError(
                f"optimizer_kwargs={arguments!r}: {name} must be hashable, such as a number, tuple or function"
            ) from error
    factory = OptimizerFactory(optimizer_class, tuple(sorted(arguments.items())))
    if not isinstance(factory(1e-3), optax.GradientTransformation):
        raise TypeError(f"optimizer_class={label} must return an optax.GradientTransformation")
    return factory


@dataclass(frozen=True)
class FrozenFactory:
    """An optimizer that leaves some parameters as they are; its state is the one of the optimizer without that.

    Attributes:
      factory: of the optimizer; None: the library's own Adam.
      names: of the parameters, such as ``actor.output.kernel``.
    """

    factory: OptimizerFactory | None
    names: tuple[str, ...]

    def __call__(self, learning_rate: Any) -> optax.GradientTransformation:
        adam = optax.flatten(optax.adam(learning_rate, eps=1e-5))  # as grpo_jax.learning.update has it
        inner = adam if self.factory is None else self.factory(learning_rate)

        def update(gradients: PyTree, state: PyTree, params: PyTree = None) -> tuple[PyTree, PyTree]:
            changes, state = inner.update(gradients, state, params)
            named = traverse_util.flatten_dict(changes, sep=".")
            named |= {name: jnp.zeros_like(named[name]) for name in self.names}
            return traverse_util.unflatten_dict(named, sep="."), state

        return optax.GradientTransformation(inner.init, update)


class Optimizer:
    """What SB3 calls ``policy.optimizer``: an optax optimizer and its state.

    Attributes:
      state: optax state, None until the algorithm sets it.
      frozen: names of the parameters that are not learned.
      param_groups: one, with the learning rate ``"lr"`` that SB3 sets.
    """

    def __init__(self, factory: OptimizerFactory | None, learning_rate: float):
        self._factory = factory
        self.state: PyTree = None
        self.frozen: tuple[str, ...] = ()
        self.param_groups: list[dict[str, Any]] = [{"lr": learning_rate}]

    @property
    def factory(self) -> OptimizerFactory | FrozenFactory | None:
        """From a learning rate to the optax optimizer; None: the library's own Adam."""
        return FrozenFactory(self._factory, self.frozen) if self.frozen else self._factory

    def state_dict(self) -> dict[str, torch.Tensor]:
        """The state's arrays as CPU tensors by name; empty before there is a state."""
        return {name: parameters.to_tensor(leaf) for name, leaf in parameters.named(self.state)}

    def load_state_dict(self, state_dict: Mapping[str, Any], strict: bool = True) -> None:
        """Takes over arrays (torch, NumPy or JAX) by name.

        Raises:
          RuntimeError: other names (where ``strict``) or shapes than those of the present state.
        """
        present = dict(parameters.named(self.state))
        leaves, _ = parameters.replaced(present, state_dict, strict, "the optimizer")
        self.state = jax.tree.unflatten(jax.tree.structure(self.state), leaves.values())
