"""Rollouts on the device: all steps of a gymnax VecEnv in one program, shown to callbacks afterwards."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
from collections.abc import Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.vec_env import VecEnv, VecMonitor

from grpo_jax import counter
from grpo_jax.cache import loop_jit
from grpo_jax.config import GRPOConfig
from grpo_jax.learning.update import Learner
from grpo_jax.noise import bits_to_keys
from grpo_jax.policies.policy import Policy, PolicyState
from grpo_jax.training import loop
from grpo_jax.types import Environments, Trajectory
from grpo_jax.worlds.base import RewardOverride, RewardOverrideState, World
from sb3_bridge.functions.programs import OwnedJit
from sb3_bridge.functions.reward import Reward
from sb3_bridge.gymnax.spaces import to_numpy
from sb3_bridge.gymnax.vec_env import WorldVecEnv
from sb3_bridge.rollout.callbacks import (
    Model,
    StepLocals,
    advance_progress_bars,
    asks_for_every_step,
    show_step,
)
from sb3_bridge.rollout.host import clip


class Simulator(NamedTuple):
    """A gymnax VecEnv, and the monitors around it that a rollout on the device must feed itself."""

    env: WorldVecEnv
    monitors: tuple[VecMonitor, ...]


def find_simulator(env: VecEnv | None) -> Simulator | None:
    """The gymnax VecEnv that a training env is, bare or within VecMonitors; None for everything else.

    Other wrappers change what the policy sees or what is paid, which a world on the device would not know.
    """
    monitors = []
    while isinstance(env, VecMonitor):
        monitors.append(env)
        env = env.venv
    return Simulator(env, tuple(monitors)) if isinstance(env, WorldVecEnv) else None


def override(world: World, reward: Reward | None) -> World:
    """The world with the user's reward, if there is one; for programs of an ``OwnedJit`` that the reward owns."""
    return world if reward is None else RewardOverride(world, reward.borrowed)


def collect_on_device(
    model: Model, config: GRPOConfig, simulator: Simulator, reward: Reward | None, callback: BaseCallback
) -> Trajectory | None:
    """A whole rollout in one program; callbacks that ask for every step are then shown one after the other.

    While they are, the environments stand where that step left them, and training stops there if one says so: the
    run is the same, bit for bit, with and without callbacks.

    Returns:
      The trajectory ``[n_steps, n_envs]`` on the device; None where a callback stopped training.
    """
    env, policy = simulator.env, model.policy
    # Placed explicitly, as a rollout's result is: otherwise the second call compiles again.
    before = jax.device_put(_wrap(env.lend(), reward), model._jax_device)
    is_shown = asks_for_every_step(callback) or bool(simulator.monitors)
    keep_states = is_shown or config.candidates not in ("episodes", "trajectory")  # else nobody reads them
    after, trajectory, ends = _rollout.of(env.program_owner, reward)(
        config,
        override(env.world, reward),
        policy.structure,
        policy.state,
        before,
        model.key_words,
        keep_states,
    )
    steps = _Steps(env, policy.structure, reward, trajectory, after, *jax.device_get(ends))
    model.rollout_buffer.start(steps.arrays, policy, config)
    if is_shown:
        if not _replay(model, simulator, steps, callback):
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


def _replay(model: Model, simulator: Simulator, steps: _Steps, callback: BaseCallback) -> bool:
    """Shows every step to the monitors and to the callback; returns whether training goes on."""
    env, buffer, arrays = simulator.env, model.rollout_buffer, steps.arrays
    outermost = simulator.monitors[0] if simulator.monitors else env
    asks = asks_for_every_step(callback)
    StepLocals(callback, model.policy.device)

    @functools.cache
    def all_thoughts() -> tuple[Any, Any, Any]:
        values = buffer.values if model.policy.has_critic else None
        return arrays["observation"], values, buffer.log_probs

    def thoughts(index: int) -> tuple[Any, Any, Any]:
        return _at(index, all_thoughts())

    for index, returned in enumerate(steps.returned()):
        model.num_timesteps += env.num_envs
        env.move_to(functools.partial(steps.environments_after, index))
        for info in returned[3]:
            if "episode" in info:
                env.write_episode(info["episode"])
        with _playing_back(env, returned):
            returned = outermost.step_wait()
        goes_on = True
        if asks:
            actions = arrays["actions"][index].copy(), arrays["clipped_actions"][index].copy()
            goes_on = show_step(model, callback, actions, returned, functools.partial(thoughts, index))
        else:
            advance_progress_bars(callback, env.num_envs)
        model._last_obs, _, model._last_episode_starts, infos = returned
        if not goes_on:
            return False
        buffer.advance(index + 1)
        model._update_info_buffer(infos, returned[2])
    return True


def _at(index: Any, tree: Any) -> Any:
    return jax.tree.map(lambda leaf: leaf[index], tree)


@contextlib.contextmanager
def _playing_back(env: WorldVecEnv, returned: Any) -> Iterator[None]:
    """Inside it ``env.step_wait()`` returns a step that was made already, so that monitors count it by their own code."""
    env.__dict__["step_wait"] = lambda: returned
    try:
        yield
    finally:
        del env.__dict__["step_wait"]


