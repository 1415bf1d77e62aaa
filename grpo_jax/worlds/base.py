"""The protocol of everything that can be stepped from any state, and the reward override."""

from __future__ import annotations

import abc
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct

from grpo_jax.spaces import ActionSpace, Dict, Discrete, Space
from grpo_jax.types import Observation, PyTree, Step

RewardFunction = Callable[[Any, Any, Any], Any]


class World(abc.ABC):
    """Something that can be stepped from any state, purely.

    Every method is a pure function of its arguments for **one** state, traceable by JAX; callers ``vmap`` it.
    A world is a pytree (a ``flax.struct.dataclass``): its arrays are traced, everything else is static.

    Attributes:
      observation_space: static description of the observations.
      action_space: static description of the actions.
    """

    observation_space: Space
    action_space: ActionSpace

    @abc.abstractmethod
    def reset(self, key: jax.Array) -> tuple[Observation, PyTree]:
        """Draws a first state: ``key -> (observation, state)``."""

    @abc.abstractmethod
    def step(self, key: jax.Array, state: PyTree, action: jax.Array) -> Step:
        """Steps once and never resets: what is reached after an end is the end itself."""

    def action_mask(self, state: PyTree) -> jax.Array | None:
        """Which actions are allowed: bool ``[sum(nvec)]``, or None where all always are."""
        del state
        return None

    def picture(self, state: PyTree) -> np.ndarray:
        """Draws one state, on the host and without a window: uint8 ``[height, width, 3]``.

        Raises:
          NotImplementedError: there is no picture of it, and why.
        """
        del state
        raise NotImplementedError(f"there is no picture of {type(self).__name__}")

    def at(self, observation: Observation, time: jax.Array | None = None) -> PyTree:
        """The states of visited observations, of any leading axes: ``[..., *shape]`` -> leaves ``[..., *]``.

        Args:
          observation: what was observed, ``[..., *shape]``; a dict of such arrays for ``Dict``.
          time: steps since the reset, int ``[...]`` or what broadcasts to it; None for 0. Worlds without a clock
            ignore it.

        Raises:
          NotImplementedError: a state of this world is more than its observation.
        """
        del observation, time
        raise NotImplementedError(
            f"{type(self).__name__}.at: a state of this world is more than its observation, so a visited observation"
            " does not say where to branch from; branch from the states that reset and step gave"
        )


@dataclass(frozen=True)
class PerSample:
    """A user's reward function in the form for one transition; equal functions share their traces."""

    function: RewardFunction
    takes_batch: bool

    def __call__(self, state: Any, action: Any, next_state: Any) -> jax.Array:
        arguments = (state, action, next_state)
        if self.takes_batch:
            arguments = jax.tree.map(lambda leaf: jnp.asarray(leaf)[None], arguments)
        return jnp.reshape(jnp.asarray(self.function(*arguments)), ())


class RewardOverrideState(struct.PyTreeNode):
    """A world's state beside its observation, which the reward function wants to see."""

    inner: PyTree
    observation: Observation


@struct.dataclass
class WrappedWorld(World):
    """A world around another one, with its spaces and its masks; its states hold those of the other as ``inner``."""

    world: World

    @property
    def observation_space(self) -> Space:  # type: ignore[override]
        return self.world.observation_space

    @property
    def action_space(self) -> ActionSpace:  # type: ignore[override]
        return self.world.action_space

    def action_mask(self, state: Any) -> jax.Array | None:
        return self.world.action_mask(state.inner)

    def picture(self, state: Any) -> np.ndarray:
        return self.world.picture(state.inner)


@struct.dataclass
class RewardOverride(WrappedWorld):
    """A world whose reward is replaced by ``reward_function(state, action, next_state)``.

    Episode statistics go on counting the world's own reward (``Step.task_reward``).

    Attributes:
      world: the world underneath.
      reward_function: per sample, of observations and an action; returns ``[]``.
    """

    reward_function: RewardFunction = struct.field(pytree_node=False)

    def reset(self, key: jax.Array) -> tuple[Observation, RewardOverrideState]:
        observation, state = self.world.reset(key)
        return observation, RewardOverrideState(state, observation)

    def step(self, key: jax.Array, state: RewardOverrideState, action: jax.Array) -> Step:
        step = self.world.step(key, state.inner, action)
        reward = self.reward_function(state.observation, action, step.observation)
        return step.replace(
            state=RewardOverrideState(step.state, step.observation),
            reward=jnp.asarray(reward, jnp.result_type(float)),
            task_reward=step.counted_reward,
        )

    def at(self, observation: Observation, time: jax.Array | None = None) -> RewardOverrideState:
        observation = jax.tree.map(jnp.asarray, observation)
        return RewardOverrideState(self.world.at(observation, time), observation)


