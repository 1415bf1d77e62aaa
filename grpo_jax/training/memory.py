"""Memory: how many bytes an iteration takes, from shapes alone, and settings that keep within a limit."""

from __future__ import annotations

import functools
import math
import re
from typing import Any, NamedTuple

import jax
from jax.extend.core import ClosedJaxpr, Jaxpr
from jax.interpreters import partial_eval

from grpo_jax.config import GRPOConfig
from grpo_jax.groups import candidates
from grpo_jax.groups.branch import chunk_size, default_branches
from grpo_jax.learning.update import NARROW
from grpo_jax.noise import KEY_WORDS, as_key
from grpo_jax.policies.policy import Policy, PolicyState
from grpo_jax.spaces import encoded_size
from grpo_jax.training.agents import agent, block_size, default_block
from grpo_jax.training.loop import TrainState, collect, compare, init
from grpo_jax.types import PyTree, tree_bytes
from grpo_jax.worlds.base import World

_UNITS = {"": 1, "B": 1, "KIB": 1 << 10, "MIB": 1 << 20, "GIB": 1 << 30, "TIB": 1 << 40}
_UNITS |= {"KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}


class Memory(NamedTuple):
    """Bytes that a program takes at its peak on each device, compiled code not counted: an estimate, from shapes alone.

    Attributes:
      state: of all agents (seeds, settings), before and after an iteration.
      rollout: of the decision states of an iteration of one agent, their groups, and their values, where there is a critic.
      branch: of one branch: its world state, and what the policy computes from it.
      n_branches: of one agent, side by side.
      update: what one agent holds while it learns: its batch, and a minibatch with what its gradient needs.
      block: agents side by side.
    """

    state: int
    rollout: int
    branch: int
    n_branches: int
    update: int
    block: int

    @property
    def total(self) -> int:
        """All of it."""
        return self.state + self.block * max(self.rollout + self.branch * self.n_branches, self.update)

    def __str__(self) -> str:
        return (
            f"{_text(self.total)}: {_text(self.state)} of states, and for each of {self.block} agents side by side"
            f" {_text(self.rollout)} of a rollout with {self.n_branches:,} branches of {self.branch:,} bytes, or"
            f" {_text(self.update)} of an update, whichever is more"
        )


def memory(
    config: GRPOConfig,
    env: World,
    *,
    n_agents: int = 1,
    block: int | None = None,
    mesh: jax.sharding.Mesh | None = None,
) -> Memory:
    """What ``run`` takes of each device's memory: about, see ``docs/gpu.md`` for how well this fits.

    Args:
      config: the settings.
      env: the world.
      n_agents: seeds, or seeds of all settings.
      block: as for ``run``.
      mesh: as for ``run``.
    """
    if block is None:
        block = default_block(config, env, n_agents, mesh)
    if mesh is not None and config.n_shards == 1:
        n_agents = -(-n_agents // mesh.devices.size)
    n_parts = 1 if mesh is None or config.n_shards == 1 else mesh.devices.size
    here = config.replace(
        n_envs=config.n_envs // n_parts, batch_size=config.batch_size // n_parts, n_shards=1
    )
    key = jax.eval_shape(lambda: jax.random.key(0))
    state: TrainState = jax.eval_shape(functools.partial(init, here, env), key)
    acted, trajectory = jax.eval_shape(
        lambda state: collect(
            here, env, state, keep_next_observation=here.bootstrap, keep_states=False, progress=0.0
        ),
        state,
    )
    comparison = jax.eval_shape(functools.partial(compare, here, env), acted, trajectory)
    all_layers, widest = _layers(state.policy, state.learner.policy, acted.environments.observation)
    batch, n_states, rows = comparison.batch, here.n_states, min(here.batch_size, here.n_states)
    groups = tree_bytes(batch) - tree_bytes(batch.observation)  # the observations are those of the rollout
    table = tree_bytes([leaf for leaf in jax.tree.leaves(batch) if math.prod(leaf.shape[1:]) <= NARROW])
    is_over = tree_bytes((trajectory.next_observation, trajectory.branched))  # when the update begins
    rollout = tree_bytes(trajectory) + groups
    update = rollout - is_over + table + rows * (tree_bytes(batch) // n_states + all_layers)
    rollout += n_states * widest if here.bootstrap else 0
    action = jax.eval_shape(lambda tree: state.policy.to_world(agent(agent(tree, 0), 0)), trajectory.action)
    is_random = _reads_key(env, state, action)
    branch, n_branches = _branches(config, here, env, state, widest, is_random, n_parts)
    return Memory(2 * n_agents * tree_bytes(state), rollout, branch, n_branches, update, min(block, n_agents))


def bounded(
    config: GRPOConfig,
    env: World,
    limit: int | str,
    *,
    n_agents: int = 1,
    block: int | None = None,
    mesh: jax.sharding.Mesh | None = None,
) -> tuple[GRPOConfig, int]:
    """The settings with as many branches side by side, and the block of agents, as a limit allows; numbers stay the same.

    Args:
      config: the settings.
      env: the world.
      limit: bytes of each device, or text such as ``"8GiB"``.
      n_agents: as for ``memory``.
      block: agents side by side, where they are given; None: to be chosen.
      mesh: as for ``run``.

    Raises:
      ValueError: it cannot be kept to; says what takes how much, and what to lower.
    """
    limit = size(limit)
    need = memory(config, env, n_agents=n_agents, block=block, mesh=mesh)
    if need.total > limit and block is None and need.block > 1:
        room = (limit - need.state) // max(1, (need.total - need.state) // need.block)
        need = memory(config, env, n_agents=n_agents, block=block_size(need.block, room), mesh=mesh)
    if need.total > limit and need.n_branches:
        side_by_side = config.n_shards // (
            1 if mesh is None else math.gcd(config.n_shards, mesh.devices.size)
        )
        most = ((limit - need.state) // need.block - need.rollout) // need.branch // side_by_side
        config = config.replace(max_branches=max(1, most))
        need = memory(config, env, n_agents=n_agents, block=need.block, mesh=mesh)
    if need.total > limit:
        raise ValueError(
            f"memory_limit={_text(limit)} is less than this run needs at least, about {need}. Lower n_envs"
            f" ({config.n_envs}), n_steps ({config.n_steps}), batch_size ({config.batch_size}) or the number of seeds"
        )
    return config, need.block


def size(limit: int | str) -> int:
    """Bytes of a number, or of text such as ``"8GiB"`` or ``"500 MB"``.

    Raises:
      ValueError: it is neither.
    """
    known = re.fullmatch(r"\s*([0-9]+(?:\.[0-9]+)?)\s*([A-Za-z]*)\s*", str(limit))
    unit = _UNITS.get(known[2].upper()) if known else None
    n_bytes = int(float(known[1]) * unit) if known and unit else 0
    if n_bytes < 1 or isinstance(limit, bool):
        raise ValueError(f"memory_limit={limit!r} must be bytes, or a size such as '8GiB' or '500MB'")
    return n_bytes


def _branches(
    config: GRPOConfig,
    here: GRPOConfig,
    env: World,
    state: TrainState,
    widest: int,
    is_random: bool,
    n_parts: int,
) -> tuple[int, int]:
    """Bytes of a branch, and how many of an agent lie side by side on a device."""
    if config.candidates in ("trajectory", "episodes"):
        return 0, 0
    environment = jax.eval_shape(lambda tree: agent(tree, 0), state.environments.state)
    per_state = candidates.n_candidates(config, state.policy.distribution) * config.n_rollouts
    n_states = here.n_states // config.branch_every
    n_shards = max(1, config.n_shards // n_parts)
    most = config.max_branches * n_shards or default_branches(env, environment)
    n_branches = chunk_size(n_states, per_state, most) * per_state
    n_words = state.policy.distribution.n_uniforms + (config.persistence is not None)
    n_words += KEY_WORDS * is_random
    streams = per_state if not config.common_random_numbers else config.n_rollouts
    noise = 4 * config.horizon * n_words * streams // per_state
    held = tree_bytes(environment) + 4 * encoded_size(env.observation_space)
    return 2 * held + widest + noise, n_branches


def _reads_key(env: World, state: TrainState, action: jax.ShapeDtypeStruct) -> bool:
    """Whether a step of the world is random: if not, no keys are drawn for its branches."""
    world_state = jax.eval_shape(lambda tree: agent(tree, 0), state.environments.state)
    key = jax.eval_shape(lambda: as_key(jax.random.key(0)))
    program = jax.make_jaxpr(lambda key, state, action: env.step(key, state, action))(
        key, world_state, action
    )
    _, is_used = partial_eval.dce_jaxpr(program.jaxpr, [True] * len(program.jaxpr.outvars))
    return bool(is_used[0])


def _layers(policy: Policy, state: PolicyState, observation: PyTree) -> tuple[int, int]:
    """Bytes that go into and come out of the layers of a policy, and its critic, for one row: of all, and of the widest.

    The observation that goes into the first one is not counted: it is there already.
    """

    def judge(state: PolicyState, observation: PyTree) -> Any:
        judged = policy.parameters_and_value if policy.critic is not None else policy.parameters
        return judged(state, jax.tree.map(lambda leaf: leaf[:1], observation))

    seen = max((tree_bytes(leaf) // leaf.shape[0] for leaf in jax.tree.leaves(observation)), default=0)
    products = _products(jax.make_jaxpr(judge)(state, observation).jaxpr)
    layers = [(0 if taken == seen else taken) + given for taken, given in products]
    return sum(layers), max(layers, default=0)


def _products(program: Jaxpr) -> list[tuple[int, int]]:
    """Bytes of the first operand and the result of every matrix product and convolution."""
    found: list[tuple[int, int]] = []
    for equation in program.eqns:
        parts = jax.tree.leaves(list(equation.params.values()))
        for part in parts:
            if isinstance(part, (ClosedJaxpr, Jaxpr)):
                found += _products(part.jaxpr if isinstance(part, ClosedJaxpr) else part)
        if equation.primitive.name in ("dot_general", "conv_general_dilated"):
            found.append((tree_bytes(equation.invars[0].aval), tree_bytes(equation.outvars[0].aval)))
    return found


def _text(n_bytes: int) -> str:
    return f"{n_bytes / (1 << 20):,.1f} MiB"
