"""WorldVecEnv: SB3's own DummyVecEnv of the same environments is the oracle."""

import copy
import os
import pickle

import gymnax
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from stable_baselines3 import PPO
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.evaluation import evaluate_policy
from stable_baselines3.common.monitor import Monitor
from stable_baselines3.common.vec_env import (
    SubprocVecEnv,
    VecCheckNan,
    VecFrameStack,
    VecMonitor,
    VecNormalize,
    VecTransposeImage,
)

import grpo_jax
import sb3_bridge
from grpo_jax import spaces
from sb3_bridge import WorldVecEnv

os.environ.setdefault("SDL_VIDEODRIVER", "dummy")
os.environ.setdefault("SDL_AUDIODRIVER", "dummy")
torch.set_num_threads(1)


def act(env, rng):
    """Random actions ``[n_envs, ...]``."""
    if hasattr(env.action_space, "n"):
        return rng.integers(env.action_space.n, size=env.num_envs)
    return rng.uniform(env.action_space.low, env.action_space.high, (env.num_envs, *env.action_space.shape))


def play(env, n_steps, seed=0):
    """All that comes out of an env under random actions, the clock aside."""
    rng = np.random.default_rng(seed)
    seen = [env.reset()]
    for _ in range(n_steps):
        observations, rewards, dones, infos = env.step(act(env, rng))
        for info in infos:
            info.get("episode", {}).pop("t", None)
        seen += [observations, rewards, dones, infos]
    return seen


@pytest.mark.parametrize(
    ("env_id", "n_steps"),
    [
        ("CartPole-v1", 80),
        ("Pendulum-v1", 210),
        ("Catch-bsuite", 40),
        ("FrozenLake-misc", 60),
        ("FourRooms-misc", 30),
    ],
)
def test_equals_sb3s_dummy_vec_env(env_id, n_steps):
    ours = WorldVecEnv(env_id, n_envs=3, seed=7)
    theirs = make_vec_env(f"gymnax/{env_id}", n_envs=3, seed=7)
    assert ours.observation_space == theirs.observation_space and ours.action_space == theirs.action_space
    for left, right in zip(play(ours, n_steps), play(theirs, n_steps), strict=True):
        if isinstance(left, list):
            for info, other in zip(left, right, strict=True):
                assert info.keys() == other.keys()
                assert info["TimeLimit.truncated"] is other["TimeLimit.truncated"]
                if "episode" in info:
                    assert info["episode"]["l"] == other["episode"]["l"]
                    assert [type(x) for x in info["episode"].values()] == [float, int]
                    np.testing.assert_allclose(info["episode"]["r"], other["episode"]["r"], rtol=1e-4)
                    final, other_final = info["terminal_observation"], other["terminal_observation"]
                    assert type(final) is type(other_final) and final.dtype == other_final.dtype
                    np.testing.assert_allclose(final, other_final, rtol=1e-3, atol=1e-4)
        else:
            assert left.dtype == right.dtype and left.shape == right.shape and left.flags.writeable
            np.testing.assert_allclose(left, right, rtol=1e-3, atol=1e-4)  # two programs round differently
    assert ours.reset_infos == theirs.reset_infos


def test_ends_of_episodes():
    env = WorldVecEnv("Pendulum-v1", n_envs=2, seed=0)
    env.reset()
    for _ in range(199):
        _, _, dones, infos = env.step(np.zeros((2, 1)))
        assert not dones.any() and infos == [{"TimeLimit.truncated": False}] * 2
    observations, _, dones, infos = env.step(np.zeros((2, 1)))
    assert dones.all() and all(info["TimeLimit.truncated"] is True for info in infos)
    assert [info["episode"]["l"] for info in infos] == [200, 200]
    for observation, info in zip(observations, infos, strict=True):
        assert info["terminal_observation"] in env.observation_space
        assert not np.array_equal(observation, info["terminal_observation"])
    np.testing.assert_array_equal(observations, np.asarray(env.environments.observation))


def equal(left, right):
    return str(left) == str(right) and all(
        np.array_equal(a, b) for a, b in zip(left, right, strict=True) if isinstance(a, np.ndarray)
    )


def test_seeds_take_effect_at_the_next_reset():
    env = WorldVecEnv("CartPole-v1", n_envs=3, seed=5)
    first = play(env, 40)
    assert equal(first, play(WorldVecEnv("CartPole-v1", n_envs=3, seed=5), 40))
    assert not equal(first, play(env, 40))  # the streams go on
    assert env.seed(5) == [5, 6, 7]
    before = np.asarray(env.environments.observation)
    env.step(np.zeros(3, int))
    assert not np.array_equal(before, first[0])  # not yet
    assert equal(first, play(env, 40))
    # Environment i of n is what a single one with seed + i would be.
    np.testing.assert_array_equal(first[0][2:], WorldVecEnv("CartPole-v1", seed=7).reset())
    starts = np.concatenate([WorldVecEnv("CartPole-v1", n_envs=2).reset() for _ in range(2)])
    assert len(np.unique(starts, axis=0)) == 4
    np.random.seed(0)
    seeds = env.seed()
    np.random.seed(0)
    assert env.seed() == seeds


