"""A policy in JAX as SB3's in torch, and back: the same actions, values and log-probabilities.

Each parameter of ours has one of torch's: kernels are transposed; features lie in another order where we see the
channels of an image last and torch first; the actor's output carries the stretch to the bounds of a Box, which ours
applies to actions; a bit has two logits here and one there.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from stable_baselines3 import PPO
from stable_baselines3.common.base_class import BaseAlgorithm
from stable_baselines3.common.policies import ActorCriticPolicy
from stable_baselines3.common.torch_layers import CombinedExtractor, FlattenExtractor, NatureCNN
from stable_baselines3.common.utils import ConstantSchedule

from grpo_jax import spaces
from grpo_jax.policies.networks import CNN, Actor, Combined, Critic, Flatten
from grpo_jax.policies.policy import Policy
from sb3_bridge.policies.layers import TORCH_ACTIVATIONS, TORCH_CLASSES
from sb3_bridge.policies.policy import SB3_POLICIES, GRPOPolicy
from sb3_bridge.policies.spaces import is_image, stretch_of
from sb3_bridge.policies.torch_layers import FeatureMapsCNN, FeatureMapsCombined, TanhGELU

if TYPE_CHECKING:
    from sb3_bridge.grpo import GRPO

_TORCH_POLICIES = {ours.kind: theirs for theirs, ours in SB3_POLICIES.items()}
_ACTIVATIONS: dict[Any, Any] = TORCH_CLASSES | {"gelu": TanhGELU}
_EXTRACTORS: dict[type, type] = {
    **{kind: kind for kind in (FlattenExtractor, NatureCNN, CombinedExtractor)},
    FeatureMapsCNN: CNN,
    FeatureMapsCombined: CombinedExtractor,
}
_NETWORKS = ("net_arch", "ortho_init", "log_std_init", "share_features_extractor", "normalize_images")
"""Arguments that the policies of both have."""
# fmt: off
_SETTINGS = (
    "learning_rate", "n_steps", "batch_size", "n_epochs", "gamma", "gae_lambda", "clip_range",
    "clip_range_vf", "normalize_advantage", "ent_coef", "vf_coef", "max_grad_norm", "target_kl",
    "tensorboard_log", "verbose",
)
"""Arguments that PPO and GRPO have both."""
# fmt: on


def to_torch(policy: GRPOPolicy) -> ActorCriticPolicy:
    """The same policy in torch, on ``policy.device``, a copy: training one leaves the other as it is.

    Deterministic actions, distributions, values, log-probabilities and entropies are equal but for float32's rounding.
    Without a critic, values are 0. Torch can trace, export, compile and train it.

    Raises:
      TypeError: a features extractor or an activation of the user's, which torch does not have.
    """
    kind, arguments = _torch_arguments(policy)
    rate = ConstantSchedule(policy.optimizer.param_groups[0]["lr"])
    generator = torch.get_rng_state()
    # Copies of the spaces: SB3's CNN draws a sample.
    twin = kind(*copy.deepcopy((policy.observation_space, policy.action_space)), rate, **arguments)
    torch.set_rng_state(generator)
    ours, theirs = policy.state_dict(), dict(twin.named_parameters(remove_duplicate=False))
    with torch.no_grad():
        for pair in _pairs(policy.structure, twin):
            array = pair.to_torch(ours[pair.name].float().numpy())
            theirs[pair.torch_name].copy_(torch.as_tensor(array))
        if not policy.has_critic:
            twin.value_net.weight.zero_()
            twin.value_net.bias.zero_()
    twin.set_training_mode(False)
    return twin.to(policy.device)


def from_torch(policy: ActorCriticPolicy) -> GRPOPolicy:
    """The same policy in JAX: the inverse of :func:`to_torch`.

    The round trip is exact, but for float32's rounding where actions are stretched to a Box, and for the two logits of a
    bit, of which only the difference comes back.

    Raises:
      TypeError, NotImplementedError: what JAX does not have here, by name.
    """
    kind, arguments = arguments_of(policy)
    rate = ConstantSchedule(policy.optimizer.param_groups[0]["lr"])
    ours = kind(policy.observation_space, policy.action_space, rate, **arguments)
    load_torch(ours, policy)
    return ours


def arguments_of(policy: ActorCriticPolicy) -> tuple[type[GRPOPolicy], dict[str, Any]]:
    """Class and ``policy_kwargs`` that make the same networks in JAX; the optimizer is ours.

    Raises:
      TypeError, NotImplementedError: what JAX does not have here, by name.
    """
    if type(policy) not in SB3_POLICIES:
        raise TypeError(
            f"policy={type(policy).__name__} must be SB3's MlpPolicy, CnnPolicy or MultiInputPolicy itself: what a derived"
            " or another class computes is not known here"
        )
    if policy.use_sde or policy.squash_output:
        raise NotImplementedError("use_sde=True (gSDE, squash_output) has no counterpart in JAX here")
    extractor = type(policy.features_extractor)
    if extractor not in _EXTRACTORS:
        raise TypeError(
            f"features_extractor_class={extractor.__name__} is torch's and has no counterpart in JAX here: only"
            " FlattenExtractor, NatureCNN and CombinedExtractor have"
        )
    given = dict(policy.features_extractor_kwargs)
    for name in ("normalized_image", "channels_first"):  # what the policy and the space say
        given.pop(name, None)
    if "activation_fn" in given:
        given["activation"] = _jax_activation(given.pop("activation_fn"))
    return SB3_POLICIES[type(policy)], {
        **{name: getattr(policy, name) for name in _NETWORKS},
        "activation_fn": _jax_activation(policy.activation_fn),
        "features_extractor_class": _EXTRACTORS[extractor],
        "features_extractor_kwargs": given,
    }


def load_torch(policy: GRPOPolicy, source: ActorCriticPolicy) -> None:
    """Takes over the parameters of a torch policy; its critic is left out where ``policy`` has none.

    Raises:
      ValueError: other spaces.
      TypeError: the torch policy has other layers than ``policy`` has counterparts for.
    """
    for name in ("observation_space", "action_space"):
        ours, theirs = getattr(policy, name), getattr(source, name)
        if ours != theirs:
            raise ValueError(f"{name.replace('_', ' ').capitalize()}s do not match: {theirs} != {ours}")
    expected = to_torch(policy)
    if repr(expected) != repr(source):
        lines = zip(repr(expected).splitlines(), repr(source).splitlines(), strict=False)
        wanted, found = next(((a, b) for a, b in lines if a != b), ("its end", "more"))
        raise TypeError(
            f"the torch policy has {found.strip()} where {wanted.strip()} was expected: layers that were replaced or added"
            " cannot be taken over"
        )
    tensors = dict(source.named_parameters(remove_duplicate=False))
    arrays = {
        pair.name: pair.from_torch(tensors[pair.torch_name].detach().cpu().numpy())
        for pair in _pairs(policy.structure, expected)
    }
    policy.load_state_dict(arrays)


def arguments_from(source: BaseAlgorithm | ActorCriticPolicy) -> tuple[dict[str, Any], ActorCriticPolicy]:
    """Arguments for a ``GRPO`` that trains on what an algorithm of SB3's (or a policy alone) learned, and the torch policy.

    ``load_torch(model.policy, torch_policy)`` then takes the parameters over; the optimizer starts anew.

    Raises:
      TypeError, NotImplementedError: what JAX does not have here, by name.
    """
    policy: Any = source.policy if isinstance(source, BaseAlgorithm) else source
    kind, policy_kwargs = arguments_of(policy)
    settings: dict[str, Any] = {}
    if isinstance(source, BaseAlgorithm):
        settings = {name: getattr(source, name) for name in _SETTINGS if hasattr(source, name)}
        settings |= {"env": source.get_env(), "seed": source.seed, "device": source.device}
    return {"policy": kind, "policy_kwargs": policy_kwargs, **settings}, policy


def to_sb3(model: GRPO) -> PPO:
    """A ``PPO`` with the model's policy (in torch), env and those settings that both have; its optimizer starts anew.

    Raises:
      TypeError: a features extractor or an activation of the user's, which torch does not have.
    """
    kind, policy_kwargs = _torch_arguments(model.policy)
    settings = {name: getattr(model, name) for name in _SETTINGS}
    if callable(settings["ent_coef"]):  # PPO's is a number
        settings["ent_coef"] = settings["ent_coef"](model._current_progress_remaining)
    settings |= {"policy_kwargs": policy_kwargs, "device": model.device}
    generator = torch.get_rng_state()
    ppo = PPO(kind, None, **settings, _init_setup_model=False)  # type: ignore[arg-type]
    ppo.observation_space, ppo.action_space = copy.deepcopy((model.observation_space, model.action_space))
    ppo.n_envs = model.n_envs
    ppo._setup_model()
    torch.set_rng_state(generator)
    ppo.policy.load_state_dict(to_torch(model.policy).state_dict())
    ppo.seed, ppo.num_timesteps = model.seed, model.num_timesteps
    if model.env is not None:
        ppo.set_env(model.env)
    return ppo


# Arguments ------------------------------------------------------------------------------------------------------------


def _torch_arguments(policy: GRPOPolicy) -> tuple[type[ActorCriticPolicy], dict[str, Any]]:
    extractor_class, extractor_kwargs = _torch_extractor(policy)
    return _TORCH_POLICIES[policy.kind], {
        **{name: getattr(policy, name) for name in _NETWORKS},
        "activation_fn": _torch_activation(policy.structure.actor.activation),
        "features_extractor_class": extractor_class,
        "features_extractor_kwargs": extractor_kwargs,
    }


def _jax_activation(activation: Any) -> Any:
    return "gelu" if activation is TanhGELU else activation


def _torch_activation(activation: Any) -> type[torch.nn.Module]:
    if activation not in _ACTIVATIONS:
        known = ", ".join(sorted(kind.__name__ for kind in TORCH_ACTIVATIONS))
        raise TypeError(f"activation_fn={activation!r} has no counterpart in torch here: only {known} have")
    return _ACTIVATIONS[activation]


def _torch_extractor(policy: GRPOPolicy) -> tuple[type, dict[str, Any]]:
    """SB3's own class where it computes the same, else ours."""
    extractor: Any = policy.structure.features_extractor
    seen: Any = policy.structure.observation_space
    space: Any = policy.observation_space

    def is_natures(seen: Any, space: Any) -> bool:
        return is_image(space, policy.normalize_images) and seen.channels_first and min(seen.shape[1:]) >= 36

    if isinstance(extractor, Flatten):
        return FlattenExtractor, {}
    if isinstance(extractor, CNN):
        n_features = {} if extractor.n_features is None else {"features_dim": extractor.n_features}
        if extractor.activation == "relu" and is_natures(seen, space):
            return NatureCNN, n_features
        activation = _torch_activation(extractor.activation)
        return FeatureMapsCNN, n_features | {
            "activation_fn": activation,
            "channels_first": seen.channels_first,
        }
    if isinstance(extractor, Combined):
        n_features, parts = {"cnn_output_dim": extractor.n_features}, dict(seen.spaces)
        of_sb3 = {name for name in parts if is_image(space[name], policy.normalize_images)}
        natures = {name for name in extractor.images if is_natures(parts[name], space[name])}
        if of_sb3 == natures == set(extractor.images):
            return CombinedExtractor, n_features
        channels_first = {name: parts[name].channels_first for name in extractor.images}
        return FeatureMapsCombined, n_features | {"channels_first": channels_first}
    raise TypeError(
        f"features_extractor_class={type(extractor).__name__} is JAX's and has no counterpart in torch: only Flatten, CNN"
        " and Combined have"
    )


