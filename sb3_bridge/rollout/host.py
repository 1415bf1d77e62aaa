"""Rollouts on the host: any VecEnv, with one call of the jitted policy a step."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple, Protocol

import jax
import numpy as np
from gymnasium import spaces
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.vec_env import VecEnv

from grpo_jax.cache import quick_jit
from grpo_jax.config import GRPOConfig
from grpo_jax.noise import bits_to_keys, bits_to_uniform, draw_bits
from grpo_jax.policies.distributions import allowed
from grpo_jax.policies.networks import Flatten
from grpo_jax.policies.policy import Policy, PolicyState
from grpo_jax.training import loop
from grpo_jax.types import Environments, Observation, Trajectory
from sb3_bridge.clones.decoration import decorated, tidy
from sb3_bridge.functions.reward import Reward
from sb3_bridge.gymnax.spaces import env_actions
from sb3_bridge.masks import has_masks, read_masks
from sb3_bridge.policies.spaces import stretch_of
from sb3_bridge.rollout.callbacks import Model, StepLocals, merged, show_step
from sb3_bridge.vec_wrappers import (
    Unnormalized,
    VecStep,
    checked_observation,
    reached_observation,
    step,
    unwrapped,
)


class Watcher(Protocol):
    """Who looks at every step: clones that are kept, and compared with what really happened."""

    def before_step(self, masks: np.ndarray | None) -> None:
        """The environments stand in a decision state, in which masks ``[N, P]`` tell what is allowed (None: all is)."""

    def after_step(self, actions: np.ndarray, reached: Any, rewards: np.ndarray, result: VecStep) -> None:
        """They were stepped: ``reached`` and ``rewards`` as the environments gave them, before VecNormalize."""


class Acted(NamedTuple):
    """What the policy does in N states, and what it computed to that end where that is expensive: else None."""

    choice: Any  # actions [N, *A] in the policy's units
    stretched: Any  # the same in the environment's units, not clipped
    distribution: Any = None  # parameters [N, P]
    value: Any = None  # [N]; None also where the critic has features of its own


_KEPT = Acted._fields[2:]


def collect_on_host(
    model: Model,
    config: GRPOConfig,
    env: VecEnv,
    reward: Reward | None,
    callback: BaseCallback,
    watcher: Watcher | None = None,
) -> Trajectory | None:
    """Steps any VecEnv for ``config.n_steps``; counters, episode statistics and last observation of the model move on.

    The user's ``reward`` sees observations as they were before VecNormalize. The callback was told of the rollout's start.

    Returns:
      The trajectory ``[n_steps, n_envs]`` as NumPy arrays, its ``state`` what the reward function saw of the decision
      states; None where a callback stopped training.
    """
    policy, space = model.policy, env.action_space
    StepLocals(callback, policy.device)
    act, think = acting(policy.structure), _thinking(policy.structure)
    n_drawn = policy.structure.distribution.n_uniforms + (config.persistence is not None)
    uniforms = np.asarray(_uniforms(model.key_words, config.n_steps, env.num_envs, n_drawn))
    unnormalized = Unnormalized(env) if reward is not None or watcher is not None else None
    keep_last = reward is not None or model.chosen_dynamics == "learned"
    keep_next = config.bootstrap or keep_last
    model._last_obs = checked_observation(env, model._last_obs, "at the start of the rollout")
    is_masked = has_masks(env)
    rows = _Rows(config.n_steps)
    model.rollout_buffer.start(rows.arrays, policy, config)
    previous: Acted | None = None
    landers = decorated(unwrapped(env)[0])
    for index in range(config.n_steps):
        observation, starts = model._last_obs, np.asarray(model._last_episode_starts, bool)
        raw = (
            unnormalized.observation(observation) if unnormalized is not None and reward is not None else None
        )
        masks = read_masks(env, f"at step {index} of the rollout") if is_masked else None
        acted = act(policy.state, observation, uniforms[index], masks)
        acted = Acted(*(leaf if leaf is None else np.asarray(leaf) for leaf in acted))
        if config.persistence is not None and previous is not None:
            persists = ~starts & (uniforms[index, :, -1] < config.persistence)
            if masks is not None:  # what is forbidden now is not held
                persists &= allowed(policy.structure.distribution, masks, previous.choice)
            acted = _persist(acted, previous, persists)
        previous = acted
        actions, clipped_actions = clip(
            space, acted.stretched if isinstance(space, spaces.Box) else acted.choice
        )
        if watcher is not None:
            watcher.before_step(masks)
        result = step(env, clipped_actions, index)
        for lander in landers:
            tidy(lander)
        model.num_timesteps += env.num_envs
        returned = result.observation, result.rewards, result.dones, result.infos
        thoughts = functools.partial(think, policy.state, observation, acted.choice, masks)
        goes_on = show_step(model, callback, (actions, clipped_actions), returned, thoughts)
        time = np.where(starts, 0, model.episode_time).astype(np.int32)
        model.episode_time = time + 1
        model._last_obs, model._last_episode_starts = result.observation, result.dones
        if not goes_on:
            return None
        model._update_info_buffer(result.infos, result.dones)
        row: dict[str, Any] = {
            "observation": observation,
            "action": acted.choice,
            "actions": actions,
            "reward": result.rewards,
            "terminated": result.dones & ~result.truncated,
            "truncated": result.truncated,
            "time": time,
            "episode_starts": starts,
        }
        if masks is not None:
            row["action_mask"] = masks
        needed = result.dones if keep_last else result.truncated
        if keep_next:
            row["next_observation"] = reached_observation(result, needed, env.observation_space)
        if unnormalized is not None:
            original, reached = unnormalized.step(result), row.get("next_observation")
            if reached is None or unnormalized.changes_observations:
                reached = reached_observation(original, needed, env.observation_space)
            if watcher is not None:
                watcher.after_step(clipped_actions, reached, original.rewards, result)
            if reward is not None:
                row |= {"raw": raw, "raw_action": clipped_actions, "raw_next": reached}
        row |= {name: leaf for name, leaf in zip(_KEPT, acted[2:], strict=True) if leaf is not None}
        rows.add(row)
        model.rollout_buffer.advance(index + 1)
    return rows.trajectory(reward)


def clip(space: spaces.Space, actions: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """What SB3 calls ``actions`` and ``clipped_actions``: before and after they are brought within a box's bounds."""
    clipped_actions = env_actions(space, actions)
    return (actions if isinstance(space, spaces.Box) else clipped_actions), clipped_actions


