"""A policy in JAX as SB3's in torch, and back: the same actions, values and log-probabilities.

Each layer of ours has one of torch's: kernels are transposed; features lie in another order where we see the channels of
an image last and torch first; the actor's output carries the stretch to the bounds of a Box, which ours applies to
actions; a bit has two logits here and one there.
"""

from __future__ import annotations

import copy
import itertools
import warnings
from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np
import torch
from stable_baselines3 import PPO
from stable_baselines3.common.base_class import BaseAlgorithm
from stable_baselines3.common.policies import ActorCriticPolicy
from stable_baselines3.common.torch_layers import CombinedExtractor, FlattenExtractor, NatureCNN
from stable_baselines3.common.utils import ConstantSchedule

from grpo_jax import spaces
from grpo_jax.policies.networks import CNN, Combined, Flatten
from grpo_jax.policies.policy import Policy
from sb3_bridge.policies.layers import TORCH_CLASSES, TORCH_NAMES
from sb3_bridge.policies.policy import SB3_POLICIES, GRPOPolicy
from sb3_bridge.policies.spaces import is_image, stretch_of
from sb3_bridge.policies.torch_layers import FeatureMapsCNN, FeatureMapsCombined, TanhGELU

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


def to_torch(policy: GRPOPolicy, is_masked: bool = False) -> ActorCriticPolicy:
    """The same policy in torch, on ``policy.device``, a copy: training one leaves the other as it is.

    Deterministic actions, distributions, values, log-probabilities and entropies are equal but for float32's rounding.
    Without a critic, values are 0. Torch can trace, export, compile and train it. It knows no action masks: where the
    environment forbids actions (``is_masked``), a warning says so.

    Raises:
      TypeError: a features extractor or an activation of the user's, which torch does not have.
    """
    if is_masked:
        warnings.warn(
            "the environment forbids some actions, of which SB3's policies know nothing: this one may play them",
            UserWarning,
            stacklevel=3,
        )
    kind, arguments = _torch_arguments(policy)
    rate = ConstantSchedule(policy.optimizer.param_groups[0]["lr"])
    with torch.random.fork_rng([]), torch.no_grad():
        # Copies of the spaces: SB3's CNN draws a sample.
        equal = kind(*copy.deepcopy((policy.observation_space, policy.action_space)), rate, **arguments)
        arrays = {name: leaf.float().numpy() for name, leaf in policy.state_dict().items()}
        for layer in _layers(policy.structure, equal):
            weight, bias = layer.to_torch(arrays[f"{layer.name}.kernel"], arrays[f"{layer.name}.bias"])
            layer.module.weight.copy_(torch.as_tensor(weight))
            layer.module.bias.copy_(torch.as_tensor(bias))
        if policy.structure.actor.gaussian:
            equal.log_std.copy_(torch.as_tensor(arrays["actor.log_std"] + _log_half(policy.structure)))
        if not policy.has_critic:
            equal.value_net.weight.zero_()
            equal.value_net.bias.zero_()
    equal.set_training_mode(False)
    return equal.to(policy.device)


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
    """Class and ``policy_kwargs`` that make the same networks in JAX; errors as in :func:`from_torch`."""
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
    known = ("normalized_image", "channels_first")  # which the policy and the space say
    kwargs = {name: leaf for name, leaf in policy.features_extractor_kwargs.items() if name not in known}
    arguments = {name: getattr(policy, name) for name in (*_NETWORKS, "activation_fn")}
    for owner in (kwargs, arguments):
        owner |= {name: "gelu" for name, value in owner.items() if value is TanhGELU}
    arguments |= {"features_extractor_class": _EXTRACTORS[extractor], "features_extractor_kwargs": kwargs}
    return SB3_POLICIES[type(policy)], arguments


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
    expected, found = (repr(module).splitlines() for module in (to_torch(policy), source))
    for wanted, got in itertools.zip_longest(expected, found, fillvalue="nothing"):
        if wanted != got:
            raise TypeError(
                f"the torch policy has {got.strip()} where {wanted.strip()} was expected: layers that were replaced or"
                " added cannot be taken over"
            )
    arrays = {}
    for layer in _layers(policy.structure, source):
        parts = (part.detach().cpu().numpy() for part in (layer.module.weight, layer.module.bias))
        arrays[f"{layer.name}.kernel"], arrays[f"{layer.name}.bias"] = layer.from_torch(*parts)
    if policy.structure.actor.gaussian:
        arrays["actor.log_std"] = source.log_std.detach().cpu().numpy() - _log_half(policy.structure)
    policy.load_state_dict(arrays)


