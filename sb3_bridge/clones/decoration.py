"""Gymnasium's LunarLander makes a body for each firing of its engines, "just a decoration, with no impact on the physics".

It does so wherever it has a render mode, which SB3 gives to the environments that it makes, and removes them when it is
drawn. Where nobody draws they are hundreds by the end of an episode, and a step takes up to ten times as long.
"""

from __future__ import annotations

import sys
from typing import Any

MOST = 16
"""More than that are there only if nobody draws: each is drawn seven times at most, and a step adds two at most."""


def is_decorated(env: Any) -> bool:
    """Whether an innermost environment is one that makes such bodies."""
    module: Any = sys.modules.get("gymnasium.envs.box2d.lunar_lander")
    return module is not None and isinstance(env, module.LunarLander)


def tidy(env: Any, most: int = MOST) -> None:
    """Removes the bodies of one that is decorated, where they are more than ``most``."""
    if len(env.particles) > most:
        env._clean_particles(True)


def decorated(vec_env: Any) -> list[Any]:
    """The innermost environments of a ``DummyVecEnv`` that are decorated; none where they are in other processes."""
    cores = [env.unwrapped for env in getattr(vec_env, "envs", ())]
    return [core for core in cores if is_decorated(core)]
