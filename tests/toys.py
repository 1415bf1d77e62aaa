"""Small worlds whose episodes are known by heart."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct

from grpo_jax.spaces import ActionSpace, Box
from grpo_jax.types import Step
from grpo_jax.worlds.base import World


@struct.dataclass
class Line(World):
    """Walk right to the goal: action 1 adds 1, action 0 nothing; reward = position after the step.

    Terminates at ``goal``; truncated after ``limit`` steps. The observation is ``[position, time]``.
    """

    action_space: ActionSpace = struct.field(pytree_node=False)
    goal: int = struct.field(pytree_node=False, default=4)
    limit: int = struct.field(pytree_node=False, default=10)

    @property
    def observation_space(self) -> Box:  # type: ignore[override]
        return Box(np.zeros(2), np.full(2, 100.0), (2,))

    def reset(self, key: jax.Array) -> tuple[jax.Array, jax.Array]:
        del key
        state = jnp.zeros(2, jnp.int32)
        return state.astype(jnp.float32), state

    def step(self, key: jax.Array, state: jax.Array, action: jax.Array) -> Step:
        del key
        moved = jnp.sum(jnp.asarray(action > 0, jnp.int32)) > 0
        state = state + jnp.array([0, 1]) + jnp.array([1, 0]) * moved
        return Step(
            observation=state.astype(jnp.float32),
            state=state,
            reward=state[0].astype(jnp.result_type(float)),
            terminated=state[0] >= self.goal,
            truncated=state[1] >= self.limit,
        )


@struct.dataclass
class MaskedLine(Line):
    """The same, but standing still is forbidden."""

    def action_mask(self, state: jax.Array) -> jax.Array:
        del state
        return jnp.array([False, True])
