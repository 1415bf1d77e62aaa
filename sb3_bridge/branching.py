"""Branches of ordinary environments: many replicas in lock step, in this process or in a SubprocVecEnv's workers."""

from __future__ import annotations

import dataclasses
import os
import sys
import traceback
import warnings
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import cloudpickle  # type: ignore[import-untyped]
import gymnasium
import jax
import numpy as np
from gymnasium import spaces
from stable_baselines3.common.vec_env import (
    DummyVecEnv,
    SubprocVecEnv,
    VecCheckNan,
    VecEnv,
    VecEnvWrapper,
    VecExtractDictObs,
    VecFrameStack,
    VecMonitor,
    VecNormalize,
    VecTransposeImage,
    VecVideoRecorder,
)

from grpo_jax.config import Backup
from sb3_bridge import snapshots
from sb3_bridge.rewards import Reward
from sb3_bridge.snapshots import (
    AnyCloner,
    CloneReport,
    Functions,
    Replica,
    Unclonable,
    check,
    layers_of,
    make_cloner,
)

Act = Callable[[Any, np.ndarray], Any]
"""``(observations [n, ...] as the policy sees them, uniforms [n, n_uniforms]) -> actions [n, *A] in env units``."""

Value = Callable[[Any], Any]
"""``observations [n, ...] as the policy sees them -> values [n]``."""

POOL_SIZE = 256  # replicas of all environments of one process, and branches in a lock step
MUJOCO_POOL_SIZE = (
    64  # a copy of a MuJoCo world takes milliseconds to make, and its steps dwarf a policy call
)
LOOP_US = 3.0  # of a lock step, for each branch in it: policy, bookkeeping (measured on CartPole-v1)

_UNCHANGING = (VecMonitor, VecCheckNan, VecVideoRecorder)
_METHOD = "_grpo_branch_server"
_SMALLEST_BATCH = 16
_REWARD_BATCH = 4096
_REWARD_BYTES = 1 << 25


# What the policy sees -----------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class View:
    """What the VecEnv's wrappers make of what an environment gives; statistics are read, never updated.

    Attributes:
      wrappers: that change observations or rewards, innermost first.
    """

    wrappers: tuple[VecEnvWrapper, ...]

    def original(self, observations: Any) -> Any:
        """As a reward function sees them: all wrappers but VecNormalize."""
        return self._through(observations, normalized=False)

    def seen(self, observations: Any) -> Any:
        """As the policy sees them."""
        return self._through(observations, normalized=True)

    def _through(self, observations: Any, normalized: bool) -> Any:
        for wrapper in self.wrappers:
            if isinstance(wrapper, VecTransposeImage):
                observations = wrapper.transpose_observations(observations)
            elif isinstance(wrapper, VecExtractDictObs):
                observations = observations[wrapper.key]
            elif normalized and isinstance(wrapper, VecNormalize):
                observations = wrapper.normalize_obs(observations)
        return observations

    def rewards(self, rewards: np.ndarray) -> np.ndarray:
        """The environments' rewards ``[n]`` as the learner sees them."""
        for wrapper in self.wrappers:
            if isinstance(wrapper, VecNormalize):
                rewards = wrapper.normalize_reward(rewards)
        return rewards


def find_view(env: VecEnv) -> tuple[VecEnv, View]:
    """The innermost VecEnv, and what its wrappers do.

    Raises:
      Unclonable: a wrapper whose effect on a branch is not known.
    """
    found: list[VecEnvWrapper] = []
    while isinstance(env, VecEnvWrapper):
        if type(env) in (VecNormalize, VecTransposeImage, VecExtractDictObs):
            found.insert(0, env)
        elif isinstance(env, VecFrameStack):
            raise Unclonable(
                "VecFrameStack keeps frames outside of the environments, where no branch has its own: stack them in each"
                " environment with gymnasium.wrappers.FrameStackObservation"
            )
        elif type(env) not in _UNCHANGING:
            raise Unclonable(
                f"what {type(env).__name__} does to observations and rewards is not known for branches: use a"
                " gymnasium.Wrapper around each environment"
            )
        env = env.venv
    return env, View(tuple(found))


# Where replicas are stepped -----------------------------------------------------------------------------------------


