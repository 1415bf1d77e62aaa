"""Rollouts on the host: all kinds of environments as PPO steps them, and what a reward function sees."""

import functools
from types import SimpleNamespace

import gymnasium as gym
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from gymnasium import spaces
from gymnasium.wrappers import TimeLimit
from sb3.contract import ENV, cartpole, parameters_of, wrappers_of
from sb3.envs import PaidAfter, RandomEnv, Recorder
from stable_baselines3 import PPO
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.monitor import Monitor
from stable_baselines3.common.on_policy_algorithm import OnPolicyAlgorithm
from stable_baselines3.common.vec_env import (
    DummyVecEnv,
    SubprocVecEnv,
    VecCheckNan,
    VecFrameStack,
    VecMonitor,
    VecNormalize,
)

from sb3_bridge import GRPO, WorldVecEnv

torch.set_num_threads(1)


SIMULATED = {"horizon": 2, "reward_function": lambda s, a, n: 1 - jnp.abs(n[2]) - 0.1 * jnp.abs(n[0])}
SMALL = {"n_steps": 8, "batch_size": 8, "n_epochs": 1, "policy_kwargs": {"net_arch": [8]}}


KINDS = {
    "id": lambda: ENV,
    "monitor": lambda: Monitor(gym.make(ENV)),
    "time limit": lambda: TimeLimit(gym.make(ENV), 5),
    "dummy": cartpole,
    "subproc": lambda: cartpole(env_class=functools.partial(SubprocVecEnv, start_method="forkserver")),
    "normalized": lambda: VecNormalize(cartpole()),
    "stacked": lambda: VecFrameStack(cartpole(), 2),
    "monitored": lambda: VecMonitor(cartpole()),
    "checked": lambda: VecCheckNan(cartpole(), raise_exception=True),
    "all": lambda: VecFrameStack(VecCheckNan(VecNormalize(VecMonitor(cartpole()))), 2),
    "gymnax on the host": lambda: make_vec_env("gymnax/CartPole-v1", n_envs=2),
    "gymnax normalized": lambda: VecNormalize(WorldVecEnv(ENV, 2)),
}


CHOSEN = {"gymnax on the host": "clone"}
CHOSEN |= {"stacked": "episodes", "all": "episodes", "gymnax normalized": "episodes"}
"""Where there is no twin, or no clones can be had either."""


class Steps(BaseCallback):
    """Episode lengths, and the kinds of what SB3 shows to callbacks."""

    def __init__(self):
        super().__init__()
        self.lengths, self.kinds, self.truncations = [], set(), []

    def _on_step(self):
        names = ("new_obs", "rewards", "dones", "actions", "clipped_actions")
        arrays = {name: self.locals[name] for name in names}
        arrays["rewards"] = np.float32(arrays["rewards"])  # a SubprocVecEnv gives PPO float64
        self.kinds.add(tuple((name, array.shape, array.dtype.name) for name, array in arrays.items()))
        for done, info in zip(self.locals["dones"], self.locals["infos"], strict=True):
            if done:
                self.lengths.append(info.get("episode", {}).get("l"))
                self.truncations.append(info["TimeLimit.truncated"])
                self.kinds.add(
                    ("end", info["terminal_observation"].shape, info["terminal_observation"].dtype)
                )
        return True


@pytest.mark.parametrize("kind", KINDS)
def test_kinds_of_environments_on_the_host(kind):
    models, steps = {}, {}
    chosen = CHOSEN.get(kind, "twin")
    for algorithm in (PPO, GRPO):
        own = {"horizon": 4} if algorithm is GRPO and chosen != "episodes" else {}
        models[algorithm] = algorithm("MlpPolicy", KINDS[kind](), **SMALL, **own, seed=0, device="cpu")
        steps[algorithm] = Steps()
        models[algorithm].learn(64, callback=steps[algorithm])
    ppo, grpo = models[PPO], models[GRPO]
    assert wrappers_of(grpo.get_env()) == wrappers_of(ppo.get_env())
    assert grpo.get_env().observation_space == ppo.get_env().observation_space == grpo.observation_space
    assert grpo.n_envs == ppo.n_envs and grpo.num_timesteps == ppo.num_timesteps == 64
    assert grpo._last_obs.shape == ppo._last_obs.shape and grpo._last_obs.dtype == ppo._last_obs.dtype
    monitored = [{length is None for length in steps[algorithm].lengths} for algorithm in (PPO, GRPO)]
    assert monitored[0] == monitored[1] and len(monitored[0]) == 1
    assert steps[GRPO].kinds == steps[PPO].kinds
    assert [sorted(info) for info in grpo.ep_info_buffer][:1] == [sorted(i) for i in ppo.ep_info_buffer][:1]
    assert grpo.chosen_dynamics == chosen
    if chosen in ("twin", "clone"):  # two actions of every state are followed, fewer steps where they end
        assert 0.6 * 64 * 2 * 4 < grpo.simulator_steps <= 64 * 2 * 4
    elif chosen == "episodes":
        assert grpo.simulator_steps == 0
    if kind == "time limit":
        assert set(steps[GRPO].lengths) == {5} and all(steps[GRPO].truncations)
    else:
        assert not any(steps[GRPO].truncations)
    normalizers = [model.get_vec_normalize_env() for model in (ppo, grpo)]
    assert all(
        (normalizer is not None) == ("normalized" in kind or kind == "all") for normalizer in normalizers
    )
    if normalizers[1] is not None:
        assert normalizers[1].obs_rms.count == normalizers[0].obs_rms.count
        assert normalizers[1] in (
            grpo.get_env(),
            getattr(getattr(grpo.get_env(), "venv", None), "venv", None),
        )
    grpo.get_env().close()
    ppo.get_env().close()


