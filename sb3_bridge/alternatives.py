"""Where candidates are followed in environments that are stepped on the host: clones, a twin, a learned world, the user's."""

from __future__ import annotations

import dataclasses
import functools
import itertools
import warnings
from collections.abc import Callable
from typing import Any, NamedTuple

import flax.serialization
import jax
import jax.numpy as jnp
import numpy as np
from gymnasium import spaces

from grpo_jax import counter
from grpo_jax.cache import quick_jit
from grpo_jax.config import GRPOConfig
from grpo_jax.groups import compare
from grpo_jax.groups.branch import Branches
from grpo_jax.learning import model as models
from grpo_jax.noise import bits_to_keys
from grpo_jax.policies.policy import Policy, PolicyState
from grpo_jax.training import loop
from grpo_jax.types import Group, Metrics, PyTree, Trajectory
from grpo_jax.worlds.base import RewardOverride, RewardOverrideState, World
from grpo_jax.worlds.function import FunctionWorld
from grpo_jax.worlds.learned import LearnedWorld
from sb3_bridge.clones.brancher import Brancher
from sb3_bridge.clones.copying import Unclonable
from sb3_bridge.functions.programs import OwnedJit
from sb3_bridge.functions.reward import Reward
from sb3_bridge.functions.transition import resolve_transition
from sb3_bridge.policies.compiled import functions_of
from sb3_bridge.policies.policy import GRPOPolicy
from sb3_bridge.rollout.callbacks import merged
from sb3_bridge.rollout.host import acting
from sb3_bridge.twins.check import short
from sb3_bridge.twins.twin import NoTwin, Twin
from sb3_bridge.vec_wrappers import VecStep

MASKS = "action mask"
MEASURED_HORIZON = 16
CAPACITY = 50_000
"""Transitions that a learned world remembers."""


class Followed(NamedTuple):
    """What came of the candidates of a rollout; with neither world nor branches, episodes are compared."""

    world: World | None = None  # to follow them in, by the program that updates the policy
    branches: tuple[Group, Branches] | None = None  # where they were followed already
    n_steps: int = 0  # of environments, that this took
    owners: tuple[Any, ...] = ()  # the user's functions in the world, by whose life its programs are bounded
    states: PyTree = (
        None  # of the world, ``[n_steps, n_envs, ...]``; None: the world gives those of the observations
    )


