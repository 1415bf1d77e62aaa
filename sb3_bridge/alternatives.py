"""Where alternatives come from in environments that are stepped on the host: clones, a learned world, or the user's."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, Literal, NamedTuple, get_args

import flax.serialization
import jax
import jax.numpy as jnp
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
from grpo_jax.types import Group, Metrics, PyTree
from grpo_jax.worlds.base import RewardOverride, RewardOverrideState, World
from grpo_jax.worlds.function import FunctionWorld
from grpo_jax.worlds.learned import LearnedWorld, check_vectors
from sb3_bridge.clones.brancher import Brancher
from sb3_bridge.clones.copying import Unclonable
from sb3_bridge.clones.core_state import Functions
from sb3_bridge.functions.reward import Reward
from sb3_bridge.functions.transition import resolve_transition
from sb3_bridge.policies.compiled import functions_of
from sb3_bridge.policies.policy import GRPOPolicy
from sb3_bridge.policies.spaces import to_observation_space
from sb3_bridge.rollout.host import acting

Name = Literal["auto", "simulator", "clone", "learned"]
Transition = Callable[[Any, Any], Any]
Dynamics = Name | Transition | Functions
Kind = Literal["simulator", "clone", "learned", "function", "episodes"]
"""What ``dynamics`` comes to: ``"episodes"`` is no alternatives at all."""

BUDGET_MS = 5.0
"""Milliseconds of branches for a decision step, up to which ``"auto"`` clones; PPO takes about 0.5 for all it does."""
MEASURED_HORIZON = 16
CAPACITY = 50_000
"""Transitions that a learned world remembers."""


class Choice(NamedTuple):
    """Where alternatives will come from.

    Attributes:
      kind: see :data:`Kind`.
      reason: why, in words for the log; empty where the user said so.
      brancher: of ``"clone"``.
    """

    kind: Kind
    reason: str = ""
    brancher: Brancher | None = None


def check_dynamics(dynamics: Any) -> None:
    """Refuses what ``dynamics`` cannot be.

    Raises:
      ValueError: says what it can be.
    """
    is_pair = isinstance(dynamics, tuple) and len(dynamics) == 2 and all(map(callable, dynamics))
    if not (is_pair or callable(dynamics) or dynamics in get_args(Name)):
        raise ValueError(
            f"dynamics={dynamics!r} must be one of {', '.join(map(repr, get_args(Name)))}, a transition function"
            " f(state, action) -> next_state, or a pair (get_state, set_state) of functions of the unwrapped env"
        )


def choose(
    dynamics: Dynamics,
    env: VecEnv,
    observation_space: spaces.Space,
    cost: Callable[[Brancher], float],
) -> Choice:
    """What ``dynamics`` means in an env that no simulator stands for.

    Args:
      dynamics: the user's, checked.
      env: the env in all its wrappers.
      observation_space: of the policy.
      cost: from a brancher to the milliseconds that the branches of a decision step will take.

    Raises:
      Unclonable: ``"clone"`` where that cannot be done, and why.
    """
    if callable(dynamics):
        return Choice("function")
    if dynamics == "learned":
        return Choice("learned")
    if dynamics == "clone" or isinstance(dynamics, tuple):
        return Choice("clone", brancher=Brancher(env, dynamics if isinstance(dynamics, tuple) else None))
    try:
        brancher = Brancher(env)
        milliseconds = cost(brancher)
        if milliseconds <= BUDGET_MS:
            return Choice("clone", f"branches take {digits(milliseconds)} ms a decision step", brancher)
        why = (
            f"branches of clones would take {digits(milliseconds)} ms a decision step, more than {BUDGET_MS:g};"
            " dynamics='clone' takes them all the same"
        )
    except Unclonable as error:
        why = str(error)
    try:
        check_learnable(env, observation_space)
    except (NotImplementedError, ValueError) as error:
        return Choice("episodes", f"{why}; no learned world: {error}")
    return Choice("learned", why)


class Clones:
    """Exact branches: copies of the environments are restored to the decision states and stepped from there.

    Args:
      brancher: of the env.
      reward: the user's, or None.
    """

    def __init__(self, brancher: Brancher, reward: Reward | None):
        self._brancher, self._reward = brancher, reward
        self._handles: list[int] = []
        self._wanted = np.zeros((0, brancher.num_envs), bool)

    @property
    def description(self) -> str:
        """How states are saved, in one line."""
        return self._brancher.report.description

    def start(self, wanted: np.ndarray) -> None:
        """A new rollout begins; ``wanted`` bool ``[T, N]`` are the decision states that will be branched."""
        self._brancher.free()
        self._handles.clear()
        self._wanted = wanted

    def before_step(self) -> None:
        """Keeps the decision states that the environments are in, where one of them is wanted."""
        is_wanted = self._wanted[len(self._handles)].any()
        self._handles.append(self._brancher.take() if is_wanted else -1)

    def evaluate(
        self, config: GRPOConfig, policy: GRPOPolicy, trajectory: Trajectory, words: np.ndarray
    ) -> tuple[tuple[Group, Branches], int]:
        """Candidates of the decision states, the group returns of those that were wanted, and the steps that took.

        Args:
          config: the settings.
          policy: which branches follow.
          trajectory: of the rollout; with ``state``, what the reward function sees of its decision states.
          words: of the iteration's PRNG key.
        """
        structure, state = policy.structure, policy.state
        bare = trajectory.replace(environments=trajectory.environments.replace(state=None))
        group, actions = _propose(config, structure, state, bare, words)
        act, is_box = acting(structure), isinstance(policy.action_space, spaces.Box)

        def follow(observations: Any, uniforms: np.ndarray) -> np.ndarray:
            choice, stretched = act(state, observations, uniforms)
            return np.asarray(stretched if is_box else choice)

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
            persistence=config.persistence,  # type: ignore[arg-type]  # a number: schedules were asked already
            past_truncation=config.branch_past_truncation,
            value=value if config.bootstrap else None,
            reward=self._reward,
            observations=originals if self._reward is not None else None,
            common_random_numbers=config.common_random_numbers,
            seed=int(words[0]) << 32 | int(words[1]),
            wanted=self._wanted.reshape(-1),
        )
        self._handles.clear()
        return (group, Branches(jnp.asarray(returns), counter.zero())), n_steps


class Learned:
    """Branches in a world that is learned from all real transitions; until it is good enough, episodes are compared.

    Args:
      policy: whose spaces the world has.
      reward: the user's; None: the environment's is learned.
      words: of the PRNG key of its first parameters.

    Raises:
      NotImplementedError: observations that are no vectors of real numbers.
    """

    description = (
        "a world that is learned from all real transitions; until it predicts well, episodes are compared"
    )

    def __init__(self, policy: GRPOPolicy, reward: Reward | None, words: np.ndarray):
        structure = policy.structure
        self._model = models.init_model(
            structure.observation_space,
            structure.action_space,
            bits_to_keys(jnp.asarray(words)),
            reward_function=reward,
            capacity=CAPACITY,
        )
        self.metrics: Metrics = {}

    def world(
        self, config: GRPOConfig, structure: Policy, trajectory: Trajectory, words: np.ndarray
    ) -> World | None:
        """Learns from a rollout; the world, if it predicted that rollout well enough beforehand."""
        horizon = min(config.horizon, MEASURED_HORIZON)
        self._model, self.metrics = _observe(self._model, structure, trajectory, horizon)
        self._model, _ = models.fit(self._model, bits_to_keys(jnp.asarray(words)))
        self.metrics = jax.device_get(self.metrics)
        return self._model.world if models.usable(self.metrics) else None

    def state_dict(self) -> PyTree:
        """All that was learned and seen, as nested dicts of arrays."""
        model = jax.device_get(self._model)
        seen = jax.tree.map(lambda leaf: leaf[: int(model.replay.count)], model.replay.data)
        return flax.serialization.to_state_dict(model.replace(replay=model.replay.replace(data=seen)))

    def load_state_dict(self, state: PyTree) -> None:
        """Takes over what ``state_dict`` gave."""
        model: models.Model = flax.serialization.from_state_dict(self._model, state)
        room = self._model.replay.data

        def fill(empty: jax.Array, seen: Any) -> jax.Array:
            return empty.at[: len(seen)].set(seen)

        replay = model.replay.replace(data=jax.tree.map(fill, room, model.replay.data))
        self._model = jax.tree.map(jnp.asarray, model.replace(replay=replay))


class Function:
    """Branches in the user's ``f(state, action) -> next_state``, with the user's reward.

    Args:
      function: the user's.
      policy: whose spaces the world has.
      reward: the user's.

    Raises:
      TypeError, ValueError: what is wrong with the function; or there is no reward function.
    """

    def __init__(self, function: Transition, policy: GRPOPolicy, reward: Reward | None):
        if reward is None:
            raise ValueError(
                "dynamics=f tells what an action leads to, not what that is worth: pass"
                " reward_function(state, action, next_state) too"
            )
        structure = policy.structure
        transition = resolve_transition(function, policy.observation_space, policy.action_space)
        inner = FunctionWorld(
            transition=transition,
            initial_state=_never,
            terminated=None,
            max_steps=np.iinfo(np.int32).max,
            observation_space=structure.observation_space,
            action_space=structure.action_space,
        )
        self.description = f"your transition function ({transition.form})"
        self._world = RewardOverride(inner, reward)

    def world(
        self, config: GRPOConfig, structure: Policy, trajectory: Trajectory, words: np.ndarray
    ) -> World | None:
        """The user's world, which knows all it ever will."""
        del config, structure, trajectory, words
        return self._world


