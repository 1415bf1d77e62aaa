"""Numbers that nothing can be learned from, at each stage: an error that says where, and a model that stays as it was."""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np
import pytest
from sb3.contract import FIXED, ROLLOUT, flat, make, venv
from stable_baselines3.common.vec_env import VecEnvWrapper, VecNormalize

from sb3_bridge import GRPO

BAD = [float("nan"), float("inf"), -1e30]


class Spoiled(VecEnvWrapper):
    """Gives a bad number for its second environment, once, in the second rollout."""

    def __init__(self, env, field, value):
        super().__init__(env)
        self.field, self.value, self.left = field, value, ROLLOUT // 2 + 5

    def reset(self):
        return self.venv.reset()

    def step_wait(self):
        observation, reward, dones, infos = self.venv.step_wait()
        observation, reward = np.array(observation), np.array(reward)
        self.left -= 1
        if self.left == 0:
            {"the observation": observation, "reward": reward}[self.field][1] = self.value
        return observation, reward, dones, infos


@pytest.mark.filterwarnings("ignore:(invalid value|overflow) encountered")  # in VecNormalize
@pytest.mark.parametrize("value", BAD)
@pytest.mark.parametrize("field", ["the observation", "reward"])
@pytest.mark.parametrize("wrap", [lambda env: env, VecNormalize], ids=["bare", "normalized"])
def test_of_environments(value, field, wrap):
    env = wrap(Spoiled(venv("host"), field, value))
    model = make(GRPO, "host", env=env, candidates="episodes", bootstrap=True)
    model.learn(ROLLOUT)
    before = flat(model)
    message = (
        f"iteration 2: found invalid values at step 4 .*{field} of environment 1 is .*keeps the parameters"
    )
    with pytest.raises(ValueError, match=message):
        model.learn(ROLLOUT, reset_num_timesteps=False)
    np.testing.assert_array_equal(flat(model), before)
    if wrap is VecNormalize:
        for one in (env.obs_rms, env.ret_rms):
            assert np.all(np.abs(one.mean) < 100) and np.all(one.var < 1e4)
    model.learn(ROLLOUT)  # the run may go on
    assert np.isfinite(flat(model)).all() and np.any(flat(model) != before)


def spoiling(value):
    """Bad for a state that only some episodes come to."""

    def reward(state, action, next_state):
        return jnp.where(next_state[..., 0] == 2, value, next_state[..., 0])

    return reward


@pytest.mark.parametrize("value", BAD)
@pytest.mark.parametrize(
    ("kind", "settings", "where"),
    [
        (
            "host",
            {"candidates": "episodes", "bootstrap": True},
            r"(environment \d at step \d|next_state=\[2)",
        ),
        ("host", {"dynamics": "clone"}, r"(environment \d (at|from) step \d|next_state=\[2)"),
        ("device", {}, r"(reward of environment \d at step \d|groups had a return)"),
    ],
    ids=["episodes", "clones", "simulator"],
)
def test_of_reward_functions(value, kind, settings, where):
    model = make(GRPO, kind, FIXED, reward_function=spoiling(value), **settings)
    before = flat(model)
    with pytest.raises(
        (FloatingPointError, ValueError), match=rf"iteration \d+: .*{where}.*keeps the parameters"
    ):
        model.learn(4 * ROLLOUT)
    np.testing.assert_array_equal(flat(model), before)


@pytest.mark.parametrize("kind", ["host", "device"])
def test_of_an_update_that_runs_away(kind):
    model = make(GRPO, kind, learning_rate=1e38, max_grad_norm=1e38, n_epochs=4)
    with pytest.raises(FloatingPointError, match=r"iteration \d+: .*keeps the parameters"):
        model.learn(6 * ROLLOUT)
    assert np.isfinite(flat(model)).all()
