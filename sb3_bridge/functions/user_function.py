"""A user's function of transitions in a known form: JAX, NumPy or torch, for one transition or for a batch.

A function of JAX is traced like any other code; NumPy and torch run on the host. Which form it is ``detect`` finds out.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar, Literal, Self

import jax
import jax.numpy as jnp
import numpy as np
import torch

from sb3_bridge.functions import host_call
from sb3_bridge.functions.programs import OwnedJit, borrow
from sb3_bridge.numbers import BadNumberError

Arguments = tuple[Any, ...]  # of a user's function; each an array, or a dict of arrays
Framework = Literal["jax", "numpy", "torch"]
FRAMEWORKS: dict[Framework, str] = {"jax": "JAX", "numpy": "NumPy", "torch": "torch"}
_GUARD_EVERY = 64
_ARRAYS = (np.ndarray, np.generic, jax.Array, float, int, list)
# Of the kinds of dtypes: what they are called, and which kinds may be cast to them.
_KINDS = {
    "f": ("real numbers", "biuf"),
    "i": ("integers", "biu"),
    "u": ("integers", "biu"),
    "b": ("booleans", "b"),
}


class Unfit(ValueError):
    """The function returned, but not what its form must return."""


@dataclass(frozen=True)
class Output:
    """One array that a user's function must return for each sample."""

    name: str  # what errors call it; empty for the only output of a function
    shape: tuple[int, ...]  # a number [] may also come as [1]
    dtype: np.dtype  # what the array is cast to; see _KINDS

    def fit(self, part: Any, lead: tuple[int, ...] = (), asarray: Callable[[Any], Any] = np.asarray) -> Any:
        """What was returned as an array ``[*lead, *shape]``, not cast yet; ``lead`` is ``(N,)`` for a batch."""
        what, (noun, kinds) = f"{self.name} of " if self.name else "", _KINDS[self.dtype.kind]
        if isinstance(part, torch.Tensor):
            part = part.detach().cpu()
            part = (part.double() if part.is_floating_point() else part).numpy()  # NumPy knows no bfloat16
        array = asarray(part) if isinstance(part, _ARRAYS) else None
        if array is None or array.dtype.kind not in kinds:
            got = type(part).__name__ if array is None else f"{array.dtype} numbers"
            raise Unfit(f"returned {what}{got}, expected one array of {noun}")
        shape = (*lead, *self.shape)
        # A batch of one may have lost its axis to a `squeeze()`.
        fits = array.shape == shape or (lead == (1,) and array.shape == self.shape)
        if not (fits or (self.shape == () and array.shape == (*lead, 1))):
            sizes = ", ".join([*("N" for _ in lead), *map(str, self.shape)])
            other = "" if self.shape else f" or [{'N, ' * len(lead)}1]"
            n = f" with N={lead[0]}" if lead else ""
            raise Unfit(f"returned {what}shape {list(array.shape)}, expected [{sizes}]{other}{n}")
        return array.reshape(shape)

    def shown(self, value: Any) -> str:
        return f"{self.name}={_text(value)}" if self.name else _text(value)


@dataclass(frozen=True)
class UserFunction:
    """A user's function in a known form; equal for equal functions, so that it can be static under ``jit``."""

    function: Callable[..., Any]  # the user's; pure, of one transition or of a batch of them, row by row
    framework: Framework  # what its arguments are: traced JAX arrays, NumPy arrays or torch CPU tensors
    takes_batch: bool  # whether arguments and results are [N, *shape] instead of [*shape]
    # Whether one that takes batches also takes one transition; now and then a row is compared with that.
    fits_one: bool = field(default=False, kw_only=True, compare=False)

    parameter: ClassVar[str]  # what the user passes it as
    argument_names: ClassVar[tuple[str, ...]]
    returns: ClassVar[str]  # what it must return, for errors

    @property
    def outputs(self) -> tuple[Output, ...]:
        """What it must return for each sample."""
        raise NotImplementedError

    def parts(self, result: Any) -> tuple[Any, ...]:
        """What the user returned, as one part for each output; raises ``Unfit``."""
        return (result,)

    def attempt(self, arguments: Arguments) -> tuple[Self, list[np.ndarray]]:
        """The form, completed by what shows only when it is tried, and its results; see ``evaluate``."""
        return self, evaluate(self, arguments)

    @property
    def borrowed(self) -> Self:
        """The same with the function held weakly: the form for programs of an :class:`OwnedJit`."""
        return replace(self, function=borrow(self.function))

    @property
    def description(self) -> str:
        """What was found out, in one line for the log."""
        return f"{self.parameter}: {self.form}"

    @property
    def form(self) -> str:
        many = "batches of transitions" if self.takes_batch else "one transition at a time"
        return f"{FRAMEWORKS[self.framework]}, {many}"

    def of_one(self, *arguments: Any) -> list[jax.Array]:
        """The outputs ``[*shape]`` of one sample, traceable; vmapped or not, the host is called once."""
        arguments = jax.tree.map(jnp.asarray, arguments)
        if self.framework != "jax":
            return host_call.call(self, arguments)
        if not self.takes_batch:
            return traced(self, arguments)
        return take(traced(self, jax.tree.map(lambda leaf: leaf[None], arguments), (1,)), 0)

    def on_host(self, arguments: Arguments) -> list[np.ndarray]:
        """Every output ``[N, *shape]`` of N >= 1 samples, for ``host_call``; finite where the arguments are."""
        results = guarded(self, arguments)
        if not finite_rows(results).all():
            rows = finite_rows(jax.tree.leaves(arguments))
            check_finite(self, take(results, rows), take(arguments, rows))
        return results


