"""One environment: Gymnasium's and SB3's checkers, seeds, registration, pictures, errors."""

import copy
import os
import pickle
import subprocess
import sys
import warnings

import gymnasium
import numpy as np
import pytest
from gymnasium.utils.env_checker import check_env as check_gymnasium
from gymnasium.wrappers import TimeLimit
from stable_baselines3.common.env_checker import check_env as check_sb3

import grpo_jax
from grpo_jax import spaces
from sb3_bridge import register_envs
from sb3_bridge.gymnax.env import GymnaxEnv
from sb3_bridge.gymnax.spaces import to_gymnasium, to_numpy, to_world_actions

os.environ.setdefault("SDL_VIDEODRIVER", "dummy")
os.environ.setdefault("SDL_AUDIODRIVER", "dummy")

# What the checkers say of the tasks themselves: unbounded velocities, small feature maps, torques beyond 1.
UNBOUNDED = [
    "A Box observation space minimum value is -infinity. This is probably too low.",
    "A Box observation space maximum value is infinity. This is probably too high.",
]
ACTION_RANGE = (
    "For Box action spaces, we recommend using a symmetric and normalized space (range=[-1, 1] or [0, 1])."
)
GYMNASIUM_WARNINGS = {
    "CartPole-v1": UNBOUNDED,
    "Pendulum-v1": [ACTION_RANGE],
    "Catch-bsuite": [],
    "Breakout-MinAtar": [],
    "FrozenLake-misc": [],
    "FourRooms-misc": [],
}
SB3_WARNINGS = {
    "CartPole-v1": [],
    "Pendulum-v1": ["We recommend you to use a symmetric and normalized Box action space (range=[-1, 1])"],
    "Catch-bsuite": ["Your observation  has an unconventional shape (neither an image, nor a 1D vector)."],
    "Breakout-MinAtar": [
        "It seems that your observation  is an image but its `dtype` is (float32)",
        "It seems that your observation space  is an image but the upper and lower bounds are not in [0, 255].",
        "The minimal resolution for an image is 36x36 for the default `CnnPolicy`.",
    ],
    "FrozenLake-misc": [],
    "FourRooms-misc": [],
}


def warnings_of(check, *args, **kwargs):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        check(*args, **kwargs)
    return [str(warning.message).removeprefix("\x1b[33mWARN: ") for warning in caught]


def assert_warnings(messages, expected):
    assert len(messages) == len(expected), messages
    for message, start in zip(messages, expected, strict=True):
        assert message.startswith(start)


@pytest.mark.parametrize("env_id", GYMNASIUM_WARNINGS)
def test_passes_the_checkers(env_id):
    env = gymnasium.make(f"gymnax/{env_id}")
    assert_warnings(
        warnings_of(check_gymnasium, env.unwrapped, skip_render_check=True), GYMNASIUM_WARNINGS[env_id]
    )
    assert_warnings(warnings_of(check_sb3, GymnaxEnv(env_id)), SB3_WARNINGS[env_id])


@pytest.mark.parametrize("env_id", ["CartPole-v1", "Pendulum-v1"])
def test_gymnasiums_own_tasks_get_the_same_warnings(env_id):
    env = gymnasium.make(env_id).unwrapped
    assert_warnings(warnings_of(check_gymnasium, env, skip_render_check=True), GYMNASIUM_WARNINGS[env_id])


@pytest.mark.parametrize(
    "env_id", ["CartPole-v1", "Pendulum-v1", "Acrobot-v1", "MountainCar-v0", "MountainCarContinuous-v0"]
)
def test_classic_tasks_have_gymnasiums_spaces(env_id):
    ours, theirs = GymnaxEnv(env_id), gymnasium.make(env_id)
    assert ours.observation_space == theirs.observation_space
    assert ours.action_space == theirs.action_space