class Clones:
    """Exact branches: copies of the environments are restored to the decision states and stepped from there.

    Copies prove themselves while they are used: the executed action of a decision state is stepped in one too, and must
    lead where it really led. The first mismatch ends their use: it is an error where the user asked for clones
    (``is_demanded``), else ``failure`` says why. ``sees_last`` tells whether the last observation of an episode is known
    as the environment gave it, which VecNormalize hides.
    """

    def __init__(self, brancher: Brancher, reward: Reward | None, is_demanded: bool):
        self.brancher, self._reward, self._is_demanded = brancher, reward, is_demanded
        self._handles: list[int] = []
        self.description, self.failure, self.sees_last = brancher.report.description, "", True

    def start(self, config: GRPOConfig, iteration: int) -> None:
        """A new rollout begins."""
        self.brancher.free()
        self._handles.clear()
        wanted = np.asarray(compare.branched(config, iteration))
        self._wanted = wanted.reshape(config.n_steps, config.n_envs)
        # A check costs a restore and a step: next to nothing where branches are long.
        self._check_every = max(1, 16 // (config.horizon * config.n_rollouts))

    def before_step(self, masks: np.ndarray | None) -> None:
        """Keeps the decision states that the environments are in, where one of them is wanted."""
        self._masks = masks
        self._handles.append(-1)
        if not self.failure and self._wanted[len(self._handles) - 1].any():
            self._handles[-1] = self._try(self.brancher.take, -1)

    def after_step(self, actions: np.ndarray, reached: Any, rewards: np.ndarray, result: VecStep) -> None:
        """Compares what clones do with what really happened."""
        handle = self._handles[-1]
        if handle >= 0 and handle % self._check_every == 0:
            self._try(functools.partial(self._check, handle, actions, reached, rewards, result))

    def _check(
        self, handle: int, actions: np.ndarray, reached: Any, rewards: np.ndarray, result: VecStep
    ) -> None:
        seen, its_rewards, terminated, truncated = self.brancher.replay(handle, actions)
        pairs = {} if self._masks is None else {MASKS: (self.brancher.masks(handle), self._masks)}
        pairs |= {
            "reward": (its_rewards.astype(np.float32), np.asarray(rewards, np.float32)),
            "end of the episode": (terminated | truncated, result.dones),
            "truncation": (truncated & ~terminated, result.truncated),
        }
        seen = self.brancher.view.original(seen)
        if isinstance(seen, dict):
            pairs |= {f"observation[{name!r}]": (part, reached[name]) for name, part in seen.items()}
        else:
            pairs["observation"] = (seen, reached)
        for (name, (mine, real)), index in itertools.product(pairs.items(), range(len(actions))):
            if name.startswith("observation") and result.dones[index] and not self.sees_last:
                continue
            if not np.array_equal(mine[index], real[index], equal_nan=mine.dtype.kind == "f"):
                raise Unclonable(
                    f"environment {index}: its clone does not do what it does itself:"
                    f" {'before' if name == MASKS else 'after'} the action {actions[index]} the clone's {name} is {short(mine[index])}, the environment's is {short(real[index])}. A part of its"
                    " state is not copied, or shared with the copies (a closure, a class attribute, a global, a native"
                    " library), or it draws from outside (np.random, a clock)"
                )

    def follow(
        self, config: GRPOConfig, policy: GRPOPolicy, trajectory: Trajectory, words: np.ndarray
    ) -> Followed:
        """The group returns of the candidates of those decision states that were wanted.

        ``trajectory.state`` is what the reward function sees of them; ``words`` uint32 ``[2]`` are those of the
        iteration's PRNG key.
        """
        if self.failure:
            return Followed()
        return self._try(functools.partial(self._follow, config, policy, trajectory, words), Followed())

    def _follow(
        self, config: GRPOConfig, policy: GRPOPolicy, trajectory: Trajectory, words: np.ndarray
    ) -> Followed:
        structure, state = policy.structure, policy.state
        bare = trajectory.replace(environments=trajectory.environments.replace(state=None))
        group, actions = _propose(config, structure, state, bare, words)
        act, value = branch_functions(policy)
        returns, n_steps = self.brancher.branch(
            self._handles,
            np.asarray(actions),
            act,
            horizon=config.horizon,
            gamma=float(config.gamma),
            n_uniforms=structure.distribution.n_uniforms,
            n_rollouts=config.n_rollouts,
            backup=config.backup,
            persistence=config.persistence,  # a number: schedules were asked already
            past_truncation=config.branch_past_truncation,
            value=value if config.bootstrap else None,
            reward=self._reward,
            observations=merged(trajectory.state),
            common_random_numbers=config.common_random_numbers,
            seed=int(words[0]) << 32 | int(words[1]),
            wanted=self._wanted.reshape(-1, 1) & np.asarray(group.valid),
        )
        self._handles.clear()
        return Followed(branches=(group, Branches(jnp.asarray(returns), counter.zero())), n_steps=n_steps)

    def _try(self, do: Callable[[], Any], default: Any = None) -> Any:
        try:
            return do()
        except Unclonable as error:
            self.brancher.free()
            why = f"at step {len(self._handles) - 1} of the rollout: {error}"
            if self._is_demanded:
                raise Unclonable(
                    f"dynamics='clone' cannot be gone on with: {why}. Use dynamics='auto', which goes on without"
                    " clones, 'learned', candidates='episodes', or a pair (get_state, set_state) that copies all"
                ) from error
            self.failure = why
            return default


class Twins:
    """Branches in a JAX world with the environments' own dynamics, from states that are taken before every step.

    Whatever the environments do is compared with what their twin does; the first difference ends its use: an error where
    the user asked for it (``is_demanded``), else ``failure`` says why.
    """

    def __init__(self, twin: Twin, reward: Reward | None, is_demanded: bool):
        self._twin, self._reward, self._is_demanded = twin, reward, is_demanded
        self._rows: list[tuple[Any, ...]] = []
        self.description, self.failure = twin.description, ""

    def start(self, config: GRPOConfig, iteration: int) -> None:
        """A new rollout begins."""
        self._rows = []
        self._try(self._twin.check_wrappers)

    def before_step(self, masks: np.ndarray | None) -> None:
        """Takes the states that the environments are in."""
        if not self.failure:
            self._rows.append((self._try(self._twin.take),))

    def after_step(self, actions: np.ndarray, reached: Any, rewards: np.ndarray, result: VecStep) -> None:
        """Keeps what really happened."""
        if not self.failure:
            if result.dones.any() and not self._twin.sees_last:
                reached = np.where(result.dones.reshape(-1, *(1,) * (reached.ndim - 1)), np.nan, reached)
            self._rows[-1] += (actions, reached, rewards, result.dones & ~result.truncated, result.truncated)

    def follow(
        self, config: GRPOConfig, policy: GRPOPolicy, trajectory: Trajectory, words: np.ndarray
    ) -> Followed:
        """The twin, and the states to branch from; ``trajectory.state`` is what the reward function sees of them."""
        if not self.failure:
            states = self._try(functools.partial(self._twin.compare, self._rows))
        if self.failure:
            return Followed()
        world: World = self._twin.world
        if self._reward is None:
            return Followed(self._twin.seen(world, True), states=states)
        world = self._twin.seen(RewardOverride(world, self._reward.borrowed), False)
        return Followed(world, owners=(self._reward,), states=RewardOverrideState(states, trajectory.state))

    def _try(self, do: Callable[[], Any]) -> Any:
        try:
            return do()
        except NoTwin as error:
            if self._is_demanded:
                raise NoTwin(
                    f"dynamics='twin' cannot be gone on with: {error}. Use dynamics='auto', which goes on without a twin"
                ) from error
            self.failure = str(error)


class Learned:
    """Branches in a world that is learned from all real transitions; until it is good enough, episodes are compared.

    Without the user's ``reward`` the environment's is learned; ``metrics`` tell how well the last rollout was predicted.
    """

    description = (
        "a world that is learned from all real transitions; until it predicts well, episodes are compared"
    )

    def __init__(self, policy: GRPOPolicy, reward: Reward | None, words: np.ndarray):
        self._model = models.init_model(
            policy.structure.observation_space,
            policy.structure.action_space,
            bits_to_keys(jnp.asarray(words)),
            reward_function=None if reward is None else _never,  # put in its place by `_judged`
            capacity=CAPACITY,
        )
        self._reward = reward
        self.metrics: Metrics = {}

    def follow(
        self, config: GRPOConfig, policy: GRPOPolicy, trajectory: Trajectory, words: np.ndarray
    ) -> Followed:
        """Learns from a rollout; the world, if it predicted that rollout well enough beforehand."""
        horizon = min(config.horizon, MEASURED_HORIZON)
        reward = None if self._reward is None else self._reward.borrowed
        observe = _observe.of(self._reward)
        model, metrics = observe(self._model, policy.structure, trajectory, horizon, reward)
        model, _ = models.fit(model, bits_to_keys(jnp.asarray(words)))
        parts = jax.device_get((model.world.params, model.world.normaliser))
        if not all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(parts)):
            raise FloatingPointError(
                "the learned world would hold NaN or inf, of rewards or observations that are too large for it: scale them."
                " It is kept as it was"
            )
        self._model = model
        self.metrics = jax.device_get(metrics)
        if not models.usable(self.metrics):
            return Followed()
        return Followed(_judged(self._model.world, reward), owners=(self._reward,))

    def state_dict(self) -> PyTree:
        """All that was learned and seen, as nested dicts of arrays."""
        model = jax.device_get(self._model)
        seen = jax.tree.map(lambda leaf: leaf[: int(model.replay.count)], model.replay.data)
        return flax.serialization.to_state_dict(model.replace(replay=model.replay.replace(data=seen)))

    def load_state_dict(self, state: PyTree) -> None:
        """Takes over what ``state_dict`` gave; a world that predicts other things is left, with a warning.

        Raises:
          ValueError: it is no such thing.
        """
        own = self._model
        try:
            model = flax.serialization.from_state_dict(own, state)
            kinds, its_kinds = (
                jax.tree.map(lambda leaf: np.asarray(leaf).dtype, one) for one in (own, model)
            )
            n_seen, sizes = (
                int(model.replay.n_seen),
                {len(leaf) for leaf in jax.tree.leaves(model.replay.data)},
            )
            if kinds != its_kinds or n_seen < 0 or sizes != {min(n_seen, own.replay.capacity)}:
                raise TypeError(f"{n_seen} transitions were seen, and {sizes} are there")
        except (AttributeError, IndexError, KeyError, TypeError, ValueError) as error:
            raise ValueError(
                f"the learned world of the file is damaged: {type(error).__name__} {error}"
            ) from error
        shapes, its_shapes = (jax.tree.map(np.shape, (one.world, one.optimizer)) for one in (own, model))
        if shapes != its_shapes:
            warnings.warn(
                "the learned world of the file predicts other things than this model asks of it (reward_function was"
                " added or left out): it is learned anew",
                UserWarning,
                stacklevel=2,
            )
            return
        data = jax.tree.map(
            lambda empty, seen: empty.at[: len(seen)].set(seen), own.replay.data, model.replay.data
        )
        self._model = jax.tree.map(jnp.asarray, model.replace(replay=model.replay.replace(data=data)))


