"""One door to all worlds."""

from __future__ import annotations

import importlib
import inspect
from typing import Any

from grpo_jax.types import PyTree
from grpo_jax.worlds import gymnax
from grpo_jax.worlds.base import RewardFunction, World, check_world, override_reward
from grpo_jax.worlds.suites import refuse_gymnasium, unknown_id, unknown_suite

SUITES = ("brax", "craftax", "jumanji", "navix", "pgx", "playground", "xminigrid")
"""What can stand before the slash of an id: modules of this room, imported on use, and extras of this package."""


def make(
    env: Any, params: PyTree | None = None, *, reward_function: RewardFunction | None = None, **options: Any
) -> World:
    """Makes a world out of whatever can be stepped purely.

    Args:
      env: a gymnax id (``"CartPole-v1"``), an id of another suite (``"brax/ant"``, see :data:`SUITES`), a bare gymnax
        ``Environment``, or a :class:`World`.
      params: ``EnvParams`` of an environment of gymnax, Craftax or XLand-MiniGrid; None: its defaults.
      reward_function: ``(state, action, next_state) -> reward``, replaces the reward that GRPO maximises
        (see :func:`override_reward`); episode statistics go on counting the environment's own.
      options: of a suite, such as ``backend="spring"``: the arguments of ``from_id`` in ``grpo_jax.worlds.<suite>``.

    Returns:
      A world, checked.

    Raises:
      ValueError, TypeError: what is wrong with which argument, and the fix.
      ImportError: a suite that is not installed, and what to install.
      RuntimeError: a suite could not make its environment, and why that may be.
    """
    prefix, slash, name = env.partition("/") if isinstance(env, str) else ("", "", "")
    if slash and prefix != "gymnax":
        world = _from_suite(prefix, name, options if params is None else {"params": params, **options})
    elif options:
        raise TypeError(
            f"{', '.join(options)}: only environments of other suites take such arguments, as in"
            " make('brax/ant', backend='spring')"
        )
    elif isinstance(env, World):
        if params is not None:
            raise ValueError(
                "params= is for gymnax environments; set a World's parameters on the World itself"
            )
        world = env
    elif isinstance(env, str):
        world = gymnax.from_id(env.removeprefix("gymnax/"), params)
    else:
        world = gymnax.from_environment(env, params)
    check_world(world)
    return world if reward_function is None else override_reward(world, reward_function)


def env_ids(suite: str = "gymnax") -> list[str]:
    """The ids of a suite that ``make`` takes; gymnax' own have no prefix, and run without a download.

    Raises:
      ValueError: there is no such suite.
      ImportError: it is not installed.
    """
    if suite == "gymnax":
        return gymnax.env_ids()
    return [f"{suite}/{name}" for name in _suite(suite, f"suite={suite!r}").ids()]


def _from_suite(prefix: str, name: str, options: dict[str, Any]) -> World:
    env_id = f"{prefix}/{name}"
    if prefix not in SUITES:
        refuse_gymnasium(env_id)
    suite = _suite(prefix, f"env={env_id!r}")
    if name not in (known := suite.ids()):
        raise unknown_id(env_id, known, f"an id of {prefix}")
    signature = inspect.signature(suite.from_id)
    try:
        signature.bind(name, **options)
    except TypeError as error:
        taken = ", ".join(list(signature.parameters)[1:]) or "nothing"
        raise TypeError(f"env={env_id!r}: {error}; besides an id it takes: {taken}") from None
    world: World = suite.from_id(name, **options)
    return world


def _suite(prefix: str, what: str) -> Any:
    if prefix not in SUITES:
        raise unknown_suite(prefix, ("gymnax", *SUITES), what)
    return importlib.import_module(f"grpo_jax.worlds.{prefix}")
