"""A model that acts by comparison: it follows the candidates of the state that its environment is in before it takes one."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from stable_baselines3.common.vec_env import VecEnv

from grpo_jax import counter
from grpo_jax.groups.plan import Plan, choose, plan_actions, propose
from grpo_jax.noise import bits_to_keys, bits_to_uniform, draw_bits, split
from grpo_jax.policies.policy import Policy, PolicyState
from grpo_jax.types import Counter, Group, Observation, PyTree
from grpo_jax.worlds.base import RewardOverrideState, World
from sb3_bridge import regime
from sb3_bridge.alternatives import branch_functions
from sb3_bridge.clones.brancher import Brancher
from sb3_bridge.functions.programs import OwnedJit
from sb3_bridge.functions.reward import Reward
from sb3_bridge.grpo import GRPO
from sb3_bridge.masks import checked_masks, has_masks, read_masks
from sb3_bridge.policies import spaces
from sb3_bridge.rollout.device import Simulator, find_simulator, override
from sb3_bridge.settings import config_of
from sb3_bridge.twins.twin import Twin
from sb3_bridge.vec_wrappers import Unnormalized


class Planner:
    """``predict`` of a model, by comparison (rollout policy improvement: Tesauro & Galperin, NeurIPS 1996).

    In every state that its environment is in, the candidates are followed for some steps in the simulator, a twin or clones,
    and the model's own action gives way to one that is better beyond doubt. It takes the place of the model wherever only
    ``predict`` is asked for::

        planner = Planner(model)
        evaluate_policy(planner, planner.get_env(), n_eval_episodes=20)

    The environment is only read: branches run in copies, with random numbers of their own. A ``reward_function`` of the model
    judges them, as in training.

    Args:
      model: a trained ``GRPO``.
      env: what ``predict`` will be asked about; None: the model's. A VecEnv, or what SB3 makes one of.
      dynamics: ``"auto"``, ``"twin"``, ``"clone"`` or a pair of functions, as for ``GRPO``; a simulator needs none of them.
      seed: of the actions that are drawn, and of the branches.
      changes: fields of ``grpo_jax.Plan`` in place of those that suit the model: ``horizon``, ``n_rollouts``, ``group_size``,
        ``confidence``, ...

    Attributes:
      plan: how candidates are compared.
      simulator_steps: steps of environments and worlds that branches have taken so far.

    Raises:
      TypeError: model is no ``GRPO``.
      ValueError: there is no environment, or no way of following candidates in it; a number that cannot be.
    """

    def __init__(
        self, model: GRPO, env: Any = None, *, dynamics: Any = "auto", seed: int | None = None, **changes: Any
    ):
        if not isinstance(model, GRPO):
            raise TypeError(f"model={type(model).__name__} must be a GRPO")
        wrapped = model.get_env() if env is None else GRPO._wrap_env(env, monitor_wrapper=False)
        if wrapped is None:
            raise ValueError(
                "env=None: the model has no environment; pass the one that predict is asked about"
            )
        self.model, self._env = model, wrapped
        self.plan = Plan.of(config_of(model), **changes)
        self.simulator_steps = 0
        self._generator = np.random.default_rng(seed)
        self._where = self._find(dynamics)

    def _find(self, dynamics: Any) -> Simulator | Twin | Brancher:
        if (simulator := find_simulator(self._env)) is not None:
            return simulator
        if callable(dynamics) or dynamics in ("learned", "simulator"):
            raise ValueError(
                f"dynamics={dynamics!r}: a plan needs the environment's own steps: 'auto', 'twin', 'clone' or a pair"
            )
        regime.check_dynamics(dynamics)
        space, free = self.model.observation_space, lambda *_: regime.Cost(1.0, 1.0)
        choice = regime.choose(dynamics, self._env, space, None, free, float("inf"))
        found = choice.twin or choice.brancher
        if found is None:
            raise ValueError(f"env={self._env}: no candidates can be followed in it: {choice.reason}")
        return found

    def get_env(self) -> VecEnv:
        """The environment that ``predict`` is asked about."""
        return self._env

    def predict(
        self,
        observation: np.ndarray | dict[str, np.ndarray],
        state: tuple[np.ndarray, ...] | None = None,
        episode_start: np.ndarray | None = None,
        deterministic: bool = False,
        action_masks: Any = None,
    ) -> tuple[np.ndarray, tuple[np.ndarray, ...] | None]:
        """Actions for the observations that the environment gave last, ``[N, *shape]``; see ``GRPO.predict``.

        ``deterministic`` is of the model's own action; which other ones are compared with it, and how they end, stays random.
        What the environment forbids is read from it: ``action_masks``, where they are given, must say the same.

        Raises:
          ValueError: observations of another number of environments, or, where that can be seen, of another state; other
            masks than the environment's.
        """
        batch, is_vectorized = spaces.to_batch(observation, self.model.observation_space)
        batch = spaces.to_finite_arrays(batch)
        n_envs = len(jax.tree.leaves(batch)[0])
        if n_envs != self._env.num_envs:
            raise ValueError(
                f"observation is of {n_envs} environments, env has {self._env.num_envs}: a plan needs the state of each"
            )
        masks = read_masks(self._env, "of the planner's environment") if has_masks(self._env) else None
        if action_masks is not None:
            space = self.model.action_space
            given = checked_masks(np.atleast_2d(action_masks), space, n_envs, "action_masks")
            if masks is None or not np.array_equal(given, masks):
                raise ValueError("action_masks are not those of the planner's environment: leave them out")
        words = self._generator.integers(2**32, size=2, dtype=np.uint32)
        if isinstance(self._where, Brancher):
            actions, n_steps = self._in_clones(self._where, batch, words, deterministic, masks)
        else:
            actions, n_steps = self._on_device(self._where, batch, words, deterministic)
        self.simulator_steps += n_steps
        actions = self.model.policy.to_env(actions)
        return (actions if is_vectorized else actions.squeeze(axis=0)), state

    def _on_device(
        self, where: Simulator | Twin, batch: Observation, words: np.ndarray, deterministic: bool
    ) -> tuple[np.ndarray, int]:
        policy, reward = self.model.policy, self.model._reward
        world: World
        states: PyTree
        owner: World | None = None
        if isinstance(where, Twin):
            world, states = where.world, where.present()
        else:
            world, environments, owner = where.env.world, where.env.lend(), where.env.program_owner
            states = environments.state
            pairs = zip(jax.tree.leaves(batch), jax.tree.leaves(environments.observation), strict=True)
            if not all(np.array_equal(own, seen, equal_nan=True) for own, seen in pairs):
                raise ValueError(
                    "observation is not the one that env gave last: a plan starts from the state of env"
                )
        if reward is not None:
            states = RewardOverrideState(states, self._original(batch))
        world = override(world, reward)
        if isinstance(where, Twin):
            world = where.seen(world, is_own_reward=reward is None)
        actions, n_steps = _act.of(owner, reward)(
            self.plan,
            world,
            policy.structure,
            policy.state,
            states,
            batch,
            words,
            deterministic,
        )
        return np.asarray(actions), counter.to_int(n_steps)

    def _in_clones(
        self,
        brancher: Brancher,
        batch: Observation,
        words: np.ndarray,
        deterministic: bool,
        masks: np.ndarray | None,
    ) -> tuple[np.ndarray, int]:
        plan, policy = self.plan, self.model.policy
        reward: Reward | None = self.model._reward
        group, actions = _propose(plan, policy.structure, policy.state, batch, words, deterministic, masks)
        actions = np.asarray(actions)
        act, value = branch_functions(policy)

        def repeated(leaf: Any) -> np.ndarray:  # as if the same state came once for each branch
            return np.concatenate([np.asarray(leaf)] * plan.n_rollouts)

        returns, n_steps = brancher.branch(
            [brancher.take()] * plan.n_rollouts,
            repeated(actions),
            act,
            horizon=plan.horizon,
            gamma=float(plan.gamma),
            n_uniforms=policy.structure.distribution.n_uniforms,
            n_rollouts=1,
            past_truncation=plan.past_truncation,
            value=value if policy.has_critic else None,
            reward=reward,
            observations=None if reward is None else jax.tree.map(repeated, self._original(batch)),
            seed=int(words[0]) << 32 | int(words[1]),
            wanted=repeated(group.valid),
        )
        returns = returns.reshape(plan.n_rollouts, len(actions), -1).swapaxes(0, 1)
        best = np.asarray(_choose(jnp.asarray(returns), group.valid, group.executed, plan.confidence))
        return actions[np.arange(len(actions)), best], n_steps

    def _original(self, batch: Observation) -> Observation:
        """The observations as a reward function sees them."""
        return Unnormalized(self._env).observation(batch)


_choose = jax.jit(choose)


def _own(policy: Policy, parameters: jax.Array, key: jax.Array, deterministic: bool) -> jax.Array:
    """The policy's own actions ``[N, *A]``, in its units."""
    if deterministic:
        return policy.distribution.mode(parameters)
    words = draw_bits(key, (len(parameters), policy.distribution.n_uniforms))
    return policy.distribution.sample(parameters, bits_to_uniform(words))


