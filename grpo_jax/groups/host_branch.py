"""Branches on the host: ordinary environments that are restored and stepped one by one, a policy call for all of them.

The branches of all environments advance in lock step. What they return is defined as for a world on the device, in
``grpo_jax.groups.branch``.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import numpy as np

from grpo_jax.config import Backup
from grpo_jax.groups.branch_return import add_reward, back_up, ends, open_end
from grpo_jax.groups.host_batch import Pending, Rewards, concatenate, padded, rows_of

Act = Callable[..., Any]
"""``(observations [n, ...] as the policy sees them, uniforms [n, n_uniforms]) -> actions [n, *A] in env units``; those
of a Box may lie outside of it. Where simulators tell masks, they are a third argument."""

Value = Callable[[Any], Any]
"""``observations [n, ...] as the policy sees them -> values [n]``."""


class Call(NamedTuple):
    """What the copies of one environment do in a lock step.

    Attributes:
      begins: ``(slot, handle)`` of the copies that are first restored to a kept state.
      seeds: uint64 ``[len(begins), 4]``, of their random generators.
      slots: n copies to be stepped.
      actions: ``[n, *A]`` in env units.
    """

    begins: list[tuple[int, int]]
    seeds: np.ndarray
    slots: list[int]
    actions: np.ndarray


class Reached(NamedTuple):
    """What a lock step leads to, for the n copies of one environment or of all.

    Attributes:
      observations: ``[n, ...]`` as the environments give them, a dict of such arrays for Dict spaces.
      rewards: float64 ``[n]``.
      terminated: bool ``[n]``.
      truncated: bool ``[n]``.
      masks: bool ``[n, P]``, the actions that are allowed then; None where all always are.
    """

    observations: Any
    rewards: np.ndarray
    terminated: np.ndarray
    truncated: np.ndarray
    masks: np.ndarray | None = None


class Simulators(Protocol):
    """N environments whose kept states can be stepped from, in copies of them."""

    def step(self, calls: list[Call | None]) -> list[Reached | None]:
        """One lock step, side by side; None where an environment's copies have nothing to do."""
        ...

    def seen(self, observations: Any) -> Any:
        """Observations as the policy sees them."""
        ...

    def original(self, observations: Any) -> Any:
        """Observations as a reward function sees them."""
        ...

    def rewards(self, rewards: np.ndarray) -> np.ndarray:
        """The environments' rewards ``[n]`` as the learner sees them."""
        ...

    def actions(self, actions: Any) -> np.ndarray:
        """Actions as the environments want them."""
        ...

    def allows(self, masks: np.ndarray, actions: np.ndarray) -> np.ndarray:
        """Whether masks ``[n, P]`` allow actions ``[n, *A]``, as the environments want them; bool ``[n]``."""
        ...


@dataclass(frozen=True)
class Settings:
    """How branches are followed; see ``group_returns`` of ``grpo_jax.groups.branch``.

    Attributes:
      horizon: H >= 1, the candidate's own step included.
      gamma: discount factor.
      n_uniforms: uniform numbers that the policy takes.
      n_rollouts: M branches of each candidate.
      backup: ``"mean"`` or ``"max"`` over the M branches.
      persistence: probability of a step after the candidate's own to repeat the action before it, where that is allowed
        then; None: 0.
      past_truncation: whether branches go on after a truncation.
      common_random_numbers: whether the candidates of a state share random numbers.
      seed: of everything random.
    """

    horizon: int
    gamma: float
    n_uniforms: int = 1
    n_rollouts: int = 1
    backup: Backup = "mean"
    persistence: float | None = None
    past_truncation: bool = False
    common_random_numbers: bool = True
    seed: int = 0

    def __post_init__(self) -> None:
        if self.horizon < 1 or self.n_rollouts < 1:
            raise ValueError(f"horizon={self.horizon} and n_rollouts={self.n_rollouts} must be at least 1")

    @property
    def n_drawn(self) -> int:
        """Uniform numbers of a step; the last one decides whether the action persists."""
        return self.n_uniforms + (self.persistence is not None)


