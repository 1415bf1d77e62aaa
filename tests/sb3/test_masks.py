"""Action masks behind SB3's interface: of ordinary environments, of worlds, and in ``predict``."""

from __future__ import annotations

import functools

import gymnasium as gym
import numpy as np
import pytest
from gymnasium import spaces
from sb3.envs import Masker, RandomEnv, Shelves
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.evaluation import evaluate_policy
from stable_baselines3.common.vec_env import DummyVecEnv, SubprocVecEnv, VecMonitor, VecNormalize
from toys import Maze

from grpo_jax.spaces import Discrete, MultiDiscrete
from sb3_bridge import GRPO, InfoMasks, Planner, WorldVecEnv
from sb3_bridge.clones.brancher import Brancher
from sb3_bridge.clones.copying import Unclonable
from sb3_bridge.gymnax.env import GymnaxEnv
from sb3_bridge.masks import has_masks

SMALL = {"n_steps": 16, "batch_size": 16, "n_epochs": 1, "policy_kwargs": {"net_arch": [4]}, "seed": 0}
CLONES = {"dynamics": "clone", "horizon": 4, "branch_every": 2}
REGIMES = {
    "episodes": {"candidates": "episodes"},
    "clones": CLONES,
    "clones, sampled": {**CLONES, "candidates": "sample", "group_size": 3, "persistence": 0.7},
    "auto": {"horizon": 4},
}


def shelves(n_envs=2, kind=DummyVecEnv, **arguments):
    return kind([functools.partial(Shelves, **arguments)] * n_envs)


class Looker(BaseCallback):
    """Keeps what a rollout knew of masks, and what the policy thought of its steps."""

    def __init__(self):
        super().__init__()
        self.rollouts, self.log_probs = [], []

    def _on_step(self):
        self.log_probs.append(self.locals["log_probs"].numpy())
        return True

    def _on_rollout_end(self):
        buffer = self.model.rollout_buffer
        self.rollouts.append(
            (self.model._trajectory, np.array(buffer.log_probs), np.array(buffer.observations))
        )


# Ordinary environments


@pytest.mark.parametrize("n_shelves", [1, 2])
@pytest.mark.parametrize("regime", REGIMES)
def test_what_is_forbidden_is_never_done(regime, n_shelves, monkeypatch):
    """The environment raises where it is, in clones as well."""
    monkeypatch.setattr(Brancher, "seconds", lambda *_: 1e-6)  # what "auto" takes is not up to a busy machine
    model, looker = GRPO("MlpPolicy", shelves(n_shelves=n_shelves), **SMALL, **REGIMES[regime]), Looker()
    model.learn(64, callback=looker)
    assert (model.chosen_dynamics == "clone") == (regime != "episodes")
    assert len(looker.rollouts) == 2
    steps = np.reshape(looker.log_probs, (2, 16, 2))
    for (trajectory, log_probs, observations), at_steps in zip(looker.rollouts, steps, strict=True):
        np.testing.assert_array_equal(trajectory.action_mask, observations.astype(bool))
        is_last = observations.sum(axis=-1) == n_shelves
        assert is_last.any() and (log_probs[is_last] == 0.0).all()  # there was no choice
        np.testing.assert_allclose(log_probs, at_steps, rtol=1e-5, atol=1e-6)
        assert (log_probs[~is_last] < -0.5).all()
    assert model.simulator_steps > 0 or regime == "episodes"


def test_workers_and_wrappers_are_asked_too():
    env = VecNormalize(VecMonitor(shelves(kind=SubprocVecEnv)))
    try:
        model = GRPO("MlpPolicy", env, **SMALL, **CLONES).learn(32)
        assert model.simulator_steps > 0
    finally:
        env.close()


def test_only_allowed_candidates_are_followed():
    """A candidate takes a step at horizon 1, so steps are counted by hand."""
    model, looker = (
        GRPO("MlpPolicy", shelves(), **SMALL, dynamics="clone", horizon=1, branch_every=1),
        Looker(),
    )
    model.learn(32, callback=looker)
    assert model.simulator_steps == looker.rollouts[0][2].sum()


