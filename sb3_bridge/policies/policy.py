"""Policies with the contract of SB3's, over the flax networks of ``grpo_jax``."""

from __future__ import annotations

import contextlib
import contextvars
import copy
import math
import warnings
from collections.abc import Callable, Iterator
from typing import Any, ClassVar, TypeVar

import flax.linen as nn
import gymnasium
import jax
import numpy as np
import torch
from flax import traverse_util
from stable_baselines3.common import policies as sb3
from stable_baselines3.common.distributions import Distribution, make_proba_distribution
from stable_baselines3.common.preprocessing import get_action_dim
from stable_baselines3.common.type_aliases import PyTorchObs, Schedule
from stable_baselines3.common.utils import ConstantSchedule, get_device

from grpo_jax.policies.networks import CNN
from grpo_jax.policies.policy import PolicyState, assemble
from grpo_jax.types import Observation, PyTree
from sb3_bridge.files.model_zip import File, checked, load_zip, save_zip
from sb3_bridge.masks import checked_masks
from sb3_bridge.policies import layers, spaces
from sb3_bridge.policies.compiled import Functions, check_process, functions_of
from sb3_bridge.policies.extractor import Kind, to_features_extractor
from sb3_bridge.policies.model import JaxModel
from sb3_bridge.policies.optimizer import Optimizer, to_optimizer
from sb3_bridge.policies.parameters import to_arrays, to_tensor

SelfPolicy = TypeVar("SelfPolicy", bound="GRPOPolicy")

# fmt: off
_KEPT = (
    "net_arch", "activation_fn", "ortho_init", "use_sde", "log_std_init", "full_std", "use_expln",
    "features_extractor_class", "features_extractor_kwargs", "share_features_extractor", "optimizer_class",
    "optimizer_kwargs", "has_critic",
)
"""Arguments that a policy keeps under their names, and is saved with."""
# fmt: on


_most_numbers = contextvars.ContextVar("most_numbers", default=math.inf)


@contextlib.contextmanager
def no_larger_than(parameters: PyTree) -> Iterator[None]:
    """Inside it a policy that is made from a file's arguments is refused, before it is, where the file's parameters are fewer.

    Twice as many are let through: those of a network with some other layers get an error of their own.
    """
    token = _most_numbers.set(2 * sum(np.size(leaf) for leaf in jax.tree.leaves(parameters)) + 2**16)
    try:
        yield
    finally:
        _most_numbers.reset(token)


