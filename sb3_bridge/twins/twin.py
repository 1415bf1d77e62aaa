"""The twin of a VecEnv's environments: found, proved by replay, and compared with what really happens."""

from __future__ import annotations

import pickle
from typing import Any

import jax
import numpy as np
from stable_baselines3.common.vec_env import (
    DummyVecEnv,
    SubprocVecEnv,
    VecEnv,
    VecExtractDictObs,
    VecNormalize,
    VecTransposeImage,
)

from grpo_jax.noise import as_key
from grpo_jax.worlds.base import World
from grpo_jax.worlds.classic import TimeLimited, TimeLimitedState
from sb3_bridge.clones.copying import Unclonable
from sb3_bridge.clones.core_state import ACTION_MASKS
from sb3_bridge.clones.processes import Local, Workers
from sb3_bridge.masks import has_masks
from sb3_bridge.twins.check import first_difference
from sb3_bridge.twins.normalized import normalized
from sb3_bridge.twins.reader import Reader
from sb3_bridge.twins.registry import Entry, entries
from sb3_bridge.vec_wrappers import find_view

N_STEPS, LEAST = 512, 128
"""Steps of the replay: of all environments, and of each at least."""


class NoTwin(ValueError):
    """Why a VecEnv has no twin; ``is_known`` where one was registered, but is refused."""

    def __init__(self, why: str, is_known: bool = True):
        super().__init__(why)
        self.is_known = is_known


