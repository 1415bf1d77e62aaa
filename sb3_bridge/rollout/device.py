"""Rollouts on the device: all steps of a gymnax VecEnv in one program, shown to callbacks afterwards."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.vec_env import VecEnv, VecMonitor

from grpo_jax import counter
from grpo_jax.config import GRPOConfig
from grpo_jax.learning.update import Learner
from grpo_jax.noise import bits_to_keys
from grpo_jax.policies.policy import Policy, PolicyState
from grpo_jax.training import loop
from grpo_jax.types import Environments, Trajectory
from grpo_jax.worlds.base import RewardOverride, RewardOverrideState, World
from sb3_bridge.functions.reward import Reward
from sb3_bridge.gymnax.spaces import to_numpy
from sb3_bridge.gymnax.vec_env import GymnaxVecEnv
from sb3_bridge.rollout.callbacks import (
    Model,
    advance_progress_bars,
    asks_for_every_step,
    reads_values,
    show_step,
)
from sb3_bridge.rollout.host import clip


class Simulator(NamedTuple):
    """A gymnax VecEnv, and the monitors around it that a rollout on the device must feed itself."""

    env: GymnaxVecEnv
    monitors: tuple[VecMonitor, ...]


def find_simulator(env: VecEnv | None) -> Simulator | None:
    """The gymnax VecEnv that a training env is, bare or within VecMonitors; None for everything else.

    Other wrappers change what the policy sees or what is paid, which a world on the device would not know.
    """
    monitors = []
    while isinstance(env, VecMonitor):
        monitors.append(env)
        env = env.venv
    return Simulator(env, tuple(monitors)) if isinstance(env, GymnaxVecEnv) else None


def override(world: World, reward: Reward | None) -> World:
    """The world with the user's reward, if there is one."""
    return world if reward is None else RewardOverride(world, reward)


def collect_on_device(
    model: Model, config: GRPOConfig, simulator: Simulator, reward: Reward | None, callback: BaseCallback
) -> Trajectory | None:
    """A whole rollout in one program; callbacks that ask for every step are then shown one after the other.

    While they are, the environments stand where that step left them, and training stops there if one says so: the
    run is the same, bit for bit, with and without callbacks.

    Args:
      model: whose policy acts; its step counters, episode statistics and last observation move on.
      config: its settings.
      simulator: the environments.
      reward: the user's, or None.
      callback: initialised, told of the rollout's start.

    Returns:
      The trajectory ``[n_steps, n_envs]`` on the device; None where a callback stopped training.
    """
    env, policy = simulator.env, model.policy
    # Placed explicitly, as a rollout's result is: otherwise the second call compiles again.
    before = jax.device_put(_wrap(env.lend(), reward), model._jax_device)
    after, trajectory, ends = _rollout(
        config, override(env.world, reward), policy.structure, policy.state, before, model.key_words
    )
    steps = _Steps(env, reward, trajectory, after, *jax.device_get(ends))
    arrays = steps.arrays(policy.structure)
    model.rollout_buffer.start(arrays, policy, config)
    if asks_for_every_step(callback) or simulator.monitors:
        if not _replay(model, simulator, steps, arrays, callback):
            return None
    else:
        advance_progress_bars(callback, config.n_states)
        model.num_timesteps += config.n_states
        episodes = steps.episodes(None if env.writes_episodes else model.ep_info_buffer.maxlen)
        for episode in episodes:
            env.write_episode(episode)
        model.ep_info_buffer.extend(episodes)
        model._last_obs = to_numpy(env.observation_space, after.observation)
        model._last_episode_starts = steps.ended[-1].copy()
    model.rollout_buffer.advance(config.n_steps)
    env.move_to(lambda: _unwrap(after, reward))
    return trajectory


