"""Pgx' games as worlds: the learner is player 0, everybody else is part of the world.

Who begins is drawn at a reset. A step of the world is the learner's move and the moves of all others until it is the
learner's turn again; its reward is what the learner got for all of them.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct

from grpo_jax.spaces import Discrete, Space
from grpo_jax.types import PyTree, Step
from grpo_jax.worlds.base import World, strong
from grpo_jax.worlds.suites import box, floats, load, making, once, pixels, settled

Opponent = Callable[[PyTree, jax.Array, jax.Array, jax.Array], jax.Array]
"""``(opponent_params, key, observation [*O], action_mask bool [n]) -> action int []``, for one state, in JAX."""

LEARNER = 0
"""Pgx draws at a reset which player begins."""

ALTERNATING = (
    *("animal_shogi", "chess", "connect_four", "gardner_chess", "go_9x9", "go_19x19"),
    *("hex", "kuhn_poker", "othello", "shogi", "tic_tac_toe"),
)
"""Games in which two players move by turns; in others one of them may move twice."""


def random_opponent(
    params: PyTree, key: jax.Array, observation: jax.Array, action_mask: jax.Array
) -> jax.Array:
    """Any of the actions that are allowed."""
    del params, observation
    return jax.random.categorical(key, jnp.where(action_mask, 0.0, -jnp.inf))


@struct.dataclass
class PgxWorld(World):
    """A game of Pgx.

    Attributes:
      opponent_params: what ``opponent`` knows; traced, so ``world.replace(opponent_params=newer)`` compiles nothing anew.
      env: the game.
      opponent: how all others move.
      observation_space: static; what the player sees whose turn it is.
      action_space: static.
    """

    opponent_params: PyTree
    env: Any = struct.field(pytree_node=False)
    opponent: Opponent = struct.field(pytree_node=False)
    observation_space: Space = struct.field(pytree_node=False)
    action_space: Discrete = struct.field(pytree_node=False)

    def reset(self, key: jax.Array) -> tuple[jax.Array, PyTree]:
        key, others_key = jax.random.split(key)
        state = self._others(others_key, strong(self.env.init(key)))
        return floats(state.observation), state

    def step(self, key: jax.Array, state: PyTree, action: jax.Array) -> Step:
        key, others_key = jax.random.split(key)
        new = self._others(others_key, strong(self.env.step(state, action, key), like=state))
        reward = new.rewards[LEARNER]
        return settled(state, floats(new.observation), new, reward, new.terminated, new.truncated)

    def action_mask(self, state: PyTree) -> jax.Array:
        mask: jax.Array = state.legal_action_mask
        return mask

    def picture(self, state: PyTree) -> np.ndarray:
        drawing = state.to_svg()
        if "<text" in drawing or "<image" in drawing:
            raise NotImplementedError(
                f"pgx draws {self.env.id} with letters or images, which cannot be made pixels of here;"
                " state.save_svg(path) of a state writes its own picture"
            )
        return pixels(drawing)

    def _others(self, key: jax.Array, state: PyTree) -> PyTree:
        """Until it is the learner's turn; ``rewards`` are then those of all moves since the learner's, and of it."""

        def is_on(carry: tuple[jax.Array, PyTree]) -> jax.Array:
            on: jax.Array = (carry[1].current_player != LEARNER) & ~(carry[1].terminated | carry[1].truncated)
            return on

        def move(carry: tuple[jax.Array, PyTree]) -> tuple[jax.Array, PyTree]:
            key, old = carry
            key, move_key, chance_key = jax.random.split(key, 3)
            seen, mask = floats(old.observation), old.legal_action_mask
            action = self.opponent(self.opponent_params, move_key, seen, mask)
            new = strong(self.env.step(old, action, chance_key), like=old)
            return key, new.replace(rewards=old.rewards + new.rewards)

        if self.env.num_players == 1:
            return state
        if self.env.id in ALTERNATING:  # half of a loop's price
            moved = move((key, state))[1]
            return jax.tree.map(lambda one, other: jnp.where(is_on((key, state)), one, other), moved, state)
        return jax.lax.while_loop(is_on, move, (key, state))[1]


def ids() -> tuple[str, ...]:
    """Pgx' games."""
    return tuple(load("pgx", "pgx").available_envs())


def from_id(name: str, *, opponent: Opponent | str = "random", opponent_params: PyTree = None) -> PgxWorld:
    """The world of a game.

    Args:
      name: as Pgx has it, such as ``"connect_four"``.
      opponent: how all others move: ``"random"``, or a function, see :data:`Opponent`.
      opponent_params: what that function gets first, such as the ``PolicyState`` of a policy.

    Raises:
      TypeError: ``opponent`` is neither.
      ValueError: an opponent for a game of one player.
    """
    env = _environment(name)
    if opponent == "random":
        opponent = random_opponent
    elif env.num_players == 1:
        raise ValueError(f"opponent={opponent!r}: pgx/{name} has one player; leave it out")
    if not callable(opponent):
        raise TypeError(
            f"opponent={opponent!r} must be 'random' or a function (opponent_params, key, observation, action_mask)"
            " -> action"
        )
    state = jax.eval_shape(env.init, jax.random.key(0))
    bounds = (0, 1) if state.observation.dtype == bool else ()
    space = box(state.observation.shape, *bounds)
    return PgxWorld(strong(opponent_params), env, opponent, space, Discrete(*state.legal_action_mask.shape))


@once
def _environment(name: str) -> Any:
    with making(f"pgx/{name}"):
        return load("pgx", "pgx").make(name)
