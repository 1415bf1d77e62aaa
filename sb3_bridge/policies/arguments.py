"""What ``policy_kwargs`` and Gymnasium's spaces mean to the policies of ``grpo_jax``."""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import flax.linen as nn
import gymnasium
import jax
import jax.numpy as jnp
import numpy as np
import optax
import torch
from stable_baselines3.common.preprocessing import check_for_nested_spaces, is_image_space
from stable_baselines3.common.torch_layers import CombinedExtractor, FlattenExtractor, NatureCNN

from grpo_jax import spaces
from grpo_jax.policies.networks import ACTIVATIONS, CNN, Activation, Combined, Flatten, check_activation

Kind = Literal["mlp", "cnn", "multi_input"]
NetArch = list[int] | dict[str, list[int]]
POLICIES: dict[Kind, str] = {"mlp": "MlpPolicy", "cnn": "CnnPolicy", "multi_input": "MultiInputPolicy"}


# --- Spaces -----------------------------------------------------------------------------------------------------------


def to_observation_space(space: gymnasium.Space, normalize_images: bool = True) -> spaces.Space:
    """The space as the networks see it, with SB3's view of what an image is.

    Images (uint8 from 0 to 255 in three dimensions, where they are normalised) are divided by 255; the smallest of their
    dimensions is the channels', first or last. Nothing else is divided.

    Raises:
      NotImplementedError: nested, or of a kind that SB3 has no policy for.
    """
    check_for_nested_spaces(space)
    if isinstance(space, gymnasium.spaces.Dict):
        entries = space.spaces.items()
        return spaces.Dict(
            tuple((name, to_observation_space(part, normalize_images)) for name, part in entries)
        )
    if isinstance(space, gymnasium.spaces.Box):
        # Only uint8 is divided by 255 in grpo_jax, and here only images are.
        divided = normalize_images and is_image_space(space)
        channels_first = _is_image(space, normalize_images) and int(np.argmin(space.shape)) == 0
        dtype = "uint8" if divided else "float32"
        return spaces.Box(space.low, space.high, space.shape, dtype, channels_first)
    if isinstance(space, gymnasium.spaces.MultiBinary) and len(space.shape) != 1:
        return spaces.Box(np.float32(0), np.float32(1), space.shape)  # type: ignore[arg-type]
    return spaces.from_gymnasium(space, "observation_space")


def to_action_space(space: gymnasium.Space) -> spaces.ActionSpace:
    """The space of a policy's actions.

    Raises:
      NotImplementedError: ``Dict``, ``Tuple`` and their like.
      AssertionError: ``MultiBinary`` of more than one dimension, as in SB3.
    """
    if isinstance(space, gymnasium.spaces.MultiBinary) and len(space.shape) != 1:
        raise AssertionError(f"action_space={space} must be one-dimensional: flatten it")
    action_space = spaces.from_gymnasium(space, "action_space")
    if isinstance(action_space, spaces.Dict):
        raise NotImplementedError(f"action_space={space}: use Box, Discrete, MultiDiscrete or MultiBinary")
    return action_space


def _is_image(space: gymnasium.Space, normalize_images: bool) -> bool:
    return is_image_space(space, normalized_image=not normalize_images)


# --- Layers -----------------------------------------------------------------------------------------------------------


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
            stacklevel=3,
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


# --- Activations ------------------------------------------------------------------------------------------------------


def _exact_gelu(x: jax.Array) -> jax.Array:
    return jax.nn.gelu(x, approximate=False)


def _tanh_shrink(x: jax.Array) -> jax.Array:
    return x - jnp.tanh(x)


TORCH_ACTIVATIONS: dict[type[torch.nn.Module], Activation] = {
    torch.nn.Tanh: "tanh",
    torch.nn.ReLU: "relu",
    torch.nn.ELU: "elu",
    torch.nn.GELU: _exact_gelu,
    torch.nn.SiLU: "silu",
    torch.nn.LeakyReLU: "leaky_relu",
    torch.nn.Sigmoid: jax.nn.sigmoid,
    torch.nn.Softplus: jax.nn.softplus,
    torch.nn.Softsign: jax.nn.soft_sign,
    torch.nn.SELU: jax.nn.selu,
    torch.nn.CELU: jax.nn.celu,
    torch.nn.Mish: jax.nn.mish,
    torch.nn.ReLU6: jax.nn.relu6,
    torch.nn.Hardtanh: jax.nn.hard_tanh,
    torch.nn.Hardswish: jax.nn.hard_swish,
    torch.nn.Hardsigmoid: jax.nn.hard_sigmoid,
    torch.nn.LogSigmoid: jax.nn.log_sigmoid,
    torch.nn.Tanhshrink: _tanh_shrink,
    torch.nn.Identity: jax.nn.identity,
}
"""Classes of torch and the same functions in JAX."""


def to_activation(activation: Any) -> Activation:
    """``activation_fn`` as a name or a function of JAX arrays; the same function always in the same form.

    Raises:
      TypeError: a torch class without a counterpart, or no function; says what to pass.
      ValueError: an unknown name.
    """
    is_torch = isinstance(activation, torch.nn.Module) or (
        isinstance(activation, type) and issubclass(activation, torch.nn.Module)
    )
    if is_torch and activation not in TORCH_ACTIVATIONS:
        known = ", ".join(sorted(kind.__name__ for kind in TORCH_ACTIVATIONS))
        raise TypeError(
            f"activation_fn={activation!r} has no counterpart in JAX here: pass a function of JAX arrays such as"
            f" jax.nn.relu, or one of these classes (not an instance) of torch.nn: {known}"
        )
    if getattr(activation, "__module__", "").startswith("torch."):
        activation = TORCH_ACTIVATIONS.get(activation, activation)
    try:
        check_activation(activation)
    except (TypeError, ValueError) as error:
        raise type(error)(f"activation_fn: {error}") from error
    names = {function: name for name, function in ACTIVATIONS.items()}
    return activation if isinstance(activation, str) else names.get(activation, activation)