@pytest.mark.filterwarnings("ignore:The environment is already wrapped with a `Monitor`")
@pytest.mark.parametrize(
    ("env", "n_envs", "where"),
    [
        (lambda: "gymnax/CartPole-v1", 1, WorldVecEnv),
        (lambda: WorldVecEnv(ENV, 1), 1, WorldVecEnv),
        (lambda: WorldVecEnv(ENV, 3, seed=1), 3, WorldVecEnv),
        (lambda: VecMonitor(WorldVecEnv(ENV, 3)), 3, VecMonitor),
    ],
)
def test_gymnax_is_branched_on_the_device(env, n_envs, where):
    model = GRPO("MlpPolicy", env(), **SIMULATED, **SMALL, seed=0)
    assert type(model.get_env()) is where and model.n_envs == n_envs
    steps = Steps()
    model.learn(16 * n_envs, callback=steps)
    assert model.num_timesteps == 16 * n_envs
    # Two actions are followed for two steps each, but where they end at once.
    n_branched = 16 * n_envs * 2 * 2
    assert 0.9 * n_branched < model.simulator_steps <= n_branched
    assert not steps.lengths or all(isinstance(length, int | np.integer) for length in steps.lengths)
    assert {kind for kind in steps.kinds if kind[0] != "end"} == {
        (
            ("new_obs", (n_envs, 4), "float32"),
            ("rewards", (n_envs,), "float32"),
            ("dones", (n_envs,), "bool"),
            ("actions", (n_envs,), "int64"),
            ("clipped_actions", (n_envs,), "int64"),
        )
    }
    assert model.get_vec_normalize_env() is None


class Scripted:
    """For SB3's own ``collect_rollouts``: takes given actions, and values as a policy of ours does."""

    squash_output = False

    def __init__(self, policy, actions):
        self._policy, self._actions = policy, iter(actions)
        self.predict_values, self.obs_to_tensor = policy.predict_values, policy.obs_to_tensor

    def set_training_mode(self, mode):
        pass

    def __call__(self, observation):
        actions = torch.as_tensor(next(self._actions))
        return actions, self.predict_values(observation), torch.zeros(len(actions))


def centre(state, action, next_state):
    return 1.0 - abs(next_state[0]) - abs(state[2]) + 0.5 * action


def short_cartpole(reward=None):
    def make():
        env = gym.make(ENV, max_episode_steps=20)
        return env if reward is None else PaidAfter(env, reward)

    return DummyVecEnv([make] * 3)


class Kept(BaseCallback):
    """The last rollout: its buffer, and which steps ended an episode and which a time limit cut."""

    def _on_rollout_start(self):
        self.buffer, self.ended, self.truncated = None, [], []

    def _on_step(self):
        self.ended.append(self.locals["dones"])
        self.truncated.append([info["TimeLimit.truncated"] for info in self.locals["infos"]])
        return True

    def _on_rollout_end(self):
        names = ("observations", "actions", "rewards", "episode_starts", "values", "returns", "advantages")
        buffer = self.model.rollout_buffer
        self.buffer = SimpleNamespace(**{name: np.array(getattr(buffer, name)) for name in names})


