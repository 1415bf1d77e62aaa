"""What a model is made of when it comes from a file: attributes and parameters, checked against what it is wanted for."""

from __future__ import annotations

import math
import reprlib
import warnings
from collections import deque
from collections.abc import Callable
from numbers import Integral, Real
from typing import Any

import numpy as np
from gymnasium import Space
from stable_baselines3.common.utils import check_for_correct_spaces, get_system_info
from stable_baselines3.common.vec_env import VecEnv

from grpo_jax.types import PyTree
from sb3_bridge.files.model_zip import File, checked, load_zip


def _count(value: Any, least: int = 0) -> bool:
    return isinstance(value, Integral) and not isinstance(value, bool) and least <= int(value) < 2**63


def _finite(value: Any) -> bool:
    return isinstance(value, Real) and not isinstance(value, bool) and math.isfinite(value)


def _array(value: Any, dtype: Any) -> bool:
    return isinstance(value, np.ndarray) and bool(value.dtype == dtype)


def _observations(value: Any) -> bool:
    parts = value.values() if isinstance(value, dict) else [value]
    return all(isinstance(x, np.ndarray) and x.dtype.kind in "biuf" and np.isfinite(x).all() for x in parts)


def _episodes(value: Any) -> bool:
    return isinstance(value, deque) and all(_finite(one.get("r")) and _finite(one.get("l")) for one in value)


def _is(*kinds: type) -> Callable[[Any], bool]:
    return lambda value: isinstance(value, kinds)


# fmt: off
_KINDS: dict[str, tuple[str, Callable[[Any], bool]]] = {
    """num_timesteps _total_timesteps _num_timesteps_at_start _episode_num _n_updates simulator_steps _n_iterations
    _n_optimizer_steps seed? horizon? branch_every?""": ("an integer of at least 0", _count),
    "n_envs n_steps batch_size n_epochs _stats_window_size group_size max_enumerated n_rollouts reference_interval":
        ("an integer of at least 1", lambda value: _count(value, 1)),
    "verbose sde_sample_freq": ("an integer of at least -1", lambda value: _count(value, -1)),
    """start_time gamma gae_lambda vf_coef max_grad_norm reference_decay spread_floor _current_progress_remaining target_kl? dual_clip?
    kl_coef?""": ("a finite number", _finite),
    "learning_rate ent_coef clip_range clip_range_vf? clip_range_high? persistence?":
        ("a finite number or a schedule", lambda value: _finite(value) or callable(value)),
    "use_sde normalize_advantage branch_past_truncation common_random_numbers cache _spread_was_judged _is_masked bootstrap?":
        ("a bool", _is(bool)),
    "candidates trajectory_form backup baseline surrogate kl_estimator reference chosen_dynamics advantage_scale?":
        ("a string", _is(str)),
    "dynamics": ("a string, a function or a pair", lambda value: isinstance(value, str | tuple) or callable(value)),
    "reward_function?": ("a function", callable),
    "policy_class rollout_buffer_class?": ("a class", _is(type)),
    "policy_kwargs rollout_buffer_kwargs _pace _environments": ("a dict", _is(dict)),
    "_frac_zero_std _frac_below_floor": ("a list of numbers", lambda value: isinstance(value, list) and all(map(_finite, value))),
    "observation_space action_space": ("a space", _is(Space)),
    "_last_obs? _last_original_obs?": ("arrays of finite numbers", _observations),
    "_last_episode_starts?": ("an array of bools", lambda value: _array(value, bool)),
    "key_words": ("uint32[2]", lambda value: _array(value, np.uint32) and value.shape == (2,)),
    "episode_time": ("an int32 array", lambda value: _array(value, np.int32) and bool(np.all(value >= 0))),
    "ep_info_buffer?": ("a deque of episodes", _episodes),
    "ep_success_buffer?": ("a deque", _is(deque)),
    "action_noise?": ("None", lambda value: False),
}
"""Attributes that a file may set ("?": or None) -> what they must be, and whether a value is that."""
# fmt: on
_KNOWN = {name.strip("?"): ("?" in name, *kind) for names, kind in _KINDS.items() for name in names.split()}


def check_attributes(path: File, attributes: dict[str, Any]) -> None:
    """Raises a ValueError where an attribute is not what it must be."""
    for name, value in attributes.items():
        may_be_none, what, holds = _KNOWN[name]
        if not (may_be_none if value is None else holds(value)):
            raise ValueError(
                f"{path}: {name}={reprlib.repr(value)} is not {what}; if the rest is sound, load(..., {name}=...)"
            )


def read_model(
    path: File,
    custom_objects: dict[str, Any] | None,
    changes: dict[str, Any],
    *,
    owner: type,
    print_system_info: bool,
    allow_pickle: bool,
) -> tuple[dict[str, Any], dict[str, PyTree]]:
    """Attributes and parameters of a saved model; arguments and further errors: :func:`load_zip`.

    Only attributes that are known are taken, each with its type; those that a subclass of a user's has beside them only from
    a file that is trusted (``allow_pickle``). Where training writes is never among them, nor what hides a member of the
    ``owner``, the model's class. ``changes`` (the keyword arguments of ``load``) replace attributes as ``custom_objects`` do.

    Raises:
      ValueError: other policy arguments than the file's; an attribute that is not what it must be.
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
    for name in ("observation_space", "action_space", "policy_class"):
        if name not in data:
            raise KeyError(f"{path} holds no {name}; pass it in custom_objects={{{name!r}: ...}}")
    left_out = []
    for name, value in list(data.items()):
        if name in custom_objects:
            continue
        if name in _KNOWN:
            check_attributes(path, {name: value})
        elif not allow_pickle or name == "tensorboard_log" or hasattr(owner, name):
            del data[name]
            left_out += [name] * (value is not None)
    if left_out:
        warnings.warn(
            f"{path}: left out {', '.join(left_out)}, which no file may set: pass {left_out[0]}=... to load, if it is wanted"
            " (attributes of your own subclass come back with allow_pickle=True)",
            stacklevel=3,
        )
    specified = changes.get("policy_kwargs", data.get("policy_kwargs", {}))
    if specified != (stored := data.setdefault("policy_kwargs", specified)):
        raise ValueError(
            "The specified policy kwargs do not equal the stored policy kwargs."
            f" Stored kwargs: {stored}, specified kwargs: {specified}"
        )
    return data, params


def arrays_of(state_dict: dict[str, Any]) -> dict[str, np.ndarray]:
    """Tensors by name as a file takes them."""
    return {name: np.asarray(value) for name, value in state_dict.items() if name != "param_groups"}


def read_parameters(path: File, own: dict[str, Any]) -> dict[str, PyTree]:
    """The parameters in a file that a model can take over, which has its ``own`` by name; see :func:`checked`."""
    params = checked(path, load_zip(path, load_data=False)[1], own)
    return {name: tree for name, tree in params.items() if name not in ("reference", "world")}


def fit_to_env(data: dict[str, Any], env: VecEnv, force_reset: bool) -> None:
    """Changes the attributes of a saved model into those of one that trains in ``env``.

    Raises:
      ValueError: other spaces than the file's.
    """
    check_for_correct_spaces(env, data["observation_space"], data["action_space"])
    data.pop("env", None)  # the caller's wins
    if force_reset or env.num_envs != data.get("n_envs"):
        data["_last_obs"] = None
    if env.num_envs != data.get("n_envs"):
        data["episode_time"] = np.zeros(env.num_envs, np.int32)
    data["n_envs"] = env.num_envs
