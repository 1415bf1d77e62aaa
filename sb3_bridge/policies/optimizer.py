"""``policy.optimizer``: an optax optimizer behind SB3's name."""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax
import torch
from flax import traverse_util

from grpo_jax.types import PyTree
from sb3_bridge.policies.parameters import replaced, to_tensor

_OPTAX_NAMES = ("adam", "adamw", "sgd", "rmsprop", "adagrad", "adadelta", "adamax", "nadam", "radam", "rprop")


@dataclasses.dataclass(frozen=True)
class OptimizerFactory:
    """From a learning rate to an optimizer; equal arguments give equal factories.

    ``frozen`` parameters, such as ``actor.output.kernel``, stay as they are; they change nothing in the state.
    """

    function: Callable[..., optax.GradientTransformation]
    arguments: tuple[tuple[str, Any], ...] = ()
    frozen: tuple[str, ...] = ()

    def __call__(self, learning_rate: Any) -> optax.GradientTransformation:
        inner = self.function(learning_rate, **dict(self.arguments))

        def update(gradients: PyTree, state: PyTree, params: PyTree = None) -> tuple[PyTree, PyTree]:
            changes, state = inner.update(gradients, state, params)

            def kept(path: tuple[Any, ...], change: jax.Array) -> jax.Array:
                return jnp.zeros_like(change) if ".".join(path) in self.frozen else change

            return traverse_util.path_aware_map(kept, changes), state

        return optax.GradientTransformation(inner.init, update) if self.frozen else inner


def to_optimizer(optimizer_class: Any, optimizer_kwargs: Mapping[str, Any] | None) -> OptimizerFactory | None:
    """``optimizer_class`` and ``optimizer_kwargs`` as one function of the learning rate; None: the library's own Adam."""
    if optimizer_class is None and not optimizer_kwargs:
        return None
    arguments = dict(optimizer_kwargs or {})
    if optimizer_class is None:
        optimizer_class, arguments = optax.adam, {"eps": 1e-5, **arguments}
    is_class = isinstance(optimizer_class, type)
    if is_class and issubclass(optimizer_class, torch.optim.Optimizer):
        name = optimizer_class.__name__.lower()
        name = "rmsprop" if name.startswith("rmsprop") else name  # SB3's RMSpropTFLike
        known = f"optax.{name}" if name in _OPTAX_NAMES else "one of optax, such as optax.adam or optax.sgd"
        raise TypeError(f"optimizer_class={optimizer_class.__name__} is torch's: pass {known}")
    if is_class or isinstance(optimizer_class, optax.GradientTransformation) or not callable(optimizer_class):
        raise TypeError(
            f"optimizer_class={optimizer_class!r} must be a function from a learning rate to an optax optimizer, such"
            " as optax.adam (not called); its arguments go into optimizer_kwargs"
        )
    label = getattr(optimizer_class, "__name__", repr(optimizer_class))
    taken = inspect.signature(optimizer_class).parameters
    takes_any = any(parameter.kind is parameter.VAR_KEYWORD for parameter in taken.values())
    for name, value in arguments.items():
        if name in ("learning_rate", "lr"):
            problem = "the learning rate is an argument of the algorithm"
        elif name not in taken and not takes_any:
            problem = f"{label} takes no {name}, but {', '.join(list(taken)[1:])}"
        elif not _is_hashable(value):
            problem = f"{name} must be hashable, such as a number, tuple or function"
        else:
            continue
        raise TypeError(f"optimizer_kwargs={arguments!r}: {problem}")
    factory = OptimizerFactory(optimizer_class, tuple(sorted(arguments.items())))
    if not isinstance(factory(1e-3), optax.GradientTransformation):
        raise TypeError(f"optimizer_class={label} must return an optax.GradientTransformation")
    return factory


def _is_hashable(value: Any) -> bool:
    try:
        hash(value)
    except TypeError:
        return False
    return True


def _own_adam(learning_rate: Any) -> optax.GradientTransformation:
    """As grpo_jax.learning.update has it."""
    return optax.flatten(optax.adam(learning_rate, eps=1e-5))


@dataclasses.dataclass(eq=False)
class Optimizer:
    """What SB3 calls ``policy.optimizer``: an optax optimizer and its state.

    Attributes:
      given: the user's factory; None: the library's own Adam.
      param_groups: one, with the learning rate ``"lr"`` that SB3 sets.
      state: optax state, None until the algorithm sets it.
      frozen: names of the parameters that are not learned.
    """

    given: OptimizerFactory | None
    param_groups: list[dict[str, Any]]
    state: PyTree = None
    frozen: tuple[str, ...] = ()

    @property
    def factory(self) -> OptimizerFactory | None:
        """From a learning rate to the optax optimizer; None: the library's own Adam."""
        if not self.frozen:
            return self.given
        return dataclasses.replace(self.given or OptimizerFactory(_own_adam), frozen=self.frozen)

    def state_dict(self) -> dict[str, torch.Tensor]:
        """The state's arrays as CPU tensors by name; empty before there is a state."""
        return {name: to_tensor(leaf) for name, leaf in self._named().items()}

    def load_state_dict(self, state_dict: Mapping[str, Any], strict: bool = True) -> None:
        """Takes over arrays (torch, NumPy or JAX) by name; other names (where ``strict``) or shapes are a RuntimeError.

        ``param_groups``, as torch's optimizers have them, may be left out.
        """
        arrays = {name: leaf for name, leaf in state_dict.items() if name != "param_groups"}
        leaves, _ = replaced(self._named(), arrays, strict, "the optimizer")
        self.state = jax.tree.unflatten(jax.tree.structure(self.state), leaves.values())
        for mine, given in zip(self.param_groups, state_dict.get("param_groups", ()), strict=False):
            mine.update(given)

    def _named(self) -> dict[str, Any]:
        leaves = jax.tree_util.tree_leaves_with_path(self.state)
        return {jax.tree_util.keystr(path): leaf for path, leaf in leaves}