def test_what_comes_out_stays_as_it_is():
    env = WorldVecEnv("CartPole-v1", n_envs=4, seed=0)
    seen = [env.reset()]
    copies = [seen[0].copy()]
    for _ in range(30):
        observations, rewards, dones, infos = env.step(np.ones(4, int))
        seen += [observations, rewards, dones, *[i["terminal_observation"] for i in infos if len(i) > 1]]
        copies += [array.copy() for array in seen[len(copies) :]]
    for array, expected in zip(seen, copies, strict=True):
        np.testing.assert_array_equal(array, expected)


def test_two_instances_share_one_program():
    from sb3_bridge.gymnax.vec_env import _step

    play(WorldVecEnv("CartPole-v1", n_envs=3, seed=0), 2)
    n_traces = _step.of()._cache_size()
    play(WorldVecEnv("CartPole-v1", n_envs=3, seed=1), 2)
    assert _step.of()._cache_size() == n_traces


def test_device_state_can_be_taken_out_and_put_back():
    env = WorldVecEnv("CartPole-v1", n_envs=2, seed=0)
    with pytest.raises(RuntimeError, match="environments was read before reset"):
        _ = env.environments
    env.reset()
    env.step(np.ones(2, int))
    kept = env.environments
    assert kept.episode_length.tolist() == [1, 1]
    first = [env.step(np.ones(2, int))[0] for _ in range(5)]
    env.move_to(lambda: jax.tree.map(jnp.copy, kept))
    again = [env.step(np.ones(2, int))[0] for _ in range(5)]
    np.testing.assert_array_equal(first, again)
    assert kept.episode_length.tolist() == [1, 1]  # still alive: step donates its own buffers only
    # It is what the training loop of grpo_jax steps.
    config = grpo_jax.GRPOConfig(n_envs=2, n_steps=4, horizon=2, batch_size=8)
    state = grpo_jax.init(config, env.world, jax.random.key(0))
    assert jax.tree.structure(state.environments) == jax.tree.structure(kept)
    env.move_to(lambda: jax.tree.map(jnp.copy, state.environments))
    env.step(np.ones(2, int))


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda env: pickle.loads(pickle.dumps(env))])
def test_a_copy_goes_its_own_way(copied, tmp_path):
    env = WorldVecEnv("CartPole-v1", n_envs=2, seed=0, render_mode="rgb_array", monitor_dir=tmp_path)
    assert equal(play(copied(env), 5), play(env, 5))  # seeds that wait for the reset too
    env.render()
    env.set_attr("goal", [1], indices=0)
    here = env.environments
    env.move_to(lambda: here)  # as a rollout on the device leaves it
    clone = copied(env)
    assert clone.world is env.world and clone.get_attr("goal", 0) == [[1]]
    clone.get_attr("goal", 0)[0].append(2)
    assert env.get_attr("goal", 0) == [[1]]
    for _ in range(40):
        actions = np.ones(2, int)
        for left, right in zip(env.step(actions)[:3], clone.step(actions)[:3], strict=True):
            np.testing.assert_array_equal(left, right)
    assert clone.render().shape == env.render().shape
    clone.close()
    assert not clone.writes_episodes and env.writes_episodes  # two writers would spoil the file
    env.close()


def test_copies_share_a_world_that_cannot_be_pickled():
    world = grpo_jax.make("CartPole-v1", reward_function=lambda s, a, n: 1.0 - jnp.abs(n[2]))
    env = WorldVecEnv(world, n_envs=2, seed=0)
    assert copy.deepcopy(env).world is world
    with pytest.raises((pickle.PicklingError, AttributeError), match="lambda"):
        pickle.dumps(env)


