"""Agents: runs of one program side by side (seeds, settings), along one axis, and how many of them are computed at once."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import chex
import jax
import jax.numpy as jnp
import numpy as np

from grpo_jax.config import GRPOConfig
from grpo_jax.groups import candidates
from grpo_jax.groups.branch import default_branches, device_memory
from grpo_jax.spaces import encoded_size
from grpo_jax.training.loop import TrainState, init
from grpo_jax.types import PyTree, backend, tree_bytes
from grpo_jax.worlds.base import World

CPU_BYTES = 1 << 20
"""What a block of agents may touch in an iteration on a CPU: a part of a core's own cache (docs/sweeps.md has what was measured)."""
DEVICE_BYTES = 4 << 30
"""The same on another device, where it does not say how much memory it has."""
DEVICE_SHARE = 0.5
"""Share of a device's memory that a block of agents may fill."""

T = TypeVar("T")


def over_agents(one: Callable[[Any], T], agents: PyTree, block: int) -> T:
    """Maps a function of one agent over the axis of agents: a block side by side, the blocks one after the other.

    Args:
      one: a function of one agent's pytree.
      agents: the pytrees of all agents, leaves ``[A, ...]``.
      block: agents side by side. Where it does not divide ``A``, some agents are computed twice.

    Returns:
      What ``one`` returns, leaves ``[A, ...]``.
    """
    n_agents = jax.tree.leaves(agents)[0].shape[0]
    chex.assert_tree_shape_prefix(agents, (n_agents,))
    if block >= n_agents:
        return jax.vmap(one)(agents)
    if block == 1:
        return jax.lax.map(one, agents)
    n_blocks = -(-n_agents // block)
    if n_blocks * block > n_agents:
        rows = np.arange(n_blocks * block) % n_agents
        agents = jax.tree.map(lambda leaf: leaf[rows], agents)
    blocks = jax.tree.map(lambda leaf: leaf.reshape(n_blocks, block, *leaf.shape[1:]), agents)
    done: T = jax.lax.map(jax.vmap(one), blocks)
    return jax.tree.map(lambda leaf: leaf.reshape(n_blocks * block, *leaf.shape[2:])[:n_agents], done)


def stack_configs(configs: Sequence[GRPOConfig]) -> GRPOConfig:
    """Configs of one structure as one, whose traced fields are arrays ``[A]``."""
    # Python's numbers stay weakly typed, as in a single run: float32 parameters stay float32 under x64.
    return jax.tree.map(lambda *leaves: jnp.stack([jnp.asarray(leaf) for leaf in leaves]), *configs)


def agent(tree: T, index: int) -> T:
    """One of the agents of a pytree, leaves ``[A, ...]``."""
    return jax.tree.map(lambda leaf: leaf[index], tree)


def check_block(block: int | None) -> None:
    """Refuses what is no number of agents."""
    if block is not None and (type(block) is not int or block < 1):
        raise ValueError(
            f"block={block!r} must be None or an integer of at least 1: agents that run side by side"
        )


def block_size(n_agents: int, most: int) -> int:
    """Agents in a block: about ``most``, such that few or none are computed twice."""
    most = max(1, min(most, n_agents))
    for size in range(most, most // 2, -1):
        if n_agents % size == 0:
            return size
    return -(-n_agents // -(-n_agents // most))


def default_block(
    config: GRPOConfig, env: World, n_agents: int, mesh: jax.sharding.Mesh | None = None
) -> int:
    """Agents side by side where nothing else was asked for: what suits the backend's cache or memory.

    Args:
      config: of one agent; or of all, leaves ``[A]``.
      env: the world.
      n_agents: how many there are.
      mesh: devices that share the agents, or their environments, where these have shards; None: one device.
    """
    if mesh is not None and config.n_shards == 1:
        n_agents = max(1, n_agents // mesh.devices.size)
    return block_size(n_agents, _budget() // agent_bytes(config, env))


def agent_bytes(config: GRPOConfig, env: World) -> int:
    """About how many bytes one agent touches again and again in an iteration: an estimate, from shapes alone."""
    key = jax.eval_shape(lambda: jax.random.key(0))
    state: TrainState = jax.eval_shape(functools.partial(init, config, env), key)
    environment = jax.eval_shape(lambda tree: agent(tree, 0), state.environments.state)
    observation_bytes = 4 * encoded_size(env.observation_space)
    state_bytes = tree_bytes(environment)
    # What a network makes of a row: the outputs of its layers, whose sizes are the last axes of their kernels.
    kernels = [leaf for leaf in jax.tree.leaves(state.params) if leaf.ndim >= 2]
    row_bytes = observation_bytes + 4 * sum(leaf.shape[-1] for leaf in kernels)
    branches = config.n_envs
    if config.candidates not in ("trajectory", "episodes"):
        per_state = candidates.n_candidates(config, state.policy.distribution) * config.n_rollouts
        wanted = config.n_states // config.branch_every * per_state
        branches = min(wanted, config.max_branches or default_branches(env, environment))
    rollout = config.n_states * (observation_bytes + state_bytes // config.branch_every)
    acting = branches * (row_bytes + state_bytes)
    learning = tree_bytes(state.learner) + tree_bytes(state.params) + 3 * config.batch_size * row_bytes
    return int(max(acting, learning) + rollout)


def _budget() -> int:
    if backend() == "cpu":
        return CPU_BYTES
    limit = device_memory()
    return int(DEVICE_SHARE * limit) if math.isfinite(limit) else DEVICE_BYTES
