"""What docs/theory.md states and no other test shows: bounds, the clip at rest; its formulas and figures."""

import functools
import importlib.util
import re
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tabular

import grpo_jax
from grpo_jax.groups.branch import group_returns
from grpo_jax.learning import losses

ROOT = Path(__file__).parents[2]
PAGES = [(ROOT / "docs" / name).read_text(encoding="utf-8") for name in ("theory.md", "theory.ja.md")]
GAMMA = 0.9


@functools.partial(jax.jit, static_argnames="horizon")
def bootstrapped_returns(transition, reward, pi, critic, horizon):
    """Exact Q_H ``[S, A]`` with a critic ``[S]`` at the end, through the library's branches."""
    n_states, n_actions = pi.shape
    first = jnp.eye(n_actions)[None, :, None, :]  # the same action, wherever the mass is
    return group_returns(
        tabular.BeliefWorld(transition, reward),
        lambda observation, mask, uniforms: jnp.broadcast_to(pi, (*uniforms.shape[:-1], *pi.shape)),
        jax.random.key(0),
        jnp.eye(n_states),
        jnp.broadcast_to(first, (n_states, n_actions, n_states, n_actions)),
        horizon=horizon,
        gamma=GAMMA,
        value=lambda mass: mass @ critic,
    ).returns


def ends(mdp, pi, horizon):
    """P_H ``[S, A, S + 1]``: where a branch is after H steps; the last one is an ended episode."""
    goes_on = mdp.transition
    for _ in range(horizon - 1):
        goes_on = np.einsum("sat,tu->sau", goes_on, np.einsum("sa,sat->st", pi, mdp.transition))
    return np.concatenate([goes_on, 1 - goes_on.sum(axis=2, keepdims=True)], axis=2)


@pytest.mark.parametrize("horizon", [1, 2, 3])
def test_bias_of_horizon_and_critic(horizon):
    """Equation (11), and the bound (12), which some action of some MDP comes near to."""
    nearest = 0.0
    for seed in range(4):
        mdp, rng = tabular.random_mdp(seed, n_layers=4), np.random.default_rng(seed)
        pi = tabular.softmax(rng.normal(size=(mdp.n_states, mdp.n_actions)))
        q = tabular.action_values(mdp, pi, GAMMA)
        v = np.sum(pi * q, axis=1)
        for critic in (np.zeros_like(v), v + 2.0, v + rng.normal(size=v.shape)):
            with jax.enable_x64(True):
                cut = np.asarray(bootstrapped_returns(mdp.transition, mdp.reward, pi, critic, horizon))
            error, where = np.append(v - critic, 0.0), ends(mdp, pi, horizon)
            np.testing.assert_allclose(q - cut, GAMMA**horizon * where @ error, rtol=1e-9, atol=1e-12)

            centred = (q - cut) - np.sum(pi * (q - cut), axis=1, keepdims=True)
            variation = 0.5 * np.abs(where[:, :, None] - where[:, None]).sum(axis=-1).max(axis=2)
            bound = GAMMA**horizon * np.ptp(error) * variation
            assert np.all(np.abs(centred) <= bound + 1e-9)
            nearest = max(nearest, np.max(np.abs(centred) / np.maximum(bound, 1e-9)))
    assert nearest > 0.5


@pytest.mark.parametrize(
    ("now", "moves"), [(0.1, True), (0.15, True), (0.27, True), (0.29, False), (0.5, False)]
)
def test_the_last_candidate_to_stop_decides(now, moves):
    """Section 9: a better action of 0.1 is pushed up to 0.28, though its own term stops at 0.12."""
    old = jnp.log(jnp.array([[0.1, 0.9]]))

    def objective(logits):
        terms = losses.Terms(jax.nn.log_softmax(logits), old, old, jnp.array([[0.9, -0.1]]))
        return losses.SURROGATES["ppo"](terms).sum()

    gradient = jax.grad(objective)(jnp.log(jnp.array([[now, 1 - now]])))
    assert (float(gradient[0, 0]) > 1e-4) == moves
    assert moves or not np.any(gradient)


def test_the_next_angle_of_cartpole_does_not_depend_on_the_action():
    """Section 7: a reward of the next angle and position has no spread at H = 1, but at H = 2."""
    world = grpo_jax.override_reward(
        grpo_jax.make("CartPole-v1"), lambda state, action, next_state: next_state[2] + next_state[0]
    )
    keys = jax.random.split(jax.random.key(0), 8)
    _, states = jax.vmap(world.reset)(keys)
    both = jnp.broadcast_to(jnp.arange(2), (8, 2))

    def spread(horizon):
        def act(observation, mask, uniforms):
            return jnp.zeros(uniforms.shape[:-1], jnp.int32)

        returns = group_returns(world, act, keys[0], states, both, horizon=horizon, gamma=1.0).returns
        return np.ptp(returns, axis=1)

    np.testing.assert_array_equal(spread(1), 0.0)
    assert np.all(spread(2) > 1e-3)


def displayed(page):
    return re.findall(r"\$\$(.*?)\$\$", page, flags=re.DOTALL)


def test_both_languages_have_the_same_numbered_equations():
    english, japanese = map(displayed, PAGES)
    assert english == japanese
    numbers = [int(re.search(r"\\qquad \((\d+)\)$", equation)[1]) for equation in english]
    assert numbers == list(range(1, len(english) + 1)) and len(numbers) > 10


@pytest.mark.parametrize("page", PAGES, ids=["english", "japanese"])
def test_formulas_are_written_as_github_reads_them(page):
    """A ``$`` opens a formula behind a blank only, and closes one before anything but a letter or a digit."""
    text = re.sub(r"```.*?```|`[^`\n]*`|\$\$.*?\$\$", "", page, flags=re.DOTALL)
    formulas = list(re.finditer(r"\$([^$\n]+)\$", text))
    assert 2 * len(formulas) == text.count("$")
    for formula in formulas:
        assert text[formula.start() - 1].isspace(), formula[0]
        assert not text[formula.end()].isalnum(), text[formula.start() : formula.end() + 5]
        assert formula[1].strip() == formula[1], formula[0]


def test_figures_are_those_of_the_notebook():
    spec = importlib.util.spec_from_file_location("theory_figures", ROOT / "benchmarks" / "theory_figures.py")
    theory_figures = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(theory_figures)
    figures = theory_figures.figures(theory_figures.NOTEBOOK)
    for page in PAGES:
        assert set(re.findall(r"images/(theory_\w+)\.png", page)) == set(figures)
    for name, png in figures.items():
        assert (theory_figures.IMAGES / f"{name}.png").read_bytes() == png, f"run {theory_figures.__file__}"