def test_attributes_and_methods():
    env = WorldVecEnv("CartPole-v1", n_envs=3, seed=0, render_mode="rgb_array")
    assert env.get_attr("render_mode") == ["rgb_array"] * 3 and env.metadata["render_fps"] == 30
    assert env.get_attr("world", indices=1) == [env.world]
    assert env.spec.id == "gymnax/CartPole-v1" and WorldVecEnv(env.world).spec is None
    env.set_attr("difficulty", 2, indices=[0, -1])
    assert env.get_attr("difficulty", [0, 2]) == [2, 2] and not env.has_attr("difficulty")
    env.set_attr("double", lambda x: 2 * x)
    assert env.env_method("double", 4) == [8, 8, 8]
    with pytest.raises(AttributeError, match="'action_space' is shared by all"):
        env.set_attr("action_space", None)
    with pytest.raises(AttributeError, match="nothing"):
        env.get_attr("nothing")
    with pytest.raises(AttributeError, match="method_name='compute_reward'"):
        env.env_method("compute_reward")
    with pytest.raises(IndexError, match="indices=3: there are 3 environments"):
        env.get_attr("world", 3)
    assert env.env_is_wrapped(Monitor) == [True] * 3 and env.env_is_wrapped(VecMonitor, 0) == [False]
    env.reset()
    assert [frame.shape for frame in env.env_method("render", indices=[1])] == [(400, 600, 3)]
    assert env.render().shape == (800, 1200, 3)
    env.close()
    env.close()
    with pytest.warns(UserWarning, match="no `render_mode`"):
        assert WorldVecEnv("CartPole-v1").render() is None
    with pytest.raises(RuntimeError, match="render_mode=None"):
        WorldVecEnv("CartPole-v1").get_images()


def dict_world(max_steps=3):
    """A world with Dict observations and MultiBinary actions that pays -1 for everything."""
    space = spaces.Dict(
        (("x", spaces.Box(np.float32(-9), np.float32(9), (2,))), ("count", spaces.Discrete(max_steps + 1)))
    )
    return grpo_jax.from_function(
        lambda state, action: {"x": state["x"] + action, "count": state["count"] + 1},
        initial_state=lambda key: {"x": jax.random.uniform(key, (2,)), "count": jnp.int32(0)},
        reward_function=lambda state, action, next_state: -1.0,
        observation_space=space,
        action_space=spaces.MultiBinary(2),
        max_steps=max_steps,
    )


def test_worlds_with_dict_observations():
    env = WorldVecEnv(dict_world(), n_envs=2, seed=0)
    first = env.reset()
    assert {name: (part.dtype, part.shape) for name, part in first.items()} == {
        "x": (np.float32, (2, 2)),
        "count": (np.int64, (2,)),
    }
    for _ in range(3):
        observations, rewards, dones, infos = env.step(np.ones((2, 2), np.int8))
    assert dones.all() and observations["count"].tolist() == [0, 0] and rewards.tolist() == [-1, -1]
    assert infos[1]["terminal_observation"] in env.observation_space
    np.testing.assert_allclose(infos[1]["terminal_observation"]["x"], first["x"][1] + 3, rtol=1e-6)
    PPO("MultiInputPolicy", env, n_steps=8, batch_size=8, n_epochs=1, device="cpu").learn(16)


def test_environment_objects_and_replaced_rewards():
    env, params = gymnax.make("CartPole-v1")
    assert WorldVecEnv(env, n_envs=2, seed=0).reset().shape == (2, 4)
    world = grpo_jax.make(
        env,
        params.replace(max_steps_in_episode=5),
        reward_function=lambda state, action, next_state: 10.0 + 0.0 * state[0],
    )
    env = WorldVecEnv(world, n_envs=2, seed=0, render_mode="rgb_array")
    env.reset()
    for _ in range(5):
        _, rewards, dones, infos = env.step(np.array([0, 1]))
    assert rewards.tolist() == [10.0, 10.0] and dones.all() and infos[0]["TimeLimit.truncated"]
    assert infos[0]["episode"]["r"] == 5.0  # statistics count what the task pays
    assert env.get_images()[0].dtype == np.uint8
    env.close()


def test_x64():
    with jax.enable_x64(True):
        for env_id in ("Pendulum-v1", "FrozenLake-misc"):
            env = WorldVecEnv(env_id, n_envs=2, seed=0)
            first = env.reset()
            observations, rewards, dones, _ = env.step(np.stack([env.action_space.sample()] * 2))
            assert first.dtype == observations.dtype == env.observation_space.dtype
            assert rewards.dtype == np.float32 and dones.dtype == bool


def test_ppo_learns():
    def ppo(n_steps):
        env = WorldVecEnv("CartPole-v1", n_envs=8)
        return PPO(
            "MlpPolicy", env, n_steps=n_steps, batch_size=128, learning_rate=3e-3, seed=0, device="cpu"
        )

    model = ppo(32)
    model.get_env().seed(0)
    before, _ = evaluate_policy(model, model.get_env(), n_eval_episodes=16, deterministic=False)
    model.learn(2000)
    assert model.num_timesteps == 2048 and len(model.ep_info_buffer) > 10
    after, _ = evaluate_policy(model, model.get_env(), n_eval_episodes=16, deterministic=False)
    assert after > 1.5 * before
    left, right = (ppo(16).learn(128).policy.state_dict() for _ in range(2))
    assert all(torch.equal(left[name], right[name]) for name in left)  # bit for bit


