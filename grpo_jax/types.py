"""What travels between the rooms.

Shapes: B decision states, G candidates, P distribution parameters; N environments, T steps of a rollout.
"""

from __future__ import annotations

from typing import Any

import jax
from flax import struct

PyTree = Any
Params = Any
Observation = Any  # an array, or a dict of arrays
Metrics = dict[str, jax.Array]


def backend() -> str:
    """The platform that programs run on: that of ``jax.default_device``, where one is set, else of JAX's default backend."""
    device = jax.config.jax_default_device  # type: ignore[attr-defined]
    if device is None:
        return jax.default_backend()
    return device if isinstance(device, str) else str(device.platform)


def is_traced(*trees: PyTree) -> bool:
    """Whether any leaf has no value yet, being traced by a ``jit``, a ``vmap`` or a gradient."""
    return any(isinstance(leaf, jax.core.Tracer) for leaf in jax.tree.leaves(trees))


def tree_bytes(tree: PyTree) -> int:
    """Bytes of all arrays of a tree, or of what has their shapes and dtypes."""
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))


class Step(struct.PyTreeNode):
    """One step of a world.

    Attributes:
      observation: of the state that was reached, before any reset.
      state: the state that was reached, before any reset.
      reward: ``[]`` float, what GRPO maximises.
      terminated: ``[]`` bool, the task itself ended: nothing can be earned any more.
      truncated: ``[]`` bool, a time limit cut the episode: its future is worth something still.
      task_reward: ``[]`` float, what episode statistics count; None where it is ``reward`` itself.
    """

    observation: Observation
    state: PyTree
    reward: jax.Array
    terminated: jax.Array
    truncated: jax.Array
    task_reward: jax.Array | None = None

    @property
    def counted_reward(self) -> jax.Array:
        """What episode statistics count: ``task_reward`` where it is told apart from ``reward``."""
        return self.reward if self.task_reward is None else self.task_reward


class Environments(struct.PyTreeNode):
    """N environments side by side; every leaf ``[N, ...]``.

    Attributes:
      state: world states.
      observation: of these states.
      episode_return: of the running episode, undiscounted, in the task's own reward.
      episode_length: of the running episode, int32.
      last_return: of the last finished episode; 0 before the first.
      last_length: of the last finished episode; 0 before the first, and only then.
    """

    state: PyTree
    observation: Observation
    episode_return: jax.Array
    episode_length: jax.Array
    last_return: jax.Array
    last_length: jax.Array


class Trajectory(struct.PyTreeNode):
    """What was seen; every leaf ``[T, N, ...]``.

    Attributes:
      environments: before the step: decision states, their observations, time since the reset.
      action_mask: bool, or None.
      distribution: parameters of pi_old; None where they were not kept, ``learn`` then computes them.
      action: executed, in the policy's units.
      reward: what GRPO maximises.
      task_reward: what episode statistics count; None where that is ``reward`` itself.
      terminated: bool.
      truncated: bool.
      next_observation: of the state that was reached, before any reset: where no episode ended, the next decision
        state's. None where no critic asks for it.
      value: the critic's of the decision states; None where it was not kept, the critic is then asked.
      branched: world states ``[T, ceil(N / branch_every), ...]``, where only those that are branched were kept and
        ``environments.state`` is None; ``()`` where none is branched.
    """

    environments: Environments
    action_mask: jax.Array | None
    distribution: jax.Array | None
    action: jax.Array
    reward: jax.Array
    task_reward: jax.Array | None
    terminated: jax.Array
    truncated: jax.Array
    next_observation: Observation | None
    value: jax.Array | None = None
    branched: PyTree = None

    @property
    def state(self) -> PyTree:
        """Decision states."""
        return self.environments.state

    @property
    def observation(self) -> Observation:
        """Of the decision states."""
        return self.environments.observation

    @property
    def time(self) -> jax.Array:
        """Steps since the reset; int32 ``[T, N]``."""
        return self.environments.episode_length

    @property
    def ended(self) -> jax.Array:
        """Whether the step was the last one of its episode; bool ``[T, N]``."""
        return self.terminated | self.truncated


class Group(struct.PyTreeNode):
    """The candidate actions of each decision state.

    Attributes:
      action: ``[B, G, *A]`` in the policy's own units.
      log_prob: ``[B, G]`` log pi_old(a_i|s).
      log_weight: ``[B, G]`` log w_i; the weights of a state's valid candidates sum to 1.
      valid: ``[B, G]`` bool, False where an action mask forbids the candidate.
      executed: ``[B]`` int32, which candidate was really executed.
    """

    action: jax.Array
    log_prob: jax.Array
    log_weight: jax.Array
    valid: jax.Array
    executed: jax.Array


class Batch(struct.PyTreeNode):
    """What the update learns from.

    Attributes:
      observation: ``[B, ...]``.
      action_mask: ``[B, n]`` bool, or None where every action is allowed.
      group: the candidates, ``[B, G]``.
      advantage: ``[B, G]``, zero in groups that are not active.
      active: ``[B]`` bool, the group has a spread to learn from.
      alive: ``[B]`` bool, the state belongs to an episode (False behind the end of a trajectory).
      compared: ``[B]`` bool, the state's candidates were compared (False where it was not branched).
      distribution: ``[B, P]`` parameters of pi_old.
      reference: ``[B, P]`` parameters of pi_ref, or None without a KL term.
      value: ``[B]`` V_old, or None without a critic.
      value_target: ``[B]`` lambda-returns, or None without a critic.
    """

    observation: Observation
    action_mask: jax.Array | None
    group: Group
    advantage: jax.Array
    active: jax.Array
    alive: jax.Array
    compared: jax.Array
    distribution: jax.Array
    reference: jax.Array | None = None
    value: jax.Array | None = None
    value_target: jax.Array | None = None


class Counter(struct.PyTreeNode):
    """A count that does not overflow: two uint32 words (int32 is full after 2.1e9 steps, minutes on a GPU)."""

    high: jax.Array
    low: jax.Array