def arguments_from(source: BaseAlgorithm | ActorCriticPolicy) -> tuple[dict[str, Any], ActorCriticPolicy]:
    """Arguments for a ``GRPO`` that trains on what an algorithm of SB3's (or a policy alone) learned, and the torch policy.

    ``load_torch(model.policy, torch_policy)`` then takes the parameters over; the optimizer starts anew. Errors as in
    :func:`from_torch`.
    """
    if not isinstance(source, BaseAlgorithm):
        kind, policy_kwargs = arguments_of(source)
        return {"policy": kind, "policy_kwargs": policy_kwargs}, source
    arguments, policy = arguments_from(source.policy)  # type: ignore[arg-type]
    arguments |= {name: getattr(source, name) for name in _SETTINGS if hasattr(source, name)}
    return {**arguments, "env": source.get_env(), "seed": source.seed, "device": source.device}, policy


def to_sb3(model: Any) -> PPO:
    """A ``PPO`` with the model's policy (in torch), env and those settings that both have; its optimizer starts anew.

    Raises:
      TypeError: as in :func:`to_torch`.
    """
    kind, policy_kwargs = _torch_arguments(model.policy)
    settings = {name: getattr(model, name) for name in _SETTINGS}
    if callable(settings["ent_coef"]):  # PPO's is a number
        settings["ent_coef"] = settings["ent_coef"](model._current_progress_remaining)
    settings |= {"policy_kwargs": policy_kwargs, "device": model.device}
    ppo = PPO(kind, None, **settings, _init_setup_model=False)  # type: ignore[arg-type]
    ppo.observation_space, ppo.action_space = copy.deepcopy((model.observation_space, model.action_space))
    ppo.n_envs = model.n_envs
    with torch.random.fork_rng([]):
        ppo._setup_model()
    ppo.policy.load_state_dict(to_torch(model.policy, model._is_masked).state_dict())
    ppo.seed, ppo.num_timesteps = model.seed, model.num_timesteps
    if model.env is not None:
        ppo.set_env(model.env)
    return ppo


def _torch_arguments(policy: GRPOPolicy) -> tuple[type[ActorCriticPolicy], dict[str, Any]]:
    arguments = {name: getattr(policy, name) for name in _NETWORKS}
    arguments["activation_fn"] = _torch_activation(policy.structure.actor.activation)
    arguments |= zip(
        ("features_extractor_class", "features_extractor_kwargs"), _torch_extractor(policy), strict=True
    )
    return _TORCH_POLICIES[policy.kind], arguments


def _torch_activation(activation: Any) -> type[torch.nn.Module]:
    if activation not in _ACTIVATIONS:
        raise TypeError(f"activation_fn={activation!r} has no counterpart in torch here: only {TORCH_NAMES}")
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
        return FeatureMapsCNN, {**n_features, "activation": activation, "channels_first": seen.channels_first}
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


