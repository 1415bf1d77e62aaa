"""What acting computes of images is not computed again by the update."""

import gymnasium
import numpy as np
import pytest
from gymnasium import spaces

from sb3_bridge import GRPO


class Pixels(gymnasium.Env):
    observation_space = spaces.Box(0, 255, (36, 36, 1), np.uint8)
    action_space = spaces.Discrete(3)

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.time = 0
        return self._seen(), {}

    def step(self, action):
        self.time += 1
        return self._seen(), float(action == 1), False, self.time >= 5, {}

    def _seen(self):
        return self.np_random.integers(0, 256, (36, 36, 1), np.uint8)


@pytest.mark.parametrize("shares", [True, False])
def test_distribution_and_value_are_those_of_the_policy_that_acted(shares, monkeypatch):
    kept = []
    train = GRPO.train
    monkeypatch.setattr(GRPO, "train", lambda model: (kept.append(model._trajectory), train(model))[1])
    kwargs = {"share_features_extractor": shares, "features_extractor_kwargs": {"features_dim": 8}}
    model = GRPO(
        "CnnPolicy",
        Pixels(),
        n_steps=12,
        batch_size=12,
        n_epochs=1,
        candidates="episodes",
        policy_kwargs=kwargs,
    )
    structure, before = model.policy.structure, model.policy.state
    model.learn(12)
    (trajectory,) = kept
    expected = structure.parameters(before, trajectory.observation)
    np.testing.assert_allclose(trajectory.distribution, expected, rtol=1e-4, atol=1e-5)
    assert (trajectory.value is not None) == shares
    if shares:
        expected = structure.value(before, trajectory.observation)
        np.testing.assert_allclose(trajectory.value, expected, rtol=1e-4, atol=1e-5)


def test_vectors_are_cheaper_to_compute_at_once():
    model = GRPO("MlpPolicy", "CartPole-v1", n_steps=8, batch_size=8, candidates="episodes")
    callback = model._setup_learn(8)[1]
    callback.on_training_start({}, {})
    model.collect_rollouts(model.env, callback, model.rollout_buffer, 8)
    assert model._trajectory.distribution is None and model._trajectory.value is None
