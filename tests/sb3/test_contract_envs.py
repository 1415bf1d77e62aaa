"""The environments and spaces of SB3's contract: PPO runs beside GRPO and is the oracle."""

import copy
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
from sb3.envs import DictOfOne, PaidAfter, RandomEnv, Recorder
from stable_baselines3 import PPO
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.envs import (
    FakeImageEnv,
    IdentityEnv,
    IdentityEnvBox,
    IdentityEnvMultiBinary,
    IdentityEnvMultiDiscrete,
    SimpleMultiObsEnv,
)
from stable_baselines3.common.evaluation import evaluate_policy
from stable_baselines3.common.monitor import Monitor
from stable_baselines3.common.on_policy_algorithm import OnPolicyAlgorithm
from stable_baselines3.common.policies import ActorCriticPolicy
from stable_baselines3.common.vec_env import (
    DummyVecEnv,
    SubprocVecEnv,
    VecCheckNan,
    VecEnvWrapper,
    VecFrameStack,
    VecMonitor,
    VecNormalize,
    VecTransposeImage,
)

from grpo_jax.training import batches
from sb3_bridge import GRPO, GymnaxVecEnv, MlpPolicy

torch.set_num_threads(1)
SMALL = {"n_steps": 8, "batch_size": 8, "n_epochs": 1, "policy_kwargs": {"net_arch": [8]}}
ENV = "CartPole-v1"


def lean(state, action, next_state):
    """Tells the actions of CartPole apart within two steps."""
    return 1 - jnp.abs(next_state[2]) - 0.1 * jnp.abs(next_state[0])


SIMULATED = {"horizon": 2, "reward_function": lean}


pytestmark = pytest.mark.usefixtures("quick_compiles")


def wrappers_of(env):
    """Classes of a VecEnv and what it wraps, from the outside."""
    classes = [type(env)]
    while isinstance(env, VecEnvWrapper):
        env = env.venv
        classes.append(type(env))
    return classes


def cartpole(n_envs=2, env_class=DummyVecEnv, **arguments):
    return env_class([functools.partial(gym.make, ENV, **arguments)] * n_envs)


def parameters_of(model):
    """One vector of all that training changes: policy and optimizer."""
    leaves = jax.tree.leaves((model.policy.state, model.policy.optimizer.state))
    return np.concatenate([np.ravel(np.asarray(leaf)) for leaf in leaves])


def actor_of(model):
    leaves = jax.tree.leaves(model.policy.state.params["actor"])
    return np.concatenate([np.ravel(np.asarray(leaf)) for leaf in leaves])


# ---- spaces

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
    ("vector", "multi discrete"),
    ("vector", "box 2-d"),
    ("vector", "float64"),
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


def test_a_policy_of_torch_is_refused_with_the_way_out():
    for policy in (ActorCriticPolicy, "torch", None, MlpPolicy):
        policy = PPO.policy_aliases["MlpPolicy"] if policy == "torch" else policy
        if policy is MlpPolicy:
            assert type(GRPO(policy, ENV, **SMALL).policy) is type(GRPO("MlpPolicy", ENV, **SMALL).policy)
        else:
            with pytest.raises(TypeError, match=r"policy=.*'MlpPolicy'.*derived from\s+sb3_bridge.MlpPolicy"):
                GRPO(policy, ENV, **SMALL)


# ---- learning on the host


@pytest.mark.parametrize(
    ("env", "dtype"),
    [
        (lambda: IdentityEnv(4), np.int64),
        (lambda: IdentityEnvMultiDiscrete(4), np.int64),
        (lambda: IdentityEnvMultiBinary(4), np.int8),
        (lambda: IdentityEnvBox(eps=0.5), np.float32),
    ],
)
def test_identity_is_learned(env, dtype):
    """What SB3's own tests demand of PPO: 90 of 100 in 20 episodes."""
    env = env()
    env.action_space.seed(0)
    model = GRPO(
        "MlpPolicy",
        env,
        n_steps=256,
        batch_size=64,
        gamma=0.4,
        learning_rate=3e-3,
        policy_kwargs={"net_arch": [32]},
        seed=1,
    )
    untrained = evaluate_policy(model, model.get_env(), n_eval_episodes=5, deterministic=False)[0]
    assert untrained < 60
    model.learn(3072)
    evaluate_policy(model, model.get_env(), n_eval_episodes=20, reward_threshold=90)
    action, _ = model.predict(env.reset()[0])
    assert np.shape(action) == np.shape(env.state) and action.dtype == dtype