def _replay(
    model: Model,
    simulator: Simulator,
    steps: _Steps,
    arrays: Mapping[str, Any],
    callback: BaseCallback,
) -> bool:
    """Shows every step to the monitors and to the callback; returns whether training goes on."""
    env, buffer = simulator.env, model.rollout_buffer
    outermost = simulator.monitors[0] if simulator.monitors else env
    asks, shows_values = asks_for_every_step(callback), reads_values(callback)
    value = log_prob = None
    if shows_values:
        value, log_prob = buffer.values if model.policy.has_critic else None, buffer.log_probs
    for index, returned in enumerate(steps.returned(arrays)):
        model.num_timesteps += env.num_envs
        env.move_to(functools.partial(steps.environments_after, index))
        for info in returned[3]:
            if "episode" in info:
                env.write_episode(info["episode"])
        with _playing_back(env, returned):
            new_obs, rewards, dones, infos = outermost.step_wait()
        if asks:
            shown = {
                "n_steps": index,
                "actions": arrays["actions"][index].copy(),
                "clipped_actions": arrays["clipped_actions"][index].copy(),
                "new_obs": new_obs,
                "rewards": rewards,
                "dones": dones,
                "infos": infos,
            }
            seen = (
                jax.tree.map(lambda leaf, t=index: leaf[t], arrays["observation"]) if shows_values else None
            )
            here = [None if array is None else array[index] for array in (value, log_prob)]
            goes_on = show_step(model, callback, shown, seen, *here)
        else:
            advance_progress_bars(callback, env.num_envs)
            goes_on = True
        model._last_obs, model._last_episode_starts = new_obs, dones
        if not goes_on:
            return False
        buffer.advance(index + 1)
        model._update_info_buffer(infos, dones)
    return True


@contextlib.contextmanager
def _playing_back(env: GymnaxVecEnv, returned: Any) -> Iterator[None]:
    """Inside it ``env.step_wait()`` returns a step that was made already, so that monitors count it by their own code."""
    env.__dict__["step_wait"] = lambda: returned
    try:
        yield
    finally:
        del env.__dict__["step_wait"]


class _Steps:
    """The steps of a finished rollout, told to the host.

    Attributes:
      ended: bool ``[T, N]``.
    """

    def __init__(
        self,
        env: GymnaxVecEnv,
        reward: Reward | None,
        trajectory: Trajectory,
        after: Environments,
        ended: np.ndarray,
        returns: np.ndarray,
        lengths: np.ndarray,
    ):
        self._env, self._reward, self._trajectory, self._after = env, reward, trajectory, after
        self.ended, self._returns, self._lengths = ended, returns, lengths

    def episodes(self, most: int | None) -> list[dict[str, Any]]:
        """Monitor's infos of the episodes that ended, in order; the last ``most`` of them."""
        where = np.argwhere(self.ended)
        return [
            self._episode(t, i) for t, i in (where if most is None else where[max(len(where) - most, 0) :])
        ]

    def _episode(self, step: int, index: int) -> dict[str, Any]:
        r = round(float(self._returns[step, index]), 6)
        return {"r": r, "l": int(self._lengths[step, index]), "t": self._env.seconds()}

    def arrays(self, policy: Policy) -> Mapping[str, Any]:
        """The rollout as NumPy arrays ``[T, N, ...]``, fetched from the device when one is first asked for."""
        return _Fetched(self._env, self._reward, self._trajectory, policy)

    def returned(
        self, arrays: Mapping[str, Any]
    ) -> Iterator[tuple[Any, np.ndarray, np.ndarray, list[dict[str, Any]]]]:
        """What ``step_wait`` would have returned, step after step."""
        env, space = self._env, self._env.observation_space
        rewards, observation, reached = arrays["reward"], arrays["observation"], arrays["next_observation"]
        cut = arrays["truncated"] & ~arrays["terminated"]
        last = jax.device_get(self._after.observation)
        for t in range(len(self.ended)):
            infos: list[dict[str, Any]] = [{"TimeLimit.truncated": False} for _ in range(env.num_envs)]
            for i in np.flatnonzero(self.ended[t]).tolist():
                final = jax.tree.map(lambda leaf, t=t, i=i: leaf[t, i], reached)
                infos[i] = {
                    "TimeLimit.truncated": bool(cut[t, i]),
                    "terminal_observation": to_numpy(space, final),
                    "episode": self._episode(t, i),
                }
            is_last = t + 1 == len(self.ended)
            following = last if is_last else jax.tree.map(lambda leaf, t=t: leaf[t + 1], observation)
            yield to_numpy(space, following), rewards[t].copy(), self.ended[t].copy(), infos

    def environments_after(self, index: int) -> Environments:
        """Where the environments stood after a step; a copy, for ``step`` donates what it is given."""
        if index + 1 == len(self.ended):
            return _unwrap(jax.tree.map(jnp.copy, self._after), self._reward)
        at = jax.tree.map(lambda leaf: leaf[index + 1], self._trajectory.environments)
        return _unwrap(at, self._reward)


