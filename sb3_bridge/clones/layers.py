"""The layers of an environment: itself and its wrappers, and the spaces that they hold."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import gymnasium
from gymnasium import wrappers
from gymnasium.utils import EzPickle, RecordConstructorArgs
from stable_baselines3.common.monitor import Monitor

# Wrappers that change no transition: replicas do without them. A class derived from one may do more, and is kept.
_TRANSPARENT = (
    Monitor,
    wrappers.PassiveEnvChecker,
    wrappers.OrderEnforcing,
    wrappers.RecordEpisodeStatistics,
    wrappers.RecordVideo,
    wrappers.RenderCollection,
    wrappers.HumanRendering,
)
# How Gymnasium remembers what a class was made with; nothing reads it later.
_CONSTRUCTION = {EzPickle: ("_ezpickle_args", "_ezpickle_kwargs"), RecordConstructorArgs: ("_saved_kwargs",)}


def layers_of(env: gymnasium.Env) -> list[gymnasium.Env]:
    """The environment and its wrappers, outermost first, without those that change no transition."""
    return [layer for layer in chain_of(env) if type(layer) not in _TRANSPARENT]


def chain_of(env: gymnasium.Env) -> Iterator[gymnasium.Env]:
    """The environment and all its wrappers, outermost first."""
    while isinstance(env, gymnasium.Wrapper):
        yield env
        env = env.env
    yield env


def _parts(space: Any) -> Iterator[gymnasium.Space]:
    yield space
    parts = getattr(space, "spaces", None) or ()
    for part in parts.values() if hasattr(parts, "values") else parts:
        yield from _parts(part)


def spaces_of(layers: list[gymnasium.Env]) -> list[gymnasium.Space]:
    """Every space that a layer holds as an attribute, parts included, once; they have generators of their own."""
    found: dict[int, gymnasium.Space] = {}
    for layer in layers:
        for name in sorted(vars(layer)):
            value = vars(layer)[name]
            if isinstance(value, gymnasium.Space):
                found |= {id(space): space for space in _parts(value)}
    return list(found.values())


def construction(layer: gymnasium.Env) -> set[str]:
    """Attributes in which Gymnasium keeps what a layer was made with."""
    return {name for kind, names in _CONSTRUCTION.items() if isinstance(layer, kind) for name in names}
