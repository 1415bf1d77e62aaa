"""Policies with the contract of SB3's, over the flax networks of ``grpo_jax``."""

from __future__ import annotations

import copy
import functools
import os
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping
from typing import Any, ClassVar, NamedTuple, TypeVar

import flax.linen as nn
import gymnasium
import jax
import jax.numpy as jnp
import numpy as np
import torch
from flax import traverse_util
from stable_baselines3.common.distributions import Distribution, make_proba_distribution
from stable_baselines3.common.policies import BasePolicy
from stable_baselines3.common.preprocessing import is_image_space, maybe_transpose
from stable_baselines3.common.type_aliases import PyTorchObs, Schedule
from stable_baselines3.common.utils import ConstantSchedule, is_vectorized_observation
from torch.nn.modules.module import _IncompatibleKeys

from grpo_jax import spaces
from grpo_jax.noise import bits_to_keys, bits_to_uniform
from grpo_jax.policies.networks import CNN
from grpo_jax.policies.policy import Policy, PolicyState, assemble
from grpo_jax.types import Observation, PyTree
from sb3_bridge.policies import arguments

SelfPolicy = TypeVar("SelfPolicy", bound="GRPOPolicy")


class Functions(NamedTuple):
    """The compiled functions of a policy, which equal structures share. Batches ``[N, ...]``, A the action's shape.

    Attributes:
      init: key words uint32 ``[2]`` -> state.
      sample: (state, observation, words uint32 ``[N, n_uniforms]``) -> action in the environment's units ``[N, *A]``.
      mode: (state, observation) -> the most probable action ``[N, *A]``.
      parameters: (state, observation) -> distribution parameters ``[N, P]``.
      value: (state, observation) -> ``[N]``.
      log_prob: (parameters, action in the policy's own units) -> log density and entropy, ``[N]`` both.
    """

    init: Callable[..., PolicyState]
    sample: Callable[..., jax.Array]
    mode: Callable[..., jax.Array]
    parameters: Callable[..., jax.Array]
    value: Callable[..., jax.Array]
    log_prob: Callable[..., tuple[jax.Array, jax.Array]]


@functools.lru_cache(maxsize=128)
def functions_of(structure: Policy) -> Functions:
    """The compiled functions of a policy.

    They are closures: a static argument would be hashed at every call, which takes longer than the call.
    """
    distribution = structure.distribution

    def sample(state: PolicyState, observation: Observation, words: jax.Array) -> jax.Array:
        parameters = structure.parameters(state, observation)
        return structure.to_world(distribution.sample(parameters, bits_to_uniform(words)))

    def mode(state: PolicyState, observation: Observation) -> jax.Array:
        return structure.to_world(distribution.mode(structure.parameters(state, observation)))

    def log_prob(parameters: jax.Array, action: jax.Array) -> tuple[jax.Array, jax.Array]:
        return distribution.log_prob(parameters, action), distribution.entropy(parameters)

    def init(words: jax.Array) -> PolicyState:
        return structure.init(bits_to_keys(words))

    def parameters(state: PolicyState, observation: Observation) -> jax.Array:
        return structure.parameters(state, observation)

    def value(state: PolicyState, observation: Observation) -> jax.Array:
        return structure.value(state, observation)

    jitted = [jax.jit(function) for function in (init, sample, mode, parameters, value, log_prob)]
    return Functions(*jitted)


class Optimizer:
    """What SB3 calls ``policy.optimizer``: an optax optimizer and its state.

    Attributes:
      factory: from a learning rate to the optax optimizer; None: the library's own Adam.
      state: optax state, None until the algorithm sets it.
      param_groups: one, with the learning rate ``"lr"`` that SB3 sets.
    """

    def __init__(self, factory: arguments.OptimizerFactory | None, learning_rate: float):
        self.factory = factory
        self.state: PyTree = None
        self.param_groups: list[dict[str, Any]] = [{"lr": learning_rate}]

    def state_dict(self) -> dict[str, torch.Tensor]:
        """The state's arrays as CPU tensors by name; empty before there is a state."""
        return {name: _to_torch(_plain(leaf)) for name, leaf in _named(self.state)}

    def load_state_dict(self, state_dict: Mapping[str, Any], strict: bool = True) -> None:
        """Takes over arrays (torch, NumPy or JAX) by name.

        Raises:
          RuntimeError: other names (where ``strict``) or shapes than those of the present state.
        """
        leaves, _ = _replaced(dict(_named(self.state)), state_dict, strict, "the optimizer")
        self.state = jax.tree.unflatten(jax.tree.structure(self.state), leaves.values())


