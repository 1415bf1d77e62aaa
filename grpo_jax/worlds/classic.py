"""Classic control with Gymnasium's own dynamics, and the time limit that Gymnasium puts around an environment.

gymnax' versions are other tasks: CartPole knows Euler's method and one reward alone, Acrobot the book's equations,
MountainCarContinuous stops a car at the goal instead of at the left wall, and parameters belong to the world. Here all
that an environment's ``step`` reads is part of a state, under the name of its attribute: environments that are stepped
side by side may differ. Source: gymnasium 1.3, ``gymnasium/envs/classic_control/*.py``. Gymnasium computes in float64,
this in JAX's default float.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct

from grpo_jax.spaces import ActionSpace, Box, Discrete, Space
from grpo_jax.types import Observation, PyTree, Step
from grpo_jax.worlds.base import World, WrappedWorld, strong

NO_LIMIT = int(jnp.iinfo(jnp.int32).max)
"""Steps until a time limit that there is none."""

State = dict[str, Any]
Moved = tuple[State, Any, Any]
"""The variables that are reached, reward ``[]`` and terminated bool ``[]``."""


class Task(NamedTuple):
    """One of Gymnasium's tasks; static.

    Attributes:
      start: ``(name, low, high)`` of each variable, between which an episode starts.
      parameters: ``(name, Gymnasium's default)`` of all else that ``step`` reads.
      move: one step, of what is in a state and an action.
      observe: what is seen of a state, ``[*shape]``.
      observation_space: at the default parameters.
      action_space: at the default parameters.
    """

    start: tuple[tuple[str, float, float], ...]
    parameters: tuple[tuple[str, float | bool], ...]
    move: Callable[[Any, jax.Array], Moved]
    observe: Callable[[Any], jax.Array]
    observation_space: Space
    action_space: ActionSpace


@struct.dataclass
class ClassicWorld(World):
    """A task of classic control; without a time limit, see :class:`TimeLimited`.

    A state is a flat dict of scalars ``[]``: the task's variables and parameters, by name.
    """

    task: Task = struct.field(pytree_node=False)

    @property
    def observation_space(self) -> Space:  # type: ignore[override]
        return self.task.observation_space

    @property
    def action_space(self) -> ActionSpace:  # type: ignore[override]
        return self.task.action_space

    def reset(self, key: jax.Array) -> tuple[Observation, State]:
        names, low, high = zip(*self.task.start, strict=True)
        drawn = jax.random.uniform(
            key, (len(names),), minval=jnp.array(low, float), maxval=jnp.array(high, float)
        )
        state = strong(dict(zip(names, drawn, strict=True)) | dict(self.task.parameters))
        return self.task.observe(SimpleNamespace(**state)), state

    def step(self, key: jax.Array, state: State, action: jax.Array) -> Step:
        del key
        moved, reward, terminated = self.task.move(SimpleNamespace(**state), action)
        state = strong(state | moved, like=state)
        return Step(
            observation=self.task.observe(SimpleNamespace(**state)),
            state=state,
            reward=jnp.asarray(reward, jnp.result_type(float)),
            terminated=jnp.asarray(terminated, bool),
            truncated=jnp.bool_(False),
        )


def move_cart_pole(s: Any, action: jax.Array) -> Moved:
    """A pole on a cart that is pushed left (0) or right (1); CartPoleEnv.step.

    theta'' = (g sin(theta) - cos(theta) t) / (l (4/3 - m cos(theta)^2 / M)), x'' = t - m l theta'' cos(theta) / M,
    t = (F + m l theta'^2 sin(theta)) / M; by Euler's method or, without ``is_euler``, its semi-implicit form. Ends beyond the
    thresholds of x and theta. Pays 1 a step, or with ``sutton_barto`` -1 at the end and 0 before.
    """
    cosine, sine = jnp.cos(s.theta), jnp.sin(s.theta)
    force = jnp.where(action == 1, s.force_mag, -s.force_mag)
    push = (force + s.polemass_length * jnp.square(s.theta_dot) * sine) / s.total_mass
    inertia = s.length * (4.0 / 3.0 - s.masspole * jnp.square(cosine) / s.total_mass)
    turn = (s.gravity * sine - cosine * push) / inertia
    x_dot = s.x_dot + s.tau * (push - s.polemass_length * turn * cosine / s.total_mass)
    theta_dot = s.theta_dot + s.tau * turn
    x = s.x + s.tau * jnp.where(s.is_euler, s.x_dot, x_dot)
    theta = s.theta + s.tau * jnp.where(s.is_euler, s.theta_dot, theta_dot)
    fell = (jnp.abs(x) > s.x_threshold) | (jnp.abs(theta) > s.theta_threshold_radians)
    reward = jnp.where(s.sutton_barto, jnp.where(fell, -1.0, 0.0), 1.0)
    return {"x": x, "x_dot": x_dot, "theta": theta, "theta_dot": theta_dot}, reward, fell


def see_cart_pole(s: Any) -> jax.Array:
    """``[x, x_dot, theta, theta_dot]``."""
    return jnp.stack([s.x, s.x_dot, s.theta, s.theta_dot])


def move_acrobot(s: Any, action: jax.Array) -> Moved:
    """Two links with a motor (``torque_0, torque_1, torque_2`` by the action) between them; AcrobotEnv.step without noise.

    One Runge-Kutta step of fourth order, of ``dt``. Angles are wrapped into [-pi, pi], velocities clipped. Ends, and pays 0
    instead of -1, where -cos(theta1) - cos(theta1 + theta2) > 1.
    """
    torque = jnp.where(action == 0, s.torque_0, jnp.where(action == 1, s.torque_1, s.torque_2))

    def after(seconds: Any, slope: tuple[Any, ...]) -> tuple[Any, ...]:
        return tuple(y + seconds * change for y, change in zip(start, slope, strict=True))

    start = (s.theta1, s.theta2, s.dtheta1, s.dtheta2)
    k1 = _acrobot_slope(s, torque, start)
    k2 = _acrobot_slope(s, torque, after(s.dt / 2, k1))
    k3 = _acrobot_slope(s, torque, after(s.dt / 2, k2))
    k4 = _acrobot_slope(s, torque, after(s.dt, k3))
    slope = tuple((a + 2 * b + 2 * c + d) / 6 for a, b, c, d in zip(k1, k2, k3, k4, strict=True))
    theta1, theta2, dtheta1, dtheta2 = after(s.dt, slope)
    theta1, theta2 = _wrap(theta1), _wrap(theta2)
    ends = -jnp.cos(theta1) - jnp.cos(theta2 + theta1) > 1.0
    reached = {
        "theta1": theta1,
        "theta2": theta2,
        "dtheta1": jnp.clip(dtheta1, -s.MAX_VEL_1, s.MAX_VEL_1),
        "dtheta2": jnp.clip(dtheta2, -s.MAX_VEL_2, s.MAX_VEL_2),
    }
    return reached, jnp.where(ends, 0.0, -1.0), ends


def _acrobot_slope(s: Any, torque: jax.Array, y: tuple[Any, ...]) -> tuple[Any, ...]:
    """Time derivatives of ``(theta1, theta2, dtheta1, dtheta2)``; AcrobotEnv._dsdt, ``is_book`` tells the book's from the paper's."""
    m1, m2, l1, inertia, g = s.LINK_MASS_1, s.LINK_MASS_2, s.LINK_LENGTH_1, s.LINK_MOI, 9.8
    lc1, lc2 = s.LINK_COM_POS_1, s.LINK_COM_POS_2
    theta1, theta2, dtheta1, dtheta2 = y
    cosine, sine = jnp.cos(theta2), jnp.sin(theta2)
    d1 = m1 * lc1**2 + m2 * (l1**2 + lc2**2 + 2 * l1 * lc2 * cosine) + 2 * inertia
    d2 = m2 * (lc2**2 + l1 * lc2 * cosine) + inertia
    phi2 = m2 * lc2 * g * jnp.cos(theta1 + theta2 - jnp.pi / 2)
    phi1 = phi2 + (m1 * lc1 + m2 * l1) * g * jnp.cos(theta1 - jnp.pi / 2)
    phi1 -= m2 * l1 * lc2 * sine * dtheta2 * (dtheta2 + 2 * dtheta1)
    of_book = jnp.where(s.is_book, m2 * l1 * lc2 * jnp.square(dtheta1) * sine, 0.0)
    ddtheta2 = (torque + d2 / d1 * phi1 - of_book - phi2) / (m2 * lc2**2 + inertia - d2**2 / d1)
    return dtheta1, dtheta2, -(d2 * ddtheta2 + phi1) / d1, ddtheta2


def see_acrobot(s: Any) -> jax.Array:
    """``[cos(theta1), sin(theta1), cos(theta2), sin(theta2), dtheta1, dtheta2]``."""
    angles = [jnp.cos(s.theta1), jnp.sin(s.theta1), jnp.cos(s.theta2), jnp.sin(s.theta2)]
    return jnp.stack([*angles, s.dtheta1, s.dtheta2])


def move_pendulum(s: Any, action: jax.Array) -> Moved:
    """A pendulum that a torque ``action [1]`` turns; PendulumEnv.step. It never ends.

    theta' += (3 g / (2 l) sin(theta) + 3 u / (m l^2)) dt, clipped; theta += theta' dt. Pays, for the state before,
    -(angle^2 + 0.1 theta'^2 + 0.001 u^2) with the angle within [-pi, pi].
    """
    u = jnp.clip(action[0], -s.max_torque, s.max_torque)
    cost = jnp.square(_wrap(s.theta)) + 0.1 * jnp.square(s.theta_dot) + 0.001 * jnp.square(u)
    change = 3 * s.g / (2 * s.l) * jnp.sin(s.theta) + 3.0 / (s.m * jnp.square(s.l)) * u
    theta_dot = jnp.clip(s.theta_dot + change * s.dt, -s.max_speed, s.max_speed)
    return {"theta": s.theta + theta_dot * s.dt, "theta_dot": theta_dot}, -cost, False


def see_pendulum(s: Any) -> jax.Array:
    """``[cos(theta), sin(theta), theta_dot]``."""
    return jnp.stack([jnp.cos(s.theta), jnp.sin(s.theta), s.theta_dot])


def move_mountain_car(s: Any, action: jax.Array) -> Moved:
    """A car that is pushed left, not at all, or right (0, 1, 2) in a valley; MountainCarEnv.step. Pays -1 a step."""
    push = (jnp.asarray(action, jnp.result_type(float)) - 1.0) * s.force
    moved, arrived = _roll(s, push - s.gravity * jnp.cos(3 * s.position))
    return moved, -1.0, arrived


def move_mountain_car_continuous(s: Any, action: jax.Array) -> Moved:
    """The same with a force ``action [1]``; Continuous_MountainCarEnv.step. Pays 100 at the goal, and -0.1 action^2 a step."""
    force = jnp.clip(action[0], s.min_action, s.max_action)
    moved, arrived = _roll(s, force * s.power - 0.0025 * jnp.cos(3 * s.position))
    return moved, jnp.where(arrived, 100.0, 0.0) - 0.1 * jnp.square(action[0]), arrived


def _roll(s: Any, change: jax.Array) -> tuple[State, jax.Array]:
    """Where a change of the velocity leads: stopped by the left wall, and whether the goal is reached."""
    velocity = jnp.clip(s.velocity + change, -s.max_speed, s.max_speed)
    position = jnp.clip(s.position + velocity, s.min_position, s.max_position)
    velocity = jnp.where((position == s.min_position) & (velocity < 0), 0.0, velocity)
    arrived = (position >= s.goal_position) & (velocity >= s.goal_velocity)
    return {"position": position, "velocity": velocity}, arrived


def see_mountain_car(s: Any) -> jax.Array:
    """``[position, velocity]``."""
    return jnp.stack([s.position, s.velocity])


def _wrap(angle: jax.Array) -> jax.Array:
    """The angle within [-pi, pi]; one that is there already stays as it is, to the last bit."""
    return jnp.where(jnp.abs(angle) <= jnp.pi, angle, (angle + jnp.pi) % (2 * jnp.pi) - jnp.pi)


def _box(*high: float, low: tuple[float, ...] | None = None) -> Box:
    return Box(np.array([-bound for bound in high] if low is None else low), np.array(high), (len(high),))


_CAR = (("min_position", -1.2), ("max_position", 0.6), ("max_speed", 0.07), ("goal_velocity", 0.0))
_CAR_START = (("position", -0.6, -0.4), ("velocity", 0.0, 0.0))
_CAR_SPACE = _box(0.6, 0.07, low=(-1.2, -0.07))
_LINKS: tuple[tuple[str, float | bool], ...]
_LINKS = (("LINK_LENGTH_1", 1.0), ("LINK_MASS_1", 1.0), ("LINK_MASS_2", 1.0), ("LINK_MOI", 1.0))
_LINKS += (
    ("LINK_COM_POS_1", 0.5),
    ("LINK_COM_POS_2", 0.5),
    ("MAX_VEL_1", 4 * np.pi),
    ("MAX_VEL_2", 9 * np.pi),
)
_LINKS += (("torque_0", -1.0), ("torque_1", 0.0), ("torque_2", 1.0), ("dt", 0.2), ("is_book", True))
_POLE: tuple[tuple[str, float | bool], ...]
_POLE = (("gravity", 9.8), ("masspole", 0.1), ("total_mass", 1.1), ("length", 0.5), ("polemass_length", 0.05))
_POLE += (("force_mag", 10.0), ("tau", 0.02), ("theta_threshold_radians", np.pi / 15), ("x_threshold", 2.4))
_POLE += (("is_euler", True), ("sutton_barto", False))

TASKS = {
    "CartPole": Task(
        tuple((name, -0.05, 0.05) for name in ("x", "x_dot", "theta", "theta_dot")),
        _POLE,
        move_cart_pole,
        see_cart_pole,
        _box(4.8, np.inf, 2 * np.pi / 15, np.inf),
        Discrete(2),
    ),
    "Acrobot": Task(
        tuple((name, -0.1, 0.1) for name in ("theta1", "theta2", "dtheta1", "dtheta2")),
        _LINKS,
        move_acrobot,
        see_acrobot,
        _box(1.0, 1.0, 1.0, 1.0, 4 * np.pi, 9 * np.pi),
        Discrete(3),
    ),
    "Pendulum": Task(
        (("theta", -np.pi, np.pi), ("theta_dot", -1.0, 1.0)),
        (("g", 10.0), ("m", 1.0), ("l", 1.0), ("dt", 0.05), ("max_speed", 8.0), ("max_torque", 2.0)),
        move_pendulum,
        see_pendulum,
        _box(1.0, 1.0, 8.0),
        _box(2.0),
    ),
    "MountainCar": Task(
        _CAR_START,
        (*_CAR, ("goal_position", 0.5), ("force", 0.001), ("gravity", 0.0025)),
        move_mountain_car,
        see_mountain_car,
        _CAR_SPACE,
        Discrete(3),
    ),
    "MountainCarContinuous": Task(
        _CAR_START,
        (*_CAR, ("goal_position", 0.45), ("power", 0.0015), ("min_action", -1.0), ("max_action", 1.0)),
        move_mountain_car_continuous,
        see_mountain_car,
        _CAR_SPACE,
        _box(1.0),
    ),
}
"""Gymnasium's tasks of classic control, by the name of their ids without a version."""


@functools.cache
def classic(name: str) -> ClassicWorld:
    """The world of one of :data:`TASKS`; KeyError for another name."""
    return ClassicWorld(TASKS[name])


class TimeLimitedState(struct.PyTreeNode):
    """A world's state, and the steps that are left until the episode is cut; int32 ``[]``."""

    inner: PyTree
    left: jax.Array


@struct.dataclass
class TimeLimited(WrappedWorld):
    """A world whose episodes are cut, as by Gymnasium's ``TimeLimit``: a truncation.

    Attributes:
      world: the world underneath.
      max_steps: of an episode; ``NO_LIMIT``: as many as there may be.
    """

    max_steps: int = struct.field(pytree_node=False, default=NO_LIMIT)

    def reset(self, key: jax.Array) -> tuple[Observation, TimeLimitedState]:
        observation, state = self.world.reset(key)
        return observation, TimeLimitedState(state, jnp.int32(self.max_steps))

    def step(self, key: jax.Array, state: TimeLimitedState, action: jax.Array) -> Step:
        step = self.world.step(key, state.inner, action)
        left = jnp.where(state.left == NO_LIMIT, NO_LIMIT, state.left - 1)
        return step.replace(state=TimeLimitedState(step.state, left), truncated=step.truncated | (left <= 0))
