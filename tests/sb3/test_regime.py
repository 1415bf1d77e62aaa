"""What is compared: what ``dynamics`` chooses, the defaults that follow, and what is refused."""

from __future__ import annotations

import io
import itertools
import warnings

import gymnasium as gym
import jax.numpy as jnp
import pytest
from gymnasium.envs.classic_control import CartPoleEnv, PendulumEnv
from sb3.sleds import (
    Camera,
    Sled,
    Slow,
    Tidal,
    Uncopyable,
    dummy,
    fares,
    filmed,
    glide,
    glide_jax,
    make,
    told,
)
from stable_baselines3.common.vec_env import VecNormalize

from sb3_bridge import GRPO, WorldVecEnv
from sb3_bridge.clones.brancher import Brancher
from sb3_bridge.clones.copying import Unclonable

pytestmark = pytest.mark.usefixtures("quick_forks")


WHOLE = {"n_steps": 32, "batch_size": 32, "n_epochs": 10}
"""A rollout long enough for the fewest branches, and PPO's epochs, of which the rest of an iteration consists."""


def test_a_gymnax_env_is_its_own_simulator(capsys):
    model = make(WorldVecEnv("CartPole-v1", 2), verbose=1)
    assert model.chosen_dynamics == "simulator"
    assert "are followed for 128 steps in the simulator" in told(capsys)


def test_an_env_by_its_id_is_followed_in_its_twin_or_in_clones(capsys):
    model = make("CartPole-v1", verbose=1)
    assert model.chosen_dynamics == "twin"
    assert "all 2 actions of every state are followed for 128 steps in a twin of CartPoleEnv" in told(capsys)
    model = make("FrozenLake-v1", verbose=1)
    assert model.chosen_dynamics == "clone"
    line = told(capsys)
    assert "all 4 actions of one state in 4 are followed for 64 steps in exact clones" in line
    assert "replay check passed" in line and "ms a decision step" in line


@pytest.mark.parametrize(("toy", "reason"), [(Tidal, "TIDE, a global of"), (Uncopyable, "generator")])
def test_without_clones_a_world_is_learned_for_a_reward_function_but_not_of_pictures(toy, reason, capsys):
    model = make(dummy(toy), verbose=1)
    line = told(capsys)
    assert model.chosen_dynamics == "episodes"
    assert reason in line and "the episodes of a rollout are compared" in line, line
    assert "with dynamics='learned'" in line

    model = make(dummy(toy), verbose=1, reward_function=fares)
    line = told(capsys)
    assert model.chosen_dynamics == "learned"
    assert reason in line and "in a world that is learned" in line, line

    model = filmed(toy, reward_function=lambda state, action, next_state: 1.0)
    line = told(capsys)
    assert model.chosen_dynamics == "episodes"
    assert "the episodes of a rollout are compared" in line
    assert reason in line and "a learned world predicts real numbers" in line, line


def test_pictures_are_cloned_where_that_is_possible(capsys):
    assert filmed(Sled).chosen_dynamics == "clone"
    assert "in exact clones" in told(capsys)


def test_slow_environments_are_not_cloned_and_the_cost_is_named(capsys):
    model = make(dummy(Slow), verbose=1, **WHOLE)
    assert model.chosen_dynamics == "episodes"
    line = told(capsys)
    # Three actions, 256 steps of 2 ms each, of one state in 32.
    cost = float(line.split("branches of clones would take ")[1].split(" ms a decision step")[0])
    assert 3 * 256 * 2 / 32 <= cost < 3 * 3 * 256 * 2 / 32
    assert "dynamics='clone'" in line


@pytest.mark.parametrize(
    ("ms", "kind", "horizon", "every"),
    [
        (0.1, "clone", 64, 4),
        (2.8, "clone", 64, 4),
        (2.9, "clone", 256, 32),
        (5.5, "clone", 256, 32),
        (6, "episodes", 64, 1),
    ],
)
def test_the_more_branches_cost_the_fewer_there_are_until_there_are_none(
    ms, kind, horizon, every, monkeypatch
):
    """Milliseconds of 16 steps of each candidate, of which the few take half."""
    monkeypatch.setattr(
        Brancher, "seconds", lambda brancher, n, k, horizon, rollouts: ms * 1e-3 * horizon / 16
    )
    model = make(dummy(Sled), **WHOLE)
    assert (model.chosen_dynamics, model.horizon, model.branch_every) == (kind, horizon, every)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # of the cost
        model = make(dummy(Sled), dynamics="clone", **WHOLE)
    assert (model.horizon, model.branch_every) == ((64, 4) if ms < 2.82 else (256, 32))