class Function:
    """Branches in the user's ``f(state, action) -> next_state``, with the user's reward, which there must be."""

    def __init__(self, function: Callable[[Any, Any], Any], policy: GRPOPolicy, reward: Reward | None):
        if reward is None:
            raise ValueError(
                "dynamics=f tells what an action leads to, not what that is worth: pass"
                " reward_function(state, action, next_state) too"
            )
        transition = resolve_transition(function, policy.observation_space, policy.action_space)
        inner = FunctionWorld(
            transition=transition.borrowed,
            initial_state=_never,
            terminated=None,
            max_steps=np.iinfo(np.int32).max,
            observation_space=policy.structure.observation_space,
            action_space=policy.structure.action_space,
        )
        self.description = f"your transition function ({transition.form})"
        self._world = RewardOverride(inner, reward.borrowed)
        self._owners = (transition, reward)

    def follow(
        self, config: GRPOConfig, policy: GRPOPolicy, trajectory: Trajectory, words: np.ndarray
    ) -> Followed:
        """The user's world, which knows all it ever will."""
        return Followed(self._world, owners=self._owners)


Alternatives = Clones | Twins | Learned | Function
"""Somewhere to follow candidates: ``follow`` does, or says where they can be followed."""


def branch_functions(policy: GRPOPolicy) -> tuple[Callable[..., np.ndarray], Callable[..., np.ndarray]]:
    """What branches on the host ask of the policy as it is now: its actions in env units, and its critic's values."""
    structure, state = policy.structure, policy.state
    act, is_box = acting(structure), isinstance(policy.action_space, spaces.Box)

    def choose(observations: Any, uniforms: np.ndarray, *masks: np.ndarray) -> np.ndarray:
        acted = act(state, observations, uniforms, *masks)
        return np.asarray(acted.stretched if is_box else acted.choice)

    def value(observations: Any) -> np.ndarray:
        return np.asarray(functions_of(structure).value(state, observations))

    return choose, value


