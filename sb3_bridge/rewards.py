"""A user's ``reward_function(state, action, next_state)``: JAX, NumPy or torch, per sample or batched.

Which it is is found out once, by trying. The JAX form is traced like any other code. NumPy and torch run on
the host, through a primitive of our own instead of ``jax.pure_callback``: that one hands its arguments over as
JAX arrays, and copies those above 100 kB that are not 64-byte aligned in the client's thread pool. On one core
the only thread of the pool is the one that waits for the copy, which is a deadlock (seen in jax 0.10;
jax-ml/jax#24255). Our primitive gets NumPy views from XLA, and nothing in it waits for JAX.
"""

from __future__ import annotations

import collections
import contextlib
import functools
import math
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Literal

import gymnasium
import jax
import jax.numpy as jnp
import numpy as np
from jax.extend.core import Primitive
from jax.interpreters import batching, mlir

Framework = Literal["jax", "numpy", "torch"]

_NAMES: dict[Framework, str] = {"jax": "JAX", "numpy": "NumPy", "torch": "torch"}
_UNBOUNDED = 1e6  # bounds beyond it tell nothing about usual values; their squares may overflow
_SMALLEST_BATCH = 7


class _Unfit(ValueError):
    """The function returned, but not the rewards that its form owes."""


@dataclass(frozen=True)
class Reward:
    """A reward function in a known form; equal for equal functions, so that it can be static under ``jit``.

    A reward that is NaN or inf is an error that shows the transition. Inside ``jit`` that holds for NumPy and
    torch only, and for finite states: what a world does behind an end may be anything, and counts for nothing.
    JAX passes an error in there on as a ``JaxRuntimeError`` that ends with the message; see ``original_errors``.

    Attributes:
      function: the user's ``(state, action, next_state) -> reward``, a pure function.
      framework: what its arguments are: traced JAX arrays, NumPy arrays or torch CPU tensors.
      takes_batch: arguments ``[N, *shape]`` and result ``[N]`` or ``[N, 1]``, instead of ``[*shape]`` and ``[]``
        or ``[1]``.
    """

    function: Callable[[Any, Any, Any], Any]
    framework: Framework
    takes_batch: bool

    def __call__(self, state: Any, action: Any, next_state: Any) -> jax.Array:
        """The reward of one transition, traceable under ``jit`` and ``vmap``.

        However deep it is vmapped, and inside of loops: the host is called once for the whole batch.

        Args:
          state: ``[*shape]``, a dict of such arrays for ``Dict`` observations.
          action: ``[*shape]`` in the environment's units.
          next_state: like ``state``.

        Returns:
          ``[]``, JAX's default float.
        """
        transition = (state, action, next_state)
        if self.framework == "jax":
            if self.takes_batch:
                transition = jax.tree.map(lambda leaf: jnp.asarray(leaf)[None], transition)
            return jnp.reshape(jnp.asarray(self.function(*transition), jnp.result_type(float)), ())
        leaves, structure = jax.tree.flatten(transition)
        leaves = [jnp.asarray(leaf) for leaf in leaves]
        return _host_reward.bind(*leaves, reward=self, structure=structure, batch_rank=0)

    def batch(self, states: Any, actions: Any, next_states: Any) -> np.ndarray:
        """The rewards of N transitions of ordinary environments, on the host.

        Args:
          states: ``[N, *shape]``, a dict of such arrays for ``Dict`` observations.
          actions: ``[N, *shape]`` in the environment's units.
          next_states: like ``states``.

        Returns:
          ``[N]`` float32.

        Raises:
          ValueError: a reward is NaN or inf, or has the wrong shape; or the arguments differ in length.
          RuntimeError: the function raised.
        """
        transitions = jax.tree.map(np.asarray, (states, actions, next_states))
        n_transitions = _length(transitions, "states, actions, next_states")
        rewards = _guarded(self, transitions) if n_transitions else np.zeros(0, np.float32)
        _check_finite(rewards, transitions, np.isfinite(rewards))
        return rewards

    @property
    def description(self) -> str:
        """What was found out, in one line for the log."""
        return f"reward_function: {self._form}"

    @property
    def _form(self) -> str:
        many = "batches of transitions" if self.takes_batch else "one transition at a time"
        return f"{_NAMES[self.framework]}, {many}"