@pytest.mark.parametrize(
    ("n_envs", "n_epochs", "kind"),
    [(1, 10, "clone"), (16, 30, "clone"), (16, 4, "episodes"), (1, 1, "clone")],
)
def test_beside_many_cheap_environments_branches_must_be_cheaper(n_envs, n_epochs, kind, monkeypatch, capsys):
    # A millisecond a decision step; the rest is 0.13, 0.096, 0.018 and 0.1 with a step that takes next to nothing.
    monkeypatch.setattr(Brancher, "seconds", lambda brancher, n, k, horizon, rollouts: 1e-3 * horizon / 16)
    model = make(dummy(Sled, n_envs), verbose=1, **WHOLE | {"n_epochs": n_epochs})
    assert model.chosen_dynamics == kind
    assert ("the rest 0.0" in told(capsys)) == (kind == "episodes")
    assert make(dummy(Sled, n_envs), dynamics="clone", n_epochs=n_epochs).chosen_dynamics == "clone"


def test_candidates_that_can_only_be_branched_are(monkeypatch):
    monkeypatch.setattr(Brancher, "seconds", lambda *_: 9.0)
    with pytest.warns(UserWarning, match="most of the run"):
        assert make(dummy(Sled), candidates="sample").chosen_dynamics == "clone"
    assert make(dummy(Uncopyable), candidates="sample").chosen_dynamics == "learned"


@pytest.mark.parametrize("kind", ["clone", "episodes"])
def test_what_was_trained_so_far_goes_on_on_a_machine_that_is_somewhat_slower_or_quicker(kind, monkeypatch):
    ms = {"clone": 3.0, "episodes": 12.0}[kind]
    monkeypatch.setattr(
        Brancher, "seconds", lambda brancher, n, k, horizon, rollouts: ms * 1e-3 * horizon / 16
    )
    model = make(dummy(Sled), **WHOLE)
    assert model.chosen_dynamics == kind
    other = {"clone": 9.0, "episodes": 5.0}[kind]
    model.learn(32)
    ms = other
    model.set_env(dummy(Sled))
    assert model.chosen_dynamics == kind
    assert make(dummy(Sled), **WHOLE).chosen_dynamics != kind, "as anew"


def test_no_world_is_learned_of_observations_whose_scale_changes(capsys):
    model = make(VecNormalize(dummy(Uncopyable)), verbose=1, reward_function=fares)
    assert model.chosen_dynamics == "episodes"
    line = told(capsys)
    assert "generator" in line and "VecNormalize(norm_obs=False)" in line
    unscaled = VecNormalize(dummy(Uncopyable), norm_obs=False)
    assert make(unscaled, reward_function=fares).chosen_dynamics == "learned"
    assert make(VecNormalize(dummy(Sled))).chosen_dynamics == "clone"


def test_another_env_is_another_choice(capsys):
    model = make(dummy(Sled), verbose=1)
    told(capsys)
    model.set_env(dummy(Uncopyable))
    assert model.chosen_dynamics == "episodes" and "generator" in told(capsys)
    model.set_env(dummy(Sled))
    assert model.chosen_dynamics == "clone" and "in exact clones" in told(capsys)


SIMULATED = lambda: WorldVecEnv("CartPole-v1", 1)


DEFAULTS = {
    "twin": (lambda: dummy(CartPoleEnv), {}, (512, 128, 1, True)),
    "simulator": (SIMULATED, {}, (2048, 128, 1, False)),
    "clone": (lambda: dummy(Sled), {}, (512, 64, 4, True)),
    "learned": (lambda: dummy(Uncopyable), {"dynamics": "learned"}, (2048, 64, 4, True)),
    "episodes": (lambda: dummy(Uncopyable), {}, (2048, 64, 1, True)),
}


