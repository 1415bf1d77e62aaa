"""Arguments: what is refused, warned of, or means something; and what NaN does."""

import functools
import warnings

import gymnasium as gym
import jax.numpy as jnp
import numpy as np
import pytest
from sb3 import contract
from sb3.contract import BOX, CONSTANT, ENV, LINE, NAN, ROLLOUT, actor_of, flat, log_of, make, on_both
from sb3.envs import PaidAfter
from stable_baselines3 import PPO
from stable_baselines3.common.vec_env import DummyVecEnv

from grpo_jax.training.diagnose import SPREAD_ITERATIONS, NoSpreadWarning
from sb3_bridge import GRPO


def test_arguments_without_a_meaning_are_named_once():
    cases = [
        (
            "host",
            BOX,
            {"use_sde": True, "sde_sample_freq": 4},
            ["use_sde", "sde_sample_freq"],
            ["gae_lambda"],
        ),
        (
            "host",
            LINE,
            {"candidates": "episodes", "horizon": 7, "branch_every": 2, "group_size": 4},
            ["horizon", "branch_every", "group_size"],
            ["n_rollouts"],
        ),
        ("host", LINE, {"bootstrap": False, "gae_lambda": 0.9}, ["gae_lambda"], ["horizon", "group_size"]),
        ("device", LINE, {"gae_lambda": 0.9, "vf_coef": 0.1}, ["gae_lambda", "vf_coef"], ["horizon"]),
        ("device", LINE, {"clip_range_vf": 0.2}, ["clip_range_vf"], []),
        ("device", LINE, {"candidates": "episodes", "backup": "max"}, ["backup"], ["gae_lambda"]),
    ]
    for kind, world, settings, named, silent in cases:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            make(GRPO, kind, world, **settings)
        (warning,) = caught
        text = str(warning.message)
        assert warning.category is UserWarning and "no meaning" in text, text
        assert all(name in text for name in named) and not any(name in text for name in silent), text
        assert warning.filename == contract.__file__  # where `make` calls GRPO


def test_arguments_with_a_meaning_are_silent():
    make(GRPO, "device", gae_lambda=0.9, vf_coef=0.1, clip_range_vf=0.2, bootstrap=True)
    make(GRPO, "host", gae_lambda=0.9, vf_coef=0.1, clip_range_vf=0.2)
    make(GRPO, "host", candidates="episodes", gae_lambda=0.9, vf_coef=0.1, clip_range_vf=0.2)
    make(
        GRPO,
        "host",
        branch_every=2,
        max_enumerated=8,
        n_rollouts=2,
        backup="max",
        persistence=0.5,
    )
    make(GRPO, "host", candidates="sample", group_size=4)
    # Set to their defaults, they say nothing.
    settings = {
        "horizon": None,
        "branch_every": None,
        "group_size": 8,
        "use_sde": False,
        "sde_sample_freq": -1,
    }
    make(GRPO, "host", candidates="episodes", **settings)


@pytest.mark.parametrize("batch_size", [12, 16, 33])
def test_batches_that_do_not_divide_the_rollout(batch_size):
    """Warned of where PPO warns, and trained with the rest as PPO trains with it."""
    told = []
    for algorithm in (PPO, GRPO):
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            model = make(algorithm, "host", batch_size=batch_size).learn(1)
        told.append([warning.category for warning in caught])
        texts = [str(warning.message) for warning in caught]
        assert model._n_updates == 2
    assert told[0] == told[1] == ([UserWarning] if ROLLOUT % batch_size else [])
    assert all(f"={batch_size} " in text and "16" in text for text in texts)


def no_spread(caught):
    return [warning for warning in caught if warning.category is NoSpreadWarning]


@pytest.mark.parametrize(("kind", "candidates"), [("host", "episodes"), ("host", "auto"), ("device", "auto")])
def test_groups_without_spread_are_told_of_once_they_persist(kind, candidates):
    model = make(GRPO, kind, CONSTANT, bootstrap=False, candidates=candidates)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        rows = log_of(model, (SPREAD_ITERATIONS + 2) * ROLLOUT)
    assert len(no_spread(caught)) == len(caught) == 1
    assert all(row["grpo/frac_zero_std"] == 1 for row in rows[1:])
    assert ("Raise horizon" in str(caught[0].message)) == (candidates == "auto")
    assert ("raise n_steps" in str(caught[0].message)) == (candidates == "episodes")


def test_some_groups_without_spread_are_no_warning():
    """The first rollout holds no whole episode; later ones do."""
    model = make(GRPO, "host", candidates="episodes", bootstrap=False, n_steps=2, batch_size=4)
    rows = log_of(model, 20 * 4)
    shares = [row["grpo/frac_zero_std"] for row in rows[1:]]
    assert shares[0] == 1 and min(shares) < 1


@pytest.mark.parametrize(("kind", "candidates"), [("host", "episodes"), ("host", "auto"), ("device", "auto")])
@pytest.mark.parametrize("bootstrap", [True, False])
def test_rewards_that_are_nan_are_an_error_and_teach_nothing(kind, candidates, bootstrap):
    settings = {"bootstrap": bootstrap, "clip_range_vf": 0.2 if bootstrap else None}
    model = make(GRPO, kind, NAN, candidates=candidates, **settings)
    before = flat(model)
    with pytest.raises((FloatingPointError, ValueError), match=r"(?i)nan"):
        model.learn(3 * ROLLOUT)
    np.testing.assert_array_equal(flat(model), before)
    # On the host it is an error at the very step that brings it.
    assert (model.num_timesteps < ROLLOUT) == (kind == "host") and model._n_updates == 0


@on_both
def test_a_reward_function_that_is_nan_is_an_error_and_teaches_nothing(kind):
    def reward(state, action, next_state):
        return jnp.where(next_state[..., 0] == 2, jnp.nan, next_state[..., 0])  # none of the drawn ones

    model = make(GRPO, kind, reward_function=reward)
    before = flat(model)
    with pytest.raises((FloatingPointError, ValueError), match=r"(?i)nan"):
        model.learn(3 * ROLLOUT)
    np.testing.assert_array_equal(flat(model), before)


SMALL = {"n_steps": 8, "batch_size": 8, "n_epochs": 1, "policy_kwargs": {"net_arch": [8]}}


def short_cartpole(reward=None):
    def make():
        env = gym.make(ENV, max_episode_steps=20)
        return env if reward is None else PaidAfter(env, reward)

    return DummyVecEnv([make] * 3)


@functools.lru_cache
def actor_after(**change):
    settings = {**SMALL, "n_epochs": 3, "learning_rate": 0.05, "seed": 0}
    return actor_of(GRPO("MlpPolicy", short_cartpole(), **settings, **change).learn(96))


@pytest.mark.parametrize(
    ("change", "differs"),
    [
        ({"clip_range_high": 0.2}, False),
        ({"clip_range_high": 2.0}, True),
        ({"surrogate": "cispo"}, True),
        ({"kl_coef": 0.0}, False),
        ({"kl_coef": 1.0}, True),
        ({"target_kl": 1e-9}, True),
        ({"normalize_advantage": False}, True),
    ],
)
def test_arguments_mean_something_on_the_host(change, differs):
    base, changed = actor_after(), actor_after(**change)
    assert np.allclose(base, changed, rtol=1e-3, atol=1e-4) == (not differs)
