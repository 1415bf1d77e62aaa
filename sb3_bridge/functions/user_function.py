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

Framework = Literal["jax", "numpy", "torch"]
Arguments = tuple[Any, ...]  # of a user's function; each an array, or a dict of arrays

FRAMEWORKS: dict[Framework, str] = {"jax": "JAX", "numpy": "NumPy", "torch": "torch"}
_ARRAYS = (np.ndarray, np.generic, jax.Array, float, int, list)

# Of the kinds of dtypes: what they are called, which kinds may be cast to them, and which Python numbers.
_KINDS: dict[str, tuple[str, str, tuple[type, ...]]] = {
    "f": ("real number", "biuf", (float, int)),
    "i": ("integer", "biu", (int,)),
    "u": ("integer", "biu", (int,)),
    "b": ("boolean", "b", (bool,)),
}
_GUARD_EVERY = 64


class Unfit(ValueError):
    """The function returned, but not what its form must return."""


@dataclass(frozen=True)
class Output:
    """One array that a user's function must return for each sample.

    Attributes:
      name: what errors call it; empty for the only output of a function.
      shape: of one sample. A number ``[]`` may also come as ``[1]``.
      dtype: what the array is cast to. Real numbers take all but complex ones, integers take no real numbers, and
        booleans take only booleans.
    """

    name: str
    shape: tuple[int, ...]
    dtype: np.dtype


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
            return [_fitted(part, output, (n_samples,)).astype(output.dtype) for part, output in parts]
        # Filled row by row: a list of parts for each sample would keep the garbage collector busy.
        results = [np.empty((n_samples, *output.shape), output.dtype) for output in outputs]
        places = tuple(zip(results, outputs, strict=True))
        for i, row in enumerate(zip(*map(_rows, arguments), strict=True)):
            for part, (result, output) in zip(form.parts(form.function(*row)), places, strict=True):
                result[i] = _fitted(part, output) if output.shape else _fitted_number(part, output)
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
                said, place = first_line(same), shown(form, arguments, row)
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
    if _finite_rows(jax.tree.leaves(one)).all():
        alone = guarded(replace(form, takes_batch=False, fits_one=False), one)
        check_agreement(form, alone, take(results, slice(row, row + 1)), one)


def check_agreement(
    form: UserFunction,
    alone: list[np.ndarray],
    together: list[np.ndarray],
    arguments: Arguments,
    origin: str = "",
) -> None:
    """Refuses a function whose result for a transition depends on the rest of a batch.

    Args:
      form: what was evaluated.
      alone: its outputs ``[N, *shape]`` for one transition at a time.
      together: the same for a batch.
      arguments: of the N samples.
      origin: where the arguments are from.

    Raises:
      ValueError: shows the first transition that differs by more than rounding.
    """
    for output, one, many in zip(form.outputs, alone, together, strict=True):
        differs = differ(one, many, 1e-3)
        if differs.any():
            row = int(np.argmax(differs))
            raise ValueError(
                f"{form.parameter} ({FRAMEWORKS[form.framework]}) gives {named(output, many[row])} for a transition"
                f" in a batch and {named(output, one[row])} for the same transition alone: it must depend on nothing"
                f" else than {shown(form, arguments, row)}{origin}; not on the rest of a batch, nor on random numbers"
            )


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


def check_finite(
    form: UserFunction,
    results: list[np.ndarray],
    arguments: Arguments,
    *,
    finite_arguments_only: bool = False,
    origin: str = "",
) -> None:
    """Refuses NaN and inf, and shows the first transition that has them.

    Args:
      form: what was evaluated.
      results: its outputs, ``[N, *shape]`` each.
      arguments: of N samples.
      finite_arguments_only: whether results of arguments that are not finite themselves may be anything.
      origin: where the arguments are from.

    Raises:
      ValueError: shows the arguments.
    """
    passes = _finite_rows(results)
    if finite_arguments_only and not passes.all():
        passes |= ~_finite_rows(jax.tree.leaves(arguments))
    if not passes.all():
        row = int(np.argmin(passes))
        wrong = next(i for i, result in enumerate(results) if not np.isfinite(result[row]).all())
        raise ValueError(
            f"{form.parameter} returned {named(form.outputs[wrong], results[wrong][row])} for"
            f" {shown(form, arguments, row)}{origin}; it must be finite: guard divisions, logarithms and roots"
        )


def traced(form: UserFunction, arguments: Arguments, lead: tuple[int, ...]) -> list[jax.Array]:
    """The outputs of a function of JAX, ``[*lead, *shape]``; ``lead`` is ``(N,)`` for a batch."""
    parts = zip(form.parts(form.function(*arguments)), form.outputs, strict=True)
    return [_fitted(part, output, lead, jnp.asarray).astype(output.dtype) for part, output in parts]


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