REWARDED = {
    "twin": (lambda: dummy(CartPoleEnv), {}, (512, 128, 1, False)),
    "simulator": (SIMULATED, {}, (2048, 128, 1, False)),
    "clone": (lambda: dummy(Sled), {}, (512, 16, 1, False)),
    "learned": (lambda: dummy(Uncopyable), {}, (2048, 16, 1, False)),
    "function": (lambda: dummy(Sled), {"dynamics": glide_jax}, (512, 16, 1, False)),
    "episodes": (lambda: dummy(Sled), {"candidates": "episodes"}, (2048, 16, 1, True)),
}


NAMES = ("n_steps", "horizon", "branch_every", "bootstrap")


@pytest.mark.parametrize(
    ("kind", "has_reward"), [*itertools.product(DEFAULTS, [False]), *itertools.product(REWARDED, [True])]
)
def test_defaults_are_those_of_the_kind(kind, has_reward):
    env, settings, expected = (REWARDED if has_reward else DEFAULTS)[kind]
    if has_reward:
        settings = settings | {"reward_function": fares}
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # plain use warns of nothing
        model = GRPO("MlpPolicy", env(), policy_kwargs={"net_arch": [8]}, **settings)
    assert model.chosen_dynamics == kind
    assert tuple(getattr(model, name) for name in NAMES) == expected
    assert ("critic" in model.policy.state.params) == expected[-1]


@pytest.mark.parametrize("kind", ["simulator", "clone", "learned", "function"])
def test_what_is_given_is_kept(kind):
    env, settings, _ = REWARDED[kind]
    given = {"n_steps": 12, "horizon": 5, "branch_every": 3, "bootstrap": kind in ("simulator", "function")}
    model = make(env(), reward_function=fares, batch_size=12, **settings, **given)
    assert model.chosen_dynamics == kind
    assert {name: getattr(model, name) for name in NAMES} == given


@pytest.mark.parametrize(
    ("n_steps", "horizon", "branch_every"),
    [
        (7, 64, 1),
        (9, 64, 3),
        (10, 64, 2),
        (12, 64, 4),
        (512, 128, 8),
        (512, 15, 1),
        (510, 100, 6),
        (6, 200, 6),
    ],
)
def test_clones_are_branched_as_often_as_divides_the_rollout(n_steps, horizon, branch_every, monkeypatch):
    """The most that costs no more than 16 steps of each candidate for a decision step."""
    monkeypatch.setattr(Brancher, "seconds", lambda *_: 1e-6)
    model = make(dummy(Sled), n_steps=n_steps, horizon=horizon, batch_size=n_steps)
    assert (model.chosen_dynamics, model.branch_every) == ("clone", branch_every)
    assert n_steps % model.branch_every == 0


def test_a_file_may_be_loaded_with_another_n_steps():
    """What was left open is no demand of the user's that the new length could break."""
    file = io.BytesIO()
    make(dummy(Sled)).save(file)
    model = GRPO.load(io.BytesIO(file.getvalue()), env=dummy(Sled), n_steps=6, batch_size=6)
    assert model.n_steps == 6 and 6 % model.branch_every == 0
    model.learn(6)


def test_a_share_that_does_not_divide_the_rollout_is_refused():
    with pytest.raises(ValueError, match="branch_every=3 must divide n_steps=8"):
        make(dummy(Sled), branch_every=3)


@pytest.mark.parametrize(
    "nonsense",
    ["nonsense", "clones", 5, None, (), (glide,), (glide, glide, glide), (glide, 3), ("clone", "learned")],
)
def test_what_dynamics_cannot_be_is_refused_with_what_it_can(nonsense):
    with pytest.raises(ValueError, match="dynamics=") as caught:
        make(dummy(Sled), dynamics=nonsense)
    text = str(caught.value)
    for fix in ("'auto'", "'clone'", "'learned'", "f(state, action) -> next_state", "(get_state, set_state)"):
        assert fix in text


def test_clones_that_cannot_be_had_are_an_error_with_the_reason():
    with pytest.raises(Unclonable, match="generator"):
        make(dummy(Uncopyable), dynamics="clone")
    with pytest.raises(Unclonable, match="TIDE, a global of"):
        make(dummy(Tidal), dynamics="clone")
    with pytest.raises(ValueError, match="dynamics='simulator' needs a WorldVecEnv"):
        make(dummy(Sled), dynamics="simulator")