# Parameters -----------------------------------------------------------------------------------------------------------

_Map = Callable[[np.ndarray], np.ndarray]


def _same(array: np.ndarray) -> np.ndarray:
    return array


class _Pair(NamedTuple):
    """One parameter here and there, and the ways between them."""

    name: str
    torch_name: str
    to_torch: _Map = _same
    from_torch: _Map = _same


def _pairs(structure: Policy, twin: ActorCriticPolicy) -> list[_Pair]:
    """All parameters of a policy."""
    extractor, pairs = structure.features_extractor, []
    extractors = [("features_extractor", "pi_features_extractor")]
    if structure.critic is not None and not structure.share_features_extractor:
        extractors.append(("critic_features_extractor", "vf_features_extractor"))
    for name, torch_name in extractors:
        module: Any = getattr(twin, torch_name)
        if isinstance(extractor, CNN):
            pairs += _convolutions(name, torch_name, module)
        elif isinstance(extractor, Combined):
            for image in extractor.images:
                path = f"{torch_name}.extractors.{image}"
                pairs += _convolutions(f"{name}.CNN_{image}", path, module.extractors[image])
    order = _order(structure)
    pairs += _head(structure.actor, "actor", "policy_net", "action_net", order)
    output_bias, output_kernel = pairs[-2:]
    pairs[-2:] = [
        _acting(structure, output_bias, is_bias=True),
        _acting(structure, output_kernel, is_bias=False),
    ]
    if structure.actor.gaussian:
        log_half = np.log(stretch_of(structure.action_space)[1].reshape(-1))
        pairs.append(_Pair("actor.log_std", "log_std", lambda a: a + log_half, lambda a: a - log_half))
    if structure.critic is not None:
        pairs += _head(structure.critic, "critic", "value_net", "value_net", order)
    return pairs


