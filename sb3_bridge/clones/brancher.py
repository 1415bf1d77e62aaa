"""Branches of ordinary environments: what they return and what they cost."""

from __future__ import annotations

import functools
import os
import warnings
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from stable_baselines3.common.vec_env import DummyVecEnv, SubprocVecEnv, VecEnv

from grpo_jax.groups.host_batch import Rewards
from grpo_jax.groups.host_branch import Act, Call, Reached, Settings, Value, group_returns
from grpo_jax.policies.distributions import allowed, for_space
from sb3_bridge.clones.copying import Unclonable
from sb3_bridge.clones.core_state import ACTION_MASKS, MUJOCO, Functions
from sb3_bridge.clones.processes import Local, Workers
from sb3_bridge.clones.snapshot import CloneReport
from sb3_bridge.gymnax.spaces import env_actions
from sb3_bridge.masks import checked_masks, has_masks
from sb3_bridge.policies.spaces import to_action_space
from sb3_bridge.vec_wrappers import find_view

POOL_SIZE = 256  # replicas of all environments of one process, and branches in a lock step
# A copy of a MuJoCo world takes milliseconds to make, and its steps dwarf a policy call.
MUJOCO_POOL_SIZE = 64
LOOP_US = 3.0  # of a lock step, for each branch in it: policy, bookkeeping (measured on CartPole-v1)


def prove(group: Local | Workers, n_envs: int) -> list[CloneReport]:
    """Reports of environments that pass the replay check, which its servers are prepared for then.

    Environments that were made alike are checked once: first one of them, then all that are not like it.

    Raises:
      Unclonable: one does not pass.
    """

    def check(indices: list[int]) -> list[CloneReport]:
        answers = group.call("check", [() if i in indices else None for i in range(n_envs)])
        reports = [CloneReport(*answers[index]) for index in indices]
        for index, report in zip(indices, reports, strict=True):
            if not report.passed:
                where = f"environment {index}: " if index else ""
                raise Unclonable(where + report.description)
        return reports

    first = check([0])[0]
    signatures = group.call("signature", [(first.varying,)] * n_envs)
    found = {signatures[0]: first}
    others = {one: i for i, one in reversed(list(enumerate(signatures))) if one not in found}
    found |= dict(zip(others, check(list(others.values())), strict=True))
    chosen = [found[signature] for signature in signatures]
    group.call("prepare", [(tuple(vars(report).values()),) for report in chosen])
    return list(found.values())


