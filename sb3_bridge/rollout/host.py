"""Rollouts behind SB3's callbacks: on the device for gymnax, on the host for every other VecEnv."""

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from gymnasium import spaces
from stable_baselines3.common.callbacks import (
    BaseCallback,
    CallbackList,
    ConvertCallback,
    ProgressBarCallback,
)
from stable_baselines3.common.vec_env import (
    VecEnv,
    VecEnvWrapper,
    VecMonitor,
    VecNormalize,
    VecTransposeImage,
)

from grpo_jax import counter
from grpo_jax.config import GRPOConfig
from grpo_jax.learning.update import Learner
from grpo_jax.noise import bits_to_keys, bits_to_uniform, draw_bits
from grpo_jax.policies.policy import Policy, PolicyState
from grpo_jax.training import loop
from grpo_jax.training.rollout import Environments, Trajectory
from grpo_jax.types import Observation
from grpo_jax.worlds.base import RewardOverride, RewardOverrideState, World
from sb3_bridge.functions.reward import Reward
from sb3_bridge.gymnax.spaces import env_actions, to_numpy
from sb3_bridge.gymnax.vec_env import GymnaxVecEnv

if TYPE_CHECKING:
    from sb3_bridge.grpo import GRPO


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


def asks_for_every_step(callback: BaseCallback) -> bool:
    """Whether a callback must be called at every step: all do but "no callback" and the progress bar."""
    if isinstance(callback, CallbackList):
        return any(asks_for_every_step(child) for child in callback.callbacks)
    if type(callback) is ConvertCallback:
        return callback.callback is not None
    return type(callback) is not ProgressBarCallback