# Evaluation.


def evaluate(form: UserFunction, arguments: Arguments) -> list[np.ndarray]:
    """Every output ``[N, *shape]`` of N >= 1 samples, not checked to be finite; raises what the function does."""
    if form.framework == "jax":
        return [np.asarray(leaf) for leaf in _evaluate_traced.of(form)(form.borrowed, *arguments)]
    n_samples, outputs = length(arguments), form.outputs
    state, action, *others = arguments
    if action.dtype.kind == "i":
        action = action.astype(np.int64)
    # Copies: what XLA or a rollout owns must survive a function that writes into its arguments.
    arguments = jax.tree.map(_to_torch if form.framework == "torch" else np.array, (state, action, *others))
    with _host_context(form.framework):
        if form.takes_batch:
            return _fit(form, form.function(*arguments), (n_samples,))
        # Filled row by row: a list of parts for each sample would keep the garbage collector busy.
        results = [np.empty((n_samples, *output.shape), output.dtype) for output in outputs]
        places = tuple(zip(results, outputs, strict=True))
        for i, row in enumerate(zip(*map(_rows, arguments), strict=True)):
            for part, (result, output) in zip(form.parts(form.function(*row)), places, strict=True):
                result[i] = output.fit(part)
        return results


def traced(form: UserFunction, arguments: Arguments, lead: tuple[int, ...] = ()) -> list[jax.Array]:
    """The outputs of a function of JAX, ``[*lead, *shape]``; ``lead`` is ``(N,)`` for a batch."""
    return _fit(form, form.function(*arguments), lead, jnp.asarray)


def _fit(form: UserFunction, result: Any, *how: Any) -> list[Any]:
    parts = zip(form.parts(result), form.outputs, strict=True)
    return [output.fit(part, *how).astype(output.dtype) for part, output in parts]


def _traced(form: UserFunction, *arguments: Any) -> list[jax.Array]:
    if form.takes_batch:
        return traced(form, arguments, (length(arguments),))
    return jax.vmap(lambda *one: traced(form, one))(*arguments)


_evaluate_traced = OwnedJit(_traced, static_argnames="form")


def guarded(form: UserFunction, arguments: Arguments) -> list[np.ndarray]:
    """``evaluate`` whose errors show the transition: RuntimeError where the function raised, else ValueError."""
    try:
        results = evaluate(form, arguments)
    except Exception as error:
        kind, verb = (ValueError, "") if isinstance(error, Unfit) else (RuntimeError, "raised ")
        said, place = first_line(error), f"a batch of states {shapes(arguments[0])}"
        for row in range(length(arguments)):
            try:
                evaluate(form, take(arguments, slice(row, row + 1)))
            except Exception as same:
                said, place = first_line(same), _shown(form, arguments, row)
                break
        raise kind(f"{form.parameter} {verb}{said} for {place}") from error
    if form.fits_one:
        _compare_a_row(form, results, arguments)
    return results


def _compare_a_row(form: UserFunction, results: list[np.ndarray], arguments: Arguments) -> None:
    """Compares one row with the function of that transition alone: at the calls 1, 2, 4, ..., and every 64th."""
    calls = vars(form)["_calls"] = vars(form).get("_calls", 0) + 1
    if calls & (calls - 1) and calls % _GUARD_EVERY:
        return
    row = calls * 2654435761 % 2**32 * length(arguments) >> 32
    one = take(arguments, slice(row, row + 1))
    if finite_rows(jax.tree.leaves(one)).all():
        alone = guarded(replace(form, takes_batch=False, fits_one=False), one)
        check_agreement(form, alone, take(results, slice(row, row + 1)), one)


