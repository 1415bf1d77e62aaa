"""The pictures of the README: the group of one decision state, and an episode of the policy that learns from such groups.

python benchmarks/pictures.py [--out docs/images]
"""

from __future__ import annotations

import argparse
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
from matplotlib.figure import Figure
from PIL import Image, ImageSequence

import grpo_jax
from grpo_jax.cli.render import render
from grpo_jax.noise import as_key, bits_to_uniform, draw_bits

ENV_ID, FIRST_STEPS, N_BRANCHES, HORIZON = "CartPole-v1", 512, 24, 40
DECISION = np.array([0.0, 0.0, 0.1, 0.6], np.float32)  # the pole leans to the right, and falls that way
COLOURS, NAMES = ("#c0392b", "#2471a3"), ("push left", "push right")
N_FRAMES = 160
LIMIT = 12.0  # degrees, where an episode ends


def follow(state: grpo_jax.TrainState, env: grpo_jax.World, key: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Angles in degrees and whether the pole still stands, ``[2, N_BRANCHES, HORIZON]``: each candidate, then the policy."""
    policy, policy_state = state.policy, state.learner.policy
    decision = env.reset(key)[1]
    x, x_dot, theta, theta_dot = map(jnp.asarray, DECISION)
    decision = decision.replace(x=x, x_dot=x_dot, theta=theta, theta_dot=theta_dot)

    def branch(action: jax.Array, key: jax.Array) -> tuple[jax.Array, jax.Array]:
        def body(carry, key):
            world_state, action, stands = carry
            step = env.step(key, world_state, action)
            parameters = policy.parameters(policy_state, step.observation)
            uniforms = bits_to_uniform(draw_bits(key, (policy.distribution.n_uniforms,)))
            stands = stands & ~step.terminated
            chosen = policy.distribution.sample(parameters, uniforms)
            return (step.state, chosen, stands), (jnp.degrees(step.observation[2]), stands)

        first = (decision, action, jnp.bool_(True))
        return jax.lax.scan(body, first, jax.random.split(key, HORIZON))[1]

    keys = jax.random.split(key, N_BRANCHES)  # the same random numbers for both candidates
    return jax.vmap(lambda action: jax.vmap(lambda key: branch(action, key))(keys))(jnp.arange(2))


def draw_group(path: pathlib.Path) -> None:
    """What the candidates of one decision state lead to, and the advantages that follow."""
    env, config = grpo_jax.make(ENV_ID), grpo_jax.preset(ENV_ID)
    state = grpo_jax.train(config, env, jax.random.key(0), FIRST_STEPS).state
    angles, stands = map(np.asarray, jax.jit(follow)(state, env, as_key(jax.random.key(1))))
    returns = 1 + stands.sum(axis=2)  # CartPole pays 1 a step, the last one included
    figure = Figure(figsize=(9.0, 3.4), layout="constrained")
    fan, bars = figure.subplots(1, 2, width_ratios=(3, 1))
    steps = np.arange(HORIZON + 1)
    for candidate, (colour, name) in enumerate(zip(COLOURS, NAMES, strict=True)):
        for i in range(N_BRANCHES):
            n = min(int(returns[candidate, i]), HORIZON)
            line = np.concatenate([[np.degrees(DECISION[2])], angles[candidate, i, :n]])
            label = f"{name}: return {returns[candidate].mean():.0f}" if i == 0 else None
            fan.plot(steps[: n + 1], line, color=colour, alpha=0.45, linewidth=1, label=label)
    fan.axhspan(LIMIT, 2 * LIMIT, color="black", alpha=0.08)
    fan.text(HORIZON - 1, LIMIT + 1.3, "the episode ends", ha="right", va="center", fontsize=9)
    fan.set(
        xlim=(0, HORIZON),
        ylim=(0, 15),
        xlabel="steps from the decision state",
        ylabel="angle of the pole, degrees",
    )
    fan.set_title("One decision state: every candidate is followed, then the policy", fontsize=10)
    fan.legend(loc="lower right", frameon=False)
    advantages = returns.mean(axis=1) - returns.mean()
    bars.bar(NAMES, advantages, color=COLOURS)
    bars.axhline(0, color="black", linewidth=0.8)
    bars.set_title("Advantage", fontsize=10)
    figure.savefig(path, dpi=110)


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
