"""``learn``: what is trained, for how long, and what is shown of it; PPO is the oracle."""

import gymnasium as gym
import jax.numpy as jnp
import numpy as np
import pytest
from sb3.contract import (
    ENV,
    N_STEPS,
    ROLLOUT,
    Recorder,
    actor_of,
    cartpole,
    log_of,
    make,
    on_both,
    parameters_of,
    weights,
)
from stable_baselines3 import PPO
from stable_baselines3.common.callbacks import (
    ProgressBarCallback,
)
from stable_baselines3.common.envs import (
    IdentityEnv,
    IdentityEnvBox,
    IdentityEnvMultiBinary,
    IdentityEnvMultiDiscrete,
)
from stable_baselines3.common.evaluation import evaluate_policy
from stable_baselines3.common.vec_env import (
    DummyVecEnv,
    SubprocVecEnv,
    VecNormalize,
)

from sb3_bridge import GRPO, WorldVecEnv


@on_both
def test_total_timesteps_is_a_lower_bound_in_whole_rollouts(kind):
    counts = {}
    for algorithm in (PPO, GRPO):
        model, counts[algorithm] = make(algorithm, kind), []
        for total, resets in [
            (1, True),
            (32, True),
            (33, True),
            (32, False),
            (1, False),
            (0, False),
            (31, True),
        ]:
            assert model.learn(total, reset_num_timesteps=resets) is model
            counts[algorithm].append((model.num_timesteps, model._total_timesteps, model._n_updates))
    assert [count[0] for count in counts[GRPO]] == [32, 32, 64, 96, 128, 128, 32]
    assert counts[GRPO] == counts[PPO]


@on_both
def test_nothing_to_do_asks_nothing_of_the_env(kind):
    events = []
    for algorithm in (PPO, GRPO):
        recorder, model = Recorder(), make(algorithm, kind)
        before = weights(model)
        model.learn(0, recorder)
        np.testing.assert_array_equal(weights(model), before)
        events.append(recorder.events)
    assert events[0] == events[1] == [("training_start", 0, 0, 0), ("training_end", 0, 0, 0)]


@on_both
@pytest.mark.parametrize("interval", [2, None])
def test_log_interval(kind, interval):
    logs = [log_of(make(algorithm, kind), 3 * ROLLOUT, log_interval=interval) for algorithm in (PPO, GRPO)]
    what = [
        [(row["time/iterations"], row["time/total_timesteps"], row["step"]) for row in rows] for rows in logs
    ]
    expected = [(i, i * ROLLOUT, i * ROLLOUT) for i in (1, 2, 3) if interval and i % interval == 0]
    assert what[0] == what[1] == expected


@on_both
def test_runs_have_names_and_numbers_in_tensorboard(kind, tmp_path):
    for algorithm in (PPO, GRPO):
        model = make(algorithm, kind, tensorboard_log=str(tmp_path / algorithm.__name__))
        model.learn(ROLLOUT)
        model.learn(ROLLOUT, reset_num_timesteps=False)
        model.learn(ROLLOUT)
        model.learn(ROLLOUT, tb_log_name="other")
        model.logger.close()
    folders = [sorted(path.name for path in (tmp_path / name).iterdir()) for name in ("PPO", "GRPO")]
    assert folders[1] == ["GRPO_1", "GRPO_2", "other_1"]
    assert folders[1] == [name.replace("PPO", "GRPO") for name in folders[0]]
    files = [len(list((tmp_path / name / f"{name}_1").iterdir())) for name in ("PPO", "GRPO")]
    assert files == [2, 2]  # the continued run is in its folder


@pytest.mark.filterwarnings("ignore::tqdm.TqdmExperimentalWarning")
@on_both
def test_progress_bar_moves_and_ends_full(kind, capsys):
    bars = []
    for algorithm in (PPO, GRPO):
        callback, model = ProgressBarCallback(), make(algorithm, kind)
        model.learn(2 * ROLLOUT, callback)
        bars.append((callback.pbar.n, callback.pbar.total))
        model.learn(ROLLOUT, callback, reset_num_timesteps=False)
        bars.append((callback.pbar.n, callback.pbar.total))
    assert bars[2:] == bars[:2] == [(2 * ROLLOUT, 2 * ROLLOUT), (ROLLOUT, ROLLOUT)]
    capsys.readouterr()
    recorder = Recorder()
    make(GRPO, kind).learn(ROLLOUT, recorder, progress_bar=True)
    assert len(recorder.steps) == N_STEPS
    captured = capsys.readouterr()
    assert "100%" in captured.out + captured.err and "32/32" in captured.out + captured.err


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
        dynamics="clone",
        horizon=4,
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


SMALL = {"n_steps": 8, "batch_size": 8, "n_epochs": 1, "policy_kwargs": {"net_arch": [8]}}


def lean(state, action, next_state):
    """Tells the actions of CartPole apart within two steps."""
    return 1 - jnp.abs(next_state[2]) - 0.1 * jnp.abs(next_state[0])


SIMULATED = {"horizon": 2, "reward_function": lean}


REPEATED = {
    "dummy": cartpole,
    "normalized": lambda: VecNormalize(cartpole()),
    "device": lambda: WorldVecEnv(ENV, 2),
    "normalized gymnax": lambda: VecNormalize(WorldVecEnv(ENV, 2)),
}


def trained(env, seed):
    branches = SIMULATED if isinstance(env, WorldVecEnv) else {}
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
    with_processes = trained(cartpole(env_class=SubprocVecEnv), 7)
    np.testing.assert_array_equal(parameters_of(with_processes), parameters_of(trained(cartpole(), 7)))
    with_processes.get_env().close()


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
        "simulator": WorldVecEnv(ENV, 2),
        "episodes": VecNormalize(WorldVecEnv(ENV, 2)),
        "twin": VecNormalize(cartpole()),
    }
    expected = 0
    for kind, env in envs.items():
        model.set_env(env)
        assert model.chosen_dynamics == kind
        model.learn(16)
        expected += 0 if kind == "episodes" else 16 * 2
        assert model.simulator_steps == expected and model.num_timesteps == 16