def collect_on_device(
    model: GRPO, config: GRPOConfig, simulator: Simulator, reward: Reward | None, callback: BaseCallback
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
    env = simulator.env
    # Committed to the device, as what a rollout returns is: else the second rollout compiles again.
    before = jax.device_put(_wrap(env.lend(), reward), model._jax_device)
    policy = model.policy
    after, trajectory, ends = _rollout(
        config, override(env.world, reward), policy.structure, policy.state, before, model.key_words
    )
    steps = _Steps(env, reward, trajectory, after, *jax.device_get(ends))
    if asks_for_every_step(callback):
        for step in steps.replay(policy.structure):
            model.num_timesteps += env.num_envs
            env.move_to(step.environments)
            infos = list(step.infos)
            for index in np.flatnonzero(step.dones).tolist():
                infos[index] = infos[index] | {"episode": _record(simulator, index, infos[index]["episode"])}
            callback.update_locals(
                {
                    "self": model,
                    "env": model.env,
                    "callback": callback,
                    "rollout_buffer": None,
                    "n_rollout_steps": config.n_steps,
                    "n_steps": step.number,
                    "actions": step.actions,
                    "clipped_actions": step.clipped_actions,
                    "new_obs": step.new_obs,
                    "rewards": step.rewards,
                    "dones": step.dones,
                    "infos": infos,
                }
            )
            goes_on = callback.on_step()
            model._last_obs, model._last_episode_starts = step.new_obs, step.dones
            if not goes_on:
                _set_running(simulator)
                return None
            model._update_info_buffer(infos, step.dones)
    else:
        _advance_progress_bars(callback, config.n_states)
        model.num_timesteps += config.n_states
        assert model.ep_info_buffer is not None
        all_needed = any(monitor.results_writer for monitor in simulator.monitors) or env.writes_episodes
        episodes = steps.episodes(None if all_needed else model.ep_info_buffer.maxlen)
        model.ep_info_buffer.extend(_record(simulator, index, episode) for index, episode in episodes)
        model._last_obs = to_numpy(env.observation_space, after.observation)
        model._last_episode_starts = steps.ended[-1].copy()
    env.move_to(lambda: _unwrap(after, reward))
    _set_running(simulator)
    return trajectory


def collect_on_host(
    model: GRPO,
    config: GRPOConfig,
    env: VecEnv,
    reward: Reward | None,
    callback: BaseCallback,
    before_step: Callable[[], None] | None = None,
) -> Trajectory | None:
    """Steps any VecEnv, with one call of the jitted policy each time.

    Args:
      model: whose policy acts; its step counters, episode statistics and last observation move on.
      config: its settings.
      env: the environments, wrapped in whatever they are.
      reward: the user's, which sees observations as they were before VecNormalize; None: the env's.
      callback: initialised, told of the rollout's start.
      before_step: called in every decision state.

    Returns:
      The trajectory ``[n_steps, n_envs]`` as NumPy arrays, its ``state`` what the reward function saw of the decision
      states; None where a callback stopped training.
    """
    policy, n_envs = model.policy, env.num_envs
    act = acting(policy.structure)
    persistence, n_uniforms = config.persistence, policy.structure.distribution.n_uniforms
    n_drawn = n_uniforms + (persistence is not None)  # the last one decides whether the action persists
    uniforms = np.asarray(_uniforms(model.key_words, config.n_steps, n_envs, n_drawn))
    previous: tuple[np.ndarray, np.ndarray] | None = None
    is_box = isinstance(env.action_space, spaces.Box)
    normalizer, original = None, None
    if reward is not None:
        normalizer, original = _originals(env, model.get_vec_normalize_env())
    keep_next = config.bootstrap or reward is not None or model.chosen_dynamics == "learned"
    assert model._last_obs is not None, "collect_on_host() comes behind a reset"
    assert model._last_episode_starts is not None
    store = _Store(config.n_steps, n_envs)
    for index in range(config.n_steps):
        observation = model._last_obs
        raw = observation if original is None else original()
        choice, stretched = map(np.asarray, act(policy.state, observation, uniforms[index, :, :n_uniforms]))
        if persistence is not None and previous is not None:
            persists = (uniforms[index, :, n_uniforms] < persistence) & ~model._last_episode_starts
            choice, stretched = (
                np.where(persists.reshape(-1, *(1,) * (new.ndim - 1)), old, new)
                for old, new in zip(previous, (choice, stretched), strict=True)
            )
        chosen, previous = choice, (choice, stretched)
        actions, clipped_actions = clip(env.action_space, stretched if is_box else chosen)
        if before_step is not None:
            before_step()
        new_obs, rewards, dones, infos = env.step(clipped_actions)
        model.num_timesteps += n_envs
        callback.update_locals(
            {
                "self": model,
                "env": env,
                "callback": callback,
                "rollout_buffer": None,
                "n_rollout_steps": config.n_steps,
                "n_steps": index,
                "actions": actions,
                "clipped_actions": clipped_actions,
                "new_obs": new_obs,
                "rewards": rewards,
                "dones": dones,
                "infos": infos,
            }
        )
        goes_on = callback.on_step()
        episode_time = np.where(model._last_episode_starts, 0, model.episode_time).astype(np.int32)
        model.episode_time = episode_time + 1
        model._last_obs, model._last_episode_starts = new_obs, dones  # type: ignore[assignment]
        if not goes_on:
            return None
        model._update_info_buffer(infos, dones)
        ended = np.flatnonzero(dones).tolist()
        truncated = np.zeros(n_envs, bool)
        for env_index in ended:
            truncated[env_index] = infos[env_index].get("TimeLimit.truncated", False)
        row: dict[str, Any] = {
            "observation": observation,
            "action": chosen,
            "reward": np.asarray(rewards, np.float32),
            "terminated": dones & ~truncated,
            "truncated": truncated,
            "time": episode_time,
        }
        if keep_next:
            row["next_observation"] = _with_final(new_obs, ended, infos)
        if reward is not None:
            raw_next = row["next_observation"]
            if normalizer is not None and original is not None:
                finals = [
                    {"terminal_observation": normalizer.unnormalize_obs(infos[i]["terminal_observation"])}
                    if i in ended
                    else {}
                    for i in range(n_envs)
                ]
                raw_next = _with_final(original(), ended, finals)
            row["raw"], row["raw_action"], row["raw_next"] = raw, clipped_actions, raw_next
        store.add(index, row)
    if reward is not None:
        shape = (config.n_steps, n_envs)
        flat = jax.tree.map(
            lambda leaf: leaf.reshape(-1, *leaf.shape[2:]),
            (store["raw"], store["raw_action"], store["raw_next"]),
        )
        store["reward"] = reward.batch(*flat).reshape(shape)
    return Trajectory(
        environments=Environments(
            state=None if reward is None else store["raw"],
            observation=store["observation"],
            episode_return=None,  # type: ignore[arg-type]
            episode_length=store["time"],
            last_return=None,  # type: ignore[arg-type]
            last_length=None,  # type: ignore[arg-type]
        ),
        action_mask=None,
        distribution=None,
        action=store["action"],
        reward=store["reward"],
        task_reward=None,
        terminated=store["terminated"],
        truncated=store["truncated"],
        next_observation=store["next_observation"] if keep_next else None,
    )


def clip(space: spaces.Space, actions: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """What SB3 calls ``actions`` and ``clipped_actions``: before and after they are brought within a box's bounds."""
    clipped_actions = env_actions(space, actions)
    return (actions if isinstance(space, spaces.Box) else clipped_actions), clipped_actions


class _Store:
    """Rows of a rollout, in arrays ``[n_steps, n_envs, ...]`` that are made when the first one comes."""

    def __init__(self, n_steps: int, n_envs: int):
        self._n_steps, self._n_envs = n_steps, n_envs
        self._arrays: dict[str, Any] = {}

    def add(self, index: int, row: dict[str, Any]) -> None:
        for name, value in row.items():
            if name not in self._arrays:
                self._arrays[name] = jax.tree.map(
                    lambda leaf: np.empty((self._n_steps, *leaf.shape), leaf.dtype), value
                )
            array = self._arrays[name]
            if isinstance(value, dict):
                for key, part in value.items():
                    array[key][index] = part
            else:
                array[index] = value

    def __getitem__(self, name: str) -> Any:
        return self._arrays[name]

    def __setitem__(self, name: str, value: Any) -> None:
        self._arrays[name] = value


def _originals(
    env: VecEnv, normalizer: VecNormalize | None
) -> tuple[VecNormalize | None, Callable[[], Any] | None]:
    """The VecNormalize that changes observations, and what gives them unchanged, as the policy's space has them.

    Raises:
      ValueError: a wrapper outside of it changes them once more, in a way that is not known here.
    """
    if normalizer is None or not normalizer.norm_obs:
        return None, None
    outside: list[VecEnvWrapper] = []
    while isinstance(env, VecEnvWrapper) and env is not normalizer:
        outside.insert(0, env)
        env = env.venv
    for wrapper in outside:
        changes = wrapper.observation_space != wrapper.venv.observation_space
        if changes and not isinstance(wrapper, VecTransposeImage):
            raise ValueError(
                f"reward_function sees observations as they were before VecNormalize, but {type(wrapper).__name__} outside"
                f" of it changes them again: put VecNormalize outside of {type(wrapper).__name__}"
            )
    transposed = [wrapper for wrapper in outside if isinstance(wrapper, VecTransposeImage)]

    def original() -> Any:
        return functools.reduce(
            lambda seen, wrapper: wrapper.transpose_observations(seen),
            transposed,
            normalizer.get_original_obs(),
        )

    return normalizer, original


def _with_final(observation: Any, ended: list[int], infos: Any) -> Any:
    """Observations that were reached: where an episode ended, its last one instead of the next one's first."""
    if not ended:
        return observation
    reached = jax.tree.map(np.array, observation)
    for index in ended:
        final = infos[index].get("terminal_observation")
        if final is None:
            raise ValueError(
                f"environment {index} ended an episode without info['terminal_observation']: an SB3 VecEnv must give it"
            )
        if isinstance(reached, dict):
            for name, array in reached.items():
                array[index] = final[name]
        else:
            reached[index] = final
    return reached


class _Step(NamedTuple):
    """One vectorised step of a finished rollout, as SB3's callbacks see it."""

    number: int
    actions: np.ndarray
    clipped_actions: np.ndarray
    new_obs: Any
    rewards: np.ndarray
    dones: np.ndarray
    infos: list[dict[str, Any]]
    environments: Callable[[], Environments]


class _Steps:
    """The steps of a rollout on the device, told to the host."""

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

    def episodes(self, most: int | None) -> list[tuple[int, dict[str, Any]]]:
        """The episodes that ended, in order, the last ``most`` of them: ``(index of the environment, info)``."""
        where = np.argwhere(self.ended)
        where = where if most is None else where[max(len(where) - most, 0) :]
        seconds = self._env.seconds()
        return [
            (int(i), _episode(self._returns[t, i], self._lengths[t, i], seconds)) for t, i in where.tolist()
        ]

    def replay(self, policy: Policy) -> Iterator[_Step]:
        """Step after step."""
        env, trajectory = self._env, self._trajectory
        ended, returns, lengths = self.ended, self._returns, self._lengths
        rewards = trajectory.reward if trajectory.task_reward is None else trajectory.task_reward
        actions, rewards, truncated, terminated, reached, observation, last = jax.device_get(
            (
                _stretch(policy, trajectory.action),
                rewards,
                trajectory.truncated,
                trajectory.terminated,
                trajectory.next_observation,
                trajectory.observation,
                self._after.observation,
            )
        )
        rewards = rewards.astype(np.float32)
        actions, clipped_actions = clip(env.action_space, actions)
        n_steps = len(ended)
        for index in range(n_steps):
            cut = truncated[index] & ~terminated[index]
            infos: list[dict[str, Any]] = [{"TimeLimit.truncated": False} for _ in range(env.num_envs)]
            for i in np.flatnonzero(ended[index]).tolist():
                final = jax.tree.map(lambda leaf, t=index, i=i: leaf[t, i], reached)
                infos[i] = {
                    "TimeLimit.truncated": bool(cut[i]),
                    "terminal_observation": to_numpy(env.observation_space, final),
                    "episode": _episode(returns[index, i], lengths[index, i], env.seconds()),
                }
            is_last = index + 1 == n_steps
            following = last if is_last else jax.tree.map(lambda leaf, t=index: leaf[t + 1], observation)
            yield _Step(
                number=index,
                actions=actions[index].copy(),
                clipped_actions=clipped_actions[index].copy(),
                new_obs=to_numpy(env.observation_space, following),
                rewards=rewards[index].copy(),
                dones=ended[index].copy(),
                infos=infos,
                environments=functools.partial(self._at, index),
            )

    def _at(self, index: int) -> Environments:
        """Where the environments stood after a step; not what the run itself goes on from, for ``step`` donates it."""
        if index + 1 == self._trajectory.reward.shape[0]:
            return _unwrap(jax.tree.map(jnp.copy, self._after), self._reward)
        at = jax.tree.map(lambda leaf: leaf[index + 1], self._trajectory.environments)
        return _unwrap(at, self._reward)


def _episode(episode_return: Any, length: Any, seconds: float) -> dict[str, Any]:
    """Monitor's info of an episode."""
    return {"r": round(float(episode_return), 6), "l": int(length), "t": seconds}


def _record(simulator: Simulator, index: int, episode: dict[str, Any]) -> dict[str, Any]:
    """Writes an episode to the files that are kept, as the monitors would have; what the outermost one tells of it."""
    simulator.env.write_episode(episode)
    for monitor in reversed(simulator.monitors):
        episode = {**episode, "t": round(time.time() - monitor.t_start, 6)}
        monitor.episode_count += 1
        if monitor.results_writer:
            monitor.results_writer.write_row(episode)
    return episode


def _set_running(simulator: Simulator) -> None:
    """Tells the monitors of the episodes that are still running."""
    if not simulator.monitors:
        return
    environments = simulator.env.lend()
    for monitor in simulator.monitors:
        monitor.episode_returns = np.array(environments.episode_return, np.float32)
        monitor.episode_lengths = np.array(environments.episode_length, np.int32)


def _advance_progress_bars(callback: BaseCallback, n_timesteps: int) -> None:
    if isinstance(callback, CallbackList):
        for child in callback.callbacks:
            _advance_progress_bars(child, n_timesteps)
    elif isinstance(callback, ProgressBarCallback):
        callback.pbar.update(n_timesteps)


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


@functools.lru_cache(maxsize=64)
def acting(policy: Policy) -> Callable[..., tuple[jax.Array, jax.Array]]:
    """``(policy_state, observation [N, ...], uniforms [N, n]) -> (action in the policy's units, in the env's)``.

    Neither is clipped.
    """

    @jax.jit
    def act(state: PolicyState, observation: Observation, uniforms: jax.Array) -> tuple[jax.Array, jax.Array]:
        action = policy.distribution.sample(policy.parameters(state, observation), uniforms)
        return action, policy.stretch(action)

    return act


@functools.partial(jax.jit, static_argnums=(1, 2, 3))
def _uniforms(words: jax.Array, n_steps: int, n_envs: int, n_uniforms: int) -> jax.Array:
    """Uniform numbers ``[T, N, n]`` for a rollout."""
    keys = loop.iteration_keys(bits_to_keys(words))
    return bits_to_uniform(draw_bits(keys.rollout, (n_steps, n_envs, n_uniforms)))


@functools.partial(jax.jit, static_argnums=0)
def _stretch(policy: Policy, action: jax.Array) -> jax.Array:
    return policy.stretch(action)