def _fitted(
    part: Any, output: Output, lead: tuple[int, ...] = (), asarray: Callable[[Any], Any] = np.asarray
) -> Any:
    """What a user returned as an array ``[*lead, *shape]``, not cast yet; ``lead`` is ``(N,)`` for a batch."""
    noun, kinds, _ = _KINDS[output.dtype.kind]
    if hasattr(part, "detach"):
        part = part.detach().cpu()
        part = (part.double() if part.is_floating_point() else part).numpy()  # NumPy knows no bfloat16
    array = asarray(part) if isinstance(part, _ARRAYS) else None
    if array is None or array.dtype.kind not in kinds:
        got = type(part).__name__ if array is None else f"{array.dtype} numbers"
        raise Unfit(f"returned {_of(output)}{got}, expected one array of {noun}s")
    shape = (*lead, *output.shape)
    # A batch of one may have lost its axis to a `squeeze()`.
    fits = array.shape == shape or (lead == (1,) and array.shape == output.shape)
    if not (fits or (output.shape == () and array.shape == (*lead, 1))):
        raise _wrong_shape(array.shape, output, lead)
    return array.reshape(shape)


def _fitted_number(part: Any, output: Output) -> Any:
    """The same for one number; the loop over samples is slow enough, so no array is made of it."""
    if not hasattr(part, "item"):
        part = _fitted(part, output)
    if tuple(part.shape) not in ((), (1,)):
        raise _wrong_shape(part.shape, output, ())
    value = part.item()
    noun, _, types = _KINDS[output.dtype.kind]
    if not isinstance(value, types):
        raise Unfit(f"returned {_of(output)}{type(value).__name__}, expected one {noun}")
    return value


def _wrong_shape(shape: Any, output: Output, lead: tuple[int, ...]) -> Unfit:
    sizes = [*("N" for _ in lead), *map(str, output.shape)]
    expected = f"[{', '.join(sizes)}]" + ("" if output.shape else f" or [{', '.join([*sizes, '1'])}]")
    n = f" with N={lead[0]}" if lead else ""
    return Unfit(f"returned {_of(output)}shape {list(shape)}, expected {expected}{n}")


def _finite_rows(leaves: list[np.ndarray]) -> np.ndarray:
    return np.all([np.isfinite(leaf).reshape(len(leaf), -1).all(axis=1) for leaf in leaves], axis=0)


# Arguments, and how errors show them.


def length(arguments: Any, name: str = "transitions") -> int:
    """N of arrays ``[N, ...]``.

    Raises:
      ValueError: they differ in it, or have no axis.
    """
    lengths = {np.shape(leaf)[:1] for leaf in jax.tree.leaves(arguments)}
    if len(lengths) != 1 or lengths == {()}:
        raise ValueError(f"{name} must be arrays [N, ...] of one N, got shapes {shapes(arguments)}")
    return lengths.pop()[0]


def take(tree: Any, index: Any) -> Any:
    """Rows of every array."""
    return jax.tree.map(lambda leaf: leaf[index], tree)


def shapes(tree: Any) -> str:
    """Shapes of arrays as text."""
    if isinstance(tree, dict):
        return "{" + ", ".join(f"{name!r}: {shapes(part)}" for name, part in tree.items()) + "}"
    if isinstance(tree, tuple):
        return ", ".join(map(shapes, tree))
    return str(list(np.shape(tree)))


def shown(form: UserFunction, arguments: Arguments, row: int) -> str:
    """One sample's arguments as text."""
    parts = zip(form.argument_names, take(arguments, row), strict=True)
    return ", ".join(f"{name}={_text(part)}" for name, part in parts)


def named(output: Output, value: Any) -> str:
    """One sample's output as text."""
    return f"{output.name}={_text(value)}" if output.name else _text(value)


def first_line(error: Exception) -> str:
    """An error in one line; of ``Unfit`` only the message."""
    line = (str(error).strip().splitlines() or [""])[0]
    return line if isinstance(error, Unfit) else f"{type(error).__name__}: {line}"


def _of(output: Output) -> str:
    return f"{output.name} of " if output.name else ""


def _text(tree: Any) -> str:
    if isinstance(tree, dict):
        return "{" + ", ".join(f"{name!r}: {_text(part)}" for name, part in tree.items()) + "}"
    text = np.array2string(np.asarray(tree), precision=6, separator=", ", threshold=64, edgeitems=2)
    return " ".join(text.split())