def test_clones_that_cost_much_are_made_all_the_same_with_a_warning():
    with pytest.warns(
        UserWarning, match=r"branches will take about [\d.e+]+ ms for a decision step"
    ) as caught:
        model = make(dummy(Slow), dynamics="clone")
    assert model.chosen_dynamics == "clone"
    (warning,) = caught
    text = str(warning.message)
    for name in ("horizon=256", "group_size=", "branch_every=8", "SubprocVecEnv", "dynamics='learned'"):
        assert name in text
    assert warning.filename == make.__code__.co_filename  # which calls GRPO
    assert (
        make(dummy(Slow), dynamics="clone", horizon=1, branch_every=8).chosen_dynamics == "clone"
    )  # silently


def test_a_world_of_pictures_is_refused():
    small = {"net_arch": [8], "features_extractor_kwargs": {"features_dim": 8}}
    with pytest.raises(NotImplementedError, match=r"a learned world predicts real numbers.*dynamics='clone'"):
        make(dummy(lambda: Camera(Sled())), "CnnPolicy", policy_kwargs=small, dynamics="learned")
    with pytest.raises(ValueError, match=r"dynamics='learned' needs .*VecNormalize\(norm_obs=False\)"):
        make(VecNormalize(dummy(Sled)), dynamics="learned")


@pytest.mark.parametrize("candidates", ["enumerate", "sample"])
@pytest.mark.parametrize("env", [SIMULATED, lambda: dummy(Sled)], ids=["simulator", "clone"])
def test_candidates_may_be_named(env, candidates, capsys):
    size = {"group_size": 5} if candidates == "sample" else {}
    model = make(env(), candidates=candidates, horizon=2, bootstrap=True, verbose=1, **size)
    groups = "5 sampled actions" if candidates == "sample" else f"all {model.action_space.n} actions"
    assert f"GRPO: {groups} of every state are followed for 2 steps in" in told(capsys)
    if candidates == "sample":
        model.learn(8)
        assert 8 * 5 < model.simulator_steps <= 8 * 5 * 2


def test_trajectories_need_the_simulator():
    make(WorldVecEnv("CartPole-v1", 4), candidates="trajectory", group_size=2)
    with pytest.raises(
        ValueError, match="candidates='trajectory' needs environments that can be reset alike"
    ):
        make(dummy(Sled), candidates="trajectory")


def test_a_simulator_takes_no_other_dynamics():
    with pytest.raises(ValueError, match="dynamics='learned' has no meaning in a WorldVecEnv"):
        make(WorldVecEnv("CartPole-v1", 2), dynamics="learned")


def test_a_baseline_that_episodes_cannot_have_is_refused_at_once():
    with pytest.raises(ValueError, match="baseline='executed'"):
        make(dummy(Uncopyable), dynamics="learned", baseline="executed")


def test_candidates_may_become_episodes_and_nothing_is_branched_from_then_on():
    model = make(dummy(Sled))
    model.learn(8)
    before = model.simulator_steps
    model.candidates = "episodes"
    model.learn(8, reset_num_timesteps=False)
    assert model.simulator_steps == before > 0


def test_episodes_are_compared_on_demand_and_nothing_is_checked(capsys):
    class Untouchable(Sled):
        def __deepcopy__(self, memo):
            raise AssertionError("a copy was made")

    model = make(dummy(Untouchable), candidates="episodes", verbose=1)
    assert model.chosen_dynamics == "episodes"
    assert told(capsys) == "GRPO: the episodes of a rollout are compared, nothing is branched; with a critic"


def test_sampled_candidates_are_branched_in_clones_only_where_they_must_be(capsys):
    """Of continuous actions: where it was measured, episodes learned more in the same seconds."""
    pole = lambda: dummy(lambda: Stirred(PendulumEnv()))
    model = make(pole(), verbose=1)
    assert model.chosen_dynamics == "episodes" and "sampled actions repaid their seconds nowhere" in told(
        capsys
    )
    reward = lambda state, action, next_state: -jnp.abs(next_state[2])
    assert make(pole(), reward_function=reward).chosen_dynamics == "clone"
    assert make(pole(), candidates="sample").chosen_dynamics == "clone"
    assert make(pole(), dynamics="clone").chosen_dynamics == "clone"


class Stirred(gym.ActionWrapper):
    """Has no twin."""

    def action(self, action):
        return 0.5 * action
