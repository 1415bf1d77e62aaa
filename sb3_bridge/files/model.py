"""What a model is made of when it comes from a file: attributes and parameters, checked against what it is wanted for."""

from __future__ import annotations

from typing import Any

import numpy as np
from stable_baselines3.common.utils import check_for_correct_spaces, get_system_info
from stable_baselines3.common.vec_env import VecEnv

from grpo_jax.types import PyTree
from sb3_bridge.files.model_zip import File, load_zip


def read_model(
    path: File,
    custom_objects: dict[str, Any] | None,
    changes: dict[str, Any],
    *,
    print_system_info: bool,
    allow_pickle: bool,
) -> tuple[dict[str, Any], dict[str, PyTree]]:
    """Attributes and parameters of a saved model; arguments and further errors: :func:`load_zip`.

    ``changes`` (the keyword arguments of ``load``) replace attributes as ``custom_objects`` do.

    Raises:
      ValueError: other policy arguments than the file's.
      KeyError: an attribute without which there is no model.
    """
    if custom_objects is not None and not isinstance(custom_objects, dict):
        raise ValueError(f"custom_objects={custom_objects!r} must be a dict or None")
    if print_system_info:
        print("== CURRENT SYSTEM INFO ==")
        get_system_info()
    custom_objects = dict(custom_objects or {}) | {x: changes[x] for x in changes if x != "policy_kwargs"}
    reading = {"allow_pickle": allow_pickle, "print_system_info": print_system_info}
    data, params = load_zip(path, custom_objects=custom_objects, **reading)
    specified = changes.get("policy_kwargs", data.get("policy_kwargs", {}))
    if specified != (stored := data.setdefault("policy_kwargs", specified)):
        raise ValueError(
            "The specified policy kwargs do not equal the stored policy kwargs."
            f" Stored kwargs: {stored}, specified kwargs: {specified}"
        )
    for name in ("observation_space", "action_space", "policy_class"):
        if name not in data:
            raise KeyError(f"{path} holds no {name}; pass it in custom_objects={{{name!r}: ...}}")
    return data, params


def fit_to_env(data: dict[str, Any], env: VecEnv, force_reset: bool) -> None:
    """Changes the attributes of a saved model into those of one that trains in ``env``.

    Raises:
      ValueError: other spaces than the file's.
    """
    check_for_correct_spaces(env, data["observation_space"], data["action_space"])
    if force_reset or env.num_envs != data.get("n_envs"):
        data["_last_obs"] = None
    if env.num_envs != data.get("n_envs"):
        data["episode_time"] = np.zeros(env.num_envs, np.int32)
    data["n_envs"] = env.num_envs