def test_a_dict_of_one_vector_trains_as_the_vector_does():
    models = []
    for policy, wrapper in (("MlpPolicy", lambda env: env), ("MultiInputPolicy", DictOfOne)):
        env = DummyVecEnv([lambda wrapper=wrapper: wrapper(gym.make(ENV))] * 2)
        models.append(GRPO(policy, env, **SMALL, seed=3).learn(48))
    np.testing.assert_array_equal(actor_of(models[0]), actor_of(models[1]))
    np.testing.assert_array_equal(parameters_of(models[0]), parameters_of(models[1]))


# ---- rollouts on the host against SB3's own


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


def collected(model):
    """The trajectory of one rollout, as ``train`` would get it."""
    _, callback = model._setup_learn(model.n_steps * model.n_envs)
    assert model.collect_rollouts(model.get_env(), callback, None, model.n_steps)
    trajectory, structure = model._trajectory, model.policy.structure
    return trajectory.replace(
        distribution=structure.parameters(model.policy.state, trajectory.environments.observation)
    )


def episode_groups(model, trajectory):
    policy = model.policy
    batch, advantages = batches.compare_episodes(model._config(), policy.structure, policy.state, trajectory)
    return batch, np.asarray(advantages.advantage[:, 0]).reshape(model.n_steps, model.n_envs)