def test_types_and_dtypes():
    env = GymnaxEnv("FrozenLake-misc")
    observation, info = env.reset(seed=0)
    assert isinstance(observation, np.int64) and info == {}
    observation, reward, terminated, truncated, info = env.step(np.array(1))
    assert isinstance(observation, np.int64)
    assert [type(x) for x in (reward, terminated, truncated, info)] == [float, bool, bool, dict]
    # gymnax gives int32 here; the space is declared float32.
    observation, _ = GymnaxEnv("FourRooms-misc").reset(seed=0)
    assert observation.dtype == np.float32 and observation.flags.writeable


def episode(env, seed, n_steps=30):
    """Observations and rewards under fixed actions, over the ends of episodes."""
    observation, _ = env.reset(seed=seed)
    seen = [observation]
    for t in range(n_steps):
        observation, reward, terminated, truncated, _ = env.step(t % env.action_space.n)
        seen += [observation, reward]
        if terminated or truncated:
            seen.append(env.reset()[0])
    return np.concatenate([np.ravel(part) for part in seen])


def test_seeds():
    env = GymnaxEnv("CartPole-v1")
    first = episode(env, 3)
    np.testing.assert_array_equal(first, episode(env, 3))
    np.testing.assert_array_equal(first, episode(GymnaxEnv("CartPole-v1"), 3))
    assert not np.array_equal(first[:4], episode(env, 4)[:4])
    # Without a seed: unpredictable at first, a fresh start at every reset.
    starts = np.stack([GymnaxEnv("CartPole-v1").reset()[0], env.reset()[0], env.reset()[0]])
    assert len(np.unique(starts, axis=0)) == 3
    assert GymnaxEnv("CartPole-v1").reset(seed=2**64 - 1)[0].shape == (4,)


def test_time_limit_truncates_once():
    env = gymnasium.make("gymnax/Pendulum-v1")
    assert env.spec.max_episode_steps is None
    wrapper = env
    while wrapper is not env.unwrapped:
        assert not isinstance(wrapper, TimeLimit)
        wrapper = wrapper.env
    env.reset(seed=0)
    ends = [env.step(np.zeros(1, np.float32))[2:4] for _ in range(200)]
    assert ends == [(False, False)] * 199 + [(False, True)]


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda env: pickle.loads(pickle.dumps(env))])
def test_a_copy_goes_its_own_way_with_the_same_programs(copied):
    env = gymnasium.make("gymnax/CartPole-v1", render_mode="rgb_array")
    env.reset(seed=0)
    env.render()
    clone = copied(env)
    assert clone.unwrapped.world is env.unwrapped.world
    expected = [env.step(1)[0] for _ in range(5)]
    np.testing.assert_array_equal(expected, [clone.step(1)[0] for _ in range(5)])
    env.close()


def test_ids():
    register_envs()  # a second time: no warning, nothing changed
    ids = {env_id.removeprefix("gymnax/") for env_id in gymnasium.registry if env_id.startswith("gymnax/")}
    assert ids == set(grpo_jax.env_ids())
    assert gymnasium.spec("gymnax/Catch-bsuite").to_json()
    with pytest.raises(gymnasium.error.NameNotFound):
        gymnasium.make("gymnax/CartPoel-v1")


def test_an_id_can_import_the_bridge():
    code = "import gymnasium; print(gymnasium.make('sb3_bridge:gymnax/CartPole-v1').reset(seed=0)[0].shape)"
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", code], capture_output=True, text=True, timeout=120
    )
    assert done.stdout.strip() == "(4,)", done.stderr


