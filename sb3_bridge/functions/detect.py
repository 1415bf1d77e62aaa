"""Finds out, by trying, in which form a user's function is to be called."""

from __future__ import annotations

import contextlib
import dataclasses
import inspect
import warnings
from typing import Any, TypeVar

import gymnasium
import jax
import numpy as np
from gymnasium.vector.utils import batch_space

from sb3_bridge.functions.indices import find_out_of_range
from sb3_bridge.functions.user_function import (
    FRAMEWORKS,
    Arguments,
    Unfit,
    UserFunction,
    check_agreement,
    check_finite,
    differ,
    evaluate,
    first_line,
    length,
    shapes,
    take,
)

F = TypeVar("F", bound=UserFunction)
Spaces = tuple[gymnasium.Space, ...]

_UNBOUNDED = 1e6  # bounds beyond it tell nothing about usual values; their squares may overflow
_SMALLEST_BATCH = 7
_LARGEST_BATCH = 64  # of those in which a function is compared with itself for one transition
_SCALES = (1.0, 0.03, 30.0)


def resolve(untried: F, spaces: Spaces) -> F:
    """Tries every form of a user's function of such spaces and keeps the one that works.

    JAX first, then NumPy, then torch; what works as JAX runs on the device. A NumPy function fails to be traced,
    as do Python branches on values; torch functions refuse arrays of the other two. A function of NumPy or torch that
    takes one transition and a batch is called for batches if the results are equal, else it is refused.

    Raises:
      TypeError: not callable, it takes other arguments, or it raises in every form (each one's error is listed).
      ValueError: it returns something else than it must, NaN or inf, or what depends on more than its sample; or a
        function of JAX has an index out of range.
    """
    signature = f"{untried.parameter}({', '.join(untried.argument_names)})"
    function: Any = untried.function
    if not callable(function):
        raise TypeError(f"{untried.parameter}={function!r} must be callable: {signature}")
    with contextlib.suppress(ValueError):  # some built-in functions have no signature
        given = inspect.signature(function)
        try:
            given.bind(*untried.argument_names)
        except TypeError as error:
            called = f"{signature} is called with {len(untried.argument_names)} arguments"
            raise TypeError(f"{called}, but yours is {given}: {error}") from None
    try:
        hash(function)
    except TypeError:  # e.g. an instance of a dataclass; its bound method hashes by identity
        untried = dataclasses.replace(untried, function=function.__call__)
    n = _SMALLEST_BATCH  # that no observation or action has an axis of
    while n in _axes(_draw(spaces, 1)):
        n += 1
    arguments = _draw(spaces, n)
    tried: dict[str, list[str]] = {}
    errors: list[Exception] = []
    for framework in FRAMEWORKS:
        fitting: dict[bool, tuple[F, list[np.ndarray]]] = {}  # forms whose shapes fit, and their results
        for takes_batch in (False, True):
            form = dataclasses.replace(untried, framework=framework, takes_batch=takes_batch)
            try:
                # What a form that is not the function's own warns of would only confuse.
                with warnings.catch_warnings(action="ignore"):
                    fitting[takes_batch] = form.attempt(arguments)
            except Exception as error:
                errors.append(error)
                tried.setdefault(first_line(error), []).append(form.form)
        if fitting:
            try:
                return _settle(fitting, spaces, arguments)
            except ValueError as error:
                raise ValueError(f"{error} (it was tried with values drawn from the spaces)") from error
    forms = "\n  ".join(
        f"{'; '.join(forms) if len(tried) > 1 else 'every form'}: {line}" for line, forms in tried.items()
    )
    for unfit in errors:
        if isinstance(unfit, Unfit):
            raise ValueError(f"{signature} must return {untried.returns}. Tried:\n  {forms}") from unfit
    raise TypeError(
        f"{signature} raises in every form that was tried, with states {shapes(arguments[0])} and actions"
        f" {shapes(arguments[1])} in a batch:\n  {forms}"
    ) from errors[0]