def test_wrappers():
    def learn(env, policy="MlpPolicy"):
        model = PPO(policy, env, n_steps=16, batch_size=32, n_epochs=1, seed=0, device="cpu")
        return model.learn(64)

    normalized = VecNormalize(WorldVecEnv("Pendulum-v1", n_envs=2))
    learn(normalized)
    assert normalized.get_original_obs().shape == (2, 3) and normalized.world is normalized.venv.world
    learn(VecFrameStack(VecCheckNan(WorldVecEnv("CartPole-v1", n_envs=2), raise_exception=True), 3))
    learn(WorldVecEnv("Breakout-MinAtar", n_envs=2))
    learn(WorldVecEnv("FrozenLake-misc", n_envs=2))
    with pytest.raises(AssertionError, match="must be an image"):  # float feature maps: as for any such env
        VecTransposeImage(WorldVecEnv("Breakout-MinAtar"))


def test_vec_monitor(tmp_path):
    inner = WorldVecEnv("CartPole-v1", n_envs=2, seed=0)
    with pytest.warns(
        UserWarning, match="already wrapped with a `Monitor`"
    ):  # true: to write the file all the same
        env = VecMonitor(inner, str(tmp_path / "log"))
    env.reset()
    infos = [info for _ in range(30) for info in env.step(np.ones(2, int))[3] if "episode" in info]
    assert all(info["episode"]["r"] == info["episode"]["l"] for info in infos) and len(infos) > 2
    env.close()
    lines = (tmp_path / "log.monitor.csv").read_text().splitlines()
    assert '"env_id": "gymnax/CartPole-v1"' in lines[0] and len(lines) == 2 + len(infos)


def test_other_vec_envs_by_id():
    env = make_vec_env("gymnax/CartPole-v1", n_envs=2, seed=0)
    PPO("MlpPolicy", env, n_steps=16, batch_size=32, n_epochs=1, device="cpu").learn(32)
    PPO("MlpPolicy", "gymnax/CartPole-v1", n_steps=16, batch_size=16, n_epochs=1, device="cpu").learn(16)
    # The process of a SubprocVecEnv has not imported the bridge: the id tells it to.
    env = make_vec_env("sb3_bridge:gymnax/CartPole-v1", seed=7, vec_env_cls=SubprocVecEnv)
    np.testing.assert_array_equal(env.reset(), WorldVecEnv("CartPole-v1", seed=7).reset())
    env.close()


def test_errors():
    for n_envs in (0, -1, 1.5, True, "2"):
        with pytest.raises(ValueError, match=f"n_envs={n_envs!r} must be an integer of at least 1"):
            WorldVecEnv("CartPole-v1", n_envs=n_envs)
    with pytest.raises(ValueError, match="env='CartPol-v1'.*did you mean CartPole-v1"):
        WorldVecEnv("CartPol-v1")
    with pytest.raises(ValueError, match="render_mode='human' must be None or 'rgb_array'"):
        WorldVecEnv("CartPole-v1", render_mode="human")
    for seed in (-1, 0.5, True):
        with pytest.raises(ValueError, match=f"seed={seed!r} must be an integer from 0"):
            WorldVecEnv("CartPole-v1", seed=seed)
    env = WorldVecEnv("CartPole-v1", n_envs=2)
    with pytest.raises(RuntimeError, match=r"step\(\) was called before reset"):
        env.step(np.zeros(2, int))
    with pytest.raises(RuntimeError, match="without actions"):
        env.step_wait()
    env.reset()
    with pytest.raises(ValueError, match=r"action has shape \[3\], expected \[2\] \(2 environments"):
        env.step(np.zeros(3, int))
    with pytest.raises(ValueError, match="out of range: Discrete.2. takes integers from 0 to 1"):
        env.step(np.array([0, 2]))
    with pytest.raises(TypeError, match="expected integers"):
        env.step(np.full(2, 0.5))
    pendulum = WorldVecEnv("Pendulum-v1", n_envs=2, seed=0)
    pendulum.reset()
    with pytest.raises(ValueError, match=r"(?s)action=.*nan.* must be finite"):
        pendulum.step(np.full((2, 1), np.nan))
    for dtype in (np.float64, np.float32, np.int64):
        assert pendulum.step(np.ones((2, 1), dtype))[1].dtype == np.float32
    env.set_options({"low": 0})
    with pytest.raises(ValueError, match="options=.*no reset options"):
        env.reset()


def test_the_former_name_is_another_name_for_it():
    assert sb3_bridge.GymnaxVecEnv is WorldVecEnv