def check_learnable(env: VecEnv, observation_space: spaces.Space) -> None:
    """Refuses what no world can be learned of.

    Raises:
      NotImplementedError: observations that are no vectors of real numbers.
      ValueError: a VecNormalize with ``norm_obs``.
    """
    check_unnormalized(env, "'learned'")
    check_vectors(to_observation_space(observation_space))


def check_unnormalized(env: VecEnv, dynamics: str) -> None:
    """Refuses observations that VecNormalize changes where a world predicts them.

    Raises:
      ValueError: a VecNormalize with ``norm_obs``.
    """
    while isinstance(env, VecEnvWrapper):
        if isinstance(env, VecNormalize) and env.norm_obs:
            raise ValueError(
                f"dynamics={dynamics} needs observations whose scale does not change: use VecNormalize(norm_obs=False), or"
                " dynamics='clone'"
            )
        env = env.venv


def states_of(world: World, observation: Any) -> PyTree:
    """The states that branches of visited observations ``[T, N, ...]`` start from."""
    if isinstance(world, RewardOverride):
        return RewardOverrideState(states_of(world.world, observation), observation)
    assert isinstance(world, LearnedWorld | FunctionWorld)
    return world.at(observation)


def digits(number: float) -> str:
    """Two digits that say something, and no exponent."""
    return np.format_float_positional(number, precision=2, fractional=False, trim="-")


def _never(key: jax.Array) -> Any:
    raise NotImplementedError("branches start from visited states: nothing is ever reset")


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
    # Of a rollout that is larger than the replay, its end.
    most = model.replay.capacity // transitions.reward.shape[1]
    recent = jax.tree.map(lambda leaf: leaf[-most:], transitions)
    return model.replace(replay=models.remember(model.replay, recent)), metrics