def _settle(fitting: dict[bool, tuple[F, list[np.ndarray]]], spaces: Spaces, arguments: Arguments) -> F:
    """Chooses between the forms whose shapes fit, and checks their results."""
    # Both fit for element-wise functions of scalars (Discrete, Box of one number) and for indices that count from
    # the end, as in `next_state[..., 2]`. Where the two disagree, neither is known to be meant.
    form, alone = fitting[False not in fitting]
    check_finite(form, alone, arguments)
    outside = find_out_of_range(form, arguments) if form.framework == "jax" else None
    if outside:
        raise ValueError(
            f"{form.parameter} ({form.form}) reads {outside}, which is out of range: JAX would give another element"
            " without an error. Correct the index; if that is meant, use jnp.take(x, index, axis, mode='clip')"
        )
    if True not in fitting:
        return form
    batched, together = fitting[True]
    if form is batched:
        try:
            rows = [evaluate(form, take(arguments, slice(i, i + 1))) for i in range(length(arguments))]
        except Exception as error:
            raise ValueError(
                f"{form.parameter} ({form.form}) fails for a batch of one transition: {first_line(error)}"
            ) from error
        alone = [np.concatenate(column) for column in zip(*rows, strict=True)]
    check_agreement(form, alone, together, arguments)
    # Of JAX a batch of single transitions is one call anyway.
    if form is not batched and form.framework != "jax" and _always_agree(form, batched, spaces):
        return dataclasses.replace(batched, fits_one=True)
    return form


def _always_agree(form: UserFunction, batched: UserFunction, spaces: Spaces) -> bool:
    """Whether batches of every size and order, and values of every scale, give what single transitions give."""
    rng = np.random.default_rng(0)
    with contextlib.suppress(Exception), warnings.catch_warnings(action="ignore"):
        for seed, scale in enumerate(_SCALES, 1):
            arguments = _draw(spaces, _LARGEST_BATCH, seed, scale)
            alone = evaluate(form, arguments)
            # Sizes that a function might take for an axis of its arguments.
            sizes = {1, 2, 3} | {n for n in _axes(arguments) if 0 < n <= _LARGEST_BATCH}
            batches = [rng.integers(_LARGEST_BATCH, size=n) for n in sorted(sizes)]
            for rows in (*batches, rng.permutation(_LARGEST_BATCH), np.zeros(5, int)):
                pairs = zip(take(alone, rows), evaluate(batched, take(arguments, rows)), strict=True)
                if any(differ(one, many, 1e-5).any() for one, many in pairs):
                    return False
        return True
    return False


# What to try with.


def _axes(arguments: Arguments) -> set[int]:
    """Sizes of all axes of one sample."""
    return {size for leaf in jax.tree.leaves(arguments) for size in leaf.shape[1:]}


def _draw(spaces: Spaces, n: int, seed: int = 0, scale: float = 1.0) -> Arguments:
    """Arguments ``[n, *shape]``, drawn with a generator of their own: the spaces' are the user's."""
    rng = np.random.default_rng(seed)
    return tuple(_draw_one(space, n, rng, scale) for space in spaces)


def _draw_one(space: gymnasium.Space, n: int, rng: np.random.Generator, scale: float) -> Any:
    """In the space's dtype: uniform, or standard normal where a bound is missing."""
    if isinstance(space, gymnasium.spaces.Dict):
        return {name: _draw_one(part, n, rng, scale) for name, part in space.spaces.items()}
    is_real = np.dtype(space.dtype).kind == "f"
    if isinstance(space, gymnasium.spaces.Box):
        most = np.inf if is_real else _UNBOUNDED
        bounds = np.stack([space.low, space.high])
        low, high = np.where(np.abs(bounds) > _UNBOUNDED, np.where(bounds > 0, most, -most), bounds).astype(
            space.dtype
        )
        space = gymnasium.spaces.Box(low, high, dtype=space.dtype.type)  # type: ignore[arg-type, union-attr]
    batch = batch_space(space, n)
    batch.seed(int(rng.integers(2**31)))
    values = batch.sample()
    return np.clip(values * scale, low, high).astype(space.dtype) if is_real else values