def resolve_reward(
    function: Callable[[Any, Any, Any], Any],
    observation_space: gymnasium.Space,
    action_space: gymnasium.Space,
    *,
    samples: tuple[Any, Any, Any] | None = None,
) -> Reward:
    """Finds out, by trying, what kind of reward function this is.

    JAX first, then NumPy, then torch; what works as JAX runs on the device. A NumPy function fails to be traced,
    as do Python branches on values; torch functions refuse arrays of the other two.

    Args:
      function: ``(state, action, next_state) -> reward``; a pure function of one transition (``[*shape]`` to
        ``[]`` or ``[1]``), or of a batch, row by row (``[N, *shape]`` to ``[N]`` or ``[N, 1]``). NumPy and torch
        get integer actions as int64; torch gets floats as float32, on the CPU.
      observation_space: of one environment.
      action_space: of one environment.
      samples: ``(states, actions, next_states)`` of real transitions to try with, ``[M, *shape]`` each; None
        draws them from the spaces.

    Returns:
      The function in its form.

    Raises:
      TypeError: not callable, or it raises in every form (each one's error is listed).
      ValueError: it returns wrong shapes, NaN or inf, or rewards that depend on more than their transition.
    """
    if not callable(function):
        raise TypeError(
            f"reward_function={function!r} must be callable: reward_function(state, action, next_state)"
        )
    try:
        hash(function)
    except TypeError:  # e.g. an instance of a dataclass; its bound method hashes by identity
        unhashable: Any = function
        function = unhashable.__call__
    transitions, origin = _transitions_to_try(observation_space, action_space, samples)
    tried: list[str] = []
    unfit: list[Exception] = []
    raised: list[Exception] = []
    for framework in _NAMES:
        fitting: dict[bool, np.ndarray] = {}
        for takes_batch in (False, True):
            reward = Reward(function, framework, takes_batch)
            try:
                # What a form that is not the function's own warns of would only confuse.
                with warnings.catch_warnings():
                    warnings.simplefilter("ignore")
                    fitting[takes_batch] = _rewards(reward, transitions)
            except Exception as error:
                (unfit if isinstance(error, _Unfit) else raised).append(error)
                tried.append(f"{reward._form}: {_first_line(error)}")
        if fitting:
            return _settle(function, framework, fitting, transitions, origin)
    forms = "\n  ".join(tried)
    if unfit:
        raise ValueError(
            "reward_function(state, action, next_state) must return one reward for a transition ([] or [1]), or"
            f" N rewards for a batch of N ([N] or [N, 1]). Tried:\n  {forms}"
        ) from unfit[0]
    raise TypeError(
        "reward_function(state, action, next_state) raises in every form that was tried, with states"
        f" {_shapes(transitions[0])} and actions {_shapes(transitions[1])} in a batch:\n  {forms}"
    ) from raised[0]


@contextlib.contextmanager
def original_errors() -> Iterator[None]:
    """Inside it, an error of a host reward function under ``jit`` arrives as itself, not as JAX's wrapper."""
    _last_error.clear()
    try:
        yield
    except jax.errors.JaxRuntimeError as error:
        if _last_error and str(_last_error[-1]) in str(error):
            raise _last_error.pop() from None
        raise


def _settle(
    function: Callable[[Any, Any, Any], Any],
    framework: Framework,
    fitting: dict[bool, np.ndarray],
    transitions: tuple[Any, Any, Any],
    origin: str,
) -> Reward:
    """Chooses between the forms whose shapes fit, and checks the rewards."""
    # Both fit for element-wise functions of scalars (Discrete, Box of one number) and for indices that count from
    # the end, as in `next_state[..., 2]`. Per sample is preferred: nothing in it can depend on the rest of a batch.
    # Where the two disagree, neither is known to be meant.
    reward = Reward(function, framework, takes_batch=False not in fitting)
    rewards = fitting[reward.takes_batch]
    _check_finite(rewards, transitions, np.isfinite(rewards), origin)
    if True not in fitting:
        return reward
    try:
        alone = fitting[False] if False in fitting else _one_by_one(reward, transitions)
    except Exception as error:
        raise ValueError(
            f"reward_function ({reward._form}) fails for a batch of one transition: {_first_line(error)}"
        ) from error
    scale = max(1.0, float(np.max(np.abs(alone))))
    differs = ~np.isclose(alone, fitting[True], rtol=1e-3, atol=1e-4 * scale)
    if differs.any():
        row = int(np.argmax(differs))
        raise ValueError(
            f"reward_function ({_NAMES[framework]}) gives {fitting[True][row]} for a transition in a batch and"
            f" {alone[row]} for the same transition alone: it must depend on nothing else than"
            f" {_shown(transitions, row)}{origin}; not on the rest of a batch, nor on random numbers"
        )
    return reward


