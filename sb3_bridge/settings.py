"""The settings of ``grpo_jax`` that the attributes of a model mean, and SB3's schedules among them."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, TypeVar

import jax
import numpy as np
import torch
from stable_baselines3.common.utils import FloatSchedule

from grpo_jax.config import GRPOConfig, field_names
from grpo_jax.groups.candidates import resolve
from grpo_jax.types import backend
from sb3_bridge.regime import as_episodes, candidates_in
from sb3_bridge.twins.pace import paced, persistence

SCHEDULES = ("clip_range", "clip_range_vf", "clip_range_high")
"""Attributes that are schedules, whatever they are set to; None stays None."""
NUMBERS_OR_SCHEDULES = ("ent_coef", "persistence")
"""Attributes that are a number, or a schedule."""

F = TypeVar("F", bound=Callable[..., Any])

_RATES = {*SCHEDULES, *NUMBERS_OR_SCHEDULES, "learning_rate"}


def as_schedule(name: str, value: Any) -> Any:
    """What an attribute of the model becomes: a schedule as SB3 makes it (or its AssertionError), where it may be one."""
    if name not in _RATES:  # attributes are set at every step
        return value
    if isinstance(value, np.ndarray | np.generic) and np.ndim(value) == 0:
        value = value.item()
    is_schedule = name in SCHEDULES or (name in NUMBERS_OR_SCHEDULES and callable(value))
    if value is None or not is_schedule:
        return value
    if name == "clip_range_vf" and isinstance(value, float | int) and value <= 0:
        raise AssertionError(
            f"`clip_range_vf` must be positive, pass `None` to deactivate vf clipping (got {value})"
        )
    try:
        return FloatSchedule(value)
    except AssertionError as error:
        raise AssertionError(f"{name}={value!r}: {error}") from None


def config_of(model: Any) -> GRPOConfig:
    """The settings that the model's present attributes mean; schedules are asked for the present progress."""

    def now(value: Any) -> Any:
        return value(model._current_progress_remaining) if callable(value) else value

    attributes = vars(model)
    values = {name: now(attributes[name]) for name in field_names() if name in attributes}
    if model.persistence == 0:
        values["persistence"] = None
    values["candidates"] = candidates_in(model.chosen_dynamics, model.candidates, model.env is not None)
    if model.candidates == "auto" and values["candidates"] == "episodes":
        values = as_episodes(values)
    if model.chosen_dynamics == "learned":  # what truncates a learned world is that it knows no further
        values["branch_past_truncation"] = False
    if model.advantage_scale is None:
        values["advantage_scale"] = "batch" if model.normalize_advantage else "none"
    values["learning_rate"] = now(model.lr_schedule)
    values["optimizer"] = model.policy.optimizer.factory
    config = GRPOConfig(**values)
    if model.chosen_dynamics != "twin" or config.candidates == "episodes":
        return config
    if model.persistence is None and model.reward_function is None:
        is_sampled = resolve(config, model.policy.structure.distribution) == "sample"
        n_decisions = model._n_iterations * config.n_states
        config = config.replace(persistence=persistence(model._pace, n_decisions, is_sampled))
    return paced(config, model._pace)


def jax_device(device: torch.device | str) -> Any:
    """JAX's device for SB3's ``device``; where there is no GPU, "cuda" means the CPU, as in SB3."""
    if str(device) == "auto":
        return jax.devices()[0]
    kind = torch.device(device).type
    try:
        return jax.devices("gpu" if kind == "cuda" else kind)[0]
    except RuntimeError:
        return jax.devices("cpu")[0]


def on_its_device(method: F) -> F:
    """A method of a model whose programs run, and are made for, the model's device, where that is not JAX's default."""

    @functools.wraps(method)
    def run(model: Any, *args: Any, **kwargs: Any) -> Any:
        if model._jax_device.platform == backend():
            return method(model, *args, **kwargs)
        with jax.default_device(model._jax_device):
            return method(model, *args, **kwargs)

    return run  # type: ignore[return-value]
