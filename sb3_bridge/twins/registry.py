"""Which environments have a twin."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import gymnasium
from gymnasium.envs.classic_control import (
    AcrobotEnv,
    CartPoleEnv,
    Continuous_MountainCarEnv,
    MountainCarEnv,
    PendulumEnv,
)

from grpo_jax.worlds.base import World
from grpo_jax.worlds.classic import TASKS, classic
from sb3_bridge.twins import gymnasium_states
from sb3_bridge.twins.reader import StateOf, name_of


class Entry(NamedTuple):
    """A world, or what makes one of an environment; and what reads a state of it."""

    world: World | Callable[[Any], World]
    state_of: StateOf


_ENTRIES: dict[str, Entry] = {}


def register_twin(
    env_class: type[gymnasium.Env], *, world: World | Callable[[Any], World], state_of: StateOf
) -> None:
    """Tells ``GRPO`` of a JAX world with the dynamics of an environment; a class that has a twin gets another one.

    Nothing is believed: before training the world must repeat what the environment does, and in training every step is
    compared. Subclasses have the twin too, unless they replace a method other than ``reset``, ``render`` and ``close``.

    Args:
      env_class: whose ``step`` the world repeats.
      world: the world, or a function ``env.unwrapped -> World`` that is called with one of the environments. Branches
        start from states that were taken: ``reset`` is never called, and may raise. Its observations and rewards are the
        environment's, before any VecEnvWrapper; a ``TimeLimit`` is taken care of.
      state_of: ``env.unwrapped -> state`` of the world, a pytree of numbers and NumPy arrays that copies what it reads;
        called before every step. It raises ValueError where the world is none for an environment. In a SubprocVecEnv it
        runs in the workers, so it should not need JAX.

    Raises:
      TypeError: what is wrong with which argument.
    """
    if not (isinstance(env_class, type) and issubclass(env_class, gymnasium.Env)):
        raise TypeError(f"env_class={env_class!r} must be a class of gymnasium.Env")
    if not (isinstance(world, World) or callable(world)):
        raise TypeError(f"world={world!r} must be a grpo_jax World, or a function env -> World")
    if not callable(state_of):
        raise TypeError(f"state_of={state_of!r} must be a function env.unwrapped -> state")
    _ENTRIES[name_of(env_class)] = Entry(world, state_of)


def entries() -> dict[str, Entry]:
    """All twins that are known, by the names of classes."""
    return dict(_ENTRIES)


for _class, _name in (
    (CartPoleEnv, "CartPole"),
    (AcrobotEnv, "Acrobot"),
    (PendulumEnv, "Pendulum"),
    (MountainCarEnv, "MountainCar"),
    (Continuous_MountainCarEnv, "MountainCarContinuous"),
):
    _task = TASKS[_name]
    _state_of = functools.partial(
        gymnasium_states.state_of,
        tuple(name for name, _, _ in _task.start),
        tuple(name for name, _ in _task.parameters),
    )
    register_twin(_class, world=classic(_name), state_of=_state_of)
