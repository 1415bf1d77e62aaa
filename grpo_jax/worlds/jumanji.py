"""Jumanji's environments as worlds: action masks, several agents as one, and time limits that are truncations."""

from __future__ import annotations

import copy
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct

from grpo_jax.spaces import Dict, Discrete, MultiDiscrete, Space
from grpo_jax.types import Observation, PyTree, Step
from grpo_jax.worlds.base import World, strong
from grpo_jax.worlds.classic import NO_LIMIT, TimeLimited
from grpo_jax.worlds.suites import box, floats, fresh_key, load, making, once, settled

_LAST = 2
"""The type of an episode's last step."""

_LEFT_OUT = ("action_mask", "step_count")
"""Fields of an observation that are no part of ours: the mask is the world's, a time limit is no part of the task."""


class JumanjiState(struct.PyTreeNode):
    """A Jumanji state, and the actions that are allowed in it: bool ``[n]``, or None where all always are."""

    inner: PyTree
    mask: jax.Array | None


@struct.dataclass
class JumanjiWorld(World):
    """A Jumanji environment; what several agents earn is added up, as by its ``MultiToSingleWrapper``.

    Attributes:
      env: it must not end by a time limit.
      nvec: how many values each part of an action has.
      observation_space: static.
      action_space: static; ``Discrete`` also where an action has parts whose mask is one of their combinations.
    """

    env: Any = struct.field(pytree_node=False)
    nvec: tuple[int, ...] = struct.field(pytree_node=False)
    observation_space: Space = struct.field(pytree_node=False)
    action_space: Discrete | MultiDiscrete = struct.field(pytree_node=False)

    def reset(self, key: jax.Array) -> tuple[Observation, JumanjiState]:
        inner, first = self.env.reset(key)
        observation, mask = _see(first.observation)
        return observation, JumanjiState(strong(inner), mask)

    def step(self, key: jax.Array, state: JumanjiState, action: jax.Array) -> Step:
        inner = state.inner.replace(key=fresh_key(state.inner.key, key))
        if isinstance(self.action_space, Discrete) and len(self.nvec) > 1:
            action = jnp.stack(jnp.unravel_index(action, self.nvec)).astype(jnp.int32)
        new, reached = self.env.step(inner, action)
        observation, mask = _see(reached.observation)
        is_last = reached.step_type == _LAST
        return settled(state, observation, JumanjiState(new, mask), jnp.sum(reached.reward), is_last, False)

    def action_mask(self, state: JumanjiState) -> jax.Array | None:
        return state.mask

    def picture(self, state: JumanjiState) -> np.ndarray:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure

        env, canvas = copy.copy(self.env), FigureCanvasAgg(Figure(figsize=(10, 10), dpi=40))
        figure = canvas.figure
        axes = figure.add_subplot()
        for name, viewer in vars(self.env).items():
            if isinstance(viewer, load("jumanji.viewer", "jumanji").MatplotlibViewer):
                setattr(env, name, viewer := copy.copy(viewer))
                # Not pyplot's, which would open a window.
                viewer._get_fig_ax = lambda *_, **__: (figure, axes)
                viewer._display = lambda figure: None
        try:
            env.render(jax.tree.map(jnp.asarray, state.inner))
            canvas.draw()
            picture = np.asarray(canvas.buffer_rgba())[..., :3].copy()
            if (picture == picture[0, 0]).all():
                raise AttributeError("nothing was drawn")
        except (AttributeError, TypeError) as error:  # it draws elsewhere, or not in one plane
            what = type(self.env).__name__
            raise NotImplementedError(f"Jumanji draws {what} in a window alone ({error})") from error
        return picture


def _see(observation: Any) -> tuple[Observation, jax.Array | None]:
    """What the policy sees, as floats: the fields of an observation or its only one; and the mask, bool ``[n]``."""
    fields = _fields(observation)
    mask = fields.get("action_mask")
    seen = {name: floats(field) for name, field in fields.items() if name not in _LEFT_OUT}
    one = next(iter(seen.values())) if len(seen) == 1 else seen
    return one, None if mask is None else jnp.asarray(mask, bool).reshape(-1)


def _fields(tree: Any, prefix: str = "") -> dict[str, Any]:
    """Leaves of nested observations by their names, ``agent_position.row``."""
    if hasattr(tree, "_asdict"):
        items = tree._asdict().items()
    elif hasattr(tree, "__dataclass_fields__"):
        items = [(name, getattr(tree, name)) for name in tree.__dataclass_fields__]
    else:
        return {prefix: tree}
    return {
        path: leaf
        for name, part in items
        for path, leaf in _fields(part, f"{prefix}.{name}" if prefix else name).items()
    }


def ids() -> tuple[str, ...]:
    """Jumanji's environments."""
    return tuple(sorted(load("jumanji", "jumanji").registered_environments()))


def from_id(name: str, **options: Any) -> World:
    """The world of an environment.

    Args:
      name: as Jumanji has it, such as ``"Snake-v1"``.
      options: of its constructor, such as ``time_limit`` or ``generator``.

    Raises:
      NotImplementedError: actions that no policy here takes.
    """
    env, max_steps = _environment(name, **options)
    first = jax.eval_shape(lambda key: env.reset(key)[1].observation, jax.random.key(0))
    nvec = np.atleast_1d(getattr(env.action_spec, "num_values", np.zeros((1, 1))))
    if nvec.ndim != 1:
        raise NotImplementedError(f"env='jumanji/{name}': actions {env.action_spec} are not supported")
    parts = tuple(int(n) for n in nvec)
    seen = jax.eval_shape(lambda tree: _see(tree)[0], first)
    space: Space = (
        Dict(tuple((field, box(leaf.shape)) for field, leaf in seen.items()))
        if isinstance(seen, dict)
        else box(seen.shape)
    )
    mask = _fields(first).get("action_mask")
    actions = _actions(name, parts, None if mask is None else mask.shape)
    world = JumanjiWorld(env, parts, space, actions)
    return world if max_steps is None else TimeLimited(world, max_steps)


def _actions(
    name: str, parts: tuple[int, ...], mask_shape: tuple[int, ...] | None
) -> Discrete | MultiDiscrete:
    """``Discrete`` where a mask is one of whole actions, ``MultiDiscrete`` where each part has a mask of its own."""
    of_parts = (len(parts), parts[0]) if len(set(parts)) == 1 else None
    if len(parts) == 1 or (mask_shape == parts and mask_shape != of_parts):
        return Discrete(int(np.prod(parts)))
    if mask_shape is None or (mask_shape == of_parts and mask_shape != parts):
        return MultiDiscrete(parts)
    raise NotImplementedError(
        f"env='jumanji/{name}': a mask of shape {mask_shape} for actions of {parts} values is not supported"
    )


@once
def _environment(name: str, **options: Any) -> tuple[Any, int | None]:
    """An environment without its time limit, and that limit."""
    with making(f"jumanji/{name}"):
        env = load("jumanji", "jumanji").make(name, **options)
    # Jumanji calls most time limits an end like any other: the environment must not know its own.
    max_steps = getattr(env, "time_limit", None)
    if max_steps is not None:
        env.time_limit = NO_LIMIT
    return env, max_steps