def _one_by_one(reward: Reward, transitions: Any) -> np.ndarray:
    n_transitions = _length(transitions)
    return np.concatenate(
        [_rewards(reward, _take(transitions, slice(i, i + 1))) for i in range(n_transitions)]
    )


def _rewards(reward: Reward, transitions: Any) -> np.ndarray:
    """``[N]`` float32 of N >= 1 transitions, not checked to be finite; raises ``_Unfit`` for wrong shapes."""
    n_transitions = _length(transitions)
    if reward.framework == "jax":
        result = _traced_rewards(reward, *transitions)
        return _as_column(result, n_transitions, () if reward.takes_batch else (n_transitions,))
    convert = _to_torch if reward.framework == "torch" else np.array
    states, actions, next_states = transitions
    actions = jax.tree.map(lambda leaf: leaf.astype(np.int64) if leaf.dtype.kind == "i" else leaf, actions)
    # Copies: what XLA or a rollout owns must survive a function that writes into its arguments.
    arguments = jax.tree.map(convert, (states, actions, next_states))
    with _host_context(reward.framework):
        if reward.takes_batch:
            return _as_column(reward.function(*arguments), n_transitions, ())
        rows = zip(*map(_rows, arguments), strict=True)
        return np.array([_as_scalar(reward.function(*row)) for row in rows], np.float64).astype(np.float32)


@functools.partial(jax.jit, static_argnames="reward")
def _traced_rewards(reward: Reward, *transitions: Any) -> Any:
    return (reward.function if reward.takes_batch else jax.vmap(reward.function))(*transitions)


@contextlib.contextmanager
def _host_context(framework: Framework) -> Iterator[None]:
    with contextlib.ExitStack() as stack:
        # Non-finite rewards are reported with their transition, which says more than NumPy's warning.
        stack.enter_context(np.errstate(all="ignore"))
        # JAX on concrete values within a callback could wait for the very thread that calls: it is refused.
        stack.enter_context(jax.transfer_guard_host_to_device("disallow_explicit"))
        if framework == "torch":
            import torch

            stack.enter_context(torch.no_grad())
        try:
            yield
        except jax.errors.JaxRuntimeError as error:
            raise TypeError(
                "it calls JAX on concrete values: make it traceable (jnp.where instead of Python branches), or use"
                f" no JAX in it ({str(error).splitlines()[0]})"
            ) from error


def _to_torch(array: np.ndarray) -> Any:
    import torch

    dtype: Any = array.dtype
    if array.dtype.kind == "f":
        dtype = np.float32
    elif array.dtype.kind in "iu" and array.dtype != np.uint8:
        dtype = np.int64
    return torch.from_numpy(np.array(array, dtype))


def _rows(tree: Any) -> Any:
    """Iterates over the samples of arrays or tensors ``[N, ...]``, or of a dict of them."""
    if isinstance(tree, dict):
        return (dict(zip(tree, row, strict=True)) for row in zip(*map(_rows, tree.values()), strict=True))
    return tree


def _as_array(result: Any) -> np.ndarray:
    """What a reward function returned, as numbers on the host."""
    if hasattr(result, "detach"):
        result = result.detach().cpu()
        result = (
            result.double() if result.is_floating_point() else result
        ).numpy()  # NumPy knows no bfloat16
    array = (
        np.asarray(result)
        if isinstance(result, np.ndarray | np.generic | jax.Array | float | int | list)
        else None
    )
    if array is None or array.dtype.kind not in "biuf":
        kind = type(result).__name__ if array is None else f"{array.dtype} numbers"
        raise _Unfit(f"returned {kind}, expected one array of real numbers")
    return array


def _as_scalar(result: Any) -> float:
    """The same for one reward; the loop over samples is slow enough, so no array is made of it."""
    if not hasattr(result, "item"):
        result = _as_array(result)
    if tuple(result.shape) not in ((), (1,)):
        raise _Unfit(f"returned shape {list(result.shape)}, expected [] or [1]")
    value = result.item()
    if not isinstance(value, float | int):
        raise _Unfit(f"returned {type(value).__name__}, expected one real number")
    return value