class _Fetched(dict[str, Any]):
    """Arrays that are fetched from the device when one is first asked for: until then their values are functions."""

    def __getitem__(self, name: str) -> Any:
        value = super().__getitem__(name)
        if callable(value):
            value = self[name] = jax.device_get(value())
        return value


@dataclasses.dataclass(frozen=True)
class _Steps:
    """The steps of a finished rollout, told to the host."""

    env: WorldVecEnv
    policy: Policy
    reward: Reward | None
    trajectory: Trajectory
    after: Environments
    ended: np.ndarray  # bool [T, N]; with the return and length of each episode that did
    returns: np.ndarray
    lengths: np.ndarray

    @functools.cached_property
    def arrays(self) -> dict[str, Any]:
        """The rollout as NumPy arrays ``[T, N, ...]``, by the names that ``RolloutView`` asks for."""
        env, policy, trajectory = self.env, self.policy, self.trajectory
        return _Fetched(
            observation=lambda: trajectory.observation,
            action_mask=lambda: trajectory.action_mask,
            next_observation=lambda: trajectory.next_observation,
            reward=lambda: _paid(env.world, self.reward is not None, trajectory, policy),
            learned_reward=lambda: trajectory.reward,
            terminated=lambda: trajectory.terminated,
            truncated=lambda: trajectory.truncated,
            episode_starts=lambda: trajectory.time == 0,
            both=lambda: clip(env.action_space, jax.device_get(_stretch(policy, trajectory.action))),
            actions=lambda: self.arrays["both"][0],
            clipped_actions=lambda: self.arrays["both"][1],
        )

    def episodes(self, most: int | None) -> list[dict[str, Any]]:
        """Monitor's infos of the episodes that ended, in order; the last ``most`` of them."""
        where = np.argwhere(self.ended)
        return [self._episode(*place) for place in where[0 if most is None else max(len(where) - most, 0) :]]

    def _episode(self, step: int, index: int) -> dict[str, Any]:
        r = round(float(self.returns[step, index]), 6)
        return {"r": r, "l": int(self.lengths[step, index]), "t": self.env.seconds()}

    def returned(self) -> Iterator[tuple[Any, np.ndarray, np.ndarray, list[dict[str, Any]]]]:
        """What ``step_wait`` would have returned, step after step."""
        env, space, arrays = self.env, self.env.observation_space, self.arrays
        cut = arrays["truncated"] & ~arrays["terminated"]
        last = jax.device_get(self.after.observation)
        for t, ended in enumerate(self.ended):
            infos: list[dict[str, Any]] = [{"TimeLimit.truncated": False} for _ in range(env.num_envs)]
            for i in np.flatnonzero(ended).tolist():
                infos[i] = {
                    "TimeLimit.truncated": bool(cut[t, i]),
                    "terminal_observation": to_numpy(space, _at((t, i), arrays["next_observation"])),
                    "episode": self._episode(t, i),
                }
            following = _at(t + 1, arrays["observation"]) if t + 1 < len(self.ended) else last
            yield to_numpy(space, following), arrays["reward"][t].copy(), ended.copy(), infos

    def environments_after(self, index: int) -> Environments:
        """Where the environments stood after a step; a copy, for ``step`` donates what it is given."""
        if index + 1 == len(self.ended):
            return _unwrap(jax.tree.map(jnp.copy, self.after), self.reward)
        return _unwrap(_at(index + 1, self.trajectory.environments), self.reward)


def _paid(world: World, is_overridden: bool, trajectory: Trajectory, policy: Policy) -> jax.Array:
    """What the environments pay, float32 ``[T, N]``: the world's reward; the user's is the learner's alone."""
    rewards = trajectory.task_reward if is_overridden else trajectory.reward
    if is_overridden and isinstance(world, RewardOverride):  # a reward of its own, which the user's replaced
        reward = jax.vmap(jax.vmap(world.reward_function))
        rewards = reward(
            trajectory.observation, policy.to_world(trajectory.action), trajectory.next_observation
        )
    return jnp.asarray(rewards, jnp.float32)


def _wrap(environments: Environments, reward: Reward | None) -> Environments:
    """Environments of a world in the form that its :func:`override` steps."""
    if reward is None:
        return environments
    return environments.replace(state=RewardOverrideState(environments.state, environments.observation))


def _unwrap(environments: Environments, reward: Reward | None) -> Environments:
    return environments if reward is None else environments.replace(state=environments.state.inner)


def _run(
    config: GRPOConfig,
    world: World,
    policy: Policy,
    policy_state: PolicyState,
    environments: Environments,
    words: jax.Array,
    keep_states: bool,
) -> tuple[Environments, Trajectory, tuple[jax.Array, jax.Array, jax.Array]]:
    """A rollout; also ``[T, N]`` where episodes ended, and the return and length of each that did."""
    state = train_state(policy, Learner(policy_state, None, None, jnp.int32(0)), environments, words)
    state, trajectory = loop.collect(
        config, world, state, keep_next_observation=True, keep_states=keep_states
    )
    before, after = trajectory.environments, state.environments
    returns, lengths = (
        jnp.concatenate([getattr(before, name)[1:], getattr(after, name)[None]])
        for name in ("last_return", "last_length")
    )
    return after, trajectory, (trajectory.ended, returns, lengths)


_rollout = OwnedJit(_run, jit=loop_jit, static_argnames=("policy", "keep_states"))


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