def group_returns(
    simulators: Simulators,
    act: Act,
    handles: Sequence[int] | np.ndarray,
    actions: np.ndarray,
    settings: Settings,
    *,
    pool: int,
    value: Value | None = None,
    reward: Rewards | None = None,
    observations: Any = None,
    wanted: np.ndarray | None = None,
) -> tuple[np.ndarray, int]:
    """Returns of the candidates of each kept state.

    Args:
      simulators: N environments.
      act: the policy that branches follow; called with some few batch sizes.
      handles: T kept states of every environment.
      actions: candidates ``[T * N, G, *A]`` in env units, states in the order of time, then of environments.
      settings: horizon, discount and the like.
      pool: copies of one environment that are stepped side by side.
      value: the critic, for what lies beyond the horizon or a truncation; None: nothing.
      reward: the user's; None: the environment's.
      observations: ``[T * N, ...]`` the states as a reward function sees them; with ``reward``.
      wanted: bool ``[T * N]`` or ``[T * N, G]``, states or candidates whose branches are wanted; None: all.

    Returns:
      Returns float32 ``[T * N, G]`` (0 where not wanted), and the number of environment steps made.

    Raises:
      ValueError: numbers of handles, actions and observations that do not fit.
    """
    n_states, n_group = actions.shape[:2]
    n_envs, rest = divmod(n_states, max(len(handles), 1))
    if rest or not len(handles):
        raise ValueError(f"actions are for {n_states} states, which {len(handles)} handles cannot keep")
    if reward is not None and observations is None:
        raise ValueError("reward needs observations: the states that the candidates start from")
    wanted = np.ones(n_states, bool) if wanted is None else np.asarray(wanted, bool)
    wanted = np.broadcast_to(wanted.reshape(n_states, -1), (n_states, n_group))
    n_streams = 1 if settings.common_random_numbers else n_group
    originals = observations if reward is not None else None
    states = _States(np.asarray(handles), actions, originals, n_envs, n_streams)
    branches = np.arange(n_states * n_group * settings.n_rollouts)
    owner = branches // (n_group * settings.n_rollouts)
    is_wanted = np.repeat(wanted.reshape(-1), settings.n_rollouts)
    lanes = [
        _Lane(branches[(owner % n_envs == index) & is_wanted], pool, settings, states)
        for index in range(n_envs)
    ]
    totals = np.zeros(len(branches), np.float64)
    pending = None if reward is None else Pending(reward, totals)
    n_steps = 0
    while True:
        calls = [lane.begin() for lane in lanes]
        if not any(calls):
            break
        answers = [answer for answer in simulators.step(calls) if answer is not None]
        reached = Reached(*(concatenate(list(part)) for part in zip(*answers, strict=True)))
        n_steps += len(reached.rewards)
        active = [lane for lane, call in zip(lanes, calls, strict=True) if call is not None]
        _lock_step(simulators, act, settings, active, reached, totals, pending, value)
    if pending is not None:
        pending.ask()
    returns = back_up(totals.reshape(n_states, n_group, settings.n_rollouts), settings.backup, axis=2)
    return returns.astype(np.float32), n_steps


# --- the branches of one environment ---


def _noise(settings: Settings, n_streams: int, state: int) -> tuple[np.ndarray, np.ndarray]:
    """Random numbers of a state's branches, whatever else runs beside them.

    Returns:
      Seeds uint64 ``[S, M, 4]`` and uniforms float32 ``[S, M, H - 1, n_drawn]`` inside (0, 1), for S streams.
    """
    rng = np.random.Generator(np.random.Philox(key=np.array([settings.seed, state], np.uint64)))
    shape = (n_streams, settings.n_rollouts)
    seeds = rng.integers(0, 2**64, (*shape, 4), np.uint64)
    bits = rng.integers(0, 2**23, (*shape, max(settings.horizon - 1, 1), settings.n_drawn), np.uint32)
    return seeds, bits.astype(np.float32) * np.float32(2.0**-23) + np.float32(2.0**-24)


class _States(NamedTuple):
    """The kept states: handles ``[T]``, candidates ``[T * N, G, *A]``, observations for a reward function or None."""

    handles: np.ndarray
    actions: np.ndarray
    observations: Any
    n_envs: int
    n_streams: int  # of random numbers for a state