class GRPOPolicy(BasePolicy):
    """Actor and critic in JAX behind SB3's policy, for vectors and, flattened, everything but dicts.

    Args:
      observation_space: of the environment, images as SB3 transposes them (channels first).
      action_space: of the environment.
      lr_schedule: learning rate from the remaining progress.
      net_arch: dense layers: a list, or a dict with ``pi`` and ``vf``; None: 64, 64, none behind convolutions.
      activation_fn: of the dense layers: a function of JAX arrays, a name, or a class of torch.nn.
      ortho_init: orthogonal kernels; False: flax's own initialisers.
      use_sde, full_std, use_expln: accepted, without a meaning here.
      log_std_init: start of the log standard deviation, on actions scaled to [-1, 1].
      squash_output: only with ``use_sde``, as in SB3; no meaning here.
      features_extractor_class: flax module class, see :func:`sb3_bridge.policies.arguments.to_features_extractor`.
      features_extractor_kwargs: its arguments.
      share_features_extractor: whether the critic learns the actor's extractor with it.
      normalize_images: whether images are divided by 255.
      optimizer_class: optax factory such as ``optax.adamw``; None: Adam with eps=1e-5.
      optimizer_kwargs: its arguments, the learning rate apart.
      has_critic: whether there is a critic.
      seed: of the parameters and of the actions that ``predict`` samples; None: the operating system's entropy.

    Attributes:
      structure: the policy of ``grpo_jax``, static; equal arguments make equal ones.
      state: its parameters, JAX arrays. Assign it to change them.
      optimizer: see :class:`Optimizer`.

    Raises:
      TypeError, ValueError, NotImplementedError, AssertionError: what is wrong with which argument, and the fix.
    """

    kind: ClassVar[arguments.Kind] = "mlp"
    optimizer: Optimizer  # type: ignore[assignment]

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
            raise AssertionError("squash_output=True has a meaning with use_sde=True only, leave it out")
        super().__init__(
            observation_space, action_space, normalize_images=normalize_images, squash_output=squash_output
        )
        self.activation_fn = activation_fn
        self.ortho_init = ortho_init
        self.use_sde = use_sde
        self.log_std_init = log_std_init
        self.full_std = full_std
        self.use_expln = use_expln
        self.features_extractor_class = features_extractor_class  # type: ignore[assignment]
        self.features_extractor_kwargs = dict(features_extractor_kwargs or {})
        self.share_features_extractor = share_features_extractor
        self.optimizer_class = optimizer_class  # type: ignore[assignment]
        self.optimizer_kwargs = dict(optimizer_kwargs or {})
        self.has_critic = has_critic
        self._device = torch.device("cpu")

        extractor = arguments.to_features_extractor(
            self.kind,
            observation_space,
            features_extractor_class,
            features_extractor_kwargs,
            normalize_images,
        )
        self.net_arch = arguments.to_net_arch(net_arch, isinstance(extractor, CNN))
        widths, critic_widths = arguments.widths_of(self.net_arch)
        self.structure = assemble(
            arguments.to_observation_space(observation_space, normalize_images),
            arguments.to_action_space(action_space),
            features_extractor=extractor,
            share_features_extractor=share_features_extractor,
            widths=widths,
            critic_widths=critic_widths if has_critic else None,
            activation=arguments.to_activation(activation_fn),
            log_std_init=float(log_std_init),
            orthogonal=ortho_init,
        )
        self._functions = functions_of(self.structure)
        self.optimizer = Optimizer(
            arguments.to_optimizer(optimizer_class, optimizer_kwargs), float(lr_schedule(1))
        )
        self.seed(seed)
        words = np.random.SeedSequence(seed).generate_state(2, np.uint32)
        self.state: PolicyState = self._functions.init(words)

    def seed(self, seed: int | None) -> None:
        """Starts the stream of random numbers that ``predict`` draws from."""
        self._seed, self._generator = seed, np.random.default_rng(seed)

    # Acting ---------------------------------------------------------------------------------------------------------

    def predict(
        self,
        observation: np.ndarray | dict[str, np.ndarray],
        state: tuple[np.ndarray, ...] | None = None,
        episode_start: np.ndarray | None = None,
        deterministic: bool = False,
    ) -> tuple[np.ndarray, tuple[np.ndarray, ...] | None]:
        """Actions for one observation or a batch; see SB3.

        Args:
          observation: ``[*shape]`` or ``[N, *shape]``, a dict of such arrays for ``Dict`` spaces; images with the channels
            first or last.
          state: returned as it is.
          episode_start: without a meaning: the policy has no memory.
          deterministic: the most probable action in place of a sampled one.

        Returns:
          Actions ``[*A]`` or ``[N, *A]`` in the action space's dtype, within its bounds; and ``state``.

        Raises:
          ValueError: a wrong shape, or what Gymnasium's ``reset`` returned.
        """
        if self.training:
            self.set_training_mode(False)
        if isinstance(observation, tuple) and len(observation) == 2 and isinstance(observation[1], dict):
            raise ValueError(
                "predict() was given a tuple, probably Gymnasium's `obs, info = env.reset()`: pass the observation"
                " alone. An SB3 VecEnv's `obs = vec_env.reset()` has no info; see"
                " https://stable-baselines3.readthedocs.io/en/master/guide/vec_envs.html#vecenv-api-vs-gym-api"
            )
        batch, is_vectorized = self._to_batch(observation)
        actions = self._act(batch, deterministic)
        return actions if is_vectorized else actions.squeeze(axis=0), state

    def _act(self, batch: Observation, deterministic: bool) -> np.ndarray:
        """Actions ``[N, *A]`` for observations ``[N, *shape]``."""
        if deterministic:
            chosen = self._functions.mode(self.state, batch)
        else:
            leaf = next(iter(batch.values())) if isinstance(batch, dict) else batch
            shape = (leaf.shape[0], self.structure.distribution.n_uniforms)
            words = self._generator.integers(0, 2**32, shape, np.uint32)
            chosen = self._functions.sample(self.state, batch, words)
        space = self.action_space
        actions = np.asarray(chosen).astype(space.dtype)
        if isinstance(space, gymnasium.spaces.Box):
            # Once more, in the space's own dtype: its bounds may not be float32.
            actions = np.clip(actions, space.low, space.high)
        return actions

    def _to_batch(self, observation: Any) -> tuple[Observation, bool]:
        """Observations ``[N, *shape]`` as SB3 makes them of what a user passes, and whether they had the axis N."""
        space = self.observation_space
        if isinstance(observation, dict):
            assert isinstance(space, gymnasium.spaces.Dict), (
                f"the observation is a dict, but the observation space is {space}"
            )
            batch, is_vectorized = {}, False
            for name, value in observation.items():
                part = space.spaces[name]
                array = maybe_transpose(value, part) if is_image_space(part) else np.array(value)
                is_vectorized = is_vectorized or is_vectorized_observation(array, part)
                batch[name] = array.reshape((-1, *_shape(part)))
            return batch, is_vectorized
        observation = np.asarray(observation)
        if observation.ndim >= 3:  # else it is no image
            observation = maybe_transpose(observation, space)
        is_vectorized = is_vectorized_observation(observation, space)
        return observation.reshape((-1, *_shape(space))), is_vectorized

    def _predict(self, observation: PyTorchObs, deterministic: bool = False) -> torch.Tensor:
        return torch.from_numpy(self._act(_from_torch(observation), deterministic)).to(self.device)

    def forward(
        self, obs: PyTorchObs, deterministic: bool = False
    ) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor]:
        """Actions ``[N, *A]``, values ``[N, 1]`` (None without a critic) and log densities ``[N]``; see SB3."""
        actions = self._predict(obs, deterministic)
        values, log_prob, _ = self.evaluate_actions(obs, actions)
        return actions, values, log_prob

    def predict_values(self, obs: PyTorchObs) -> torch.Tensor:
        """Values ``[N, 1]`` of observations ``[N, *shape]`` (torch, as ``obs_to_tensor`` gives them, NumPy or JAX).

        Raises:
          RuntimeError: there is no critic.
        """
        if not self.has_critic:
            raise RuntimeError("this policy has no critic (bootstrap=False): there are no values to predict")
        return self._to_tensor(self._functions.value(self.state, _from_torch(obs))[:, None])

    def evaluate_actions(
        self, obs: PyTorchObs, actions: torch.Tensor
    ) -> tuple[torch.Tensor | None, torch.Tensor, torch.Tensor]:
        """What the policy thinks of actions; no gradients flow.

        Args:
          obs: ``[N, *shape]``, as ``obs_to_tensor`` gives them.
          actions: ``[N, *A]`` in the environment's units.

        Returns:
          Values ``[N, 1]`` (None without a critic), log densities ``[N]`` and entropies ``[N]``. Of a Gaussian in the
          environment's units, before actions are clipped.
        """
        observation = _from_torch(obs)
        array = np.asarray(_from_torch(actions)).reshape((-1, *_shape(self.action_space)))
        middle, half = self._stretch()
        if isinstance(self.action_space, gymnasium.spaces.Box):
            array = ((array - middle) / half).astype(np.float32)
        parameters = self._functions.parameters(self.state, observation)
        log_prob, entropy = self._functions.log_prob(parameters, array)
        volume = float(np.sum(np.log(half)))
        values = self.predict_values(obs) if self.has_critic else None
        return values, self._to_tensor(log_prob) - volume, self._to_tensor(entropy) + volume

    def get_distribution(self, obs: PyTorchObs) -> Distribution:
        """SB3's distribution object over the actions for observations ``[N, *shape]``, without gradients."""
        parameters = self._to_tensor(self._functions.parameters(self.state, _from_torch(obs)))
        distribution: Any = make_proba_distribution(self.action_space)
        if isinstance(self.action_space, gymnasium.spaces.Box):
            middle, half = (torch.as_tensor(part.reshape(-1)).to(parameters) for part in self._stretch())
            mean, log_std = parameters.chunk(2, dim=-1)
            return distribution.proba_distribution(mean * half + middle, log_std + half.log())
        if isinstance(self.action_space, gymnasium.spaces.MultiBinary):
            pairs = parameters.reshape(len(parameters), -1, 2)
            return distribution.proba_distribution(action_logits=pairs[..., 1] - pairs[..., 0])
        return distribution.proba_distribution(action_logits=parameters)

    def _stretch(self) -> tuple[np.ndarray, np.ndarray]:
        """Where the policy's 0 and 1 lie in the environment's units: ``[*A]`` middle and half width."""
        space = self.structure.action_space
        if not isinstance(space, spaces.Box) or not space.is_bounded:
            shape = _shape(self.action_space)
            return np.zeros(shape, np.float32), np.ones(shape, np.float32)
        half = (space.high - space.low) / 2
        return (space.high + space.low) / 2, np.where(half > 0, half, np.float32(1))

    def reset_noise(self, n_envs: int = 1) -> None:
        """As SB3's without gSDE.

        Raises:
          AssertionError: always.
        """
        del n_envs
        raise AssertionError("reset_noise() is for gSDE (use_sde=True), which this policy does not have")

    # The device, for tensors ----------------------------------------------------------------------------------------

    @property
    def device(self) -> torch.device:
        """Where torch tensors go; the parameters are JAX's, and stay where they are."""
        return self._device

    def to(  # type: ignore[override]
        self: SelfPolicy, device: Any = None, *args: Any, **kwargs: Any
    ) -> SelfPolicy:
        """Sets the device of tensors.

        Raises:
          TypeError: anything but a device, such as a dtype.
        """
        if args or kwargs or isinstance(device, torch.dtype):
            raise TypeError(f"to({device!r}, ...) takes a device alone: the parameters are JAX arrays")
        if device is not None:
            self._device = torch.device(device)
        return self

    def cpu(self: SelfPolicy) -> SelfPolicy:
        """``to("cpu")``."""
        return self.to("cpu")

    def _to_tensor(self, array: jax.Array) -> torch.Tensor:
        return _to_torch(array).to(self.device)

    # Parameters -----------------------------------------------------------------------------------------------------

    def state_dict_of(self, state: PolicyState) -> dict[str, torch.Tensor]:
        """Parameters of a state of this policy as CPU tensors, ``{"actor.MLP_0.Dense_0.kernel": ...}``; copies."""
        return {name: _to_torch(leaf) for name, leaf in _flat(state).items()}

    def state_from(self, state_dict: Mapping[str, Any], strict: bool = True) -> PolicyState:
        """A state with the parameters that :meth:`state_dict_of` gave; see :meth:`load_state_dict`."""
        return self._loaded(state_dict, strict)[0]

    def _loaded(self, state_dict: Mapping[str, Any], strict: bool) -> tuple[PolicyState, _IncompatibleKeys]:
        owner = type(self).__name__
        leaves, keys = _replaced(_flat(self.state), state_dict, strict, owner)
        structure = traverse_util.flatten_dict(self.state.params)
        nested = dict(zip(structure, leaves.values(), strict=True))
        return self.state.replace(params=traverse_util.unflatten_dict(nested)), keys

    def state_dict(  # type: ignore[override]
        self, *, destination: Any = None, prefix: str = "", keep_vars: bool = False
    ) -> dict[str, torch.Tensor]:
        """The parameters as CPU tensors, by name; copies."""
        del keep_vars
        destination = OrderedDict() if destination is None else destination
        destination.update({prefix + name: leaf for name, leaf in self.state_dict_of(self.state).items()})
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
        self.state, keys = self._loaded(state_dict, strict)
        return keys

    def named_parameters(
        self, prefix: str = "", recurse: bool = True, remove_duplicate: bool = True
    ) -> Iterator[tuple[str, Any]]:
        """Names and tensors, copies of the parameters: changing them changes nothing, ``load_state_dict`` does."""
        del recurse, remove_duplicate
        for name, tensor in self.state_dict_of(self.state).items():
            yield f"{prefix}.{name}" if prefix else name, tensor.to(self.device)

    def load_from_vector(self, vector: np.ndarray) -> None:
        """Takes over the parameters that ``parameters_to_vector`` gave, ``[n]``.

        Raises:
          ValueError: another length.
        """
        flat = _flat(self.state)
        sizes = [leaf.size for leaf in flat.values()]
        vector = np.asarray(_from_torch(vector))
        if vector.shape != (sum(sizes),):
            raise ValueError(f"vector has shape {list(vector.shape)}, expected [{sum(sizes)}]")
        parts = np.split(vector, np.cumsum(sizes)[:-1])
        self.load_state_dict(
            {name: part.reshape(flat[name].shape) for name, part in zip(flat, parts, strict=True)}
        )

    # Files and copies -----------------------------------------------------------------------------------------------

    def _get_constructor_parameters(self) -> dict[str, Any]:
        return {
            **super()._get_constructor_parameters(),
            "lr_schedule": ConstantSchedule(self.optimizer.param_groups[0]["lr"]),
            "net_arch": self.net_arch,
            "activation_fn": self.activation_fn,
            "ortho_init": self.ortho_init,
            "use_sde": self.use_sde,
            "log_std_init": self.log_std_init,
            "full_std": self.full_std,
            "use_expln": self.use_expln,
            "squash_output": self.squash_output,
            "features_extractor_class": self.features_extractor_class,
            "features_extractor_kwargs": self.features_extractor_kwargs,
            "share_features_extractor": self.share_features_extractor,
            "optimizer_class": self.optimizer_class,
            "optimizer_kwargs": self.optimizer_kwargs,
            "has_critic": self.has_critic,
            "seed": self._seed,
        }

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes the policy without pickle; see :func:`sb3_bridge.files.model_zip.policy_to_file`."""
        from sb3_bridge.files.model_zip import policy_to_file

        policy_to_file(self, path)  # type: ignore[arg-type]

    @classmethod
    def load(
        cls: type[SelfPolicy],
        path: str | os.PathLike[str],
        device: torch.device | str = "auto",
        *,
        custom_objects: dict[str, Any] | None = None,
        allow_pickle: bool = False,
    ) -> SelfPolicy:
        """A policy that :meth:`save` wrote; see :func:`sb3_bridge.files.model_zip.policy_from_file`."""
        from sb3_bridge.files.model_zip import policy_from_file

        return policy_from_file(
            cls,
            path,  # type: ignore[arg-type]
            device,
            custom_objects=custom_objects,
            allow_pickle=allow_pickle,
        )

    def __deepcopy__(self: SelfPolicy, memo: dict[int, Any]) -> SelfPolicy:
        # What is static is shared: a copied jitted function is another function, and its structure another one.
        static = (self.structure, self.activation_fn, self.features_extractor_kwargs, self.optimizer.factory)
        memo.update({id(part): part for part in static})
        twin = memo[id(self)] = type(self).__new__(type(self))
        twin.__setstate__(copy.deepcopy(self.__getstate__(), memo))
        return twin

    def __getstate__(self) -> dict[str, Any]:
        # Compiled functions cannot be pickled (nor can jitted ones that the user passed).
        return {name: value for name, value in self.__dict__.items() if name != "_functions"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._functions = functions_of(self.structure)


class MlpPolicy(GRPOPolicy):
    """Dense layers on a vector; anything else but dicts is flattened. Arguments: :class:`GRPOPolicy`."""


class CnnPolicy(GRPOPolicy):
    """Convolutions (with ReLU) on an image. Arguments: :class:`GRPOPolicy`."""

    kind = "cnn"


class MultiInputPolicy(GRPOPolicy):
    """Dict observations: convolutions on each image, everything else flattened. Arguments: :class:`GRPOPolicy`."""

    kind = "multi_input"


def _shape(space: gymnasium.Space) -> tuple[int, ...]:
    shape = space.shape
    assert shape is not None
    return shape


def _flat(state: PolicyState) -> dict[str, jax.Array]:
    return traverse_util.flatten_dict(state.params, sep=".")


def _named(tree: PyTree) -> list[tuple[str, Any]]:
    return [(jax.tree_util.keystr(path), leaf) for path, leaf in jax.tree_util.tree_leaves_with_path(tree)]


def _plain(leaf: Any) -> Any:
    is_key = isinstance(leaf, jax.Array) and jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)
    return jax.random.key_data(leaf) if is_key else leaf


def _to_torch(array: Any) -> torch.Tensor:
    array = np.array(array)
    if array.dtype == jnp.bfloat16:  # which torch does not take from NumPy
        return torch.from_numpy(array.view(np.int16)).view(torch.bfloat16)
    return torch.from_numpy(array)


def _from_torch(tree: Any) -> Any:
    """A tensor, or a dict of them, as NumPy arrays; other arrays as they are."""
    if isinstance(tree, dict):
        return {name: _from_torch(leaf) for name, leaf in tree.items()}
    if not isinstance(tree, torch.Tensor):
        return tree
    tensor = tree.detach().cpu()
    if tensor.dtype == torch.bfloat16:
        return tensor.view(torch.int16).numpy().view(jnp.bfloat16)
    return tensor.numpy()


def _replaced(
    present: dict[str, Any], given: Mapping[str, Any], strict: bool, owner: str
) -> tuple[dict[str, Any], _IncompatibleKeys]:
    """The leaves of ``present`` with those of ``given`` in their places, in their dtypes and on their devices."""
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
        array, plain = np.array(_from_torch(given[name])), _plain(leaf)
        if array.shape != np.shape(plain):
            errors.append(f"{name} has shape {list(array.shape)}, expected {list(np.shape(plain))}")
            continue
        leaves[name] = _like(leaf, plain, array)
    if errors:
        raise RuntimeError(f"cannot load the parameters of {owner}: {'; '.join(errors)}")
    return leaves, _IncompatibleKeys(missing, unexpected)


def _like(leaf: Any, plain: Any, array: np.ndarray) -> Any:
    if not isinstance(leaf, jax.Array):
        return array
    loaded = jax.device_put(jnp.asarray(array, plain.dtype), plain.sharding)
    return loaded if plain is leaf else jax.random.wrap_key_data(loaded, impl=jax.random.key_impl(leaf))