class Server:
    """One environment's snapshots and replicas; for a SubprocVecEnv it lives in the worker.

    Args:
      env: the real one; it is only read.
      functions: the user's pair, or None.
    """

    def __init__(self, env: gymnasium.Env, functions: Functions | None):
        self._env, self._functions = env, functions
        self._cloner: AnyCloner | None = None
        self._replicas: list[Replica] = []
        self._kept: dict[int, Any] = {}

    def signature(self) -> str:
        """Equal for environments made alike: one check will do for them."""
        layers = layers_of(self._env)
        return repr(
            [f"{type(layer).__module__}.{type(layer).__qualname__}" for layer in layers]
            + [str(self._env.spec)]
        )

    def check(self) -> tuple[Any, ...]:
        """The replay check's report, as a plain tuple."""
        return tuple(getattr(check(self._env, self._functions), name) for name in _REPORT)

    def prepare(self, report: tuple[Any, ...]) -> None:
        self._cloner = make_cloner(self._env, CloneReport(*report), self._functions)

    def take(self, number: int) -> None:
        assert self._cloner is not None
        self._kept[number] = self._cloner.save()

    def free(self) -> None:
        self._kept.clear()

    def changed_constants(self) -> list[str]:
        assert self._cloner is not None
        return self._cloner.changed_constants()

    def step(
        self, begins: list[tuple[int, int]], words: np.ndarray, slots: Sequence[int], actions: np.ndarray
    ) -> tuple[Any, np.ndarray, np.ndarray, np.ndarray]:
        """Restores ``(slot, snapshot)`` with seeds ``words`` [n_begins, 4], then steps ``slots`` with ``actions``.

        Returns:
          Observations ``[n, ...]`` (a dict for Dict spaces), rewards float64, terminated and truncated bool ``[n]``.
        """
        assert self._cloner is not None
        replicas = self._replicas
        for (slot, number), seed in zip(begins, words, strict=True):
            while slot >= len(replicas):
                replicas.append(self._cloner.replica())
            self._cloner.restore(replicas[slot], self._kept[number], seed)
        observations, rewards, terminated, truncated = [], [], [], []
        for slot, action in zip(slots, actions, strict=True):
            observation, reward, over, cut, _ = replicas[slot].step(action)
            observations.append(observation)
            rewards.append(reward)
            terminated.append(over)
            truncated.append(cut)
        return (
            _stack(self._env.observation_space, observations),
            np.array(rewards, np.float64).reshape(-1),
            np.array(terminated, bool),
            np.array(truncated, bool),
        )


_REPORT = tuple(field.name for field in dataclasses.fields(CloneReport))


def _stack(space: spaces.Space, observations: list[Any]) -> Any:
    if isinstance(space, spaces.Dict):
        return {
            name: _stack(part, [seen[name] for seen in observations]) for name, part in space.spaces.items()
        }
    return np.array(observations, space.dtype)


class _Group(Protocol):
    """The servers of all environments, wherever they are."""

    def call(self, method: str, arguments: list[tuple[Any, ...] | None]) -> list[Any]:
        """One call of each server, side by side; None where there is nothing to do for one."""
        ...


class _Local:
    """Servers in this process."""

    def __init__(self, env: DummyVecEnv, functions: Functions | None):
        self._servers = [Server(one, functions) for one in env.envs]

    def call(self, method: str, arguments: list[tuple[Any, ...] | None]) -> list[Any]:
        return [
            None if args is None else getattr(server, method)(*args)
            for server, args in zip(self._servers, arguments, strict=True)
        ]


class _Call:
    """Pickles as a call of ``function``: unpickles to what that returns."""

    def __init__(self, function: Callable[..., Any], *arguments: Any):
        self._reduced = (function, arguments)

    def __reduce__(self) -> Any:
        return self._reduced


def _install(functions: Functions | None, method: str) -> str:
    """In a worker: gives environments the method that SB3's ``env_method`` calls; returns its name."""
    servers: dict[int, Server] = {}

    def serve(env: gymnasium.Env, name: str, arguments: tuple[Any, ...]) -> tuple[bool, Any]:
        try:
            if id(env) not in servers:
                servers[id(env)] = Server(env, functions)
            return True, getattr(servers[id(env)], name)(*arguments)
        except Exception as error:  # it would end the worker: the main process raises it
            return False, (isinstance(error, Unclonable), str(error), traceback.format_exc())

    setattr(gymnasium.Env, method, serve)
    return method