# --- Optimizer --------------------------------------------------------------------------------------------------------

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


# --- Features extractor -----------------------------------------------------------------------------------------------

_SB3_EXTRACTORS = {FlattenExtractor: "flatten", NatureCNN: "cnn", CombinedExtractor: "combined"}
_OWN_EXTRACTORS = {Flatten: "flatten", CNN: "cnn", Combined: "combined"}
_DEFAULTS: dict[Kind, str] = {"mlp": "flatten", "cnn": "cnn", "multi_input": "combined"}


def to_features_extractor(
    kind: Kind,
    space: gymnasium.Space,
    features_extractor_class: Any = None,
    features_extractor_kwargs: Mapping[str, Any] | None = None,
    normalize_images: bool = True,
) -> nn.Module:
    """The flax module that turns observations into features.

    A module of the user's sees observations as ``[B, *shape]``: one-hot where they are categories, images with the
    channels last and divided by 255; a dict of such arrays for a ``Dict`` space. It gives ``[B, F]``.

    Args:
      kind: which of the three policies asks.
      space: the observation space.
      features_extractor_class: a flax module class; SB3's own three mean ours; None: what the policy stands for.
      features_extractor_kwargs: its arguments: ``features_dim`` for convolutions (where our own CNN is named also
        ``activation``, and feature maps of any number of channels do), ``cnn_output_dim`` for the combined one, as in SB3.
      normalize_images: whether images are divided by 255; False also lets images of other dtypes be images.

    Raises:
      ValueError: another policy fits the space.
      AssertionError: convolutions on what is no image, as in SB3.
      TypeError: not a flax module class, or arguments that it does not take.
    """
    is_dict = isinstance(space, gymnasium.spaces.Dict)
    if is_dict and kind != "multi_input":
        raise ValueError(f"{POLICIES[kind]} is not for Dict observations: use MultiInputPolicy for {space}")
    if not is_dict and kind == "multi_input":
        fitting = "CnnPolicy" if _is_image(space, normalize_images) else "MlpPolicy"
        raise ValueError(f"MultiInputPolicy is for Dict observations: use {fitting} for {space}")
    given = features_extractor_class
    own = _DEFAULTS[kind] if given is None else _lookup(given)
    if own is None:
        return _user_extractor(given, features_extractor_kwargs)
    arguments = dict(features_extractor_kwargs or {})
    arguments.pop("normalized_image", None)  # what normalize_images=False tells us
    # Who names our CNN says that the maps are for it, also those that are no image to SB3.
    by_name = given is CNN
    of_cnn = ("features_dim", "activation") if by_name else ("features_dim",)
    options = {"flatten": (), "cnn": of_cnn, "combined": ("cnn_output_dim",)}[own]
    unknown = sorted(set(arguments) - set(options))
    if unknown:
        takes = ", ".join(options) or "no arguments"
        raise TypeError(
            f"features_extractor_kwargs={arguments!r}: {', '.join(unknown)} is not known; the {own} extractor takes"
            f" {takes}"
        )
    encoded = to_observation_space(space, normalize_images)
    if own == "cnn":
        if is_dict or not spaces.is_image(encoded) or not (by_name or _is_image(space, normalize_images)):
            raise AssertionError(_no_image(space))
        return CNN(arguments.get("activation", "relu"), arguments.get("features_dim"))
    if own == "flatten":
        if is_dict:
            raise ValueError(
                f"a Flatten extractor joins no Dict: leave features_extractor_class out for {space}"
            )
        return Flatten(spaces.encoded_rank(encoded))
    if not isinstance(encoded, spaces.Dict):
        raise ValueError(f"a Combined extractor is for Dict observations, not for {space}")
    images = tuple(
        name
        for name, part in encoded.spaces
        if _is_image(space[name], normalize_images) and spaces.is_image(part)  # type: ignore[index]
    )
    ranks = tuple((name, spaces.encoded_rank(part)) for name, part in encoded.spaces)
    return Combined(ranks, images, "relu", arguments.get("cnn_output_dim", 256))


def _lookup(extractor: Any) -> str | None:
    return {**_SB3_EXTRACTORS, **_OWN_EXTRACTORS}.get(extractor) if isinstance(extractor, type) else None


def _user_extractor(extractor: Any, arguments: Mapping[str, Any] | None) -> nn.Module:
    if not (isinstance(extractor, type) and issubclass(extractor, nn.Module)):
        is_torch = isinstance(extractor, type) and issubclass(extractor, torch.nn.Module)
        why = "torch cannot run in JAX: write it" if is_torch else "it must be"
        raise TypeError(
            f"features_extractor_class={extractor!r}: {why} as a class derived from flax.linen.Module, from"
            " observations [B, *shape] (images with the channels last) to features [B, F]; its arguments go into"
            " features_extractor_kwargs"
        )
    return extractor(**dict(arguments or {}))


def _no_image(space: gymnasium.Space) -> str:
    text = f"CnnPolicy is for images (Box, uint8, from 0 to 255, 3x3 pixels or more), not for {space}: use MlpPolicy"
    if isinstance(space, gymnasium.spaces.Box) and len(space.shape) == 3:
        return text + ", or normalize_images=False in policy_kwargs for images that are normalised already"
    return text