def _act_on_device(
    plan: Plan,
    world: World,
    policy: Policy,
    policy_state: PolicyState,
    states: PyTree,
    observation: Observation,
    words: jax.Array,
    deterministic: bool,
) -> tuple[jax.Array, Counter]:
    """Actions ``[N, *A]`` in the world's units."""
    own_key, plan_key = split(bits_to_keys(words), 2)
    parameters = policy.parameters(policy_state, observation, jax.vmap(world.action_mask)(states))
    own = _own(policy, parameters, own_key, deterministic)
    planned = plan_actions(plan, world, policy, policy_state, states, parameters, own, plan_key)
    return policy.to_world(planned.action), planned.simulator_steps


_act = OwnedJit(_act_on_device, static_argnums=(2, 7))


@functools.partial(jax.jit, static_argnames=("policy", "deterministic"))
def _propose(
    plan: Plan,
    policy: Policy,
    policy_state: PolicyState,
    observation: Observation,
    words: jax.Array,
    deterministic: bool,
    masks: jax.Array | None,
) -> tuple[Group, jax.Array]:
    """The candidates ``[N, G]``, and their actions in the world's units."""
    own_key, draw_key = split(bits_to_keys(words), 2)
    parameters = policy.parameters(policy_state, observation, masks)
    own = _own(policy, parameters, own_key, deterministic)
    group = propose(plan, policy, parameters, own, masks, draw_key)
    return group, policy.to_world(group.action)
