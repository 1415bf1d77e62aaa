"""``predict`` of the model, with action masks."""

from __future__ import annotations

import warnings
from typing import Any

import numpy as np
from stable_baselines3.common.on_policy_algorithm import OnPolicyAlgorithm

from sb3_bridge.clones.core_state import ACTION_MASKS


class Acting(OnPolicyAlgorithm):
    """A model whose ``predict`` takes masks as that of sb3-contrib's MaskablePPO does."""

    policy: Any
    _is_masked = False  # whether the environment forbids actions
    _told_of_masks = False

    def predict(
        self,
        observation: np.ndarray | dict[str, np.ndarray],
        state: tuple[np.ndarray, ...] | None = None,
        episode_start: np.ndarray | None = None,
        deterministic: bool = False,
        action_masks: Any = None,
    ) -> tuple[np.ndarray, tuple[np.ndarray, ...] | None]:
        """Actions for observations; see SB3's ``PPO.predict``, and sb3-contrib's ``MaskablePPO.predict`` for ``action_masks``.

        ``action_masks`` are bool ``[n_actions]``, or ``[n_envs, n_actions]`` as ``vec_env.env_method("action_masks")``
        gives them: True where an action is allowed. None: all are, and a model of an environment that forbids some warns once.

        Raises:
          ValueError: observations or masks of a wrong shape or kind; a mask that allows nothing.
        """
        if action_masks is None and self._is_masked and not self._told_of_masks:
            self._told_of_masks = True
            warnings.warn(
                f"the environment forbids some actions, and predict() was not told which: it may play them. Pass"
                f" action_masks=env.env_method({ACTION_MASKS!r}), or evaluate with"
                " sb3_contrib.common.maskable.evaluation.evaluate_policy in place of SB3's, which passes none, or let a Planner act",
                UserWarning,
                stacklevel=2,
            )
        actions: tuple[np.ndarray, Any] = self.policy.predict(
            observation, state, episode_start, deterministic, action_masks
        )
        return actions