@pytest.mark.filterwarnings("ignore::grpo_jax.NoSpreadWarning")
def test_masks_decide_what_is_learned():
    """Where the mask allows one thing alone there is nothing to learn: no parameter changes but the critic's."""

    class One(Shelves):
        def action_masks(self):
            return np.arange(4) == np.argmax(self.is_left)

    for settings in ({"candidates": "episodes"}, CLONES):
        model = GRPO("MlpPolicy", DummyVecEnv([One] * 2), **SMALL, **settings, bootstrap=True, ent_coef=0.1)
        before = model.policy.state_dict()
        model.learn(64)
        for name, leaf in model.policy.state_dict().items():
            assert name.startswith("critic") or np.array_equal(before[name], leaf), name


@pytest.mark.parametrize(
    "function",
    [lambda env: env.unwrapped.action_masks(), lambda env: env.unwrapped.action_masks().astype(np.int8)],
    ids=["bool", "int8"],
)
def test_masks_of_a_wrapper(function):
    env = DummyVecEnv([lambda: Masker(gym.wrappers.TimeLimit(Shelves(), 3), function)] * 2)
    assert GRPO("MlpPolicy", env, **SMALL, **CLONES).learn(32).simulator_steps > 0


class Telling(Shelves):
    """Tells in ``info`` what it allows, of the states before ``until`` alone; its array is always the same one."""

    def __init__(self, until=99):
        super().__init__()
        self.until, self.told = until, np.zeros(4, np.int8)

    def tell(self, info):
        self.told[:] = self.is_left.reshape(-1)
        return info | ({"action_mask": self.told} if self.is_left.sum() < self.until else {})

    def reset(self, **arguments):
        observation, info = super().reset(**arguments)
        return observation, self.tell(info)

    def step(self, action):
        *step, info = super().step(action)
        return *step, self.tell(info)

    def action_masks(self):
        raise AssertionError("was asked")


def test_masks_told_in_info():
    """As the method's: learning is equal, in clones too. Vectors of environments reset by themselves."""
    for settings in ({"candidates": "episodes"}, CLONES):
        told, asked = (
            GRPO("MlpPolicy", env, **SMALL, **settings)
            for env in (DummyVecEnv([lambda: InfoMasks(Telling())] * 2), shelves())
        )
        told.learn(48)
        asked.learn(48)
        assert told.num_timesteps == 64 and told.simulator_steps == asked.simulator_steps
        for name, leaf in told.policy.state_dict().items():
            np.testing.assert_array_equal(leaf, asked.policy.state_dict()[name])


def test_a_mask_that_comes_now_and_then_is_an_error():
    env = InfoMasks(Telling(until=4))
    with pytest.raises(gym.error.ResetNeeded, match="before reset"):
        env.action_masks()
    with pytest.raises(ValueError, match=r"reset\(\) of .* told no info\['action_mask'\].*action_masks\(\)"):
        env.reset()
    env = InfoMasks(Telling(until=4))
    env.env.until = 5
    env.reset()
    env.env.until = 3
    with pytest.raises(ValueError, match=r"step\(1\) of"):
        env.step(1)


GLOBAL = Shelves(is_lenient=True)


def test_masks_of_another_state_are_noticed():
    """A function that reads the real environment by a global name, wherever the copy stands; a closure is copied."""
    settings = SMALL | CLONES
    env = DummyVecEnv([lambda: Masker(GLOBAL, lambda _: GLOBAL.is_left.reshape(-1))])
    with pytest.raises(Unclonable, match=r"before the action .* clone's action mask is"):
        GRPO("MlpPolicy", env, **settings).learn(16)
    own = Shelves()
    env = DummyVecEnv([lambda: Masker(own, lambda _: own.is_left.reshape(-1))])
    assert GRPO("MlpPolicy", env, **settings).learn(16).simulator_steps > 0


# Where there are none


@pytest.mark.parametrize(
    "settings",
    [
        {"dynamics": "learned"},
        {"dynamics": lambda s, a: s, "reward_function": lambda s, a, t: t[0] * 1.0},
    ],
    ids=["learned", "f"],
)
def test_worlds_without_masks_are_refused(settings):
    with pytest.raises(ValueError, match=r"knows no action_masks\(\).*use dynamics='clone'"):
        GRPO("MlpPolicy", shelves(), **SMALL, **settings)