class _Lane:
    """The branches of one environment: those that wait, and those under way in the order of their slots.

    A place that a finished branch leaves is taken by the next one at once.
    """

    def __init__(self, waiting: np.ndarray, pool: int, settings: Settings, states: _States):
        self._waiting, self._settings, self._states = waiting, settings, states
        self._free = list(range(pool))[::-1]
        self.branch = np.zeros(0, np.int64)
        self.slot = np.zeros(0, np.int64)
        self.depth = np.zeros(0, np.int64)  # steps made
        self.action: Any = None  # of the next step, [n, *A]
        self.origin: Any = None  # where that step starts, as a reward function sees it
        self._uniforms = np.zeros((pool, max(settings.horizon - 1, 1), settings.n_drawn), np.float32)

    def begin(self) -> Call | None:
        """Fills free places; the next step of all branches, None where none is left."""
        begins, seeds = self._fill(min(len(self._free), len(self._waiting)))
        return Call(begins, seeds, self.slot.tolist(), self.action) if len(self.slot) else None

    def _fill(self, n_new: int) -> tuple[list[tuple[int, int]], np.ndarray]:
        if not n_new:
            return [], np.zeros((0, 4), np.uint64)
        new, self._waiting = self._waiting[:n_new], self._waiting[n_new:]
        slots = np.array([self._free.pop() for _ in range(n_new)])
        n_rollouts, kept = self._settings.n_rollouts, self._states
        states, rest = np.divmod(new, kept.actions.shape[1] * n_rollouts)
        candidates, rollouts = np.divmod(rest, n_rollouts)
        streams = candidates if kept.n_streams > 1 else np.zeros_like(candidates)
        all_seeds = np.empty((n_new, 4), np.uint64)
        for state in np.unique(states):
            mine = states == state
            seeds, uniforms = _noise(self._settings, kept.n_streams, int(state))
            all_seeds[mine] = seeds[streams[mine], rollouts[mine]]
            self._uniforms[slots[mine]] = uniforms[streams[mine], rollouts[mine]]
        action = kept.actions[states, candidates]
        origin = None if kept.observations is None else rows_of(kept.observations, states)
        is_first = not len(self.branch)
        self.branch = np.concatenate([self.branch, new])
        self.slot = np.concatenate([self.slot, slots])
        self.depth = np.concatenate([self.depth, np.zeros(n_new, np.int64)])
        self.action = action if is_first else concatenate([self.action, action])
        self.origin = origin if is_first or origin is None else concatenate([self.origin, origin])
        handles = kept.handles[states // kept.n_envs]
        return list(zip(slots.tolist(), handles.tolist(), strict=True)), all_seeds

    def uniforms(self) -> np.ndarray:
        """Uniform numbers ``[n, n_drawn]`` of the step after the one that is being made."""
        return self._uniforms[self.slot, np.minimum(self.depth + 1, self._settings.horizon - 1) - 1]

    def keep(self, stays: np.ndarray, action: np.ndarray, origin: Any) -> None:
        """Goes on with the branches ``stays`` bool ``[n]``, with their next actions and where those start."""
        self._free.extend(self.slot[~stays].tolist())
        self.branch, self.slot = self.branch[stays], self.slot[stays]
        self.depth, self.action = self.depth[stays] + 1, action[stays]
        self.origin = None if origin is None else rows_of(origin, np.flatnonzero(stays))


# --- a lock step of all environments ---


def _lock_step(
    simulators: Simulators,
    act: Act,
    settings: Settings,
    lanes: list[_Lane],
    reached: Reached,
    totals: np.ndarray,
    pending: Pending | None,
    value: Value | None,
) -> None:
    """Adds what the branches earned in a step to ``totals``, and chooses their next actions."""
    branch = np.concatenate([lane.branch for lane in lanes])
    depth = np.concatenate([lane.depth for lane in lanes])
    action = concatenate([lane.action for lane in lanes])
    discounts = settings.gamma ** np.arange(settings.horizon + 1, dtype=np.float64)
    original = None
    if pending is None:
        totals[branch] = add_reward(totals[branch], discounts[depth], simulators.rewards(reached.rewards))
    else:
        original = simulators.original(reached.observations)
        pending.add(branch, discounts[depth], concatenate([lane.origin for lane in lanes]), action, original)
    over = ends(reached.terminated, reached.truncated, settings.past_truncation) | (
        depth + 1 == settings.horizon
    )
    seen = simulators.seen(reached.observations)
    rows = np.flatnonzero(over & open_end(reached.terminated))
    if value is not None and len(rows):
        values = np.asarray(value(rows_of(seen, padded(rows))))[: len(rows)]
        ended = branch[rows]
        totals[ended] = add_reward(totals[ended], discounts[depth[rows] + 1], values.reshape(-1))
    rows = np.flatnonzero(~over)
    if len(rows):
        uniforms = np.concatenate([lane.uniforms() for lane in lanes])
        action = _next_actions(simulators, act, settings, seen, uniforms, rows, action, reached.masks)
    start = 0
    for lane in lanes:
        part = slice(start, start := start + len(lane.branch))
        lane.keep(~over[part], action[part], None if original is None else rows_of(original, part))


def _next_actions(
    simulators: Simulators,
    act: Act,
    settings: Settings,
    seen: Any,
    uniforms: np.ndarray,
    rows: np.ndarray,
    action: np.ndarray,
    masks: np.ndarray | None,
) -> np.ndarray:
    """The policy's actions for ``rows``, but where the action before persists."""
    batch = padded(rows)
    told = (rows_of(seen, batch), uniforms[batch, : settings.n_uniforms])
    chosen = np.asarray(act(*told) if masks is None else act(*told, masks[batch]))[: len(rows)]
    if settings.persistence is not None:
        asked = uniforms[rows, settings.n_uniforms] >= settings.persistence
        if masks is not None:
            asked |= ~simulators.allows(masks[rows], action[rows])
        rows, chosen = rows[asked], chosen[asked]
    following = action.copy()
    following[rows] = simulators.actions(chosen)
    return following