class Brancher:
    """Branches from the states of a VecEnv's environments; none of them is touched.

    Args:
      env: DummyVecEnv or SubprocVecEnv, in SB3's wrappers.
      functions: a pair ``(save, restore)``: ``save(env.unwrapped) -> state`` and ``restore(env.unwrapped, state)``;
        None finds a way of its own.

    Attributes:
      report: what the replay check found; the worst times where environments differ.
      group: where its copies are.
      view: what the wrappers make of observations and rewards.

    Raises:
      Unclonable: why no exact branches can be had here.
    """

    def __init__(self, env: VecEnv, functions: Functions | None = None):
        base, self.view = find_view(env)
        self.num_envs = env.num_envs
        # What ``grpo_jax.groups.host_branch`` asks of simulators, beside ``step``.
        self.seen, self.original, self.rewards = self.view.seen, self.view.original, self.view.rewards
        self.actions = lambda actions: env_actions(env.action_space, np.asarray(actions))
        self.group: Local | Workers
        if isinstance(base, DummyVecEnv):
            self.group, self.n_processes = Local(base, functions), 1
        elif isinstance(base, SubprocVecEnv):
            self.group, self.n_processes = Workers(base, functions), min(self.num_envs, os.cpu_count() or 1)
        else:
            raise Unclonable(
                f"branches run in the environments of a DummyVecEnv or SubprocVecEnv; {type(base).__name__} gives no"
                " access to them"
            )
        self._is_masked, self._space = has_masks(env), env.action_space
        distribution = for_space(to_action_space(env.action_space))
        self.allows = functools.partial(allowed, distribution)
        self._everything = np.ones(distribution.n_parameters, bool)
        self.report = max(prove(self.group, env.num_envs), key=lambda report: report.step_us)
        most = MUJOCO_POOL_SIZE if self.report.way == MUJOCO else POOL_SIZE
        self._pool = max(1, most // self.num_envs)
        self._taken = 0

    def _all(self, method: str, *arguments: Any) -> list[Any]:
        return self.group.call(method, [arguments] * self.num_envs)

    def take(self) -> int:
        """Keeps the present state of every environment, until ``branch`` or ``free``; returns a handle.

        Raises:
          Unclonable: an environment that was replaced, or wrapped anew, does not pass the replay check; or one holds
            something by now that cannot be copied.
        """
        self._all("take", self._taken)
        self._taken += 1
        return self._taken - 1

    def masks(self, handle: int) -> np.ndarray:
        """What copies allow in a kept state, bool ``[N, P]``; of environments with masks."""
        answers = self._all("masks_at", handle)
        return checked_masks(answers, self._space, self.num_envs, f"{ACTION_MASKS}() of a clone")

    def free(self) -> None:
        """Forgets all states that were kept."""
        self._all("free")

    def replay(self, handle: int, actions: Any) -> tuple[Any, np.ndarray, np.ndarray, np.ndarray]:
        """What ``actions`` lead to from a kept state, with the random generators as they were in it.

        Equal, bit for bit, to what the environments did, if they were stepped with these actions ``[N, *A]`` from that
        state. A DummyVecEnv rounds rewards to float32, and after an end shows the next episode's first observation instead
        (this one is ``infos[i]["terminal_observation"]``).

        Returns:
          Observations ``[N, ...]`` (a dict of such arrays for Dict spaces) before any VecEnvWrapper, rewards float64,
          terminated and truncated bool ``[N]``.
        """
        answers = self.group.call("replay", [(handle, action) for action in np.asarray(actions)])
        return jax.tree.map(lambda *parts: np.concatenate(parts), *answers)

    def seconds(self, n_states: int, n_candidates: int, horizon: int, n_rollouts: int = 1) -> float:
        """What the branches of ``n_states`` states will cost at most, by the times that the check measured."""
        report = self.report
        n_branches = n_states * n_candidates * n_rollouts
        each = horizon * report.step_us + report.restore_us
        own = n_states * report.snapshot_us + n_branches * each
        return (own / self.n_processes + n_branches * horizon * LOOP_US) * 1e-6

    def branch(
        self,
        handles: Sequence[int],
        actions: Any,
        act: Act,
        *,
        value: Value | None = None,
        reward: Rewards | None = None,
        observations: Any = None,
        wanted: np.ndarray | None = None,
        **settings: Any,
    ) -> tuple[np.ndarray, int]:
        """Returns of the candidates of each kept state, as ``grpo_jax.groups.host_branch.group_returns`` defines them.

        Args:
          handles: T of ``take``; all kept states are freed afterwards.
          actions: candidates ``[T * N, G, *A]`` in env units, states in the order of time, then of environments.
          act: the policy that branches follow; called with some few batch sizes.
          value: the critic, for what lies beyond the horizon or a truncation; None: nothing.
          reward: the user's; None: the environment's, as the wrappers make it.
          observations: ``[T * N, ...]`` the states as a reward function sees them (``view.original``); with ``reward``.
          wanted: bool ``[T * N]`` or ``[T * N, G]``, states or candidates whose branches are wanted; None: all.
          settings: of ``grpo_jax.groups.host_branch.Settings``: ``horizon``, ``gamma``, ... The environments' generators
            are seeded anew from ``seed``, so that no branch knows the real future.

        Returns:
          Returns float32 ``[T * N, G]`` (0 where not wanted), and the number of environment steps made.

        Raises:
          ValueError: shapes or numbers that do not fit.
          Unclonable: something large that never changed at first was changed.
        """
        actions = self.actions(actions)
        n_states = len(handles) * self.num_envs
        if len(actions) != n_states:
            raise ValueError(
                f"actions are for {len(actions)} states, but {len(handles)} handles of {self.num_envs} environments keep"
                f" {n_states}"
            )
        asked = {"value": value, "reward": reward, "observations": observations, "wanted": wanted}
        try:
            self._all("begin", self._is_masked)
            found = group_returns(self, act, handles, actions, Settings(**settings), pool=self._pool, **asked)
        finally:
            self.free()
        changed = sorted({name for names in self._all("changed_constants") for name in names})
        if changed:
            warnings.warn(
                f"{', '.join(changed)} seemed never to change, but did: the last branches may have been wrong. From now on"
                " it is part of every snapshot",
                stacklevel=2,
            )
        return found

    def step(self, calls: list[Call | None]) -> list[Reached | None]:
        """One lock step of the replicas."""
        answers = self.group.call("step", [None if call is None else tuple(call) for call in calls])
        return [None if answer is None else self._reached(answer) for answer in answers]

    def _reached(self, answer: Any) -> Reached:
        if not self._is_masked:
            return Reached(*answer)
        reached, asked = answer[:-1], answer[-1]
        rows = [self._everything if mask is None else mask for mask in asked]
        masks = checked_masks(rows, self._space, len(rows), f"{ACTION_MASKS}() of a clone", "branch")
        return Reached(*reached)._replace(masks=masks)