def override_reward(world: World, reward_function: RewardFunction) -> RewardOverride:
    """Replaces a world's reward by a function of what the policy observes.

    Args:
      world: any world.
      reward_function: ``(state, action, next_state) -> reward`` on observations before normalisation, in JAX.
        Either of one transition (arrays ``[*shape]``, returns ``[]`` or ``[1]``) or of a batch of them
        (``[N, *shape]``, returns ``[N]`` or ``[N, 1]``); which of the two is found out here, once, by trying.

    Returns:
      The world with the new reward.

    Raises:
      TypeError: the function fails for one transition and for a batch.
      ValueError: it returns the wrong shape, or NaN or inf on a real transition.
    """
    per_sample = _per_sample(reward_function, world)
    overridden = RewardOverride(world, per_sample)

    def probe(key: jax.Array) -> tuple[Any, ...]:
        observation, state = overridden.reset(key)
        action = example_action(world.action_space)
        step = overridden.step(key, state, action)
        return step.reward, observation, action, step.observation

    reward, *seen = jax.jit(jax.vmap(probe))(jax.random.split(jax.random.key(0), 8))
    bad = ~np.isfinite(np.asarray(reward))
    if bad.any():
        index = int(np.argmax(bad))
        shown = [jax.tree.map(lambda leaf: np.asarray(leaf)[index], part) for part in seen]
        raise ValueError(
            f"reward_function returned {np.asarray(reward)[index]} for state={shown[0]}, action={shown[1]},"
            f" next_state={shown[2]}; it must be finite: guard divisions, logarithms and roots"
        )
    return overridden


def example_action(space: ActionSpace) -> jax.Array:
    """Some action of a space, in the dtype that worlds are stepped with (the middle of a bounded box)."""
    if isinstance(space, Discrete):
        return jnp.int32(0)
    if hasattr(space, "nvec"):
        return jnp.zeros(space.shape, jnp.int32)
    middle = (space.low + space.high) / 2 if space.is_bounded else np.zeros(space.shape)
    return jnp.asarray(middle, jnp.result_type(float))


def strong(tree: PyTree, like: PyTree | None = None) -> PyTree:
    """Strips weak types (else a loop over steps is traced twice), casting to the dtypes of ``like``."""
    if like is None:
        return jax.tree.map(lambda leaf: jnp.asarray(leaf, dtype=jnp.result_type(leaf)), tree)
    return jax.tree.map(lambda leaf, other: jnp.asarray(leaf, dtype=other.dtype), tree, like)


def check_world(world: World) -> None:
    """Traces a world and reports what would break a compiled loop; costs two traces, compiles nothing.

    Raises:
      TypeError: a method cannot be traced, or ``step`` changes the structure, shape or dtype of the state.
      ValueError: ``step`` is not pure, or its outputs have wrong shapes.
    """
    name = type(world).__name__
    key = jax.eval_shape(lambda: jax.random.key(0))
    try:
        observation, state = jax.eval_shape(world.reset, key)
        action = jax.eval_shape(lambda: example_action(world.action_space))
        # A fresh function object each time: a cached trace would hide what changed in between.
        first, second = (
            jax.make_jaxpr(lambda *args: world.step(*args))(key, state, action) for _ in range(2)
        )
        step = jax.eval_shape(world.step, key, state, action)
    except jax.errors.UnexpectedTracerError as error:
        raise ValueError(_impure(name)) from error
    except jax.errors.JAXTypeError as error:
        raise TypeError(
            f"world {name} cannot be traced by JAX ({type(error).__name__}): reset and step must be pure"
            " jax.numpy functions without Python branches on their arguments"
        ) from error
    same_constants = len(first.consts) == len(second.consts) and all(
        _same_bytes(a, b)
        for a, b in zip(first.consts, second.consts, strict=True)
        if not isinstance(a, jax.core.Tracer)
    )
    if str(first) != str(second) or not same_constants:
        raise ValueError(_impure(name))
    _check_shapes(name, world.observation_space, observation)
    _check_same(f"world {name}: step's state", state, step.state)
    _check_same(f"world {name}: step's observation", observation, step.observation)
    for field in ("reward", "terminated", "truncated"):
        value = getattr(step, field)
        if value.shape != ():
            raise ValueError(f"world {name}: step must return {field} of shape [], got {list(value.shape)}")