def check_agreement(form: UserFunction, alone: list[Any], together: list[Any], arguments: Arguments) -> None:
    """Raises ValueError where outputs ``[N, *shape]`` of transitions alone and together differ by more than rounding."""
    for output, one, many in zip(form.outputs, alone, together, strict=True):
        differs = differ(one, many, 1e-3)
        if differs.any():
            row = int(np.argmax(differs))
            raise ValueError(
                f"{form.parameter} ({FRAMEWORKS[form.framework]}) gives {output.shown(many[row])} for a transition"
                f" in a batch and {output.shown(one[row])} for the same transition alone: it must depend on nothing"
                f" else than {_shown(form, arguments, row)}; not on the rest of a batch, nor on random numbers"
            )


def check_finite(form: UserFunction, results: list[np.ndarray], arguments: Arguments) -> None:
    """Raises ValueError for outputs ``[N, *shape]`` that are NaN or inf, and shows the first transition that has them."""
    for output, result in zip(form.outputs, results, strict=True):
        passes = finite_rows([result])
        if not passes.all():
            row = int(np.argmin(passes))
            raise BadNumberError(
                f"{form.parameter} returned {output.shown(result[row])} for {_shown(form, arguments, row)};"
                " it must be finite: guard divisions, logarithms and roots"
            )


@contextlib.contextmanager
def _host_context(framework: Framework) -> Iterator[None]:
    with (
        # Non-finite results are reported with their transition, which says more than NumPy's warning.
        np.errstate(all="ignore"),
        # JAX on concrete values within a callback could wait for the very thread that calls: it is refused.
        jax.transfer_guard_host_to_device("disallow_explicit"),
        torch.set_grad_enabled(framework != "torch" and torch.is_grad_enabled()),
    ):
        try:
            yield
        except jax.errors.JaxRuntimeError as error:
            raise TypeError(
                "it calls JAX on concrete values: make it traceable (jnp.where instead of Python branches), or use"
                f" no JAX in it ({str(error).splitlines()[0]})"
            ) from error


def _to_torch(array: np.ndarray) -> torch.Tensor:
    is_wide = array.dtype.kind in "iu" and array.dtype != np.uint8
    dtype = np.float32 if array.dtype.kind == "f" else np.int64 if is_wide else array.dtype
    return torch.from_numpy(np.array(array, dtype))


def _rows(tree: Any) -> Any:
    """Iterates over the samples of arrays or tensors ``[N, ...]``, or of a dict of them."""
    if isinstance(tree, dict):
        return (dict(zip(tree, row, strict=True)) for row in zip(*map(_rows, tree.values()), strict=True))
    return tree


# Samples, and how errors show them.


def length(arguments: Any) -> int:
    """N of arrays ``[N, ...]``."""
    return len(jax.tree.leaves(arguments)[0])


def take(tree: Any, index: Any) -> Any:
    """Rows of every array."""
    return jax.tree.map(lambda leaf: leaf[index], tree)


def finite_rows(leaves: list[np.ndarray]) -> np.ndarray:
    """Which rows of all arrays ``[N, ...]`` are finite, bool ``[N]``."""
    return np.all([np.isfinite(leaf).reshape(len(leaf), -1).all(axis=1) for leaf in leaves], axis=0)


def differ(one: np.ndarray, many: np.ndarray, tolerance: float) -> np.ndarray:
    """Which of N samples differ by more than a part of their size, and a tenth of it of the largest; bool ``[N]``."""
    if one.dtype.kind == "f":
        finite = np.where(np.isfinite(one), np.abs(one), 0.0)
        allowed = tolerance * np.abs(many) + 0.1 * tolerance * np.maximum(1.0, np.max(finite, axis=0))
        differs = ~((np.abs(one - many) <= allowed) | np.isclose(one, many, 0.0, 0.0, equal_nan=True))
    else:
        # Rounding may take pixels one apart; all other integers are categories.
        differs = np.abs(one.astype(int) - many) > (one.dtype.kind == "u")
    return differs.reshape(len(one), -1).any(axis=1)


def shapes(tree: Any) -> str:
    """Shapes of arrays as text."""
    return str(jax.tree.map(lambda leaf: list(np.shape(leaf)), tree))


def first_line(error: Exception) -> str:
    """An error in one line; of ``Unfit`` only the message."""
    line = (str(error).strip().splitlines() or [""])[0]
    return line if isinstance(error, Unfit) else f"{type(error).__name__}: {line}"


def _shown(form: UserFunction, arguments: Arguments, row: int) -> str:
    parts = zip(form.argument_names, take(arguments, row), strict=True)
    return ", ".join(f"{name}={_text(part)}" for name, part in parts)


def _text(tree: Any) -> str:
    if isinstance(tree, dict):
        return "{" + ", ".join(f"{name!r}: {_text(part)}" for name, part in tree.items()) + "}"
    text = np.array2string(np.asarray(tree), precision=6, separator=", ", threshold=64, edgeitems=2)
    return " ".join(text.split())
