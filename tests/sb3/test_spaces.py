"""Spaces and kinds of environments: each acts, trains and predicts like PPO, or is refused as by PPO."""

import copy

import gymnasium as gym
import jax
import numpy as np
import pytest
import torch
from gymnasium import spaces
from sb3.contract import ENV, actor_of, parameters_of, wrappers_of
from sb3.envs import DictOfOne, RandomEnv
from stable_baselines3 import PPO
from stable_baselines3.common.envs import (
    FakeImageEnv,
    SimpleMultiObsEnv,
)
from stable_baselines3.common.evaluation import evaluate_policy
from stable_baselines3.common.vec_env import (
    DummyVecEnv,
    VecTransposeImage,
)

from sb3_bridge import GRPO

torch.set_num_threads(1)


SMALL = {"n_steps": 8, "batch_size": 8, "n_epochs": 1, "policy_kwargs": {"net_arch": [8]}}


IMAGE = spaces.Box(0, 255, (36, 36, 1), np.uint8)


OBSERVATIONS = {
    "vector": spaces.Box(-1, 1, (3,), np.float32),
    "image last": IMAGE,
    "image first": spaces.Box(0, 255, (2, 36, 36), np.uint8),
    "discrete": spaces.Discrete(5),
    "multi discrete": spaces.MultiDiscrete([3, 2]),
    "multi binary": spaces.MultiBinary(4),
    "dict": spaces.Dict({"vector": spaces.Box(-1, 1, (3,), np.float64), "image": IMAGE}),
}


ACTIONS = {
    "discrete": spaces.Discrete(3),
    "multi discrete": spaces.MultiDiscrete([3, 2]),
    "multi binary": spaces.MultiBinary(3),
    "box": spaces.Box(np.float32([-2, 0]), np.float32([2, 5])),
    "box 2-d": spaces.Box(-1, 1, (2, 3), np.float32),
    # float32(0.1) is above 0.1.
    "float64": spaces.Box(-0.1, 0.1, (2,), np.float64),
}


# Every observation and every action.
PAIRS = [
    ("vector", "box 2-d"),
    ("image last", "discrete"),
    ("image first", "box"),
    ("discrete", "float64"),
    ("multi discrete", "multi binary"),
    ("multi binary", "multi discrete"),
    ("dict", "discrete"),
]


def policy_for(space):
    """Name and small networks."""
    if isinstance(space, spaces.Dict):
        return "MultiInputPolicy", {"net_arch": [8], "features_extractor_kwargs": {"cnn_output_dim": 8}}
    if len(space.shape) == 3:
        return "CnnPolicy", {"net_arch": [8], "features_extractor_kwargs": {"features_dim": 8}}
    return "MlpPolicy", {"net_arch": [8]}


@pytest.mark.parametrize(("observation", "action"), PAIRS)
def test_spaces_act_train_and_predict_like_ppo(observation, action):
    models, envs = {}, {}
    for algorithm in (PPO, GRPO):
        env = RandomEnv(copy.deepcopy(OBSERVATIONS[observation]), copy.deepcopy(ACTIONS[action]))
        name, policy_kwargs = policy_for(env.observation_space)
        model = algorithm(name, env, **{**SMALL, "policy_kwargs": policy_kwargs}, seed=0, device="cpu")
        before = actor_of(model) if algorithm is GRPO else None
        model.learn(16)
        models[algorithm], envs[algorithm] = model, env
    assert not np.array_equal(before, actor_of(models[GRPO]))
    ppo, grpo = models[PPO], models[GRPO]
    assert grpo.num_timesteps == ppo.num_timesteps == len(envs[GRPO].actions) == 16
    assert grpo.observation_space == ppo.observation_space and grpo.action_space == ppo.action_space
    assert list(grpo.ep_info_buffer[0]) == list(ppo.ep_info_buffer[0])
    assert [info["l"] for info in grpo.ep_info_buffer] == [info["l"] for info in ppo.ep_info_buffer]
    space = ACTIONS[action]
    assert all(space.contains(taken) for taken in envs[GRPO].actions)
    if isinstance(space, spaces.MultiBinary):  # PPO's bits are floats
        assert {taken.dtype for taken in envs[GRPO].actions} == {space.dtype}
    elif space.contains(envs[PPO].actions[0]):
        assert {taken.dtype for taken in envs[GRPO].actions} == {taken.dtype for taken in envs[PPO].actions}

    for where in (envs, None):
        one = OBSERVATIONS[observation].sample()
        if where is None:
            batch = [OBSERVATIONS[observation].sample() for _ in range(3)]
            one = jax.tree.map(lambda *leaves: np.stack(leaves), *batch)
        for deterministic in (True, False):
            (ours, our_state), (theirs, their_state) = (
                models[algorithm].predict(one, deterministic=deterministic) for algorithm in (GRPO, PPO)
            )
            assert type(ours) is type(theirs) and ours.shape == theirs.shape
            assert our_state is their_state is None
            if isinstance(space, spaces.MultiBinary):
                assert ours.dtype == space.dtype
            elif space.contains(theirs if where else theirs[0]):
                assert ours.dtype == theirs.dtype
            assert space.contains(ours) if where else all(space.contains(row) for row in ours)

    ours, theirs = (
        evaluate_policy(models[algorithm], models[algorithm].get_env(), 3, return_episode_rewards=True)
        for algorithm in (GRPO, PPO)
    )
    assert ours[1] == theirs[1] == [5, 5, 5]
    assert {type(reward) for reward in ours[0]} == {type(reward) for reward in theirs[0]}