def _never(*_: Any) -> Any:
    raise NotImplementedError(
        "branches start from visited states, and no world is asked for rewards while it is fitted"
    )


@functools.partial(quick_jit, static_argnums=1)
def _propose(
    config: GRPOConfig, policy: Policy, state: PolicyState, trajectory: Trajectory, words: jax.Array
) -> tuple[Group, jax.Array]:
    group, _ = loop.draw_group(config, policy, state, trajectory, bits_to_keys(words))
    return group, policy.to_world(group.action)


def _judged(world: LearnedWorld, reward: Reward | None) -> LearnedWorld:
    return world if reward is None else dataclasses.replace(world, reward_function=reward)


def _remember(
    model: models.Model, policy: Policy, trajectory: Trajectory, horizon: int, reward: Reward | None
) -> tuple[models.Model, Metrics]:
    transitions = models.transitions_of(policy, trajectory)
    metrics = models.measure(_judged(model.world, reward), transitions, horizon)
    # Of a rollout that is larger than the replay, its end.
    most = model.replay.capacity // transitions.reward.shape[1]
    recent = jax.tree.map(lambda leaf: leaf[-most:], transitions)
    return model.replace(replay=models.remember(model.replay, recent)), metrics


_observe = OwnedJit(_remember, static_argnums=(1, 3, 4))