def test_auto_takes_neither_twin_nor_learned_world(capsys):
    def cartpole():
        return Masker(gym.make("CartPole-v1"), lambda env: np.array([True, True]))

    with pytest.raises(ValueError, match=r"action_masks\(\), of which a twin knows nothing"):
        GRPO("MlpPolicy", DummyVecEnv([cartpole]), **SMALL, dynamics="twin")
    GRPO("MlpPolicy", DummyVecEnv([cartpole]), **SMALL, verbose=1)
    assert "of which a twin knows nothing" in capsys.readouterr().out

    class Unlike(Shelves):
        def __init__(self):
            super().__init__()
            self.file = open("/dev/null")  # noqa: SIM115  # cannot be copied

    reward = lambda state, action, following: following[0] * 1.0
    model = GRPO("MlpPolicy", DummyVecEnv([Unlike]), **SMALL, verbose=1, reward_function=reward)
    model.env.envs[0].file.close()
    assert model.chosen_dynamics == "episodes"
    assert "no learned world: dynamics='learned' knows no action_masks()" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("mask", "message"),
    [
        (np.ones(3, bool), r"shape \[2, 3\], expected bool \[2, 4\] for 2 states with Discrete"),
        (np.zeros(4, bool), "allows no action in environment 0: an episode that cannot go on must end"),
        (np.array([0.2, 0.8, 0.0, 0.0]), "gave float64 numbers, expected bool"),
        (np.array([0, 1, 2, 1]), "gave int64 numbers, expected bool"),
    ],
)
def test_bad_masks_are_named(mask, message):
    env = DummyVecEnv([lambda: Masker(Shelves(), lambda _: mask)] * 2)
    model = GRPO("MlpPolicy", env, **SMALL, candidates="episodes")
    with pytest.raises(ValueError, match=rf"action_masks\(\) at step 0 of the rollout.*{message}"):
        model.learn(32)


def test_some_with_masks_and_some_without_are_refused():
    env = DummyVecEnv([Shelves, lambda: RandomEnv(Shelves().observation_space, spaces.Discrete(4))])
    with pytest.raises(ValueError, match=r"environment 0 has action_masks\(\), environment 1 has not"):
        GRPO("MlpPolicy", env, **SMALL)


@pytest.mark.parametrize("answer", [None, NotImplementedError])
def test_a_vec_env_that_knows_no_attributes_has_no_masks(answer):
    class Bare(DummyVecEnv):
        def get_attr(self, attr_name, indices=None):
            if answer is not None and attr_name != "render_mode":  # which SB3 itself asks for
                raise answer
            return [None] * self.num_envs

    assert not has_masks(Bare([lambda: gym.make("CartPole-v1")]))


def test_a_box_has_no_masks():
    env = gym.make("Pendulum-v1")
    with pytest.raises(ValueError, match="has no actions to forbid"):
        GRPO("MlpPolicy", DummyVecEnv([lambda: Masker(env, lambda _: np.ones(1))]), **SMALL)


# predict


def test_predict_takes_masks_as_maskable_ppo_does():
    env = shelves(3)
    model = GRPO("MlpPolicy", env, **SMALL, candidates="episodes")
    observation = env.reset()
    masks = np.eye(4, dtype=bool)[[2, 0, 3]]
    for deterministic in (False, True):
        for form in (masks, list(masks), masks.astype(np.int8)):
            actions, _ = model.predict(observation, deterministic=deterministic, action_masks=form)
            np.testing.assert_array_equal(actions, [2, 0, 3])
        action, _ = model.predict(observation[0], deterministic=deterministic, action_masks=masks[2])
        assert action == 3 and action.shape == ()
    free = np.ones((3, 4), bool)
    model.policy.seed(1)
    first = [model.predict(observation, action_masks=free)[0] for _ in range(8)]
    model.policy.seed(1)
    with pytest.warns(UserWarning, match="predict.. was not told which"):
        again = [model.predict(observation)[0]]
    again += [model.predict(observation)[0] for _ in range(7)]  # told once
    np.testing.assert_array_equal(first, again)
    actions = np.array([2, 0, 3])
    _, log_prob, entropy = model.policy.evaluate_actions(observation, actions, action_masks=masks)
    np.testing.assert_array_equal(log_prob, 0.0)
    np.testing.assert_array_equal(entropy, 0.0)


@pytest.mark.parametrize(
    ("masks", "message"),
    [
        (np.ones(4, bool), r"shape \[4\], expected bool \[3, 4\]"),
        (np.ones((3, 5), bool), r"shape \[3, 5\], expected bool \[3, 4\]"),
        ([[True] * 4, [True] * 4, [True] * 3], "rows that are no equal arrays"),
        (np.array([[True] * 4, [False] * 4, [True] * 4]), "allows no action in environment 1"),
        (np.full((3, 4), 0.5), "expected bool"),
    ],
)
def test_predict_refuses_bad_masks(masks, message):
    env = shelves(3)
    model = GRPO("MlpPolicy", env, **SMALL, candidates="episodes")
    with pytest.raises(ValueError, match=f"action_masks.*{message}"):
        model.predict(env.reset(), action_masks=masks)