class _Layer(NamedTuple):
    """One layer here (its path) and there (its module): how inputs and outputs of the two differ."""

    name: str
    module: Any
    order: np.ndarray | None = None  # where torch has each of our inputs; None: in the same place
    matrix: np.ndarray | None = (
        None  # from our outputs to torch's, which lie ``shift`` higher; None: they are the same
    )
    shift: Any = 0

    def to_torch(self, kernel: np.ndarray, bias: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        weight = kernel.transpose(-1, -2, *range(kernel.ndim - 2))
        weight = weight if self.order is None else weight[:, np.argsort(self.order)]
        if self.matrix is None:
            return weight, bias
        return self.matrix @ weight, self.matrix @ bias + self.shift

    def from_torch(self, weight: np.ndarray, bias: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        if self.matrix is not None:  # its rows are orthogonal
            inverse = self.matrix.T / np.square(self.matrix).sum(axis=1)
            weight, bias = inverse @ weight, inverse @ (bias - self.shift)
        weight = weight if self.order is None else weight[:, self.order]
        return weight.transpose(*range(2, weight.ndim), 1, 0), bias


def _layers(structure: Policy, equal: Any) -> Iterator[_Layer]:
    """All layers of a policy, and those of the torch policy that has the same ones."""
    extractor: Any = structure.features_extractor
    has_critic = structure.critic is not None
    extractors = [("features_extractor", equal.pi_features_extractor)]
    if has_critic and not structure.share_features_extractor:
        extractors.append(("critic_features_extractor", equal.vf_features_extractor))
    for name, module in extractors:
        if isinstance(extractor, CNN):
            yield from _convolutional(name, module)
        for image in getattr(extractor, "images", ()):
            yield from _convolutional(f"{name}.CNN_{image}", module.extractors[image])
    heads = [("actor", equal.mlp_extractor.policy_net, equal.action_net, _outputs(structure.action_space))]
    heads += [("critic", equal.mlp_extractor.value_net, equal.value_net, ())] if has_critic else []
    for name, net, output, outputs in heads:
        order = _order(extractor, structure.observation_space)
        for i, module in enumerate(net[::2]):  # activations are between them
            yield _Layer(f"{name}.MLP_0.Dense_{i}", module, order)
            order = None
        yield _Layer(f"{name}.output", output, order, *outputs)


def _convolutional(name: str, module: Any) -> Iterator[_Layer]:
    """Layers of a CNN; before the dense one, pixels lie as [height, width, channels] here."""
    convolutions = [layer for layer in module.cnn if isinstance(layer, torch.nn.Conv2d)]
    yield from (_Layer(f"{name}.Conv_{i}", layer) for i, layer in enumerate(convolutions))
    dense = module.linear[0]
    order = np.arange(dense.in_features).reshape(convolutions[-1].out_channels, -1).T.reshape(-1)
    yield _Layer(f"{name}.Dense_0", dense, order)


def _order(extractor: Any, space: Any) -> np.ndarray | None:
    """Where torch has each of our features; None: as we do, behind convolutions."""
    if isinstance(extractor, CNN):
        return None
    images = getattr(extractor, "images", ())
    orders: list[np.ndarray] = []
    for name, part in space.spaces if isinstance(space, spaces.Dict) else [("", space)]:
        order = np.arange(extractor.n_features if name in images else spaces.encoded_size(part))
        if name not in images and isinstance(part, spaces.Box) and part.channels_first:
            order = np.moveaxis(order.reshape(part.shape), 0, -1).reshape(-1)
        orders.append(order + sum(map(len, orders)))
    return np.concatenate(orders)


def _outputs(space: spaces.ActionSpace) -> tuple[np.ndarray, ...]:
    """Matrix and shift of the actor's output."""
    if isinstance(space, spaces.MultiBinary):  # two logits a bit here, their difference there
        return (np.kron(np.eye(space.n), np.array([-1.0, 1.0])),)
    if isinstance(space, spaces.Box):
        middle, half = (part.reshape(-1).astype(float) for part in stretch_of(space))
        return np.diag(half), middle
    return ()


def _log_half(structure: Policy) -> np.ndarray:
    return np.log(stretch_of(structure.action_space)[1].reshape(-1))
