"""A user's ``reward_function(state, action, next_state)``: JAX, NumPy or torch, per sample or batched."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import gymnasium
import jax
import jax.numpy as jnp
import numpy as np

from sb3_bridge.functions.detect import resolve
from sb3_bridge.functions.host_call import original_errors as original_errors
from sb3_bridge.functions.user_function import Output, UserFunction, check_finite, guarded, shapes


@dataclass(frozen=True)
class Reward(UserFunction):
    """A reward function in a known form; a reward that is NaN or inf is an error that shows the transition.

    Inside ``jit`` that holds for NumPy and torch only, and for finite states: what a world gives after an end counts
    for nothing. JAX passes an error in there on as a ``JaxRuntimeError``; see ``original_errors``.
    """

    parameter: ClassVar[str] = "reward_function"
    argument_names: ClassVar[tuple[str, ...]] = ("state", "action", "next_state")
    returns: ClassVar[str] = "one reward for a transition ([] or [1]), or N for a batch of N ([N] or [N, 1])"

    @property
    def outputs(self) -> tuple[Output, ...]:
        return (Output("", (), np.dtype(jnp.result_type(float))),)

    def __call__(self, state: Any, action: Any, next_state: Any) -> jax.Array:
        """The reward of one transition, traceable: ``[]`` in JAX's default float; see ``of_one``."""
        return self.of_one(state, action, next_state)[0]

    def batch(self, states: Any, actions: Any, next_states: Any) -> np.ndarray:
        """The rewards float32 ``[N]`` of transitions ``[N, *shape]`` of ordinary environments, on the host.

        Raises:
          ValueError: a reward is NaN or inf, or has the wrong shape; or the arguments differ in length.
          RuntimeError: the function raised.
        """
        transitions = jax.tree.map(np.asarray, (states, actions, next_states))
        lengths = {leaf.shape[:1] for leaf in jax.tree.leaves(transitions)}
        if len(lengths) != 1 or lengths == {()}:
            got = f"got shapes {shapes(transitions)}"
            raise ValueError(f"states, actions, next_states must be arrays [N, ...] of one N, {got}")
        if lengths == {(0,)}:
            return np.zeros(0, np.float32)
        results = [rewards.astype(np.float32) for rewards in guarded(self, transitions)]
        check_finite(self, results, transitions)
        return results[0]


def resolve_reward(
    function: Callable[..., Any], observation_space: gymnasium.Space, action_space: gymnasium.Space
) -> Reward:
    """Finds out, by trying, what kind of reward function this is; see ``detect.resolve`` for errors.

    It is ``(state, action, next_state) -> reward``, pure, of one transition (``[*shape]`` to ``[]`` or ``[1]``) or of a
    batch, row by row (``[N, *shape]`` to ``[N]`` or ``[N, 1]``). NumPy and torch get integer actions as int64; torch
    gets floats as float32, on the CPU.
    """
    spaces = (observation_space, action_space, observation_space)
    return resolve(Reward(function, "jax", takes_batch=False), spaces)