@functools.lru_cache(maxsize=64)
def acting(policy: Policy) -> Callable[..., Acted]:
    """``(policy_state, observation [N, ...], uniforms [N, >= n_uniforms], masks) -> Acted``; actions are not clipped."""
    n_uniforms = policy.distribution.n_uniforms
    extractor = policy.features_extractor
    has_features = not isinstance(extractor, Flatten) and bool(getattr(extractor, "images", True))
    has_value = has_features and policy.critic is not None and policy.share_features_extractor

    @quick_jit
    def act(
        state: PolicyState, observation: Observation, uniforms: jax.Array, masks: jax.Array | None = None
    ) -> Acted:
        value = None
        if has_value:
            parameters, value = policy.parameters_and_value(state, observation, masks)
        else:
            parameters = policy.parameters(state, observation, masks)
        action = policy.distribution.sample(parameters, uniforms[..., :n_uniforms])
        return Acted(action, policy.stretch(action), parameters if has_features else None, value)

    return act


@functools.lru_cache(maxsize=64)
def _thinking(policy: Policy) -> Callable[..., tuple[Any, Any, Any]]:
    """``(policy_state, observation [N, ...], choice [N, *A], masks) -> Thoughts``, ``choice`` in the policy's units."""
    volume = float(np.log(stretch_of(policy.action_space)[1]).sum())

    @quick_jit
    def think(
        state: PolicyState, observation: Observation, choice: jax.Array, masks: jax.Array | None
    ) -> tuple[Any, Any, Any]:
        value = policy.value(state, observation) if "critic" in state.params else None
        parameters = policy.parameters(state, observation, masks)
        return observation, value, policy.distribution.log_prob(parameters, choice) - volume

    return think


def _persist(acted: Acted, previous: Acted, persists: np.ndarray) -> Acted:
    """Repeats the actions before, where ``persists`` bool ``[N]`` says so."""
    choice, stretched = (
        np.where(persists.reshape(-1, *(1,) * (new.ndim - 1)), old, new)
        for old, new in zip(previous[:2], acted[:2], strict=True)
    )
    return acted._replace(choice=choice, stretched=stretched)


class _Rows:
    """The rows of a rollout, in arrays ``[n_steps, n_envs, ...]`` that are made when the first one comes."""

    def __init__(self, n_steps: int):
        self._n_steps, self._n_rows = n_steps, 0
        self.arrays: dict[str, Any] = {}

    def add(self, row: dict[str, Any]) -> None:
        for name, value in row.items():
            if name not in self.arrays:
                self.arrays[name] = jax.tree.map(
                    lambda leaf: np.zeros((self._n_steps, *leaf.shape), leaf.dtype), value
                )
            if isinstance(value, dict):
                for key, part in value.items():
                    self.arrays[name][key][self._n_rows] = part
            else:
                self.arrays[name][self._n_rows] = value
        self._n_rows += 1

    def trajectory(self, reward: Reward | None) -> Trajectory:
        """What the learner sees, with the user's reward in place of the environment's."""
        arrays = self.arrays
        if reward is not None:
            flat = merged((arrays["raw"], arrays["raw_action"], arrays["raw_next"]))
            arrays["learned_reward"] = reward.batch(*flat).reshape(arrays["reward"].shape)
        unknown: Any = None
        return Trajectory(
            environments=Environments(
                arrays.get("raw"), arrays["observation"], unknown, arrays["time"], unknown, unknown
            ),
            action_mask=arrays.get("action_mask"),
            distribution=arrays.get("distribution"),
            action=arrays["action"],
            reward=arrays.get("learned_reward", arrays["reward"]),
            task_reward=None,
            terminated=arrays["terminated"],
            truncated=arrays["truncated"],
            next_observation=arrays.get("next_observation"),
            value=arrays.get("value"),
        )


@functools.partial(quick_jit, static_argnums=(1, 2, 3))
def _uniforms(words: jax.Array, n_steps: int, n_envs: int, n_uniforms: int) -> jax.Array:
    """Numbers ``[T, N, n]`` for a rollout; the last one decides whether an action persists, if any may."""
    keys = loop.iteration_keys(bits_to_keys(words))
    return bits_to_uniform(draw_bits(keys.rollout, (n_steps, n_envs, n_uniforms)))
