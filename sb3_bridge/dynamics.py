"""Where alternatives come from in environments that are stepped on the host: exact clones, or a learned world."""

from __future__ import annotations

import functools
from typing import Any

import jax
import numpy as np
from gymnasium import spaces
from stable_baselines3.common.vec_env import VecEnv, VecEnvWrapper, VecNormalize

from grpo_jax import counter
from grpo_jax.config import GRPOConfig
from grpo_jax.groups.branch import Branches
from grpo_jax.learning import model as models
from grpo_jax.noise import bits_to_keys, split
from grpo_jax.policies.policy import Policy, PolicyState
from grpo_jax.training import batches, loop
from grpo_jax.training.rollout import Trajectory
from grpo_jax.types import Group, Metrics
from grpo_jax.worlds.learned import LearnedWorld
from sb3_bridge.branching import Brancher
from sb3_bridge.collect import acting, clip
from sb3_bridge.policies import GRPOPolicy, functions_of
from sb3_bridge.rewards import Reward


class Clones:
    """Exact branches: copies of the environments are restored to every decision state and stepped from there.

    Args:
      env: DummyVecEnv or SubprocVecEnv, in SB3's wrappers.
      reward: the user's, or None.

    Raises:
      Unclonable: why that cannot be done here.
    """

    def __init__(self, env: VecEnv, reward: Reward | None):
        self._brancher, self._reward = Brancher(env), reward
        self._handles: list[int] = []

    @property
    def description(self) -> str:
        """How states are saved, in one line."""
        return self._brancher.report.description

    def start(self) -> None:
        """A new rollout begins."""
        self._brancher.free()
        self._handles.clear()

    def before_step(self) -> None:
        """Keeps the decision states that the environments are in."""
        self._handles.append(self._brancher.take())

    def evaluate(
        self, config: GRPOConfig, policy: GRPOPolicy, trajectory: Trajectory, words: np.ndarray
    ) -> tuple[tuple[Group, Branches], int]:
        """Candidates of the decision states that were kept, their group returns, and the steps that took.

        Args:
          config: the settings.
          policy: which branches follow.
          trajectory: of the rollout; with ``state``, what the reward function sees of its decision states.
          words: of the iteration's PRNG key.
        """
        structure, state = policy.structure, policy.state
        group, actions = _propose(
            config,
            structure,
            state,
            trajectory.replace(environments=trajectory.environments.replace(state=None)),
            words,
        )
        act, is_box = acting(structure), isinstance(policy.action_space, spaces.Box)

        def follow(observations: Any, uniforms: np.ndarray) -> np.ndarray:
            choice, stretched = act(state, observations, uniforms)
            return clip(policy.action_space, np.asarray(stretched if is_box else choice))[1]

        def value(observations: Any) -> np.ndarray:
            return np.asarray(functions_of(structure).value(state, observations))

        originals = jax.tree.map(lambda leaf: leaf.reshape(-1, *leaf.shape[2:]), trajectory.state)
        returns, n_steps = self._brancher.branch(
            self._handles,
            np.asarray(actions),
            follow,
            horizon=config.horizon,
            gamma=float(config.gamma),
            n_uniforms=structure.distribution.n_uniforms,
            n_rollouts=config.n_rollouts,
            backup=config.backup,
            value=value if config.bootstrap else None,
            reward=self._reward,
            observations=originals if self._reward is not None else None,
            common_random_numbers=config.common_random_numbers,
            seed=int(words[0]) << 32 | int(words[1]),
        )
        self._handles.clear()
        return (group, Branches(returns, counter.zero())), n_steps


class Learned:
    """Branches in a world that is learned from all real transitions; until it is good enough, episodes are compared.

    Args:
      policy: whose spaces the world has.
      reward: the user's; None: the environment's is learned.
      words: of the PRNG key of its first parameters.

    Raises:
      NotImplementedError: observations that are no vectors of real numbers.
    """

    description = "learned from all real transitions"

    def __init__(self, policy: GRPOPolicy, reward: Reward | None, words: np.ndarray):
        structure = policy.structure
        self._model = models.init_model(
            structure.observation_space, structure.action_space, bits_to_keys(words), reward_function=reward
        )
        self.metrics: Metrics = {}

    def world(
        self, config: GRPOConfig, structure: Policy, trajectory: Trajectory, words: np.ndarray
    ) -> LearnedWorld | None:
        """Learns from a rollout; the world, if it predicted that rollout well enough beforehand."""
        self._model, self.metrics = _observe(self._model, structure, trajectory, min(config.horizon, 16))
        self._model, _ = models.fit(self._model, bits_to_keys(words))
        self.metrics = jax.device_get(self.metrics)
        return self._model.world if models.usable(self.metrics) else None


def check_unnormalized(env: VecEnv) -> None:
    """Refuses observations that VecNormalize changes while a world of them is learned.

    Raises:
      ValueError: a VecNormalize with ``norm_obs``.
    """
    while isinstance(env, VecEnvWrapper):
        if isinstance(env, VecNormalize) and env.norm_obs:
            raise ValueError(
                "dynamics='learned' needs observations whose scale does not change: use VecNormalize(norm_obs=False), or"
                " dynamics='clone'"
            )
        env = env.venv


@functools.partial(jax.jit, static_argnums=1)
def _propose(
    config: GRPOConfig, policy: Policy, state: PolicyState, trajectory: Trajectory, words: jax.Array
) -> tuple[Group, jax.Array]:
    distribution = policy.parameters(state, trajectory.observation)
    candidate_key, _ = split(loop.iteration_keys(bits_to_keys(words)).groups, 2)
    group = batches.propose(config, policy, trajectory.replace(distribution=distribution), candidate_key)
    return group, policy.to_world(group.action)


@functools.partial(jax.jit, static_argnums=(1, 3))
def _observe(
    model: models.Model, policy: Policy, trajectory: Trajectory, horizon: int
) -> tuple[models.Model, Metrics]:
    transitions = models.transitions_of(policy, trajectory)
    metrics = models.measure(model.world, transitions, horizon)
    return model.replace(replay=models.remember(model.replay, transitions)), metrics