class _Fetched(Mapping[str, Any]):
    """Arrays of a trajectory on the device by the names that ``RolloutView`` asks for."""

    def __init__(self, env: GymnaxVecEnv, reward: Reward | None, trajectory: Trajectory, policy: Policy):
        self._makers = {
            "observation": lambda: trajectory.observation,
            "next_observation": lambda: trajectory.next_observation,
            "reward": lambda: _paid(env.world, reward is not None, trajectory, policy),
            "learned_reward": lambda: trajectory.reward,
            "terminated": lambda: trajectory.terminated,
            "truncated": lambda: trajectory.truncated,
            "episode_starts": lambda: trajectory.time == 0,
            "stretched": lambda: _stretch(policy, trajectory.action),
        }
        self._space = env.action_space
        self._known: dict[str, Any] = {}

    def __getitem__(self, name: str) -> Any:
        if name in ("actions", "clipped_actions") and name not in self._known:
            self._known["actions"], self._known["clipped_actions"] = clip(self._space, self["stretched"])
        if name not in self._known:
            self._known[name] = jax.device_get(self._makers[name]())
        return self._known[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._makers)

    def __len__(self) -> int:
        return len(self._makers)


def _paid(world: World, is_overridden: bool, trajectory: Trajectory, policy: Policy) -> jax.Array:
    """What the environments pay, float32 ``[T, N]``: the world's reward; the user's is the learner's alone."""
    if not is_overridden:
        rewards = trajectory.reward
    elif isinstance(world, RewardOverride):  # a reward of the world's own, which the user's replaced
        reward = jax.vmap(jax.vmap(world.reward_function))
        rewards = reward(
            trajectory.observation, policy.to_world(trajectory.action), trajectory.next_observation
        )
    else:
        assert trajectory.task_reward is not None
        rewards = trajectory.task_reward
    return jnp.asarray(rewards, jnp.float32)


def _wrap(environments: Environments, reward: Reward | None) -> Environments:
    """Environments of a world in the form that its :func:`override` steps."""
    if reward is None:
        return environments
    return environments.replace(state=RewardOverrideState(environments.state, environments.observation))


def _unwrap(environments: Environments, reward: Reward | None) -> Environments:
    return environments if reward is None else environments.replace(state=environments.state.inner)


@functools.partial(jax.jit, static_argnames="policy")
def _rollout(
    config: GRPOConfig,
    world: World,
    policy: Policy,
    policy_state: PolicyState,
    environments: Environments,
    words: jax.Array,
) -> tuple[Environments, Trajectory, tuple[jax.Array, jax.Array, jax.Array]]:
    """A rollout; also ``[T, N]`` where episodes ended, and the return and length of each that did."""
    state = train_state(policy, Learner(policy_state, None, None, jnp.int32(0)), environments, words)
    state, trajectory = loop.collect(config, world, state, keep_next_observation=True)
    before, after = trajectory.environments, state.environments
    returns, lengths = (
        jnp.concatenate([of_last[1:], last[None]])
        for of_last, last in (
            (before.last_return, after.last_return),
            (before.last_length, after.last_length),
        )
    )
    return after, trajectory, (trajectory.ended, returns, lengths)


def train_state(
    policy: Policy, learner: Learner, environments: Environments | None, words: jax.Array, iteration: Any = 0
) -> loop.TrainState:
    """What ``grpo_jax`` trains, from what the SB3 object keeps; step counts start at 0."""
    return loop.TrainState(
        learner=learner,
        environments=environments,  # type: ignore[arg-type]  # None where they are on the host
        key=bits_to_keys(words),
        iteration=jnp.int32(iteration),
        decision_steps=counter.zero(),
        simulator_steps=counter.zero(),
        policy=policy,
    )


@functools.partial(jax.jit, static_argnums=0)
def _stretch(policy: Policy, action: jax.Array) -> jax.Array:
    return policy.stretch(action)
