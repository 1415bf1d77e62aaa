"""Self-play: the opponent in a game is a policy, which may be the learner's of some iterations ago.

The opponent's parameters are data of the world, so a newer one compiles nothing anew. Play against earlier versions of
oneself is Samuel's (1959) and TD-Gammon's (Tesauro 1995).
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax

from grpo_jax.noise import bits_to_uniform, draw_bits
from grpo_jax.policies.policy import Policy, PolicyState
from grpo_jax.training.loop import TrainState
from grpo_jax.types import Observation
from grpo_jax.worlds.base import World


@dataclasses.dataclass(frozen=True)
class PolicyOpponent:
    """A policy as the ``opponent`` of a world, whose ``opponent_params`` are the policy's state.

    Attributes:
      policy: actor and distribution.
      deterministic: the most probable action instead of a sampled one.
    """

    policy: Policy
    deterministic: bool = False

    def __call__(
        self, params: PolicyState, key: jax.Array, observation: Observation, action_mask: jax.Array | None
    ) -> jax.Array:
        """The action in one state, of those that are allowed."""
        if self.deterministic:
            mode = self.policy.distribution.mode(self.policy.parameters(params, observation, action_mask))
            return self.policy.to_world(mode)
        uniforms = bits_to_uniform(draw_bits(key, (self.policy.distribution.n_uniforms,)))
        return self.policy.act(params, observation, action_mask, uniforms)


def against(world: World, state: TrainState, *, deterministic: bool = False) -> World:
    """The game against the policy of a training state, as it is now.

    Args:
      world: a game with an ``opponent``, such as ``make("pgx/connect_four")``; whom it has so far does not matter.
      state: of a run in this game.
      deterministic: the opponent takes its most probable action instead of a sampled one.

    Returns:
      The world with that opponent, to train or to evaluate in.

    Raises:
      TypeError: ``state`` is no ``TrainState``, or of several seeds.
      ValueError: the world has no opponent.
    """
    if not isinstance(state, TrainState) or state.iteration.ndim:
        found = "one of several seeds" if isinstance(state, TrainState) else type(state).__name__
        raise TypeError(
            f"state={found} must be a TrainState of one seed: jax.tree.map(lambda leaf: leaf[0], state)"
        )
    check_opponent(world)
    opponent = PolicyOpponent(state.policy, deterministic)
    game: Any = world
    playing: World = game.replace(opponent=opponent, opponent_params=state.learner.policy)
    return playing


def check_opponent(world: World) -> None:
    """Raises ValueError where nobody plays against the learner."""
    players = getattr(getattr(world, "env", None), "num_players", 2)
    if not (hasattr(world, "opponent") and hasattr(world, "opponent_params")) or players == 1:
        raise ValueError(
            f"env={type(world).__name__} has no opponent: self-play needs a game of two, such as"
            ' make("pgx/connect_four")'
        )
