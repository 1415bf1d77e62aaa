"""A user's ``dynamics(state, action)``: JAX, NumPy or torch, per sample or batched, with or without an end."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar, Self

import gymnasium
import jax
import jax.numpy as jnp
import numpy as np

from grpo_jax.spaces import Dict, Space, from_gymnasium
from sb3_bridge.functions.detect import resolve
from sb3_bridge.functions.user_function import Arguments, Output, Unfit, UserFunction


class _TellsEnd(Unfit):
    pass


@dataclass(frozen=True)
class Transition(UserFunction):
    """A transition function in a known form: ``(state, action) -> next_state`` or ``-> (next_state, terminated)``.

    A ``next_state`` with NaN or inf is an error that shows state and action, inside ``jit`` for NumPy and torch only,
    and for finite arguments. Branches step on after an end until all of them have ended: it must be finite there too.
    """

    tells_end: bool  # whether it returns (next_state, terminated)
    observation_space: Space  # of state and next_state

    parameter: ClassVar[str] = "dynamics"
    argument_names: ClassVar[tuple[str, ...]] = ("state", "action")
    returns: ClassVar[str] = (
        "next_state or (next_state, terminated): of a transition an observation and a boolean ([] or [1]), or of a"
        " batch of N its observations and N booleans ([N] or [N, 1])"
    )

    @property
    def outputs(self) -> tuple[Output, ...]:
        space = self.observation_space
        states: list[tuple[str, Any]] = [("next_state", space)]
        if isinstance(space, Dict):
            states = [(f"next_state[{name!r}]", part) for name, part in space.spaces]
        ends = [Output("terminated", (), np.dtype(bool))] if self.tells_end else []
        return (*(Output(name, part.shape, _dtype(part)) for name, part in states), *ends)

    def parts(self, result: Any) -> tuple[Any, ...]:
        end: tuple[Any, ...] = ()
        if isinstance(result, tuple):
            if len(result) != 2:
                raise Unfit(f"returned a tuple of {len(result)}, expected (next_state, terminated)")
            if not self.tells_end:
                raise _TellsEnd("returned (next_state, terminated) instead of next_state alone")
            result, end = result[0], result[1:]
        elif self.tells_end:
            raise Unfit("returned next_state alone instead of (next_state, terminated)")
        if not isinstance(self.observation_space, Dict):
            return (result, *end)
        names = list(dict(self.observation_space.spaces))
        if not isinstance(result, dict) or result.keys() != set(names):
            got = f"names {list(result)}" if isinstance(result, dict) else type(result).__name__
            raise Unfit(f"returned next_state of {got}, expected a dict of {names}")
        return (*(result[name] for name in names), *end)

    def attempt(self, arguments: Arguments) -> tuple[Self, list[np.ndarray]]:
        try:
            return super().attempt(arguments)
        except _TellsEnd:
            return dataclasses.replace(self, tells_end=True).attempt(arguments)

    def __call__(self, state: Any, action: Any) -> Any:
        """Where one action leads, traceable: ``next_state`` or ``(next_state, terminated)``; see ``of_one``.

        Real numbers are JAX's default float, images and other integer boxes have the space's dtype, categories are int32.
        """
        leaves = self.of_one(state, action)
        ends = [leaves.pop()] if self.tells_end else []
        next_state: Any = leaves[0]
        if isinstance(self.observation_space, Dict):
            next_state = dict(zip(dict(self.observation_space.spaces), leaves, strict=True))
        return (next_state, *ends) if ends else next_state


def resolve_transition(
    function: Callable[..., Any], observation_space: gymnasium.Space, action_space: gymnasium.Space
) -> Transition:
    """Finds out, by trying, what kind of transition function this is; see ``detect.resolve`` for errors.

    It is ``(state, action) -> next_state`` or ``-> (next_state, terminated)``, pure, of one transition or of a batch, row
    by row. NumPy and torch get integer actions as int64; torch gets floats as float32, on the CPU. Of integers
    ``next_state`` must be integers, and ``terminated`` must be booleans. Observations that no world can have raise a
    NotImplementedError.
    """
    space = from_gymnasium(observation_space, "observation_space")
    untried = Transition(function, "jax", takes_batch=False, tells_end=False, observation_space=space)
    return resolve(untried, (observation_space, action_space))


def _dtype(space: Space) -> np.dtype:
    """What worlds have the observations of a space in."""
    dtype = np.dtype(getattr(space, "dtype", np.int32))
    return np.dtype(jnp.result_type(float) if dtype.kind == "f" else jax.dtypes.canonicalize_dtype(dtype))
