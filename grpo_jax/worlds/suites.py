"""What the worlds of other suites share; ``make`` knows the suites, each has a file of its own.

A suite's file has ``ids()``, the ids without the suite's prefix, and ``from_id(name, ...)``, the world of one of them.
It imports its suite where one of the two is called, never before.
"""

from __future__ import annotations

import contextlib
import difflib
import functools
import importlib
import io
import os
import re
from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np

from grpo_jax.spaces import Box
from grpo_jax.types import Observation, PyTree, Step
from grpo_jax.worlds.base import strong

_R = TypeVar("_R")


def load(module: str, suite: str) -> Any:
    """A module of a suite.

    Raises:
      ImportError: it cannot be imported; says what to install.
    """
    package = module.partition(".")[0]
    try:
        return importlib.import_module(module)
    except ImportError as error:
        is_missing = isinstance(error, ModuleNotFoundError) and (error.name or "").startswith(package)
        why = "is not installed" if is_missing else f"cannot be imported ({error})"
        raise ImportError(
            f"env='{suite}/...' needs {package}, which {why}: pip install 'grpo-jax[{suite}]' (in a clone: '.[{suite}]')"
        ) from error


def unknown_id(env_id: str, known: Sequence[str], what: str) -> ValueError:
    """The error for an id that there is not; suggests the nearest of the ``known`` ones, which lack the suite's prefix."""
    prefix, slash, name = env_id.rpartition("/")
    near = nearest(name, known)
    is_begun = any(match.lower().startswith(name.lower()) for match in near)  # Breakout: of Breakout-MinAtar
    if not is_begun and (not near or _base(near[0]) != _base(name)):
        refuse_gymnasium(env_id)
    hint = (
        f"did you mean {' or '.join(prefix + slash + match for match in near)}?"
        if near
        else f"known ids: {', '.join(known)}"
    )
    return ValueError(f"env={env_id!r} is not {what}; {hint}")


def unknown_suite(prefix: str, known: Sequence[str], what: str) -> ValueError:
    """The error for a suite that there is not; ``what`` names the argument and its value, such as ``env='Brax/ant'``."""
    near = nearest(prefix, known, cutoff=0.6)
    hint = f"; did you mean {' or '.join(near)}?" if near else ""
    return ValueError(f"{what}: there is no suite {prefix!r}{hint}; there are {', '.join(known)}")


def nearest(name: str, known: Sequence[str], cutoff: float = 0.4) -> list[str]:
    """The known names that a misspelled one may mean: those that differ in case or version alone, else up to 3 like it."""
    same = [match for match in known if _base(match) == _base(name)]
    exact = [match for match in same if match.lower() == name.lower()]
    by_lower = {match.lower(): match for match in known}
    near = difflib.get_close_matches(name.lower(), list(by_lower), n=3, cutoff=cutoff)
    return exact or same or [by_lower[match] for match in near]


def _base(name: str) -> str:
    """An id without its version, in lower case."""
    return re.sub(r"-v\d+$", "", name.lower())


def refuse_gymnasium(env_id: str) -> None:
    """Raises ValueError where an id is one of Gymnasium's, which no world has: says what takes it."""
    import gymnasium

    atari = (
        env_id.lower().startswith("ale/") or "NoFrameskip" in env_id
    )  # registered where ale_py is imported
    exact = {known.lower(): known for known in gymnasium.registry}
    newest = {_base(known): known for known in gymnasium.registry}
    found = env_id if atari else exact.get(env_id.lower()) or newest.get(_base(env_id))
    if found is not None:
        policy, found = ("CnnPolicy", f"ale_py:{env_id}") if atari else ("MlpPolicy", found)
        raise ValueError(
            f"env={env_id!r} is a Gymnasium environment, which is no world of JAX: use sb3_bridge.GRPO, as in"
            f" `from sb3_bridge import GRPO; GRPO({policy!r}, {found!r}).learn(100_000)`"
        )


@contextlib.contextmanager
def making(env_id: str) -> Iterator[None]:
    """Says of an environment that its suite cannot make why that may be.

    Raises:
      RuntimeError: whatever the suite raised, wrong arguments (TypeError, ValueError) apart.
    """
    try:
        yield
    except (TypeError, ValueError, NotImplementedError):
        raise
    except Exception as error:  # a suite may raise anything
        raise RuntimeError(
            f"env={env_id!r} could not be made ({type(error).__name__}: {str(error).strip() or 'no reason given'})."
            " Some environments download robots or data when they are made for the first time: make it once where"
            " the network can be reached"
        ) from error


def once(function: Callable[..., _R]) -> Callable[..., _R]:
    """Remembers what was made of arguments that can be hashed: worlds with one environment object share their traces."""
    remembered = functools.lru_cache(maxsize=128, typed=True)(function)

    @functools.wraps(function)
    def made(*args: Any, **kwargs: Any) -> _R:
        try:
            hash((args, tuple(kwargs.items())))
        except TypeError:
            return function(*args, **kwargs)
        return remembered(*args, **kwargs)

    return made


def settled(
    like: PyTree, observation: Observation, state: PyTree, reward: Any, terminated: Any, truncated: Any
) -> Step:
    """A step whose dtypes never change: those of the state ``like`` before it, floating rewards, bool flags, all ``[]``."""
    return Step(
        observation=strong(observation),
        state=strong(state, like=like),
        reward=jnp.asarray(reward, jnp.result_type(float)).reshape(()),
        terminated=jnp.asarray(terminated, bool).reshape(()),
        truncated=jnp.asarray(truncated, bool).reshape(()),
    )


def fresh_key(old: jax.Array, key: jax.Array) -> jax.Array:
    """The key of a step, in the form in which a state holds its own.

    A state's own key would give every branch the future that is going to happen, and all branches of a candidate the
    same one.
    """
    words = jax.random.key_data(key)
    if jnp.issubdtype(old.dtype, jax.dtypes.prng_key):
        return jax.random.wrap_key_data(words, impl=jax.random.key_impl(old))
    return words


def pixels(drawing: str) -> np.ndarray:
    """An SVG of plain shapes as uint8 ``[height, width, 3]``.

    Raises:
      NotImplementedError: pygame, which draws it, is missing.
    """
    os.environ.setdefault("PYGAME_HIDE_SUPPORT_PROMPT", "1")
    try:
        import pygame
    except ImportError as error:
        raise NotImplementedError("this picture needs pygame: pip install pygame") from error
    surface = pygame.image.load(io.BytesIO(drawing.encode()), "drawing.svg")
    return np.ascontiguousarray(pygame.surfarray.array3d(surface).swapaxes(0, 1))


def floats(observation: Any) -> jax.Array:
    """Bits and integers as JAX's default float."""
    return jnp.asarray(observation, jnp.result_type(float))


def box(shape: Sequence[int], low: float = -np.inf, high: float = np.inf) -> Box:
    """Real numbers from ``low`` to ``high``."""
    return Box(np.asarray(low), np.asarray(high), tuple(shape))


def one_hot(grid: jax.Array, sizes: Sequence[int]) -> jax.Array:
    """Categories ``[H, W, C]`` as feature maps, float ``[H, W, sum(sizes)]``; ``sizes`` has one entry a channel."""
    return jnp.concatenate([jax.nn.one_hot(grid[..., i], n) for i, n in enumerate(sizes)], axis=-1)
