"""The lock-step loop: the branches of all environments advance together, one call of the policy for a step."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from gymnasium import spaces

from sb3_bridge.clones.processes import Group
from sb3_bridge.functions.reward import Reward
from sb3_bridge.gymnax.spaces import env_actions
from sb3_bridge.vec_wrappers import View

Act = Callable[[Any, np.ndarray], Any]
"""``(observations [n, ...] as the policy sees them, uniforms [n, n_uniforms]) -> actions [n, *A] in env units``; those
of a Box may lie outside of it."""

Value = Callable[[Any], Any]
"""``observations [n, ...] as the policy sees them -> values [n]``."""

_SMALLEST_BATCH = 16
_REWARD_BATCH = 4096
_REWARD_BYTES = 1 << 25


class _Front:
    """Where the branches of one environment stand: what waits, and what is on its way, in the order of its slots."""

    def __init__(self, waiting: np.ndarray, pool: int, horizon: int, n_uniforms: int):
        self.waiting = waiting  # branches, in the order they begin
        self.free = list(range(pool))[::-1]
        self.branch = np.zeros(0, np.int64)
        self.slot = np.zeros(0, np.int64)
        self.depth = np.zeros(0, np.int64)  # steps made
        self.action: Any = None  # of the next step, [n, *A]
        self.origin: Any = None  # where that step starts, as a reward function sees it
        self.uniforms = np.zeros((pool, max(horizon - 1, 1), n_uniforms), np.float32)


class Loop:
    """All branches of one call. A place that a finished branch leaves is taken by the next one at once."""

    def __init__(
        self,
        group: Group,
        view: View,
        handles: np.ndarray,
        actions: np.ndarray,
        act: Act,
        *,
        space: spaces.Space,
        n_envs: int,
        pool: int,
        horizon: int,
        gamma: float,
        n_uniforms: int,
        n_rollouts: int,
        persistence: float | None,
        past_truncation: bool,
        value: Value | None,
        reward: Reward | None,
        observations: Any,
        n_streams: int,
        seed: int,
        wanted: np.ndarray,
    ):
        self._group, self._view, self._handles, self._actions, self._act = group, view, handles, actions, act
        self._space = space
        self._n_envs, self._horizon, self._n_uniforms, self._n_rollouts = (
            n_envs,
            horizon,
            n_uniforms,
            n_rollouts,
        )
        self._persistence, self._past_truncation = persistence, past_truncation
        self._n_drawn = n_uniforms + (
            persistence is not None
        )  # the last one decides whether the action persists
        self._value, self._reward, self._observations = value, reward, observations
        self._n_streams, self._seed = n_streams, seed
        self._discounts = gamma ** np.arange(horizon + 1, dtype=np.float64)
        self._n_group = actions.shape[1]
        self._per_state = self._n_group * n_rollouts
        branches = np.arange(len(actions) * self._per_state)
        states = branches // self._per_state
        self._fronts = [
            _Front(branches[(states % n_envs == index) & wanted[states]], pool, horizon, self._n_drawn)
            for index in range(n_envs)
        ]
        self._totals = np.zeros(len(branches), np.float64)
        self._n_steps = 0
        self._bill: list[
            tuple[np.ndarray, np.ndarray, Any, Any, Any]
        ] = []  # transitions whose reward is to be asked
        self._n_billed = 0

    def run(self) -> tuple[np.ndarray, int]:
        """Discounted returns of all branches ``[B * G * M]`` and the number of steps."""
        fronts = self._fronts
        while True:
            calls = [self._begin(front) for front in fronts]
            sizes = [len(front.slot) for front in fronts]
            if not sum(sizes):
                break
            answers = self._group.call(
                "step",
                [
                    (*call, front.slot.tolist(), front.action) if size else None
                    for call, front, size in zip(calls, fronts, sizes, strict=True)
                ],
            )
            parts = [answer for answer in answers if answer is not None]
            reached, rewards, terminated, truncated = (
                _concatenate(list(part)) for part in zip(*parts, strict=True)
            )
            self._advance(reached, rewards, terminated, truncated, sizes)
        self._ask_rewards()
        return self._totals, self._n_steps

    def _begin(self, front: _Front) -> tuple[list[tuple[int, int]], np.ndarray]:
        """Fills free places; returns ``(slot, handle)`` of what begins, and its seeds."""
        n_new = min(len(front.free), len(front.waiting))
        if not n_new:
            return [], np.zeros((0, 4), np.uint64)
        new, front.waiting = front.waiting[:n_new], front.waiting[n_new:]
        slots = np.array([front.free.pop() for _ in range(n_new)])
        states, rest = np.divmod(new, self._per_state)
        candidates, rollouts = np.divmod(rest, self._n_rollouts)
        streams = candidates if self._n_streams > 1 else np.zeros_like(candidates)
        words = np.empty((n_new, 4), np.uint64)
        for state in np.unique(states):
            mine = states == state
            seeds, uniforms = self._noise(int(state))
            words[mine] = seeds[streams[mine], rollouts[mine]]
            front.uniforms[slots[mine]] = uniforms[streams[mine], rollouts[mine]]
        action = self._actions[states, candidates]
        origin = None
        if self._reward is not None:
            origin = jax.tree.map(lambda leaf: np.asarray(leaf)[states], self._observations)
        n_old = len(front.branch)
        front.branch = np.concatenate([front.branch, new])
        front.slot = np.concatenate([front.slot, slots])
        front.depth = np.concatenate([front.depth, np.zeros(n_new, np.int64)])
        front.action = _concatenate([front.action, action]) if n_old else action
        front.origin = _concatenate([front.origin, origin]) if n_old else origin
        handles = self._handles[states // self._n_envs]
        return list(zip(slots.tolist(), handles.tolist(), strict=True)), words

    def _noise(self, state: int) -> tuple[np.ndarray, np.ndarray]:
        """Random numbers of a state's branches, whatever else runs beside them.

        Returns:
          Seeds uint64 ``[S, M, 4]`` and uniforms float32 ``[S, M, H - 1, n_drawn]`` inside (0, 1), for S streams.
        """
        rng = np.random.Generator(np.random.Philox(key=np.array([self._seed, state], np.uint64)))
        shape = (self._n_streams, self._n_rollouts)
        seeds = rng.integers(0, 2**64, (*shape, 4), np.uint64)
        bits = rng.integers(0, 2**23, (*shape, max(self._horizon - 1, 1), self._n_drawn), np.uint32)
        return seeds, bits.astype(np.float32) * np.float32(2.0**-23) + np.float32(2.0**-24)

    def _advance(
        self,
        reached: Any,
        rewards: np.ndarray,
        terminated: np.ndarray,
        truncated: np.ndarray,
        sizes: list[int],
    ) -> None:
        """Books one lock step, and asks the policy for the next actions."""
        fronts = [front for front, size in zip(self._fronts, sizes, strict=True) if size]
        branch = _concatenate([front.branch for front in fronts])
        depth = _concatenate([front.depth for front in fronts])
        action = _concatenate([front.action for front in fronts])
        discount = self._discounts[depth]
        self._n_steps += len(branch)
        original = None
        if self._reward is None:
            self._totals[branch] += discount * self._view.rewards(rewards)
        else:
            original = self._view.original(reached)
            origin = _concatenate([front.origin for front in fronts])
            self._charge(branch, discount, origin, action, original)
        depth = depth + 1
        over = terminated | (depth == self._horizon)
        if not self._past_truncation:
            over |= truncated
        seen = self._view.seen(reached)
        if self._value is not None:
            rows = np.flatnonzero(over & ~terminated)
            if len(rows):
                values = np.asarray(self._value(_rows(seen, _padded(rows))))[: len(rows)]
                self._totals[branch[rows]] += self._discounts[depth[rows]] * values.reshape(-1)
        rows = np.flatnonzero(~over)
        following = action
        if len(rows):
            slot = _concatenate([front.slot for front in fronts])
            owner = np.repeat(np.arange(len(fronts)), [len(front.slot) for front in fronts])
            uniforms = np.empty((len(branch), self._n_drawn), np.float32)
            for index, front in enumerate(fronts):
                mine = owner == index
                uniforms[mine] = front.uniforms[slot[mine], np.minimum(depth[mine], self._horizon - 1) - 1]
            padded = _padded(rows)
            chosen = self._act(_rows(seen, padded), uniforms[padded, : self._n_uniforms])
            if self._persistence is not None:
                asked = uniforms[rows, self._n_uniforms] >= self._persistence
                rows, chosen = rows[asked], np.asarray(chosen)[: len(rows)][asked]
            following = action.copy()
            following[rows] = env_actions(self._space, np.asarray(chosen)[: len(rows)])
        start = 0
        for front in fronts:
            end = start + len(front.branch)
            stays = ~over[start:end]
            front.free.extend(front.slot[~stays].tolist())
            front.branch, front.slot = front.branch[stays], front.slot[stays]
            front.depth = depth[start:end][stays]
            front.action = following[start:end][stays]
            if original is not None:
                front.origin = _rows(original, start + np.flatnonzero(stays))
            start = end

    def _charge(
        self, branch: np.ndarray, discount: np.ndarray, origin: Any, action: Any, reached: Any
    ) -> None:
        self._bill.append((branch, discount, origin, action, reached))
        self._n_billed += len(branch)
        n_bytes = sum(leaf.nbytes for leaf in jax.tree.leaves(reached)) // len(branch) * self._n_billed
        if self._n_billed >= _REWARD_BATCH or n_bytes >= _REWARD_BYTES:
            self._ask_rewards()

    def _ask_rewards(self) -> None:
        """One call of the user's function for many lock steps."""
        if not self._bill:
            return
        assert self._reward is not None
        branch, discount, *transitions = (_concatenate(list(part)) for part in zip(*self._bill, strict=True))
        n_rows = len(branch)
        if self._reward.framework == "jax":  # compiles for every size; the others would only compute more
            rows = _padded(np.arange(n_rows))
            transitions = [_rows(part, rows) for part in transitions]
        rewards = self._reward.batch(*transitions)[:n_rows]
        np.add.at(self._totals, branch, discount * rewards)
        self._bill, self._n_billed = [], 0


def _concatenate(parts: list[Any]) -> Any:
    if len(parts) == 1:
        return parts[0]
    return jax.tree.map(lambda *leaves: np.concatenate(leaves), *parts)


def _rows(tree: Any, rows: np.ndarray) -> Any:
    if isinstance(tree, dict):
        return {name: leaf[rows] for name, leaf in tree.items()}
    return tree[rows]


def _padded(rows: np.ndarray) -> np.ndarray:
    """Rows, the first one repeated up to a power of two: what is compiled by size is compiled a few times only."""
    size = max(_SMALLEST_BATCH, 1 << (len(rows) - 1).bit_length())
    return np.concatenate([rows, np.full(size - len(rows), rows[0])])
