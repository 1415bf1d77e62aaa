"""Finds out, by trying, in which form a user's function is to be called."""

from __future__ import annotations

import dataclasses
import warnings
from typing import Any, TypeVar

import gymnasium
import jax
import numpy as np

from sb3_bridge.functions.user_function import (
    FRAMEWORKS,
    Arguments,
    Unfit,
    UserFunction,
    check_finite,
    evaluate,
    first_line,
    length,
    named,
    shapes,
    shown,
    take,
)

F = TypeVar("F", bound=UserFunction)
Fitting = dict[bool, tuple[F, list[np.ndarray]]]  # by takes_batch: forms whose shapes fit, and their results

_UNBOUNDED = 1e6  # bounds beyond it tell nothing about usual values; their squares may overflow
_SMALLEST_BATCH = 7


def resolve(untried: F, spaces: tuple[gymnasium.Space, ...], samples: tuple[Any, ...] | None = None) -> F:
    """Tries every form of a user's function and keeps the one that works.

    JAX first, then NumPy, then torch; what works as JAX runs on the device. A NumPy function fails to be traced,
    as do Python branches on values; torch functions refuse arrays of the other two.

    Args:
      untried: the function in any form.
      spaces: of its arguments.
      samples: real arguments to try with, ``[M, *shape]`` each; None draws them from the spaces.

    Returns:
      The function in its own form.

    Raises:
      TypeError: not callable, or it raises in every form (each one's error is listed).
      ValueError: it returns something else than it owes, NaN or inf, or what depends on more than its sample.
    """
    signature = f"{untried.parameter}({', '.join(untried.argument_names)})"
    function: Any = untried.function
    if not callable(function):
        raise TypeError(f"{untried.parameter}={function!r} must be callable: {signature}")
    try:
        hash(function)
    except TypeError:  # e.g. an instance of a dataclass; its bound method hashes by identity
        untried = dataclasses.replace(untried, function=function.__call__)
    arguments, origin = _arguments_to_try(untried, spaces, samples)
    tried: list[str] = []
    unfit: list[Exception] = []
    raised: list[Exception] = []
    for framework in FRAMEWORKS:
        fitting: Fitting = {}
        for takes_batch in (False, True):
            form = dataclasses.replace(untried, framework=framework, takes_batch=takes_batch)
            try:
                # What a form that is not the function's own warns of would only confuse.
                with warnings.catch_warnings():
                    warnings.simplefilter("ignore")
                    fitting[takes_batch] = form.attempt(arguments)
            except Exception as error:
                (unfit if isinstance(error, Unfit) else raised).append(error)
                tried.append(f"{form.form}: {first_line(error)}")
        if fitting:
            return _settle(fitting, arguments, origin)
    forms = "\n  ".join(tried)
    if unfit:
        raise ValueError(f"{signature} must return {untried.owed}. Tried:\n  {forms}") from unfit[0]
    raise TypeError(
        f"{signature} raises in every form that was tried, with states {shapes(arguments[0])} and actions"
        f" {shapes(arguments[1])} in a batch:\n  {forms}"
    ) from raised[0]


def _settle(fitting: Fitting, arguments: Arguments, origin: str) -> Any:
    """Chooses between the forms whose shapes fit, and checks their results."""
    # Both fit for element-wise functions of scalars (Discrete, Box of one number) and for indices that count from
    # the end, as in `next_state[..., 2]`. Per sample is preferred: nothing in it can depend on the rest of a batch.
    # Where the two disagree, neither is known to be meant.
    form, alone = fitting[False not in fitting]
    check_finite(form, alone, arguments, origin=origin)
    if True not in fitting:
        return form
    _, together = fitting[True]
    if False not in fitting:
        try:
            alone = _one_by_one(form, arguments)
        except Exception as error:
            raise ValueError(
                f"{form.parameter} ({form.form}) fails for a batch of one transition: {first_line(error)}"
            ) from error
    for output, one, many in zip(form.outputs, alone, together, strict=True):
        differs = _differ(one, many)
        if differs.any():
            row = int(np.argmax(differs))
            raise ValueError(
                f"{form.parameter} ({form.form.split(',')[0]}) gives {named(output, many[row])} for a transition in"
                f" a batch and {named(output, one[row])} for the same transition alone: it must depend on nothing"
                f" else than {shown(form, arguments, row)}{origin}; not on the rest of a batch, nor on random numbers"
            )
    return form