def test_advantages_and_value_targets_are_those_of_ppo():
    settings = {**SMALL, "n_steps": 40, "gamma": 0.9, "gae_lambda": 0.8, "seed": 5, "learning_rate": 0.0}
    settings["batch_size"] = 120
    model = GRPO("MlpPolicy", short_cartpole(), candidates="episodes", **settings)
    kept = Kept()
    model.learn(120, kept)
    ours = kept.buffer
    ended, truncated = np.array(kept.ended), np.array(kept.truncated)
    assert truncated.any() and (ended & ~truncated).any()
    assert not ended[-1].all()  # what the rollout cuts is valued, too

    ppo = PPO("MlpPolicy", short_cartpole(), **settings, device="cpu")
    ppo.policy = Scripted(model.policy, ours.actions[..., 0].astype(int))
    _, callback = ppo._setup_learn(120)
    theirs = ppo.rollout_buffer
    OnPolicyAlgorithm.collect_rollouts(ppo, ppo.get_env(), callback, theirs, ppo.n_steps)
    np.testing.assert_array_equal(ours.observations, theirs.observations)
    np.testing.assert_array_equal(ours.episode_starts[1:], theirs.episode_starts[1:])
    # PPO adds the value of what a time limit cut to the reward.
    np.testing.assert_allclose(ours.rewards[~truncated], theirs.rewards[~truncated], rtol=1e-6)
    for name in ("values", "returns", "advantages"):
        expected = getattr(theirs, name)
        np.testing.assert_allclose(getattr(ours, name), expected, rtol=1e-3, atol=1e-4, err_msg=name)


@pytest.mark.parametrize("bootstrap", [True, False])
def test_a_reward_function_trains_as_an_environment_that_pays_it(bootstrap):
    settings = {**SMALL, "n_steps": 40, "batch_size": 120, "candidates": "episodes", "bootstrap": bootstrap}
    before, *after = (
        parameters_of(GRPO("MlpPolicy", env, **settings, **given, seed=5).learn(n_timesteps))
        for n_timesteps, env, given in (
            (0, short_cartpole(), {}),
            (240, short_cartpole(centre), {}),
            (240, short_cartpole(), {"reward_function": centre}),
            (240, short_cartpole(), {}),
        )
    )
    assert np.abs(after[0] - before).max() > 1e-4
    np.testing.assert_allclose(after[0], after[1], rtol=1e-3, atol=1e-5)
    assert not np.allclose(after[0], after[2], rtol=1e-3, atol=1e-5)


def recorded(wrap, make):
    recorders = [Recorder(make()) for _ in range(2)]
    return wrap(DummyVecEnv([lambda recorder=recorder: recorder for recorder in recorders])), recorders


def small_multi_input():
    space = spaces.Dict(
        {"vector": spaces.Box(-1, 1, (3,), np.float32), "image": spaces.Box(0, 255, (8, 8, 1), np.uint8)}
    )
    return RandomEnv(space, spaces.Box(-1, 1, (2,)), length=5)


REWARDED = {
    "plain": (lambda env: env, lambda: gym.make(ENV, max_episode_steps=6)),
    "normalized": (VecNormalize, lambda: gym.make(ENV, max_episode_steps=6)),
    "rewards": (lambda env: VecNormalize(env, norm_obs=False), lambda: gym.make(ENV, max_episode_steps=6)),
    "monitored": (lambda env: VecMonitor(VecNormalize(env)), lambda: gym.make(ENV, max_episode_steps=6)),
    "boxed": (VecNormalize, lambda: gym.make("Pendulum-v1", max_episode_steps=6)),
    "stacked within": (
        lambda env: VecNormalize(VecFrameStack(env, 2)),
        lambda: gym.make(ENV, max_episode_steps=6),
    ),
    "dict": (lambda env: VecNormalize(env, norm_obs_keys=["vector"]), small_multi_input),
}