def _convolutions(name: str, torch_name: str, module: Any) -> list[_Pair]:
    """Those of one CNN; between convolutions and dense layer, pixels lie as [height, width, channels] here."""
    pairs = []
    convolutions = [i for i, layer in enumerate(module.cnn) if isinstance(layer, torch.nn.Conv2d)]
    for i, place in enumerate(convolutions):
        ours, theirs = f"{name}.Conv_{i}", f"{torch_name}.cnn.{place}"
        pairs.append(_Pair(f"{ours}.bias", f"{theirs}.bias"))
        kernel = (lambda a: a.transpose(3, 2, 0, 1)), (lambda a: a.transpose(2, 3, 1, 0))
        pairs.append(_Pair(f"{ours}.kernel", f"{theirs}.weight", *kernel))
    shape = module._observation_space.shape
    seen = torch.zeros(1, *shape)
    seen = seen if getattr(module, "channels_first", True) else seen.movedim(-1, 1)
    with torch.no_grad():
        maps = module.cnn[:-1](seen).shape[1:]
    order = np.arange(maps.numel()).reshape(maps).transpose(1, 2, 0).reshape(-1)
    return pairs + _dense(f"{name}.Dense_0", f"{torch_name}.linear.0", order)


def _order(structure: Policy) -> np.ndarray | None:
    """Where torch has each of our features; None: as we do, behind convolutions."""
    extractor: Any = structure.features_extractor
    space = structure.observation_space
    if isinstance(extractor, CNN):
        return None
    images = extractor.images if isinstance(extractor, Combined) else ()
    orders: list[np.ndarray] = []
    for name, part in space.spaces if isinstance(space, spaces.Dict) else [("", space)]:
        size = extractor.n_features if name in images else spaces.encoded_size(part)
        order = np.arange(size)
        if name not in images and isinstance(part, spaces.Box) and part.channels_first:
            order = np.moveaxis(order.reshape(part.shape), 0, -1).reshape(-1)
        orders.append(order + sum(map(len, orders)))
    return np.concatenate(orders)