def test_the_core_does_not_know_the_bridge_and_gymnax_is_imported_when_it_is_needed():
    code = """
import sys, grpo_jax
print([name for name in ("sb3_bridge", "stable_baselines3", "torch") if name in sys.modules])
import sb3_bridge
print("gymnax" in sys.modules)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.stdout.splitlines() == ["[]", "False"], done.stderr


@pytest.mark.parametrize(
    "env_id",
    ["CartPole-v1", "Pendulum-v1", "Catch-bsuite", "Breakout-MinAtar", "FourRooms-misc", "PointRobot-misc"],
)
def test_pictures(env_id):
    env = GymnaxEnv(env_id, render_mode="rgb_array")
    env.reset(seed=0)
    frame = env.render()
    action = getattr(env.action_space, "high", 0)
    for _ in range(6):
        env.step(action)
    later = env.render()
    assert frame.dtype == np.uint8 and frame.ndim == 3 and frame.shape[2] == 3
    assert frame.shape == later.shape and not np.array_equal(frame, later)
    env.close()
    env.close()


def test_no_picture():
    env = gymnasium.make(
        "gymnax/FrozenLake-misc", render_mode="rgb_array"
    )  # as make_vec_env does for every id
    env.reset(seed=0)
    with pytest.raises(NotImplementedError, match="no picture of FrozenLake-misc.*CartPole-v1.*Catch-bsuite"):
        env.render()
    env = GymnaxEnv("CartPole-v1")
    env.reset()
    assert env.render() is None


def test_errors():
    with pytest.raises(ValueError, match="env='CartPol-v1'.*did you mean CartPole-v1"):
        GymnaxEnv("CartPol-v1")
    with pytest.raises(TypeError, match="is not a gymnax Environment"):
        GymnaxEnv(3)
    with pytest.raises(ValueError, match="render_mode='ansi' must be None or 'rgb_array'"):
        GymnaxEnv("CartPole-v1", render_mode="ansi")
    env = GymnaxEnv("CartPole-v1", render_mode="rgb_array")
    with pytest.raises(gymnasium.error.ResetNeeded, match="before reset"):
        env.step(0)
    with pytest.raises(gymnasium.error.ResetNeeded, match="before reset"):
        env.render()
    with pytest.raises(ValueError, match="seed=-1 must be an integer from 0"):
        env.reset(seed=-1)
    with pytest.raises(ValueError, match="options=.*no reset options"):
        env.reset(options={"low": 0})
    env.reset(seed=0)
    while not any(env.step(1)[2:4]):
        pass
    with pytest.raises(gymnasium.error.ResetNeeded, match="after an episode ended"):
        env.step(1)


EVERY_SPACE = spaces.Dict(
    (
        ("box", spaces.Box(np.float32(-1), np.float32(1), (2,))),
        ("discrete", spaces.Discrete(3)),
        ("bits", spaces.MultiBinary(4)),
        ("numbers", spaces.MultiDiscrete((2, 3))),
        ("image", spaces.Box(np.float32(0), np.float32(255), (4, 4, 3), "uint8")),
    )
)


def test_spaces_there_and_back():
    there = to_gymnasium(EVERY_SPACE)
    assert dict(spaces.from_gymnasium(there).spaces) == dict(EVERY_SPACE.spaces)
    assert there["image"] == gymnasium.spaces.Box(0, 255, (4, 4, 3), np.uint8)
    # Bounds in the space's own dtype, so that Gymnasium does not warn of lost precision.
    assert there["box"].low.dtype == np.float32
    assert to_numpy(there, there.sample()) in there
    with pytest.raises(TypeError, match="must be one of grpo_jax.spaces"):
        to_gymnasium(there["box"])


@pytest.mark.parametrize("name", ["box", "discrete", "bits", "numbers"])
def test_actions(name):
    space = to_gymnasium(EVERY_SPACE)[name]
    action = to_world_actions(space, space.sample())
    assert action.shape == space.shape
    assert action.dtype == (np.float32 if name == "box" else np.int32)
    with pytest.raises(ValueError, match=r"action has shape \[3, 3\].*5 environments"):
        to_world_actions(space, np.zeros((3, 3)), (5,))
    if name == "box":
        with pytest.raises(ValueError, match="must be finite"):
            to_world_actions(space, [0.0, np.nan])
        with pytest.raises(TypeError, match="dtype <U1"):
            to_world_actions(space, ["a", "b"])
    else:
        with pytest.raises(ValueError, match="out of range"):
            to_world_actions(space, np.full(space.shape, 3))
        with pytest.raises(TypeError, match="dtype float64, expected integers"):
            to_world_actions(space, np.full(space.shape, 0.5))
