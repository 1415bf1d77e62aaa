"""Whether a world does what an environment did: equal, but for what rounding can explain."""

from __future__ import annotations

from typing import Any

import jax
import numpy as np

from grpo_jax.cache import quick_jit
from grpo_jax.noise import as_key
from grpo_jax.worlds.base import World

ROUNDING = 5e-6
"""How far, as a share of each number, a state may be at most from the one that was taken: some fifty roundings of float32."""
_NEAR = 16  # states around the one that was taken
_MARGIN = 4.0  # of the differences among what they lead to
_CHUNK = 512  # transitions in a call, so that one program does for all


def first_difference(
    world: World, states: Any, actions: np.ndarray, real: dict[str, Any]
) -> tuple[int, str] | None:
    """The first transition in which the world does not do what really happened.

    The world is stepped from the states that were taken, and from others around them that differ from these by
    up to ``ROUNDING``. What really happened may differ from what the world does by four times as much as these differ from
    one another, and by ``ROUNDING`` of itself; an episode may end only where it ends for one of them.

    Args:
      world: with states as they were taken.
      states: leaves ``[n, ...]``.
      actions: ``[n, *A]``, in the world's units.
      real: ``observation`` ``[n, *shape]`` (or a dict of such; NaN where it is not known), ``reward``, ``terminated``
        and ``truncated`` (and not terminated) ``[n]``.

    Returns:
      Its index and what differs; None where nothing does.
    """
    n, drawn = len(actions), np.random.default_rng(0)
    for start in range(0, n, _CHUNK):
        rows = np.minimum(np.arange(start, start + _CHUNK), n - 1)
        around = jax.tree.map(lambda leaf, rows=rows: _around(leaf[rows], drawn), states)
        reached = jax.device_get(
            _step(world, around, np.tile(actions[rows], (1 + _NEAR,) + (1,) * (actions.ndim - 1)))
        )
        found: list[tuple[int, str]] = []
        if (names := [name for name, _ in _named(reached)]) != (others := [name for name, _ in _named(real)]):
            return 0, f"the twin gives {', '.join(names)}, the environment {', '.join(others)}"
        for (name, mine), (_, its) in zip(_named(reached), _named(real), strict=True):
            if mine.shape[1:] != its.shape[1:]:
                return (
                    0,
                    f"the twin's {name} has shape {list(mine.shape[1:])}, the environment's {list(its.shape[1:])}",
                )
            mine, its = mine.reshape(1 + _NEAR, _CHUNK, *mine.shape[1:]), its[rows]
            wrong = np.flatnonzero(_differs(mine, its).reshape(_CHUNK, -1).any(-1))
            if wrong.size:
                at = int(wrong[0])
                text = f"the twin's {name} is {short(mine[0, at])}, the environment's {short(its[at])}"
                found.append((int(rows[at]), text))
        if found:
            return min(found)
    return None


@quick_jit
def _step(world: World, states: Any, actions: jax.Array) -> dict[str, Any]:
    reached = jax.vmap(world.step, (None, 0, 0))(as_key(jax.random.key(0)), states, actions)
    return {
        "observation": reached.observation,
        "reward": reached.reward,
        "terminated": reached.terminated,
        "truncated": reached.truncated & ~reached.terminated,
    }


def _around(leaf: np.ndarray, drawn: np.random.Generator) -> np.ndarray:
    """The states themselves, then those around them: ``[n, ...]`` to ``[(1 + _NEAR) * n, ...]``."""
    near = np.broadcast_to(leaf, (1 + _NEAR, *leaf.shape)).copy()
    if leaf.dtype.kind == "f":
        near[1:] *= 1 + ROUNDING * drawn.uniform(-1.0, 1.0, near[1:].shape)
    return near.reshape(-1, *leaf.shape[1:])


def _differs(mine: np.ndarray, real: np.ndarray) -> np.ndarray:
    if mine.dtype == bool:
        return (mine != real).all(0)
    exact = mine[0].astype(np.float64)
    tolerance = _MARGIN * np.abs(mine - exact).max(0) + ROUNDING * np.abs(exact)
    return ~((np.abs(exact - real) <= tolerance) | np.isnan(real))


def _named(tree: dict[str, Any]) -> list[tuple[str, Any]]:
    parts = tree["observation"]
    parts = parts if isinstance(parts, dict) else {"": parts}
    seen = [
        (f"observation[{name!r}]" if name else "observation", part) for name, part in sorted(parts.items())
    ]
    return seen + [(name, tree[name]) for name in ("reward", "terminated", "truncated")]


def short(value: Any) -> str:
    """An array in few words, for errors."""
    return " ".join(np.array2string(np.asarray(value), precision=9, threshold=16, edgeitems=2).split())