class GRPOPolicy(JaxModel):
    """Actor and critic in JAX behind SB3's policy, for vectors and, flattened, everything but dicts.

    Arguments are those of SB3's ``ActorCriticPolicy``, in its order, and mean the same but for these: ``activation_fn`` is
    a function of JAX arrays, a name, or a class of torch.nn; ``features_extractor_class`` a flax module class, see
    :func:`sb3_bridge.policies.extractor.to_features_extractor`; ``optimizer_class`` an optax factory such as
    ``optax.adamw`` (None: Adam with eps=1e-5), and ``optimizer_kwargs`` its arguments, the learning rate apart.
    ``log_std_init`` is of actions scaled to [-1, 1]. ``use_sde`` and what belongs to it has no meaning. GRPO's own are
    ``has_critic`` and ``seed`` (of the parameters and of the actions that ``predict`` samples; None: the operating
    system's entropy). ``structure`` is the policy of ``grpo_jax``; equal arguments make equal ones.

    Raises:
      TypeError, ValueError, NotImplementedError, AssertionError: what is wrong with which argument, and the fix.
    """

    kind: ClassVar[Kind] = "mlp"
    net_arch: Any

    def __init__(
        self,
        observation_space: gymnasium.Space,
        action_space: gymnasium.Space,
        lr_schedule: Schedule,
        net_arch: list[int] | dict[str, list[int]] | None = None,
        activation_fn: Any = "tanh",
        ortho_init: bool = True,
        use_sde: bool = False,
        log_std_init: float = 0.0,
        full_std: bool = True,
        use_expln: bool = False,
        squash_output: bool = False,
        features_extractor_class: type[nn.Module] | None = None,
        features_extractor_kwargs: dict[str, Any] | None = None,
        share_features_extractor: bool = True,
        normalize_images: bool = True,
        optimizer_class: Callable[..., Any] | None = None,
        optimizer_kwargs: dict[str, Any] | None = None,
        *,
        has_critic: bool = True,
        seed: int | None = None,
    ):
        if squash_output and not use_sde:
            raise AssertionError("squash_output=True is only available when using gSDE: leave it out")
        super().__init__(
            observation_space, action_space, normalize_images=normalize_images, squash_output=squash_output
        )
        features_extractor_kwargs, optimizer_kwargs = (
            dict(features_extractor_kwargs or {}),
            dict(optimizer_kwargs or {}),
        )
        given = locals()
        for name in _KEPT:
            setattr(self, name, given[name])
        self.dist_kwargs = None  # SB3's arguments of gSDE

        self._assemble()
        factory = to_optimizer(optimizer_class, optimizer_kwargs)
        self.optimizer = Optimizer(factory, [{"lr": float(lr_schedule(1))}])
        self.seed(seed)
        words = np.random.SeedSequence(seed).generate_state(2, np.uint32)
        if (most := _most_numbers.get()) < math.inf:
            self._check_size(words, most)
        self.state: PolicyState = self._functions.init(words)

    def _check_size(self, words: np.ndarray, most: float) -> None:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of sizes beyond 32 bits
            try:
                leaves = jax.tree.leaves(jax.eval_shape(self._functions.init, words))
                n: float = sum(math.prod(leaf.shape) for leaf in leaves)
            except OverflowError:
                n = math.inf
        if n > most:
            raise ValueError(
                f"net_arch={self.net_arch} makes {n:,} parameters: the file holds fewer than half as many"
            )

    def seed(self, seed: int | None) -> None:
        """Starts the stream of random numbers that ``predict`` draws from."""
        self._seed, self._generator = seed, np.random.default_rng(seed)

    def _assemble(self) -> None:
        """Makes the structure that the arguments mean."""
        given = (self.features_extractor_class, self.features_extractor_kwargs, self.normalize_images)
        extractor = to_features_extractor(self.kind, self.observation_space, *given)
        self.net_arch = layers.to_net_arch(self.net_arch, isinstance(extractor, CNN))
        widths, critic_widths = layers.widths_of(self.net_arch)
        self.structure = assemble(
            spaces.to_observation_space(self.observation_space, self.normalize_images),
            spaces.to_action_space(self.action_space),
            features_extractor=extractor,
            share_features_extractor=self.share_features_extractor,
            widths=widths,
            critic_widths=critic_widths if self.has_critic else None,
            activation=layers.to_activation(self.activation_fn),
            log_std_init=float(self.log_std_init),
            orthogonal=self.ortho_init,
        )
        self._compiled = functions_of(self.structure)

    @property
    def _functions(self) -> Functions:
        check_process()
        return self._compiled

    def predict(
        self,
        observation: np.ndarray | dict[str, np.ndarray],
        state: tuple[np.ndarray, ...] | None = None,
        episode_start: np.ndarray | None = None,
        deterministic: bool = False,
        action_masks: Any = None,
    ) -> tuple[np.ndarray, tuple[np.ndarray, ...] | None]:
        """Actions ``[*A]`` or ``[N, *A]`` in the action space's dtype, within its bounds; and ``state``. See SB3.

        Observations are ``[*shape]`` or ``[N, *shape]``, dicts of such arrays for ``Dict`` spaces; images with the channels
        first or last. ``deterministic`` takes the most probable action in place of a sampled one. ``action_masks`` are bool
        ``[n_actions]`` or ``[N, n_actions]``, True where an action is allowed; None: all are.

        Raises:
          ValueError: a wrong shape, NaN or inf, or what Gymnasium's ``reset`` returned; a mask that allows no action.
          RuntimeError: torch traces or exports, or this process was forked from one that uses JAX.
        """
        if self.training:
            self.set_training_mode(False)
        batch, is_vectorized = spaces.to_batch(observation, self.observation_space)
        actions = self._act(spaces.to_finite_arrays(batch), deterministic, action_masks)
        return actions if is_vectorized else actions.squeeze(axis=0), state

    def _act(self, batch: Observation, deterministic: bool, action_masks: Any = None) -> np.ndarray:
        """Actions ``[N, *A]`` for observations ``[N, *shape]``."""
        masks = self._masks(batch, action_masks)
        if deterministic:
            chosen = self._functions.mode(self.state, batch, *masks)
        else:
            shape = (len(jax.tree.leaves(batch)[0]), self.structure.distribution.n_uniforms)
            words = self._generator.integers(0, 2**32, shape, np.uint32)
            chosen = self._functions.sample(self.state, batch, words, *masks)
        return self.to_env(chosen)

    def _masks(self, batch: Observation, action_masks: Any) -> tuple[np.ndarray, ...]:
        """Nothing, or checked masks bool ``[N, P]``: what a compiled function takes."""
        if action_masks is None:
            return ()
        n = len(jax.tree.leaves(batch)[0])
        one = n == 1 and np.ndim(action_masks) == 1
        return (checked_masks([action_masks] if one else action_masks, self.action_space, n, "action_masks"),)

    def to_env(self, chosen: Any) -> np.ndarray:
        """Actions of the device, in the action space's dtype and within its bounds."""
        space = self.action_space
        actions = np.asarray(chosen).astype(space.dtype)
        if isinstance(space, gymnasium.spaces.Box):
            # Once more, in the space's own dtype: its bounds may not be float32.
            actions = np.clip(actions, space.low, space.high)
        return actions

    def _predict(
        self, observation: PyTorchObs, deterministic: bool = False, action_masks: Any = None
    ) -> torch.Tensor:
        actions = self._act(spaces.to_finite_arrays(observation), deterministic, action_masks)
        return torch.from_numpy(actions).to(self.device)

    def forward(
        self, obs: PyTorchObs, deterministic: bool = False, action_masks: Any = None
    ) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor]:
        """Actions ``[N, *A]``, values ``[N, 1]`` (None without a critic) and log densities ``[N]``; see SB3."""
        actions = self._predict(obs, deterministic, action_masks)
        values, log_prob, _ = self.evaluate_actions(obs, actions, action_masks)
        return actions, values, log_prob

    def predict_values(self, obs: PyTorchObs) -> torch.Tensor:
        """Values ``[N, 1]`` of observations ``[N, *shape]`` (torch, NumPy or JAX); without a critic a RuntimeError."""
        if not self.has_critic:
            raise RuntimeError("this policy has no critic (bootstrap=False): there are no values to predict")
        return self._to_tensor(self._functions.value(self.state, spaces.to_finite_arrays(obs))[:, None])

    def evaluate_actions(
        self, obs: PyTorchObs, actions: torch.Tensor, action_masks: Any = None
    ) -> tuple[torch.Tensor | None, torch.Tensor, torch.Tensor]:
        """Values ``[N, 1]`` (None without a critic), log densities ``[N]`` and entropies ``[N]``, without gradients.

        For observations ``[N, *shape]`` and actions ``[N, *A]`` in the environment's units, as are the densities of a
        Gaussian (before actions are clipped).
        """
        shape = (-1, get_action_dim(self.action_space)) if self.action_space.shape else (-1,)
        with torch.no_grad():
            distribution: Any = self.get_distribution(obs, action_masks)
            flat = to_tensor(to_arrays(actions)).to(self.device, torch.float32).reshape(shape)
            answers = distribution.log_prob(flat), distribution.entropy()
        log_prob, entropy = map(self._without_gradient, answers)
        return self.predict_values(obs) if self.has_critic else None, log_prob, entropy

    def get_distribution(self, obs: PyTorchObs, action_masks: Any = None) -> Distribution:
        """SB3's distribution over the actions for observations ``[N, *shape]``, without gradients; masks: see :meth:`predict`."""
        batch = spaces.to_finite_arrays(obs)
        masks = self._masks(batch, action_masks)
        parameters = self._to_tensor(self._functions.parameters(self.state, batch, *masks))
        distribution: Any = make_proba_distribution(self.action_space)
        if isinstance(self.action_space, gymnasium.spaces.Box):
            stretch = spaces.stretch_of(self.structure.action_space)
            middle, half = (torch.as_tensor(part.reshape(-1)).to(parameters) for part in stretch)
            mean, log_std = parameters.chunk(2, dim=-1)
            return distribution.proba_distribution(mean * half + middle, log_std + half.log())
        if isinstance(self.action_space, gymnasium.spaces.MultiBinary):
            pairs = parameters.reshape(len(parameters), -1, 2)
            return distribution.proba_distribution(action_logits=pairs[..., 1] - pairs[..., 0])
        return distribution.proba_distribution(action_logits=parameters)

    def reset_noise(self, n_envs: int = 1) -> None:
        """As SB3's without gSDE: always an AssertionError."""
        raise AssertionError("reset_noise() is only available when using gSDE, which is not known here")

    def _get_constructor_parameters(self) -> dict[str, Any]:
        return {
            **super()._get_constructor_parameters(),
            "lr_schedule": ConstantSchedule(self.optimizer.param_groups[0]["lr"]),
            **{name: getattr(self, name) for name in _KEPT},
            "squash_output": self.squash_output,
            "seed": self._seed,
        }

    def save(self, path: File) -> None:
        """Writes the policy without pickle: its constructor's arguments and its parameters; errors of ``save_zip``."""
        save_zip(path, self._get_constructor_parameters(), {"policy": self.state.params})

    @classmethod
    def load(
        cls: type[SelfPolicy], path: File, device: torch.device | str = "auto", **reading: Any
    ) -> SelfPolicy:
        """A policy that :meth:`save` wrote; a file of anything else is a ValueError.

        ``reading``: ``custom_objects`` and ``allow_pickle``; see :func:`sb3_bridge.files.model_zip.load_zip`.
        """
        data, params = load_zip(path, **reading)
        if "policy_class" in data or "policy" not in params:
            raise ValueError(f"{path} holds a whole model, not a policy alone: use GRPO.load(path).policy")
        try:
            with no_larger_than(params["policy"]):
                policy = cls(**data)
        except TypeError as error:
            raise ValueError(
                f"{path} does not hold what the policy is made from ({error}); pass what is missing in custom_objects"
            ) from error
        checked(path, params, {"policy": policy.state_dict()})
        policy.load_state_dict(traverse_util.flatten_dict(params["policy"], sep="."))
        return policy.to(get_device(device))

    def __deepcopy__(self: SelfPolicy, memo: dict[int, Any]) -> SelfPolicy:
        # What is static is shared: a copied jitted function is another function, and its structure another one.
        static = (self.activation_fn, self.features_extractor_kwargs, self.optimizer.given)
        memo.update({id(part): part for part in static})
        copied = memo[id(self)] = type(self).__new__(type(self))
        copied.__setstate__(copy.deepcopy(self.__getstate__(), memo))
        return copied

    def __getstate__(self) -> dict[str, Any]:
        # Jitted functions cannot be pickled; torch's classes stand for those of the activations.
        left_out = ("_compiled", "structure")
        state = {name: value for name, value in self.__dict__.items() if name not in left_out}
        state["activation_fn"] = layers.TORCH_CLASSES.get(self.structure.actor.activation, self.activation_fn)
        return state

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._assemble()