def test_no_part_may_be_without_an_action():
    env = shelves(n_shelves=2)
    model = GRPO("MlpPolicy", env, **SMALL, candidates="episodes")
    masks = np.ones((2, 8), bool)
    masks[1, :4] = False
    with pytest.raises(ValueError, match="allows no action of one of its parts in environment 1"):
        model.predict(env.reset(), action_masks=masks)


def test_a_loaded_model_knows_that_there_were_masks(tmp_path):
    GRPO("MlpPolicy", shelves(), **SMALL, candidates="episodes").save(tmp_path / "model")
    model = GRPO.load(tmp_path / "model")
    with pytest.warns(UserWarning, match="was not told which"):
        model.predict(np.ones(4, np.float32))
    model.save(tmp_path / "again")  # after the warning
    again = GRPO.load(tmp_path / "again")
    for export in (again.to_torch, again.to_sb3):
        with pytest.warns(UserWarning, match="SB3's policies know nothing"):
            export()
    with pytest.warns(UserWarning, match="was not told which"):
        again.predict(np.ones(4, np.float32))


def test_contribs_evaluation():
    evaluation = pytest.importorskip("sb3_contrib.common.maskable.evaluation")
    env = VecMonitor(shelves())
    model = GRPO("MlpPolicy", env, **SMALL, candidates="episodes")
    returns, lengths = evaluation.evaluate_policy(
        model, env, 6, deterministic=False, return_episode_rewards=True
    )
    assert lengths == [4] * 6 and min(returns) < max(returns)
    planner = Planner(model, horizon=4, n_rollouts=2, seed=0)
    _, lengths = evaluation.evaluate_policy(planner, env, 2, return_episode_rewards=True)
    assert lengths == [4, 4] and planner.simulator_steps > 0
    with pytest.raises(RuntimeError, match="is gone"), pytest.warns(UserWarning, match="was not told"):
        evaluate_policy(model, env, 6)


# Worlds


@pytest.mark.parametrize("space", [Discrete(4), MultiDiscrete((2, 3))], ids=str)
def test_worlds_with_masks(space):
    """What is forbidden pays NaN in this world, which no rollout and no evaluation lets pass."""
    world, looker = Maze(space), Looker()
    env = WorldVecEnv(world, 4, seed=0)
    model = GRPO("MlpPolicy", env, **SMALL, horizon=3, persistence=0.5)
    model.learn(64, callback=looker)
    trajectory, log_probs, _ = looker.rollouts[0]
    np.testing.assert_allclose(log_probs, looker.log_probs[:16], rtol=1e-5, atol=1e-6)
    rooms = np.asarray(trajectory.state)[..., 0]
    np.testing.assert_array_equal(trajectory.action_mask, world.table()[rooms])
    is_single = world.table()[rooms].sum(axis=-1) == len(space.nvec)
    assert is_single.any() and (log_probs[is_single] == 0.0).all()

    observation = env.reset()
    assert env.has_attr("action_masks")
    for _ in range(6):  # beyond an end
        masks = np.stack(env.env_method("action_masks"))
        np.testing.assert_array_equal(masks, world.table()[np.asarray(env.environments.state)[:, 0]])
        np.testing.assert_array_equal(env.env_method("action_masks", indices=[2])[0], masks[2])
        observation, rewards, *_ = env.step(model.predict(observation, action_masks=masks)[0])
        assert np.isfinite(rewards).all()


def test_one_world_is_an_environment_with_masks():
    world = Maze(Discrete(4))
    env = GymnaxEnv(world)
    with pytest.raises(gym.error.ResetNeeded):
        env.action_masks()
    env.reset(seed=0)
    mask = env.action_masks()
    assert mask.dtype == bool
    np.testing.assert_array_equal(mask, world.table()[int(env._state[0])])
    model = GRPO("MlpPolicy", env, **SMALL).learn(16)  # on the host: a VecEnv of SB3's
    assert model.num_timesteps == 16


def test_worlds_without_masks_have_no_such_method():
    env = WorldVecEnv("CartPole-v1", 2)
    assert not env.has_attr("action_masks") and not hasattr(GymnaxEnv("CartPole-v1"), "action_masks")
    with pytest.raises(AttributeError):
        env.env_method("action_masks")