@pytest.mark.parametrize(
    ("policy", "env"),
    [
        (
            "CnnPolicy",
            lambda: FakeImageEnv(screen_height=36, screen_width=36, channel_first=True, discrete=False),
        ),
        ("MultiInputPolicy", lambda: SimpleMultiObsEnv(channel_last=False, discrete_actions=False)),
        ("MlpPolicy", lambda: gym.make("Pendulum-v1")),
    ],
)
def test_environments_of_sb3_and_gymnasium(policy, env):
    kwargs = {"net_arch": [8]}
    if policy != "MlpPolicy":
        size = "features_dim" if policy == "CnnPolicy" else "cnn_output_dim"
        kwargs["features_extractor_kwargs"] = {size: 8}
    ppo, grpo = (
        algorithm(policy, env(), **{**SMALL, "policy_kwargs": kwargs}, seed=0, device="cpu")
        for algorithm in (PPO, GRPO)
    )
    assert grpo.observation_space == ppo.observation_space
    assert wrappers_of(grpo.get_env()) == wrappers_of(ppo.get_env())
    before = actor_of(grpo)
    grpo.learn(16)
    # FakeImageEnv pays nothing: with its critic's errors alone the advantages still differ from zero.
    assert not np.array_equal(before, actor_of(grpo))
    observation = grpo.get_env().reset()
    ours, theirs = (model.predict(observation)[0] for model in (grpo, ppo))
    assert ours.shape == theirs.shape and ours.dtype == theirs.dtype


def refused_space(observation=None, action=None):
    return lambda: RandomEnv(observation or OBSERVATIONS["vector"], action or ACTIONS["discrete"])


NESTED = spaces.Dict({"outer": spaces.Dict({"inner": spaces.Discrete(2)})})


@pytest.mark.parametrize(
    ("policy", "env"),
    [
        ("MlpPolicy", refused_space(action=spaces.Box(-np.inf, np.inf, (2,)))),
        ("MlpPolicy", refused_space(action=spaces.Box(np.float32([-1, -np.inf]), np.float32([1, 1])))),
        ("MlpPolicy", refused_space(action=spaces.Tuple([spaces.Discrete(2)]))),
        ("MlpPolicy", refused_space(action=spaces.Dict({"a": spaces.Discrete(2)}))),
        ("MlpPolicy", refused_space(action=spaces.MultiBinary([2, 2]))),
        ("MlpPolicy", refused_space(action=spaces.MultiDiscrete([[2, 2], [2, 2]]))),
        ("MlpPolicy", refused_space(spaces.Tuple([spaces.Discrete(2)]))),
        ("MlpPolicy", refused_space(NESTED)),
        ("MultiInputPolicy", refused_space(NESTED)),
        ("MlpPolicy", refused_space(OBSERVATIONS["dict"])),
        ("CnnPolicy", refused_space(OBSERVATIONS["dict"])),
        ("CnnPolicy", refused_space()),
        ("CnnPolicy", refused_space(spaces.Box(0, 1, (36, 36, 3)))),
        ("CnnPolicy", refused_space(OBSERVATIONS["discrete"])),
        ("MlPolicy", refused_space()),
        ("MlpPolicy", lambda: "NoSuchEnv-v0"),
        ("MlpPolicy", lambda: object()),
    ],
)
def test_what_does_not_fit_is_refused_as_by_ppo(policy, env):
    errors = []
    for algorithm in (PPO, GRPO):
        with pytest.raises(Exception) as caught:  # noqa: PT011
            algorithm(policy, env(), **{**SMALL, "policy_kwargs": None}, device="cpu").learn(8)
        errors.append(caught.value)
    assert type(errors[1]) is type(errors[0]), errors
    assert str(errors[1])


def test_multi_input_policy_is_for_dicts():
    # PPO's error is an accident: 'Box' object has no attribute 'spaces'.
    with pytest.raises(ValueError, match="MultiInputPolicy is for Dict observations: use MlpPolicy"):
        GRPO("MultiInputPolicy", refused_space()(), **SMALL)


def test_a_dict_of_one_vector_trains_as_the_vector_does():
    models = []
    for policy, wrapper in (("MlpPolicy", lambda env: env), ("MultiInputPolicy", DictOfOne)):
        env = DummyVecEnv([lambda wrapper=wrapper: wrapper(gym.make(ENV))] * 2)
        models.append(GRPO(policy, env, **SMALL, seed=3, dynamics="clone").learn(48))
    np.testing.assert_array_equal(actor_of(models[0]), actor_of(models[1]))
    np.testing.assert_array_equal(parameters_of(models[0]), parameters_of(models[1]))


@pytest.mark.parametrize("wrapped", [False, True])
def test_images_are_transposed_once(wrapped):
    env = DummyVecEnv([lambda: FakeImageEnv(screen_height=36, screen_width=36)] * 2)
    model = GRPO("CnnPolicy", VecTransposeImage(env) if wrapped else env, **SMALL)
    assert wrappers_of(model.get_env()) == [VecTransposeImage, DummyVecEnv]
    assert model.observation_space.shape == (1, 36, 36)