@pytest.mark.parametrize("kind", REWARDED)
def test_the_reward_function_sees_true_transitions(kind):
    wrap, make = REWARDED[kind]
    env, recorders = recorded(wrap, make)
    calls = []

    def reward(state, action, next_state):
        if np.ndim(jax.tree.leaves(state)[-1]) < 2:
            raise TypeError("batches only")
        calls.append((state, np.asarray(action), next_state))
        return 0.25 * jax.tree.leaves(next_state)[-1][:, 0]

    policy = "MultiInputPolicy" if kind == "dict" else "MlpPolicy"
    model = GRPO(policy, env, reward_function=reward, candidates="episodes", **SMALL, seed=0)
    calls.clear()
    for recorder in recorders:
        recorder.transitions.clear()
    kept = Kept()
    model.learn(16, kept)
    (call,) = calls
    ended = np.array(kept.ended)
    assert ended.any() and not ended.all()
    for name, got in zip(("state", "action", "next_state"), call, strict=True):
        true = [
            [step[("state", "action", "next_state").index(name)] for step in r.transitions] for r in recorders
        ]
        expected = jax.tree.map(
            lambda *leaves: np.stack(leaves), *[x for pair in zip(*true, strict=True) for x in pair]
        )
        got = got if isinstance(got, dict) else {"": got}
        expected = expected if isinstance(expected, dict) else {"": expected}
        for entry, values in got.items():
            wanted = expected[entry]
            if entry == "image":
                wanted = np.moveaxis(wanted, -1, 1)
            if kind == "stacked within" and name != "action":
                values = values[:, 4:]  # the newest frame
            if name == "next_state":
                # VecNormalize keeps no last observation of an episode: that one is computed back.
                inexact = np.ravel(ended)
                np.testing.assert_allclose(values[inexact], wanted[inexact], rtol=1e-4, atol=1e-5)
                values, wanted = values[~inexact], wanted[~inexact]
            np.testing.assert_array_equal(values, wanted)


def test_frames_stacked_outside_of_vec_normalize_are_refused():
    env = VecFrameStack(VecNormalize(cartpole()), 2)
    model = GRPO("MlpPolicy", env, reward_function=lambda s, a, n: n[0], **SMALL)
    with pytest.raises(ValueError, match="put VecNormalize outside of VecFrameStack"):
        model.learn(16)


# Rewards without rounding, so that all forms train alike bit for bit.
FORMS = {
    "jax": lambda s, a, n: jnp.where(jnp.abs(n[2]) < 0.03, 1.0, 0.25 * a),
    "numpy batched": lambda s, a, n: np.where(np.abs(n[:, 2]) < 0.03, 1.0, 0.25 * a),
    "torch": lambda s, a, n: torch.where(torch.abs(n[2]) < 0.03, 1.0, 0.25 * a),
    "torch batched": lambda s, a, n: torch.where(torch.abs(n[:, 2:3]) < 0.03, 1.0, 0.25 * a[:, None]),
}


@pytest.mark.filterwarnings("ignore:The environment is already wrapped with a `Monitor`")
@pytest.mark.filterwarnings("ignore::grpo_jax.NoSpreadWarning")  # without a reward
@pytest.mark.parametrize(
    ("env", "branches", "forms"),
    [
        (cartpole, {"horizon": 2, "branch_every": 1}, tuple(FORMS)),
        (lambda: WorldVecEnv(ENV, 2), {"horizon": 2}, ("jax", "numpy batched")),
    ],
)
def test_all_forms_of_a_reward_train_alike_and_leave_the_statistics_alone(env, branches, forms):
    results, episodes = {}, {}
    for form in (None, *forms):
        reward = None if form is None else FORMS[form]
        model = GRPO("MlpPolicy", VecMonitor(env()), reward_function=reward, **branches, **SMALL, seed=2)
        model.learn(16)
        results[form] = parameters_of(model)
        model.learn(48, reset_num_timesteps=False)
        episodes[form] = [(info["r"], info["l"]) for info in model.ep_info_buffer]
        assert episodes[form] and all(score == length for score, length in episodes[form])
    first = results[forms[0]]
    for form in forms[1:]:
        np.testing.assert_array_equal(results[form], first, err_msg=form)
    assert not np.array_equal(results[None], first)


@pytest.mark.parametrize(("env", "branches"), [(cartpole, {}), (lambda: WorldVecEnv(ENV, 2), {"horizon": 2})])
@pytest.mark.parametrize("fault", ["nan", "raise"])
def test_errors_of_a_reward_show_what_it_was_given(env, branches, fault):
    switch = SimpleNamespace(on=False)

    def reward(state, action, next_state):
        values = np.abs(next_state[:, 2]) + 0.0 * np.asarray(action)
        if switch.on and fault == "raise":
            raise KeyError("no such weather")
        return np.full_like(values, np.nan) if switch.on else values

    model = GRPO("MlpPolicy", env(), reward_function=reward, **branches, **SMALL)
    switch.on = True
    transition = r"for state=\[.*\], action=[01], next_state=\[.*\]"
    error, message = {
        "nan": (ValueError, "reward_function returned nan " + transition),
        "raise": (RuntimeError, "reward_function raised KeyError: 'no such weather' " + transition),
    }[fault]
    with pytest.raises(error, match=message):
        model.learn(16)