def _impure(name: str) -> str:
    return (
        f"world {name} is not pure: two traces of step with the same arguments differ; draw randomness from"
        " the key and keep everything that changes in the state, not in Python objects or NumPy's generator"
    )


def _same_bytes(left: Any, right: Any) -> bool:
    """Equality of two constants; NaN equals itself, and typed keys are compared by their words."""
    if left is right:
        return True
    if jnp.issubdtype(left.dtype, jax.dtypes.prng_key):
        left, right = jax.random.key_data(left), jax.random.key_data(right)
    left, right = np.asarray(left), np.asarray(right)
    return left.dtype == right.dtype and left.shape == right.shape and left.tobytes() == right.tobytes()


def _check_shapes(name: str, space: Space, observation: Observation) -> None:
    expected: Any
    actual: Any
    if isinstance(space, Dict):
        expected = {key: getattr(part, "shape", None) for key, part in space.spaces}
        is_dict = isinstance(observation, dict)
        actual = {key: part.shape for key, part in observation.items()} if is_dict else observation
    else:
        expected, actual = space.shape, getattr(observation, "shape", observation)
    if actual != expected:
        raise ValueError(
            f"world {name}: reset's observation has shape {actual}, but observation_space says {expected}"
        )


def _check_same(what: str, expected: PyTree, actual: PyTree) -> None:
    structure: Any = jax.tree.structure(actual)
    if structure != jax.tree.structure(expected):
        raise TypeError(
            f"{what} has another structure than reset's: {structure} instead of"
            f" {jax.tree.structure(expected)}"
        )
    paths = jax.tree_util.tree_flatten_with_path(expected)[0]
    for (path, left), right in zip(paths, jax.tree.leaves(actual), strict=True):
        if left.shape != right.shape or left.dtype != right.dtype:
            raise TypeError(
                f"{what}{jax.tree_util.keystr(path)} is {right.dtype}{list(right.shape)}, but reset gives"
                f" {left.dtype}{list(left.shape)}: cast it"
            )


def _per_sample(reward_function: RewardFunction, world: World) -> PerSample:
    """Finds out whether the function takes one transition or a batch; returns the form for one."""
    if not callable(reward_function):
        raise TypeError(f"reward_function must be callable, got {reward_function!r}")
    key = jax.eval_shape(lambda: jax.random.key(0))
    observation, _ = jax.eval_shape(world.reset, key)
    action = jax.eval_shape(lambda: example_action(world.action_space))
    n_samples = 7  # a size that no observation is likely to have

    def batched(tree: PyTree) -> PyTree:
        return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct((n_samples, *leaf.shape), leaf.dtype), tree)

    tried: list[str] = []
    errors: list[Exception] = []
    for arguments, shapes, form in (
        ((observation, action, observation), ((), (1,)), "one transition"),
        (
            (batched(observation), batched(action), batched(observation)),
            ((n_samples,), (n_samples, 1)),
            "a batch",
        ),
    ):
        try:
            result = jax.eval_shape(reward_function, *arguments)
        except Exception as error:  # whatever the user's code raises is reported below
            tried.append(f"{form}: {type(error).__name__}: {str(error).splitlines()[0]}")
            errors.append(error)
            continue
        shape = getattr(result, "shape", None)
        if shape in shapes:
            return PerSample(reward_function, takes_batch=form == "a batch")
        returned = "no single array" if shape is None else f"shape {list(shape)}"
        expected = " or ".join(str(list(s)).replace(str(n_samples), "N") for s in shapes)
        tried.append(f"{form}: {returned.replace(str(n_samples), 'N')}, expected {expected}")
    message = (
        "reward_function(state, action, next_state) must return one reward for one transition, or N rewards"
        f" for a batch of N, using jax.numpy. Tried with {'; with '.join(tried)}"
    )
    if len(errors) == 2:
        raise TypeError(message) from errors[0]
    raise ValueError(message)
