"""What SB3's callbacks see of a step."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, Protocol

import jax
import numpy as np
import torch
from stable_baselines3.common.callbacks import (
    BaseCallback,
    CallbackList,
    ConvertCallback,
    EventCallback,
    ProgressBarCallback,
)
from stable_baselines3.common.utils import obs_as_tensor
from stable_baselines3.common.vec_env import VecEnv

from grpo_jax.policies.policy import Policy
from grpo_jax.spaces import Box
from sb3_bridge.policies.policy import GRPOPolicy
from sb3_bridge.rollout.buffer import RolloutView


class Model(Protocol):
    """What a rollout reads of the model, and moves on."""

    policy: GRPOPolicy
    env: VecEnv | None
    rollout_buffer: RolloutView
    num_timesteps: int
    key_words: np.ndarray
    episode_time: np.ndarray
    chosen_dynamics: Any
    ep_info_buffer: Any
    _last_obs: Any
    _last_episode_starts: Any
    _jax_device: Any

    def _update_info_buffer(self, infos: list[dict[str, Any]], dones: np.ndarray | None = None) -> None: ...


def _flat(callback: BaseCallback | None) -> Iterator[BaseCallback]:
    """The callbacks of a list of lists; "no callback" is none."""
    if isinstance(callback, CallbackList):
        for child in callback.callbacks:
            yield from _flat(child)
    elif callback is not None and not (type(callback) is ConvertCallback and callback.callback is None):
        yield callback


def asks_for_every_step(callback: BaseCallback) -> bool:
    """Whether a callback must be called at every step: all but the progress bar must."""
    return any(type(one) is not ProgressBarCallback for one in _flat(callback))


def reads_values(callback: BaseCallback | None) -> bool:
    """Whether a callback may read ``values`` and ``log_probs``: SB3's own do not, and the policy need not be asked."""
    return any(
        type(one) is ConvertCallback
        or not type(one).__module__.startswith("stable_baselines3.")
        or (isinstance(one, EventCallback) and reads_values(one.callback))
        for one in _flat(callback)
    )


def advance_progress_bars(callback: BaseCallback, n_timesteps: int) -> None:
    """Tells progress bars of steps that no callback was called for."""
    for one in _flat(callback):
        if isinstance(one, ProgressBarCallback):
            one.pbar.update(n_timesteps)


def show_step(
    model: Model,
    callback: BaseCallback,
    actions: tuple[np.ndarray, np.ndarray],
    returned: Sequence[Any],
    seen: Any = None,
    value: Any = None,
    log_prob: Any = None,
) -> bool:
    """Calls a callback with PPO's local variables of a step; returns whether training goes on.

    ``actions`` are those before and after they were brought within a box's bounds, ``returned`` new observations,
    rewards, ends and infos. Where the callback reads values: ``seen`` are the observations of the decision states
    ``[N, ...]``, ``value`` is theirs (None without a critic), ``log_prob`` that of the actions in the environment's units.
    """
    buffer = model.rollout_buffer
    shown: dict[str, Any] = {"self": model, "env": model.env, "callback": callback, "rollout_buffer": buffer}
    shown |= {"n_rollout_steps": buffer.buffer_size, "n_steps": buffer.pos}
    shown |= zip(("actions", "clipped_actions"), actions, strict=True)
    shown |= zip(("new_obs", "rewards", "dones", "infos"), returned, strict=True)
    if seen is not None:
        shown["obs_tensor"] = obs_as_tensor(jax.tree.map(np.array, seen), model.policy.device)
        shown["values"] = None if value is None else torch.from_numpy(np.array(value)).reshape(-1, 1)
        shown["log_probs"] = torch.from_numpy(np.array(log_prob))
    callback.update_locals(shown)
    return callback.on_step()


def log_volume(policy: Policy) -> float:
    """What a log density in the policy's units is too large by in the environment's."""
    space = policy.action_space
    if not isinstance(space, Box) or not space.is_bounded:
        return 0.0
    half = (space.high - space.low) / 2
    return float(np.log(np.where(half > 0, half, 1.0)).sum())
