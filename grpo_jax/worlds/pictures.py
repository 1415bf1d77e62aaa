"""Pictures of states, drawn by gymnax's own visualizers or by their world, and GIFs of them.

Nothing is imported before the first picture: matplotlib, pygame and Gymnasium take seconds.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np

from grpo_jax.types import PyTree
from grpo_jax.worlds.base import RewardOverride, World
from grpo_jax.worlds.gymnax import GymnaxWorld

_COLORS = 64
"""Of a GIF: enough for these pictures, and a third of the size."""

_LEAST_WIDTH = 240


class Renderer:
    """Draws states one by one; keeps the screen between them."""

    def __init__(self) -> None:
        self._screen: Any = None

    def frame(self, world: World, state: PyTree) -> np.ndarray:
        """Draws one state.

        Args:
          world: the world that the state belongs to.
          state: one state, without a batch axis.

        Returns:
          uint8 ``[height, width, 3]``.

        Raises:
          NotImplementedError: there is no picture of this world, or what draws it is missing.
          gymnasium.error.DependencyNotInstalled: pygame is missing.
        """
        while isinstance(world, RewardOverride):
            world, state = world.world, state.inner
        if not isinstance(world, GymnaxWorld):
            picture = world.picture(state)
            factor = -(-_LEAST_WIDTH // picture.shape[1])  # whole pixels, wide enough for a caption
            return picture.repeat(factor, axis=0).repeat(factor, axis=1)
        name, classic, plots = world.env.name, _classic_names(), _plots()
        if name in classic:
            return self._classic_control(name, state, world.params)
        if name in plots:
            return _plot(plots[name], world, state)
        known = ", ".join((*classic, *plots))
        raise NotImplementedError(f"gymnax has no picture of {name}; what can be rendered: {known}")

    def _classic_control(self, name: str, state: PyTree, params: PyTree) -> np.ndarray:
        """gymnax's ``render_gym_frame``, without a new window for every frame."""
        import gymnasium
        from gymnax.visualize import vis_gym

        if self._screen is None:
            self._screen = gymnasium.make(name, render_mode="rgb_array", disable_env_checker=True).unwrapped
            self._screen.reset()
        vis_gym.set_gym_params(self._screen, name, params)
        self._screen.state = vis_gym.get_gym_state(state, name)
        if name == "Pendulum-v1":
            self._screen.last_u = np.asarray(state.last_u, np.float64)
        return self._screen.render()

    def close(self) -> None:
        """Closes the screen; may be called twice."""
        if self._screen is not None:
            self._screen.close()
            self._screen = None


def fps(world: World) -> int:
    """Frames per second at which a world is good to watch: games on a grid move in larger steps."""
    return 20 if isinstance(world, GymnaxWorld) and world.env.name in _classic_names() else 10


def caption(frame: np.ndarray, text: str) -> np.ndarray:
    """Puts a line of text above a picture.

    Args:
      frame: uint8 ``[height, width, 3]``.
      text: one line.

    Returns:
      uint8 ``[height + 36, width, 3]``.
    """
    from PIL import Image, ImageDraw, ImageFont

    band = Image.new("RGB", (frame.shape[1], 36), "white")
    font = ImageFont.load_default(20)
    ImageDraw.Draw(band).text((frame.shape[1] / 2, 18), text, fill="black", font=font, anchor="mm")
    return np.concatenate([np.asarray(band), frame])


def write_gif(path: Path, frames: Iterable[np.ndarray], fps: float) -> int:
    """Writes a GIF that plays for ever; all of it or nothing.

    Args:
      path: where to, in a directory that exists; replaced.
      frames: at least one; uint8 ``[height, width, 3]``, of equal shapes.
      fps: frames per second.

    Returns:
      How many frames there were.
    """
    from PIL import Image

    images = [Image.fromarray(frame).quantize(_COLORS) for frame in frames]
    with tempfile.TemporaryDirectory(dir=path.absolute().parent, prefix=".gif-") as directory:
        written = Path(directory) / "whole.gif"
        images[0].save(written, save_all=True, append_images=images[1:], duration=1000 / fps, loop=0)
        os.replace(written, path)
    return len(images)


def _classic_names() -> tuple[str, ...]:
    """What Gymnasium draws."""
    from gymnax.visualize import vis_gym

    return vis_gym.SUPPORTED_GYM_ENVS


def _plots() -> dict[str, Callable[..., Any]]:
    """What matplotlib draws: name -> ``init(axes, env, state, params)``."""
    from gymnax.visualize import vis_catch, vis_maze, vis_minatar

    minatar = ("Asterix", "Breakout", "Freeway", "Seaquest", "SpaceInvaders")
    return {
        "Catch-bsuite": vis_catch.init_catch,
        **{f"{game}-MinAtar": vis_minatar.init_minatar for game in minatar},
        "Pong-misc": vis_minatar.init_minatar,
        "MetaMaze-misc": vis_maze.init_maze,
        "FourRooms-misc": vis_maze.init_maze,
        "PointRobot-misc": _point_robot,
    }


def _point_robot(axes: Any, _: Any, state: PyTree, params: PyTree) -> None:
    """The goal on its half circle and the robot; gymnax's own draws on pyplot's global figure."""
    from matplotlib.patches import Arc, Circle

    axes.set(xlim=(-1.25, 1.25), ylim=(-0.5, 1.25), aspect="equal", xticks=(), yticks=())
    axes.add_patch(Arc((0, 0), 2, 2, theta1=0, theta2=180))
    axes.add_patch(Circle((float(state.goal[0]), float(state.goal[1])), float(params.goal_radius), alpha=0.3))
    axes.add_patch(Circle((float(state.pos[0]), float(state.pos[1])), 0.05, color="red"))


def _plot(init: Callable[..., Any], world: GymnaxWorld, state: PyTree) -> np.ndarray:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(4, 4), dpi=100)  # not pyplot's: no global state, no display
    canvas = FigureCanvasAgg(figure)
    init(figure.add_subplot(), world.env, state, world.params)
    canvas.draw()
    return np.array(canvas.buffer_rgba())[..., :3].copy()
