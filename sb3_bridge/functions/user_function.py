"""A user's function of transitions in a known form: JAX, NumPy or torch, for one transition or for a batch.

A function of JAX is traced like any other code; NumPy and torch run on the host. Which form it is ``detect`` finds out.
"""

from __future__ import annotations

import abc
import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar, Literal, Self

import jax
import jax.numpy as jnp
import numpy as np

from sb3_bridge.functions import host_call
from sb3_bridge.functions.programs import OwnedJit, borrow
from sb3_bridge.functions.results import (
    Arguments,
    Output,
    Unfit,
    differ,
    finite_rows,
    first_line,
    length,
    shapes,
    shown,
    take,
)

Framework = Literal["jax", "numpy", "torch"]
FRAMEWORKS: dict[Framework, str] = {"jax": "JAX", "numpy": "NumPy", "torch": "torch"}
_GUARD_EVERY = 64


@dataclass(frozen=True)
class UserFunction(abc.ABC):
    """A user's function in a known form; equal for equal functions, so that it can be static under ``jit``.

    Attributes:
      function: the user's; pure, of one transition or of a batch of them, row by row.
      framework: what its arguments are: traced JAX arrays, NumPy arrays or torch CPU tensors.
      takes_batch: whether arguments and results are ``[N, *shape]`` instead of ``[*shape]``.
      fits_one: whether a function that is called for batches also takes one transition, with equal results; now and
        then one row of a batch is compared with that.
    """

    function: Callable[..., Any]
    framework: Framework
    takes_batch: bool
    fits_one: bool = field(default=False, kw_only=True, compare=False)

    parameter: ClassVar[str]  # what the user passes it as
    argument_names: ClassVar[tuple[str, ...]]
    returns: ClassVar[str]  # what it must return, for errors

    @property
    @abc.abstractmethod
    def outputs(self) -> tuple[Output, ...]:
        """What it must return for each sample."""

    @abc.abstractmethod
    def parts(self, result: Any) -> tuple[Any, ...]:
        """What the user returned, as one part for each output; raises ``Unfit``."""

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
        """The outputs ``[*shape]`` of one sample, traceable under ``jit`` and ``vmap``.

        However deep it is vmapped, and inside of loops: the host is called once for the whole batch.
        """
        arguments = jax.tree.map(jnp.asarray, arguments)
        if self.framework != "jax":
            return host_call.call(self, arguments)
        if not self.takes_batch:
            return traced(self, arguments, ())
        return [leaf[0] for leaf in traced(self, jax.tree.map(lambda leaf: leaf[None], arguments), (1,))]

    def on_host(self, arguments: Arguments) -> list[np.ndarray]:
        """Every output ``[N, *shape]`` of N >= 1 samples, for ``host_call``.

        Raises:
          ValueError: wrong structure, shape or kind of number; or NaN or inf where the arguments have none.
          RuntimeError: the function raised.
        """
        results = guarded(self, arguments)
        check_finite(self, results, arguments, finite_arguments_only=True)
        return results


# Evaluation.


def evaluate(form: UserFunction, arguments: Arguments) -> list[np.ndarray]:
    """Every output ``[N, *shape]`` of N >= 1 samples, not checked to be finite.

    Raises:
      Unfit: wrong structure, shape or kind of number.
      Exception: whatever the function raises.
    """
    if form.framework == "jax":
        return [np.asarray(leaf) for leaf in _evaluate_traced.of(form)(form.borrowed, *arguments)]
    n_samples, outputs = length(arguments), form.outputs
    arguments = tuple(
        jax.tree.map(lambda leaf: leaf.astype(np.int64) if leaf.dtype.kind == "i" else leaf, argument)
        if name == "action"
        else argument
        for name, argument in zip(form.argument_names, arguments, strict=True)
    )
    # Copies: what XLA or a rollout owns must survive a function that writes into its arguments.
    arguments = jax.tree.map(_to_torch if form.framework == "torch" else np.array, arguments)
    with _host_context(form.framework):
        if form.takes_batch:
            parts = zip(form.parts(form.function(*arguments)), outputs, strict=True)
            return [output.fit(part, (n_samples,)).astype(output.dtype) for part, output in parts]
        # Filled row by row: a list of parts for each sample would keep the garbage collector busy.
        results = [np.empty((n_samples, *output.shape), output.dtype) for output in outputs]
        places = tuple(zip(results, outputs, strict=True))
        for i, row in enumerate(zip(*map(_rows, arguments), strict=True)):
            for part, (result, output) in zip(form.parts(form.function(*row)), places, strict=True):
                result[i] = output.fit(part)
        return results


