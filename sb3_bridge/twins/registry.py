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


_OTHERS: dict[str, Callable[[Any], float | bool]] = {
    "is_euler": lambda env: env.kinematics_integrator == "euler",
    "sutton_barto": lambda env: bool(env._sutton_barto_reward),
    "is_book": lambda env: env.book_or_nips != "nips",
    **{f"torque_{i}": lambda env, i=i: float(env.AVAIL_TORQUE[i]) for i in range(3)},  # type: ignore[misc]
}
"""Parameters that are no attribute."""


def _state_of(variables: tuple[str, ...], parameters: tuple[str, ...], env: Any) -> dict[str, float | bool]:
    """A state of Gymnasium's classic control as ``grpo_jax.worlds.classic`` has it; in workers, without JAX."""
    if getattr(env, "torque_noise_max", 0.0):
        raise ValueError(f"torque_noise_max={env.torque_noise_max} is noise, which no twin repeats")
    state: dict[str, float | bool] = dict(zip(variables, map(float, env.state), strict=True))
    for name in parameters:
        state[name] = _OTHERS[name](env) if name in _OTHERS else float(getattr(env, name))
    return state


for _class, _name in (
    (CartPoleEnv, "CartPole"),
    (AcrobotEnv, "Acrobot"),
    (PendulumEnv, "Pendulum"),
    (MountainCarEnv, "MountainCar"),
    (Continuous_MountainCarEnv, "MountainCarContinuous"),
):
    _names = tuple(tuple(one[0] for one in part) for part in TASKS[_name][:2])
    register_twin(_class, world=classic(_name), state_of=functools.partial(_state_of, *_names))