class Twin:
    """A world that does what the environments of a VecEnv do; these are only read.

    Attributes:
      world: with states of its own, and the steps that are left until a ``TimeLimit``.
      description: for the log.

    Raises:
      NoTwin: there is none, or it does something else.
    """

    def __init__(self, env: VecEnv):
        self._env, known = env, entries()
        base, functions = env.unwrapped, {name: entry.state_of for name, entry in known.items()}
        self._group: Local | Workers
        try:
            if isinstance(base, DummyVecEnv):
                self._group = Local(base, functions, Reader)
            elif isinstance(base, SubprocVecEnv):
                self._group = Workers(base, functions, Reader)
            else:
                why = f"environments of a DummyVecEnv or SubprocVecEnv may have a twin, not of {type(base).__name__}"
                raise NoTwin(why, is_known=False)
            name = self._name(known)
            self.check_wrappers()
            self.world = TimeLimited(self._world(known[name]))
            self._check_state(self.compare(played := self._played()), played[0][1])
        except Unclonable as error:
            raise NoTwin(str(error)) from error
        self.description = f"a twin of {name.rpartition('.')[2]} (a JAX world, proved by replay)"

    def _all(self, method: str, *arguments: Any) -> list[Any]:
        return self._group.call(method, [arguments] * self._env.num_envs)

    def _name(self, known: dict[str, Entry]) -> str:
        """The class whose twin it is."""
        (own, name), *others = dict.fromkeys(self._all("family"))
        if not name:
            raise NoTwin(
                f"dynamics='twin': no twin of {own} is known. Register one, sb3_bridge.register_twin({own.split('.')[-1]},"
                " world=..., state_of=...), or use dynamics='auto'",
                is_known=False,
            )
        if any(other != name for _, other in others):
            raise NoTwin(f"one world for all environments: {own} and {others[0][0]} have no twin in common")
        return name

    def check_wrappers(self) -> None:
        """Raises NoTwin where a VecEnvWrapper changes what the policy sees or is paid, now that it may be asked for it; or masks."""
        if has_masks(self._env):
            raise NoTwin(
                f"the environments forbid actions by {ACTION_MASKS}(), of which a twin knows nothing: use dynamics='clone'"
            )
        try:
            view = find_view(self._env)[1]
        except Unclonable as error:
            raise NoTwin(str(error)) from error
        scaling = [
            one
            for one in view.wrappers
            if isinstance(one, VecNormalize) and (one.norm_obs or one.norm_reward)
        ]
        is_other = len(scaling) > 1 or any(one.norm_obs and isinstance(one.obs_rms, dict) for one in scaling)
        for one in view.wrappers:
            if isinstance(one, VecTransposeImage | VecExtractDictObs) or (is_other and one in scaling):
                raise NoTwin(
                    f"{type(one).__name__} changes observations or rewards outside of the environments, where a twin knows of one"
                    " VecNormalize of vectors alone: use a gymnasium.Wrapper around each of them, or dynamics='clone'"
                )
        self._normalizer = scaling[0] if scaling else None

    def seen(self, world: World, is_own_reward: bool) -> World:
        """The ``world``, the twin or one around it with its observations, as VecNormalize shows it now."""
        return normalized(world, self._normalizer, is_own_reward)

    @property
    def sees_last(self) -> bool:
        """Whether the last observation of an episode is known as the environment gave it, which VecNormalize hides."""
        return self._normalizer is None or not self._normalizer.norm_obs

    def _world(self, entry: Entry) -> World:
        if isinstance(entry.world, World):
            return entry.world
        base = self._env.unwrapped
        core = base.envs[0].unwrapped if isinstance(base, DummyVecEnv) else pickle.loads(self._all("core")[0])
        world = entry.world(core)
        if not isinstance(world, World):
            raise NoTwin(
                f"the function that makes the twin's world returned {world!r}, which is no grpo_jax World"
            )
        return world

    def _check_state(self, states: Any, actions: np.ndarray) -> None:
        """Raises NoTwin where a step makes something else of a state, which would break a compiled loop."""
        first = jax.tree.map(lambda leaf: leaf[0, 0], states)
        after = jax.eval_shape(self.world.step, as_key(jax.random.key(0)), first, _cast(actions)[0]).state
        before, after = (
            [
                (jax.tree_util.keystr(path), leaf.shape, leaf.dtype)
                for path, leaf in jax.tree_util.tree_leaves_with_path(one.inner)
            ]
            for one in (first, after)
        )
        if before != after:
            raise NoTwin(
                f"the twin's step makes a state {after} of what state_of gave, {before}: cast in one of them"
            )

    def _played(self) -> list[tuple[Any, ...]]:
        """What copies of the environments do in random play: rows as those of :meth:`compare`."""
        n_steps = max(LEAST, N_STEPS // self._env.num_envs)
        calls: list[Any] = [(n_steps, seed) for seed in range(self._env.num_envs)]
        played = self._group.call("play", calls)
        rows = [list(zip(*step, strict=True)) for step in zip(*played, strict=True)]
        return [(states, *map(_stacked, rest)) for states, *rest in rows]

    def take(self) -> list[Any]:
        """The states that the environments are in, for :meth:`compare`; raises NoTwin."""
        try:
            return self._all("take")
        except Unclonable as error:
            raise NoTwin(str(error)) from error

    def present(self) -> TimeLimitedState:
        """The states that the environments are in, as the world has them: leaves ``[N, ...]``; raises NoTwin."""
        return _as_world(self.take())

    def compare(self, rows: list[tuple[Any, ...]]) -> TimeLimitedState:
        """The states of T steps, as the world has them: leaves ``[T, N, ...]``.

        Args:
          rows: of each step the states that were taken before it, actions ``[N, *A]``, observations (NaN: unknown), rewards,
            terminated and truncated ``[N]``.

        Raises:
          NoTwin: the world does not do what the environments did.
        """
        shape = len(rows), self._env.num_envs
        states = _as_world([state for row in rows for state in row[0]])
        actions, observations, rewards, terminated, truncated = (
            jax.tree.map(lambda *parts: np.concatenate(parts), *column)
            for column in list(zip(*rows, strict=True))[1:]
        )
        real = {
            "observation": observations,
            "reward": rewards,
            "terminated": terminated,
            "truncated": truncated,
        }
        if (found := first_difference(self.world, states, _cast(actions), real)) is not None:
            step, index = divmod(found[0], shape[1])
            raise NoTwin(
                f"environment {index}, after its action {actions[found[0]]} at step {step}: {found[1]}"
            )
        return jax.tree.map(lambda leaf: leaf.reshape(*shape, *leaf.shape[1:]), states)


def _as_world(states: list[Any]) -> TimeLimitedState:
    return TimeLimitedState(*jax.tree.map(_cast, _stacked(states)))


def _stacked(trees: Any) -> Any:
    return jax.tree.map(lambda *leaves: np.asarray(leaves), *trees)


def _cast(array: np.ndarray) -> np.ndarray:
    """In JAX's own dtypes."""
    return array.astype(jax.dtypes.canonicalize_dtype(array.dtype))