def _head(head: Actor | Critic, name: str, net: str, output: str, order: np.ndarray | None) -> list[_Pair]:
    pairs = []
    for i in range(len(head.widths)):
        layer = f"{name}.MLP_0.Dense_{i}"
        pairs += _dense(layer, f"mlp_extractor.{net}.{2 * i}", None if i else order)
    return pairs + _dense(f"{name}.output", output, None if head.widths else order)


def _dense(name: str, torch_name: str, order: np.ndarray | None) -> list[_Pair]:
    """Bias and kernel of a layer; ``order``: where torch has each of its inputs."""
    back, forth = (slice(None), slice(None)) if order is None else (order, np.argsort(order))
    kernel = (lambda a: a[forth].T), (lambda a: a.T[back])
    bias = _Pair(f"{name}.bias", f"{torch_name}.bias")
    return [bias, _Pair(f"{name}.kernel", f"{torch_name}.weight", *kernel)]


def _acting(structure: Policy, pair: _Pair, is_bias: bool) -> _Pair:
    """A parameter of the actor's output (torch's with the outputs first), in the environment's units."""
    space, (name, torch_name, to_torch, from_torch) = structure.action_space, pair
    if isinstance(space, spaces.MultiBinary):  # two logits a bit here, their difference there

        def to_bits(array: np.ndarray) -> np.ndarray:
            logits = to_torch(array)
            return logits[1::2] - logits[::2]

        def from_bits(array: np.ndarray) -> np.ndarray:
            return from_torch(np.stack([-array / 2, array / 2], axis=1).reshape(-1, *array.shape[1:]))

        return _Pair(name, torch_name, to_bits, from_bits)
    if isinstance(space, spaces.Box):
        middle, half = (part.reshape(-1) for part in stretch_of(space))
        scale, shift = (half, middle) if is_bias else (half[:, None], np.float32(0))
        return _Pair(
            name, torch_name, lambda a: to_torch(a) * scale + shift, lambda a: from_torch((a - shift) / scale)
        )
    return pair