class MlpPolicy(GRPOPolicy):
    """Dense layers on a vector; anything else but dicts is flattened. Arguments: :class:`GRPOPolicy`."""


class CnnPolicy(GRPOPolicy):
    """Convolutions (with ReLU) on an image. Arguments: :class:`GRPOPolicy`."""

    kind = "cnn"


class MultiInputPolicy(GRPOPolicy):
    """Dict observations: convolutions on each image, everything else flattened. Arguments: :class:`GRPOPolicy`."""

    kind = "multi_input"


SB3_POLICIES: dict[Any, type[GRPOPolicy]] = {
    sb3.ActorCriticPolicy: MlpPolicy,
    sb3.ActorCriticCnnPolicy: CnnPolicy,
    sb3.MultiInputActorCriticPolicy: MultiInputPolicy,
}
"""SB3's classes and those that stand for them here."""


def to_policy_class(policy: Any) -> str | type[GRPOPolicy]:
    """The policy that a user means: a name, a class derived from ours, or ours for one of SB3's three."""
    is_class = isinstance(policy, type)
    if isinstance(policy, str) or (is_class and issubclass(policy, GRPOPolicy)):
        return policy
    if is_class and policy in SB3_POLICIES:
        return SB3_POLICIES[policy]
    raise TypeError(
        f"policy={policy!r} must be 'MlpPolicy', 'CnnPolicy', 'MultiInputPolicy', SB3's classes of these names, or a class"
        " derived from sb3_bridge.MlpPolicy and its like: a policy of torch cannot run in JAX"
    )