def _as_column(result: Any, n_transitions: int, prefix: tuple[int, ...]) -> np.ndarray:
    """Checks ``[N]`` or ``[N, 1]``; ``prefix`` is ``vmap``'s part of the shape, which the user does not see."""
    array = _as_array(result)
    # A batch of one may have lost its axis to a `squeeze()`.
    if array.shape not in ((n_transitions,), (n_transitions, 1)) and (n_transitions > 1 or array.shape != ()):
        n = "" if prefix else f" with N={n_transitions}"
        shape, expected = array.shape[len(prefix) :], "[] or [1]" if prefix else f"[N] or [N, 1]{n}"
        raise _Unfit(f"returned shape {list(shape)}, expected {expected}")
    return array.reshape(n_transitions).astype(np.float32)


def _guarded(reward: Reward, transitions: Any) -> np.ndarray:
    """``_rewards`` whose errors show the transition that they are due to."""
    try:
        return _rewards(reward, transitions)
    except Exception as error:
        raise _blamed(reward, transitions, error) from error


def _blamed(reward: Reward, transitions: Any, error: Exception) -> Exception:
    kind, verb = (ValueError, "") if isinstance(error, _Unfit) else (RuntimeError, "raised ")
    for row in range(_length(transitions)):
        try:
            _rewards(reward, _take(transitions, slice(row, row + 1)))
        except Exception as same:
            return kind(f"reward_function {verb}{_first_line(same)} for {_shown(transitions, row)}")
    return kind(f"reward_function {verb}{_first_line(error)} for a batch of states {_shapes(transitions[0])}")


def _check_finite(rewards: np.ndarray, transitions: Any, passes: np.ndarray, origin: str = "") -> None:
    if not passes.all():
        row = int(np.argmin(passes))
        raise ValueError(
            f"reward_function returned {rewards[row]} for {_shown(transitions, row)}{origin}; it must be finite:"
            " guard divisions, logarithms and roots"
        )


# The host's primitive. Operands are the leaves of (state, action, next_state), all with the same `batch_rank`
# leading axes; the result is [*batch].

_last_error: collections.deque[Exception] = collections.deque(maxlen=1)


def _call_host(
    *leaves: np.ndarray, reward: Reward, structure: Any, batch_rank: int, dtype: Any
) -> tuple[np.ndarray]:
    batch_shape = leaves[0].shape[:batch_rank]
    n_transitions = math.prod(batch_shape)
    if n_transitions == 0:
        return (np.zeros(batch_shape, dtype),)
    flat = [leaf.reshape(n_transitions, *leaf.shape[batch_rank:]) for leaf in leaves]
    transitions = jax.tree.unflatten(structure, flat)
    try:
        rewards = _guarded(reward, transitions)
        passes = np.isfinite(rewards)
        if not passes.all():
            _check_finite(rewards, transitions, passes | ~_finite_rows(flat))
    except Exception as error:
        _last_error.append(error)
        raise
    return (rewards.reshape(batch_shape).astype(dtype),)


def _finite_rows(leaves: list[np.ndarray]) -> np.ndarray:
    return np.all([np.isfinite(leaf).reshape(len(leaf), -1).all(axis=1) for leaf in leaves], axis=0)


def _result_shape(*leaves: Any, batch_rank: int, **_: Any) -> jax.core.ShapedArray:
    return jax.core.ShapedArray(leaves[0].shape[:batch_rank], jnp.result_type(float))


def _batch(leaves: Any, axes: Any, *, batch_rank: int, **params: Any) -> tuple[jax.Array, int]:
    size = next(leaf.shape[axis] for leaf, axis in zip(leaves, axes, strict=True) if axis is not None)
    leaves = [
        jnp.broadcast_to(leaf, (size, *leaf.shape)) if axis is None else jnp.moveaxis(leaf, axis, 0)
        for leaf, axis in zip(leaves, axes, strict=True)
    ]
    return _host_reward.bind(*leaves, batch_rank=batch_rank + 1, **params), 0


def _lower(ctx: Any, *operands: Any, **params: Any) -> Any:
    call = functools.partial(_call_host, dtype=ctx.avals_out[0].dtype, **params)
    results, _, _ = mlir.emit_python_callback(
        ctx,
        call,
        None,
        list(operands),
        ctx.avals_in,
        ctx.avals_out,
        has_side_effect=False,
        returns_token=False,
    )
    return results


_host_reward = Primitive("host_reward")
_host_reward.def_abstract_eval(_result_shape)
_host_reward.def_impl(jax.jit(_host_reward.bind, static_argnames=("reward", "structure", "batch_rank")))
batching.primitive_batchers[_host_reward] = _batch
mlir.register_lowering(_host_reward, _lower)


# Transitions.