def _one_by_one(form: UserFunction, arguments: Arguments) -> list[np.ndarray]:
    rows = [evaluate(form, take(arguments, slice(i, i + 1))) for i in range(length(arguments))]
    return [np.concatenate(column) for column in zip(*rows, strict=True)]


def _differ(one: np.ndarray, many: np.ndarray) -> np.ndarray:
    """Which of N samples differ by more than the order of sums explains; bool ``[N]``."""
    if one.dtype.kind == "f":
        scale = np.maximum(1.0, np.max(np.abs(one), axis=0))
        differs = ~(np.abs(one - many) <= 1e-3 * np.abs(many) + 1e-4 * scale)
    else:
        # Rounding may take pixels one apart; all other integers are categories.
        differs = np.abs(one.astype(int) - many) > (one.dtype.kind == "u")
    return differs.reshape(len(one), -1).any(axis=1)


# What to try with.


def _arguments_to_try(
    form: UserFunction, spaces: tuple[gymnasium.Space, ...], samples: tuple[Any, ...] | None
) -> tuple[Arguments, str]:
    """Arguments ``[N, *shape]``, and where they are from; no observation or action has an axis of that N."""
    rng = np.random.default_rng(0)  # the spaces' own generators are the user's
    drawn = tuple(_draw(form, rng, space, 1) for space in spaces)
    names = ", ".join(f"{name}s" for name in form.argument_names)
    if samples is not None:
        if not isinstance(samples, tuple) or len(samples) != len(spaces):
            raise ValueError(f"samples={samples!r} must be None or a tuple ({names})")
        samples = jax.tree.map(np.asarray, samples)
        expected, got = (jax.tree.map(lambda leaf: leaf.shape[1:], tree) for tree in (drawn, samples))
        if expected != got:
            raise ValueError(
                f"samples ({names}) have shapes {got} behind their first axis, but the spaces say {expected}"
            )
    n_samples = 0 if samples is None else length(samples, "samples")
    n = max(n_samples, _SMALLEST_BATCH)
    while n in {size for leaf in jax.tree.leaves(drawn) for size in leaf.shape[1:]}:
        n += 1
    if samples is None or n_samples == 0:
        return tuple(_draw(form, rng, space, n) for space in spaces), " (drawn from the spaces)"
    return take(samples, np.arange(n) % n_samples), ""


def _draw(form: UserFunction, rng: np.random.Generator, space: gymnasium.Space, n: int) -> Any:
    """``[n, *space.shape]`` in the space's dtype: uniform, or standard normal where a bound is missing."""
    if isinstance(space, gymnasium.spaces.Dict):
        return {name: _draw(form, rng, part, n) for name, part in space.spaces.items()}
    if isinstance(space, gymnasium.spaces.Discrete):
        return int(space.start) + rng.integers(int(space.n), size=n)
    if isinstance(space, gymnasium.spaces.MultiDiscrete):
        return rng.integers(space.start, space.start + space.nvec, (n, *space.shape)).astype(space.dtype)
    if isinstance(space, gymnasium.spaces.MultiBinary):
        return rng.integers(0, 2, (n, *space.shape)).astype(space.dtype)
    if not isinstance(space, gymnasium.spaces.Box):
        raise TypeError(
            f"{form.parameter} cannot be tried on {space}: use Box, Discrete, MultiDiscrete, MultiBinary, Dict"
        )
    low, high = space.low.astype(np.float64), space.high.astype(np.float64)
    bounded = (low > -_UNBOUNDED) & (high < _UNBOUNDED)
    low, high = np.clip(low, -_UNBOUNDED, _UNBOUNDED), np.clip(high, -_UNBOUNDED, _UNBOUNDED)
    shape = (n, *space.shape)
    normal = np.clip(np.clip(0.0, low, high) + rng.standard_normal(shape), low, high)
    values = np.where(bounded, low + (high - low) * rng.random(shape), normal)
    return (values if np.dtype(space.dtype).kind == "f" else np.round(values)).astype(space.dtype)
