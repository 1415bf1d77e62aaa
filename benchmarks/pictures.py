"""The pictures of the README: the group of one decision state, and an episode of the policy that learns from such groups.

python benchmarks/pictures.py [--out docs/images]
"""

from __future__ import annotations

import argparse
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
from PIL import Image, ImageSequence

import grpo_jax
from grpo_jax.cli import decision, group_plots, plots
from grpo_jax.cli.render import render
from grpo_jax.noise import as_key

ENV_ID, FIRST_STEPS, N_BRANCHES, HORIZON = "CartPole-v1", 512, 24, 40
DECISION = np.array([0.0, 0.0, 0.1, 0.6], np.float32)  # the pole leans to the right, and falls that way
NAMES = ("push left", "push right")
N_FRAMES = 160
LIMIT = 12.0  # degrees, where an episode ends


def draw_group(path: pathlib.Path) -> None:
    """What the candidates of one decision state lead to, and the advantages that follow."""
    env, config = grpo_jax.make(ENV_ID), grpo_jax.preset(ENV_ID)
    state = grpo_jax.train(config, env, jax.random.key(0), FIRST_STEPS).state
    observation = jnp.asarray(DECISION)
    decision_state = env.reset(as_key(jax.random.key(1)))[1]
    x, x_dot, theta, theta_dot = observation
    decision_state = decision_state.replace(x=x, x_dot=x_dot, theta=theta, theta_dot=theta_dot)
    key, config = jax.random.key(1), config.replace(horizon=HORIZON)
    group = jax.device_get(
        decision.fan(state, env, config, decision_state, observation, key, n_branches=N_BRANCHES)
    )
    figure, fan, _ = group_plots.draw_fan(
        np.degrees(group.observation[..., 2]),
        group,
        title="One decision state: every candidate is followed, then the policy",
        y_label="angle of the pole, degrees",
        names=NAMES,
    )
    fan.axhspan(LIMIT, 2 * LIMIT, color="black", alpha=0.08)
    fan.text(HORIZON - 1, LIMIT + 1.3, "the episode ends", ha="right", va="center", fontsize=9)
    fan.set_ylim(3, 15)
    plots.write(figure, path)


def draw_episode(path: pathlib.Path) -> None:
    """An episode of the preset's policy."""
    env = grpo_jax.make(ENV_ID)
    total = grpo_jax.preset_timesteps(ENV_ID)
    state = grpo_jax.train(grpo_jax.preset(ENV_ID), env, jax.random.key(0), total).state
    frames, earned = render(state, env, jax.random.key(3), path)
    with Image.open(path) as gif:  # its beginning, so that a page loads soon
        shown = [frame.copy() for frame in ImageSequence.Iterator(gif)][:N_FRAMES]
    shown[0].save(
        path, save_all=True, append_images=shown[1:], duration=gif.info["duration"], loop=0, optimize=True
    )
    print(f"{path}: {len(shown)} of {frames} frames, return {earned:.0f} after {total:,} decision steps")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=pathlib.Path, default=pathlib.Path("docs/images"), help="folder")
    out = parser.parse_args().out
    draw_group(out / "group.png")
    draw_episode(out / "cartpole.gif")


if __name__ == "__main__":
    main()
