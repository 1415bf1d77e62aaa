"""Branches of ordinary environments: what they return and what they cost."""

from __future__ import annotations

import os
import warnings
from collections.abc import Sequence
from typing import Any

import numpy as np
from stable_baselines3.common.vec_env import DummyVecEnv, SubprocVecEnv, VecEnv

from grpo_jax.config import Backup
from grpo_jax.groups.host_branch import Act, Call, Reached, Rewards, Settings, Value, group_returns
from sb3_bridge.clones.copying import Unclonable
from sb3_bridge.clones.core_state import MUJOCO, Functions
from sb3_bridge.clones.processes import Group, Local, Workers
from sb3_bridge.clones.snapshot import CloneReport
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
        None finds a way of its own.

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
        self.report = max(self._check(), key=lambda report: report.step_us)
        most = MUJOCO_POOL_SIZE if self.report.way == MUJOCO else POOL_SIZE
        self._pool = max(1, most // self.num_envs)
        self._taken = 0

    def _all(self, method: str, *arguments: Any) -> list[Any]:
        return self._group.call(method, [arguments] * self.num_envs)

    def _check(self) -> list[CloneReport]:
        """Environments that were made alike are checked once: first one of them, then all that are not like it."""
        reports: list[CloneReport | None] = [None] * self.num_envs
        reports[0] = first = self._checked([0])[0]
        signatures = self._all("signature", first.varying)
        others = {signature: index for index, signature in reversed(list(enumerate(signatures)))}
        del others[signatures[0]]
        found = {signatures[0]: first} | dict(zip(others, self._checked(list(others.values())), strict=True))
        chosen = [found[signature] for signature in signatures]
        self._group.call("prepare", [(_plain(report),) for report in chosen])
        return list(found.values())

    def _checked(self, indices: list[int]) -> list[CloneReport]:
        answers = self._group.call(
            "check", [() if index in indices else None for index in range(self.num_envs)]
        )
        reports = [CloneReport(*answers[index]) for index in indices]
        for index, report in zip(indices, reports, strict=True):
            if not report.passed:
                where = f"environment {index}: " if index else ""
                raise Unclonable(where + report.description)
        return reports

    def take(self) -> int:
        """Keeps the present state of every environment, until ``branch`` or ``free``; returns a handle.

        Raises:
          Unclonable: an environment that was replaced, or wrapped anew, does not pass the replay check; or one holds
            something by now that cannot be copied.
        """
        self._all("take", self._taken)
        self._taken += 1
        return self._taken - 1

    def free(self) -> None:
        """Forgets all states that were kept."""
        self._all("free")

    def replay(self, handle: int, actions: Any) -> tuple[Any, np.ndarray, np.ndarray, np.ndarray]:
        """What ``actions`` lead to from a kept state, with the random generators as they were in it.

        Equal, bit for bit, to what the environments did, if they were stepped with these actions from that state. A
        DummyVecEnv rounds rewards to float32, and after an end shows the next episode's first observation instead
        (this one is ``infos[i]["terminal_observation"]``).

        Args:
          handle: of ``take``, not freed yet.
          actions: ``[N, *A]``, as the environments get them.

        Returns:
          Observations ``[N, ...]`` (a dict of such arrays for Dict spaces) before any VecEnvWrapper, rewards float64,
          terminated and truncated bool ``[N]``.
        """
        answers = self._group.call("replay", [(handle, action) for action in np.asarray(actions)])
        observations, *rest = zip(*answers, strict=True)
        rewards, terminated, truncated = (np.concatenate(part) for part in rest)
        if isinstance(observations[0], dict):
            stacked: Any = {
                name: np.concatenate([one[name] for one in observations]) for name in observations[0]
            }
        else:
            stacked = np.concatenate(observations)
        return stacked, rewards, terminated, truncated

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
        reward: Rewards | None = None,
        observations: Any = None,
        common_random_numbers: bool = True,
        seed: int = 0,
        wanted: np.ndarray | None = None,
    ) -> tuple[np.ndarray, int]:
        """Returns of the candidates of each kept state, as ``grpo_jax.groups.host_branch.group_returns`` defines them.

        Args:
          handles: T of ``take``; all kept states are freed afterwards.
          actions: candidates ``[T * N, G, *A]`` in env units, states in the order of time, then of environments.
          act: the policy that branches follow; called with some few batch sizes.
          horizon: H >= 1, the candidate's own step included.
          gamma: discount factor.
          n_uniforms: uniform numbers that ``act`` takes.
          n_rollouts: M branches of each candidate.
          backup: ``"mean"`` or (optimistic) ``"max"`` over the M branches.
          persistence: probability of a step after the candidate's own to repeat the action before it; None: 0.
          past_truncation: whether branches go on after a truncation, as after a mere time limit they can.
          value: the critic, for what lies beyond the horizon or a truncation; None: nothing.
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
          Unclonable: something large that never changed at first was changed.
        """
        actions = env_actions(self._action_space, np.asarray(actions))
        if len(actions) != len(handles) * self.num_envs:
            raise ValueError(
                f"actions are for {len(actions)} states, but {len(handles)} handles of {self.num_envs} environments keep"
                f" {len(handles) * self.num_envs}"
            )
        settings = Settings(
            horizon=horizon,
            gamma=float(gamma),
            n_uniforms=n_uniforms,
            n_rollouts=n_rollouts,
            backup=backup,
            persistence=persistence,
            past_truncation=past_truncation,
            common_random_numbers=common_random_numbers,
            seed=seed,
        )
        try:
            self._all("begin")
            found = group_returns(
                self,
                act,
                handles,
                actions,
                settings,
                pool=self._pool,
                value=value,
                reward=reward,
                observations=observations,
                wanted=wanted,
            )
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

    # What ``grpo_jax.groups.host_branch`` asks of simulators.

    def step(self, calls: list[Call | None]) -> list[Reached | None]:
        """One lock step of the replicas."""
        answers = self._group.call("step", [None if call is None else tuple(call) for call in calls])
        return [None if answer is None else Reached(*answer) for answer in answers]

    def seen(self, observations: Any) -> Any:
        """Observations as the policy sees them."""
        return self.view.seen(observations)

    def original(self, observations: Any) -> Any:
        """Observations as a reward function sees them."""
        return self.view.original(observations)

    def rewards(self, rewards: np.ndarray) -> np.ndarray:
        """The environments' rewards ``[n]`` as the learner sees them."""
        return self.view.rewards(rewards)

    def actions(self, actions: Any) -> np.ndarray:
        """Actions as the environments want them."""
        return env_actions(self._action_space, np.asarray(actions))


def _plain(report: CloneReport) -> tuple[Any, ...]:
    return tuple(vars(report).values())
