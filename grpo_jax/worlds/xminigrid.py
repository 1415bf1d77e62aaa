"""XLand-MiniGrid's grids as worlds: their tiles are one-hot maps."""

from __future__ import annotations

from typing import Any

import jax
import numpy as np
from flax import struct

from grpo_jax.spaces import Discrete, Space
from grpo_jax.types import PyTree, Step
from grpo_jax.worlds.base import World, strong
from grpo_jax.worlds.suites import box, fresh_key, load, making, once, one_hot, settled

_LAST = 2
"""The type of an episode's last step."""


@struct.dataclass
class XMiniGridWorld(World):
    """An XLand-MiniGrid environment; its state is a ``TimeStep``.

    Attributes:
      params: its ``EnvParams``; their ruleset is traced, and ``max_steps`` a time limit, which is a truncation.
      env: the bare environment.
      sizes: how many tiles and colours there are.
      observation_space: static.
      action_space: static.
    """

    params: PyTree
    env: Any = struct.field(pytree_node=False)
    sizes: tuple[int, int] = struct.field(pytree_node=False)
    observation_space: Space = struct.field(pytree_node=False)
    action_space: Discrete = struct.field(pytree_node=False)

    def reset(self, key: jax.Array) -> tuple[jax.Array, PyTree]:
        first = strong(self.env.reset(self.params, key))
        return one_hot(first.observation, self.sizes), first

    def step(self, key: jax.Array, state: PyTree, action: jax.Array) -> Step:
        inner = state.state.replace(key=fresh_key(state.state.key, key))
        new = self.env.step(self.params, state.replace(state=inner), action)
        is_last, is_over = new.step_type == _LAST, new.discount == 0
        seen = one_hot(new.observation, self.sizes)
        return settled(state, seen, new, new.reward, is_last & is_over, is_last & ~is_over)

    def picture(self, state: PyTree) -> np.ndarray:
        draw = load("xminigrid.rendering.rgb_render", "xminigrid").render
        picture: np.ndarray = draw(np.asarray(state.state.grid), state.state.agent, self.params.view_size)
        return picture


def ids() -> tuple[str, ...]:
    """XLand-MiniGrid's environments."""
    return tuple(load("xminigrid", "xminigrid").registered_environments())


def from_id(name: str, *, params: PyTree = None, **options: Any) -> XMiniGridWorld:
    """The world of an environment.

    Args:
      name: as XLand-MiniGrid has it, such as ``"MiniGrid-DoorKey-5x5"``.
      params: its ``EnvParams``, with the ruleset that an XLand environment needs; None: the default ones.
      options: fields of ``EnvParams`` to replace, such as ``max_steps``.

    Raises:
      ValueError: an XLand environment without a ruleset, in which there is nothing to reach.
    """
    env, default = _environment(name)
    if params is None and hasattr(default, "ruleset") and "ruleset" not in options:
        raise ValueError(
            f"env='xminigrid/{name}' has no goal without a ruleset: give one, such as"
            " ruleset=xminigrid.load_benchmark('trivial-1m').sample_ruleset(key)"
        )
    params = strong((default if params is None else params).replace(**options))
    tiles = load("xminigrid.core.constants", "xminigrid")
    sizes = (int(tiles.NUM_TILES), int(tiles.NUM_COLORS))
    height, width, _ = env.observation_shape(params)
    return XMiniGridWorld(
        params, env, sizes, box((height, width, sum(sizes)), 0, 1), Discrete(int(env.num_actions(params)))
    )


@once
def _environment(name: str) -> Any:
    with making(f"xminigrid/{name}"):
        return load("xminigrid", "xminigrid").make(name)