def _transitions_to_try(
    observation_space: gymnasium.Space, action_space: gymnasium.Space, samples: tuple[Any, Any, Any] | None
) -> tuple[tuple[Any, Any, Any], str]:
    """Transitions ``[N, *shape]``, and where they are from; no observation or action has an axis of that N."""
    rng = np.random.default_rng(0)  # the spaces' own generators are the user's
    spaces = (observation_space, action_space, observation_space)
    drawn = [_draw(rng, space, 1) for space in spaces]
    if samples is not None:
        if not isinstance(samples, tuple) or len(samples) != 3:
            raise ValueError(f"samples={samples!r} must be None or a tuple (states, actions, next_states)")
        samples = jax.tree.map(np.asarray, samples)
        expected, got = (jax.tree.map(lambda leaf: leaf.shape[1:], tree) for tree in (tuple(drawn), samples))
        if expected != got:
            raise ValueError(
                f"samples (states, actions, next_states) have shapes {got} behind their first axis, but the spaces"
                f" say {expected}"
            )
    n_samples = 0 if samples is None else _length(samples, "samples")
    n = max(n_samples, _SMALLEST_BATCH)
    while n in {size for leaf in jax.tree.leaves(drawn) for size in leaf.shape[1:]}:
        n += 1
    if samples is None or n_samples == 0:
        states, actions, next_states = (_draw(rng, space, n) for space in spaces)
        return (states, actions, next_states), " (drawn from the spaces)"
    return _take(samples, np.arange(n) % n_samples), ""


def _draw(rng: np.random.Generator, space: gymnasium.Space, n: int) -> Any:
    """``[n, *space.shape]`` in the space's dtype: uniform, or standard normal where a bound is missing."""
    if isinstance(space, gymnasium.spaces.Dict):
        return {name: _draw(rng, part, n) for name, part in space.spaces.items()}
    if isinstance(space, gymnasium.spaces.Discrete):
        return int(space.start) + rng.integers(int(space.n), size=n)
    if isinstance(space, gymnasium.spaces.MultiDiscrete):
        return rng.integers(space.start, space.start + space.nvec, (n, *space.shape)).astype(space.dtype)
    if isinstance(space, gymnasium.spaces.MultiBinary):
        return rng.integers(0, 2, (n, *space.shape)).astype(space.dtype)
    if not isinstance(space, gymnasium.spaces.Box):
        raise TypeError(
            f"reward_function cannot be tried on {space}: use Box, Discrete, MultiDiscrete, MultiBinary, Dict"
        )
    low, high = space.low.astype(np.float64), space.high.astype(np.float64)
    bounded = (low > -_UNBOUNDED) & (high < _UNBOUNDED)
    low, high = np.clip(low, -_UNBOUNDED, _UNBOUNDED), np.clip(high, -_UNBOUNDED, _UNBOUNDED)
    shape = (n, *space.shape)
    normal = np.clip(np.clip(0.0, low, high) + rng.standard_normal(shape), low, high)
    values = np.where(bounded, low + (high - low) * rng.random(shape), normal)
    return (values if np.dtype(space.dtype).kind == "f" else np.round(values)).astype(space.dtype)


def _length(transitions: Any, name: str = "transitions") -> int:
    lengths = {np.shape(leaf)[:1] for leaf in jax.tree.leaves(transitions)}
    if len(lengths) != 1 or lengths == {()}:
        raise ValueError(f"{name} must be arrays [N, ...] of one N, got shapes {_shapes(transitions)}")
    return lengths.pop()[0]


def _take(tree: Any, index: Any) -> Any:
    return jax.tree.map(lambda leaf: leaf[index], tree)


def _shapes(tree: Any) -> str:
    if isinstance(tree, dict):
        return "{" + ", ".join(f"{name!r}: {_shapes(part)}" for name, part in tree.items()) + "}"
    if isinstance(tree, tuple):
        return ", ".join(map(_shapes, tree))
    return str(list(np.shape(tree)))


def _shown(transitions: Any, row: int) -> str:
    names = ("state", "action", "next_state")
    parts = zip(names, _take(transitions, row), strict=True)
    return ", ".join(f"{name}={_text(part)}" for name, part in parts)


def _text(tree: Any) -> str:
    if isinstance(tree, dict):
        return "{" + ", ".join(f"{name!r}: {_text(part)}" for name, part in tree.items()) + "}"
    text = np.array2string(np.asarray(tree), precision=6, separator=", ", threshold=64, edgeitems=2)
    return " ".join(text.split())


def _first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines() or [""]
    return lines[0] if isinstance(error, _Unfit) else f"{type(error).__name__}: {lines[0]}"