@pytest.mark.parametrize("reward", [None, centre])
def test_advantages_and_value_targets_are_those_of_ppo(reward):
    settings = {**SMALL, "n_steps": 40, "gamma": 0.9, "gae_lambda": 0.8, "seed": 5}
    model = GRPO("MlpPolicy", short_cartpole(), reward_function=reward, candidates="episodes", **settings)
    trajectory = collected(model)
    assert trajectory.truncated.any() and trajectory.terminated.any()
    assert not (trajectory.truncated & trajectory.terminated).any()
    assert not trajectory.ended[-1].all()  # what the rollout cuts is valued, too

    ppo = PPO("MlpPolicy", short_cartpole(reward), **settings, device="cpu")
    ppo.policy = Scripted(model.policy, trajectory.action)
    _, callback = ppo._setup_learn(120)
    buffer = ppo.rollout_buffer
    OnPolicyAlgorithm.collect_rollouts(ppo, ppo.get_env(), callback, buffer, ppo.n_steps)
    np.testing.assert_array_equal(buffer.observations, trajectory.environments.observation)
    np.testing.assert_array_equal(buffer.episode_starts[1:], trajectory.ended[:-1])
    # PPO adds the value of what a time limit cut to the reward, ours stays what was paid.
    plain = ~trajectory.truncated
    np.testing.assert_allclose(buffer.rewards[plain], trajectory.reward[plain], rtol=1e-6)

    batch, advantage = episode_groups(model, trajectory)
    shape = buffer.returns.shape
    np.testing.assert_allclose(np.reshape(batch.value, shape), buffer.values, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(np.reshape(batch.value_target, shape), buffer.returns, rtol=1e-4, atol=1e-5)
    theirs = (buffer.advantages - buffer.advantages.mean()) / buffer.advantages.std()
    np.testing.assert_allclose(advantage, theirs, rtol=1e-3, atol=1e-4)
    assert np.asarray(batch.alive).all()


def test_without_a_critic_episodes_are_compared_at_equal_times():
    model = GRPO(
        "MlpPolicy",
        short_cartpole(),
        reward_function=centre,
        candidates="episodes",
        bootstrap=False,
        **{**SMALL, "n_steps": 40},
        seed=5,
    )
    trajectory = collected(model)
    _, advantage = episode_groups(model, trajectory)
    returns = np.full((40, 3), np.nan)
    times = np.zeros((40, 3), int)
    for env in range(3):
        time, future = 0, np.nan
        for step in range(40):
            times[step, env] = time
            time = 0 if trajectory.ended[step, env] else time + 1
        for step in reversed(range(40)):
            future = 0.0 if trajectory.ended[step, env] else future
            future = returns[step, env] = trajectory.reward[step, env] + model.gamma * future
    deviation = np.zeros((40, 3))
    for time in np.unique(times):
        known = (times == time) & ~np.isnan(returns)
        if known.sum() > 1 and returns[known].std() > 1e-3:
            deviation[known] = returns[known] - returns[known].mean()
    assert np.isnan(returns).any() and np.count_nonzero(deviation) > 60
    expected = deviation / np.sqrt(np.mean(deviation[deviation != 0] ** 2))
    np.testing.assert_allclose(advantage, expected, rtol=1e-3, atol=1e-4)


# ---- kinds of environments

KINDS = {
    "id": lambda: ENV,
    "env": lambda: gym.make(ENV),
    "monitor": lambda: Monitor(gym.make(ENV)),
    "time limit": lambda: TimeLimit(gym.make(ENV), 5),
    "dummy": cartpole,
    "subproc": lambda: cartpole(env_class=functools.partial(SubprocVecEnv, start_method="forkserver")),
    "make_vec_env": lambda: make_vec_env(ENV, n_envs=2),
    "normalized": lambda: VecNormalize(cartpole()),
    "stacked": lambda: VecFrameStack(cartpole(), 2),
    "monitored": lambda: VecMonitor(cartpole()),
    "checked": lambda: VecCheckNan(cartpole(), raise_exception=True),
    "all": lambda: VecFrameStack(VecCheckNan(VecNormalize(VecMonitor(cartpole()))), 2),
    "gymnax on the host": lambda: make_vec_env("gymnax/CartPole-v1", n_envs=2),
    "gymnax normalized": lambda: VecNormalize(GymnaxVecEnv(ENV, 2)),
}


CHOSEN = {"stacked": "learned", "all": "episodes", "gymnax normalized": "episodes"}
"""Where no clones can be had."""


class Steps(BaseCallback):
    """Episode lengths, and the kinds of what SB3 shows to callbacks."""

    def __init__(self):
        super().__init__()
        self.lengths, self.kinds, self.truncations = [], set(), []

    def _on_step(self):
        names = ("new_obs", "rewards", "dones", "actions", "clipped_actions")
        self.kinds.add(tuple((n, self.locals[n].shape, self.locals[n].dtype.name) for n in names))
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
    chosen = CHOSEN.get(kind, "clone")
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
    if chosen == "clone":  # two actions of every state are followed, fewer steps where they end
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


@pytest.mark.parametrize("wrapped", [False, True])
def test_images_are_transposed_once(wrapped):
    env = DummyVecEnv([lambda: FakeImageEnv(screen_height=36, screen_width=36)] * 2)
    model = GRPO("CnnPolicy", VecTransposeImage(env) if wrapped else env, **SMALL)
    assert wrappers_of(model.get_env()) == [VecTransposeImage, DummyVecEnv]
    assert model.observation_space.shape == (1, 36, 36)


@pytest.mark.filterwarnings("ignore:The environment is already wrapped with a `Monitor`")
@pytest.mark.parametrize(
    ("env", "n_envs", "where"),
    [
        (lambda: "gymnax/CartPole-v1", 1, GymnaxVecEnv),
        (lambda: GymnaxVecEnv(ENV, 1), 1, GymnaxVecEnv),
        (lambda: GymnaxVecEnv(ENV, 3, seed=1), 3, GymnaxVecEnv),
        (lambda: VecMonitor(GymnaxVecEnv(ENV, 3)), 3, VecMonitor),
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
    assert not steps.lengths or all(type(length) is int for length in steps.lengths)
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


# ---- exchange of environments


def test_set_env_takes_and_refuses_what_ppo_does():
    errors = []
    for algorithm in (PPO, GRPO):
        model = algorithm("MlpPolicy", cartpole(), **SMALL, seed=0, device="cpu").learn(16)
        other = VecNormalize(cartpole())
        model.set_env(other)
        assert model.get_env() is other and model.get_vec_normalize_env() is other
        assert model._last_obs is None
        model.learn(16, reset_num_timesteps=False)
        assert model.num_timesteps == 32 and other.num_envs == 2
        last = model._last_obs
        model.set_env(other, force_reset=False)
        assert model._last_obs is last
        model.set_env(cartpole())
        assert model.get_vec_normalize_env() is None
        for env in (cartpole(3), gym.make(ENV), DummyVecEnv([lambda: gym.make("Pendulum-v1")] * 2), None):
            with pytest.raises(Exception) as caught:  # noqa: PT011
                model.set_env(env)
            errors.append(type(caught.value))
    assert errors[:4] == errors[4:]
    assert errors[:3] == [AssertionError, AssertionError, ValueError]


def test_set_env_between_host_and_device():
    model = GRPO("MlpPolicy", cartpole(), candidates="episodes", **SMALL, seed=0).learn(16)
    assert model.simulator_steps == 0
    model.candidates, model.horizon, model.branch_every = "auto", 1, 1
    envs = {
        "simulator": GymnaxVecEnv(ENV, 2),
        "episodes": VecNormalize(GymnaxVecEnv(ENV, 2)),
        "clone": VecNormalize(cartpole()),
    }
    expected = 0
    for kind, env in envs.items():
        model.set_env(env)
        assert model.chosen_dynamics == kind
        model.learn(16)
        expected += 0 if kind == "episodes" else 16 * 2
        assert model.simulator_steps == expected and model.num_timesteps == 16


# ---- the user's reward


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
    model = GRPO(policy, env, reward_function=reward, **SMALL, seed=0)
    calls.clear()
    for recorder in recorders:
        recorder.transitions.clear()
    trajectory = collected(model)
    (call,) = calls
    ended = trajectory.ended
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
    # It is what is learned from, and the statistics of episodes are not touched.
    np.testing.assert_array_equal(np.ravel(trajectory.reward), 0.25 * jax.tree.leaves(call[2])[-1][:, 0])


def test_frames_stacked_outside_of_vec_normalize_are_refused():
    env = VecFrameStack(VecNormalize(cartpole()), 2)
    model = GRPO("MlpPolicy", env, reward_function=lambda s, a, n: n[0], **SMALL)
    with pytest.raises(ValueError, match="put VecNormalize outside of VecFrameStack"):
        model.learn(16)


# Rewards without rounding, so that all forms train alike bit for bit.
FORMS = {
    "jax": lambda s, a, n: jnp.where(jnp.abs(n[2]) < 0.03, 1.0, 0.25 * a),
    "jax batched": lambda s, a, n: jnp.where(jnp.abs(n[:, 2]) < 0.03, 1.0, 0.25 * a),
    "numpy": lambda s, a, n: 1.0 if abs(float(n[2])) < 0.03 else 0.25 * float(a),
    "numpy batched": lambda s, a, n: np.where(np.abs(n[:, 2]) < 0.03, 1.0, 0.25 * a),
    "torch": lambda s, a, n: torch.where(torch.abs(n[2]) < 0.03, 1.0, 0.25 * a),
    "torch batched": lambda s, a, n: torch.where(torch.abs(n[:, 2:3]) < 0.03, 1.0, 0.25 * a[:, None]),
}


@pytest.mark.filterwarnings("ignore:The environment is already wrapped with a `Monitor`")
@pytest.mark.filterwarnings("ignore::grpo_jax.NoSpreadWarning")  # without a reward
@pytest.mark.parametrize(
    ("env", "branches", "forms"),
    [
        (cartpole, {}, tuple(FORMS)),
        (lambda: GymnaxVecEnv(ENV, 2), {"horizon": 2}, ("jax", "numpy batched", "torch")),
    ],
)
def test_all_forms_of_a_reward_train_alike_and_leave_the_statistics_alone(env, branches, forms):
    results, episodes = {}, {}
    for form in (None, *forms):
        reward = None if form is None else FORMS[form]
        model = GRPO("MlpPolicy", VecMonitor(env()), reward_function=reward, **branches, **SMALL, seed=2)
        if form is not None:
            assert (model._reward.framework, model._reward.takes_batch) == (
                form.split()[0],
                "batched" in form,
            )
        model.learn(16)
        results[form] = parameters_of(model)
        model.learn(48, reset_num_timesteps=False)
        episodes[form] = [(info["r"], info["l"]) for info in model.ep_info_buffer]
        assert episodes[form] and all(score == length for score, length in episodes[form])
    first = results[forms[0]]
    for form in forms[1:]:
        np.testing.assert_array_equal(results[form], first, err_msg=form)
    assert not np.array_equal(results[None], first)


@pytest.mark.parametrize(
    ("env", "branches"), [(cartpole, {}), (lambda: GymnaxVecEnv(ENV, 2), {"horizon": 2})]
)
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


# ---- one seed, one run

REPEATED = {
    "dummy": cartpole,
    "normalized": lambda: VecNormalize(cartpole()),
    "device": lambda: GymnaxVecEnv(ENV, 2),
    "normalized gymnax": lambda: VecNormalize(GymnaxVecEnv(ENV, 2)),
}


def trained(env, seed):
    branches = SIMULATED if isinstance(env, GymnaxVecEnv) else {}
    return GRPO("MlpPolicy", env, seed=seed, **branches, **SMALL).learn(48)


@pytest.mark.parametrize("kind", REPEATED)
def test_one_seed_one_run(kind, real_compiles):
    first, again, other, unseeded, unseeded_too = (
        trained(REPEATED[kind](), seed) for seed in (7, 7, 8, None, None)
    )
    np.testing.assert_array_equal(parameters_of(again), parameters_of(first))
    np.testing.assert_array_equal(again.key_words, first.key_words)
    np.testing.assert_array_equal(again._last_obs, first._last_obs)
    if "normalized" in kind:
        ours, theirs = (model.get_vec_normalize_env() for model in (first, again))
        np.testing.assert_array_equal(ours.obs_rms.var, theirs.obs_rms.var)
    observations = np.linspace(-1, 1, 40, dtype=np.float32).reshape(10, 4)
    np.testing.assert_array_equal(first.predict(observations)[0], again.predict(observations)[0])
    for one, two in ((first, other), (unseeded, unseeded_too), (first, unseeded)):
        assert not np.array_equal(actor_of(one), actor_of(two))
        assert not np.array_equal(one._last_obs, two._last_obs)


def test_processes_change_nothing(real_compiles):
    with_processes = trained(KINDS["subproc"](), 7)
    np.testing.assert_array_equal(parameters_of(with_processes), parameters_of(trained(cartpole(), 7)))
    with_processes.get_env().close()


# ---- every regime

REGIMES = {
    "kl": {"kl_coef": 0.1, "reference": "ema", "surrogate": "cispo", "n_rollouts": 2},
    "critic": {"bootstrap": True, "surrogate": "sapo", "clip_range_vf": 0.2},
    "target": {"kl_coef": 0.05, "kl_estimator": "k3", "surrogate": "tpo", "backup": "max", "n_rollouts": 3},
    "clip": {"clip_range_high": 0.4, "target_kl": 1e-9, "n_epochs": 5, "learning_rate": 0.1},
    "episodes": {"candidates": "episodes", "bootstrap": False, "kl_coef": 0.1, "n_steps": 32},
    "episodes with a critic": {"candidates": "episodes", "surrogate": "cispo", "target_kl": 0.5},
    "trajectory": {"candidates": "trajectory", "group_size": 2, "surrogate": "sapo", "n_steps": 32},
}
BRANCHED = ("kl", "critic", "target", "clip")


class Logs(BaseCallback):
    """What is logged, once an iteration."""

    def __init__(self):
        super().__init__()
        self.rows = []

    def _on_step(self):
        return True

    def _on_rollout_start(self):
        self.rows.append(dict(self.model.logger.name_to_value))


@pytest.mark.parametrize("regime", REGIMES)
def test_every_regime_runs_and_logs(regime):
    arguments = REGIMES[regime]
    branches = SIMULATED if regime in BRANCHED else {}
    model = GRPO("MlpPolicy", GymnaxVecEnv(ENV, 2), seed=0, **{**SMALL, **branches, **arguments})
    total = 4 * 2 * model.n_steps
    before, logs = actor_of(model), Logs()
    model.learn(total, callback=logs, log_interval=100)
    row = logs.rows[-1]
    assert all(np.isfinite(value) for name, value in row.items() if name != "train/explained_variance")
    expected = {
        "train/loss",
        "train/approx_kl",
        "train/clip_fraction",
        "train/entropy_loss",
        "train/n_updates",
    }
    expected |= {"train/policy_gradient_loss", "train/clip_range", "train/learning_rate"}
    expected |= {"grpo/group_spread", "grpo/frac_zero_std", "grpo/grad_norm", "grpo/simulator_steps"}
    critic = {"train/value_loss", "train/explained_variance"}
    assert expected <= set(row)
    assert critic <= set(row) if model.bootstrap else not critic & set(row)
    assert ("grpo/kl" in row) == ("kl_coef" in arguments)
    assert ("grpo/world_error" in row) == (regime in BRANCHED)
    assert ("train/clip_range_vf" in row) == ("clip_range_vf" in arguments)
    assert model.num_timesteps == total
    assert not np.array_equal(before, actor_of(model))
    if regime in BRANCHED:
        most = total * 2 * 2 * arguments.get("n_rollouts", 1)
        assert 0.85 * most < model.simulator_steps <= most
    else:
        assert model.simulator_steps == 0
    if "kl_coef" in arguments:
        assert logs.rows[1]["grpo/kl"] < row["grpo/kl"]
    n_minibatches = total // 8 * model.n_epochs
    if regime == "clip":  # stopped behind the first step of every iteration
        assert model._n_optimizer_steps < n_minibatches
    else:
        assert model._n_optimizer_steps == n_minibatches


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
