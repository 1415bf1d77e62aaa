"""Small worlds whose episodes are known by heart."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct

from grpo_jax.policies.distributions import for_space
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


@struct.dataclass
class Maze(World):
    """Rooms with doors: each room forbids some actions, and one that is forbidden pays NaN and ends the episode.

    The state is ``[room, time]``, the observation the room as one of ``N_ROOMS``. Terminates after ``limit`` steps in a room
    in which nothing at all is allowed.
    """

    action_space: ActionSpace = struct.field(pytree_node=False)
    limit: int = struct.field(pytree_node=False, default=5)

    N_ROOMS = 6

    @property
    def observation_space(self) -> Box:  # type: ignore[override]
        return Box(np.zeros(self.N_ROOMS), np.ones(self.N_ROOMS), (self.N_ROOMS,))

    def table(self) -> np.ndarray:
        """Masks of all rooms, bool ``[N_ROOMS + 1, P]``: the first room leaves one choice, the last one none."""
        nvec = self.action_space.nvec  # type: ignore[union-attr]
        parts = []
        for n in nvec:
            part = np.random.default_rng(n).random((self.N_ROOMS + 1, n)) < 0.6
            part[np.arange(self.N_ROOMS), np.arange(self.N_ROOMS) % n] = True
            part[0] = np.arange(n) == n - 1
            parts.append(part)
        table = np.concatenate(parts, axis=1)
        table[-1] = False
        return table

    def reset(self, key: jax.Array) -> tuple[jax.Array, jax.Array]:
        state = jnp.array([0, 0]).at[0].set(jax.random.randint(key, (), 0, self.N_ROOMS))
        return self._see(state), state

    def step(self, key: jax.Array, state: jax.Array, action: jax.Array) -> Step:
        del key
        distribution = for_space(self.action_space)
        index = distribution.index(jnp.asarray(action, jnp.int32))  # type: ignore[union-attr]
        is_allowed = distribution.allows(self.action_mask(state), action)  # type: ignore[union-attr]
        room, time = (3 * state[0] + index + 1) % self.N_ROOMS, state[1] + 1
        over = (time >= self.limit) | ~is_allowed
        state = jnp.stack([jnp.where(over, self.N_ROOMS, room), time])
        return Step(
            observation=self._see(state),
            state=state,
            reward=jnp.where(is_allowed, (index + 1.0) * (room + 1.0), jnp.nan),
            terminated=over,
            truncated=jnp.bool_(False),
        )

    def action_mask(self, state: jax.Array) -> jax.Array:
        return jnp.asarray(self.table())[state[0]]

    def _see(self, state: jax.Array) -> jax.Array:
        return jax.nn.one_hot(state[0], self.N_ROOMS)
