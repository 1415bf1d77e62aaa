"""Branches of ordinary environments: what they return and what they cost."""

from __future__ import annotations

import dataclasses
import os
import warnings
from collections.abc import Sequence
from typing import Any

import numpy as np
from stable_baselines3.common.vec_env import DummyVecEnv, SubprocVecEnv, VecEnv

from grpo_jax.config import Backup
from sb3_bridge.clones.copying import Unclonable
from sb3_bridge.clones.core_state import MUJOCO, Functions
from sb3_bridge.clones.lockstep import Act, Loop, Value
from sb3_bridge.clones.processes import Group, Local, Workers
from sb3_bridge.clones.snapshot import CloneReport
from sb3_bridge.functions.reward import Reward
from sb3_bridge.gymnax.spaces import env_actions
from sb3_bridge.vec_wrappers import find_view

POOL_SIZE = 256  # replicas of all environments of one process, and branches in a lock step
MUJOCO_POOL_SIZE = (
    64  # a copy of a MuJoCo world takes milliseconds to make, and its steps dwarf a policy call
)
LOOP_US = 3.0  # of a lock step, for each branch in it: policy, bookkeeping (measured on CartPole-v1)


class Brancher:
    """Branches from the states of a VecEnv's environments; none of them is touched.

    Args:
      env: DummyVecEnv or SubprocVecEnv, in SB3's wrappers.
      functions: a pair ``(save, restore)``: ``save(env.unwrapped) -> state`` and ``restore(env.unwrapped, state)``;
        None finds means of its own.

    Attributes:
      report: what the replay check found; the worst times where environments differ.
      view: what the wrappers make of observations and rewards.

    Raises:
      Unclonable: why no exact branches can be had here.
    """

    def __init__(self, env: VecEnv, functions: Functions | None = None):
        base, self.view = find_view(env)
        self.num_envs = env.num_envs
        self._action_space = env.action_space
        self._group: Group
        if isinstance(base, DummyVecEnv):
            self._group, self.n_processes = Local(base, functions), 1
        elif isinstance(base, SubprocVecEnv):
            self._group, self.n_processes = Workers(base, functions), min(self.num_envs, os.cpu_count() or 1)
        else:
            raise Unclonable(
                f"branches run in the environments of a DummyVecEnv or SubprocVecEnv; {type(base).__name__} gives no"
                " access to them"
            )
        reports = self._check()
        self.report = max(reports, key=lambda report: report.step_us)
        most = MUJOCO_POOL_SIZE if self.report.means == MUJOCO else POOL_SIZE
        self._pool = max(1, most // self.num_envs)
        self._taken = 0

    def _all(self, method: str, *arguments: Any) -> list[Any]:
        return self._group.call(method, [arguments] * self.num_envs)

    def _check(self) -> list[CloneReport]:
        """Environments that were made alike are checked once."""
        signatures = self._all("signature")
        firsts = {signatures.index(signature) for signature in signatures}
        answers = self._group.call(
            "check", [() if index in firsts else None for index in range(self.num_envs)]
        )
        reports = {}
        for index in sorted(firsts):
            reports[signatures[index]] = report = CloneReport(*answers[index])
            if not report.passed:
                raise Unclonable(report.description)
        chosen = [dataclasses.astuple(reports[signature]) for signature in signatures]
        self._group.call("prepare", [(report,) for report in chosen])
        return list(reports.values())

    def take(self) -> int:
        """Keeps the present state of every environment, until ``branch`` or ``free``; returns a handle."""
        self._all("take", self._taken)
        self._taken += 1
        return self._taken - 1

    def free(self) -> None:
        """Forgets all states that were kept."""
        self._all("free")

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
        horizon: int,
        gamma: float,
        n_uniforms: int = 1,
        n_rollouts: int = 1,
        backup: Backup = "mean",
        persistence: float | None = None,
        past_truncation: bool = False,
        value: Value | None = None,
        reward: Reward | None = None,
        observations: Any = None,
        common_random_numbers: bool = True,
        seed: int = 0,
        wanted: np.ndarray | None = None,
    ) -> tuple[np.ndarray, int]:
        """Returns of the candidates of each kept state, as ``grpo_jax``'s ``group_returns`` defines them.

        Args:
          handles: T of ``take``; all kept states are freed afterwards.
          actions: candidates ``[T * N, G, *A]`` in env units, states in the order of time, then of environments.
          act: the policy that branches follow; called with some few batch sizes.
          horizon: H >= 1, the candidate's own step included.
          gamma: discount factor.
          n_uniforms: uniform numbers that ``act`` takes.
          n_rollouts: M branches of each candidate.
          backup: ``"mean"`` or (optimistic) ``"max"`` over the M branches.
          persistence: probability of a step behind the candidate's own to repeat the action before it; None: 0.
          past_truncation: whether branches go on behind a truncation, as behind a mere time limit they can.
          value: the critic, for what lies behind the horizon or a truncation; None: nothing.
          reward: the user's; None: the environment's, as the wrappers make it.
          observations: ``[T * N, ...]`` the states as a reward function sees them (``view.original``); with ``reward``.
          common_random_numbers: the candidates of a state share random numbers; else each draws its own.
          seed: of everything random in the branches. The environments' generators are seeded anew, so that no branch
            knows the real future.
          wanted: bool ``[T * N]``, states whose branches are wanted; None: all.

        Returns:
          Returns float32 ``[T * N, G]`` (0 where not wanted), and the number of environment steps made.

        Raises:
          ValueError: shapes or numbers that do not fit.
        """
        actions = env_actions(self._action_space, np.asarray(actions))
        n_states, n_group = actions.shape[:2]
        if horizon < 1 or n_rollouts < 1:
            raise ValueError(f"horizon={horizon} and n_rollouts={n_rollouts} must be at least 1")
        if n_states != len(handles) * self.num_envs:
            raise ValueError(
                f"actions are for {n_states} states, but {len(handles)} handles of {self.num_envs} environments keep"
                f" {len(handles) * self.num_envs}"
            )
        if reward is not None and observations is None:
            raise ValueError("reward needs observations: the states that the candidates start from")
        try:
            loop = Loop(
                self._group,
                self.view,
                np.asarray(handles),
                actions,
                act,
                space=self._action_space,
                n_envs=self.num_envs,
                pool=self._pool,
                horizon=horizon,
                gamma=float(gamma),
                n_uniforms=n_uniforms,
                n_rollouts=n_rollouts,
                persistence=persistence,
                past_truncation=past_truncation,
                value=value,
                reward=reward,
                observations=observations,
                n_streams=1 if common_random_numbers else n_group,
                seed=seed,
                wanted=np.ones(n_states, bool) if wanted is None else np.asarray(wanted, bool),
            )
            totals, n_steps = loop.run()
        finally:
            self.free()
        changed = sorted({name for names in self._all("changed_constants") for name in names})
        if changed:
            warnings.warn(
                f"{', '.join(changed)} seemed never to change, but did: the last branches may have been wrong. From now on"
                " it is part of every snapshot",
                stacklevel=2,
            )
        totals = totals.reshape(n_states, n_group, n_rollouts)
        returns = totals.max(axis=2) if backup == "max" else totals.mean(axis=2)
        return returns.astype(np.float32), n_steps
