"""What comes out of a VecEnv: checked where it comes in, whatever gave it."""

import numpy as np
import pytest
from gymnasium import spaces
from sb3.tracks import Track
from stable_baselines3 import PPO
from stable_baselines3.common.vec_env import DummyVecEnv, SubprocVecEnv, VecEnvWrapper, VecNormalize

from sb3_bridge import GRPO

SMALL = {"n_steps": 16, "batch_size": 16, "n_epochs": 1, "policy_kwargs": {"net_arch": [8]}, "seed": 0}


class Changed(VecEnvWrapper):
    """Passes what ``change(observation, rewards, dones, infos)`` makes of a step."""

    def __init__(self, venv, change):
        super().__init__(venv)
        self.change = change

    def reset(self):
        return self.venv.reset()

    def step_wait(self):
        return self.change(*self.venv.step_wait())


def tracks(n=2, **arguments):
    return DummyVecEnv([lambda: Track(**arguments)] * n)


@pytest.mark.parametrize("field", ["observation", "reward"])
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_numbers_that_are_not_finite_are_an_error_where_they_come_in(field, value):
    env = DummyVecEnv([Track, lambda: Track(field, value)])
    model = GRPO("MlpPolicy", env, candidates="episodes", **SMALL)
    with pytest.raises(ValueError, match=rf"found invalid values at step 6 .*{field} of environment 1 is"):
        model.learn(16)


def test_the_last_observation_of_an_episode_is_checked_where_somebody_looks_at_it():
    env = tracks(1, field="observation", bad_at=5)  # the time limit cuts there
    with pytest.raises(ValueError, match="last observation .*nan"):
        GRPO("MlpPolicy", env, candidates="episodes", **SMALL).learn(16)


def test_the_first_observation_is_checked_too():
    class Broken(Track):
        def reset(self, **arguments):
            return super().reset(**arguments)[0] * np.float32(np.nan), {}

    with pytest.raises(ValueError, match="at the start of the rollout"):
        GRPO("MlpPolicy", DummyVecEnv([Broken]), candidates="episodes", **SMALL).learn(16)


def parameters(env, **settings):
    model = GRPO("MlpPolicy", env, candidates="episodes", **SMALL, **settings).learn(32)
    return np.concatenate([leaf.numpy().ravel() for leaf in model.policy.state_dict().values()])


REUSED = np.zeros((2, 2), np.float32)


def reuse(observation, *rest):
    REUSED[:] = observation
    return REUSED, *rest


SAME = {
    "dones uint8": lambda o, r, d, i: (o, r, d.astype(np.uint8), i),
    "dones list": lambda o, r, d, i: (o, r, d.tolist(), i),
    "rewards float64": lambda o, r, d, i: (o, r.astype(np.float64), d, i),
    "rewards list": lambda o, r, d, i: (o, r.tolist(), d, i),
    "infos tuple": lambda o, r, d, i: (o, r, d, tuple(i)),
    "buffer reused": reuse,
}


@pytest.mark.parametrize("change", SAME)
def test_other_forms_of_the_same_step_train_alike(change):
    """dones of SuperSuit are uint8; a VecEnv may return the same buffer at every step."""
    np.testing.assert_array_equal(parameters(Changed(tracks(), SAME[change])), parameters(tracks()))


WRONG = {
    "rewards": lambda o, r, d, i: (o, r[:, None], d, i),
    "dones": lambda o, r, d, i: (o, r, d[:1], i),
    "observation": lambda o, r, d, i: (o[:, :1], r, d, i),
}


@pytest.mark.parametrize("field", WRONG)
def test_wrong_shapes_are_refused_by_name(field):
    with pytest.raises(ValueError, match=rf"(?i){field}.*shape|shape.*{field}"):
        GRPO("MlpPolicy", Changed(tracks(), WRONG[field]), candidates="episodes", **SMALL).learn(16)


class Longer(VecEnvWrapper):
    """Adds a feature, and leaves the last observations of episodes as they were."""

    def __init__(self, venv):
        super().__init__(venv, spaces.Box(-np.inf, np.inf, (3,), np.float32))

    def _more(self, seen):
        return np.concatenate([seen, seen[:, :1] ** 2], axis=1)

    def reset(self):
        return self._more(self.venv.reset())

    def step_wait(self):
        seen, *rest = self.venv.step_wait()
        return self._more(seen), *rest


def test_last_observations_of_another_shape_are_refused_where_a_critic_asks_for_them():
    with pytest.raises(ValueError, match=r"terminal_observation.*\(2,\).*please use \(3,\)"):
        GRPO("MlpPolicy", Longer(tracks()), candidates="episodes", **SMALL).learn(16)


def test_last_observations_of_another_shape_are_of_no_interest_after_a_termination():
    class Ending(Track):
        def step(self, action):
            observation, reward, _, over, info = super().step(action)
            return observation, reward, over, False, info

    env = lambda: Longer(DummyVecEnv([Ending] * 2))
    for algorithm, more in ((PPO, {}), (GRPO, {"candidates": "episodes"})):
        assert algorithm("MlpPolicy", env(), **SMALL, **more).learn(32).num_timesteps == 32
    with pytest.raises(ValueError, match="terminal_observation"):
        GRPO("MlpPolicy", env(), candidates="episodes", reward_function=lambda s, a, n: n[0], **SMALL).learn(
            32
        )


class Rescaling(Track):
    """Writes into the action that it is given."""

    action_space = spaces.Box(-1, 1, (1,), np.float32)

    def step(self, action):
        action *= 100.0
        return super().step(action[0] / 100.0)


@pytest.mark.parametrize("vec_env", [DummyVecEnv, SubprocVecEnv])
def test_an_env_that_writes_into_its_actions_changes_nothing_for_others(vec_env):
    """The reward function sees the action that was taken, in this process and in others."""
    seen = []

    def reward(state, action, next_state):
        seen.append(np.array(action))
        return np.float32(0.0)

    env = vec_env([Rescaling] * 2)
    GRPO("MlpPolicy", env, candidates="episodes", reward_function=reward, **SMALL).learn(16)
    env.close()
    assert np.abs(np.concatenate([action.ravel() for action in seen])).max() <= 1


def test_what_vec_normalize_hides_is_shown_to_a_reward_function():
    seen = []

    def reward(state, action, next_state):
        seen.append(np.array([state, next_state]).reshape(2, -1, 2))
        return np.zeros(np.shape(next_state)[:-1], np.float32)

    env = VecNormalize(tracks())
    GRPO("MlpPolicy", env, candidates="episodes", reward_function=reward, **SMALL).learn(16)
    states, reached = seen[-1]  # one call for the whole rollout
    inside = reached[:, 0] < 5  # VecNormalize gives the last ones back with a rounding error
    np.testing.assert_array_equal(states[inside, 0] + 1, reached[inside, 0])
    assert (states[:, 1] == 0.5).all()