class _Workers:
    """Servers in the workers of a SubprocVecEnv, spoken to in SB3's own protocol."""

    def __init__(self, env: SubprocVecEnv, functions: Functions | None):
        self._env = env
        # By value: a worker needs neither this package nor JAX.
        modules = (sys.modules[snapshots.__name__], sys.modules[__name__])
        for module in modules:
            cloudpickle.register_pickle_by_value(module)
        try:
            parcel = cloudpickle.dumps(_Call(_install, functions, _METHOD))
        finally:
            for module in modules:
                cloudpickle.unregister_pickle_by_value(module)
        for remote in env.remotes:
            remote.send(("has_attr", _Call(cloudpickle.loads, parcel)))
        installed = [remote.recv() for remote in env.remotes]
        if not all(installed):
            raise Unclonable("the workers of this SubprocVecEnv take no method for branches")

    def call(self, method: str, arguments: list[tuple[Any, ...] | None]) -> list[Any]:
        for remote, args in zip(self._env.remotes, arguments, strict=True):
            if args is not None:
                remote.send(("env_method", (_METHOD, (method, args), {})))
        answers: list[Any] = [
            (True, None) if args is None else remote.recv()
            for remote, args in zip(self._env.remotes, arguments, strict=True)
        ]
        for index, (is_fine, answer) in enumerate(answers):
            if not is_fine:
                refused, message, trace = answer
                if refused:
                    raise Unclonable(message)
                raise RuntimeError(f"a branch in environment {index} raised {message}\n{trace}")
        return [answer for _, answer in answers]


# Branches -----------------------------------------------------------------------------------------------------------


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
        self.env, self.num_envs = env, env.num_envs
        self._action_space = env.action_space
        self._group: _Group
        if isinstance(base, DummyVecEnv):
            self._group, self.n_processes = _Local(base, functions), 1
        elif isinstance(base, SubprocVecEnv):
            self._group, self.n_processes = _Workers(base, functions), min(self.num_envs, os.cpu_count() or 1)
        else:
            raise Unclonable(
                f"branches run in the environments of a DummyVecEnv or SubprocVecEnv; {type(base).__name__} gives no"
                " access to them"
            )
        reports = self._check()
        self.report = max(reports, key=lambda report: report.step_us)
        most = MUJOCO_POOL_SIZE if self.report.means == snapshots.MUJOCO else POOL_SIZE
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
        actions = _env_actions(self._action_space, np.asarray(actions))
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
            loop = _Loop(
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


class _Loop:
    """All branches of one call. A place that a finished branch leaves is taken by the next one at once."""

    def __init__(
        self,
        group: _Group,
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
        self._value, self._reward, self._observations = value, reward, observations
        self._n_streams, self._seed = n_streams, seed
        self._discounts = gamma ** np.arange(horizon + 1, dtype=np.float64)
        self._n_group = actions.shape[1]
        self._per_state = self._n_group * n_rollouts
        branches = np.arange(len(actions) * self._per_state)
        states = branches // self._per_state
        self._fronts = [
            _Front(branches[(states % n_envs == index) & wanted[states]], pool, horizon, n_uniforms)
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
          Seeds uint64 ``[S, M, 4]`` and uniforms float32 ``[S, M, H - 1, n_uniforms]`` inside (0, 1), for S streams.
        """
        rng = np.random.Generator(np.random.Philox(key=np.array([self._seed, state], np.uint64)))
        shape = (self._n_streams, self._n_rollouts)
        seeds = rng.integers(0, 2**64, (*shape, 4), np.uint64)
        bits = rng.integers(0, 2**23, (*shape, max(self._horizon - 1, 1), self._n_uniforms), np.uint32)
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
        over = terminated | truncated | (depth == self._horizon)
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
            uniforms = np.empty((len(branch), self._n_uniforms), np.float32)
            for index, front in enumerate(fronts):
                mine = owner == index
                uniforms[mine] = front.uniforms[slot[mine], np.minimum(depth[mine], self._horizon - 1) - 1]
            padded = _padded(rows)
            chosen = np.asarray(self._act(_rows(seen, padded), uniforms[padded]))[: len(rows)]
            following = action.copy()
            following[rows] = _env_actions(self._space, chosen)
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


def _env_actions(space: spaces.Space, actions: np.ndarray) -> np.ndarray:
    """In the dtype that environments are stepped with, within the bounds of a Box."""
    if isinstance(space, spaces.Box):
        actions = np.clip(actions, space.low, space.high)
    return actions.astype(space.dtype)
