"""MuJoCo Playground's bare environments as worlds; they have Brax' interface."""

from __future__ import annotations

from typing import Any

import jax

from grpo_jax.worlds.brax import wrap
from grpo_jax.worlds.classic import TimeLimited
from grpo_jax.worlds.suites import load, making, once


def ids() -> tuple[str, ...]:
    """Playground's environments."""
    return tuple(load("mujoco_playground", "playground").registry.ALL_ENVS)


def from_id(
    name: str,
    *,
    episode_length: int | None = None,
    observation: str = "state",
    impl: str = "jax",
    **options: Any,
) -> TimeLimited:
    """The world of an environment.

    Args:
      name: as Playground has it, such as ``"CartpoleBalance"``.
      episode_length: steps of an episode, a truncation; None: what the environment's config says.
      observation: the entry that is seen where observations are a dict, such as ``"privileged_state"``, which no real
        robot sees.
      impl: MJX' implementation: ``"jax"``, or ``"warp"`` on a GPU.
      options: fields of the environment's config to replace.

    Raises:
      ValueError: there is no such observation, or no such field of the config.
    """
    env, default_length = _environment(name, impl=impl, **options)
    seen = jax.eval_shape(env.reset, jax.random.key(0)).obs
    if isinstance(seen, dict) and observation not in seen:
        raise ValueError(f"observation={observation!r} must be one of {', '.join(seen)}")
    length = default_length if episode_length is None else episode_length
    return wrap(env, length, observation if isinstance(seen, dict) else None)


@once
def _environment(name: str, **options: Any) -> tuple[Any, int]:
    """An environment, and the steps of its episodes."""
    registry = load("mujoco_playground", "playground").registry
    with making(f"playground/{name}"):
        config = registry.get_default_config(name)
        if unknown := [option for option in options if option not in config]:
            raise ValueError(f"{', '.join(unknown)}: the config of playground/{name} has {', '.join(config)}")
        config.update(options)
        if (repeat := config.get("action_repeat", 1)) != 1:  # a bare environment takes no notice of it
            raise ValueError(f"action_repeat={repeat!r} must be 1; raise ctrl_dt instead")
        return registry.load(name, config=config), int(config.episode_length)
