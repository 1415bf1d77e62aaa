"""States of Gymnasium's classic control, as ``grpo_jax.worlds.classic`` has them; runs in workers, without JAX."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any


def state_of(variables: tuple[str, ...], parameters: tuple[str, ...], env: Any) -> dict[str, float | bool]:
    """The ``variables``, which are ``env.state``, and the ``parameters``, attributes or what :data:`_OTHERS` makes of them."""
    if getattr(env, "torque_noise_max", 0.0):
        raise ValueError(f"torque_noise_max={env.torque_noise_max} is noise, which no twin repeats")
    state: dict[str, float | bool] = dict(zip(variables, map(float, env.state), strict=True))
    for name in parameters:
        state[name] = _OTHERS[name](env) if name in _OTHERS else float(getattr(env, name))
    return state


_OTHERS: dict[str, Callable[[Any], float | bool]] = {
    "is_euler": lambda env: env.kinematics_integrator == "euler",
    "sutton_barto": lambda env: bool(env._sutton_barto_reward),
    "is_book": lambda env: env.book_or_nips != "nips",
    **{f"torque_{i}": lambda env, i=i: float(env.AVAIL_TORQUE[i]) for i in range(3)},  # type: ignore[misc]
}