def guarded(form: UserFunction, arguments: Arguments) -> list[np.ndarray]:
    """``evaluate`` whose errors show the transition that they are due to.

    Raises:
      ValueError: wrong structure, shape or kind of number; or another result in a batch than alone.
      RuntimeError: the function raised.
    """
    try:
        results = evaluate(form, arguments)
    except Exception as error:
        kind, verb = (ValueError, "") if isinstance(error, Unfit) else (RuntimeError, "raised ")
        said, place = first_line(error), f"a batch of states {shapes(arguments[0])}"
        for row in range(length(arguments)):
            try:
                evaluate(form, take(arguments, slice(row, row + 1)))
            except Exception as same:
                said, place = first_line(same), shown(form.argument_names, arguments, row)
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


def check_agreement(
    form: UserFunction,
    alone: list[np.ndarray],
    together: list[np.ndarray],
    arguments: Arguments,
    origin: str = "",
) -> None:
    """Raises ValueError where outputs ``[N, *shape]`` of transitions alone and together differ by more than rounding."""
    for output, one, many in zip(form.outputs, alone, together, strict=True):
        differs = differ(one, many, 1e-3)
        if differs.any():
            row = int(np.argmax(differs))
            raise ValueError(
                f"{form.parameter} ({FRAMEWORKS[form.framework]}) gives {output.shown(many[row])} for a transition"
                f" in a batch and {output.shown(one[row])} for the same transition alone: it must depend on nothing"
                f" else than {shown(form.argument_names, arguments, row)}{origin}; not on the rest of a batch, nor on random numbers"
            )


def check_finite(
    form: UserFunction,
    results: list[np.ndarray],
    arguments: Arguments,
    *,
    finite_arguments_only: bool = False,
    origin: str = "",
) -> None:
    """Raises ValueError for outputs ``[N, *shape]`` that are NaN or inf, and shows the first transition that has them.

    With ``finite_arguments_only`` results of arguments that are not finite themselves may be anything.
    """
    passes = finite_rows(results)
    if finite_arguments_only and not passes.all():
        passes |= ~finite_rows(jax.tree.leaves(arguments))
    if not passes.all():
        row = int(np.argmin(passes))
        wrong = next(i for i, result in enumerate(results) if not np.isfinite(result[row]).all())
        raise ValueError(
            f"{form.parameter} returned {form.outputs[wrong].shown(results[wrong][row])} for"
            f" {shown(form.argument_names, arguments, row)}{origin}; it must be finite: guard divisions, logarithms and roots"
        )


def traced(form: UserFunction, arguments: Arguments, lead: tuple[int, ...]) -> list[jax.Array]:
    """The outputs of a function of JAX, ``[*lead, *shape]``; ``lead`` is ``(N,)`` for a batch."""
    parts = zip(form.parts(form.function(*arguments)), form.outputs, strict=True)
    return [output.fit(part, lead, jnp.asarray).astype(output.dtype) for part, output in parts]


def _traced(form: UserFunction, *arguments: Any) -> list[jax.Array]:
    if form.takes_batch:
        return traced(form, arguments, (length(arguments),))
    return jax.vmap(lambda *one: traced(form, one, ()))(*arguments)


_evaluate_traced = OwnedJit(_traced, static_argnames="form")


@contextlib.contextmanager
def _host_context(framework: Framework) -> Iterator[None]:
    with contextlib.ExitStack() as stack:
        # Non-finite results are reported with their transition, which says more than NumPy's warning.
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
